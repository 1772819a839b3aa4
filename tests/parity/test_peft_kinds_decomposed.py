"""PEFT saves and merges, lorahub merges from the files alone: kinds that take the weight apart, or draw numbers again.

Numbers are PEFT 0.21.2's own: nothing is trained, every adapter parameter is moved by seeded noise, saved, and PEFT's
``merge_and_unload`` is what lorahub must come to.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.pytorch_utils import Conv1D

from lorahub.adapter import Adapter, load, open_header, save
from lorahub.bases.index import BaseIndex, BaseRef, ParameterInfo
from lorahub.bases.layout import Target
from lorahub.bases.torch_module import TorchModule
from lorahub.deltas.delta import Delta
from lorahub.deltas.frod import Rebased
from lorahub.deltas.kind import Leaf
from lorahub.deltas.osf import Tail
from lorahub.deltas.pissa import Moved
from lorahub.deltas.plain import plain_lora
from lorahub.deltas.tinylora import Tiny
from lorahub.deltas.waveft import Wavelets
from lorahub.errors import BaseNeeded, CannotCarry, IntegrityError, LorahubError, NotFinite, UnsupportedKind
from lorahub.findings import Verdict
from lorahub.formats.peft.completion import surroundings
from lorahub.formats.peft.fits import Suffixes
from lorahub.merging import merge
from lorahub.plugins import Registry

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what PEFT's imports say of other packages is not ours
    import peft
    from peft import PeftConfig, PeftModel, get_peft_model
    from peft.tuners.lora.config import KasaConfig
    from peft.tuners.tuners_utils import check_target_module_exists


if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Layers(nn.Module):
    """Every layer type that PEFT adapts with one of these kinds; the order is not that of the names."""

    def __init__(self) -> None:
        super().__init__()
        self.third = nn.Linear(16, 16)
        self.embed = nn.Embedding(11, 12)
        self.first = nn.Linear(12, 8)
        self.second = nn.Linear(8, 12, bias=False)
        self.odd = nn.Linear(7, 9)
        self.turned = Conv1D(8, 12)
        self.square = Conv1D(12, 12)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.third(self.first(self.embed(tokens)).repeat(1, 1, 2))


def base() -> Layers:
    torch.manual_seed(3)
    return Layers()


def index() -> BaseIndex:
    return TorchModule().index_model(base(), BaseRef())


def quietly(action: Callable[[], Any]) -> Any:
    """Run PEFT's code, whose warnings are its own affair."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return action()


@dataclass(frozen=True)
class Case:
    """A PEFT config, and what comes of it."""

    config: Callable[[], PeftConfig]
    kind: str
    changed: int = 1
    noise: float = 0.5
    codes: tuple[str, ...] = ()  # of findings
    needs_base: bool = False
    reloaded: float = 0.0  # how far PEFT is from itself after saving and loading


THREE = ["first", "second", "third"]
FIVE = [*THREE, "turned", "embed"]


def case(
    kind: str, cls: type[PeftConfig], changed: int, *, about: Mapping[str, Any] | None = None, **fields: Any
) -> Case:
    return Case(lambda: quietly(lambda: cls(**fields)), kind, changed, **(about or {}))


SIGNS = {"codes": ("result-of-this-machine",), "reloaded": 1e-6}  # lorahub writes another alpha, which cancels
DRAWN = {"codes": ("drawn-again",), "needs_base": True}

CASES: Mapping[str, Case] = {
    "kasa": case("kasa", peft.LoraConfig, 3, r=3, kasa_config=KasaConfig(), target_modules=THREE),
    "kasa, bias and rslora": case(
        "kasa",
        peft.LoraConfig,
        4,
        r=2,
        lora_alpha=5,
        use_rslora=True,
        lora_bias=True,
        kasa_config=KasaConfig(),
        target_modules=["first", "third"],
    ),
    "pissa": case("pissa", peft.LoraConfig, 3, r=3, lora_alpha=5, init_lora_weights="pissa", target_modules=THREE),
    "pissa, rslora and stored transposed": case(
        "pissa",
        peft.LoraConfig,
        2,
        r=4,
        lora_alpha=5,
        use_rslora=True,
        init_lora_weights="pissa",
        target_modules=["turned", "first"],
        rank_pattern={"first": 2},
    ),
    "olora": case("pissa", peft.LoraConfig, 3, r=3, lora_alpha=5, init_lora_weights="olora", target_modules=THREE),
    "osf": case("osf", peft.OSFConfig, 3, target_modules=THREE),
    "osf, by module": case(
        "osf", peft.OSFConfig, 3, effective_rank=0.25, rank_pattern={"first": 6, "thi": 0.8}, target_modules=THREE
    ),
    "peanut": case("peanut", peft.PeanutConfig, 3, r=3, target_modules=THREE),
    "peanut, deep": case(
        "peanut", peft.PeanutConfig, 2, r=4, depth=2, act_fn="gelu_new", scaling=0.7, target_modules=["first", "third"]
    ),
    "psoft": case("psoft", peft.PsoftConfig, 3, r=4, target_modules=THREE, about=SIGNS),
    "psoft, from random projections": case(
        "psoft",
        peft.PsoftConfig,
        3,
        r=3,
        psoft_svd="lowrank",
        psoft_svd_lowrank_niter=3,
        random_seed=5,
        ab_svd_init="pissa_init",
        target_modules=THREE,
        about=SIGNS,
    ),
    "psoft, from one random projection": case(
        "psoft",
        peft.PsoftConfig,
        1,
        r=2,
        psoft_svd="lowrank",
        psoft_svd_lowrank_niter=0,
        target_modules=["third"],
        about=SIGNS,
    ),
    "psoft, one angle less": case("psoft", peft.PsoftConfig, 1, r=1, target_modules=["third"], about=SIGNS),
    "psoft, free": case(
        "psoft",
        peft.PsoftConfig,
        1,
        r=4,
        psoft_alpha=3,
        psoft_orth=False,
        psoft_mag_a=False,
        psoft_mag_b=False,
        target_modules=["third"],
        about=SIGNS,
    ),
    **{
        f"psoft, a series of {terms}": case(
            "psoft",
            peft.PsoftConfig,
            1,
            r=4,
            use_cayley_neumann=True,
            num_cayley_neumann_terms=terms,
            cayley_neumann_eps=bound,
            psoft_mag_b=False,
            target_modules=["third"],
            about=SIGNS,
        )
        for terms, bound in {2: None, 3: 0.9, 4: None, 5: 0.5}.items()
    },
    "frod": case("frod", peft.FrodConfig, 3, sparse_rate=0.1, progressbar=False, target_modules=THREE),
    "frod, stored transposed": case(
        "frod", peft.FrodConfig, 1, progressbar=False, fan_in_fan_out=True, target_modules=["turned"]
    ),
    "frod, no places": case("frod", peft.FrodConfig, 1, sparse_rate=0.0, progressbar=False, target_modules=["first"]),
    "tinylora": case("tinylora", peft.TinyLoraConfig, 5, r=3, u=6, target_modules=FIVE),
    "tinylora, some tied": case(
        "tinylora", peft.TinyLoraConfig, 5, r=2, u=4, weight_tying=0.5, projection_seed=9, target_modules=FIVE
    ),
    "tinylora, all tied": case("tinylora", peft.TinyLoraConfig, 3, r=20, u=4, weight_tying=1.0, target_modules=THREE),
    "tinylora, drawn": case(
        "tinylora",
        peft.TinyLoraConfig,
        5,
        r=2,
        u=4,
        weight_tying=0.3,
        save_projection=False,
        target_modules=FIVE,
        about=DRAWN,
    ),
    "unilora": case("unilora", peft.UniLoraConfig, 3, r=3, theta_d_length=13, save_indices=True, target_modules=THREE),
    "unilora, drawn": case(
        "unilora",
        peft.UniLoraConfig,
        4,
        r=3,
        theta_d_length=13,
        proj_seed=5,
        target_modules=[*THREE, "turned"],
        about=DRAWN,
    ),
    "unilora, more numbers than places": case(
        "unilora", peft.UniLoraConfig, 1, r=2, theta_d_length=500, target_modules=["second"], about=DRAWN
    ),
    "supertuning, the largest": case(
        "supertuning",
        peft.SupertuningConfig,
        3,
        sparsity=0.7,
        r=2,
        lora_alpha=3,
        save_precomputed_indices=False,
        target_modules=THREE,
    ),
    "supertuning, the smallest": case(
        "supertuning",
        peft.SupertuningConfig,
        1,
        sparsity=0.5,
        select_top=False,
        save_precomputed_indices=False,
        target_modules=["third"],
    ),
    **{
        f"waveft, {family}": case(
            "waveft",
            peft.WaveFTConfig,
            3,
            n_frequency=50,
            scaling=2.0,
            wavelet_family=family,
            target_modules=["first", "odd", "turned"],
            fan_in_fan_out=turned,
        )
        for family, turned in {
            "db2": False,
            "db10": False,
            "sym2": True,
            "sym5": False,
            "coif1": False,
            "coif4": True,
        }.items()
    },
    "vera, drawn": case(
        "vera", peft.VeraConfig, 3, r=4, save_projection=False, projection_prng_key=5, target_modules=THREE, about=DRAWN
    ),
    "pvera, drawn": case("pvera", peft.PveraConfig, 3, r=4, save_projection=False, target_modules=THREE, about=DRAWN),
    "randlora, drawn": case(
        "randlora",
        peft.RandLoraConfig,
        3,
        r=3,
        randlora_alpha=4,
        save_projection=False,
        target_modules=THREE,
        about=DRAWN,
    ),
    "randlora, drawn sparse": case(
        "randlora",
        peft.RandLoraConfig,
        1,
        r=3,
        randlora_alpha=2,
        sparse=True,
        save_projection=False,
        target_modules=["first"],
        about=DRAWN,
    ),
    "randlora, drawn very sparse": case(
        "randlora",
        peft.RandLoraConfig,
        1,
        r=5,
        randlora_alpha=2,
        very_sparse=True,
        save_projection=False,
        fan_in_fan_out=True,
        target_modules=["turned"],
        about=DRAWN,
    ),
}


def trained(case: Case, folder: Path) -> PeftModel:
    """A PEFT model with every trainable number moved, saved to ``folder``."""
    model = quietly(lambda: get_peft_model(base(), case.config()))
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * case.noise)
    quietly(lambda: model.save_pretrained(folder))
    return model.eval()


def loaded(folder: Path, registry: Registry, *, with_base: bool) -> Adapter:
    return load(open_header(folder, registry, index=index() if with_base else None), registry)


def merged_by_hand(adapter: Adapter, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Every parameter of the base that the adapter changes, with the change, in the base's orientation."""
    weights = base().state_dict()
    result = {}
    for target, delta in adapter.deltas.items():
        turned = target.name in ("turned.weight", "square.weight")
        weight = weights[target.name].to(dtype)
        logical = weight.T if turned else weight
        logical = logical + delta.delta(logical)
        result[target.name] = logical.T if turned else logical
    return result


@pytest.fixture(params=CASES)
def some(request: pytest.FixtureRequest) -> Case:
    return CASES[request.param]


def test_merging_from_the_files_gives_what_peft_merges(some: Case, tmp_path: Path, registry: Registry) -> None:
    live = trained(some, tmp_path)
    header = open_header(tmp_path, registry, index=index() if some.codes else None)
    assert tuple(finding.code for finding in header.findings) == some.codes
    assert all(finding.level <= Verdict.UNVERIFIED for finding in header.findings)
    assert header.kinds == (some.kind,)
    adapter = load(header, registry)
    weights = base().state_dict()
    expected = quietly(live.merge_and_unload).state_dict()
    for dtype in (torch.float32, torch.float64):
        found = merged_by_hand(adapter, dtype)
        assert len(found) == some.changed
        for name, value in found.items():
            torch.testing.assert_close(value, expected[name].to(dtype), rtol=0, atol=2e-5)
            assert (value - weights[name]).norm() > 1e-2 * weights[name].norm()
    for name, weight in weights.items():
        assert name in found or torch.equal(expected[name], weight)


def test_a_live_model_is_merged_into_whole(some: Case, tmp_path: Path) -> None:
    live = trained(some, tmp_path)
    model = base()
    merge(model, {"one": tmp_path})
    expected = quietly(live.merge_and_unload).state_dict()
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, expected[name], rtol=0, atol=2e-5)


def test_what_is_written_reads_back_in_peft_as_the_same_change(some: Case, tmp_path: Path, registry: Registry) -> None:
    live = trained(some, tmp_path / "theirs")
    save(loaded(tmp_path / "theirs", registry, with_base=some.needs_base), tmp_path / "ours", registry=registry)
    theirs, ours = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("theirs", "ours"))
    assert ours.keys() == theirs.keys() if not some.needs_base else ours.keys() > theirs.keys()
    for key, tensor in theirs.items():
        assert ours[key].dtype == tensor.dtype
        assert torch.equal(ours[key], tensor), key

    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        again = PeftModel.from_pretrained(base(), tmp_path / "ours")
    complaints = [text for each in said if "missing" in (text := str(each.message)) or "nexpected" in text]
    # PEFT 0.21.2 also asks for a copy of RandLoRA's shared pair on every module, and has it without
    assert [text for text in complaints if ".randlora_" not in text] == []
    expected, found = (quietly(model.merge_and_unload).state_dict() for model in (live, again))
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=some.reloaded)


def config_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "adapter_config.json").read_text())


def rewrite(folder: Path, **fields: Any) -> None:
    """Change config fields; None removes one."""
    config = {name: value for name, value in (config_of(folder) | fields).items() if value is not None}
    (folder / "adapter_config.json").write_text(json.dumps(config))


def edit(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Change the stored tensors."""
    tensors = load_file(folder / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})


DRAWN_AGAIN = [name for name, each in CASES.items() if each.needs_base]


@pytest.mark.parametrize("name", DRAWN_AGAIN)
def test_what_follows_from_the_base_is_looked_at_without_it_and_not_loaded(
    name: str, tmp_path: Path, registry: Registry
) -> None:
    trained(CASES[name], tmp_path)
    header = open_header(tmp_path, registry)
    (finding,) = header.findings
    assert (finding.code, finding.level) == ("base-needed", Verdict.UNVERIFIED)
    assert "drawn again from a seed" in finding.message
    assert "in PEFT, with save_" in finding.remedy
    assert header.kinds == (CASES[name].kind,)
    with pytest.raises(BaseNeeded, match="drawn again from a seed"):
        load(header, registry)
    assert len(load(header, registry, index=index()).deltas) == CASES[name].changed


@pytest.mark.parametrize("name", ["unilora, drawn", "tinylora, drawn"])
def test_a_base_whose_order_nobody_knows_does_not_do(name: str, tmp_path: Path, registry: Registry) -> None:
    trained(CASES[name], tmp_path / "adapter")
    (tmp_path / "base").mkdir()
    save_file(base().state_dict(), tmp_path / "base" / "model.safetensors")
    with pytest.raises(LorahubError, match="order in which the model is built"):
        merge(tmp_path / "base", {"one": tmp_path / "adapter"}, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_shapes_of_a_base_on_disk_do_where_shapes_are_all_it_takes(tmp_path: Path) -> None:
    live = trained(CASES["vera, drawn"], tmp_path / "adapter")
    (tmp_path / "base").mkdir()
    save_file(base().state_dict(), tmp_path / "base" / "model.safetensors")
    merge(tmp_path / "base", {"one": tmp_path / "adapter"}, out=tmp_path / "out")
    expected = quietly(live.merge_and_unload).state_dict()
    for name, value in load_file(tmp_path / "out" / "model.safetensors").items():
        torch.testing.assert_close(value, expected[name], rtol=0, atol=2e-5)


@pytest.mark.parametrize("name", ["kasa", "pissa", "osf", "psoft", "frod", "peanut, deep", "supertuning, the largest"])
def test_a_base_on_disk_is_taken_apart_as_a_live_one_is(name: str, tmp_path: Path) -> None:
    live = trained(CASES[name], tmp_path / "adapter")
    (tmp_path / "base").mkdir()
    save_file(base().state_dict(), tmp_path / "base" / "model.safetensors")
    merge(tmp_path / "base", {"one": tmp_path / "adapter"}, out=tmp_path / "out")
    expected = quietly(live.merge_and_unload).state_dict()
    for key, value in load_file(tmp_path / "out" / "model.safetensors").items():
        torch.testing.assert_close(value, expected[key], rtol=0, atol=2e-5)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_order_is_that_of_the_model_and_not_of_names(
    family: str, tmp_path: Path, tiny_model: Callable[..., PreTrainedModel]
) -> None:
    targets = {"llama": ["q_proj", "k_proj", "v_proj", "down_proj"], "gpt2": ["c_attn", "c_fc"]}[family]
    live = quietly(
        lambda: get_peft_model(tiny_model(family), peft.UniLoraConfig(r=2, theta_d_length=29, target_modules=targets))
    )
    with torch.no_grad():
        live.base_model.unilora_theta_d["default"].add_(torch.randn(29, generator=torch.Generator().manual_seed(5)))
    quietly(lambda: live.save_pretrained(tmp_path))
    model = tiny_model(family)
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    merge(model, {"one": tmp_path})
    expected = quietly(live.merge_and_unload).state_dict()
    moved = 0
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, expected[name], rtol=0, atol=2e-5)
        moved += int((value - weights[name]).norm() > 1e-2 * weights[name].norm())
    assert moved == 2 * len(targets)

    # of a checkpoint the table of its architecture says the order
    tiny_model(family).save_pretrained(tmp_path / "base")
    merge(tmp_path / "base", {"one": tmp_path}, out=tmp_path / "out")
    merged = load_file(tmp_path / "out" / "model.safetensors")
    for name, value in expected.items():
        if name in merged:
            torch.testing.assert_close(merged[name], value, rtol=0, atol=2e-5)
    assert len(merged) > 2 * len(targets)


def named(*names: str) -> BaseIndex:
    """A base that builds matrices of these names, in this order."""
    info = ParameterInfo(shape=(4, 4), dtype="F32", stored_as="")
    parameters = {f"{name}.weight": info for name in sorted(names)}
    return BaseIndex(ref=BaseRef(), framework="torch", parameters=parameters, registered=names)


NAMES = (
    "layers.1.q",
    "model.layers.10.mlp.experts.1.down",
    "model.layers.1.attn.q",
    "model.layers.1.attn.k",
    "model.layers.1.mlp.experts.0.down",
    "model.layers.0.attn.q",
    "model.blocks.1.attn.q",
    "model.head.attn.q",
    "q",
    "lm.q_head",
)


@pytest.mark.parametrize(
    "fields",
    [
        {"target_modules": ["q", "down"]},
        {"target_modules": ["attn.q", "lm.q_head"]},
        {"target_modules": r".*\.(q|k)"},
        {"target_modules": ["q", "down"], "layers_to_transform": 1},
        {"target_modules": ["q", "k", "down"], "layers_to_transform": [1, 10], "layers_pattern": "layers"},
        {"target_modules": ["q", "layers.1.q"], "layers_to_transform": [0], "layers_pattern": ["blocks", "layers"]},
        {"target_modules": ["q"], "exclude_modules": ["layers.1.q", "attn.q"]},
        {"target_modules": ["q", "k"], "exclude_modules": r"model\.layers.*"},
        {"target_modules": ["q", "k"], "modules_to_save": ["attn"]},
        {"target_modules": ["q", "k"], "modules_to_save": ["model.head"]},
    ],
    ids=str,
)
def test_the_modules_that_a_config_names_are_those_that_peft_adapts(fields: dict[str, Any]) -> None:
    config = peft.LoraConfig(**fields)
    expected = tuple(name for name in NAMES if check_target_module_exists(config, name))
    assert surroundings(named(*NAMES), fields).targeted == expected
    assert 0 < len(expected) < len(NAMES)


@pytest.mark.parametrize("given", [None, "all-linear", r"(a)\1"])
def test_what_a_config_does_not_name_is_not_guessed(given: str | None) -> None:
    assert surroundings(named(*NAMES), {"target_modules": given}).targeted is None


def test_a_base_in_16_bits_has_its_scales_in_16_bits(tmp_path: Path, registry: Registry) -> None:
    live = quietly(lambda: get_peft_model(base().bfloat16(), CASES["unilora, drawn"].config()))
    quietly(lambda: live.save_pretrained(tmp_path))
    half = TorchModule().index_model(base().bfloat16(), BaseRef())
    adapter = load(open_header(tmp_path, registry, index=half), registry)
    for target, delta in adapter.deltas.items():
        layer = live.base_model.model.get_submodule(target.module)
        tensors = delta.tensors()
        for ours, theirs in (("up_scales", "unilora_scales_B"), ("down_places", "unilora_indices_A")):
            expected = getattr(layer, theirs)["default"]
            assert torch.equal(tensors[ours].to(expected.dtype), expected)


REFUSED: Mapping[str, tuple[str, dict[str, Any], str, str]] = {
    "kasa, denied": ("kasa", {"kasa_config": None}, "config-contradicts-tensors", "kasa_config is not set"),
    "kasa, other rank": ("kasa", {"r": 4}, "config-contradicts-tensors", "r says rank 4"),
    "pissa, other rank": ("pissa", {"r": 4}, "config-contradicts-tensors", "r says rank 4"),
    "pissa with DoRA": ("pissa", {"use_dora": True}, "config-contradicts-tensors", "no lora_magnitude_vector"),
    "pissa, drawn": ("pissa", {"init_lora_weights": "pissa_niter_4"}, "config-refused", "draws at random"),
    "peanut, other depth": ("peanut, deep", {"depth": 1}, "config-contradicts-tensors", "depth is 1"),
    "peanut, other rank": ("peanut", {"r": 4}, "config-contradicts-tensors", "r says rank 4"),
    "peanut, unknown bend": ("peanut", {"act_fn": "xielu"}, "config-unreadable", "act_fn is 'xielu'"),
    "psoft, other rank": ("psoft", {"r": 5}, "config-contradicts-tensors", "ask for [10] numbers"),
    "psoft, free": ("psoft", {"psoft_orth": False}, "config-contradicts-tensors", "ask for [4, 4] numbers"),
    "psoft, no vector": ("psoft", {"psoft_mag_a": False}, "config-contradicts-tensors", "psoft_mag_a is false"),
    "psoft, other start": ("psoft", {"ab_svd_init": "random"}, "config-unreadable", "ab_svd_init is 'random'"),
    "tinylora, other sets": ("tinylora", {"weight_tying": 0.5}, "config-contradicts-tensors", "have 2 vectors"),
    "tinylora, odd sets": ("tinylora", {"weight_tying": 1.5}, "config-contradicts-tensors", "should be from 0 to 1"),
    "unilora, other rank": ("unilora", {"r": 4}, "config-contradicts-tensors", "r says rank 4"),
    "unilora, not there": ("unilora, drawn", {"save_indices": True}, "config-contradicts-tensors", "save_indices is"),
    "vera, not there": ("vera, drawn", {"save_projection": True}, "config-contradicts-tensors", "the file has none"),
    "randlora, not there": ("randlora, drawn", {"save_projection": None}, "config-contradicts-tensors", "has none"),
    "supertuning, not there": (
        "supertuning, the largest",
        {"save_precomputed_indices": True},
        "config-contradicts-tensors",
        "the file has no supertuning_indices",
    ),
    "waveft, too long": ("waveft, db2", {"wavelet_family": "coif5"}, "config-unreadable", "wavelet_family is 'coif5'"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_config_that_cannot_be_followed_is_refused(name: str, tmp_path: Path, registry: Registry) -> None:
    source, fields, code, words = REFUSED[name]
    trained(CASES[source], tmp_path)
    rewrite(tmp_path, **fields)
    found = {finding.code: finding for finding in open_header(tmp_path, registry, index=index()).findings}
    assert found[code].level is Verdict.INCOMPATIBLE
    assert words in found[code].message


LOST: Mapping[str, tuple[str, Callable[[dict[str, torch.Tensor]], object], str]] = {
    "osf, too many values": (
        "osf",
        lambda t: t.update(
            {
                f"base_model.model.first.osf_svd_params.{name}": torch.ones(size)
                for name, size in {"U_low": (8, 9), "S_low": (9,), "V_low": (9, 12)}.items()
            }
        ),
        "more than a",
    ),
    "peanut, a layer": (
        "peanut, deep",
        lambda t: t.pop("base_model.model.first.peanut_encoders.1.weight"),
        "depth is 2, and the file has decoder.0, decoder.1, encoder.0",
    ),
    "frod, a basis": ("frod", lambda t: t.pop("base_model.frod_V.first"), "lacks basis.first"),
    "frod, one too many": (
        "frod",
        lambda t: t.update({"base_model.frod_V.fourth": torch.ones(2, 2)}),
        "no module uses it",
    ),
    "frod, a place outside": (
        "frod",
        lambda t: t["base_model.frod_s_indices.first"].fill_(12),
        "reaches outside a basis of 12",
    ),
    "tinylora, a vector": ("tinylora", lambda t: t.pop("base_model.tinylora_v.0"), "and the file has 4"),
    "tinylora, some numbers": (
        "tinylora",
        lambda t: t.pop("base_model.model.first.tinylora_P"),
        "4 of 5 modules have a tinylora_P",
    ),
    "tinylora, other numbers": (
        "tinylora",
        lambda t: t["base_model.model.first.tinylora_P"].add_(1e-3),
        "none of the 5 that projection_seed 42 gives",
    ),
    "tinylora, numbers of another size": (
        "tinylora, all tied",
        lambda t: t.update({"base_model.tinylora_v.0": torch.ones(5)}),
        "do not fit",
    ),
    "unilora, the vector": (
        "unilora",
        lambda t: t.update({"base_model.unilora_theta_d": torch.ones(2)}),
        "reaches beyond the shared vector of 2",
    ),
    "vera, one of two": ("vera, drawn", lambda t: t.update({"base_model.vera_A": torch.ones(4, 16)}), "has one of two"),
    "randlora, a copy alone": (
        "randlora, drawn",
        lambda t: t.update(
            {
                "base_model.model.first.randlora_A": torch.ones(3, 1, 16),
                "base_model.model.first.randlora_B": torch.ones(16, 6, 3),
            }
        ),
        "is a copy of a projection",
    ),
}


@pytest.mark.parametrize("name", LOST)
def test_tensors_that_do_not_belong_together_are_refused(name: str, tmp_path: Path, registry: Registry) -> None:
    source, change, words = LOST[name]
    trained(CASES[source], tmp_path)
    edit(tmp_path, change)
    with pytest.raises(IntegrityError, match=words):
        load(open_header(tmp_path, registry, index=index()), registry)


def test_frod_without_its_bases_is_refused_with_the_way_to_save_them(tmp_path: Path, registry: Registry) -> None:
    config = quietly(lambda: peft.FrodConfig(save_projection=False, progressbar=False, target_modules=THREE))
    trained(Case(lambda: config, "frod"), tmp_path)
    (finding,) = open_header(tmp_path, registry, index=index()).findings
    assert (finding.code, finding.level) == ("kind-unsupported", Verdict.INCOMPATIBLE)
    assert "the weights of all layers together" in finding.message
    assert "save_projection=True" in finding.remedy
    with pytest.raises(UnsupportedKind, match="save_projection is false"):
        load(open_header(tmp_path, registry), registry)


def test_olora_that_began_the_wrong_way_round_is_refused(tmp_path: Path, registry: Registry) -> None:
    config = peft.LoraConfig(r=2, init_lora_weights="olora", fan_in_fan_out=True, target_modules=["square"])
    trained(Case(lambda: config, "pissa"), tmp_path)
    (finding,) = open_header(tmp_path, registry, index=index()).findings
    assert (finding.code, finding.level) == ("kind-unsupported", Verdict.INCOMPATIBLE)
    assert "square is stored [in, out]" in finding.message


def test_supertuning_without_its_places_is_refused_where_16_bits_have_lost_them(tmp_path: Path) -> None:
    trained(CASES["supertuning, the largest"], tmp_path)
    model = base().bfloat16()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(LorahubError, match="which has which is not in the file"):
        merge(model, {"one": tmp_path})
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_adamss_is_refused_by_name(tmp_path: Path, registry: Registry) -> None:
    save_file({"base_model.model.first.adamss_A.0": torch.ones(2, 2)}, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "ADAMSS"}))
    (finding,) = open_header(tmp_path, registry).findings
    assert (finding.code, finding.level) == ("kind-unsupported", Verdict.INCOMPATIBLE)
    assert "AdaMSS" in finding.message
    assert "KMeans" in finding.message


def test_an_embedding_beside_pissa_is_plain_lora(tmp_path: Path, registry: Registry) -> None:
    config = peft.LoraConfig(r=2, init_lora_weights="pissa", target_modules=["embed", "first"])
    live = trained(Case(lambda: config, "pissa"), tmp_path)
    adapter = loaded(tmp_path, registry, with_base=False)
    assert {target.name: delta.kind for target, delta in adapter.deltas.items()} == {
        "embed.weight": "lora",
        "first.weight": "pissa",
    }
    expected = quietly(live.merge_and_unload).state_dict()
    for name, value in merged_by_hand(adapter, torch.float32).items():
        torch.testing.assert_close(value, expected[name], rtol=0, atol=2e-5)


@pytest.mark.parametrize("name", ["pissa", "pissa, rslora and stored transposed", "olora"])
def test_as_plain_lora_it_is_what_peft_converts_it_to(name: str, tmp_path: Path, registry: Registry) -> None:
    model = quietly(lambda: get_peft_model(base(), CASES[name].config()))
    quietly(lambda: model.save_pretrained(tmp_path / "start"))
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.5)
    quietly(lambda: model.save_pretrained(tmp_path / "trained"))
    rslora = CASES[name].config().use_rslora
    if not rslora:  # PEFT refuses to convert a rank pattern with rslora
        quietly(
            lambda: model.save_pretrained(
                tmp_path / "converted", path_initial_model_for_weight_conversion=tmp_path / "start"
            )
        )
        theirs = loaded(tmp_path / "converted", registry, with_base=False)
    weights = base().state_dict()
    ours = {}
    for target, delta in loaded(tmp_path / "trained", registry, with_base=False).deltas.items():
        stored = weights[target.name]
        weight = stored.T if target.module == "turned" else stored
        lora = plain_lora(delta, weight)
        assert lora is not None
        ours[target] = lora
        expected = delta.delta(weight) if rslora else theirs.deltas[target].delta(weight)
        torch.testing.assert_close(lora.delta(weight), expected, rtol=0, atol=2e-5)
        assert expected.norm() > 1e-2 * weight.norm()
    hints = {"fan_in_fan_out": True} if rslora else {}
    save(Adapter(deltas=ours, hints=hints), tmp_path / "ours", registry=registry)
    again = quietly(lambda: PeftModel.from_pretrained(base(), tmp_path / "ours"))
    expected_state = quietly(model.merge_and_unload).state_dict()
    for key, value in quietly(again.merge_and_unload).state_dict().items():
        torch.testing.assert_close(value, expected_state[key], rtol=0, atol=2e-5)


def normal(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


UNCARRIED: Mapping[str, tuple[dict[str, Delta], str]] = {
    "two starts": (
        {name: Moved(normal(3, 2), normal(2, 4), 1.0, name) for name in ("pissa", "olora")},
        "one init_lora_weights",
    ),
    "osf, nothing stays": ({"a": Tail(normal(3, 3), normal(3), normal(3, 4))}, "leaves at least one singular value"),
    "frod, a basis of another name": (
        {"a": Rebased(normal(3), normal(1), torch.tensor([[0], [1]]), normal(3, 3), "b")},
        "would find others",
    ),
    "frod, no one share of places": (
        {
            name: Rebased(normal(n), normal(count), torch.zeros(2, count, dtype=torch.long), normal(n, n), name)
            for name, n, count in (("a", 3, 1), ("b", 4, 12))
        },
        "one sparse_rate",
    ),
    "tinylora, two seeds": (
        {
            name: Tiny(normal(3, 2), normal(2, 4), normal(3, 2, 2), normal(3), name, seed)
            for seed, name in enumerate("01")
        },
        "one projection_seed",
    ),
    "tinylora, numbers of no place": (
        {name: Tiny(normal(3, 2), normal(2, 4), normal(3, 2, 2), normal(3), name) for name in "01"},
        "do not say all",
    ),
    "waveft, two families": (
        {name: Wavelets(normal(3), 1.0, 5, family=name) for name in ("db2", "db3")},
        "one wavelet_family",
    ),
}


@pytest.mark.parametrize("name", UNCARRIED)
def test_what_peft_has_no_word_for_is_not_written(name: str, tmp_path: Path, registry: Registry) -> None:
    modules, words = UNCARRIED[name]
    deltas = {Target("", module, "weight"): delta for module, delta in modules.items()}
    with pytest.raises((CannotCarry, IntegrityError), match=words):
        save(Adapter(deltas=deltas), tmp_path / "out", registry=registry)
    assert not (tmp_path / "out").exists()


BOMBS: Mapping[str, tuple[str, dict[str, Any], str]] = {
    "unilora, rank": ("unilora, drawn", {"r": 10**12}, "times the size of the largest layer"),
    "unilora, no rank": ("unilora, drawn", {"r": 0}, "r should be a rank"),
    "unilora, seed": ("unilora, drawn", {"proj_seed": -1}, "should be a seed"),
    "vera, seed": ("vera, drawn", {"projection_prng_key": 2**64}, "should be a seed"),
    "tinylora, seed": ("tinylora, drawn", {"projection_seed": 2**63}, "should be a seed"),
    "psoft, terms": ("psoft, a series of 5", {"num_cayley_neumann_terms": 10**9}, "should be from 1 to 1000"),
    "psoft, draws": ("psoft, from random projections", {"psoft_svd_lowrank_niter": 10**9}, "from 0 to 1000"),
    "peanut, depth": ("peanut, deep", {"depth": 10**12}, "depth is 1000000000000"),
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_small_file_cannot_ask_for_endless_work(name: str, tmp_path: Path, registry: Registry) -> None:
    source, fields, words = BOMBS[name]
    trained(CASES[source], tmp_path)
    rewrite(tmp_path, **fields)
    with pytest.raises(IntegrityError, match=words):
        load(open_header(tmp_path, registry, index=index()), registry)


GROWN: Mapping[str, tuple[str, Callable[[dict[str, torch.Tensor]], object], str]] = {
    "vera, rank": (
        "vera, drawn",
        lambda t: t.update({f"base_model.model.{name}.vera_lambda_d": torch.ones(4096) for name in THREE}),
        "times the size of the largest layer",
    ),
    "tinylora, numbers": (
        "tinylora, drawn",
        lambda t: t.update({f"base_model.tinylora_v.{at}": torch.ones(2**26 + 1) for at in range(4)}),
        "random numbers for one module",
    ),
    "tinylora, no vector": (
        "tinylora",
        lambda t: t.update({"base_model.tinylora_v.0": torch.ones(2, 2)}),
        "is no vector",
    ),
    "unilora, nothing": (
        "unilora, drawn",
        lambda t: t.update({"base_model.unilora_theta_d": torch.ones(0)}),
        "the file has none",
    ),
    "frod, sizes": (
        "frod",
        lambda t: t.update({"base_model.frod_V.first": torch.ones(5, 5)}),
        "do not fit places",
    ),
}


@pytest.mark.parametrize("name", GROWN)
def test_tensors_of_no_use_are_refused_before_numbers_are_drawn(name: str, tmp_path: Path, registry: Registry) -> None:
    source, change, words = GROWN[name]
    trained(CASES[source], tmp_path)
    if source == "vera, drawn":
        rewrite(tmp_path, r=4096)
    edit(tmp_path, change)
    with pytest.raises(IntegrityError, match=words):
        load(open_header(tmp_path, registry, index=index()), registry)


@pytest.mark.parametrize("name", ["kasa", "pissa", "olora", "osf", "psoft", "frod"])
def test_a_base_that_is_not_finite_is_refused_by_name(name: str, tmp_path: Path) -> None:
    trained(CASES[name], tmp_path)
    model = base()
    with torch.no_grad():
        model.first.weight[2, 3] = torch.nan
    with pytest.raises(NotFinite):
        merge(model, {"one": tmp_path})


@pytest.mark.parametrize(
    ("suffix", "which"),
    [
        ("peanut_encoders.3.weight", "3"),
        ("peanut_encoders.first.weight", "first"),
        ("peanut_encoders.weight", ""),
        ("peanut_encoders..weight", ""),
        ("peanut_encoders.1.2.weight", ""),
        ("peanut_decoders.1.weight", ""),
        ("peanut_encoders.1.weights", ""),
    ],
)
def test_one_of_many_is_told_by_what_stands_in_its_name(suffix: str, which: str) -> None:
    leaf = Leaf(slot="encoder", suffix="peanut_encoders.*.weight")
    assert leaf.which(suffix) == which
    assert (suffix in Suffixes([leaf.suffix, "peanut_A.weight"])) is bool(which)
    assert Leaf(slot="down", suffix="peanut_A.weight").which("peanut_A.weight") == ""


def test_a_key_beside_many_that_is_none_of_them_is_unknown(tmp_path: Path, registry: Registry) -> None:
    trained(CASES["tinylora"], tmp_path)
    edit(tmp_path, lambda tensors: tensors.update({"base_model.tinylora_v.0.more": torch.ones(6)}))
    (finding,) = open_header(tmp_path, registry).findings
    assert (finding.code, finding.where) == ("key-unknown", ("base_model.tinylora_v.0.more",))
