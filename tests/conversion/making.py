"""Adapters to convert, bases to convert them for, and what they are held against."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lorahub.adapter import Adapter, load, open_header
from lorahub.bases.framework import Framework, whole_layouts
from lorahub.bases.index import BaseIndex, BaseRef, ParameterInfo
from lorahub.bases.layout import Layout, Piece, Target
from lorahub.conversion.change import Change, Origin, Weight
from lorahub.deltas.delta import Delta
from lorahub.deltas.dora import DoRA
from lorahub.deltas.kind import JSON
from lorahub.deltas.lora import LoRA
from lorahub.errors import BaseMismatch, CannotCarry
from lorahub.opening import Base
from lorahub.plugins import load_registry
from lorahub.saving import write_folder

REGISTRY = load_registry()
NOWHERE: Weight = lambda _: None  # noqa: E731 - no base
MODULES = ("model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.v_proj", "model.layers.1.self_attn.q_proj")
OUT, IN, RANK = 36, 36, 2


def drawn(*size: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed)).to(dtype)


def lora(seed: int = 0, *, out: int = OUT, into: int = IN, rank: int = RANK, scale: float = 1.5) -> LoRA:
    return LoRA(drawn(out, rank, seed=seed), drawn(rank, into, seed=seed + 50), scale)


def write(folder: Path, deltas: Mapping[Target, Delta], format: str = "peft", **hints: JSON) -> Path:  # noqa: A002
    return write_folder(folder, deltas, registry=REGISTRY, format=format, hints=hints, record=None)


def on(*deltas: Delta, component: str = "", modules: Sequence[str] = MODULES) -> dict[Target, Delta]:
    return {Target(component, module, "weight"): delta for module, delta in zip(modules, deltas, strict=False)}


def read(place: Path) -> Adapter:
    return load(open_header(place, REGISTRY), REGISTRY)


def change_of(delta: Delta, shape: tuple[int, ...] = (OUT, IN)) -> np.ndarray[Any, np.dtype[np.float64]]:
    """What a LoRA does, by a loop over its rank."""
    assert isinstance(delta, LoRA)
    up, down = delta.up.flatten(1).double().numpy(), delta.down.flatten(1).double().numpy()
    total = np.zeros((up.shape[0], down.shape[1]))
    for k in range(up.shape[1]):
        total += np.outer(up[:, k], down[k])
    return (delta.scale * total).reshape(shape)


def close(found: Any, expected: Any, bound: float = 1e-6) -> None:
    assert np.linalg.norm(expected) > 1e-2
    assert np.linalg.norm(found - expected) <= bound * np.linalg.norm(expected)


def start(delta: Delta, shape: tuple[int, ...] | None = None) -> Change:
    target = Target("", "m", "weight")
    return Change(target=target, delta=delta, origins=(Origin(target=target),), shape=shape)


class Split:
    """A framework whose bases keep q, k and v together, or apart, whatever the adapter says."""

    name, requires = "split", ""

    def __init__(self, layouts: Mapping[Target, Layout]) -> None:
        self._layouts = layouts

    def layouts(self, index: BaseIndex, targets: Sequence[Target]) -> Mapping[Target, Layout]:
        plain = whole_layouts(index, [target for target in targets if target not in self._layouts])
        return {**plain, **{target: self._layouts[target] for target in targets if target in self._layouts}}

    def parameters(self, model: Any, index: BaseIndex) -> Mapping[str, torch.Tensor]:
        return dict(model)

    def edits(self, index: BaseIndex, created: object, hints: object) -> None:
        return None


def based(shapes: Mapping[str, tuple[int, ...]], pieces: Mapping[Target, tuple[Piece, ...]]) -> Base:
    infos = {name: ParameterInfo(shape=shape, dtype="F32", stored_as=name) for name, shape in shapes.items()}
    index = BaseIndex(ref=BaseRef(), framework="split", parameters=infos)
    framework: Framework = Split({target: Layout(target=target, pieces=each) for target, each in pieces.items()})  # type: ignore[assignment]
    model: Any = {name: drawn(*shape, seed=9) for name, shape in shapes.items()}
    return Base(index=index, framework=framework, model=model)


def takes(name: str, deltas: Mapping[Target, Delta]) -> bool:
    try:
        REGISTRY.formats[name].write(deltas, tuple(REGISTRY.kinds.values()), {})
    except CannotCarry:
        return False
    return True


def examples(kind: str) -> Iterator[dict[Target, Delta]]:
    """Adapters of three modules: each of its own, then such as have the same options or share tensors."""
    for seeds in ((0, 1, 2), *((seed,) * 3 for seed in range(12))):
        made = []
        for seed in seeds:
            generator = torch.Generator().manual_seed(seed)
            delta = REGISTRY.kinds[kind].deltas[0].example((OUT, IN), r=RANK, generator=generator)
            made.append(replace(delta, axis=0) if isinstance(delta, DoRA) else delta)
        yield on(*made)


def sample(kind: str) -> tuple[dict[Target, Delta], tuple[str, ...]]:
    """The example that most formats take, and which do; none where a kind has no example on a square matrix."""
    try:
        tried = [(deltas, tuple(name for name in REGISTRY.formats if takes(name, deltas))) for deltas in examples(kind)]
    except BaseMismatch:
        return {}, ()
    return max(tried, key=lambda each: len(each[1]))
