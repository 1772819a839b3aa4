"""PSOFT: a rotation inside the subspace of a weight's largest singular values (https://openreview.net/forum?id=FSHrinMArK).

``W' = W + B @ (R - I) @ A`` with ``B @ A`` the part of ``W`` with the r largest singular values, and
``R = diag(b) @ (I + Q) @ (I - Q)^-1 @ diag(a)`` with ``Q`` skew-symmetric.  A, B and ``R`` belong together: where a
library gives a singular vector the other sign, the same ``R`` makes another change.  PEFT stores ``R`` alone and
decomposes the base anew whenever it loads an adapter, in float32, so its own result is that of the machine too.  The
same is done here, on the CPU, and said in a finding.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, ClassVar, final

from lorahub.deltas.delta import Delta, Index
from lorahub.deltas.kind import (
    JSON,
    Completed,
    Field,
    Group,
    Kind,
    Leaf,
    Slot,
    Spelling,
    Surroundings,
    TensorRef,
    Touch,
)
from lorahub.deltas.peft_config import INERT, USED, one_for_all
from lorahub.deltas.peft_values import PLACES, integer, number, seed, switch
from lorahub.deltas.rotation import block_size, cayley, neumann, skew
from lorahub.deltas.singular import Factors, expect_finite, whole_only
from lorahub.errors import BaseMismatch, IntegrityError, UnsupportedKind
from lorahub.findings import Finding, Verdict
from lorahub.hookspecs import hookimpl
from lorahub.lazy import torch

if TYPE_CHECKING:
    from typing import Self

__all__ = ["PSOFT", "Principal"]

STARTS = ("psoft_init", "pissa_init")
"""``ab_svd_init``: singular values on B alone, or their roots on both sides."""

_MOST = 1000

_drawing = threading.Lock()


@final
@dataclass(frozen=True, slots=True, eq=False)
class Principal(Delta):
    """``B @ (R - I) @ A``.

    Attributes:
        turn: ``[r (r - 1) / 2]`` angles above the diagonal of Q, or ``R`` itself ``[r, r]``.
        left: ``[r]``, multiplies R's rows; or None.
        right: ``[r]``, multiplies R's columns; or None.
        rank: r.
        balanced: the roots of the singular values are on both sides, not the values on B.
        terms: of the Neumann series that stands for the inverse; 0 for the inverse itself.
        bound: the largest norm of Q in the series; 0 for any.
        draws: power iterations of a decomposition from random projections; None for the full one.
        seed: of those projections.
    """

    turn: torch.Tensor
    left: torch.Tensor | None
    right: torch.Tensor | None
    rank: int
    balanced: bool = False
    terms: int = 0
    bound: float = 0.0
    draws: int | None = None
    seed: int = 0

    kind: ClassVar[str] = "psoft"
    additive: ClassVar[bool] = False

    def delta(self, weight: torch.Tensor, **siblings: torch.Tensor) -> torch.Tensor:
        """The decomposition is that of the weight in float32; everything after it is in the weight's dtype.

        Raises:
            BaseMismatch: the weight is no matrix, or smaller than the rank.
        """
        b, a = self.factors(weight)
        return b @ a

    def factors(self, weight: torch.Tensor) -> Factors:
        """``B @ (R - I)`` and ``A``, of rank r.

        Raises:
            BaseMismatch: the weight is no matrix, or smaller than the rank.
        """
        if weight.dim() != 2 or min(weight.shape) < self.rank:
            raise BaseMismatch(f"a psoft delta of rank {self.rank} was given a weight {list(weight.shape)}")
        expect_finite(self.kind, weight)
        u, s, vh = (part.to(weight) for part in self._decompose(weight.detach().to("cpu", torch.float32).contiguous()))
        before, after = (s.sqrt(), s.sqrt()) if self.balanced else (s, torch.ones_like(s))
        return (u * before) @ self._turning(weight), after[:, None] * vh

    def _decompose(self, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        if self.draws is None:
            u, s, vh = torch.linalg.svd(weight, full_matrices=False)
            return u[:, : self.rank], s[: self.rank], vh[: self.rank]
        with _drawing, torch.random.fork_rng(devices=[]):  # the function draws from the global generator alone
            torch.manual_seed(self.seed)
            u, s, v = torch.svd_lowrank(weight, q=self.rank, niter=self.draws)
        return u, s, v.T

    def _turning(self, like: torch.Tensor) -> torch.Tensor:
        """``R - I``."""
        eye = torch.eye(self.rank, dtype=like.dtype, device=like.device)
        turn = self.turn.to(like)
        change = turn - eye if turn.dim() == 2 else self._rotation(skew(turn[None], self.rank))[0]
        left, right = (eye[0] * 0 + 1 if each is None else each.to(like) for each in (self.left, self.right))
        return left[:, None] * change * right + torch.diag(left * right - 1)

    def _rotation(self, q: torch.Tensor) -> torch.Tensor:
        if not self.terms:
            return cayley(-q)
        norm = torch.linalg.matrix_norm(q)
        if self.bound and bool(norm > self.bound):
            q = q * (self.bound / (norm + 1e-12))
        return neumann(q, series(self.terms))

    def region(self, rows: Index, cols: Index) -> Self:
        """Only the whole.

        Raises:
            NotLocal: any cut.
        """
        whole_only(self.kind, rows, cols)
        return self

    def shape(self) -> None:
        """None: any matrix of that rank will do."""

    @classmethod
    def fresh(cls, shape: tuple[int, ...], *, r: int, generator: torch.Generator) -> Self:
        """Angles of zero, and ones.

        Raises:
            BaseMismatch: ``shape`` is no matrix.
        """
        like = cls.example(shape, r=r, generator=generator)
        angles = torch.zeros(like.rank * (like.rank - 1) // 2, device=generator.device)
        ones = torch.ones(like.rank, device=generator.device)
        return cls(angles, ones, ones.clone(), like.rank)

    @classmethod
    def example(cls, shape: tuple[int, ...], *, r: int, generator: torch.Generator) -> Self:
        """Normal angles or a normal matrix, normal vectors or none, either start.

        Raises:
            BaseMismatch: ``shape`` is no matrix.
        """
        if len(shape) != 2:
            raise BaseMismatch(f"a psoft delta changes matrices [out, in], not {list(shape)}")
        rank, device = min(r, *shape), generator.device
        free, scaled, balanced, series_of = torch.randint(2, (4,), generator=generator, device=device).tolist()
        size = (rank, rank) if free else (rank * (rank - 1) // 2,)
        turn, left, right = (torch.randn(each, generator=generator, device=device) for each in (size, rank, rank))
        terms = 0 if free else 5 * series_of
        bound = 0.9 if terms else 0.0
        return cls(turn, left if scaled else None, right if scaled else None, rank, bool(balanced), terms, bound)


def series(terms: int) -> list[float]:
    """Coefficients of Q, Q^2 ... in PEFT 0.21.2's series of so many terms: the last one counts once."""
    if terms < 3:
        return [2.0] * (terms - 1)
    powers = max(terms - 1, 3)  # even three terms have a third power
    return [2.0] * (powers - 1) + [1.0]


def touches(group: Group) -> tuple[Touch, ...]:
    """The weight, of any size, whole."""
    rank = group.options.get("rank")
    slots = tuple(group.slots)
    return (
        Touch(
            parameter="weight",
            dims=f">{rank} >{rank}",
            slots=slots,
            additive=False,
            local=False,
            rank=rank if isinstance(rank, int) else None,
        ),
    )


def build(group: Group, tensors: Mapping[str, torch.Tensor]) -> dict[str, Delta]:
    """The weight's delta."""
    said = group.options
    rank, terms, draws, start = (said[name] for name in ("rank", "terms", "draws", "seed"))
    bound = said["bound"]
    assert isinstance(rank, int)
    assert isinstance(terms, int)
    assert draws is None or isinstance(draws, int)
    assert isinstance(start, int)
    assert isinstance(bound, int | float)
    left, right = tensors.get("left"), tensors.get("right")
    balanced = bool(said["balanced"])
    return {"weight": Principal(tensors["turn"], left, right, rank, balanced, terms, float(bound), draws, start)}


def dissolve(deltas: Mapping[str, Delta]) -> tuple[dict[str, torch.Tensor], dict[str, JSON]] | None:
    """The inverse of ``build``."""
    match dict(deltas):
        case {"weight": Principal() as weight, **others} if not others:
            said: dict[str, JSON] = {
                name: getattr(weight, name) for name in ("rank", "balanced", "terms", "bound", "draws", "seed")
            }
            return weight.tensors(), said
    return None


FIELDS: Mapping[str, Field] = MappingProxyType(
    {
        **PLACES,
        "r": USED,
        "ab_svd_init": USED,
        "psoft_svd": USED,
        "psoft_svd_lowrank_niter": USED,
        "random_seed": USED,
        "psoft_orth": USED,
        "psoft_mag_a": USED,
        "psoft_mag_b": USED,
        "use_cayley_neumann": USED,
        "num_cayley_neumann_terms": USED,
        "cayley_neumann_eps": USED,
        "psoft_alpha": INERT,  # the singular values are divided by the scale that multiplies the change
        "psoft_dropout": INERT,
        "fan_in_fan_out": INERT,
    }
)


def options(config: Mapping[str, JSON], module: str, slots: Mapping[str, TensorRef]) -> dict[str, JSON]:
    """How the weight is taken apart, and what R is.

    Raises:
        IntegrityError: config and tensors contradict each other.
        UnsupportedKind: a start or a decomposition that is not known.
    """
    turn, rank = slots["turn"], integer(config, "r", 32)
    free = not switch(config, "psoft_orth", True)
    if _size_of(turn) != rank or free != (len(turn.shape) == 2):
        wanted = [rank, rank] if free else [rank * (rank - 1) // 2]
        raise IntegrityError(
            f"{module}: r and psoft_orth ask for {wanted} numbers, and {turn.key} is {list(turn.shape)}"
        )
    for slot, field in (("left", "psoft_mag_b"), ("right", "psoft_mag_a")):
        if switch(config, field, True) != (slot in slots):
            raise IntegrityError(f"{module}: {field} is {str(slot not in slots).lower()}, and the file says otherwise")
        if slot in slots and slots[slot].shape != (rank,):
            raise IntegrityError(f"{module}: {slots[slot].key} is {list(slots[slot].shape)}, and r says {[rank]}")
    start, method = config.get("ab_svd_init") or STARTS[0], config.get("psoft_svd") or "full"
    if start not in STARTS or method not in ("full", "lowrank"):
        raise UnsupportedKind(f"{module}: ab_svd_init is {start!r} and psoft_svd {method!r}, and one is not known")
    drawn, inverse = method == "lowrank", not switch(config, "use_cayley_neumann", False) or free
    return {
        "rank": rank,
        "balanced": start == "pissa_init",
        "terms": 0 if inverse else _few(config, "num_cayley_neumann_terms", 5, least=1),
        "bound": 0.0 if inverse else number(config, "cayley_neumann_eps", 0.0),
        "draws": _few(config, "psoft_svd_lowrank_niter", 10, least=0) if drawn else None,
        "seed": seed(config, "random_seed", 0) if drawn else 0,
    }


def _size_of(turn: TensorRef) -> int | None:
    """r, from the angles above a diagonal or from a square matrix; None where it is neither."""
    match turn.shape:
        case (n,):
            return block_size(n)
        case (rows, cols) if rows == cols:
            return rows
    return None


def _few(config: Mapping[str, JSON], name: str, default: int, *, least: int) -> int:
    """A number of rounds, which a file must not make endless.

    Raises:
        IntegrityError: it is below ``least``, or no number that anybody would train with.
    """
    value = integer(config, name, default)
    if not least <= value <= _MOST:
        raise IntegrityError(f"{name} should be from {least} to {_MOST}, not {value}")
    return value


def config(groups: Mapping[str, Group]) -> dict[str, JSON]:
    """The inverse of ``options``.

    Raises:
        CannotCarry: modules differ in what PEFT keeps once.
    """

    def one(field: str, option: str) -> JSON:
        return one_for_all(groups, field, lambda group: group.options[option])

    rank, terms, draws = one("r", "rank"), one("num_cayley_neumann_terms", "terms"), one("psoft_svd", "draws")
    return {
        "r": rank,
        "psoft_alpha": rank,
        "psoft_dropout": 0.0,
        "ab_svd_init": STARTS[bool(one("ab_svd_init", "balanced"))],
        "psoft_svd": "full" if draws is None else "lowrank",
        "psoft_svd_lowrank_niter": 10 if draws is None else draws,
        "random_seed": one("random_seed", "seed"),
        "psoft_orth": one_for_all(groups, "psoft_orth", lambda group: len(group.slots["turn"].shape) == 1),
        "psoft_mag_a": one_for_all(groups, "psoft_mag_a", lambda group: "right" in group.slots),
        "psoft_mag_b": one_for_all(groups, "psoft_mag_b", lambda group: "left" in group.slots),
        "use_cayley_neumann": bool(terms),
        "num_cayley_neumann_terms": terms or 5,
        "cayley_neumann_eps": one("cayley_neumann_eps", "bound") or None,
        "init_weights": True,
    }


def complete(
    _config: Mapping[str, JSON],
    groups: Sequence[Group],
    _shared: Mapping[str, TensorRef],
    base: Surroundings | None,
) -> Completed:
    """The groups as they are, and what is to be said of them where there is a base to take apart."""
    if base is None:
        return Completed(groups=tuple(groups))
    said = Finding(
        code="result-of-this-machine",
        axis="base",
        level=Verdict.UNVERIFIED,
        message="PSOFT turns singular vectors of the base, whose signs are not in the file and differ between linear "
        "algebra libraries; as in PEFT, they are those that this machine's library gives, on the CPU",
        where=tuple(group.slots["turn"].key for group in groups),
        remedy="hold the merged model against the one that was trained, or merge where it was trained",
    )
    return Completed(groups=tuple(groups), findings=(said,))


PSOFT = Kind(
    name="psoft",
    title="PSOFT",
    source="https://openreview.net/forum?id=FSHrinMArK",
    slots=(
        Slot(name="turn", dims="*turn", prunable=True),
        Slot(name="left", dims="r", optional=True),
        Slot(name="right", dims="r", optional=True),
    ),
    deltas=(Principal,),
    touches=touches,
    build=build,
    dissolve=dissolve,
    spellings=(
        Spelling(
            format="peft",
            tag="PSOFT",
            leaves=(
                Leaf(slot="turn", suffix="psoft_R.weight"),
                Leaf(slot="left", suffix="psoft_R.vector_b"),
                Leaf(slot="right", suffix="psoft_R.vector_a"),
            ),
            fields=FIELDS,
            options=options,
            config=config,
            complete=complete,
        ),
    ),
)


@hookimpl
def lorahub_kinds() -> list[Kind]:
    """The built-in PSOFT."""
    return [PSOFT]
