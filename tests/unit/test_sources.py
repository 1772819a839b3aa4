"""What people write is found: paths that exist, names on a hub, revisions and folders given apart."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import lorahub
from lorahub.errors import InvalidRef, NotFound, UsageError
from lorahub.files.writer import save_file
from lorahub.sources import as_ref


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
