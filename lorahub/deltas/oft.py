"""OFT: the inputs of a layer turned by an orthogonal matrix, block by block (https://arxiv.org/abs/2306.07280).

``W' = W_2d @ R^T`` with ``R`` block-diagonal, a convolution's inputs being ``in * prod(k)``; PEFT turns an embedding's
vectors the other way round, ``W' = W @ R``.  A block comes from the skew-symmetric ``Q`` that is stored as its upper
triangle, and how is a matter of the config, not of the tensors: the exact Cayley transform ``(I - Q)(I + Q)^-1``, or a
series in ``Q`` that approximates ``(I + Q)(I - Q)^-1`` - the opposite rotation.  Both are what PEFT computes (0.16 to
0.21.2), so both are followed as the config says.  OneTrainer has PEFT's series, turns kernels the way PEFT turns
embeddings, and may divide the angles by a number that goes with the blocks' size.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, ClassVar, final

from lorahub.deltas.beginning import flag, number, stands, whole, zeros
from lorahub.deltas.delta import Around, Delta, Index, Route
from lorahub.deltas.fit import expect_matrix
from lorahub.deltas.kind import JSON, Group, Kind, Leaf, Slot, Spelling, Touch
from lorahub.deltas.peft_oft import (
    FIELDS,
    MOST_TERMS,
    RULES,
    adjusted,
    config,
    disputed,
    disputed_on,
    options,
    size_of_blocks,
    turned,
)
from lorahub.deltas.rotation import all_columns, block_size, blockwise, cayley, neumann, number_of_blocks, skew
from lorahub.deltas.starting import Ground, Setting, Started, Starting
from lorahub.errors import BaseMismatch, UsageError
from lorahub.hookspecs import hookimpl
from lorahub.lazy import torch

if TYPE_CHECKING:
    from typing import Self

    from lorahub.bases.site import Site

__all__ = ["OFT", "Turn"]


@final
@dataclass(frozen=True, slots=True, eq=False)
class Turn(Delta):
    """``W @ R^T`` in place of ``W``.

    Attributes:
        angles: ``[n, b * (b - 1) / 2]``, the upper triangle of each block's ``Q`` row by row.
        series: coefficients of ``Q``, ``Q^2``, ... in ``R - I``; None for the exact Cayley transform.
        shared: the one row of ``angles`` serves for every block.
        limit: COFT's bound on the length of all of ``Q``, or None.
        turned: ``W @ R`` instead.
        mirrored: ``W @ R`` for weights with a kernel, whatever ``turned`` says (OneTrainer).
        scaled: the angles are divided by ``2 * sqrt(b - 1)`` first (OneTrainer's scaled OFT).
    """

    angles: torch.Tensor
    series: tuple[float, ...] | None = None
    shared: bool = False
    limit: float | None = None
    turned: bool = False
    mirrored: bool = False
    scaled: bool = False

    kind: ClassVar[str] = "oft"
    additive: ClassVar[bool] = False

    def delta(self, weight: torch.Tensor, **siblings: torch.Tensor) -> torch.Tensor:
        """``W @ (R - I)^T`` over flattened trailing axes.

        Raises:
            BaseMismatch: the blocks do not add up to the weight's inputs.
        """
        expect_matrix(self.kind, tuple(weight.shape))
        blocks = self._blocks(self.angles.to(weight))
        flat = weight.flatten(1)
        if not self.shared and flat.shape[1] != blocks.shape[0] * blocks.shape[1]:
            raise BaseMismatch(
                f"an oft delta with {blocks.shape[0]} blocks of {blocks.shape[1]} was given a weight "
                f"{list(weight.shape)}"
            )
        turned = self.turned or (self.mirrored and weight.dim() > 2)
        return blockwise(flat, blocks if turned else blocks.transpose(1, 2)).reshape(weight.shape)

    def around(self, site: Site) -> Route | None:
        """Of a linear layer the inputs are turned instead of the weight: ``x (W R^T)^T`` is ``(x R) W^T``."""
        if site.op != "linear":
            return None

        def inputs(x: torch.Tensor) -> torch.Tensor:
            wide = torch.promote_types(x.dtype, torch.float32)
            blocks = self._blocks(self.angles.to(x.device, wide))
            if self.turned:
                blocks = blocks.transpose(1, 2)
            # the rotation itself rather than the difference from it: one product, and nothing to add
            blocks = blocks + torch.eye(blocks.shape[-1], dtype=wide, device=x.device)
            return turn(x.to(wide), blocks).to(x.dtype)

        return Route(lambda _: Around(inputs=inputs), enters=True)

    def _blocks(self, angles: torch.Tensor) -> torch.Tensor:
        """``R - I`` of every stored block."""
        b = block_size(angles.shape[1])
        assert b is not None  # checked where the delta is built
        q = skew(angles, b)
        if self.scaled:
            q = q / (2 * math.sqrt(max(1, b - 1)))
        if self.limit is not None:
            # PEFT projects whenever it applies the adapter, each block onto its part of the bound
            bound = self.limit / math.sqrt(angles.shape[0])
            q = q * (bound / torch.linalg.vector_norm(q, dim=(1, 2), keepdim=True).clamp_min(bound))
        return cayley(q) if self.series is None else neumann(q, self.series)

    def region(self, rows: Index, cols: Index) -> Self:
        """The same turn for any rows.

        Raises:
            NotLocal: the columns are cut.
        """
        all_columns(self.kind, cols)
        return self

    def shape(self) -> None:
        """None: the blocks say how many inputs there are, not how many outputs."""

    @classmethod
    def fresh(cls, shape: tuple[int, ...], *, r: int, generator: torch.Generator) -> Self:
        """No angles in ``r`` blocks, or as many fewer as the inputs fall into; PEFT's default series.

        Raises:
            BaseMismatch: ``shape`` is no weight, or has a single input.
        """
        return cls(torch.zeros(angles_shape(shape, r), device=generator.device), RULES["0.18.0"](5))

    @classmethod
    def example(cls, shape: tuple[int, ...], *, r: int, generator: torch.Generator) -> Self:
        """Normal angles; exact, a series, shared or bounded, and either way round, at random.

        Raises:
            BaseMismatch: ``shape`` is no weight, or has a single input.
        """
        n, numbers = angles_shape(shape, r)
        form, way = (int(torch.randint(high, (), generator=generator, device=generator.device)) for high in (4, 2))
        angles = torch.randn((1 if form == 2 else n, numbers), generator=generator, device=generator.device) * 0.4
        series = RULES["0.18.0"](5) if form in (1, 2) else None
        return cls(angles, series, shared=form == 2, limit=0.75 if form == 3 else None, turned=way == 1)


def turn(x: torch.Tensor, blocks: torch.Tensor) -> torch.Tensor:
    """``x`` ``[..., n * b]`` times the block-diagonal matrix of ``blocks`` ``[n, b, b]``; one block serves for all."""
    n, b = blocks.shape[:2]
    if n == 1:
        return (x.reshape(*x.shape[:-1], -1, b) @ blocks[0]).reshape(x.shape)
    parts = x.reshape(-1, n, b).transpose(0, 1)
    return torch.bmm(parts, blocks).transpose(0, 1).reshape(x.shape)


def angles_shape(shape: tuple[int, ...], r: int) -> tuple[int, int]:
    """Blocks and numbers in each, for a weight of ``shape``."""
    _, _, features = expect_matrix("oft", shape)
    n = number_of_blocks(features, r)
    b = features // n
    return n, b * (b - 1) // 2


def touches(group: Group) -> tuple[Touch, ...]:
    """The weight, its inputs counted over the kernel."""
    angles = group.slots["angles"]
    n, b = angles.shape[0], size_of_blocks(angles)
    dims = f"out *%{b}" if group.options["shared"] else f"out *{n * b}"
    return (Touch(parameter="weight", dims=dims, slots=("angles",), additive=False),)


def build(group: Group, tensors: Mapping[str, torch.Tensor]) -> dict[str, Delta]:
    """The weight's delta, the other way round for embeddings."""
    series, limit = group.options["series"], group.options["limit"]
    assert series is None or isinstance(series, list)
    assert limit is None or isinstance(limit, float)
    return {
        "weight": Turn(
            tensors["angles"],
            None if series is None else tuple(float(each) for each in series if isinstance(each, int | float)),
            shared=bool(group.options["shared"]),
            limit=limit,
            turned=turned(group),
            mirrored=group.options.get("mirrored") is True,
            scaled=group.options.get("scaled") is True,
        )
    }


def dissolve(deltas: Mapping[str, Delta]) -> tuple[dict[str, torch.Tensor], dict[str, JSON]] | None:
    """The inverse of ``build``."""
    match dict(deltas):
        case {"weight": Turn() as turn, **others} if not others:
            series: JSON = None if turn.series is None else [*turn.series]
            said: dict[str, JSON] = {
                "series": series,
                "shared": turn.shared,
                "limit": turn.limit,
                "turned": turn.turned,
                "mirrored": turn.mirrored,
                "scaled": turn.scaled,
            }
            return {"angles": turn.angles}, said
    return None


_WHERE: Mapping[str, str] = MappingProxyType({"experts": "it turns the inputs of one weight, and no stack of experts"})


def start(ground: Ground) -> Started:
    """Angles of zero.

    Raises:
        UsageError: it cannot stand there, or the settings contradict each other.
    """
    stands(ground, "OFT", _WHERE)
    features = math.prod(ground.shape[1:])
    if features < 2:
        raise UsageError(f"OFT cannot stand on {ground.module}, because there is nothing to turn in one dimension")
    n, b = _blocks_of(ground, features)
    shared = flag(ground, "block_share")
    limit = number(ground, "eps") if flag(ground, "coft") else None
    if limit is not None and limit <= 0:
        raise UsageError(f"{ground.module}: eps should be above zero, not {limit}")
    terms = whole(ground, "num_cayley_neumann_terms", least=1)
    if terms > MOST_TERMS:
        raise UsageError(f"{ground.module}: num_cayley_neumann_terms should be {MOST_TERMS} at most, not {terms}")
    series: JSON = [*RULES["0.18.0"](terms)] if flag(ground, "use_cayley_neumann") else None
    return Started(
        trained={"angles": zeros(ground, 1 if shared else n, b * (b - 1) // 2)},
        options={"series": series, "shared": shared, "limit": limit, "turned": ground.role == "embedding"},
    )


def _blocks_of(ground: Ground, features: int) -> tuple[int, int]:
    """How many blocks of which size: the number or the size that was asked for, or what divides and is nearest."""
    n, b = (whole(ground, name, least=0) for name in ("r", "oft_block_size"))
    if (n == 0) == (b == 0):
        raise UsageError(
            f"{ground.module}: OFT takes r, the number of blocks, or oft_block_size, and the other is 0; not r={n} and "
            f"oft_block_size={b}",
            "for blocks of 32: r=0, oft_block_size=32",
        )
    if b:
        size = adjusted(features, b)
        if size < 2:
            fits = next(each for each in range(2, features + 1) if features % each == 0)
            raise UsageError(
                f"OFT cannot stand on {ground.module} in blocks of {b}, because of the sizes that divide its "
                f"{features} inputs 1 is the nearest, and there is nothing to turn in one dimension",
                f"leave it out of target_modules, or choose oft_block_size={fits} or another that divides",
            )
        return features // size, size
    n = adjusted(features, n)
    if features // n < 2:
        raise UsageError(
            f"{ground.module}: {n} blocks of {features} inputs are too small to turn", "choose a smaller r"
        )
    return n, features // n


STARTING = Starting(
    settings={
        "r": Setting(default=0, says="How many blocks, or the nearest number that divides; 0: by oft_block_size."),
        "oft_block_size": Setting(default=32, says="The size of the blocks, or the nearest that divides; 0: by r."),
        "block_share": Setting(default=False, says="One block serves for all."),
        "coft": Setting(default=False, says="Bound the angles by eps."),
        "eps": Setting(default=6e-5, says="The bound on the length of all angles, with coft."),
        "use_cayley_neumann": Setting(default=True, says="Turn by a series instead of the exact Cayley transform."),
        "num_cayley_neumann_terms": Setting(default=5, says="How many terms of the series."),
    },
    start=start,
)

OFT = Kind(
    name="oft",
    title="OFT",
    source="https://arxiv.org/abs/2306.07280",
    slots=(Slot(name="angles", dims="blocks numbers"),),
    deltas=(Turn,),
    touches=touches,
    build=build,
    dissolve=dissolve,
    spellings=(
        Spelling(
            format="peft",
            tag="OFT",
            leaves=(
                Leaf(slot="angles", suffix="oft_R.weight"),
                Leaf(slot="angles", suffix="oft_embedding_R.weight", role="embedding"),
            ),
            fields=FIELDS,
            options=options,
            config=config,
            disputed=disputed,
            disputed_on=disputed_on,
        ),
    ),
    starting=STARTING,
)


@hookimpl
def lorahub_kinds() -> list[Kind]:
    """The built-in OFT."""
    return [OFT]
