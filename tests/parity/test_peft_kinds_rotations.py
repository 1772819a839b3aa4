"""PEFT trains and merges, lorahub merges from the files alone: rotations, sparse and spectral changes, biases, norms.

Numbers are PEFT 0.21.2's own: every adapter parameter is moved by seeded noise, saved, and PEFT's ``merge_and_unload``
is what lorahub must come to.
"""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers.pytorch_utils import Conv1D

import lorahub
from lorahub.adapter import Adapter, load, open_header, save
from lorahub.bases.layout import Target
from lorahub.deltas.boft import Butterfly
from lorahub.deltas.c3a import Circulant
from lorahub.deltas.delta import Delta
from lorahub.deltas.hra import Mirrors
from lorahub.deltas.oft import Turn
from lorahub.deltas.road import Pairs
from lorahub.deltas.shira import Sparse
from lorahub.errors import CannotCarry, Incompatible
from lorahub.findings import Verdict
from lorahub.merging import merge
from lorahub.plugins import Registry

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what PEFT's imports say of other packages is not ours
    import peft
    from peft import PeftConfig, PeftModel, get_peft_model


class Layers(nn.Module):
    """Every layer type that PEFT adapts with one of these kinds."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 12)
        self.first = nn.Linear(12, 8)
        self.second = nn.Linear(8, 12, bias=False)
        self.third = nn.Linear(16, 16)
        self.turned = Conv1D(8, 12)
        self.odd = nn.Linear(7, 5)
        self.flat = nn.Conv1d(4, 6, 3)
        self.square = nn.Conv2d(4, 6, 3)
        self.norm = nn.LayerNorm(8)
        self.plain = nn.RMSNorm(8)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.third(self.first(self.embed(tokens)).repeat(1, 1, 2))


def base() -> Layers:
    torch.manual_seed(3)
    return Layers()


def quietly(action: Callable[[], Any]) -> Any:
    """Run PEFT's code, whose warnings are its own affair."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return action()


@dataclass(frozen=True)
class Case:
    """A PEFT config and how far its parameters are moved."""

    config: PeftConfig
    kind: str
    noise: float = 0.3
    changed: int = 1
    codes: frozenset[str] = field(default_factory=frozenset)


def oft(**fields: Any) -> Case:
    changed = len(fields["target_modules"])
    return Case(peft.OFTConfig(**fields), "oft", changed=changed)


CASES: Mapping[str, Case] = {
    "oft": oft(oft_block_size=4, target_modules=["first", "second", "third"]),
    "oft, blocks by number": oft(r=2, oft_block_size=0, target_modules=["first", "second"]),
    "oft, block size rounded": oft(oft_block_size=5, target_modules=["first", "second"]),
    "oft, exact": oft(oft_block_size=4, use_cayley_neumann=False, target_modules=["first", "third"]),
    "oft, one term": Case(
        peft.OFTConfig(oft_block_size=4, num_cayley_neumann_terms=2, target_modules=["first"]), "oft"
    ),
    **{
        f"oft, {terms} terms": oft(oft_block_size=4, num_cayley_neumann_terms=terms, target_modules=["first"])
        for terms in (3, 4, 7)
    },
    "oft, shared block": oft(oft_block_size=4, block_share=True, target_modules=["first", "second", "square"]),
    "oft, one block": oft(r=1, oft_block_size=0, target_modules=["first"]),
    "oft, bounded": oft(oft_block_size=4, coft=True, eps=0.9, target_modules=["first", "third"]),
    "oft, embedding": oft(oft_block_size=4, target_modules=["embed", "first"]),
    "oft, exact embedding": oft(oft_block_size=3, use_cayley_neumann=False, target_modules=["embed"]),
    "oft, convolution": oft(oft_block_size=6, target_modules=["square"]),
    "boft": Case(peft.BOFTConfig(boft_block_size=4, target_modules=["first", "third"]), "boft", changed=2),
    "boft, blocks by number": Case(
        peft.BOFTConfig(boft_block_size=0, boft_block_num=2, target_modules=["first", "second"]), "boft", changed=2
    ),
    "boft, three factors": Case(
        peft.BOFTConfig(boft_block_size=4, boft_n_butterfly_factor=3, target_modules=["third"]), "boft"
    ),
    "boft, two factors of a convolution": Case(
        peft.BOFTConfig(boft_block_size=6, boft_n_butterfly_factor=2, target_modules=["square"]), "boft"
    ),
    "hra": Case(peft.HRAConfig(r=4, target_modules=["first", "second", "square"]), "hra", changed=3),
    "hra, odd": Case(peft.HRAConfig(r=3, target_modules=["first"]), "hra"),
    "hra, orthogonal": Case(
        peft.HRAConfig(r=3, apply_GS=True, init_weights=False, target_modules=["first", "square"]), "hra", changed=2
    ),
    **{
        variant: Case(
            # 8 and 12 outputs, a bias on one
            peft.RoadConfig(variant=variant, group_size=4, target_modules=["first", "second"]),
            "road",
            changed=3,
        )
        for variant in ("road_1", "road_2", "road_4")
    },
    "c3a": Case(peft.C3AConfig(block_size=4, target_modules=["first", "second"]), "c3a", changed=2),
    "c3a, patterns": Case(
        peft.C3AConfig(
            block_size=4, block_size_pattern={"third": 8, "second": 2}, target_modules=["first", "second", "third"]
        ),
        "c3a",
        changed=3,
    ),
    "shira": Case(peft.ShiraConfig(r=2, target_modules=["first", "second"]), "shira", changed=2),
    "beft": Case(peft.BeftConfig(target_modules=["first", "third"]), "beft", changed=2),
    "ln_tuning": Case(peft.LNTuningConfig(target_modules=["norm", "plain"]), "ln_tuning", changed=3),
    "fourierft": Case(
        peft.FourierFTConfig(n_frequency=20, scaling=31.0, target_modules=["first", "second"]), "fourierft", changed=2
    ),
    "fourierft, patterns and a seed": Case(
        peft.FourierFTConfig(
            n_frequency=20,
            scaling=31.0,
            random_loc_seed=5,
            n_frequency_pattern={"third": 40, "second": 9},
            target_modules=["first", "second", "third"],
        ),
        "fourierft",
        changed=3,
    ),
    "waveft": Case(
        peft.WaveFTConfig(n_frequency=20, scaling=2.5, target_modules=["first", "second"]), "waveft", changed=2
    ),
    "waveft, odd sizes": Case(peft.WaveFTConfig(n_frequency=20, scaling=2.5, target_modules=["odd"]), "waveft"),
    "waveft, no transform": Case(
        peft.WaveFTConfig(
            n_frequency=20,
            scaling=2.5,
            use_idwt=False,
            wavelet_family="coif5",
            random_loc_seed=5,
            n_frequency_pattern={"third": 40},
            target_modules=["first", "third"],
        ),
        "waveft",
        changed=2,
    ),
    "waveft, in proportion": Case(
        peft.WaveFTConfig(
            n_frequency=20, scaling=2.5, proportional_parameters=True, target_modules=["first", "second", "third"]
        ),
        "waveft",
        changed=3,
    ),
    "waveft, stored transposed": Case(
        peft.WaveFTConfig(n_frequency=20, scaling=2.5, fan_in_fan_out=True, target_modules=["turned"]), "waveft"
    ),
    "fourierft, stored transposed": Case(
        peft.FourierFTConfig(n_frequency=20, scaling=31.0, fan_in_fan_out=True, target_modules=["turned"]), "fourierft"
    ),
}


class BlockDiagonal:
    """Stands for PEFT's CUDA extension, which only puts blocks on a diagonal; without it PEFT makes one factor."""

    def forward(self, blocks: torch.Tensor) -> list[torch.Tensor]:
        return [torch.stack([torch.block_diag(*factor) for factor in blocks])]


@pytest.fixture(autouse=True)
def blocks_without_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("peft.tuners.boft.layer._FBD_CUDA", BlockDiagonal())


def trained(case: Case, folder: Path) -> PeftModel:
    """A PEFT model with every trainable number moved, saved to ``folder``."""
    model = quietly(lambda: get_peft_model(base(), case.config))
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * case.noise)
    quietly(lambda: model.save_pretrained(folder))
    return model.eval()


def merged_by_hand(adapter: Adapter, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Every parameter of the base that the adapter changes, with the change, in the base's orientation."""
    weights = base().state_dict()
    result = {}
    for target, delta in adapter.deltas.items():
        if target.name not in weights:
            continue
        turned = target.name == "turned.weight"
        weight = weights[target.name].to(dtype)
        logical = weight.T if turned else weight
        value = delta.replacement()
        logical = logical + delta.delta(logical) if value is None else value.to(dtype)
        result[target.name] = logical.T if turned else logical
    return result


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> Case:
    return CASES[request.param]


def test_merging_from_the_files_gives_what_peft_merges(case: Case, tmp_path: Path, registry: Registry) -> None:
    live = trained(case, tmp_path)
    header = open_header(tmp_path, registry)
    assert header.kinds == (case.kind,)
    assert {finding.code for finding in header.findings} == case.codes
    assert all(finding.level is Verdict.EXACT for finding in header.findings)
    adapter = load(header, registry)
    weights = base().state_dict()
    expected = quietly(live.merge_and_unload).state_dict()
    for dtype in (torch.float32, torch.float64):
        found = merged_by_hand(adapter, dtype)
        assert len(found) == case.changed
        for name, value in found.items():
            torch.testing.assert_close(value, expected[name].to(dtype), rtol=0, atol=2e-5)
            assert (value - weights[name]).norm() > 1e-2 * weights[name].norm()
    for name, weight in weights.items():
        assert name in found or torch.equal(expected[name], weight)


def test_writing_what_was_read_gives_the_same_tensors_and_peft_loads_them(
    case: Case, tmp_path: Path, registry: Registry
) -> None:
    live = trained(case, tmp_path / "theirs")
    save(load(open_header(tmp_path / "theirs", registry), registry), tmp_path / "ours", registry=registry)
    theirs, ours = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("theirs", "ours"))
    assert ours.keys() == theirs.keys()
    for key, tensor in ours.items():
        assert tensor.dtype == theirs[key].dtype
        assert torch.equal(tensor, theirs[key]), key

    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        again = PeftModel.from_pretrained(base(), tmp_path / "ours")
    assert [
        str(each.message) for each in said if "missing" in str(each.message) or "nexpected" in str(each.message)
    ] == []
    expected, found = (quietly(model.merge_and_unload).state_dict() for model in (live, again))
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


def test_a_live_model_is_merged_into_whole(case: Case, tmp_path: Path) -> None:
    live = trained(case, tmp_path)
    model = base()
    # on a kernel PEFT's merge is not what it trained
    merge(model, {"one": tmp_path}, compat="peft" if "square" in case.config.target_modules else None)
    expected = quietly(live.merge_and_unload).state_dict()
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, expected[name], rtol=0, atol=2e-5)


def windows(folder: Path, kernel: int) -> tuple[nn.Module, Any]:
    """A convolution, and what PEFT trained on it."""
    torch.manual_seed(3)
    net = nn.Sequential(nn.Conv2d(4, 6, kernel, padding=kernel // 2))
    config = peft.OFTConfig(oft_block_size=4, target_modules=["0"])
    live = quietly(lambda: get_peft_model(copy.deepcopy(net), config))
    with torch.no_grad():
        for parameter in live.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape) * 0.2)
    quietly(lambda: live.save_pretrained(folder))
    return net, live.eval()


def test_oft_on_a_kernel_is_one_thing_in_peft_before_it_merges_and_another_from_then_on(tmp_path: Path) -> None:
    net, live = windows(tmp_path, 3)
    x = torch.randn(2, 4, 5, 5)
    before, merged = live(x).detach(), quietly(live.merge_and_unload)(x).detach()
    assert (before - merged).norm() > 0.1 * merged.norm()  # which is why somebody has to choose
    with pytest.raises(Incompatible, match="turns overlapping windows"):
        merge(net, {"one": tmp_path})
    with pytest.raises(Incompatible, match="no change of the weight"):
        merge(net, {"one": tmp_path}, compat="strict")
    with lorahub.attach(net, [tmp_path], compat="peft"):
        torch.testing.assert_close(net(x), merged, rtol=0, atol=2e-5)


def test_oft_on_a_kernel_of_one_is_the_same_thing_before_and_after(tmp_path: Path) -> None:
    net, live = windows(tmp_path, 1)
    x = torch.randn(2, 4, 5, 5)
    plain, before = net(x).detach(), live(x).detach()
    assert (before - plain).norm() > 1e-2 * plain.norm()
    with lorahub.attach(net, [tmp_path]):
        torch.testing.assert_close(net(x), before, rtol=0, atol=2e-5)


def test_oft_that_is_trained_here_on_a_kernel_is_the_merge_of_peft_and_says_so(tmp_path: Path) -> None:
    torch.manual_seed(3)
    net = nn.Sequential(nn.Conv2d(4, 6, 3))
    x = torch.randn(2, 4, 5, 5)
    plain = net(x).detach()
    with lorahub.create(net, "oft", oft_block_size=4, target_modules=["0"]) as trainee:
        with torch.no_grad():
            for parameter in trainee.parameters():
                parameter.add_(torch.randn(parameter.shape) * 0.2)
        trained_here = net(x).detach()
        trainee.save(tmp_path / "a")
    assert (trained_here - plain).norm() > 1e-2 * plain.norm()
    found = {each.code: each for each in lorahub.check(tmp_path / "a", net).findings}
    assert "compat peft for 1 target: the turned kernel" in found["compat-chosen"].message
    with lorahub.attach(net, [tmp_path / "a"]):
        torch.testing.assert_close(net(x), trained_here, rtol=0, atol=2e-5)
    with lorahub.create(net, resume=tmp_path / "a") as trainee:
        trainee.save(tmp_path / "b")
    save(lorahub.load(tmp_path / "b"), tmp_path / "c")  # the base is not at hand
    merge(net, {"one": tmp_path / "c"})
    torch.testing.assert_close(net(x), trained_here, rtol=0, atol=2e-5)
    torch.manual_seed(3)
    theirs = quietly(lambda: PeftModel.from_pretrained(nn.Sequential(nn.Conv2d(4, 6, 3)), tmp_path / "c"))
    torch.testing.assert_close(quietly(theirs.merge_and_unload)(x), trained_here, rtol=0, atol=2e-5)


def config_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "adapter_config.json").read_text())


def rewrite(folder: Path, **fields: Any) -> None:
    """Change config fields; None removes one."""
    config = {name: value for name, value in (config_of(folder) | fields).items() if value is not None}
    (folder / "adapter_config.json").write_text(json.dumps(config))


def test_an_oft_series_from_before_0_18_is_computed_as_it_was_trained(tmp_path: Path, registry: Registry) -> None:
    trained(oft(oft_block_size=4, target_modules=["first"]), tmp_path)
    rewrite(tmp_path, peft_version=None)
    angles = load_file(tmp_path / "adapter_model.safetensors")["base_model.model.first.oft_R.weight"]
    weight = base().state_dict()["first.weight"].double()
    expected = weight.clone()
    for block, numbers in enumerate(angles.double()):
        q = torch.zeros(4, 4, dtype=torch.float64)
        q[*torch.triu_indices(4, 4, 1)] = numbers
        q = q - q.T
        # PEFT 0.16 and 0.17: all five terms of the series are doubled but the first
        r = torch.eye(4, dtype=torch.float64) + 2 * q + 2 * q @ q + 2 * q @ q @ q + 2 * q @ q @ q @ q
        part = slice(4 * block, 4 * block + 4)
        expected[:, part] = weight[:, part] @ r.T
    adapter = load(open_header(tmp_path, registry, compat="strict"), registry)
    torch.testing.assert_close(merged_by_hand(adapter, torch.float64)["first.weight"], expected, rtol=0, atol=1e-12)
    save(adapter, tmp_path / "ours", registry=registry)
    assert config_of(tmp_path / "ours")["peft_version"] == "0.17.0"
    again = merged_by_hand(load(open_header(tmp_path / "ours", registry), registry), torch.float64)
    torch.testing.assert_close(again["first.weight"], expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("fields", "word"),
    [
        ({"block_share": True}, "block_share"),
        ({"use_cayley_neumann": "yes"}, "use_cayley_neumann"),
        ({"num_cayley_neumann_terms": 10**9}, "num_cayley_neumann_terms"),
        ({"coft": True, "eps": -1}, "eps"),
        ({"peft_version": "new"}, "peft_version"),
    ],
)
def test_an_oft_config_that_contradicts_its_tensors_is_refused(
    fields: dict[str, Any], word: str, tmp_path: Path, registry: Registry
) -> None:
    trained(oft(oft_block_size=4, target_modules=["first"]), tmp_path)
    rewrite(tmp_path, **fields)
    (finding,) = open_header(tmp_path, registry).findings
    assert (finding.code, finding.level) == ("config-contradicts-tensors", Verdict.INCOMPATIBLE)
    assert word in finding.message


REFUSED: Mapping[str, tuple[str, dict[str, Any], str]] = {
    "boft, other size": ("boft", {"boft_block_size": 2}, "boft_block_size is 2"),
    "boft, other number": ("boft", {"boft_block_size": 0, "boft_block_num": 5}, "boft_block_num is 5"),
    "hra, other number": ("hra", {"r": 3}, "r says rank 3"),
    "hra, no flag": ("hra", {"apply_GS": "no"}, "apply_GS should be true or false"),
    "road, no variant": ("road_1", {"variant": "road_3"}, "not 'road_3'"),
    "road, more numbers": ("road_1", {"variant": "road_4", "group_size": 64}, "groups of 64 outputs"),
    "road, odd groups": ("road_1", {"group_size": 3}, "groups of 3 outputs"),
    "c3a, other size": ("c3a", {"block_size": 3}, "block_size is 3"),
    "shira, no multiple": ("shira", {"r": 7}, "no multiple of r = 7"),
    "fourierft, no number": ("fourierft", {"scaling": "much"}, "scaling should be a number"),
    "fourierft, no seed": ("fourierft", {"random_loc_seed": 1.5}, "random_loc_seed should be a whole number"),
    "fourierft, large seed": ("fourierft", {"random_loc_seed": 2**65}, "64-bit number"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_config_that_contradicts_the_tensors_is_refused(name: str, tmp_path: Path, registry: Registry) -> None:
    source, fields, words = REFUSED[name]
    trained(CASES[source], tmp_path)
    rewrite(tmp_path, **fields)
    (finding,) = open_header(tmp_path, registry).findings
    assert (finding.code, finding.level) == ("config-contradicts-tensors", Verdict.INCOMPATIBLE)
    assert words in finding.message


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


UNCARRIED: Mapping[str, tuple[dict[str, dict[str, Delta]], str]] = {
    "oft, an embedding without its role": (
        {"embed": {"weight": Turn(normal(2, 3), turned=True)}},
        "turns embeddings one way",
    ),
    "oft, two formulas": (
        {"a": {"weight": Turn(normal(2, 3))}, "b": {"weight": Turn(normal(2, 3), (2.0,))}},
        "one use_cayley_neumann",
    ),
    "oft, no number of terms": ({"a": {"weight": Turn(normal(2, 3), (2.0, 1.0))}}, "no number of terms"),
    "oft, sizes and numbers apart": (
        {"a": {"weight": Turn(normal(4, 3))}, "b": {"weight": Turn(normal(2, 120))}},
        "one oft_block_size or r",
    ),
    "boft, sizes and numbers apart": (
        {
            "a": {"weight": Butterfly(normal(1, 2, 3, 3), normal(5, 1))},
            "b": {"weight": Butterfly(normal(1, 3, 2, 2), normal(5, 1))},
        },
        "one boft_block_size or boft_block_num",
    ),
    "road, only the weight": ({"a": {"weight": Pairs(normal(4), normal(4), "road_2", 2)}}, "no word for road"),
    "hra, two ranks": (
        {"a": {"weight": Mirrors(normal(6, 2))}, "b": {"weight": Mirrors(normal(6, 3))}},
        "one r for all modules",
    ),
    "c3a, names that end alike": (
        {name: {"weight": Circulant(normal(2, 2, b))} for name, b in {"q": 3, "a.q": 2, "b.q": 2, "v": 2}.items()},
        "block_size_pattern",
    ),
    "c3a, cut": ({"a": {"weight": Circulant(normal(2, 2, 2)).region(slice(0, 2), slice(None))}}, "no word for c3a"),
    "shira, cut": (
        {"a": {"weight": Sparse(normal(2), torch.tensor([[0, 1], [1, 1]]), 1).region(slice(0, 1), slice(None))}},
        "no word for shira",
    ),
}


@pytest.mark.parametrize("name", UNCARRIED)
def test_what_peft_has_no_word_for_is_not_written(name: str, tmp_path: Path, registry: Registry) -> None:
    modules, words = UNCARRIED[name]
    deltas = {
        Target("", module, parameter): delta
        for module, parameters in modules.items()
        for parameter, delta in parameters.items()
    }
    with pytest.raises(CannotCarry, match=words):
        save(Adapter(deltas=deltas), tmp_path / "out", registry=registry)
    assert not (tmp_path / "out").exists()


def test_the_bias_of_an_adapted_layer_is_needed_by_beft_and_welcome_to_road(tmp_path: Path, registry: Registry) -> None:
    trained(CASES["beft"], tmp_path / "beft")
    trained(CASES["road_1"], tmp_path / "road")
    for name, present in {"beft": {False}, "road": {False, True}}.items():
        touches = open_header(tmp_path / name, registry).touches
        assert {touch.if_present for touch in touches.values()} == present


def test_a_batch_normalisation_is_refused_with_its_statistics(tmp_path: Path, registry: Registry) -> None:
    model = nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 4))
    live = quietly(lambda: get_peft_model(model, peft.LNTuningConfig(target_modules=["0"])))
    quietly(lambda: live.save_pretrained(tmp_path))
    findings = open_header(tmp_path, registry).findings
    assert any(finding.level is not Verdict.EXACT and "running_mean" in str(finding.where) for finding in findings)


def test_norms_beside_the_factors_of_another_kind_stay_replacements(tmp_path: Path, registry: Registry) -> None:
    config = peft.HRAConfig(r=2, target_modules=["first"], modules_to_save=["norm"])
    trained(Case(config, "hra"), tmp_path / "theirs")
    header = open_header(tmp_path / "theirs", registry)
    assert header.kinds == ("hra", "replace")
    save(load(header, registry), tmp_path / "ours", registry=registry)
    assert open_header(tmp_path / "ours", registry).kinds == ("hra", "replace")
