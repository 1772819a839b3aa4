"""What a kind adds to a module's output is what its change to the weight adds, for every kind and every site.

The reference is torch's own operation with and without the changed weight, in float64.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import pytest
import torch

from lorahub.bases.site import Site
from lorahub.deltas.delta import Delta
from lorahub.deltas.kind import Kind
from lorahub.deltas.lora import LoRA
from lorahub.errors import BaseMismatch
from lorahub.plugins import load_registry

KINDS = load_registry().kinds
RANK = 2
LINEAR = Site(op="linear")
EMBEDDING = Site(op="embedding")


def conv(*kernel: int, stride: int = 1, padding: int | str = 0, dilation: int = 1, groups: int = 1) -> Site:
    n = len(kernel)
    return Site(
        op="conv",
        kernel=kernel,
        stride=(stride,) * n,
        padding=padding if isinstance(padding, str) else (padding,) * n,
        dilation=(dilation,) * n,
        groups=groups,
    )


CIRCULAR = replace(conv(3, 3), around=(1, 1, 1, 1), padding_mode="circular")

SITES: dict[str, tuple[Site, tuple[int, ...], tuple[int, ...]]] = {
    "linear": (LINEAR, (12, 8), (2, 5, 8)),
    "linear, more inputs": (LINEAR, (8, 12), (3, 12)),
    "linear, square": (LINEAR, (8, 8), (2, 3, 8)),
    "linear, no rows": (LINEAR, (12, 8), (0, 8)),
    "embedding": (EMBEDDING, (12, 8), (2, 5)),
    "conv 1x1": (conv(1, 1), (12, 8, 1, 1), (2, 8, 4, 3)),
    "conv 3x3, padded, stride 2": (conv(3, 3, stride=2, padding=1), (8, 6, 3, 3), (2, 6, 7, 5)),
    "conv 3x3, same, dilated": (conv(3, 3, padding="same", dilation=2), (8, 6, 3, 3), (2, 6, 6, 5)),
    "conv 3x3, circular": (CIRCULAR, (8, 6, 3, 3), (2, 6, 5, 4)),
    "conv 3x3, groups": (conv(3, 3, padding=1, groups=2), (8, 6, 3, 3), (2, 12, 5, 5)),
    "conv 3": (conv(3, padding=1), (8, 6, 3), (2, 6, 7)),
    "conv 3x2x1": (conv(3, 2, 1), (8, 6, 3, 2, 1), (2, 6, 4, 3, 2)),
    "conv, no rows": (conv(3, 3), (8, 6, 3, 3), (0, 6, 5, 5)),
}
"""What is called -> the site, the weight's shape, the input's."""

FORMS = (0, 1, 2, 3)
"""Seeds: kinds of several forms draw one of them for each."""


@dataclass(frozen=True, slots=True)
class Drawn:
    delta: Delta
    weight: torch.Tensor
    x: torch.Tensor
    y: torch.Tensor
    site: Site


def drawn(kind: Kind, called: str) -> Iterator[Drawn]:
    """Every class and form of the kind at a site, where it has any for such a weight."""
    site, shape, inputs = SITES[called]
    for cls in kind.deltas:
        for seed in FORMS:
            generator = torch.Generator().manual_seed(seed)
            try:
                delta = cls.example(shape, r=RANK, generator=generator)
            except BaseMismatch:
                continue
            weight = torch.randn(shape, generator=generator, dtype=torch.float64)
            if site.op == "embedding":
                x = torch.randint(shape[0], inputs, generator=generator)
            else:
                x = torch.randn(inputs, generator=generator, dtype=torch.float64)
            yield Drawn(delta, weight, x, site.call(x, weight), site)


def bound(each: Drawn, change: torch.Tensor) -> float:
    """Each output is a sum over at most n products of numbers no larger than these, in any order of float64."""
    n = each.weight[0].numel() * each.weight.shape[0]
    largest = max(1.0, *(float(each.abs().max()) for each in (change, each.y) if each.numel()))
    inputs = 1.0 if each.site.op == "embedding" or not each.x.numel() else float(each.x.abs().max())
    return 4 * n * torch.finfo(torch.float64).eps * largest * max(1.0, inputs)


def by_hand(each: Drawn) -> torch.Tensor:
    """The operation of torch with the change in the weight's place."""
    change = each.delta.delta(each.weight)
    functional = torch.nn.functional
    if each.site.op == "linear":
        return torch.matmul(each.x, change.T)
    if each.site.op == "embedding":
        return change[each.x]
    x = each.x
    padding = each.site.padding
    if each.site.padding_mode != "zeros":
        x, padding = functional.pad(x, each.site.around, mode=each.site.padding_mode), 0
    op = {1: functional.conv1d, 2: functional.conv2d, 3: functional.conv3d}[len(each.site.kernel)]
    where = {"stride": each.site.stride, "padding": padding, "dilation": each.site.dilation}
    return op(x, change, groups=each.site.groups, **where)


@pytest.mark.parametrize("called", SITES)
@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS.keys())
def test_the_contribution_is_what_the_changed_weight_adds(kind: Kind, called: str) -> None:
    for each in drawn(kind, called):
        found = each.delta.contribution(each.x, each.y, each.site)
        if found is None:
            continue
        expected = by_hand(each)
        assert found.shape == expected.shape == each.y.shape
        assert found.dtype is torch.float64
        if expected.numel():
            assert float(expected.norm() / each.y.norm()) > 1e-2
            assert float((found - expected).abs().max()) <= bound(each, expected)
            assert float(expected.abs().max()) > bound(each, expected)  # so leaving it out would fail


def gives(name: str, called: str) -> set[bool]:
    """Whether the kind contributes at a site, over its forms."""
    return {each.delta.contribution(each.x, each.y, each.site) is not None for each in drawn(KINDS[name], called)}


def test_every_additive_kind_of_a_few_numbers_contributes_to_a_linear_layer() -> None:
    whole = {"conv-view", "expert-lora", "full", "fourierft", "waveft", "shira", "supertuning", "beft", "lora-sparse"}
    additive = {name for name, kind in KINDS.items() if any(cls.additive for cls in kind.deltas)}
    silent = {name for name in additive if True not in gives(name, "linear")}
    assert silent <= whole


def test_kinds_that_look_at_the_weight_do_not_contribute() -> None:
    for name, kind in KINDS.items():
        if not any(cls.additive for cls in kind.deltas):
            for called in SITES:
                assert gives(name, called) <= {False}


@pytest.mark.parametrize(
    "called", ["linear", "embedding", "conv 1x1", "conv 3x3, padded, stride 2", "conv 3x3, groups"]
)
def test_lora_contributes_everywhere(called: str) -> None:
    lora = [each for each in drawn(KINDS["lora"], called) if isinstance(each.delta, LoRA)]
    assert lora
    assert all(each.delta.contribution(each.x, each.y, each.site) is not None for each in lora)


@pytest.mark.parametrize("called", SITES)
@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS.keys())
def test_whether_there_is_a_contribution_does_not_depend_on_the_batch(kind: Kind, called: str) -> None:
    for each in drawn(kind, called):
        found = each.delta.contribution(each.x, each.y, each.site)
        none = each.delta.contribution(each.x[:0], each.y[:0], each.site)
        assert (found is None) == (none is None)
        assert none is None or none.shape == each.y[:0].shape


@pytest.mark.parametrize(
    "name", ["lora", "vera", "pvera", "randlora", "miss", "c3a", "gralora", "lokr", "loha", "delora"]
)
def test_gradients_reach_the_input_and_every_trained_number_as_through_the_weight(name: str) -> None:
    for each in drawn(KINDS[name], "linear"):
        if each.delta.contribution(each.x, each.y, each.site) is None:
            continue
        fields = {key: value for key, value in each.delta.tensors().items() if value.is_floating_point()}
        wide = {key: value.double().requires_grad_() for key, value in fields.items()}
        delta = replace(each.delta, **wide)  # type: ignore[type-var]  # every delta is a dataclass
        x = each.x.clone().requires_grad_()
        pull = torch.randn(each.y.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))

        def grads(output: torch.Tensor) -> list[torch.Tensor | None]:
            given = [x, *wide.values()]  # noqa: B023 - called at once
            return list(torch.autograd.grad((output * pull).sum(), given, allow_unused=True))  # noqa: B023

        live = delta.contribution(x, each.y, each.site)
        assert live is not None
        through = x @ delta.delta(each.weight).T
        for one, other in zip(grads(live), grads(through), strict=True):
            assert (one is None) == (other is None)
            if one is not None and other is not None:
                torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS.keys())
def test_a_contribution_has_the_dtype_of_the_output_whatever_the_adapter_is_stored_in(
    kind: Kind, dtype: torch.dtype
) -> None:
    for each in drawn(kind, "linear"):
        found = each.delta.contribution(each.x.to(dtype), each.y.to(dtype), each.site)
        if found is not None:
            assert found.dtype is dtype
            expected = by_hand(each)
            assert float((found - expected).norm() / expected.norm()) < 40 * torch.finfo(dtype).eps
