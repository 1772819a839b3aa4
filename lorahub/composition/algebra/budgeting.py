"""Ranks for many targets out of one budget: water-filling over the singular values of all of them.

A quality asked of the whole is reached with the fewest singular values by keeping the largest ones, wherever they are:
all that lie above one level.  A number of parameters is best spent on those with the most energy for what they cost.
Numbers only; what they belong to is the caller's to know.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from lorahub.composition.algebra.truncate import ROUNDING, Budget
from lorahub.errors import UsageError
from lorahub.lazy import torch

__all__ = ["Shared", "Spectrum", "budget_of", "ranks_for_error", "ranks_for_parameters"]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Spectrum:
    """The singular values of one target's change.

    Attributes:
        values: descending, float64; the largest ones, at least as many as may be kept.
        cost: parameters that one of them takes: out + in * prod(k).
        missing: the sum of squares of those that are not in ``values``.
    """

    values: torch.Tensor
    cost: int
    missing: float = 0.0

    @property
    def total(self) -> float:
        """The squared Frobenius norm of the change."""
        return self.missing + float((self.values**2).sum())


@dataclass(frozen=True, slots=True, kw_only=True)
class Shared:
    """One budget for all targets together.

    Attributes:
        lost: the share of the energy of all changes that may be lost, or None.
        parameters: numbers that all factors together may have, or None; exactly one of the two.
        most: the largest rank of any target, or None.
    """

    lost: float | None = None
    parameters: int | None = None
    most: int | None = None

    def ranks(self, spectra: Sequence[Spectrum]) -> list[int]:
        """The rank of each target; 0 leaves one out."""
        if self.parameters is not None:
            return ranks_for_parameters(spectra, self.parameters)
        return ranks_for_error(spectra, self.lost or 0.0)


def budget_of(
    rank: int | None,
    energy: float | None,
    error: float | None,
    *,
    adaptive: bool = False,
    parameters: int | None = None,
    ratio: float | None = None,
    cumulative: float | None = None,
) -> Budget | Shared:
    """A budget for every target, or, where it is adaptive or a number of parameters, one for all together.

    Args:
        rank: see ``Budget``; in a common budget it bounds each target.
        energy: see ``Budget``.
        error: see ``Budget``.
        adaptive: the energy or error is that of all together.
        parameters: how many all factors may have.
        ratio: see ``Budget``.
        cumulative: see ``Budget``.

    Raises:
        UsageError: the demands contradict each other, or a number is out of its range.
    """
    if not adaptive and parameters is None:
        return Budget(rank=rank, energy=energy, error=error, ratio=ratio, cumulative=cumulative)
    if ratio is not None or cumulative is not None:
        raise UsageError("sv_ratio and sv_cumulative speak of single targets", "for all together: --energy or --error")
    most = Budget(rank=rank).rank if rank is not None else None
    if parameters is None:
        return Shared(lost=Budget(energy=energy, error=error).lost(), most=most)
    if energy is not None or error is not None or parameters < 1:
        raise UsageError("a number of parameters is a budget by itself, of 1 or more", "--parameters 1000000")
    return Shared(parameters=parameters, most=most)


def ranks_for_error(spectra: Sequence[Spectrum], lost: float) -> list[int]:
    """The fewest singular values in all with which no more than a share of the energy is lost; 0 leaves a target out.

    Where the values that are known do not suffice, all of them are kept.

    Args:
        spectra: of every target.
        lost: the share of the sum of all squared norms that may be lost: 1 - energy, or a relative error squared.

    Raises:
        UsageError: ``lost`` is no share.
    """
    if not 0 <= lost < 1:
        raise UsageError(f"a share of {lost} cannot be lost", "give an energy in (0, 1] or an error in [0, 1)")
    allowed = max(lost, ROUNDING**2) * sum(each.total for each in spectra)
    left = allowed - sum(each.missing for each in spectra)
    ranks = [int((each.values > 0).sum()) for each in spectra]
    for square, number, _ in sorted(_steps(spectra, lambda square, _cost: square), key=lambda step: step[:2]):
        left -= square
        if left < 0:
            break
        ranks[number] -= 1
    return ranks


def ranks_for_parameters(spectra: Sequence[Spectrum], parameters: int) -> list[int]:
    """The ranks with the most energy that take at most so many parameters; 0 leaves a target out.

    Raises:
        UsageError: not one singular value fits.
    """
    ranks, left = [0] * len(spectra), parameters
    full = set[int]()
    for _, number, _ in sorted(
        _steps(spectra, lambda square, cost: square / cost), key=lambda step: (-step[0], step[1])
    ):
        if number in full:
            continue
        if spectra[number].cost > left:
            full.add(number)  # its smaller values cost as much; another target's may fit
            continue
        ranks[number] += 1
        left -= spectra[number].cost
    if not any(ranks) and any(each.total for each in spectra):
        least = min(each.cost for each in spectra)
        raise UsageError(f"{parameters} parameters hold no change at all", f"give at least {least}")
    return ranks


def _steps(spectra: Sequence[Spectrum], worth: Callable[[float, int], float]) -> Iterator[tuple[float, int, int]]:
    """(worth, target, position) of every singular value that is not zero."""
    for number, each in enumerate(spectra):
        for position, value in enumerate(each.values.tolist()):
            if value > 0:
                yield worth(value**2, each.cost), number, position
