"""Base indices as values, bases surveyed from disk, frameworks chosen, weights hashed once."""

from __future__ import annotations

import hashlib
import json
import os
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lorahub.bases import weights as weights_module
from lorahub.bases.framework import BaseFiles
from lorahub.bases.index import BaseIndex, BaseRef, ParameterInfo, natural, structure_digest
from lorahub.bases.open import index_base, index_live, survey_base, weights_digest
from lorahub.bases.torch_module import TorchModule
from lorahub.errors import (
    HeaderError,
    IntegrityError,
    NotFound,
    UnsupportedFormat,
    UsageError,
)
from lorahub.findings import Claim


def index_of(*names: str, **fields) -> BaseIndex:
    parameters = {name: ParameterInfo(shape=(2, 3), dtype="F32", stored_as=name) for name in names}
    return BaseIndex(ref=BaseRef(), framework="torch", parameters=parameters, **fields)


def test_natural_order_counts():
    assert sorted(["h.10.w", "h.2.w", "h.w", "a"], key=natural) == ["a", "h.2.w", "h.10.w", "h.w"]


def test_the_structure_digest_depends_on_names_and_shapes_alone():
    one = index_of("a.weight", "b.weight")
    other_dtype = replace(
        one, parameters={name: replace(info, dtype="BF16") for name, info in one.parameters.items()}, weights="sha256:0"
    )
    assert other_dtype.structure == one.structure
    assert index_of("b.weight", "a.weight").structure == one.structure
    assert index_of("a.weight", "c.weight").structure != one.structure
    assert structure_digest([("a.weight", (3, 2)), ("b.weight", (2, 3))]) != one.structure


def test_the_targets_digest_leaves_out_what_the_base_lacks():
    index = index_of("a.weight", "b.weight")
    assert index.targets(["a.weight", "z.weight"]) == index.targets(["a.weight"]) != index.targets(["b.weight"])


def test_modules_list_their_parameters_and_tied_names_too():
    index = index_of("h.2.bias", "h.10.bias", "emb.weight", tied=(("emb.weight", "head.weight"),))
    assert list(index.modules()) == ["emb", "h.2", "h.10", "head"]
    assert index.stored("head.weight") == "emb.weight"
    assert index.stored("h.2.bias") == "h.2.bias"
    assert index.tied_with("emb.weight") == ("head.weight",)


def test_spellings_follow_aliases():
    index = index_of("bert.pooler.weight", aliases=(("bert.", ""), ("bert.pooler.", "old.pool.")))
    assert index.spellings("bert.pooler") == ("bert.pooler", "pooler", "old.pool")
    assert index.spellings("bert") == ("bert", "")
    assert index.spellings("berta") == ("berta",)


# Surveys ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    base = tmp_path / "base"
    base.mkdir()
    save_file({"a.weight": torch.zeros(2, 3), "b.weight": torch.zeros(3)}, base / "model.safetensors")
    (base / "config.json").write_text('{"model_type": "mine"}')
    (base / "tokenizer.json").write_text("{}")
    return base


def shard(folder: Path) -> Path:
    (folder / "model.safetensors").unlink()
    save_file({"a.weight": torch.zeros(2, 3)}, folder / "model-00001-of-00002.safetensors")
    save_file({"b.weight": torch.zeros(3)}, folder / "model-00002-of-00002.safetensors")
    weight_map = {f"{name}.weight": f"model-0000{n}-of-00002.safetensors" for n, name in ((1, "a"), (2, "b"))}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def test_a_survey_lists_headers_configs_and_everything_else(folder):
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text("{}")
    (folder / ".git").mkdir()
    (folder / ".git" / "HEAD").write_text("ref")
    files = survey_base(folder)
    assert set(files.tensors) == {"a.weight", "b.weight"}
    assert files.config == {"model_type": "mine"}
    assert files.others == ("1_Pooling/config.json", "tokenizer.json")


def test_shards_and_one_file_give_the_same_index(folder):
    single = TorchModule().index(BaseRef(), survey_base(folder))
    assert TorchModule().index(BaseRef(), survey_base(shard(folder))) == single


def test_a_single_file_is_a_base_with_the_configs_beside_it(folder):
    save_file({"c.weight": torch.zeros(1)}, folder / "other.safetensors")
    files = survey_base(folder / "other.safetensors")
    assert list(files.headers) == ["other.safetensors"]
    assert files.config == {"model_type": "mine"}


def test_an_index_may_be_named(folder):
    assert len(survey_base(shard(folder) / "model.safetensors.index.json").headers) == 2


def test_a_missing_shard_is_named(folder):
    (shard(folder) / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(NotFound, match="model-00002"):
        survey_base(folder)


def test_an_index_that_disagrees_with_its_shards_is_refused(folder):
    save_file({"z.weight": torch.zeros(3)}, shard(folder) / "model-00002-of-00002.safetensors")
    with pytest.raises(IntegrityError, match=r"z\.weight|b\.weight"):
        survey_base(folder)


def test_nothing_there_says_so(tmp_path):
    with pytest.raises(NotFound, match="nowhere"):
        survey_base(tmp_path / "nowhere")


def test_pickled_weights_are_refused_with_a_way_out(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(UnsupportedFormat, match="pickle") as raised:
        survey_base(folder)
    assert "save_pretrained" in raised.value.hint
    with pytest.raises(UnsupportedFormat):
        survey_base(folder / "pytorch_model.bin")


def test_weights_in_a_subfolder_are_pointed_at(folder):
    (folder / "unet").mkdir()
    (folder / "model.safetensors").rename(folder / "unet" / "diffusion_pytorch_model.safetensors")
    with pytest.raises(UnsupportedFormat) as raised:
        survey_base(folder)
    assert raised.value.hint.endswith("unet")


def test_an_adapter_is_no_base(folder):
    (folder / "model.safetensors").rename(folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(UnsupportedFormat, match="adapter"):
        survey_base(folder)


def test_several_weights_files_without_a_usual_name_are_not_chosen_from(folder):
    (folder / "model.safetensors").rename(folder / "a.safetensors")
    assert list(survey_base(folder).headers) == ["a.safetensors"]
    save_file({"c.weight": torch.zeros(1)}, folder / "b.safetensors")
    with pytest.raises(UnsupportedFormat, match=r"a\.safetensors, b\.safetensors"):
        survey_base(folder)


def test_an_empty_folder_says_what_was_looked_for(tmp_path):
    with pytest.raises(UnsupportedFormat, match=r"model\.safetensors"):
        survey_base(tmp_path)


@pytest.mark.parametrize("text", ["", "[]", "{", '{"a": ' + "[" * 100_000, "\xff"])
def test_a_config_that_is_no_object_is_one_typed_error(folder, text):
    (folder / "config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(IntegrityError, match=r"config\.json"):
        survey_base(folder)


def test_a_config_too_large_to_be_one_is_not_parsed(folder):
    (folder / "config.json").write_text('{"a": "' + "x" * (5 << 20) + '"}')
    with pytest.raises(IntegrityError, match="limit"):
        survey_base(folder)


def test_a_damaged_weights_file_is_a_header_error(folder):
    with (folder / "model.safetensors").open("r+b") as file:
        file.truncate(40)
    with pytest.raises(HeaderError):
        survey_base(folder)


# Frameworks ------------------------------------------------------------------------------------------------------


class Fake(TorchModule):
    def __init__(self, name: str, score: float | None) -> None:
        self.name = name
        self.score = score

    def claims(self, files: BaseFiles) -> Claim | None:
        return None if self.score is None else Claim(self.score, f"{self.name} says so")

    def claims_model(self, model) -> Claim | None:
        return self.claims(model)


def named(*fakes: Fake) -> dict[str, Fake]:
    return {fake.name: fake for fake in fakes}


def test_the_surest_framework_wins_whatever_the_order(folder):
    frameworks = named(Fake("a", 0.1), Fake("b", 0.9), Fake("c", None))
    chosen, index = index_base(survey_base(folder), BaseRef(), frameworks, weights="sha256:1")
    assert (chosen.name, index.framework, index.weights) == ("b", "b", "sha256:1")
    assert index_live(torch.nn.Linear(1, 1), frameworks)[0].name == "b"


def test_equal_claims_are_an_error_that_names_both(folder):
    with pytest.raises(UnsupportedFormat, match="a and b claim") as raised:
        index_base(survey_base(folder), BaseRef(), named(Fake("b", 0.5), Fake("a", 0.5), Fake("c", 0.1)))
    assert "LORAHUB_DISABLE_PLUGINS" in raised.value.hint


def test_no_claim_is_an_error(folder):
    with pytest.raises(UnsupportedFormat, match="no framework"):
        index_base(survey_base(folder), BaseRef(), named(Fake("a", None)))


def test_a_live_base_is_a_module():
    with pytest.raises(UsageError, match="dict"):
        index_live({}, named(Fake("a", 0.5)))


# The weights digest ----------------------------------------------------------------------------------------------


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("LORAHUB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def settle(folder: Path, seconds: int = 60) -> None:
    """Give the files an age at which their time stamps tell changes apart."""
    then = time.time() - seconds
    for path in folder.glob("*.safetensors"):
        os.utime(path, (then, then))


def test_the_weights_digest_is_over_hash_size_and_name_of_each_file(folder, cache):
    shard(folder)
    lines = ""
    for path in sorted(folder.glob("*.safetensors")):
        data = path.read_bytes()
        lines += f"{hashlib.sha256(data).hexdigest()} {len(data)} {path.name}\n"
    assert weights_digest(survey_base(folder)) == "sha256:" + hashlib.sha256(lines.encode()).hexdigest()


def test_a_base_is_hashed_once(folder, cache, monkeypatch):
    settle(folder)
    first = weights_digest(survey_base(folder))
    monkeypatch.setattr(weights_module, "read_into", lambda *_: pytest.fail("the file was read again"))
    seen: list[tuple[int, int]] = []
    assert weights_digest(survey_base(folder), progress=lambda done, total: seen.append((done, total))) == first
    size = (folder / "model.safetensors").stat().st_size
    assert seen == [(size, size)]


def test_changed_bytes_of_the_same_size_change_the_digest(folder, cache):
    settle(folder)
    first = weights_digest(survey_base(folder))
    save_file({"a.weight": torch.ones(2, 3), "b.weight": torch.zeros(3)}, folder / "model.safetensors")
    settle(folder, seconds=30)
    assert weights_digest(survey_base(folder)) != first


def test_a_file_that_may_still_change_is_not_remembered(folder, cache):
    weights_digest(survey_base(folder))
    assert not list(cache.rglob("digests/*"))
    settle(folder)
    weights_digest(survey_base(folder))
    assert len(list(cache.rglob("digests/*"))) == 1


def test_a_cache_entry_that_is_not_ours_is_ignored(folder, cache):
    settle(folder)
    first = weights_digest(survey_base(folder))
    (entry,) = cache.rglob("digests/*")
    entry.write_bytes(b"\xff nonsense")
    assert weights_digest(survey_base(folder)) == first


def test_a_cache_that_cannot_be_written_costs_nothing_but_time(folder, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LORAHUB_CACHE", str(tmp_path / "file" / "below"))
    settle(folder)
    assert weights_digest(survey_base(folder)).startswith("sha256:")


def test_a_file_replaced_since_its_survey_is_noticed(folder, cache):
    files = survey_base(folder)
    save_file({"a.weight": torch.zeros(9, 9)}, folder / "model.safetensors")
    with pytest.raises(IntegrityError, match=r"model\.safetensors"):
        weights_digest(files)
