"""One side of the disk benchmark, in a process of its own: ``disk_sides.py SIDE BASE ADAPTER OUT``."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from importlib import import_module
from pathlib import Path

__all__ = ["SIDES"]


def _peft(base: Path, adapter: Path, out: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    with _work():
        model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype="auto"), adapter)
        model.merge_and_unload().save_pretrained(out, max_shard_size="100GB")
        _flush(out)


def _api(base: Path, adapter: Path, out: Path) -> None:
    from lorahub import merging

    _import_torch()
    with _work():
        merging.merge(base, {"a": adapter}, out=out)


def _copy(base: Path, adapter: Path, out: Path) -> None:
    """The stream with nothing to fold: the same plan without its steps."""
    from lorahub.engine.writing import stream
    from lorahub.merging.preparing import prepare

    _import_torch()
    with _work():
        job = prepare(base, {"a": adapter})
        assert job.base.files is not None
        names = tuple(job.base.index.parameters)
        nothing = replace(job.plan, adapters=(), steps=(), untouched=names, config_edits={})
        stream.stream_merge(job.base.files, nothing, {}, out)


def _import_torch() -> None:
    """Now, and not when lorahub first needs it: imports are left out of what ``_work`` says."""
    import_module("torch")


@contextmanager
def _work() -> Iterator[None]:
    """Say how long the block took: what is left of a process without its start and its imports."""
    begun = time.perf_counter()
    yield
    print(f"\nwork_s={time.perf_counter() - begun:.6f}", flush=True)


def _flush(folder: Path) -> None:
    for path in folder.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())


SIDES: dict[str, Callable[[Path, Path, Path], None]] = {"peft": _peft, "api": _api, "copy": _copy}

if __name__ == "__main__":
    SIDES[sys.argv[1]](*map(Path, sys.argv[2:5]))
