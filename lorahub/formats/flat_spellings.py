"""How kohya's sd-scripts, LyCORIS and their like spell kinds: the suffixes, and what ``alpha`` does to each.

Tables and the arithmetic of scales.  Knows neither files nor how modules are named.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from types import MappingProxyType

from lorahub.deltas.kind import JSON, Group, Leaf, Spelling, TensorRef
from lorahub.deltas.peft_config import alpha_for
from lorahub.errors import CannotCarry, IntegrityError
from lorahub.shapes import ShapeMisfit

__all__ = ["FORMAT", "REFUSED", "SPELLINGS", "WHOLE", "alpha_of", "dora_axis", "scaled"]

FORMAT = "kohya"

WHOLE: Mapping[str, str] = MappingProxyType({"diff": "weight", "diff_b": "bias", "w_norm": "weight", "b_norm": "bias"})
"""Suffix -> the parameter that is changed by such a tensor as it is, without a scale."""

REFUSED: Mapping[str, str] = MappingProxyType(
    {
        "lora_mid.weight": "LoCon with a Tucker core (lora_mid)",
        "oft_blocks": "LyCORIS OFT or BOFT",
        "oft_diag": "LyCORIS OFT",
        "oft_R.weight": "OneTrainer OFT",
        "rescale": "LyCORIS OFT with rescaling",
        "a1.weight": "LyCORIS GLoRA",
        "a2.weight": "LyCORIS GLoRA",
        "b1.weight": "LyCORIS GLoRA",
        "b2.weight": "LyCORIS GLoRA",
        "bm.weight": "LyCORIS GLoRA",
        "on_input": "LyCORIS IA3",
        "weight": "LyCORIS IA3",
        "scalar": "LyCORIS with a scalar that was not folded in",
        "bias_indices": "LyCORIS with a sparse bias",
        "bias_values": "LyCORIS with a sparse bias",
        "bias_size": "LyCORIS with a sparse bias",
    }
)
"""Suffix -> what it is a sign of, for weight changes that are recognised and refused where no kind reads them."""


def scaled(numbers: Mapping[str, JSON], rank: int, key: str) -> dict[str, JSON]:
    """Scale, its rule, alpha and rank; without an alpha the scale is 1.

    Raises:
        IntegrityError: there is no rank.
    """
    if rank < 1:
        raise IntegrityError(f"{key} has no rank")
    alpha = numbers.get("alpha")
    if not isinstance(alpha, int | float):
        return {"scale": 1.0, "scale_rule": "default", "alpha": float(rank), "rank": rank}
    return {"scale": alpha / rank, "scale_rule": "alpha/r", "alpha": alpha, "rank": rank}


def dora_axis(slots: Mapping[str, TensorRef]) -> int:
    """Which axis of the weight keeps its lengths, from the shape they have.

    Raises:
        ShapeMisfit: their number is that of neither axis, or a vector beside a square weight could be either.
    """
    magnitude = slots["magnitude"]
    out, width = slots["up"].shape[0], slots["down"].shape[1]
    sizes, shape = (out, width), magnitude.shape
    if len(shape) == 1:
        if out == width:
            raise ShapeMisfit(f"{magnitude.key} {list(shape)} could hold lengths of the rows or of the columns")
        fitting = [axis for axis in (0, 1) if sizes[axis] == shape[0]]
    else:
        fitting = [
            axis for axis in (0, 1) if shape == tuple(sizes[axis] if at == axis else 1 for at in range(len(shape)))
        ]
    if not fitting:
        raise ShapeMisfit(f"{magnitude.key} {list(shape)} fits neither the {out} rows nor the {width} columns")
    return fitting[0]


def alpha_of(group: Group, rank: int) -> float:
    """The alpha under which reading ``group`` again gives a bit-equal scale.

    Raises:
        CannotCarry: there is none.
    """
    scale = group.options.get("scale")
    if rank < 1:
        raise CannotCarry("there is no alpha for a rank of 0")
    alpha = alpha_for(scale, group.options.get("alpha"), float(rank), whole=False)
    if not alpha or not math.isfinite(alpha):
        raise CannotCarry(f"no alpha over rank {rank} gives the scale {scale!r}; 0 and NaN mean that there is none")
    return float(alpha)


def _rank(slots: Mapping[str, TensorRef], names: tuple[str, ...]) -> tuple[int, str]:
    ref = next(slots[name] for name in names if name in slots)
    return (ref.shape[0] if ref.shape else 0), ref.key


def _by_rank(*names: str) -> Callable[[Mapping[str, JSON], str, Mapping[str, TensorRef]], dict[str, JSON]]:
    """Options of a kind whose rank is the first size of the first of these slots that is there."""

    def options(numbers: Mapping[str, JSON], _module: str, slots: Mapping[str, TensorRef]) -> dict[str, JSON]:
        return scaled(numbers, *_rank(slots, names))

    return options


def _dora(numbers: Mapping[str, JSON], _module: str, slots: Mapping[str, TensorRef]) -> dict[str, JSON]:
    return {**scaled(numbers, *_rank(slots, ("down",))), "axis": dora_axis(slots)}


def _lokr(numbers: Mapping[str, JSON], _module: str, slots: Mapping[str, TensorRef]) -> dict[str, JSON]:
    """As LyCORIS: two whole matrices are not scaled, whatever alpha says; else the rank is that of the first factor."""
    if "w1_b" in slots or "w2_b" in slots:
        return scaled(numbers, *_rank(slots, ("w1_b", "w2_b")))
    stated = numbers.get("alpha")
    alpha: dict[str, JSON] = {} if stated is None else {"alpha": stated}
    return {"scale": 1.0, "scale_rule": "absolute", **alpha}


def _full(_numbers: Mapping[str, JSON], _module: str, _slots: Mapping[str, TensorRef]) -> dict[str, JSON]:
    return {}


def _alpha(*names: str) -> Callable[[Mapping[str, Group]], dict[str, JSON]]:
    """The numbers to store beside one module."""

    def config(groups: Mapping[str, Group]) -> dict[str, JSON]:
        (group,) = groups.values()
        return {"alpha": alpha_of(group, _rank(group.slots, names)[0])}

    return config


def _lokr_alpha(groups: Mapping[str, Group]) -> dict[str, JSON]:
    (group,) = groups.values()
    if group.options.get("trailing"):
        raise CannotCarry("LyCORIS multiplies out a LoKr beside a Conv1d in another way")
    if "w1_b" in group.slots or "w2_b" in group.slots:
        return {"alpha": alpha_of(group, _rank(group.slots, ("w1_b", "w2_b"))[0])}
    if group.options.get("scale") != 1.0:
        raise CannotCarry("a LoKr of two whole matrices has no scale here")
    return {}


def _unscaled(groups: Mapping[str, Group]) -> dict[str, JSON]:
    if any(group.options.get("scale", 1.0) != 1.0 for group in groups.values()):
        raise CannotCarry("a difference is stored without a scale")
    return {}


def _leaves(prefix: str, *names: str) -> tuple[Leaf, ...]:
    return tuple(Leaf(slot=name, suffix=f"{prefix}{name}") for name in names)


_PAIR = (Leaf(slot="down", suffix="lora_down.weight"), Leaf(slot="up", suffix="lora_up.weight"))
_HADA = ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")
_LOKR = ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")

SPELLINGS: Mapping[str, Spelling] = MappingProxyType(
    {
        "lora": Spelling(format=FORMAT, tag="", leaves=_PAIR, options=_by_rank("down"), config=_alpha("down")),
        "dora": Spelling(
            format=FORMAT,
            tag="",
            leaves=(*_PAIR, Leaf(slot="magnitude", suffix="dora_scale")),
            options=_dora,
            config=_alpha("down"),
        ),
        "locon": Spelling(
            format=FORMAT,
            tag="",
            leaves=(*_PAIR, Leaf(slot="mid", suffix="lora_mid.weight")),
            options=_by_rank("down"),
            config=_alpha("down"),
        ),
        "loha": Spelling(
            format=FORMAT, tag="", leaves=_leaves("hada_", *_HADA), options=_by_rank("w1_b"), config=_alpha("w1_b")
        ),
        "lokr": Spelling(format=FORMAT, tag="", leaves=_leaves("lokr_", *_LOKR), options=_lokr, config=_lokr_alpha),
        "full": Spelling(
            format=FORMAT,
            tag="",
            leaves=tuple(Leaf(slot="diff", suffix=suffix) for suffix in WHOLE),
            options=_full,
            config=_unscaled,
        ),
    }
)
"""Kind -> its spelling.  ``options`` reads ``{"alpha": number}`` or nothing; ``config`` gives it back for a module."""
