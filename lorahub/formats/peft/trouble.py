"""What is wrong with modules of a PEFT file, collected while they are gone through, as findings in the end."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import final

from lorahub.deltas.kind import TensorRef
from lorahub.findings import Axis, Finding, Verdict
from lorahub.formats.peft.config import CONFIG
from lorahub.formats.peft.keys import Names

__all__ = ["Trouble"]

_SHARDED = (
    "sharded training (DeepSpeed ZeRO-3, FSDP) leaves such pieces where the weights were not gathered before saving: "
    "gather them and save the adapter again"
)


@final
class Trouble:
    """What is wrong, by code: the keys concerned and the first case in words."""

    _TEXTS: Mapping[str, tuple[str, str]] = {
        "config-contradicts-tensors": (
            f"{CONFIG} and the tensors contradict each other",
            f"correct {CONFIG} where it is known to be wrong; else fetch both files again, or ask their author",
        ),
        "config-unreadable": (f"{CONFIG} uses what is not understood here", ""),
        "base-needed": ("the keys leave out which parameter is meant", "name the base: --base BASE"),
        "key-twice": ("two keys say the same", ""),
        "parameter-ambiguous": ("it cannot be told which parameter is meant, or which way round it is", ""),
        "slot-misfit": ("tensors of one module do not fit together", "fetch the file again, or ask its author"),
        "slot-missing": ("part of a module's tensors is missing", "fetch the file again, or ask its author"),
        "tensor-empty": ("tensors are empty or flat", _SHARDED),
    }

    def __init__(self) -> None:
        self._found: dict[str, tuple[list[str], list[str]]] = {}

    def add(self, code: str, keys: Collection[str], what: str) -> None:
        """Note one case."""
        cases, where = self._found.setdefault(code, ([], []))
        cases.append(what)
        where.extend(keys)

    def add_unused(self, found: Names, shared: Mapping[tuple[str, str], TensorRef]) -> None:
        """Note what no module uses, and keys that say what another has said."""
        used = {ref.key for ref in shared.values()}
        for key in found.shared.values():
            if key not in used:
                self.add("slot-missing", [key], f"{key} is shared by modules, and no module uses it")
        for key in found.again:
            self.add("key-twice", [key], f"{key} and another key both name one slot")

    def findings(self) -> list[Finding]:
        """One for each code, sorted."""
        result = []
        for code, (cases, where) in sorted(self._found.items()):
            text, remedy = self._TEXTS[code]
            more = f" (and {count - 1} more like it)" if (count := len(set(cases))) > 1 else ""
            result.append(
                Finding(
                    code=code,
                    axis=_AXES.get(code, "integrity"),
                    level=Verdict.UNVERIFIED if code == "base-needed" else Verdict.INCOMPATIBLE,
                    message=f"{text}: {cases[0]}{more}",
                    where=tuple(sorted(where)),
                    remedy=remedy,
                )
            )
        return result


_AXES: Mapping[str, Axis] = {"base-needed": "base", "config-unreadable": "format", "parameter-ambiguous": "placement"}
"""Code -> the axis of its finding, where that is not integrity."""
