"""The ``lorahub`` command: a table of commands, loaded one at a time.

``--help`` reads the table below and imports nothing else: no torch, no pydantic, no rich, no plugin.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib import import_module
from typing import NamedTuple

import click

from lorahub import __version__
from lorahub.cli.output import Mode, Output
from lorahub.errors import LorahubError, UsageError, WriteFailed
from lorahub.names import did_you_mean

__all__ = ["main", "make_cli"]

_INTERRUPTED = "Interrupted: nothing half done counts, and the same command again finishes it."


class _Row(NamedTuple):
    """One command: its module below ``lorahub.cli`` (the function has the command's name) and its one-line help."""

    module: str
    help: str


COMMANDS: dict[str, _Row] = {
    "inspect": _Row("inspect", "Say what an adapter is: format, kinds, ranks, scales, targets. Headers only."),
    "check": _Row("check", "Say whether an adapter goes with a base, with evidence and an exit code."),
    "record": _Row("record", "Write down an adapter's base and arithmetic while they are known."),
    "card": _Row("card", "Show or write the model card of an adapter folder, as a push would."),
    "convert": _Row("convert", "Write an adapter in another layout, with proof that nothing changed."),
    "merge": _Row("merge", "Merge adapters into a base and write a new checkpoint."),
    "compose": _Row("compose", "Make one adapter of several: exact sums, TIES, DARE, SLERP, ... or a recipe."),
    "dequantise": _Row("dequantise", "Write a quantised base as the numbers it stands for, to merge into."),
    "extract": _Row("extract", "Make an adapter of the difference between a tuned checkpoint and its base."),
    "resize": _Row("resize", "Cut an adapter's factors to another rank, with the error that makes."),
    "diff": _Row("diff", "Compare adapters: norms, differences, angles; and what gets in the way of composing them."),
    "tag": _Row("tag", "Write metadata into a safetensors file: trigger words, base, title; tensors stay as they are."),
    "pull": _Row("pull", "Fetch an adapter by version, verify every file, print its folder."),
    "search": _Row("search", "Find adapters: by name, base, author, library, tags."),
    "versions": _Row("versions", "List the versions of an adapter."),
    "push": _Row("push", "Publish an adapter folder as an immutable version."),
    "add": _Row("add", "Write adapters, or the base, into lorahub.toml, and lock them."),
    "remove": _Row("remove", "Take adapters out of lorahub.toml and its lock."),
    "lock": _Row("lock", "Write lorahub.lock: which commits and bytes lorahub.toml comes to."),
    "sync": _Row("sync", "Install exactly what is locked, one verified folder for each adapter."),
    "verify": _Row("verify", "Hash installed adapters and hold them against the lock."),
    "outdated": _Row("outdated", "Say how everything that is locked stands on its hub now."),
    "plugins": _Row("plugins", "List plugins: state, version, hooks, requirements."),
    "completion": _Row("completion", "Print the completion script of a shell."),
}


class _Lazy(click.Group):
    """A group whose commands are imported when they are called, with suggestions for misspelt ones."""

    def __init__(self, plugin_commands: Callable[[], dict[str, click.Command]]) -> None:
        super().__init__(name="lorahub", help=HELP, context_settings={"help_option_names": ["-h", "--help"]})
        self._plugin_commands = plugin_commands

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if row := COMMANDS.get(cmd_name):
            command = getattr(import_module(f"lorahub.cli.{row.module}"), cmd_name)
            assert isinstance(command, click.Command)
            return command
        return self._plugin_commands().get(cmd_name)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, row.help) for name, row in COMMANDS.items()])

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        try:
            return super().resolve_command(ctx, args)
        except click.UsageError as error:
            suggestion = did_you_mean(args[0], COMMANDS)
            raise click.UsageError(f"{error.format_message()}{suggestion}", ctx) from None


HELP = """LoRA-family adapters as dependable, versioned artefacts.

An adapter is a folder, a file, or NS/NAME[@VERSION] on a hub, optionally with a weight: acme/ink@1.2:0.8

\b
  lorahub inspect acme/ink            what is it?
  lorahub check acme/ink --base BASE  does it go with this base?
  lorahub merge acme/ink --base BASE -o out
"""


def _plugin_commands() -> dict[str, click.Command]:
    from lorahub.plugins import load_registry

    return dict(load_registry().commands)


def make_cli(plugin_commands: Callable[[], dict[str, click.Command]] = _plugin_commands) -> click.Group:
    """The command line, with a loader for plugins' commands that runs only when an unknown name is typed."""
    group = _Lazy(plugin_commands)
    return click.version_option(__version__, prog_name="lorahub")(group)


def _mode(arguments: list[str]) -> Mode:
    """The output mode that the raw arguments ask for, for errors that happen before or outside a command."""
    if "--json" in arguments:
        return "json"
    return "quiet" if {"-q", "--quiet"} & set(arguments) else "human"


def main(arguments: list[str] | None = None) -> None:
    """Run the command line and exit.

    0 accepted, 1 operational, 2 usage, 3 degraded, 4 incompatible, 5 integrity, 6 unavailable, 130 interrupted.
    """
    raw = (sys.argv[1:] if arguments is None else arguments) or ["--help"]
    try:
        code = make_cli().main(args=raw, prog_name="lorahub", standalone_mode=False)
    except click.exceptions.Exit as stop:
        sys.exit(stop.exit_code)
    except (click.Abort, KeyboardInterrupt):
        sys.stderr.write(f"{_INTERRUPTED}\n")
        sys.exit(130)
    except click.ClickException as error:
        usage = error.ctx.get_usage() if isinstance(error, click.UsageError) and error.ctx else ""
        command = error.ctx.command_path if isinstance(error, click.UsageError) and error.ctx else "lorahub"
        if usage and _mode(raw) == "human":
            sys.stderr.write(usage + "\n")
        Output(_mode(raw)).error(UsageError(error.format_message(), f"{command} --help"))
        sys.exit(2)
    except LorahubError as error:
        Output(_mode(raw)).error(error)
        sys.exit(error.exit_code)
    except BrokenPipeError:
        sys.stderr.close()  # the reader left; say nothing more
        sys.exit(141)
    except OSError as error:
        where = f" ({error.filename})" if error.filename else ""
        Output(_mode(raw)).error(
            WriteFailed(f"{error.strerror or error}{where}", "check the path, its permissions and the free space")
        )
        sys.exit(WriteFailed.exit_code)
    sys.exit(code if isinstance(code, int) else 0)
