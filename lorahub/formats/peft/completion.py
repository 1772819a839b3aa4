"""What a PEFT file leaves out, filled in from all modules together or from the base, as its kind asks for it.

PEFT's files may lack what a seed and the base's shapes give back.  Which facts a kind needs and what it makes of them,
the kind says; here the base is described to it, and what it cannot do becomes a finding.
"""

from __future__ import annotations

from collections.abc import Mapping

from lorahub.bases.index import BaseIndex
from lorahub.deltas.kind import JSON, Matrix, Surroundings
from lorahub.errors import BaseNeeded, IntegrityError, LorahubError, UnsupportedKind
from lorahub.findings import Axis, Finding, Verdict
from lorahub.formats.families import representatives
from lorahub.formats.peft.fits import Ways
from lorahub.formats.peft.groups import Grouped
from lorahub.formats.peft.targets import targeted

__all__ = ["complete", "surroundings"]

_CODES: Mapping[type[LorahubError], tuple[str, Axis]] = {
    UnsupportedKind: ("kind-unsupported", "format"),
    IntegrityError: ("config-contradicts-tensors", "integrity"),
}


def complete(found: Grouped, ways: Ways, config: Mapping[str, JSON], index: BaseIndex | None) -> Grouped:
    """``found`` with every kind's groups completed, and only findings that are new.

    Groups whose files contradict themselves are left out; what cannot be computed, or not yet, is still seen.
    """
    present = {group.kind for group in representatives(found.groups)} | {kind for kind, _ in found.shared}
    if not any(kind.name in present for kind, spelling in ways if spelling.complete is not None):
        return Grouped(found.groups, found.shared, ())
    groups, shared = list(found.groups), dict(found.shared)
    findings: list[Finding] = []
    broken = any(finding.level is Verdict.INCOMPATIBLE for finding in found.findings)
    base = None
    for kind, spelling in ways:
        own = [group for group in groups if group.kind == kind.name]
        common = {slot: ref for (name, slot), ref in shared.items() if name == kind.name}
        alone = spelling.implied and common and not broken
        if spelling.complete is None or not (own or alone):
            continue
        base = base or (surroundings(index, config) if index else None)
        keys = [ref.key for group in own for ref in group.slots.values()] + [ref.key for ref in common.values()]
        rest = [group for group in groups if group.kind != kind.name]
        try:
            completed = spelling.complete(config, own, common, base)
        except BaseNeeded as error:
            findings.append(
                Finding(
                    code="base-needed",
                    axis="base",
                    level=Verdict.UNVERIFIED if index is None else Verdict.INCOMPATIBLE,
                    message=error.message,
                    where=tuple(sorted(keys)),
                    remedy=error.hint,
                )
            )
        except (IntegrityError, UnsupportedKind) as error:
            code, axis = next(says for cls, says in _CODES.items() if isinstance(error, cls))
            findings.append(
                Finding(
                    code=code,
                    axis=axis,
                    level=Verdict.INCOMPATIBLE,
                    message=error.message,
                    where=tuple(sorted(keys)),
                    remedy=error.hint,
                )
            )
            if isinstance(error, IntegrityError):
                groups = rest
                shared = {key: ref for key, ref in shared.items() if key[0] != kind.name}
        else:
            groups = [*rest, *completed.groups]
            findings += completed.findings
    return Grouped(tuple(groups), shared, tuple(findings))


def surroundings(index: BaseIndex, config: Mapping[str, JSON]) -> Surroundings:
    """The base as kinds may ask of it."""
    matrices = {}
    for module in index.modules():
        info = index.parameters.get(index.stored(f"{module}.weight" if module else "weight"))
        if info is not None and len(info.shape) == 2:
            out, inputs = info.shape[::-1] if info.transposed else info.shape
            matrices[module] = Matrix(out=out, inputs=inputs, dtype=info.dtype, transposed=info.transposed)
    order = [module for module in index.registered if module in matrices]
    return Surroundings(matrices=matrices, targeted=targeted(order, config) if index.registered else None)
