"""Adapters as their authors stored them: read to the last key, or refused for what they are."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from lorahub.adapter import load, open_header, save
from lorahub.deltas.kind import JSON
from lorahub.deltas.lora import LoRA
from lorahub.errors import HeaderError, LorahubError, UnsupportedFormat, UnsupportedKind
from lorahub.files.header import Header, TensorInfo
from lorahub.findings import Verdict
from lorahub.formats.format import AdapterFiles
from lorahub.formats.peft import PeftFormat
from lorahub.formats.peft.types import TYPES
from lorahub.plugins import Registry

READ: Mapping[str, tuple[tuple[str, ...], int, int, float, str]] = {
    "niket-sharma__LLMs-from-groundup__distilgpt2": (("lora",), 6, 8, 2.0, "distilgpt2"),
    "BK7195__deltacompression-poc__opencalm_fp16_r1": (("lora",), 24, 1, 32.0, "cyberagent/open-calm-1b"),
    "deepbiolab__gpt2-classification-peft__gpt2_cls_cproj": (("lora", "replace"), 37, 8, 4.0, "gpt2"),
    "branbot6__sift-opf-zh__privacy_filter_moe": (("lora", "replace"), 34, 16, 2.0, "openai/privacy-filter"),
    "hyper07__Skin-Lesion-Generation-Diffusion__sd_skin_peft": (("lora",), 128, 4, 4.0, ""),
}
"""Folder -> kinds, targets, rank, scale and the base it names, as counted by hand from its files."""

REFUSED: Mapping[str, tuple[type[LorahubError], str]] = {
    "elisagdelope__ESM2-bindingsites__lfs_pointer_bin": (UnsupportedFormat, "adapter_model.bin is a Git LFS pointer"),
    "ostris__ai-toolkit__empty_safetensors": (UnsupportedFormat, "holds no tensors: its header is empty"),
    "invoke-ai__InvokeAI__zero_byte": (HeaderError, "the file is empty (0 bytes)"),
    "Inishpy__lerobot-libero__smolvla_scalars": (UnsupportedFormat, "single numbers only (606 of them): no factors"),
    "adapter-hub__adapters__bottleneck_bigbird": (
        UnsupportedKind,
        "AdapterHub adapter for google/bigbird-roberta-base",
    ),
    "LMHan122__lightweight-fine-tuning-peft__gpt2_r8_6cls_bin": (UnsupportedFormat, "pickle, which is never opened"),
    "cloneofsimo__lora__kiriko2_te": (UnsupportedFormat, "pickle, which is never opened"),
}
"""Folder -> how it is refused, and why."""


@pytest.mark.parametrize("name", READ)
def test_a_real_adapter_is_read_to_the_last_key(real_adapters: Path, registry: Registry, name: str) -> None:
    kinds, targets, rank, scale, base = READ[name]
    header = open_header(real_adapters / name, registry)
    assert (header.kinds, len(header.touches), header.ranks) == (kinds, targets, (rank,))
    assert header.reading.base_repo == base
    assert header.findings == ()
    scales = {group.options["scale"] for group in header.reading.groups if group.kind == "lora"}
    assert scales == {scale}
    keys = [ref.key for group in header.reading.groups for ref in group.slots.values()]
    with safe_open(real_adapters / name / header.reading.file, "pt") as file:
        assert sorted(keys) == sorted(file.keys())


@pytest.mark.parametrize("name", READ)
def test_a_real_adapter_is_loaded_saved_and_loaded_the_same(
    real_adapters: Path, registry: Registry, tmp_path: Path, name: str
) -> None:
    adapter = load(open_header(real_adapters / name, registry), registry)
    place = save(adapter, tmp_path / "again", registry=registry)
    again = open_header(place, registry)
    assert again.findings == ()
    theirs, ours = (folder / "adapter_model.safetensors" for folder in (real_adapters / name, place))
    with safe_open(theirs, "pt") as left, safe_open(ours, "pt") as right:
        assert set(left.keys()) == set(right.keys())
        for key in left.keys():  # noqa: SIM118 - a safetensors file is no mapping
            assert left.get_tensor(key).dtype == right.get_tensor(key).dtype
            assert torch.equal(left.get_tensor(key), right.get_tensor(key))
    moved = [delta for delta in adapter.deltas.values() if isinstance(delta, LoRA) and bool(delta.up.any())]
    assert moved, "every factor is zero: this adapter would prove nothing"


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_broken_or_no_adapter_is_refused_for_the_right_reason(
    real_adapters: Path, registry: Registry, name: str
) -> None:
    error, reason = REFUSED[name]
    with pytest.raises(error) as refusal:
        open_header(real_adapters / name, registry)
    assert type(refusal.value) is error
    assert reason in refusal.value.message
    assert refusal.value.hint


def test_every_real_folder_opens_or_is_refused_by_a_typed_error(real_adapters: Path, registry: Registry) -> None:
    for folder in sorted(real_adapters.iterdir()):
        if folder.is_dir() and folder.name not in ("configs", "layouts"):
            try:
                open_header(folder, registry)
            except LorahubError as error:
                if not error.hint:
                    pytest.fail(f"{folder.name} is refused without a word on what to do: {error}")


def test_every_real_config_is_recognised_or_refused_by_its_name(real_adapters: Path, registry: Registry) -> None:
    kinds = tuple(registry.kinds.values())
    read_here = {spelling.tag for kind in kinds for spelling in kind.spellings if spelling.format == "peft"}
    paths = sorted((real_adapters / "configs").glob("*.json"))
    assert len(paths) == 45
    seen = set()
    for path in paths:
        config: dict[str, JSON] = json.loads(path.read_text())
        tag = config["peft_type"]
        assert isinstance(tag, str)
        tensors = {"base_model.model.q.unheard_of": TensorInfo("F32", (2, 2), 0, 16)}
        header = Header(tensors=tensors, metadata={}, data_start=0, size=16)
        files = AdapterFiles(
            folder=path.parent, headers={"adapter_model.safetensors": header}, configs={"adapter_config.json": config}
        )
        reading = PeftFormat().read(files, kinds, None)
        codes = {finding.code for finding in reading.findings}
        if tag in read_here:
            assert codes == {"key-unknown"}, (path.name, codes)  # every field of the config is known
        else:
            (finding,) = [each for each in reading.findings if each.code == "kind-unsupported"]
            assert finding.level is Verdict.INCOMPATIBLE
            assert tag in finding.message
            assert tag not in TYPES or TYPES[tag].title in finding.message
        seen.add(tag)
    assert len(seen) == len(paths)
