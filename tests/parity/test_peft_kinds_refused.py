"""Files of PEFT's kinds that cannot be followed, do not belong together or ask for too much: refused by name."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from parity.decomposed import CASES, THREE, Case, base, edit, index, quietly, rewrite, trained
from safetensors.torch import save_file

from lorahub.adapter import Adapter, load, open_header, save
from lorahub.bases.layout import Target
from lorahub.deltas.delta import Delta
from lorahub.deltas.frod import Rebased
from lorahub.deltas.kind import Leaf
from lorahub.deltas.osf import Tail
from lorahub.deltas.pissa import Moved
from lorahub.deltas.tinylora import Tiny
from lorahub.deltas.waveft import Wavelets
from lorahub.errors import CannotCarry, IntegrityError, LorahubError, NotFinite, UnsupportedKind
from lorahub.findings import Verdict
from lorahub.formats.peft.fits import Suffixes
from lorahub.merging import merge
from lorahub.plugins import Registry

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what PEFT's imports say of other packages is not ours
    import peft


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
