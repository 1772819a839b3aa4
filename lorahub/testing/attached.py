"""The law of modules with deltas attached: they give what merged weights give."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

from lorahub.bases.index import BaseRef
from lorahub.bases.layout import Piece, Target
from lorahub.bases.torch_module import TorchModule
from lorahub.deltas.delta import Delta
from lorahub.deltas.kind import Kind
from lorahub.engine.planning.plan import Form, Plan, Step, Term
from lorahub.lazy import torch
from lorahub.live.attached import Live
from lorahub.testing.cases import Case, cases
from lorahub.testing.judging import close_outputs, hold

if TYPE_CHECKING:
    from torch import nn

__all__ = ["attached_equals_merged"]


def attached_equals_merged(kind: Kind) -> None:
    """Law 9: a module with two deltas attached gives what it gives with both merged, and rows of a batch may differ.

    Linear layers, embeddings and convolutions (one of them in groups, strided and dilated), and biases.
    """
    for case in cases(kind):
        for how, module, name, x in _modules(case):
            says = f"{case.name}: {how}"
            weight = module.get_parameter(name).detach()
            plain = module(x).detach()
            terms = {"one": (0.75, case.delta), "other": (-0.5, case.other)}

            def given(
                value: torch.Tensor, module: nn.Module = module, name: str = name, x: torch.Tensor = x
            ) -> torch.Tensor:
                output: torch.Tensor = torch.func.functional_call(module, {name: value}, x)
                return output.detach()

            merged = weight + sum(strength * delta.delta(weight) for strength, delta in terms.values())
            expected = given(merged)
            by_row = [(row, weight + delta.delta(weight)) for row, delta in ((0, case.other), (2, case.delta))]
            of_row = [(row, alone, given(alone)[row]) for row, alone in by_row]
            hold(not torch.equal(expected, plain), f"{says}: merging makes no difference, so nothing is tested")
            live = _attach(module, name, {adapter: delta for adapter, (_, delta) in terms.items()})
            try:
                live.set_adapters([*terms], weights=[strength for strength, _ in terms.values()])
                found = module(x).detach()
                close_outputs(found, expected, (x, weight, merged), f"{says}: attached, it is not what merging gives")
                if name == "weight":
                    live.set_rows(["other", None, "one"])
                    rows = module(x).detach()
                    for row, alone, own in of_row:
                        close_outputs(rows[row], own, (x, weight, alone), f"{says}: row {row} is not its own")
                    hold(torch.equal(rows[1], plain[1]), f"{says}: a row without an adapter changes")
            finally:
                live.detach()
            hold(torch.equal(module(x), plain), f"{says}: detached, the module is not what it was")


def _modules(case: Case) -> Iterator[tuple[str, nn.Module, str, torch.Tensor]]:
    """Modules that have the case's weight, in float64: (what it is, module, which parameter, a batch of 3 for it)."""
    sizes, generator = case.weight.shape, case.generator

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    def holding(module: nn.Module, name: str) -> nn.Module:
        module = module.double().eval()
        with torch.no_grad():
            module.get_parameter(name).copy_(case.weight)
        return module

    if len(sizes) == 1:
        yield "a bias", holding(torch.nn.Linear(5, sizes[0]), "bias"), "bias", noise(3, 5)
        return
    if len(sizes) == 2:
        yield "a linear layer", holding(torch.nn.Linear(sizes[1], sizes[0]), "weight"), "weight", noise(3, 2, sizes[1])
        ids = torch.randint(sizes[0], (3, 20), generator=generator)
        yield "an embedding", holding(torch.nn.Embedding(*sizes), "weight"), "weight", ids
        return
    out, width, *kernel = sizes
    make = getattr(torch.nn, f"Conv{len(kernel)}d")
    places = [6] * len(kernel)
    yield "a convolution", holding(make(width, out, kernel, padding=1), "weight"), "weight", noise(3, width, *places)
    grouped = make(2 * width, out, kernel, groups=2, stride=2, dilation=2, padding=2, padding_mode="circular")
    yield "a convolution in groups", holding(grouped, "weight"), "weight", noise(3, 2 * width, *places)


def _attach(module: nn.Module, name: str, deltas: Mapping[str, Delta]) -> Live:
    """The deltas attached to one parameter, under their names and inactive."""
    framework = TorchModule()
    index = framework.index_model(module, BaseRef())
    form = Form(tuple(index.parameters[name].shape), index.parameters[name].dtype)
    target = Target("", "", name)

    def plan(adapter: str, delta: Delta) -> Plan:
        term = Term(
            adapter=adapter,
            weight=1.0,
            target=target,
            piece=Piece(parameter=name),
            kind=delta.kind,
            additive=delta.additive,
            replaces=delta.replacement() is not None,
            local=False,
            rank=None,
        )
        step = Step(out=name, source=name, before=form, after=form, terms=(term,), stored_as=name, saved_as=name)
        return Plan(base=BaseRef(), framework=framework.name, steps=(step,), untouched=())

    live = Live(
        module,
        index,
        framework,
        plan=lambda adapter, delta: (plan(adapter, cast("Delta", delta)), _Holder({target: cast("Delta", delta)})),
        judge=lambda _: None,
    )
    for adapter, delta in deltas.items():
        live.add(adapter, delta)
    return live


@dataclass(frozen=True, slots=True)
class _Holder:
    deltas: Mapping[Target, Delta]
