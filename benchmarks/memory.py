"""Merging into weights in memory: lorahub against PEFT's ``merge_adapter`` and the least it could take.

All sides change the same memory, one after another, repeat by repeat, and the weights are put back in between (not
timed).  The floor is one pass that reads and writes every weight that a merge changes (``W.mul_(1)``).  lorahub's time
is that of the whole call: opening the adapter's files, planning, checking, merging, measuring what is kept, and what
undoing exactly needs; with ``undo="none"``, which is what PEFT's merge offers, without that last part.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from machine import HERE
from measure import Sample, fold, ratios
from models import LLAMA, NARROW, TARGETS, lora_on, meta_llama, meta_stack, meta_unet, randomise, small, unet_targets
from peft import IA3Config, LoHaConfig, LoKrConfig, LoraConfig, OFTConfig, VeraConfig, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

import lorahub

__all__ = ["kinds", "layers", "layers32", "llama", "many"]

FLOOR = "read + write pass"
FACTORS = {"bf16": torch.bfloat16, "fp32": torch.float32}
"""The dtypes of the adapter's factors; PEFT itself trains and saves float32 ones."""

_KINDS: dict[str, Callable[[list[str]], Any]] = {
    "LoRA": lambda names: LoraConfig(r=16, target_modules=names),
    "DoRA": lambda names: LoraConfig(r=16, use_dora=True, target_modules=names),
    "LoHa": lambda names: LoHaConfig(r=8, target_modules=names),
    "LoKr": lambda names: LoKrConfig(r=16, target_modules=names),
    "(IA)3": lambda names: IA3Config(target_modules=names, feedforward_modules=[]),
    "OFT": lambda names: OFTConfig(oft_block_size=32, r=0, target_modules=names),
    "VeRA": lambda names: VeraConfig(r=64, target_modules=names),
}

UNDO = {"": "auto", ", no undo": "none"}
"""How lorahub's sides are named, and what they keep for undoing."""


def _peft(word: str) -> str:
    return f"PEFT merge_adapter, {word} factors"


def _ours(word: str, kept: str) -> str:
    return f"lorahub.merge, {word} factors{kept}"


def _addmm_(word: str) -> str:
    return f"torch addmm_, {word} factors"


def _pairs(words: Sequence[str]) -> list[tuple[str, str]]:
    return [
        *((_peft(word), _ours(word, kept)) for kept in UNDO for word in words),
        *((_ours(word, kept), FLOOR) for kept in UNDO for word in words),
        *((_peft(word), FLOOR) for word in words),
        (_addmm_(words[0]), FLOOR),
    ]


@dataclass(frozen=True, slots=True)
class Side:
    """``act`` is timed, and ``reset``, which runs after it, is not."""

    act: Callable[[], Any]
    reset: Callable[[], None] = lambda: None


def layers(quick: bool) -> dict[str, Any]:
    """Eight layers of 4096 x 4096."""
    count, width = (2, 1024) if quick else (8, 4096)
    build = partial(meta_stack, count, width)
    title = f"Merge in memory: {count} linear layers of {width} x {width}, bf16, rank 16, {HERE}"
    return {"title": title} | _compare(build, build().state_dict(), _numbers(count), repeats=3 if quick else 9)


def layers32(quick: bool) -> dict[str, Any]:
    """Four layers of 4096 x 4096 in float32."""
    count, width = (2, 1024) if quick else (4, 4096)

    def build() -> nn.Module:
        return meta_stack(count, width).float()

    title = f"Merge in memory: {count} linear layers of {width} x {width}, float32, rank 16, {HERE}"
    repeats = 3 if quick else 9
    return {"title": title} | _compare(build, build().state_dict(), _numbers(count), words=["fp32"], repeats=repeats)


def kinds(quick: bool) -> dict[str, Any]:
    """Every kind of adapter that PEFT merges as we do, on four layers of 4096 x 4096."""
    count, width = (2, 512) if quick else (4, 4096)
    targets = _numbers(count)
    build = partial(meta_stack, count, width)
    state = randomise(build().state_dict(), seed=1)
    samples: dict[str, list[Sample]] = {}
    for kind, config in _KINDS.items():
        torch.manual_seed(2)
        wrapped, plain = get_peft_model(_live(build, state), config(targets)), _live(build, state)
        with torch.no_grad(), tempfile.TemporaryDirectory() as folder:
            for parameter in wrapped.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn_like(parameter) * 0.01)
            wrapped.save_pretrained(folder)
            layers = [module for module in wrapped.modules() if isinstance(module, BaseTunerLayer)]
            adapter = lorahub.load(folder)
            sides = {
                f"PEFT, {kind}": Side(wrapped.merge_adapter, partial(_forget_merge, layers)),
                f"lorahub, {kind}": Side(partial(lorahub.merge, plain, {"a": adapter}, allow=["delta-lost"])),
            }
            weights = [module.get_base_layer().weight for module in layers]
            samples |= _timed(sides, weights, repeats=2 if quick else 5)[0]
    title = f"Merge in memory by kind: {count} linear layers of {width} x {width}, bf16, {HERE}"
    pairs = [(f"PEFT, {kind}", f"lorahub, {kind}") for kind in _KINDS]
    return {
        "title": title,
        "repeats": 2 if quick else 5,
        "sides": {name: fold(each) for name, each in samples.items()},
        "ratios": ratios(samples, pairs, "wall_s"),
    }


def llama(quick: bool) -> dict[str, Any]:
    """All linear layers of a random Llama."""
    config = small(LLAMA) if quick else LLAMA
    model = meta_llama(config)
    size = sum(p.numel() for p in model.parameters()) / 1e9
    title = (
        f"Merge in memory: all linear layers of a random Llama, {size:.2f} billion parameters, bf16, rank 16, {HERE}"
    )
    repeats = 3 if quick else 5
    return {"title": title} | _compare(lambda: meta_llama(config), model.state_dict(), TARGETS, repeats=repeats)


def many(quick: bool) -> dict[str, Any]:
    """SDXL's UNet with a tenth of its width: what a merge costs for a layer, however small that is."""
    build = partial(meta_unet, NARROW | ({"transformer_layers_per_block": (1, 1, 1)} if quick else {}))
    targets = unet_targets(build())
    title = f"Merge in memory: the {len(targets)} layers of an SDXL UNet of a tenth of the width, bf16, rank 16, {HERE}"
    return {"title": title} | _compare(build, build().state_dict(), targets, repeats=3 if quick else 9)


def _numbers(count: int) -> list[str]:
    return [str(number) for number in range(count)]


def _live(build: Callable[[], nn.Module], state: dict[str, torch.Tensor]) -> nn.Module:
    model = build()
    model.load_state_dict(state, assign=True)  # every model of a run has the same memory
    return model.requires_grad_(False)


def _compare(
    build: Callable[[], nn.Module],
    shapes: dict[str, torch.Tensor],
    targets: list[str],
    *,
    words: Sequence[str] = tuple(FACTORS),
    repeats: int,
) -> dict[str, Any]:
    live = partial(_live, build, randomise(shapes, seed=1))
    with tempfile.TemporaryDirectory() as folder:
        in_peft = {word: lora_on(live(), targets, dtype=FACTORS[word]) for word in words}
        changed = [module.base_layer.weight for module in _lora(in_peft[words[0]])]
        sides = {
            FLOOR: Side(lambda: [weight.mul_(1) for weight in changed]),
            _addmm_(words[0]): Side(partial(_addmm, in_peft[words[0]])),
        }
        for word, wrapped in in_peft.items():
            wrapped.save_pretrained(Path(folder) / word)
            sides[_peft(word)] = Side(wrapped.merge_adapter, partial(_forget_merge, _lora(wrapped)))
            adapter = lorahub.load(Path(folder) / word)
            for kept, undo in UNDO.items():
                sides[_ours(word, kept)] = Side(partial(lorahub.merge, live(), {"a": adapter}, undo=undo))
        samples, agreement = _timed(sides, changed, repeats=repeats, alike=(_peft("fp32"), _ours("fp32", "")))
    return {
        "repeats": repeats,
        "changed_bytes": sum(weight.nbytes for weight in changed),
        "agreement": agreement,
        "sides": {name: fold(each) for name, each in samples.items()},
        "ratios": ratios(samples, _pairs(words), "wall_s"),
    }


def _timed(
    sides: Mapping[str, Side], changed: Sequence[torch.Tensor], *, repeats: int, alike: Collection[str] = ()
) -> tuple[dict[str, list[Sample]], dict[str, float]]:
    """What each side took, repeat by repeat, and how two sides' results compare; weights are put back after each."""
    backup = [weight.clone() for weight in changed]
    samples: dict[str, list[Sample]] = {name: [] for name in sides}
    results: dict[str, list[torch.Tensor]] = {}
    for repeat in range(repeats + 1):  # the first is to warm up
        for name, side in sides.items():
            cpu, wall = time.process_time(), time.perf_counter()
            result = side.act()
            taken = {"wall_s": time.perf_counter() - wall, "cpu_s": time.process_time() - cpu}
            if repeat:
                samples[name].append(taken)
            elif name in alike:
                results[name] = [weight.clone() for weight in changed]
            del result
            side.reset()
            for weight, kept in zip(changed, backup, strict=True):
                weight.data.copy_(kept)
    return samples, _agreement(backup, *results.values()) if results else {}


def _lora(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if "default" in getattr(module, "lora_A", {})]


def _addmm(model: nn.Module) -> None:
    for module in _lora(model):
        up, down = module.lora_B["default"].weight, module.lora_A["default"].weight
        module.base_layer.weight.flatten(1).addmm_(up.flatten(1), down.flatten(1), alpha=module.scaling["default"])


def _forget_merge(layers: Sequence[Any]) -> None:
    """PEFT's own note that it has merged, cleared: the weights are put back by copying."""
    for module in layers:
        module.merged_adapters.clear()


def _agreement(before: list[torch.Tensor], one: list[torch.Tensor], other: list[torch.Tensor]) -> dict[str, float]:
    """Of two sides' results: the share of weights that a merge changed, and the share in which the two differ."""
    total = sum(weight.numel() for weight in before)
    return {
        "changed": sum(int((a != b).sum()) for a, b in zip(before, one, strict=True)) / total,
        "different": sum(int((a != b).sum()) for a, b in zip(one, other, strict=True)) / total,
    }
