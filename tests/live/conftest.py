"""Deltas attached to a plain module, and the same deltas merged into a copy of it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterator, Mapping
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from lorahub.bases.index import BaseIndex, BaseRef
from lorahub.bases.layout import Piece, Region, Target
from lorahub.bases.torch_module import TorchModule
from lorahub.deltas.delta import Delta
from lorahub.deltas.lora import LoRA
from lorahub.engine.changing.merge import merge_into
from lorahub.engine.planning.plan import Form, Plan, Step, Term
from lorahub.live.attached import Live
from lorahub.live.copies import owner_of

Deltas = Mapping[str, Delta]
"""Dotted parameter name, or (name, where in it) by ``at``, to change."""


def target(name: str) -> Target:
    module, _, parameter = name.rpartition(".")
    return Target("", module, parameter)


def region(name: str) -> tuple[str, Region]:
    """``"qkv.weight[8:16]"`` is a band of rows; ``"experts.up[1]"`` one expert."""
    name, _, inside = name.partition("[")
    if not inside:
        return name, Region()
    start, colon, stop = inside.rstrip("]").partition(":")
    return name, Region(rows=slice(int(start), int(stop))) if colon else Region(expert=int(start))


def plan_of(index: BaseIndex, adapter: str, deltas: Deltas, weight: float = 1.0) -> Plan:
    """The plan of one adapter whose changes land where their names say."""
    terms: dict[str, list[Term]] = {}
    for spelled, delta in deltas.items():
        name, where = region(spelled)
        name = index.stored(name)
        if index.parameters[name].transposed:
            where = Region(transposed=True)
        module = name.rpartition(".")[0]
        terms.setdefault(name, []).append(
            Term(
                adapter=adapter,
                weight=weight,
                target=target(spelled),
                piece=Piece(parameter=name, of_parameter=where),
                kind=delta.kind,
                additive=delta.additive,
                replaces=delta.replacement() is not None,
                local=False,
                rank=None,
                siblings={each: Piece(parameter=f"{module}.{each}") for each in delta.reads},
            )
        )
    steps = []
    for name, of in terms.items():
        form = Form(index.parameters[name].shape, index.parameters[name].dtype)
        steps.append(Step(out=name, source=name, before=form, after=form, terms=tuple(of), stored_as=name))
    return Plan(base=BaseRef(), framework="torch", steps=tuple(steps), untouched=())


def holder(deltas: Deltas) -> Any:
    return SimpleNamespace(deltas={target(name): delta for name, delta in deltas.items()})


class Bench:
    """What tests build with."""

    def __init__(self) -> None:
        self.opened: list[Live] = []

    def attach(
        self, model: nn.Module, adapters: Mapping[str, Deltas], active: Collection[str] | None = None, **options: Any
    ) -> Live:
        """The adapters attached, all of them chosen or those that are named."""
        framework = TorchModule()
        index = framework.index_model(model, BaseRef())
        live = Live(
            model,
            index,
            framework,
            plan=lambda name, deltas: (plan_of(index, name, deltas), holder(deltas)),
            judge=lambda _: None,
            **options,
        )
        self.opened.append(live)
        for name, deltas in adapters.items():
            live.add(name, deltas)
        live.set_adapters([*(adapters if active is None else active)])
        return live

    def merged(self, model: nn.Module, deltas: Deltas, weight: float = 1.0) -> nn.Module:
        """A copy of the model, without what is attached, with one adapter merged into it."""
        framework, result = TorchModule(), copy.deepcopy(model)
        if isinstance(live := owner_of(result), Live):
            live.detach()
        index = framework.index_model(result, BaseRef())
        plan = plan_of(index, "one", deltas, weight)
        merge_into(framework.parameters(result, index), plan, {"one": holder(deltas)}, threads=1)
        return result

    @staticmethod
    def lora(out: int, inp: int, *k: int, r: int = 4, seed: int = 0, dtype: torch.dtype = torch.float32) -> LoRA:
        """A LoRA whose change is as large as a weight of standard deviation 0.3."""
        generator = torch.Generator().manual_seed(seed)
        down = torch.randn(r, inp, *k, generator=generator)
        up = torch.randn(out, r, *(1 for _ in k), generator=generator)
        return LoRA(up.to(dtype), down.to(dtype), 0.3 / r**0.5)

    @staticmethod
    def randn(*shape: int, seed: int = 7, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.fixture
def bench() -> Iterator[Bench]:
    """See ``Bench``; whatever it attached is detached afterwards."""
    made = Bench()
    yield made
    for live in made.opened:
        live.detach()


@pytest.fixture
def agree() -> Callable[[torch.Tensor, torch.Tensor, torch.Tensor], None]:
    """``agree(found, expected, plain)``: the first two are equal but for rounding, and far from ``plain``."""

    def check(found: torch.Tensor, expected: torch.Tensor, plain: torch.Tensor) -> None:
        change = float((expected - plain).detach().norm() / plain.detach().norm())
        assert change > 1e-2, f"the adapter changes outputs by {change:.1e} only, so nothing is tested"
        torch.testing.assert_close(found.detach(), expected.detach(), rtol=1e-4, atol=1e-5)

    return check
