"""Kohya's and LyCORIS's spelling: names through the base, scales by the rules, every key placed or named."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import lorahub
from lorahub.adapter import Adapter, load, open_header, save
from lorahub.bases.index import BaseIndex, BaseRef, ParameterInfo
from lorahub.bases.layout import Target
from lorahub.bases.torch_module import TorchModule
from lorahub.deltas.delta import Delta
from lorahub.deltas.dora import DoRA
from lorahub.deltas.full import Full
from lorahub.deltas.kind import JSON, Kind
from lorahub.deltas.lokr import LoKr
from lorahub.deltas.lora import LoRA
from lorahub.errors import CannotCarry, IntegrityError, UnsupportedFormat, UnsupportedKind
from lorahub.files.header import Header, TensorInfo, read_header
from lorahub.files.writer import save_file
from lorahub.findings import Finding, Verdict
from lorahub.formats.assembly import account, touches
from lorahub.formats.format import AdapterFiles, Reading
from lorahub.formats.kohya import KohyaFormat
from lorahub.plugins import Registry

STEM = "lora_unet_mid_to_q"
PAIR = {"lora_down.weight": (2, 4), "lora_up.weight": (6, 2)}


@pytest.fixture
def kinds(registry: Registry) -> tuple[Kind, ...]:
    return tuple(registry.kinds.values())


class Folder:
    """One weights file: shapes are filled with random numbers, numbers become 0-d tensors."""

    def __init__(self, folder: Path, registry: Registry) -> None:
        self.path = folder / "weights.safetensors"
        self.registry = registry

    def fill(self, entries: Mapping[str, Sequence[int] | float], metadata: Mapping[str, str] | None = None) -> Path:
        generator = torch.Generator().manual_seed(0)
        tensors = {
            key: torch.tensor(entry) if isinstance(entry, float) else torch.randn(tuple(entry), generator=generator)
            for key, entry in entries.items()
        }
        save_file(self.path, tensors, dict(metadata or {}))
        return self.path.parent

    def read(
        self,
        entries: Mapping[str, Sequence[int] | float],
        metadata: Mapping[str, str] | None = None,
        index: BaseIndex | None = None,
        *,
        stem: str = f"{STEM}.",
    ) -> Reading:
        self.fill({stem + name: entry for name, entry in entries.items()}, metadata)
        header = read_header(self.path)
        files = AdapterFiles(folder=self.path.parent, headers={self.path.name: header}, configs={})
        reading = KohyaFormat().read(files, tuple(self.registry.kinds.values()), index)
        account(reading, header)
        return reading


@pytest.fixture
def weights(tmp_path: Path, registry: Registry) -> Folder:
    return Folder(tmp_path, registry)


def finding(reading: Reading, code: str) -> Finding:
    (found,) = [each for each in reading.findings if each.code == code]
    return found


def base(*names: str, component: str = "") -> BaseIndex:
    return BaseIndex(
        ref=BaseRef(repo="acme/base"),
        framework="test",
        parameters={
            f"{component}:{name}" if component else name: ParameterInfo(shape=(6, 4), dtype="F32", stored_as=name)
            for name in names
        },
    )


# --- names -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prefix", "component"),
    [
        ("lora_unet", "unet"),
        ("lora_te", "text_encoder"),
        ("lora_te1", "text_encoder"),
        ("lora_te2", "text_encoder_2"),
        ("lora_te3", "text_encoder_3"),
        ("lora_transformer", "transformer"),
        ("lycoris", ""),
    ],
)
def test_the_prefix_names_the_component_and_a_module_stays_as_spelled_without_a_base(
    weights: Folder, prefix: str, component: str
) -> None:
    reading = weights.read(PAIR, stem=f"{prefix}_mid_to_q.")
    (group,) = reading.groups
    assert (group.component, group.module, group.kind) == (component, "mid_to_q", "lora")


def test_of_two_components_those_that_a_bare_model_could_be_find_their_names_and_stay_apart(
    weights: Folder, registry: Registry
) -> None:
    shapes = {f"{stem}.{name}": shape for stem in (STEM, "lora_te_layers_0_q") for name, shape in PAIR.items()}
    reading = weights.read(shapes, index=base("mid.to_q.weight"), stem="")
    assert {(group.component, group.module) for group in reading.groups} == {
        ("unet", "mid.to_q"),
        ("text_encoder", "layers_0_q"),
    }
    reading = weights.read(shapes, index=base("mid.to_q.weight", "layers.0.q.weight"), stem="")
    assert {(group.component, group.module) for group in reading.groups} == {
        ("unet", "mid.to_q"),
        ("text_encoder", "layers.0.q"),
    }


def test_lengths_that_diffusers_leaves_under_pefts_name_are_those_of_the_rows(weights: Folder) -> None:
    square = {"lora_unet_mid_to_q.lora_down.weight": (2, 4), "lora_unet_mid_to_q.lora_up.weight": (4, 2)}
    reading = weights.read({**square, "lora_unet_mid_to.q.lora_magnitude_vector": (4,)}, stem="")
    (group,) = reading.groups
    assert (group.module, group.kind, group.options["axis"]) == ("mid_to_q", "dora", 0)
    assert not reading.findings


def test_a_bias_of_the_upper_factor_is_scaled_like_it_and_never_written(
    weights: Folder, kinds: tuple[Kind, ...], tmp_path: Path
) -> None:
    reading = weights.read({**PAIR, "lora_up.bias": (6,), "alpha": 1.0})
    (group,) = reading.groups
    assert (group.kind, group.options["scale"], group.slots["bias"].key) == ("lora", 0.5, f"{STEM}.lora_up.bias")
    deltas: dict[Target, Delta] = {
        Target("unet", "mid.to_q", "weight"): LoRA(torch.randn(6, 2), torch.randn(2, 4), 0.5),
        Target("unet", "mid.to_q", "bias"): Full(torch.randn(6), 0.5),
    }
    with pytest.raises(CannotCarry):
        KohyaFormat().write(deltas, kinds, {})


def test_a_base_turns_underscores_back_into_its_own_dots_only(weights: Folder) -> None:
    index = base("mid.to_q.weight", "other.mid_to.q.weight")
    assert weights.read(PAIR, index=index).groups[0].module == "mid.to_q"
    pipeline = base("mid.to_q.weight", component="unet")
    (group,) = weights.read(PAIR, index=pipeline).groups
    assert (group.component, group.module) == ("unet", "mid.to_q")


def test_one_part_of_a_pipeline_fits_a_bare_model_of_that_part(weights: Folder) -> None:
    (group,) = weights.read(PAIR, index=base("mid.to_q.weight")).groups
    assert (group.component, group.module) == ("", "mid.to_q")


def test_a_module_that_the_bare_model_lacks_is_of_the_part_that_the_others_are(weights: Folder) -> None:
    """So that it is said to be missing, and not to belong to another part."""
    shapes = {f"{stem}.{name}": shape for stem in (STEM, "lora_unet_mid_to_k") for name, shape in PAIR.items()}
    reading = weights.read(shapes, index=base("mid.to_q.weight"), stem="")
    assert {(group.component, group.module) for group in reading.groups} == {("", "mid.to_q"), ("", "mid_to_k")}


def test_a_bare_model_without_the_names_or_a_file_of_two_parts_keeps_its_components(weights: Folder) -> None:
    (group,) = weights.read(PAIR, index=base("up.to_q.weight")).groups
    assert (group.component, group.module) == ("unet", "mid_to_q")
    both = {f"{stem}.{name}": shape for stem in (STEM, "lora_te_fc1") for name, shape in PAIR.items()}
    reading = weights.read(both, index=base("mid.to_q.weight", "fc1.weight"), stem="")
    assert {group.component for group in reading.groups} == {"unet", "text_encoder"}


def test_kohyas_unet_is_the_transformer_of_a_pipeline_that_has_one(weights: Folder) -> None:
    (group,) = weights.read(PAIR, index=base("mid.to_q.weight", component="transformer")).groups
    assert (group.component, group.module) == ("transformer", "mid.to_q")


def test_a_name_that_means_two_modules_of_the_base_is_refused_and_not_guessed(weights: Folder) -> None:
    reading = weights.read(PAIR, index=base("mid.to_q.weight", "mid_to.q.weight"))
    found = finding(reading, "module-ambiguous")
    assert found.level is Verdict.INCOMPATIBLE
    assert "mid.to_q and mid_to.q" in found.message


def test_prefixes_are_told_apart_whatever_the_module_is_called(weights: Folder) -> None:
    reading = weights.read(PAIR, stem="lora_te1_text_model_fc1.")
    assert (reading.groups[0].component, reading.groups[0].module) == ("text_encoder", "text_model_fc1")


# --- scales ----------------------------------------------------------------------------------------------------------


def test_alpha_over_rank_is_the_scale_and_its_rule_is_kept(weights: Folder) -> None:
    (group,) = weights.read({**PAIR, "alpha": 1.0}).groups
    assert {name: group.options[name] for name in ("scale", "scale_rule", "alpha", "rank")} == {
        "scale": 0.5,
        "scale_rule": "alpha/r",
        "alpha": 1.0,
        "rank": 2,
    }


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int64])
@pytest.mark.parametrize("shape", [(), (1,)])
def test_alpha_is_read_without_torch_whatever_its_dtype(
    tmp_path: Path, kinds: tuple[Kind, ...], dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    tensors = {f"{STEM}.{name}": torch.zeros(each) for name, each in PAIR.items()}
    save_file(tmp_path / "a.safetensors", {**tensors, f"{STEM}.alpha": torch.full(shape, 3, dtype=dtype)}, {})
    files = AdapterFiles(
        folder=tmp_path, headers={"a.safetensors": read_header(tmp_path / "a.safetensors")}, configs={}
    )
    (group,) = KohyaFormat().read(files, kinds, None).groups
    assert group.options["scale"] == 1.5


def test_without_an_alpha_the_scale_is_one(weights: Folder) -> None:
    reading = weights.read(PAIR)
    assert (reading.groups[0].options["scale"], reading.groups[0].options["scale_rule"]) == (1.0, "default")
    assert reading.findings == ()


@pytest.mark.parametrize("alpha", [0.0, float("nan")])
def test_an_alpha_of_zero_or_nan_is_taken_for_missing_and_said(weights: Folder, alpha: float) -> None:
    reading = weights.read({**PAIR, "alpha": alpha})
    assert reading.groups[0].options["scale"] == 1.0
    assert finding(reading, "alpha-void").where == (f"{STEM}.alpha",)
    adapter = load(open_header(weights.path, weights.registry), weights.registry)
    assert [delta.kind for delta in adapter.deltas.values()] == ["lora"]


def test_an_alpha_of_infinity_or_of_several_numbers_is_refused(weights: Folder) -> None:
    assert finding(weights.read({**PAIR, "alpha": float("inf")}), "slot-misfit").level is Verdict.INCOMPATIBLE
    with pytest.raises(IntegrityError, match=r"alpha should be a single number, not F32 \[2\]"):
        weights.read({**PAIR, "alpha": (2,)})


def test_of_an_alpha_in_eight_bits_the_dtype_is_named_and_not_its_size(weights: Folder) -> None:
    tensors = {STEM + "." + name: torch.ones(shape) for name, shape in PAIR.items()}
    save_file(weights.path, {**tensors, STEM + ".alpha": torch.tensor(1.0).to(torch.float8_e5m2)}, {})
    with pytest.raises(IntegrityError, match="stored as F8_E5M2") as caught:
        open_header(weights.path.parent, weights.registry)
    assert "single number" not in caught.value.message
    assert "F32" in caught.value.hint


@pytest.mark.parametrize(("entries", "says"), [({"alpha": 8.0}, "says 8"), ({}, "has no alpha, which means 2")])
def test_a_header_that_states_another_alpha_is_an_error_with_both_numbers(
    weights: Folder, entries: dict[str, float], says: str
) -> None:
    reading = weights.read({**PAIR, **entries}, {"ss_network_alpha": "16", "ss_network_module": "networks.lora"})
    found = finding(reading, "alpha-conflict")
    assert (found.level, found.axis) == (Verdict.INCOMPATIBLE, "integrity")
    assert "says 16" in found.message
    assert says in found.message


@pytest.mark.parametrize(
    "metadata",
    [
        {"ss_network_alpha": "8.003"},
        {"ss_network_alpha": "None"},
        {"ss_network_alpha": "Dynamic"},
        {"ss_network_alpha": "16", "ss_network_args": '{"conv_alpha": "1"}'},
        {"ss_network_alpha": "16", "ss_network_module": "lycoris.kohya"},
    ],
)
def test_a_header_that_states_no_one_alpha_for_all_contradicts_nothing(
    weights: Folder, metadata: dict[str, str]
) -> None:
    assert weights.read({**PAIR, "alpha": 8.0}, metadata).findings == ()


def test_a_lokr_of_two_whole_matrices_is_not_scaled_whatever_alpha_says(weights: Folder) -> None:
    (group,) = weights.read({"lokr_w1": (2, 2), "lokr_w2": (3, 2), "alpha": 5.0}).groups
    assert (group.options["scale"], group.options["scale_rule"], group.options["alpha"]) == (1.0, "absolute", 5.0)
    (group,) = weights.read({"lokr_w1": (2, 2), "lokr_w2_a": (3, 2), "lokr_w2_b": (2, 2), "alpha": 5.0}).groups
    assert group.options["scale"] == 2.5


# --- DoRA ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("out", "width", "shape", "axis"),
    [
        (6, 4, (6, 1), 0),
        (6, 4, (1, 4), 1),
        (6, 4, (6,), 0),
        (6, 4, (4,), 1),
        (4, 4, (4, 1), 0),
        (4, 4, (1, 4), 1),
    ],
)
def test_the_axis_of_dora_is_read_from_the_shape_of_its_lengths(
    weights: Folder, out: int, width: int, shape: tuple[int, ...], axis: int
) -> None:
    entries = {"lora_down.weight": (2, width), "lora_up.weight": (out, 2), "dora_scale": shape}
    (group,) = weights.read(entries).groups
    assert (group.kind, group.options["axis"]) == ("dora", axis)


def test_the_axis_of_dora_beside_a_convolution_is_read_too(weights: Folder) -> None:
    entries = {"lora_down.weight": (2, 4, 3, 3), "lora_up.weight": (6, 2, 1, 1), "dora_scale": (1, 4, 1, 1)}
    assert weights.read(entries).groups[0].options["axis"] == 1


@pytest.mark.parametrize(
    ("out", "shape", "text"), [(4, (4,), "rows or of the columns"), (6, (5, 1), "fits neither"), (6, (1, 6), "neither")]
)
def test_lengths_that_fit_both_axes_or_none_are_refused(
    weights: Folder, out: int, shape: tuple[int, ...], text: str
) -> None:
    entries = {"lora_down.weight": (2, 4), "lora_up.weight": (out, 2), "dora_scale": shape}
    reading = weights.read(entries)
    assert text in finding(reading, "slot-misfit").message
    assert reading.groups == ()


# --- every key -------------------------------------------------------------------------------------------------------


def test_differences_and_norms_change_their_parameters_without_a_scale(weights: Folder) -> None:
    entries = {**PAIR, "alpha": 1.0, "diff_b": (6,)}
    reading = weights.read(entries)
    assert [(group.kind, group.parameter) for group in reading.groups] == [("lora", "weight"), ("full", "bias")]
    reading = weights.read({"w_norm": (6,), "b_norm": (6,)})
    assert {(group.kind, group.parameter) for group in reading.groups} == {("full", "weight"), ("full", "bias")}
    adapter = load(open_header(weights.path, weights.registry), weights.registry)
    assert [delta.scale for delta in adapter.deltas.values() if isinstance(delta, Full)] == [1.0, 1.0]
    reading = weights.read({"diff": (6, 4), "alpha": 4.0})
    assert finding(reading, "alpha-unused").level is Verdict.EXACT


def test_a_core_between_the_factors_makes_it_locon(weights: Folder) -> None:
    entries = {"lora_down.weight": (2, 4, 1, 1), "lora_mid.weight": (2, 2, 3, 3), "lora_up.weight": (6, 2, 1, 1)}
    reading = weights.read({**entries, "alpha": 1.0})
    assert [(group.kind, group.options["scale"]) for group in reading.groups] == [("locon", 0.5)]
    assert reading.findings == ()


def test_a_module_with_factors_and_a_whole_difference_of_the_same_weight_is_refused(weights: Folder) -> None:
    weights.read({**PAIR, "diff": (6, 4)})
    with pytest.raises(IntegrityError, match="parameter-twice"):
        load(open_header(weights.path, weights.registry), weights.registry)


@pytest.mark.parametrize(
    ("entries", "text"),
    [
        ({"oft_diag": (2, 3, 3)}, "LyCORIS OFT of a release before 2.0"),
        ({"q_layer.weight": (2, 4), "p_layer.weight": (6, 2), "lambda_layer": (1, 2), "alpha": 1.0}, "T-LoRA"),
        ({"oft_R.weight": (2, 1), "dora_scale": (6, 1), "initial_norm": (6, 1)}, "DoRA over OneTrainer's OFT"),
        ({"oft_R.weight": (2, 1), "oft_R.cans_exp": (0,)}, "Newton-Schulz"),
        ({**PAIR, "reshape_weight": (2,)}, "another shape"),
    ],
)
def test_what_is_not_read_is_refused_by_its_name(
    weights: Folder, entries: dict[str, tuple[int, ...]], text: str
) -> None:
    reading = weights.read(entries)
    found = finding(reading, "kind-unsupported")
    assert found.level is Verdict.INCOMPATIBLE
    assert text in found.message
    assert len(found.where) == len(entries)
    with pytest.raises(UnsupportedKind, match="no installed kind reads"):
        load(open_header(weights.path, weights.registry), weights.registry)


def test_an_unknown_key_is_named_and_may_be_left_out(weights: Folder) -> None:
    reading = weights.read({**PAIR, "unheard_of": (3,)})
    assert len(reading.groups) == 1
    found = finding(reading, "key-unknown")
    assert (found.where, found.allowable) == ((f"{STEM}.unheard_of",), True)
    reading = weights.read({f"{STEM}.{name}": shape for name, shape in PAIR.items()} | {"emb_params": (2,)}, stem="")
    assert finding(reading, "key-unknown").where == ("emb_params",)


@pytest.mark.parametrize(
    ("entries", "code", "text"),
    [
        ({"lora_down.weight": (2, 4), "alpha": 1.0}, "slot-missing", "without lora_up.weight"),
        ({"alpha": 1.0}, "slot-missing", "no factors"),
        ({"lora_down.weight": (2, 4), "lora_up.weight": (6, 3)}, "slot-misfit", "r is 2 elsewhere, 3 here"),
        ({"lora_down.weight": (0, 4), "lora_up.weight": (6, 0)}, "slot-misfit", "is empty"),
        ({"lokr_w1": (2, 2), "lokr_w2_a": (3, 2)}, "slot-misfit", "makes none"),
        ({**PAIR, "hada_w1_a": (2, 2)}, "slot-missing", "no kind has together"),
    ],
)
def test_tensors_that_make_no_whole_are_findings_with_all_their_keys(
    weights: Folder, entries: dict[str, tuple[int, ...] | float], code: str, text: str
) -> None:
    reading = weights.read(entries)
    found = finding(reading, code)
    assert found.level is Verdict.INCOMPATIBLE
    assert text in found.message
    assert len(found.where) == len(entries)
    assert reading.groups == ()


# --- recognition -----------------------------------------------------------------------------------------------------


def test_kohya_claims_its_own_and_no_other(weights: Folder, registry: Registry) -> None:
    folder = weights.fill({f"{STEM}.{name}": shape for name, shape in PAIR.items()})
    assert open_header(folder, registry).format == "kohya"
    header = read_header(weights.path)
    peft: dict[str, JSON] = {"peft_type": "LORA"}
    beside = AdapterFiles(folder=folder, headers={"a": header}, configs={"adapter_config.json": peft})
    alone = AdapterFiles(folder=folder, headers={"a": header}, configs={})
    assert KohyaFormat().claims(beside) == KohyaFormat().claims(alone) is not None
    for key in ("base_model.model.q.lora_A.weight", "unet.mid.to_q.lora_A.weight", "lora_unet_q", "unet:0:up"):
        weights.fill({key: (2, 2)})
        files = AdapterFiles(folder=folder, headers={"a": read_header(weights.path)}, configs={})
        assert KohyaFormat().claims(files) is None


def test_among_several_adapters_in_a_folder_the_user_is_asked(weights: Folder, registry: Registry) -> None:
    folder = weights.fill({f"{STEM}.{name}": shape for name, shape in PAIR.items()})
    (folder / "second.safetensors").write_bytes(weights.path.read_bytes())
    with pytest.raises(UnsupportedFormat, match=r"second\.safetensors, weights\.safetensors") as caught:
        open_header(folder, registry)
    assert f"{folder / 'second.safetensors'}," in caught.value.hint
    assert "weight_name='second.safetensors'" in caught.value.hint
    assert open_header(folder, registry, weight_name="second.safetensors").reading.file == "second.safetensors"


# --- writing ---------------------------------------------------------------------------------------------------------


def _lora(scale: float = 0.7, *, out: int = 6) -> LoRA:
    generator = torch.Generator().manual_seed(1)
    return LoRA(torch.randn(out, 2, generator=generator), torch.randn(2, 4, generator=generator), scale)


def test_what_is_saved_reads_back_with_dots_and_all(tmp_path: Path, registry: Registry) -> None:
    lora = _lora()
    deltas: dict[Target, Delta] = {
        Target("unet", "mid.to_q", "weight"): lora,
        Target("unet", "mid.to_q", "bias"): Full(torch.ones(6)),
        Target("text_encoder", "fc_1.x", "weight"): DoRA(lora.up, lora.down, 0.5, torch.ones(4), 1),
        Target("text_encoder_2", "fc1", "weight"): LoKr(1.0, w1=torch.ones(2, 2), w2=torch.ones(3, 2)),
        Target("", "plain", "weight"): _lora(1.0),
    }
    folder = save(Adapter(deltas=deltas), tmp_path / "out", registry=registry, format="kohya")
    header = open_header(folder, registry)
    assert header.findings == ()
    again = load(header, registry).deltas
    assert set(again) == set(deltas)
    written = read_header(folder / "lora.safetensors")
    assert {key.partition(".")[0] for key in written.tensors} == {
        "lora_unet_mid_to_q",
        "lora_te1_fc_1_x",
        "lora_te2_fc1",
        "lycoris_plain",
    }
    assert written.tensors["lora_te1_fc_1_x.dora_scale"].shape == (1, 4)
    assert written.tensors["lora_unet_mid_to_q.alpha"].dtype == "F64"  # 1.4 is no float32
    assert written.tensors["lycoris_plain.alpha"].dtype == "F32"
    assert again[Target("unet", "mid.to_q", "weight")].scale == 0.7  # type: ignore[attr-defined]


def test_an_alpha_beside_factors_of_eight_bits_is_stored_wider(tmp_path: Path, registry: Registry) -> None:
    lora = _lora()
    short = LoRA(lora.up.to(torch.float8_e4m3fn), lora.down.to(torch.float8_e4m3fn), 1.0)
    target = Target("unet", "mid.to_q", "weight")
    folder = save(Adapter(deltas={target: short}), tmp_path / "out", registry=registry, format="kohya")
    stored = {
        key.rpartition(".")[2]: info.dtype for key, info in read_header(folder / "lora.safetensors").tensors.items()
    }
    assert stored == {"alpha": "F32", "weight": "F8_E4M3"}
    again = load(open_header(folder, registry), registry).deltas[target]
    assert isinstance(again, LoRA)
    assert again.scale == 1.0
    assert torch.equal(again.up.float(), short.up.float())


def test_a_saved_file_keeps_its_prefix_and_what_it_says_of_its_base(weights: Folder, tmp_path: Path) -> None:
    said = {"modelspec.architecture": "stable-diffusion-xl-v1-base/lora", "ss_network_dim": "2"}
    stem = "lora_te1_fc1."
    folder = weights.fill({stem + name: shape for name, shape in PAIR.items()}, said)
    adapter = load(open_header(folder, weights.registry), weights.registry)
    again = save(adapter, tmp_path / "again", registry=weights.registry, format="kohya")
    header = read_header(again / "lora.safetensors")
    assert all(key.startswith(stem) for key in header.tensors)
    assert header.metadata["modelspec.architecture"] == said["modelspec.architecture"]
    assert "ss_network_dim" not in header.metadata


@pytest.mark.parametrize(
    ("deltas", "text"),
    [
        ({Target("unet", "a.b", "weight"): _lora(), Target("unet", "a_b", "weight"): _lora()}, "would also mean a.b"),
        ({Target("vae", "q", "weight"): _lora()}, "no prefix for the component 'vae'"),
        ({Target("unet", "q", "weight"): Full(torch.ones(6, 4), 0.5)}, "without a scale: unet:q.weight"),
        ({Target("unet", "q", "weight"): _lora(0.0)}, "no alpha over rank 2 gives the scale 0.0"),
        ({Target("unet", "q", "position"): Full(torch.ones(6))}, "no word for a difference on position"),
        ({Target("unet", "q", "weight"): LoKr(0.5, w1=torch.ones(2, 2), w2=torch.ones(3, 2))}, "has no scale here"),
    ],
)
def test_what_has_no_spelling_is_refused_with_its_targets(
    kinds: tuple[Kind, ...], deltas: dict[Target, Delta], text: str
) -> None:
    with pytest.raises(CannotCarry, match=text.replace("(", r"\(")) as refusal:
        KohyaFormat().write(deltas, kinds, {})
    assert all(target.name in refusal.value.message for target in list(deltas)[1:])


def test_a_list_of_names_that_the_keys_do_not_spell_is_refused(weights: Folder) -> None:
    with pytest.raises(IntegrityError, match=r"lora_unet_mid_to_q for 'elsewhere'"):
        weights.read(PAIR, {"lorahub.modules": json.dumps({STEM: "elsewhere"})})
    with pytest.raises(IntegrityError, match="cannot be read"):
        weights.read(PAIR, {"lorahub.modules": "{"})


def test_a_file_is_inspected_without_torch(weights: Folder) -> None:
    entries = {f"{STEM}.{name}": shape for name, shape in PAIR.items()}
    folder = weights.fill({**entries, f"{STEM}.alpha": 1.0})
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "from lorahub.adapter import open_header; from lorahub.plugins import load_registry\n"
        f"print([group.options['scale'] for group in open_header({str(folder)!r}, load_registry()).reading.groups])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr) == ("[0.5]\n", "")


# --- all the way -----------------------------------------------------------------------------------------------------


def test_a_plain_module_is_found_through_its_own_names_and_merged(weights: Folder) -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.to_q = nn.Linear(4, 6)

    model = nn.ModuleDict({"mid": Block()})
    index = TorchModule().index_model(model, BaseRef())
    folder = weights.fill({f"{STEM}.{name}": shape for name, shape in PAIR.items()} | {f"{STEM}.alpha": 1.0})
    header = open_header(folder, weights.registry, index=index)
    assert [target.name for target in header.touches] == ["mid.to_q.weight"]
    (delta,) = load(header, weights.registry).deltas.values()
    weight = model["mid"].to_q.weight.detach().clone()
    expected = weight + delta.delta(weight)
    found = load(header, weights.registry)
    again = open_header(save(found, folder / "again", registry=weights.registry, format="kohya"), weights.registry)
    assert list(again.touches) == list(header.touches)
    lorahub.merge(model, [str(folder)])
    torch.testing.assert_close(model["mid"].to_q.weight.detach(), expected, rtol=0, atol=1e-6)
    assert not torch.equal(weight, expected)


# --- whatever the file holds -----------------------------------------------------------------------------------------

PIECES = st.sampled_from(
    [
        *("lora_unet_q", "lora_te_q", "lycoris_q", "lora_unet_", "q", "alpha", "diff", "diff_b", "w_norm", "weight"),
        *("lora_down", "lora_up", "lora_mid", "dora_scale", "oft_blocks", "on_input", "lokr_w1", "lokr_w2", "lokr_t2"),
        *("lokr_w1_a", "lokr_w1_b", "lokr_w2_a", "lokr_w2_b", "hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"),
    ]
)
SHAPES = st.lists(st.integers(0, 4), max_size=4).map(tuple)


@settings(max_examples=150)
@given(
    shapes=st.dictionaries(st.lists(PIECES, min_size=1, max_size=4).map(".".join), SHAPES, max_size=6),
    named=st.booleans(),
)
def test_whatever_the_names_and_shapes_are_every_key_is_placed_or_named(
    registry: Registry, shapes: dict[str, tuple[int, ...]], named: bool
) -> None:
    shapes = shapes | {"lora_unet_k.lora_down.weight": (2, 4)}
    header = Header(
        tensors={key: TensorInfo("F32", shape, 0, 0) for key, shape in shapes.items()},
        metadata={},
        data_start=0,
        size=0,
    )
    numbers = dict.fromkeys(shapes, b"\0\0\x80\x3f")
    files = AdapterFiles(folder=Path("none"), headers={"a": header}, configs={}, numbers={"a": numbers})
    index = base("q.weight", "k.weight") if named else None
    reader, kinds = KohyaFormat(), tuple(registry.kinds.values())
    if any(key.endswith((".alpha", ".on_input")) and math.prod(shape) != 1 for key, shape in shapes.items()):
        with suppress(IntegrityError):  # an alpha or a flag of several numbers, where it is one
            reader.read(files, kinds, index)
        return
    reading = reader.read(files, kinds, index)
    account(reading, header)
    touches(reading.groups, registry.kinds)
