"""Where adapters land, and what is said where they do not."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from lorahub.bases.framework import Edits
from lorahub.bases.layout import Layout, Piece, Region
from lorahub.deltas.dora import DoRA
from lorahub.deltas.full import Full
from lorahub.deltas.ia3 import Gain
from lorahub.deltas.kind import Group, TensorRef
from lorahub.deltas.replace import Replace
from lorahub.engine.planning.place import logical_shape, place
from lorahub.findings import Verdict


def put(world, tools, deltas, **hints):
    reading = tools.header(deltas, hints=hints).reading
    return place(reading.groups, tools.kinds, world.index(), world, hints=reading.hints)


def only(placement):
    (finding,) = placement.findings
    return finding


def test_a_change_lands_in_the_parameter_of_its_name(base, tools):
    placement = put(base, tools, {"layers.0.q.weight": tools.lora(24, 16)})
    (placed,) = placement.placed
    assert placed.pieces == (Piece(parameter="layers.0.q.weight"),)
    assert (placed.kind, placed.touch.rank, placed.nbytes) == ("lora", 4, 4 * (24 + 16) * 4)
    assert not placement.findings


def test_a_declared_transposed_weight_is_turned_and_its_shape_checked_turned(tools):
    world = tools.World({"m.weight": tools.weights(16, 24)}, transposed=frozenset({"m.weight"}))
    (placed,) = put(world, tools, {"m.weight": tools.lora(24, 16)}).placed
    assert placed.pieces[0].of_parameter.transposed
    assert only(put(world, tools, {"m.weight": tools.lora(16, 24)})).code == "shape-mismatch"


def test_a_replacement_of_a_transposed_weight_lies_in_its_file_as_the_base_stores_it(tools):
    world = tools.World({"m.weight": tools.weights(16, 24)}, transposed=frozenset({"m.weight"}))
    assert not put(world, tools, {"m.weight": Replace(tools.weights(16, 24))}).findings


def test_a_misfit_names_both_shapes_and_cannot_be_allowed(base, tools):
    found = only(put(base, tools, {"layers.0.q.weight": tools.lora(20, 16)}))
    assert (found.code, found.level, found.allowable) == ("shape-mismatch", Verdict.INCOMPATIBLE, False)
    assert "[24, 16]" in found.message
    assert "[20, 4]" in found.message
    assert found.where == ("layers.0.q.weight",)
    assert "lorahub inspect" in found.remedy


def test_many_misfits_of_one_sort_are_one_finding(base, tools):
    found = only(put(base, tools, {f"layers.{n}.q.weight": tools.lora(20, 16) for n in (0, 1)}))
    assert found.where == ("layers.0.q.weight", "layers.1.q.weight")


def test_an_undeclared_base_that_would_fit_turned_around_is_explained_and_not_guessed_at(tools):
    world = tools.World({"m.weight": tools.weights(16, 24)}, declared=False)
    assert "plugin" in only(put(world, tools, {"m.weight": tools.lora(24, 16)})).message
    world.declared = True
    assert "plugin" not in only(put(world, tools, {"m.weight": tools.lora(24, 16)})).message


def test_a_grouped_convolution_is_refused_with_the_reason(tools):
    world = tools.World({"c.weight": tools.weights(8, 2, 3, 3)})
    assert "grouped convolution" in only(put(world, tools, {"c.weight": tools.lora(8, 4, 3, 3)})).message


@pytest.mark.parametrize("config", [{"vocab_size": 50}, {"text_config": {"vocab_size": 50}}])
def test_a_changed_vocabulary_is_named_with_the_size_that_the_base_should_have(tools, config):
    world = tools.World({"embed.weight": tools.weights(50, 16)}, config=config)
    replaced = only(put(world, tools, {"embed.weight": Replace(tools.weights(53, 16))})).message
    assert "knows 50 words" in replaced
    assert "resize_token_embeddings(53)" in replaced
    assert "at random" not in replaced
    factors = only(put(world, tools, {"embed.weight": tools.lora(53, 16)})).message
    assert "resize_token_embeddings(53)" in factors
    assert "at random" in factors
    narrower = only(put(world, tools, {"embed.weight": tools.lora(50, 12)})).message
    assert "words" not in narrower


def test_an_absent_target_is_degraded_while_something_else_lands(base, tools):
    found = only(put(base, tools, {"layers.0.q.weight": tools.lora(24, 16), "layers.0.qq.weight": tools.lora(24, 16)}))
    assert (found.code, found.level, found.allowable) == ("target-missing", Verdict.DEGRADED, True)
    assert "1 of 2" in found.message
    assert "Did you mean 'layers.0.q'?" in found.message


def test_an_adapter_of_which_nothing_lands_cannot_be_allowed(base, tools):
    found = only(put(base, tools, {"model.layers.0.q.weight": tools.lora(24, 16)}))
    assert (found.code, found.level, found.allowable) == ("target-missing", Verdict.INCOMPATIBLE, False)


WAN = {"q": "to_q", "k": "to_k", "v": "to_v", "o": "to_out.0"}


def _wan(tools, names, config=None):
    """Weights of attention in Wan's model, under ``names`` of its projections and of the attention itself."""
    weights = {
        f"blocks.{n}.{names['attention']}.{names[each]}.weight": tools.weights(24, 16)
        for n in (0, 1)
        for each in "qkvo"
    }
    return tools.World(weights, config=config or {})


@pytest.mark.parametrize("prefix", ["", "diffusion_model."])
def test_names_of_the_makers_end_in_the_command_that_translates_them(tools, prefix):
    world = _wan(tools, WAN | {"attention": "attn1"}, {"_class_name": "WanTransformer3DModel"})
    found = only(put(world, tools, {f"{prefix}blocks.0.self_attn.{each}.weight": tools.lora(24, 16) for each in "qk"}))
    assert (found.code, found.level) == ("target-missing", Verdict.INCOMPATIBLE)
    assert "lorahub convert ADAPTER --to diffusers --base BASE -o FOLDER" in found.remedy


def test_no_translation_is_offered_where_it_would_not_help(tools):
    makers = {each: each for each in "qkvo"} | {"attention": "self_attn"}
    own = _wan(tools, makers)
    assert "--to diffusers" not in only(put(own, tools, {"blocks.7.self_attn.q.weight": tools.lora(24, 16)})).remedy
    diffusers = _wan(tools, WAN | {"attention": "attn1"}, {"_class_name": "WanTransformer3DModel"})
    odd = only(put(diffusers, tools, {"blocks.0.elsewhere.q.weight": tools.lora(24, 16)}))
    assert "--to diffusers" not in odd.remedy


def components(tools, *targets):
    slots = {"up": (24, 4), "down": (4, 16)}
    refs = {name: TensorRef(key=name, shape=shape, dtype="F32") for name, shape in slots.items()}
    return [
        Group(component=part, module=module, kind="lora", slots=refs, options={"scale": 1.0})
        for part, module in targets
    ]


def test_of_several_components_the_one_that_the_base_is_lands_and_the_others_are_named(base, tools):
    groups = components(tools, ("unet", "layers.0.q"), ("unet", "layers.1.q"), ("text_encoder", "encoder.q"))
    placement = place(groups, tools.kinds, base.index(), base)
    assert [(one.target.name, one.name) for one in placement.placed] == [
        ("unet:layers.0.q.weight", "layers.0.q.weight"),
        ("unet:layers.1.q.weight", "layers.1.q.weight"),
    ]
    found = only(placement)
    assert (found.code, found.level, found.allowable) == ("component-elsewhere", Verdict.DEGRADED, True)
    assert found.where == ("text_encoder:encoder.q.weight",)
    assert "1 of 3" in found.message


def test_what_the_component_of_the_base_lacks_is_told_apart_from_what_is_elsewhere(base, tools):
    groups = components(tools, ("unet", "layers.0.q"), ("unet", "layers.9.q"), ("text_encoder", "encoder.q"))
    placement = place(groups, tools.kinds, base.index(), base)
    assert {found.code: found.where for found in placement.findings} == {
        "target-missing": ("unet:layers.9.q.weight",),
        "component-elsewhere": ("text_encoder:encoder.q.weight",),
    }


def test_of_two_components_with_the_same_modules_the_one_whose_shapes_fit_is_the_base(base, tools):
    wide = {"up": (36, 4), "down": (4, 32)}
    other = components(tools, ("text_encoder_2", "layers.0.q"))[0]
    slots = {name: TensorRef(key=name, shape=shape, dtype="F32") for name, shape in wide.items()}
    groups = [*components(tools, ("text_encoder", "layers.0.q")), dataclasses.replace(other, slots=slots)]
    placement = place(groups, tools.kinds, base.index(), base)
    assert [one.target.name for one in placement.placed] == ["text_encoder:layers.0.q.weight"]
    found = only(placement)
    assert (found.code, found.where) == ("component-elsewhere", ("text_encoder_2:layers.0.q.weight",))


def test_where_two_components_could_be_the_base_none_is_chosen(base, tools):
    groups = components(tools, ("text_encoder", "layers.0.q"), ("text_encoder_2", "layers.0.q"))
    found = only(place(groups, tools.kinds, base.index(), base))
    assert (found.code, found.level) == ("target-missing", Verdict.INCOMPATIBLE)
    assert "--component text_encoder" in found.remedy


def test_an_adapter_without_changes_says_so(base, tools):
    assert only(put(base, tools, {})).code == "nothing-lands"


def _with_bias(tools):
    lora = tools.lora(16, 16)
    slots = {
        name: TensorRef(key=f"norm.{name}", shape=tuple(shape), dtype="F32")
        for name, shape in (("up", lora.up.shape), ("down", lora.down.shape), ("bias", (16,)))
    }
    return Group(module="proj", kind="lora", slots=slots, options={"scale": 1.0})


def test_a_trained_bias_on_a_module_without_one_is_refused(tools):
    world = tools.World({"proj.weight": tools.weights(16, 16)})
    placement = place([_with_bias(tools)], tools.kinds, world.index(), world)
    found = only(placement)
    assert (found.code, found.level) == ("parameter-missing", Verdict.INCOMPATIBLE)
    assert "proj has no bias" in found.message
    world.tensors["proj.bias"] = tools.weights(16)
    assert len(place([_with_bias(tools)], tools.kinds, world.index(), world).placed) == 2


def test_sizes_are_one_binding_for_all_parameters_of_a_module(tools):
    world = tools.World({"proj.weight": tools.weights(16, 16), "proj.bias": tools.weights(12)})
    assert only(place([_with_bias(tools)], tools.kinds, world.index(), world)).code == "shape-mismatch"


def test_a_gain_on_a_bias_is_skipped_where_there_is_none(base, tools):
    gain = Gain(torch.ones(16, 1), 0)
    world = tools.World({"proj.weight": tools.weights(16, 16)})
    placement = put(world, tools, {"proj.weight": gain})
    assert [placed.target.parameter for placed in placement.placed] == ["weight"]
    assert not placement.findings


# --------------------------------------------------------------------------------------------------- new heads


def test_a_new_head_is_created_where_the_framework_can_take_it(base, tools):
    base.head = Edits(config={"num_labels": 3}, missing=("head.bias",))
    head = {"head.weight": Replace(tools.weights(3, 16, dtype=torch.float32))}
    placement = put(base, tools, head, task_type="SEQ_CLS")
    (new,) = placement.created
    assert (new.target.name, new.shape, new.dtype, new.nbytes) == ("head.weight", (3, 16), "F32", 192)
    assert placement.edits.config == {"num_labels": 3}
    assert base.asked == [({"head.weight": ((3, 16), "F32")}, {"task_type": "SEQ_CLS"})]
    assert (only(placement).code, only(placement).where) == ("head-incomplete", ("head.bias",))
    head["head.bias"] = Replace(tools.weights(3))
    assert not put(base, tools, head).findings


def test_a_new_head_without_a_place_is_a_missing_target(base, tools):
    placement = put(base, tools, {"head.weight": Replace(tools.weights(3, 16)), "norm.weight": Full(tools.weights(16))})
    assert (only(placement).code, only(placement).where) == ("target-missing", ("head.weight",))
    assert not placement.created


def test_a_replacement_in_another_shape_asks_the_framework_too(base, tools):
    wider = {"embed.weight": Replace(tools.weights(52, 16))}
    assert only(put(base, tools, wider)).code == "shape-mismatch"
    base.head = Edits(config={"vocab_size": 52})
    assert put(base, tools, wider).created[0].shape == (52, 16)


# --------------------------------------------------------------------------------------------------- storage, layouts


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8])
def test_quantised_storage_is_refused_by_name(tools, dtype):
    world = tools.World({"m.weight": torch.zeros(24, 16, dtype=dtype)})
    found = only(put(world, tools, {"m.weight": tools.lora(24, 16)}))
    assert (found.code, found.where) == ("storage-unsupported", ("m.weight",))
    assert "quantised" in found.message


def test_eight_bit_floats_that_have_scales_are_codes_and_refused(tools):
    world = tools.World({"m.weight": torch.zeros(24, 16, dtype=torch.float8_e4m3fn)})
    assert not put(world, tools, {"m.weight": tools.lora(24, 16)}).findings
    world.tensors["m.weight_scale_inv"] = torch.ones(1)
    assert only(put(world, tools, {"m.weight": tools.lora(24, 16)})).code == "storage-unsupported"


def test_a_counter_is_replaced_by_one_of_its_own_dtype(tools):
    world = tools.World({"bn.count": torch.tensor(3)})
    assert not put(world, tools, {"bn.count": Replace(torch.tensor(5))}).findings


def test_a_change_that_cannot_be_cut_is_refused_where_the_base_keeps_it_in_pieces(tools):
    world, target = (
        tools.World({"a.weight": tools.weights(8, 16), "b.weight": tools.weights(8, 16)}),
        tools.target("ab.weight"),
    )
    pieces = tuple(
        Piece(parameter=f"{name}.weight", of_delta=Region(rows=slice(at, at + 8))) for name, at in (("a", 0), ("b", 8))
    )
    world.layout[target] = Layout(target=target, pieces=pieces)
    assert logical_shape(world.layout[target], world.index()) == (16, 16)
    assert not put(world, tools, {"ab.weight": tools.lora(16, 16)}).findings
    lora = tools.lora(16, 16)
    columns = DoRA(lora.up, lora.down, 1.0, torch.ones(16), 1)
    assert only(put(world, tools, {"ab.weight": columns})).code == "layout-unsupported"


def test_what_a_change_reads_must_lie_in_one_place(base, tools):
    kind = tools.kinds["lora"]

    def touches(group):
        return (dataclasses.replace(kind.touches(group)[0], reads=("gate",)),)

    kinds = {"lora": dataclasses.replace(kind, touches=touches)}
    groups = tools.header({"layers.0.q.weight": tools.lora(24, 16)}).reading.groups
    assert only(place(groups, kinds, base.index(), base)).code == "layout-unsupported"
    base.tensors["layers.0.q.gate"] = tools.weights(3)
    (placed,) = place(groups, kinds, base.index(), base).placed
    assert placed.siblings == {"gate": Piece(parameter="layers.0.q.gate")}
