"""How kohya's sd-scripts, LyCORIS and their like spell kinds: the suffixes, and what ``alpha`` does to each.

Tables and the arithmetic of scales.  Knows neither files nor how modules are named.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import TypeAlias

from lorahub.deltas.decomposed import axis_of
from lorahub.deltas.kind import JSON, Group, Leaf, Spelling, TensorRef
from lorahub.deltas.lycoris_glora import rank_of
from lorahub.deltas.peft_config import alpha_for
from lorahub.errors import CannotCarry, IntegrityError
from lorahub.shapes import ShapeMisfit

__all__ = [
    "AXES",
    "FORMAT",
    "NUMBERS",
    "READ",
    "REFUSED",
    "ROOT",
    "SPELLINGS",
    "STAGED",
    "UNSCALED",
    "WHOLE",
    "alpha_of",
    "dora_axis",
    "scaled",
]

OptionsOf: TypeAlias = "Callable[[Mapping[str, JSON], str, Mapping[str, TensorRef]], dict[str, JSON]]"
"""(numbers, module, slots) -> what changes the arithmetic."""

FORMAT = "kohya"

WHOLE: Mapping[str, str] = MappingProxyType({"diff": "weight", "diff_b": "bias", "w_norm": "weight", "b_norm": "bias"})
"""Suffix -> the parameter that is changed by such a tensor as it is, without a scale."""

REFUSED: Mapping[str, str] = MappingProxyType(
    {
        "oft_diag": "LyCORIS OFT of a release before 2.0, in which oft_diag meant two things",
        **{f"oft_blocks.{part}": "OFT of the parts of a fused layer, as sd-scripts has it" for part in range(4)},
        "q_layer.weight": "T-LoRA, whose rank depends on the time step",
        "p_layer.weight": "T-LoRA, whose rank depends on the time step",
        "lambda_layer": "T-LoRA, whose rank depends on the time step",
        "initial_norm": "DoRA over OneTrainer's OFT",
        "dora_multiplier": "DoRA over OneTrainer's OFT",
        "dora_log_multiplier": "DoRA over OneTrainer's OFT",
        "oft_R.cans_exp": "OneTrainer's OFT by Newton-Schulz steps",
        "oft_R.cans_oft": "OneTrainer's OFT by Newton-Schulz steps",
        "reshape_weight": "a weight of another shape, as ComfyUI stores it",
    }
)
"""Suffix -> what it is a sign of, for weight changes that are recognised and that no kind reads."""

NUMBERS: Mapping[str, str] = MappingProxyType(
    {"alpha": "alpha", "scalar": "scalar", "on_input": "on_input", "oft_R.scaled_oft": "scaled"}
)
"""Suffix of a tensor that is a single number -> what ``options`` calls it."""

STAGED = "oft_blocks"
"""Suffix of the tensor whose axes tell diag-OFT from BOFT, and whose alpha is a bound that may be 0."""

ROOT = "rooted"
"""What ``options`` calls the statement that an alpha is to be divided by the square root of the rank."""

AXES = "axes"
"""What ``options`` calls the number of those axes."""


def scaled(numbers: Mapping[str, JSON], rank: int, key: str) -> dict[str, JSON]:
    """Scale, its rule, alpha and rank; without an alpha the scale is 1, and a trained scalar multiplies it.

    Raises:
        IntegrityError: there is no rank.
    """
    if rank < 1:
        raise IntegrityError(f"{key} has no rank")
    alpha, scalar = numbers.get("alpha"), numbers.get("scalar")
    stated = isinstance(alpha, int | float)
    scale, rule = (alpha / rank, "alpha/r") if isinstance(alpha, int | float) else (1.0, "default")
    if numbers.get(ROOT) is True and isinstance(alpha, int | float):
        scale, rule = alpha / math.sqrt(rank), "alpha/sqrt(r)"
    if isinstance(scalar, int | float):
        scale, rule = scale * scalar, f"{rule} * scalar"
    return {"scale": scale, "scale_rule": rule, "alpha": alpha if stated else float(rank), "rank": rank}


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
    axis = 0 if slots["magnitude"].key.endswith(_PEFT_LENGTHS) else dora_axis(slots)  # PEFT's are of the rows
    return {**scaled(numbers, *_rank(slots, ("down",))), "axis": axis}


def _lokr(numbers: Mapping[str, JSON], _module: str, slots: Mapping[str, TensorRef]) -> dict[str, JSON]:
    """As LyCORIS: two whole matrices are not scaled, whatever alpha says; else the rank is that of the first factor."""
    if "w1_b" in slots or "w2_b" in slots:
        return scaled(numbers, *_rank(slots, ("w1_b", "w2_b")))
    stated, scalar = numbers.get("alpha"), numbers.get("scalar")
    alpha: dict[str, JSON] = {} if stated is None else {"alpha": stated}
    return {"scale": scalar if isinstance(scalar, int | float) else 1.0, "scale_rule": "absolute", **alpha}


def _over(inner: OptionsOf) -> OptionsOf:
    """Options of a decomposed kind: those of the kind inside, and the axis of the lengths."""

    def options(numbers: Mapping[str, JSON], module: str, slots: Mapping[str, TensorRef]) -> dict[str, JSON]:
        return {**inner(numbers, module, slots), "axis": axis_of(slots["magnitude"])}

    return options


def _glora(numbers: Mapping[str, JSON], _module: str, slots: Mapping[str, TensorRef]) -> dict[str, JSON]:
    return scaled(numbers, rank_of(slots), slots["a1"].key)


def _glora_alpha(groups: Mapping[str, Group]) -> dict[str, JSON]:
    (group,) = groups.values()
    return {"alpha": alpha_of(group, rank_of(group.slots))}


def _constraint(numbers: Mapping[str, JSON], _module: str, _slots: Mapping[str, TensorRef]) -> dict[str, JSON]:
    """An alpha is no scale here: it bounds the rotation, and 0 leaves it free."""
    alpha = numbers.get("alpha")
    return {"constraint": alpha if isinstance(alpha, int | float) and alpha > 0 else None}


def _constraint_alpha(groups: Mapping[str, Group]) -> dict[str, JSON]:
    (group,) = groups.values()
    return {"alpha": group.options.get("constraint") or 0.0}


def _has_axes(count: int) -> Callable[[Mapping[str, JSON]], bool]:
    def when(numbers: Mapping[str, JSON]) -> bool:
        return numbers.get(AXES) == count

    return when


def _growth(numbers: Mapping[str, JSON], module: str, _slots: Mapping[str, TensorRef]) -> dict[str, JSON]:
    flag = numbers.get("on_input")
    if flag not in (0, 1):
        raise IntegrityError(f"{module}: on_input should be 0 or 1 and say which axis grows, not {flag}")
    return {"axis": int(flag == 1)}


def _on_input(groups: Mapping[str, Group]) -> dict[str, JSON]:
    (group,) = groups.values()
    return {"on_input": group.options["axis"]}


_SERIES = (2.0, 2.0, 2.0, 1.0)
"""OneTrainer's approximation, in every release that has one: PEFT's with five terms."""


def _onetrainer(numbers: Mapping[str, JSON], _module: str, slots: Mapping[str, TensorRef]) -> dict[str, JSON]:
    """A single block serves for all inputs; which way a weight turns depends on whether it has a kernel."""
    shared = slots["angles"].shape[:1] == (1,)
    said: dict[str, JSON] = {"series": [*_SERIES], "shared": shared, "limit": None, "turned": False, "mirrored": True}
    return {**said, "scaled": bool(numbers.get("scaled"))}


def _onetrainer_flags(groups: Mapping[str, Group]) -> dict[str, JSON]:
    (group,) = groups.values()
    found = {name: value for name, value in group.options.items() if name != "scaled"}
    if found != {name: value for name, value in _onetrainer({}, "", group.slots).items() if name != "scaled"}:
        raise CannotCarry("only OneTrainer's way of OFT has a word here")
    return {"oft_R.scaled_oft": 1} if group.options.get("scaled") else {}


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
    return {"alpha": 1.0}  # which scales nothing, but LyCORIS loads no module without one


def _unscaled(groups: Mapping[str, Group]) -> dict[str, JSON]:
    if any(group.options.get("scale", 1.0) != 1.0 for group in groups.values()):
        raise CannotCarry("a difference is stored without a scale")
    return {}


def _always(_numbers: Mapping[str, JSON]) -> bool:
    return True


def _leaves(prefix: str, *names: str) -> tuple[Leaf, ...]:
    return tuple(Leaf(slot=name, suffix=f"{prefix}{name}") for name in names)


_PAIR = (Leaf(slot="down", suffix="lora_down.weight"), Leaf(slot="up", suffix="lora_up.weight"))
_MID = Leaf(slot="mid", suffix="lora_mid.weight")
_HADA = _leaves("hada_", "w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")
_LOKR = _leaves("lokr_", "w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")
_LENGTHS = Leaf(slot="magnitude", suffix="dora_scale")
_PEFT_LENGTHS = "lora_magnitude_vector"
_TURNS = (Leaf(slot="blocks", suffix=STAGED), Leaf(slot="rescale", suffix="rescale"))
_REST = (
    Leaf(slot="places", suffix="bias_indices"),
    Leaf(slot="values", suffix="bias_values"),
    Leaf(slot="size", suffix="bias_size"),
)
_GLORA = (*(Leaf(slot=name, suffix=f"{name}.weight") for name in ("a1", "a2", "b1", "b2")),)
_CORE = Leaf(slot="core", suffix="bm.weight")


def _spelling(
    leaves: tuple[Leaf, ...],
    options: OptionsOf,
    config: Callable[[Mapping[str, Group]], dict[str, JSON]],
    when: Callable[[Mapping[str, JSON]], bool] = _always,
) -> Spelling:
    return Spelling(format=FORMAT, tag="", leaves=leaves, options=options, config=config, when=when)


_WHOLE = tuple(Leaf(slot="diff", suffix=suffix) for suffix in WHOLE)
_BY_DOWN, _DOWN_ALPHA = _by_rank("down"), _alpha("down")
_BY_HADA, _HADA_ALPHA = _by_rank("w1_b"), _alpha("w1_b")

SPELLINGS: Mapping[str, Spelling] = MappingProxyType(
    {
        "lora": _spelling(_PAIR, _BY_DOWN, _DOWN_ALPHA),
        "dora": _spelling((*_PAIR, _LENGTHS), _dora, _DOWN_ALPHA),
        "locon": _spelling((*_PAIR, _MID), _BY_DOWN, _DOWN_ALPHA),
        "loha": _spelling(_HADA, _BY_HADA, _HADA_ALPHA),
        "lokr": _spelling(_LOKR, _lokr, _lokr_alpha),
        "dora-locon": _spelling((*_PAIR, _MID, _LENGTHS), _over(_BY_DOWN), _DOWN_ALPHA),
        "dora-loha": _spelling((*_HADA, _LENGTHS), _over(_BY_HADA), _HADA_ALPHA),
        "dora-lokr": _spelling((*_LOKR, _LENGTHS), _over(_lokr), _lokr_alpha),
        "lora-sparse": _spelling((*_PAIR, replace(_MID, slot="core"), *_REST), _BY_DOWN, _DOWN_ALPHA),
        "diag-oft": _spelling(_TURNS, _constraint, _constraint_alpha, _has_axes(3)),
        "lycoris-boft": _spelling(_TURNS, _constraint, _constraint_alpha, _has_axes(4)),
        "lycoris-glora": _spelling((*_GLORA, _CORE), _glora, _glora_alpha),
        "lycoris-ia3": _spelling((Leaf(slot="growth", suffix="weight"),), _growth, _on_input),
        "oft": _spelling((Leaf(slot="angles", suffix="oft_R.weight"),), _onetrainer, _onetrainer_flags),
        "full": _spelling(_WHOLE, _full, _unscaled),
    }
)
"""Kind -> its spelling.  ``options`` reads the numbers that are there; ``config`` gives them back for a module."""

READ: Mapping[str, Spelling] = MappingProxyType(
    {
        **SPELLINGS,
        "lora": _spelling((*_PAIR, Leaf(slot="bias", suffix="lora_up.bias")), _BY_DOWN, _DOWN_ALPHA),
        "dora": _spelling((*_PAIR, _LENGTHS, replace(_LENGTHS, suffix=_PEFT_LENGTHS)), _dora, _DOWN_ALPHA),
    }
)
"""The same with what diffusers' own converter leaves as PEFT has it; no trainer reads that, so it is never written."""

UNSCALED = frozenset({"full", "lycoris-ia3", "oft"})
"""Kinds that an alpha means nothing to."""
