"""The laws that every composition method keeps: its declarations are true, and its result is one value.

Each runs on adapters of different ranks over a matrix, a convolution, a vector and a stack of experts, of which none
has all.  References are the method itself in other circumstances, so a method also needs a test against a formula.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import permutations
from types import MappingProxyType
from typing import Any

from lorahub.bases.layout import Target
from lorahub.composition.algebra.truncate import Budget
from lorahub.composition.combining import Combined, Part, combine
from lorahub.composition.method import Method
from lorahub.deltas.delta import Delta
from lorahub.deltas.expert_lora import ExpertLoRA
from lorahub.deltas.full import Full
from lorahub.deltas.lora import LoRA
from lorahub.errors import LorahubError
from lorahub.lazy import torch
from lorahub.testing.judging import hold

__all__ = [
    "METHOD_LAWS",
    "check_method",
    "every_adapter_counts",
    "order_counts_only_where_declared",
    "parameters_come_back",
    "threads_count_for_nothing",
]

WEIGHTS = (0.7, 0.4, 1.3)
NOTICED = 1e-4
"""Relative change of a result that is no rounding."""

ROUNDED = 1e-5
"""Relative difference that float32 tensors and sums in another order may make."""


def check_method(method: Method) -> None:
    """Run every law; raises ``AssertionError`` with the first sentence that does not hold.

    Args:
        method: with the parameters to try it with; one that is ``ordered`` needs some under which order counts.
    """
    for law in METHOD_LAWS.values():
        law(method)


def order_counts_only_where_declared(method: Method) -> None:
    """Adapters in another order give the same, or, where the method is ``ordered``, something else.

    Raises:
        AssertionError: they do not.
    """
    given = _parts(method)
    first = _whole(_composed(given, method))
    hold(float(first.norm()) > NOTICED, f"{method.name} makes nothing of the law's adapters")
    others = [_whole(_composed(order, method)) for order in permutations(given)]
    apart = max(float((other - first).norm() / first.norm()) for other in others)
    if type(method).ordered:
        hold(apart > NOTICED, f"{method.name} says that order counts, and no order changes anything")
    else:
        hold(apart < ROUNDED, f"{method.name} says that order does not count, and another one changes {apart:.1e}")


def threads_count_for_nothing(method: Method) -> None:
    """The same bytes on one thread and on several, with every sort of budget.

    Raises:
        AssertionError: they differ.
    """
    given, before = _parts(method), torch.get_num_threads()
    for budget in (None, Budget(rank=2), Budget(energy=0.9)):
        try:
            torch.set_num_threads(2)
            one, many = (_composed(given, method, budget, threads) for threads in (1, 4))
        finally:
            torch.set_num_threads(before)
        alike = all(
            torch.equal(tensor, many.deltas[target].tensors()[name])
            for target, delta in one.deltas.items()
            for name, tensor in delta.tensors().items()
        )
        hold(
            alike and one.deltas.keys() == many.deltas.keys(), f"{method.name}: four threads make other bytes than one"
        )


def every_adapter_counts(method: Method) -> None:
    """Each adapter, changed, changes the result.

    Raises:
        AssertionError: one does not.
    """
    given = _parts(method)
    first = _whole(_composed(given, method))
    for number, part in enumerate(given):
        other = replace(part, deltas={target: _other(delta) for target, delta in part.deltas.items()})
        found = _whole(_composed([*given[:number], other, *given[number + 1 :]], method))
        moved = float((found - first).norm() / first.norm())
        hold(moved > NOTICED, f"{method.name}: adapter {number} is another one, and the result is the same")


def parameters_come_back(method: Method) -> None:
    """What a recipe says of the method makes it again, and what it does not have is refused.

    Raises:
        AssertionError: they do not, or it is not.
    """
    again = type(method).made(method.parameters())
    hold(again == method, f"{method.name}: its parameters {method.parameters()} make {again}, and not {method}")
    try:
        type(method).made({"no-such-parameter": 1})
    except LorahubError:
        return
    hold(False, f"{method.name} takes a parameter that it does not have")


METHOD_LAWS: Mapping[str, Callable[[Method], None]] = MappingProxyType(
    {
        law.__name__: law
        for law in (
            parameters_come_back,
            order_counts_only_where_declared,
            threads_count_for_nothing,
            every_adapter_counts,
        )
    }
)


def _composed(given: Sequence[Part], method: Method, budget: Budget | None = None, threads: int = 1) -> Combined:
    return combine(given, lambda _: method, budget, dtype=torch.float32, threads=threads)


def _parts(method: Method) -> list[Part]:
    """As many adapters as the method takes, three at most; of one rank where it takes no others."""
    most = type(method).count[1] or len(WEIGHTS)
    given = [
        Part(label=str(number), deltas=deltas, weights=dict.fromkeys(deltas, weight), seed=number, elsewhere=weight)
        for number, (deltas, weight) in enumerate(zip(_adapters(ranks=(2, 3, 2)), WEIGHTS, strict=True))
    ][:most]
    try:
        _composed(given, method)
    except LorahubError:
        matrix = Target("", "a", "weight")
        given = [
            replace(part, deltas={matrix: deltas[matrix]}, weights={matrix: part.elsewhere})
            for part, deltas in zip(given, _adapters(ranks=(2, 2, 2)), strict=False)
        ]
    return given


def _adapters(*, ranks: tuple[int, int, int]) -> list[dict[Target, Delta]]:
    generator = torch.Generator().manual_seed(5)
    matrix, conv, stack = (Target("", module, "weight") for module in "abc")
    bias = Target("", "a", "bias")

    def lora(shape: tuple[int, ...], r: int) -> LoRA:
        return LoRA.example(shape, r=r, generator=generator)

    def experts(r: int) -> ExpertLoRA:
        up, down = torch.randn(3, 10, r, generator=generator), torch.randn(3, r, 6, generator=generator)
        return ExpertLoRA(up, down, 0.5, False)

    made: list[dict[Target, Delta]] = [
        {matrix: lora((12, 9), r), bias: Full(torch.randn(12, generator=generator), 0.7), stack: experts(r)}
        for r in ranks
    ]
    for number in (0, 2):
        made[number][conv] = lora((8, 5, 3, 3), ranks[number])
    return made


def _other(delta: Delta) -> Delta:
    """Another change of the same shape."""
    generator = torch.Generator().manual_seed(77)
    fresh: dict[str, Any] = {
        name: torch.randn(tensor.shape, generator=generator) for name, tensor in delta.tensors().items()
    }
    return replace(delta, **fresh)  # type: ignore[type-var]  # every delta is a dataclass


def _whole(result: Combined) -> torch.Tensor:
    """Everything a composition does, as one vector, float64."""
    pieces = [
        delta.delta(torch.zeros(delta.shape() or (), dtype=torch.float64)).flatten()
        for _, delta in sorted(result.deltas.items(), key=lambda each: each[0].name)
    ]
    whole: torch.Tensor = torch.cat(pieces)
    return whole
