"""How training begins: PEFT's distributions, starts that look at the weight or at data, and refusals that say why."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from lorahub.deltas.departed import Departed
from lorahub.deltas.kind import Group, TensorRef
from lorahub.deltas.lora import LORA, LoRA
from lorahub.deltas.starting import Ground, Started, Starting
from lorahub.errors import UsageError
from lorahub.plugins import load_registry
from lorahub.testing import (
    additive_kinds_ignore_the_weight_and_commute,
    attached_equals_merged,
    fresh_changes_nothing,
    full_merges_alike,
    layouts_land_alike,
    regions_are_local_or_refused,
    shape_is_kept,
    starts_change_nothing_and_train,
    weights_are_linear,
)

KINDS = load_registry().kinds


def starting(kind: str) -> Starting:
    found = KINDS[kind].starting
    assert found is not None
    return found


def ground(kind: str, shape: tuple[int, ...] = (12, 10), role: str = "linear", **told: Any) -> Ground:
    own = {name: told.pop(name) for name in ("groups", "inputs") if name in told}
    settings = {name: setting.default for name, setting in starting(kind).settings.items()}
    assert told.keys() <= settings.keys()
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(2))
    return Ground(
        module="m",
        shape=shape,
        role=role,
        device=torch.device("cpu"),
        weight=lambda: weight,
        settings=settings | told,
        generator=torch.Generator().manual_seed(0),
        **own,
    )


def start(kind: str, *rest: Any, **told: Any) -> Started:
    return starting(kind).start(ground(kind, *rest, **told))


def shapes(started: Started) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in started.trained.items()}


@pytest.mark.parametrize(
    "law",
    [
        shape_is_kept,
        fresh_changes_nothing,
        additive_kinds_ignore_the_weight_and_commute,
        weights_are_linear,
        regions_are_local_or_refused,
        full_merges_alike,
        layouts_land_alike,
        attached_equals_merged,
    ],
    ids=lambda law: law.__name__,
)
def test_lora_that_counts_from_its_start_keeps_the_laws_of_changes(law):
    law(replace(LORA, deltas=(Departed,)))


def test_lora_that_counts_from_its_start_is_written_as_lora_of_twice_the_rank():
    delta = Departed.example((8, 6), r=2, generator=torch.Generator().manual_seed(1))
    tensors, options = LORA.dissolve({"weight": delta})
    refs = {name: TensorRef(key=name, shape=tuple(each.shape), dtype="F32") for name, each in tensors.items()}
    again = LORA.build(Group(module="m", kind="lora", slots=refs, options=options), tensors)["weight"]
    assert isinstance(again, LoRA)
    assert again.down.shape == (4, 6)
    weight = torch.zeros(8, 6, dtype=torch.float64)
    wanted = 0.7 * (delta.up.double() @ delta.down.double() - delta.from_up.double() @ delta.from_down.double())
    torch.testing.assert_close(again.delta(weight), wanted)


@pytest.mark.parametrize("init", ["default", "gaussian"])
def test_lora_begins_with_the_distributions_of_peft(init):
    started = start("lora", (64, 400), r=16, alpha=4.0, init=init)
    assert shapes(started) == {"down": (16, 400), "up": (64, 16)}
    down, up = started.trained["down"], started.trained["up"]
    assert not up.any()
    if init == "default":
        assert 0.98 / 20 < down.abs().max() <= 1 / 20
        assert float(down.std()) == pytest.approx(1 / 20 / math.sqrt(3), rel=0.05)
    else:
        assert float(down.std()) == pytest.approx(1 / 16, rel=0.05)
        assert down.abs().max() > 2.5 / 16
    assert started.options == {"scale": 0.25, "scale_rule": "alpha/r", "alpha": 4.0, "rank": 16}


def test_lora_on_an_embedding_has_its_zeros_beside_the_rows():
    started = start("lora", (30, 12), "embedding", r=4)
    assert not started.trained["up"].any()
    assert float(started.trained["down"].std()) == pytest.approx(1.0, rel=0.4)


def test_lora_on_a_grouped_convolution_has_the_kernels_of_one_group():
    assert shapes(start("lora", (8, 3, 3, 3), "conv", r=2, groups=4)) == {"down": (2, 3, 3, 3), "up": (8, 2, 1, 1)}


def test_rslora_divides_alpha_by_the_root_of_the_rank():
    options = start("lora", r=4, alpha=6.0, use_rslora=True).options
    assert (options["scale"], options["scale_rule"]) == (3.0, "alpha/sqrt(r)")


def test_pissa_begins_with_the_largest_singular_values_and_subtracts_them():
    here = ground("lora", r=3, alpha=6.0, init="pissa")
    started = starting("lora").start(here)
    u, s, vh = torch.linalg.svd(here.weight().double())
    product = 2.0 * started.trained["up"].double() @ started.trained["down"].double()
    torch.testing.assert_close(product, u[:, :3] * s[:3] @ vh[:3], rtol=1e-4, atol=1e-5)
    assert product.norm() > 0.3 * here.weight().norm()
    assert torch.equal(started.fixed["from_up"], started.trained["up"])
    assert started.fixed["from_up"].data_ptr() != started.trained["up"].data_ptr()


def test_olora_begins_with_an_orthonormal_factor():
    here = ground("lora", r=3, init="olora")
    started = starting("lora").start(here)
    up = started.trained["up"].double()
    torch.testing.assert_close(up.T @ up, torch.eye(3, dtype=torch.float64), rtol=1e-5, atol=1e-5)
    q, r = torch.linalg.qr(here.weight().double())
    torch.testing.assert_close(up @ started.trained["down"].double(), q[:, :3] @ r[:3], rtol=1e-4, atol=1e-5)


def test_eva_begins_with_the_directions_along_which_inputs_vary_most():
    generator = torch.Generator().manual_seed(4)
    basis, _ = torch.linalg.qr(torch.randn(10, 10, generator=generator))
    sizes = torch.tensor([9.0, 6.0, 3.0, *([0.1] * 7)])
    seen = (torch.randn(200, 10, generator=generator) * sizes) @ basis.T + 5.0
    started = start("lora", r=2, init="eva", inputs=lambda: seen)
    assert not started.trained["up"].any()
    down = started.trained["down"]
    torch.testing.assert_close((down @ basis[:, :2]).abs(), torch.eye(2), rtol=0, atol=0.15)
    torch.testing.assert_close(down @ down.T, torch.eye(2), rtol=0, atol=1e-5)


def test_dora_begins_with_the_lengths_of_rows_or_of_an_embeddings_columns():
    linear, conv, table = ground("dora"), ground("dora", (8, 4, 3, 3), "conv"), ground("dora", (9, 6), "embedding")
    for here, lengths, shape in (
        (linear, linear.weight().norm(dim=1), (12,)),
        (conv, conv.weight().flatten(1).norm(dim=1), (1, 8, 1, 1)),
        (table, table.weight().norm(dim=0), (6,)),
    ):
        magnitude = starting("dora").start(here).trained["magnitude"]
        assert tuple(magnitude.shape) == shape
        torch.testing.assert_close(magnitude.flatten(), lengths)


@pytest.mark.parametrize(
    ("told", "wanted"),
    [
        ({"r": 2}, {"w1": (6, 5), "w2_a": (8, 2), "w2_b": (2, 8)}),
        ({"r": 4}, {"w1": (6, 5), "w2": (8, 8)}),
        ({"r": 2, "decompose_both": True}, {"w1_a": (6, 2), "w1_b": (2, 5), "w2_a": (8, 2), "w2_b": (2, 8)}),
        ({"r": 1, "decompose_factor": 4}, {"w1": (4, 4), "w2_a": (12, 1), "w2_b": (1, 10)}),
    ],
    ids=str,
)
def test_lokr_is_cut_as_peft_cuts_it(told, wanted):
    started = start("lokr", (48, 40), **told)
    assert shapes(started) == wanted
    zero = "w1" if "w1" in wanted else "w1_a"
    assert [name for name, each in started.trained.items() if not each.any()] == [zero]
    lycoris = start("lokr", (48, 40), init="lycoris", **told)
    last = "w2" if "w2" in wanted else "w2_b"
    assert [name for name, each in lycoris.trained.items() if not each.any()] == [last]


@pytest.mark.parametrize(
    ("told", "features", "wanted"),
    [
        ({"oft_block_size": 4}, 12, (3, 6)),
        ({"oft_block_size": 5}, 12, (3, 6)),
        ({"oft_block_size": 64}, 12, (1, 66)),
        ({"r": 3, "oft_block_size": 0}, 12, (3, 6)),
        ({"oft_block_size": 4, "block_share": True}, 12, (1, 6)),
    ],
    ids=str,
)
def test_oft_has_the_blocks_that_peft_makes_of_a_number_or_a_size(told, features, wanted):
    assert shapes(start("oft", (6, features), **told)) == {"angles": wanted}


def test_vera_shares_the_projections_that_peft_draws_for_the_largest_layer():
    grounds = [ground("vera", shape, r=4, projection_prng_key=7) for shape in ((12, 10), (5, 30))]
    shared = starting("vera").shared(grounds)
    generator = torch.Generator().manual_seed(7)
    down, up = (
        torch.nn.init.kaiming_uniform_(torch.empty(size), a=0, generator=generator) for size in ((4, 30), (12, 4))
    )
    assert torch.equal(shared["down"], down)
    assert torch.equal(shared["up"], up)
    with pytest.raises(UsageError, match="one r and one projection_prng_key"):
        starting("vera").shared([grounds[0], ground("vera", r=8, projection_prng_key=7)])


def test_a_gain_is_on_the_inputs_of_feed_forward_modules_alone():
    assert shapes(start("ia3", (12, 10))) == {"gain": (12, 1)}
    assert shapes(start("ia3", (12, 10), feedforward_modules=["m"])) == {"gain": (1, 10)}
    assert shapes(start("ia3", (8, 4, 3, 3), "conv", feedforward_modules=["m"])) == {"gain": (1, 4, 1, 1)}
    assert start("ia3", (12, 10), feedforward_modules="m|n").options == {"feedforward": True}


@pytest.mark.parametrize(
    ("kind", "shape", "role", "told", "says"),
    [
        ("loha", (9, 6), "embedding", {}, "LoHa cannot stand on m.weight, because no tool has LoHa on embeddings"),
        ("lokr", (9, 6), "embedding", {}, "LoKr cannot stand"),
        ("vera", (8, 4, 3), "conv", {}, "VeRA cannot stand.*matrices"),
        ("ia3", (9, 6), "embedding", {}, "cannot stand"),
        (
            "ia3",
            (8, 2, 3, 3),
            "conv",
            {"groups": 2, "feedforward_modules": ["m"]},
            "2 columns for 4 inputs in 2 groups",
        ),
        ("oft", (9, 1), "linear", {}, "nothing to turn"),
        ("oft", (8, 1, 7, 7), "conv", {"oft_block_size": 4, "groups": 8}, "its 49 inputs 1 is the nearest"),
        ("oft", (8, 7), "linear", {"oft_block_size": 2}, "its 7 inputs 1 is the nearest"),
        ("oft", (9, 6), "linear", {"r": 2}, "r=2 and oft_block_size=32"),
        ("oft", (9, 6), "linear", {"coft": True, "eps": 0.0}, "eps should be above zero"),
        ("lora", (12, 10), "linear", {"r": 0}, "r should be a whole number of 1 or more, not 0"),
        ("lora", (12, 10), "linear", {"alpha": math.nan}, "alpha should be a number"),
        ("lora", (12, 10), "linear", {"init": "pisa"}, "no init='pisa'"),
        ("lora", (12, 10), "linear", {"init": "pissa", "r": 11}, "takes r=11 directions of a weight that has 10"),
        ("lora", (12, 10), "linear", {"init": "eva"}, "no batches were run"),
        ("lora", (9, 6), "embedding", {"init": "pissa"}, "an embedding has none"),
        ("lora", (12,), "linear", {}, "no weight of a linear layer"),
        ("dora", (12, 10), "linear", {"init": "pissa"}, "no init='pissa'"),
        ("lokr", (12, 10), "linear", {"decompose_factor": 0}, "decompose_factor should be -1 or above zero"),
        ("expert-lora", (12, 10), "linear", {}, "no stack of experts"),
    ],
    ids=lambda value: str(value) if isinstance(value, str) else "",
)
def test_where_a_kind_cannot_stand_it_says_why(kind, shape, role, told, says):
    with pytest.raises(UsageError, match=says):
        start(kind, shape, role, **told)


SMALL = (
    *(("linear", (out, inputs), 1) for out in (1, 2, 7) for inputs in (1, 2, 5)),
    *(
        ("conv", (8, inputs, *kernel), 8 if inputs == 1 else 1)
        for inputs in (1, 3)
        for kernel in ((1,), (7, 7), (2, 2))
    ),
    *(("embedding", (rows, width), 1) for rows in (1, 7) for width in (1, 7)),
    *(("experts", (3, out, 1), 1) for out in (1, 7)),
)
"""Roles, shapes and groups where little is left to divide."""


@pytest.mark.parametrize("kind", [name for name, kind in KINDS.items() if kind.starting is not None])
def test_what_begins_has_no_tensor_of_nothing(kind):
    begun = 0
    for role, shape, groups in SMALL:
        for told in ({"oft_block_size": 2}, {"oft_block_size": 0, "r": 2}) if kind == "oft" else ({},):
            try:
                started = start(kind, shape, role, groups=groups, **told)
            except UsageError:
                continue
            begun += 1
            assert all(tensor.numel() for tensor in started.trained.values()), (role, shape)
    assert begun


def test_the_law_of_starts_notices_one_that_changes_something():
    def moved(here: Ground) -> Started:
        found = starting("lora").start(here)
        return replace(found, trained={**found.trained, "up": torch.ones_like(found.trained["up"])})

    broken = replace(LORA, starting=replace(starting("lora"), start=moved))
    with pytest.raises(AssertionError, match="changes the weight by"):
        starts_change_nothing_and_train(broken)


def test_the_law_of_starts_notices_one_that_cannot_learn():
    def still(here: Ground) -> Started:
        found = starting("lora").start(here)
        return replace(found, trained={name: torch.zeros_like(each) for name, each in found.trained.items()})

    broken = replace(LORA, starting=replace(starting("lora"), start=still))
    with pytest.raises(AssertionError, match="no gradient"):
        starts_change_nothing_and_train(broken)
