"""Deltas into a folder: spelled by a format, proven to read back as the same deltas, then put in place whole.

Knows no spelling.  What the native files have no word for goes into ``lorahub.json`` where there is a record, and the
arithmetic as it was understood goes under one key of the safetensors header.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from lorahub import strict_json
from lorahub.bases.layout import Target
from lorahub.deltas.delta import Delta
from lorahub.deltas.kind import JSON, Group, Kind, Touch
from lorahub.errors import CannotCarry
from lorahub.files.atomic import atomic_write, new_staging, put_in_place, replace_dir, write_failed
from lorahub.files.containers import read_weights_header
from lorahub.files.digest import file_digest, tensors_digest
from lorahub.files.dtypes import from_torch, stored_shape
from lorahub.files.emit import lay_out, save_weights
from lorahub.findings import Verdict
from lorahub.formats.assembly import account, build_deltas
from lorahub.formats.format import AdapterFiles, Format, Written
from lorahub.lazy import torch
from lorahub.records import FILENAME, SCHEMA_VERSION, AdapterRecord, FileRecord, ModuleRecord
from lorahub.registry import Registry

__all__ = ["carries", "module_record", "write_folder"]

TRAINING = "lorahub.training"
"""Of a file's metadata, what going on with a training takes; see ``lorahub.training.going_on``."""


def write_folder(
    folder: Path,
    deltas: Mapping[Target, Delta],
    *,
    registry: Registry,
    format: str,  # noqa: A002 - what people call it
    hints: Mapping[str, JSON],
    record: AdapterRecord | None,
) -> Path:
    """Write deltas to ``folder``: a new one appears whole or not at all, in an old one each file is replaced whole.

    Args:
        folder: where to.
        deltas: in logical orientation.
        registry: kinds and formats.
        format: which layout.
        hints: see ``Adapter``.
        record: what ``lorahub.json`` shall say; its files, digests and arithmetic are filled in.  None: there is none.

    Raises:
        CannotCarry: the format has no word for part of it; nothing was written.
        WriteFailed: no space or no permission.
    """
    written, groups = _spelled(deltas, registry=registry, format=format, hints=hints, record=record)
    described = _described(record, groups, registry.kinds)
    metadata = {**written.metadata, "lorahub": strict_json.compact(described.maths())}
    if training := hints.get("training"):
        metadata[TRAINING] = strict_json.compact(training)
    staging = new_staging(folder)
    try:
        save_weights(staging / written.file, written.tensors, metadata)
        for name, config in written.configs.items():
            text = json.dumps(config, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
            atomic_write(staging / name, text.encode())  # not sorted: the order of patterns decides which is found
        if record is not None:
            atomic_write(staging / FILENAME, _with_digests(described, staging, written).to_json().encode())
        _put(staging, folder)
    finally:
        shutil.rmtree(staging, ignore_errors=True)  # gone by then, or what a failure left
    return folder


def carries(
    deltas: Mapping[Target, Delta],
    *,
    registry: Registry,
    format: str,  # noqa: A002 - what people call it
    hints: Mapping[str, JSON],
) -> bool:
    """Whether a format has words for all of these deltas; nothing is written."""
    try:
        _spelled(deltas, registry=registry, format=format, hints=hints, record=None)
    except CannotCarry:
        return False
    return True


def _spelled(
    deltas: Mapping[Target, Delta],
    *,
    registry: Registry,
    format: str,  # noqa: A002 - what people call it
    hints: Mapping[str, JSON],
    record: AdapterRecord | None,
) -> tuple[Written, tuple[Group, ...]]:
    """What a format makes of deltas, and the groups that it reads as; see ``write_folder``."""
    stored = _as_stored(deltas, hints, registry.kinds)
    writer = registry.format(format)
    written = writer.write(stored, tuple(registry.kinds.values()), _with_base(hints, record))
    return written, _prove(written, stored, writer, registry.kinds)


def _with_base(hints: Mapping[str, JSON], record: AdapterRecord | None) -> dict[str, JSON]:
    """The hints; of the base, the record knows best."""
    base = record.base if record else None
    if base is None or not base.repo_id:
        return dict(hints)
    return {**hints, "base_repo": base.repo_id, "base_revision": base.revision}


def _as_stored(
    deltas: Mapping[Target, Delta], hints: Mapping[str, JSON], kinds: Mapping[str, Kind]
) -> dict[Target, Delta]:
    """The deltas with replacements as the base stores them: those read as [out, in] turned back."""
    listed = hints.get("transposed")
    transposed = set(listed) if isinstance(listed, list) else set()
    result = dict(deltas)
    for target, delta in deltas.items():
        if delta.replacement() is not None and target.name in transposed:
            kind = kinds[delta.kind]
            taken = kind.dissolve({target.parameter: delta})
            assert taken is not None  # a kind takes apart what it built
            slots = {slot: each.transpose(0, 1) if each.dim() > 1 else each for slot, each in taken[0].items()}
            group = Group(module=target.module, parameter=target.parameter, kind=kind.name, slots={}, options=taken[1])
            result[target] = kind.build(group, slots)[target.parameter]
    return result


def _prove(
    written: Written, deltas: Mapping[Target, Delta], carrier: Format, kinds: Mapping[str, Kind]
) -> tuple[Group, ...]:
    """Read back what would be written, and demand the same deltas; the groups it reads as.

    Raises:
        CannotCarry: the format would lose or change something.
    """
    entries = {}
    for key, tensor in written.tensors.items():
        code = from_torch(tensor.dtype)
        entries[key] = (code, stored_shape(code, tensor.shape))
    header = lay_out(written.file, entries, written.metadata)
    numbers = {key: _bytes(tensor) for key, tensor in written.tensors.items() if tensor.numel() == 1}
    files = AdapterFiles(
        folder=Path(), headers={written.file: header}, configs=written.configs, numbers={written.file: numbers}
    )
    reading = carrier.read(files, tuple(kinds.values()), written.index)
    account(reading, header)
    worrying = [each.show() for each in reading.findings if each.level > Verdict.EXACT]
    again, _ = build_deltas(reading, written.tensors.__getitem__, kinds, written.index)
    changed = [target.name for target in {**deltas, **again} if not _equal(deltas.get(target), again.get(target))]
    if worrying or changed:
        what = worrying or [f"{len(changed)} targets would read back changed, first: {', '.join(changed[:3])}"]
        raise CannotCarry(f"the format '{carrier.name}' cannot carry this adapter: {'; '.join(what)}")
    return tuple(reading.groups)


def _bytes(tensor: torch.Tensor) -> bytes:
    """What a file holds for a tensor of one element."""
    return bytes(tensor.detach().reshape(1).view(torch.uint8).tolist())


def _equal(left: Delta | None, right: Delta | None) -> bool:
    if left is None or right is None or type(left) is not type(right):
        return False
    pairs = ((getattr(left, each.name), getattr(right, each.name)) for each in fields(left))  # type: ignore[arg-type]  # every delta is a dataclass
    return all(_same(one, other) for one, other in pairs)


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return one.dtype == other.dtype and one.shape == other.shape and _same_bits(one, other)
    return bool(one == other)


def _same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    if one.data_ptr() == other.data_ptr() and one.stride() == other.stride():
        return True
    flat = (each.detach().contiguous().view(-1).view(torch.uint8) for each in (one, other))
    return torch.equal(*flat)


def _described(record: AdapterRecord | None, groups: Sequence[Group], kinds: Mapping[str, Kind]) -> AdapterRecord:
    """The record with the arithmetic of ``groups``; a bare one where there is none."""
    start = record or AdapterRecord(schema_version=SCHEMA_VERSION, kinds=("replace",))
    return start.changed(
        kinds=sorted({group.kind for group in groups}),
        components=sorted({group.component for group in groups} - {""}) or None,
        modules=[module_record(group, kinds[group.kind].touches(group)[0]) for group in groups],
    )


def module_record(group: Group, touch: Touch, *, shape: tuple[int, ...] = ()) -> ModuleRecord:
    """What a group does to one parameter, as a record keeps it; ``shape``: of that parameter, where it is known."""
    said: dict[str, Any] = {
        "path": group.module or touch.parameter,
        "kind": group.kind,
        "component": group.component,
        "parameter": touch.parameter,
        "role": group.role,
        "rank": touch.rank,
        "scale": group.options.get("scale"),
        "scale_rule": group.options.get("scale_rule", ""),
        "alpha": group.options.get("alpha"),
        "shape": shape,
        "dtype": next(iter(sorted({ref.dtype for ref in group.slots.values()})), ""),
    }
    return ModuleRecord.checked(**{name: value for name, value in said.items() if value is not None})


def _with_digests(record: AdapterRecord, folder: Path, written: Written) -> AdapterRecord:
    files = {}
    for name in sorted([written.file, *written.configs]):
        sha256, size = file_digest(folder / name)
        files[name] = FileRecord(size=size, sha256=sha256)
    weights = folder / written.file
    return record.changed(files=files, digest={"tensors": tensors_digest(weights, read_weights_header(weights))})


def _put(staging: Path, folder: Path) -> None:
    """A new folder in one rename; into an existing one file by file, the record last: a torn set shows as stale."""
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        replace_dir(staging, folder)
        return
    try:
        for path in sorted(staging.iterdir(), key=lambda each: (each.name == FILENAME, each.name)):
            put_in_place(path, folder / path.name)
    except OSError as error:
        raise write_failed(folder, error) from None
