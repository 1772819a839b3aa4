"""What an adapter is, read from headers: the document behind ``lorahub inspect``.

No weights, no torch, no base: modules are named as the file spells them.  Metadata are whatever the file's author put
there: they are handed on whole, and whoever shows them shortens and escapes them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass

from lorahub import strict_json
from lorahub.adapter import AdapterHeader
from lorahub.bases.layers import Ranges, ranges_of
from lorahub.deltas.kind import JSON, Group
from lorahub.files.dtypes import nbytes
from lorahub.findings import Finding, Verdict
from lorahub.lineage import Guess, guess, modules_of
from lorahub.registry import Registry

__all__ = ["Distance", "Inspection", "Row", "base_of", "inspect", "tag_frequency", "trigger_words"]

_TRIGGERS = (
    "modelspec.trigger_phrase",
    "ss_trigger_words",
    "trigger_words",
    "trigger_phrase",
    "trigger_word",
    "instance_prompt",
)
"""Header keys under which trainers and sites write the words that call an adapter."""

_TAGS = "ss_tag_frequency"
_LARGEST = 1 << 20
"""Bytes of a value that is read as JSON; a header's metadata hold no more."""


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
class Distance:
    """How an adapter was read that lies on a hub, and was not pulled.

    Attributes:
        pin: which state, as "ns/name@v1.2".
        commit: 40 hex digits.
        why: how the reference came to it.
        files: name -> bytes, of everything a pull would bring.
        sha256: of the weights file, where the hub lists it.
        bytes_read: from the hub, just now; what was read before is kept.
        requests: how many reads that took, listings not counted.
    """

    pin: str
    commit: str
    why: str
    files: Mapping[str, int]
    sha256: str
    bytes_read: int
    requests: int

    def document(self) -> dict[str, object]:
        """JSON-ready values."""
        return {
            "pin": self.pin,
            "commit": self.commit,
            "why": self.why,
            "files": dict(self.files),
            "sha256": self.sha256,
            "autov2": self.sha256[:10],
            "bytes_read": self.bytes_read,
            "requests": self.requests,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Inspection:
    """The answer to "what is this adapter?".

    Attributes:
        adapter: what it was called.
        kinds: every kind it uses, sorted; one whose tensors all modules share has no rows without a base.
        where: the folder it lies in, or its pin on a hub.
        confidence: how sure its format is, 0 to 1, and why.
        size: bytes of the weights file.
        base: what it says of its base; "" where it says nothing, and then ``guess`` may know.
        triggers: the words that call it.
        unclaimed: tensors that no kind uses.
        distance: how it was read where it lies on a hub, or None.
        layers: which of its base's layers its model has, as (start, end) ranges, where it repeats some; else none.
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
    confidence: tuple[float, str] = (1.0, "")
    size: int = 0
    guess: Guess | None = None
    triggers: tuple[str, ...] = ()
    unclaimed: tuple[str, ...] = ()
    distance: Distance | None = None
    kinds: tuple[str, ...] = ()
    layers: Ranges = ()

    def document(self) -> dict[str, object]:
        """JSON-ready values; ``targets`` lists every group."""
        return {
            "adapter": self.adapter,
            "where": self.where,
            "format": self.format,
            "confidence": self.confidence[0],
            "reason": self.confidence[1],
            "file": self.file,
            "size": self.size,
            "kinds": list(self.kinds),
            "parameters": self.parameters,
            "bytes": self.nbytes,
            "base": self.base,
            "base_guess": self.guess.document() if self.guess else None,
            "trigger_words": list(self.triggers),
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
            "unclaimed": list(self.unclaimed),
            "record": self.record,
            "metadata": self.metadata,
            "findings": [finding.document() for finding in self.findings],
        } | {
            **({"layers": [list(pair) for pair in self.layers]} if self.layers else {}),
            **({"remote": self.distance.document()} if self.distance else {}),
        }


def inspect(header: AdapterHeader, registry: Registry, *, distance: Distance | None = None) -> Inspection:
    """Fold an adapter's header into what a person wants to know of it."""
    reading = header.reading
    stored = header.files.headers[reading.file]
    used = {ref.key for group in reading.groups for ref in group.slots.values()}
    used |= {ref.key for ref in reading.shared.values()}
    used |= {ref.key for part in reading.parts.values() for ref in part.tensors.values()}
    told = {key for each in reading.findings if each.level < Verdict.DEGRADED for key in each.where}  # an alpha of 0
    refs = [ref for group in reading.groups for ref in group.slots.values()] + list(reading.shared.values())
    refs += [ref for part in reading.parts.values() for ref in part.tensors.values()]
    return Inspection(
        adapter=header.label,
        where=str(header.folder),
        format=reading.format,
        file=reading.file,
        rows=_rows(reading.groups, registry),
        groups=tuple(reading.groups),
        parts=tuple(sorted(reading.parts)),
        parameters=sum(_count(ref.shape) for ref in refs),
        nbytes=sum(nbytes(ref.dtype, ref.shape) for ref in refs),
        base=base_of(header),
        record=header.record.document() if header.record else None,
        metadata=dict(stored.metadata),
        findings=header.findings,
        confidence=(header.claim.score, header.claim.reason) if header.claim else (1.0, ""),
        size=stored.size,
        guess=guess(stored.metadata, modules_of(reading.groups, registry.kinds)),
        triggers=trigger_words(stored.metadata, header.record.trigger_words if header.record else ()),
        unclaimed=tuple(key for key in stored.tensors if key not in used and key not in told),
        distance=distance,
        kinds=header.kinds,
        layers=ranges_of(reading.hints),
    )


def trigger_words(metadata: Mapping[str, str], recorded: tuple[str, ...] = ()) -> tuple[str, ...]:
    """The words that call an adapter: the record's, else the first that the metadata name, each once, in order."""
    for key in () if recorded else _TRIGGERS:
        text = metadata.get(key, "").strip()
        with suppress(strict_json.NotStrict):
            listed = strict_json.read(text, limit=_LARGEST) if text.startswith("[") else None
            if isinstance(listed, list):
                recorded = tuple(each for each in listed if isinstance(each, str))
        recorded = recorded or tuple(word.strip() for word in text.split(",") if word.strip())
        if recorded:
            break
    return tuple(dict.fromkeys(recorded))


def tag_frequency(metadata: Mapping[str, str]) -> list[tuple[str, int]]:
    """How often each tag was among the captions, over all folders of images, most frequent first; empty if unsaid."""
    try:
        folders = strict_json.read(metadata.get(_TAGS, ""), limit=_LARGEST)
    except strict_json.NotStrict:
        return []
    counts: Counter[str] = Counter()
    for tags in folders.values() if isinstance(folders, dict) else ():
        for tag, count in tags.items() if isinstance(tags, dict) else ():
            if isinstance(count, int):
                counts[tag.strip()] += count
    return sorted(counts.items(), key=lambda item: (-item[1], item[0]))


def base_of(header: AdapterHeader) -> str:
    """The base that the record names, or else the files; "" where neither does."""
    recorded = header.record.base if header.record else None
    if recorded and recorded.repo_id:
        return f"{recorded.repo_id}@{recorded.revision[:12]}" if recorded.revision else recorded.repo_id
    return header.reading.base_repo


def _count(shape: tuple[int, ...]) -> int:
    product = 1
    for size in shape:
        product *= size
    return product


def _rows(groups: Sequence[Group], registry: Registry) -> tuple[Row, ...]:
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
