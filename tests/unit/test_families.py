"""Modules that differ in their names alone are worked out once: the same groups and findings as one by one."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from math import prod
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorahub.adapter import AdapterHeader, recognise
from lorahub.errors import LorahubError
from lorahub.files.header import Header, parse_header
from lorahub.formats import sorts
from lorahub.formats.families import Groups, representatives
from lorahub.formats.format import AdapterFiles
from lorahub.formats.marks import Mark
from lorahub.formats.peft.fits import Suffixes
from lorahub.lineage import guess, label_of, modules_of
from lorahub.plugins import load_registry

REGISTRY = load_registry()
Shape = tuple[int, ...]


def files_of(
    shapes: Mapping[str, Shape], numbers: Mapping[str, float], metadata: Mapping[str, str], config: object
) -> AdapterFiles:
    """Surveyed files that lie nowhere."""
    entries: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    at = 0
    for key, shape in shapes.items():
        entries[key] = {"dtype": "F32", "shape": list(shape), "data_offsets": [at, at := at + 4 * prod(shape)]}
    text = json.dumps(entries, separators=(",", ":")).encode()
    start = len(text).to_bytes(8, "little") + text
    header: Header = parse_header(
        lambda begin, count: (start + bytes(at))[begin : begin + count], len(start) + at, where="x"
    )
    return AdapterFiles(
        folder=Path("nowhere"),
        headers={"x.safetensors": header},
        configs={"adapter_config.json": config} if isinstance(config, dict) else {},
        numbers={"x.safetensors": {key: struct.pack("<f", value) for key, value in numbers.items()}},
    )


def told(files: AdapterFiles) -> object:
    """Everything that is made of files, or the error."""
    try:
        header = recognise(files, REGISTRY)
    except LorahubError as error:
        return type(error), error.message
    return (
        [*header.reading.groups],
        dict(header.touches),
        header.findings,
        dict(header.reading.hints),
        header.kinds,
        header.ranks,
        label_of({}, lambda: modules_of(header.reading.groups, REGISTRY.kinds)),
    )


def one_by_one(files: AdapterFiles, patch: pytest.MonkeyPatch) -> object:
    """The same where no module is like another."""
    patch.setattr(sorts, "_like", lambda *_: None)
    patch.setattr(sorts, "_remembered", {})
    for spelling in (each for kind in REGISTRY.kinds.values() for each in kind.spellings):
        object.__setattr__(spelling, "alike", lambda _: False)
    try:
        return told(files)
    finally:
        patch.undo()
        for spelling, alike in ALIKE:
            object.__setattr__(spelling, "alike", alike)


ALIKE = [(each, each.alike) for kind in REGISTRY.kinds.values() for each in kind.spellings]
FLAT = [
    "lora_unet_down_blocks_0_attn1_to_q",
    "lora_unet_down_blocks_10_attn2_to_k",
    "lora_te_text_model_encoder_layers_2_mlp_fc1",
]
FLAT += ["lora_te1_text_model_encoder_layers_2_mlp_fc1", "lora_unet_down_blocks_2_attn1_to_q"]
DOTTED = ["transformer.transformer_blocks.0.attn.to_q", "transformer.transformer_blocks.10.attn.to_q"]
DOTTED += ["transformer.single_transformer_blocks.2.proj_out", "text_encoder.text_model.encoder.layers.1.mlp.fc1"]
PEFT = [f"base_model.model.model.layers.{at}.self_attn.{end}" for at in (0, 2, 10) for end in ("q_proj", "v_proj")]
SHAPES: list[dict[str, Shape]] = [
    {"down": (4, 16), "up": (8, 4)},
    {"down": (4, 768), "up": (8, 4)},
    {"down": (2, 16), "up": (8, 2)},
    {"down": (2, 16), "up": (8, 4)},
    {"down": (2, 16)},
    {"down": (0, 16), "up": (8, 0)},
    {"down": (4, 16, 3, 3), "up": (8, 4, 1, 1)},
    {"dora": (8, 1), "down": (4, 16), "up": (8, 4)},
    {"diff": (8, 16)},
    {"unknown": (1,)},
]
FLAT_ENDS = {
    "down": "lora_down.weight",
    "up": "lora_up.weight",
    "dora": "dora_scale",
    "diff": "diff",
    "unknown": "what",
}
DOTTED_ENDS = {
    "down": "lora_A.weight",
    "up": "lora_B.weight",
    "dora": "lora_magnitude_vector",
    "diff": "diff",
    "unknown": "what",
}


@st.composite
def adapters(draw: st.DrawFn, names: list[str], ends: Mapping[str, str]) -> tuple[dict[str, Shape], dict[str, float]]:
    """Shapes and numbers of a file; few sorts of modules, some of them broken."""
    some = draw(st.lists(st.sampled_from(SHAPES), min_size=1, max_size=3))
    shapes: dict[str, Shape] = {}
    numbers: dict[str, float] = {}
    for name in draw(st.lists(st.sampled_from(names), min_size=1, max_size=6, unique=True)):
        shapes |= {f"{name}.{ends[slot]}": shape for slot, shape in draw(st.sampled_from(some)).items()}
        alpha = draw(st.sampled_from([None, 1.0, 1.0, 4.0, 0.0, -0.0, float("nan")]))
        if alpha is not None and ends is not DOTTED_ENDS:
            shapes[f"{name}.alpha"] = ()
            numbers[f"{name}.alpha"] = alpha
    return shapes, numbers


METADATA = st.sampled_from(
    [
        {},
        {"ss_network_module": "networks.lora", "ss_network_alpha": "1"},
        {"lora_alpha": "2"},
        {"lora_adapter_metadata": json.dumps({"transformer.r": 4, "transformer.lora_alpha": 8})},
        {
            "lora_adapter_metadata": json.dumps(
                {"transformer.r": 4, "transformer.lora_alpha": 8, "transformer.alpha_pattern": {"10.attn.to_q": 2}}
            )
        },
    ]
)


@given(adapters(FLAT, FLAT_ENDS), METADATA)
def test_flat_files_read_the_same(made: tuple[dict[str, Shape], dict[str, float]], metadata: dict[str, str]) -> None:
    files = files_of(*made, metadata, None)
    with pytest.MonkeyPatch.context() as patch:
        assert repr(told(files)) == repr(one_by_one(files, patch))


@given(adapters(DOTTED, DOTTED_ENDS), METADATA)
def test_dotted_files_read_the_same(made: tuple[dict[str, Shape], dict[str, float]], metadata: dict[str, str]) -> None:
    files = files_of(*made, metadata, None)
    with pytest.MonkeyPatch.context() as patch:
        assert repr(told(files)) == repr(one_by_one(files, patch))


CONFIGS = st.sampled_from(
    [
        {},
        {"rank_pattern": {"layers.2.self_attn.q_proj": 2}},
        {"alpha_pattern": {"v_proj": 3}},
        {"use_rslora": True},
        {"use_dora": True},
        {"bias": "all", "target_modules": ["q_proj"]},
    ]
)


@given(adapters(PEFT, DOTTED_ENDS), CONFIGS)
def test_files_of_peft_read_the_same(
    made: tuple[dict[str, Shape], dict[str, float]], fields: dict[str, object]
) -> None:
    files = files_of(*made, {}, {"peft_type": "LORA", "r": 4, "lora_alpha": 8, **fields})
    with pytest.MonkeyPatch.context() as patch:
        assert repr(told(files)) == repr(one_by_one(files, patch))


def kohya(modules: int) -> AdapterHeader:
    """A sound file of so many modules."""
    names = [f"lora_unet_down_blocks_0_transformer_blocks_{at}_attn1_to_q" for at in range(modules)]
    shapes = {f"{name}.{FLAT_ENDS[slot]}": shape for name in names for slot, shape in SHAPES[0].items()}
    return recognise(files_of(shapes, {}, {}, None), REGISTRY)


def test_a_family_is_made_once_and_its_groups_when_they_are_looked_at() -> None:
    header = kohya(12)
    groups = header.reading.groups
    assert isinstance(groups, Groups)
    assert len(groups) == 12
    assert len(representatives(groups)) == 1
    assert groups._made is None
    assert [group.module[-len("11_attn1_to_q") :].lstrip("_") for group in groups][-1] == "11_attn1_to_q"
    assert len(header.touches) == 12


def test_two_keys_that_say_the_same_are_told_and_none_is_lost_without_a_word() -> None:
    spelled = ("lora_unet_mid.block.lora_magnitude_vector", "lora_unet_mid_block.lora_magnitude_vector")
    shapes: dict[str, Shape] = dict.fromkeys(spelled, (8,))
    shapes |= {"lora_unet_mid_block.lora_down.weight": (4, 16), "lora_unet_mid_block.lora_up.weight": (8, 4)}
    header = recognise(files_of(shapes, {}, {}, None), REGISTRY)
    twice = [each for each in header.findings if each.code == "key-twice"]
    assert [each.where for each in twice] == [(spelled[1],)]
    assert [len(group.slots) for group in header.reading.groups] == [3]


def test_the_label_alone_is_that_of_the_whole_guess() -> None:
    modules = modules_of(kohya(3).reading.groups, REGISTRY.kinds)
    for metadata in (
        {},
        {"ss_base_model_version": "sdxl_base_v1-0"},
        {"ss_sd_model_name": "ponyDiffusion.safetensors"},
        {"ss_base_model_version": "sdxl_base_v1-0", "ss_sd_model_name": "ponyDiffusion.safetensors"},
    ):
        found = guess(metadata, modules)
        assert label_of(metadata, lambda: modules) == (found.label if found else "")


def test_only_lora_without_patterns_speaks_for_modules_it_does_not_name() -> None:
    alike = REGISTRY.kinds["lora"].spellings[0].alike
    assert alike({"r": 4})
    assert not any(
        alike({"r": 4, field: value}) for field, value in (("rank_pattern", {"q": 2}), ("alpha_pattern", {"q": 2}))
    )
    assert not alike({"use_rslora": True})
    assert not any(each.alike({}) for kind in REGISTRY.kinds.values() if kind.name != "lora" for each in kind.spellings)
    assert Suffixes({"a"}) == {"a"}


@given(st.lists(st.text("ab.", min_size=1, max_size=4), unique=True))
def test_a_mark_is_on_a_header_where_one_of_its_names_passes_the_test(names: list[str]) -> None:
    header = Header(tensors=dict.fromkeys(names), metadata={}, data_start=8, size=8)  # type: ignore[arg-type]
    assert MARK.on([header]) == any(name.startswith("a.") for name in names)
    assert MARK.on([]) is False
    for mark, passes in MARKS:
        assert mark.on([header]) == any(map(passes, names))


MARK = Mark(lambda name: name.startswith("a."))
MARKS = (
    (Mark(begins=("a", "b.")), lambda name: name.startswith(("a", "b."))),
    (Mark(ends=(".b", "a.")), lambda name: name.endswith((".b", "a."))),
    (
        Mark(lambda name: len(name) > 2, begins=("a",), ends=("b",)),
        lambda name: len(name) > 2 and name[0] == "a" and name[-1] == "b",
    ),
)
