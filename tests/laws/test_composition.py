"""Laws 12 and 14, over every registered method: the exact sum is the sum, order and threads count for nothing."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import permutations

import pytest
import torch

from lorahub.bases.layout import Target
from lorahub.composition.combining import Combined, Part, combine
from lorahub.composition.method import Method, ProductMethod
from lorahub.composition.truncate import Budget
from lorahub.deltas.delta import Delta
from lorahub.deltas.expert_lora import ExpertLoRA
from lorahub.deltas.full import Full
from lorahub.deltas.kind import Kind
from lorahub.deltas.lora import LoRA
from lorahub.plugins import load_registry
from lorahub.testing import cases

REGISTRY = load_registry()
SUMS = ("linear", "cat", "task_arithmetic")
ADDITIVE = [
    pytest.param(kind, id=kind.name)
    for kind in REGISTRY.kinds.values()
    if any(cls.additive for cls in kind.deltas) and kind.name != "expert-lora"
]
METHODS = [
    pytest.param(method, id=name) for name, method in REGISTRY.methods.items() if not issubclass(method, ProductMethod)
]
WEIGHTS = (0.7, -0.4, 1.3)


def parts(deltas: Sequence[dict[Target, Delta]], weights: Sequence[float]) -> list[Part]:
    return [
        Part(label=str(number), deltas=each, weights=dict.fromkeys(each, weight), seed=100 + number)
        for number, (each, weight) in enumerate(zip(deltas, weights, strict=True))
    ]


def composed(given: Sequence[Part], method: Method, budget: Budget | None = None, threads: int = 1) -> Combined:
    return combine(given, lambda _: method, budget, dtype=torch.float32, threads=threads)


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
        given = [{target: case.delta}, {target: third}, {target: case.other}]
        result = composed(parts(given, WEIGHTS), REGISTRY.method(name).made({}))
        each = [weight * dense(one[target], shape) for weight, one in zip(WEIGHTS, given, strict=True)]
        wanted, size = each[0] + each[1] + each[2], max(float(one.norm()) for one in each)
        found = dense(result.deltas[target], shape)
        assert float((found - wanted).norm()) <= 1e-6 * size, case.name
        assert float(each[0].norm()) > 1e-2 * size, case.name
        assert float((found - (wanted - each[0])).norm()) > 1e-3 * size, case.name
        tried += 1
    assert tried


def three() -> list[dict[Target, Delta]]:
    """Adapters of different ranks, on a matrix, a convolution, a vector and a stack; none has all of them."""
    generator = torch.Generator().manual_seed(5)
    matrix, conv, bias, stack = (
        Target("", "a", "weight"), Target("", "b", "weight"), Target("", "a", "bias"), Target("", "c", "weight"),
    )  # fmt: skip

    def lora(shape: tuple[int, ...], r: int) -> LoRA:
        return LoRA.example(shape, r=r, generator=generator)

    def experts(r: int) -> ExpertLoRA:
        up, down = torch.randn(3, 10, r, generator=generator), torch.randn(3, r, 6, generator=generator)
        return ExpertLoRA(up, down, 0.5, False)

    def vector() -> Full:
        return Full(torch.randn(12, generator=generator), 0.7)

    return [
        {matrix: lora((12, 9), 2), conv: lora((8, 5, 3, 3), 2), bias: vector(), stack: experts(2)},
        {matrix: lora((12, 9), 3), bias: vector(), stack: experts(1)},
        {matrix: lora((12, 9), 2), conv: lora((8, 5, 3, 3), 1), bias: vector(), stack: experts(2)},
    ]


def made(method: type[Method]) -> Method:
    """The method; slerp away from the middle, where it knows no first and second."""
    return method.made({"t": 0.3} if method.name == "slerp" else {})


def some(method: type[Method]) -> list[dict[Target, Delta]]:
    """As many of the three as the method takes; of equal ranks where it asks for that."""
    found = three()[: method.count[1] or 3]
    if method.name == "peft_linear":
        matrix = Target("", "a", "weight")
        generator = torch.Generator().manual_seed(6)
        return [{matrix: LoRA.example((12, 9), r=2, generator=generator)} for _ in found]
    return found


def whole(result: Combined) -> torch.Tensor:
    """Everything a composition does, as one vector."""
    return torch.cat(
        [dense(delta, delta.shape() or ()).flatten() for _, delta in sorted(result.deltas.items(), key=str)]
    )


@pytest.mark.parametrize("method", METHODS)
def test_the_order_of_adapters_counts_only_where_a_method_says_so(method: type[Method]) -> None:
    """Law 14; the parts keep their seeds, so that what is drawn goes with the adapter."""
    given = parts(some(method), (0.7, 0.4, 1.3)[: method.count[1] or 3])
    first = whole(composed(given, made(method)))
    assert float(first.norm()) > 1e-2
    others = [whole(composed(list(order), made(method))) for order in permutations(given)]
    apart = max(float((other - first).norm() / first.norm()) for other in others)
    assert apart > 1e-3 if method.ordered else apart < 1e-5


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("budget", [None, Budget(rank=2), Budget(energy=0.9)], ids=str)
def test_the_bytes_do_not_depend_on_the_number_of_threads(method: type[Method], budget: Budget | None) -> None:
    given = parts(some(method), (0.7, 0.4, 1.3)[: method.count[1] or 3])
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        one, many = (composed(given, made(method), budget, threads) for threads in (1, 4))
    finally:
        torch.set_num_threads(before)
    assert one.deltas.keys() == many.deltas.keys()
    assert all(
        torch.equal(tensor, many.deltas[target].tensors()[name])
        for target, delta in one.deltas.items()
        for name, tensor in delta.tensors().items()
    )


@pytest.mark.parametrize("method", METHODS)
def test_no_adapter_is_left_out_in_silence(method: type[Method]) -> None:
    given = parts(some(method), (0.7, 0.4, 1.3)[: method.count[1] or 3])
    full = whole(composed(given, made(method)))
    changed = [
        Part(
            label=each.label,
            deltas={t: _twice(d) for t, d in each.deltas.items()},
            weights=each.weights,
            seed=each.seed,
        )
        for each in given
    ]
    for number in range(len(given)):
        other = [*given[:number], changed[number], *given[number + 1 :]]
        assert float((whole(composed(other, made(method))) - full).norm()) > 1e-4 * float(full.norm())


def _twice(delta: Delta) -> Delta:
    """Another change of the same shape."""
    if isinstance(delta, Full):
        return Full(delta.diff.flip(0) * 2, delta.scale)
    if isinstance(delta, ExpertLoRA):
        return ExpertLoRA(delta.up.flip(1) * 2, delta.down, delta.scale, delta.transposed)
    assert isinstance(delta, LoRA)
    return LoRA(delta.up.flip(0) * 2, delta.down, delta.scale)
