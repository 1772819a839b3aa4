"""``lorahub completion``."""

from __future__ import annotations

import click
from click.shell_completion import get_completion_class

from lorahub.cli.output import Output

__all__ = ["completion"]


@click.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@click.pass_context
def completion(ctx: click.Context, shell: str) -> None:
    r"""Print the completion script of SHELL.

    \b
    bash   eval "$(lorahub completion bash)"
    zsh    eval "$(lorahub completion zsh)"
    fish   lorahub completion fish | source
    """
    script = get_completion_class(shell)
    assert script is not None
    Output().answer(None, text=script(ctx.find_root().command, {}, "lorahub", "_LORAHUB_COMPLETE").source())
