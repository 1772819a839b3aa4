"""``lorahub inspect``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import click

from lorahub import fetching, listing, sources, weighing
from lorahub.cli.inspect_text import inspection_text, weights_text
from lorahub.cli.options import compat_option, hub_option, output_options
from lorahub.cli.output import Output, aligned, size
from lorahub.errors import UsageError
from lorahub.files.atomic import atomic_write
from lorahub.inspection import Inspection
from lorahub.listing import COLUMNS, Entry
from lorahub.pictures import heat_map
from lorahub.pictures.terminal import lines
from lorahub.plugins import load_registry

__all__ = ["inspect"]


@click.command()
@click.argument("ref")
@hub_option
@click.option("--hashes", is_flag=True, help="Of one adapter: read its file and show sha256, AutoV2 and AutoV3.")
@click.option("--weights", is_flag=True, help="Of one adapter: read its tensors; norms, spectra, and a heat map.")
@click.option("--base", metavar="BASE", help="With --weights: the base, for norms relative to its weights.")
@compat_option
@click.option("--show", type=click.Choice(list(weighing.MEASURES)), help="With --weights: what the heat map shows.")
@click.option("--svg", type=click.Path(dir_okay=False), help="With --weights: write the heat map to this file too.")
@click.option("--no-color", is_flag=True, help="No colours on the terminal (also NO_COLOR).")
@click.option("--sort", type=click.Choice(list(COLUMNS)), help="Of a folder of adapters: the column to sort by.")
@click.option("--csv", "as_csv", is_flag=True, help="Of a folder of adapters: comma-separated values.")
@click.option("--duplicates", is_flag=True, help="Of a folder of adapters: read all tensors, find equal ones.")
@output_options
def inspect(
    ref: str,
    hub: str | None,
    hashes: bool,
    weights: bool,
    base: str | None,
    compat: str | None,
    show: str | None,
    svg: str | None,
    no_color: bool,
    sort: str | None,
    as_csv: bool,
    duplicates: bool,
    out: Output,
) -> None:
    """Say what an adapter is: format, kinds, ranks, scales, targets, base, metadata, record.

    REF is a folder, a weights file, or NS/NAME[@VERSION]; of a folder of adapters, each is a row. Only headers are
    read, of one on a hub too, save for --hashes, --weights and --duplicates.
    """
    parsed = fetching.as_ref(ref)
    path = Path(parsed.path).expanduser() if parsed.path is not None else None
    weighed: weighing.Weighing | None = None
    weights = weights or base is not None or show is not None or svg is not None
    if path is not None and listing.is_collection(path):
        if hashes or weights:
            what = "--hashes" if hashes else "--weights"
            raise UsageError(f"{what} is for one adapter, and {ref} holds several", f"lorahub inspect FILE {what}")
        _list(path, sort or "name", as_csv, duplicates, out)
        return
    if sort or as_csv or duplicates:
        if path is not None and path.is_dir() and len(listing.beside(path, "")) > 1:
            _list(path, sort or "name", as_csv, duplicates, out)
            return
        raise UsageError(f"--sort, --csv and --duplicates are for a folder of adapters, and {ref} is none")
    if show == "relative" and base is None:
        raise UsageError("a norm relative to the base takes the base", f"lorahub inspect {ref} --weights --base BASE")
    with out.progress("pulling") as progress:
        found = sources.inspect(ref, hub=hub, progress=progress)
        known = _hashes(ref, found, hub, progress) if hashes else {}
    beside = listing.beside(path, found.file) if path is not None and path.is_dir() else ()
    document = found.document() | ({"hashes": known} if hashes else {}) | ({"beside": list(beside)} if beside else {})
    text, drawn = inspection_text(found, known, out.width, beside=beside), []
    if weights:
        with out.progress("weighing", unit="steps") as progress:
            weighed = sources.weigh(ref, base, compat=compat, hub=hub, progress=progress)
        document["weights"] = weighed.document()
        text += "\n\n" + weights_text(weighed)
        if weighed.targets:
            measure = show or ("relative" if base else "norm")
            picture = weighing.heat_map(weighed, measure, title=Path(found.adapter).name)
            colour = out.colour(wanted=not no_color)
            drawn = ["", *lines(picture, width=out.width, colour=colour, unicode=out.unicode)]
            if svg:
                atomic_write(svg, heat_map.svg(picture).encode())
    out.answer(document, text=text, bare=found.format, picture=drawn)
    if weights and svg and drawn:
        out.say(f"the heat map is in {svg}")
    out.findings((*found.findings, *(weighed.findings if weighed else ())))


def _hashes(ref: str, found: Inspection, hub: str | None, progress: fetching.Progress) -> dict[str, str]:
    """Of the weights file, which has to be here for that."""
    where = Path(found.where) if found.distance is None else fetching.pull(ref, hub=hub, progress=progress).folder
    return listing.hashes(where / found.file)


def _list(folder: Path, sort: str, as_csv: bool, duplicates: bool, out: Output) -> None:
    """One row an adapter; fails only where not one could be read."""
    if as_csv and out.mode == "json":
        raise UsageError("--csv and --json are two forms of one answer: give one of them")
    with out.progress("reading", unit="steps") as progress:
        entries = listing.list_folder(folder, load_registry(), duplicates=duplicates, progress=progress)
    entries = listing.ordered(entries, sort)
    document = {"where": str(folder), "adapters": [each.document() for each in entries]}
    text = listing.as_csv(entries).rstrip("\n") if as_csv else _table(entries)
    out.answer(document, text=text, bare="\n".join(each.name for each in entries if not each.error))
    unread = [each for each in entries if each.error]
    if unread:
        out.say(f"{len(unread)} of {len(entries)} cannot be read")
    if len(unread) == len(entries):
        raise click.exceptions.Exit(max((each.exit_code for each in unread), default=1))


def _table(entries: Sequence[Entry]) -> str:
    rows = [(*COLUMNS, "")]
    rows += [
        (
            each.name,
            each.format or "-",
            "+".join(each.kinds) or "-",
            _span(each.ranks),
            _span(each.scales),
            "-" if each.nbytes is None else size(each.nbytes),
            each.base or each.looks_like or "-",
            "-" if each.error else str(each.findings),
            each.error or (f"same tensors as {each.same_as}" if each.same_as else ""),
        )
        for each in entries
    ]
    return aligned(rows, indent="")


def _span(values: Sequence[float]) -> str:
    """One value, or the smallest and the largest."""
    shown = [f"{value:g}" for value in values]
    return "-" if not shown else shown[0] if len(shown) == 1 else f"{shown[0]}..{shown[-1]}"
