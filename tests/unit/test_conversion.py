"""Conversion: renames are bit-equal, rewritings are exact, losses are told, and nothing is half written."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import lorahub
from lorahub.adapter import Adapter, load, open_header, save
from lorahub.bases.framework import Framework, whole_layouts
from lorahub.bases.index import BaseIndex, BaseRef, ParameterInfo
from lorahub.bases.layout import Layout, Piece, Region, Target
from lorahub.composition.truncate import Budget
from lorahub.conversion.change import Change, Origin, Weight
from lorahub.conversion.folding import fold
from lorahub.conversion.fused import land, trimmed
from lorahub.conversion.losses import told
from lorahub.conversion.rewrite import REWRITINGS, Obstacle, rewrite
from lorahub.conversion.unify import ladder, one_rank, one_scale
from lorahub.conversion.verify import difference, same
from lorahub.deltas.adalora import AdaLoRA
from lorahub.deltas.decomposed import DoLoHa
from lorahub.deltas.delta import Delta
from lorahub.deltas.dora import DoRA
from lorahub.deltas.full import Full
from lorahub.deltas.kind import JSON
from lorahub.deltas.locon import LoCon
from lorahub.deltas.loha import LoHa
from lorahub.deltas.lokr import LoKr
from lorahub.deltas.lora import LoRA
from lorahub.deltas.miss import MiSS
from lorahub.deltas.replace import Replace
from lorahub.deltas.vera import VeRA
from lorahub.errors import BaseMismatch, CannotCarry, Degraded, UsageError, WriteFailed
from lorahub.findings import Finding, Verdict
from lorahub.plugins import Registry, load_registry
from lorahub.records import AdapterRecord
from lorahub.saving import write_folder
from lorahub.sources import Base

REGISTRY = load_registry()
NOWHERE: Weight = lambda _: None  # noqa: E731 - no base
MODULES = ("model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.v_proj", "model.layers.1.self_attn.q_proj")
OUT, IN, RANK = 36, 36, 2


def drawn(*size: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed)).to(dtype)


def lora(seed: int = 0, *, out: int = OUT, into: int = IN, rank: int = RANK, scale: float = 1.5) -> LoRA:
    return LoRA(drawn(out, rank, seed=seed), drawn(rank, into, seed=seed + 50), scale)


def write(folder: Path, deltas: Mapping[Target, Delta], format: str = "peft", **hints: JSON) -> Path:  # noqa: A002
    return write_folder(folder, deltas, registry=REGISTRY, format=format, hints=hints, record=None)


def on(*deltas: Delta, component: str = "", modules: Sequence[str] = MODULES) -> dict[Target, Delta]:
    return {Target(component, module, "weight"): delta for module, delta in zip(modules, deltas, strict=False)}


def read(place: Path) -> Adapter:
    return load(open_header(place, REGISTRY), REGISTRY)


def change_of(delta: Delta, shape: tuple[int, ...] = (OUT, IN)) -> np.ndarray[Any, np.dtype[np.float64]]:
    """What a LoRA does, by a loop over its rank."""
    assert isinstance(delta, LoRA)
    up, down = delta.up.flatten(1).double().numpy(), delta.down.flatten(1).double().numpy()
    total = np.zeros((up.shape[0], down.shape[1]))
    for k in range(up.shape[1]):
        total += np.outer(up[:, k], down[k])
    return (delta.scale * total).reshape(shape)


def close(found: Any, expected: Any, bound: float = 1e-6) -> None:
    assert np.linalg.norm(expected) > 1e-2
    assert np.linalg.norm(found - expected) <= bound * np.linalg.norm(expected)


# Round trips


def takes(name: str, deltas: Mapping[Target, Delta]) -> bool:
    try:
        REGISTRY.formats[name].write(deltas, tuple(REGISTRY.kinds.values()), {})
    except CannotCarry:
        return False
    return True


def examples(kind: str) -> Iterator[dict[Target, Delta]]:
    """Adapters of three modules: each of its own, then such as have the same options or share tensors."""
    for seeds in ((0, 1, 2), *((seed,) * 3 for seed in range(12))):
        made = []
        for seed in seeds:
            generator = torch.Generator().manual_seed(seed)
            delta = REGISTRY.kinds[kind].deltas[0].example((OUT, IN), r=RANK, generator=generator)
            made.append(replace(delta, axis=0) if isinstance(delta, DoRA) else delta)
        yield on(*made)


def sample(kind: str) -> tuple[dict[Target, Delta], tuple[str, ...]]:
    """The example that most formats take, and which do; none where a kind has no example on a square matrix."""
    try:
        tried = [(deltas, tuple(name for name in REGISTRY.formats if takes(name, deltas))) for deltas in examples(kind)]
    except BaseMismatch:
        return {}, ()
    return max(tried, key=lambda each: len(each[1]))


SAMPLES = {kind: sample(kind) for kind in REGISTRY.kinds}
CARRIED = {(name, kind) for kind, (_, names) in SAMPLES.items() for name in names}
ROUND_TRIPS = sorted(
    (kind, one, other) for one, kind in CARRIED for other, same_kind in CARRIED if same_kind == kind and one != other
)


def test_the_formats_of_the_lossless_matrix_are_all_in_the_round_trips() -> None:
    expected = {("lora", each) for each in ("peft", "diffusers", "kohya", "mlx")}
    expected |= {("dora", each) for each in ("peft", "diffusers", "kohya", "mlx")}
    expected |= {(kind, each) for kind in ("loha", "lokr") for each in ("peft", "kohya")}
    assert expected <= {(kind, name) for name, kind in CARRIED}


@pytest.mark.parametrize(("kind", "one", "other"), ROUND_TRIPS)
def test_there_and_back_again_is_bit_identical(kind: str, one: str, other: str, tmp_path: Path) -> None:
    deltas, _ = SAMPLES[kind]
    write(tmp_path / "start", deltas, one)
    report = lorahub.convert(tmp_path / "start", other, tmp_path / "there")
    assert (dict(report.rules), report.max_error, report.unverified) == ({"rename": len(deltas)}, 0.0, 0)
    lorahub.convert(tmp_path / "there", one, tmp_path / "back")
    start, again = read(tmp_path / "start").deltas, read(tmp_path / "back").deltas
    assert start.keys() == again.keys()
    assert all(same(start[target], again[target]) for target in start)
    weights = {path.name for path in (tmp_path / "start").iterdir()} & {
        path.name for path in (tmp_path / "back").iterdir()
    }
    assert weights


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("to", ["diffusers", "kohya", "mlx"])
def test_numbers_keep_their_type(to: str, dtype: torch.dtype, tmp_path: Path) -> None:
    deltas = on(*(replace(each, up=each.up.to(dtype), down=each.down.to(dtype)) for each in map(lora, range(3))))
    write(tmp_path / "peft", deltas)
    lorahub.convert(tmp_path / "peft", to, tmp_path / "there")
    lorahub.convert(tmp_path / "there", "peft", tmp_path / "back")
    one, other = (load_file(tmp_path / each / "adapter_model.safetensors") for each in ("peft", "back"))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) and other[key].dtype == dtype for key in one)


# Closed forms, against loops


def test_loha_becomes_lora_of_the_product_of_its_ranks(tmp_path: Path) -> None:
    a, b, c, d = drawn(24, 2, seed=1), drawn(2, 20, seed=2), drawn(24, 2, seed=3), drawn(2, 20, seed=4)
    write(tmp_path / "loha", on(LoHa(a, b, c, d, 0.7)))
    report = lorahub.convert(tmp_path / "loha", "diffusers", tmp_path / "out")
    (delta,) = read(tmp_path / "out").deltas.values()
    first, second = (
        np.array([[sum(x[o, k] * y[k, i] for k in range(2)) for i in range(20)] for o in range(24)])
        for x, y in ((a.double().numpy(), b.double().numpy()), (c.double().numpy(), d.double().numpy()))
    )
    close(change_of(delta, (24, 20)), 0.7 * first * second)
    assert dict(report.rules) == {"loha-to-lora": 1}
    assert [(each.rank_before, each.rank_after) for each in report.targets] == [(2, 4)]
    assert report.max_error is not None
    assert 0 < report.max_error <= 1e-6


def test_loha_whose_product_of_ranks_is_not_low_is_still_exact(tmp_path: Path) -> None:
    a, b, c, d = drawn(10, 4, seed=1), drawn(4, 8, seed=2), drawn(10, 4, seed=3), drawn(4, 8, seed=4)
    write(tmp_path / "loha", on(LoHa(a, b, c, d, 0.7)))
    lorahub.convert(tmp_path / "loha", "mlx", tmp_path / "out")
    (delta,) = read(tmp_path / "out").deltas.values()
    assert isinstance(delta, LoRA)
    assert delta.down.shape[0] == 8
    close(change_of(delta, (10, 8)), 0.7 * (a @ b).double().numpy() * (c @ d).double().numpy())


def test_lokr_becomes_lora_of_the_product_of_its_sides_ranks(tmp_path: Path) -> None:
    w1, a, b = drawn(3, 4, seed=1), drawn(8, 2, seed=2), drawn(2, 6, seed=3)
    write(tmp_path / "lokr", on(LoKr(scale=0.5, w1=w1, w2_a=a, w2_b=b)), "kohya")
    lorahub.convert(tmp_path / "lokr", "diffusers", tmp_path / "out")
    (delta,) = read(tmp_path / "out").deltas.values()
    assert isinstance(delta, LoRA)
    assert delta.down.shape[0] == 3 * 2
    close(change_of(delta, (24, 24)), 0.5 * np.kron(w1.double().numpy(), (a.double() @ b.double()).numpy()))


def test_a_tucker_core_becomes_a_plain_convolution_of_the_same_rank(tmp_path: Path) -> None:
    up, mid, down = drawn(6, 2, 1, 1, seed=1), drawn(2, 2, 3, 3, seed=2), drawn(2, 5, 1, 1, seed=3)
    write(tmp_path / "locon", on(LoCon(up, mid, down, 0.25)), "kohya")
    lorahub.convert(tmp_path / "locon", "peft", tmp_path / "out")
    (delta,) = read(tmp_path / "out").deltas.values()
    assert isinstance(delta, LoRA)
    assert (delta.up.shape, delta.down.shape) == ((6, 2, 1, 1), (2, 5, 3, 3))
    expected = np.zeros((6, 5, 3, 3))
    u, m, d = up.double().numpy(), mid.double().numpy(), down.double().numpy()
    for o in range(6):
        for i in range(5):
            for r in range(2):
                for s in range(2):
                    expected[o, i] += u[o, r, 0, 0] * m[r, s] * d[s, i, 0, 0]
    close(change_of(delta, (6, 5, 3, 3)), 0.25 * expected)


def start(delta: Delta, shape: tuple[int, ...] | None = None) -> Change:
    target = Target("", "m", "weight")
    return Change(target=target, delta=delta, origins=(Origin(target=target),), shape=shape)


def test_vera_takes_its_vectors_into_the_factors() -> None:
    gain, mix, up, down = drawn(5, seed=1), drawn(3, seed=2), drawn(9, 3, seed=3), drawn(3, 9, seed=4)
    found = rewrite(start(VeRA(gain, mix, up, down), (5, 7)), NOWHERE).delta
    expected = np.array(
        [[float(gain[o]) * sum(float(up[o, k] * mix[k]) * float(down[k, i]) for k in range(3)) for i in range(7)]
         for o in range(5)]
    )  # fmt: skip
    close(change_of(found, (5, 7)), expected)


def test_miss_is_lora_of_its_native_rank() -> None:
    block = drawn(3, 8, seed=1)
    found = rewrite(start(MiSS(block), (8, 10)), NOWHERE).delta
    assert isinstance(found, LoRA)
    assert found.down.shape[0] == 3
    expected = np.array([[float(block[i % 3, o]) for i in range(10)] for o in range(8)])
    close(change_of(found, (8, 10)), expected, 1e-15)


def test_dora_over_another_kind_is_dora_over_lora(tmp_path: Path) -> None:
    inner = LoHa(drawn(24, 2, seed=1), drawn(2, 20, seed=2), drawn(24, 2, seed=3), drawn(2, 20, seed=4), 0.7)
    lengths = drawn(24, seed=5).abs() + 1
    dressed = DoLoHa(inner.w1_a, inner.w1_b, inner.w2_a, inner.w2_b, 0.7, lengths[:, None], 0)
    write(tmp_path / "kohya", on(dressed), "kohya")
    base = based({f"{MODULES[0]}.weight": (24, 20)}, {})
    report = lorahub.convert(tmp_path / "kohya", "peft", tmp_path / "out", base=base)
    assert report.rules == {"dora-loha-to-dora": 1}
    (delta,) = read(tmp_path / "out").deltas.values()
    assert isinstance(delta, DoRA)
    weight = drawn(24, 20, seed=6).double().numpy()
    moved = weight + 0.7 * (inner.w1_a @ inner.w1_b).double().numpy() * (inner.w2_a @ inner.w2_b).double().numpy()
    expected = lengths.double().numpy()[:, None] * moved / np.linalg.norm(moved, axis=1, keepdims=True) - weight
    close(delta.delta(torch.from_numpy(weight)).numpy(), expected)


def test_a_format_that_is_only_read_says_so_at_once(tmp_path: Path) -> None:
    write(tmp_path / "peft", on(lora(1)))
    with pytest.raises(CannotCarry, match="read only"):
        lorahub.convert(tmp_path / "peft", "xlabs", tmp_path / "out")


def test_what_does_not_say_how_large_it_is_asks_for_the_base() -> None:
    with pytest.raises(Obstacle) as stop:
        rewrite(start(MiSS(drawn(3, 8))), NOWHERE)
    assert stop.value.remedy == "--base BASE"


@pytest.mark.parametrize("kind", REWRITINGS)
def test_every_rewriting_of_the_table_is_the_same_change(kind: str) -> None:
    tried = 0
    for cls in REGISTRY.kinds[kind].deltas:
        for shape in ((24, 20), (6, 5, 3, 3)):
            generator = torch.Generator().manual_seed(1)
            try:
                delta = cls.example(shape, r=2, generator=generator)
                plain = rewrite(start(delta, shape), NOWHERE).delta
            except (BaseMismatch, Obstacle):
                continue
            tried += 1
            zero = torch.zeros(shape, dtype=torch.float64)
            close(change_of(plain, shape), delta.delta(zero).numpy())
    assert tried


def test_pruned_singular_values_leave_a_lora_that_does_nothing() -> None:
    pruned = AdaLoRA(up=drawn(4, 0), down=drawn(0, 6), values=drawn(0, 1), scale=1.0)
    found = rewrite(start(pruned), NOWHERE).delta
    assert isinstance(found, LoRA)
    assert (found.down.shape, int(found.up.count_nonzero())) == ((1, 6), 0)


# Scales


def test_a_power_of_two_folds_into_sixteen_bits_and_anything_else_into_thirty_two() -> None:
    numbers = drawn(50, dtype=torch.bfloat16)
    assert fold(numbers, 0.25).dtype == torch.bfloat16
    assert torch.equal(fold(numbers, 0.25).double(), numbers.double() * 0.25)
    third = fold(numbers, 1 / 3)
    assert third.dtype == torch.float32
    assert torch.equal(third, (numbers.double() / 3).float())
    tiny = torch.tensor([2**-24], dtype=torch.float16)  # the smallest there is: half of it would be lost
    assert float(fold(tiny, 0.5)) == 2**-25


def test_mlx_gets_one_scale_and_one_rank(tmp_path: Path) -> None:
    deltas = on(lora(1, scale=2.0), lora(2, scale=0.3, rank=3), lora(3, scale=2.0))
    write(tmp_path / "peft", deltas)
    report = lorahub.convert(tmp_path / "peft", "mlx", tmp_path / "mlx")
    config = json.loads((tmp_path / "mlx" / "adapter_config.json").read_text())
    assert (config["lora_parameters"]["scale"], config["lora_parameters"]["rank"]) == (2.0, 3)
    found = read(tmp_path / "mlx").deltas
    for target, delta in deltas.items():
        close(change_of(found[target]), change_of(delta))
    assert report.rules == {"rank-padded": 2, "scale-folded": 1}


def test_scales_a_power_of_two_apart_stay_bit_exact_in_sixteen_bits(tmp_path: Path) -> None:
    half = [
        LoRA(drawn(OUT, RANK, seed=seed, dtype=torch.bfloat16), drawn(RANK, IN, seed=9, dtype=torch.bfloat16), scale)
        for seed, scale in enumerate((2.0, 0.5, 2.0))
    ]
    write(tmp_path / "peft", on(*half))
    report = lorahub.convert(tmp_path / "peft", "mlx", tmp_path / "mlx")
    assert report.max_error == 0.0
    assert {each.dtype for each in load_file(tmp_path / "mlx" / "adapters.safetensors").values()} == {torch.bfloat16}


def test_rank_stabilised_scales_become_alphas(tmp_path: Path) -> None:
    tensors = {
        f"base_model.model.{module}.lora_{name}.weight": drawn(*size, seed=seed)
        for seed, module in enumerate(MODULES)
        for name, size in (("A", (3, IN)), ("B", (OUT, 3)))
    }
    (tmp_path / "peft").mkdir()
    save_file(tensors, tmp_path / "peft" / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 3, "lora_alpha": 5, "use_rslora": True, "target_modules": ["q_proj", "v_proj"]}
    (tmp_path / "peft" / "adapter_config.json").write_text(json.dumps(config))
    report = lorahub.convert(tmp_path / "peft", "kohya", tmp_path / "out.safetensors")
    assert report.rules == {"rslora-folded": 3}
    assert report.max_error == 0.0
    written = load_file(tmp_path / "out.safetensors")
    alphas = [float(each) for key, each in written.items() if key.endswith(".alpha")]
    assert alphas == pytest.approx([5 * math.sqrt(3)] * 3, rel=1e-15)


def test_an_alpha_of_kohya_is_the_alpha_of_diffusers(tmp_path: Path) -> None:
    stem = "lora_unet_final_layer_linear"
    tensors = {
        f"{stem}.lora_down.weight": drawn(4, 8),
        f"{stem}.lora_up.weight": drawn(6, 4),
        f"{stem}.alpha": torch.tensor(1.0),
    }
    save_file(tensors, tmp_path / "flux.safetensors", {"lorahub.modules": json.dumps({stem: "final_layer.linear"})})
    lorahub.convert(tmp_path / "flux.safetensors", "diffusers", tmp_path / "out")
    ((target, delta),) = read(tmp_path / "out").deltas.items()
    assert target == Target("transformer", "proj_out", "weight")
    assert isinstance(delta, LoRA)
    assert delta.scale == 0.25
    with safe_open(tmp_path / "out" / "pytorch_lora_weights.safetensors", "pt") as file:
        assert json.loads(file.metadata()["lora_adapter_metadata"])["transformer.lora_alpha"] == 1


def test_unifying_changes_nothing() -> None:
    changes = [replace(start(lora(seed, rank=rank, scale=scale)), target=Target("", str(seed), "weight"))
               for seed, (rank, scale) in enumerate(((2, 0.3), (3, 1.7), (1, 0.3)))]  # fmt: skip
    assert len({change.delta.scale for change in one_scale(changes)}) == 1  # type: ignore[attr-defined]
    assert len({change.delta.down.shape[0] for change in one_rank(changes)}) == 1  # type: ignore[attr-defined]
    for steps in ladder(NOWHERE):
        now = list(changes)
        for step in steps:
            now = step(now)
        for before, after in zip(changes, now, strict=True):
            close(change_of(after.delta), change_of(before.delta))


# Fused projections


class Split:
    """A framework whose bases keep q, k and v together, or apart, whatever the adapter says."""

    name, requires = "split", ""

    def __init__(self, layouts: Mapping[Target, Layout]) -> None:
        self._layouts = layouts

    def layouts(self, index: BaseIndex, targets: Sequence[Target]) -> Mapping[Target, Layout]:
        plain = whole_layouts(index, [target for target in targets if target not in self._layouts])
        return {**plain, **{target: self._layouts[target] for target in targets if target in self._layouts}}

    def parameters(self, model: Any, index: BaseIndex) -> Mapping[str, torch.Tensor]:
        return dict(model)

    def edits(self, index: BaseIndex, created: object, hints: object) -> None:
        return None


FUSED, PARTS = Target("", "attn.qkv", "weight"), tuple(Target("", f"attn.{name}", "weight") for name in "qkv")
SIZES = (6, 6, 8)


def bands() -> list[slice]:
    stops = np.cumsum(SIZES).tolist()
    return [slice(stop - size, stop) for stop, size in zip(stops, SIZES, strict=True)]


def splitting() -> Base:
    """Adapters say qkv, the base has q, k and v."""
    pieces = tuple(
        Piece(parameter=part.name, of_delta=Region(rows=rows)) for part, rows in zip(PARTS, bands(), strict=True)
    )
    return based({part.name: (size, IN) for part, size in zip(PARTS, SIZES, strict=True)}, {FUSED: pieces})


def fusing() -> Base:
    """Adapters say q, k and v, the base has qkv."""
    pieces = {
        part: (Piece(parameter=FUSED.name, of_parameter=Region(rows=rows)),)
        for part, rows in zip(PARTS, bands(), strict=True)
    }
    return based({FUSED.name: (sum(SIZES), IN)}, pieces)


def based(shapes: Mapping[str, tuple[int, ...]], pieces: Mapping[Target, tuple[Piece, ...]]) -> Base:
    infos = {name: ParameterInfo(shape=shape, dtype="F32", stored_as=name) for name, shape in shapes.items()}
    index = BaseIndex(ref=BaseRef(), framework="split", parameters=infos)
    framework: Framework = Split({target: Layout(target=target, pieces=each) for target, each in pieces.items()})  # type: ignore[assignment]
    model: Any = {name: drawn(*shape, seed=9) for name, shape in shapes.items()}
    return Base(index=index, framework=framework, model=model)


def test_a_fused_projection_splits_by_rows_and_shares_its_down(tmp_path: Path) -> None:
    whole = lora(1, out=sum(SIZES), rank=3)
    write(tmp_path / "fused", {FUSED: whole}, "kohya")
    report = lorahub.convert(tmp_path / "fused", "peft", tmp_path / "out", base=splitting())
    found = read(tmp_path / "out").deltas
    assert set(found) == set(PARTS)
    for part, rows in zip(PARTS, bands(), strict=True):
        delta = found[part]
        assert isinstance(delta, LoRA)
        assert torch.equal(delta.down, whole.down)
        assert torch.equal(delta.up, whole.up[rows])
        close(change_of(delta, (rows.stop - rows.start, IN)), change_of(whole, (sum(SIZES), IN))[rows], 1e-15)
    assert report.rules == {"fused-to-split": 3}
    assert report.max_error == 0.0


def test_factors_trained_apart_are_found_again_in_a_block_diagonal_up(tmp_path: Path) -> None:
    apart = [lora(seed, out=size, rank=2) for seed, size in enumerate(SIZES)]
    up = torch.zeros(sum(SIZES), 6)
    for at, (rows, each) in enumerate(zip(bands(), apart, strict=True)):
        up[rows, 2 * at : 2 * at + 2] = each.up
    write(tmp_path / "fused", {FUSED: LoRA(up, torch.cat([each.down for each in apart]), 1.5)}, "kohya")
    lorahub.convert(tmp_path / "fused", "peft", tmp_path / "out", base=splitting())
    found = read(tmp_path / "out").deltas
    assert all(same(found[part], each) for part, each in zip(PARTS, apart, strict=True))
    # ... and back: the very file it was
    lorahub.convert(tmp_path / "out", "kohya", tmp_path / "back", base=fusing())
    one, other = (load_file(tmp_path / each / "lora.safetensors") for each in ("fused", "back"))
    assert all(torch.equal(one[key], other[key]) for key in one | other)


def test_split_projections_fuse_beside_each_other_or_at_their_own_rank_where_down_is_one(tmp_path: Path) -> None:
    apart = {part: lora(seed, out=size, scale=scale) for seed, (part, size, scale) in
             enumerate(zip(PARTS, SIZES, (1.5, 0.7, 1.5), strict=True))}  # fmt: skip
    write(tmp_path / "apart", apart, "kohya")
    report = lorahub.convert(tmp_path / "apart", "peft", tmp_path / "out", base=fusing())
    delta = read(tmp_path / "out").deltas[FUSED]
    assert isinstance(delta, LoRA)
    assert delta.down.shape[0] == 3 * RANK
    expected = np.concatenate([change_of(each, (size, IN)) for each, size in zip(apart.values(), SIZES, strict=True)])
    close(change_of(delta, (sum(SIZES), IN)), expected)
    assert report.targets[0].sources == tuple(part.name for part in PARTS)

    shared = {part: replace(each, down=drawn(RANK, IN, seed=77), scale=1.5) for part, each in apart.items()}
    write(tmp_path / "shared", shared, "kohya")
    lorahub.convert(tmp_path / "shared", "peft", tmp_path / "small", base=fusing())
    small = read(tmp_path / "small").deltas[FUSED]
    assert isinstance(small, LoRA)
    assert small.down.shape[0] == RANK
    expected = np.concatenate([change_of(each, (size, IN)) for each, size in zip(shared.values(), SIZES, strict=True)])
    close(change_of(small, (sum(SIZES), IN)), expected, 1e-15)


def test_lengths_of_dora_go_with_their_rows(tmp_path: Path) -> None:
    size = sum(SIZES)
    whole = DoRA(drawn(size, RANK), drawn(RANK, IN, seed=1), 1.0, drawn(size, seed=2).abs() + 1)
    write(tmp_path / "fused", {FUSED: whole}, "kohya")
    report = lorahub.convert(tmp_path / "fused", "peft", tmp_path / "out", base=splitting())
    assert report.max_error is not None
    assert report.max_error <= 1e-12
    found = read(tmp_path / "out").deltas
    for part, rows in zip(PARTS, bands(), strict=True):
        delta = found[part]
        assert isinstance(delta, DoRA)
        assert torch.equal(delta.magnitude, whole.magnitude[rows])  # type: ignore[arg-type,index]
    lorahub.convert(tmp_path / "out", "kohya", tmp_path / "back", base=fusing())
    again = read(tmp_path / "back").deltas[FUSED]
    weight = drawn(size, IN, seed=5, dtype=torch.float64)
    close(again.delta(weight).numpy(), whole.delta(weight).numpy(), 1e-12)


def test_a_part_and_the_whole_that_it_is_of_are_not_laid_over_each_other(tmp_path: Path) -> None:
    both = {FUSED: lora(1, out=sum(SIZES)), PARTS[0]: lora(2, out=SIZES[0])}
    write(tmp_path / "both", both, "kohya")
    with pytest.raises(CannotCarry, match="another also changes") as stop:
        lorahub.convert(tmp_path / "both", "peft", tmp_path / "out", base=fusing())
    assert {name for each in stop.value.findings for name in each.where} == {FUSED.name, PARTS[0].name}


def test_a_part_that_the_adapter_leaves_alone_stays_zero() -> None:
    base = fusing()
    apart = [replace(start(lora(1, out=SIZES[1])), target=PARTS[1], origins=(Origin(target=PARTS[1]),))]
    (only,), stuck = land(apart, base.framework.layouts(base.index, list(PARTS)), base.index, NOWHERE)
    assert not stuck
    assert only.target == FUSED
    whole = change_of(only.delta, (sum(SIZES), IN))
    assert not whole[bands()[0]].any()
    assert not whole[bands()[2]].any()
    close(whole[bands()[1]], change_of(apart[0].delta, (SIZES[1], IN)), 1e-15)


STACK = Target("", "mlp.experts", "gate_up_proj")
EXPERTS, INNER, HIDDEN = 3, 5, 8


def gates(*experts: int) -> dict[Target, Region]:
    """The gate and up projections of some experts, and where they lie in the stack."""
    return {
        Target("", f"mlp.experts.{at}.{name}_proj", "weight"): Region(expert=at, rows=slice(first, first + INNER))
        for at in experts
        for name, first in (("gate", 0), ("up", INNER))
    }


def test_experts_trained_one_by_one_become_the_stack_of_the_base_and_come_apart_again(tmp_path: Path) -> None:
    """transformers 5 stacks what adapters of earlier releases name one by one."""
    places = gates(0, 2)
    apart = {
        target: lora(seed, out=INNER, into=HIDDEN, rank=2 + seed % 2, scale=1.5) for seed, target in enumerate(places)
    }
    write(tmp_path / "apart", apart)
    pieces = {target: (Piece(parameter=STACK.name, of_parameter=place),) for target, place in gates(0, 1, 2).items()}
    stack = based({STACK.name: (EXPERTS, 2 * INNER, HIDDEN)}, pieces)
    report = lorahub.convert(tmp_path / "apart", "peft", tmp_path / "stack", base=stack)
    assert report.rules == {"experts-to-stack": 1}
    assert report.max_error == 0.0
    assert report.targets[0].sources == tuple(target.name for target in sorted(apart))
    expected = np.zeros((EXPERTS, 2 * INNER, HIDDEN))
    for target, place in places.items():
        assert place.expert is not None
        expected[place.expert][place.rows] = change_of(apart[target], (INNER, HIDDEN))  # type: ignore[index]
    header = open_header(tmp_path / "stack", REGISTRY, index=stack.index)
    (found,) = load(header, REGISTRY).deltas.values()
    zero = torch.zeros(EXPERTS, 2 * INNER, HIDDEN, dtype=torch.float64)
    close(found.delta(zero).numpy(), expected, 1e-12)

    whole = tuple(Piece(parameter=target.name, of_delta=place) for target, place in gates(0, 1, 2).items())
    shapes = {target.name: (INNER, HIDDEN) for target in gates(0, 1, 2)}
    experts = based({**shapes, STACK.name: (EXPERTS, 2 * INNER, HIDDEN)}, {STACK: whole})
    back = lorahub.convert(tmp_path / "stack", "mlx", tmp_path / "back", base=experts)
    assert set(back.rules) == {"stack-to-experts", "rank-padded"}
    again = read(tmp_path / "back").deltas
    for target, place in gates(0, 1, 2).items():
        assert place.expert is not None
        one = change_of(again[target], (INNER, HIDDEN))
        assert np.abs(one - expected[place.expert][place.rows]).max() <= 1e-12  # type: ignore[index]


def test_what_is_no_lora_is_not_stacked(tmp_path: Path) -> None:
    (target,) = list(gates(1))[:1]
    stack = based(
        {STACK.name: (EXPERTS, 2 * INNER, HIDDEN)},
        {target: (Piece(parameter=STACK.name, of_parameter=gates(1)[target]),)},
    )
    dora = DoRA(drawn(INNER, 2), drawn(2, HIDDEN, seed=1), 1.0, drawn(INNER, seed=2).abs() + 1)
    write(tmp_path / "one", {target: dora})
    with pytest.raises(lorahub.LorahubError):
        lorahub.convert(tmp_path / "one", "peft", tmp_path / "out", base=stack)
    assert not (tmp_path / "out").exists()


def test_trimming_keeps_one_component_of_a_change_that_does_nothing() -> None:
    found = trimmed(LoRA(torch.zeros(4, 3), drawn(3, 5), 1.0))
    assert isinstance(found, LoRA)
    assert found.up.shape == (4, 1)


# Names and parts of pipelines


def test_one_part_of_a_pipeline_goes_to_a_format_for_one_model(tmp_path: Path) -> None:
    both = {**on(lora(1), component="unet"), **on(lora(2), component="text_encoder")}
    write(tmp_path / "both", both, "diffusers")
    with pytest.raises(CannotCarry, match="one model") as stop:
        lorahub.convert(tmp_path / "both", "mlx", tmp_path / "out")
    assert "--component" in stop.value.hint
    report = lorahub.convert(tmp_path / "both", "mlx", tmp_path / "out", component="unet")
    assert set(read(tmp_path / "out").deltas) == set(on(lora(1)))
    assert any("'text_encoder'" in loss and "1 targets" in loss for loss in report.losses)
    with pytest.raises(UsageError, match="no component 'vae'"):
        lorahub.convert(tmp_path / "both", "mlx", tmp_path / "never", component="vae")


def test_a_bare_adapter_is_named_for_a_part_of_a_pipeline(tmp_path: Path) -> None:
    write(tmp_path / "peft", on(lora(1)))
    lorahub.convert(tmp_path / "peft", "kohya", tmp_path / "x.safetensors", component="unet")
    keys = load_file(tmp_path / "x.safetensors").keys()
    assert {key.partition(".")[0] for key in keys} == {"lora_unet_model_layers_0_self_attn_q_proj"}


def test_underscores_for_dots_need_a_base(tmp_path: Path) -> None:
    stem = "lora_unet_mid_block_to_q"
    save_file(
        {f"{stem}.lora_down.weight": drawn(2, 6), f"{stem}.lora_up.weight": drawn(6, 2)}, tmp_path / "x.safetensors"
    )
    with pytest.raises(CannotCarry) as stop:
        lorahub.convert(tmp_path / "x.safetensors", "peft", tmp_path / "out")
    assert "--base" in stop.value.hint
    assert stop.value.findings[0].where == ("mid_block_to_q",)
    base = based({"mid_block.to_q.weight": (6, 6)}, {})
    lorahub.convert(tmp_path / "x.safetensors", "peft", tmp_path / "out", base=base)
    assert set(read(tmp_path / "out").deltas) == {Target("", "mid_block.to_q", "weight")}
    other = based({"up_block.to_q.weight": (6, 6)}, {})
    with pytest.raises((CannotCarry, Degraded, BaseMismatch)):
        lorahub.convert(tmp_path / "x.safetensors", "peft", tmp_path / "never", base=other)
    assert not (tmp_path / "never").exists()


# What there is no word for


def test_a_change_that_no_format_has_a_word_for_is_listed_in_full_with_a_remedy(tmp_path: Path) -> None:
    turns = SAMPLES["hra"][0]
    write(tmp_path / "turned", turns)
    with pytest.raises(CannotCarry) as stop:
        lorahub.convert(tmp_path / "turned", "kohya", tmp_path / "out")
    assert sorted(stop.value.findings[0].where) == sorted(target.name for target in turns)
    assert "--approximate" in stop.value.hint
    assert "--base" in stop.value.hint
    assert [path.name for path in tmp_path.iterdir()] == ["turned"]


def test_what_is_left_out_is_allowed_by_name_and_written_down(tmp_path: Path) -> None:
    head = Target("", "score", "weight")
    write(tmp_path / "peft", {**on(lora(1)), head: Replace(drawn(3, IN))}, modules_to_save=["score"])
    with pytest.raises(CannotCarry) as stop:
        lorahub.convert(tmp_path / "peft", "mlx", tmp_path / "out")
    assert stop.value.findings[0].where == (head.name,)
    report = lorahub.convert(tmp_path / "peft", "mlx", tmp_path / "out", allow=["cannot-carry"])
    assert any(head.name in loss for loss in report.losses)
    record = AdapterRecord.load(tmp_path / "out" / "lorahub.json")
    assert record.derivation is not None
    assert any(head.name in loss for loss in record.derivation.losses)


def test_parts_that_change_no_weight_are_never_dropped_in_silence(tmp_path: Path) -> None:
    folder = tmp_path / "prompt"
    folder.mkdir()
    save_file({"prompt_embeddings": drawn(4, 8)}, folder / "adapter_model.safetensors")
    config = {"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 4}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(lorahub.LorahubError):
        lorahub.convert(folder, "kohya", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["prompt"]


def test_an_unknown_key_blocks_until_it_is_allowed_and_then_is_a_loss(tmp_path: Path) -> None:
    write(tmp_path / "peft", on(lora(1)))
    file = tmp_path / "peft" / "adapter_model.safetensors"
    save_file({**load_file(file), "mystery": drawn(2)}, file)
    with pytest.raises(Degraded, match="mystery"):
        lorahub.convert(tmp_path / "peft", "kohya", tmp_path / "out")
    report = lorahub.convert(tmp_path / "peft", "kohya", tmp_path / "out", allow=["key-unknown"])
    assert any("mystery" in loss for loss in report.losses)


def test_whole_differences_travel_with_the_factors(tmp_path: Path) -> None:
    """Ten tensors of a Wan file in, ten out: norms, biases and factors."""
    stem = "diffusion_model.blocks.0"
    tensors = {f"{stem}.self_attn.{name}.lora_{side}.weight": drawn(*size, seed=seed)
               for seed, name in enumerate("qk") for side, size in (("A", (2, 8)), ("B", (8, 2)))}  # fmt: skip
    tensors |= {f"{stem}.self_attn.{name}.diff_b": drawn(8, seed=20) for name in "qkvo"}
    tensors |= {f"{stem}.norm3.diff": drawn(8, seed=30), f"{stem}.norm3.diff_b": drawn(8, seed=31)}
    save_file(tensors, tmp_path / "wan.safetensors")
    report = lorahub.convert(tmp_path / "wan.safetensors", "kohya", tmp_path / "out.safetensors")
    written = load_file(tmp_path / "out.safetensors")
    assert len([key for key in written if not key.endswith(".alpha")]) == len(tensors) == 10
    assert report.losses == ()
    assert {key.partition(".")[0].removesuffix("_q") for key in written} >= {
        "lora_unet_blocks_0_self_attn",
        "lora_unet_blocks_0_norm3",
    }
    source = {
        Target("unet", target.module, target.parameter): delta
        for target, delta in read(tmp_path / "wan.safetensors").deltas.items()
    }
    found = read(tmp_path / "out.safetensors").deltas
    assert source.keys() == found.keys()
    assert all(same(source[target], found[target]) for target in source)


# Approximation


def turned_and_base(folder: Path) -> tuple[dict[Target, Delta], Base]:
    turns = SAMPLES["hra"][0]
    write(folder, turns)
    return turns, based({target.name: (OUT, IN) for target in turns}, {})


def test_an_approximation_is_the_best_of_its_rank_and_says_what_is_lost(tmp_path: Path) -> None:
    turns, base = turned_and_base(tmp_path / "turned")  # reflections of rank 2
    report = lorahub.convert(tmp_path / "turned", "mlx", tmp_path / "out", base=base, approximate=True, rank=1)
    found = read(tmp_path / "out").deltas
    assert not report.exact
    for line, (target, delta) in zip(report.targets, turns.items(), strict=True):
        weight = base.model[target.name].double()  # type: ignore[index,union-attr,operator]
        moved = delta.delta(weight).numpy()
        values = np.linalg.svd(moved, compute_uv=False)
        best = math.sqrt(float((values[1:] ** 2).sum() / (values**2).sum()))
        told = np.linalg.norm(change_of(found[target]) - moved) / np.linalg.norm(moved)
        assert best > 1e-2
        assert told == pytest.approx(best, rel=1e-5)
        assert line.difference == pytest.approx(best, rel=1e-5)
    record = AdapterRecord.load(tmp_path / "out" / "lorahub.json")
    assert record.derivation is not None
    assert record.derivation.max_error == pytest.approx(report.max_error)
    assert record.derivation.rules == {"approximated": 3}


def test_a_whole_difference_is_approximated_without_a_base(tmp_path: Path) -> None:
    whole = drawn(OUT, IN, seed=3)
    target = Target("", MODULES[1], "weight")
    write(tmp_path / "kohya", {**on(lora(1)), target: Full(whole)}, "kohya")
    with pytest.raises(CannotCarry, match="full rank") as stop:
        lorahub.convert(tmp_path / "kohya", "peft", tmp_path / "out")
    assert stop.value.hint == "add: --approximate --rank 32"
    report = lorahub.convert(tmp_path / "kohya", "peft", tmp_path / "out", approximate=True, rank=20)
    values = np.linalg.svd(whole.double().numpy(), compute_uv=False)
    lost = {each.target: each.difference for each in report.targets}
    assert lost[f"{MODULES[0]}.weight"] == 0.0
    assert lost[target.name] == pytest.approx(math.sqrt(float((values[20:] ** 2).sum() / (values**2).sum())), rel=1e-5)


def test_an_approximation_meets_the_error_that_was_asked_for(tmp_path: Path) -> None:
    _, base = turned_and_base(tmp_path / "turned")
    report = lorahub.convert(
        tmp_path / "turned", "peft", tmp_path / "out", base=base, kind="lora", approximate=True, error=0.1
    )
    assert report.max_error is not None
    assert 0 < report.max_error <= 0.1
    assert {each.after for each in report.targets} == {"lora"}


def test_an_approximation_is_never_made_unasked(tmp_path: Path) -> None:
    _, base = turned_and_base(tmp_path / "turned")
    with pytest.raises(CannotCarry):
        lorahub.convert(tmp_path / "turned", "mlx", tmp_path / "out", base=base)
    with pytest.raises(UsageError, match="asked for"):
        lorahub.convert(tmp_path / "turned", "mlx", tmp_path / "out", base=base, rank=4)
    with pytest.raises(UsageError, match="budget"):
        lorahub.convert(tmp_path / "turned", "mlx", tmp_path / "out", base=base, approximate=True)
    with pytest.raises(CannotCarry, match="depends on the weight"):
        lorahub.convert(tmp_path / "turned", "mlx", tmp_path / "out", approximate=True, rank=4)


# The proof


def test_the_proof_sees_a_change_in_one_number() -> None:
    delta = lora(1)
    moved = replace(delta, up=delta.up.clone())
    moved.up[3, 1] += 1e-3
    target = Target("", "m", "weight")
    found = difference(start(delta), moved, {target: delta}, NOWHERE)
    expected = np.linalg.norm(change_of(moved) - change_of(delta)) / np.linalg.norm(change_of(delta))
    assert found == pytest.approx(expected, rel=1e-9)
    assert difference(start(delta), delta, {target: delta}, NOWHERE) == 0.0


def test_the_proof_of_what_depends_on_the_weight_needs_the_weight() -> None:
    target = Target("", "m", "weight")
    one = DoRA(drawn(6, 2), drawn(2, 5, seed=1), 1.0, drawn(6, seed=2).abs() + 1)
    other = replace(one, up=one.up * 2, scale=0.5)
    assert difference(start(one), other, {target: one}, NOWHERE) is None
    weight = drawn(6, 5, seed=3, dtype=torch.float64)
    assert difference(start(one), other, {target: one}, lambda _: weight) == pytest.approx(0, abs=1e-12)
    shorter = replace(one, magnitude=one.magnitude * 0.5)  # type: ignore[operator]
    assert difference(start(one), shorter, {target: one}, lambda _: weight) > 1e-2  # type: ignore[operator]


def test_a_store_that_is_too_narrow_is_told_and_one_that_was_asked_for_is_not_refused(tmp_path: Path) -> None:
    write(tmp_path / "peft", on(lora(1)))
    report = lorahub.convert(tmp_path / "peft", "kohya", tmp_path / "out.safetensors", dtype="fp16")
    assert report.rules == {"stored-as-f16": 1}
    assert report.max_error is not None
    assert 1e-5 < report.max_error < 1e-3
    assert load_file(tmp_path / "out.safetensors")[
        "lycoris_model_layers_0_self_attn_q_proj.lora_up.weight"
    ].dtype == torch.float16  # fmt: skip


# The result as a whole


def test_a_record_says_how_the_files_came_about_and_keeps_what_it_said(tmp_path: Path, registry: Registry) -> None:
    write(tmp_path / "peft", on(lora(1)))
    lorahub.record(tmp_path / "peft", name="ink", license="mit")
    lorahub.convert(tmp_path / "peft", "diffusers", tmp_path / "out")
    record = AdapterRecord.load(tmp_path / "out" / "lorahub.json")
    assert (record.name, record.license) == ("ink", "mit")
    assert record.stale(tmp_path / "out") == ()
    assert record.derivation is not None
    assert record.derivation.converted_from == "peft"
    assert set(record.derivation.sources) == {"adapter_model.safetensors", "adapter_config.json"}
    assert record.derivation.rules == {"rename": 1}
    assert record.derivation.max_error == 0.0
    assert open_header(tmp_path / "out", registry).findings == ()


def test_what_a_header_says_of_the_adapter_goes_into_the_record_and_the_rest_is_named(tmp_path: Path) -> None:
    stem = "lora_unet_a_b"
    said = {
        "modelspec.title": "Ink",
        "modelspec.trigger_phrase": "ink wash, brush",
        "ss_dataset_dirs": '{"/home/me/secret": 3}',
        "lorahub.modules": json.dumps({stem: "a.b"}),
    }
    tensors = {f"{stem}.lora_down.weight": drawn(2, 6), f"{stem}.lora_up.weight": drawn(6, 2)}
    save_file(tensors, tmp_path / "x.safetensors", said)
    report = lorahub.convert(tmp_path / "x.safetensors", "peft", tmp_path / "out")
    record = AdapterRecord.load(tmp_path / "out" / "lorahub.json")
    assert (record.title, record.trigger_words) == ("Ink", ("ink wash", "brush"))
    assert report.losses[-1] == "metadata of the file that is not carried: ss_dataset_dirs"
    assert "secret" not in (tmp_path / "out" / "lorahub.json").read_text()


def test_a_loss_that_speaks_of_somebodys_machine_is_told_without_its_path() -> None:
    found = Finding(
        code="key-unknown", axis="format", level=Verdict.DEGRADED, message="in /home/me/secret", allowable=True
    )
    (loss,) = told([found], ["key-unknown"], {}, [], [])
    assert "key-unknown" in loss
    assert "secret" not in loss


def test_a_place_that_is_taken_stays_as_it_is(tmp_path: Path) -> None:
    write(tmp_path / "peft", on(lora(1)))
    taken = tmp_path / "x.safetensors"
    taken.write_text("precious")
    with pytest.raises(WriteFailed, match="exists"):
        lorahub.convert(tmp_path / "peft", "kohya", taken)
    assert taken.read_text() == "precious"


def test_a_format_that_is_a_folder_is_not_squeezed_into_a_file(tmp_path: Path) -> None:
    write(tmp_path / "kohya", on(lora(1)), "kohya")
    with pytest.raises(CannotCarry, match="is a folder"):
        lorahub.convert(tmp_path / "kohya", "peft", tmp_path / "x.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["kohya"]


def test_the_same_source_gives_the_same_bytes(tmp_path: Path) -> None:
    write(
        tmp_path / "loha", on(LoHa(drawn(20, 2), drawn(2, 20, seed=1), drawn(20, 2, seed=2), drawn(2, 20, seed=3), 1.0))
    )
    for name in ("one", "two"):
        lorahub.convert(tmp_path / "loha", "kohya", tmp_path / f"{name}.safetensors", kind="lora")
    assert (tmp_path / "one.safetensors").read_bytes() == (tmp_path / "two.safetensors").read_bytes()


def test_several_kinds_become_one_where_a_format_has_one(tmp_path: Path) -> None:
    mixed = on(lora(1), LoHa(drawn(OUT, 2), drawn(2, IN, seed=1), drawn(OUT, 2, seed=2), drawn(2, IN, seed=3), 1.0))
    write(tmp_path / "kohya", mixed, "kohya")
    report = lorahub.convert(tmp_path / "kohya", "peft", tmp_path / "out")
    assert report.rules == {"loha-to-lora": 1, "rename": 1}
    found = read(tmp_path / "out").deltas
    zero = torch.zeros(OUT, IN, dtype=torch.float64)
    for target, delta in mixed.items():
        close(change_of(found[target]), delta.delta(zero).numpy())


def test_a_scaled_bias_keeps_what_it_does(tmp_path: Path) -> None:
    factors = lora(1, scale=0.75)
    module = MODULES[0]
    both = {Target("", module, "weight"): factors, Target("", module, "bias"): Full(drawn(OUT, seed=4), 0.75)}
    write(tmp_path / "peft", both)
    report = lorahub.convert(tmp_path / "peft", "kohya", tmp_path / "out")
    found = read(tmp_path / "out").deltas[Target("", module, "bias")]
    assert isinstance(found, Full)
    assert found.scale == 1.0
    close(found.diff.double().numpy(), 0.75 * drawn(OUT, seed=4).double().numpy(), 1e-7)
    assert report.rules == {"rename": 1, "scale-folded": 1}


def test_budgets_are_checked_before_anything_is_read() -> None:
    with pytest.raises(UsageError):
        Budget(rank=0)


def test_saving_what_was_converted_needs_no_conversion(tmp_path: Path, registry: Registry) -> None:
    write(tmp_path / "peft", on(lora(1)))
    lorahub.convert(tmp_path / "peft", "kohya", tmp_path / "kohya")
    save(read(tmp_path / "kohya"), tmp_path / "again", registry=registry, format="kohya")
    one, other = (load_file(tmp_path / each / "lora.safetensors") for each in ("kohya", "again"))
    assert all(torch.equal(one[key], other[key]) for key in one | other)


# Pickles and other containers


def test_a_pickle_is_opened_for_conversion_and_for_nothing_else(tmp_path: Path) -> None:
    write(tmp_path / "peft", on(lora(1)))
    folder = tmp_path / "old"
    folder.mkdir()
    torch.save(load_file(tmp_path / "peft" / "adapter_model.safetensors"), folder / "adapter_model.bin")
    (folder / "adapter_config.json").write_text((tmp_path / "peft" / "adapter_config.json").read_text())
    report = lorahub.convert(folder, "peft", tmp_path / "out")
    assert report.adapter == str(folder)
    one, other = (load_file(tmp_path / each / "adapter_model.safetensors") for each in ("peft", "out"))
    assert all(torch.equal(one[key], other[key]) for key in one | other)
    record = AdapterRecord.load(tmp_path / "out" / "lorahub.json")
    assert record.derivation is not None
    assert set(record.derivation.sources) == {"adapter_model.bin", "adapter_config.json"}


class _Payload:
    def __reduce__(self) -> tuple[Any, ...]:
        return print, ("this must never be printed",)


def test_a_pickle_that_asks_for_code_is_refused_and_runs_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save({"lora_A": _Payload()}, tmp_path / "x.bin")
    with pytest.raises(lorahub.LorahubError):
        lorahub.convert(tmp_path / "x.bin", "peft", tmp_path / "out")
    assert capsys.readouterr().out == ""
    assert [path.name for path in tmp_path.iterdir()] == ["x.bin"]


def test_an_error_names_the_pickle_and_not_the_place_where_it_was_unpacked(tmp_path: Path) -> None:
    torch.save({"a": torch.tensor(1.0)}, tmp_path / "x.bin")
    with pytest.raises(lorahub.LorahubError) as stop:
        lorahub.convert(tmp_path / "x.bin", "peft", tmp_path / "out")
    assert str(tmp_path) in stop.value.message


def test_mlxs_npz_is_read_like_its_safetensors(tmp_path: Path) -> None:
    a, b = drawn(IN, RANK), drawn(RANK, OUT, seed=1)
    folder = tmp_path / "mlx"
    folder.mkdir()
    np.savez(folder / "adapters.npz", **{f"{MODULES[0]}.lora_a": a.numpy(), f"{MODULES[0]}.lora_b": b.numpy()})
    config = {"fine_tune_type": "lora", "lora_parameters": {"rank": RANK, "scale": 0.5}}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    lorahub.convert(folder, "peft", tmp_path / "out")
    (delta,) = read(tmp_path / "out").deltas.values()
    close(change_of(delta), 0.5 * (a.double() @ b.double()).T.numpy())


# What only a base makes possible


def test_a_replaced_parameter_is_a_difference_where_the_base_is_at_hand(tmp_path: Path) -> None:
    head = Target("", "score", "weight")
    value = drawn(3, IN, seed=8)
    write(tmp_path / "peft", {**on(lora(1)), head: Replace(value)}, modules_to_save=["score"])
    base = based({f"{MODULES[0]}.weight": (OUT, IN), "score.weight": (3, IN)}, {})
    report = lorahub.convert(tmp_path / "peft", "kohya", tmp_path / "out", base=base)
    found = read(tmp_path / "out").deltas[head]
    assert isinstance(found, Full)
    close(found.diff.numpy(), (value - base.model["score.weight"]).numpy(), 1e-6)  # type: ignore[index,union-attr,operator]
    assert report.rules == {"rename": 1, "replacement-to-difference": 1}


@pytest.mark.parametrize("counted", [7, 8])
def test_a_counter_that_nothing_touched_needs_no_word(counted: int, tmp_path: Path) -> None:
    """Modules kept whole bring their buffers along: those that are the base's own change nothing."""
    norm = "stem.normalization"
    base = based({f"{MODULES[0]}.weight": (OUT, IN), f"{norm}.weight": (8,), f"{norm}.running_mean": (8,)}, {})
    counter = ParameterInfo(shape=(), dtype="I64", stored_as=f"{norm}.num_batches_tracked")
    model: Any = {**base.model, counter.stored_as: torch.tensor(7)}  # type: ignore[dict-item]
    infos = {**base.index.parameters, counter.stored_as: counter}
    base = replace(base, index=replace(base.index, parameters=infos), model=model)
    kept = {
        "weight": drawn(8, seed=3),
        "running_mean": model[f"{norm}.running_mean"].clone(),
        "num_batches_tracked": torch.tensor(counted),
    }
    whole = {Target("", norm, name): Replace(value) for name, value in kept.items()}
    write(tmp_path / "peft", {**on(lora(1)), **whole}, modules_to_save=[norm])
    if counted != 7:
        with pytest.raises(CannotCarry, match="no word"):
            lorahub.convert(tmp_path / "peft", "kohya", tmp_path / "out", base=base)
        return
    report = lorahub.convert(tmp_path / "peft", "kohya", tmp_path / "out", base=base)
    assert set(read(tmp_path / "out").deltas) == {Target("", norm, "weight"), *on(lora(1))}
    assert report.rules["replacement-to-difference"] == 1
    assert lorahub.diff(tmp_path / "peft", tmp_path / "peft", base=base).equal


@pytest.mark.parametrize("scale", [0.5, 1.5])
def test_a_bias_beside_factors_is_pefts_lora_bias_and_comes_back(scale: float, tmp_path: Path) -> None:
    biased = {Target("", module, "bias"): Full(drawn(OUT, seed=at), scale) for at, module in enumerate(MODULES)}
    factors = on(*(lora(seed, scale=scale) for seed in range(3)))
    write(tmp_path / "peft", {**factors, **biased})
    lorahub.convert(tmp_path / "peft", "kohya", tmp_path / "x.safetensors")
    assert f"lycoris_{MODULES[0].replace('.', '_')}.diff_b" in load_file(tmp_path / "x.safetensors")
    report = lorahub.convert(tmp_path / "x.safetensors", "peft", tmp_path / "back")
    assert report.max_error is not None
    assert report.max_error < 1e-7
    one, other = (load_file(tmp_path / each / "adapter_model.safetensors") for each in ("peft", "back"))
    assert one.keys() == other.keys()
    assert json.loads((tmp_path / "back" / "adapter_config.json").read_text())["lora_bias"] is True
    for key, each in one.items():
        close(other[key].numpy(), each.numpy(), 1e-7)
        assert scale != 0.5 or torch.equal(other[key], each)


def test_a_head_trained_whole_comes_back_to_peft_where_the_base_is_at_hand(tmp_path: Path) -> None:
    base = based({f"{MODULES[0]}.weight": (OUT, IN), "score.weight": (3, IN)}, {})
    head = Target("", "score", "weight")
    value = drawn(3, IN, seed=8)
    write(tmp_path / "peft", {**on(lora(1)), head: Replace(value)}, modules_to_save=["score"])
    lorahub.convert(tmp_path / "peft", "kohya", tmp_path / "x.safetensors", base=base)
    report = lorahub.convert(tmp_path / "x.safetensors", "peft", tmp_path / "back", base=base)
    found = read(tmp_path / "back").deltas[head]
    assert isinstance(found, Replace)
    assert report.rules["difference-to-replacement"] == 1
    close(found.value.numpy(), value.numpy(), 1e-6)


def test_a_module_that_peft_could_not_load_is_not_kept_whole(tmp_path: Path) -> None:
    """PEFT wants all that a kept module has; a file with a part of it gives only that part."""
    norm = "stem.normalization"
    base = based({f"{MODULES[0]}.weight": (OUT, IN), f"{norm}.weight": (8,), f"{norm}.running_mean": (8,)}, {})
    write(tmp_path / "x", {**on(lora(1)), Target("", norm, "weight"): Full(drawn(8))}, "kohya")
    with pytest.raises(CannotCarry, match="no word"):
        lorahub.convert(tmp_path / "x", "peft", tmp_path / "out", base=base)


def test_a_bare_model_is_the_base_of_the_component_that_is_named(tmp_path: Path) -> None:
    tensors = {}
    for prefix, module in (("lora_unet", "mid_block_to_q"), ("lora_te", "text_model_fc1")):
        tensors[f"{prefix}_{module}.lora_down.weight"] = drawn(2, 6)
        tensors[f"{prefix}_{module}.lora_up.weight"] = drawn(6, 2)
    save_file(tensors, tmp_path / "x.safetensors")
    base = based({"mid_block.to_q.weight": (6, 6)}, {})
    with pytest.raises(CannotCarry) as stop:
        lorahub.convert(tmp_path / "x.safetensors", "diffusers", tmp_path / "out", base=base)
    assert "--component" in stop.value.hint
    lorahub.convert(tmp_path / "x.safetensors", "diffusers", tmp_path / "out", base=base, component="unet")
    assert set(read(tmp_path / "out").deltas) == {Target("unet", "mid_block.to_q", "weight")}


def test_names_of_a_tool_of_its_own_are_not_taken_for_the_models(tmp_path: Path) -> None:
    folder = tmp_path / "torchtune"
    folder.mkdir()
    tensors = {"layers.0.attn.v_proj.lora_a.weight": drawn(2, 8), "layers.0.attn.v_proj.lora_b.weight": drawn(8, 2)}
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"r": 2, "lora_alpha": 4, "peft_type": "LORA"}))
    with pytest.raises(CannotCarry, match="Meta's names") as stop:
        lorahub.convert(folder, "peft", tmp_path / "out")
    assert "--base" in stop.value.hint


def test_a_base_without_numbers_gives_names_and_sizes(tmp_path: Path) -> None:
    block = drawn(3, OUT, seed=1)
    write(tmp_path / "miss", on(MiSS(block)))
    with torch.device("meta"):
        parts = torch.nn.ModuleDict({"q_proj": torch.nn.Linear(IN, OUT, bias=False)})
        layer = torch.nn.ModuleDict({"self_attn": parts})
        model = torch.nn.ModuleDict({"model": torch.nn.ModuleDict({"layers": torch.nn.ModuleList([layer])})})
    report = lorahub.convert(tmp_path / "miss", "diffusers", tmp_path / "out", base=model)
    assert report.rules == {"miss-to-lora": 1}
    assert report.max_error == 0.0


def test_a_reference_to_a_hub_is_a_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORAHUB_CACHE", str(tmp_path / "cache"))
    write(tmp_path / "peft", on(lora(1)))
    lorahub.record(tmp_path / "peft", name="ink", license="mit", version="1.0.0")
    hub = str(tmp_path / "hub")
    record = AdapterRecord.load(tmp_path / "peft" / "lorahub.json")
    base = {"repo_id": "acme/base"}
    (tmp_path / "peft" / "lorahub.json").write_text(record.changed(base=base).to_json())
    lorahub.push(tmp_path / "peft", "acme/ink", version="1.0.0", hub=hub)
    report = lorahub.convert("acme/ink@1.0.0", "kohya", tmp_path / "out", hub=hub)
    assert "acme/ink" in report.adapter
    source, found = read(tmp_path / "peft").deltas, read(tmp_path / "out").deltas
    assert all(same(source[target], found[target]) for target in source)
