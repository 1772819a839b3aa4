"""Where PEFT's result is not the declared one, somebody chooses, and the choice travels: into plans, records, files."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import nn

import lorahub
from lorahub.adapter import load, open_header
from lorahub.bases.index import BaseIndex, BaseRef, ParameterInfo
from lorahub.bases.layout import Target
from lorahub.cli.main import main
from lorahub.deltas.expert_lora import ExpertLoRA
from lorahub.deltas.kind import JSON
from lorahub.deltas.lora import LoRA
from lorahub.deltas.oft import Turn
from lorahub.errors import Incompatible, IntegrityError, UnsupportedKind, UsageError
from lorahub.files.header import Header, TensorInfo
from lorahub.files.writer import save_file
from lorahub.findings import Finding, Verdict
from lorahub.formats.assembly import touches
from lorahub.formats.format import AdapterFiles
from lorahub.formats.peft import PeftFormat
from lorahub.formats.peft.types import TYPES
from lorahub.merging import merge, plan
from lorahub.merging.checking import check
from lorahub.merging.job import PROVENANCE
from lorahub.merging.preparing import prepare
from lorahub.plugins import Registry, load_registry
from lorahub.publishing import record

PREFIX = "base_model.model."
RANK, ALPHA, WIDTH = 2, 3, 8


def numbers(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def write(folder: Path, tensors: Mapping[str, torch.Tensor], **config: JSON) -> Path:
    """A PEFT folder; ``config`` wins over LoRA's of rank 2 and alpha 3."""
    folder.mkdir(parents=True)
    named = {PREFIX + name: tensor for name, tensor in sorted(tensors.items())}
    save_file(folder / "adapter_model.safetensors", named, {"format": "pt"})
    document = {"peft_type": "LORA", "peft_version": "0.21.2", "r": RANK, "lora_alpha": ALPHA, **config}
    (folder / "adapter_config.json").write_text(json.dumps(document))
    return folder


def attention(folder: Path) -> Path:
    """LoRA on a MultiheadAttention, as PEFT 0.21.2 names it: https://github.com/huggingface/peft/pull/3774."""
    tensors = {
        "attn.lora_A.weight": numbers(RANK, WIDTH),
        "attn.lora_B.weight": numbers(3 * WIDTH, RANK),
        "attn.base_layer.out_proj.lora_A.weight": numbers(RANK, WIDTH, seed=1),
        "attn.base_layer.out_proj.lora_B.weight": numbers(WIDTH, RANK, seed=1),
    }
    return write(folder, tensors, target_modules=["attn"])


def base(folder: Path) -> Path:
    folder.mkdir()
    tensors = {"attn.in_proj_weight": numbers(3 * WIDTH, WIDTH, seed=5), "attn.out_proj.weight": numbers(WIDTH, WIDTH)}
    save_file(folder / "model.safetensors", tensors, {"format": "pt"})
    return folder


OUTPUT = Target("", "attn.out_proj", "weight")


def scale_of(adapter: lorahub.Adapter) -> float:
    delta = adapter.deltas[OUTPUT]
    assert isinstance(delta, LoRA)
    return delta.scale


def one(found: tuple[Finding, ...], code: str) -> Finding:
    (finding,) = [each for each in found if each.code == code]
    return finding


# --- the choice ------------------------------------------------------------------------------------------------------


def test_without_a_choice_the_finding_says_what_differs_where_it_is_known_and_what_to_type(
    tmp_path: Path, registry: Registry
) -> None:
    header = open_header(attention(tmp_path / "a"), registry)
    found = one(header.findings, "compat-choice")
    assert (found.level, found.axis, found.allowable) == (Verdict.INCOMPATIBLE, "policy", False)
    assert "1 target" in found.message
    assert "two times over" in found.message
    assert "https://github.com/huggingface/peft/pull/3774" in found.message
    assert "0.21.2" in found.message
    assert found.remedy.startswith("--compat peft (")
    assert "--compat strict (" in found.remedy
    assert all("out_proj" in key for key in found.where)


@pytest.mark.parametrize(("compat", "times"), [("peft", 2), ("strict", 1)])
def test_a_choice_decides_the_scale_and_is_told(compat: str, times: int, tmp_path: Path, registry: Registry) -> None:
    folder = attention(tmp_path / "a")
    adapter = lorahub.load(folder, compat=compat)
    assert scale_of(adapter) == times * ALPHA / RANK
    assert adapter.hints["compat"] == compat
    assert adapter.header is not None
    found = one(adapter.header.findings, "compat-chosen")
    assert (found.level, found.axis) == (Verdict.EXACT, "policy")
    assert found.message.startswith(f"compat {compat} for 1 target")


def test_loading_without_a_choice_stops_with_the_way_to_choose(tmp_path: Path) -> None:
    with pytest.raises(Incompatible, match="nobody chose") as caught:
        lorahub.load(attention(tmp_path / "a"))
    assert "--compat" in caught.value.hint


def test_what_is_no_choice_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="'PEFT'"):
        lorahub.load(attention(tmp_path / "a"), compat="PEFT")
    with pytest.raises(UsageError, match="'both'"):
        prepare(base(tmp_path / "base"), [str(tmp_path / "a")], compat="both")


def test_where_nothing_differs_no_choice_is_asked_for_and_none_is_told(tmp_path: Path) -> None:
    tensors = {"q.lora_A.weight": numbers(RANK, WIDTH), "q.lora_B.weight": numbers(WIDTH, RANK)}
    folder = write(tmp_path / "a", tensors, target_modules=["q"])
    for compat in (None, "peft", "strict"):
        adapter = lorahub.load(folder, compat=compat)
        assert adapter.header is not None
        assert not [each for each in adapter.header.findings if each.code.startswith("compat")]
        assert "compat" not in adapter.hints


def test_a_choice_cannot_be_allowed_away(tmp_path: Path) -> None:
    with pytest.raises(Incompatible, match="compat-choice"):
        merge(base(tmp_path / "base"), [str(attention(tmp_path / "a"))], out=tmp_path / "o", allow=["compat-choice"])
    assert not (tmp_path / "o").exists()


# --- where it travels ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("compat", ["peft", "strict"])
def test_a_merge_records_the_choice_of_each_adapter_that_it_decided(compat: str, tmp_path: Path) -> None:
    adapter, onto = attention(tmp_path / "a"), base(tmp_path / "base")
    plain = write(
        tmp_path / "plain",
        {"attn.out_proj.lora_A.weight": numbers(RANK, WIDTH), "attn.out_proj.lora_B.weight": numbers(WIDTH, RANK)},
        target_modules=["out_proj"],
    )
    merge(onto, {"one": adapter, "two": plain}, out=tmp_path / "out", compat=compat, allow=["base-undeclared"])
    said = json.loads((tmp_path / "out" / PROVENANCE).read_text())
    assert [each.get("compat") for each in said["adapters"]] == [compat, None]
    assert prepare(onto, {"one": adapter}, compat=compat).document()["compat"] == compat


def test_plans_of_the_two_choices_differ_in_nothing_but_the_numbers(tmp_path: Path) -> None:
    adapter, onto = attention(tmp_path / "a"), base(tmp_path / "base")
    peft, strict = (plan(onto, [str(adapter)], compat=compat) for compat in ("peft", "strict"))
    assert [step.out for step in peft.steps] == [step.out for step in strict.steps]
    assert peft.allowed == strict.allowed


def test_check_is_incompatible_without_a_choice_and_accepts_either(tmp_path: Path) -> None:
    adapter, onto = attention(tmp_path / "a"), base(tmp_path / "base")
    report = check(str(adapter), str(onto))
    assert (report.verdict, report.axes["policy"]) == (Verdict.INCOMPATIBLE, Verdict.INCOMPATIBLE)
    for compat in ("peft", "strict"):
        report = check(str(adapter), str(onto), compat=compat)
        assert report.verdict <= Verdict.UNVERIFIED
        assert one(report.findings, "compat-chosen").message.startswith(f"compat {compat}")


def test_an_open_header_keeps_its_choice_when_it_meets_a_base(tmp_path: Path, registry: Registry) -> None:
    header = open_header(attention(tmp_path / "a"), registry, compat="strict")
    job = prepare(base(tmp_path / "base"), {"one": header})
    assert job.headers["one"].files.compat == "strict"
    assert job.verdict <= Verdict.UNVERIFIED
    other = prepare(base(tmp_path / "again"), {"one": header}, compat="peft")
    assert other.headers["one"].reading.hints["compat"] == "peft"


def test_the_record_keeps_the_choice_and_speaks_for_it_until_files_change(tmp_path: Path, registry: Registry) -> None:
    folder = attention(tmp_path / "a")
    assert record(folder).compat is None
    written = record(folder, compat="peft")
    assert written.compat is not None
    assert written.compat.choice == "peft"
    assert scale_of(lorahub.load(folder)) == 2 * ALPHA / RANK
    assert scale_of(lorahub.load(folder, compat="strict")) == ALPHA / RANK  # who asks wins
    assert record(folder).compat == written.compat  # and writing the record anew keeps it
    config = folder / "adapter_config.json"
    config.write_text(config.read_text() + " ")
    assert one(open_header(folder, registry).findings, "compat-choice").level is Verdict.INCOMPATIBLE


def test_a_file_that_names_no_choice_in_its_metadata_is_damaged(tmp_path: Path, registry: Registry) -> None:
    folder = attention(tmp_path / "a")
    path = folder / "adapter_model.safetensors"
    save_file(path, load_file(path), {"format": "pt", "lorahub.compat": "maybe"})
    with pytest.raises(IntegrityError, match="maybe"):
        open_header(folder, registry)


# --- each dispute ----------------------------------------------------------------------------------------------------


def oft(folder: Path, **config: JSON) -> Path:
    """An OFT adapter of PEFT 0.17, which wrote no version: its config.py warns of these since 0.18."""
    tensors = {"q.oft_R.weight": numbers(2, 6)}
    fields: dict[str, JSON] = {"peft_type": "OFT", "peft_version": None, "oft_block_size": 4, "target_modules": ["q"]}
    folder = write(folder, tensors, **fields | config)
    document = json.loads((folder / "adapter_config.json").read_text())
    kept = {name: value for name, value in document.items() if name not in {"lora_alpha", "r"} and value is not None}
    (folder / "adapter_config.json").write_text(json.dumps(kept))
    return folder


def test_an_oft_adapter_from_before_0_18_turns_as_peft_today_or_as_it_was_trained(tmp_path: Path) -> None:
    # https://github.com/huggingface/peft/blob/v0.21.2/src/peft/tuners/oft/config.py; trained by 0.16 or 0.17
    folder = oft(tmp_path / "a")
    with pytest.raises(Incompatible, match="last term of OFT's series"):
        lorahub.load(folder)
    series = {}
    for compat in ("peft", "strict"):
        delta = lorahub.load(folder, compat=compat).deltas[Target("", "q", "weight")]
        assert isinstance(delta, Turn)
        series[compat] = delta.series
    assert series == {"peft": (2.0, 2.0, 2.0, 1.0), "strict": (2.0, 2.0, 2.0, 2.0)}


@pytest.mark.parametrize(
    "config",
    [{"peft_version": "0.18.0"}, {"use_cayley_neumann": False}, {"num_cayley_neumann_terms": 2}],
    ids=["trained by 0.18", "exact", "two terms"],
)
def test_oft_is_no_matter_of_dispute_where_both_releases_turn_alike(
    config: dict[str, JSON], tmp_path: Path, registry: Registry
) -> None:
    assert open_header(oft(tmp_path / "a", **config), registry).findings == ()


def test_the_two_branches_of_oft_are_each_followed_as_trained_though_they_turn_opposite_ways(tmp_path: Path) -> None:
    # PEFT 0.18 to 0.21.2: the same tensors under the other setting are another adapter, so nothing is disputed
    weight = torch.eye(8, dtype=torch.float64)
    turned = []
    for exact in (False, True):
        folder = oft(tmp_path / str(exact), peft_version="0.21.2", use_cayley_neumann=not exact)
        path = folder / "adapter_model.safetensors"
        save_file(path, {name: tensor * 0.02 for name, tensor in load_file(path).items()}, {"format": "pt"})
        turned.append(lorahub.load(folder).deltas[Target("", "q", "weight")].delta(weight))
    series, exact = turned
    assert series.norm() > 1e-2 * weight.norm()
    assert (series + exact).norm() < 0.1 * series.norm()  # equal and opposite but for what is small in the angles


def test_lokr_of_a_conv1d_is_followed_as_peft_trains_and_merges_it(tmp_path: Path, registry: Registry) -> None:
    # PEFT to 0.21.2 multiplies out a whole w2 [b, d, k] along the last axes, in training too: there is one result
    tensors = {"c.lokr_w1": numbers(2, 2), "c.lokr_w2": numbers(3, 2, 3)}
    fields: dict[str, JSON] = {"peft_type": "LOKR", "r": 8, "alpha": 4, "lora_alpha": None, "target_modules": ["c"]}
    folder = write(tmp_path / "a", tensors, **fields)
    config = json.loads((folder / "adapter_config.json").read_text())
    del config["lora_alpha"]
    (folder / "adapter_config.json").write_text(json.dumps(config))
    changes = []
    for compat in (None, "peft", "strict"):
        header = open_header(folder, registry, compat=compat)
        assert not [each for each in header.findings if each.code.startswith("compat")]
        changes.append(load(header, registry).deltas[Target("", "c", "weight")].delta(torch.zeros(6, 4, 3)))
    assert changes[0].norm() > 1e-2
    assert torch.equal(changes[0], changes[1])
    assert torch.equal(changes[0], changes[2])


def test_boft_has_as_many_factors_as_its_tensors_whatever_the_config_says(tmp_path: Path, registry: Registry) -> None:
    # PEFT to 0.21.2 makes one factor where its CUDA extension is missing, and trains, saves and merges that one
    tensors = {"q.boft_R": numbers(1, 2, 4, 4), "q.boft_s": numbers(WIDTH, 1)}
    fields: dict[str, JSON] = {"peft_type": "BOFT", "boft_block_size": 4, "boft_n_butterfly_factor": 2}
    folder = write(tmp_path / "a", tensors, **fields, target_modules=["q"])
    config = json.loads((folder / "adapter_config.json").read_text())
    kept = {name: value for name, value in config.items() if name not in {"r", "lora_alpha"}}
    (folder / "adapter_config.json").write_text(json.dumps(kept))
    for compat in (None, "peft", "strict"):
        header = open_header(folder, registry, compat=compat)
        assert not [each for each in header.findings if each.level > Verdict.EXACT]
        delta = load(header, registry).deltas[Target("", "q", "weight")]
        assert delta.tensors()["blocks"].shape[0] == 1


class Square(nn.Module):
    """A stack of square matrices, stored [E, out, in]."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.Module()
        self.experts.stack = nn.Parameter(numbers(4, WIDTH, WIDTH, seed=9))


@pytest.mark.parametrize("version", ["0.18.1", None])
def test_square_experts_from_before_0_19_are_read_as_peft_today_or_as_they_were_trained(
    version: str | None, tmp_path: Path
) -> None:
    # PEFT 0.17 and 0.18 took every stack for [E, in, out]: https://github.com/unslothai/unsloth-zoo/pull/629
    tensors = {
        "experts.lora_A.weight": numbers(4 * RANK, WIDTH),
        "experts.lora_B.weight": numbers(WIDTH, 4 * RANK),
    }
    fields: dict[str, JSON] = {"target_parameters": ["experts.stack"], "target_modules": [], "peft_version": version}
    folder = write(tmp_path / "a", tensors, **fields)
    found = one(prepare(Square(), {"one": folder}).findings, "compat-choice")
    assert "trained by PEFT 0.17 or 0.18" in found.message
    ways = {}
    for compat in ("peft", "strict"):
        model = Square()
        before = model.experts.stack.detach().clone()
        merge(model, {"one": folder}, compat=compat)
        ways[compat] = model.experts.stack - before
    assert ways["peft"].norm() > 1e-2
    torch.testing.assert_close(ways["peft"].mT, ways["strict"])
    down = tensors["experts.lora_A.weight"].reshape(4, RANK, WIDTH)
    up = tensors["experts.lora_B.weight"].reshape(WIDTH, RANK, 4)
    # what 0.18.1 computes: einsum("o r e, e r i -> e i o")
    trained = torch.einsum("ore,eri->eio", up, down) * ALPHA / RANK
    torch.testing.assert_close(ways["strict"], trained, atol=1e-5, rtol=1e-5)


def test_experts_from_before_0_19_that_are_not_square_are_read_as_they_were_trained(tmp_path: Path) -> None:
    # PEFT 0.21.2 cannot load these at all: the shapes of its own factors are the other way round
    tensors = {"experts.lora_A.weight": numbers(4 * RANK, 6), "experts.lora_B.weight": numbers(5, 4 * RANK)}
    fields: dict[str, JSON] = {"target_parameters": ["experts.stack"], "target_modules": [], "peft_version": "0.18.1"}
    folder = write(tmp_path / "a", tensors, **fields)
    model = Square()
    model.experts.stack = nn.Parameter(numbers(4, 6, 5))
    before = model.experts.stack.detach().clone()
    merge(model, {"one": folder})
    up = tensors["experts.lora_B.weight"].reshape(5, RANK, 4)
    trained = torch.einsum("ore,eri->eio", up, tensors["experts.lora_A.weight"].reshape(4, RANK, 6)) * ALPHA / RANK
    assert trained.norm() > 1e-2 * before.norm()
    torch.testing.assert_close(model.experts.stack - before, trained, atol=1e-5, rtol=1e-5)


# --- what keys leave out ---------------------------------------------------------------------------------------------


def parameters(folder: Path, names: list[JSON], *, depth: int, **config: JSON) -> Path:
    tensors = {}
    for level in range(depth):
        stem = "experts" + ".base_layer" * level
        tensors[f"{stem}.lora_A.weight"] = numbers(4 * RANK, 6, seed=level)
        tensors[f"{stem}.lora_B.weight"] = numbers(5, 4 * RANK, seed=level)
    return write(folder, tensors, target_parameters=names, target_modules=[], **config)


def test_one_parameter_is_known_by_name_without_a_base_and_its_way_round_is_left_open(
    tmp_path: Path, registry: Registry
) -> None:
    adapter = load(open_header(parameters(tmp_path / "a", ["experts.stack"], depth=1), registry), registry)
    ((target, delta),) = adapter.deltas.items()
    assert target == Target("", "experts", "stack")
    assert isinstance(delta, ExpertLoRA)
    assert delta.transposed is None
    assert (delta.up.shape, delta.down.shape) == ((4, 5, RANK), (4, RANK, 6))


def test_parameters_whose_order_only_the_base_knows_ask_for_it(tmp_path: Path, registry: Registry) -> None:
    folder = parameters(tmp_path / "a", ["experts.one", "experts.other"], depth=2)
    header = open_header(folder, registry)
    assert one(header.findings, "base-needed").level is Verdict.UNVERIFIED
    with pytest.raises(Incompatible, match=r"experts\.one|one and other"):
        load(header, registry)


def test_parameters_that_fit_either_way_are_ambiguous_even_with_the_base(tmp_path: Path) -> None:
    folder = parameters(tmp_path / "a", ["experts.one", "experts.other"], depth=2)
    model = nn.Module()
    model.experts = nn.Module()
    model.experts.one, model.experts.other = (nn.Parameter(numbers(4, 5, 6)) for _ in range(2))
    found = one(prepare(model, {"one": folder}).findings, "parameter-ambiguous")
    assert (found.level, found.axis, len(found.where)) == (Verdict.INCOMPATIBLE, "placement", 4)
    assert "one and other in several orders" in found.message


@pytest.mark.parametrize(
    ("names", "depth", "says"),
    [
        (["experts.stack"], 2, "has factors for 2 of its parameters, and target_parameters names stack"),
        (["experts.a", "experts.b"], 1, "has factors for 1 of its parameters, and target_parameters names a, b"),
        ([], 2, "target_parameters names none"),
    ],
)
def test_wrappers_that_the_config_does_not_account_for_are_said(
    names: list[JSON], depth: int, says: str, tmp_path: Path, registry: Registry
) -> None:
    header = open_header(parameters(tmp_path / "a", names, depth=depth), registry)
    assert says in one(header.findings, "base-needed").message


def test_metadata_that_names_no_parameters_is_damaged(tmp_path: Path, registry: Registry) -> None:
    folder = parameters(tmp_path / "a", ["experts.stack"], depth=1)
    path = folder / "adapter_model.safetensors"
    entries = ("1", '{"parameter": 3}', '{"parameter": ""}', '{"parameter": "a", "transposed": 1}')
    for text in ("{", "[]", *(f'{{"experts": {entry}}}' for entry in entries)):
        save_file(path, load_file(path), {"format": "pt", "lorahub.parameters": text})
        with pytest.raises(IntegrityError, match=r"lorahub\.parameters"):
            open_header(folder, registry)


STEMS = (
    "experts",
    "experts.base_layer",
    "experts.base_layer.base_layer",
    "experts.base_layer.out_proj",
    "experts.0.w1",
    "attn",
    "attn.base_layer.out_proj",
    "attn.out_proj",
    "base_layer",
)
SUFFIXES = (
    "lora_A.weight",
    "lora_B.weight",
    "lora_B.bias",
    "lora_embedding_A",
    "lora_magnitude_vector",
    "token_adapter.trainable_tokens_delta",
    "base_layer.bias",
    "lora_A.default.weight",
)
SHAPES = ((8, 4), (4, 8), (2, 4), (6, 0), (4,), (), (1, 2, 3), (8, 8))
FIELDS: Mapping[str, tuple[JSON, ...]] = {
    "target_parameters": (None, [], ["experts.a"], ["a", "b"], ["."], ["experts.a", "experts.b"], "x", 3),
    "target_modules": (None, [], ["attn"], "all-linear", "["),
    "trainable_token_indices": (None, [1, 2], [1, 1], {"experts": [0, 1]}, {"": {}}, "x"),
    "r": (None, 0, 2, -1, "x"),
    "rank_pattern": (None, {"experts.a": 2}, {"(": 1}, 1),
    "peft_version": (None, "0.18.0", "0.21.2", "new"),
    "use_rslora": (None, True, 1),
    "bias": ("none", "all"),
}
METADATA: tuple[dict[str, str], ...] = (
    {},
    {"lorahub.parameters": '{"experts": {"parameter": "a", "transposed": true}}'},
    {"lorahub.parameters": '{"attn": {"parameter": "b", "transposed": null}}'},
    {"lorahub.compat": "peft"},
)
BASE = BaseIndex(
    ref=BaseRef(repo="acme/base"),
    framework="test",
    parameters={
        name: ParameterInfo(shape=shape, dtype="F32", stored_as=name)
        for name, shape in {
            "experts.a": (2, 4, 8),
            "experts.b": (2, 8, 4),
            "experts.none": (0, 4, 4),
            "attn.in_proj_weight": (24, 8),
            "attn.out_proj.weight": (8, 8),
        }.items()
    },
)


@settings(max_examples=300)
@given(
    st.dictionaries(st.tuples(st.sampled_from(STEMS), st.sampled_from(SUFFIXES)), st.sampled_from(SHAPES), min_size=1),
    st.fixed_dictionaries({}, optional={name: st.sampled_from(values) for name, values in FIELDS.items()}),
    st.sampled_from(METADATA),
    st.sampled_from([None, "peft", "strict"]),
    st.sampled_from([None, BASE]),
)
def test_whatever_wrappers_fields_and_metadata_say_every_key_has_a_place_or_the_file_is_refused(
    shapes: Mapping[tuple[str, str], tuple[int, ...]],
    config: Mapping[str, JSON],
    metadata: dict[str, str],
    compat: Any,
    index: BaseIndex | None,
) -> None:
    infos = {f"{PREFIX}{'.'.join(name)}": TensorInfo("F32", shape, 0, 0) for name, shape in shapes.items()}
    header = Header(tensors=infos, metadata=metadata, data_start=0, size=0)
    files = AdapterFiles(
        folder=Path("a"),
        headers={"adapter_model.safetensors": header},
        configs={"adapter_config.json": {"peft_type": "LORA", **config}},
        compat=compat,
    )
    registry = load_registry()
    with suppress(IntegrityError):
        reading = PeftFormat().read(files, tuple(registry.kinds.values()), index)
        placed = [ref.key for group in reading.groups for ref in group.slots.values()]
        said = {key for finding in reading.findings for key in finding.where}
        assert len(placed) == len(set(placed))
        assert infos.keys() <= said | set(placed)
        touches(reading.groups, registry.kinds)


# --- what no choice helps --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("compat", [None, "peft", "strict"])
@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"use_qalora": True}, "averaged in groups"),
    ],
    ids=["QALoRA"],
)
def test_what_is_no_one_change_of_weights_is_refused_by_name_whatever_is_chosen(
    fields: dict[str, JSON], says: str, compat: Any, tmp_path: Path, registry: Registry
) -> None:
    tensors = {"q.lora_A.weight": numbers(RANK, WIDTH), "q.lora_B.weight": numbers(WIDTH, RANK)}
    header = open_header(write(tmp_path / "a", tensors, target_modules=["q"], **fields), registry, compat=compat)
    found = one(header.findings, "config-refused")
    assert (found.level, found.allowable, found.where) == (Verdict.INCOMPATIBLE, False, tuple(fields))
    assert says in found.message
    with pytest.raises(UnsupportedKind, match=next(iter(fields))):
        load(header, registry)


@pytest.mark.parametrize(
    ("fields", "name", "says"),
    [
        ({"alora_invocation_tokens": [1, 2]}, "alora", "after an invocation string"),
        ({"arrow_config": {"top_k": 2}}, "arrow", "depends on the input"),
    ],
    ids=["aLoRA", "Arrow"],
)
def test_factors_that_act_on_some_tokens_only_are_a_part_and_no_lora(
    fields: dict[str, JSON], name: str, says: str, tmp_path: Path, registry: Registry
) -> None:
    tensors = {"q.lora_A.weight": numbers(RANK, WIDTH), "q.lora_B.weight": numbers(WIDTH, RANK)}
    folder = write(tmp_path / "a", tensors, target_modules=["q"], **fields)
    header = open_header(folder, registry)
    (part,) = header.reading.parts.values()
    assert (part.kind, len(part.tensors), header.kinds) == (name, 2, ())
    assert says in one(header.findings, "kind-unsupported").message
    with pytest.raises(UnsupportedKind, match="cannot be merged"):
        load(header, registry)
    assert record(folder).kinds == (name,)


@pytest.mark.parametrize("tag", ["XLORA", "POLY", "LILY", "SHADOW", "ADAPTION_PROMPT", "PREFIX_TUNING"])
def test_what_is_no_weight_change_is_a_part_under_either_choice(tag: str, tmp_path: Path, registry: Registry) -> None:
    for compat in ("peft", "strict"):
        folder = write(tmp_path / compat, {"q.router.weight": numbers(2, 2)}, peft_type=tag)
        header = open_header(folder, registry, compat=compat)
        assert list(header.reading.parts) == [TYPES[tag].part]
        assert one(header.findings, "kind-unsupported").level is Verdict.INCOMPATIBLE


# --- the command line ------------------------------------------------------------------------------------------------


def run(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> tuple[int, str, str]:
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return int(stop.value.code or 0), captured.out, captured.err


def test_the_command_line_asks_takes_the_choice_and_records_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LORAHUB_CACHE", str(tmp_path / "cache"))
    adapter, onto, out = attention(tmp_path / "a"), base(tmp_path / "base"), tmp_path / "out"
    code, _, said = run(capsys, "check", adapter, "--base", onto)
    assert code == 4
    assert "compat-choice" in said
    code, _, said = run(capsys, "merge", adapter, "--base", onto, "-o", out)
    assert code == 4
    assert "--compat peft" in said
    assert not out.exists()
    code, _, said = run(capsys, "merge", adapter, "--base", onto, "-o", out, "--compat", "maybe")
    assert code == 2
    code, answer, _ = run(capsys, "check", adapter, "--base", onto, "--compat", "strict", "--json")
    assert code == 0
    assert "compat-chosen" in {each["code"] for each in json.loads(answer)["findings"]}
    code, _, said = run(capsys, "merge", adapter, "--base", onto, "-o", out, "--compat", "peft")
    assert code == 0, said
    assert json.loads((out / PROVENANCE).read_text())["adapters"][0]["compat"] == "peft"
    code, _, said = run(capsys, "record", adapter, "--compat", "peft")
    assert code == 0, said
    assert json.loads((adapter / "lorahub.json").read_text())["compat"] == {"choice": "peft"}
    assert run(capsys, "check", adapter, "--base", onto)[0] == 0
