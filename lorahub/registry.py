"""Everything registered, as a value: kinds, formats, frameworks, runtimes, storages, methods, commands, plugins.

Knows what an object of each sort must have and what to say where a name is unknown.  ``plugins.py`` fills it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import metadata
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal

from packaging.requirements import InvalidRequirement, Requirement

from lorahub.errors import (
    LorahubError,
    MissingDependency,
    PluginError,
    UnsupportedFormat,
    UnsupportedKind,
    UsageError,
)
from lorahub.names import did_you_mean

if TYPE_CHECKING:
    import click

    from lorahub.bases.framework import Framework
    from lorahub.composition.method import Method
    from lorahub.deltas.kind import Kind
    from lorahub.formats.format import Format
    from lorahub.runtimes.runtime import Runtime
    from lorahub.storages.storage import Storage

__all__ = ["SORTS", "PluginInfo", "Registry", "Required", "Sort", "State", "required", "unmet"]

State = Literal["loaded", "blocked", "broken", "conflict", "refused"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Sort:
    """One sort of thing that can be registered.

    Attributes:
        one: what one of them is called.
        hook: the hook that brings them.
        attributes: what an object must have.
        unknown: the error for a name that nobody registered.
        listed: the command that lists what there is.
    """

    one: str
    hook: str
    attributes: tuple[str, ...]
    unknown: type[LorahubError]
    listed: str = "lorahub plugins"


SORTS: Mapping[str, Sort] = MappingProxyType(
    {
        "kinds": Sort(
            one="kind",
            hook="lorahub_kinds",
            attributes=(
                "name",
                "title",
                "source",
                "slots",
                "deltas",
                "touches",
                "build",
                "dissolve",
                "spellings",
                "starting",
            ),
            unknown=UnsupportedKind,
        ),
        "formats": Sort(
            one="format",
            hook="lorahub_formats",
            attributes=("name", "claims", "read", "write"),
            unknown=UnsupportedFormat,
        ),
        "frameworks": Sort(
            one="framework",
            hook="lorahub_frameworks",
            attributes=(
                "name",
                "requires",
                "claims",
                "claims_model",
                "index",
                "index_model",
                "layouts",
                "targets",
                "edits",
                "untie",
                "companions",
                "parameters",
                "site",
                "open_base",
            ),
            unknown=PluginError,
        ),
        "runtimes": Sort(
            one="runtime",
            hook="lorahub_runtimes",
            attributes=("name", "title", "versions", "rules"),
            unknown=UsageError,
        ),
        "storages": Sort(
            one="storage",
            hook="lorahub_storages",
            attributes=("name", "library", "holds", "stored"),
            unknown=UsageError,
        ),
        "methods": Sort(
            one="method",
            hook="lorahub_methods",
            attributes=(
                "name",
                "title",
                "source",
                "ordered",
                "draws",
                "count",
                "cut",
                "combine",
                "made",
                "demand_known",
                "defaults",
                "parameters",
            ),
            unknown=UsageError,
            listed="lorahub compose --methods",
        ),
        "commands": Sort(
            one="command",
            hook="lorahub_commands",
            attributes=("name", "invoke", "make_context"),
            unknown=UsageError,
        ),
    }
)
"""Field of ``Registry`` -> what belongs there; a test keeps the attributes in step with the types."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Required:
    """A requirement, and what is installed.

    Attributes:
        requirement: as "transformers>=5,<6".
        installed: the version that is; "" where none is.
        met: whether that is what is asked for.
    """

    requirement: str
    installed: str
    met: bool

    def __str__(self) -> str:
        if self.met:
            return f"{self.requirement} ({self.installed})"
        return f"{self.requirement} ({f'{self.installed} is' if self.installed else 'not'} installed)"

    def document(self) -> dict[str, object]:
        """The requirement as JSON-ready values, keys in declaration order."""
        return {"requirement": self.requirement, "installed": self.installed, "met": self.met}


@dataclass(frozen=True, slots=True, kw_only=True)
class PluginInfo:
    """What became of one entry point.

    Attributes:
        name: the entry point's name.
        distribution: who brought it; "" where the entry point does not say.
        version: of the distribution.
        state: ``loaded``; ``blocked`` by the environment (never imported); ``broken``; in ``conflict`` over a name;
            ``refused``, because it was made for another version of the hooks.
        error: why it is not loaded, in words; "" when it is.
        remedy: what to do about that, or about what it requires, as a command where there is one; "" for nothing.
        hooks: the hooks it implements, sorted.
        provides: what it brings, as "framework transformers", sorted.
        requires: what its frameworks need installed before a model can be opened, and what is; sorted.
        findings: the codes of its own findings, sorted.
    """

    name: str
    distribution: str = ""
    version: str = ""
    state: State = "loaded"
    error: str = ""
    remedy: str = ""
    hooks: tuple[str, ...] = ()
    provides: tuple[str, ...] = ()
    requires: tuple[Required, ...] = ()
    findings: tuple[str, ...] = ()

    def __str__(self) -> str:
        origin = f"{self.distribution} {self.version}" if self.distribution else "of no distribution"
        return f"plugin '{self.name}' ({origin})"

    def document(self) -> dict[str, object]:
        """The entry as JSON-ready values, keys in declaration order."""
        return {
            "name": self.name,
            "distribution": self.distribution,
            "version": self.version,
            "state": self.state,
            "error": self.error,
            "remedy": self.remedy,
            "hooks": list(self.hooks),
            "provides": list(self.provides),
            "requires": [each.document() for each in self.requires],
            "findings": list(self.findings),
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Registry:
    """Everything that is registered, by name: complete when it exists, never changed after.

    The mappings are sorted by name, so nothing depends on the order in which packages were installed.
    """

    kinds: Mapping[str, Kind] = field(default_factory=lambda: MappingProxyType({}))
    formats: Mapping[str, Format] = field(default_factory=lambda: MappingProxyType({}))
    frameworks: Mapping[str, Framework] = field(default_factory=lambda: MappingProxyType({}))
    runtimes: Mapping[str, Runtime] = field(default_factory=lambda: MappingProxyType({}))
    storages: Mapping[str, Storage] = field(default_factory=lambda: MappingProxyType({}))
    methods: Mapping[str, type[Method]] = field(default_factory=lambda: MappingProxyType({}))
    commands: Mapping[str, click.Command] = field(default_factory=lambda: MappingProxyType({}))
    plugins: tuple[PluginInfo, ...] = ()

    def kind(self, name: str) -> Kind:
        """The kind of that name; raises ``UnsupportedKind``."""
        return self.kinds[name] if name in self.kinds else self._unknown("kinds", name)

    def format(self, name: str) -> Format:
        """The format of that name; raises ``UnsupportedFormat``."""
        return self.formats[name] if name in self.formats else self._unknown("formats", name)

    def runtime(self, name: str) -> Runtime:
        """The runtime table of that name; raises ``UsageError``."""
        return self.runtimes[name] if name in self.runtimes else self._unknown("runtimes", name)

    def method(self, name: str) -> type[Method]:
        """The composition method of that name; raises ``UsageError``."""
        return self.methods[name] if name in self.methods else self._unknown("methods", name)

    def framework(self, name: str) -> Framework:
        """The framework of that name, for what it does from files alone; raises ``PluginError``."""
        return self.frameworks[name] if name in self.frameworks else self._unknown("frameworks", name)

    def framework_to_run(self, name: str) -> Framework:
        """The framework of that name, after testing that what it requires is installed.

        Raises:
            PluginError: no such framework, or its package is installed in a version it was not made for.
            MissingDependency: its package is not installed.
        """
        framework = self.framework(name)
        if framework.requires and (lack := unmet(framework.requires)):
            error = MissingDependency if lack.endswith("(not installed)") else PluginError
            raise error(f"The framework '{name}' needs {lack}.", f"pip install '{framework.requires}'")
        return framework

    def _unknown(self, sort: str, name: str) -> Any:
        known: Mapping[str, object] = getattr(self, sort)
        message = f"No {SORTS[sort].one} is called '{name}'."
        message += did_you_mean(name, known) or f" There are: {', '.join(known) or 'none'}."
        for plugin in self.plugins:
            if plugin.state != "loaded":
                message += f"\n  Not loaded: {plugin}: {plugin.error}"
        raise SORTS[sort].unknown(message, SORTS[sort].listed)


def required(requirement: str) -> Required:
    """What is installed of a requirement; nothing is imported for it.

    Raises:
        PluginError: it is no requirement.
    """
    try:
        parsed = Requirement(requirement)
    except InvalidRequirement as error:
        raise PluginError(f"{requirement!r} is no requirement such as 'transformers>=5,<6'") from error
    try:
        found = metadata.version(parsed.name)
    except metadata.PackageNotFoundError:
        return Required(requirement=requirement, installed="", met=False)
    met = parsed.specifier.contains(found, prereleases=True)
    return Required(requirement=requirement, installed=found, met=met)


def unmet(requirement: str) -> str:
    """The requirement with what is installed instead, or "" where it is met.

    Raises:
        PluginError: it is no requirement.
    """
    found = required(requirement)
    return "" if found.met else str(found)
