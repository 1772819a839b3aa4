"""What PEFT's ``OFT`` config says: the formula, and from which numbers PEFT makes blocks of the sizes in a file.

Knows configs and headers, no tensors; the arithmetic is in ``oft``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from types import MappingProxyType

from packaging.version import InvalidVersion, Version

from lorahub.deltas.disputes import Dispute
from lorahub.deltas.kind import JSON, Field, Group, TensorRef
from lorahub.deltas.peft_config import INERT, USED, one_for_all
from lorahub.deltas.peft_values import PLACES, integer, number, switch
from lorahub.deltas.rotation import block_size
from lorahub.errors import CannotCarry, IntegrityError

__all__ = [
    "FIELDS",
    "MOST_TERMS",
    "RULES",
    "adjusted",
    "config",
    "disputed",
    "disputed_on",
    "options",
    "size_of_blocks",
    "turned",
]


def series_since_0_18(terms: int) -> tuple[float, ...]:
    """``2, 2, ..., 2, 1``; three terms give four, which is what PEFT's loop does."""
    if terms < 3:
        return (2.0,) if terms == 2 else ()
    return (*(2.0 for _ in range(max(terms, 4) - 2)), 1.0)


def series_before_0_18(terms: int) -> tuple[float, ...]:
    """``2, 2, ..., 2``."""
    return tuple(2.0 for _ in range(1, terms))


RULES = MappingProxyType({"0.18.0": series_since_0_18, "0.17.0": series_before_0_18})
"""A PEFT version -> how it turns ``num_cayley_neumann_terms`` into a series; PEFT warns of the change, and no more."""

MOST_TERMS = 64
_OTHERS = ("mirrored", "scaled")


def size_of_blocks(angles: TensorRef) -> int:
    """``b`` of a tensor ``[n, b * (b - 1) / 2]``.

    Raises:
        IntegrityError: no block has that many numbers.
    """
    b = block_size(angles.shape[1])
    if b is None:
        raise IntegrityError(f"{angles.key} {list(angles.shape)}: no triangle of a square matrix has that many numbers")
    return b


def turned(group: Group) -> bool:
    """What the options say, else true for embeddings alone."""
    return bool(group.options.get("turned", group.role == "embedding"))


FIELDS: Mapping[str, Field] = MappingProxyType(
    {
        **PLACES,
        "use_cayley_neumann": USED,
        "num_cayley_neumann_terms": USED,
        "peft_version": USED,  # the series was another one before 0.18
        "block_share": USED,
        "coft": USED,
        "eps": USED,
        # PEFT rounds both to what divides a layer's inputs, so the tensor's shape counts, not they
        "r": INERT,
        "oft_block_size": INERT,
        "rank_pattern": INERT,  # early releases had both; the blocks are as large as the tensors say
        "alpha_pattern": INERT,  # and nothing was ever scaled by it
        "module_dropout": INERT,
        "fan_in_fan_out": INERT,  # PEFT adapts no layer that stores [in, out]
    }
)


def options(config: Mapping[str, JSON], module: str, slots: Mapping[str, TensorRef]) -> dict[str, JSON]:
    """Which formula PEFT used, and its numbers.

    Raises:
        IntegrityError: blocks that should be shared are several, a field has a value that PEFT never writes, or the
            tensor holds no triangles.
    """
    angles = slots["angles"]
    size_of_blocks(angles)
    shared = switch(config, "block_share", False)
    if shared and angles.shape[0] != 1:
        raise IntegrityError(f"{module}: block_share is true, and {angles.key} has {angles.shape[0]} blocks")
    terms = integer(config, "num_cayley_neumann_terms", 5)
    if not terms <= MOST_TERMS:
        raise IntegrityError(f"num_cayley_neumann_terms should be a small number, not {terms}")
    rule = RULES["0.17.0" if _before_0_18(config.get("peft_version")) else "0.18.0"]
    series: JSON = [*rule(terms)] if switch(config, "use_cayley_neumann", True) else None
    limit = number(config, "eps", 6e-5) if switch(config, "coft", False) else None
    if limit is not None and limit <= 0:
        raise IntegrityError(f"eps should be above zero, not {limit}")
    return {"series": series, "shared": shared, "limit": limit}


def disputed(
    config: Mapping[str, JSON], _module: str, _slots: Mapping[str, TensorRef], options: Mapping[str, JSON]
) -> Dispute | None:
    """PEFT since 0.18 computes another series than the release that trained an older adapter, and only warns."""
    series = options["series"]
    now: JSON = [*RULES["0.18.0"](integer(config, "num_cayley_neumann_terms", 5))]
    if series is None or series == now:
        return None
    return replace(_SERIES, followed={"series": now}, declared={"series": series})


_SERIES = Dispute(
    topic="oft-series-before-0.18",
    says="PEFT 0.18 changed the last term of OFT's series, so it turns older adapters by other angles than they were "
    "trained with",
    upstream="https://github.com/huggingface/peft/blob/v0.21.2/src/peft/tuners/oft/config.py",
    holds="trained by PEFT 0.16 or 0.17, merged by PEFT 0.18 to 0.21.2",
    peft="the series of PEFT 0.21.2",
    strict="the series that it was trained with",
    followed={},
    declared={},
)


def disputed_on(shape: tuple[int, ...], _options: Mapping[str, JSON]) -> Dispute | None:
    """On a kernel PEFT computes one thing until it merges, and another from then on."""
    return _WINDOWS if any(size > 1 for size in shape[2:]) else None


_WINDOWS = Dispute(
    topic="oft-on-kernels",
    says="as long as PEFT has not merged OFT on a convolution, it turns overlapping windows of the input and adds them "
    "up before it convolves, which changes outputs even where nothing is turned; its merge turns the kernel instead",
    upstream="https://github.com/huggingface/peft/blob/v0.21.2/src/peft/tuners/oft/layer.py",
    holds="kernels larger than 1, PEFT 0.21.2",
    peft="the turned kernel, which is PEFT's own merge and what lorahub trains",
    strict="what PEFT trains there is no change of the weight",
    followed={},
    declared=None,
)


def _before_0_18(stated: JSON) -> bool:
    """Whether an older PEFT trained the adapter; PEFT writes its version since 0.18."""
    if stated is None:
        return True
    try:
        return Version(str(stated).partition("@")[0]).release < (0, 18)
    except InvalidVersion:
        raise IntegrityError(f"peft_version should be a version, not {stated!r}") from None


def config(groups: Mapping[str, Group]) -> dict[str, JSON]:
    """The fields under which PEFT makes modules of these shapes and computes the same rotations.

    Raises:
        CannotCarry: modules differ in what PEFT keeps once, an embedding's way round is not that of its role, no block
            size or number gives these shapes, or no number of terms gives the series.
    """
    if other := sorted(name for name, group in groups.items() if any(group.options.get(each) for each in _OTHERS)):
        raise CannotCarry(f"PEFT has no word for OneTrainer's way of OFT, scaled or with kernels: {', '.join(other)}")
    if wrong := sorted(name for name, group in groups.items() if turned(group) != (group.role == "embedding")):
        raise CannotCarry(
            f"PEFT turns embeddings one way and all else the other; otherwise on {', '.join(wrong)}",
            "If these are embeddings, say so: PEFT spells them apart.",
        )
    series = one_for_all(groups, "use_cayley_neumann", lambda group: group.options["series"])
    limit = one_for_all(groups, "eps", lambda group: group.options["limit"])
    shared = one_for_all(groups, "block_share", lambda group: group.options["shared"])
    version, terms = _terms(series)
    field, value = _blocks_field(groups, shared=bool(shared))
    return {
        "r": 0,
        "oft_block_size": 0,
        field: value,
        "use_cayley_neumann": series is not None,
        "num_cayley_neumann_terms": terms,
        "peft_version": version,
        "block_share": shared,
        "coft": limit is not None,
        "eps": 6e-5 if limit is None else limit,
        "module_dropout": 0.0,
        "init_weights": True,
    }


def _terms(series: JSON) -> tuple[str, int]:
    """PEFT's version and number of terms for a series."""
    if not isinstance(series, list):
        return "0.18.0", 5
    for version, rule in RULES.items():
        for terms in range(1, len(series) + 2):
            if [*rule(terms)] == series:
                return version, terms
    raise CannotCarry(f"PEFT has no number of terms for the series {series}")


def _blocks_field(groups: Mapping[str, Group], *, shared: bool) -> tuple[str, int]:
    """``oft_block_size`` or ``r``, from which PEFT finds every module's blocks."""
    sizes = {(ref.shape[0], size_of_blocks(ref)) for ref in (group.slots["angles"] for group in groups.values())}
    if shared:
        if len({b for _, b in sizes}) == 1:
            return "oft_block_size", next(b for _, b in sizes)
    else:
        for b in _likely(size for _, size in sizes):
            if all(adjusted(n * own, b) == own for n, own in sizes):
                return "oft_block_size", b
        for r in _likely(n for n, _ in sizes):
            if all(adjusted(n * own, r) == n for n, own in sizes):
                return "r", r
    found = ", ".join(f"{n} blocks of {b}" for n, b in sorted(sizes))
    raise CannotCarry(f"PEFT has one oft_block_size or r for all modules, and none gives these: {found}")


def _likely(sizes: Iterable[int]) -> Iterable[int]:
    """The sizes themselves, then all others up to twice the largest."""
    own = sorted(set(sizes))
    return [*own, *range(1, 2 * own[-1] + 1)]


def adjusted(features: int, wanted: int) -> int:
    """What PEFT 0.21.2 makes of a block size or number that need not divide the inputs."""
    if wanted >= features:
        return features
    higher = next(size for size in range(wanted, features + 1) if features % size == 0)
    lower = next(size for size in range(wanted, 0, -1) if features % size == 0)
    return lower if wanted - lower <= higher - wanted else higher
