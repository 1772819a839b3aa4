"""Laws 7 and 8, over every registered format and kind: what is written reads back bit for bit, or is refused."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

import pytest
import torch

from lorahub.bases.layout import Target
from lorahub.deltas.delta import Delta
from lorahub.deltas.kind import JSON, Kind
from lorahub.errors import BaseMismatch, CannotCarry
from lorahub.files.header import read_header
from lorahub.files.tensors import FileSource
from lorahub.files.writer import save_file
from lorahub.formats.assembly import build_deltas
from lorahub.formats.format import AdapterFiles, Format
from lorahub.plugins import Registry, load_registry

REGISTRY = load_registry()
SHAPES = ((8, 6), (5, 5), (6, 4, 3), (4, 6, 3, 2), (4, 3, 2, 2, 2), (8,))
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
PAIRS = [
    pytest.param(each, kind, id=f"{each.name}-{kind.name}")
    for each in REGISTRY.formats.values()
    for kind in REGISTRY.kinds.values()
]


def adapters(kind: Kind, dtype: torch.dtype) -> Iterator[tuple[dict[Target, Delta], dict[str, JSON]]]:
    """Adapters of one and of three modules, from examples of every class on every shape, without and with roles."""
    for shape in SHAPES:
        generator = torch.Generator().manual_seed(len(shape))
        for cls in kind.deltas:
            try:
                examples = [_cast(cls.example(shape, r=2, generator=generator), dtype) for _ in range(3)]
            except BaseMismatch:
                continue
            both = [("weight", "bias")] if len(shape) > 1 else []
            for parameters in (("weight",), ("bias",), *both):
                deltas = {
                    Target("", module, parameter): delta
                    for module, delta in zip(("layers.2.q", "layers.10.k", "head"), examples, strict=True)
                    for parameter in parameters
                }
                modules = dict.fromkeys(target.module for target in deltas)
                alone = ({target: each for target, each in deltas.items() if target.module == one} for one in modules)
                for chosen in (deltas, *alone):
                    roles: dict[str, JSON] = {target.name: "embedding" for target in chosen}
                    yield chosen, {}
                    yield chosen, {"roles": roles}


def _cast(delta: Delta, dtype: torch.dtype) -> Delta:
    values = {field.name: getattr(delta, field.name) for field in fields(delta)}  # type: ignore[arg-type]
    tensors = {name: tensor.to(dtype) for name, tensor in delta.tensors().items()}
    return type(delta)(**(values | tensors))


def same(one: Delta | None, other: Delta | None) -> bool:
    if type(one) is not type(other) or one is None or other is None:
        return False
    for field in fields(one):  # type: ignore[arg-type]  # every delta is a dataclass
        ours, theirs = getattr(one, field.name), getattr(other, field.name)
        if isinstance(ours, torch.Tensor) and isinstance(theirs, torch.Tensor):
            if ours.dtype != theirs.dtype or not torch.equal(ours, theirs):
                return False
        elif ours != theirs:
            return False
    return True


def _declared(carrier: Format, kind: Kind) -> bool:
    return any(spelling.format == carrier.name for spelling in kind.spellings)


@pytest.mark.parametrize(("carrier", "kind"), PAIRS)
def test_what_a_format_writes_it_reads_back_bit_for_bit_or_it_refuses(
    carrier: Format, kind: Kind, tmp_path: Path
) -> None:
    spelled = kind.name in getattr(carrier, "writes", ()) or _declared(carrier, kind)
    assert {dtype: _carried(carrier, kind, dtype, tmp_path) > 0 for dtype in DTYPES} == dict.fromkeys(DTYPES, spelled)


def _carried(carrier: Format, kind: Kind, dtype: torch.dtype, tmp_path: Path) -> int:
    """How many adapters the format takes; each of them reads back as it was."""
    kinds = tuple(REGISTRY.kinds.values())
    carried = 0
    for deltas, hints in adapters(kind, dtype):
        try:
            written = carrier.write(deltas, kinds, hints)
        except CannotCarry:
            continue
        carried += 1
        save_file(tmp_path / written.file, written.tensors, written.metadata)
        header = read_header(tmp_path / written.file)
        files = AdapterFiles(folder=tmp_path, headers={written.file: header}, configs=written.configs)
        reading = carrier.read(files, kinds, None)
        assert reading.findings == (), dtype
        with FileSource(tmp_path / written.file) as source:
            again, _ = build_deltas(reading, source.read, REGISTRY.kinds, None)
        changed = [target.name for target in deltas | again if not same(deltas.get(target), again.get(target))]
        assert changed == [], dtype
    return carried


@pytest.mark.parametrize("carrier", REGISTRY.formats.values(), ids=REGISTRY.formats)
def test_no_format_spells_two_slots_alike(carrier: Format, registry: Registry) -> None:
    spellings = [
        (kind, spelling)
        for kind in registry.kinds.values()
        for spelling in kind.spellings
        if spelling.format == carrier.name
    ]
    assert spellings or hasattr(carrier, "rows")  # empty where all that it reads is no weight change
    for row in getattr(carrier, "rows", ()):  # a format with a table of its own
        endings = [leaf.suffix for leaf in row.leaves]
        assert len(set(endings)) == len(endings), row.kind
        assert {leaf.slot for leaf in row.leaves} <= {slot.name for slot in registry.kind(row.kind).slots}
    for kind, spelling in spellings:
        suffixes = [(leaf.suffix, kind.slot(leaf.slot).shared) for leaf in spelling.leaves]
        assert len(set(suffixes)) == len(suffixes), kind.name
        for other, theirs in spellings:
            if other.name != kind.name and theirs.tag == spelling.tag:
                # Whether a module's factors are for a stack of experts, the config says and no name.
                shared = {leaf.suffix: (leaf.slot, leaf.transposed) for leaf in theirs.leaves}
                ours = {leaf.suffix: (leaf.slot, leaf.transposed) for leaf in spelling.leaves}
                both = shared.keys() & ours.keys()
                assert {suffix: shared[suffix] for suffix in both} == {suffix: ours[suffix] for suffix in both}
