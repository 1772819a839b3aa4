"""A base whose layers are repeated, by names alone: what is asked for, what comes of it, and what stands against it.

What merging makes of it is held against PEFT by the transformers plugin's tests.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lorahub.adapter import load, open_header
from lorahub.bases.index import BaseIndex, BaseRef, ParameterInfo, natural
from lorahub.bases.layers import LayerList, as_ranges, ranges_of, shown, twice
from lorahub.bases.repeated import repeated, why_not
from lorahub.errors import Incompatible, IntegrityError
from lorahub.files.writer import save_file
from lorahub.findings import Verdict
from lorahub.plugins import load_registry

LAYERS = LayerList(path="model.layers", count="num_hidden_layers", each={"layer_types": ("a", "b", "c", "d", "e")})


def base(depth: int = 5, **fields: Any) -> BaseIndex:
    """Two parameters in each layer and one outside; the files spell the path otherwise."""
    names = {f"model.layers.{number}.{leaf}": (number + 1, 8) for number in range(depth) for leaf in ("norm", "q")}
    parameters = {
        name: ParameterInfo(shape=shape, dtype="F32", stored_as=name.removeprefix("model."))
        for name, shape in {**names, "model.words.weight": (9, 8)}.items()
    }
    extras = {
        f"model.layers.{number}.frequencies": ParameterInfo(
            shape=(2,), dtype="F32", stored_as=f"layers.{number}.frequencies"
        )
        for number in range(depth)
    }
    return BaseIndex(
        ref=BaseRef(repo="acme/base"),
        framework="test",
        **{
            "parameters": {name: parameters[name] for name in sorted(parameters, key=natural)},
            "extras": extras,
            "config": {"model_type": "test", "num_hidden_layers": depth},
            "layers": LAYERS,
            **fields,
        },
    )


# --- what is asked for -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "says"),
    [
        (7, "is no list"),
        ("0-4", "is no list"),
        ({"0": 4}, "is no list"),
        ([], "is no list"),
        ([0, 4], "is no list"),
        ([[0]], "is no list"),
        ([[0, 2, 4]], "is no list"),
        ([[0, None]], "is no list"),
        ([[0, "4"]], "is no list"),
        ([[0.0, 4.0]], "is no list"),
        ([[False, True]], "is no list"),
        ([[0, 4], 5], "is no list"),
        ([[0, 4], [3, 3]], r"has \[3, 3\], which is no range"),
        ([[4, 0]], r"has \[4, 0\], which is no range"),
        ([[-1, 2]], r"has \[-1, 2\], which is no range"),  # in PEFT the last layer, then the first
        ([[0, 10**18]], "asks for 1000000000000000000 layers"),
        ([[0, 4000], [0, 4000]], "asks for 8000 layers"),
        ([[2, 4]] * 33, "has layer 2 33 times"),
    ],
)
def test_what_is_no_map_of_layers_is_said(value: Any, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        as_ranges(value)


def test_ranges_are_those_of_peft_and_shown_with_both_ends() -> None:
    ranges = as_ranges([[0, 4], [2, 5], [1, 2]])
    assert shown(ranges) == "0-3, 2-4, 1"
    assert ranges_of({"repeated_layers": [[0, 4], [2, 5]]}) == ((0, 4), (2, 5))
    assert ranges_of({}) == ()


@given(st.lists(st.tuples(st.integers(0, 6), st.integers(1, 4)).map(lambda pair: [pair[0], sum(pair)]), min_size=1))
def test_a_layer_is_there_twice_where_two_ranges_meet(pairs: list[Any]) -> None:
    numbers = [number for start, stop in pairs for number in range(start, stop)]
    if max(map(numbers.count, numbers)) <= 32:
        assert twice(as_ranges(pairs)) is (len(set(numbers)) < len(numbers))


# --- the deeper base -------------------------------------------------------------------------------------------------


def test_every_layer_has_its_own_number_and_its_origins_tensor() -> None:
    index = base()
    deeper = repeated(index, ((0, 4), (2, 5)))
    assert deeper.repeated is not None
    sources = deeper.repeated.sources
    assert sources == (0, 1, 2, 3, 2, 3, 4)
    inside = {name for name in deeper.parameters if name.startswith("model.layers.")}
    assert inside == {f"model.layers.{number}.{leaf}" for number in range(7) for leaf in ("norm", "q")}
    assert list(deeper.parameters) == sorted(deeper.parameters, key=natural)
    for number, source in enumerate(sources):
        name, origin = f"model.layers.{number}.q", f"model.layers.{source}.q"
        assert deeper.parameters[name] is index.parameters[origin]
        assert deeper.repeated.origin(name) == origin
        assert deeper.repeated.spelled(name, index.parameters[origin].stored_as) == f"layers.{number}.q"
    assert deeper.parameters["model.words.weight"] is index.parameters["model.words.weight"]
    assert deeper.repeated.copies("model.layers.2.q") == ("model.layers.2.q", "model.layers.4.q")
    assert deeper.repeated.copies("model.words.weight") == ("model.words.weight",)
    assert deeper.repeated.spelled("model.words.weight", "words.weight") == "words.weight"
    assert deeper.repeated.config() == {
        "num_hidden_layers": 7,
        "layer_types": ["a", "b", "c", "d", "c", "d", "e"],
    }


def test_names_that_mean_another_layer_now_or_none_are_left_out() -> None:
    deeper = repeated(base(), ((1, 2), (1, 3)))  # 1, 1, 2
    assert deeper.repeated is not None
    left = {f"layers.{number}.{leaf}" for number in (0, 3, 4) for leaf in ("norm", "q", "frequencies")}
    assert set(deeper.repeated.left_out) == left
    assert list(deeper.extras) == ["model.layers.1.frequencies", "model.layers.2.frequencies"]


def test_a_list_that_begins_like_another_is_not_taken_for_it() -> None:
    odd = {"model.layers_norm.1.weight": ParameterInfo(shape=(1,), dtype="F32", stored_as="layers_norm.1.weight")}
    odd |= {"model.layers.weight": ParameterInfo(shape=(1,), dtype="F32", stored_as="layers.weight")}
    index = base()
    deeper = repeated(replace(index, parameters={**index.parameters, **odd}), ((0, 1), (0, 1)))
    assert odd.keys() <= deeper.parameters.keys()
    assert deeper.repeated is not None
    assert not any("norm.1" in name for name in deeper.repeated.left_out)


@pytest.mark.parametrize(
    ("fields", "ranges", "code", "says"),
    [
        ({"layers": None}, ((0, 2),), "layers-undeclared", "model_type 'test'"),
        ({"layers": None, "config": {}}, ((0, 2),), "layers-undeclared", "the framework 'test'"),
        ({}, ((0, 4), (3, 6)), "layers-out-of-range", "has 5 of them, so 3-5 is not there"),
        ({"depth": 4}, ((0, 2),), "layers-contradict", "5 values in layer_types"),
        ({"tied": (("model.layers.1.q", "model.layers.3.q"),)}, ((0, 2),), "layers-tied", "cannot be told apart"),
    ],
)
def test_what_stands_against_it_has_a_name_and_makes_no_index(
    fields: dict[str, Any], ranges: Any, code: str, says: str
) -> None:
    found = why_not(base(**fields), ranges)
    assert found is not None
    assert (found.code, found.axis, found.level) == (code, "placement", Verdict.INCOMPATIBLE)
    assert says in found.message
    with pytest.raises(Incompatible, match="layer"):
        repeated(base(**fields), ranges)


# --- what a PEFT folder says -----------------------------------------------------------------------------------------


def adapter(folder: Path, layers: Any, **config: Any) -> Path:
    folder.mkdir()
    stems = [f"base_model.model.model.layers.{number}" for number in range(7)]
    tensors = {f"{stem}.q.lora_A.weight": torch.ones(2, 8) for stem in stems}
    tensors |= {f"{stem}.q.lora_B.weight": torch.ones(3, 2) for stem in stems}
    save_file(folder / "adapter_model.safetensors", tensors, {"format": "pt"})
    document = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["q"], "layer_replication": layers}
    (folder / "adapter_config.json").write_text(json.dumps({**document, **config}))
    return folder


def test_where_layers_are_copied_somebody_chooses(tmp_path: Path) -> None:
    """Upstream: https://github.com/huggingface/peft/issues/1707; PEFT 0.10 to 0.21.2."""
    folder, registry = adapter(tmp_path / "a", [[0, 4], [2, 5]]), load_registry()
    for compat, code in ((None, "compat-choice"), ("peft", "compat-chosen"), ("strict", "compat-chosen")):
        header = open_header(folder, registry, compat=compat)  # type: ignore[arg-type]
        found = next(each for each in header.findings if each.code == code)
        assert "https://github.com/huggingface/peft/issues/1707" in found.message
        assert header.reading.hints.get("compat") == compat
        assert ranges_of(header.reading.hints) == ((0, 4), (2, 5))


def test_only_what_has_copies_is_in_dispute_once_the_base_is_known(tmp_path: Path) -> None:
    folder, registry = adapter(tmp_path / "a", [[0, 4], [2, 5]]), load_registry()
    header = open_header(folder, registry, index=repeated(base(), ((0, 4), (2, 5))))
    found = next(each for each in header.findings if each.code == "compat-choice")
    assert {key.split(".")[4] for key in found.where} == {"2", "3", "4", "5"}


def test_without_copies_nothing_is_in_dispute(tmp_path: Path) -> None:
    header = open_header(adapter(tmp_path / "a", [[3, 5], [0, 3]]), load_registry())
    assert [each.code for each in header.findings] == ["layers-repeated"]
    assert "its base's 3-4, 0-2" in header.findings[0].message


@pytest.mark.parametrize("layers", [None, False, []])
def test_an_empty_field_says_nothing(layers: Any, tmp_path: Path) -> None:
    header = open_header(adapter(tmp_path / "a", layers), load_registry())
    assert header.findings == ()
    assert ranges_of(header.reading.hints) == ()


@pytest.mark.parametrize("layers", [7, "[[0, 4]]", [[4, 0]], [[0, 10**18]], True])
def test_a_field_that_is_no_map_is_damage(layers: Any, tmp_path: Path) -> None:
    header = open_header(adapter(tmp_path / "a", layers), load_registry())
    found = next(each for each in header.findings if each.axis == "integrity")
    assert (found.code, found.level, found.where) == (
        "config-contradicts-tensors",
        Verdict.INCOMPATIBLE,
        ("layer_replication",),
    )
    with pytest.raises(IntegrityError, match="layer_replication"):
        load(header, load_registry())
