"""From one merged adapter to another: lorahub against PEFT's ``unmerge_adapter`` and ``merge_adapter``.

Each side has a model of its own, of the same numbers, with an adapter merged into it, and goes to the other one and
back, repeat by repeat.  Both adapters are at hand from the start.  PEFT takes the old change off by subtracting what it
added, in the weights' dtype; lorahub swaps to the bits of a merge into the untouched weights.  In the end all take off
what is merged, and it is counted in how many weights that is not the base.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from machine import HERE
from measure import Sample, fold, ratios
from models import NARROW, lora_on, meta_stack, meta_unet, randomise, unet_targets
from peft import PeftModel
from torch import nn

import lorahub

__all__ = ["layers", "many"]

PEFT, SWAP, READY = "PEFT unmerge and merge", "lorahub swap", "lorahub swap, prepared"
NAMES = ("one", "other")


def layers(quick: bool) -> dict[str, Any]:
    """Four layers of 4096 x 4096."""
    count, width = (2, 1024) if quick else (4, 4096)
    title = f"Swap in memory: {count} linear layers of {width} x {width}, bf16, rank 16, {HERE}"
    targets = [str(number) for number in range(count)]
    return {"title": title} | _compare(partial(meta_stack, count, width), targets, repeats=4 if quick else 12)


def many(quick: bool) -> dict[str, Any]:
    """SDXL's UNet with a tenth of its width."""
    build = partial(meta_unet, NARROW | ({"transformer_layers_per_block": (1, 1, 1)} if quick else {}))
    targets = unet_targets(build())
    title = f"Swap in memory: the {len(targets)} layers of an SDXL UNet of a tenth of the width, bf16, rank 16, {HERE}"
    return {"title": title} | _compare(build, targets, repeats=4 if quick else 12)


def _compare(build: Callable[[], nn.Module], targets: list[str], *, repeats: int) -> dict[str, Any]:
    state = randomise(build().state_dict(), seed=1)

    def live() -> nn.Module:
        model = build()
        model.load_state_dict({name: tensor.clone() for name, tensor in state.items()}, assign=True)
        return model.requires_grad_(False)

    with tempfile.TemporaryDirectory() as folder:
        folders = {name: Path(folder) / name for name in NAMES}
        for seed, place in enumerate(folders.values()):
            lora_on(live(), targets, dtype=torch.bfloat16, seed=seed).save_pretrained(place)
        adapters = {name: lorahub.load(place) for name, place in folders.items()}
        models = {name: live() for name in (PEFT, SWAP, READY)}
        wrapped = _in_peft(models[PEFT], folders)
        swapped, prepared = (lorahub.merge(models[name], {"a": adapters[NAMES[0]]}) for name in (SWAP, READY))
        ready = {name: prepared.prepare({"a": each}) for name, each in adapters.items()}
        sides: dict[str, Callable[[str], object]] = {
            PEFT: partial(_go_on, wrapped),
            SWAP: lambda name: swapped.swap({"a": adapters[name]}),
            READY: lambda name: prepared.swap(ready[name]),
        }
        samples = _timed(sides, repeats)
        wrapped.unmerge_adapter()
        swapped.undo()
        prepared.undo()
    wrong = {name: _differing(_plain(model), state, targets) for name, model in models.items()}
    return {
        "repeats": repeats,
        "sides": {name: fold(each) for name, each in samples.items()},
        "ratios": ratios(samples, [(PEFT, READY), (PEFT, SWAP), (SWAP, READY)], "wall_s"),
        "says": [
            f"With everything taken off, {wrong[PEFT]:.1%} of the weights in question were not the base's after PEFT,",
            f"{wrong[SWAP]:.1%} and {wrong[READY]:.1%} after lorahub.",
        ],
    }


def _timed(sides: dict[str, Callable[[str], object]], repeats: int) -> dict[str, list[Sample]]:
    samples: dict[str, list[Sample]] = {name: [] for name in sides}
    for repeat in range(repeats + 2):  # there and back to warm up
        for name, go in sides.items():
            cpu, wall = time.process_time(), time.perf_counter()
            go(NAMES[(repeat + 1) % 2])
            taken = {"wall_s": time.perf_counter() - wall, "cpu_s": time.process_time() - cpu}
            if repeat >= 2:
                samples[name].append(taken)
    return samples


def _in_peft(model: nn.Module, folders: dict[str, Path]) -> PeftModel:
    first, second = NAMES
    wrapped = PeftModel.from_pretrained(model, folders[first], adapter_name=first, autocast_adapter_dtype=False)
    wrapped.load_adapter(folders[second], second, autocast_adapter_dtype=False)
    wrapped.set_adapter(first)
    wrapped.merge_adapter()
    return wrapped


def _go_on(wrapped: PeftModel, name: str) -> None:
    wrapped.unmerge_adapter()
    wrapped.set_adapter(name)
    wrapped.merge_adapter()


def _plain(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name.replace(".base_layer", ""): tensor for name, tensor in model.state_dict().items()}


def _differing(found: dict[str, torch.Tensor], state: dict[str, torch.Tensor], targets: list[str]) -> float:
    """The share of the targets' weights that are not the base's."""
    names = [name for name in state if name.endswith(".weight") and _is_target(name, targets)]
    total = sum(state[name].numel() for name in names)
    return sum(int((found[name] != state[name]).sum()) for name in names) / total


def _is_target(name: str, targets: list[str]) -> bool:
    module = name.removesuffix(".weight")
    return any(module == target or module.endswith(f".{target}") for target in targets)
