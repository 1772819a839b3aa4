"""``lorahub check``."""

from __future__ import annotations

import click

from lorahub.cli.options import allow_option, base_option, compat_option, hub_option, output_options
from lorahub.cli.output import Output, aligned
from lorahub.findings import Axis, Verdict
from lorahub.merging import checking
from lorahub.report import CheckReport

__all__ = ["check"]

LANDED = "components"
"""Code of the finding that says which components of a pipeline an adapter changes."""

EXIT = {Verdict.DEGRADED: 3, Verdict.INCOMPATIBLE: 4}


@click.command()
@click.argument("ref")
@base_option
@click.option("--for", "runtime", metavar="RUNTIME", help="Judge for a serving runtime instead of a base, as vllm.")
@allow_option
@compat_option
@hub_option
@output_options
def check(
    ref: str,
    base: str | None,
    runtime: str | None,
    allow: tuple[str, ...],
    compat: str | None,
    hub: str | None,
    out: Output,
) -> int:
    """Say whether an adapter goes with a base: exact, compatible, unverified, degraded or incompatible.

    Without --base the recorded base is used. Exit codes: 0 accepted, 3 degraded, 4 incompatible, 5 integrity,
    6 unavailable.
    """
    with out.progress("checking") as progress:
        report = checking.check(ref, base, runtime=runtime, allow=allow, compat=compat, hub=hub, progress=progress)
    axes = [(axis, str(verdict), _note(report, axis)) for axis, verdict in report.axes.items()]
    out.answer(
        report.document(),
        text=f"{report.verdict}: {report.adapter} with {report.against}\n{aligned(axes)}",
        bare=str(report.verdict),
    )
    out.findings(report.findings, allowed=allow)
    if report.verdict is Verdict.INCOMPATIBLE and report.axes["integrity"] is Verdict.INCOMPATIBLE:
        return 5
    return EXIT.get(report.verdict, 0)


def _note(report: CheckReport, axis: Axis) -> str:
    """What an accepted axis rests on, in a few words; what is worse is told after the answer.

    Of a pipeline, always what lands where.
    """
    level = report.axes[axis]
    if landed := [each.message for each in report.findings if each.axis == axis and each.code == LANDED]:
        return landed[0]
    notes = [each.message for each in report.findings if each.axis == axis and each.level is level]
    return notes[0] if notes and level < Verdict.UNVERIFIED else ""
