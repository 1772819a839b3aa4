"""Merging on a CUDA device: Llama-3-8B, SDXL's UNet and ViT-L, with random weights made there.

The floor is what moving the bytes costs: a copy of one large buffer, timed in the same repeat, at whose rate the
weights are read and written.  Lorahub's times are beside it: that of the kernel's launches alone, made ready before, of
the same with the untouched weights put aside or (a swap) read from there, of a whole swap that was prepared, and of the
whole call of ``lorahub.merge``, which plans and checks.  Around them are PyTorch's ``addmm_``, layer by layer, and
PEFT.  All sides change the same memory, by a change so small that weights need not be put back in between; only the
whole swap, which looks whether anyone else wrote, has a model of its own.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import Any

import timm
import torch
from measure import Sample, fold, ratios
from models import LLAMA3, RANK, SDXL, lora_on, meta_llama, meta_unet, small
from torch import nn

import lorahub
from lorahub.engine.kernels.choice import merger
from lorahub.engine.kernels.patches import Patch

__all__ = ["llama", "unet", "vit"]

COPY = "a copy's time for the same bytes"
LAUNCHED = "lorahub's kernel"
SAVING = "lorahub's kernel, untouched weights put aside"
SWAPPING = "lorahub's kernel, from the weights put aside"
PREPARED = "lorahub swap, prepared"
WHOLE = "lorahub.merge"
UNDONE = "lorahub.merge, then undo"
ADDMM = "torch addmm_"
PEFT = "PEFT merge_adapter"

_SMALL = {"block_out_channels": (32, 64, 64), "attention_head_dim": (2, 2, 2), "cross_attention_dim": 64}


def llama(quick: bool) -> dict[str, Any]:
    """The linear layers of Llama-3-8B."""
    return _case("the linear layers of Llama-3-8B", lambda: meta_llama(small(LLAMA3) if quick else LLAMA3), quick)


def unet(quick: bool) -> dict[str, Any]:
    """The linear layers and convolutions of SDXL's UNet."""
    config = SDXL | _SMALL if quick else SDXL

    return _case("the linear layers and convolutions of SDXL's UNet", partial(meta_unet, config), quick)


def vit(quick: bool) -> dict[str, Any]:
    """The linear layers of ViT-L."""

    def build() -> nn.Module:
        with torch.device("meta"):
            name = "vit_tiny_patch16_224" if quick else "vit_large_patch16_224"
            return timm.create_model(name, pretrained=False).to(torch.bfloat16)

    return _case("the linear layers and the convolution of ViT-L", build, quick)


def _case(what: str, build: Callable[[], nn.Module], quick: bool) -> dict[str, Any]:
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    title = f"Merge on a device: {what}, bf16, rank {RANK}, {name}"
    if device.type == "cpu" and not quick:
        return {"title": title, "skipped": "there is no CUDA device", "elsewhere": True}
    state = {name: _normal(tensor, device) for name, tensor in build().state_dict().items()}

    def live(*, apart: bool = False) -> nn.Module:
        model = build()
        model.load_state_dict({name: each.clone() if apart else each for name, each in state.items()}, assign=True)
        return model.requires_grad_(False)

    changed = _changed(live())
    repeats, buffer = (2, 1 << 24) if quick else (9, 1 << 31)
    with tempfile.TemporaryDirectory() as folder:
        samples = _timed(_sides(live, changed, Path(folder), buffer), device, repeats=repeats)
    moved = 2 * sum(weight.nbytes for weight in changed.values())
    for sample in samples[COPY]:
        sample["wall_s"] *= moved / (2 * buffer)
    pairs = [*((side, COPY) for side in samples if side != COPY), (PEFT, WHOLE), (ADDMM, WHOLE), (UNDONE, WHOLE)]
    kernel = merger(device, next(iter(changed.values())).dtype)
    why = f" ({kernel.reason})" if kernel.reason else ""
    return {
        "title": title,
        "repeats": repeats,
        "sides": {side: fold(each) for side, each in samples.items()},
        "ratios": ratios(samples, pairs, "wall_s"),
        "says": [f"{len(changed)} layers, {moved / 2e9:.2f} GB; the kernel is {kernel.name}'s{why}."],
    }


def _normal(like: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Normal numbers of a tensor's shape and dtype, made on the device; integers are zeros."""
    made = torch.empty_like(like, device=device)
    return made.normal_(0, 0.02) if like.is_floating_point() else made.zero_()


def _changed(model: nn.Module) -> dict[str, torch.Tensor]:
    """Module name -> weight, of what LoRA goes onto: linear layers and convolutions, but for a model's head."""
    found = (nn.Linear, nn.Conv2d)
    of = {name: module.weight for name, module in model.named_modules() if isinstance(module, found)}
    return {name: weight for name, weight in of.items() if name not in {"lm_head", "head"}}


def _sides(
    live: Callable[..., nn.Module], changed: Mapping[str, torch.Tensor], folder: Path, buffer: int
) -> dict[str, Callable[[], object]]:
    in_peft, model = lora_on(live(), sorted(changed), dtype=torch.bfloat16), live()
    in_peft.save_pretrained(folder)
    adapter = {"a": lorahub.load(folder)}
    layers = [module for module in in_peft.modules() if "default" in getattr(module, "lora_A", {})]
    patches = list(map(_patch, layers))
    saving = [replace(patch, saved=torch.empty_like(patch.weight)) for patch in patches]
    swapping = [replace(patch, before=patch.saved, saved=None) for patch in saving]
    device = patches[0].weight.device
    one, other = torch.empty(2, buffer, dtype=torch.uint8, device=device)

    prepare, held = merger(device, patches[0].weight.dtype).run, lorahub.merge(live(apart=True), adapter, undo="copy")
    ready, turn = [held.prepare(adapter, weights=[weight]) for weight in (0.5, 1.0)], cycle((0, 1))

    def peft() -> None:
        in_peft.merge_adapter()
        for layer in layers:
            layer.merged_adapters.clear()  # its own note that it has merged; the next side goes on from here

    return {
        COPY: lambda: one.copy_(other),
        LAUNCHED: prepare(patches),
        SAVING: prepare(saving),
        SWAPPING: prepare(swapping),
        PREPARED: lambda: held.swap(ready[next(turn)]),
        WHOLE: lambda: lorahub.merge(model, adapter, undo="none"),
        UNDONE: lambda: lorahub.merge(model, adapter, undo="copy").undo(),
        ADDMM: lambda: [patch.weight.addmm_(patch.up, patch.down) for patch in patches],
        PEFT: peft,
    }


def _patch(layer: Any) -> Patch:
    up, down = (factors["default"].weight.flatten(1) for factors in (layer.lora_B, layer.lora_A))
    return Patch(weight=layer.get_base_layer().weight.flatten(1), up=up, down=down, scale=layer.scaling["default"])


def _timed(sides: Mapping[str, Callable[[], object]], device: torch.device, *, repeats: int) -> dict[str, list[Sample]]:
    """What each side took, repeat by repeat, until the device had done it."""

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    samples: dict[str, list[Sample]] = {name: [] for name in sides}
    for repeat in range(repeats + 1):  # the first is to warm up
        for name, side in sides.items():
            wait()
            cpu, wall = time.process_time(), time.perf_counter()
            side()
            wait()
            taken = {"wall_s": time.perf_counter() - wall, "cpu_s": time.process_time() - cpu}
            if repeat:
                samples[name].append(taken)
    return samples
