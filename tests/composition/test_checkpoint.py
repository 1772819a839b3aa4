"""``lorahub.compose.checkpoint``: what a method makes goes into the base as it is, in one rounding."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from composition.composed import IN, OUT, dense, same, save_base, write
from safetensors.torch import load_file

import lorahub
from lorahub.adapter import Adapter
from lorahub.bases.layout import Target
from lorahub.composing.asked import requested
from lorahub.composing.job import prepare_composition
from lorahub.composition.uncut import Uncut
from lorahub.deltas.delta import Delta
from lorahub.deltas.expert_lora import ExpertLoRA
from lorahub.deltas.lora import LoRA
from lorahub.engine.report import MergeReport
from lorahub.errors import UnsupportedKind
from lorahub.files.writer import save_file

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TinyModel = Callable[..., "PreTrainedModel"]
DENSITY = 0.4
TIES: dict[str, Any] = {"method": "ties", "parameters": {"density": DENSITY}}
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # PEFT does


@pytest.fixture
def three(tmp_path: Path) -> list[Path]:
    """Adapters of several scales and targets."""
    said: list[dict[str, Any]] = [{}, {"names": ("q", "k")}, {"use_rslora": True}]
    return [write(tmp_path / f"a{number}", number, **each) for number, each in enumerate(said)]


def checkpoint(
    base: Path, adapters: Sequence[Path], weights: Sequence[float], out: Path, *, threads: int = 1, **fields: Any
) -> MergeReport:
    given = {"base": str(base), "output": "checkpoint", **fields}
    request = requested([*map(str, adapters)], weights, **given)
    return prepare_composition(request, allow=["base-unrecorded"]).merge(out, threads=threads)


def ties(changes: Sequence[torch.Tensor], weights: Sequence[float]) -> torch.Tensor:
    """TIES in float64, element by element: keep the largest of each, elect a sign, take the mean of those with it."""
    trimmed = []
    for change, weight in zip(changes, weights, strict=True):
        keep = int(DENSITY * change.numel())
        bound = change.abs().flatten().sort(descending=True).values[keep - 1] if change.any() else 0.0
        trimmed.append(torch.where(change.abs() >= bound, change, 0.0) * weight)
    result = torch.zeros_like(changes[0])
    for place in range(result.numel()):
        values = [float(each.view(-1)[place]) for each in trimmed]
        agreeing = [value for value in values if value * sum(values) > 0]
        result.view(-1)[place] = sum(agreeing) / max(1, len(agreeing))
    return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_elementwise_changes_go_in_dense_and_are_rounded_once(
    three: list[Path], tmp_path: Path, dtype: torch.dtype
) -> None:
    base = save_base(tmp_path / "base", dtype=dtype)
    weights = (0.7, 0.5, -0.6)
    report = checkpoint(base, three, weights, tmp_path / "merged", **TIES)
    assert "change-cut" not in {finding.code for finding in report.findings}
    before, after = (load_file(folder / "model.safetensors") for folder in (base, tmp_path / "merged"))
    loaded = [lorahub.load(folder) for folder in three]
    for layer in range(2):
        for name in "qkv":
            target = Target("", f"layers.{layer}.{name}", "weight")
            wanted = before[target.name].double() + ties([dense(each, target) for each in loaded], weights)
            found = after[target.name].double()
            assert not torch.equal(after[target.name], before[target.name])
            rounded = (wanted.to(dtype).double() - wanted).abs()
            assert bool(((found - wanted).abs() <= rounded * 1.001 + 2e-6 * wanted.abs().max()).all())
            most = 1e-2 if dtype is torch.bfloat16 else 1.0
            assert float((found != wanted.to(dtype).double()).double().mean()) <= most
    assert torch.equal(after["head.weight"], before["head.weight"])


def test_factors_that_a_method_gives_stay_factors_and_go_in_once(three: list[Path], tmp_path: Path) -> None:
    base = save_base(tmp_path / "base")
    checkpoint(base, three, (1.0, 1.0, 1.0), tmp_path / "merged", method="peft_linear")
    made = lorahub.compose(three, method="peft_linear")
    _demand_same(base, tmp_path / "merged", made)


def _demand_same(base: Path, merged: Path, made: Adapter, tolerance: float = 1e-5) -> None:
    before, after = (load_file(folder / "model.safetensors") for folder in (base, merged))
    for target in made.deltas:
        moved = after[target.name].double() - before[target.name].double()
        assert same(moved, dense(made, target), tolerance), target.name


@pytest.mark.parametrize(
    "fields",
    [
        {"method": "dare_ties", "parameters": {"density": 0.5}, "seed": 3},
        {"method": "breadcrumbs"},
        {"method": "karcher"},
        {"method": "model_stock", "parameters": {"scope": "adapter"}},
    ],
    ids=lambda fields: fields["method"],
)
def test_a_checkpoint_has_what_an_adapter_of_full_rank_would_have(
    three: list[Path], tmp_path: Path, fields: dict[str, Any]
) -> None:
    base = save_base(tmp_path / "base")
    whole = {**fields, **fields.get("parameters", {})}
    whole.pop("parameters", None)
    made = lorahub.compose(three, weights=(0.5, 0.3, 0.7), rank=IN, base=str(base), **whole)
    checkpoint(base, three, (0.5, 0.3, 0.7), tmp_path / "merged", **fields)
    _demand_same(base, tmp_path / "merged", made)


@pytest.mark.plugin("transformers")
def test_the_bytes_do_not_depend_on_threads_and_the_base_may_store_weights_the_other_way_round(
    tiny_model: TinyModel, tmp_path: Path
) -> None:
    from peft import LoraConfig, get_peft_model

    model = tiny_model("gpt2", n_layer=1)
    model.save_pretrained(tmp_path / "base")
    changes: list[dict[str, torch.Tensor]] = []
    before = {name: each.detach().double() for name, each in model.named_parameters()}
    for number in range(2):
        config = LoraConfig(r=2, target_modules=["c_attn", "c_fc"], fan_in_fan_out=True)
        tuned = get_peft_model(tiny_model("gpt2", n_layer=1), config)
        generator = torch.Generator().manual_seed(number)
        for name, parameter in tuned.named_parameters():
            if "lora_" in name:
                parameter.data = torch.randn(parameter.shape, generator=generator)
        tuned.save_pretrained(str(tmp_path / f"a{number}"))
        merged = tuned.double().merge_and_unload()
        changes.append({name: each.detach() - before[name] for name, each in merged.named_parameters()})
    adapters = [tmp_path / f"a{number}" for number in range(2)]
    for threads in (1, 3):
        checkpoint(tmp_path / "base", adapters, (0.6, 0.5), tmp_path / f"merged-{threads}", threads=threads, **TIES)
    one, three = (tmp_path / f"merged-{threads}" / "model.safetensors" for threads in (1, 3))
    assert one.read_bytes() == three.read_bytes()
    found = load_file(one)
    changed = [name for name in before if any(bool(change[name].any()) for change in changes)]
    assert len(changed) == 2
    for name in changed:
        wanted = before[name] + ties([change[name].contiguous() for change in changes], (0.6, 0.5))
        (stored,) = (value for key, value in found.items() if name.endswith(key))
        assert float((stored.double() - wanted).abs().max()) < 1e-5


def test_what_depends_on_the_base_is_taken_at_the_base_or_refused_before_anything_is_written(
    three: list[Path], tmp_path: Path
) -> None:
    base = save_base(tmp_path / "base")
    given = [three[0], write(tmp_path / "dora", 5, dora=True)]
    with pytest.raises(UnsupportedKind, match=r"layers\.0\.q\.weight: a change of kind dora"):
        checkpoint(base, given, (0.5, 0.5), tmp_path / "refused", **TIES)
    assert not [*tmp_path.glob("*refused*")]
    checkpoint(base, given, (0.5, 0.5), tmp_path / "merged", non_additive="dense", **TIES)
    made = lorahub.compose(
        given,
        weights=(0.5, 0.5),
        method="ties",
        density=DENSITY,
        rank=IN,
        base=str(base),
        non_additive="dense",
        allow=["base-unrecorded"],
    )
    _demand_same(base, tmp_path / "merged", made)


def test_new_values_go_in_beside_what_is_added(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(9)
    heads = [torch.randn(3, OUT, generator=generator) for _ in range(2)]
    given = [write(tmp_path / name, number, head=heads[number]) for number, name in enumerate("ab")]
    base = save_base(tmp_path / "base")
    checkpoint(base, given, (0.7, 0.6), tmp_path / "merged", **TIES)
    before, after = (load_file(folder / "model.safetensors") for folder in (base, tmp_path / "merged"))
    loaded = [lorahub.load(folder) for folder in given]
    head = before["head.weight"].double()
    assert same(after["head.weight"].double() - head, ties([each.double() - head for each in heads], (0.7, 0.6)), 1e-5)
    q = Target("", "layers.1.q", "weight")
    moved = after[q.name].double() - before[q.name].double()
    assert same(moved, ties([dense(each, q) for each in loaded], (0.7, 0.6)), 1e-5)


def test_a_merge_holds_what_was_made_of_one_target_for_each_thread(
    three: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = save_base(tmp_path / "base")
    alive: list[weakref.ref[torch.Tensor]] = []
    counts: list[int] = []
    plain = Uncut._made

    def counted(self: Uncut, target: Target) -> Any:
        made = plain(self, target)
        assert isinstance(made, torch.Tensor)
        gc.collect()
        counts.append(sum(each() is not None for each in alive))
        alive.append(weakref.ref(made))
        return made

    monkeypatch.setattr(Uncut, "_made", counted)
    checkpoint(base, three, (0.5, 0.5, 0.5), tmp_path / "merged", **TIES)
    assert len(counts) == 6  # each target is made once
    assert max(counts) <= 1


def test_experts_in_one_parameter_go_in_as_factors_and_what_that_leaves_out_is_told(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(5)
    stack, plain = Target("", "mlp", "experts"), Target("", "mlp.gate", "weight")
    shapes = {stack: (2, OUT, IN), plain: (OUT, IN)}
    base = tmp_path / "base"
    base.mkdir()
    before = {target.name: torch.randn(shape, generator=generator) for target, shape in shapes.items()}
    save_file(base / "model.safetensors", before)
    (base / "config.json").write_text("{}")

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    given = []
    for _ in range(2):
        deltas: dict[Target, Delta] = {
            stack: ExpertLoRA(normal(2, OUT, 3), normal(2, 3, IN), 0.5),
            plain: LoRA(normal(OUT, 3), normal(3, IN), 0.5),
        }
        given.append(Adapter(deltas=deltas))
    stacks = [adapter.deltas[stack].delta(torch.zeros(shapes[stack])).double() for adapter in given]

    def merged(name: str, **fields: Any) -> tuple[set[str], Mapping[str, torch.Tensor]]:
        request = requested(given, (0.5, 0.5), base=str(base), output="checkpoint", **fields)
        report = prepare_composition(request).merge(tmp_path / name)
        after = load_file(tmp_path / name / "model.safetensors")
        return {each.code for each in report.findings}, {key: after[key].double() - before[key] for key in before}

    said, moved = merged("karcher", method="karcher")
    assert "change-cut" not in said
    assert float(moved[stack.name].norm()) > 1
    said, moved = merged("ties", **TIES)
    assert "change-cut" in said
    assert same(moved[plain.name], ties([dense(each, plain) for each in given], (0.5, 0.5)), 1e-5)
    for expert in range(2):
        wanted = ties([each[expert].contiguous() for each in stacks], (0.5, 0.5))
        assert 1e-3 < float((moved[stack.name][expert] - wanted).norm() / wanted.norm()) < 0.6
