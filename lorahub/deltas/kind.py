"""What a kind declares: its slots, how formats spell them, and what a group of tensors turns into.

A declaration is data and pure functions over shapes; arithmetic lives in the deltas it builds.  A new kind is one
module with its delta, its ``Kind`` and a hook implementation.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Literal, TypeAlias

from lorahub.deltas.delta import Delta
from lorahub.deltas.disputes import Dispute
from lorahub.deltas.starting import Starting
from lorahub.findings import Finding
from lorahub.lazy import torch

__all__ = [
    "JSON",
    "Completed",
    "Field",
    "Group",
    "Kind",
    "Leaf",
    "Matrix",
    "Slot",
    "Spelling",
    "Surroundings",
    "TensorRef",
    "Touch",
]

JSON: TypeAlias = "bool | int | float | str | list[JSON] | dict[str, JSON] | None"


@dataclass(frozen=True, slots=True, kw_only=True)
class Slot:
    """A named tensor of a kind: ``down`` with dims ``"r in *k"``.

    ``shared`` slots exist once per adapter; ``prunable`` ones may have no elements left.  Of ``many`` there may be any
    number, none included; a group calls them ``name.WHICH``, after what stands for the ``*`` of their spelling.
    ``holds`` is what its numbers are: real ones, places or sizes, or whatever the base stores.
    """

    name: str
    dims: str
    optional: bool = False
    shared: bool = False
    prunable: bool = False
    many: bool = False
    holds: Literal["floats", "integers", "anything"] = "floats"

    def covers(self, name: str) -> bool:
        """Whether a tensor that a group calls ``name`` is this slot's."""
        return name == self.name or (self.many and name.startswith(f"{self.name}."))


@dataclass(frozen=True, slots=True, kw_only=True)
class Leaf:
    """How a format spells a slot behind a module's stem: ``Leaf(slot="down", suffix="lora_A.weight")``.

    Attributes:
        suffix: its ending; of a slot of ``many`` with one ``*``, which stands for anything without a dot.
        transposed: the file stores the slot with its first two axes exchanged.
        role: what the module must be when this spelling is found ("linear", "embedding", ...); empty: anything.
        stacked: the file holds the slot's matrices, one for each expert, in one; see ``lorahub.deltas.stacks``.
    """

    slot: str
    suffix: str
    transposed: bool = False
    role: str = ""
    stacked: str = ""

    def which(self, suffix: str) -> str:
        """What stands for the ``*`` in ``suffix``, or "" where this leaf does not spell it."""
        head, star, tail = self.suffix.partition("*")
        middle = suffix[len(head) : len(suffix) - len(tail)]
        fits = star and suffix == f"{head}{middle}{tail}" and "." not in middle
        return middle if fits else ""


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorRef:
    """Where a slot's tensor is: the key in the file, its shape and dtype as the slot.

    ``transposed`` and ``stacked`` say how the file stores it otherwise, as in ``Leaf``.  ``rows`` are, where the file
    has them in another order, the positions there of the slot's rows.  ``expert`` is, where it is one of a stack of
    tensors, which one; several groups share that key, and where the file has one for all experts, it is theirs.
    ``reshaped``: the file has the elements in the same order under another shape.
    """

    key: str
    shape: tuple[int, ...]
    dtype: str
    transposed: bool = False
    stacked: str = ""
    rows: tuple[int, ...] = field(default=(), repr=False)
    expert: int | None = None
    reshaped: bool = False


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
        inside: PEFT multiplies the factors by an adapter's weight, in which this change is not linear.
        stacks: ``Delta.expert`` gives the change of one matrix of the stack that the parameter is.
        tied: what is done, where it is meant for every name that the base has for the parameter, so that these stay
            tied; several changes of one parameter that say the same are one.
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
    inside: bool = False
    stacks: bool = False
    tied: str = ""


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


def _never(_config: Mapping[str, JSON]) -> bool:
    return False


def _undisputed(
    _config: Mapping[str, JSON], _module: str, _slots: Mapping[str, TensorRef], _options: Mapping[str, JSON]
) -> Dispute | None:
    return None


@dataclass(frozen=True, slots=True, kw_only=True)
class Matrix:
    """A module of the base whose weight is a matrix: its sizes, its dtype (safetensors code), how it is stored."""

    out: int
    inputs: int
    dtype: str
    transposed: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Surroundings:
    """What a base looks like around an adapter, for kinds whose files leave out what follows from it.

    Names and sizes only: a kind that needs the values of a weight gets that one weight in ``Delta.delta``, and one
    that needs those of other modules too cannot be computed.

    Attributes:
        matrices: module -> its weight, for every module of the base whose weight is a matrix.
        targeted: those that the adapter's config names, in the order in which the framework builds its modules; None
            where nobody knows that order, as for files of an architecture that no plugin knows.
    """

    matrices: Mapping[str, Matrix]
    targeted: tuple[str, ...] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Completed:
    """Groups with all that their files left out, and what is to be said of that."""

    groups: tuple[Group, ...]
    findings: tuple[Finding, ...] = ()


Completion: TypeAlias = (
    "Callable[[Mapping[str, JSON], Sequence[Group], Mapping[str, TensorRef], Surroundings | None], Completed]"
)
"""(config, the kind's groups, its shared slots, the base or None) -> the groups as ``build`` takes them."""


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
        disputed: ``(config, module, slots, options)`` -> how the result of the tool whose format this is differs from
            the declared one for a group, where it does.
        disputed_on: ``(shape, options)`` -> the same, where it shows with the shape of the base's weight alone.
        complete: called once for each adapter, with all groups of the kind, where the files leave something out that
            follows from other modules or from the base: it writes the facts into the groups' options (sizes of
            projections, places in an order) or makes groups for modules that have no tensors of their own.  Raises
            ``BaseNeeded`` where it takes a base that is not there, ``UnsupportedKind`` where no base would help, and
            ``IntegrityError`` where the modules contradict each other.
        implied: the adapter may hold shared slots alone; ``complete`` makes the groups.
        beside: the kind stands beside another of the same tag in one adapter, with config fields of its own.
        alike: whether, under a config, modules with the same suffixes and shapes have the same options, touches and
            disputes whatever their names, so that one of them tells for all.
    """

    format: str
    tag: str
    leaves: tuple[Leaf, ...]
    fields: Mapping[str, Field] = field(default_factory=lambda: MappingProxyType({}))
    options: OptionsReader
    config: Callable[[Mapping[str, Group]], dict[str, JSON]]
    when: Callable[[Mapping[str, JSON]], bool] = _always
    disputed: Callable[[Mapping[str, JSON], str, Mapping[str, TensorRef], Mapping[str, JSON]], Dispute | None] = (
        _undisputed
    )
    disputed_on: Callable[[tuple[int, ...], Mapping[str, JSON]], Dispute | None] | None = None
    complete: Completion | None = None
    implied: bool = False
    beside: bool = False
    alike: Callable[[Mapping[str, JSON]], bool] = _never


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
        starting: how its training begins, where it can be trained.
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
    starting: Starting | None = None

    def slot(self, name: str) -> Slot:
        """The slot of that name; of ``many`` by the name of any of them."""
        return next(slot for slot in self.slots if slot.covers(name))
