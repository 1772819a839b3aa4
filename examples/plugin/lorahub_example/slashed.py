"""An example of a format: ``shift.json`` beside a safetensors file of keys such as ``layers/0/q/shift``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import final

from lorahub import hookimpl
from lorahub.bases.index import BaseIndex
from lorahub.bases.layout import Target
from lorahub.deltas.delta import Delta
from lorahub.deltas.kind import JSON, Group, Kind, TensorRef
from lorahub.errors import CannotCarry
from lorahub.findings import Claim
from lorahub.formats.format import AdapterFiles, Format, Reading, Written
from lorahub.formats.gather import Stem, Trouble, gather, ways_of

CONFIG = "shift.json"
FILE = "shift.safetensors"


@final
class SlashedFormat:
    """Reads and writes module paths with slashes."""

    name = "slashed"

    def claims(self, files: AdapterFiles) -> Claim | None:
        """Sure where its config lies beside its weights."""
        return Claim(1.0, f"there is a {CONFIG}") if CONFIG in files.configs and FILE in files.headers else None

    def read(self, files: AdapterFiles, kinds: Sequence[Kind], index: BaseIndex | None) -> Reading:
        """Account for every key: a slot of a kind, or a finding."""
        header, trouble = files.headers[FILE], Trouble()
        ways = ways_of(self.name, {}, kinds)
        suffixes = {leaf.suffix for _, spelling in ways for leaf in spelling.leaves}
        modules: dict[str, dict[str, str]] = {}
        unknown = []
        for key in header.tensors:
            path, _, suffix = key.rpartition("/")
            if path and suffix in suffixes:
                modules.setdefault(path.replace("/", "."), {})[suffix] = key
            else:
                unknown.append(key)
        stems = [
            Stem(component="", module=module, keys=keys, numbers=files.configs[CONFIG])
            for module, keys in modules.items()
        ]
        groups = gather(stems, ways, header, trouble)
        if unknown:
            trouble.add("key-unknown", unknown, unknown[0])
        return Reading(format=self.name, file=FILE, groups=groups, findings=trouble.findings())

    def write(self, deltas: Mapping[Target, Delta], kinds: Sequence[Kind], hints: Mapping[str, JSON]) -> Written:
        """Spell what the kinds with a spelling here can take apart.

        Raises:
            CannotCarry: naming every target that no such kind knows.
        """
        ways = ways_of(self.name, {}, kinds)
        tensors, groups, lost, config = {}, {}, [], {}
        for target, delta in deltas.items():
            for kind, spelling in ways:
                if (taken := kind.dissolve({target.parameter: delta})) is not None and not target.component:
                    stem = target.module.replace(".", "/")
                    tensors |= {f"{stem}/{leaf.suffix}": taken[0][leaf.slot] for leaf in spelling.leaves}
                    slots = {
                        slot: TensorRef(key=slot, shape=tuple(each.shape), dtype="F32")
                        for slot, each in taken[0].items()
                    }
                    groups[target.module] = Group(module=target.module, kind=kind.name, slots=slots, options=taken[1])
                    config |= spelling.config(groups)
                    break
            else:
                lost.append(target.name)
        if lost:
            raise CannotCarry(f"the format 'slashed' has no word for {', '.join(lost)}")
        return Written(file=FILE, tensors=tensors, metadata={}, configs={CONFIG: config})


@hookimpl
def lorahub_formats() -> list[Format]:
    """One format."""
    return [SlashedFormat()]
