"""What a manifest accepts: how well adapters go with the base, whose they are, and under which licences."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from lorahub.checks import refuse
from lorahub.errors import Degraded
from lorahub.findings import Finding, Verdict, worst
from lorahub.manifest.document import FILENAME, Policy
from lorahub.manifest.lockfile import LockedAdapter

__all__ = ["MACHINE", "demand", "judge", "offences"]

MACHINE = frozenset({"libraries"})
"""Axes that speak of the machine that asks, and so are no part of a lock."""


def judge(name: str, findings: Sequence[Finding], policy: Policy) -> Verdict:
    """The verdict over an adapter's findings, as it is locked: what is allowed counts in full.

    Raises:
        IntegrityError, BaseMismatch, Incompatible: it cannot be done.
        Degraded: it is worse than the policy accepts.
    """
    own = [each for each in findings if each.axis not in MACHINE]
    verdict, accepted = worst(own), worst(own, allowed=policy.allow)
    if accepted is Verdict.INCOMPATIBLE:
        refuse(own, allowed=policy.allow, subject=f"{name} as {FILENAME} names it")
    limit = policy.worst if verdict == accepted else max(policy.worst, accepted)
    if accepted <= limit:
        return verdict
    stopping = tuple(each for each in own if worst([each], allowed=policy.allow) > limit)
    told = "; ".join(each.show() for each in stopping[:3])
    raise Degraded(
        f"{name} is {accepted}, and {FILENAME} accepts nothing worse than {limit}: {told}",
        _way_on(accepted, stopping),
        stopping,
    )


def _way_on(verdict: Verdict, stopping: Sequence[Finding]) -> str:
    """What to do about what is refused, and the line of the policy that accepts it."""
    ways = [next((each.remedy for each in stopping if each.remedy), "")]
    if verdict is Verdict.UNVERIFIED:
        line = f'verdict = "{verdict}"'
        ways.append(f"to accept such: lorahub add --verdict {verdict}   (which is {line} in [policy] of {FILENAME})")
    elif codes := sorted({each.code for each in stopping if each.level is verdict and each.allowable}):
        ways.append(f"to accept it, in [policy] of {FILENAME}: allow = [{_listed(codes)}]")
    return "; or ".join(filter(None, ways))


def offences(policy: Policy, adapters: Iterable[LockedAdapter]) -> list[Finding]:
    """Where adapters are whose, or under what, the policy does not accept."""
    found = []
    owners, licenses = set(policy.owners), {each.lower() for each in policy.licenses}
    for each in adapters:
        owner = (each.repo or "").partition("/")[0]
        if owners and each.repo and owner not in owners:
            found.append(
                _offence(
                    "policy-owner", each,
                    f"{each.name} is from {owner}, and owners = [{_listed(policy.owners)}]", f'"{owner}" to owners',
                )
            )  # fmt: skip
        if licenses and (each.license or "").lower() not in licenses:
            says = f"is under {each.license}" if each.license else "states no licence"
            found.append(
                _offence(
                    "policy-license", each,
                    f"{each.name} {says}, and licenses = [{_listed(policy.licenses)}]",
                    f'"{each.license}" to licenses' if each.license else "",
                )
            )  # fmt: skip
    return found


def demand(found: Sequence[Finding]) -> None:
    """Refuse what the policy does not accept.

    Raises:
        Degraded: lists every offence with its line of the policy.
    """
    if found:
        told = "; ".join(each.message for each in found)
        raise Degraded(f"the policy of {FILENAME} refuses: {told}", found[0].remedy, tuple(found))


def _offence(code: str, adapter: LockedAdapter, message: str, add: str) -> Finding:
    return Finding(
        code=code,
        axis="policy",
        level=Verdict.DEGRADED,
        message=message,
        where=(adapter.name,),
        remedy=f"if that is fine, add {add} in [policy] of {FILENAME}" if add else f"lorahub remove {adapter.name}",
    )


def _listed(words: Sequence[str]) -> str:
    return ", ".join(f'"{each}"' for each in words)
