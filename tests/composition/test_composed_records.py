"""What a composition says of itself, and what its base adds: accepted findings, bases, names, storage, provenance."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from composition.composed import save_base, write
from safetensors import safe_open

import lorahub
from lorahub.adapter import Adapter, load, open_header
from lorahub.bases.layout import Target
from lorahub.combination import Combinable, Combination
from lorahub.composing.asked import requested
from lorahub.deltas.lora import LoRA
from lorahub.errors import BaseNeeded, UsageError
from lorahub.opening import open_base
from lorahub.plugins import load_registry
from lorahub.recipe import Recipe

if TYPE_CHECKING:
    from transformers import PreTrainedModel

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # PEFT does

TinyModel = Callable[..., "PreTrainedModel"]


@pytest.fixture
def pair(tmp_path: Path) -> Mapping[str, Path]:
    return {name: write(tmp_path / name, seed) for seed, name in enumerate(("ink", "sql"))}


@pytest.fixture
def strangers(tmp_path: Path) -> list[Path]:
    return [write(tmp_path / name, 1, base_model_name_or_path=f"acme/{name}") for name in ("one", "two")]


# ---------------------------------------------------------------------------------------------------- what was accepted


def test_what_had_to_be_accepted_stands_in_the_record_and_its_recipe(strangers: list[Path], tmp_path: Path) -> None:
    mix = lorahub.compose(strangers, allow=["bases-differ", "nothing-shared"], out=tmp_path / "mix")
    assert mix.record is not None
    assert mix.record.recipe is not None
    assert mix.record.recipe.params == {"allow": ["bases-differ"]}
    recipe = Recipe.from_text(mix.record.recipe.text)
    assert recipe.allow == ("bases-differ",)
    again = lorahub.compose(_beside(tmp_path, recipe), out=tmp_path / "again")
    assert again.record is not None
    assert again.record.recipe == mix.record.recipe


def _beside(folder: Path, recipe: Recipe) -> Path:
    file = folder / "recipe.toml"
    file.write_text(recipe.to_toml())
    return file


def test_a_code_that_accepted_nothing_is_not_recorded(pair: Mapping[str, Path]) -> None:
    mix = lorahub.compose(pair, allow=["bases-differ", "base-unrecorded"])
    assert mix.record is not None
    assert mix.record.recipe is not None
    assert mix.record.recipe.params == {}
    assert Recipe.from_text(mix.record.recipe.text).allow == ()


# --------------------------------------------------------------------------------------------------------------- bases


def recorded(folder: Path, repo: str, revision: int, *, seed: int = 1) -> None:
    """Say which base an adapter is for."""
    base = save_base(folder.parent / f"base-of-{folder.name}", seed)
    lorahub.record(folder, base, base_repo=repo, base_revision=f"{revision}" * 40)


def test_adapters_of_different_bases_make_one_that_names_none(strangers: list[Path], tmp_path: Path) -> None:
    for number, folder in enumerate(strangers):
        recorded(folder, f"acme/{folder.name}", number, seed=number)
    mix = lorahub.compose(strangers, allow=["bases-differ"], out=tmp_path / "mix")
    assert mix.record is not None
    assert mix.record.base is None
    assert json.loads((tmp_path / "mix" / "adapter_config.json").read_text()).get("base_model_name_or_path") is None
    assert "base-left-out" in {finding.code for finding in mix.report.findings}


def test_adapters_of_one_base_make_one_that_names_it(pair: Mapping[str, Path], tmp_path: Path) -> None:
    for number, folder in enumerate(pair.values()):
        recorded(folder, "acme/base", number)
    mix = lorahub.compose(pair)
    assert mix.record is not None
    assert mix.record.base is not None
    assert (mix.record.base.repo_id, mix.record.base.revision) == ("acme/base", "0" * 40)
    assert mix.record.base.targets
    assert "base-left-out" not in {finding.code for finding in mix.report.findings}

    recorded(wide := write(tmp_path / "wide", 3, names=("q", "k")), "acme/base", 0)
    more = lorahub.compose({**pair, "wide": wide})
    assert more.record is not None
    assert more.record.base is not None
    assert (more.record.base.weights_digest, more.record.base.targets) == (mix.record.base.weights_digest, None)


# --------------------------------------------------------------------------------------------------------------- names


def test_weights_go_by_the_names_that_people_gave(pair: Mapping[str, Path]) -> None:
    named = dict(zip(("my ink", "my-ink"), pair.values(), strict=True))
    request = requested(named, {"my ink": 0.7, "my-ink": 0.3})
    assert [(each.name, each.weight) for each in request.recipe.adapters] == [("my-ink", 0.7), ("my-ink-2", 0.3)]
    assert [each.weight for each in requested(named, {"my-ink-2": 0.5}).recipe.adapters] == [1.0, 0.5]
    with pytest.raises(UsageError, match="'my-ink' and 'my-ink-2' are one adapter"):
        requested(named, {"my-ink": 0.5, "my-ink-2": 0.3})
    with pytest.raises(UsageError, match="were not given: my_ink"):
        requested(named, {"my_ink": 0.5})


def test_a_term_that_is_no_adapter_is_refused(pair: Mapping[str, Path]) -> None:
    class Other(Combinable):
        pass

    mixed = Combination(terms=((lorahub.load(pair["ink"]), 0.5), (Other(), 0.5)))
    with pytest.raises(UsageError, match="term 2 of the sum is no adapter, but a Other"):
        lorahub.compose(mixed)


# --------------------------------------------------------------------------------------------------- what the base adds


@pytest.mark.plugin("transformers")
def test_new_values_for_weights_stored_the_other_way_round_are_written_as_the_base_has_them(
    tiny_model: TinyModel, tmp_path: Path
) -> None:
    from peft import LoraConfig, PeftModel, get_peft_model

    base = tiny_model("gpt2", n_layer=1)
    base.save_pretrained(tmp_path / "base")
    config = LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True, modules_to_save=["c_proj"])
    weights, changes = (0.7, -0.2), []
    before = {name: value.detach().double() for name, value in base.named_parameters()}
    for number in range(2):
        model = get_peft_model(tiny_model("gpt2", n_layer=1), config)
        generator = torch.Generator().manual_seed(number)
        for name, parameter in model.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                parameter.data = torch.randn(parameter.shape, generator=generator)
        model.save_pretrained(str(tmp_path / f"a{number}"))
        merged = model.double().merge_and_unload()
        changes.append({name: value.detach() - before[name] for name, value in merged.named_parameters()})
    wanted: dict[str, torch.Tensor] = {
        name: value + sum(weight * change[name] for weight, change in zip(weights, changes, strict=True))
        for name, value in before.items()
    }
    lorahub.compose(
        [tmp_path / "a0", tmp_path / "a1"], weights=weights, base=str(tmp_path / "base"), out=tmp_path / "mix"
    )
    loaded = PeftModel.from_pretrained(tiny_model("gpt2", n_layer=1), str(tmp_path / "mix"))
    found = {name: value.detach() for name, value in loaded.double().merge_and_unload().named_parameters()}
    assert {name for name in found if not torch.equal(found[name], before[name])} >= {
        f"transformer.h.0.{name}.weight" for name in ("attn.c_attn", "attn.c_proj", "mlp.c_proj")
    }
    for name, value in wanted.items():
        assert torch.allclose(found[name], value, rtol=0, atol=1e-5), name


@pytest.mark.plugin("transformers")
def test_new_values_that_may_be_either_way_round_are_refused_without_the_base(
    tiny_model: TinyModel, tmp_path: Path
) -> None:
    from peft import LoraConfig, get_peft_model

    tiny_model("gpt2", n_layer=1).save_pretrained(tmp_path / "base")
    config = LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True, modules_to_save=["c_proj"])
    for name in "ab":
        get_peft_model(tiny_model("gpt2", n_layer=1), config).save_pretrained(str(tmp_path / name))
    index = open_base(tmp_path / "base").index
    known = load(open_header(tmp_path / "a", load_registry(), index=index), load_registry())
    assert lorahub.compose([known]).hints["transposed"] == known.hints["transposed"]
    with pytest.raises(BaseNeeded, match=r"c_proj.*stores it \[in, out\], and .*b was not"):
        lorahub.compose([known, tmp_path / "b"], weights=[0.5, 0.5])


@pytest.mark.parametrize("layout", ["torchtune", "gguf"])
def test_formats_that_need_the_bases_config_are_written_where_a_base_is_named(
    tiny_model: TinyModel, tmp_path: Path, layout: str
) -> None:
    from peft import LoraConfig, get_peft_model

    tiny_model("llama").save_pretrained(tmp_path / "base")
    for number in range(2):
        model = get_peft_model(tiny_model("llama"), LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
        generator = torch.Generator().manual_seed(number)
        for name, value in model.named_parameters():
            if "lora_" in name:
                value.data = torch.randn(value.shape, generator=generator)
        model.save_pretrained(str(tmp_path / f"a{number}"))
    given = [tmp_path / f"a{number}" for number in range(2)]
    mix = lorahub.compose(given, weights=[0.7, 0.3], base=str(tmp_path / "base"), format=layout, out=tmp_path / "mix")
    header = open_header(tmp_path / "mix", load_registry(), index=open_base(tmp_path / "base").index)
    assert header.format == layout
    again = load(header, load_registry())
    parts = [lorahub.load(folder) for folder in given]
    assert again.deltas.keys() == mix.deltas.keys() == parts[0].deltas.keys()
    for target in again.deltas:
        wanted = 0.7 * _product(parts[0], target) + 0.3 * _product(parts[1], target)
        assert torch.allclose(_product(again, target), wanted, rtol=0, atol=1e-5)


def _product(adapter: Adapter, target: Target) -> torch.Tensor:
    delta = adapter.deltas[target]
    assert isinstance(delta, LoRA)
    return delta.scale * (delta.up.double() @ delta.down.double())


# ---------------------------------------------------------------------------------------------------------- checkpoints


@pytest.mark.parametrize("out", ["merged", "merged.safetensors"])
@pytest.mark.parametrize("rank", [None, 6])
def test_a_checkpoint_names_the_recipe_and_the_parents_of_what_went_in(
    pair: Mapping[str, Path], tmp_path: Path, out: str, rank: int | None
) -> None:
    fields: dict[str, Any] = {"rank": rank} if rank else {}
    recipe = Recipe.from_document(
        {
            "base": str(save_base(tmp_path / "base")),
            "output": "checkpoint",
            "method": "ties",
            **fields,
            "adapters": [{"ref": str(folder), "weight": 0.6} for folder in pair.values()],
        }
    )
    lorahub.compose.checkpoint(recipe, tmp_path / out)
    if out.endswith(".safetensors"):
        with safe_open(tmp_path / out, "pt") as file:
            said = json.loads(file.metadata()["lorahub-merge"])
    else:
        said = json.loads((tmp_path / out / "lorahub-merge.json").read_text())
    (made,) = said["adapters"]
    assert made["recipe"]["method"] == "ties"
    assert [(each["ref"], each["weight"]) for each in made["parents"]] == [("ink", 0.6), ("sql", 0.6)]
    assert all(each["digest"].startswith("sha256:") for each in made["parents"])
    assert Recipe.from_text(made["recipe"]["text"]).method == "ties"
    assert str(tmp_path) not in json.dumps(said)
