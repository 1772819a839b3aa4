"""``lorahub inspect``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import click

from lorahub import listing, sources
from lorahub.cli.options import hub_option, output_options
from lorahub.cli.output import Output, aligned, size
from lorahub.errors import UsageError
from lorahub.inspection import Inspection
from lorahub.listing import COLUMNS, Entry
from lorahub.plugins import load_registry

__all__ = ["inspect"]


@click.command()
@click.argument("ref")
@hub_option
@click.option("--hashes", is_flag=True, help="Of one adapter: read its file and show sha256, AutoV2 and AutoV3.")
@click.option("--sort", type=click.Choice(list(COLUMNS)), help="Of a folder of adapters: the column to sort by.")
@click.option("--csv", "as_csv", is_flag=True, help="Of a folder of adapters: comma-separated values.")
@click.option("--duplicates", is_flag=True, help="Of a folder of adapters: read all tensors, find equal ones.")
@output_options
def inspect(
    ref: str, hub: str | None, hashes: bool, sort: str | None, as_csv: bool, duplicates: bool, out: Output
) -> None:
    """Say what an adapter is: format, kinds, ranks, scales, targets, base, record.

    REF is a folder, a safetensors file, or NS/NAME[@VERSION]; of a folder of adapters, each is a row. Only headers are
    read, save for --hashes and --duplicates.
    """
    parsed = sources.as_ref(ref)
    path = Path(parsed.path).expanduser() if parsed.path is not None else None
    if path is not None and listing.is_collection(path):
        if hashes:
            raise UsageError(f"--hashes is for one adapter, and {ref} holds several", "lorahub inspect FILE --hashes")
        _list(path, sort or "name", as_csv, duplicates, out)
        return
    if sort or as_csv or duplicates:
        raise UsageError(f"--sort, --csv and --duplicates are for a folder of adapters, and {ref} is none")
    with out.progress("pulling") as progress:
        found = sources.inspect(ref, hub=hub, progress=progress)
    known = listing.hashes(Path(found.where) / found.file) if hashes else {}
    document = found.document() | ({"hashes": known} if hashes else {})
    out.answer(document, text=_text(found, known), bare=found.format)
    out.findings(found.findings)


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
            each.base or "-",
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


def _text(found: Inspection, hashes: dict[str, str]) -> str:
    kinds = ", ".join(sorted({row.kind for row in found.rows})) or "nothing that changes weights"
    facts = [
        ("format", f"{found.format} ({found.file})"),
        ("kinds", kinds),
        ("size", f"{found.parameters:,} parameters, {size(found.nbytes)}"),
        ("base", found.base or "not recorded"),
    ]
    if found.parts:
        facts.append(("parts", ", ".join(found.parts)))
    known = found.record or {}
    facts += [(key, str(known[key])) for key in ("name", "version", "license") if known.get(key)]
    facts += list(hashes.items())
    table = [("kind", "target", "modules", "rank", "scale", "dtype")]
    table += [
        (
            row.kind,
            row.targets,
            str(row.modules),
            "" if row.rank is None else str(row.rank),
            "" if row.scale is None else f"{row.scale:g} ({row.scale_rule})" if row.scale_rule else f"{row.scale:g}",
            "+".join(row.dtypes),
        )
        for row in found.rows
    ]
    return (
        f"{found.adapter}\n{aligned(facts)}\n\n{aligned(table)}" if found.rows else f"{found.adapter}\n{aligned(facts)}"
    )
