"""How long it takes to go from one task to the next: another adapter on the model in memory, or another model.

A GPT-2 of random weights and two LoRA adapters on query and value lie on disk, in the page cache.  The sides take
turns.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from claims import Row, main, take_turns
from memory import SMALL
from transformers import GPT2Config, GPT2LMHeadModel

import lorahub

__all__ = ["rows"]

RANK, REPEATS = 8, 7
TASKS = ("one", "other")
_SIZED = ("base", TASKS[0])


def rows(size: Mapping[str, Any] = SMALL, repeats: int = REPEATS) -> list[Row]:
    """Milliseconds of every way to switch."""
    transformers.utils.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model: Any = GPT2LMHeadModel(GPT2Config(**dict(size))).eval()
        model.save_pretrained(folder / "base")
        for seed, task in enumerate(TASKS):
            _saved(model, folder / task, seed)
        merged: Any = GPT2LMHeadModel.from_pretrained(folder / "base")
        took = take_turns(_sides(model, merged, folder), repeats)
        sizes = {each: sum(file.stat().st_size for file in (folder / each).rglob("*.safetensors")) for each in _SIZED}
    loaded = took["load"]
    what = f"a GPT-2 of {sizes['base'] / 1e6:.0f} MB, adapters of {sizes['one'] / 1e6:.1f} MB"

    def row(claim: str, side: str) -> Row:
        return Row(claim, "", "no figure", f"{took[side]:.3g} ms, {took[side] / loaded:.2g} times that")

    return [
        Row(f"{what}: load a full model from disk", "", "", f"{loaded:.0f} ms"),
        row("choose another attached adapter", "choose"),
        row("attach an adapter from its files instead of another", "attach"),
        row("undo the merged adapter, merge another from its files", "merge"),
    ]


def _sides(model: Any, merged: Any, folder: Path) -> dict[str, Callable[[], object]]:
    live = lorahub.attach(model, {task: lorahub.load(folder / task) for task in TASKS}, active=[TASKS[0]])
    other: Any = GPT2LMHeadModel.from_pretrained(folder / "base")
    exchanged = lorahub.attach(other, {"a": lorahub.load(folder / TASKS[0])})
    state: dict[str, Any] = {"now": lorahub.merge(merged, {"a": lorahub.load(folder / TASKS[0])}), "turn": 0}

    def following() -> str:
        state["turn"] += 1
        return TASKS[state["turn"] % 2]

    def remerge() -> None:
        state["now"].undo()
        state["now"] = lorahub.merge(merged, {"a": lorahub.load(folder / following())})

    return {
        "load": lambda: GPT2LMHeadModel.from_pretrained(folder / "base"),
        "choose": lambda: live.set_adapters([following()]),
        "attach": lambda: exchanged.swap("a", lorahub.load(folder / following())),
        "merge": remerge,
    }


def _saved(model: Any, folder: Path, seed: int) -> None:
    with lorahub.create(model, r=RANK, target_modules=["q_proj", "v_proj"], seed=seed) as trainee:
        generator = torch.Generator().manual_seed(seed)
        for own in trainee.parameters():
            own.data.normal_(0, 0.02, generator=generator)
        trainee.save(folder)


if __name__ == "__main__":
    sys.exit(main(__file__, rows))
