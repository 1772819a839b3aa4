"""Groups of processes that talk to each other by gloo, forked from a script once everything is imported."""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Callable, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any, NoReturn, TypeAlias

import torch
from torch.distributed import barrier, destroy_process_group, init_process_group

__all__ = ["found_by", "run"]

Work: TypeAlias = "Callable[[int, int, Mapping[str, Any]], dict[str, Any]]"
"""What each process does, of its rank, how many there are and what the group was given; gives what it found."""


def run(work: Work) -> None:
    """Run the groups of the command line (a folder, then name -> [processes, what they are given]), one by one.

    Prints name -> the exit code of each process; what each found lies in the folder.
    """
    folder, groups = Path(sys.argv[1]), json.loads(sys.argv[2])
    codes = {name: _together(folder / name, work, *group) for name, group in groups.items()}
    sys.stdout.write(json.dumps(codes))


def found_by(folder: Path, name: str, codes: Mapping[str, list[int]]) -> list[dict[str, Any]]:
    """What each process of a group found; fails with what they said where one did not come to its end."""
    said = "\n".join((folder / name / f"said-{rank}").read_text() for rank in range(len(codes[name])))
    assert set(codes[name]) == {0}, said
    return [json.loads((folder / name / f"rank-{rank}.json").read_text()) for rank in range(len(codes[name]))]


def _together(folder: Path, work: Work, world: int, given: Mapping[str, Any]) -> list[int]:
    folder.mkdir()
    ranks = [_start(folder, work, rank, world, given) for rank in range(world)]
    return [os.waitstatus_to_exitcode(os.waitpid(rank, 0)[1]) for rank in ranks]


def _start(folder: Path, work: Work, rank: int, world: int, given: Mapping[str, Any]) -> int:
    """Fork one rank, which says what it has to say in a file of its own; its process."""
    if child := os.fork():
        return child
    try:
        said = os.open(folder / f"said-{rank}", os.O_WRONLY | os.O_CREAT)
        os.dup2(said, 1)
        os.dup2(said, 2)
        torch.set_num_threads(1)
        meeting = f"file://{folder / 'meeting'}"
        patience = timedelta(minutes=2)
        init_process_group("gloo", init_method=meeting, rank=rank, world_size=world, timeout=patience)
        draft = folder / f"rank-{rank}.json.draft"
        draft.write_text(json.dumps(work(rank, world, given)))
        draft.rename(folder / f"rank-{rank}.json")
        _leave()
    except BaseException:  # noqa: BLE001 - a fork must not go on with what its parent does
        traceback.print_exc()
        sys.stderr.flush()
    os._exit(1)


def _leave() -> NoReturn:
    """End this process with success once every rank has come here, without taking the interpreter down.

    Gloo's threads outlive ``destroy_process_group`` while a device mesh refers to the group.  A thread that lets go of
    the tensors of its last collective while the interpreter is being finalised asks for the interpreter's lock, is
    ended by that in the middle of a destructor, and takes the process with it: "terminate called without an active
    exception".
    """
    barrier()
    destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
