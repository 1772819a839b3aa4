"""A small base and its framework, as plain data, and adapters made of real deltas."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lorahub.bases.framework import BaseFiles, Edits, whole_layouts
from lorahub.bases.index import BaseIndex, BaseRef, ParameterInfo, natural
from lorahub.bases.layout import Layout, Target
from lorahub.deltas.delta import Delta
from lorahub.deltas.dora import DORA, DoRA
from lorahub.deltas.full import FULL, Full
from lorahub.deltas.ia3 import IA3, Gain
from lorahub.deltas.kind import Group, Kind, TensorRef
from lorahub.deltas.lora import LORA, LoRA
from lorahub.deltas.replace import REPLACE, Replace
from lorahub.engine.changing import launch, undo
from lorahub.engine.changing.merge import Merged, merge_into
from lorahub.engine.folding import planes
from lorahub.engine.kernels import checksum_torch, noting_torch
from lorahub.engine.kernels.choice import Choice, Native
from lorahub.engine.kernels.patches import Merge, Outcome, Patch
from lorahub.engine.kernels.tiles import Noter
from lorahub.engine.planning.casting import cast
from lorahub.engine.planning.plan import Plan, plan
from lorahub.engine.report import MergeReport
from lorahub.engine.rounding import directed, fast
from lorahub.engine.rounding.nearest import nearest
from lorahub.engine.undoing import noted
from lorahub.engine.writing.stream import stream_merge
from lorahub.files.dtypes import from_torch
from lorahub.files.header import read_header
from lorahub.files.shards import encode_index
from lorahub.files.tensors import open_weights
from lorahub.files.writer import save_file
from lorahub.findings import Finding
from lorahub.formats.format import Reading

KINDS: dict[str, Kind] = {kind.name: kind for kind in (LORA, DORA, FULL, IA3, REPLACE)}
OF = {LoRA: LORA, DoRA: DORA, Full: FULL, Gain: IA3, Replace: REPLACE}

Deltas = Mapping[str, Delta]


@dataclass
class World:
    """A base: tensors by canonical name, and what its framework declares.

    Adapters are mappings from dotted parameter names to deltas.
    """

    tensors: dict[str, torch.Tensor]
    transposed: frozenset[str] = frozenset()
    roles: dict[str, str] = field(default_factory=dict)
    tied: tuple[tuple[str, ...], ...] = ()
    extras: dict[str, torch.Tensor] = field(default_factory=dict)
    stored: dict[str, str] = field(default_factory=dict)
    layout: dict[Target, Layout] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    declared: bool = True
    head: Edits | None = None
    apart: Edits | None = None
    asked: list[tuple[Any, ...]] = field(default_factory=list)
    name: str = "shelf"

    # What a framework does.

    def layouts(self, index: BaseIndex, targets: Collection[Target]) -> dict[Target, Layout]:
        plain = whole_layouts(index, [target for target in targets if target not in self.layout])
        return plain | {target: self.layout[target] for target in targets if target in self.layout}

    def edits(self, index: BaseIndex, created: Mapping[str, Any], hints: Mapping[str, Any]) -> Edits | None:
        self.asked.append((dict(created), dict(hints)))
        return self.head

    def untie(self, index: BaseIndex, names: Collection[str]) -> Edits | None:
        self.asked.append(tuple(names))
        return self.apart

    # What a base is.

    def index(self) -> BaseIndex:
        def info(name: str, tensor: torch.Tensor) -> ParameterInfo:
            return ParameterInfo(
                shape=tuple(tensor.shape),
                dtype=from_torch(tensor.dtype),
                stored_as=self.stored.get(name, name),
                transposed=name in self.transposed,
                role=self.roles.get(name, ""),
            )

        names = sorted(self.tensors, key=natural)
        return BaseIndex(
            ref=BaseRef(repo="acme/base"),
            framework=self.name,
            parameters={name: info(name, self.tensors[name]) for name in names},
            extras={name: info(name, tensor) for name, tensor in self.extras.items()},
            tied=self.tied,
            config=self.config,
            declared=self.declared,
        )

    def live(self) -> dict[str, torch.Tensor]:
        return {name: tensor.clone() for name, tensor in self.tensors.items()}

    def save(self, folder: Path, *, shards: int = 1) -> BaseFiles:
        """The base's files, its tensors dealt out to shards in turn."""
        folder.mkdir()
        everything = {self.stored.get(name, name): tensor for name, tensor in (self.tensors | self.extras).items()}
        names = ["model.safetensors"] if shards == 1 else [f"model-{n}-of-{shards}.safetensors" for n in range(shards)]
        weight_map = {name: names[number % shards] for number, name in enumerate(everything)}
        for file in names:
            part = {name: tensor for name, tensor in everything.items() if weight_map[name] == file}
            save_file(folder / file, part, {"format": "pt"})
        others = ()
        if shards > 1:
            others = ("model.safetensors.index.json",)
            (folder / others[0]).write_bytes(encode_index(weight_map, 0))
        headers = {file: read_header(folder / file) for file in names}
        return BaseFiles(folder=folder, headers=headers, configs={"config.json": self.config}, others=others)

    # What adapters do to it.

    def plan(
        self,
        *adapters: Deltas,
        weights: Collection[float] | None = None,
        allow: Collection[str] = (),
        mode: str = "fast",
        dtype: str | None = None,
        **header: Any,
    ) -> Plan:
        weights = list(weights or [1.0] * len(adapters))
        given = {chr(97 + n): (make_header(deltas, **header), weights[n]) for n, deltas in enumerate(adapters)}
        planned = plan(self.index(), self, given, KINDS, allow=allow, mode=mode)
        return planned if dtype is None else cast(planned, self.index(), dtype)

    def merge(self, live: Mapping[str, torch.Tensor], *adapters: Deltas, threads: int = 1, **options: Any) -> Merged:
        return merge_into(live, self.plan(*adapters, **options), bring(*adapters), threads=threads)

    def demand_merged(self, live: Mapping[str, torch.Tensor], changes: Deltas) -> None:
        """Parameters hold what the float64 sums are rounded to, but for two elements in a thousand."""
        for name, change in changes.items():
            weight = self.tensors[name]
            exact = weight.double() + change.delta(weight.double())
            assert not torch.equal(live[name], weight)
            assert (live[name] != nearest(exact, weight.dtype)).double().mean() < 2e-3

    @staticmethod
    def same(live: Mapping[str, torch.Tensor], tensors: Mapping[str, torch.Tensor]) -> bool:
        return all(torch.equal(live[name], tensor) for name, tensor in tensors.items())

    def stream(
        self, files: BaseFiles, out: Path, *adapters: Deltas, threads: int = 1, companions: Any = None, **options: Any
    ) -> MergeReport:
        planned = self.plan(*adapters, **options)
        return stream_merge(files, planned, bring(*adapters), out, threads=threads, companions=companions)


def target(name: str) -> Target:
    module, _, parameter = name.rpartition(".")
    return Target("", module, parameter)


def bring(*adapters: Deltas) -> dict[str, Any]:
    """The adapters with their tensors, named a, b, c."""
    named = [{target(name): delta for name, delta in deltas.items()} for deltas in adapters]
    return {chr(97 + number): SimpleNamespace(deltas=deltas) for number, deltas in enumerate(named)}


def make_header(deltas: Deltas, *, findings: tuple[Finding, ...] = (), hints: Mapping[str, Any] | None = None) -> Any:
    """What files with these deltas would say."""
    groups = tuple(_group(name, delta) for name, delta in deltas.items())
    reading = Reading(format="test", file="adapter.safetensors", groups=groups, hints=hints or {})
    return SimpleNamespace(reading=reading, findings=findings)


def _group(name: str, delta: Delta) -> Group:
    module, _, parameter = name.rpartition(".")
    kind = OF[type(delta)]
    if isinstance(delta, Gain) and parameter == "weight" and delta.axis == 0:  # as files have it: with the bias
        dissolved = kind.dissolve({"weight": delta, "bias": Gain(delta.gain.reshape(-1), 0)})
    else:
        dissolved = kind.dissolve({"weight" if kind.name in {"lora", "dora", "ia3"} else parameter: delta})
    assert dissolved is not None
    tensors, options = dissolved
    slots = {
        slot: TensorRef(key=f"{name}.{slot}", shape=tuple(tensor.shape), dtype=from_torch(tensor.dtype))
        for slot, tensor in tensors.items()
    }
    return Group(module=module, parameter=parameter, kind=kind.name, slots=slots, options=options)


def lora(out: int, inp: int, *k: int, r: int = 4, seed: int = 0, dtype: torch.dtype = torch.float32) -> LoRA:
    """A LoRA whose change is about a twentieth of a weight of standard deviation 0.05."""
    generator = torch.Generator().manual_seed(seed)
    down = torch.randn(r, inp, *k, generator=generator) * 0.1
    up = torch.randn(out, r, *(1 for _ in k), generator=generator) * 0.1
    return LoRA(up.to(dtype), down.to(dtype), 0.25 / r**0.5)


def weights(*shape: int, seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1000 + seed)
    return (torch.randn(*shape, generator=generator) * 0.05).to(dtype)


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, by its path in it."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def survey(folder: Path) -> BaseFiles:
    """The weights files of a folder that ``World.save`` made."""
    headers = {path.name: read_header(path) for path in sorted(folder.glob("*.safetensors"))}
    return BaseFiles(folder=folder, headers=headers, configs={}, others=())


@pytest.fixture
def base() -> World:
    """Two linear layers with biases, an embedding and a norm, in bfloat16."""
    return World(
        {
            "embed.weight": weights(50, 16, seed=1),
            "layers.0.q.weight": weights(24, 16, seed=2),
            "layers.0.q.bias": weights(24, seed=3),
            "layers.1.q.weight": weights(24, 16, seed=4),
            "layers.1.q.bias": weights(24, seed=5),
            "norm.weight": weights(16, seed=6),
        },
        config={"architectures": ["Base"], "hidden_size": 16},
    )


@pytest.fixture
def as_device(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[list[Patch]]]:
    """Has weights on the CPU merged as those of a device are that has kernels; returns what they will be called with.

    The kernels are a merger, and what notes journals.
    """

    def use(merge: Callable[[Sequence[Patch]], list[Outcome]], note: Noter = noting_torch.NOTER) -> list[list[Patch]]:
        calls: list[list[Patch]] = []

        def told(patches: Sequence[Patch]) -> Merge:
            def run() -> list[Outcome]:
                calls.append(list(patches))
                return merge(patches)

            return run

        for module in (fast, directed, launch):
            monkeypatch.setattr(module, "merger", lambda *_: Choice("triton", told))
        for other in (fast, directed, planes, undo):
            monkeypatch.setattr(other, "native", lambda: Native(None, "a device is played"))
        for noting in (fast, launch, noted):
            monkeypatch.setattr(noting, "noter", lambda *_: Choice("triton", note))
        monkeypatch.setattr(undo, "summer", lambda _: Choice("triton", checksum_torch.checksums))
        return calls

    return use


@pytest.fixture
def tools() -> Any:
    """What tests build with."""
    return SimpleNamespace(
        World=World,
        lora=lora,
        weights=weights,
        target=target,
        bring=bring,
        header=make_header,
        contents=contents,
        kinds=KINDS,
        read=_read,
        survey=survey,
    )


def _read(folder: Path) -> dict[str, torch.Tensor]:
    with open_weights(folder) as source:
        return {name: source.read(name) for name in source.names()}
