"""Diffusers' spellings: three generations of suffixes, alpha from tensor or header, every key placed or named."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lorahub.adapter import Adapter, load, open_header, save
from lorahub.bases.index import BaseIndex, BaseRef, ParameterInfo
from lorahub.bases.layout import Target
from lorahub.deltas.delta import Delta
from lorahub.deltas.dora import DoRA
from lorahub.deltas.full import Full
from lorahub.deltas.kind import JSON, Kind
from lorahub.deltas.lora import LoRA
from lorahub.errors import CannotCarry, IntegrityError, UnsupportedFormat
from lorahub.files.header import Header, TensorInfo, read_header
from lorahub.files.writer import save_file
from lorahub.findings import Finding, Verdict
from lorahub.formats.assembly import account, touches
from lorahub.formats.diffusers import DiffusersFormat
from lorahub.formats.format import AdapterFiles, Reading
from lorahub.plugins import Registry

STEM = "unet.mid.attn.to_q."
PAIR = {"lora_A.weight": (2, 4), "lora_B.weight": (6, 2)}
FILE = "pytorch_lora_weights.safetensors"


class Folder:
    """One weights file: shapes are filled with random numbers, numbers become 0-d tensors."""

    def __init__(self, folder: Path, registry: Registry) -> None:
        self.path = folder / FILE
        self.registry = registry

    def fill(
        self, entries: Mapping[str, Sequence[int] | float], config: Mapping[str, JSON] | None = None, text: str = ""
    ) -> Path:
        generator = torch.Generator().manual_seed(0)
        tensors = {
            key: torch.tensor(entry) if isinstance(entry, float) else torch.randn(tuple(entry), generator=generator)
            for key, entry in entries.items()
        }
        said = text or (json.dumps(config) if config is not None else "")
        save_file(self.path, tensors, {"format": "pt"} | ({"lora_adapter_metadata": said} if said else {}))
        return self.path.parent

    def read(
        self,
        entries: Mapping[str, Sequence[int] | float],
        config: Mapping[str, JSON] | None = None,
        index: BaseIndex | None = None,
        *,
        stem: str = STEM,
        text: str = "",
    ) -> Reading:
        self.fill({stem + name: entry for name, entry in entries.items()}, config, text)
        header = read_header(self.path)
        files = AdapterFiles(folder=self.path.parent, headers={FILE: header}, configs={})
        reading = DiffusersFormat().read(files, tuple(self.registry.kinds.values()), index)
        account(reading, header)
        return reading


@pytest.fixture
def weights(tmp_path: Path, registry: Registry) -> Folder:
    return Folder(tmp_path, registry)


@pytest.fixture
def kinds(registry: Registry) -> tuple[Kind, ...]:
    return tuple(registry.kinds.values())


def finding(reading: Reading, code: str) -> Finding:
    (found,) = [each for each in reading.findings if each.code == code]
    return found


def base(*names: str) -> BaseIndex:
    return BaseIndex(
        ref=BaseRef(repo="acme/base"),
        framework="test",
        parameters={name: ParameterInfo(shape=(6, 4), dtype="F32", stored_as=name) for name in names},
    )


# --- names -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("down", "up"),
    [
        ("to_q.lora_A.weight", "to_q.lora_B.weight"),
        ("to_q.lora.down.weight", "to_q.lora.up.weight"),
        ("to_q.lora_linear_layer.down.weight", "to_q.lora_linear_layer.up.weight"),
        ("processor.to_q_lora.down.weight", "processor.to_q_lora.up.weight"),
    ],
)
@pytest.mark.parametrize("component", ["unet", "text_encoder_2", "transformer", ""])
def test_every_spelling_there_has_been_names_the_same_module(
    weights: Folder, component: str, down: str, up: str
) -> None:
    stem = f"{component}.mid.attn." if component else "mid.attn."
    reading = weights.read({down: (2, 4), up: (6, 2)}, stem=stem)
    (group,) = reading.groups
    assert (group.component, group.module, group.kind) == (component, "mid.attn.to_q", "lora")
    assert (group.slots["down"].shape, group.slots["up"].shape) == ((2, 4), (6, 2))
    assert reading.findings == ()


def test_the_processors_output_layer_is_the_first_of_the_modules_list(weights: Folder) -> None:
    entries = {"processor.to_out_lora.down.weight": (2, 4), "processor.to_out_lora.up.weight": (6, 2)}
    assert weights.read(entries, stem="mid.attn.").groups[0].module == "mid.attn.to_out.0"


@pytest.mark.parametrize(
    ("old", "module"),
    [("to_q", "q_proj"), ("to_k", "k_proj"), ("to_v", "v_proj"), ("to_out", "out_proj")],
)
def test_text_encoders_had_words_of_attention_processors_too(weights: Folder, old: str, module: str) -> None:
    stem = "text_encoder.text_model.encoder.layers.0.self_attn."
    reading = weights.read({f"{old}_lora.down.weight": (2, 4), f"{old}_lora.up.weight": (6, 2)}, stem=stem)
    assert [group.module for group in reading.groups] == [f"text_model.encoder.layers.0.self_attn.{module}"]
    assert reading.findings == ()


def test_one_part_of_a_pipeline_fits_a_bare_model_and_a_file_without_parts_fits_a_pipeline(weights: Folder) -> None:
    (group,) = weights.read(PAIR, index=base("mid.attn.to_q.weight")).groups
    assert (group.component, group.module) == ("", "mid.attn.to_q")
    (group,) = weights.read(PAIR, index=base("other.weight")).groups
    assert (group.component, group.module) == ("unet", "mid.attn.to_q")
    pipeline = base("unet:mid.attn.to_q.weight", "text_encoder:fc1.weight")
    (group,) = weights.read(PAIR, index=pipeline, stem="mid.attn.to_q.").groups
    assert (group.component, group.module) == ("unet", "mid.attn.to_q")


def test_two_spellings_of_one_slot_are_refused(weights: Folder) -> None:
    reading = weights.read({**PAIR, "lora.down.weight": (2, 4)})
    assert finding(reading, "slot-missing").level is Verdict.INCOMPATIBLE
    both = {"to_q.lora.down.weight": (2, 4), "processor.to_q_lora.down.weight": (2, 4)}
    reading = weights.read(both, stem="mid.attn.")
    assert finding(reading, "key-twice").level is Verdict.INCOMPATIBLE


# --- scales ----------------------------------------------------------------------------------------------------------


def test_without_an_alpha_the_scale_is_one(weights: Folder) -> None:
    reading = weights.read(PAIR)
    assert (reading.groups[0].options["scale"], reading.groups[0].options["scale_rule"]) == (1.0, "default")


@pytest.mark.parametrize(
    ("config", "scale", "rule"),
    [
        ({"unet.r": 2, "unet.lora_alpha": 5}, 2.5, "alpha/r"),
        ({"unet.r": 2, "unet.lora_alpha": 4, "unet.alpha_pattern": {"to_q": 1}}, 0.5, "alpha/r"),
        ({"unet.r": 9, "unet.rank_pattern": {"mid.attn.to_q": 2}, "unet.lora_alpha": 4}, 2.0, "alpha/r"),
        ({"unet.r": 2, "unet.lora_alpha": 4, "unet.use_rslora": True}, 4 / 2**0.5, "alpha/sqrt(r)"),
        ({"text_encoder.r": 3, "text_encoder.lora_alpha": 4}, 1.0, "default"),
    ],
)
def test_the_header_says_alpha_for_each_component(
    weights: Folder, config: dict[str, JSON], scale: float, rule: str
) -> None:
    reading = weights.read(PAIR, config)
    assert (reading.groups[0].options["scale"], reading.groups[0].options["scale_rule"]) == (scale, rule)
    assert reading.findings == ()


def test_a_tensor_says_alpha_before_the_header_and_must_agree_with_it(weights: Folder) -> None:
    config: dict[str, JSON] = {"unet.r": 2, "unet.lora_alpha": 4}
    reading = weights.read({**PAIR, "alpha": 4.001}, config)
    assert reading.groups[0].options["alpha"] == pytest.approx(4.001)
    assert reading.findings == ()
    found = finding(weights.read({**PAIR, "alpha": 8.0}, config), "alpha-conflict")
    assert (found.level, found.axis) == (Verdict.INCOMPATIBLE, "integrity")
    assert "says 4" in found.message
    assert "says 8" in found.message


@pytest.mark.parametrize("alpha", [0.0, float("nan")])
def test_an_alpha_of_zero_or_nan_is_taken_for_missing_and_said(weights: Folder, alpha: float) -> None:
    reading = weights.read({**PAIR, "alpha": alpha})
    assert reading.groups[0].options["scale"] == 1.0
    assert finding(reading, "alpha-void").where == (f"{STEM}alpha",)
    reading = weights.read(PAIR, {"unet.lora_alpha": 0})
    assert reading.groups[0].options["scale"] == 1.0
    assert finding(reading, "alpha-void")


def test_a_rank_that_the_header_states_otherwise_is_refused(weights: Folder) -> None:
    reading = weights.read(PAIR, {"unet.r": 4, "unet.lora_alpha": 4})
    assert "r says rank 4" in finding(reading, "slot-misfit").message
    assert reading.groups == ()


def test_fields_that_cannot_be_honoured_are_refused_by_component(weights: Folder) -> None:
    reading = weights.read(PAIR, {"unet.r": 2, "unet.lora_alpha": 2, "unet.use_qalora": True, "unet.unheard_of": 1})
    assert finding(reading, "config-refused").where == ("unet.use_qalora",)
    found = finding(reading, "config-unknown")
    assert found.where == ("unet.unheard_of",)
    assert "lora_adapter_metadata in the header" in found.message
    assert "adapter_config" not in found.message


@pytest.mark.parametrize("text", ["{", "[]", "3"])
def test_a_header_that_is_no_object_is_an_error(weights: Folder, text: str) -> None:
    with pytest.raises(IntegrityError, match="lora_adapter_metadata in the header cannot be read"):
        weights.read(PAIR, text=text)


# --- DoRA and the rest -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("suffix", "shape", "axis"),
    [
        ("lora_magnitude_vector", (6,), 0),
        ("lora_magnitude_vector.weight", (6,), 0),
        ("dora_scale", (6, 1), 0),
        ("dora_scale", (1, 4), 1),
    ],
)
def test_a_magnitude_makes_it_dora_along_the_axis_it_has(
    weights: Folder, suffix: str, shape: tuple[int, ...], axis: int
) -> None:
    reading = weights.read({**PAIR, suffix: shape})
    (group,) = reading.groups
    assert group.kind == "dora"
    delta = load(open_header(weights.path, weights.registry), weights.registry).deltas[
        Target("unet", "mid.attn.to_q", "weight")
    ]
    assert isinstance(delta, DoRA)
    assert delta.axis == axis


def test_a_square_vector_of_unknown_axis_is_refused_unless_peft_wrote_it(weights: Folder) -> None:
    square = {"lora_A.weight": (2, 4), "lora_B.weight": (4, 2)}
    assert weights.read({**square, "lora_magnitude_vector": (4,)}).groups[0].kind == "dora"
    assert "rows or of the columns" in finding(weights.read({**square, "dora_scale": (4,)}), "slot-misfit").message


def test_dora_that_the_header_denies_is_refused(weights: Folder) -> None:
    config: dict[str, JSON] = {"unet.r": 2, "unet.lora_alpha": 2, "unet.use_dora": False}
    reading = weights.read({**PAIR, "lora_magnitude_vector": (6,)}, config)
    assert "use_dora is false" in finding(reading, "slot-misfit").message


def test_biases_of_factors_and_whole_differences_are_carried(weights: Folder) -> None:
    entries = {"q.lora_A.weight": (2, 4), "q.lora_B.weight": (6, 2), "q.lora_B.bias": (6,), "norm.diff": (3,)}
    reading = weights.read(entries, stem="transformer.")
    assert reading.findings == ()
    adapter = load(open_header(weights.path, weights.registry), weights.registry)
    assert {target.name: delta.kind for target, delta in adapter.deltas.items()} == {
        "transformer:q.weight": "lora",
        "transformer:q.bias": "full",
        "transformer:norm.weight": "full",
    }


@pytest.mark.parametrize(
    ("entries", "code", "text"),
    [
        ({"lora_A.weight": (2, 4)}, "slot-missing", "without lora_B.weight"),
        ({"alpha": 1.0}, "slot-missing", "no factors"),
        ({"lora_A.weight": (2, 4), "lora_B.weight": (6, 3)}, "slot-misfit", "r is 2 elsewhere, 3 here"),
        ({**PAIR, "dora_scale": (5, 1)}, "slot-misfit", "fits neither"),
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


def test_unknown_keys_are_named_and_may_be_left_out(weights: Folder) -> None:
    entries = {f"{STEM}{name}": shape for name, shape in PAIR.items()}
    extra = {"unet.mid.unheard_of": (2,), "diffusion_model.q.lora_A.weight": (2, 4)}
    found = finding(weights.read(entries | extra, stem=""), "key-unknown")
    assert (set(found.where), found.allowable) == (set(extra), True)


# --- recognition -----------------------------------------------------------------------------------------------------


def test_diffusers_claims_its_own_and_no_other(weights: Folder, registry: Registry) -> None:
    folder = weights.fill({f"{STEM}{name}": shape for name, shape in PAIR.items()})
    assert open_header(folder, registry).format == "diffusers"
    header = read_header(weights.path)
    peft: dict[str, JSON] = {"peft_type": "LORA"}
    beside = AdapterFiles(folder=folder, headers={FILE: header}, configs={"adapter_config.json": peft})
    alone = AdapterFiles(folder=folder, headers={FILE: header}, configs={})
    assert DiffusersFormat().claims(beside) == DiffusersFormat().claims(alone) is not None
    weights.fill({"layers.0.q_proj.lora_A.weight": (2, 4), "layers.0.q_proj.lora_B.weight": (4, 2)})
    bare = {FILE: read_header(weights.path)}
    assert DiffusersFormat().claims(AdapterFiles(folder=folder, headers=bare, configs=beside.configs)) is None
    for key in (
        "base_model.model.q.lora_A.weight",
        "diffusion_model.q.lora_A.weight",
        "lora_unet_q.lora_down.weight",
        "double_blocks.0.processor.qkv_lora1.down.weight",
        "q.lora_A.default.weight",
        "q.lora_a",
        "unet:0:up",
        "w_a_000",
    ):
        weights.fill({key: (2, 2)})
        files = AdapterFiles(folder=folder, headers={FILE: read_header(weights.path)}, configs={})
        assert DiffusersFormat().claims(files) is None, key
    weights.fill({"img_in.lora_A.weight": (2, 4), "double_blocks.0.norm.query_norm.scale": (3,)})
    files = AdapterFiles(folder=folder, headers={FILE: read_header(weights.path)}, configs={})
    assert DiffusersFormat().claims(files) is None


def test_a_file_of_two_formats_is_refused(weights: Folder, registry: Registry) -> None:
    folder = weights.fill({f"{STEM}lora_A.weight": (2, 4), "lora_unet_q.lora_down.weight": (2, 4)})
    with pytest.raises(UnsupportedFormat, match=r"several formats: diffusers .* and kohya"):
        open_header(folder, registry)


def test_among_several_files_diffusers_own_name_wins_and_otherwise_the_user_is_asked(
    weights: Folder, registry: Registry
) -> None:
    folder = weights.fill({f"{STEM}{name}": shape for name, shape in PAIR.items()})
    (folder / "a.safetensors").write_bytes(weights.path.read_bytes())
    assert open_header(folder, registry).reading.file == FILE
    weights.path.rename(folder / "b.safetensors")
    with pytest.raises(UnsupportedFormat, match=r"a\.safetensors, b\.safetensors"):
        open_header(folder, registry)


# --- writing ---------------------------------------------------------------------------------------------------------


def _lora(scale: float = 0.7) -> LoRA:
    generator = torch.Generator().manual_seed(1)
    return LoRA(torch.randn(6, 2, generator=generator), torch.randn(2, 4, generator=generator), scale)


def test_what_is_saved_reads_back_and_is_spelled_as_diffusers_spells_it(tmp_path: Path, registry: Registry) -> None:
    deltas: dict[Target, Delta] = {
        Target("unet", "mid.to_q", "weight"): _lora(),
        Target("unet", "mid.to_k", "weight"): _lora(0.1),
        Target("text_encoder", "fc1", "weight"): DoRA(_lora().up, _lora().down, 0.5, torch.ones(6)),
        Target("", "plain", "weight"): _lora(1.0),
    }
    folder = save(Adapter(deltas=deltas), tmp_path / "out", registry=registry, format="diffusers")
    header = open_header(folder, registry)
    assert (header.format, header.findings) == ("diffusers", ())
    again = load(header, registry).deltas
    assert set(again) == set(deltas)
    assert [again[target].scale for target in deltas] == [0.7, 0.1, 0.5, 1.0]  # type: ignore[attr-defined]
    written = read_header(folder / FILE)
    assert "text_encoder.fc1.lora_magnitude_vector" in written.tensors
    said = json.loads(written.metadata["lora_adapter_metadata"])
    assert (said["unet.r"], said["unet.target_modules"]) == (2, ["mid.to_k", "mid.to_q"])
    assert said["text_encoder.use_dora"] is True


@pytest.mark.parametrize(
    ("deltas", "text"),
    [
        ({Target("", "unet.q", "weight"): _lora()}, "cannot be told apart again: unet.q.weight"),
        ({Target("vae", "q", "weight"): _lora()}, "'vae' and such a module cannot be told apart"),
        ({Target("unet", "q", "weight"): Full(torch.ones(6, 4))}, "no word for full: unet:q.weight"),
        ({Target("unet", "q", "weight"): _lora(0.0)}, "a scale of 0 has no alpha"),
        ({Target("unet", "q", "weight"): DoRA(_lora().up, _lora().down, 0.5, torch.ones(4), 1)}, "lengths for columns"),
    ],
)
def test_what_has_no_spelling_is_refused_with_its_targets(
    kinds: tuple[Kind, ...], deltas: dict[Target, Delta], text: str
) -> None:
    with pytest.raises(CannotCarry, match=text):
        DiffusersFormat().write(deltas, kinds, {})


# --- whatever the file holds -----------------------------------------------------------------------------------------

PIECES = st.sampled_from(
    [
        *("unet", "text_encoder", "q", "processor", "to_q_lora", "to_q", "alpha", "diff", "weight", "bias"),
        *("lora_A", "lora_B", "lora", "down", "up", "lora_linear_layer", "lora_magnitude_vector", "dora_scale"),
        *("base_model.model", "diffusion_model", "default"),
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
    shapes = shapes | {"unet.k.lora_A.weight": (2, 4)}
    header = Header(
        tensors={key: TensorInfo("F32", shape, 0, 0) for key, shape in shapes.items()},
        metadata={},
        data_start=0,
        size=0,
    )
    numbers = dict.fromkeys(shapes, b"\0\0\x80\x3f")
    files = AdapterFiles(folder=Path("none"), headers={"a": header}, configs={}, numbers={"a": numbers})
    index = base("q.weight", "unet:q.weight") if named else None
    reader, kinds = DiffusersFormat(), tuple(registry.kinds.values())
    if any(key.endswith(".alpha") and math.prod(shape) != 1 for key, shape in shapes.items()):
        with suppress(IntegrityError):  # an alpha of several numbers, where it is one
            reader.read(files, kinds, index)
        return
    reading = reader.read(files, kinds, index)
    account(reading, header)
    touches(reading.groups, registry.kinds)
