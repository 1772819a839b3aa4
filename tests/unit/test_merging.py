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
