"""``lorahub diff``."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass

import click

from lorahub import comparing
from lorahub.cli.diff_text import (
    adapters_document,
    comparison_text,
    interference_text,
    similarity_text,
    subspaces_text,
)
from lorahub.cli.options import allow_option, base_option, hub_option, output_options
from lorahub.cli.output import Output, Progress
from lorahub.comparing import Beside, Comparison, InterferenceReport, Similarity, Subspaces, beside
from lorahub.composition.analysis.picturing import PAIRS, SHOWS, Show, conflict_map, pair_map, subspace_map, target_map
from lorahub.errors import UsageError
from lorahub.files.atomic import atomic_write
from lorahub.pictures import heat_map
from lorahub.pictures.heat_map import HeatMap
from lorahub.pictures.terminal import lines

__all__ = ["diff"]


HELP = """Compare adapters: norms, differences, cosines and angles of what they change.

Two are compared target by target. Of three or more there is the cosine of every two, and a heat map. Adapters may
have weights (A:0.7), which count for three or more and for --interference. Nothing of a weight's size is made of
changes of low rank. With --base, adapters whose formats name modules differently are compared too, and kinds that
look at the weights.

\b
  lorahub diff A B                          target by target
  lorahub diff A B C --svg alike.svg        how alike they are, as a picture
  lorahub diff A B C --interference         before composing: what gets in the way, and which method suits
  lorahub diff A B --show subspace-in       do their strongest directions agree?

Exit codes: 0 every target is equal within the tolerance, 1 they differ, or something could not be compared; 2 and
more as everywhere.
"""


@click.command(help=HELP)
@click.argument("a")
@click.argument("b")
@click.argument("more", nargs=-1, metavar="[C]...")
@base_option
@click.option(
    "--tolerance",
    type=float,
    default=comparing.TOLERANCE,
    show_default=True,
    help="Changes that differ by at most this share of the larger one count as the same.",
)
@click.option(
    "--interference", is_flag=True, help="Look at every element: opposite signs, cancelling, and which method suits."
)
@click.option("--show", type=click.Choice(SHOWS), help="What the heat map shows; the last three are of two adapters.")
@click.option("--target", metavar="NAME", help="With --show subspace-...: of this target; * stands for any characters.")
@click.option(
    "--directions", type=click.IntRange(min=1), help="With --show subspace-...: how many of either.  [default: 16]"
)
@click.option("--svg", type=click.Path(dir_okay=False), help="Write the heat map to this file too.")
@click.option("--no-color", is_flag=True, help="No colours on the terminal (also NO_COLOR).")
@click.option("--threads", type=click.IntRange(min=1), help="How many threads; the result does not depend on it.")
@allow_option
@hub_option
@output_options
def diff(
    a: str,
    b: str,
    more: tuple[str, ...],
    base: str | None,
    tolerance: float,
    interference: bool,
    show: Show | None,
    target: str | None,
    directions: int | None,
    svg: str | None,
    no_color: bool,
    threads: int | None,
    allow: tuple[str, ...],
    hub: str | None,
    out: Output,
) -> int:
    """Compare two adapters or more."""
    shown = _shown(2 + len(more), show, target, directions, svg)
    if more or interference or shown:
        return _several((a, b, *more), base, allow, hub, _Asked(
            tolerance=tolerance, interference=interference or shown == "conflict", show=shown, target=target or "*",
            directions=directions or comparing.DIRECTIONS, svg=svg, colour=not no_color, threads=threads,
        ), out)  # fmt: skip
    found = _two(a, b, base, tolerance, allow, hub, out)
    out.answer(
        {"a": a, "b": b, **found.document()},
        text=comparison_text(a, b, found),
        bare="equal" if found.equal else "different",
    )
    out.findings(found.findings)
    return 0 if found.equal else 1


@dataclass(frozen=True, slots=True, kw_only=True)
class _Asked:
    """What is to be found out besides, and how it is to be shown."""

    tolerance: float
    interference: bool
    show: Show | None
    target: str
    directions: int
    svg: str | None
    colour: bool
    threads: int | None


def _shown(count: int, show: Show | None, target: str | None, directions: int | None, svg: str | None) -> Show | None:
    """What the picture is of: what was asked for, else what fits the number of adapters; None for no picture."""
    narrowed = target is not None or directions is not None
    if count > 2 and (narrowed or (show and show not in PAIRS)):
        what = f"--show {show}" if show and show not in PAIRS else "--target" if target is not None else "--directions"
        raise UsageError(f"{what} is of two adapters, and these are {count}", "lorahub diff A B --show subspace-in")
    if narrowed and show and not show.startswith("subspace"):
        raise UsageError(
            f"--target and --directions say nothing of '{show}'", "they go with --show subspace-in or -out"
        )
    if count > 2:
        return show or "cosine"
    return show or ("subspace-in" if narrowed or svg else None)


def _two(
    a: str, b: str, base: str | None, tolerance: float, allow: tuple[str, ...], hub: str | None, out: Output
) -> Comparison:
    with out.progress("fetching") as progress:
        return comparing.diff(a, b, base=base, tolerance=tolerance, allow=allow, hub=hub, progress=progress)


def _several(
    adapters: tuple[str, ...], base: str | None, allow: tuple[str, ...], hub: str | None, asked: _Asked, out: Output
) -> int:
    """More than two, or more than the plain comparison of two."""
    document: dict[str, object] = {}
    texts: list[str] = []
    equal: bool | None = None
    if len(adapters) == 2:
        found = _two(*adapters, base, asked.tolerance, allow, hub, out)
        document, equal = {"a": adapters[0], "b": adapters[1], **found.document()}, found.equal
        texts.append(comparison_text(*adapters, found))
    with ExitStack() as held:
        with out.progress("fetching") as progress:
            opened = held.enter_context(beside(adapters, base=base, allow=allow, hub=hub, progress=progress))
        with out.progress("comparing", unit="steps") as progress:
            alike, report = _measured(opened, asked, progress)
            directions = _directions(opened, asked, progress)
    if alike:
        about = {"adapters": adapters_document(opened, alike), **alike.document()}
        document |= about if equal is None else {"similarity": about}
        texts += [similarity_text(opened, alike, pairs=report is None)] if equal is None else []
    if report:
        document["interference"] = report.document()
        texts.append(interference_text(report))
    if directions:
        document["subspaces"] = directions.document()
        texts.append(subspaces_text(directions))
    document["findings"] = [finding.document() for finding in opened.findings]
    equal = bool(alike and alike.equal) if equal is None else equal
    picture = _picture(asked.show, alike, report, directions)
    drawn = (
        lines(picture, width=out.width, colour=out.colour(wanted=asked.colour), unicode=out.unicode) if picture else []
    )
    if picture and asked.svg:
        atomic_write(asked.svg, heat_map.svg(picture).encode())
    out.answer(
        document,
        text="\n\n".join(texts),
        bare="equal" if equal else "different",
        picture=["", *drawn] if drawn else [],
    )
    if asked.svg:
        out.say(
            f"the heat map is in {asked.svg}" if picture else f"there is nothing to draw; {asked.svg} was not written"
        )
    out.findings(opened.findings)
    return 0 if equal else 1


def _measured(opened: Beside, asked: _Asked, progress: Progress) -> tuple[Similarity | None, InterferenceReport | None]:
    """What is needed of similarity and interference."""
    if asked.interference:
        report = opened.interference(tolerance=asked.tolerance, threads=asked.threads, progress=progress)
        return report.similarity, report
    if asked.show and asked.show.startswith("subspace"):
        return None, None
    return opened.similarity(tolerance=asked.tolerance, threads=asked.threads, progress=progress), None


def _directions(opened: Beside, asked: _Asked, progress: Progress) -> Subspaces | None:
    if not (asked.show and asked.show.startswith("subspace")):
        return None
    return opened.subspaces(target=asked.target, directions=asked.directions, threads=asked.threads, progress=progress)


def _picture(
    show: Show | None,
    alike: Similarity | None,
    report: InterferenceReport | None,
    directions: Subspaces | None,
) -> HeatMap | None:
    """What was asked for as a picture; None where there is nothing in it."""
    found: HeatMap | None = None
    if directions:
        found = subspace_map(directions, "out" if show == "subspace-out" else "in")
    elif show == "conflict" and report:
        found = conflict_map(report.signs)
    elif show == "targets" and alike:
        found = target_map(alike)
    elif show in PAIRS and alike:
        found = pair_map(alike, show)
    return found if found and found.values else None
