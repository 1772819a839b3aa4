"""Every door into lorahub, on one page.

A plugin is a module with some of these functions, each marked ``@lorahub.hookimpl``, registered under the entry-point
group ``lorahub``.  Hooks return lists; the objects in them do the work.  The built-ins come through the same hooks.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pluggy

if TYPE_CHECKING:
    import click

    from lorahub.bases.framework import Framework
    from lorahub.composition.method import Method
    from lorahub.deltas.kind import Kind
    from lorahub.formats.format import Format
    from lorahub.runtimes.runtime import Runtime
    from lorahub.storages.storage import Storage

__all__ = [
    "HOOKSPEC_VERSION",
    "hookimpl",
    "hookspec",
    "lorahub_commands",
    "lorahub_formats",
    "lorahub_frameworks",
    "lorahub_kinds",
    "lorahub_methods",
    "lorahub_runtimes",
    "lorahub_storages",
]

HOOKSPEC_VERSION = (1, 0)
"""A plugin module may say ``LORAHUB_HOOKS = (1, 0)``; another major is refused by name."""

hookspec = pluggy.HookspecMarker("lorahub")
hookimpl = pluggy.HookimplMarker("lorahub")


@hookspec
def lorahub_kinds() -> list[Kind]:
    """Adapter kinds: how a parameter changes, and how formats spell it."""
    return []


@hookspec
def lorahub_formats() -> list[Format]:
    """On-disk formats of adapters."""
    return []


@hookspec
def lorahub_frameworks() -> list[Framework]:
    """Frameworks: what their bases look like and where deltas land."""
    return []


@hookspec
def lorahub_runtimes() -> list[Runtime]:
    """Runtime tables for ``lorahub check --for NAME``: what a serving runtime accepts."""
    return []


@hookspec
def lorahub_storages() -> list[Storage]:
    """Storages: how quantised modules keep their weights, and how other numbers are put there."""
    return []


@hookspec
def lorahub_methods() -> list[type[Method]]:
    """Composition methods: several changes to one matrix in, one change out."""
    return []


@hookspec
def lorahub_commands() -> list[click.Command]:
    """Further commands of the command line; a core command cannot be shadowed."""
    return []
