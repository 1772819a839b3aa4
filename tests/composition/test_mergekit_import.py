"""What a mergekit configuration asks for that adapters cannot be is refused by name, and what is left out is told."""

from __future__ import annotations

from pathlib import Path

import pytest

from lorahub.composition.mergekit.methods import METHODS, OPTIONAL_BASE
from lorahub.composition.mergekit.reading import from_mergekit, load_mergekit
from lorahub.errors import RecipeError
from lorahub.plugins import load_registry
from lorahub.recipe import Recipe
from lorahub.recipe_fields import Filter, Gradient

A, B = "acme/base+acme/a", "acme/base+acme/b"
PAIR = f"models:\n  - {{model: {A}, parameters: {{weight: 0.6}}}}\n  - {{model: {B}, parameters: {{weight: 0.4}}}}\n"


def complaint(text: str) -> str:
    with pytest.raises(RecipeError) as refused:
        from_mergekit(text)
    return str(refused.value)


def test_a_configuration_becomes_a_recipe_that_says_its_defaults() -> None:
    recipe = from_mergekit(f"merge_method: ties\nbase_model: acme/base\n{PAIR}dtype: bfloat16\n").recipe
    assert recipe == Recipe.from_text(
        """
        method = "ties"
        dtype = "bfloat16"
        [parameters]
        lambda = 1.0
        normalize = true
        rescale = false
        election = "mergekit"
        [[adapters]]
        ref = "acme/a"
        weight = 0.6
        parameters = { density = 1.0 }
        [[adapters]]
        ref = "acme/b"
        weight = 0.4
        parameters = { density = 1.0 }
        """
    )


def test_linear_says_that_it_normalizes_which_is_no_default_here() -> None:
    assert from_mergekit(f"merge_method: linear\n{PAIR}").recipe.parameters == {"normalize": True}
    assert Recipe.inline(["a/b"]).parameters == {}


def test_rescale_is_the_l1_norm() -> None:
    recipe = from_mergekit(f"merge_method: dare_ties\nbase_model: acme/base\n{PAIR}").recipe
    assert recipe.parameters["rescale"] == "l1"


def test_gradients_know_their_layers_and_what_is_outside() -> None:
    text = f"""
    merge_method: slerp
    base_model: {A}
    slices:
      - sources:
          - {{model: {B}, layer_range: [0, 32]}}
          - {{model: {A}, layer_range: [0, 32]}}
    parameters:
      t:
        - {{filter: self_attn, value: [0, 0.5, 1]}}
        - {{value: 1e-1}}
    """
    imported = from_mergekit(text)
    assert [each.ref for each in imported.recipe.adapters] == ["acme/a", "acme/b"]
    assert imported.recipe.parameters["t"] == (
        Filter(filter="*self_attn*", value=Gradient(gradient=(0.0, 0.5, 1.0), layers=32, elsewhere=0.0), optional=True),
        Filter(value=0.1),
    )
    assert any("layer_range [0, 32] is taken for all layers" in note for note in imported.notes)
    assert any("lengths and angles of whole weights" in note for note in imported.notes)


REFUSED = {
    "passthrough": (f"merge_method: passthrough\n{PAIR}", "merge_method passthrough cannot be carried over"),
    "arcee_fusion": (f"merge_method: arcee_fusion\n{PAIR}", "looks at the base's weights"),
    "ram": (f"merge_method: ram\n{PAIR}", "choose sce or ties"),
    "a mistyped method": (f"merge_method: tie\n{PAIR}", "Did you mean 'ties'?"),
    "no method": (PAIR, "merge_method is missing"),
    "other bases": (
        f"merge_method: ties\nmodels: [{{model: {A}, parameters: {{weight: 1}}}}, {{model: x/y+acme/b}}]",
        "different bases: acme/base and x/y",
    ),
    "another base": (f"merge_method: ties\nbase_model: x/y\n{PAIR}", "different bases"),
    "another revision": (f"merge_method: ties\nbase_model: acme/base@v1\n{PAIR}", "name it alike everywhere"),
    "an adapter as base": (f"merge_method: ties\nbase_model: {A}\n{PAIR}", "takes differences from it"),
    "slices": (
        "merge_method: linear\nslices: [{sources: [{model: a/b, layer_range: [0, 8]}]}, {sources: []}]",
        "2 slices put layers together anew",
    ),
    "part of the layers": (
        f"merge_method: linear\nslices:\n  - sources: [{{model: {A}, layer_range: [4, 8]}}]",
        "layer_range [4, 8] takes part of the layers",
    ),
    "modules": (
        f"merge_method: linear\nmodules: {{default: {{models: [{{model: {A}}}]}}}}",
        "modules cannot be carried",
    ),
    "models and slices": (f"merge_method: linear\n{PAIR}slices: [{{}}]", "exactly one of models, slices and modules"),
    "tokenizer": (f"merge_method: linear\n{PAIR}tokenizer_source: union", "an adapter has no tokenizer"),
    "tokens": (
        f"merge_method: linear\n{PAIR}tokenizer: {{source: base, tokens: {{}}}}",
        "tokenizer cannot be carried over",
    ),
    "chat template": (f"merge_method: linear\n{PAIR}chat_template: auto", "chat_template cannot be carried over"),
    "architecture": (
        "merge_method: linear\nmodels: [{model: {model: a/b, override_architecture: X}}]",
        "override_architecture cannot be carried over",
    ),
    "dtype": (f"merge_method: linear\ndtype: int8\n{PAIR}", "dtype int8 cannot be stored"),
    "no weight": (f"merge_method: linear\nmodels: [{{model: {A}}}]", "the parameter weight is missing"),
    "only the base": (
        "merge_method: ties\nbase_model: acme/base\nmodels: [{model: acme/base}]",
        "it names no adapter",
    ),
    "twice the same": (f"merge_method: ties\nmodels: [{{model: {A}}}, {{model: {A}}}]", "is named twice"),
    "base alone in slerp": (
        f"merge_method: slerp\nbase_model: acme/base\nmodels: [{{model: {A}}}]\nparameters: {{t: 0.5}}",
        "a model without adapter",
    ),
    "three in slerp": (
        f"merge_method: slerp\nbase_model: {A}\n{PAIR}  - {{model: acme/base+acme/c}}\nparameters: {{t: 0.5}}",
        "takes two models",
    ),
    "no t": (f"merge_method: slerp\nbase_model: {A}\n{PAIR}", "the parameter t is missing"),
    "karcher with base": (f"merge_method: karcher\nbase_model: acme/base\n{PAIR}", "counts base_model as one"),
    "scaled base": (
        f"merge_method: linear\n{PAIR.replace('0.6', '0.9')}parameters: {{normalize: false}}",
        "at weights of 1.3 together, also multiplies the base",
    ),
    "scaled base by depth": (
        f"merge_method: linear\n{PAIR.replace('0.6', '[0, 1]')}parameters: {{normalize: false}}",
        "how often the base comes out",
    ),
    "switch by filter": (
        f"merge_method: ties\n{PAIR}parameters: {{normalize: [{{filter: mlp, value: true}}, {{value: false}}]}}",
        "normalize differs by filter",
    ),
    "iterations by depth": (
        f"merge_method: karcher\n{PAIR}parameters: {{max_iter: [1, 9]}}",
        "max_iter differs by depth",
    ),
    "star in a filter": (
        f"merge_method: linear\nmodels: [{{model: {A}, parameters: {{weight: [{{filter: '*q', value: 1}}]}}}}]",
        "'*' is in no name",
    ),
    "a folder's revision": ("merge_method: linear\nmodels: [{model: ./x@v1, parameters: {weight: 1}}]", "no revision"),
    "no reference": ("merge_method: linear\nmodels: [{model: 'a/b/c d', parameters: {weight: 1}}]", "not a reference"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_carried_over_is_refused_by_name(name: str) -> None:
    text, words = REFUSED[name]
    assert words in complaint(text)


NOTED = {
    "int8_mask: true": "it changes how a mask is kept in memory",
    "wieght: 1": "mergekit's ties does not read it. Did you mean 'weight'?",
}


@pytest.mark.parametrize("parameter", NOTED)
def test_parameters_without_effect_are_left_out_and_told(parameter: str) -> None:
    plain = from_mergekit(f"merge_method: ties\nbase_model: acme/base\n{PAIR}")
    imported = from_mergekit(f"merge_method: ties\nbase_model: acme/base\n{PAIR}parameters: {{{parameter}}}")
    assert imported.recipe == plain.recipe
    assert any(NOTED[parameter] in note for note in imported.notes)


def test_harmless_lines_are_left_out_and_told() -> None:
    imported = from_mergekit(
        f"merge_method: ties\nbase_model: acme/base\n{PAIR}tokenizer_source: base\nnmae: mine\ndtype: float64\n"
    )
    assert imported.recipe.dtype == "float32"
    for words in ("tokenizer stays the base's", "'nmae' is left out", "everything is computed in it"):
        assert any(words in note for note in imported.notes)


def test_a_base_among_the_models_takes_its_share() -> None:
    text = f"merge_method: linear\nbase_model: acme/base\n{PAIR}  - {{model: acme/base, parameters: {{weight: 1}}}}\n"
    recipe = from_mergekit(text).recipe
    assert [each.weight for each in recipe.adapters] == [pytest.approx(0.3), pytest.approx(0.2)]
    assert recipe.parameters == {"normalize": False}


def test_models_without_plus_are_taken_for_adapters_unless_they_are_seen_to_be_whole(tmp_path: Path) -> None:
    imported = from_mergekit("merge_method: linear\nmodels: [{model: acme/a@v1, parameters: {weight: 1}}]")
    assert imported.recipe.adapters[0].ref == "acme/a@v1"
    assert any("acme/a@v1 is taken for an adapter" in note for note in imported.notes)
    (tmp_path / "config.json").write_text("{}", encoding="utf-8")
    text = f"merge_method: linear\nmodels: [{{model: '{tmp_path}', parameters: {{weight: 1}}}}]"
    assert "is a whole model, and recipes are of adapters" in complaint(text)
    (tmp_path / "adapter_config.json").write_text("{}", encoding="utf-8")
    assert from_mergekit(text).recipe.adapters[0].ref == str(tmp_path)


def test_local_folders_are_found_from_the_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "adapters" / "ink").mkdir(parents=True)
    (tmp_path / "configs").mkdir()
    path = tmp_path / "configs" / "mix.yaml"
    path.write_text(
        "merge_method: linear\nmodels: [{model: gpt2+adapters/ink, parameters: {weight: 1}}]\n", encoding="utf-8"
    )
    monkeypatch.chdir(tmp_path)
    imported = load_mergekit(path)
    recipe = imported.recipe
    assert recipe.adapters[0].reference(path.parent).local == path.parent / "../adapters/ink"
    assert recipe.adapters[0].ref == "./../adapters/ink"
    assert recipe.base is None
    assert any("gpt2 is not read" in note for note in imported.notes)
    path.write_text(path.read_text(encoding="utf-8").replace("weight: 1", "weight: [0, 1]"), encoding="utf-8")
    assert load_mergekit(path).recipe.base == "gpt2"


def test_every_method_that_is_carried_over_is_one_of_ours_and_takes_what_it_is_given() -> None:
    known = load_registry().methods
    for name, spelling in METHODS.items():
        given = {key: 0.5 if value is None else value for key, value in {**spelling.common, **spelling.each}.items()}
        given |= dict(spelling.fixed)
        given.pop("weight", None)
        if given.get("rescale") is True:
            given["rescale"] = "l1"
        assert known[name].made(given).name == name
    assert METHODS.keys() >= OPTIONAL_BASE
