"""What there is to say of a llama.cpp adapter besides its factors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from lorahub.bases.index import BaseIndex
from lorahub.deltas.kind import Group
from lorahub.findings import Finding, Verdict
from lorahub.formats.gguf.names import architecture_of

__all__ = ["about_base", "about_invocation", "about_names", "about_norms"]

_INVOCATION = "adapter.alora.invocation_tokens"


def about_base(architecture: str, index: BaseIndex | None) -> list[Finding]:
    """A base of another architecture, which llama.cpp itself would refuse."""
    wanted = architecture_of(index.config) if index else ""
    if not wanted or wanted == architecture:
        return []
    return [
        Finding(
            code="base-architecture",
            axis="base",
            level=Verdict.INCOMPATIBLE,
            message=f"the adapter is for models of llama.cpp's architecture {architecture!r}, the base is {wanted!r}",
        )
    ]


def about_names(groups: Sequence[Group]) -> list[Finding]:
    """Names and rows that stayed as in the file, for want of a base."""
    if not groups:
        return []
    return [
        Finding(
            code="names-of-llama-cpp",
            axis="format",
            level=Verdict.EXACT,
            message="modules have llama.cpp's names, and rows its order; with a base both become the base's",
            remedy="give the base: --base BASE",
        )
    ]


def about_norms(keys: Sequence[str]) -> list[Finding]:
    """Norm vectors that some tools put beside the factors."""
    if not keys:
        return []
    return [
        Finding(
            code="norm-left-out",
            axis="format",
            level=Verdict.UNVERIFIED,
            message=f"the file brings {len(keys)} whole norm vectors, which llama.cpp leaves out, and so does lorahub",
            where=tuple(keys),
        )
    ]


def about_invocation(said: Mapping[str, str]) -> list[Finding]:
    """An adapter that acts only after certain tokens."""
    if said.get(_INVOCATION, "[]") == "[]":
        return []
    return [
        Finding(
            code="config-refused",
            axis="format",
            level=Verdict.INCOMPATIBLE,
            message=f"{_INVOCATION} cannot be honoured, because the adapter acts only on tokens after an invocation "
            "string, which no change of weights can do",
            where=(_INVOCATION,),
        )
    ]
