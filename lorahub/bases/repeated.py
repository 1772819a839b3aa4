"""A base with some of its layers repeated, as an index: what adapters of a deeper model are placed in.

Every layer of the result is in it under its own number, and knows which stored tensor it is made from.  Nothing is
copied here; a plan says what is.
"""

from __future__ import annotations

from dataclasses import replace
from types import MappingProxyType

from lorahub.bases.index import BaseIndex, ParameterInfo, natural
from lorahub.bases.layers import Ranges, Repetition, shown
from lorahub.errors import Incompatible
from lorahub.findings import Finding, Verdict

__all__ = ["repeated", "why_not"]


def why_not(index: BaseIndex, ranges: Ranges) -> Finding | None:
    """What stands against repeating these layers of a base; None where nothing does."""
    layers = index.layers
    if layers is None:
        kind = index.config.get("model_type")
        named = f"model_type {kind!r}" if isinstance(kind, str) else f"the framework {index.framework!r}"
        return _stop(
            "layers-undeclared",
            f"the adapter is for a model that repeats layers of its base, and which list holds the layers of {named} "
            "is not declared",
            remedy="lorahub plugins",
        )
    depth = layers.depth(index.parameters)
    if beyond := [(start, stop) for start, stop in ranges if stop > depth]:
        return _stop(
            "layers-out-of-range",
            f"the adapter is for a model of its base's layers {shown(ranges)}, and {index.ref} has {depth} of them, so "
            f"{shown(beyond)} is not there",
            remedy="use the base it was trained on",
        )
    if shared := [name for group in index.tied for name in group if layers.number(name) is not None]:
        return _stop(
            "layers-tied",
            f"{shared[0]} shares its storage with other parameters of {index.ref}, so its layers cannot be told apart",
            where=tuple(shared),
            remedy="use the base as it was before its layers were repeated",
        )
    if uneven := [key for key, values in layers.each.items() if len(values) != depth]:
        return _stop(
            "layers-contradict",
            f"config.json has {len(layers.each[uneven[0]])} values in {uneven[0]}, and {index.ref} has {depth} layers",
            where=tuple(uneven),
        )
    return None


def repeated(index: BaseIndex, ranges: Ranges) -> BaseIndex:
    """The index of the deeper model.

    Raises:
        Incompatible: this base's layers cannot be repeated so; see ``why_not``.
    """
    against, layers = why_not(index, ranges), index.layers
    if against is not None or layers is None:
        raise Incompatible(against.message if against else "", against.remedy if against else "")
    sources = tuple(number for start, stop in ranges for number in range(start, stop))
    places = {source: tuple(at for at, each in enumerate(sources) if each == source) for source in set(sources)}
    found: dict[str, ParameterInfo] = {}
    extras: dict[str, ParameterInfo] = {}
    left_out: list[str] = []
    for name, info in index.parameters.items():
        number = layers.number(name)
        if number is None:
            found[name] = info
            continue
        found |= {layers.renumbered(name, at): info for at in places.get(number, ())}
        if number not in places.get(number, ()):
            left_out.append(info.stored_as)
    for name, info in index.extras.items():  # nobody reads those of layers, so they stay where their layer stays
        number = layers.number(name)
        if number is None or number in places.get(number, ()):
            extras[name] = info
        else:
            left_out.append(info.stored_as)
    return replace(
        index,
        parameters=MappingProxyType({name: found[name] for name in sorted(found, key=natural)}),
        extras=MappingProxyType(extras),
        registered=(),
        repeated=Repetition(
            layers=layers,
            ranges=ranges,
            sources=sources,
            places=MappingProxyType(places),
            depth=layers.depth(index.parameters),
            left_out=tuple(left_out),
        ),
    )


def _stop(code: str, message: str, where: tuple[str, ...] = (), remedy: str = "") -> Finding:
    return Finding(
        code=code,
        axis="placement",
        level=Verdict.INCOMPATIBLE,
        message=message,
        where=where or ("layer_replication",),
        remedy=remedy,
    )
