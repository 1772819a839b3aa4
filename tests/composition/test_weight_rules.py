"""Rules of a recipe give every target its number, and complain where they speak of nothing or leave a target out."""

from __future__ import annotations

from collections.abc import Sequence
from types import MappingProxyType
from typing import Any

import pytest

from lorahub.bases.index import BaseIndex, BaseRef, ParameterInfo, natural
from lorahub.bases.layout import Target
from lorahub.composition.weights.blocks import block_names
from lorahub.composition.weights.depth import Depth, Depths
from lorahub.composition.weights.resolve import parameters_of, resolve, weights_of
from lorahub.errors import RecipeError
from lorahub.recipe import Recipe

LAYERS = 4
LLAMA = [
    Target("", f"model.layers.{n}.{place}", "weight")
    for n in range(LAYERS)
    for place in ("self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj")
]
LLAMA_IN_ORDER = sorted(LLAMA, key=lambda target: natural(target.name))
HEAD = Target("", "lm_head", "weight")
T5 = [
    Target("", f"{side}.block.{n}.layer.0.SelfAttention.q", "weight")
    for side in ("encoder", "decoder")
    for n in range(3)
]
ATTENTIONS = [("down_blocks.0", 2), ("down_blocks.1", 2), ("mid_block", 1), ("up_blocks.0", 3), ("up_blocks.1", 3)]
UNET = [
    Target("unet", f"{block}.attentions.{n}.transformer_blocks.0.attn1.to_q", "weight")
    for block, count in ATTENTIONS
    for n in range(count)
]
ENCODER = [Target("text_encoder", f"text_model.encoder.layers.{n}.self_attn.q_proj", "weight") for n in range(2)]
PIPELINE = [*UNET, *ENCODER]
FLUX = [
    Target("transformer", f"{blocks}.{n}.attn.to_q", "weight")
    for blocks, count in (("transformer_blocks", 2), ("single_transformer_blocks", 3))
    for n in range(count)
]


def numbers(weight: str, targets: Sequence[Target] = LLAMA) -> dict[str, float]:
    """Target -> number, for a weight as a recipe has it."""
    recipe = Recipe.from_text(f'[[adapters]]\nref = "a/b"\nweight = {weight}')
    return {target.name: value for target, value in weights_of(recipe, [targets])[0].items()}


def complaint(weight: str, targets: Sequence[Target] = LLAMA) -> str:
    with pytest.raises(RecipeError) as refused:
        numbers(weight, targets)
    return str(refused.value)


def index(*names: str) -> BaseIndex:
    return BaseIndex(
        ref=BaseRef(folder=None, repo="acme/base", commit=None),
        framework="torch",
        parameters=MappingProxyType({name: ParameterInfo(shape=(2, 2), dtype="F32", stored_as=name) for name in names}),
    )


def by_layer(found: dict[str, float], parts: int = 2) -> list[float]:
    """The numbers in the order of layers, one for each."""
    return list({name.split(".")[parts]: value for name, value in found.items()}.values())


# ---------------------------------------------------------------------------------------------------------- numbers


def test_a_number_is_for_every_target() -> None:
    assert numbers("-0.5") == {target.name: -0.5 for target in LLAMA}


def test_numbers_over_depth_are_linear_between_evenly_spaced_points() -> None:
    assert by_layer(numbers("[0, 1]")) == pytest.approx([0, 1 / 3, 2 / 3, 1])
    assert by_layer(numbers("[0, 1, 0]")) == pytest.approx([0, 2 / 3, 2 / 3, 0])
    assert set(numbers("[0.3]").values()) == {0.3}


def test_one_layer_alone_gets_the_last_number() -> None:
    assert set(numbers("[0, 1]", LLAMA[:3]).values()) == {1.0}


def test_the_number_of_layers_can_be_said_or_known_from_the_base() -> None:
    assert by_layer(numbers("{ gradient = [0, 1], layers = 7 }")) == pytest.approx([0, 1 / 6, 2 / 6, 3 / 6])
    recipe = Recipe.from_text('[[adapters]]\nref = "a/b"\nweight = [0, 1]')
    base = index(*(f"model.layers.{n}.self_attn.q_proj.weight" for n in range(7)))
    found = weights_of(recipe, [LLAMA], base)[0]
    assert by_layer({target.name: value for target, value in found.items()}) == pytest.approx([0, 1 / 6, 2 / 6, 3 / 6])
    assert "layer 3, counted from 0, and layers = 3" in complaint("{ gradient = [0, 1], layers = 3 }")


def test_depth_counts_the_layers_of_all_adapters() -> None:
    recipe = Recipe.inline(["a/b", "a/c"]).changed(adapters=[{"ref": "a/b", "weight": [0.0, 1.0]}, {"ref": "a/c"}])
    first, _ = weights_of(recipe, [LLAMA[:6], LLAMA])
    assert sorted({first[target] for target in LLAMA[:6]}) == pytest.approx([0, 1 / 3])


def test_what_an_adapter_does_not_change_has_its_weight_too_and_its_rule_is_not_held_to_it() -> None:
    rule = [
        {"filter": "*attn*", "value": [0.0, 3.0], "count": 4},
        {"filter": "*mlp*", "value": 9.0, "optional": True},
    ]
    recipe = Recipe.from_document({"adapters": [{"ref": "a/b", "weight": rule}, {"ref": "a/c", "weight": 0.5}]})
    own = [target for target in LLAMA[:6] if "attn" in target.module]
    first, second = weights_of(recipe, [own, [*LLAMA, HEAD]])
    assert [first[target] for target in LLAMA[::3]] == pytest.approx([0, 1, 2, 3])
    assert {first[target] for target in LLAMA[2::3]} == {9}
    assert first[HEAD] == 0
    assert set(second.values()) == {0.5}
    assert "says nothing of lm_head.weight" in complaint(
        '[{ filter = "*attn*", value = 1 }, { filter = "*mlp*", value = 9 }]', [*LLAMA, HEAD]
    )


@pytest.mark.parametrize(
    "rule",
    [
        {"layers": {"9": 1.0}},
        {"preset": "b-lora-style"},
        {"unet": 1.0},
        {"mid": 1.0},
        {"blocks": {"MID": 1.0}},
        [{"filter": "zzz", "value": 1.0}],
    ],
)
def test_a_rule_that_is_not_held_to_what_it_says_gives_zero_where_it_says_nothing(rule: Any) -> None:
    recipe = Recipe.from_document({"adapters": [{"ref": "a/b", "weight": rule}]})
    with pytest.raises(RecipeError):
        resolve(recipe.adapters[0].weight, LLAMA)
    assert set(resolve(recipe.adapters[0].weight, LLAMA, strict=False).values()) == {1.0 if "mid" in rule else 0.0}


def test_a_target_in_no_layer_needs_a_number_of_its_own() -> None:
    assert "in none: lm_head.weight" in complaint("[0, 1]", [*LLAMA, HEAD])
    assert numbers("{ gradient = [0, 1], elsewhere = 5 }", [*LLAMA, HEAD])["lm_head.weight"] == 5


def test_layers_and_ranges_include_both_ends() -> None:
    assert by_layer(numbers("{ layers = { 0 = 1, 1-2 = 2, 3- = 3 } }")) == [1, 2, 2, 3]
    assert by_layer(numbers("{ layers = { 1-2 = 2 }, default = 0 }")) == [0, 2, 2, 0]
    assert "says nothing of model.layers.0" in complaint("{ layers = { 1-2 = 2 } }")
    assert "layers['9-']: no target is in these layers; they are in 0 to 3" in complaint(
        "{ layers = { 9- = 2 }, default = 0 }"
    )


# ------------------------------------------------------------------------------------------------------------- depth


@pytest.mark.parametrize(
    ("module", "layer", "count"),
    [
        ("decoder.block.2.layer.0.SelfAttention.q", 2, 3),
        ("encoder.block.0.layer.0.SelfAttention.q", 0, 3),
    ],
)
def test_encoder_and_decoder_are_counted_each_for_itself(module: str, layer: int, count: int) -> None:
    assert Depths(T5).of(Target("", module, "weight")) == Depth(layer, count)


@pytest.mark.parametrize(
    ("module", "layer"), [("down_blocks.1", 1), ("mid_block", 2), ("up_blocks.0", 3), ("up_blocks.1", 4)]
)
def test_the_blocks_of_a_unet_are_counted_through(module: str, layer: int) -> None:
    target = next(target for target in UNET if target.module.startswith(module))
    assert Depths(PIPELINE).of(target) == Depth(layer, 5)
    flat = [Target(target.component, target.module.replace(".", "_"), "weight") for target in PIPELINE]
    assert Depths(flat).of(flat[PIPELINE.index(target)]) == Depth(layer, 5)


def test_double_and_single_blocks_follow_each_other() -> None:
    assert [depth.layer for target in FLUX if (depth := Depths(FLUX).of(target))] == [0, 1, 2, 3, 4]


def test_components_are_counted_each_for_itself() -> None:
    depths = Depths(PIPELINE)
    assert depths.of(ENCODER[1]) == Depth(1, 2)


@pytest.mark.parametrize(
    "module",
    ["transformer.h.5.attn.c_attn", "bert.encoder.layer.5.attention.self.query", "vision.stages.5.conv"],
)
def test_layers_are_found_under_many_names(module: str) -> None:
    targets = [Target("", module.replace("5", str(n)), "weight") for n in range(6)]
    assert Depths(targets).of(Target("", module, "weight")) == Depth(5, 6)


def test_where_no_word_tells_what_repeats_is_a_layer() -> None:
    targets = [Target("", f"net.cells_of.{n}.mix.0.fc", "weight") for n in range(3)]
    assert Depths(targets).of(targets[2]) == Depth(2, 3)
    assert Depths([Target("", "head.0.fc", "weight")]).of(Target("", "head.0.fc", "weight")) is None


def test_what_comes_before_is_not_guessed() -> None:
    only_up = [target for target in UNET if target.module.startswith("up_blocks")]
    assert "name the base, which tells" in complaint("[0, 1]", only_up)
    assert set(numbers("0.5", only_up).values()) == {0.5}
    names = [f"{target.module}.weight" for target in UNET]
    recipe = Recipe.from_text('[[adapters]]\nref = "a/b"\nweight = [0, 1]')
    found = weights_of(recipe, [only_up], index(*names))[0]
    assert sorted(set(found.values())) == [0.75, 1.0]
    assert found == weights_of(recipe, [only_up], index(*(f"unet:{name}" for name in names)))[0]


# ----------------------------------------------------------------------------------------------- filters, components


def test_the_first_filter_that_fits_counts() -> None:
    found = numbers('[{ filter = "*.q_proj", value = 1 }, { filter = "*self_attn*", value = 2 }, { value = 3 }]')
    assert {name.split(".")[4]: value for name, value in found.items()} == {"q_proj": 1, "v_proj": 2, "down_proj": 3}


def test_a_filter_may_give_numbers_over_depth() -> None:
    found = numbers('[{ filter = "*self_attn*", value = [0, 3], count = 8 }, { value = -1 }]')
    assert [value for name, value in found.items() if "q_proj" in name] == pytest.approx([0, 1, 2, 3])


@pytest.mark.parametrize(
    ("pattern", "near"),
    [
        ("*.q_prj", "'*.q_proj' fits 4"),
        ("self_attn", "'*self_attn*' fits 8"),
        ("*.self_atn.*", "'*.self_attn.*' fits 8"),
    ],
)
def test_a_filter_that_fits_nothing_names_one_that_does(pattern: str, near: str) -> None:
    message = complaint(f'[{{ filter = "{pattern}", value = 1 }}, {{ value = 0 }}]')
    assert f"adapters[0].weight[0]: '{pattern}' fits none of 12 targets" in message
    assert near in message


def test_a_filter_like_nothing_says_how_patterns_are_read() -> None:
    assert "'*' is any run of characters" in complaint('[{ filter = "zzz", value = 1 }, { value = 0 }]')


def test_an_optional_filter_may_fit_nothing() -> None:
    assert set(numbers('[{ filter = "*none*", value = 1, optional = true }, { value = 2 }]').values()) == {2}
    assert set(numbers('[{ filter = "*none*", value = 1, count = 0 }, { value = 2 }]').values()) == {2}


def test_a_filter_behind_another_that_takes_all_is_refused() -> None:
    message = complaint('[{ value = 1 }, { filter = "*.q_proj", value = 2 }]')
    assert "all 4 targets that '*.q_proj' fits have their number from an earlier filter" in message


def test_an_expected_count_is_held() -> None:
    message = complaint('[{ filter = "*.q_proj", value = 1, count = 5 }, { value = 0 }]')
    assert "gives 4 targets their number, and count says 5" in message


def test_targets_that_no_rule_names_are_an_error() -> None:
    assert "says nothing of model.layers.0.mlp.down_proj.weight" in complaint('[{ filter = "*attn*", value = 1 }]')
    assert "says nothing of text_encoder:" in complaint("{ unet = 1 }", PIPELINE)


def test_components_have_rules_of_their_own() -> None:
    found = numbers("{ unet = [0, 4], text_encoder = 9 }", PIPELINE)
    assert sorted(set(found.values())) == [0, 1, 2, 3, 4, 9]
    assert set(numbers("{ text_encoder = 1, default = 2 }", PIPELINE).values()) == {1, 2}
    assert "Did you mean 'unet'?" in complaint("{ unte = 1, default = 0 }", PIPELINE)
    assert "the model is one, without components" in complaint("{ unet = 1 }")


def test_a_filter_may_name_the_component() -> None:
    found = numbers('[{ filter = "unet:*", value = 1, count = 11 }, { value = 0 }]', PIPELINE)
    assert {name.partition(":")[0]: value for name, value in found.items()} == {"unet": 1, "text_encoder": 0}


# ------------------------------------------------------------------------------------------------------------ blocks


def test_b_lora_keeps_its_two_blocks() -> None:
    for preset, block in (("b-lora-content", "up_blocks.0.attentions.0"), ("b-lora-style", "up_blocks.0.attentions.1")):
        found = numbers(f'{{ preset = "{preset}", value = 0.9 }}', PIPELINE)
        assert {name for name, value in found.items() if value} == {
            target.name for target in UNET if target.module.startswith(block)
        }
        assert set(found.values()) == {0.9, 0.0}
    assert "nothing changes there" in complaint('{ preset = "b-lora-style" }')


@pytest.mark.parametrize(
    ("module", "block"),
    [
        ("down_blocks.1.attentions.0.proj_in", "IN04"),
        ("down_blocks.2.attentions.1.proj_in", "IN08"),
        ("down_blocks.0.downsamplers.0.conv", "IN03"),
        ("down_blocks_3_resnets_1_conv1", "IN11"),
        ("input_blocks.4.1.proj_in", "IN04"),
        ("mid_block.resnets.0.conv1", "MID"),
        ("middle_block.1.proj_in", "MID"),
        ("up_blocks.1.attentions.2.proj_in", "OUT05"),
        ("up_blocks.0.upsamplers.0.conv", "OUT02"),
        ("output_blocks_11_1_proj_in", "OUT11"),
        ("conv_in", "IN00"),
        ("transformer_blocks.3.attn.to_q", "D03"),
        ("single_transformer_blocks.20.attn.to_q", "S20"),
        ("double_blocks.18.img_attn.qkv", "D18"),
        ("single_blocks_37_linear1", "S37"),
        ("single_transformer_blocks.7.proj_out", "S07"),
        ("context_embedder", "IN"),
        ("final_layer.linear", "OUT"),
    ],
)
def test_blocks_have_the_names_of_lora_block_weight(module: str, block: str) -> None:
    assert block_names(Target("unet", module, "weight")) == (block,)


def test_a_list_of_blocks_is_read_by_its_length() -> None:
    row = [0.0, 0, 0, 0, 0, 0, 1, 2, 3, 0, 0, 0]  # BASE IN04 IN05 IN07 IN08 MID OUT00 OUT01 OUT02 ...
    found = numbers(f"{{ blocks = {row}, default = 7 }}", PIPELINE)
    assert found["unet:up_blocks.0.attentions.2.transformer_blocks.0.attn1.to_q.weight"] == 3
    assert found["unet:down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.weight"] == 7
    assert found[ENCODER[0].name] == 0
    assert "no target is in block IN11" in complaint("{ blocks = { IN11 = 1 }, default = 0 }", PIPELINE)
    flux = numbers(f"{{ blocks = {[float(n) for n in range(61)]} }}", FLUX)
    assert list(flux.values()) == [22, 23, 24, 3, 4]


def test_a_units_list_must_reach_its_attentions() -> None:
    assert "up.block_0: 4 numbers, and changes are in 3 attentions" in complaint(
        "{ up = { block_0 = [1, 1, 1, 1] } }", UNET
    )
    assert "2 numbers, and unet:up_blocks.0.attentions.2" in complaint(
        "{ unet = { up = [1, 2] }, default = 0 }", PIPELINE
    )
    assert "there are: down block_0, down block_1, mid block_0" in complaint(
        "{ unet = { down = { block_3 = 1 } }, default = 0 }", PIPELINE
    )
    assert "only UNets have them" in complaint("{ mid = 1 }")


# -------------------------------------------------------------------------------------------------------- parameters


def parameters(text: str, defaults: dict[str, Any] | None = None) -> list[dict[str, Any]]:
    """A method's parameters layer by layer, for the first target of each."""
    found = parameters_of(Recipe.from_text(text), LLAMA, defaults=defaults)
    return [dict(found[target]) for target in LLAMA[::3]]


TWO = '[[adapters]]\nref = "a/b"\n{}\n[[adapters]]\nref = "a/c"\n{}\n'


def test_parameters_for_all_are_as_written_unless_they_are_rules() -> None:
    head = '[parameters]\nnormalize = true\nlambda = { gradient = [0, 3] }\nbasis = "core"\n'
    head += "density = [0.2, 0.4]\nmax_iter = 7\n"
    rows = parameters(head + TWO.format("", ""))
    assert [row["lambda"] for row in rows] == pytest.approx([0, 1, 2, 3])
    assert all(row["normalize"] is True and row["basis"] == "core" and row["density"] == (0.2, 0.4) for row in rows)
    assert all(type(row["max_iter"]) is int for row in rows)


def test_an_adapters_own_parameter_makes_one_for_each() -> None:
    rows = parameters("[parameters]\ndensity = 0.5\n" + TWO.format("parameters = { density = [0, 0.3] }", ""))
    assert [row["density"] for row in rows] == [
        (pytest.approx(0.0), 0.5), (pytest.approx(0.1), 0.5), (pytest.approx(0.2), 0.5), (pytest.approx(0.3), 0.5)
    ]  # fmt: skip
    own = TWO.format("parameters = { density = 0.9 }", "")
    assert parameters(own, {"density": 0.2})[0] == {"density": (0.9, 0.2)}
    assert parameters("[parameters]\ndensity = [0.1, 0.2]\n" + own)[0] == {"density": (0.9, 0.2)}
    with pytest.raises(RecipeError, match=r"adapters\[1\].parameters.density is missing"):
        parameters(own)
    with pytest.raises(RecipeError, match="lists 3 values for 2 adapters"):
        parameters("[parameters]\ndensity = [0.1, 0.2, 0.3]\n" + own)


def test_equal_parameters_are_one_object() -> None:
    found = parameters_of(Recipe.from_text("[parameters]\nt = { gradient = [0, 1] }\n" + TWO.format("", "")), LLAMA)
    assert len({id(values) for values in found.values()}) == LAYERS


def test_a_rule_made_by_hand_is_checked_too() -> None:
    with pytest.raises(RecipeError, match="no finite number"):
        resolve(float("nan"), LLAMA)
    with pytest.raises(RecipeError, match="is no rule"):
        resolve("high", LLAMA)  # type: ignore[arg-type]
    assert list(resolve(1.0, LLAMA[::-1])) == list(resolve(1.0, LLAMA)) == LLAMA_IN_ORDER
