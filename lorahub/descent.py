"""What adapters that are made have in common: a new folder, parents as a record names them, how they were made."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from pathlib import Path

from lorahub import __version__
from lorahub.adapter import AdapterHeader
from lorahub.deltas.kind import JSON
from lorahub.errors import WriteFailed
from lorahub.files.digest import tensors_digest
from lorahub.records import SCHEMA_VERSION, AdapterRecord

__all__ = ["derived", "new_folder", "parent", "tensors_of", "written"]


def parent(header: AdapterHeader, role: str = "", **further: JSON) -> dict[str, JSON]:
    """An adapter as a record names a parent; of a path, the last part only.

    Args:
        header: the adapter.
        role: what it was there for, where that is not plain.
        further: ``revision``, ``weight``.
    """
    known, place = header.record, Path(header.label)
    named = place.resolve().name if place.exists() else header.label
    if known and known.name:
        named = f"{known.name}@{known.version}" if known.version else known.name
    said: dict[str, JSON] = {"ref": named, "digest": tensors_of(header), "role": role, **further}
    return {name: value for name, value in said.items() if value is not None and value != ""}


def tensors_of(header: AdapterHeader) -> str | None:
    """The digest of an adapter's tensors: the recorded one, else computed; None for containers that have none."""
    known, file = header.record, header.reading.file
    if known and known.digest and known.digest.tensors:
        return known.digest.tensors
    if not file.endswith(".safetensors"):
        return None
    return tensors_digest(header.folder / file, header.files.headers[file])


def derived(
    start: AdapterRecord | None,
    method: str,
    settings: Mapping[str, JSON],
    parents: Collection[Mapping[str, JSON]],
    **recipe: JSON,
) -> AdapterRecord:
    """A record that says what was made from what; what an earlier one said stays, but for version and results.

    Args:
        start: the earlier record, or None.
        method: how it was made.
        settings: the method's parameters.
        parents: of what; see ``parent``.
        recipe: further fields of the recipe: ``seed``, ``text``, ``digest``.
    """
    begun = start or AdapterRecord(schema_version=SCHEMA_VERSION, kinds=("lora",))
    said = {name: value for name, value in recipe.items() if value is not None and value != ""}
    return begun.changed(
        version=None,
        evals=None,
        derivation=None,
        parents=list(parents),
        recipe={"method": method, "params": dict(settings), "tool": "lorahub", "tool_version": __version__, **said},
    )


def new_folder(out: str | os.PathLike[str]) -> Path:
    """The folder for a result, which must not hold anything yet.

    Raises:
        WriteFailed: it is there, and not empty.
    """
    folder = Path(out)
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise WriteFailed(f"{folder} exists", "name a new folder, or remove it yourself")
    return folder


def written(folder: Path) -> int:
    """Bytes of the weights in a folder."""
    return sum(path.stat().st_size for path in folder.iterdir() if path.suffix in (".safetensors", ".npz", ".gguf"))
