"""Merging into models that are sharded over processes: FSDP2, tensor parallel, and both at once.

The processes are real (gloo, two or four of them); each compares what it sees with a merge into the whole model.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import rank_groups
import torch

from lorahub.bases.placements import _chunks, _joined, _within
from lorahub.engine.changing.sharding import _overlaps
from lorahub.files.writer import save_file

SCRIPT = Path(__file__).with_name("sharded_ranks.py")
SHAPES = {"up": (37, 16), "down": (16, 37), "conv": (9, 16), "embed": (27, 16)}


def write_adapter(folder: Path, *, dora: bool = False) -> str:
    """A LoRA for every weight of the model, as PEFT writes it; its change is about a fifth of the weights."""
    generator = torch.Generator().manual_seed(11)
    tensors, r = {}, 4
    for name, (out, width) in SHAPES.items():
        stem = f"base_model.model.block.{name}"
        down, up = torch.randn(r, width, generator=generator), torch.randn(out, r, generator=generator) * 0.02
        if name == "embed":
            tensors |= {f"{stem}.lora_embedding_A": up.T.contiguous(), f"{stem}.lora_embedding_B": down.T.contiguous()}
        elif name == "conv":
            kernel = torch.randn(r, width, 3, 3, generator=generator)
            tensors |= {f"{stem}.lora_A.weight": kernel, f"{stem}.lora_B.weight": up[..., None, None].contiguous()}
        else:
            tensors |= {f"{stem}.lora_A.weight": down, f"{stem}.lora_B.weight": up}
        if dora:
            tensors[f"{stem}.lora_magnitude_vector"] = torch.rand(out, generator=generator) + 0.5
    if dora:
        tensors = {name: value for name, value in tensors.items() if ".down." in name}
    folder.mkdir()
    save_file(folder / "adapter_model.safetensors", tensors, {"format": "pt"})
    targets = ["down"] if dora else sorted(SHAPES)
    config = {"peft_type": "LORA", "r": r, "lora_alpha": 6, "target_modules": targets, "use_dora": dora}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return str(folder)


@pytest.fixture(scope="module")
def groups(run_script: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], list[Any]]:
    """``groups(NAME)``: what each rank of that group found; all groups are forked from one process, one by one."""
    if not hasattr(os, "fork"):
        pytest.skip("this platform cannot fork")
    folder = tmp_path_factory.mktemp("groups")
    adapter, dora = write_adapter(folder / "lora"), write_adapter(folder / "dora", dora=True)
    jobs = {
        "fsdp": {"way": "fsdp", "adapter": adapter},
        "tensor-parallel": {"way": "tensor-parallel", "adapter": adapter},
        "rows of dora": {"way": "fsdp", "adapter": dora},
        "columns of dora": {"way": "refused", "adapter": dora},
    }
    given = {
        "two": (2, jobs),
        "four": (4, {"both": {"way": "both", "adapter": adapter}}),
        "broken": (2, {"broken": {"way": "broken"}}),
    }
    codes = run_script(SCRIPT.read_text(), folder, json.dumps(given))

    return lambda name: rank_groups.found_by(folder, name, codes)


@pytest.fixture
def two(groups: Callable[[str], list[Any]]) -> list[Any]:
    return groups("two")


WEIGHTS = sorted(f"block.{name}.weight" for name in SHAPES)


@pytest.mark.parametrize("job", ["fsdp", "tensor-parallel"])
def test_every_process_merges_its_part_and_nothing_is_sent(two, job):
    for found in (each[job] for each in two):
        assert found["collectives"] == 0
        assert found["changed"] == WEIGHTS
        assert found["left"] == []


def test_fsdp_shards_every_parameter_and_the_parts_are_those_of_the_whole_merge(two):
    for found in (each["fsdp"] for each in two):
        assert set(WEIGHTS) <= set(found["sharded"])
        assert found["unlike"] == {}


def test_tensor_parallel_parts_are_those_of_the_whole_merge(two):
    for found in (each["tensor-parallel"] for each in two):
        assert {"block.up.weight", "block.down.weight"} <= set(found["sharded"])
        assert found["unlike"] == {}


def test_dora_over_whole_rows_needs_no_other_process(two):
    for found in (each["rows of dora"] for each in two):
        assert found["changed"] == ["block.down.weight"]
        assert found["unlike"] == {}


def test_dora_over_parts_of_rows_is_refused_by_name_and_changes_nothing(two):
    for found in (each["columns of dora"] for each in two):
        assert "block.down.weight" in found["said"]
        assert "normalises whole rows" in found["said"]
        assert found["changed"] == []


def test_strided_shards_of_two_dimensions_are_those_of_the_whole_merge(groups):
    for found in groups("four"):
        assert found["both"]["changed"] == WEIGHTS
        assert found["both"]["unlike"] == {}
        assert found["both"]["left"] == []


def test_a_rank_that_breaks_down_is_noticed(groups):
    with pytest.raises(AssertionError, match="rank 1 breaks down as it was asked to"):
        groups("broken")


@pytest.mark.parametrize("size", [1, 2, 7, 16])
@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_shards_are_cut_as_torch_chunk_cuts(size, count):
    assert [list(span) for span in _chunks(range(size), count)] == [
        chunk.tolist() for chunk in torch.arange(size).chunk(count)
    ]


def test_positions_are_looked_up_among_runs():
    runs = (range(2, 5), range(10, 14))
    assert [list(run) for run in _within(runs, range(1, 5))] == [[3, 4], [10, 11]]
    assert _joined([range(2), range(2, 5), range(7, 8)]) == (range(5), range(7, 8))


@pytest.mark.parametrize("runs", [(range(9),), (range(3, 6),), (range(2), range(6, 9)), ()])
@pytest.mark.parametrize(
    ("index", "of_delta"),
    [
        (slice(None), slice(None)),
        (slice(2, 8), slice(None)),
        (slice(2, 8), slice(1, 7)),
        ((8, 0, 4, 5), slice(None)),
        (slice(1, 4), (5, 3, 1)),
    ],
)
def test_what_overlaps_is_what_looking_at_every_position_gives(runs, index, of_delta):
    held = [position for run in runs for position in run]
    to = list(range(9))[index] if isinstance(index, slice) else list(index)
    source = list(range(9))[of_delta][: len(to)] if isinstance(of_delta, slice) else list(of_delta)
    expected = {(held.index(position), source[number]) for number, position in enumerate(to) if position in held}
    found = set()
    for here, of in _overlaps(index, of_delta, runs, 9):
        local = list(range(len(held)))[here] if isinstance(here, slice) else list(here)
        change = source if of == slice(None) else list(range(9))[of] if isinstance(of, slice) else list(of)
        found |= set(zip(local, change, strict=True))
    assert found == expected
