"""One batch over many adapters: against a loop over rows in float64, and against what a selection must not do."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lorahub.bases.site import Site
from lorahub.deltas.delta import LowRank
from lorahub.engine.kernels import segmented_torch
from lorahub.engine.kernels.choice import Choice
from lorahub.engine.kernels.segments import Segments
from lorahub.errors import BaseMismatch, UsageError
from lorahub.live import grouped
from lorahub.live.grouped import Rows, add

LINEAR = Site(op="linear")
CONV = Site(op="conv", kernel=(3, 3), stride=(2, 2), padding=(1, 1), dilation=(1, 1))
EMBEDDING = Site(op="embedding")

IN, OUT = 24, 20


def factors(
    ranks: Mapping[str, int], *, into: int = IN, out: int = OUT, dtype: torch.dtype = torch.float64
) -> dict[str, LowRank]:
    """Normal factors for each adapter, each with a scale of its own; the change is as large as the input."""
    generator = torch.Generator().manual_seed(7)

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float64).to(dtype)

    return {
        name: LowRank(normal(out, rank), normal(rank, into), 0.25 * (at + 1) / rank)
        for at, (name, rank) in enumerate(ranks.items())
    }


def batch(*size: int, dtype: torch.dtype = torch.float64, seed: int = 3) -> torch.Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def by_hand(
    y: torch.Tensor,
    x: torch.Tensor,
    names: Sequence[str | None],
    given: Mapping[str, LowRank],
    weights: Mapping[str, float] | None = None,
) -> torch.Tensor:
    """Row by row, from multiplied-out changes, in float64."""
    result = y.double().clone()
    for row, name in enumerate(names):
        if name in given:
            low = given[name]  # type: ignore[index]  # None is in no mapping
            change = (low.up.double() @ low.down.double()) * low.scale * (weights or {}).get(name or "", 1.0)
            result[row] += x[row].double() @ change.T
    return result


NAMES = ("a", "b", "c", "a", None, "b", "d", "e", None, "e", "e", "missing")
RANKS = {"a": 4, "b": 4, "c": 3, "d": 1, "e": 7, "unused": 4}


@pytest.fixture(params=["grouped", "row by row"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both ways of multiplying, whatever the sizes."""
    monkeypatch.setattr(grouped, "LONG", 2**62 if request.param == "grouped" else 0)
    return str(request.param)


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("middle", [(), (1,), (5,), (2, 3)], ids=str)
def test_each_row_gets_the_change_of_its_own_adapter(middle: tuple[int, ...]) -> None:
    x, y = batch(len(NAMES), *middle, IN), batch(len(NAMES), *middle, OUT, seed=4)
    given_factors = factors(RANKS)
    expected = by_hand(y, x, NAMES, given_factors)
    found = add(y.clone(), x, LINEAR, given_factors, Rows(NAMES))
    assert float((expected - y).norm() / y.norm()) > 0.1
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.usefixtures("way")
def test_rows_without_an_adapter_and_of_adapters_that_are_not_here_keep_every_bit() -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        x, y = batch(len(NAMES), 3, IN, dtype=dtype), batch(len(NAMES), 3, OUT, dtype=dtype, seed=4)
        found = add(y.clone(), x, LINEAR, factors(RANKS), Rows(NAMES))
        untouched = [row for row, name in enumerate(NAMES) if name not in RANKS]
        assert torch.equal(found[untouched], y[untouched])
        assert not torch.equal(found, y)


def test_a_batch_that_nobody_adapts_is_returned_as_it_is() -> None:
    x, y = batch(3, IN), batch(3, OUT)
    assert torch.equal(add(y.clone(), x, LINEAR, factors(RANKS), Rows([None] * 3)), y)
    assert torch.equal(add(y.clone(), x, LINEAR, {}, Rows(["a", "b", "c"])), y)
    assert add(y[:0], x[:0], LINEAR, factors(RANKS), Rows([])).shape == (0, OUT)
    assert add(y.new_empty(1, 0, OUT), x.new_empty(1, 0, IN), LINEAR, factors(RANKS), Rows(["a"])).shape == (1, 0, OUT)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("tokens", [1, 2, 5, 17, 600])
def test_what_becomes_of_a_row_does_not_depend_on_the_order_of_the_batch(dtype: torch.dtype, tokens: int) -> None:
    names = [*NAMES * 2, *"aaac"]
    x, y = batch(len(names), tokens, 96, dtype=dtype), batch(len(names), tokens, 80, dtype=dtype, seed=4)
    given_factors = factors({name: 8 * rank for name, rank in RANKS.items()}, into=96, out=80, dtype=dtype)
    first = add(y.clone(), x, LINEAR, given_factors, Rows(names))
    for seed in range(6):
        order = random.Random(seed).sample(range(len(names)), len(names))
        mixed = add(y[order].clone(), x[order], LINEAR, given_factors, Rows([names[row] for row in order]))
        assert torch.equal(mixed, first[order])


def test_what_is_added_is_rounded_once_onto_the_output() -> None:
    """Were the change rounded before it is added, every element could be off by half a unit of the change more."""
    x, y = batch(8, 1, 64, dtype=torch.bfloat16), batch(8, 1, 64, dtype=torch.bfloat16, seed=4)
    names = [f"{row}" for row in range(8)]
    # one large number among zeros: what lies between the factors is exact, so only the sum is rounded
    given_factors = {
        name: LowRank(torch.full((64, 1), 1.0 + at / 128, dtype=torch.bfloat16), torch.eye(64)[:1].bfloat16(), 1.0)
        for at, name in enumerate(names)
    }
    expected = by_hand(y, x, names, given_factors).bfloat16()
    assert torch.equal(add(y.clone(), x, LINEAR, given_factors, Rows(names)), expected)


@pytest.mark.usefixtures("way")
def test_weights_multiply_the_changes_and_are_read_at_every_call() -> None:
    x, y = batch(len(NAMES), 2, IN), batch(len(NAMES), 2, OUT, seed=4)
    given_factors, rows = factors(RANKS), Rows(NAMES)
    weights = torch.ones(len(rows.adapters), dtype=torch.float64)
    for step in range(3):
        weights.copy_(torch.arange(len(rows.adapters)) * 0.5 - step)
        by_name = dict(zip(rows.adapters, weights.tolist(), strict=True))
        expected = by_hand(y, x, NAMES, given_factors, by_name)
        found = add(y.clone(), x, LINEAR, given_factors, rows, weights)
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_factors_that_took_the_place_of_others_are_used_at_once() -> None:
    x, y, rows = batch(2, IN), batch(2, OUT, seed=4), Rows(["a", "b"])
    given_factors = factors({"a": 4, "b": 4})
    add(y.clone(), x, LINEAR, given_factors, rows)
    given_factors["b"] = factors({"other": 2})["other"]
    torch.testing.assert_close(
        add(y.clone(), x, LINEAR, given_factors, rows), by_hand(y, x, ["a", "b"], given_factors), rtol=1e-12, atol=1e-12
    )
    given_factors["a"].up.mul_(3)  # in place: whoever does that says so
    rows.forget()
    torch.testing.assert_close(
        add(y.clone(), x, LINEAR, given_factors, rows), by_hand(y, x, ["a", "b"], given_factors), rtol=1e-12, atol=1e-12
    )


def test_one_selection_serves_modules_of_other_sizes_ranks_dtypes_and_adapters() -> None:
    rows = Rows(NAMES)
    for into, out, dtype, ranks in (
        (IN, OUT, torch.float64, RANKS),
        (OUT, IN, torch.float32, {"a": 1, "e": 1}),
        (IN, OUT, torch.float32, {"b": 5}),
    ):
        x, y = batch(len(NAMES), 3, into, dtype=dtype), batch(len(NAMES), 3, out, dtype=dtype, seed=4)
        given_factors = factors(ranks, into=into, out=out)
        expected = by_hand(y, x, NAMES, given_factors)
        found = add(y.clone(), x, LINEAR, given_factors, rows)
        torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-4)


def test_nothing_is_padded_to_the_largest_rank_and_nothing_is_copied_for_many_rows() -> None:
    names = ["a", "b", "b", "c", *"d" * 40]
    rows = Rows(names)
    assert [each.which for each in rows.classes((8, 8, 512, 8))] == [(0, 1, 1), (2,), (3,) * 40]
    prepared = rows.prepared(factors({"a": 8, "b": 8, "c": 512, "d": 8}), batch(len(names), OUT))
    stacks = grouped._stacks(prepared, rows)
    kept = sum(stack.up.untyped_storage().nbytes() + stack.down.untyped_storage().nbytes() for stack in stacks)
    assert kept == (8 + 8 + 8 + 512 + 8) * (IN + OUT) * 8


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize(
    "arrange", [lambda y: y.transpose(0, 1).contiguous().transpose(0, 1), lambda y: y], ids=["turned", "plain"]
)
def test_inputs_and_outputs_may_lie_in_memory_as_they_like(arrange: Callable[[torch.Tensor], torch.Tensor]) -> None:
    for middle in ((3,), (2, 3)):
        x, y = arrange(batch(len(NAMES), *middle, IN)), arrange(batch(len(NAMES), *middle, OUT, seed=4))
        found = y.clone()
        returned = add(found, x, LINEAR, factors(RANKS), Rows(NAMES))
        assert returned is found
        torch.testing.assert_close(found, by_hand(y, x, NAMES, factors(RANKS)), rtol=1e-12, atol=1e-12)


def test_rows_may_lie_along_another_axis() -> None:
    x, y = batch(3, len(NAMES), IN), batch(3, len(NAMES), OUT, seed=4)
    site = Site(op="linear", rows=1)
    found = add(y.clone(), x, site, factors(RANKS), Rows(NAMES))
    expected = by_hand(y.movedim(1, 0), x.movedim(1, 0), NAMES, factors(RANKS)).movedim(0, 1)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_convolutions_and_embeddings_take_an_adapter_for_each_row_too() -> None:
    names = ["a", "b", None, "a", "c"]
    ranks = {"a": 2, "b": 3, "c": 2}
    x = batch(5, 6, 7, 5)
    change = factors(ranks, into=6 * 9, out=8)
    y = batch(5, 8, 4, 3, seed=4)
    expected = y.clone()
    for row, name in enumerate(names):
        if name:
            low = change[name]
            kernel = (low.up @ low.down * low.scale).reshape(8, 6, 3, 3)
            expected[row] += torch.nn.functional.conv2d(x[row : row + 1], kernel, stride=2, padding=1)[0]
    torch.testing.assert_close(add(y.clone(), x, CONV, change, Rows(names)), expected, rtol=1e-12, atol=1e-12)
    ids = torch.randint(11, (5, 4), generator=torch.Generator().manual_seed(0))
    change, y = factors(ranks, into=6, out=11), batch(5, 4, 6, seed=4)
    weights = torch.tensor([0.5, -2.0, 3.0], dtype=torch.float64)
    expected = y.clone()
    for row, name in enumerate(names):
        if name:
            low = change[name]
            expected[row] += (low.up @ low.down * low.scale)[ids[row]] * weights["abc".index(name)]
    found = add(y.clone(), ids, EMBEDDING, change, Rows(names), weights)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.usefixtures("way")
def test_gradients_reach_inputs_factors_weights_and_outputs() -> None:
    names = ["a", "b", None, "a", "c"]
    given_factors = factors({"a": 2, "b": 3, "c": 2})
    for low in given_factors.values():
        low.up.requires_grad_()
        low.down.requires_grad_()
    x, y = batch(5, 3, IN).requires_grad_(), batch(5, 3, OUT, seed=4).requires_grad_()
    rows = Rows(names)
    weights = torch.tensor([0.5, 2.0, -1.0], dtype=torch.float64, requires_grad=True)
    pull = batch(5, 3, OUT, seed=5)
    inputs = [x, y, weights, *(tensor for low in given_factors.values() for tensor in (low.up, low.down))]

    def loop() -> torch.Tensor:
        parts = []
        for row, name in enumerate(names):
            part = y[row]
            if name:
                low = given_factors[name]
                part = part + x[row] @ (low.up @ low.down).T * (low.scale * weights["abc".index(name)])
            parts.append(part)
        return torch.stack(parts)

    expected = torch.autograd.grad((loop() * pull).sum(), inputs)
    for _ in range(2):  # nothing of the first time is kept
        found = torch.autograd.grad((add(y * 1, x, LINEAR, given_factors, rows, weights) * pull).sum(), inputs)
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


def test_factors_in_training_are_read_anew_at_every_call() -> None:
    x, y, rows = batch(2, IN), batch(2, OUT, seed=4), Rows(["a", "b"])
    given_factors = factors({"a": 4, "b": 4})
    given_factors["a"].up.requires_grad_()
    with torch.no_grad():
        add(y.clone(), x, LINEAR, given_factors, rows)
        given_factors["a"].up.mul_(3)
        found = add(y.clone(), x, LINEAR, given_factors, rows)
    torch.testing.assert_close(found, by_hand(y, x, ["a", "b"], given_factors).detach(), rtol=1e-12, atol=1e-12)


def test_a_batch_of_another_size_is_refused() -> None:
    with pytest.raises(UsageError, match="named for 2 rows, and a module was called with 3"):
        add(batch(3, OUT), batch(3, IN), LINEAR, factors(RANKS), Rows(["a", "b"]))
    with pytest.raises(UsageError, match="cannot be told apart"):
        add(batch(2, OUT), batch(2, IN), Site(op="linear", rows=None), factors(RANKS), Rows(["a", "b"]))


def test_factors_of_other_sizes_are_refused_before_anything_is_added() -> None:
    given_factors = factors({"a": 4}) | factors({"b": 4}, into=IN + 1)
    y = batch(2, OUT)
    before = y.clone()
    with pytest.raises(BaseMismatch, match="different sizes"):
        add(y, batch(2, IN), LINEAR, given_factors, Rows(["a", "b"]))
    assert torch.equal(y, before)


@settings(max_examples=60, deadline=None)
@given(
    names=st.lists(st.sampled_from(["a", "b", "c", "d", None]), min_size=1, max_size=12),
    ranks=st.lists(st.integers(1, 40), min_size=4, max_size=4),
    tokens=st.integers(1, 9),
    into=st.integers(1, 33),
    out=st.integers(1, 33),
    long=st.booleans(),
)
def test_any_mixture_of_ranks_rows_and_sizes_is_the_loop_over_rows(
    names: list[str | None], ranks: list[int], tokens: int, into: int, out: int, long: bool
) -> None:
    given_factors = factors(dict(zip("abcd", ranks, strict=True)), into=into, out=out)
    x, y = batch(len(names), tokens, into), batch(len(names), tokens, out, seed=4)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(grouped, "LONG", 0 if long else 2**62)
        found = add(y.clone(), x, LINEAR, given_factors, Rows(names))
    torch.testing.assert_close(found, by_hand(y, x, names, given_factors), rtol=1e-10, atol=1e-10)


# ------------------------------------------------------------------------------------------------- on a device


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[Segments]:
    """Plays a device with a kernel; what it was launched for."""
    seen: list[Segments] = []

    def run(y: torch.Tensor, x: torch.Tensor, segments: Segments, scales: torch.Tensor) -> None:
        seen.append(segments)
        segmented_torch.add_segments(y, x, segments, scales)

    monkeypatch.setattr(grouped, "adder", lambda *_: Choice("triton", run))
    return seen


@pytest.mark.parametrize("middle", [(), (1,), (2, 3)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_device_takes_all_rows_in_one_call(
    launches: list[Segments], dtype: torch.dtype, middle: tuple[int, ...]
) -> None:
    x, y = batch(len(NAMES), *middle, IN, dtype=dtype), batch(len(NAMES), *middle, OUT, seed=4, dtype=dtype)
    given_factors, rows = factors(RANKS, dtype=dtype), Rows(NAMES)
    expected = by_hand(y, x, NAMES, given_factors)
    assert float((expected - y).norm() / y.norm()) > 0.1
    close = {"rtol": 8 * torch.finfo(dtype).eps, "atol": 8 * torch.finfo(dtype).eps}
    for _ in range(2):  # what is made of a selection is kept
        found = add(y.clone(), x, LINEAR, given_factors, rows)
        torch.testing.assert_close(found.double(), expected, **close)
    assert launches[0] is launches[1]
    assert launches[0].rows == (0, 3, 1, 5, 2, 6, 7, 9, 10)  # by adapter; those that nobody adapts are not among them
    weights = torch.linspace(-1, 2, len(rows.adapters), dtype=dtype)
    by_name = dict(zip(rows.adapters, weights.tolist(), strict=True))
    found = add(y.clone(), x, LINEAR, given_factors, rows, weights)
    torch.testing.assert_close(found.double(), by_hand(y, x, NAMES, given_factors, by_name), **close)
    across = add(y.transpose(0, -1).contiguous().transpose(0, -1).clone(), x, LINEAR, given_factors, rows)
    torch.testing.assert_close(across.double(), expected, **close)


def test_a_device_leaves_gradients_other_layers_and_wider_numbers_to_plain_torch(launches: list[Segments]) -> None:
    x, y = batch(3, IN, dtype=torch.float32), batch(3, OUT, seed=4, dtype=torch.float32)
    rows, given_factors = Rows(["a", "b", "a"]), factors({"a": 4, "b": 2}, dtype=torch.float32)
    add(y.clone(), x.clone().requires_grad_(), LINEAR, given_factors, rows).sum().backward()
    add(y.double(), x.double(), LINEAR, given_factors, rows)
    table = LowRank(torch.ones(9, 2), torch.ones(2, OUT), 1.0)
    add(y.clone(), torch.tensor([1, 2, 3]), EMBEDDING, {"a": table}, rows)
    assert not launches
    given_factors["a"].up.requires_grad_()
    before = by_hand(y, x, ["a", "b", "a"], given_factors)
    with torch.no_grad():  # nothing of factors in training is kept
        for _ in range(2):
            found = add(y.clone(), x, LINEAR, given_factors, rows)
            expected = by_hand(y, x, ["a", "b", "a"], given_factors)
            torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=1e-6)
            given_factors["a"].up.mul_(3)
    assert len(launches) == 2
    assert not torch.allclose(before, expected)


def test_a_batch_that_a_device_changed_is_known_to_autograd_as_changed(launches: list[Segments]) -> None:
    x, y = batch(2, IN, dtype=torch.float32), batch(2, OUT, dtype=torch.float32)
    given_factors = factors({"a": 4}, dtype=torch.float32)
    leaf = torch.ones(2, OUT, requires_grad=True)
    product = leaf * y  # keeps y
    add(y, x, LINEAR, given_factors, Rows(["a", "a"]))
    assert len(launches) == 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.sum().backward()
