"""``lorahub plugins``: what is installed, what became of it, and what there is of each sort."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import click

from lorahub.cli.options import output_options
from lorahub.cli.output import Output, aligned
from lorahub.plugins import load_registry, name_clash
from lorahub.registry import SORTS, PluginInfo, Registry

__all__ = ["plugins"]

_LISTED = tuple(sort for sort in SORTS if sort != "commands")

_COLUMNS: Mapping[str, Mapping[str, Callable[[Any], object]]] = MappingProxyType(
    {
        "kinds": {
            "title": lambda kind: kind.title,
            "trains": lambda kind: kind.starting is not None,
            "source": lambda kind: kind.source,
        },
        "formats": {"reads": lambda carrier: _first_sentence(type(carrier))},
        "frameworks": {"requires": lambda framework: framework.requires},
        "runtimes": {"title": lambda runtime: runtime.title, "versions": lambda runtime: runtime.versions},
        "storages": {"library": lambda storage: storage.library},
        "methods": {"title": lambda method: method.title, "source": lambda method: method.source},
    }
)
"""Sort -> what is shown of one besides its name and who brings it."""


@click.command()
@click.option(
    "--list", "listed", type=click.Choice(_LISTED), help="Everything of one sort that is registered, and who brings it."
)
@output_options
def plugins(listed: str | None, out: Output) -> None:
    """List plugins with version, state, what they bring and what they require, and what is built in."""
    registry = load_registry()
    if listed:
        _answer_sort(registry, listed, out)
        return
    names = {sort: sorted(getattr(registry, sort)) for sort in _LISTED}
    built_in = aligned([(sort, ", ".join(each)) for sort, each in names.items()])
    shown = "\n\n".join(map(_entry, registry.plugins)) or "no plugins installed"
    out.answer(
        {"plugins": [each.document() for each in registry.plugins], **names},
        text=f"{shown}\n\nregistered, built in or by a plugin:\n{built_in}",
        bare="\n".join(each.name for each in registry.plugins if each.state == "loaded"),
    )
    if clash := name_clash():
        out.say(clash)


def _entry(info: PluginInfo) -> str:
    """One plugin as a paragraph: what it is, and in lines below what there is to say of it."""
    rows = [(hook.removeprefix("lorahub_"), _brought(info, hook)) for hook in info.hooks]
    rows += [("requires", str(each)) for each in info.requires]
    if info.error:
        rows.append(("because", info.error))
    if info.remedy:
        rows.append(("to do", info.remedy))
    origin = f"{info.distribution} {info.version}".strip() or "of no distribution"
    return "\n".join(filter(None, [f"{info.name} ({origin}): {info.state}", aligned(rows)]))


def _brought(info: PluginInfo, hook: str) -> str:
    one = next(sort.one for sort in SORTS.values() if sort.hook == hook)
    return ", ".join(each.removeprefix(f"{one} ") for each in info.provides if each.startswith(f"{one} ")) or "nothing"


def _answer_sort(registry: Registry, sort: str, out: Output) -> None:
    """The table of one sort."""
    columns = _COLUMNS[sort]
    brought = {each: info.name for info in registry.plugins if info.state == "loaded" for each in info.provides}
    entries: list[dict[str, object]] = [
        {
            "name": name,
            **{column: value(each) for column, value in columns.items()},
            "from": brought.get(f"{SORTS[sort].one} {name}", "lorahub"),
        }
        for name, each in getattr(registry, sort).items()
    ]
    rows = [("name", *columns, "from"), *(tuple(map(_cell, entry.values())) for entry in entries)]
    out.answer({sort: entries}, text=aligned(rows), bare="\n".join(getattr(registry, sort)))


def _cell(value: object) -> str:
    return ("yes" if value else "no") if isinstance(value, bool) else str(value) or "-"


def _first_sentence(described: type) -> str:
    return (described.__doc__ or "").strip().partition("\n")[0].removesuffix(".")
