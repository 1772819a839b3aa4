"""The loader: built-in modules and installed plugins in, one ``Registry`` out.

Built-in modules are found by looking into the rooms, so a new file needs no list to be edited.  A plugin is taken whole
or not at all: one that fails to import, breaks the hook contract or wants a name that is taken is left out, and the
registry keeps its name, its distribution and the reason.  No plugin can break another, or a command that needs none.

    LORAHUB_DISABLE_PLUGINS=name,...   these are not imported (``*``: none is)
    LORAHUB_LOAD_PLUGINS=name,...      only these are imported

A name is an entry point's or a distribution's.  Nothing here imports torch or knows a framework.
"""

from __future__ import annotations

import importlib
import os
import pkgutil
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from importlib import metadata
from types import MappingProxyType, ModuleType, SimpleNamespace
from typing import Any

import pluggy
from packaging.utils import canonicalize_name

from lorahub import hookspecs
from lorahub.errors import LorahubError, PluginError
from lorahub.registry import SORTS, PluginInfo, Registry, Required, State, required

__all__ = ["GROUP", "PluginInfo", "Registry", "load_registry", "name_clash"]

GROUP = "lorahub"
"""The entry-point group."""

ROOMS = (
    "lorahub.deltas",
    "lorahub.formats",
    "lorahub.bases",
    "lorahub.runtimes",
    "lorahub.storages",
    "lorahub.composition.methods",
)
"""Packages whose modules may implement hooks."""

_PREFIX = "lorahub_"  # of every hook
_NAME = re.compile(r"[a-z0-9]+(?:[._-][a-z0-9]+)*")


@dataclass(slots=True, kw_only=True)
class _Candidate:
    """A module on its way into the registry; ``objects`` is registry field -> name -> object."""

    info: PluginInfo
    objects: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def loaded(self) -> bool:
        return self.info.state == "loaded"

    def names(self) -> Iterator[tuple[str, str]]:
        """Every (registry field, name) it wants."""
        return ((sort, name) for sort, named in self.objects.items() for name in named)


def load_registry(
    *, entry_points: Iterable[metadata.EntryPoint] | None = None, env: Mapping[str, str] | None = None
) -> Registry:
    """The registry of the built-in modules and every plugin; made once for the installed ones.

    Args:
        entry_points: where plugins come from; those installed in group ``lorahub`` by default.
        env: where ``LORAHUB_DISABLE_PLUGINS`` and ``LORAHUB_LOAD_PLUGINS`` are read; ``os.environ`` by default.

    Raises:
        PluginError: a built-in module breaks the contract, which is a defect of lorahub itself.
    """
    env = os.environ if env is None else env
    disabled, allowed = (env.get(name, "") for name in ("LORAHUB_DISABLE_PLUGINS", "LORAHUB_LOAD_PLUGINS"))
    if entry_points is None:
        return _installed(disabled, allowed)
    return _build(entry_points, disabled, allowed)


@cache  # a process sees one set of installed packages
def _installed(disabled: str, allowed: str) -> Registry:
    return _build(metadata.entry_points(group=GROUP), disabled, allowed)


def _build(entry_points: Iterable[metadata.EntryPoint], disabled: str, allowed: str) -> Registry:
    built_in = _built_in()
    ordered = sorted(entry_points, key=lambda point: (point.name, *_distribution(point)))
    plugins = [_load(point, disabled, allowed) for point in ordered]
    _settle(plugins, taken={key for candidate in built_in for key in candidate.names()})

    merged: dict[str, dict[str, Any]] = {sort: {} for sort in SORTS}
    for candidate in (*built_in, *filter(lambda plugin: plugin.loaded, plugins)):
        for sort, named in candidate.objects.items():
            merged[sort] |= named
    return Registry(
        plugins=tuple(plugin.info for plugin in plugins),
        **{sort: MappingProxyType(dict(sorted(named.items()))) for sort, named in merged.items()},
    )


def name_clash(distribution: Callable[[str], metadata.Distribution] = metadata.distribution) -> str | None:
    """What to say where another project's distribution, called ``lorahub``, is installed beside this one; else None.

    Both install into the import package ``lorahub``, so whichever came last has overwritten files of the other.
    """
    try:
        other = distribution("lorahub")
    except metadata.PackageNotFoundError:
        return None
    return (
        f"The distribution 'lorahub' {other.version} is installed here. It is another project with the import name of\n"
        "  this one ('lorahub-core'), and the two overwrite each other's files.\n"
        "  To repair: pip uninstall --yes lorahub lorahub-core, then install lorahub-core again as you did before.\n"
        "  To use both: give each a virtual environment of its own."
    )


def _built_in() -> list[_Candidate]:
    """Every module of the rooms that implements a hook."""
    result: list[_Candidate] = []
    owners: dict[tuple[str, str], str] = {}
    for room in ROOMS:
        for found in pkgutil.iter_modules(importlib.import_module(room).__path__, prefix=f"{room}."):
            hooks = _named(importlib.import_module(found.name))
            objects = _collect(_hooks(hooks, found.name) if vars(hooks) else {})
            candidate = _Candidate(info=PluginInfo(name=found.name), objects=objects)
            for sort, name in candidate.names():
                if owner := owners.get((sort, name)):
                    raise PluginError(f"{owner} and {found.name} both bring a {SORTS[sort].one} called '{name}'")
                owners[sort, name] = found.name
            result.append(candidate)
    return result


def _named(module: ModuleType) -> SimpleNamespace:
    """What a module of lorahub's own has that can be a hook; pluggy looks at every name, and a module has many."""
    return SimpleNamespace(**{name: value for name, value in vars(module).items() if name.startswith(_PREFIX)})


def _load(point: metadata.EntryPoint, disabled: str, allowed: str) -> _Candidate:
    """Import one entry point and call its hooks; whatever goes wrong is kept as its state."""
    distribution, version = _distribution(point)
    info = PluginInfo(name=point.name, distribution=distribution, version=version)
    if reason := _blocked(info, disabled, allowed):
        return _Candidate(info=_left_out(info, "blocked", reason))
    try:
        hooks = _import(point)
        objects = _collect(hooks)
        findings = _findings(point.load())
        needs = sorted({one.requires for one in objects.get("frameworks", {}).values() if one.requires})
        requires = tuple(map(required, needs))
    except _OtherHooks as error:
        return _Candidate(info=_left_out(info, "refused", error.message, error.hint))
    except (Exception, SystemExit) as error:  # noqa: BLE001 - foreign code fails in any way, and takes no other along
        text = str(error) if isinstance(error, LorahubError) else f"{type(error).__name__}: {error}"
        return _Candidate(info=_left_out(info, "broken", text))
    candidate = _Candidate(info=info, objects=objects)
    candidate.info = replace(
        info,
        hooks=tuple(sorted(hooks)),
        provides=tuple(sorted(f"{SORTS[sort].one} {name}" for sort, name in candidate.names())),
        requires=requires,
        remedy=_to_meet(requires),
        findings=findings,
    )
    return candidate


def _settle(plugins: list[_Candidate], *, taken: set[tuple[str, str]]) -> None:
    """Put every plugin in conflict that wants what a built-in or another plugin has: all rivals, whatever the order."""
    contenders = [plugin for plugin in plugins if plugin.loaded]
    for plugin in contenders:
        rivals = [other for other in contenders if other is not plugin]
        reasons = [
            f"it brings a {SORTS[sort].one} called '{name}', which lorahub brings itself"
            for sort, name in plugin.names()
            if (sort, name) in taken
        ]
        reasons += [
            f"{rival.info} brings a {SORTS[sort].one} called '{name}' too"
            for rival in rivals
            for sort, name in plugin.names()
            if name in rival.objects.get(sort, ())
        ]
        reasons += [f"{rival.info} has the same name" for rival in rivals if rival.info.name == plugin.info.name]
        if reasons:
            plugin.info = _left_out(plugin.info, "conflict", "; ".join(reasons))


def _import(point: metadata.EntryPoint) -> dict[str, Callable[[], object]]:
    """The hook implementations behind an entry point; raises ``PluginError`` or whatever its code raises."""
    plugin = point.load()
    wanted, ours = getattr(plugin, "LORAHUB_HOOKS", hookspecs.HOOKSPEC_VERSION), hookspecs.HOOKSPEC_VERSION
    if not (isinstance(wanted, tuple) and wanted and all(isinstance(part, int) for part in wanted)):
        raise PluginError(f"its LORAHUB_HOOKS is {wanted!r}, and must be a tuple such as {ours}")
    if wanted[0] != ours[0]:
        made, here = (".".join(map(str, version)) for version in (wanted, ours))
        older = "lorahub-core" if wanted[0] > ours[0] else point.dist.name if point.dist else "the plugin"
        raise _OtherHooks(
            f"it was made for version {made} of lorahub's hooks, and this lorahub has {here}",
            f"pip install --upgrade {older}",
        )
    hooks = _hooks(plugin, point.name)
    if not hooks:
        raise PluginError(f"{point.value} implements none of lorahub's hooks")
    return hooks


class _OtherHooks(PluginError):
    """A plugin for another major version of the hooks."""


def _left_out(info: PluginInfo, state: State, error: str, remedy: str = "") -> PluginInfo:
    """The entry of a plugin that is not loaded, with what to do about it."""
    install = f"pip install --upgrade {info.distribution}" if info.distribution else "upgrade it"
    without = f"LORAHUB_DISABLE_PLUGINS={info.name}"
    usual: dict[State, str] = {
        "blocked": "change or unset that variable",
        "broken": f"{install}; or do without it: {without}",
        "conflict": f"keep one of them: {without}, or uninstall it",
    }
    return replace(info, state=state, error=error, remedy=remedy or usual.get(state, ""))


def _to_meet(requires: tuple[Required, ...]) -> str:
    """The command that installs what is missing, or ""."""
    missing = [f"'{each.requirement}'" for each in requires if not each.met]
    return f"pip install {' '.join(missing)}" if missing else ""


def _findings(plugin: object) -> tuple[str, ...]:
    """The codes that a plugin's own findings have, as its ``LORAHUB_FINDINGS`` lists them."""
    codes = getattr(plugin, "LORAHUB_FINDINGS", ())
    if not (isinstance(codes, list | tuple) and all(isinstance(each, str) for each in codes)):
        raise PluginError(f"its LORAHUB_FINDINGS is {codes!r}, and must be a tuple such as ('some-code',)")
    return tuple(sorted(codes))


def _hooks(plugin: object, name: str) -> dict[str, Callable[[], object]]:
    """Hook name -> the plugin's implementation.

    Raises:
        PluginError: it takes an argument that the hook has not, or implements a hook that does not exist.
    """
    manager = pluggy.PluginManager("lorahub")
    manager.add_hookspecs(hookspecs)
    try:
        manager.register(plugin, name)
        manager.check_pending()
    except pluggy.PluginValidationError as error:
        raise PluginError(f"it does not follow lorahub's hooks: {' '.join(str(error).split())}") from error
    return {
        sort.hook: implementation.function
        for sort in SORTS.values()
        for implementation in getattr(manager.hook, sort.hook).get_hookimpls()
    }


def _collect(hooks: Mapping[str, Callable[[], object]]) -> dict[str, dict[str, Any]]:
    """Call every hook and test what it returns: a list of objects with the right attributes, each name once."""
    result: dict[str, dict[str, Any]] = {}
    for sort, about in SORTS.items():
        if about.hook not in hooks:
            continue
        objects = hooks[about.hook]()
        if not isinstance(objects, list | tuple):
            raise PluginError(f"{about.hook} returned an object of type {type(objects).__name__}, not a list")
        named = result[sort] = {}
        for one in objects:
            said = f"{about.hook} returned"
            if missing := [attribute for attribute in about.attributes if not hasattr(one, attribute)]:
                raise PluginError(f"{said} an object of type {type(one).__name__} without {', '.join(missing)}")
            if not isinstance(one.name, str) or not _NAME.fullmatch(one.name):
                raise PluginError(f"{said} a {about.one} called {one.name!r}; names are like 'some-name'")
            if one.name in named:
                raise PluginError(f"{said} two {sort} called '{one.name}'")
            named[one.name] = one
    return result


def _blocked(info: PluginInfo, disabled: str, allowed: str) -> str:
    """Which variable keeps the plugin out, as a sentence, or ""."""
    own = {canonicalize_name(name) for name in (info.name, info.distribution) if name}
    never, only = (
        {canonicalize_name(name.strip()) for name in names.split(",") if name.strip()} for names in (disabled, allowed)
    )
    if "*" in never or own & never:
        return "LORAHUB_DISABLE_PLUGINS names it"
    if only and not own & only:
        return "LORAHUB_LOAD_PLUGINS does not name it"
    return ""


def _distribution(point: metadata.EntryPoint) -> tuple[str, str]:
    """Name and version of the distribution an entry point came with, or two empty strings."""
    return (point.dist.name, point.dist.version) if point.dist else ("", "")
