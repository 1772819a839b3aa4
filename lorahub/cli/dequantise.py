"""``lorahub dequantise``."""

from __future__ import annotations

import click

from lorahub import dequantising
from lorahub.cli.options import output_options
from lorahub.cli.output import Output, size
from lorahub.engine.planning.casting import DTYPES

__all__ = ["dequantise"]


@click.command(
    help="""Write a quantised base as the numbers that it stands for, in 16 bits, to merge into.

An adapter that was trained on a quantised base was trained with these numbers, and not with those of the base that it
was made from. Reads bitsandbytes nf4, fp4 and int8, and 8-bit weights of compressed-tensors; their libraries are not
needed.

\b
  lorahub dequantise ./llama-bnb-4bit -o ./llama-as-trained
  lorahub merge --base ./llama-as-trained acme/ink -o ./llama-ink
"""
)
@click.argument("base", metavar="FOLDER", type=click.Path(exists=True))
@click.option("-o", "--out", "target", metavar="PATH", required=True, help="A new folder.")
@click.option("--dtype", type=click.Choice(list(DTYPES)), help="By default what its library gives the weights in.")
@output_options
def dequantise(base: str, target: str, dtype: str | None, out: Output) -> None:
    """See the help above."""
    with out.progress("dequantising") as progress:
        done = dequantising.dequantise(base, target, dtype=dtype, progress=progress)
    exact = "every number exact" if not done.rounded else f"rounded by up to {done.rounded:.1e} of a weight's size"
    text = (
        f"{done.out}: {done.weights} weights of {done.storage} as {' and '.join(done.dtypes)}, {exact}; "
        f"{size(done.bytes_read)} -> {size(done.bytes_written)}"
    )
    out.answer(done.document(), text=text, bare=str(done.out))
