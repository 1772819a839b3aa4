"""Tensors of a PEFT file that are no slots: whole parameters that replace the base's.

PEFT writes them without saying what they are: modules of ``modules_to_save``, biases trained along, embeddings of a
changed vocabulary.  The config tells them apart; a tensor that it does not explain is left over.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace

from lorahub.bases.index import BaseIndex, natural
from lorahub.deltas.kind import JSON, Group
from lorahub.files.header import Header
from lorahub.findings import Axis, Finding, Verdict
from lorahub.formats.peft.config import kept_by, names, trains_biases
from lorahub.formats.peft.groups import tensor_ref
from lorahub.formats.peft.keys import ORIGINAL, SAVED, WRAPPED, Bare, Names, Stems
from lorahub.formats.peft.tying import ties_saved

__all__ = ["Bared", "group_bare"]

_EMBEDDINGS = ("embed_tokens", "lm_head")
"""Modules that PEFT saves whole, without a word in the config, where the vocabulary was resized."""


_HEADS: Mapping[str, tuple[str, ...]] = {
    "QUESTION_ANS": ("qa_outputs",),
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
}
"""``task_type`` -> what PEFT adds to ``modules_to_save`` when it wraps a model; early configs do not say so."""


@dataclass(frozen=True, slots=True)
class Bared:
    """Whole parameters, findings about keys that need none or have one already, and keys that nothing explains."""

    groups: tuple[Group, ...]
    findings: tuple[Finding, ...]
    unknown: tuple[str, ...]


def group_bare(
    found: Names, header: Header, config: Mapping[str, JSON], stems: Stems, index: BaseIndex | None
) -> Bared:
    """One "replace" group for each tensor that the config explains.

    Raises:
        IntegrityError: ``modules_to_save`` is no list of names.
    """
    entries, biases = (*names(config, "modules_to_save"), *_heads(config)), trains_biases(config)
    tied = ties_saved(config)
    plain = {(bare.module, bare.parameter) for bare in found.bare.values() if not bare.wrapper}
    reasons: dict[str, list[str]] = {}
    groups: dict[tuple[str, str], Group] = {}
    for key, bare in sorted(found.bare.items(), key=lambda item: natural(item[0])):
        code = _explain(bare, found.factors, entries, biases=biases, plain=plain)
        module = stems.find(bare.module) or bare.module
        if code in _TAKEN and (module, bare.parameter) in groups:
            code = "key-twice"
        if code in _TAKEN:
            groups[module, bare.parameter] = Group(
                module=module,
                parameter=bare.parameter,
                kind="replace",
                slots={"value": tensor_ref(header, key)},
                options={"tied": True} if tied and bare.parameter == "weight" else {},
            )
        reasons.setdefault(code, []).append(key)
    findings = [replace(_TEXTS[code], where=tuple(keys)) for code, keys in sorted(reasons.items()) if code in _TEXTS]
    if wrapped := reasons.get("base-weight"):
        findings.append(_base_weights(wrapped, found, header, stems, index))
    return Bared(tuple(groups.values()), tuple(findings), tuple(reasons.get("", ())))


def _heads(config: Mapping[str, JSON]) -> tuple[str, ...]:
    """The modules that PEFT's model class for the task keeps, whether or not the config lists them."""
    task = config.get("task_type")
    return _HEADS.get(task, ()) if isinstance(task, str) else ()


_TAKEN = ("saved", "saved-infix", "embedding")


def _explain(
    bare: Bare, targeted: Collection[str], entries: tuple[str, ...], *, biases: bool, plain: set[tuple[str, str]]
) -> str:
    """What a tensor is there for; "" where nothing says so."""
    if bare.wrapper == ORIGINAL:
        return "original-module"
    if bare.wrapper == SAVED:
        return "saved-twice" if (bare.module, bare.parameter) in plain else "saved-infix"
    inside = any(bare.module.startswith(f"{stem}.") for stem in targeted) and bare.module not in targeted
    if bare.parameter == "bias" and biases and not inside:
        return "saved"
    if bare.wrapper == WRAPPED:
        return "base-weight" if bare.parameter == "weight" and bare.module in targeted else ""
    if kept_by(bare.module, entries):
        return "saved"
    return "embedding" if bare.parameter == "weight" and bare.module.rpartition(".")[2] in _EMBEDDINGS else ""


def _finding(code: str, level: Verdict, message: str, axis: Axis = "format", remedy: str = "") -> Finding:
    return Finding(
        code=code, axis=axis, level=level, message=message, remedy=remedy, allowable=level is Verdict.DEGRADED
    )


_TEXTS: Mapping[str, Finding] = {
    "original-module": _finding(
        "original-module",
        Verdict.EXACT,
        "the file keeps a copy of what modules_to_save replaced; nothing uses it",
    ),
    "saved-twice": _finding(
        "modules-to-save-twice",
        Verdict.EXACT,
        "PEFT saved biases of modules_to_save a second time; it never reads that copy, nor does lorahub",
    ),
    "saved-infix": _finding(
        "modules-to-save-in-key",
        Verdict.EXACT,
        "tensors are named as in a model's memory, with modules_to_save inside the name",
    ),
    "embedding": _finding(
        "embedding-included",
        Verdict.EXACT,
        "the file brings whole embeddings, as PEFT saves them for a changed vocabulary; they replace the base's",
    ),
    "key-twice": _finding(
        "key-twice", Verdict.INCOMPATIBLE, "two tensors want to replace one parameter", axis="integrity"
    ),
}


def _base_weights(keys: list[str], found: Names, header: Header, stems: Stems, index: BaseIndex | None) -> Finding:
    """Copies of the base's own weight below adapted modules: PEFT adds them for embeddings among the targets."""
    resized = []
    for key in keys:
        module = stems.find(found.bare[key].module)
        base = index.parameters.get(f"{module}.weight") if index and module else None
        if base is not None and base.shape != header.tensors[key].shape:
            resized.append(f"{key} is {list(header.tensors[key].shape)}, the base has {list(base.shape)}")
    if resized:
        finding = _finding(
            "embedding-included",
            Verdict.DEGRADED,
            f"the file brings the weight that an adapted module had in training, of another shape: {resized[0]}",
            remedy="use a base with the vocabulary of training",
        )
    else:
        finding = _finding(
            "embedding-included",
            Verdict.UNVERIFIED,
            f"the file brings a copy of the base's own weight for {len(keys)} adapted modules; the base's is used "
            "instead, which is the same where the base is the one of training",
        )
    return replace(finding, where=tuple(keys))
