"""A folder of a thousand adapters: ``lorahub inspect DIR/`` against parsing the same headers with the json module.

The files are as trainers write them: SDXL LoRAs in kohya's spelling with 2,166 tensors each, of four ranks, with 64
metadata of their own and an alpha tensor for every module; sparse, since nobody looks at the factors, and each under
ten names, which saves the disk three gigabytes and the lister nothing.  All are in the page cache.  The other side
opens each file, reads its header and calls ``json.loads``: no checks, no format, no alphas.
"""

from __future__ import annotations

import json
import struct
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from measure import Sample, fold, ratios

from lorahub.files.writer import encode_header
from lorahub.listing import Entry, list_folder
from lorahub.plugins import load_registry

__all__ = ["listing"]

OURS, JSON = "lorahub.listing.list_folder", "json.loads of every header"
RANKS = (4, 8, 16, 32)
LINKS = 10
STAGES = (
    ("input_blocks_4_1", 2, 640),
    ("input_blocks_5_1", 2, 640),
    ("input_blocks_7_1", 10, 1280),
    ("input_blocks_8_1", 10, 1280),
    ("middle_block_1", 10, 1280),
    ("output_blocks_0_1", 10, 1280),
    ("output_blocks_1_1", 10, 1280),
    ("output_blocks_2_1", 10, 1280),
    ("output_blocks_3_1", 2, 640),
    ("output_blocks_4_1", 2, 640),
    ("output_blocks_5_1", 2, 640),
)
"""SDXL's stages with attention: name, transformer blocks, channels."""


def listing(quick: bool) -> dict[str, Any]:
    """Time to list, and to parse."""
    count, repeats = (40, 2) if quick else (1000, 5)
    registry = load_registry()
    with tempfile.TemporaryDirectory(prefix="lorahub-bench-") as temporary:
        folder = Path(temporary)
        for number in range(count):
            path = folder / f"style-{number}.safetensors"
            if number < count // LINKS:
                _write(path, RANKS[number % len(RANKS)], number)
            else:
                path.hardlink_to(folder / f"style-{number % (count // LINKS)}.safetensors")
        sides: dict[str, Callable[[], object]] = {
            JSON: lambda: _parse(folder),
            OURS: lambda: list_folder(folder, registry),
        }
        entries = list_folder(folder, registry)
        _demand(entries, count)
        samples: dict[str, list[Sample]] = {name: [] for name in sides}
        for _ in range(repeats):
            for name, run in sides.items():
                wall, cpu = time.perf_counter(), time.process_time()
                run()
                samples[name].append({"wall_s": time.perf_counter() - wall, "cpu_s": time.process_time() - cpu})
    return {
        "title": f"List {count:,} SDXL adapters in one folder: format, kinds, ranks, scales, base, findings",
        "repeats": repeats,
        "sides": {name: fold(each) for name, each in samples.items()},
        "ratios": ratios(samples, [(OURS, JSON)], "wall_s"),
        "cpu_ratios": ratios(samples, [(OURS, JSON)], "cpu_s"),
    }


def _demand(entries: tuple[Entry, ...], count: int) -> None:
    """What was listed is what was written."""
    assert len(entries) == count
    assert {each.error for each in entries} == {""}
    assert {(each.format, each.kinds, each.base or each.looks_like) for each in entries} == {
        ("kohya", ("lora",), "SDXL")
    }
    assert {(each.ranks, each.scales) for each in entries} == {((rank,), (1 / rank,)) for rank in RANKS}


def _parse(folder: Path) -> None:
    for path in folder.iterdir():
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            json.loads(file.read(length))


def _write(path: Path, rank: int, seed: int) -> None:
    entries = dict(sorted(_entries(rank).items()))
    metadata = {f"ss_setting_{number:02}": f"{seed * number}" for number in range(60)}
    metadata |= {
        "ss_base_model_version": "sdxl_base_v1-0",
        "ss_network_module": "networks.lora",
        "ss_output_name": path.stem,
        "ss_tag_frequency": json.dumps({"10_style": {f"tag {number}": number + seed for number in range(200)}}),
    }
    encoded = encode_header(entries, metadata)
    at = len(encoded)
    with path.open("wb") as file:
        file.write(encoded)
        for _, shape in entries.values():
            if not shape:
                file.seek(at)
                file.write(struct.pack("<e", 1.0))
            at += 2 * _count(shape)
        file.truncate(at)


def _count(shape: list[int]) -> int:
    return shape[0] * shape[1] if shape else 1


def _entries(rank: int) -> dict[str, tuple[str, list[int]]]:
    found: dict[str, tuple[str, list[int]]] = {}

    def add(module: str, inputs: int, outputs: int) -> None:
        found[f"lora_unet_{module}.alpha"] = ("F16", [])
        found[f"lora_unet_{module}.lora_down.weight"] = ("F16", [rank, inputs])
        found[f"lora_unet_{module}.lora_up.weight"] = ("F16", [outputs, rank])

    for stage, depth, width in STAGES:
        add(f"{stage}_proj_in", width, width)
        add(f"{stage}_proj_out", width, width)
        for block in (f"{stage}_transformer_blocks_{number}" for number in range(depth)):
            for attention, context in (("attn1", width), ("attn2", 2048)):
                add(f"{block}_{attention}_to_q", width, width)
                add(f"{block}_{attention}_to_k", context, width)
                add(f"{block}_{attention}_to_v", context, width)
                add(f"{block}_{attention}_to_out_0", width, width)
            add(f"{block}_ff_net_0_proj", width, 8 * width)
            add(f"{block}_ff_net_2", 4 * width, width)
    return found
