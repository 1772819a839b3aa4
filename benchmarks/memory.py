"""Merging into bfloat16 weights in memory: lorahub against PEFT's ``merge_adapter`` and the least it could take.

All sides change the same memory, one after another, repeat by repeat, and the weights are put back in between (not
timed).  The floor is one pass that reads and writes every weight that a merge changes (``W.mul_(1)``).  lorahub's time
is that of the whole call: opening the adapter's files, planning, checking, merging, measuring what is kept, and what
undoing exactly needs; with ``undo="none"``, which is what PEFT's merge offers, without that last part.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from measure import Sample, fold, ratios
from models import LLAMA, TARGETS, Stack, lora_on, meta_llama, randomise, small
from peft import PeftModel
from torch import nn

import lorahub

__all__ = ["layers", "llama"]

FLOOR = "read + write pass"
ADDMM = "torch addmm_, bf16 factors"
FACTORS = {"bf16": torch.bfloat16, "fp32": torch.float32}
"""The dtypes of the adapter's factors; PEFT itself trains and saves float32 ones."""

UNDO = {"": "auto", ", no undo": "none"}
"""How lorahub's sides are named, and what they keep for undoing."""


def _peft(word: str) -> str:
    return f"PEFT merge_adapter, {word} factors"


def _ours(word: str, kept: str) -> str:
    return f"lorahub.merge, {word} factors{kept}"


PAIRS = [
    *((_peft(word), _ours(word, kept)) for kept in UNDO for word in FACTORS),
    *((_ours(word, kept), FLOOR) for kept in UNDO for word in FACTORS),
    *((_peft(word), FLOOR) for word in FACTORS),
    (ADDMM, FLOOR),
]


@dataclass(frozen=True, slots=True)
class Side:
    """``act`` is timed, and ``reset``, which runs after it, is not."""

    act: Callable[[], Any]
    reset: Callable[[], None] = lambda: None


def layers(quick: bool) -> dict[str, Any]:
    """Eight layers of 4096 x 4096."""
    count, width = (2, 1024) if quick else (8, 4096)
    with torch.device("meta"):
        shapes = Stack(count, width).state_dict()

    def build() -> nn.Module:
        with torch.device("meta"):
            return Stack(count, width)

    title = f"Merge in memory: {count} linear layers of {width} x {width}, bf16, rank 16"
    return {"title": title} | _compare(build, shapes, [str(i) for i in range(count)], repeats=3 if quick else 9)


def llama(quick: bool) -> dict[str, Any]:
    """All linear layers of a random Llama."""
    config = small(LLAMA) if quick else LLAMA
    model = meta_llama(config)
    size = sum(p.numel() for p in model.parameters()) / 1e9
    title = f"Merge in memory: all linear layers of a random Llama, {size:.2f} billion parameters, bf16, rank 16"
    repeats = 3 if quick else 5
    return {"title": title} | _compare(lambda: meta_llama(config), model.state_dict(), TARGETS, repeats=repeats)


def _compare(
    build: Callable[[], nn.Module], shapes: dict[str, torch.Tensor], targets: list[str], *, repeats: int
) -> dict[str, Any]:
    state = randomise(shapes, seed=1)

    def live() -> nn.Module:
        model = build()
        model.load_state_dict(state, assign=True)  # every model of this run has the same memory
        return model.requires_grad_(False)

    with tempfile.TemporaryDirectory() as folder:
        in_peft = {word: lora_on(live(), targets, dtype=dtype) for word, dtype in FACTORS.items()}
        changed = [module.base_layer.weight for module in _lora(in_peft["bf16"])]
        sides = {
            FLOOR: Side(lambda: [weight.mul_(1) for weight in changed]),
            ADDMM: Side(partial(_addmm, in_peft["bf16"])),
        }
        for word, wrapped in in_peft.items():
            wrapped.save_pretrained(Path(folder) / word)
            sides[_peft(word)] = Side(wrapped.merge_adapter, partial(_forget_merge, wrapped))
            adapter = lorahub.load(Path(folder) / word)
            for kept, undo in UNDO.items():
                sides[_ours(word, kept)] = Side(partial(lorahub.merge, live(), {"a": adapter}, undo=undo))
        backup = [weight.clone() for weight in changed]
        samples: dict[str, list[Sample]] = {name: [] for name in sides}
        results: dict[str, list[torch.Tensor]] = {}
        agreement: dict[str, float] = {}
        for repeat in range(repeats + 1):  # the first is to warm up
            for name, side in sides.items():
                cpu, wall = time.process_time(), time.perf_counter()
                result = side.act()
                taken = {"wall_s": time.perf_counter() - wall, "cpu_s": time.process_time() - cpu}
                if repeat:
                    samples[name].append(taken)
                elif name in (_peft("fp32"), _ours("fp32", "")):
                    results[name] = [weight.clone() for weight in changed]
                del result
                side.reset()
                for weight, kept in zip(changed, backup, strict=True):
                    weight.copy_(kept)
            if not repeat:
                agreement = _agreement(backup, *results.values())
                results.clear()
    return {
        "repeats": repeats,
        "changed_bytes": sum(weight.numel() * 2 for weight in backup),
        "agreement": agreement,
        "sides": {name: fold(each) for name, each in samples.items()},
        "ratios": ratios(samples, PAIRS, "wall_s"),
    }


def _lora(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if "default" in getattr(module, "lora_A", {})]


def _addmm(model: nn.Module) -> None:
    for module in _lora(model):
        up, down = module.lora_B["default"].weight, module.lora_A["default"].weight
        module.base_layer.weight.addmm_(up, down, alpha=module.scaling["default"])


def _forget_merge(model: PeftModel) -> None:
    """PEFT's own note that it has merged, cleared: the weights are put back by copying."""
    for module in _lora(model):
        module.merged_adapters.clear()


def _agreement(before: list[torch.Tensor], one: list[torch.Tensor], other: list[torch.Tensor]) -> dict[str, float]:
    """Of two sides' results: the share of weights that a merge changed, and the share in which the two differ."""
    total = sum(weight.numel() for weight in before)
    return {
        "changed": sum(int((a != b).sum()) for a, b in zip(before, one, strict=True)) / total,
        "different": sum(int((a != b).sum()) for a, b in zip(one, other, strict=True)) / total,
    }
