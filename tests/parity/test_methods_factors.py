"""Methods on factors beside mergekit and PEFT, which compute the same on whole matrices; on real adapters as well.

mergekit merges whole models: it is given a random base with each change added, and takes the base away itself.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

from lorahub.adapter import load, open_header
from lorahub.composition.algebra.truncate import Budget, truncate
from lorahub.composition.method import Method, Terms
from lorahub.composition.methods.core import Core
from lorahub.composition.methods.iso_c import IsoC
from lorahub.composition.methods.karcher import Karcher
from lorahub.composition.methods.knots import Knots
from lorahub.composition.methods.linear import Cat, Linear
from lorahub.composition.methods.model_stock import ModelStock
from lorahub.composition.methods.multislerp import Multislerp
from lorahub.composition.methods.nuslerp import Nuslerp
from lorahub.composition.methods.peft_linear import PeftLinear
from lorahub.composition.methods.slerp import Slerp
from lorahub.composition.methods.svd import Svd
from lorahub.composition.methods.ties import Ties
from lorahub.composition.methods.tsv import Tsv
from lorahub.composition.multiplicative import combined as combined_product
from lorahub.deltas.delta import LowRank
from lorahub.errors import UnsupportedKind
from lorahub.plugins import Registry

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what their imports say of other packages is not ours
    from mergekit.merge_methods.base import PerInputValues, TensorGroup
    from mergekit.merge_methods.karcher import karcher_merge_tensors
    from mergekit.merge_methods.model_stock import model_stock_merge_method
    from mergekit.merge_methods.multislerp import multislerp
    from mergekit.merge_methods.nuslerp import nuslerp_merge_method
    from mergekit.merge_methods.slerp import slerp
    from peft import HRAConfig, IA3Config, LoraConfig, OFTConfig, get_peft_model

if TYPE_CHECKING:
    from transformers import PreTrainedModel

OUT, IN = 24, 31
WEIGHTS = (0.7, 1.3, 0.4)


def changes(ranks: Sequence[int], *, seed: int = 0) -> list[LowRank]:
    """Random factors that have directions in common."""
    generator = torch.Generator().manual_seed(seed)
    up, down = torch.randn(OUT, 9, generator=generator), torch.randn(9, IN, generator=generator)
    return [
        LowRank(
            torch.randn(OUT, rank, generator=generator) + up[:, :rank],
            torch.randn(rank, IN, generator=generator) + down[:rank],
            0.5 + number,
        )
        for number, rank in enumerate(ranks)
    ]


def dense(change: object) -> torch.Tensor:
    assert isinstance(change, LowRank)
    return change.scale * (change.up.double() @ change.down.double())


def terms(found: Sequence[LowRank], weights: Sequence[float]) -> Terms:
    shape = (found[0].up.shape[0], found[0].down.shape[1])
    return Terms(shape=shape, changes=tuple(found), weights=tuple(weights), seeds=tuple(range(len(found))))


def grouped(found: Sequence[torch.Tensor]) -> tuple[TensorGroup, torch.Tensor]:
    """What mergekit is given: a base, and each change added to it."""
    base = torch.randn(found[0].shape, generator=torch.Generator().manual_seed(99), dtype=torch.float64)
    return TensorGroup.from_tensors([base, *(base + each for each in found)], base_index=0), base


def by_slerp(found: list[torch.Tensor], weights: Sequence[float]) -> torch.Tensor:
    return slerp(torch.tensor([0.3]), (weights[0] * found[0])[None], (weights[1] * found[1])[None])[0]


def by_nuslerp(**settings: bool) -> Callable[[list[torch.Tensor], Sequence[float]], torch.Tensor]:
    def run(found: list[torch.Tensor], weights: Sequence[float]) -> torch.Tensor:
        group, base = grouped(found)
        shared = PerInputValues([(n + 1, weight) for n, weight in enumerate(weights)])
        return nuslerp_merge_method.merge_group(group, weight=shared, **settings) - base

    return run


def by_multislerp(**settings: bool) -> Callable[[list[torch.Tensor], Sequence[float]], torch.Tensor]:
    def run(found: list[torch.Tensor], weights: Sequence[float]) -> torch.Tensor:
        group, base = grouped(found)
        shared = PerInputValues([(n + 1, weight) for n, weight in enumerate(weights)])
        return multislerp.merge_group(group, weight=shared, **settings) - base

    return run


def by_karcher(found: list[torch.Tensor], weights: Sequence[float]) -> torch.Tensor:
    return karcher_merge_tensors(found, [weight / sum(weights) for weight in weights])


def by_model_stock(*, filter_wise: bool) -> Callable[[list[torch.Tensor], Sequence[float]], torch.Tensor]:
    def run(found: list[torch.Tensor], weights: Sequence[float]) -> torch.Tensor:
        group, base = grouped([weight * each for weight, each in zip(weights, found, strict=True)])
        return model_stock_merge_method.merge_group(group, filter_wise=filter_wise) - base

    return run


MERGEKIT: dict[str, tuple[Method, Callable[[list[torch.Tensor], Sequence[float]], torch.Tensor], int]] = {
    "slerp": (Slerp(t=0.3), by_slerp, 2),
    "nuslerp": (Nuslerp(), by_nuslerp(), 2),
    "nuslerp, not flattened": (Nuslerp(nuslerp_flatten=False), by_nuslerp(nuslerp_flatten=False), 2),
    "nuslerp, row-wise": (
        Nuslerp(nuslerp_flatten=False, nuslerp_row_wise=True),
        by_nuslerp(nuslerp_flatten=False, nuslerp_row_wise=True),
        2,
    ),
    "multislerp": (Multislerp(), by_multislerp(), 3),
    "multislerp, not normalised": (
        Multislerp(normalize_weights=False),
        by_multislerp(normalize_weights=False),
        3,
    ),
    "karcher": (Karcher(), by_karcher, 3),
    "model_stock": (ModelStock(), by_model_stock(filter_wise=False), 3),
    "model_stock, filter-wise": (ModelStock(filter_wise=True), by_model_stock(filter_wise=True), 3),
}


def agree(name: str, found: list[LowRank], weights: Sequence[float], tolerance: float) -> None:
    """The method comes to what mergekit does, which is not small, and would not without the last adapter."""
    method, peer, count = MERGEKIT[name]
    found, weights = found[:count], weights[:count]
    expected = peer([dense(each) for each in found], weights)
    assert float(expected.norm()) > 1e-2
    assert float((dense(method.combine(terms(found, weights))) - expected).norm()) <= tolerance * float(expected.norm())
    out, inner = expected.shape
    dropped = [*found[:-1], LowRank(torch.zeros(out, 0), torch.zeros(0, inner), 1.0)]
    assert float((dense(method.combine(terms(dropped, weights))) - expected).norm()) > 1e-2 * float(expected.norm())


@pytest.mark.parametrize("name", MERGEKIT)
@pytest.mark.parametrize("ranks", [(4, 4, 4), (2, 7, 3)])
def test_a_method_comes_to_what_mergekit_computes_on_matrices(name: str, ranks: tuple[int, ...]) -> None:
    agree(name, changes(ranks), WEIGHTS, 1e-7)


def test_one_change_of_nothing_is_what_mergekit_makes_of_it() -> None:
    found = [changes((3,))[0], LowRank(torch.zeros(OUT, 0), torch.zeros(0, IN), 1.0)]
    for name in ("slerp", "nuslerp", "model_stock"):
        method, peer, _ = MERGEKIT[name]
        expected = peer([dense(each) for each in found], (1.0, 1.0))
        assert torch.allclose(dense(method.combine(terms(found, (1.0, 1.0)))), expected, atol=1e-7)


# PEFT


@pytest.fixture
def combined(tiny_model: Callable[..., PreTrainedModel]) -> Callable[..., dict[str, list[LowRank]]]:
    """``combined(how, ranks, weights)``: what PEFT's ``add_weighted_adapter`` comes to.

    Of every adapted module: the changes that went in, and the one that came out.
    """

    def run(how: str, ranks: Sequence[int], weights: Sequence[float], **settings: Any) -> dict[str, list[LowRank]]:
        model = tiny_model("llama")
        names = [f"a{number}" for number in range(len(ranks))]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PEFT's warnings are its own affair
            targets = ["q_proj", "v_proj", "down_proj", "embed_tokens"]
            configs = [LoraConfig(r=rank, lora_alpha=2 * rank + 1, target_modules=targets) for rank in ranks]
            peft = get_peft_model(model, configs[0], adapter_name=names[0])
            for name, config in zip(names[1:], configs[1:], strict=True):
                peft.add_adapter(name, config)
            generator = torch.Generator().manual_seed(3)
            for name, parameter in peft.named_parameters():
                if "lora_" in name:
                    parameter.data = torch.randn(parameter.shape, generator=generator)
            peft.add_weighted_adapter(names, list(weights), "result", combination_type=how, **settings)
        found: dict[str, list[LowRank]] = {}
        for label, module in peft.named_modules():
            if hasattr(module, "lora_A"):
                found[label] = [_of(module, name) for name in [*names, "result"]]
        assert len(found) == 7
        return found

    return run


def _of(module: Any, name: str) -> LowRank:
    if name in module.lora_A:
        return LowRank(module.lora_B[name].weight.data, module.lora_A[name].weight.data, module.scaling[name])
    embedding = module.lora_embedding_A[name].data.mT, module.lora_embedding_B[name].data.mT  # [in, r], [r, out]
    return LowRank(*embedding, module.scaling[name])


def mirrored(change: LowRank) -> LowRank:
    return LowRank(change.down.mT, change.up.mT, change.scale)


Combined = Callable[..., dict[str, list[LowRank]]]


def far(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).norm() / other.norm())


@pytest.mark.parametrize("weights", [(0.5, 1.5, 1.0), (0.5, -1.5, 1.0)])
def test_cat_is_what_peft_concatenates(combined: Combined, weights: tuple[float, ...]) -> None:
    for *found, result in combined("cat", (2, 3, 4), weights).values():
        made = Cat().combine(terms(found, weights))
        assert isinstance(made, LowRank)
        assert made.up.shape[1] == result.up.shape[1] == 9
        assert far(dense(made), dense(result)) < 1e-6
        assert far(dense(Cat().combine(terms(found[:2], weights[:2]))), dense(result)) > 1e-2


def test_svd_cut_to_a_rank_is_what_peft_cuts(combined: Combined) -> None:
    weights = (0.5, -1.5, 1.0)
    for *found, result in combined("svd", (2, 3, 4), weights, svd_rank=5).values():
        total = Svd().combine(terms(found, weights))
        assert isinstance(total, LowRank)
        cut = truncate(total.up, total.down, total.scale, Budget(rank=5))
        assert far(cut.up @ cut.down, dense(result)) < 1e-5
        assert 1e-2 < far(dense(result), dense(total)) < 1
        fewer = Svd().combine(terms(found[:2], weights[:2]))
        assert isinstance(fewer, LowRank)
        less = truncate(fewer.up, fewer.down, fewer.scale, Budget(rank=5))
        assert far(less.up @ less.down, dense(result)) > 1e-2


@pytest.mark.parametrize("weights", [(0.5, 0.5), (0.5, -1.5), (-1.0, -0.3)])
def test_peft_linear_is_what_peft_calls_linear(combined: Combined, weights: tuple[float, ...]) -> None:
    for label, changed in combined("linear", (3, 3), weights).items():
        # an embedding's A is the side of the tokens, which counts where the signs differ
        turn = "embed_tokens" in label and min(weights) < 0 < max(weights)
        *found, result = [mirrored(each) for each in changed] if turn else changed
        made = PeftLinear().combine(terms(found, weights))
        assert far(dense(made), dense(result)) < 1e-6
        assert far(dense(PeftLinear().combine(terms(found[:1], weights[:1]))), dense(result)) > 1e-2
        assert far(dense(result), dense(Linear().combine(terms(found, weights)))) > 0.3  # and no weighted sum


def test_unequal_ranks_have_no_such_linear_there_nor_here(combined: Combined) -> None:
    with pytest.raises(ValueError, match="same r value"):
        combined("linear", (2, 3), (0.5, 0.5))
    with pytest.raises(UnsupportedKind, match="ranks 2, 3"):
        PeftLinear().combine(terms(changes((2, 3)), (0.5, 0.5)))


MULTIPLY: dict[str, Callable[[], Any]] = {
    "ia3": lambda: IA3Config(target_modules=["q_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "oft": lambda: OFTConfig(target_modules=["q_proj", "down_proj"], oft_block_size=4, r=0, use_cayley_neumann=False),
    "hra": lambda: HRAConfig(target_modules=["q_proj", "down_proj"], r=4),
    "hra, orthogonal": lambda: HRAConfig(target_modules=["q_proj", "down_proj"], r=4, apply_GS=True),
}


@pytest.mark.parametrize("kind", MULTIPLY)
def test_a_product_is_what_peft_merges_one_after_the_other(
    kind: str, tiny_model: Callable[..., PreTrainedModel], tmp_path: Path, registry: Registry
) -> None:
    model = tiny_model("llama").double()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    names = ["one", "other", "third"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's warnings are its own affair
        peft = get_peft_model(model, MULTIPLY[kind](), adapter_name=names[0])
        for name in names[1:]:
            peft.add_adapter(name, MULTIPLY[kind]())
        generator = torch.Generator().manual_seed(3)
        for name, parameter in peft.named_parameters():
            if any(part in name for part in ("ia3_", "oft_", "hra_")):
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.data = 1 + 0.3 * noise if kind == "ia3" else noise.to(parameter)
        peft.save_pretrained(tmp_path)
        peft.merge_adapter(names)
    adapters = [load(open_header(tmp_path / name, registry), registry).deltas for name in names]
    merged = peft.get_base_model().state_dict()
    assert len(adapters[0]) >= 4
    for target in adapters[0]:
        weight = before.get(target.name)
        if weight is None:
            continue  # a gain would go to a bias as well, where the layer had one
        changes_of_it = [each[target] for each in adapters]
        product = combined_product(changes_of_it, (1.0,) * 3, "product", dtype=torch.float64)
        assert product is not None
        wanted = merged[target.name.replace(".weight", ".base_layer.weight")] - weight
        assert float(wanted.norm()) > 1e-2 * float(weight.norm())
        assert float((product.delta(weight) - wanted).norm()) < 1e-6 * float(wanted.norm())
        fewer = combined_product(changes_of_it[:2], (1.0,) * 2, "product", dtype=torch.float64)
        assert fewer is not None
        assert float((fewer.delta(weight) - wanted).norm()) > 1e-2 * float(wanted.norm())


# Real adapters: three of one network, by different people, with different tools

PEOPLE = (
    "catundchat__stable-diffusion-v1.5-lora__sd15_cat_st",
    "hyper07__Skin-Lesion-Generation-Diffusion__sd_skin_peft",
    "huggingface__diffusers__sd_pokemon_docs",
)
MATRICES = (
    "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q",
    "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_v",  # 768 inputs, 320 outputs
    "up_blocks.3.attentions.2.transformer_blocks.0.attn2.to_out.0",
)


@pytest.fixture(scope="module")
def real_changes(real_adapters: Path, registry: Registry) -> dict[str, list[LowRank]]:
    """Of some matrices: what each of the three does to it."""
    found: dict[str, list[LowRank]] = {name: [] for name in MATRICES}
    for folder in PEOPLE:
        deltas = load(open_header(real_adapters / folder, registry), registry).deltas
        for target, delta in deltas.items():
            low = delta.low_rank()
            if target.module in found and low is not None:
                found[target.module].append(low)
    assert all(len(each) == 3 for each in found.values())
    return found


@pytest.mark.parametrize("matrix", MATRICES)
@pytest.mark.parametrize("name", MERGEKIT)
def test_on_real_adapters_a_method_comes_to_what_mergekit_computes(
    real_changes: dict[str, list[LowRank]], name: str, matrix: str
) -> None:
    """As they are they stand at right angles; with half of the first in each there is something to interpolate."""
    first = real_changes[matrix][0]
    half = LowRank(first.up, first.down, first.scale / 2)
    related = [Cat().combine(terms([each, half], (1.0, 1.0))) for each in real_changes[matrix]]
    norm = max(float(dense(each).norm()) for each in related)
    agree(name, [LowRank(each.up, each.down, 1 / norm) for each in related if isinstance(each, LowRank)], WEIGHTS, 1e-6)


def test_real_adapters_of_different_people_stand_at_right_angles(real_changes: dict[str, list[LowRank]]) -> None:
    """So Model Stock, which takes what is orthogonal for noise, leaves next to nothing of them."""
    for found in real_changes.values():
        one, other = (dense(each) for each in found[:2])
        assert abs(float((one * other).sum() / (one.norm() * other.norm()))) < 0.02
        stock = dense(ModelStock().combine(terms(found[:2], (1.0, 1.0))))
        assert float(stock.norm()) < 0.02 * float((one + other).norm())


@pytest.mark.parametrize("matrix", MATRICES)
def test_on_real_adapters_factor_methods_are_their_dense_definitions(
    real_changes: dict[str, list[LowRank]], matrix: str
) -> None:
    found = real_changes[matrix]
    scaled = [weight * dense(each) for weight, each in zip(WEIGHTS, found, strict=True)]
    total = sum(scaled[1:], scaled[0])
    u, s, vh = torch.linalg.svd(total, full_matrices=False)
    parts = [torch.linalg.svd(each, full_matrices=False) for each in scaled]
    left = torch.cat([part[0][:, :4] for part in parts], dim=1)
    right = torch.cat([part[2][:4].mT for part in parts], dim=1)
    polars = [torch.linalg.multi_dot([*torch.linalg.svd(each, full_matrices=False)[::2]]) for each in (left, right)]
    expected = {
        Linear(): total,
        IsoC(): float(s[:12].mean()) * u[:, :12] @ vh[:12],
        Tsv(): polars[0] @ torch.diag(torch.cat([part[1][:4] for part in parts])) @ polars[1].mT,
        Knots(inner=Ties(density=1.0, normalize=True)): None,
    }
    for method, wanted in expected.items():
        result = dense(method.combine(terms(found, WEIGHTS)))
        if wanted is not None:
            assert far(result, wanted) < 1e-8
        fewer = [*found[:2], LowRank(found[2].up[:, :0], found[2].down[:0], 1.0)]
        assert far(dense(method.combine(terms(fewer, WEIGHTS))), result) > 1e-2


@pytest.mark.parametrize("matrix", MATRICES)
@pytest.mark.parametrize("preset", [Knots, Core])
def test_on_real_adapters_ties_in_a_basis_is_ties_on_the_dense_coordinates(
    real_changes: dict[str, list[LowRank]], preset: type[Knots | Core], matrix: str
) -> None:
    """TIES by its definition, element by element, on coordinates that a dense SVD gives."""
    found = real_changes[matrix]
    full = [dense(each) for each in found]
    left = torch.linalg.svd(torch.cat(full, dim=1), full_matrices=False)[0][:, :12]
    right = torch.eye(full[0].shape[1], dtype=torch.float64)
    if preset is Core:
        right = torch.linalg.svd(torch.cat(full), full_matrices=False)[2][:12].mT
    points = [left.mT @ each @ right for each in full]
    trimmed = []
    for point in points:
        kept = round(0.25 * point.numel())
        least = point.abs().flatten().sort(descending=True).values[kept - 1]
        trimmed.append(torch.where(point.abs() >= least, point, 0.0))
    total = sum(trimmed[1:], trimmed[0])
    elected = [torch.where(each * total > 0, each, 0.0) for each in trimmed]
    counts = sum((each != 0).double() for each in elected)
    assert isinstance(counts, torch.Tensor)
    mean = sum(elected[1:], elected[0]) / counts.clamp_min(1)
    expected = left @ mean @ right.mT
    result = dense(preset(inner=Ties(density=0.25)).combine(terms(found, (1.0, 1.0, 1.0))))
    assert far(result, expected) < 1e-8
    assert far(sum(full[1:], full[0]), expected) > 1e-2
