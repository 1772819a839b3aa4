"""Laws 12 and 14, over every registered method: the exact sum is the sum, order and threads count for nothing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, final

import pytest
import torch

from lorahub.bases.layout import Target
from lorahub.composition.combining import Combined, Part, combine
from lorahub.composition.method import Method, ProductMethod, SumMethod
from lorahub.deltas.delta import Delta
from lorahub.deltas.full import Full
from lorahub.deltas.kind import Kind
from lorahub.deltas.lora import LoRA
from lorahub.plugins import load_registry
from lorahub.testing import METHOD_LAWS, cases, check_method

REGISTRY = load_registry()
SUMS = ("linear", "cat", "task_arithmetic")
ADDITIVE = [
    pytest.param(kind, id=kind.name)
    for kind in REGISTRY.kinds.values()
    if any(cls.additive for cls in kind.deltas) and kind.name != "expert-lora"
]
EXAMPLES = {
    name: [case for case in cases(kind) if case.delta.additive]
    for name, kind in REGISTRY.kinds.items()
    if any(cls.additive for cls in kind.deltas) and name != "expert-lora"
}
METHODS = [
    pytest.param(method, id=name) for name, method in REGISTRY.methods.items() if not issubclass(method, ProductMethod)
]
WEIGHTS = (0.7, -0.4, 1.3)


def parts(deltas: Sequence[dict[Target, Delta]], weights: Sequence[float]) -> list[Part]:
    return [
        Part(label=str(number), deltas=each, weights=dict.fromkeys(each, weight), seed=100 + number)
        for number, (each, weight) in enumerate(zip(deltas, weights, strict=True))
    ]


def composed(given: Sequence[Part], method: Method, base: torch.Tensor | None = None) -> Combined:
    weights = None if base is None else lambda _: base
    return combine(given, lambda _: method, None, dtype=torch.float32, threads=1, base=weights)


def dense(delta: Delta, shape: tuple[int, ...]) -> torch.Tensor:
    return delta.delta(torch.zeros(shape, dtype=torch.float64))


@pytest.mark.parametrize("name", SUMS)
@pytest.mark.parametrize("kind", ADDITIVE)
def test_the_exact_sum_is_the_sum_of_the_changes(name: str, kind: Kind) -> None:
    """Law 12, of every additive kind with LoRA and with itself, uncut: to 1e-6 of the larger change."""
    tried = 0
    target = Target("", "layer", "weight")
    for case in cases(kind):
        shape = tuple(case.weight.shape)
        if not case.delta.additive:
            continue
        third = (LoRA if len(shape) > 1 else Full).example(shape, r=3, generator=case.generator)
        given: list[dict[Target, Delta]] = [{target: case.delta}, {target: third}, {target: case.other}]
        result = composed(parts(given, WEIGHTS), REGISTRY.method(name).made({}))
        each = [weight * dense(one[target], shape) for weight, one in zip(WEIGHTS, given, strict=True)]
        wanted, size = each[0] + each[1] + each[2], max(float(one.norm()) for one in each)
        found = dense(result.deltas[target], shape)
        assert float((found - wanted).norm()) <= 1e-6 * size, case.name
        assert float(each[0].norm()) > 1e-2 * size, case.name
        assert float((found - (wanted - each[0])).norm()) > 1e-3 * size, case.name
        tried += 1
    assert tried


@pytest.mark.parametrize("kind", ADDITIVE)
def test_every_two_additive_kinds_add_exactly(kind: Kind) -> None:
    """Law 12 for each pair of kinds, on the first shape that both take; the base tells shapes that tensors do not."""
    target = Target("", "layer", "weight")
    tried = 0
    for other in REGISTRY.kinds.values():
        firsts = {tuple(case.weight.shape): case.delta for case in EXAMPLES[kind.name]}
        seconds = {tuple(case.weight.shape): case.other for case in EXAMPLES.get(other.name, ())}
        shape = next((shape for shape in firsts if shape in seconds), None)
        if shape is None:
            continue
        given: list[dict[Target, Delta]] = [{target: firsts[shape]}, {target: seconds[shape]}]
        base = torch.zeros(shape, dtype=torch.float64)
        result = composed(parts(given, (0.7, -0.4)), REGISTRY.method("linear").made({}), base=base)
        each = [weight * dense(one[target], shape) for weight, one in zip((0.7, -0.4), given, strict=True)]
        size = max(float(one.norm()) for one in each)
        assert float((dense(result.deltas[target], shape) - sum(each)).norm()) <= 1e-6 * size, other.name
        assert min(float(one.norm()) for one in each) > 1e-2 * size, other.name
        tried += 1
    assert tried


@pytest.mark.parametrize("law", METHOD_LAWS.values(), ids=METHOD_LAWS.keys())
@pytest.mark.parametrize("method", METHODS)
def test_the_method_keeps_the_law(method: type[Method], law: Callable[[Method], None]) -> None:
    law(method.made({"t": 0.3} if method.name == "slerp" else {}))


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class First(SumMethod):
    """A method that breaks what it declares: it takes the first adapter alone."""

    name: ClassVar[str] = "first"
    title: ClassVar[str] = "the first"
    source: ClassVar[str] = "a test"

    def coefficients(self, weights: Sequence[float]) -> Sequence[float]:
        return [1.0, *[0.0] * (len(weights) - 1)]


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Hasty(SumMethod):
    """A method whose result is another one each time."""

    name: ClassVar[str] = "hasty"
    title: ClassVar[str] = "hasty"
    source: ClassVar[str] = "a test"

    def coefficients(self, weights: Sequence[float]) -> Sequence[float]:
        return [weight * (1 + float(torch.rand(1))) for weight in weights]


@pytest.mark.parametrize(
    ("method", "law"),
    [
        (First(), "order_counts_only_where_declared"),
        (First(), "every_adapter_counts"),
        (Hasty(), "threads_count_for_nothing"),
    ],
    ids=str,
)
def test_the_laws_catch_a_method_that_breaks_them(method: Method, law: str) -> None:
    with pytest.raises(AssertionError, match=method.name):
        METHOD_LAWS[law](method)
    with pytest.raises(AssertionError):
        check_method(method)
