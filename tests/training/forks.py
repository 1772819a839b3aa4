"""Two real processes, forked once everything is imported, that meet over gloo and each say what came in a file."""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any, NoReturn

import accelerate
import torch
from torch.distributed import barrier, destroy_process_group, init_process_group

__all__ = ["RANKS", "shards_here", "together"]

RANKS = 2


def together(folder: Path, work: Callable[[Path, int], dict[str, Any]]) -> list[int]:
    """Run ``work(folder, rank)`` in each rank; what it gives lies in ``rank-N.json``.  The processes' exit codes."""
    ranks = [_start(folder, rank, work) for rank in range(RANKS)]
    return [os.waitstatus_to_exitcode(os.waitpid(rank, 0)[1]) for rank in ranks]


def shards_here() -> None:
    """Let accelerate shard among processes of a CPU.

    It does so on accelerators alone: it is told that these are some, and everything that it does then is its own.
    """
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    accelerate.PartialState(cpu=True)
    accelerate.PartialState._shared_state["distributed_type"] = accelerate.DistributedType.MULTI_XPU


def _start(folder: Path, rank: int, work: Callable[[Path, int], dict[str, Any]]) -> int:
    """Fork one rank, which says what it has to say in a file of its own; its process."""
    if child := os.fork():
        return child
    try:
        said = os.open(folder / f"said-{rank}", os.O_WRONLY | os.O_CREAT)
        os.dup2(said, 1)
        os.dup2(said, 2)
        _rank(folder, rank, work)
    except BaseException:  # noqa: BLE001 - a fork must not go on with what its parent does
        traceback.print_exc()
        sys.stderr.flush()
    os._exit(1)


def _rank(folder: Path, rank: int, work: Callable[[Path, int], dict[str, Any]]) -> NoReturn:
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(RANKS), LOCAL_WORLD_SIZE=str(RANKS))
    os.environ.update(ACCELERATE_USE_CPU="true", OMP_NUM_THREADS="1")
    meeting = f"file://{folder / 'meeting'}"
    init_process_group("gloo", init_method=meeting, rank=rank, world_size=RANKS, timeout=timedelta(minutes=2))
    (folder / f"rank-{rank}.json").write_text(json.dumps(work(folder, rank)))
    barrier()
    destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # gloo's threads outlive their group, and may take an interpreter down that is being finalised
