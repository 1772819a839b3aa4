"""What people write is found: paths that exist, names on a hub, revisions and folders given apart."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import lorahub
from lorahub.errors import InvalidRef, NotFound, UsageError
from lorahub.fetching import as_ref
from lorahub.files.writer import save_file


def adapter(folder: Path, value: float = 1.0) -> Path:
    folder.mkdir(parents=True)
    tensors = {f"base_model.model.q.lora_{slot}.weight": torch.full((2, 2), value) for slot in "AB"}
    save_file(folder / "adapter_model.safetensors", tensors, {"format": "pt"})
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 2}))
    return folder


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LORAHUB_CACHE", str(tmp_path / "cache"))


def test_a_path_that_exists_is_a_path_also_where_it_could_be_a_name() -> None:
    assert as_ref("acme/ink").repo == "acme/ink"
    adapter(Path("acme/ink"))
    assert as_ref("acme/ink").path == "./acme/ink"
    assert as_ref("mine=acme/ink:0.5").weight == 0.5
    assert as_ref("my-own=acme/ink:0.5").name == "my-own"
    assert as_ref("my-own=acme/ink:0.5").path == "./acme/ink"
    assert as_ref("acme/ink@1.0").repo == "acme/ink"  # no such path: the selector makes it a name


def test_an_absolute_path_is_not_looked_for_below_this_folder(tmp_path: Path) -> None:
    inner = adapter(Path(f".{tmp_path}/elsewhere"))
    assert inner.exists()
    assert as_ref(f"{tmp_path}/elsewhere").path == f"{tmp_path}/elsewhere"
    assert as_ref(f"ink={tmp_path}/elsewhere").path == f"{tmp_path}/elsewhere"


def test_a_path_that_ends_as_if_in_a_weight_is_taken_whole_where_it_exists(tmp_path: Path) -> None:
    for place in ("runs/num:0.5", "run_12:30"):
        adapter(Path(place))
        for typed in (place, f"./{place}", f"{tmp_path}/{place}", f"ink={place}", f"ink={tmp_path}/{place}"):
            found = as_ref(typed)
            assert (found.local, found.weight) == (Path(found.path or ""), None)
            assert Path(found.path or "").samefile(tmp_path / place)
            assert as_ref(str(found)) == found
    assert lorahub.load("runs/num:0.5").deltas
    assert as_ref("run_12:30:0.8").weight == 0.8
    Path("run_12").mkdir()
    assert (as_ref("run_12:30").path, as_ref("run_12:7").weight) == ("./run_12:30", 7.0)


def test_the_home_folder_is_looked_into_for_such_paths_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    adapter(tmp_path / "num:0.5")
    assert as_ref("~/num:0.5").local == tmp_path / "num:0.5"


@pytest.mark.parametrize("weight", ["abc", "nan", "inf", "1e999", "", "0,5"])
def test_what_is_no_weight_is_said_to_be_none(weight: str, tmp_path: Path) -> None:
    adapter(Path("ok"))
    for place in ("ok", "./ok", str(tmp_path / "ok"), "ink=ok"):
        with pytest.raises(InvalidRef, match=rf"'{weight}' is no weight") as caught:
            as_ref(f"{place}:{weight}")
        assert f"{place.removeprefix('./')}:0.8" in caught.value.hint
    assert issubclass(InvalidRef, UsageError)


def test_a_colon_in_an_address_or_after_a_drive_is_no_weight() -> None:
    Path("C").mkdir()
    Path("https").mkdir()
    assert as_ref("C:/models/ink").path == "C:/models/ink"
    assert as_ref("https://huggingface.co/acme/ink").repo == "acme/ink"
    assert as_ref("./nowhere:abc").path == "./nowhere:abc"


def test_an_over_long_name_is_a_malformed_reference_and_no_failure_of_the_disk() -> None:
    with pytest.raises(InvalidRef):
        as_ref("acme/" + "x" * 400)


def test_one_word_that_is_no_path_is_not_found_rather_than_misspelt() -> None:
    with pytest.raises(NotFound, match="called nowhere"):
        as_ref("nowhere")
    with pytest.raises(InvalidRef):
        as_ref("a/b/../c")


def test_bases_of_old_have_names_without_a_namespace() -> None:
    assert as_ref("gpt2", bare=True).repo == "gpt2"


def value(loaded: lorahub.Adapter) -> float:
    low = next(iter(loaded.deltas.values())).low_rank()
    assert low is not None
    return float(low.up[0, 0])


def test_a_subfolder_may_be_given_apart_from_a_local_folder() -> None:
    adapter(Path("many/one"), 1.0)
    adapter(Path("many/two"), 2.0)
    assert value(lorahub.load("./many", subfolder="two")) == 2.0


def test_a_revision_may_be_given_apart_from_a_name(tmp_path: Path) -> None:
    hub = str(tmp_path / "hub")
    for number, version in enumerate(("1.0.0", "1.1.0"), start=1):
        folder = adapter(tmp_path / version, float(number))
        base = tmp_path / "base.safetensors"
        save_file(base, {"q.weight": torch.ones(2, 2)})
        lorahub.record(folder, base, license="mit", name="ink")
        lorahub.push(folder, "acme/ink", version=version, hub=hub)
    assert value(lorahub.load("acme/ink", hub=hub)) == 2.0
    assert value(lorahub.load("acme/ink", revision="1.0.0", hub=hub)) == 1.0
    with pytest.raises(UsageError, match=r"selects 1\.1 already"):
        lorahub.load("acme/ink@1.1", revision="1.0.0", hub=hub)
    with pytest.raises(UsageError, match="no revisions"):
        lorahub.load("./1.0.0", revision="1.0.0")


def test_a_live_base_is_read_as_a_part_of_a_pipeline_as_its_files_are(tmp_path: Path) -> None:
    """What a conversion calls the part is no name of the model itself."""

    class Net(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            generator = torch.Generator().manual_seed(3)
            self.norm1, self.conv1 = torch.nn.LayerNorm(6), torch.nn.Linear(6, 6)
            for each in self.parameters():
                each.data = torch.randn(each.shape, generator=generator)

    model = Net()
    (tmp_path / "base").mkdir()
    save_file(tmp_path / "base" / "model.safetensors", dict(model.state_dict()), {})
    tensors = {
        "lora_unet_norm1.w_norm": torch.full((6,), 0.5),
        "lora_unet_norm1.b_norm": torch.full((6,), 0.25),
        "lora_unet_conv1.lora_down.weight": torch.ones(2, 6),
        "lora_unet_conv1.lora_up.weight": torch.ones(6, 2),
        "lora_unet_conv1.alpha": torch.tensor(2.0),
    }
    tensors |= {key.replace("unet_conv1", "te_fc"): each for key, each in tensors.items() if "conv1" in key}
    save_file(tmp_path / "x.safetensors", tensors, {})
    for name, base in (("live", model), ("files", tmp_path / "base")):
        lorahub.convert(tmp_path / "x.safetensors", "peft", tmp_path / name, base=base, component="unet")
    file = "adapter_model.safetensors"
    written = load_file(tmp_path / "live" / file)
    assert torch.equal(written["base_model.model.norm1.weight"], model.norm1.weight + 0.5)
    assert (tmp_path / "live" / file).read_bytes() == (tmp_path / "files" / file).read_bytes()
