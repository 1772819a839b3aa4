"""Recipes, locks and mergekit configurations from anybody: an answer soon, or a typed error that says where."""

from __future__ import annotations

import contextlib
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lorahub import strict_toml, strict_yaml
from lorahub.bases.layout import Target
from lorahub.composition.mergekit.reading import from_mergekit, load_mergekit
from lorahub.composition.weights.resolve import weights_of
from lorahub.errors import LorahubError, RecipeError, RecordError
from lorahub.recipe import Recipe
from lorahub.recipe_lock import RecipeLock
from lorahub.strict_json import NotStrict

ADAPTER = '[[adapters]]\nref = "a/b"\n'

TOML: dict[str, str | bytes] = {
    "brackets": "x = " + "[" * 200_000,
    "tables": "x = " + "{a=" * 200_000,
    "dotted key": "a" + ".a" * 400_000 + " = 1",
    "dotted quoted key": '"["' + '."["' * 200_000 + " = 1",
    "dotted header": "[a" + ".a" * 400_000 + "]",
    "duplicate key": 'method = "a"\nmethod = "b"\n' + ADAPTER,
    "duplicate table": "[parameters]\n[parameters]\n" + ADAPTER,
    "not UTF-8": b'method = "\xff"\n',
    "UTF-16": 'method = "ties"'.encode("utf-16"),
    "NUL": "a = \x00",
    "open string": 'a = "' + "x" * 900_000,
    "quotes": 'a = """' + '"' * 900_000,
    "escapes": 'a = "' + "\\" * 900_000,
    "long number": "a = " + "9" * 900_000,
    "long hex number": "rank = 0x" + "f" * 900_000 + "\n" + ADAPTER,
    "large number": "seed = 9223372036854775808\n" + ADAPTER,
    "empty": "",
    "a list": "[1, 2]",
    "long key": "k" * 900_000 + " = 1\n" + ADAPTER,
    "many keys": "\n".join(f"k{n} = 1" for n in range(60_000)) + "\n" + ADAPTER,
    "many wrong adapters": (ADAPTER + "weight = [true]\n") * 4_000,
    "deep rule": ADAPTER + "weight = " + "{unet=" * 40 + "1" + "}" * 40,
    "invisible": 'method = "ties\u202e"\n[[adapters]]\nref = "a/\u200bb"',
}


@pytest.mark.parametrize("name", TOML)
def test_a_hostile_recipe_is_refused(name: str) -> None:
    with pytest.raises(RecipeError) as refused:
        Recipe.from_text(TOML[name])
    assert len(str(refused.value)) < 40_000
    with pytest.raises(RecordError):
        RecipeLock.from_text(TOML[name])


YAML: dict[str, str | bytes] = {
    "brackets": "a: " + "[" * 60_000,
    "dashes": "- " * 60_000,
    "laughs": "a: &a [x, x]\nb: &b [*a, *a]\nc: &c [*b, *b]\n",
    "merge keys": "a: &a {x: 1}\nb: {<<: [*a, *a]}\n",
    "duplicate key": "merge_method: ties\nmerge_method: linear\n",
    "code": "merge_method: !!python/object/apply:os.system [true]\n",
    "two documents": "merge_method: ties\n---\nmerge_method: ties\n",
    "not UTF-8": b"merge_method: \xff",
    "number as key": "1: 2\n",
    "long number": "a: " + "9" * 100_000,
    "bad date": "a: 2020-13-41",
    "scalar": "ties",
    "empty": "",
    "NUL": "a: \x00",
    "list of lists": "merge_method: ties\nmodels: [[a]]\n",
    "models as text": "merge_method: ties\nmodels: a/b\n",
    "parameters as text": "merge_method: ties\nmodels: [{model: x/y+a/b, parameters: high}]\n",
    "weight as mapping": "merge_method: ties\nmodels: [{model: x/y+a/b, parameters: {weight: {a: 1}}}]\n",
    "weight not a number": "merge_method: ties\nmodels: [{model: x/y+a/b, parameters: {weight: heavy}}]\n",
    "weight NaN": "merge_method: ties\nmodels: [{model: x/y+a/b, parameters: {weight: .nan}}]\n",
    "weight too large": f"merge_method: ties\nmodels: [{{model: x/y+a/b, parameters: {{weight: 1{'0' * 400}}}}}]\n",
    "model as number": "merge_method: ties\nmodels: [{model: 7}]\n",
    "two pluses": "merge_method: ties\nmodels: [{model: a/b+c/d+e/f}]\n",
}


@pytest.mark.parametrize("name", YAML)
def test_a_hostile_configuration_is_refused(name: str) -> None:
    with pytest.raises(RecipeError) as refused:
        from_mergekit(YAML[name])
    assert len(str(refused.value)) < 2000


@pytest.mark.parametrize("load", [Recipe.load, RecipeLock.load, load_mergekit], ids=["recipe", "lock", "mergekit"])
def test_a_file_of_a_hundred_megabytes_is_refused_unread(load: Callable[[Path], Any], tmp_path: Path) -> None:
    path = tmp_path / "large"
    with path.open("wb") as file:
        file.truncate(100 << 20)
    tracemalloc.start()
    try:
        with pytest.raises(LorahubError, match="allowed"):
            load(path)
        assert tracemalloc.get_traced_memory()[1] < 32 << 20
    finally:
        tracemalloc.stop()


def test_a_pattern_of_many_stars_takes_no_time_of_its_own() -> None:
    targets = [Target("", f"model.layers.{n}.{'a' * 200}", "weight") for n in range(50)]
    recipe = Recipe.from_document(
        {"adapters": [{"ref": "a/b", "weight": [{"filter": "*a" * 500 + "b", "value": 1}, {"value": 0}]}]}
    )
    with pytest.raises(RecipeError, match="fits none of 50 targets"):
        weights_of(recipe, [targets])


def test_a_target_of_many_numbers_has_one_depth() -> None:
    names = [".".join(["layers", *map(str, range(n, n + 300))]) for n in range(3)]
    recipe = Recipe.from_document({"adapters": [{"ref": "a/b", "weight": [0, 1]}]})
    found = weights_of(recipe, [[Target("", name, "weight") for name in names]])[0]
    assert sorted(found.values()) == [0, 0.5, 1]


@given(st.text(alphabet=st.sampled_from("ab.=[]{}\"'#\n, 01-_\\x"), max_size=60))
@settings(max_examples=300)
def test_any_text_is_read_or_refused(text: str) -> None:
    for read in (strict_toml.read, strict_yaml.read):
        with contextlib.suppress(NotStrict):
            read(text, limit=1 << 10)
    for build in (Recipe.from_text, from_mergekit, RecipeLock.from_text):
        with pytest.raises(LorahubError):
            build(text)


def test_what_shields_the_parser_lets_sound_texts_pass() -> None:
    text = (
        "a = '''x''''\nb = \"\"\"[[[[.....\"\"\"\"\"\nc = '.....[[['\n# ....[[[[\n" + 'd = [{ e."f.g" = [1.5, 2.5] }]\n'
    )
    value = strict_toml.read(text, limit=1 << 10, depth=4)
    assert value == {"a": "x'", "b": '[[[[.....""', "c": ".....[[[", "d": [{"e": {"f.g": [1.5, 2.5]}}]}
    deep = "".join(f"a{n}.b.c = [{n}.5, {n}.5]\n" for n in range(500))
    assert len(strict_toml.read(deep, limit=1 << 20, depth=4)) == 500
