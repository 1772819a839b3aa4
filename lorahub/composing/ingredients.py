"""What goes into a composition, opened: each adapter fetched, read, held against the others and against the base.

From headers alone; deltas are read when they are asked for.  An adapter that was made in memory is taken as it is.
"""

from __future__ import annotations

import threading
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from lorahub import checks
from lorahub.adapter import Adapter, AdapterHeader, open_deltas, open_header
from lorahub.bases.index import BaseIndex
from lorahub.bases.layout import Target
from lorahub.composition.gathering import Weights
from lorahub.composition.together import together
from lorahub.conversion.settled import Settled, settled
from lorahub.conversion.weights import BaseWeights
from lorahub.deltas.delta import Delta
from lorahub.deltas.disputes import Compat
from lorahub.deltas.kind import JSON
from lorahub.descent import parent, tensors_of
from lorahub.errors import BaseNeeded
from lorahub.fetching import Progress, as_ref, pull
from lorahub.files.tensors import DictSource
from lorahub.findings import Finding
from lorahub.hub.hub import Pin
from lorahub.lazy import torch
from lorahub.merging.preparing import prepare
from lorahub.names import Ref
from lorahub.opening import Base
from lorahub.records import AdapterRecord
from lorahub.registry import Registry
from lorahub.sources import Given, header_of

__all__ = ["Held", "Opened", "base_weights", "holding", "judge", "open_one"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Opened:
    """One adapter of a composition.

    Attributes:
        label: what people call it.
        header: its files; None for one that was made in memory.
        adapter: the one that was given open, or None.
        pin: what of a hub it is, or None.
        requested: what was asked for, as text.
        home: it under the base's names, or None without a base; ``header`` is its.
    """

    label: str
    header: AdapterHeader | None
    adapter: Adapter | None = None
    pin: Pin | None = None
    requested: str = ""
    home: Settled | None = None

    @property
    def record(self) -> AdapterRecord | None:
        """What is recorded of it."""
        return self.header.record if self.header else self.adapter.record if self.adapter else None

    @property
    def hints(self) -> Mapping[str, JSON]:
        """What its format said that no delta holds."""
        if self.adapter is not None:
            return self.adapter.hints
        assert self.header is not None  # one of the two is there
        reading = self.header.reading
        base = {"base_repo": reading.base_repo, "base_revision": reading.base_revision}
        hints = {**reading.hints, **{name: value for name, value in base.items() if value}}
        return self.home.hints(hints) if self.home else hints

    @property
    def moved(self) -> bool:
        """Whether the base has some of what it changes under other names."""
        return self.home is not None and self.home.moved

    @property
    def format(self) -> str | None:
        """Its format, or None for one that was made in memory."""
        return self.header.format if self.header else None

    def without(self, base: Base | None) -> frozenset[Target]:
        """Targets that it names in case a base has them, as IA3 does biases, and this one does not."""
        if base is None or self.header is None:
            return frozenset()
        optional = {target for target, touch in self.header.touches.items() if touch.if_present}
        return frozenset(optional - base.framework.layouts(base.index, optional).keys())

    def parent(self, content: str, weight: float | None) -> dict[str, JSON]:
        """It as a record names a parent."""
        revision = self.pin.commit if self.pin else None
        if self.header is not None:
            return parent(self.header, revision=revision, weight=weight)
        said: dict[str, JSON] = {"ref": self.label, "digest": content, "weight": weight}
        return {name: value for name, value in said.items() if value is not None}


def open_one(
    source: Given,
    registry: Registry,
    *,
    label: str,
    hub: str | None,
    base: Base | None,
    compat: Compat | None,
    progress: Progress,
) -> Opened:
    """Fetch one adapter and read its header, under the base's names where there is one.

    Raises:
        NotFound, Unavailable, UnsupportedFormat, IntegrityError: see ``lorahub.load``.
    """
    index = base.index if base else None
    one = _read(source, registry, label=label, hub=hub, index=index, compat=compat, progress=progress)
    if base is None or one.header is None or one.adapter is not None:
        return one
    home = settled(one.header, base.index, base.framework, registry.kinds)
    return replace(one, header=home.header, home=home)


def _read(
    source: Given,
    registry: Registry,
    *,
    label: str,
    hub: str | None,
    index: BaseIndex | None,
    compat: Compat | None,
    progress: Progress,
) -> Opened:
    if isinstance(source, Adapter):
        if source.header is None:
            return Opened(label=label, header=None, adapter=source, requested=label)
        header = header_of(source, registry, hub=hub, progress=progress, index=index, compat=compat)
        own = source if header is source.header else None
        return Opened(label=label, header=header, adapter=own, requested=label)
    if isinstance(source, AdapterHeader):
        header = header_of(source, registry, hub=hub, progress=progress, index=index, compat=compat)
        return Opened(label=label, header=header, requested=label)
    ref = as_ref(source)
    if ref.path is not None:
        header = header_of(
            replace(ref, weight=None, name=None), registry, hub=hub, progress=progress, index=index, compat=compat
        )
        return Opened(label=label, header=header, requested=Path(ref.path).name)
    pulled = pull(Ref(repo=ref.repo, selector=ref.selector, subpath=ref.subpath), hub=hub, progress=progress)
    header = open_header(
        pulled.folder, registry, index=index, weight_name=pulled.pin.file, label=str(pulled.pin), compat=compat
    )
    return Opened(label=label, header=header, pin=pulled.pin, requested=str(replace(ref, name=None, weight=None)))


def judge(
    opened: Sequence[Opened], base: Base | None, *, allow: Collection[str], compat: str | None
) -> tuple[Finding, ...]:
    """Hold the adapters against each other, and against the base where there is one; what there is to say.

    Raises:
        Degraded, Incompatible, BaseMismatch, IntegrityError: something stops that ``allow`` does not name.
        BaseNeeded: new values are the one way round in one adapter, and may be the other in another.
    """
    headers = [each.header for each in opened if each.header is not None]
    if base is None:
        _demand_one_way(opened)
    findings: list[Finding] = [*together(headers)]
    for each in opened:
        if each.header is None:
            continue
        own = each.header.findings
        if base is not None:
            own = prepare(base, {each.label: each.header}, weights=[1.0], allow=allow, compat=compat).findings
        findings += own
        checks.refuse(own, allowed=allow, subject=f"{each.label} in a composition")
    checks.refuse(findings, allowed=allow, subject=" with ".join(each.label for each in opened))
    return tuple(dict.fromkeys(findings))


def _demand_one_way(opened: Sequence[Opened]) -> None:
    """Refuse new values of which only some were read against the base, where that stores them [in, out].

    Raises:
        BaseNeeded: there are such; which way round the others are is not known.
    """
    turned = [set(listed) if isinstance(listed := each.hints.get("transposed"), list) else set() for each in opened]
    for each, own in zip(opened, turned, strict=True):
        touches = each.header.touches if each.header is not None else {}
        for name in set().union(*turned) - own:
            if any(target.name == name and touch.replaces for target, touch in touches.items()):
                raise BaseNeeded(
                    f"{name}: another adapter was read against a base that stores it [in, out], and {each.label} "
                    "was not",
                    "name the base: --base FOLDER",
                )


@dataclass(frozen=True, slots=True, kw_only=True)
class Held:
    """An adapter whose tensors can be asked for.

    Attributes:
        deltas: target -> change.
        content: the digest of its tensors; what it draws from.
    """

    deltas: Mapping[Target, Delta]
    content: str


@contextmanager
def holding(opened: Sequence[Opened], registry: Registry) -> Iterator[list[Held]]:
    """The adapters' deltas, read as they are asked for, as long as the files are open."""
    with ExitStack() as stack:
        held = []
        for each in opened:
            content = tensors_of(each.header) if each.header else None
            if each.adapter is not None:
                held.append(Held(deltas=each.adapter.deltas, content=content or _content(each.adapter)))
                continue
            assert each.header is not None  # one of the two is there
            reader = stack.enter_context(open_deltas(each.header, registry, kept=0))
            deltas = each.home.deltas(reader.deltas) if each.home else reader.deltas
            held.append(Held(deltas=deltas, content=content or reader.content))
        yield held


def _content(adapter: Adapter) -> str:
    tensors = {
        f"{target.name} {name}": tensor.detach()
        for target, delta in adapter.deltas.items()
        for name, tensor in delta.tensors().items()
    }
    return DictSource(tensors).digest()


@contextmanager
def base_weights(base: Base | None, held: Sequence[Held]) -> Iterator[Weights | None]:
    """The base's weights by target, and those of siblings that changes may look at; None without a base."""
    if base is None:
        yield None
        return
    targets = {target for each in held for target in each.deltas}
    siblings = {replace(target, parameter=name) for target in targets for name in ("weight", "bias")}
    layouts = base.framework.layouts(base.index, {*targets, *siblings})
    lock = threading.Lock()  # files are opened at their first tensor, and several threads ask
    with base.tensors() as read:
        weights = BaseWeights(base.index, layouts, read)

        def weight(target: Target) -> torch.Tensor | None:
            with lock:
                return weights.weight(target)

        yield weight
