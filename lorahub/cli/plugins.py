"""``lorahub plugins``."""

from __future__ import annotations

import click

from lorahub.cli.options import output_options
from lorahub.cli.output import Output, aligned
from lorahub.plugins import load_registry, name_clash

__all__ = ["plugins"]


@click.command()
@output_options
def plugins(out: Output) -> None:
    """List plugins with version, hooks, state and requirements, and what is built in."""
    registry = load_registry()
    rows = [("name", "state", "version", "distribution", "brings")]
    rows += [
        (each.name, each.state, each.version, each.distribution, each.error or ", ".join(each.hooks))
        for each in registry.plugins
    ]
    builtin = [
        ("kinds", ", ".join(sorted(registry.kinds))),
        ("formats", ", ".join(sorted(registry.formats))),
        ("frameworks", ", ".join(sorted(registry.frameworks))),
        ("runtimes", ", ".join(sorted(registry.runtimes))),
        ("storages", ", ".join(sorted(registry.storages))),
    ]
    text = f"{aligned(rows)}\n\n{aligned(builtin)}" if len(rows) > 1 else f"no plugins installed\n\n{aligned(builtin)}"
    out.answer(
        {
            "plugins": [each.document() for each in registry.plugins],
            **{key: value.split(", ") for key, value in builtin},
        },
        text=text,
    )
    if clash := name_clash():
        out.say(clash)
