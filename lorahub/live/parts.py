"""What an adapter carries that is no weight change, acting on a live model: prompts and prefixes.

How a part acts is its framework's business; here is who applies it, when it acts and that it is taken off again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, final, runtime_checkable

from lorahub.adapter import AdapterHeader
from lorahub.deltas.kind import JSON
from lorahub.errors import IntegrityError, NotFinite, UnsupportedKind, UsageError
from lorahub.files.tensors import FileSource

if TYPE_CHECKING:
    import torch
    from torch import nn

__all__ = ["AppliesParts", "OpenPart", "PartHandle", "Parts", "parts_in"]

_CONFIG = "adapter_config.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenPart:
    """A part with its tensors.

    Attributes:
        name: of the part.
        kind: what it is ("prompt-tuning").
        reason: why it is no weight change, as a sentence.
        tensors: by the names in the file, on the CPU, in the dtypes stored.
        options: what the adapter's configuration says.
    """

    name: str
    kind: str
    reason: str
    tensors: Mapping[str, torch.Tensor]
    options: Mapping[str, JSON]


class PartHandle(Protocol):
    """A part that acts on a model."""

    def remove(self) -> None:
        """Take it off."""


@runtime_checkable
class AppliesParts(Protocol):
    """A framework that can let parts act on its live models."""

    def apply_part(self, model: nn.Module, part: OpenPart, acts: Callable[[], bool]) -> PartHandle:
        """Put a part into a model's calls.

        Args:
            model: the live model.
            part: the part.
            acts: whether it acts, in this context and at this moment.

        Raises:
            UnsupportedKind: it cannot act on this model, with the reason.
            BaseMismatch: its shapes are another model's.
        """


def parts_in(header: AdapterHeader) -> tuple[OpenPart, ...]:
    """The parts of an adapter that is nothing but parts, read; none of any other.

    Raises:
        NotFound, AccessDenied, Unavailable, IntegrityError: its file cannot be read.
        NotFinite: it holds NaN or infinity.
    """
    reading = header.reading
    if not reading.parts or reading.groups:
        return ()
    broken = [each for each in header.findings if each.axis == "integrity" and not each.allowable]
    if broken:
        raise IntegrityError(f"{header.label}: {broken[0].show()}", broken[0].remedy, tuple(broken))
    opened = []
    with FileSource(header.folder / reading.file) as source:
        for name, part in reading.parts.items():
            tensors = {ref.key: source.read(ref.key) for ref in part.tensors.values()}
            if wrong := [key for key, value in tensors.items() if not bool(value.isfinite().all())]:
                raise NotFinite(f"{header.label} holds NaN or infinity in {wrong[0]}", "ask its author for a sound one")
            options = header.files.configs.get(_CONFIG, {})
            opened.append(
                OpenPart(name=name, kind=part.kind, reason=part.reason, tensors=tensors, options=dict(options))
            )
    return tuple(opened)


@final
class Parts:
    """The parts that act on one model, by adapter."""

    def __init__(self, model: nn.Module, framework: object) -> None:
        """Apply nothing yet."""
        self._model, self._framework = model, framework
        self._held: dict[str, tuple[PartHandle, ...]] = {}
        self._given: dict[str, tuple[OpenPart, ...]] = {}

    def put(self, name: str, parts: Sequence[OpenPart], acts: Callable[[], bool]) -> None:
        """Let an adapter have these parts, in the place of those that it had.

        Raises:
            UnsupportedKind: the framework cannot apply them; nothing changed.
        """
        if parts and not isinstance(self._framework, AppliesParts):
            raise UnsupportedKind(
                f"'{name}' is {parts[0].kind}: {parts[0].reason}; to apply it takes a plugin that knows the model",
                "lorahub plugins",
            )
        made: list[PartHandle] = []
        try:
            for part in parts:
                assert isinstance(self._framework, AppliesParts)
                made.append(self._framework.apply_part(self._model, part, acts))
        except BaseException:
            _remove(made)
            raise
        self.drop(name)
        if made:
            self._held[name] = tuple(made)
            self._given[name] = tuple(parts)

    def drop(self, name: str) -> None:
        """Take the parts of an adapter off."""
        _remove(self._held.pop(name, ()))
        self._given.pop(name, None)

    def of(self, name: str) -> tuple[OpenPart, ...]:
        """The parts of an adapter, as they were given."""
        return self._given.get(name, ())

    def close(self) -> None:
        """Take all off."""
        for name in list(self._held):
            self.drop(name)

    def demand(
        self, chosen: Mapping[str, float], rows: Sequence[str | None] | None = None, *, coming: str | None = None
    ) -> None:
        """Refuse a choice that parts cannot follow.

        Args:
            chosen: the adapters with their weights.
            rows: which adapter each row takes, or None.
            coming: one that is about to have parts.

        Raises:
            UsageError: a part with a weight other than 0 or 1, several that act at once, or one for some rows only.
        """
        acting = [name for name in chosen if (name in self._held or name == coming) and chosen[name] != 0]
        for name in acting:
            if chosen[name] != 1:
                raise UsageError(
                    f"'{name}' stands beside the input and changes no weight, so it acts or does not: "
                    f"there is none of it at {chosen[name]:g}",
                    "give it the weight 1, or 0",
                )
            if rows is not None and any(other != name for other in rows):
                raise UsageError(
                    f"'{name}' stands before the whole batch's input, and not before that of some rows only",
                    f"run these rows apart: live.set_adapters([{name!r}])",
                )
        if len(acting) > 1:
            raise UsageError(
                f"{' and '.join(repr(name) for name in acting)} each stand before the input, and only one can",
                f"choose one: live.set_adapters([{acting[0]!r}])",
            )


def _remove(handles: Sequence[PartHandle]) -> None:
    for handle in reversed(handles):
        handle.remove()
