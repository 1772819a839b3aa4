"""Adapters of image pipelines as their authors stored them, and the layouts of others by their headers."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from pathlib import Path

import pytest
from safetensors import safe_open

from lorahub.adapter import load, open_header
from lorahub.files.header import Header, TensorInfo
from lorahub.formats.assembly import account, touches
from lorahub.formats.format import AdapterFiles
from lorahub.plugins import Registry

READ: Mapping[str, tuple[str, tuple[str, ...], int, tuple[int, ...], float, dict[str, int]]] = {
    "catundchat__stable-diffusion-v1.5-lora__sd15_cat_st": ("diffusers", ("lora",), 128, (4,), 1.0, {"": 128}),
    "huggingface__diffusers__sd_pokemon_docs": ("diffusers", ("lora",), 128, (4,), 1.0, {"unet": 128}),
    "KohakuBlueleaf__LyCORIS__lokr_4": ("kohya", ("lokr",), 350, (4,), 1.0, {"text_encoder": 72, "unet": 278}),
}
"""Folder -> format, kinds, targets, ranks, scale and modules by component, as counted by hand from its files."""

LAYOUTS: Mapping[str, tuple[str, tuple[str, ...], int, dict[str, int]]] = {
    "anima_lora_kohya_format.json": ("kohya", ("lora",), 11, {"unet": 11}),
    "flux_dora_onetrainer_format.json": (
        "kohya",
        ("dora",),
        506,
        {"text_encoder": 72, "text_encoder_2": 168, "transformer": 266},
    ),
    "flux_lora_diffusers_format.json": ("diffusers", ("lora",), 494, {"transformer": 494}),
    "flux_lora_kohya_format.json": ("kohya", ("lora",), 304, {"unet": 304}),
    "qwen_image_lora_kohya_format.json": ("kohya", ("lokr",), 8, {"unet": 8}),
    "stripped_kohya_sdxl.json": ("kohya", ("lora",), 986, {"text_encoder": 72, "text_encoder_2": 192, "unet": 722}),
}
"""File -> format, kinds, modules, and modules by component, as counted by hand."""


def layout(path: Path) -> AdapterFiles:
    """A header of that layout; numbers, which a layout has no values for, are 4."""
    entries = json.loads(path.read_text())
    shapes = {key: tuple(entry["shape"] if isinstance(entry, dict) else entry) for key, entry in entries.items()}
    header = Header(
        tensors={key: TensorInfo("F32", shape, 0, 0) for key, shape in shapes.items()},
        metadata={},
        data_start=0,
        size=0,
    )
    numbers = {key: struct.pack("<f", 4.0) for key, shape in shapes.items() if shape in ((), (1,))}
    return AdapterFiles(folder=path.parent, headers={"a": header}, configs={}, numbers={"a": numbers})


def by_component(modules: list[str]) -> dict[str, int]:
    return {component: modules.count(component) for component in sorted(set(modules))}


@pytest.mark.parametrize("name", READ)
def test_a_real_pipeline_adapter_is_read_to_the_last_key(real_adapters: Path, registry: Registry, name: str) -> None:
    spelled, kinds, targets, ranks, scale, components = READ[name]
    header = open_header(real_adapters / name, registry)
    assert (header.format, header.kinds, len(header.touches), header.ranks) == (spelled, kinds, targets, ranks)
    assert {group.options["scale"] for group in header.reading.groups} == {scale}
    assert by_component([group.component for group in header.reading.groups]) == components
    assert header.findings == ()
    keys = [ref.key for group in header.reading.groups for ref in group.slots.values()]
    with safe_open(real_adapters / name / header.reading.file, "pt") as file:
        assert sorted(keys) == sorted(file.keys())
    assert len(load(header, registry).deltas) == targets


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_real_layout_is_claimed_by_one_format_and_read_to_the_last_key(
    real_adapters: Path, registry: Registry, name: str
) -> None:
    spelled, kinds, modules, components = LAYOUTS[name]
    files = layout(real_adapters / "layouts" / name)
    assert [each.name for each in registry.formats.values() if each.claims(files)] == [spelled]
    reading = registry.format(spelled).read(files, tuple(registry.kinds.values()), None)
    account(reading, files.headers["a"])
    assert reading.findings == ()
    assert tuple(sorted({group.kind for group in reading.groups})) == kinds
    assert len(touches(reading.groups, registry.kinds)[0]) == modules
    assert by_component([group.component for group in reading.groups]) == components
    keys = [ref.key for group in reading.groups for ref in group.slots.values()]
    assert sorted(keys) == sorted(files.headers["a"].tensors)
