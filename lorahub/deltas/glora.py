"""GLoRA: weight and bias each scaled and shifted (https://arxiv.org/abs/2306.07967).

``W' = W + W * A + B`` and ``b' = b + b * D + E + W @ C``.  Each of the five is a product of two factors, a column, one
number, or zeros that PEFT stores in full.  What is stored in full is used as it is.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, ClassVar, final

from lorahub.deltas.delta import ALL, Delta, Index, take
from lorahub.deltas.kind import JSON, Field, Group, Kind, Leaf, Slot, Spelling, TensorRef, Touch
from lorahub.deltas.peft_config import USED, one_for_all
from lorahub.deltas.peft_values import PLACES, integer
from lorahub.errors import BaseMismatch, CannotCarry, IntegrityError, NotLocal
from lorahub.hookspecs import hookimpl
from lorahub.lazy import torch
from lorahub.shapes import ShapeMisfit

if TYPE_CHECKING:
    from typing import Self

__all__ = ["GLORA", "Offsets", "Scaled"]


def path(left: torch.Tensor, right: torch.Tensor | None, like: torch.Tensor) -> torch.Tensor:
    """``left @ right``, or ``left`` to be broadcast, in the dtype of ``like``."""
    return left.to(like) if right is None else left.to(like) @ right.to(like)


def cut_path(
    left: torch.Tensor, right: torch.Tensor | None, rows: Index, cols: Index
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """A path on a weight cut to a region: axes of size one stay, for they are broadcast."""
    if right is not None:
        return take(left, rows, 0), take(right, cols, 1)
    if left.dim() < 2:
        return left, None
    down = left if left.shape[0] == 1 and left.shape[1] == 1 else take(left, rows, 0)
    return (take(down, cols, 1) if left.shape[1] > 1 else down), None


@final
@dataclass(frozen=True, slots=True, eq=False)
class Scaled(Delta):
    """``W * A + B``.

    Attributes:
        gain, gain_right: A: ``[out, r]`` and ``[r, in]``; or ``[out, 1]``, ``[1]`` or ``[out, in]`` and None.
        shift, shift_right: B, in the same form.
        form: what PEFT calls it: see ``FORMS``.
    """

    gain: torch.Tensor
    gain_right: torch.Tensor | None
    shift: torch.Tensor
    shift_right: torch.Tensor | None
    form: str

    kind: ClassVar[str] = "glora"
    additive: ClassVar[bool] = False

    def delta(self, weight: torch.Tensor, **siblings: torch.Tensor) -> torch.Tensor:
        """In the weight's dtype.

        Raises:
            BaseMismatch: the weight has other sizes, or is no matrix.
        """
        gain, shift = path(self.gain, self.gain_right, weight), path(self.shift, self.shift_right, weight)
        for each in (gain, shift):
            known = each.dim() < 2 or (each.shape[0] == weight.shape[0] and each.shape[1] in (1, *weight.shape[1:]))
            if weight.dim() != 2 or not known:
                raise BaseMismatch(f"a glora path {list(each.shape)} was given a weight {list(weight.shape)}")
        return weight * gain + shift

    def region(self, rows: Index, cols: Index) -> Self:
        """Rows and columns of both paths, as far as they have any."""
        gain, shift = (
            cut_path(left, right, rows, cols)
            for left, right in ((self.gain, self.gain_right), (self.shift, self.shift_right))
        )
        return type(self)(*gain, *shift, self.form)

    def shape(self) -> None:
        """None: a column or a number does not tell."""

    @classmethod
    def fresh(cls, shape: tuple[int, ...], *, r: int, generator: torch.Generator) -> Self:
        """Left factors of zero.

        Raises:
            BaseMismatch: ``shape`` is no matrix.
        """
        out, inputs = expect_two(shape)
        bound = 1 / math.sqrt(inputs)
        rights = [
            torch.empty(r, inputs, device=generator.device).uniform_(-bound, bound, generator=generator)
            for _ in range(2)
        ]
        zeros = torch.zeros(out, r, device=generator.device)
        return cls(zeros, rights[0], zeros.clone(), rights[1], "lora")

    @classmethod
    def example(cls, shape: tuple[int, ...], *, r: int, generator: torch.Generator) -> Self:
        """Normal paths in one of the three trained forms.

        Raises:
            BaseMismatch: ``shape`` is no matrix.
        """
        out, inputs = expect_two(shape)

        def normal(*size: int) -> torch.Tensor:
            return torch.randn(size, generator=generator, device=generator.device)

        form = int(torch.randint(3, (), generator=generator, device=generator.device))
        if form == 0:
            return cls(normal(out, r), normal(r, inputs), normal(out, r), normal(r, inputs), "lora")
        size, name = ((out, 1), "vector") if form == 1 else ((1,), "constant")
        return cls(normal(*size), None, normal(*size), None, name)


@final
@dataclass(frozen=True, slots=True, eq=False)
class Offsets(Delta):
    """``b * D + E + W @ C``.

    Attributes:
        mix, mix_right: C: ``[in, r]`` and ``[r, 1]``; or ``[in, 1]`` and None.
        gain: D, ``[out]`` or ``[1]``.
        shift: E, ``[out]`` or ``[1]``.
        mix_form, form: what PEFT calls those of C, and of D and E: see ``FORMS``.
    """

    mix: torch.Tensor
    mix_right: torch.Tensor | None
    gain: torch.Tensor
    shift: torch.Tensor
    mix_form: str
    form: str

    kind: ClassVar[str] = "glora"
    additive: ClassVar[bool] = False
    reads: ClassVar[tuple[str, ...]] = ("weight",)

    # by position only: the sibling it reads is itself called "weight"
    def delta(self, bias: torch.Tensor, /, **siblings: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        """The change of a bias; its module's untouched weight comes as ``weight`` among the siblings.

        Raises:
            BaseMismatch: sizes do not fit.
        """
        mix, weight = path(self.mix, self.mix_right, bias), siblings["weight"]
        sizes = {each.shape[0] for each in (self.gain, self.shift)} - {1, *bias.shape}
        if bias.dim() != 1 or sizes or weight.dim() != 2 or mix.shape[0] != weight.shape[1]:
            raise BaseMismatch(
                f"a glora path {list(mix.shape)} was given a bias {list(bias.shape)} and a weight {list(weight.shape)}"
            )
        return bias * self.gain.to(bias) + self.shift.to(bias) + (weight.to(bias) @ mix).squeeze(-1)

    def region(self, rows: Index, cols: Index) -> Self:
        """Only the whole.

        Raises:
            NotLocal: any cut, for the weight that it reads is not cut with it.
        """
        if rows != ALL:
            raise NotLocal("a glora change of a bias reads the whole weight; it cannot be cut")
        return self

    def shape(self) -> None:
        """None: a number does not tell."""

    @classmethod
    def fresh(cls, shape: tuple[int, ...], *, r: int, generator: torch.Generator) -> Self:
        """Refused: the weight beside the bias has a size that the bias does not tell.

        Raises:
            BaseMismatch: always.
        """
        raise BaseMismatch(f"a glora change of a bias {list(shape)} needs the size of its weight as well")

    @classmethod
    def example(cls, shape: tuple[int, ...], *, r: int, generator: torch.Generator) -> Self:
        """Refused, as ``fresh`` is.

        Raises:
            BaseMismatch: always.
        """
        raise BaseMismatch(f"a glora change of a bias {list(shape)} needs the size of its weight as well")


def expect_two(shape: tuple[int, ...]) -> tuple[int, int]:
    """``(out, in)``.

    Raises:
        BaseMismatch: ``shape`` is no matrix.
    """
    if len(shape) != 2:
        raise BaseMismatch(f"a glora delta changes matrices [out, in], not {list(shape)}")
    return shape[0], shape[1]


FORMS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {"lora": ("Xd", "Xu"), "vector": ("X",), "constant": ("X",), "none": ("zeros",)}
)
"""What PEFT calls a form -> the tensors that it has."""

PATHS: Mapping[str, tuple[str, str]] = MappingProxyType(
    {
        "A": ("config_A_B", "lora"),
        "B": ("config_A_B", "lora"),
        "C": ("config_C", "lora"),
        "D": ("config_D_E", "constant"),
        "E": ("config_D_E", "constant"),
    }
)
"""Path -> the config field with its form, and PEFT's default."""

LEAVES = tuple(
    Leaf(slot=f"{letter}.{name}", suffix=f"glora_{letter}.{name}")
    for letter in PATHS
    for name in (("Xd", "Xu", "X", "zeros") if letter in "ABC" else ("X", "zeros"))
)


def form_of(slots: Mapping[str, TensorRef], letter: str) -> str:
    """Which form a path has, by its tensors, or "" where it has none.

    Raises:
        ShapeMisfit: the tensors are no form of this path.
    """
    shapes = {name: ref.shape for slot, ref in slots.items() for at, _, name in [slot.partition(".")] if at == letter}
    last = {"C": (1,), "D": (), "E": ()}.get(letter)
    match shapes:
        case {"Xd": (_, r), "Xu": (s, _), **rest} if not rest and r == s and r > 0:
            return "lora"
        case {"X": (1,), **rest} if not rest and letter != "C":
            return "constant"
        case {"X": (_, *others), **rest} if not rest and tuple(others) == ((1,) if last is None else last):
            return "vector"
        case {"zeros": (_, *others), **rest} if not rest and (
            len(others) == 1 if last is None else tuple(others) == last
        ):
            return "none"
        case empty if not empty:
            return ""
    raise ShapeMisfit(f"glora_{letter} is {', '.join(f'{name} {list(shape)}' for name, shape in shapes.items())}")


def sizes_of(slots: Mapping[str, TensorRef]) -> tuple[str, str]:
    """The outputs and the inputs of the weight as dims: numbers where a path tells them.

    Raises:
        ShapeMisfit: paths tell different sizes.
    """
    outs: set[int] = set()
    inputs: set[int] = set()
    for letter in PATHS:
        form = form_of(slots, letter)
        if form in ("", "constant"):
            continue
        shapes = [slots[f"{letter}.{name}"].shape for name in FORMS[form]]
        (inputs if letter == "C" else outs).add(shapes[0][0])
        if letter in "AB" and form != "vector":
            inputs.add(shapes[-1][1])
    if len(outs) > 1 or len(inputs) > 1:
        raise ShapeMisfit(f"its paths are for {sorted(outs)} outputs and {sorted(inputs)} inputs")
    return next(map(str, outs), "out"), next(map(str, inputs), "in")


def touches(group: Group) -> tuple[Touch, ...]:
    """The weight, and the bias where the module has one."""
    out, inputs = sizes_of(group.slots)
    weight, bias = (tuple(name for name in group.slots if name[0] in letters) for letters in ("AB", "CDE"))
    ranks = [ref.shape[0] for name, ref in group.slots.items() if name in ("A.Xu", "B.Xu")]
    changes = [
        Touch(
            parameter="weight",
            dims=f"{out} {inputs}",
            slots=weight,
            additive=False,
            rank=ranks[0] if ranks else None,
        )
    ]
    if bias:
        changes.append(
            Touch(
                parameter="bias",
                dims=out,
                slots=bias,
                additive=False,
                if_present=True,
                local=False,
                reads=("weight",),
            )
        )
    return tuple(changes)


def build(group: Group, tensors: Mapping[str, torch.Tensor]) -> dict[str, Delta]:
    """The weight's delta, and the bias's where files have its three paths."""
    forms = {letter: form_of(group.slots, letter) for letter in PATHS}

    def pair(letter: str) -> tuple[torch.Tensor, torch.Tensor | None]:
        first, *others = (tensors[f"{letter}.{name}"] for name in FORMS[forms[letter]])
        return first, others[0] if others else None

    deltas: dict[str, Delta] = {"weight": Scaled(*pair("A"), *pair("B"), forms["A"])}
    if forms["C"]:
        deltas["bias"] = Offsets(*pair("C"), pair("D")[0], pair("E")[0], forms["C"], forms["D"])
    return deltas


def dissolve(deltas: Mapping[str, Delta]) -> tuple[dict[str, torch.Tensor], dict[str, JSON]] | None:
    """The inverse of ``build``."""
    weight, bias = deltas.get("weight"), deltas.get("bias")
    if not isinstance(weight, Scaled) or not deltas.keys() <= {"weight", "bias"}:
        return None
    paths = {"A": (weight.form, weight.gain, weight.gain_right), "B": (weight.form, weight.shift, weight.shift_right)}
    if isinstance(bias, Offsets):
        paths["C"] = (bias.mix_form, bias.mix, bias.mix_right)
        paths |= {"D": (bias.form, bias.gain, None), "E": (bias.form, bias.shift, None)}
    elif bias is not None:
        return None
    return {
        f"{letter}.{name}": tensor
        for letter, (form, *tensors) in paths.items()
        for name, tensor in zip(FORMS[form], tensors, strict=False)
        if tensor is not None
    }, {}


FIELDS: Mapping[str, Field] = MappingProxyType(
    {**PLACES, "r": USED, "config_A_B": USED, "config_C": USED, "config_D_E": USED}
)


def options(config: Mapping[str, JSON], module: str, slots: Mapping[str, TensorRef]) -> dict[str, JSON]:
    """Nothing: the tensors say it all, once they agree with the config.

    Raises:
        IntegrityError: a path is missing, or has another form or rank than the config says.
        ShapeMisfit: tensors of a path do not fit together.
    """
    absent = ""
    for letter, (field, default) in PATHS.items():
        found, stated = form_of(slots, letter), config.get(field) or default
        if not found and letter in "CDE" and stated == "none":
            absent += letter
            continue
        # PEFT has no bias to change in some modules, and then nothing to train there
        if found != stated and not (found == "none" and letter in "CDE"):
            raise IntegrityError(f"{module}: {field} is {stated!r}, and glora_{letter} has the form {found!r}")
        ref = slots.get(f"{letter}.Xu")
        if ref is not None and ref.shape[0] != (r := integer(config, "r", 8)):
            raise IntegrityError(f"{module}: r says rank {r}, and {ref.key} has rank {ref.shape[0]}")
    if absent not in ("", "CDE"):
        raise IntegrityError(f"{module}: the file has some of the paths C, D and E, and not {absent}")
    return {}


def config(groups: Mapping[str, Group]) -> dict[str, JSON]:
    """The inverse of ``options``.

    Raises:
        CannotCarry: modules differ in what PEFT keeps once, or lack the paths of a bias.
    """
    bare = sorted(name for name, group in groups.items() if not form_of(group.slots, "C"))
    if bare and len(bare) < len(groups):
        raise CannotCarry(f"PEFT's GLoRA has paths for a bias on all modules or none, and not on: {', '.join(bare)}")
    forms: dict[str, JSON] = {}
    for letter, (field, _) in PATHS.items():
        each = {name: form_of(group.slots, letter) for name, group in groups.items()}
        # modules without a bias store zeros, whatever the others have
        trained = {name: groups[name] for name in groups if letter in "AB" or each[name] not in ("", "none")}
        found = one_for_all(trained, field, lambda group: form_of(group.slots, letter)) if trained else "none"  # noqa: B023 - called at once
        if forms.setdefault(field, found) != found:
            raise CannotCarry(f"PEFT has one {field} for two paths, and here they differ")
    ranks = {ref.shape[0] for group in groups.values() for slot, ref in group.slots.items() if slot.endswith(".Xu")}
    if len(ranks) > 1:
        raise CannotCarry(f"PEFT has one r for all modules and paths, and these have ranks {sorted(ranks)}")
    return {**forms, "r": next(iter(ranks), 8), "init_weights": True}


GLORA = Kind(
    name="glora",
    title="GLoRA",
    source="https://arxiv.org/abs/2306.07967",
    # ``options`` sees to it that every path is whole
    slots=tuple(Slot(name=leaf.slot, dims=f"*{leaf.slot}", optional=True) for leaf in LEAVES),
    deltas=(Scaled,),
    touches=touches,
    build=build,
    dissolve=dissolve,
    spellings=(Spelling(format="peft", tag="GLORA", leaves=LEAVES, fields=FIELDS, options=options, config=config),),
)


@hookimpl
def lorahub_kinds() -> list[Kind]:
    """The built-in GLoRA."""
    return [GLORA]
