"""Which base a merge or check is for, where none was named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import lorahub
from lorahub.errors import Offline, UsageError
from lorahub.files.writer import save_file
from lorahub.merging import preparing
from lorahub.names import Ref


@pytest.fixture
def adapter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LORAHUB_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "ink"
    folder.mkdir()
    tensors = {f"base_model.model.q.lora_{slot}.weight": torch.ones(2, 2) for slot in "AB"}
    save_file(folder / "adapter_model.safetensors", tensors, {"format": "pt"})
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 2}))
    save_file(tmp_path / "base.safetensors", {"q.weight": torch.ones(2, 2)})
    return folder


def test_without_a_record_the_base_must_be_named(adapter: Path) -> None:
    with pytest.raises(UsageError, match="does not record a base") as refused:
        lorahub.check(adapter)
    assert "--base" in refused.value.hint


def test_a_base_that_is_gone_is_recorded_by_its_name_and_never_in_place_of_its_weights(
    adapter: Path, tmp_path: Path
) -> None:
    by_name = lorahub.record(adapter, base_repo="acme/gone", base_revision="b" * 40).base
    assert by_name is not None
    assert (by_name.repo_id, by_name.revision, by_name.weights_digest) == ("acme/gone", "b" * 40, None)
    report = lorahub.check(adapter, tmp_path / "base.safetensors")
    assert "base-weights-unrecorded" in {each.code for each in report.findings}
    lorahub.record(adapter, tmp_path / "base.safetensors")
    with pytest.raises(UsageError, match="would forget them"):
        lorahub.record(adapter, base_repo="acme/other")
    with pytest.raises(UsageError, match="no repository"):
        lorahub.record(adapter, base_revision="b" * 40)


def test_the_recorded_base_is_asked_for_by_name_and_never_taken_from_a_folder_that_lies_here(
    adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lorahub.record(adapter, tmp_path / "base.safetensors", base_repo="acme/base", base_revision="a" * 40)
    (tmp_path / "acme" / "base").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    asked: list[Any] = []

    def unreachable(base: object, **_options: object) -> None:
        asked.append(base)
        raise Offline("the network is off", "switch it on")

    monkeypatch.setattr(preparing, "open_base", unreachable)
    with pytest.raises(
        Offline, match=r"records acme/base@a{40} as its base, which cannot be had: the network"
    ) as refused:
        lorahub.check(adapter)
    assert asked == [Ref(repo="acme/base", selector="a" * 40)]
    assert "--base FOLDER" in refused.value.hint


def _one_linear() -> torch.nn.Module:
    model = torch.nn.Module()
    model.q = torch.nn.Linear(2, 2, bias=False)
    return model


@pytest.mark.parametrize("way", ["path", "text", "open", "header", "listed", "named"])
def test_one_adapter_is_taken_as_whatever_it_is_written_as(adapter: Path, way: str) -> None:
    opened = lorahub.load(adapter)
    assert opened.header is not None
    given: dict[str, Any] = {
        "path": adapter,
        "text": str(adapter),
        "open": opened,
        "header": opened.header,
        "listed": [opened],
        "named": {"ink": adapter},
    }
    model = _one_linear()
    before = model.q.weight.detach().clone()
    merged = lorahub.merge(model, given[way])
    assert torch.equal(model.q.weight, before + 2)
    merged.undo()
    with lorahub.attach(model, given[way]) as live:
        assert live.adapters == ("ink",)
    assert lorahub.plan(model, given[way]).adapters == (("ink", 1.0),)


def test_adapters_of_one_name_are_told_apart_in_a_list(adapter: Path) -> None:
    opened = lorahub.load(adapter)
    assert [name for name, _ in lorahub.plan(_one_linear(), [opened, adapter, opened]).adapters] == [
        "ink",
        "ink-2",
        "ink-3",
    ]


@pytest.mark.parametrize("given", [None, 5, [None], {"ink": None}, {"ink": 3}])
def test_what_is_no_adapter_is_refused_with_what_is_one(given: Any) -> None:
    for do in (lorahub.merge, lorahub.attach, lorahub.plan):
        with pytest.raises(UsageError, match="is no adapter, and no reference to one"):
            do(_one_linear(), given)
    for what in (lorahub.load, lorahub.inspect, lambda it: lorahub.check(it, _one_linear())):
        with pytest.raises(UsageError, match="is no path and no reference"):
            what(given)


def test_a_record_without_a_name_and_a_digest_says_so(adapter: Path, tmp_path: Path) -> None:
    lorahub.record(adapter, tmp_path / "base.safetensors")
    file = adapter / "lorahub.json"
    said = json.loads(file.read_text())
    said["base"] = {"structure": said["base"]["structure"]}
    file.write_text(json.dumps(said))
    found = {each.code: each.message for each in lorahub.check(adapter, tmp_path / "base.safetensors").findings}
    assert "neither its name nor a digest" in found["base-weights-unrecorded"]


def test_a_base_that_only_the_config_names_is_offered_as_that(adapter: Path) -> None:
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "base_model_name_or_path": "gpt2"}))
    with pytest.raises(UsageError, match="does not record a base; its files name gpt2 without a commit") as refused:
        lorahub.check(adapter)
    assert refused.value.hint == "name the base: --base gpt2"


def test_what_an_option_allows_is_named_as_an_argument_too() -> None:
    error = UsageError("it is so", "to go on all the same: --allow target-missing --allow key-unknown")
    assert str(error).splitlines()[-1] == '  in Python: allow=["target-missing", "key-unknown"]'
    assert "in Python" not in str(UsageError("it is so", "name the base: --base BASE"))
    assert "in Python" not in error.hint
