"""Folders of adapters: ``lorahub inspect DIR/`` against parsing the same headers with the json module.

``alike``: a thousand files as one trainer writes them: SDXL LoRAs in kohya's spelling with 2,166 tensors each, of four
ranks, with 64 metadata of their own and an alpha tensor for every module, each under ten names, which saves the disk
three gigabytes and the lister nothing.  ``different``: three hundred files of five layouts, no two of which have the
same tensors.  Files are sparse, since nobody looks at the factors, and in the page cache.  The other side opens each
file, reads its header (and the config beside it, where there is one) and calls ``json.loads``: no checks, no format, no
alphas.
"""

from __future__ import annotations

import json
import struct
import tempfile
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from math import prod
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from layouts import LAYOUTS, Written, header, sdxl
from measure import Sample, fold, ratios

from lorahub.files.writer import encode_header
from lorahub.listing import Entry, list_folder
from lorahub.plugins import load_registry
from lorahub.registry import Registry

__all__ = ["different", "listing"]

OURS, JSON = "lorahub.listing.list_folder", "json.loads of every header"
RANKS = (4, 8, 16, 32)
LINKS = 10
_CONFIG = "adapter_config.json"


def listing(quick: bool) -> dict[str, Any]:
    """Time to list, and to parse, files that share their structure."""
    count, repeats = (40, 2) if quick else (1000, 5)
    with tempfile.TemporaryDirectory(prefix="lorahub-bench-") as temporary:
        folder = Path(temporary)
        for number in range(count):
            path = folder / f"style-{number}.safetensors"
            if number < count // LINKS:
                _write(path, _alike(RANKS[number % len(RANKS)], number))
            else:
                path.hardlink_to(folder / f"style-{number % (count // LINKS)}.safetensors")
        entries = _apart(folder)
        assert len(entries) == count
        assert {(each.error, each.format, each.kinds, each.base or each.looks_like) for each in entries} == {
            ("", "kohya", ("lora",), "SDXL")
        }
        assert {(each.ranks, each.scales) for each in entries} == {((rank,), (1 / rank,)) for rank in RANKS}
        return _compared(
            folder, repeats, f"List {count:,} SDXL adapters in one folder: format, kinds, ranks, scales, base, findings"
        )


def different(quick: bool) -> dict[str, Any]:
    """Time to list, and to parse, files that have nothing in common but what bases have."""
    count, repeats = (20, 2) if quick else (300, 5)
    with tempfile.TemporaryDirectory(prefix="lorahub-bench-") as temporary:
        folder = Path(temporary)
        tensors = write_different(folder, count)
        entries = _apart(folder)
        assert len(entries) == count
        assert {(each.error, each.kinds) for each in entries} == {("", ("lora",))}
        assert all(len(each.ranks) == len(each.scales) == 1 for each in entries)
        return _compared(
            folder, repeats, f"List {count:,} adapters of five layouts, no two alike: {tensors // count:,} tensors each"
        )


def write_different(folder: Path, count: int) -> int:
    """Write ``count`` adapters, and say how many tensors they have together."""
    turns = [name for name, layout in LAYOUTS.items() for _ in range(layout.share)]
    tensors = 0
    for number in range(count):
        made = header(turns[number % len(turns)], number)
        tensors += len(made.tensors)
        if made.config is None:
            _write(folder / f"style-{number}.safetensors", made)
        else:
            (folder / f"model-{number}").mkdir()
            (folder / f"model-{number}" / _CONFIG).write_text(json.dumps(made.config, indent=2))
            _write(folder / f"model-{number}" / "adapter_model.safetensors", made)
    return tensors


def _compared(folder: Path, repeats: int, title: str) -> dict[str, Any]:
    """Each side and each repeat in a process of its own, so that nothing is remembered from the one before."""
    _registry()  # loaded here, and there when a process begins
    samples: dict[str, list[Sample]] = {name: [] for name in _SIDES}
    for _ in range(repeats):
        for name in _SIDES:
            with ProcessPoolExecutor(1, mp_context=get_context("fork")) as pool:
                samples[name].append(pool.submit(_timed, name, folder).result())
    return {
        "title": title,
        "repeats": repeats,
        "sides": {name: fold(each) for name, each in samples.items()},
        "ratios": ratios(samples, [(OURS, JSON)], "wall_s"),
        "cpu_ratios": ratios(samples, [(OURS, JSON)], "cpu_s"),
    }


def _timed(name: str, folder: Path) -> Sample:
    wall, cpu = time.perf_counter(), time.process_time()
    _SIDES[name](folder)
    return {"wall_s": time.perf_counter() - wall, "cpu_s": time.process_time() - cpu}


def _listed(folder: Path) -> tuple[Entry, ...]:
    return list_folder(folder, _registry())


@cache
def _registry() -> Registry:
    return load_registry()


def _apart(folder: Path) -> tuple[Entry, ...]:
    """The entries, from a process of its own."""
    with ProcessPoolExecutor(1, mp_context=get_context("fork")) as pool:
        return pool.submit(_listed, folder).result()


def _parse(folder: Path) -> None:
    for path in folder.rglob("*.safetensors"):
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            json.loads(file.read(length))
        if (config := path.parent / _CONFIG).exists():
            json.loads(config.read_bytes())


def _alike(rank: int, seed: int) -> Written:
    entries: dict[str, tuple[str, list[int]]] = {}
    for name, inputs, outputs in sdxl():
        entries[f"{name}.alpha"] = ("F16", [])
        entries[f"{name}.lora_down.weight"] = ("F16", [rank, inputs])
        entries[f"{name}.lora_up.weight"] = ("F16", [outputs, rank])
    metadata = {f"ss_setting_{number:02}": f"{seed * number}" for number in range(60)}
    metadata |= {
        "ss_base_model_version": "sdxl_base_v1-0",
        "ss_network_module": "networks.lora",
        "ss_output_name": f"style-{seed}",
        "ss_tag_frequency": json.dumps({"10_style": {f"tag {number}": number + seed for number in range(200)}}),
    }
    return Written(dict(sorted(entries.items())), metadata, None)


def _write(path: Path, made: Written) -> None:
    encoded = encode_header(made.tensors, made.metadata)
    at = len(encoded)
    with path.open("wb") as file:
        file.write(encoded)
        for code, shape in made.tensors.values():
            if not shape:
                file.seek(at)
                file.write(_ONE[code])
            at += 2 * prod(shape)
        file.truncate(at)


_ONE: Mapping[str, bytes] = {"F16": struct.pack("<e", 1.0), "BF16": struct.pack("<f", 1.0)[2:]}

_SIDES: Mapping[str, Callable[[Path], object]] = {JSON: _parse, OURS: _listed}
