"""What an adapter is, read from headers: the document behind ``lorahub inspect``.

No weights, no torch, no base: modules are named as the file spells them.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from lorahub.adapter import AdapterHeader
from lorahub.deltas.kind import JSON, Group
from lorahub.files.dtypes import nbytes
from lorahub.findings import Finding
from lorahub.registry import Registry

__all__ = ["Inspection", "Row", "inspect"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """Targets that share kind, rank, scale and dtype, folded to one line.

    Attributes:
        targets: the last part of the module path ("query", "c_attn"), or the whole path where there is one module.
        modules: how many modules.
        rank: r, or None for kinds without one.
        scale: the factor on the stored change, or None; scale_rule says where it comes from.
        dtypes: safetensors codes of the slots.
    """

    kind: str
    targets: str
    modules: int
    rank: int | None
    scale: float | None
    scale_rule: str
    dtypes: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Inspection:
    """The answer to "what is this adapter?".

    Attributes:
        adapter: what it was called.
        where: the folder it lies in.
    """

    adapter: str
    where: str
    format: str
    file: str
    rows: tuple[Row, ...]
    groups: tuple[Group, ...]
    parts: tuple[str, ...]
    parameters: int
    nbytes: int
    base: str
    record: dict[str, JSON] | None
    metadata: dict[str, str]
    findings: tuple[Finding, ...]

    def document(self) -> dict[str, object]:
        """JSON-ready values; ``targets`` lists every group."""
        return {
            "adapter": self.adapter,
            "where": self.where,
            "format": self.format,
            "file": self.file,
            "kinds": sorted({row.kind for row in self.rows}),
            "parameters": self.parameters,
            "bytes": self.nbytes,
            "base": self.base,
            "rows": [
                {
                    "kind": row.kind,
                    "targets": row.targets,
                    "modules": row.modules,
                    "rank": row.rank,
                    "scale": row.scale,
                    "scale_rule": row.scale_rule,
                    "dtypes": list(row.dtypes),
                }
                for row in self.rows
            ],
            "targets": [
                {
                    "component": group.component,
                    "module": group.module,
                    "parameter": group.parameter,
                    "kind": group.kind,
                    "options": dict(group.options),
                    "slots": {
                        name: {"shape": list(ref.shape), "dtype": ref.dtype, "key": ref.key}
                        for name, ref in group.slots.items()
                    },
                }
                for group in self.groups
            ],
            "parts": list(self.parts),
            "record": self.record,
            "metadata": self.metadata,
            "findings": [finding.document() for finding in self.findings],
        }


def inspect(header: AdapterHeader, registry: Registry) -> Inspection:
    """Fold an adapter's header into what a person wants to know of it."""
    reading = header.reading
    refs = [ref for group in reading.groups for ref in group.slots.values()] + list(reading.shared.values())
    refs += [ref for part in reading.parts.values() for ref in part.tensors.values()]
    return Inspection(
        adapter=header.label,
        where=str(header.folder),
        format=reading.format,
        file=reading.file,
        rows=_rows(reading.groups, registry),
        groups=reading.groups,
        parts=tuple(sorted(reading.parts)),
        parameters=sum(_count(ref.shape) for ref in refs),
        nbytes=sum(nbytes(ref.dtype, ref.shape) for ref in refs),
        base=_base(header),
        record=header.record.document() if header.record else None,
        metadata=dict(header.files.headers[reading.file].metadata),
        findings=header.findings,
    )


def _base(header: AdapterHeader) -> str:
    recorded = header.record.base if header.record else None
    if recorded and recorded.repo_id:
        return f"{recorded.repo_id}@{recorded.revision[:12]}" if recorded.revision else recorded.repo_id
    return header.reading.base_repo


def _count(shape: tuple[int, ...]) -> int:
    product = 1
    for size in shape:
        product *= size
    return product


def _rows(groups: tuple[Group, ...], registry: Registry) -> tuple[Row, ...]:
    keys: Counter[tuple[str, str, int | None, float | None, str, tuple[str, ...]]] = Counter()
    for group in groups:
        rank = next((touch.rank for touch in registry.kinds[group.kind].touches(group) if touch.rank is not None), None)
        scale = group.options.get("scale")
        keys[
            (
                group.kind,
                _short(group),
                rank,
                float(scale) if isinstance(scale, int | float) else None,
                str(group.options.get("scale_rule", "")),
                tuple(sorted({ref.dtype for ref in group.slots.values()})),
            )
        ] += 1
    return tuple(
        Row(kind=kind, targets=targets, modules=count, rank=rank, scale=scale, scale_rule=rule, dtypes=dtypes)
        for (kind, targets, rank, scale, rule, dtypes), count in sorted(
            keys.items(), key=lambda item: (item[0][0], item[0][1], str(item[0]))
        )
    )


def _short(group: Group) -> str:
    """The end of the module path, from its last word on ("to_out.0"), and the parameter where it says more.

    Flattened names ("down_blocks_0_attentions_1_proj_in") keep their words, with a star for every number.
    """
    parts = group.module.split(".")
    if len(parts) == 1:
        parts = ["_".join("*" if part.isdigit() else part for part in group.module.split("_"))]
    start = next((at for at in reversed(range(len(parts))) if not parts[at].isdigit()), 0)
    last = ".".join(parts[start:])
    return last if group.parameter == "weight" else f"{last}.{group.parameter}"
