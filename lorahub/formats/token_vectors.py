"""Token vectors that travel inside an adapter: ``bundle_emb.<token>.<text encoder>``, as OneTrainer bundles them.

A trained token is no weight change: a tokenizer gains a word, and a text encoder a row or an output for it.  So they
are parts.  Knows names in a header; no kinds.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from lorahub.bases.index import natural
from lorahub.deltas.kind import TensorRef
from lorahub.files.header import Header
from lorahub.findings import Finding, Verdict
from lorahub.formats.format import Part
from lorahub.formats.marks import Mark

__all__ = ["KIND", "REASON", "bundled", "left_out", "part_of"]

KIND = "textual-inversion"
REASON = "it gives a text encoder vectors for a new word of its tokenizer, and changes no weight"

_BUNDLE = "bundle_emb."
_OLD = ".string_to_param.*"
"""How a bundle ends that was made for a model with one text encoder."""


_BUNDLED = Mark(begins=(_BUNDLE,))


def bundled(header: Header) -> dict[str, Part]:
    """Token -> its vectors, by the name of the part; empty where nothing is bundled."""
    tokens: dict[str, list[str]] = {}
    if not _BUNDLED.on([header]):
        return {}
    for key in header.tensors:
        token = key.removesuffix(_OLD) if key.endswith(_OLD) else key.rpartition(".")[0]
        if key.startswith(_BUNDLE) and len(token) > len(_BUNDLE):
            tokens.setdefault(token.removeprefix(_BUNDLE), []).append(key)
    return {token: part_of(header, keys) for token, keys in sorted(tokens.items())}


def part_of(header: Header, keys: Iterable[str]) -> Part:
    """Some tensors of a file as the vectors of one token."""
    tensors = {key: header.tensors[key] for key in keys}
    return Part(
        kind=KIND,
        reason=REASON,
        tensors={key: TensorRef(key=key, shape=info.shape, dtype=info.dtype) for key, info in tensors.items()},
    )


def left_out(parts: Mapping[str, Part], *, others: bool) -> Sequence[Finding]:
    """What to say of token vectors that stand beside weight changes, or alone; nothing where there are none.

    Args:
        parts: by token.
        others: whether the file changes weights besides.
    """
    if not parts:
        return ()
    names = ", ".join(sorted(parts, key=natural)[:3])
    return (
        Finding(
            code="kind-unsupported",
            axis="format",
            level=Verdict.DEGRADED if others else Verdict.INCOMPATIBLE,
            message=f"a merge would leave out the vectors of {len(parts)} words ({names}): {REASON}"
            if others
            else f"this is a textual inversion ({names}), which cannot be merged: {REASON}",
            where=tuple(ref.key for part in parts.values() for ref in part.tensors.values()),
            remedy="to merge the rest: --allow kind-unsupported" if others else "load it beside the model it is for",
            allowable=others,
        ),
    )
