"""llama.cpp's LoRA adapters: one ``.gguf`` file with ``general.type`` = "adapter".

``blk.0.attn_q.weight.lora_a`` is the down factor, ``.lora_b`` the up factor, and ``token_embd``'s are the other way
round.  The scale is ``adapter.lora.alpha`` over each tensor's own rank, or 1 where alpha is 0.  llama.cpp has names of
its own for modules and, in some architectures, an order of its own for the rows of queries and keys: with a base both
become the base's; without one they stay as in the file.  Quantised factors are read where float32 holds their values.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import final

from lorahub.bases.index import BaseIndex
from lorahub.bases.layout import Target
from lorahub.deltas.delta import Delta
from lorahub.deltas.kind import JSON, Group, Kind, TensorRef
from lorahub.errors import IntegrityError, UnsupportedFormat, UnsupportedKind
from lorahub.files.dtypes import DTYPES
from lorahub.files.gguf import EXACT
from lorahub.files.grammar import show
from lorahub.files.header import Header
from lorahub.findings import Claim, Finding, Verdict
from lorahub.formats.experts import in_base
from lorahub.formats.format import AdapterFiles, Format, Reading, Written, one_of
from lorahub.formats.gguf.names import GgufStems
from lorahub.formats.gguf.notes import about_base, about_invocation, about_names, about_norms
from lorahub.formats.gguf.tables import (
    ALPHA,
    ARCHITECTURE,
    EMBEDDING,
    EXACT_ALPHA,
    EXPERTS,
    LINEAR,
    PAIRED,
    ROTATED,
    TOKENS,
    TYPE,
)
from lorahub.formats.gguf.write import write
from lorahub.formats.rope import heads_of, to_halves
from lorahub.formats.suffixes import Row, group_suffixes, unknown_keys
from lorahub.hookspecs import hookimpl

__all__ = ["GgufFormat", "lorahub_formats"]

_REPO = "general.base_model.0.repo_url"
_HUB = "https://huggingface.co/"


@final
class GgufFormat:
    """Reads and writes llama.cpp's adapters."""

    name = "gguf"
    rows = (*LINEAR, *EMBEDDING, *EXPERTS)

    def claims(self, files: AdapterFiles) -> Claim | None:
        """Sure of every GGUF file; ``read`` says of those that are no adapters what they are."""
        for header in _of_gguf(files).values():
            return Claim(1.0, f"a GGUF file of type {header.metadata.get(TYPE, 'model')!r}")
        return None

    def read(self, files: AdapterFiles, kinds: Sequence[Kind], index: BaseIndex | None) -> Reading:
        """Account for every key.

        Raises:
            UnsupportedFormat: it is a model, or several files could be meant, or the base's architecture is another.
            UnsupportedKind: it is a control vector, or an adapter of another type.
            IntegrityError: alpha is no finite number.
            MissingDependency: a base is given, and the gguf package, which knows the names, is not installed.
        """
        found = _of_gguf(files)
        if len(found) > 1:
            raise UnsupportedFormat(
                f"{files.folder} holds several weights files: {', '.join(sorted(found))}",
                one_of(files, found),
            )
        ((file, header),) = found.items()
        _demand_adapter(header, str(files.folder / file))
        architecture = header.metadata.get(ARCHITECTURE, "")
        stems = GgufStems(index, architecture)
        findings = about_base(architecture, index)
        logical, quantised = _unpacked(header)
        norms = [key for key, info in header.tensors.items() if key.endswith("_norm.weight") and len(info.shape) == 1]
        grouped = group_suffixes(
            logical,
            {key: key for key in header.tensors if key not in norms},
            lambda module: _rows(header, module),
            kinds,
            stems,
            _Scale(header.metadata),
        )
        groups, moved = _in_base_order(_experts(grouped.groups, stems, index), architecture, index)
        roles: dict[str, JSON] = {
            Target(group.component, group.module, group.parameter).name: group.role for group in groups if group.role
        }
        hints: dict[str, JSON] = {"gguf_architecture": architecture, **({"roles": roles} if roles else {})}
        return Reading(
            format=self.name,
            file=file,
            groups=groups,
            findings=(
                *grouped.findings,
                *unknown_keys(grouped.unknown, "are no factors of LoRA"),
                *findings,
                *moved,
                *quantised,
                *about_norms(norms),
                *about_invocation(header.metadata),
            ),
            base_repo=_base_repo(header),
            hints=hints,
        )

    def write(self, deltas: Mapping[Target, Delta], kinds: Sequence[Kind], hints: Mapping[str, JSON]) -> Written:
        """Spell the deltas as llama.cpp's ``convert_lora_to_gguf.py`` would; see ``lorahub.formats.gguf.write``."""
        return write(deltas, {kind.name: kind for kind in kinds}, hints)


def _of_gguf(files: AdapterFiles) -> dict[str, Header]:
    return {name: header for name, header in files.headers.items() if name.lower().endswith(".gguf")}


def _demand_adapter(header: Header, where: str) -> None:
    said = header.metadata
    if said.get(ARCHITECTURE) == "controlvector":
        raise UnsupportedKind(f"{where} is a control vector: it is added to hidden states and changes no weight")
    if said.get(TYPE) != "adapter":
        raise UnsupportedFormat(
            f"{where} is a GGUF {said.get(TYPE, 'model')} of architecture {said.get(ARCHITECTURE, 'unknown')}, not an "
            "adapter",
            "give the adapter's own file",
        )
    if said.get("adapter.type", "lora") != "lora":
        raise UnsupportedKind(f"{where} is an adapter of type {said['adapter.type']!r}, and llama.cpp knows only lora")


class _Scale:
    """llama.cpp's rule: alpha over the rank of each tensor; 1 where alpha is 0 or missing."""

    def __init__(self, said: Mapping[str, str]) -> None:
        self.alpha = _number(said, ALPHA)
        exact = _number(said, EXACT_ALPHA)
        if exact and abs(exact - self.alpha) > 2**-22 * abs(exact):
            raise IntegrityError(
                f"{ALPHA} is {self.alpha!r}, and {EXACT_ALPHA} {exact!r} is no more precise form of it"
            )
        self.alpha = exact or self.alpha

    def __call__(self, _kind: str, module: str, slots: Mapping[str, TensorRef]) -> dict[str, JSON]:
        rank = slots["down"].shape[-2]
        if not rank:
            raise IntegrityError(f"the factors of {module} have no rank")
        if not self.alpha:
            return {"scale": 1.0, "scale_rule": "1, since alpha is 0", "rank": rank}
        return {"scale": self.alpha / rank, "scale_rule": "alpha/r", "alpha": self.alpha, "rank": rank}


def _number(said: Mapping[str, str], key: str) -> float:
    text = said.get(key, "0")
    try:
        value = float(text[:_DIGITS])
    except ValueError:
        value = math.nan
    if not math.isfinite(value) or len(text) > _DIGITS:
        raise IntegrityError(f"{key} is {show(text)}, not a number", "fetch it again, or ask its author")
    return value


_DIGITS = 40
"""Characters of the longest number in double precision, and some."""


def _base_repo(header: Header) -> str:
    """The repository that the converter names, or ""."""
    url = header.metadata.get(_REPO, "")
    repo = url.removeprefix(_HUB)
    return repo if url.startswith(_HUB) and repo.count("/") == 1 and repo.isprintable() and " " not in repo else ""


def _unpacked(header: Header) -> tuple[Header, list[Finding]]:
    """The header as it reads, quantised tensors as float32; and what is to be said of those."""
    packed = {key: info.dtype for key, info in header.tensors.items() if info.dtype not in DTYPES}
    if not packed:
        return header, []
    tensors = {key: replace(info, dtype="F32") if key in packed else info for key, info in header.tensors.items()}
    exact = [key for key, dtype in packed.items() if dtype in EXACT]
    rounded = [key for key in packed if key not in exact]
    findings = []
    if exact:
        findings.append(
            Finding(
                code="tensor-quantised",
                axis="format",
                level=Verdict.EXACT,
                message=f"{len(exact)} tensors are stored as {_listed(packed, exact)}: their values read as float32",
                where=tuple(exact),
            )
        )
    if rounded:
        findings.append(
            Finding(
                code="tensor-quantised",
                axis="format",
                level=Verdict.INCOMPATIBLE,
                message=f"{len(rounded)} tensors are stored as {_listed(packed, rounded)}, whose values float32 cannot "
                "hold exactly",
                where=tuple(rounded),
                remedy="convert the adapter it was made from again: convert_lora_to_gguf.py --outtype f16",
            )
        )
    return replace(header, tensors=MappingProxyType(tensors)), findings


def _listed(dtypes: Mapping[str, str], keys: Sequence[str]) -> str:
    return ", ".join(sorted({dtypes[key] for key in keys}))


def _rows(header: Header, module: str) -> tuple[Row, ...]:
    if module == TOKENS:
        return EMBEDDING
    up = header.tensors.get(f"{module}.weight.lora_b")
    return EXPERTS if up and len(up.shape) == 3 else LINEAR


def _experts(groups: Sequence[Group], stems: GgufStems, index: BaseIndex | None) -> list[Group]:
    """Stacks of experts under the base's names, one group for each expert where the base has modules for each."""
    result = []
    for group in groups:
        found = stems.experts.get(group.module) if group.kind == EXPERTS[0].kind else None
        if found is None:
            result.append(group)
            continue
        result += in_base(replace(group, module=found[0], parameter=found[1]), index)
    return result


def _in_base_order(
    groups: Sequence[Group], architecture: str, index: BaseIndex | None
) -> tuple[tuple[Group, ...], list[Finding]]:
    """The groups with the rows of queries and keys as the base has them, where a base is known."""
    if index is None:
        return tuple(groups), about_names(groups)
    paired = PAIRED.get(architecture)
    heads = heads_of(index.config) if paired else None
    result, lost = [], []
    for group in groups:
        up = group.slots["up"]
        last = up.key.removesuffix(".weight.lora_b").rpartition(".")[2]
        if paired is False or last not in ROTATED or group.role:
            result.append(group)
            continue
        rows = to_halves(up.shape[0], heads[ROTATED[last]]) if heads else None
        if rows is None:
            lost.append(up.key)
            rows = ()
        result.append(replace(group, slots={**group.slots, "up": replace(up, rows=rows)}))
    if not lost:
        return tuple(result), []
    why = (
        "the base's config does not say how many heads fit them"
        if paired
        else f"lorahub does not know whether llama.cpp moves them in the architecture {architecture!r}"
    )
    finding = Finding(
        code="row-order-unknown",
        axis="format",
        level=Verdict.INCOMPATIBLE,
        message=f"llama.cpp keeps the rows of queries and keys in an order of its own, and {why}",
        where=tuple(lost),
        remedy="use the adapter that it was converted from",
    )
    return tuple(result), [finding]


@hookimpl
def lorahub_formats() -> list[Format]:
    """llama.cpp's adapters."""
    return [GgufFormat()]
