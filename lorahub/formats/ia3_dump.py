"""Gains of (IA)³ without a config: T-Few's ``multi_lora_b``, and PEFT's ``ia3_l`` out of a model's memory.

https://github.com/r-three/t-few.  There is no alpha to miss, and the shape tells whether a gain is on outputs
``[out, 1]`` or inputs ``[1, in]``, so nothing but the keys is needed.  T-Few names modules as the base does; other keys
are parameters saved whole.  Read only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import final

from lorahub.bases.index import BaseIndex
from lorahub.bases.layout import Target
from lorahub.deltas.delta import Delta
from lorahub.deltas.ia3 import options as gain_options
from lorahub.deltas.kind import JSON, Kind, Leaf, TensorRef
from lorahub.errors import CannotCarry, UnsupportedKind
from lorahub.findings import Claim
from lorahub.formats.comfy import only_file
from lorahub.formats.format import AdapterFiles, Format, Reading, Written
from lorahub.formats.marks import Mark
from lorahub.formats.peft.keys import PREFIX, Stems
from lorahub.formats.plain import about_config, is_plain, whole_parameters
from lorahub.formats.suffixes import Row, group_suffixes, unknown_keys
from lorahub.hookspecs import hookimpl

__all__ = ["Ia3DumpFormat", "lorahub_formats"]

_OUT, _IN = "multi_lora_b", "multi_lora_a"
_SPELLED = (_OUT, _IN, "ia3_l", "ia3_l.default")


_GAINS = Mark(ends=tuple(f".{suffix}" for suffix in _SPELLED))


@final
class Ia3DumpFormat:
    """Reads gains that have no config."""

    name = "ia3-dump"
    rows = tuple(Row(kind="ia3", leaves=(Leaf(slot="gain", suffix=suffix),)) for suffix in _SPELLED)
    writes: frozenset[str] = frozenset()

    def claims(self, files: AdapterFiles) -> Claim | None:
        """By the ends of names, where no config says what they are."""
        if not is_plain(files):
            return None
        if _GAINS.on(files.headers.values()):
            return Claim(0.6, "tensor names end as gains of (IA)³ do")
        return None

    def read(self, files: AdapterFiles, kinds: Sequence[Kind], index: BaseIndex | None) -> Reading:
        """Account for every key.

        Raises:
            UnsupportedFormat: several files could hold the weights.
        """
        file = only_file(files)
        header = files.headers[file]
        stems = Stems(index)
        ends = tuple(f".{suffix}" for suffix in _SPELLED)
        paths = {key: key.removeprefix(PREFIX) for key in header.tensors if key.endswith(ends)}
        spelled = set(paths.values())

        def options(_kind: str, module: str, slots: Mapping[str, TensorRef]) -> dict[str, JSON]:
            if {f"{module}.{_OUT}", f"{module}.{_IN}"} <= spelled:
                raise UnsupportedKind(f"{module} has gains on outputs and inputs at once, which no kind here has")
            return gain_options({}, module, slots)

        grouped = group_suffixes(header, paths, lambda _: self.rows, kinds, stems, options)
        whole, left = whole_parameters(
            header, [key for key in header.tensors if key not in paths], stems, grouped.groups
        )
        return Reading(
            format=self.name,
            file=file,
            groups=(*grouped.groups, *whole),
            findings=(
                *grouped.findings,
                *unknown_keys([*grouped.unknown, *left], "are no gain and no parameter of a module"),
                *about_config(files, ()),
            ),
        )

    def write(self, deltas: Mapping[Target, Delta], kinds: Sequence[Kind], hints: Mapping[str, JSON]) -> Written:
        """Refused.

        Raises:
            CannotCarry: always.
        """
        raise CannotCarry("the format 'ia3-dump' is read only", "write another: peft")


@hookimpl
def lorahub_formats() -> list[Format]:
    """Gains without a config."""
    return [Ia3DumpFormat()]
