"""The PEFT format: every key and every config field has a place, or a finding that names it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import MappingProxyType

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lorahub.bases.index import BaseIndex, BaseRef, ParameterInfo
from lorahub.bases.layout import Target
from lorahub.deltas.delta import Delta
from lorahub.deltas.dora import DoRA
from lorahub.deltas.full import Full
from lorahub.deltas.ia3 import Gain
from lorahub.deltas.kind import JSON, Kind, Leaf, Slot, Spelling
from lorahub.deltas.lora import LORA, LoRA
from lorahub.deltas.replace import Replace
from lorahub.errors import CannotCarry, IntegrityError, UnsupportedFormat
from lorahub.files.header import Header, TensorInfo
from lorahub.findings import Finding, Verdict
from lorahub.formats.format import AdapterFiles, Reading
from lorahub.formats.peft import PeftFormat
from lorahub.formats.peft.types import TYPES
from lorahub.plugins import Registry

PREFIX = "base_model.model."
PAIR = {"q.lora_A.weight": (2, 4), "q.lora_B.weight": (6, 2)}


def header(shapes: Mapping[str, Sequence[int]], dtype: str = "F32") -> Header:
    infos = {name: TensorInfo(dtype, tuple(shape), 0, 0) for name, shape in shapes.items()}
    return Header(tensors=infos, metadata={}, data_start=0, size=0)


def files(
    shapes: Mapping[str, Sequence[int]], config: Mapping[str, JSON] | None, *, prefix: str = PREFIX
) -> AdapterFiles:
    return AdapterFiles(
        folder=Path("adapter"),
        headers={"adapter_model.safetensors": header({prefix + name: shape for name, shape in shapes.items()})},
        configs={} if config is None else {"adapter_config.json": config},
    )


def lora(**fields: JSON) -> dict[str, JSON]:
    return {"peft_type": "LORA", "r": 2, "lora_alpha": 4, **fields}


@pytest.fixture
def kinds(registry: Registry) -> tuple[Kind, ...]:
    return tuple(registry.kinds.values())


def read(
    kinds: tuple[Kind, ...],
    shapes: Mapping[str, Sequence[int]],
    config: Mapping[str, JSON],
    index: BaseIndex | None = None,
    *,
    prefix: str = PREFIX,
) -> Reading:
    reading = PeftFormat().read(files(shapes, config, prefix=prefix), kinds, index)
    placed = [ref.key for group in reading.groups for ref in group.slots.values()]
    placed += [ref.key for ref in reading.shared.values()]
    placed += [ref.key for part in reading.parts.values() for ref in part.tensors.values()]
    said = {key for finding in reading.findings for key in finding.where}
    assert len(placed) == len(set(placed))
    assert {prefix + name for name in shapes} <= said | set(placed)
    return reading


def finding(reading: Reading, code: str) -> Finding:
    (found,) = [each for each in reading.findings if each.code == code]
    return found


def base(*names: str, aliases: tuple[tuple[str, str], ...] = (), shape: tuple[int, ...] = (6, 4)) -> BaseIndex:
    return BaseIndex(
        ref=BaseRef(repo="acme/base"),
        framework="test",
        parameters={name: ParameterInfo(shape=shape, dtype="F32", stored_as=name) for name in names},
        aliases=aliases,
    )


# --- recognition -----------------------------------------------------------------------------------------------------


def test_a_peft_type_in_the_config_is_a_sure_claim() -> None:
    claim = PeftFormat().claims(files(PAIR, lora()))
    assert claim is not None
    assert claim.score == 1.0


def test_without_a_config_the_modules_are_told_and_the_scale_is_not(kinds: tuple[Kind, ...]) -> None:
    claim = PeftFormat().claims(files(PAIR, None))
    assert claim is not None
    assert claim.score < 1.0
    reading = PeftFormat().read(files(PAIR, None), kinds, None)
    (group,) = reading.groups
    assert (group.kind, group.module) == ("lora", "q")
    assert "scale" not in group.options
    said = finding(reading, "config-missing")
    assert said.level is Verdict.INCOMPATIBLE
    assert not said.allowable
    assert "adapter_config.json" in said.message
    assert "lora_alpha" in said.remedy


@pytest.mark.parametrize(
    ("shapes", "kind"),
    [
        ({**PAIR, "q.lora_magnitude_vector": (6,)}, "dora"),
        ({"q.lora_embedding_A": (2, 9), "q.lora_embedding_B": (4, 2), "q.lora_magnitude_vector": (4,)}, "dora"),
        ({"q.hada_w1_a": (6, 2), "q.hada_w1_b": (2, 4), "q.hada_w2_a": (6, 2), "q.hada_w2_b": (2, 4)}, "loha"),
        ({"q.lora_A": (2, 4), "q.lora_B": (6, 2), "q.lora_E": (2, 1)}, "adalora"),
        ({"q.miss_block": (2, 6)}, "miss"),
    ],
)
def test_without_a_config_the_names_tell_the_kind(
    kinds: tuple[Kind, ...], shapes: Mapping[str, Sequence[int]], kind: str
) -> None:
    reading = PeftFormat().read(files(shapes, None), kinds, None)
    assert [group.kind for group in reading.groups] == [kind]
    assert {"scale", "alpha"}.isdisjoint(reading.groups[0].options)


def test_without_a_config_what_only_it_could_explain_is_left_over(kinds: tuple[Kind, ...]) -> None:
    shapes = {**PAIR, "score.weight": (3, 4)}
    assert finding(PeftFormat().read(files(shapes, None), kinds, None), "key-unknown").where == (
        f"{PREFIX}score.weight",
    )
    tokens = PeftFormat().read(files({"e.trainable_tokens_delta": (2, 4)}, None), kinds, None)
    assert tokens.groups == ()
    assert finding(tokens, "key-unknown").where == (f"{PREFIX}e.trainable_tokens_delta",)


def test_a_config_that_explains_none_of_the_names_is_little_of_a_claim() -> None:
    foreign = files({"lora_unet_q.lora_down.weight": (2, 4)}, lora(), prefix="")
    claim = PeftFormat().claims(foreign)
    assert claim is not None
    assert claim.score < 0.4
    prompts = files({"prompt_embeddings": (8, 4)}, {"peft_type": "PROMPT_TUNING"}, prefix="")
    assert PeftFormat().claims(prompts) == PeftFormat().claims(files(PAIR, lora()))


def test_a_config_without_weights_or_of_another_library_is_no_claim() -> None:
    config = {"adapter_config.json": {"peft_type": "LORA"}}
    assert PeftFormat().claims(AdapterFiles(folder=Path("a"), headers={}, configs=config)) is None
    assert PeftFormat().claims(files({"w_a_000": (4, 8)}, {"fine_tune_type": "lora"}, prefix="")) is None


def test_among_several_weights_files_pefts_own_name_wins_and_otherwise_the_user_is_asked(
    kinds: tuple[Kind, ...],
) -> None:
    here = header({PREFIX + name: shape for name, shape in PAIR.items()})
    folder = AdapterFiles(
        folder=Path("a"),
        headers={"model.safetensors": header({"w": (1,)}), "adapter_model.safetensors": here},
        configs={"adapter_config.json": lora()},
    )
    assert PeftFormat().read(folder, kinds, None).file == "adapter_model.safetensors"
    renamed = AdapterFiles(
        folder=Path("a"), headers={"a.safetensors": here, "b.safetensors": here}, configs=folder.configs
    )
    with pytest.raises(UnsupportedFormat, match=r"a\.safetensors, b\.safetensors"):
        PeftFormat().read(renamed, kinds, None)


# --- slots -----------------------------------------------------------------------------------------------------------


def test_a_pair_of_factors_becomes_one_group_with_its_scale(kinds: tuple[Kind, ...]) -> None:
    reading = read(kinds, PAIR, lora())
    (group,) = reading.groups
    assert (group.kind, group.module, group.role) == ("lora", "q", "")
    assert group.slots["down"].key == f"{PREFIX}q.lora_A.weight"
    assert group.slots["up"].shape == (6, 2)
    assert group.options["scale"] == 2.0
    assert reading.findings == ()


def test_an_embeddings_factors_are_turned_to_the_orientation_of_the_slots(kinds: tuple[Kind, ...]) -> None:
    reading = read(kinds, {"e.lora_embedding_A": (2, 50), "e.lora_embedding_B": (4, 2)}, lora())
    (group,) = reading.groups
    assert group.role == "embedding"
    assert (group.slots["up"].shape, group.slots["down"].shape) == ((50, 2), (2, 4))
    assert group.slots["up"].transposed
    assert reading.hints["roles"] == {"e.weight": "embedding"}


def test_a_magnitude_makes_the_group_dora(kinds: tuple[Kind, ...]) -> None:
    reading = read(kinds, {**PAIR, "q.lora_magnitude_vector": (6,)}, lora(use_dora=True))
    assert [group.kind for group in reading.groups] == ["dora"]


def test_half_a_pair_is_a_finding_that_names_the_other_half(kinds: tuple[Kind, ...]) -> None:
    reading = read(kinds, {**PAIR, "k.lora_A.weight": (2, 4)}, lora())
    assert [group.module for group in reading.groups] == ["q"]
    found = finding(reading, "slot-missing")
    assert (found.level, found.axis, found.allowable) == (Verdict.INCOMPATIBLE, "integrity", False)
    assert "k has lora_A.weight without lora_B.weight" in found.message
    assert found.where == (f"{PREFIX}k.lora_A.weight",)


def test_slots_that_no_kind_has_together_are_a_finding(kinds: tuple[Kind, ...]) -> None:
    reading = read(kinds, {**PAIR, "q.lora_embedding_A": (2, 4)}, lora())
    assert "no kind has together" in finding(reading, "slot-missing").message


@pytest.mark.parametrize(
    ("shapes", "code", "text"),
    [
        ({"q.lora_A.weight": (2, 4), "q.lora_B.weight": (6, 3)}, "slot-misfit", "r is 2 elsewhere, 3 here"),
        ({"q.lora_A.weight": (0,), "q.lora_B.weight": (0,)}, "tensor-empty", "ZeRO-3"),
        ({"q.lora_A.weight": (8,), "q.lora_B.weight": (12,)}, "tensor-empty", "ZeRO-3"),
        ({"q.lora_A.weight": (3, 4), "q.lora_B.weight": (6, 3)}, "config-contradicts-tensors", "r says rank 2"),
        (
            {**PAIR, "q.lora_magnitude_vector": (6,)},
            "config-contradicts-tensors",
            "use_dora is false, and the file has",
        ),
    ],
)
def test_tensors_that_contradict_each_other_or_the_config_are_refused(
    kinds: tuple[Kind, ...], shapes: dict[str, tuple[int, ...]], code: str, text: str
) -> None:
    reading = read(kinds, shapes, lora())
    found = finding(reading, code)
    assert found.level is Verdict.INCOMPATIBLE
    assert text in found.message + found.remedy
    assert len(found.where) == len(shapes)
    assert reading.groups == ()


def test_dora_lengths_of_the_wrong_number_are_refused_before_anything_is_loaded(kinds: tuple[Kind, ...]) -> None:
    reading = read(kinds, {**PAIR, "q.lora_magnitude_vector": (5,)}, lora(use_dora=True))
    assert "should hold 6 lengths" in finding(reading, "config-contradicts-tensors").message


def test_one_wrong_field_of_the_config_is_said_once_and_with_what_to_do(kinds: tuple[Kind, ...]) -> None:
    pairs = {f"{module}.{name[2:]}": shape for module in "qkv" for name, shape in PAIR.items()}
    said = finding(read(kinds, pairs, lora(lora_alpha="16")), "config-contradicts-tensors")
    assert "lora_alpha should be a number, not '16'" in said.message
    assert "more like it" not in said.message
    assert len(said.where) == len(pairs)
    assert "adapter_config.json" in said.remedy
    assert "(and 2 more like it)" in finding(read(kinds, pairs, lora(r=3)), "config-contradicts-tensors").message


def test_modules_the_config_does_not_target_are_used_and_mentioned(kinds: tuple[Kind, ...]) -> None:
    shapes = {**PAIR, "layers.0.k.lora_A.weight": (2, 4), "layers.0.k.lora_B.weight": (6, 2)}
    assert read(kinds, shapes, lora(target_modules=["q", "k"])).findings == ()
    assert read(kinds, shapes, lora(target_modules=r"q|layers\.\d+\.k")).findings == ()
    reading = read(kinds, shapes, lora(target_modules=["q", "0k"]))
    assert len(reading.groups) == 2
    assert finding(reading, "target-unlisted").where == ("layers.0.k",)


def several_layers(*modules: str) -> BaseIndex:
    info = {f"{name}.weight": ParameterInfo(shape=(6, 4), dtype="F32", stored_as=f"{name}.weight") for name in modules}
    return BaseIndex(ref=BaseRef(), framework="test", parameters=info, tied=(("m.layers.0.q.weight", "q.weight"),))


@pytest.mark.parametrize(
    ("config", "lacking"),
    [
        ({"target_modules": ["q"]}, ("m.layers.1.q", "m.layers.2.q")),
        ({"target_modules": r"m\.layers\.\d+\.q"}, ("m.layers.1.q", "m.layers.2.q")),
        ({"target_modules": ["q"], "layers_to_transform": [0, 1]}, ("m.layers.1.q",)),
        ({"target_modules": ["q"], "layers_to_transform": 0}, ()),
        ({"target_modules": ["q"], "exclude_modules": ["layers.2.q"]}, ("m.layers.1.q",)),
        ({"target_modules": ["q", "k"], "modules_to_save": ["2.q", "k"]}, ("m.layers.1.q", "2.q", "k")),
        ({"target_modules": "all-linear"}, ()),
        ({}, ()),
    ],
)
def test_modules_the_config_covers_and_the_file_lacks_are_mentioned(
    kinds: tuple[Kind, ...], config: dict[str, JSON], lacking: tuple[str, ...]
) -> None:
    base = several_layers("m.layers.0.q", "m.layers.1.q", "m.layers.2.q", "m.layers.0.k")
    shapes = {f"m.layers.0.{name}": shape for name, shape in PAIR.items()}
    reading = read(kinds, shapes, lora(**config), index=base)
    assert len(reading.groups) == 1
    found = [each for each in reading.findings if each.code == "target-unfilled"]
    assert tuple(where for each in found for where in each.where) == lacking
    assert all(each.level is Verdict.UNVERIFIED for each in found)


def test_what_was_trained_whole_and_is_not_in_the_file_is_mentioned(kinds: tuple[Kind, ...]) -> None:
    def missed(names: tuple[str, ...], index: BaseIndex | None, **config: JSON) -> list[str]:
        shapes = {**{f"m.{name}": shape for name, shape in PAIR.items()}, **dict.fromkeys(names, (6,))}
        reading = read(kinds, shapes, lora(target_modules=["q"], **config), index=index)
        assert not [each for each in reading.findings if each.level > Verdict.UNVERIFIED]
        return [where for each in reading.findings if each.code == "target-unfilled" for where in each.where]

    info = ParameterInfo(shape=(6,), dtype="F32", stored_as="")
    parameters = {**several_layers("m.q", "m.head").parameters, "m.q.bias": info, "m.norm.bias": info}
    biased = BaseIndex(ref=BaseRef(), framework="test", parameters=parameters)
    for index in (None, biased):
        assert missed((), index, modules_to_save=["head"]) == ["head"]
        assert missed(("m.head.weight",), index, modules_to_save=["head"]) == []
        assert missed(("m.head.weight",), index, modules_to_save=["head", "score"]) == []  # as PEFT lists both
    assert missed((), biased, bias="lora_only") == ["m.q.bias"]
    assert missed(("m.q.bias",), biased, bias="lora_only") == []
    assert missed(("m.q.bias",), biased, bias="all") == ["m.norm.bias"]
    assert missed((), biased, bias="none") == []


@pytest.mark.parametrize(
    ("config", "named"),
    [
        ({"exclude_modules": ["layers.1.q"]}, ("m.layers.1.q",)),
        ({"exclude_modules": r".*layers\.1.*"}, ("m.layers.1.q",)),
        ({"layers_to_transform": [0]}, ("m.layers.1.q",)),
        ({"layers_to_transform": [0, 1]}, ()),
        ({"layers_to_transform": 0, "layers_pattern": "layers"}, ("m.layers.1.q",)),
    ],
)
def test_modules_that_peft_would_leave_out_are_mentioned_whichever_field_says_so(
    kinds: tuple[Kind, ...], config: dict[str, JSON], named: tuple[str, ...]
) -> None:
    shapes = {f"m.layers.{layer}.{name}": shape for layer in (0, 1) for name, shape in PAIR.items()}
    reading = read(kinds, shapes, lora(target_modules=["q"], **config))
    assert len(reading.groups) == 2
    found = [each for each in reading.findings if each.code == "target-unlisted"]
    assert tuple(where for each in found for where in each.where) == named
    assert all(next(iter(config)) in each.message for each in found)


def test_modules_of_another_class_of_model_are_not_missed(kinds: tuple[Kind, ...]) -> None:
    shapes = {f"other.layers.0.{name}": shape for name, shape in PAIR.items()}
    reading = read(kinds, shapes, lora(target_modules=["q"]), index=several_layers("m.layers.0.q", "m.layers.1.q"))
    assert "target-unfilled" not in {each.code for each in reading.findings}


# --- names -----------------------------------------------------------------------------------------------------------


def test_an_adapters_name_inside_every_key_is_read_and_noted(kinds: tuple[Kind, ...]) -> None:
    shapes = {
        "q.lora_A.sql.weight": (2, 4),
        "q.lora_B.sql.weight": (6, 2),
        "q.lora_magnitude_vector.sql.weight": (6,),
        "e.lora_embedding_A.sql": (2, 50),
        "e.lora_embedding_B.sql": (4, 2),
        "e.lora_magnitude_vector.sql.weight": (4,),
        "head.original_module.weight": (2, 4),
        "head.modules_to_save.sql.weight": (2, 4),
    }
    reading = read(kinds, shapes, lora(use_dora=True, modules_to_save=["head"]))
    assert {group.module: group.kind for group in reading.groups} == {"q": "dora", "e": "dora", "head": "replace"}
    assert {each.code: each.level for each in reading.findings} == {
        "adapter-name-in-key": Verdict.EXACT,
        "modules-to-save-in-key": Verdict.EXACT,
        "original-module": Verdict.EXACT,
    }


def test_two_adapters_in_one_file_are_refused(kinds: tuple[Kind, ...]) -> None:
    shapes = {
        f"q.{factor}.{name}.weight": PAIR[f"q.{factor}.weight"] for factor in ("lora_A", "lora_B") for name in "ab"
    }
    reading = read(kinds, shapes, lora())
    assert finding(reading, "several-adapters").level is Verdict.INCOMPATIBLE
    assert len(finding(reading, "key-twice").where) == 2


def test_a_key_no_kind_and_no_config_field_explains_is_degraded_and_named(kinds: tuple[Kind, ...]) -> None:
    reading = read(kinds, {**PAIR, "q.lora_C.weight": (2, 2), "norm.weight": (4,), "q.weight": (6, 4)}, lora())
    found = finding(reading, "key-unknown")
    assert (found.level, found.allowable) == (Verdict.DEGRADED, True)
    assert set(found.where) == {PREFIX + name for name in ("q.lora_C.weight", "norm.weight", "q.weight")}


def test_a_key_outside_pefts_name_space_is_unknown(kinds: tuple[Kind, ...]) -> None:
    reading = read(kinds, PAIR, lora(), prefix="")
    assert len(finding(reading, "key-unknown").where) == 2


def test_with_a_base_modules_resolve_to_its_names_by_every_spelling(kinds: tuple[Kind, ...]) -> None:
    index = base("bert.layer.0.q.weight", "bert.layer.0.k.weight", aliases=(("bert.", ""),))
    shapes = {
        "layer.0.q.lora_A.weight": (2, 4),
        "layer.0.q.lora_B.weight": (6, 2),
        "bert.layer.0.k.lora_A.weight": (2, 4),
        "bert.layer.0.k.lora_B.weight": (6, 2),
        "elsewhere.lora_A.weight": (2, 4),
        "elsewhere.lora_B.weight": (6, 2),
    }
    modules = {group.module for group in read(kinds, shapes, lora(), index).groups}
    assert modules == {"bert.layer.0.q", "bert.layer.0.k", "elsewhere"}


def test_two_names_for_one_module_of_the_base_are_refused(kinds: tuple[Kind, ...]) -> None:
    index = base("bert.q.weight", aliases=(("bert.", ""),))
    reading = read(kinds, {**PAIR, **{f"bert.{name}": shape for name, shape in PAIR.items()}}, lora(), index)
    assert finding(reading, "key-twice").level is Verdict.INCOMPATIBLE
    assert len(reading.groups) == 1


def test_a_spelling_that_two_modules_share_resolves_to_neither(kinds: tuple[Kind, ...]) -> None:
    index = base("a.q.weight", "b.q.weight", aliases=(("a.", ""), ("b.", "")))
    assert [group.module for group in read(kinds, PAIR, lora(), index).groups] == ["q"]


def test_a_module_called_like_a_slot_is_told_from_one_by_the_base(kinds: tuple[Kind, ...]) -> None:
    index = base("x.lora_A.weight")
    reading = read(kinds, {"x.lora_A.weight": (6, 4)}, lora(modules_to_save=["lora_A"]), index)
    assert [(group.kind, group.module) for group in reading.groups] == [("replace", "x.lora_A")]


def test_the_longest_suffix_wins(kinds: tuple[Kind, ...]) -> None:
    def nothing(*_: object) -> dict[str, JSON]:
        return {}

    leaves = (Leaf(slot="a", suffix="A"), Leaf(slot="b", suffix="x.A"))
    two = Kind(
        name="two",
        title="Two",
        source="",
        slots=(Slot(name="a", dims="*k", optional=True), Slot(name="b", dims="*k", optional=True)),
        deltas=(),
        touches=lambda _: (),
        build=lambda *_: {},
        dissolve=lambda _: None,
        spellings=(Spelling(format="peft", tag="TWO", leaves=leaves, options=nothing, config=nothing),),
    )
    (group,) = read((two,), {"m.x.A": (1,)}, {"peft_type": "TWO"}).groups
    assert (group.module, set(group.slots)) == ("m", {"b"})


def test_tensors_that_exist_once_per_adapter_are_shared(kinds: tuple[Kind, ...]) -> None:
    spelling = Spelling(
        format="peft",
        tag="VERA",
        leaves=(Leaf(slot="own", suffix="vera_lambda"), Leaf(slot="common", suffix="vera_A")),
        options=lambda *_: {},
        config=lambda _: {},
    )
    vera = Kind(
        name="vera",
        title="VeRA",
        source="",
        slots=(Slot(name="own", dims="r"), Slot(name="common", dims="r in", shared=True)),
        deltas=(),
        touches=lambda _: (),
        build=lambda *_: {},
        dissolve=lambda _: None,
        spellings=(spelling,),
    )
    shapes = {"base_model.vera_A": (2, 4), f"{PREFIX}q.vera_lambda": (2,), f"{PREFIX}k.vera_lambda": (2,)}
    reading = read((vera,), shapes, {"peft_type": "VERA"}, prefix="")
    assert {key: ref.key for key, ref in reading.shared.items()} == {("vera", "common"): "base_model.vera_A"}
    assert [group.module for group in reading.groups] == ["k", "q"]
    alone = read((vera,), {f"{PREFIX}q.vera_lambda": (2,)}, {"peft_type": "VERA"}, prefix="")
    assert "without vera_A" in finding(alone, "slot-missing").message


# --- whole parameters ------------------------------------------------------------------------------------------------


def test_modules_to_save_covers_a_module_and_all_inside_it(kinds: tuple[Kind, ...]) -> None:
    shapes = {**PAIR, "classifier.dense.weight": (4, 4), "classifier.out.bias": (2,), "roberta.pooler.weight": (4, 4)}
    reading = read(kinds, shapes, lora(modules_to_save=["classifier"]))
    replaced = {(group.module, group.parameter) for group in reading.groups if group.kind == "replace"}
    assert replaced == {("classifier.dense", "weight"), ("classifier.out", "bias")}
    assert finding(reading, "key-unknown").where == (f"{PREFIX}roberta.pooler.weight",)


def test_the_second_copy_that_peft_makes_of_a_heads_bias_is_noted_and_unused(kinds: tuple[Kind, ...]) -> None:
    shapes = {**PAIR, **{f"head.{name}": (2,) for name in ("bias", "modules_to_save.bias", "original_module.bias")}}
    reading = read(kinds, shapes, lora(bias="all", modules_to_save=["head"]))
    (group,) = [group for group in reading.groups if group.kind == "replace"]
    assert group.slots["value"].key == f"{PREFIX}head.bias"
    assert {each.code: each.level for each in reading.findings} == {
        "modules-to-save-twice": Verdict.EXACT,
        "original-module": Verdict.EXACT,
    }


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_biases_are_replaced_where_the_config_trained_them(kinds: tuple[Kind, ...], bias: str) -> None:
    shapes = {**PAIR, "q.base_layer.bias": (6,), "norm.bias": (4,)}
    reading = read(kinds, shapes, lora(bias=bias))
    replaced = {(group.module, group.parameter) for group in reading.groups if group.kind == "replace"}
    assert replaced == {("q", "bias"), ("norm", "bias")}
    assert len(finding(read(kinds, shapes, lora(bias="none")), "key-unknown").where) == 2


def test_a_bias_inside_an_adapted_module_is_no_bias_of_the_base(kinds: tuple[Kind, ...]) -> None:
    reading = read(kinds, {**PAIR, "q.lora_gate.bias": (6,)}, lora(bias="all"))
    assert finding(reading, "key-unknown").where == (f"{PREFIX}q.lora_gate.bias",)


def test_the_copy_of_an_adapted_embedding_is_left_out_and_said_so(kinds: tuple[Kind, ...]) -> None:
    shapes = {
        "embed_tokens.lora_embedding_A": (2, 50),
        "embed_tokens.lora_embedding_B": (4, 2),
        "embed_tokens.base_layer.weight": (50, 4),
    }
    reading = read(kinds, shapes, lora())
    assert [group.kind for group in reading.groups] == ["lora"]
    assert finding(reading, "embedding-included").level is Verdict.UNVERIFIED
    same = read(kinds, shapes, lora(), base("embed_tokens.weight", shape=(50, 4)))
    assert finding(same, "embedding-included").level is Verdict.UNVERIFIED
    resized = finding(read(kinds, shapes, lora(), base("embed_tokens.weight", shape=(48, 4))), "embedding-included")
    assert resized.level is Verdict.DEGRADED
    assert "[50, 4]" in resized.message
    assert "[48, 4]" in resized.message


def test_embeddings_of_a_changed_vocabulary_replace_the_bases(kinds: tuple[Kind, ...]) -> None:
    reading = read(kinds, {**PAIR, "model.embed_tokens.weight": (52, 4), "lm_head.weight": (52, 4)}, lora())
    assert {group.module for group in reading.groups if group.kind == "replace"} == {"model.embed_tokens", "lm_head"}
    assert finding(reading, "embedding-included").level is Verdict.EXACT


def test_two_tensors_for_one_parameter_are_refused(kinds: tuple[Kind, ...]) -> None:
    reading = read(kinds, {**PAIR, "q.base_layer.bias": (6,), "q.bias": (6,)}, lora(bias="all"))
    assert finding(reading, "key-twice").level is Verdict.INCOMPATIBLE


def test_modules_to_save_that_is_no_list_of_names_is_refused(kinds: tuple[Kind, ...]) -> None:
    with pytest.raises(IntegrityError, match="modules_to_save"):
        PeftFormat().read(files(PAIR, lora(modules_to_save={"head": 1})), kinds, None)


# --- config fields ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [None, False, "", [], {}])
def test_an_unknown_field_that_is_empty_is_only_noted(kinds: tuple[Kind, ...], value: JSON) -> None:
    assert finding(read(kinds, PAIR, lora(use_magic=value)), "config-unknown").level is Verdict.EXACT


@pytest.mark.parametrize("value", [True, 0, 1, 0.5, "on", ["x"], {"x": None}])
def test_an_unknown_field_with_a_value_blocks_until_allowed_and_is_named(kinds: tuple[Kind, ...], value: JSON) -> None:
    found = finding(read(kinds, PAIR, lora(use_magic=value)), "config-unknown")
    assert (found.level, found.allowable, found.where) == (Verdict.DEGRADED, True, ("use_magic",))
    assert "use_magic = " in found.message


@pytest.mark.parametrize("init", ["pissa_niter_16", "corda", "lora_ga", "loftq"])
def test_an_initialisation_that_moved_the_base_is_refused_with_the_way_to_convert_it(
    kinds: tuple[Kind, ...], init: str
) -> None:
    found = finding(read(kinds, PAIR, lora(init_lora_weights=init)), "config-refused")
    assert (found.level, found.allowable) == (Verdict.INCOMPATIBLE, False)
    assert f'init_lora_weights = "{init}"' in found.message
    assert "path_initial_model_for_weight_conversion" in found.message


def test_harmless_values_and_inert_fields_say_nothing(kinds: tuple[Kind, ...]) -> None:
    config = lora(init_lora_weights="gaussian", lora_dropout=0.3, task_type="CAUSAL_LM", use_dora=False, revision=None)
    assert read(kinds, PAIR, config).findings == ()
    assert read(kinds, PAIR, lora(init_lora_weights=1)).findings[0].code == "config-refused"  # 1 is not true


def test_every_unhonoured_field_has_a_finding_of_its_own(kinds: tuple[Kind, ...]) -> None:
    config = lora(
        use_qalora=True,
        use_bdlora=None,
        arrow_config=None,
        enable_lora=[True],
    )
    refused = [each for each in read(kinds, PAIR, config).findings if each.code == "config-refused"]
    assert {each.where[0] for each in refused} == {
        "use_qalora",
        "enable_lora",
    }


@pytest.mark.parametrize("fields", [{"target_parameters": ["experts.down_proj"]}, {"trainable_token_indices": [3]}])
def test_a_field_that_speaks_of_tensors_the_file_does_not_have_is_refused(
    kinds: tuple[Kind, ...], fields: dict[str, JSON]
) -> None:
    found = finding(read(kinds, PAIR, lora(target_modules=["q"], **fields)), "slot-missing")
    assert (found.level, found.where) == (Verdict.INCOMPATIBLE, tuple(fields))


# --- adapter types ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tag", sorted(tag for tag, about in TYPES.items() if about.part))
def test_what_is_no_weight_change_becomes_a_part_with_its_reason(kinds: tuple[Kind, ...], tag: str) -> None:
    reading = read(kinds, {"prompt_embeddings": (4, 32)}, {"peft_type": tag}, prefix="")
    (part,) = reading.parts.values()
    assert part.kind == TYPES[tag].part
    assert list(part.tensors) == ["prompt_embeddings"]
    found = finding(reading, "kind-unsupported")
    assert (found.level, found.allowable) == (Verdict.INCOMPATIBLE, False)
    assert TYPES[tag].title in found.message
    assert part.reason in found.message
    assert ("attaches it" in found.remedy) == TYPES[tag].live


def test_a_head_beside_prompts_can_be_had_without_them_if_allowed(kinds: tuple[Kind, ...]) -> None:
    shapes = {"prompt_embeddings": (4, 32), f"{PREFIX}score.weight": (2, 32)}
    reading = read(kinds, shapes, {"peft_type": "PROMPT_TUNING", "modules_to_save": ["score"]}, prefix="")
    assert [group.module for group in reading.groups] == ["score"]
    found = finding(reading, "kind-unsupported")
    assert (found.level, found.allowable) == (Verdict.DEGRADED, True)


@pytest.mark.parametrize("tag", [*sorted(tag for tag, about in TYPES.items() if not about.part), "DIAG"])
def test_a_weight_change_no_kind_reads_is_refused_by_name(tag: str) -> None:
    reading = read((), {"q.some_factor": (4, 2)}, {"peft_type": tag, "r": 2})
    found = finding(reading, "kind-unsupported")
    assert found.level is Verdict.INCOMPATIBLE
    assert tag in found.message
    assert found.where == (f"{PREFIX}q.some_factor",)
    assert reading.parts == {}


def test_bone_is_read_as_what_became_of_it(kinds: tuple[Kind, ...]) -> None:
    reading = read(kinds, {"q.bone_block": (2, 6)}, {"peft_type": "BONE", "r": 2, "init_weights": True})
    assert [group.kind for group in reading.groups] == ["miss"]
    assert reading.findings == ()
    without = tuple(kind for kind in kinds if kind.name != "miss")
    assert "MiSS" in finding(read(without, {"q.bone_block": (2, 6)}, {"peft_type": "BONE"}), "kind-unsupported").message


# --- the base --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gpt2", "acme/base", "FacebookAI/roberta-base", "meta-llama/Llama-3.2-1B"])
def test_a_repository_is_taken_from_the_config_with_its_revision(kinds: tuple[Kind, ...], name: str) -> None:
    reading = read(kinds, PAIR, lora(base_model_name_or_path=name, revision="v2"))
    assert (reading.base_repo, reading.base_revision, reading.findings) == (name, "v2", ())


@pytest.mark.parametrize(
    "path",
    ["/data/llama", "./out", "../base", "~/models/x", "C:\\models\\x", "C:/models/x", "a/b/c", "models\\x", "a/b/"],
)
def test_a_path_on_somebodys_machine_names_no_base(kinds: tuple[Kind, ...], path: str) -> None:
    reading = read(kinds, PAIR, lora(base_model_name_or_path=path, revision="main"))
    assert (reading.base_repo, reading.base_revision) == ("", "")
    assert finding(reading, "base-is-a-local-path").level is Verdict.EXACT


# --- writing ---------------------------------------------------------------------------------------------------------


def example(shape: tuple[int, ...] = (6, 4), r: int = 2) -> LoRA:
    return LoRA.example(shape, r=r, generator=torch.Generator().manual_seed(1))


def at(module: str, parameter: str = "weight", component: str = "") -> Target:
    return Target(component, module, parameter)


def test_what_is_written_is_sorted_and_the_same_each_time(kinds: tuple[Kind, ...]) -> None:
    deltas: dict[Target, Delta] = {at(f"layers.{number}.q"): example() for number in (10, 2)}
    written = PeftFormat().write(deltas, kinds, {})
    assert list(written.tensors) == sorted(written.tensors)
    assert written.metadata == {"format": "pt"}
    config = written.configs["adapter_config.json"]
    assert list(config) == sorted(config)
    assert config["target_modules"] == ["layers.2.q", "layers.10.q"]
    again = PeftFormat().write(dict(reversed(deltas.items())), kinds, {})
    assert (list(again.tensors), again.configs) == (list(written.tensors), written.configs)


def test_an_embedding_is_written_as_one_where_the_hints_say_so(kinds: tuple[Kind, ...]) -> None:
    delta = example((50, 4))
    written = PeftFormat().write({at("e"): delta}, kinds, {"roles": {"e.weight": "embedding"}})
    assert {key: tuple(tensor.shape) for key, tensor in written.tensors.items()} == {
        f"{PREFIX}e.lora_embedding_A": (2, 50),
        f"{PREFIX}e.lora_embedding_B": (4, 2),
    }
    plain = PeftFormat().write({at("e"): delta}, kinds, {})
    assert set(plain.tensors) == {f"{PREFIX}e.lora_A.weight", f"{PREFIX}e.lora_B.weight"}


def test_saved_modules_keep_the_name_they_were_saved_under(kinds: tuple[Kind, ...]) -> None:
    deltas: dict[Target, Delta] = {
        at("q"): example(),
        at("classifier.dense"): Replace(torch.ones(4, 4)),
        at("norm"): Replace(torch.ones(4)),
    }
    config = (
        PeftFormat().write(deltas, kinds, {"modules_to_save": ["classifier", "score"]}).configs["adapter_config.json"]
    )
    assert config["modules_to_save"] == ["classifier", "norm"]
    bare = PeftFormat().write(deltas, kinds, {}).configs["adapter_config.json"]
    assert bare["modules_to_save"] == ["classifier.dense", "norm"]


@pytest.mark.parametrize(
    ("deltas", "reason"),
    [
        ({at("q", component="unet"): example()}, "components: unet:q.weight"),
        ({at("q"): Full(torch.ones(6, 4))}, "no word for full on these parameters: q.weight"),
        (
            {at("q", "one"): example(), at("q", "other"): example()},
            "in which it registers them, which is not known: q.one, q.other",
        ),
        ({at("q"): example(), at("q", "scale"): Replace(torch.ones(6))}, "beside factors: q.scale"),
        ({at("q"): example(), at("", "cls_token"): Replace(torch.ones(6))}, "modules by name: cls_token"),
        ({at("head"): Replace(torch.ones(6, 4))}, "without factors: head.weight"),
        (
            {at("q"): example(), at("k"): Gain(torch.ones(1, 4), 1)},
            "of one kind, and these are ia3, lora",
        ),
        ({at("q"): example(), at("e"): Full(torch.ones(2)), at("f"): Full(torch.ones(2))}, "e.weight, f.weight"),
    ],
)
def test_what_peft_has_no_word_for_is_refused_by_target(
    kinds: tuple[Kind, ...], deltas: dict[Target, Delta], reason: str
) -> None:
    with pytest.raises(CannotCarry) as refusal:
        PeftFormat().write(deltas, kinds, {})
    assert reason in str(refusal.value)


def test_lora_and_dora_do_not_share_an_adapter(kinds: tuple[Kind, ...]) -> None:
    dora = DoRA.example((6, 4, 1), r=2, generator=torch.Generator().manual_seed(1))
    with pytest.raises(CannotCarry, match="dora, lora"):
        PeftFormat().write({at("q"): example(), at("k"): dora}, kinds, {})


def test_the_config_carries_what_the_hints_know_of_the_base(kinds: tuple[Kind, ...]) -> None:
    hints = MappingProxyType(
        {"base_repo": "acme/base", "base_revision": "v2", "task_type": "SEQ_CLS", "fan_in_fan_out": True}
    )
    config = PeftFormat().write({at("q"): example()}, kinds, hints).configs["adapter_config.json"]
    assert config["base_model_name_or_path"] == "acme/base"
    assert config["revision"] == "v2"
    assert (config["task_type"], config["fan_in_fan_out"], config["auto_mapping"]) == ("SEQ_CLS", True, None)


def test_the_suffixes_are_those_the_kinds_declare() -> None:
    renamed = [
        Leaf(slot=leaf.slot, suffix=leaf.suffix.replace("lora", "other"), transposed=leaf.transposed, role=leaf.role)
        for leaf in LORA.spellings[0].leaves
    ]
    spelling = Spelling(
        format="peft",
        tag="OTHER",
        leaves=tuple(renamed),
        options=LORA.spellings[0].options,
        config=LORA.spellings[0].config,
    )
    other = Kind(
        name="other",
        title="Other",
        source="",
        slots=LORA.slots,
        deltas=LORA.deltas,
        touches=LORA.touches,
        build=LORA.build,
        dissolve=LORA.dissolve,
        spellings=(spelling,),
    )
    shapes = {"q.other_A.weight": (2, 4), "q.other_B.weight": (6, 2)}
    (group,) = read((other,), shapes, lora(peft_type="OTHER")).groups
    assert group.kind == "other"


# --- whatever comes --------------------------------------------------------------------------------------------------

PIECES = st.sampled_from(
    [
        *"qke0",
        "base_model",
        "model",
        "base_layer",
        "modules_to_save",
        "original_module",
        "default",
        "lora_A",
        "lora_B",
        "lora_embedding_A",
        "lora_embedding_B",
        "lora_magnitude_vector",
        "ia3_l",
        "embed_tokens",
        "weight",
        "bias",
        "",
    ]
)
KEYS = st.lists(PIECES, min_size=1, max_size=6).map(".".join)
NAMES = st.one_of(KEYS, KEYS.map(PREFIX.__add__))
SHAPES = st.lists(st.sampled_from([0, 1, 2, 4, 6]), max_size=4).map(tuple)
VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-3, 9)
    | st.floats(allow_nan=False)
    | st.sampled_from(["all", "q", "none", "(a+)+$"]),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["q", "k", "(", "^q$"]), inner, max_size=3)
    ),
    max_leaves=4,
)
CONFIGS = st.dictionaries(
    st.sampled_from(
        [
            "r",
            "lora_alpha",
            "rank_pattern",
            "alpha_pattern",
            "use_dora",
            "use_rslora",
            "lora_bias",
            "bias",
            "modules_to_save",
            "target_modules",
            "feedforward_modules",
            "base_model_name_or_path",
            "revision",
            "auto_mapping",
            "init_lora_weights",
            "unheard_of",
        ]
    ),
    VALUES,
    max_size=5,
)


@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    shapes=st.dictionaries(NAMES, SHAPES, min_size=1, max_size=8),
    config=CONFIGS,
    tag=st.sampled_from(["LORA", "IA3", "OFT", "PROMPT_TUNING", "?"]),
)
def test_whatever_the_names_and_the_config_every_key_has_one_place_or_the_file_is_refused(
    kinds: tuple[Kind, ...], shapes: dict[str, tuple[int, ...]], config: dict[str, JSON], tag: str
) -> None:
    with suppress(IntegrityError):
        read(kinds, shapes, {"peft_type": tag, **config}, prefix="")
