"""A dense change as factors: the best of a rank, or the smallest rank that is good enough.

Two ways, both in float64 on one thread.  The exact one diagonalises the smaller Gram matrix.  Where few of many
singular values are wanted, subspace iteration from a seeded start finds them for a fraction of that (Halko, Martinsson
and Tropp, https://arxiv.org/abs/0909.4061); its error is within 0.1 % of the best one on spectra as flat as noise, and
far closer on others.  Whichever is taken, the change is projected onto the basis that was found, so the error told is
that of the very factors returned.  The matrix is read in bands of rows: no float64 copy of it is made.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from lorahub.composition.algebra.truncate import Budget, Truncated, balanced, one_thread
from lorahub.errors import NotFinite, UsageError
from lorahub.lazy import torch

__all__ = ["factorise", "spectrum"]

SMALL = 512
"""Matrices whose smaller side is no longer than this are diagonalised: nothing is faster."""

SHARE = 8
"""Subspace iteration pays while the subspace is no more than one SHARE-th of the smaller side."""

FIRST = 48
"""Columns of the first subspace where a quality is asked for, and no rank."""

ROUNDS = 12
"""Subspace iterations at most."""

SETTLED = 1e-4
"""Iteration ends when a round lowers the squared error by less than this share of it."""

ROUNDING = 1e-6
"""Relative error that the Gram matrix, which squares the singular values, does not resolve."""

_BAND = 1 << 17  # numbers converted to float64 at a time: as many as stay in the cache of a core


def factorise(matrix: torch.Tensor, budget: Budget) -> Truncated:
    """The best approximation of a dense matrix within a budget, or close to it where its rank is small.

    Relative errors below 1e-6 are not told apart from none: an error budget of 0 keeps what is above that.

    Args:
        matrix: [out, in * prod(k)], any floating dtype; read only.
        budget: how much to keep.

    Raises:
        UsageError: no matrix.
        NotFinite: NaN or infinity in it.
    """
    if matrix.dim() != 2:
        raise UsageError(f"only a matrix has factors, not a tensor of shape {list(matrix.shape)}")
    with one_thread():
        tall = matrix.shape[0] > matrix.shape[1]
        flat = matrix.mT if tall else matrix  # [small, large]; bands are rows of it either way
        total = _square(flat)
        if not math.isfinite(total):
            raise NotFinite("NaN or infinity in a difference", "one of the two checkpoints is damaged")
        if not total:
            up, down = (matrix.new_zeros(size, 1, dtype=torch.float64) for size in matrix.shape)
            return balanced(up, down.mT, up.new_zeros(1), norm=0.0, error=0.0)
        found = _subspace(flat, total, budget)
        basis, squares = found or _spectrum(flat)
        rank = budget.choose(squares, total, rounding=ROUNDING)
        return _projected(flat, basis[:, :rank], total, tall=tall, singular=found is None)


def spectrum(matrix: torch.Tensor) -> torch.Tensor:
    """All singular values of a dense matrix, descending, float64; those below 1e-6 of the norm are noise.

    Raises:
        NotFinite: NaN or infinity in it.
    """
    with one_thread():
        flat = matrix.mT if matrix.shape[0] > matrix.shape[1] else matrix
        gram = _gram(flat)
        if not torch.isfinite(gram).all():
            raise NotFinite("NaN or infinity in a difference", "one of the two checkpoints is damaged")
        values = torch.linalg.eigvalsh(gram).flip(0).clamp_min(0)
        noise = (ROUNDING**2) * float(values.sum())
        return torch.where(values.flip(0).cumsum(0).flip(0) > noise, values, 0.0).sqrt()


def _spectrum(flat: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Left singular vectors and squared singular values, descending, from the smaller Gram matrix."""
    values, vectors = torch.linalg.eigh(_gram(flat))
    return vectors.flip(1), values.flip(0).clamp_min(0)


def _gram(flat: torch.Tensor) -> torch.Tensor:
    """``flat flat^T`` in float64."""
    gram = flat.new_zeros(flat.shape[0], flat.shape[0], dtype=torch.float64)
    for _, band in _bands(flat.mT):
        gram.addmm_(band.mT, band)
    return gram


def _subspace(flat: torch.Tensor, total: float, budget: Budget) -> tuple[torch.Tensor, torch.Tensor] | None:
    """The same for the largest singular values only, or None where the whole spectrum is the cheaper way."""
    small = flat.shape[0]
    if small <= SMALL or budget.needs_all:
        return None
    rank = budget.rank or small
    width = _width(min(rank, FIRST) if budget.demands else rank)
    found: torch.Tensor | None = None
    allowed = max(budget.lost(), ROUNDING**2) * total
    while width * SHARE <= small:
        basis, squares = _iterate(flat, total, width, min(rank, width), found)
        chosen = budget.choose(squares, total, rounding=ROUNDING)
        lost = total - float(squares[:chosen].sum())
        if not budget.demands or chosen == rank or (chosen < width and lost <= allowed):
            return basis, squares
        # none of those that are missing is larger than the last one found, so that many more are needed at least
        missing = (total - float(squares.sum()) - allowed) / float(squares[-1])
        if min(rank, width + missing) * SHARE > small:
            return None
        found, width = basis, 2 * width
    return None


def _width(rank: int) -> int:
    """Columns of a subspace for ``rank`` singular values: a few more make the last ones accurate."""
    return rank + max(8, rank // 4)


def _iterate(
    flat: torch.Tensor, total: float, width: int, rank: int, found: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Subspace iteration until the error at ``rank`` no longer falls; ``found`` is where a smaller one ended."""
    generator = torch.Generator().manual_seed(width)
    known = found.shape[1] if found is not None else 0
    start = torch.randn(flat.shape[1], width - known, generator=generator, dtype=torch.float64).to(flat.device)
    sample = _times(flat, start)
    basis = _orthonormal(sample if found is None else torch.cat([found, sample], dim=1))
    before = math.inf
    for _ in range(ROUNDS):
        core = _times(flat.mT, basis)  # [large, width]
        right, triangle = torch.linalg.qr(core)
        values, vectors = torch.linalg.eigh(triangle.mT @ triangle)
        squares = values.flip(0).clamp_min(0)
        ritz = basis @ vectors.flip(1)
        lost = max(total - float(squares[:rank].sum()), 0.0)
        if before - lost <= SETTLED * lost or lost <= (ROUNDING**2) * total:
            break
        before = lost
        basis = _orthonormal(_times(flat, right))
    return ritz, squares


def _projected(flat: torch.Tensor, basis: torch.Tensor, total: float, *, tall: bool, singular: bool) -> Truncated:
    """The factors of ``basis basis^T flat``, and their exact error; ``singular``: of a basis of singular vectors."""
    core = _times(flat.mT, basis).mT  # [rank, large]
    if singular:
        s = core.norm(dim=1)
        vh = core / s[:, None]
    else:
        right, triangle = torch.linalg.qr(core.mT)
        u, s, small_vh = torch.linalg.svd(triangle.mT, full_matrices=False)
        basis, vh = basis @ u, small_vh @ right.mT
    lost = total - float((s**2).sum())
    if lost < 1e-10 * total:  # a difference of two sums resolves no more: subtract element by element
        scaled = s[:, None] * vh
        lost = sum(float((band - basis[rows] @ scaled).square().sum()) for rows, band in _bands(flat))
    u, vh = (vh.mT, basis.mT) if tall else (basis, vh)
    return balanced(u, vh, s, norm=math.sqrt(total), error=min(1.0, math.sqrt(max(lost, 0.0) / total)))


def _bands(matrix: torch.Tensor) -> Iterator[tuple[slice, torch.Tensor]]:
    """The rows of a matrix a few at a time, in float64."""
    step = max(1, _BAND // max(matrix.shape[1], 1))
    for start in range(0, matrix.shape[0], step):
        rows = slice(start, start + step)
        yield rows, matrix[rows].to(torch.float64)


def _times(matrix: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """``matrix @ other`` in float64."""
    return torch.cat([band @ other for _, band in _bands(matrix)])


def _square(matrix: torch.Tensor) -> float:
    return sum(float(band.square().sum()) for _, band in _bands(matrix))


def _orthonormal(columns: torch.Tensor) -> torch.Tensor:
    basis: torch.Tensor = torch.linalg.qr(columns).Q
    return basis
