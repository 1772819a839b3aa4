"""What a plan says, demands and remembers."""

from __future__ import annotations

import json
import math

import pytest
import torch

from lorahub.bases.framework import Edits
from lorahub.bases.layout import Layout, Piece, Region
from lorahub.deltas.dora import DoRA
from lorahub.deltas.replace import Replace
from lorahub.errors import BaseMismatch, Degraded, UsageError
from lorahub.findings import Finding, Verdict


def codes(plan):
    return {finding.code: finding.level for finding in plan.findings}


def test_steps_come_in_canonical_order_with_everything_else_untouched(base, tools):
    plan = base.plan({"layers.1.q.weight": tools.lora(24, 16), "layers.0.q.weight": tools.lora(24, 16)})
    assert [step.out for step in plan.steps] == ["layers.0.q.weight", "layers.1.q.weight"]
    assert plan.untouched == ("embed.weight", "layers.0.q.bias", "layers.1.q.bias", "norm.weight")
    assert plan.untouched_bytes == 2 * (50 * 16 + 24 + 24 + 16)
    assert plan.verdict is Verdict.EXACT
    plan.check()


def test_terms_keep_the_order_in_which_adapters_were_given(base, tools):
    plan = base.plan(*({"layers.0.q.weight": tools.lora(24, 16)} for _ in range(3)), weights=[1.0, -0.5, 0.25])
    assert [(term.adapter, term.weight) for term in plan.steps[0].terms] == [("a", 1.0), ("b", -0.5), ("c", 0.25)]


@pytest.mark.parametrize("weight", [math.nan, math.inf, True, "0.5", None])
def test_weights_are_finite_numbers(base, tools, weight):
    with pytest.raises(UsageError, match="no finite number"):
        base.plan({"layers.0.q.weight": tools.lora(24, 16)}, weights=[weight])


def test_no_adapter_is_no_plan(base):
    with pytest.raises(UsageError, match="no adapter"):
        base.plan()


def test_weight_zero_drops_an_adapter_with_a_note(base, tools):
    plan = base.plan(
        {"layers.0.q.weight": tools.lora(24, 16)}, {"norm.weight": Replace(tools.weights(16))}, weights=[0.0, 1.0]
    )
    assert [step.out for step in plan.steps] == ["norm.weight"]
    assert codes(plan) == {"weight-zero": Verdict.EXACT}
    plan.check()


def test_a_degraded_plan_is_refused_until_its_code_is_allowed(base, tools):
    deltas = {"layers.0.q.weight": tools.lora(24, 16), "elsewhere.weight": tools.lora(24, 16)}
    plan = base.plan(deltas)
    with pytest.raises(Degraded, match="elsewhere") as caught:
        plan.check()
    assert caught.value.hint.endswith("--allow target-missing")
    assert [finding.code for finding in caught.value.findings] == ["target-missing"]
    allowed = base.plan(deltas, allow=["target-missing"])
    allowed.check()
    assert allowed.verdict is Verdict.UNVERIFIED


def test_an_incompatible_plan_is_refused_whatever_is_allowed(base, tools):
    plan = base.plan({"layers.0.q.weight": tools.lora(20, 16)}, allow=["shape-mismatch"])
    with pytest.raises(BaseMismatch, match=r"\[24, 16\]"):
        plan.check()


def test_findings_of_the_header_are_part_of_the_plan(base, tools):
    finding = Finding(code="config-unknown", axis="format", level=Verdict.DEGRADED, message="?", allowable=True)
    plan = base.plan({"layers.0.q.weight": tools.lora(24, 16)}, findings=(finding,))
    assert plan.findings == (finding,)


def test_that_nothing_lands_is_not_said_beside_what_it_follows_from(base, tools):
    cause = Finding(code="config-contradicts-tensors", axis="integrity", level=Verdict.INCOMPATIBLE, message="?")
    assert base.plan({}, findings=(cause,)).findings == (cause,)
    loss = Finding(code="key-unknown", axis="format", level=Verdict.DEGRADED, message="?", allowable=True)
    assert set(codes(base.plan({}, findings=(loss,), allow=["key-unknown"]))) == {"key-unknown", "nothing-lands"}


def test_two_replacements_of_one_parameter_are_refused(base, tools):
    value = {"norm.weight": Replace(tools.weights(16))}
    assert codes(base.plan(value, value)) == {"two-replacements": Verdict.INCOMPATIBLE}
    assert not base.plan(value, {"norm.weight": tools_full(tools)}).findings


def tools_full(tools):
    from lorahub.deltas.full import Full

    return Full(tools.weights(16))


def test_replacements_of_different_bands_of_a_parameter_do_not_collide(tools):
    world = tools.World({"qkv.weight": tools.weights(48, 16)})
    for name, rows in (("q", slice(0, 24)), ("k", slice(24, 48)), ("both", slice(12, 36))):
        target = tools.target(f"{name}.weight")
        piece = Piece(parameter="qkv.weight", of_parameter=Region(rows=rows))
        world.layout[target] = Layout(target=target, pieces=(piece,))
    q, k, both = ({f"{name}.weight": Replace(tools.weights(24, 16))} for name in ("q", "k", "both"))
    assert not world.plan(q, k).findings
    assert "two-replacements" in codes(world.plan(q, both))


def test_a_part_of_a_change_that_looks_at_the_weight_is_noted(base, tools):
    lora = tools.lora(24, 16)
    dora = {"layers.0.q.weight": DoRA(lora.up, lora.down, 1.0, torch.ones(24), 0)}
    assert codes(base.plan(dora, weights=[0.5])) == {"weight-is-linear": Verdict.EXACT}
    assert not base.plan(dora).findings


# --------------------------------------------------------------------------------------------------- heads


def test_a_created_head_is_a_step_with_its_edits(base, tools):
    base.head = Edits(
        config={"num_labels": 3},
        removed=("norm.weight",),
        renamed={"head.weight": "score", "embed.weight": "bert.embed"},
    )
    plan = base.plan({"head.weight": Replace(tools.weights(3, 16)), "layers.0.q.weight": tools.lora(24, 16)})
    step = next(step for step in plan.steps if step.out == "head.weight")
    assert (step.source, step.before, step.saved_as, step.made_whole) == (None, None, "score", True)
    assert (plan.removed, plan.dropped) == (("norm.weight",), ("norm.weight",))
    assert plan.renamed == {"embed.weight": "bert.embed"}
    assert plan.config_edits == {"num_labels": 3}
    assert "norm.weight" not in plan.untouched


def test_a_head_is_taken_whole_whatever_the_weight_and_that_is_said(base, tools):
    base.head = Edits()
    plan = base.plan({"head.weight": Replace(tools.weights(3, 16))}, weights=[0.5])
    assert plan.steps[0].terms[0].weight == 1.0
    assert codes(plan) == {"taken-whole": Verdict.UNVERIFIED}


def test_two_heads_that_need_different_configurations_are_refused(base, tools):
    class Both:
        name = "shelf"

        def __getattr__(self, name):
            return getattr(base, name)

        def edits(self, index, created, hints):
            return Edits(config={"num_labels": next(iter(created.values()))[0][0]})

    from lorahub.engine.planning.plan import plan

    adapters = {
        name: (tools.header({f"{name}.weight": Replace(tools.weights(size, 16))}), 1.0)
        for name, size in (("x", 3), ("y", 4))
    }
    planned = plan(base.index(), Both(), adapters, tools.kinds)
    assert codes(planned) == {"config-conflict": Verdict.INCOMPATIBLE}


def test_one_head_brought_by_two_adapters_is_refused(base, tools):
    base.head = Edits()
    head = {"head.weight": Replace(tools.weights(3, 16))}
    assert codes(base.plan(head, head)) == {"two-replacements": Verdict.INCOMPATIBLE}


def test_a_resized_parameter_that_another_adapter_changes_is_refused(base, tools):
    base.head = Edits()
    resized = {"embed.weight": Replace(tools.weights(60, 16))}
    assert codes(base.plan(resized, {"embed.weight": tools.lora(50, 16)})) == {"two-shapes": Verdict.INCOMPATIBLE}


def test_a_change_to_a_parameter_that_the_new_head_removes_would_be_lost(base, tools):
    base.head = Edits(removed=("norm.weight",))
    plan = base.plan({"head.weight": Replace(tools.weights(3, 16)), "norm.weight": Replace(tools.weights(16))})
    assert codes(plan) == {"target-removed": Verdict.DEGRADED}
    assert [step.out for step in plan.steps] == ["head.weight"]


# --------------------------------------------------------------------------------------------------- ties


@pytest.fixture
def tied(base):
    base.tied = (("embed.weight", "lm_head.weight"),)
    base.config["tie_word_embeddings"] = True
    base.apart = Edits(config={"tie_word_embeddings": False}, copied={"lm_head.weight": "embed.weight"})
    return base


@pytest.mark.parametrize("changed", ["embed.weight", "lm_head.weight"])
def test_a_change_to_one_of_two_tied_names_unties_knowingly(tied, tools, changed):
    plan = tied.plan({changed: tools.lora(50, 16)})
    assert codes(plan) == {"tied-parameter": Verdict.DEGRADED}
    assert "shares its storage" in plan.findings[0].message
    terms = {step.out: len(step.terms) for step in plan.steps}
    expected = {"lm_head.weight": 0} | {changed: 1}
    assert terms == expected
    assert all((step.source, step.stored_as) == ("embed.weight", "embed.weight") for step in plan.steps)
    assert plan.config_edits == {"tie_word_embeddings": False}
    assert tied.asked == [(changed,)]


def test_a_change_to_both_tied_names_loses_nothing(tied, tools):
    plan = tied.plan({"embed.weight": tools.lora(50, 16), "lm_head.weight": tools.lora(50, 16, seed=1)})
    assert not plan.findings
    assert [step.out for step in plan.steps] == ["embed.weight", "lm_head.weight"]


def test_a_change_beside_tied_names_unties_nothing(tied, tools):
    plan = tied.plan({"norm.weight": Replace(tools.weights(16))})
    assert not plan.config_edits
    assert not tied.asked


@pytest.mark.parametrize("changed", ["embed.weight", "lm_head.weight"])
def test_where_no_configuration_can_part_them_the_change_of_one_is_knowingly_that_of_all(tied, tools, changed):
    tied.apart = None
    tied.extras = {"lm_head.weight": tied.tensors["embed.weight"]}
    plan = tied.plan({changed: tools.lora(50, 16)})
    assert codes(plan) == {"tied-parameter": Verdict.DEGRADED}
    assert plan.findings[0].where == (changed,)
    (step,) = plan.steps
    assert (step.out, step.source, len(step.terms)) == ("embed.weight", "embed.weight", 1)
    assert plan.dropped == ("lm_head.weight",)
    assert not plan.config_edits


def test_two_changes_of_ties_that_no_configuration_can_part_are_refused(tied, tools):
    tied.apart = None
    plan = tied.plan({"embed.weight": tools.lora(50, 16), "lm_head.weight": tools.lora(50, 16, seed=1)})
    assert codes(plan) == {"tied-parameter": Verdict.INCOMPATIBLE}


def test_an_outdated_second_copy_of_a_tied_parameter_is_left_out(tied, tools):
    tied.extras = {"lm_head.weight": tied.tensors["embed.weight"], "rope.freqs": tools.weights(4)}
    plan = tied.plan({"embed.weight": tools.lora(50, 16)}, allow=["tied-parameter"])
    assert plan.dropped == ("lm_head.weight",)


# --------------------------------------------------------------------------------------------------- digest, explain


def test_the_digest_follows_what_the_result_depends_on(base, tools):
    deltas = {"layers.0.q.weight": tools.lora(24, 16)}
    digest = base.plan(deltas).digest()
    assert digest.startswith("sha256:")
    assert base.plan(deltas).digest() == digest
    assert base.plan(deltas, weights=[0.5]).digest() != digest
    assert base.plan({"layers.1.q.weight": tools.lora(24, 16)}).digest() != digest
    finding = Finding(code="x", axis="format", level=Verdict.UNVERIFIED, message="y")
    assert base.plan(deltas, findings=(finding,)).digest() == digest


def test_the_document_is_json_and_names_the_pieces(tools):
    world = tools.World({"qkv.weight": tools.weights(48, 16)})
    target = tools.target("q.weight")
    piece = Piece(parameter="qkv.weight", of_parameter=Region(rows=slice(0, 24)))
    world.layout[target] = Layout(target=target, pieces=(piece,))
    document = json.loads(json.dumps(world.plan({"q.weight": tools.lora(24, 16)}).document()))
    (step,) = document["steps"]
    assert step["before"] == step["after"] == {"shape": [48, 16], "dtype": "BF16"}
    assert step["terms"][0]["of_parameter"]["rows"] == {"start": 0, "stop": 24, "step": None}
    assert document["verdict"] == "exact"


def test_explaining_a_plan_tells_every_fact_in_a_column(base, tools):
    base.head = Edits(config={"num_labels": 3, "architectures": ["Classifier"]})
    deltas = {f"layers.{n}.q.weight": tools.lora(24, 16, r=4 + n) for n in (0, 1)}
    deltas |= {"head.weight": Replace(tools.weights(3, 16)), "zz.weight": tools.lora(3, 3)}
    text = base.plan(deltas, weights=[0.8], allow=["target-missing"]).explain()
    assert text.splitlines() == [
        "base         acme/base (shelf)",
        "adapters     a at 0.8",
        "changes      3 targets in 3 parameters",
        "kinds        lora r=4 (1), lora r=5 (1), replace (1)",
        "largest      layers.0.q.weight [24, 16] BF16",
        "writes       3.36 kB, of which 1.63 kB change",
        text.splitlines()[6],
        "untouched    4 parameters, copied as bytes",
        "created      head.weight [3, 16] BF16",
        "config.json  num_labels: absent -> 3",
        "config.json  architectures: ['Base'] -> ['Classifier']",
        "degraded     target-missing: 1 of 4 targets are not in acme/base, first zz.weight. [zz.weight] (allowed)",
        text.splitlines()[12],
    ]
    assert text.splitlines()[12].startswith("unverified   taken-whole: ")
    assert text.splitlines()[6].startswith("memory       about ")


def test_memory_grows_with_threads_and_with_the_copies_that_undo_keeps(tools):
    world = tools.World({f"m.{n}.weight": tools.weights(2048, 2048) for n in range(4)})
    plan = world.plan({name: tools.lora(2048, 2048) for name in world.tensors})
    assert plan.peak_bytes(threads=2) > plan.peak_bytes(threads=1)
    assert plan.peak_bytes(streamed=False) >= 4 * 2048 * 2048 * 2
    assert plan.peak_bytes(threads=2) <= 256 << 20
