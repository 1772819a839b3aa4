"""A change of low rank, cut to a smaller rank: QR of both factors and the SVD of a small core, never of the product.

The best approximation of rank k keeps the k largest singular values, and its squared error is the sum of the squares
of the others (Eckart and Young).  For ``up`` [m, R] and ``down`` [R, n] the singular values are those of the R x R core
between their two QR bases, which costs about 4 (m + n) R^2 operations and (m + n) R numbers of memory.

Everything is computed in float64, on one thread, with a fixed convention for signs: the same bytes whatever the number
of threads.  A dense difference is factorised in ``factorise``; ranks over many targets are shared out in
``budgeting``.  Knows no files and no adapters.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from lorahub.errors import NotFinite, UsageError
from lorahub.lazy import torch

__all__ = ["Budget", "Truncated", "balanced", "norm", "one_thread", "singular_values", "truncate"]

ROUNDING = 1e-14
"""Relative Frobenius error below which what is left of a float64 product is its own rounding."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """How much of a change to keep: the smallest rank that meets every demand, but never more than ``rank``.

    The last two are what kohya's ``resize_lora`` calls sv_ratio and sv_cumulative; its sv_fro p is the energy p**2.

    Attributes:
        rank: at most this many; alone: exactly this many, as far as there are so many singular values that count.
        energy: at least this share of the squared Frobenius norm, in (0, 1].
        error: at most this relative Frobenius error, in [0, 1).
        ratio: every singular value of at least one ratio-th of the largest, 1 or more.
        cumulative: at least this share of the sum of the singular values, in (0, 1].

    Raises:
        UsageError: nothing is asked for, or a number is out of its range.
    """

    rank: int | None = None
    energy: float | None = None
    error: float | None = None
    ratio: float | None = None
    cumulative: float | None = None

    def __post_init__(self) -> None:
        if self.rank is None and not self.demands:
            raise UsageError("no budget: nothing says how much to keep", "give a rank, an energy or an error")
        if self.rank is not None and self.rank < 1:
            raise UsageError(f"a rank of {self.rank} keeps nothing", "give 1 or more")
        if self.energy is not None and not 0 < self.energy <= 1:
            raise UsageError(f"an energy of {self.energy} is no share of the whole", "give more than 0 and at most 1")
        if self.error is not None and not 0 <= self.error < 1:
            raise UsageError(f"a relative error of {self.error} cannot be asked for", "give 0 or more, less than 1")
        if self.ratio is not None and not 1 <= self.ratio < math.inf:
            raise UsageError(f"a ratio of {self.ratio} keeps nothing, or all", "give a finite number of at least 1")
        if self.cumulative is not None and not 0 < self.cumulative <= 1:
            raise UsageError(f"a sum of {self.cumulative} is no share of the whole", "give more than 0 and at most 1")

    @property
    def demands(self) -> bool:
        """Whether a quality is asked for, and not only a rank."""
        return self.energy is not None or self.error is not None or self.needs_all

    @property
    def needs_all(self) -> bool:
        """Whether the rank depends on the singular values themselves, and not only on what is lost."""
        return self.ratio is not None or self.cumulative is not None

    def lost(self) -> float:
        """The share of the squared norm that may be lost: the stricter of the demands; 0 where there are none."""
        shares = [1 - self.energy] if self.energy is not None else []
        shares += [self.error**2] if self.error is not None else []
        return min(shares, default=0.0)

    def choose(self, squares: torch.Tensor, total: float, *, rounding: float = ROUNDING) -> int:
        """The rank to keep, at least 1.

        Args:
            squares: squared singular values, descending, float64; possibly only the largest ones.
            total: the squared Frobenius norm, which exceeds their sum where some are missing.
            rounding: relative error below which the rest is noise and nothing more is kept.
        """
        missing = max(total - float(squares.sum()), 0.0)
        tails = torch.cat([squares.flip(0).cumsum(0).flip(0), squares.new_zeros(1)]) + missing
        allowed = max(self.lost(), rounding**2) * total
        counting = _first(tails <= (rounding**2) * total)
        wanted = [_first(tails <= allowed)] if self.energy is not None or self.error is not None else []
        values = squares.sqrt()
        if self.ratio is not None:
            wanted.append(int((values * self.ratio >= values[0]).sum()))
        if self.cumulative is not None:
            wanted.append(1 + _first(values.cumsum(0) >= self.cumulative * values.sum() * (1 - rounding)))
        return max(1, min(max(wanted, default=counting), counting, len(squares), self.rank or len(squares)))


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Truncated:
    """A change as ``up @ down``, both sides holding the roots of the singular values, which descend.

    Attributes:
        up: [out, rank], float64.
        down: [rank, in * prod(k)], float64.
        values: the singular values kept, [rank], float64.
        norm: the Frobenius norm of the change before.
        error: the relative Frobenius error; 0 where there was no change.
    """

    up: torch.Tensor
    down: torch.Tensor
    values: torch.Tensor
    norm: float
    error: float

    @property
    def rank(self) -> int:
        """How many singular values are kept."""
        return len(self.values)

    @property
    def energy(self) -> float:
        """The share of the squared Frobenius norm that is kept."""
        return max(0.0, 1 - self.error**2)

    def cut(self, rank: int) -> Truncated:
        """The first ``rank`` of it: again the best there is of that rank."""
        if rank >= self.rank:
            return self
        lost = (self.error * self.norm) ** 2 + float((self.values[rank:] ** 2).sum())
        return Truncated(
            up=self.up[:, :rank],
            down=self.down[:rank],
            values=self.values[:rank],
            norm=self.norm,
            error=min(1.0, math.sqrt(lost) / self.norm) if self.norm else 0.0,
        )

    def stored(self, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, float]:
        """The factors in another dtype, and a relative error that they do not exceed, their rounding included.

        Raises:
            NotFinite: they do not fit into it.
        """
        up, down = self.up.to(dtype).contiguous(), self.down.to(dtype).contiguous()
        if not (bool(torch.isfinite(up).all()) and bool(torch.isfinite(down).all())):
            raise NotFinite(f"the factors of a change do not fit into {dtype}", "choose another dtype")
        both = torch.cat([self.up, -up.to(self.up)], dim=1), torch.cat([self.down, down.to(self.down)])
        rounding = float(singular_values(*both, 1.0).norm())
        return up, down, min(1.0, self.error + rounding / self.norm) if self.norm else 0.0


@contextmanager
def one_thread() -> Iterator[None]:
    """Compute on one thread of this process's PyTorch: LAPACK's results depend on how many there are."""
    before = torch.get_num_threads()
    if before == 1:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def truncate(up: torch.Tensor, down: torch.Tensor, scale: float, budget: Budget) -> Truncated:
    """The best approximation of ``scale * up @ down`` within a budget.

    Args:
        up: [out, R], any floating dtype.
        down: [R, in * prod(k)].
        scale: multiplies the product; it is inside the result's factors.
        budget: how much to keep.

    Raises:
        NotFinite: NaN or infinity in the factors.
    """
    with one_thread():
        left, right, u, s, vh = _core(up, down, scale)
        squares = s**2
        total = float(squares.sum())
        rank = budget.choose(squares, total)
        kept, lost = s[:rank], float(squares[rank:].sum())
        return balanced(
            left @ u[:, :rank],
            vh[:rank] @ right.mT,
            kept,
            norm=math.sqrt(total),
            error=math.sqrt(lost / total) if total else 0.0,
        )


def singular_values(up: torch.Tensor, down: torch.Tensor, scale: float) -> torch.Tensor:
    """All min(out, R, in) singular values of ``scale * up @ down``, descending, float64.

    Raises:
        NotFinite: NaN or infinity in the factors.
    """
    with one_thread():
        return _core(up, down, scale)[3]


def norm(up: torch.Tensor, down: torch.Tensor, scale: float) -> float:
    """The Frobenius norm of ``scale * up @ down``, from the two Gram matrices of its factors."""
    with one_thread():
        up, down = up.double(), down.double()
        square = float(((up.mT @ up) * (down @ down.mT)).sum())
        return abs(scale) * math.sqrt(max(square, 0.0))


def balanced(u: torch.Tensor, vh: torch.Tensor, values: torch.Tensor, *, norm: float, error: float) -> Truncated:
    """Orthonormal columns ``u`` and rows ``vh`` as factors; in each column of ``u`` the largest entry is positive.

    Halving the singular values between the two keeps both in float16's range wherever that can be.
    """
    rank = u.shape[1]
    leading = u.gather(0, u.abs().argmax(0, keepdim=True)) if u.shape[0] and rank else u.new_ones(1, rank)
    signs = torch.where(leading < 0, -1.0, 1.0).to(u)
    root = values.sqrt()
    return Truncated(up=u * (signs * root), down=vh * (signs * root).mT, values=values, norm=norm, error=error)


def _first(true: torch.Tensor) -> int:
    """Where the first true element is; the length where there is none."""
    where = true.nonzero()
    return int(where[0]) if len(where) else len(true)


def _core(
    up: torch.Tensor, down: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(basis of up's columns, basis of down's rows as columns, and the core's U, S, Vh)."""
    left, r_up = torch.linalg.qr(up.double())
    right, r_down = torch.linalg.qr(down.double().mT)
    core = (r_up @ r_down.mT) * scale
    if not torch.isfinite(core).all():
        raise NotFinite("NaN or infinity in the factors of a change", "its training diverged, or it is damaged")
    u, s, vh = torch.linalg.svd(core, full_matrices=False)
    return left, right, u, s, vh
