"""Law 9 catches a kind whose own way is not its change."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import pytest
import torch

from lorahub.deltas.delta import Delta, LowRank
from lorahub.deltas.fit import expect_matrix
from lorahub.deltas.full import FULL, Full
from lorahub.testing import attached_equals_merged


@dataclass(frozen=True, slots=True, eq=False)
class Honest(Delta):
    """A full difference with a way of its own, on linear layers."""

    diff: torch.Tensor

    kind: ClassVar[str] = "full"
    additive: ClassVar[bool] = True

    def delta(self, weight, **siblings):
        return self.diff.to(weight) * 1.0

    def region(self, rows, cols):
        return type(self)(Full(self.diff).region(rows, cols).diff)

    def contribution(self, x, y, site):
        return x @ self.diff.to(y).T if site.op == "linear" else None

    def shape(self):
        return tuple(self.diff.shape)

    @classmethod
    def fresh(cls, shape, *, r, generator):
        return cls(torch.zeros(shape))

    @classmethod
    def example(cls, shape, *, r, generator):
        expect_matrix("full", shape)
        return cls(torch.randn(shape, generator=generator))


class Doubled(Honest):
    """Adds its change twice."""

    def contribution(self, x, y, site):
        return x @ self.diff.to(y).T * 2 if site.op == "linear" else None


class Idle(Honest):
    """Adds nothing."""

    def contribution(self, x, y, site):
        return torch.zeros_like(y) if site.op == "linear" else None


class Factored(Honest):
    """Claims factors that are not its change."""

    def low_rank(self):
        return LowRank(self.diff.flatten(1)[:, :1], torch.ones(1, self.diff.flatten(1).shape[1]), 1.0)

    def contribution(self, x, y, site):
        return Delta.contribution(self, x, y, site)


def test_a_kind_with_a_way_of_its_own_keeps_the_law():
    attached_equals_merged(replace(FULL, deltas=(Honest,)))


@pytest.mark.parametrize("broken", [Doubled, Idle, Factored])
def test_a_way_that_is_not_the_change_breaks_it(broken):
    with pytest.raises(AssertionError, match="attached, it is not what merging gives"):
        attached_equals_merged(replace(FULL, deltas=(broken,)))
