"""A recipe reads back as it was written, means the same however it was written, and is refused at its key path."""

from __future__ import annotations

import functools
import json
import re
import tomllib
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorahub.composition.algebra.budgeting import Shared, budget_of
from lorahub.composition.algebra.truncate import Budget
from lorahub.errors import NotFound, RecipeError
from lorahub.names import Ref
from lorahub.recipe import LIMIT, Recipe
from lorahub.recipe_fields import BLOCK_LISTS, Filter, Gradient

SCHEMAS = Path(__file__).parents[2] / "schemas"
EXAMPLES = SCHEMAS / "examples" / "recipe"
VALID = sorted((EXAMPLES / "valid").glob("*.toml"))
INVALID = sorted((EXAMPLES / "invalid").glob("*.toml"))

TIES = """
method = "ties"
rank = 32
[parameters]
density = 0.4
[[adapters]]
ref = "acme/ink@1.2"
weight = 0.7
[[adapters]]
ref = "acme/sql@~=1.0"
weight = [0.0, 0.5, 1.0]
"""


@functools.cache
def published() -> jsonschema.Draft202012Validator:
    schema = json.loads((SCHEMAS / "recipe.schema.json").read_text(encoding="utf-8"))
    jsonschema.Draft202012Validator.check_schema(schema)
    return jsonschema.Draft202012Validator(schema)


def said(path: Path, word: str) -> str:
    """What an example says of itself, in its first comments."""
    match = re.search(rf"^# {word}: (.+)$", path.read_text(encoding="utf-8"), re.MULTILINE)
    assert match is not None, path
    return match[1]


def refused(text: str | bytes) -> str:
    with pytest.raises(RecipeError) as error:
        Recipe.from_text(text)
    return str(error.value)


# ------------------------------------------------------------------------------------------------------- examples


@pytest.mark.parametrize("path", VALID, ids=lambda path: path.stem)
def test_a_valid_example_is_valid_for_schema_and_model_and_reads_back(path: Path) -> None:
    assert said(path, "why")
    text = path.read_text(encoding="utf-8")
    assert list(published().iter_errors(tomllib.loads(text))) == []
    recipe = Recipe.load(path)
    assert Recipe.from_text(recipe.to_toml()) == recipe
    assert Recipe.from_text(recipe.to_toml()).fingerprint() == recipe.fingerprint()
    assert list(published().iter_errors(recipe.document())) == []


@pytest.mark.parametrize("path", INVALID, ids=lambda path: path.stem)
def test_an_invalid_example_fails_both_at_its_key_path(path: Path) -> None:
    assert said(path, "why")
    where = said(path, "where")
    text = path.read_text(encoding="utf-8")
    assert f"{where}: " in refused(text) or where == "base"
    parts = [int(part) if part.isdigit() else part for part in re.findall(r"[A-Za-z_0-9]+", where)]
    found = [list(error.absolute_path) for error in published().iter_errors(tomllib.loads(text))]
    assert any(parts[: len(place)] == place for place in found)


def test_there_are_examples_of_both_sorts() -> None:
    assert len(VALID) >= 6
    assert len(INVALID) >= 20


# -------------------------------------------------------------------------------------------------------- reading


def test_what_is_left_out_has_its_default() -> None:
    recipe = Recipe.from_text('[[adapters]]\nref = "acme/ink"')
    assert (recipe.method, recipe.seed, recipe.output, recipe.non_additive) == ("linear", 0, "adapter", "refuse")
    assert recipe.adapters[0].weight == 1.0
    assert recipe.parameters == {}


def test_rules_are_told_apart_by_their_keys() -> None:
    recipe = Recipe.from_text(
        '[[adapters]]\nref = "a/b"\nweight = [{ filter = "*q*", value = { gradient = [0, 1] } }, { value = 2 }]'
    )
    assert recipe.adapters[0].weight == (
        Filter(filter="*q*", value=Gradient(gradient=(0.0, 1.0))),
        Filter(value=2.0),
    )


def test_every_problem_is_listed_with_its_key_path() -> None:
    message = refused(
        """
        methud = "ties"
        rank = "8"
        energy = nan
        seed = 2026-01-01
        [[adapters]]
        ref = "acme/ink@1.2:0.7"
        wieght = 1
        [[adapters]]
        ref = "acme"
        weight = [nan, 1]
        [[adapters]]
        ref = "a/b"
        weight = { unet = { down = { blok = 1 } }, other = true }
        parameters = { density = inf }
        """
    )
    for line in (
        "methud: there is no such key here. Did you mean 'method'?",
        "rank: Input should be a valid integer",
        "energy: Input should be a finite number",
        "seed: a date",
        "adapters[0].ref: 'acme/ink@1.2:0.7' carries a name or a weight",
        "adapters[0].wieght: there is no such key here. Did you mean 'weight'?",
        "adapters[1].ref: 'acme' is not a reference",
        "adapters[1].weight[0]: Input should be a finite number",
        "adapters[2].weight.unet.down.blok: 'blok' is not a block as diffusers numbers them",
        "adapters[2].weight.other: Input should be a valid number",
        "adapters[2].parameters.density: Input should be a finite number",
    ):
        assert f"\n  {line}" in message
    assert "is empty" not in message


@pytest.mark.parametrize(
    ("weight", "complaint"),
    [
        ("{ layers = { 0-3 = 1, 2- = 0 } }", "'0-3' and '2-' both hold layer 2"),
        ("{ layers = { 3-1 = 1 } }", "'3-1' holds no layer"),
        ("{ blocks = [1, 2, 3] }", "must list 12, 17, 20, 26, 61"),
        ("{}", "is empty"),
        ('{ "a b" = 1 }', "'a b' is not the name of a component"),
    ],
)
def test_rules_that_cannot_be_meant_are_refused(weight: str, complaint: str) -> None:
    assert complaint in refused(f'[[adapters]]\nref = "a/b"\nweight = {weight}')


def test_names_are_given_once_and_labels_are_unique() -> None:
    assert "two adapters are called 'x'" in refused(
        '[[adapters]]\nref = "a/b"\nname = "x"\n[[adapters]]\nref = "a/c"\nname = "x"'
    )
    recipe = Recipe.inline(["a/x", "b/x", "x-2=c/y", "./dir/z/", "d/e/sub/f.safetensors"])
    assert recipe.labels() == ("x", "x-3", "x-2", "z", "f.safetensors")


def test_a_checkpoint_needs_a_base_and_has_no_format() -> None:
    assert "a checkpoint is made of a base" in refused('output = "checkpoint"\n[[adapters]]\nref = "a/b"')
    text = 'output = "checkpoint"\nbase = "gpt2"\nformat = "peft"\n[[adapters]]\nref = "a/b"'
    assert "format is that of a written adapter" in refused(text)
    assert Recipe.from_text(text.replace('format = "peft"\n', "")).base_reference() == Ref(repo="gpt2")


def test_a_newer_version_says_what_to_do() -> None:
    assert "pip install --upgrade" in refused('schema_version = "1.7"\nnewkey = 1\n[[adapters]]\nref = "a/b"')


def test_a_file_that_is_not_there_is_not_found(tmp_path: Path) -> None:
    with pytest.raises(NotFound):
        Recipe.load(tmp_path / "none.toml")


# ---------------------------------------------------------------------------------------------------- places, budgets


def test_local_paths_start_at_the_recipes_folder(tmp_path: Path) -> None:
    recipe = Recipe.inline(["./ink", "../sql", "acme/x@1", "/abs/olute"], base="./base")
    places = [each.reference(tmp_path) for each in recipe.adapters]
    assert [place.local for place in places] == [tmp_path / "ink", tmp_path / "../sql", None, Path("/abs/olute")]
    assert recipe.adapters[0].reference().local == Path("ink")
    base = recipe.base_reference(tmp_path)
    assert base is not None
    assert base.local == tmp_path / "base"
    assert Recipe.inline(["a/b"]).base_reference() is None


def test_the_budget_is_resizes() -> None:
    assert budget_of(**Recipe.inline(["a/b"], rank=8, energy=0.9).budget()) == Budget(rank=8, energy=0.9)
    assert budget_of(**Recipe.inline(["a/b"], max_parameters=1000).budget()) == Shared(parameters=1000)


# -------------------------------------------------------------------------------------------------------- writing


def test_the_command_lines_form_is_a_recipe() -> None:
    recipe = Recipe.inline(
        ["acme/ink@1.0:0.7", "sql=acme/sql:-0.3", "./dir"], "ties", {"density": 0.4}, rank=32, seed=None
    )
    assert recipe.to_toml() == (
        'schema_version = "1.0"\nmethod = "ties"\nrank = 32\nadapters = [\n'
        '    { ref = "acme/ink@1.0", weight = 0.7 },\n'
        '    { ref = "acme/sql", name = "sql", weight = -0.3 },\n    { ref = "./dir" },\n]\n\n'
        "[parameters]\ndensity = 0.4\n"
    )
    assert Recipe.from_text(recipe.to_toml()) == recipe
    with pytest.raises(RecipeError, match="the request does not follow the schema of a recipe: rank"):
        Recipe.inline(["a/b"], rank=0)


def test_equal_recipes_have_one_fingerprint_however_they_are_written() -> None:
    recipe = Recipe.from_text(TIES)
    other = Recipe.from_text(
        'schema_version = "1.0"\nseed = 0\ndescription = "mine"\n' + TIES.replace("0.0, 0.5, 1.0", "0, 0.5, 1")
    )
    assert other.fingerprint() == recipe.fingerprint()
    assert re.fullmatch(r"sha256:[0-9a-f]{64}", recipe.fingerprint())
    one, two = (Recipe.inline(["a/b"], parameters={"lambda": value}) for value in (1, 1.0))
    assert one.fingerprint() == two.fingerprint()


@pytest.mark.parametrize(
    "change",
    [
        {"seed": 1},
        {"method": "linear"},
        {"rank": 16},
        {"parameters": {"density": 0.5}},
        {"dtype": "float16"},
        {"rank": None},
    ],
)
def test_whatever_may_change_the_result_changes_the_fingerprint(change: dict[str, Any]) -> None:
    recipe = Recipe.from_text(TIES)
    changed = recipe.changed(**change)
    assert changed.fingerprint() != recipe.fingerprint()
    assert changed != recipe


def test_a_change_is_checked_like_a_recipe_that_is_read() -> None:
    with pytest.raises(RecipeError, match="rank"):
        Recipe.from_text(TIES).changed(rank="8")


def test_the_order_of_adapters_counts_in_the_fingerprint() -> None:
    assert Recipe.inline(["a/b", "a/c"]).fingerprint() != Recipe.inline(["a/c", "a/b"]).fingerprint()


def test_lists_of_blocks_name_each_block_once() -> None:
    assert {count: len(set(names)) for count, names in BLOCK_LISTS.items()} == {n: n for n in (12, 17, 20, 26, 61)}


NUMBERS = st.floats(-4, 4, allow_nan=False).map(lambda x: round(x, 6) + 0.0)
RULES = st.recursive(
    NUMBERS | st.lists(NUMBERS, min_size=1, max_size=4),
    lambda inner: st.one_of(
        st.fixed_dictionaries(
            {"gradient": st.lists(NUMBERS, min_size=1, max_size=3)}, optional={"layers": st.integers(1, 99)}
        ),
        st.dictionaries(st.sampled_from(["unet", "text_encoder", "transformer"]), inner, min_size=1),
        st.lists(
            st.fixed_dictionaries(
                {"value": inner}, optional={"filter": st.text(min_size=1, max_size=9), "count": st.integers(0, 9)}
            ),
            min_size=1,
            max_size=3,
        ),
    ),
    max_leaves=8,
)


@given(st.lists(RULES, min_size=1, max_size=3), st.integers(0, 2**63 - 1))
def test_any_recipe_reads_back_as_it_was_written(rules: list[Any], seed: int) -> None:
    document = {"seed": seed, "adapters": [{"ref": "a/b", "weight": rule} for rule in rules]}
    recipe = Recipe.from_document(document)
    again = Recipe.from_text(recipe.to_toml())
    assert again == recipe
    assert again.to_toml() == recipe.to_toml()
    assert list(published().iter_errors(document)) == []


def test_a_recipe_over_the_limit_is_refused() -> None:
    assert "allowed" in refused(TIES + "#" * LIMIT)
