"""PEFT saves and merges, lorahub merges from the files alone: shared projections and banks, replaced rows, and others.

Numbers are PEFT 0.21.2's own: nothing is trained, every adapter parameter is moved by seeded noise, saved, and PEFT's
``merge_and_unload`` is what lorahub must come to.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.pytorch_utils import Conv1D

from lorahub.adapter import Adapter, load, open_header, save
from lorahub.bases.layout import Target
from lorahub.deltas.bdlora import BlockLoRA
from lorahub.deltas.deft import Refill
from lorahub.deltas.delta import Delta
from lorahub.deltas.glora import Offsets, Scaled
from lorahub.deltas.supertuning import Elements
from lorahub.deltas.tokens import Rows
from lorahub.deltas.vblora import Banked
from lorahub.deltas.vera import VeRA
from lorahub.errors import CannotCarry, IntegrityError
from lorahub.findings import Verdict
from lorahub.merging import merge
from lorahub.plugins import Registry

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what PEFT's imports say of other packages is not ours
    import peft
    from peft import PeftConfig, PeftModel, get_peft_model
    from peft.tuners.lora.config import BdLoraConfig


class Layers(nn.Module):
    """Every layer type that PEFT adapts with one of these kinds."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 12)
        self.first = nn.Linear(12, 8)
        self.second = nn.Linear(8, 12, bias=False)
        self.third = nn.Linear(16, 16)
        self.turned = Conv1D(8, 12)

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
    """A PEFT config, how far its parameters are moved, and how many parameters of the base change."""

    config: PeftConfig
    kind: str
    noise: float = 0.5
    changed: int = 1
    still: tuple[str, ...] = ()  # parameters with paths of zeros
    reloaded: float = 0.0  # how far PEFT is from itself after saving and loading


THREE = ["first", "second", "third"]


def vblora(*, reloaded: float = 0.0, **fields: Any) -> Case:
    config = peft.VBLoRAConfig(
        r=3, num_vectors=9, vector_length=4, init_vector_bank_bound=1.0, target_modules=THREE, **fields
    )
    return Case(config, "vblora", changed=3, reloaded=reloaded)


def bdlora(targets: list[str], **fields: Any) -> Case:
    blocks = BdLoraConfig(nblocks=2, **fields)
    config = peft.LoraConfig(
        r=4,
        lora_alpha=6,
        use_bdlora=blocks,
        target_modules=targets,
    )
    return Case(config, "bdlora", changed=len(targets))


CASES: Mapping[str, Case] = {
    "vera": Case(peft.VeraConfig(r=4, target_modules=THREE), "vera", changed=3),
    "vera, stored transposed": Case(
        peft.VeraConfig(r=3, fan_in_fan_out=True, projection_prng_key=5, target_modules=["turned", "first"]),
        "vera",
        changed=2,
    ),
    "pvera": Case(peft.PveraConfig(r=4, target_modules=THREE), "pvera", changed=3),
    "pvera, stored transposed": Case(peft.PveraConfig(r=3, fan_in_fan_out=True, target_modules=["turned"]), "pvera"),
    "randlora": Case(peft.RandLoraConfig(r=3, randlora_alpha=4, target_modules=THREE), "randlora", changed=3),
    "randlora, very sparse": Case(
        peft.RandLoraConfig(r=5, randlora_alpha=4, very_sparse=True, target_modules=["first"]), "randlora"
    ),
    "randlora, stored transposed": Case(
        peft.RandLoraConfig(r=2, randlora_alpha=2, fan_in_fan_out=True, target_modules=["turned"]), "randlora"
    ),
    "tokens": Case(peft.TrainableTokensConfig(token_indices=[7, 0, 3], target_modules=["embed"]), "tokens"),
    "deft": Case(peft.DeftConfig(r=3, target_modules=THREE), "deft", changed=3),
    "deft, scaled and of full rank": Case(peft.DeftConfig(r=9, alpha=6, target_modules=["first"]), "deft"),
    "deft, relu": Case(
        peft.DeftConfig(r=3, alpha=2, decomposition_method="relu", target_modules=["first", "third"]),
        "deft",
        changed=2,
    ),
    "deft, projected only": Case(peft.DeftConfig(r=3, para=True, target_modules=["second"]), "deft"),
    "deft, stored transposed": Case(peft.DeftConfig(r=3, fan_in_fan_out=True, target_modules=["turned"]), "deft"),
    "glora": Case(peft.GloraConfig(r=2, target_modules=THREE), "glora", changed=5),
    "glora, columns": Case(
        peft.GloraConfig(config_A_B="vector", config_C="vector", config_D_E="vector", target_modules=THREE),
        "glora",
        changed=5,
    ),
    "glora, numbers": Case(
        peft.GloraConfig(config_A_B="constant", config_C="none", config_D_E="constant", target_modules=THREE),
        "glora",
        changed=5,
    ),
    "glora, bias only": Case(
        peft.GloraConfig(r=3, config_A_B="none", config_D_E="none", target_modules=["first"]),
        "glora",
        changed=2,
        still=("first.weight",),
    ),
    "supertuning": Case(peft.SupertuningConfig(sparsity=0.8, target_modules=THREE), "supertuning", changed=3),
    "supertuning, with factors": Case(
        peft.SupertuningConfig(sparsity=0.9, r=2, lora_alpha=3, target_modules=["first", "second"]),
        "supertuning",
        changed=2,
    ),
    "bdlora": bdlora(THREE, target_modules_bd_a=["first"], target_modules_bd_b=["second", "third"]),
    "bdlora, some whole": bdlora(THREE, target_modules_bd_a=["thi"], match_strict=False),
    "vblora": vblora(topk=2),
    "vblora, one vector a piece": vblora(topk=1),
    "vblora, chosen only": vblora(topk=3, save_only_topk_weights=True, reloaded=1e-6),
    "vblora, one chosen": vblora(topk=1, save_only_topk_weights=True),
    "vblora, stored transposed": Case(
        peft.VBLoRAConfig(
            r=2,
            num_vectors=7,
            vector_length=2,
            init_vector_bank_bound=1.0,
            fan_in_fan_out=True,
            target_modules=["turned"],
        ),
        "vblora",
    ),
}


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
        turned = target.name == "turned.weight"
        if target.name not in weights:
            continue
        weight = weights[target.name].to(dtype)
        logical = weight.T if turned else weight
        siblings = {name: weights[f"{target.module}.{name}"].to(dtype) for name in delta.reads}
        logical = logical + delta.delta(logical, **siblings)
        result[target.name] = logical.T if turned else logical
    return result


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> Case:
    return CASES[request.param]


def test_merging_from_the_files_gives_what_peft_merges(case: Case, tmp_path: Path, registry: Registry) -> None:
    live = trained(case, tmp_path)
    header = open_header(tmp_path, registry)
    assert header.findings == ()
    assert header.kinds == (case.kind,)
    adapter = load(header, registry)
    weights = base().state_dict()
    expected = quietly(live.merge_and_unload).state_dict()
    for dtype in (torch.float32, torch.float64):
        found = merged_by_hand(adapter, dtype)
        assert len(found) == case.changed
        for name, value in found.items():
            torch.testing.assert_close(value, expected[name].to(dtype), rtol=0, atol=2e-5)
            moved = (value - weights[name]).norm() > 1e-2 * weights[name].norm()
            assert moved or name in case.still
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
        torch.testing.assert_close(found[name], value, rtol=0, atol=case.reloaded)


def test_a_live_model_is_merged_into_whole(case: Case, tmp_path: Path) -> None:
    live = trained(case, tmp_path)
    model = base()
    merge(model, {"one": tmp_path})
    expected = quietly(live.merge_and_unload).state_dict()
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, expected[name], rtol=0, atol=2e-5)


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


REFUSED: Mapping[str, tuple[str, dict[str, Any], str]] = {
    "vera, other rank": ("vera", {"r": 5}, "r says rank 5"),
    "pvera, other rank": ("pvera", {"r": 8}, "r says rank 8"),
    "randlora, other rank": ("randlora", {"r": 5}, "r says rank 5"),
    "randlora, no alpha": ("randlora", {"randlora_alpha": "much"}, "randlora_alpha should be a number"),
    "tokens, too few": ("tokens", {"token_indices": [1, 2]}, "lists 2 rows, and"),
    "tokens, twice": ("tokens", {"token_indices": [1, 2, 2]}, "should list different rows"),
    "tokens, below zero": ("tokens", {"token_indices": [1, 2, -1]}, "should list different rows"),
    "tokens, no list": ("tokens", {"token_indices": 3}, "should list different rows"),
    "deft, other rank": ("deft", {"r": 4}, "r says rank 4"),
    "deft, nothing to fill with": ("deft", {"para": True}, "para is true, and the file has a deft_R"),
    "glora, other rank": ("glora", {"r": 3}, "r says rank 3"),
    "glora, other form": ("glora", {"config_A_B": "vector"}, "config_A_B is 'vector'"),
    "glora, other form of the bias": ("glora", {"config_D_E": "vector"}, "config_D_E is 'vector'"),
    "supertuning, other rank": ("supertuning, with factors", {"r": 3}, "r says rank 3"),
    "supertuning, no factors": ("supertuning", {"r": 3}, "there are no factors"),
    "bdlora, no settings": ("bdlora", {"use_bdlora": True}, "use_bdlora should hold settings"),
    "bdlora, both factors": (
        "bdlora",
        {"use_bdlora": {"nblocks": 2, "target_modules_bd_a": THREE, "target_modules_bd_b": THREE}},
        "names it for both factors",
    ),
    "bdlora, no list": (
        "bdlora",
        {"use_bdlora": {"nblocks": 2, "target_modules_bd_a": "first"}},
        "should list parts of module names",
    ),
    "vblora, other form": ("vblora", {"save_only_topk_weights": True}, "save_only_topk_weights is true"),
    "vblora, other vectors": ("vblora", {"num_vectors": 8}, "num_vectors is 8"),
    "vblora, more than there are": ("vblora", {"topk": 10}, "topk is 10, and at most 9"),
    "vblora, fewer than were kept": ("vblora, chosen only", {"topk": 2}, "topk is 2, and as many as 3"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_config_that_contradicts_the_tensors_is_refused(name: str, tmp_path: Path, registry: Registry) -> None:
    source, fields, words = REFUSED[name]
    trained(CASES[source], tmp_path)
    rewrite(tmp_path, **fields)
    found = {finding.code: finding for finding in open_header(tmp_path, registry).findings}
    assert found.keys() <= {"config-contradicts-tensors", "slot-missing"}  # then nobody uses what is shared
    assert found["config-contradicts-tensors"].level is Verdict.INCOMPATIBLE
    assert words in found["config-contradicts-tensors"].message


def test_projections_too_small_for_a_module_are_refused(tmp_path: Path, registry: Registry) -> None:
    trained(CASES["vera"], tmp_path)
    edit(tmp_path, lambda tensors: tensors.update({"base_model.vera_B": tensors["base_model.vera_B"][:9].clone()}))
    with pytest.raises(IntegrityError, match="does not fit the shared projections"):
        load(open_header(tmp_path, registry), registry)


def test_copies_of_the_projections_that_differ_are_refused(tmp_path: Path, registry: Registry) -> None:
    trained(CASES["randlora"], tmp_path)
    edit(tmp_path, lambda tensors: tensors["base_model.model.first.randlora_A"].add_(1))
    with pytest.raises(IntegrityError, match="differs from the projection that all modules share"):
        load(open_header(tmp_path, registry), registry)


def test_projections_without_copies_stay_without_copies(tmp_path: Path, registry: Registry) -> None:
    live = trained(CASES["randlora"], tmp_path / "theirs")
    copies = [f"base_model.model.{module}.randlora_{letter}" for module in THREE for letter in "AB"]
    edit(tmp_path / "theirs", lambda tensors: [tensors.pop(key) for key in copies])
    adapter = load(open_header(tmp_path / "theirs", registry), registry)
    expected = quietly(live.merge_and_unload).state_dict()
    for name, value in merged_by_hand(adapter, torch.float32).items():
        torch.testing.assert_close(value, expected[name], rtol=0, atol=2e-5)
    save(adapter, tmp_path / "ours", registry=registry)
    theirs, ours = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("theirs", "ours"))
    assert ours.keys() == theirs.keys()


def test_rows_that_the_base_lacks_are_a_misfit_before_anything_is_read(tmp_path: Path) -> None:
    trained(CASES["tokens"], tmp_path)
    rewrite(tmp_path, token_indices=[1, 2, 11])
    with pytest.raises(Exception, match="12 is the least, 11 found"):
        merge(base(), {"one": tmp_path})


def test_an_unknown_decomposition_is_refused_by_name(tmp_path: Path, registry: Registry) -> None:
    trained(CASES["deft"], tmp_path)
    rewrite(tmp_path, decomposition_method="svd")
    (finding,) = open_header(tmp_path, registry).findings
    assert (finding.code, finding.level) == ("config-unreadable", Verdict.INCOMPATIBLE)
    assert "decomposition_method is 'svd'" in finding.message


def test_blocks_that_the_factors_cannot_have_are_refused(tmp_path: Path, registry: Registry) -> None:
    trained(CASES["bdlora"], tmp_path)
    rewrite(tmp_path, use_bdlora={"nblocks": 4, "target_modules_bd_a": ["first"], "target_modules_bd_b": ["second"]})
    found = {finding.code: finding for finding in open_header(tmp_path, registry).findings}
    assert "are no factors with up in 4 blocks" in found["slot-misfit"].message


def test_glora_on_weights_alone_is_written_without_paths_for_the_bias(tmp_path: Path, registry: Registry) -> None:
    delta = Scaled(normal(8, 2), normal(2, 12), normal(8, 2), normal(2, 12), "lora")
    adapter = Adapter(deltas={Target("", "first", "weight"): delta})
    save(adapter, tmp_path, registry=registry)
    assert load(open_header(tmp_path, registry), registry).deltas.keys() == adapter.deltas.keys()
    live = quietly(lambda: PeftModel.from_pretrained(base(), tmp_path))
    expected = quietly(live.merge_and_unload).state_dict()
    for name, value in merged_by_hand(adapter, torch.float32).items():
        torch.testing.assert_close(value, expected[name], rtol=0, atol=2e-5)


def test_glora_with_some_of_the_paths_for_a_bias_is_refused(tmp_path: Path, registry: Registry) -> None:
    trained(CASES["glora, bias only"], tmp_path)
    edit(tmp_path, lambda tensors: tensors.pop("base_model.model.first.glora_D.zeros"))
    (finding,) = open_header(tmp_path, registry).findings
    assert (finding.code, finding.level) == ("config-contradicts-tensors", Verdict.INCOMPATIBLE)
    assert "some of the paths C, D and E, and not D" in finding.message


def test_a_bank_of_another_length_than_the_config_says_is_refused(tmp_path: Path, registry: Registry) -> None:
    trained(CASES["vblora"], tmp_path)
    rewrite(tmp_path, vector_length=2)
    with pytest.raises(IntegrityError, match="vector_length is 2"):
        load(open_header(tmp_path, registry), registry)


def test_a_choice_that_the_bank_lacks_is_refused(tmp_path: Path, registry: Registry) -> None:
    trained(CASES["vblora, chosen only"], tmp_path)
    edit(tmp_path, lambda tensors: tensors["base_model.model.first.vblora_logits_A_topk_indices"].fill_(9))
    with pytest.raises(IntegrityError, match="the shared bank of 9 lacks"):
        load(open_header(tmp_path, registry), registry)


def test_half_of_a_module_is_refused(tmp_path: Path, registry: Registry) -> None:
    trained(CASES["vblora, chosen only"], tmp_path)
    edit(tmp_path, lambda tensors: tensors.pop("base_model.model.first.vblora_logits_A_topk_weights"))
    (finding,) = open_header(tmp_path, registry).findings
    assert "are not all of its tensors" in finding.message


def test_projections_narrower_than_the_base_are_a_misfit_before_anything_is_read(tmp_path: Path) -> None:
    trained(CASES["vera"], tmp_path)
    edit(tmp_path, lambda tensors: tensors.update({"base_model.vera_A": tensors["base_model.vera_A"][:, :9].clone()}))
    with pytest.raises(Exception, match="12 is the least, 9 found"):
        merge(base(), {"one": tmp_path})


def normal(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


UNCARRIED: Mapping[str, tuple[dict[str, dict[str, Delta]], str]] = {
    "vera, projections of their own": (
        {
            name: {"weight": VeRA(normal(3), normal(2), normal(3, 2, seed=seed), normal(2, 4))}
            for seed, name in enumerate("ab")
        },
        "one up for all modules",
    ),
    "tokens, other rows": (
        {"a": {"weight": Rows(normal(1, 2), (3,))}, "b": {"weight": Rows(normal(1, 2), (4,))}},
        "one token_indices",
    ),
    "deft, two ranks": (
        {name: {"weight": Refill(normal(4, r), normal(r, 2), 1.0, "qr")} for name, r in {"a": 2, "b": 3}.items()},
        "one r for all modules",
    ),
    "deft, two scales": (
        {name: {"weight": Refill(normal(4, 2), normal(2, 2), s, "qr")} for name, s in {"a": 1.0, "b": 3.0}.items()},
        "one alpha for all modules",
    ),
    "glora, some without a bias": (
        {
            "a": {"weight": Scaled(normal(1), None, normal(1), None, "constant")},
            "b": {
                "weight": Scaled(normal(1), None, normal(1), None, "constant"),
                "bias": Offsets(normal(2, 1), None, normal(1), normal(1), "vector", "constant"),
            },
        },
        "paths for a bias on all modules or none",
    ),
    "supertuning, two sparsities": (
        {
            name: {"weight": Elements(normal(2), torch.tensor([1, 2]), sparsity=sparsity)}
            for name, sparsity in {"a": 0.5, "b": 0.25}.items()
        },
        "one sparsity",
    ),
    "bdlora, part of a name": (
        {
            "q": {"weight": BlockLoRA(normal(4, 2), normal(4, 4), 1.0, "up", 2)},
            "q_proj": {"weight": BlockLoRA(normal(4, 4), normal(4, 2), 1.0, "down", 2)},
        },
        "by part of their names",
    ),
    "vblora, cut": (
        {"a": {"weight": Banked(normal(2, 2, 3), normal(2, 2, 3), normal(3, 2), 1).region(slice(0, 2), slice(None))}},
        "no word for vblora",
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
