"""What the built-in kinds read from PEFT configs, and write back."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lorahub.deltas import peft_lora
from lorahub.deltas.dora import DORA, DoRA
from lorahub.deltas.full import FULL, Full
from lorahub.deltas.ia3 import IA3, Gain
from lorahub.deltas.kind import Group, Kind, TensorRef
from lorahub.deltas.lora import LORA, LoRA
from lorahub.deltas.replace import REPLACE, Replace
from lorahub.errors import BaseMismatch, CannotCarry, IntegrityError, NotLocal, UnsupportedKind
from lorahub.shapes import ShapeMisfit, unify

LORA_OPTIONS, DORA_OPTIONS, IA3_OPTIONS = (kind.spellings[0].options for kind in (LORA, DORA, IA3))


def refs(**shapes: tuple[int, ...]) -> dict[str, TensorRef]:
    return {name: TensorRef(key=f"m.{name}", shape=shape, dtype="F32") for name, shape in shapes.items()}


def pair(r: int = 4, **more: tuple[int, ...]) -> dict[str, TensorRef]:
    return refs(down=(r, 6), up=(5, r), **more)


def group_of(kind: Kind, deltas: dict[str, object], **more: object) -> tuple[Group, dict[str, torch.Tensor]]:
    """The group a file would hold for these deltas, with its tensors."""
    tensors, options = kind.dissolve(deltas)
    slots = refs(**{name: tuple(tensor.shape) for name, tensor in tensors.items()})
    return Group(**{"module": "m", "kind": kind.name, "slots": slots, "options": options, **more}), tensors


# scale and rank


@pytest.mark.parametrize(
    ("config", "scale", "rule"),
    [
        ({"r": 4, "lora_alpha": 16}, 4.0, "alpha/r"),
        ({"r": 4, "lora_alpha": 16, "use_rslora": True}, 8.0, "alpha/sqrt(r)"),
        ({"r": 4, "lora_alpha": 1.5}, 0.375, "alpha/r"),
        ({"r": 4}, 2.0, "alpha/r"),
        ({"lora_alpha": 16}, 4.0, "alpha/r"),
        ({"r": 8, "lora_alpha": 16, "rank_pattern": {"q": 4}}, 4.0, "alpha/r"),
        ({"r": 4, "lora_alpha": 16, "alpha_pattern": {r".*\.k": 2, "q": 6, "a.q": 2}}, 1.5, "alpha/r"),
        ({"r": 4, "lora_alpha": 16, "rank_pattern": None, "alpha_pattern": {"^q": 6}}, 4.0, "alpha/r"),
        ({"r": 4, "lora_alpha": 10, "alpha_pattern": {r"^a\.q$": 6}, "use_rslora": True}, 3.0, "alpha/sqrt(r)"),
    ],
)
def test_the_scale_follows_peft(config: dict[str, object], scale: float, rule: str):
    options = LORA_OPTIONS(config, "a.q", pair(4))
    assert options["scale"] == scale
    assert options["scale_rule"] == rule
    assert options["rank"] == 4


@pytest.mark.parametrize(
    ("config", "stated"),
    [({"r": 8}, "r says rank 8"), ({"r": 4, "rank_pattern": {"q": 16}}, r"rank_pattern\['q'\] says rank 16")],
)
def test_a_stated_rank_that_disagrees_with_the_tensor_names_both(config: dict[str, object], stated: str):
    with pytest.raises(IntegrityError, match=rf"a\.q: {stated}, and m\.down has rank 4"):
        LORA_OPTIONS(config, "a.q", pair(4))


@pytest.mark.parametrize(
    ("config", "field"),
    [
        ({"lora_alpha": "16"}, "lora_alpha should be a number, not '16'"),
        ({"lora_alpha": True}, "lora_alpha"),
        ({"lora_alpha": math.nan}, "lora_alpha"),
        ({"lora_alpha": 10**400}, "lora_alpha"),
        ({"r": [4]}, "r should be a number"),
        ({"rank_pattern": ["q"]}, "rank_pattern should map"),
        ({"rank_pattern": {"q": "4"}}, r"rank_pattern\['q'\]"),
        ({"alpha_pattern": {"q": None}}, r"alpha_pattern\['q'\]"),
        ({"use_rslora": "yes"}, "use_rslora should be true or false"),
        ({"use_dora": 1}, "use_dora"),
        ({"lora_bias": "none"}, "lora_bias"),
    ],
)
def test_a_field_of_the_wrong_type_is_named(config: dict[str, object], field: str):
    with pytest.raises(IntegrityError, match=f"^(q: )?{field}"):
        LORA_OPTIONS(config, "q", pair(4))


def test_a_factor_without_a_rank_is_refused():
    with pytest.raises(IntegrityError, match="has no rank"):
        LORA_OPTIONS({"r": 4}, "q", refs(down=(0, 6), up=(5, 0)))


def test_a_pattern_that_cannot_be_matched_safely_is_refused_by_field():
    with pytest.raises(UnsupportedKind, match="rank_pattern"):
        LORA_OPTIONS({"r": 4, "rank_pattern": {r"(q)\1": 2}}, "q", pair(4))


def test_a_refused_field_is_not_mistaken_for_a_wrong_rank():
    old = {"r": 8, "lora_alpha": 16, "enable_lora": [True, False, True]}
    assert LORA_OPTIONS(old, "query_key_value", refs(down=(16, 6), up=(5, 8, 1)))["rank"] == 16


@pytest.mark.parametrize(
    ("options", "config", "slots", "complaint"),
    [
        (LORA_OPTIONS, {"use_dora": True}, pair(), "no lora_magnitude_vector"),
        (LORA_OPTIONS, {"lora_bias": True}, pair(), "has no lora_B.bias"),
        (LORA_OPTIONS, {}, pair(bias=(5,)), "lora_bias is false, and the file has a lora_B.bias"),
        (DORA_OPTIONS, {}, pair(magnitude=(5,)), "use_dora is false"),
        (DORA_OPTIONS, {"use_dora": True, "lora_bias": True}, pair(magnitude=(5,)), "PEFT does not allow"),
    ],
)
def test_a_config_that_denies_the_tensors_is_refused(options, config, slots, complaint):
    with pytest.raises(IntegrityError, match=complaint):
        options({"r": 4, **config}, "q", slots)


# every config field


def test_every_field_that_peft_writes_is_declared():
    peft = pytest.importorskip("peft")
    common = {"auto_mapping", "base_model_name_or_path", "bias", "modules_to_save", "peft_type", "revision"}
    for kind, config in ((LORA, peft.LoraConfig()), (DORA, peft.LoraConfig()), (IA3, peft.IA3Config())):
        written = {name: value for name, value in config.to_dict().items() if name not in common}
        fields = kind.spellings[0].fields
        assert written.keys() <= fields.keys()
        refused = {
            name: value
            for name, value in written.items()
            if value and fields[name].refuse and value not in fields[name].harmless
        }
        assert not refused, "PEFT's defaults change nothing"


@pytest.mark.parametrize("value", ["pissa", "pissa_niter_16", "olora", "corda", "lora_ga", "loftq", "something new"])
def test_initialisations_that_move_the_base_are_not_harmless(value: str):
    field = peft_lora.FIELDS["init_lora_weights"]
    assert value not in field.harmless
    assert "path_initial_model_for_weight_conversion" in field.refuse


def test_every_refusal_reads_on_after_because():
    reasons = [field.refuse for field in peft_lora.FIELDS.values() if field.refuse]
    assert len(reasons) >= 9
    assert all(reason[0].islower() and not reason.endswith(".") for reason in reasons)


# writing PEFT


def lora_group(scale: float, r: int = 4, **options: object) -> Group:
    return Group(module="m", kind="lora", slots=pair(r), options={"scale": scale, "rank": r, **options})


def read_back(groups: dict[str, Group]) -> dict[str, object]:
    config = peft_lora.config(groups)
    assert config.keys() <= peft_lora.FIELDS.keys()
    for name, group in groups.items():
        options = (DORA_OPTIONS if "magnitude" in group.slots else LORA_OPTIONS)(config, name, group.slots)
        assert options["scale"] == group.options["scale"]
    return config


@settings(deadline=None)
@given(alpha=st.integers(1, 512), r=st.integers(1, 300), rslora=st.booleans())
def test_a_scale_that_came_from_an_alpha_goes_back_to_one(alpha: int, r: int, rslora: bool):
    read = LORA_OPTIONS({"r": r, "lora_alpha": alpha, "use_rslora": rslora}, "a.q", pair(r))
    forgotten = {"a.q": lora_group(read["scale"], r)}
    remembered = {"a.q": lora_group(r=r, **read | {"rank": r})}
    read_back(forgotten)
    config = read_back(remembered)
    assert (config["lora_alpha"], config["use_rslora"]) == (alpha, rslora)


@settings(deadline=None)
@given(scale=st.floats(1e-6, 1e6), r=st.sampled_from([1, 2, 4, 8, 16, 64]))
def test_any_scale_can_be_written_for_ranks_that_are_powers_of_two(scale: float, r: int):
    read_back({"a.q": lora_group(scale, r)})


def test_the_commonest_rank_and_alpha_are_the_default_and_the_rest_patterns():
    config = read_back(
        {"a.q": lora_group(2.0, 4), "a.k": lora_group(2.0, 4), "a.v": lora_group(2.0, 8), "a.o": lora_group(0.5, 4)}
    )
    assert (config["r"], config["rank_pattern"]) == (4, {"a.v": 8})
    assert (config["lora_alpha"], config["alpha_pattern"]) == (8, {"a.v": 16, "a.o": 2})


def test_names_that_end_alike_are_written_as_anchored_patterns():
    config = read_back({"q": lora_group(2.0, 8), "a.q": lora_group(2.0, 4), "b.q": lora_group(2.0, 4)})
    assert config["rank_pattern"] == {"^q": 8}
    dotted = read_back({"a.q": lora_group(2.0, 8), "aXq": lora_group(2.0, 4), "b": lora_group(2.0, 4)})
    assert dotted["rank_pattern"] == {r"^a\.q": 8}


def test_scales_that_need_two_rules_cannot_be_carried():
    plain, root = lora_group(1 / 3, 3), lora_group(7 / math.sqrt(7), 7)
    assert read_back({"a": plain})["use_rslora"] is False
    with pytest.raises(CannotCarry, match="none gives these scales exactly"):
        peft_lora.config({"a": lora_group(math.inf, 4), "b": root})


@pytest.mark.parametrize(
    ("groups", "complaint"),
    [
        (
            {"a": lora_group(1.0), "b": replace(lora_group(1.0), slots=pair(magnitude=(5,)))},
            "use_dora .* true for b .* false for a",
        ),
        ({"a": lora_group(1.0), "b": replace(lora_group(1.0), slots=pair(bias=(5,)))}, "lora_bias .* true for b"),
        ({"e": replace(lora_group(1.0), slots=pair(bias=(5,)), role="embedding")}, "embeddings: e"),
        ({"e": lora_group(1.0, axis=1)}, "otherwise on e"),
        ({"e": replace(lora_group(1.0, axis=0), role="embedding")}, "otherwise on e"),
    ],
)
def test_what_one_peft_config_cannot_say_is_listed(groups: dict[str, Group], complaint: str):
    with pytest.raises(CannotCarry, match=complaint):
        peft_lora.config(groups)


def test_peft_itself_finds_the_same_scales_in_what_is_written():
    peft = pytest.importorskip("peft")
    ranks = {"a.q": (2.0, 4), "b.q": (0.3, 6), "q": (1.25, 8)}
    config = peft_lora.config({name: lora_group(scale, r) for name, (scale, r) in ranks.items()})

    class Layer(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.q = torch.nn.Linear(6, 5)

    model = Layer()
    model.a, model.b = Layer(), Layer()
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q"], **config))
    found = {
        name: (module.scaling["default"], module.r["default"])
        for name, module in adapted.base_model.model.named_modules()
        if isinstance(module, peft.tuners.lora.Linear)
    }
    assert found == ranks


# build, dissolve


@pytest.mark.parametrize(
    ("kind", "deltas"),
    [
        (LORA, {"weight": LoRA(torch.randn(5, 3), torch.randn(3, 6), 0.7)}),
        (LORA, {"weight": LoRA(torch.randn(5, 3), torch.randn(3, 6), 0.7), "bias": Full(torch.randn(5), 0.7)}),
        (LORA, {"weight": LoRA(torch.randn(5, 3, 1, 1), torch.randn(3, 6, 2, 2), 0.7)}),
        (DORA, {"weight": DoRA(torch.randn(5, 3), torch.randn(3, 6), 0.7, torch.rand(5), 0)}),
        (DORA, {"weight": DoRA(torch.randn(5, 3), torch.randn(3, 6), 0.7, torch.rand(6), 1)}),
        (DORA, {"weight": DoRA(torch.randn(5, 3, 1), torch.randn(3, 6, 2), 0.7, torch.rand(5), 0)}),
        (IA3, {"weight": Gain(torch.randn(1, 6), 1)}),
        (IA3, {"weight": Gain(torch.randn(1, 6, 1, 1), 1)}),
        (IA3, {"weight": Gain((rows := torch.randn(5, 1)), 0), "bias": Gain(rows.reshape(-1), 0)}),
        (IA3, {"weight": Gain((rows := torch.randn(5, 1, 1, 1)), 0), "bias": Gain(rows.reshape(-1), 0)}),
        (REPLACE, {"weight": Replace(torch.randn(5, 6))}),
        (REPLACE, {"weight": Replace(torch.tensor(2.5))}),
        (FULL, {"weight": Full(torch.randn(5), 0.3)}),
    ],
)
def test_build_undoes_dissolve(kind: Kind, deltas: dict[str, object]):
    group, tensors = group_of(kind, deltas)
    built = kind.build(group, tensors)
    assert built.keys() == deltas.keys() == {touch.parameter for touch in kind.touches(group)}
    for parameter, delta in deltas.items():
        again = built[parameter]
        assert type(again) is type(delta)
        assert again.tensors().keys() == delta.tensors().keys()
        assert all(torch.equal(tensor, again.tensors()[name]) for name, tensor in delta.tensors().items())
        plain = {"scale", "axis"}
        assert [getattr(again, name, None) for name in plain] == [getattr(delta, name, None) for name in plain]


def test_the_up_factor_of_a_convolution_gets_the_ones_that_files_have():
    tensors, _ = LORA.dissolve({"weight": LoRA(torch.randn(5, 3), torch.randn(3, 6, 2, 2), 1.0)})
    assert tensors["up"].shape == (5, 3, 1, 1)


def test_peft_shapes_of_magnitudes_and_gains_come_back_as_they_were():
    magnitude, _ = DORA.dissolve({"weight": DoRA(torch.randn(5, 3), torch.randn(3, 6, 2, 2), 1.0, torch.rand(5))})
    assert magnitude["magnitude"].shape == (1, 5, 1, 1)
    gain = torch.randn(5, 1, 1, 1)
    rows, _ = IA3.dissolve({"weight": Gain(gain, 0), "bias": Gain(gain.reshape(-1), 0)})
    assert rows["gain"].shape == (1, 5, 1, 1)
    assert torch.equal(rows["gain"].flatten(), gain.flatten())


A_LORA = LoRA(torch.randn(5, 3), torch.randn(3, 6), 0.7)
A_DORA = DoRA(torch.randn(5, 3), torch.randn(3, 6), 0.7, torch.rand(5))


@pytest.mark.parametrize(
    ("kind", "deltas"),
    [
        (LORA, {}),
        (LORA, {"bias": Full(torch.randn(5))}),
        (LORA, {"weight": Full(torch.randn(5, 6))}),
        (LORA, {"weight": A_LORA, "bias": Full(torch.randn(5), 0.5)}),
        (LORA, {"weight": A_LORA, "bias": Full(torch.randn(4), 0.7)}),
        (LORA, {"weight": A_LORA, "bias": Replace(torch.randn(5))}),
        (LORA, {"weight": A_LORA, "other": Full(torch.randn(5), 0.7)}),
        (DORA, {"weight": A_LORA}),
        (
            DORA,
            {"weight": DoRA(torch.randn(5, 3), torch.randn(3, 6), 0.7, torch.rand(5)), "bias": Full(torch.randn(5))},
        ),
        (IA3, {"weight": Gain(torch.randn(5, 1), 0)}),
        (IA3, {"weight": Gain(torch.randn(5, 1), 0), "bias": Gain(torch.randn(5), 0)}),
        (IA3, {"weight": Gain(torch.randn(1, 6), 1), "bias": Gain(torch.randn(5), 0)}),
        (FULL, {"weight": Full(torch.randn(5, 6)), "bias": Full(torch.randn(5))}),
        (REPLACE, {"weight": Full(torch.randn(5, 6))}),
    ],
)
def test_deltas_of_another_kind_do_not_dissolve(kind: Kind, deltas: dict[str, object]):
    assert kind.dissolve(deltas) is None


# refusals, one by one


def test_a_weight_of_another_shape_is_refused_even_where_it_would_broadcast():
    square = LoRA(torch.randn(5, 3), torch.randn(3, 6), 1.0)
    for shape in ((6, 5), (1, 6), (5, 6, 1), (30,)):
        with pytest.raises(BaseMismatch, match=r"\[5, 6\]"):
            square.delta(torch.zeros(shape))
    with pytest.raises(BaseMismatch, match=r"\[5\].*\[1\]"):
        Full(torch.randn(5)).delta(torch.zeros(1))
    with pytest.raises(BaseMismatch, match=r"gain \[5, 1\]"):
        Gain(torch.randn(5, 1), 0).delta(torch.zeros(1, 6))
    with pytest.raises(BaseMismatch, match=r"gain \[5, 1\]"):
        Gain(torch.randn(5, 1), 0).delta(torch.zeros(5, 6, 2))


def test_factors_refuse_vectors():
    for cls in (LoRA, DoRA):
        for make in (cls.fresh, cls.example):
            with pytest.raises(BaseMismatch, match=r"not \[5\]"):
                make((5,), r=2, generator=torch.Generator())


def test_dora_refuses_to_be_cut_through_its_vectors_and_only_there():
    rows = DoRA(torch.randn(5, 3), torch.randn(3, 6), 0.7, torch.rand(5), 0)
    columns = DoRA(torch.randn(5, 3), torch.randn(3, 6), 0.7, torch.rand(6), 1)
    with pytest.raises(NotLocal, match="whole rows"):
        rows.region(slice(None), slice(0, 3))
    with pytest.raises(NotLocal, match="whole columns"):
        columns.region(slice(0, 3), slice(None))
    assert rows.region(slice(0, 2), (5, 4, 3, 2, 1, 0)).shape() == (2, 6)
    assert columns.region(slice(None), (1,)).shape() == (5, 1)
    assert [DORA.touches(group_of(DORA, {"weight": delta})[0])[0].local for delta in (rows, columns)] == [True, False]


def test_a_row_of_zeros_stays_when_its_magnitude_is_zero_too():
    weight = torch.randn(3, 4, dtype=torch.float64)
    weight[1] = 0
    up, down = torch.randn(3, 2), torch.randn(2, 4)
    up[1] = 0
    kept = DoRA(up, down, 1.0, torch.tensor([1.0, 0.0, 2.0])).delta(weight)
    assert kept.isfinite().all()
    assert not kept[1].any()
    assert DoRA(up, down, 1.0, torch.tensor([1.0, 0.5, 2.0])).delta(weight)[1].isnan().all()
    assert not DoRA(torch.zeros(3, 2), down, 1.0).delta(weight).any()


def test_a_fresh_dora_is_stored_only_once_it_was_measured():
    fresh = DoRA.fresh((5, 6), r=2, generator=torch.Generator().manual_seed(0))
    with pytest.raises(CannotCarry, match="no magnitude"):
        DORA.dissolve({"weight": fresh})
    weight = torch.randn(5, 6, dtype=torch.bfloat16)
    tensors, _ = DORA.dissolve({"weight": fresh.measured(weight)})
    assert tensors["magnitude"].dtype == torch.float32
    assert torch.allclose(tensors["magnitude"], weight.float().norm(dim=1))


def test_gradients_reach_every_tensor_of_a_delta_in_training():
    weight = torch.randn(5, 6)
    for delta in (
        LoRA(torch.randn(5, 2), torch.randn(2, 6), 0.7),
        DoRA(torch.randn(5, 2), torch.randn(2, 6), 0.7, torch.rand(5)),
        Gain(torch.randn(5, 1), 0),
        Full(torch.randn(5, 6)),
    ):
        for tensor in delta.tensors().values():
            tensor.requires_grad_()
        (delta.delta(weight) ** 2).sum().backward()
        assert all(tensor.grad is not None and tensor.grad.any() for tensor in delta.tensors().values())


@pytest.mark.parametrize("shape", [(6,), (1, 6), (5, 2), ()])
def test_a_magnitude_with_another_number_of_lengths_is_refused(shape: tuple[int, ...]):
    group = Group(module="m", kind="dora", slots=pair(magnitude=shape), options={"scale": 1.0})
    with pytest.raises(IntegrityError, match=r"m\.magnitude .* should hold 5 lengths, one for each row"):
        DORA.touches(group)


def test_a_fresh_replacement_is_refused_with_what_to_do():
    with pytest.raises(UnsupportedKind, match="weight itself") as caught:
        Replace.fresh((5, 6), r=2, generator=torch.Generator())
    assert "full" in caught.value.hint


def test_fresh_factors_start_as_peft_starts_them():
    fresh = LoRA.fresh((500, 40, 2), r=16, generator=torch.Generator().manual_seed(0))
    assert not fresh.up.any()
    assert fresh.up.shape == (500, 16, 1)
    bound = 1 / math.sqrt(40 * 2)
    assert fresh.down.abs().max() <= bound
    assert math.isclose(fresh.down.std().item(), bound / math.sqrt(3), rel_tol=0.05)


# IA3


@pytest.mark.parametrize(
    ("names", "module", "shape", "feedforward"),
    [
        (["down_proj"], "layers.0.down_proj", (1, 6), True),
        (["down_proj"], "layers.0.k_proj", (5, 1), False),
        (["own_proj"], "layers.0.down_proj", (1, 6), True),  # PEFT compares the plain end of the name
        ([], "layers.0.k_proj", (5, 1), False),
        (r".*\.down_proj", "layers.0.down_proj", (1, 6, 1, 1), True),
        (r"down_proj", "layers.0.down_proj", (1, 6, 1, 1), False),
        (None, "layers.0.k_proj", (5, 1), False),
        (None, "layers.0.k_proj", (1, 6), True),
    ],
)
def test_which_axis_an_ia3_gain_is_for(names, module: str, shape: tuple[int, ...], feedforward: bool):
    assert IA3_OPTIONS({"feedforward_modules": names}, module, refs(gain=shape)) == {"feedforward": feedforward}


@pytest.mark.parametrize(
    ("names", "shape", "complaint"),
    [
        (["k"], (5, 1), r"says the gain is on inputs|on inputs, and m\.gain \[5, 1\] is one for outputs"),
        ([], (1, 6), r"on outputs, and m\.gain \[1, 6\] is one for inputs|on the outputs"),
        (None, (1, 6, 1, 1), "does not tell"),
        ([], (5, 6), "is no gain"),
        ([], (6,), "is no gain"),
        ([], (1, 6, 3), "is no gain"),
        (7, (1, 6), "should be a pattern or a list"),
        ([7], (1, 6), "should be a pattern or a list"),
    ],
)
def test_an_ia3_config_that_contradicts_the_shape_is_refused(names, shape: tuple[int, ...], complaint: str):
    with pytest.raises(IntegrityError, match=complaint):
        IA3_OPTIONS({"feedforward_modules": names}, "a.k", refs(gain=shape))


def test_an_ia3_gain_fits_the_axis_it_is_for_and_no_other():
    def touch(shape, feedforward):
        group = Group(module="m", kind="ia3", slots=refs(gain=shape), options={"feedforward": feedforward})
        return IA3.touches(group)

    weight, bias = touch((5, 1), feedforward=False)
    unify(weight.dims, (5, 6), {}, name="weight")
    with pytest.raises(ShapeMisfit):
        unify(weight.dims, (6, 5), {}, name="weight")
    with pytest.raises(ShapeMisfit):
        unify(weight.dims, (5, 6, 3), {}, name="weight")
    assert bias.if_present
    unify(bias.dims, (5,), {}, name="bias")
    (columns,) = touch((1, 6, 1, 1), feedforward=True)
    unify(columns.dims, (5, 6, 3, 2), {}, name="weight")
    with pytest.raises(ShapeMisfit):  # a grouped convolution
        unify(columns.dims, (5, 3, 3, 2), {}, name="weight")


def test_ia3_writes_the_modules_whose_gain_is_on_the_inputs():
    def group(feedforward):
        return Group(module="m", kind="ia3", slots=refs(gain=(1, 6)), options={"feedforward": feedforward})

    config = IA3.spellings[0].config({"a.fc": group(True), "a.k": group(False), "b.fc": group(True)})
    assert config["feedforward_modules"] == ["a.fc", "b.fc"]
    with pytest.raises(CannotCarry, match=r"a\.fc"):
        IA3.spellings[0].config({"fc": group(True), "a.fc": group(False)})
