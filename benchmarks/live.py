"""Adapters on a live model: lorahub against PEFT and against the model without any.

All sides run in one process on the same weights and take turns, call by call.  Both libraries get the same adapters in
bfloat16, and their outputs are compared before anything is timed.  "Added" is the time of a call less that of the bare
model in the same repeat: what the adapters cost.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from machine import HERE
from measure import Sample, fold, ratios
from models import LLAMA, TARGETS, meta_llama, randomise, small
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import LlamaConfig

import lorahub
from lorahub.live.attached import Live

__all__ = ["load", "one", "rows"]

BARE, PEFT, OURS = "no adapter", "PEFT", "lorahub"
RANK = 16


class Layers(nn.Module):
    """Square linear layers one after another, without bias, in bfloat16."""

    def __init__(self, layers: int, width: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width, bias=False, dtype=torch.bfloat16) for _ in range(layers))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., width] to the same."""
        for layer in self.layers:
            x = layer(x)
        return x


@dataclass(frozen=True, slots=True)
class Three:
    """The same model three times, on the same memory: bare, in PEFT, and with lorahub's adapters attached."""

    bare: nn.Module
    wrapped: PeftModel
    ours: nn.Module
    live: Live


def one(quick: bool) -> dict[str, Any]:
    """One adapter, for 1, 16 and 256 tokens."""
    count, width, repeats = (2, 512, 3) if quick else (8, 4096, 15)
    samples: dict[str, list[Sample]] = {}
    with torch.inference_mode(), _three(count, width, ["a0"]) as three:
        three.live.set_adapters(["a0"])
        for tokens in (1, 16, 256):
            x = torch.randn(1, tokens, width, dtype=torch.bfloat16)
            sides = {BARE: partial(three.bare, x), PEFT: partial(three.wrapped, x), OURS: partial(three.ours, x)}
            samples |= {f"{name}, {tokens} tokens": taken for name, taken in _turns(sides, repeats).items()}
    pairs = [
        (f"{name}, {tokens} tokens", f"{BARE}, {tokens} tokens") for tokens in (1, 16, 256) for name in (OURS, PEFT)
    ]
    title = f"Live, one adapter: {count} linear layers of {width} x {width}, bf16, rank {RANK}, {HERE}"
    return {"title": title, **_result(samples, pairs, repeats)}


def rows(quick: bool) -> dict[str, Any]:
    """As many adapters in one batch as it has rows; PEFT's side is ``adapter_names``."""
    count, adapters, repeats = (2, 4, 3) if quick else (4, 32, 11)
    names = [f"a{at}" for at in range(adapters)]  # PEFT takes names out of keys: a number would be a layer
    samples: dict[str, list[Sample]] = {}
    pairs: list[tuple[str, str]] = []
    for width in (256,) if quick else (1024, 4096):
        with torch.inference_mode(), _three(count, width, names) as three:
            three.live.set_rows(names)
            for tokens in (1, 16):
                x = torch.randn(adapters, tokens, width, dtype=torch.bfloat16)
                in_peft = partial(three.wrapped, x, adapter_names=names)
                taken = _turns({BARE: partial(three.bare, x), PEFT: in_peft, OURS: partial(three.ours, x)}, repeats)
                taken |= {f"added by {name}": _less(taken[name], taken[BARE]) for name in (PEFT, OURS)}
                says = f"width {width}, {tokens} tokens a row"
                samples |= {f"{name}, {says}": each for name, each in taken.items()}
                pairs += [
                    (f"added by {PEFT}, {says}", f"added by {OURS}, {says}"),
                    (f"{PEFT}, {says}", f"{OURS}, {says}"),
                ]
    layers = f"{count} square linear layers, bf16, rank {RANK}"
    title = f"Live, {adapters} adapters in one batch of {adapters} rows: {layers}, {HERE}"
    return {"title": title, **_result(samples, pairs, repeats)}


READ, LOADED, ATTACHED, IN_PEFT = "read the files", "lorahub.load", "lorahub.load and attach", "PEFT load_adapter"
CHOSEN, CHOSEN_IN_PEFT = "lorahub set_adapters", "PEFT set_adapter"
CALLED, CALLED_IN_PEFT = "lorahub set_adapters and a call", "PEFT set_adapter and a call"
FIRST, LAST = "one of the first fifth", "one of the last fifth"  # without the very first, which prepares the model


def load(quick: bool) -> dict[str, Any]:
    """Loading many adapters of a Llama from warm files, attaching them, and choosing among them."""
    config, count, repeats = (small(LLAMA), 5, 2) if quick else (LLAMA, 50, 3)
    state = randomise(meta_llama(config).state_dict(), seed=1)
    samples: dict[str, list[Sample]] = {}
    with tempfile.TemporaryDirectory() as name, torch.inference_mode():
        folders = _saved(Path(name), config, count)
        for repeat in range(repeats + 1):  # the first is to warm up
            for side, sample in _loading(config, state, folders).items() if repeat else ():
                samples.setdefault(side, []).append(sample)
    pairs = [
        (LOADED, READ),
        (ATTACHED, READ),
        (IN_PEFT, ATTACHED),
        *((f"{name}, {LAST}", f"{name}, {FIRST}") for name in (ATTACHED, IN_PEFT)),
        (CHOSEN_IN_PEFT, CHOSEN),
        (CALLED_IN_PEFT, CALLED),
    ]
    size = sum(value.numel() for value in state.values()) / 1e9
    model_name = f"a Llama of {size:.2f} billion parameters"
    title = f"Live, load {count} adapters and choose among them: {model_name}, rank {RANK}, {HERE}"
    return {"title": title, **_result(samples, pairs, repeats)}


def _loading(config: LlamaConfig, state: Mapping[str, torch.Tensor], folders: Sequence[Path]) -> dict[str, Sample]:
    """Every side once; of the choices, the mean of one."""
    files = [folder / "adapter_model.safetensors" for folder in folders]
    with _clock() as read:
        kept: object = [file.read_bytes() for file in files]
    with _clock() as loaded:
        kept = [lorahub.load(folder) for folder in folders]
    del kept
    ours, base = (_llama(config, state) for _ in range(2))
    each, each_in_peft = [], []
    for folder in folders:
        with _clock() as taken:
            if folder is folders[0]:
                live = lorahub.attach(ours, {folder.name: lorahub.load(folder)}, active=[])
            else:
                live.add(folder.name, lorahub.load(folder))
        each.append(taken)
    for folder in folders:
        with _clock() as taken:
            if folder is folders[0]:
                wrapped = PeftModel.from_pretrained(
                    base, folder, adapter_name=folder.name, autocast_adapter_dtype=False
                )
            else:
                wrapped.load_adapter(folder, folder.name, autocast_adapter_dtype=False)
        each_in_peft.append(taken)
    wrapped.eval()
    names = [folder.name for folder in folders]
    ids = torch.ones(1, 1, dtype=torch.long)
    ours(ids)

    def all_of(act: Callable[[str], object]) -> Sample:
        with _clock() as taken:
            for name in names:
                act(name)
        return {key: value / len(names) for key, value in taken.items()}

    fifth = max(1, len(folders) // 5)
    return {
        READ: read,
        LOADED: loaded,
        ATTACHED: _mean(each, len(each)),
        IN_PEFT: _mean(each_in_peft, len(each)),
        f"{ATTACHED}, {FIRST}": _mean(each[1 : fifth + 1]),
        f"{ATTACHED}, {LAST}": _mean(each[-fifth:]),
        f"{IN_PEFT}, {FIRST}": _mean(each_in_peft[1 : fifth + 1]),
        f"{IN_PEFT}, {LAST}": _mean(each_in_peft[-fifth:]),
        CHOSEN: all_of(lambda name: live.set_adapters([name])),
        CHOSEN_IN_PEFT: all_of(wrapped.set_adapter),
        CALLED: all_of(lambda name: (live.set_adapters([name]), ours(ids))),
        CALLED_IN_PEFT: all_of(lambda name: (wrapped.set_adapter(name), wrapped(ids))),
    }


def _llama(config: LlamaConfig, state: Mapping[str, torch.Tensor]) -> nn.Module:
    model = meta_llama(config)
    model.load_state_dict(state, assign=True)
    model.model.rotary_emb = type(model.model.rotary_emb)(config)  # its numbers are in no checkpoint
    return model.requires_grad_(False).eval()


def _saved(folder: Path, config: LlamaConfig, count: int) -> list[Path]:
    """Adapters for all linear layers in folders of their own, written by PEFT one after another."""
    lora = LoraConfig(r=RANK, lora_alpha=RANK, target_modules=TARGETS)
    with torch.device("meta"):
        wrapped = get_peft_model(meta_llama(config), lora, adapter_name="any", autocast_adapter_dtype=False)
    wrapped.to_empty(device="cpu")
    for at in range(count):
        _randomise(wrapped, seed=at)
        wrapped.save_pretrained(folder)
        (folder / "any").rename(folder / f"a{at}")
    return [folder / f"a{at}" for at in range(count)]


@contextmanager
def _three(count: int, width: int, names: Sequence[str]) -> Iterator[Three]:
    """The layers with these adapters; their outputs do not grow on the way through."""
    with torch.device("meta"):
        models = [Layers(count, width) for _ in range(3)]
    shapes = {name: value.shape for name, value in models[0].state_dict().items()}
    state = {name: (torch.randn(shape) / width**0.5).to(torch.bfloat16) for name, shape in shapes.items()}
    for model in models:
        model.load_state_dict(state, assign=True)
        model.requires_grad_(False).eval()
    bare, inner, ours = models
    config = LoraConfig(r=RANK, lora_alpha=RANK, target_modules=[str(at) for at in range(count)])
    wrapped = get_peft_model(inner, config, adapter_name=names[0], autocast_adapter_dtype=False)
    for name in names[1:]:
        wrapped.add_adapter(name, config, autocast_adapter_dtype=False)
    _randomise(wrapped)
    with tempfile.TemporaryDirectory() as folder:
        wrapped.save_pretrained(folder)
        adapters = {name: lorahub.load(Path(folder) / name) for name in names}
    with lorahub.attach(ours, adapters, active=[]) as live:
        yield Three(bare, wrapped.eval(), ours, live)


def _randomise(wrapped: PeftModel, *, seed: int = 7) -> None:
    """Random factors, for changes of about a tenth of what a layer gives."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in wrapped.named_parameters():
        if "lora_" in name:
            size = 0.3 if "lora_B" in name else 1.0
            values = torch.empty(parameter.shape).normal_(0, size * max(parameter.shape) ** -0.5, generator=generator)
            parameter.data.copy_(values)


def _turns(sides: Mapping[str, Callable[[], torch.Tensor]], repeats: int) -> dict[str, list[Sample]]:
    """Each side in turn, after a warm-up in which PEFT and lorahub are found to agree."""
    bare, theirs, mine = (sides[name]().double() for name in (BARE, PEFT, OURS))
    moved, apart = (theirs - bare).norm() / bare.norm(), (theirs - mine).norm() / bare.norm()
    if not apart < 0.02 or not moved > 5 * apart:
        raise RuntimeError(f"adapters move the output by {moved:.1e}, and PEFT and lorahub differ by {apart:.1e}")
    samples: dict[str, list[Sample]] = {name: [] for name in sides}
    for _ in range(repeats):
        for name, act in sides.items():
            with _clock() as taken:
                act()
            samples[name].append(taken)
    return samples


@contextmanager
def _clock() -> Iterator[Sample]:
    """Filled with what the block took, at its end."""
    taken: Sample = {}
    cpu, wall = time.process_time(), time.perf_counter()
    yield taken
    taken |= {"wall_s": time.perf_counter() - wall, "cpu_s": time.process_time() - cpu}


def _mean(samples: Sequence[Sample], times: int = 1) -> Sample:
    """The mean, times a number: with their number, the sum."""
    return {key: sum(each[key] for each in samples) * times / len(samples) for key in samples[0]}


def _less(samples: Sequence[Sample], others: Sequence[Sample]) -> list[Sample]:
    """What the one took more than the other in each repeat, a microsecond at least."""
    return [{key: max(one[key] - other[key], 1e-6) for key in one} for one, other in zip(samples, others, strict=True)]


def _result(samples: Mapping[str, Sequence[Sample]], pairs: Sequence[tuple[str, str]], repeats: int) -> dict[str, Any]:
    return {
        "repeats": repeats,
        "sides": {name: fold(each) for name, each in samples.items()},
        "ratios": ratios(samples, pairs, "wall_s"),
    }
