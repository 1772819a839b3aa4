"""What a kind declares: its slots, how formats spell them, and what a group of tensors turns into.

A declaration is data and pure functions over shapes; arithmetic lives in the deltas it builds.  A new kind is one
module with its delta, its ``Kind`` and a hook implementation.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TypeAlias

from lorahub.deltas.delta import Delta
from lorahub.lazy import torch

__all__ = ["JSON", "Field", "Group", "Kind", "Leaf", "Slot", "Spelling", "TensorRef", "Touch"]

JSON: TypeAlias = "bool | int | float | str | list[JSON] | dict[str, JSON] | None"


@dataclass(frozen=True, slots=True, kw_only=True)
class Slot:
    """A named tensor of a kind: ``down`` with dims ``"r in *k"``.

    ``shared`` slots exist once per adapter; ``prunable`` ones may have no elements left.  ``lacking`` says why files
    may be without one that is not optional, to follow the complaint that it is missing.
    """

    name: str
    dims: str
    optional: bool = False
    shared: bool = False
    prunable: bool = False
    lacking: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Leaf:
    """How a format spells a slot behind a module's stem: ``Leaf(slot="down", suffix="lora_A.weight")``.

    Attributes:
        transposed: the file stores the slot with its first two axes exchanged.
        role: what the module must be when this spelling is found ("linear", "embedding", ...); empty: anything.
    """

    slot: str
    suffix: str
    transposed: bool = False
    role: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorRef:
    """Where a slot's tensor is: the key in the file, its shape and dtype as the slot (after ``transposed``)."""

    key: str
    shape: tuple[int, ...]
    dtype: str
    transposed: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """All tensors of one kind on one module, as a file spells them: no values, headers only.

    Attributes:
        component: "" or the part of a pipeline ("unet", "text_encoder").
        module: dotted module path, as the file spells it until a base is known.
        parameter: the parameter a whole-parameter kind stands for; "weight" for factor kinds.
        kind: registered kind name.
        role: what the spelling says the module is ("embedding", ...), or "".
        slots: slot name to tensor.
        options: numbers and flags that change the arithmetic, JSON values: ``{"scale": 2.0, "scale_rule": "alpha/r"}``.
    """

    component: str = ""
    module: str
    parameter: str = "weight"
    kind: str
    role: str = ""
    slots: Mapping[str, TensorRef]
    options: Mapping[str, JSON] = field(default_factory=lambda: MappingProxyType({}))


@dataclass(frozen=True, slots=True, kw_only=True)
class Touch:
    """One parameter that a group changes, known from headers alone.

    Attributes:
        parameter: name within the module.
        dims: how the parameter's shape binds together with the slots' dims ("out in *k", "out").
        slots: the slots this change uses, checked against ``dims`` in one binding.
        additive: see ``Delta.additive``.
        replaces: the parameter's whole value is replaced (or created where the base has none).
        if_present: skip in silence where the base has no such parameter (an IA3 gain on a bias).
        local: ``Delta.region`` works on row windows.
        rank: r, where the kind has one.
        reads: sibling parameters the change looks at.
    """

    parameter: str
    dims: str
    slots: tuple[str, ...]
    additive: bool
    replaces: bool = False
    if_present: bool = False
    local: bool = True
    rank: int | None = None
    reads: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Field:
    """What a format's config field means to a kind.

    Attributes:
        inert: it never changes the arithmetic of stored tensors (dropout, dates, the selection of targets).
        used: the kind's ``options`` reads it.
        harmless: values (besides null, false and empty) under which the field changes nothing.
        refuse: why any other value cannot be honoured, as the end of "because ..."; empty for inert and used fields.
    """

    inert: bool = False
    used: bool = False
    harmless: tuple[JSON, ...] = ()
    refuse: str = ""


OptionsReader: TypeAlias = "Callable[[Mapping[str, JSON], str, Mapping[str, TensorRef]], dict[str, JSON]]"


def _always(_config: Mapping[str, JSON]) -> bool:
    return True


@dataclass(frozen=True, slots=True, kw_only=True)
class Spelling:
    """How one format spells a kind.

    Attributes:
        format: the format's registered name.
        tag: what the format's config calls the kind ("LORA"); kinds may share a tag (LoRA and DoRA do).
        leaves: every slot's suffixes; several leaves may name one slot (linear and embedding spellings).
        fields: config fields beyond those the format knows for all kinds.
        options: ``(config, module, slots) -> options`` for one group; raises ``IntegrityError`` where config and
            tensors disagree.
        config: the inverse, for writing: ``options`` per module -> config fields; raises ``CannotCarry``.
        when: whether a config speaks of this kind at all, where kinds share a tag and their tensors' names.
    """

    format: str
    tag: str
    leaves: tuple[Leaf, ...]
    fields: Mapping[str, Field] = field(default_factory=lambda: MappingProxyType({}))
    options: OptionsReader
    config: Callable[[Mapping[str, Group]], dict[str, JSON]]
    when: Callable[[Mapping[str, JSON]], bool] = _always


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """A registered kind.

    Attributes:
        name: unique, lower case: "lora".
        title: how people write it: "LoRA".
        source: paper or specification.
        slots: every tensor it may have.
        deltas: the delta classes it builds, for the laws.
        touches: group -> the parameters it changes; headers only.
        build: (group, tensors by slot) -> parameter name to delta.  Tensors arrive in slot orientation.
        dissolve: the inverse of ``build`` for writing: parameter name to delta -> (tensors by slot, options), or
            None where these deltas are not of this kind.
        spellings: one per format that can carry it.
    """

    name: str
    title: str
    source: str
    slots: tuple[Slot, ...]
    deltas: tuple[type[Delta], ...]
    touches: Callable[[Group], tuple[Touch, ...]]
    build: Callable[[Group, Mapping[str, torch.Tensor]], Mapping[str, Delta]]
    dissolve: Callable[[Mapping[str, Delta]], tuple[dict[str, torch.Tensor], dict[str, JSON]] | None]
    spellings: tuple[Spelling, ...] = ()

    def slot(self, name: str) -> Slot:
        """The slot of that name."""
        return next(slot for slot in self.slots if slot.name == name)
