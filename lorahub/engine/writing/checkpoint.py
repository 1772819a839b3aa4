"""The files of a merged checkpoint, laid out before a byte is read: which tensor lies where, and what it is made from.

The base's shards, names and order are kept; what is new goes to the last shard, and copies of repeated layers to that
of their source.  Knows headers; no tensors.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from lorahub.bases.framework import BaseFiles
from lorahub.engine.planning.plan import Plan
from lorahub.engine.planning.steps import Form, Step
from lorahub.errors import IntegrityError, UsageError
from lorahub.files.header import TensorInfo
from lorahub.files.shards import encode_index
from lorahub.files.writer import usual_order

__all__ = ["Copy", "Shard", "index_files", "lay_out"]

_INDEX = ".safetensors.index.json"


@dataclass(frozen=True, slots=True)
class Copy:
    """A tensor of the base that goes along as bytes: its file, and its name there."""

    file: str
    name: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Shard:
    """One weights file of the result.

    Attributes:
        name: its file name.
        entries: saved name -> (dtype code, stored shape), in the order of their bytes.
        copies: saved name -> what is copied there.
        steps: saved name -> (step that makes it, file that its source lies in or "").
        metadata: of its header, as in the base.
        prefix: of a pipeline, what saved names begin with here and not in the file.
    """

    name: str
    entries: Mapping[str, tuple[str, Sequence[int]]]
    copies: Mapping[str, Copy]
    steps: Mapping[str, tuple[Step, str]]
    metadata: Mapping[str, str]
    prefix: str = ""

    @property
    def nbytes(self) -> int:
        """Bytes of all its tensors."""
        return sum(Form(tuple(shape), dtype).nbytes for dtype, shape in self.entries.values())


def lay_out(files: BaseFiles, plan: Plan) -> tuple[Shard, ...]:
    """The weights files of the result, in the order of their names; those that end up empty are left out.

    Raises:
        IntegrityError: the files are not those of the base that the plan was made for.
        UsageError: the base has no weights, or two tensors would have one name.
    """
    if not files.headers:
        raise UsageError(f"{files.folder} holds no safetensors files, so there is nothing to merge into")
    where = {name: file for file, header in files.headers.items() for name in header.tensors}
    _demand_planned(files, plan, where)
    in_place = {step.stored_as: step for step in plan.steps if step.stored_as and step.source == step.out}
    beside = [step for step in plan.steps if in_place.get(step.stored_as) is not step]
    made = {step.saved_as for step in plan.steps}
    shards = []
    for file in sorted(files.headers):
        shard = _Draft(file)
        for name, info in files.headers[file].tensors.items():
            step = in_place.get(name)
            if step:
                shard.add(step.saved_as, step.after, step=(step, file))
            elif name not in plan.dropped and (saved := plan.renamed.get(name, name)) not in made:
                shard.add(saved, Form(info.shape, info.dtype), copy=Copy(file, name))
        for step in (step for step in beside if _home(step, plan, where, files) == file):
            copied = not step.terms and step.stored_as and step.before == step.after  # untied as it is
            source = where.get(step.stored_as, "")
            if copied:
                shard.add(step.saved_as, step.after, copy=Copy(source, step.stored_as))
            else:
                shard.add(step.saved_as, step.after, step=(step, source))
        shards.append(shard.done(files))
    _demand_distinct(shards)
    return tuple(shard for shard in shards if shard.entries)


def _home(step: Step, plan: Plan, where: Mapping[str, str], files: BaseFiles) -> str:
    """The file for what has no place in the base's: the last, of a pipeline's the last of that component."""
    own = [file for file in files.headers if step.saved_as.startswith(files.prefix(file))]
    last = max(own or files.headers)
    moved = plan.repeated is not None and plan.repeated.layers.number(step.out) is not None
    return where.get(step.stored_as, last) if moved else last


class _Draft:
    """A shard that is being laid out."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.entries: dict[str, tuple[str, Sequence[int]]] = {}
        self.copies: dict[str, Copy] = {}
        self.steps: dict[str, tuple[Step, str]] = {}

    def add(self, name: str, form: Form, *, copy: Copy | None = None, step: tuple[Step, str] | None = None) -> None:
        if name in self.entries:
            raise UsageError(f"two tensors of the result would be called {name}")
        self.entries[name] = (form.dtype, form.shape)
        if copy:
            self.copies[name] = copy
        if step:
            self.steps[name] = step

    def done(self, files: BaseFiles) -> Shard:
        header = files.headers[self.name]
        before = [(info.dtype, tuple(info.shape)) for info in header.tensors.values()]
        same = before == [(dtype, tuple(shape)) for dtype, shape in self.entries.values()]
        return Shard(
            name=self.name,
            entries=MappingProxyType(self.entries if same else usual_order(self.entries)),  # aligned in either case
            copies=MappingProxyType(self.copies),
            steps=MappingProxyType(self.steps),
            metadata=header.metadata,
            prefix=files.prefix(self.name),
        )


def _demand_planned(files: BaseFiles, plan: Plan, where: Mapping[str, str]) -> None:
    for step in plan.steps:
        if not step.stored_as:
            continue
        file = where.get(step.stored_as)
        info: TensorInfo | None = files.headers[file].tensors[step.stored_as] if file else None
        found = Form(tuple(info.shape), info.dtype) if info else None
        if found != step.before:
            raise IntegrityError(
                f"the plan expects {step.stored_as} {step.before} in {files.folder} and finds {found or 'none'}",
                "the base changed since it was planned: plan again",
            )


def _demand_distinct(shards: Sequence[Shard]) -> None:
    seen: dict[str, str] = {}
    for shard in shards:
        for name in shard.entries:
            if name in seen:
                raise UsageError(f"two tensors of the result would be called {name}, in {seen[name]} and {shard.name}")
            seen[name] = shard.name


def index_files(files: BaseFiles, shards: Sequence[Shard]) -> dict[str, bytes]:
    """Index file name -> its content, where the base has one or the result several files; one for each component."""
    if not files.parts:
        found = _index(files, shards, "")
        return dict([found]) if found else {}
    result: dict[str, bytes] = {}
    for component, part in files.parts.items():
        own = [shard for shard in shards if shard.prefix == f"{component}."]
        if found := _index(part, own, f"{component}/"):
            result[f"{component}/{found[0]}"] = found[1]
    return result


def _index(files: BaseFiles, shards: Sequence[Shard], folder: str) -> tuple[str, bytes] | None:
    names = sorted(name for name in (*files.configs, *files.others) if name.endswith(_INDEX) and "/" not in name)
    if not names and len(shards) < 2:
        return None
    weight_map = {
        name.removeprefix(shard.prefix): shard.name.removeprefix(folder) for shard in shards for name in shard.entries
    }
    return names[0] if names else f"model{_INDEX}", encode_index(weight_map, sum(shard.nbytes for shard in shards))
