"""Every registered kind keeps every law, and every law catches a kind that breaks it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar

import pytest
import torch

from lorahub.deltas.delta import Delta, LowRank
from lorahub.deltas.fit import expect_matrix
from lorahub.deltas.full import FULL, Full
from lorahub.deltas.ia3 import IA3
from lorahub.deltas.kind import Field, Kind, Leaf
from lorahub.deltas.lora import LORA
from lorahub.plugins import load_registry
from lorahub.testing import LAWS, cases, check_kind

KINDS = load_registry().kinds
BUILT_IN = {"lora", "dora", "replace", "full", "ia3"}


def test_the_foundation_kinds_are_registered():
    assert KINDS.keys() >= BUILT_IN


@pytest.mark.parametrize("law", LAWS.values(), ids=LAWS.keys())
@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS.keys())
def test_the_kind_keeps_the_law(kind: Kind, law: Callable[[Kind], None]):
    law(kind)


@pytest.mark.parametrize("name", sorted(BUILT_IN))
def test_the_laws_see_every_delta_class_on_several_shapes(name: str):
    kind = KINDS[name]
    shapes = {cls: set() for cls in kind.deltas}
    for case in cases(kind):
        shapes[type(case.delta)].add(tuple(case.weight.shape))
    assert all(len(found) >= 5 for found in shapes.values())


@dataclass(frozen=True, slots=True, eq=False)
class Shift(Delta):
    """A well-behaved additive delta, to be broken one method at a time."""

    diff: torch.Tensor

    kind: ClassVar[str] = "full"
    additive: ClassVar[bool] = True

    def delta(self, weight, **siblings):
        return self.diff.to(weight) * 1.0

    def region(self, rows, cols):
        full = Full(self.diff).region(rows, cols)
        return type(self)(full.diff)

    def shape(self):
        return tuple(self.diff.shape)

    @classmethod
    def fresh(cls, shape, *, r, generator):
        return cls(torch.zeros(shape))

    @classmethod
    def example(cls, shape, *, r, generator):
        return cls(torch.randn(shape, generator=generator))


def kind_of(cls: type[Delta]) -> Kind:
    """The full-difference kind around another delta class."""

    def dissolve(deltas):
        match list(deltas.values()):
            case [cls(diff=diff)]:
                return {"diff": diff}, {}
        return None

    return replace(
        FULL, deltas=(cls,), build=lambda group, tensors: {group.parameter: cls(tensors["diff"])}, dissolve=dissolve
    )


def test_a_kind_that_keeps_all_laws_passes():
    check_kind(kind_of(Shift))


class WrongDtype(Shift):
    def delta(self, weight, **siblings):
        return self.diff.float() * 1.0


class Aliases(Shift):
    def delta(self, weight, **siblings):
        return self.diff.to(weight)


class WritesTheWeight(Shift):
    def delta(self, weight, **siblings):
        weight.mul_(2)
        return self.diff.to(weight) * 1.0


class NotFinite(Shift):
    def delta(self, weight, **siblings):
        return self.diff.to(weight) / 0


class TooSmall(Shift):
    def delta(self, weight, **siblings):
        return self.diff.to(weight) * 1e-9


class FreshIsNot(Shift):
    @classmethod
    def fresh(cls, shape, *, r, generator):
        return cls(torch.full(shape, 1e-30))


class LooksAtTheWeight(Shift):
    def delta(self, weight, **siblings):
        return self.diff.to(weight) * weight


class DoesNotLook(Shift):
    additive: ClassVar[bool] = False


class Forgets(Shift):
    calls: ClassVar[list[int]] = []

    def delta(self, weight, **siblings):
        self.calls.append(1)
        return self.diff.to(weight) * (1.0 + 0.01 * len(self.calls))


class RegionIgnoresColumns(Shift):
    def region(self, rows, cols):
        full = Full(self.diff).region(rows, slice(None))
        return type(self)(full.diff[:, : len(range(full.diff.shape[1])[cols])] if full.diff.dim() > 1 else full.diff)


class RegionReverses(Shift):
    def region(self, rows, cols):
        cut = Full(self.diff).region(rows, cols).diff
        return type(self)(cut.flip(0) if isinstance(rows, tuple) else cut)


class WrongReplacement(Shift):
    def replacement(self):
        return self.diff


class WrongFactors(Shift):
    def low_rank(self):
        flat = self.diff.flatten(1) if self.diff.dim() > 1 else self.diff[:, None]
        return LowRank(flat, torch.eye(flat.shape[1]), 1.5)


class RefusesEverything(Shift):
    @classmethod
    def example(cls, shape, *, r, generator):
        expect_matrix("shift", ())


@pytest.mark.parametrize(
    ("broken", "law", "sentence"),
    [
        (WrongDtype, "shape_is_kept", "is torch.float32"),
        (Aliases, "shape_is_kept", "shares memory with the delta"),
        (WritesTheWeight, "shape_is_kept", "wrote into the weight"),
        (NotFinite, "shape_is_kept", "not finite"),
        (TooSmall, "shape_is_kept", "too little to test with"),
        (RefusesEverything, "shape_is_kept", "refuses every shape"),
        (FreshIsNot, "fresh_changes_nothing", "a fresh delta changes"),
        (LooksAtTheWeight, "additive_kinds_ignore_the_weight_and_commute", "declared additive, and looks"),
        (DoesNotLook, "additive_kinds_ignore_the_weight_and_commute", "does not look at the weight"),
        (Forgets, "weights_are_linear", "another change the second time"),
        (RegionIgnoresColumns, "regions_are_local_or_refused", "is not that part of the change"),
        (RegionReverses, "regions_are_local_or_refused", "is not that part of the change"),
        (RegionIgnoresColumns, "layouts_land_alike", "split columns"),
        (WrongReplacement, "full_merges_alike", "is not the merged value"),
        (WrongFactors, "full_merges_alike", "is not the change"),
    ],
)
def test_a_law_names_the_delta_that_breaks_it(broken: type[Delta], law: str, sentence: str):
    with pytest.raises(AssertionError, match=sentence):
        LAWS[law](kind_of(broken))


def test_a_declaration_that_leaves_the_weight_unbound_is_caught():
    loose = replace(IA3, touches=lambda group: tuple(replace(touch, dims="*any") for touch in IA3.touches(group)))
    with pytest.raises(AssertionError, match="any size pass"):
        LAWS["declarations_are_what_build_does"](loose)


def test_a_build_that_swaps_its_slots_is_caught():
    def build(group, tensors):
        return {"weight": type(LORA.build(group, tensors)["weight"])(tensors["up"] * 2, tensors["down"] / 2, 0.7)}

    with pytest.raises(AssertionError, match="holds other tensors"):
        LAWS["declarations_are_what_build_does"](replace(LORA, build=build))


def test_a_kind_that_recognises_none_of_its_deltas_is_caught():
    with pytest.raises(AssertionError, match="recognises no example"):
        LAWS["declarations_are_what_build_does"](replace(LORA, dissolve=lambda deltas: None))


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"leaves": (Leaf(slot="up", suffix="lora_B.weight"),)}, "no word for down"),
        ({"leaves": (*LORA.spellings[0].leaves, Leaf(slot="down", suffix="lora_B.weight"))}, "spell two slots"),
        ({"leaves": (*LORA.spellings[0].leaves, Leaf(slot="middle", suffix="lora_M"))}, "does not declare"),
        ({"fields": {"r": Field(used=True, inert=True)}}, "not just one of"),
        ({"fields": {"r": Field(used=True)}}, "writes the fields"),
        ({"options": lambda config, module, slots: {"scale": 0.5}}, "reads another scale back"),
    ],
)
def test_a_spelling_that_loses_something_is_caught(change: dict[str, object], sentence: str):
    broken = replace(LORA, spellings=(replace(LORA.spellings[0], **change),))
    with pytest.raises(AssertionError, match=sentence):
        LAWS["spellings_lose_nothing"](broken)
