"""The door for composition methods: several changes to one matrix in, one change out.

A method is a frozen dataclass whose fields are its parameters, spelled as PEFT and mergekit users know them.  What it
works on is its type:

    SumMethod       nothing but the weights: the result is a weighted sum
    GramMethod      only the inner products of the changes: the result is a weighted sum of them
    FactorMethod    the factors: the result is of low rank again, and nothing of a weight's size is made
    ElementMethod   element by element, in a basis that is part of the method's parameters
    ProductMethod   changes that multiply the weight (gains, turns), one after the other

It sees one matrix at a time and knows no adapters, no files and no other targets.  Weights are never normalised unless
a parameter asks for it, and are those of weight space: a change at weight w is w times the change.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeAlias

from lorahub.composition.algebra.coordinates import enter
from lorahub.composition.algebra.gram import gram_matrix
from lorahub.composition.algebra.truncate import one_thread
from lorahub.deltas.delta import LowRank
from lorahub.errors import UnsupportedKind, UsageError
from lorahub.lazy import torch
from lorahub.names import did_you_mean

if TYPE_CHECKING:
    from typing import Self

__all__ = [
    "Basis",
    "Change",
    "ElementMethod",
    "FactorMethod",
    "GramMethod",
    "Method",
    "PerAdapter",
    "ProductMethod",
    "SumMethod",
    "Terms",
    "each_of",
]

Change: TypeAlias = "LowRank | torch.Tensor"
"""What happens to one matrix [out, in], or one vector [out], at weight 1: factors, or the change itself, float32."""

PerAdapter: TypeAlias = float | tuple[float, ...]
"""A parameter that is one number for all adapters, or one for each in order."""

Basis: TypeAlias = Literal["dense", "core", "knots"]
"""Where element-wise rules are applied: the weight's own elements; the core space of all factors (``core-svd-v1``,
https://arxiv.org/abs/2509.17786); or the shared right factors of KnOTS (https://arxiv.org/abs/2410.19735)."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Terms:
    """What several adapters do to one matrix or vector.

    Attributes:
        shape: [out, in] of the matrix, the kernel's axes flattened into ``in``; or [out] of a vector.
        changes: one for each adapter, at weight 1; factors of rank 0 where it leaves the matrix alone.
        weights: one for each adapter.
        seeds: one for each adapter, from the recipe's seed, its digest and the target: what it draws depends on
            nothing else.
        whole: inner products of the whole adapters, [n, n] float64, for methods whose scope is the adapter.
    """

    shape: tuple[int, ...]
    changes: tuple[Change, ...]
    weights: tuple[float, ...]
    seeds: tuple[int, ...]
    whole: torch.Tensor | None = None

    @property
    def factored(self) -> bool:
        """Whether every change comes as factors."""
        return all(isinstance(change, LowRank) for change in self.changes)

    def factors(self) -> list[LowRank]:
        """The changes as factors.

        Raises:
            UnsupportedKind: one of them has none.
        """
        found = [change for change in self.changes if isinstance(change, LowRank)]
        if len(found) < len(self.changes):
            raise UnsupportedKind(
                "a change has no factors, and this method works on factors alone",
                "make LoRA of it first (lorahub convert, lorahub extract), or take a method that works on elements",
            )
        return found

    def dense(self, number: int) -> torch.Tensor:
        """One change as a tensor of ``shape``, float32, at weight 1; a new one, or the one that was given."""
        change = self.changes[number]
        if not isinstance(change, LowRank):
            return change.float()
        return ((change.up.double() * change.scale).float() @ change.down.float()).reshape(self.shape)

    def stack(self) -> torch.Tensor:
        """All changes as tensors, [n, *shape], float32, at weight 1."""
        with one_thread():
            result = torch.empty(len(self.changes), *self.shape)  # filled one by one: never two of all
            for number in range(len(self.changes)):
                result[number] = self.dense(number)
            return result

    def gram(self) -> torch.Tensor:
        """Their inner products, [n, n], float64."""
        if self.factored:
            return gram_matrix(self.factors())
        with one_thread():
            flat = self.stack().double().flatten(1)
            return flat @ flat.mT

    def sum(self, coefficients: Sequence[float]) -> Change:
        """The changes, each times a number, added: factors side by side where all have them, which is exact."""
        if not self.factored:
            with one_thread():
                total = torch.zeros(self.shape, dtype=torch.float64)
                for number, coefficient in enumerate(coefficients):
                    if coefficient:
                        total += coefficient * self.dense(number).double()
                return total.float()
        kept = [(each, number) for each, number in zip(self.factors(), coefficients, strict=True) if number]
        if not sum(each.up.shape[1] for each, _ in kept):
            out, inner = self.shape
            return LowRank(torch.zeros(out, 1), torch.zeros(1, inner), 1.0)
        up = torch.cat([each.up.double() * (each.scale * number) for each, number in kept], dim=1)
        return LowRank(up, torch.cat([each.down.double() for each, _ in kept]), 1.0)

    def draw(self, number: int) -> torch.Generator:
        """A generator for what is drawn for one adapter here; the same whenever and wherever it is asked for."""
        generator: torch.Generator = torch.Generator().manual_seed(self.seeds[number])
        return generator


class Method(ABC):
    """How changes become one.  Subclasses are frozen dataclasses, final, and registered by ``lorahub_methods``.

    Class attributes:
        name: as recipes and ``--method`` spell it.
        title: what people call it.
        source: the paper, or whose behaviour it is.
        ordered: whether the order of the adapters counts.
        draws: whether it draws at random.
        count: how many adapters it takes: (least, most); None is any number.
        cut: its result is meant to be cut: without a rank, an energy or an error it is not what its name says.
    """

    __slots__ = ()

    name: ClassVar[str]
    title: ClassVar[str]
    source: ClassVar[str]
    ordered: ClassVar[bool] = False
    draws: ClassVar[bool] = False
    count: ClassVar[tuple[int, int | None]] = (1, None)
    cut: ClassVar[bool] = False

    @abstractmethod
    def combine(self, terms: Terms) -> Change:
        """The one change: factors, or a tensor of ``terms.shape``.  Pure, and the same for any number of threads."""

    @classmethod
    def made(cls, parameters: Mapping[str, Any]) -> Self:
        """The method with these parameters.

        Raises:
            UsageError: it has none of that name, or a value is out of its range.
        """
        cls.demand_known(parameters)
        known = {field.name.rstrip("_"): field.name for field in fields(cls)}  # type: ignore[arg-type]  # every method is a dataclass
        plain = {name: tuple(value) if isinstance(value, list) else value for name, value in parameters.items()}
        return cls(**{known[name]: value for name, value in plain.items()})

    @classmethod
    def demand_known(cls, names: Collection[str]) -> None:
        """Return where the method has parameters of all these names.

        Raises:
            UsageError: it has none of that name.
        """
        known = [field.name.rstrip("_") for field in fields(cls)]  # type: ignore[arg-type]  # as above
        for name in names:
            if name not in known:
                raise UsageError(
                    f"the method '{cls.name}' has no parameter '{name}'.{did_you_mean(name, known)}",
                    f"it has: {', '.join(known) or 'none'}",
                )

    @classmethod
    def defaults(cls) -> dict[str, Any]:
        """What its parameters are where nobody says."""
        known = fields(cls)  # type: ignore[arg-type]  # as above
        return {field.name.rstrip("_"): field.default for field in known if field.default is not MISSING}

    def parameters(self) -> dict[str, Any]:
        """Every parameter and its value, as JSON has them; ``lambda``, a word of Python's, is the field ``lambda_``."""
        values = {field.name.rstrip("_"): getattr(self, field.name) for field in fields(self)}  # type: ignore[arg-type]
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


class SumMethod(Method):
    """A weighted sum whose weights follow from those asked for alone; exact, and linear in every adapter."""

    __slots__ = ()

    def combine(self, terms: Terms) -> Change:
        """Factors side by side; added where a change has none."""
        return terms.sum(self.coefficients(terms.weights))

    @abstractmethod
    def coefficients(self, weights: Sequence[float]) -> Sequence[float]:
        """What each change is multiplied with.

        Args:
            weights: what people asked for, one for each.
        """


class GramMethod(Method):
    """A weighted sum whose weights follow from the inner products of the changes alone.

    Subclasses with a field ``scope`` let people choose between "target", as mergekit does, and "adapter": one angle
    for the whole adapters.
    """

    __slots__ = ()

    def combine(self, terms: Terms) -> Change:
        """Ask for the coefficients and add."""
        if terms.whole is None and getattr(self, "scope", "target") == "adapter":
            raise UsageError(
                f"{self.name} with scope=adapter needs the inner products of the whole adapters, and has one target's",
                "give Terms(whole=...), or compose the adapters: lorahub.compose",
            )
        gram = terms.gram() if terms.whole is None else terms.whole
        return terms.sum(self.coefficients(gram, terms.weights))

    @abstractmethod
    def coefficients(self, gram: torch.Tensor, weights: Sequence[float]) -> Sequence[float]:
        """What each change is multiplied with.

        Args:
            gram: inner products of the changes at weight 1, [n, n], float64.
            weights: what people asked for, one for each.
        """


class FactorMethod(Method):
    """From factors to factors.  A vector has none: there the changes are added, each times its weight."""

    __slots__ = ()

    def combine(self, terms: Terms) -> Change:
        """Factors for a matrix, the sum for a vector."""
        return self.factors(terms) if len(terms.shape) == 2 else terms.sum(terms.weights)

    @abstractmethod
    def factors(self, terms: Terms) -> LowRank:
        """The one change of a matrix.

        Raises:
            UnsupportedKind: a change has no factors.
        """


class ElementMethod(Method):
    """Element by element, in a basis.  Subclasses have a field ``basis``."""

    __slots__ = ()

    basis: Basis

    def combine(self, terms: Terms) -> Change:
        """Go into the basis, combine there, and come back."""
        with one_thread():
            coordinates = enter(self.basis, terms)
            return coordinates.back(self.elements(coordinates.stack, terms))

    @abstractmethod
    def elements(self, stack: torch.Tensor, terms: Terms) -> torch.Tensor:
        """The one tensor.

        Args:
            stack: the changes at weight 1, [n, rows, columns] or, for a vector, [n, length]; float32 or float64; it
                may be written to.
            terms: for weights, seeds and the count; its ``changes`` are not in the basis.

        Returns:
            [rows, columns] or [length], of the stack's dtype.
        """


class ProductMethod(Method):
    """Changes that multiply, one after the other; ``multiplicative`` computes them, and sums have none."""

    __slots__ = ()

    def combine(self, terms: Terms) -> Change:
        """Refused: these changes add.

        Raises:
            UnsupportedKind: always.
        """
        raise UnsupportedKind(
            "changes that are added to a weight have no product",
            f"take linear for adapters that add; {self.name} is for those that rescale (IA3) or turn (OFT, HRA)",
        )


def each_of(value: PerAdapter, count: int, name: str) -> tuple[float, ...]:
    """A parameter for each of ``count`` adapters.

    Raises:
        UsageError: it lists another number of values.
    """
    if not isinstance(value, tuple):
        return (value,) * count
    if len(value) != count:
        raise UsageError(f"{name} lists {len(value)} values for {count} adapters", "give one for all, or one for each")
    return value
