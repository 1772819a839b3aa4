"""Writing down what is known while it is known: from an adapter's header and its base to a record.

The counterpart of ``checks.py``, which holds the record against a base later.  No torch.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from lorahub.adapter import AdapterHeader
from lorahub.bases.framework import Framework
from lorahub.bases.index import BaseIndex
from lorahub.bases.layout import Target
from lorahub.deltas.kind import JSON
from lorahub.engine.planning.plan import Plan
from lorahub.files.digest import file_digest, tensors_digest
from lorahub.hub.contents import rule_for, survey
from lorahub.records import FILENAME, SCHEMA_VERSION, AdapterRecord, BaseRecord, Compat, FileRecord
from lorahub.registry import Registry
from lorahub.saving import module_record

__all__ = ["describe_base", "keep_name", "make_record"]

_RECORDED = frozenset({"behaviour", "companion"})
"""Roles of files whose digest a record keeps: what decides how the adapter acts, tokenizer included; no documents."""


def describe_base(
    index: BaseIndex,
    framework: Framework,
    touched: Collection[str],
    *,
    repo: str | None = None,
    revision: str | None = None,
) -> BaseRecord:
    """The base as a record keeps it: its name where it has one, and the digests that tell it from its relatives.

    Args:
        index: the base, with its weights digest.
        framework: what loads it.
        touched: canonical names of the parameters the adapter changes.
        repo: its name on the Hub, where ``index`` does not know.
        revision: its commit there.
    """
    architectures = index.config.get("architectures") or [index.config.get("architecture")]  # timm has one
    fields: dict[str, JSON] = {
        "repo_id": repo or index.ref.repo,
        "revision": revision or index.ref.commit,
        "subfolder": index.ref.subfolder,
        "library": framework.name,
        "architecture": architectures[0] if isinstance(architectures, list) and architectures else None,
        "weights_digest": index.weights,
        "structure": index.structure,
        "targets": index.targets(touched),
        "quantization": _quantization(index),
    }
    return BaseRecord.checked(**{key: value for key, value in fields.items() if value})


def _quantization(index: BaseIndex) -> dict[str, JSON]:
    """How the base is quantised, as its configuration says: the method, and the bits where there is one number."""
    said = index.config.get("quantization_config")
    if not isinstance(said, Mapping):
        return {}
    four, eight = said.get("load_in_4bit") is True, said.get("load_in_8bit") is True
    bits = 4 if four else 8 if eight else said.get("bits")
    found: dict[str, JSON] = {"method": said.get("quant_method"), "bits": bits}
    return {name: value for name, value in found.items() if type(value) in (str, int)}


def keep_name(base: BaseRecord, earlier: AdapterRecord | None) -> BaseRecord:
    """``base`` under the name that an earlier record gave to the same weights, where nothing names it now."""
    known = earlier.base if earlier else None
    if base.repo_id or known is None or not known.repo_id or known.weights_digest != base.weights_digest:
        return base
    return base.model_copy(update={"repo_id": known.repo_id, "revision": known.revision, "subfolder": known.subfolder})


def make_record(
    header: AdapterHeader,
    registry: Registry,
    *,
    base: BaseRecord | None,
    plan: Plan | None,
    fields: Mapping[str, Any],
) -> AdapterRecord:
    """A record of the adapter as it lies there; what an earlier record said and nothing here contradicts is kept.

    Args:
        header: the adapter, read against its base where one is at hand.
        registry: for what each kind touches.
        base: the base, or None to keep what was recorded.
        plan: how the adapter lands in that base, for the shapes of the touched parameters.
        fields: further fields, as ``{"license": "mit"}``.

    Raises:
        RecordError: a field does not follow the schema.
        PushRefused: the folder holds what no adapter folder may.
    """
    shapes = {step.out: step.after.shape for step in plan.steps} if plan else {}
    modules = tuple(
        module_record(group, touch, shape=shapes.get(Target(group.component, group.module, touch.parameter).name, ()))
        for group in header.reading.groups
        for touch in registry.kinds[group.kind].touches(group)[:1]
    )
    found = survey(header.folder)
    file = header.reading.file
    start = header.record or AdapterRecord(schema_version=SCHEMA_VERSION, kinds=("unknown",))
    if choice := header.reading.hints.get("compat"):
        start = start.changed(compat=(start.compat or Compat()).model_copy(update={"choice": choice}))
    return start.changed(
        schema_version=start.schema_version,
        kinds=sorted(
            {group.kind for group in header.reading.groups} | {part.kind for part in header.reading.parts.values()}
        ),
        modules=modules,
        components=sorted({group.component for group in header.reading.groups} - {""}),
        **({"base": base} if base else {}),
        files={
            path: FileRecord(size=size, sha256=sha256)
            for path in sorted(found.files)
            if path != FILENAME and rule_for(path).role in _RECORDED
            for sha256, size in [file_digest(header.folder / path)]
        },
        digest={"tensors": tensors_digest(header.folder / file, header.files.headers[file])},
        **fields,
    )
