"""Options that several commands share, said once."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar

import click

from lorahub.cli.output import Output
from lorahub.codes import CODES, demand_known
from lorahub.deltas.disputes import COMPATS

__all__ = ["allow_option", "base_option", "compat_option", "hub_option", "output_options"]

F = TypeVar("F", bound=Callable[..., Any])

hub_option = click.option(
    "--hub",
    metavar="PATH",
    envvar="LORAHUB_HUB",
    help="Folder hub to use instead of Hugging Face (also LORAHUB_HUB).",
)
base_option = click.option("--base", metavar="BASE", help="The base: a local folder or file, or NS/NAME[@COMMIT].")


def _known(_context: click.Context, _option: click.Parameter, codes: tuple[str, ...]) -> tuple[str, ...]:
    """The codes of ``--allow``, once it is sure that there are such; plugins are loaded for the others alone."""
    others = [code for code in codes if code not in CODES]
    if others:
        from lorahub.plugins import load_registry

        demand_known(others, {code for plugin in load_registry().plugins for code in plugin.findings})
    return codes


allow_option = click.option(
    "--allow",
    metavar="CODE",
    multiple=True,
    callback=_known,
    help="Accept one finding by its code and record that; may be repeated. The only override there is.",
)
compat_option = click.option(
    "--compat",
    type=click.Choice(COMPATS),
    help="Where PEFT's result is not the declared one: follow PEFT, or be strict. Recorded.",
)


def output_options(command: F) -> F:
    """``--json`` and ``-q``, handed to the command as ``out: Output``."""

    @click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout.")
    @click.option("-q", "--quiet", is_flag=True, help="Only the bare answer.")
    @wraps(command)
    def wrapper(
        *args: Any, as_json: bool, quiet: bool, **kwargs: Any
    ) -> Any:  # passes through whatever click collected
        return command(*args, out=Output("json" if as_json else "quiet" if quiet else "human"), **kwargs)

    return wrapper  # type: ignore[return-value]  # click decorators keep the callable's role, not its signature
