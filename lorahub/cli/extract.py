"""``lorahub extract``."""

from __future__ import annotations

import click

from lorahub import deriving
from lorahub.cli.options import allow_option, output_options
from lorahub.cli.output import Output
from lorahub.cli.reducing import budget_options, show

__all__ = ["extract"]


@click.command()
@click.argument("tuned")
@click.option("--base", metavar="BASE", required=True, help="What it was tuned from: a folder, a file or NS/NAME.")
@click.option("-o", "--out", "target", metavar="FOLDER", required=True, help="Where the adapter goes; a new folder.")
@budget_options
@click.option(
    "--dtype", type=click.Choice(deriving.DTYPES), default="float32", show_default=True, help="Of the factors."
)
@click.option("--whole", metavar="PATTERN", multiple=True, help="Parameters to keep whole (*); may be repeated.")
@click.option("--leave-out", metavar="PATTERN", multiple=True, help="Parameters to go without (*); may be repeated.")
@click.option("--embedding", metavar="PATTERN", multiple=True, help="Embeddings (*), where no plugin knows them.")
@click.option("--base-repo", metavar="NS/NAME", help="What a local base is called on the Hub.")
@click.option("--base-revision", metavar="COMMIT", help="Its commit there, 40 hex digits.")
@click.option("--threads", type=click.IntRange(min=1), help="How many threads; the result does not depend on it.")
@allow_option
@output_options
def extract(
    tuned: str,
    base: str,
    target: str,
    rank: int | None,
    energy: float | None,
    error: float | None,
    adaptive: bool,
    parameters: int | None,
    dtype: str,
    whole: tuple[str, ...],
    leave_out: tuple[str, ...],
    embedding: tuple[str, ...],
    base_repo: str | None,
    base_revision: str | None,
    threads: int | None,
    allow: tuple[str, ...],
    out: Output,
) -> None:
    """Make an adapter of the difference between a TUNED checkpoint and its base.

    TUNED is a folder, a file, or NS/NAME[@COMMIT]. The result is a PEFT folder: LoRA factors for matrices, the tuned
    values of biases and norms. Parameters are read one by one; no model is loaded.
    """
    with out.progress("extracting", unit="steps") as progress:
        report = deriving.extract(
            tuned,
            base,
            target,
            rank=rank,
            energy=energy,
            error=error,
            adaptive=adaptive,
            parameters=parameters,
            dtype=dtype,
            whole=whole,
            leave_out=leave_out,
            embedding=embedding,
            base_repo=base_repo,
            base_revision=base_revision,
            allow=allow,
            threads=threads,
            progress=progress,
        )
    show(report, out)
