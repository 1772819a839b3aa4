"""``lorahub resize``."""

from __future__ import annotations

import click

from lorahub import deriving
from lorahub.cli.options import allow_option, base_option, hub_option, output_options
from lorahub.cli.output import Output
from lorahub.cli.reducing import budget_options, show

__all__ = ["resize"]


@click.command()
@click.argument("ref")
@click.option("-o", "--out", "target", metavar="FOLDER", required=True, help="Where the result goes; a new folder.")
@budget_options
@click.option("--sv-ratio", type=float, help="Keep singular values of at least one such part of the largest, as 20.")
@click.option("--sv-fro", type=float, help="Keep at least this share of the norm: the energy is its square.")
@click.option("--sv-cumulative", type=float, help="Keep at least this share of the sum of the singular values.")
@click.option("--dtype", type=click.Choice(deriving.DTYPES), help="Of new factors; that of the old ones by default.")
@base_option
@click.option("--threads", type=click.IntRange(min=1), help="How many threads; the result does not depend on it.")
@allow_option
@hub_option
@output_options
def resize(
    ref: str,
    target: str,
    rank: int | None,
    energy: float | None,
    error: float | None,
    adaptive: bool,
    parameters: int | None,
    sv_ratio: float | None,
    sv_fro: float | None,
    sv_cumulative: float | None,
    dtype: str | None,
    base: str | None,
    threads: int | None,
    allow: tuple[str, ...],
    hub: str | None,
    out: Output,
) -> None:
    """Cut an adapter's LoRA factors to another rank.

    Each change keeps its largest singular values, which is the best there is of that rank. Kinds other than LoRA are
    kept as they are and named. The scale stays; alpha follows the rank.
    """
    with out.progress("resizing", unit="steps") as progress:
        report = deriving.resize(
            ref,
            target,
            rank=rank,
            energy=energy,
            error=error,
            sv_ratio=sv_ratio,
            sv_fro=sv_fro,
            sv_cumulative=sv_cumulative,
            adaptive=adaptive,
            parameters=parameters,
            dtype=dtype,
            base=base,
            allow=allow,
            hub=hub,
            threads=threads,
            progress=progress,
        )
    show(report, out)
