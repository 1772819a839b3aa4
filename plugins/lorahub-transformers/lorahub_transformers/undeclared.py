"""The index of an architecture that the table does not have: from its class where that is at hand, else from headers.

A class is at hand in a live model, and where transformers is installed and knows the configuration: then the names,
types, ties and presets are those of the class, built on the meta device.  Otherwise names and shapes are taken as they
are, which the index says (``declared`` is False), and nobody guesses what a module is.
"""

from __future__ import annotations

import json
import weakref
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, cast

from lorahub.bases.framework import BaseFiles, Edits
from lorahub.bases.index import BaseIndex, BaseRef, ParameterInfo
from lorahub.bases.layout import Piece
from lorahub.bases.torch_module import CHILD, in_order, live_entries
from lorahub.deltas.kind import JSON
from lorahub_transformers.building import build
from lorahub_transformers.converting import Converted, Shape, converted, inverse, older_names, stored_shapes
from lorahub_transformers.moved import moved
from lorahub_transformers.presets import presets_of

if TYPE_CHECKING:
    from torch import nn

__all__ = ["from_files", "from_model", "untie"]

_NAME = "transformers"
_TIE = "tie_word_embeddings"
_KEPT = 8
"""How many classes are remembered."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Seen:
    """What a class and its conversions say of a base's tensors.

    Attributes:
        live: the index of the class itself.
        converted: what becomes of the stored names.
        older: older name -> live name.
        around: (beginning, other beginning) of all names.
    """

    live: BaseIndex
    converted: Converted
    older: Mapping[str, str]
    around: tuple[tuple[str, str], ...]


def from_files(ref: BaseRef, files: BaseFiles, stored: Mapping[str, ParameterInfo]) -> BaseIndex:
    """The index of a checkpoint.

    Args:
        ref: which base it is.
        files: what was surveyed.
        stored: its tensors by their stored names.
    """
    text = json.dumps(dict(files.config), sort_keys=True)
    shapes = tuple((name, info.shape) for name, info in stored.items())
    seen = _seen(text, shapes)
    if seen is None or not _describes(seen, stored):
        return _bare(ref, files.config, stored)
    live, names = seen.live, seen.converted.live
    kept: dict[str, ParameterInfo] = {}
    extras: dict[str, ParameterInfo] = {}
    for name, info in stored.items():
        canonical = names.get(name, name)
        leader = live.stored(canonical)
        known = live.parameters.get(leader)
        if known is None:
            kept[name] = info  # of another class, or rearranged on loading: it keeps its name
        elif leader in kept:
            first, second = (info, kept[leader]) if canonical == leader else (kept[leader], info)
            kept[leader] = _as(known, first)
            extras[second.stored_as] = replace(second, role="", transposed=False, turned=None)
        else:
            kept[leader] = _as(known, info)
    return BaseIndex(
        ref=ref,
        framework=_NAME,
        parameters=in_order(kept.items()),
        aliases=(*_aliases([*seen.older.items(), *names.items()], files.config, kept), *seen.around),
        tied=tuple(group for group in live.tied if group[0] in kept),
        extras=in_order(extras.items()),
        config=files.config,
        registered=live.registered,
        presets=MappingProxyType(
            {preset: left for preset, each in live.presets.items() if (left := tuple(n for n in each if n in kept))}
        ),
        elsewhere=MappingProxyType(_there(seen.converted.within, kept)),
    )


def from_model(model: nn.Module, ref: BaseRef, config: Mapping[str, JSON]) -> BaseIndex:
    """The index of a live or meta-device model.

    Raises:
        UnsupportedFormat: a tensor of a dtype that no safetensors file can hold.
    """
    entries, groups = _entries(model)
    index = _of_class(model, ref, config, entries, groups)
    # aliases are asked for always, and pieces hardly ever: experts, of which there are thousands, wait until then
    shapes = _shapes(entries, groups)
    apart = frozenset(index.presets.get("experts", ()))
    few = stored_shapes(model, {name: shape for name, shape in shapes.items() if name not in apart})
    names = [*older_names(model, shapes).items(), *converted(model, few, shapes).live.items()]
    aliases = (*_aliases(names, config, entries), *_around(model))
    return replace(index, aliases=aliases, elsewhere=_Elsewhere(model, shapes))


def untie(index: BaseIndex) -> Edits | None:
    """The edits that untie all pairs of a model, or None where its class ties them whatever its configuration says.

    What the flag does is seen by building the class with it; what checkpoints call the other names, by converting them.
    """
    flags: dict[str, JSON] = {_TIE: False}
    inner = index.config.get("text_config")
    if isinstance(inner, Mapping) and _TIE in inner:
        flags["text_config"] = {**inner, _TIE: False}
    model = build({**index.config, **flags}, [*index.parameters, *index.extras])
    if model is None:
        return None
    entries, groups = _entries(model)
    if groups:
        return None
    shapes = _shapes(entries, groups)
    stored = {live: name for name, live in converted(model, stored_shapes(model, shapes), shapes).live.items()}
    copied = {other: leader for leader, *others in index.tied for other in others}
    renamed = {name: stored[name] for name in copied if stored.get(name, name) != name}
    return Edits(config=MappingProxyType(flags), copied=MappingProxyType(copied), renamed=MappingProxyType(renamed))


class _Elsewhere(Mapping[str, tuple[Piece, ...]]):
    """Stored tensors that loading puts together or takes apart, as pieces of a live model; read when asked for."""

    def __init__(self, model: nn.Module, shapes: Mapping[str, Shape]) -> None:
        self._model = weakref.ref(model)  # an index may outlive the weights
        self._shapes = shapes
        self._found: dict[str, tuple[Piece, ...]] | None = None

    def __getitem__(self, name: str) -> tuple[Piece, ...]:
        return self._all()[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._all())

    def __len__(self) -> int:
        return len(self._all())

    def _all(self) -> dict[str, tuple[Piece, ...]]:
        if self._found is None:
            model = self._model()
            stored = stored_shapes(model, self._shapes) if model is not None else {}
            within = converted(model, stored, self._shapes).within if model is not None else {}
            self._found = _there(inverse(within), self._shapes)
        return self._found


@lru_cache(maxsize=_KEPT)
def _seen(text: str, stored: tuple[tuple[str, Shape], ...]) -> _Seen | None:
    """What the class says, or None where there is none to be had."""
    config: dict[str, JSON] = json.loads(text)
    model = build(config, [name for name, _ in stored])
    if model is None:
        return None
    entries, groups = _entries(model)
    live = _of_class(model, BaseRef(), config, entries, groups)
    shapes = _shapes(entries, groups)
    return _Seen(
        live=live,
        converted=converted(model, dict(stored), shapes),
        older=older_names(model, shapes),
        around=_around(model),
    )


def _describes(seen: _Seen, stored: Mapping[str, ParameterInfo]) -> bool:
    """Whether the class has these tensors, in these shapes; a configuration that says otherwise is not believed."""
    names = seen.converted.live
    known = [(seen.live.parameters.get(seen.live.stored(names.get(name, name))), info) for name, info in stored.items()]
    found = [(each, info) for each, info in known if each is not None]
    return bool(found) and all(each.shape == info.shape for each, info in found)


def _entries(model: nn.Module) -> tuple[dict[str, ParameterInfo], tuple[tuple[str, ...], ...]]:
    sources: Mapping[str, str] = getattr(model, "all_tied_weights_keys", {})
    return live_entries(model, leaders=set(sources.values()))


def _of_class(
    model: nn.Module,
    ref: BaseRef,
    config: Mapping[str, JSON],
    entries: Mapping[str, ParameterInfo],
    groups: tuple[tuple[str, ...], ...],
) -> BaseIndex:
    """The index of a model under its live names, without other spellings."""
    dropped = frozenset(cast("Any", getattr(model, "_keys_to_ignore_on_save", None)) or ())
    kept = {name: info for name, info in entries.items() if name not in dropped}
    return BaseIndex(
        ref=ref,
        framework=_NAME,
        parameters=in_order(kept.items()),
        tied=groups,
        config=config,
        registered=tuple(name for name, _ in model.named_modules() if name and CHILD not in name.split(".")),
        presets=presets_of(model, kept),
    )


def _shapes(entries: Mapping[str, ParameterInfo], groups: Iterable[tuple[str, ...]]) -> dict[str, Shape]:
    """The shape of every parameter, of tied ones under all their names."""
    found = {name: info.shape for name, info in entries.items()}
    return found | {name: found[first] for first, *others in groups for name in others}


def _as(known: ParameterInfo, info: ParameterInfo) -> ParameterInfo:
    """A stored tensor with what its class says of it."""
    return replace(info, role=known.role, transposed=known.transposed, turned=known.turned)


def _bare(ref: BaseRef, config: Mapping[str, JSON], stored: Mapping[str, ParameterInfo]) -> BaseIndex:
    """Names and shapes as they are."""
    return BaseIndex(
        ref=ref,
        framework=_NAME,
        parameters=in_order(stored.items()),
        aliases=tuple(moved(config, in_order(stored.items()))),
        config=config,
        declared=False,
    )


def _aliases(
    names: Iterable[tuple[str, str]], config: Mapping[str, JSON], kept: Collection[str]
) -> tuple[tuple[str, str], ...]:
    """(canonical beginning, other beginning) for all modules that checkpoints and older releases call otherwise."""
    found: dict[tuple[str, str], None] = {}
    for stored, live in names:
        here, there = live.rpartition(".")[0], stored.rpartition(".")[0]
        if here != there and here and there and live in kept:
            found[f"{here}.", f"{there}."] = None
    found |= dict.fromkeys(moved(config, kept))
    return tuple(found)


def _around(model: nn.Module) -> tuple[tuple[str, str], ...]:
    """How names begin in a model with a head and in the bare one: an adapter may have been trained on either."""
    prefix = str(getattr(model, "base_model_prefix", "") or "")
    if not prefix:
        return ()
    return ((f"{prefix}.", ""),) if prefix in dict(model.named_children()) else (("", f"{prefix}."),)


def _there(within: Mapping[str, Iterable[Piece]], kept: Collection[str]) -> dict[str, tuple[Piece, ...]]:
    """Those of which every piece lies in a parameter that the base has."""
    found = {name: tuple(pieces) for name, pieces in within.items()}
    return {name: each for name, each in found.items() if all(piece.parameter in kept for piece in each)}
