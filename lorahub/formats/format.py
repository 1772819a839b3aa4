"""The format protocol: how adapter files are recognised, read as slots, and written.

A format is tables and look-ups over headers; it renames, transposes and slices, and never computes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Protocol

from lorahub.bases.index import BaseIndex
from lorahub.bases.layout import Target
from lorahub.deltas.delta import Delta
from lorahub.deltas.disputes import Compat
from lorahub.deltas.kind import JSON, Group, Kind, TensorRef
from lorahub.files.header import Header
from lorahub.findings import Claim, Finding
from lorahub.lazy import torch

__all__ = ["AdapterFiles", "Format", "Part", "Reading", "Written", "one_of"]


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterFiles:
    """What lies in an adapter folder, headers and configs only.

    Attributes:
        folder: where it lies.
        headers: weights file name -> header, in whatever container it is.
        configs: JSON file name -> parsed object (``adapter_config.json``, ``lorahub.json``).
        others: every other file name.
        numbers: weights file -> tensor of one element -> its bytes, for files that are not on disk yet; a format that
            keeps numbers as tensors reads those of all other files from ``folder``.
        compat: whose result counts where PEFT's is not the declared one; None: nobody chose.
    """

    folder: Path
    headers: Mapping[str, Header]
    configs: Mapping[str, Mapping[str, JSON]]
    others: tuple[str, ...] = ()
    numbers: Mapping[str, Mapping[str, bytes]] = field(default_factory=lambda: MappingProxyType({}))
    compat: Compat | None = None


def one_of(files: AdapterFiles, names: Iterable[str]) -> str:
    """What to do where several weights files could be meant, as a hint."""
    first = min(names, default="FILE")
    return f"name the one that is meant: {files.folder / first}, or in Python weight_name={first!r}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """Something an adapter carries that is no weight change: prompts, prefixes, token vectors.

    Attributes:
        kind: what it is ("prompt-tuning").
        reason: why it cannot be merged, as a sentence.
        tensors: name -> where it is in the file.
    """

    kind: str
    reason: str
    tensors: Mapping[str, TensorRef]


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """What a format made of some files: every key is in exactly one group, shared slot, part or finding.

    Attributes:
        format: the format's name.
        file: the weights file's name.
        groups: one per module and kind, modules as spelled (or canonical where an index was given and they resolved).
        shared: (kind, slot) -> tensor used by all groups of the kind.
        parts: by name.
        findings: unknown keys, unknown or refused config fields, conflicts.
        base_repo / base_revision: what the files say of their base; "" where they say nothing or a local path.
        hints: metadata worth keeping in a record (peft_version, task_type, ...).
    """

    format: str
    file: str
    groups: Sequence[Group]
    shared: Mapping[tuple[str, str], TensorRef] = field(default_factory=lambda: MappingProxyType({}))
    parts: Mapping[str, Part] = field(default_factory=lambda: MappingProxyType({}))
    findings: tuple[Finding, ...] = ()
    base_repo: str = ""
    base_revision: str = ""
    hints: Mapping[str, JSON] = field(default_factory=lambda: MappingProxyType({}))


@dataclass(frozen=True, slots=True, kw_only=True)
class Written:
    """What a format wants on disk: the weights file's name and tensors by key (in order), and JSON files by name.

    The file's suffix says which container it is (see ``lorahub.files.containers``).  ``index`` is what the spelling
    took for granted of the base, its names and config, where the files read back as the same deltas only with it.
    """

    file: str
    tensors: Mapping[str, torch.Tensor]
    metadata: Mapping[str, str]
    configs: Mapping[str, Mapping[str, JSON]]
    index: BaseIndex | None = None


class Format(Protocol):
    """One on-disk layout of adapters."""

    @property
    def name(self) -> str:
        """Unique, lower case: "peft"."""

    def claims(self, files: AdapterFiles) -> Claim | None:
        """How sure this format is that the files are its own; None: they are not."""

    def read(self, files: AdapterFiles, kinds: Sequence[Kind], index: BaseIndex | None) -> Reading:
        """Account for every key; with ``index``, stems are looked up among the base's names and become canonical.

        Raises:
            IntegrityError: the files contradict themselves (config rank against tensor rank, half a pair of factors).
        """

    def write(self, deltas: Mapping[Target, Delta], kinds: Sequence[Kind], hints: Mapping[str, JSON]) -> Written:
        """Spell the deltas in this format.

        Raises:
            CannotCarry: listing every target the format has no word for.
        """
