"""Pickled and positional adapters as their authors stored them: unpacked, read to the last key, found in a base."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from lorahub.adapter import load, open_header
from lorahub.bases.index import BaseIndex, BaseRef
from lorahub.bases.torch_module import TorchModule
from lorahub.engine.planning.place import place
from lorahub.errors import IntegrityError, LorahubError, UnsupportedFormat, UnsupportedKind
from lorahub.files.pickles import PICKLES, left_out, unpack
from lorahub.plugins import Registry

BLOOM = "wujindou__BLOOM-LORA__bloom_mergedlinear"
DISNEY = "cloneofsimo__lora__disney_r1_ti"
GPT2 = "LMHan122__lightweight-fine-tuning-peft__gpt2_r8_6cls_bin"
KIRIKO = "cloneofsimo__lora__kiriko2_te"
ROBERTA = "microsoft__LoRA__roberta_base_mnli"
SAM = "MathieuNlp__Sam_LoRA__sam_r4"
T_FEW = "r-three__t-few__t0_3b_ia3"

READ: Mapping[str, tuple[str, tuple[str, ...], int, tuple[int, ...], tuple[float, ...], set[str]]] = {
    BLOOM: ("peft-merged", ("merged-lora",), 24, (8,), (2.0,), set()),
    GPT2: ("peft", ("lora", "replace"), 13, (8,), (1.25,), set()),
    KIRIKO: ("cloneofsimo", ("lora",), 48, (4,), (1.0,), {"base-needed"}),
    ROBERTA: ("loralib", ("lora", "replace"), 28, (8,), (1.0,), {"alpha-unknown"}),
    T_FEW: ("ia3-dump", ("ia3",), 384, (), (), set()),
    DISNEY: ("cloneofsimo", ("lora",), 192, (1,), (1.0,), {"base-needed", "kind-unsupported"}),
    SAM: ("lora-vit", ("qv-lora",), 12, (4,), (1.0,), {"alpha-unknown", "base-needed"}),
}
"""Folder -> format, kinds, targets, ranks, scales and what is said of it, as counted by hand from its files."""

PARTS: Mapping[str, tuple[str, str]] = {
    "adapter-hub__adapters__bottleneck_bigbird": ("adapterhub", "bottleneck"),
    "huggingface__diffusers__ti_frida10": ("textual-inversion", "<frida>"),
}
"""Folder -> format and the part that is all it holds."""

REFUSED: Mapping[str, tuple[type[LorahubError], str]] = {
    "elisagdelope__ESM2-bindingsites__lfs_pointer_bin": (IntegrityError, "is a Git LFS pointer"),
    "Inishpy__lerobot-libero__smolvla_scalars": (UnsupportedFormat, "single numbers only (606 of them)"),
}

PLACED: Mapping[str, tuple[str, int, str, str]] = {
    BLOOM: ("bigscience/bloom-560m", 24, "transformer.h.0.self_attention.query_key_value", "a fused layer"),
    GPT2: ("gpt2", 12, "transformer.h.0.attn.c_attn", "its head is a classifier's"),
    KIRIKO: ("SD1-clip", 48, "encoder.layers.0.self_attn.k_proj", "keys come first"),
    ROBERTA: (
        "roberta-base",
        26,
        "roberta.encoder.layer.0.attention.self.query",
        "this base has two labels",
    ),
    T_FEW: ("bigscience/T0_3B", 192, "decoder.block.0.layer.0.SelfAttention.k", "T5 has no biases"),
    DISNEY: ("SD1-unet", 144, "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q", "a U-Net alone"),
    SAM: ("facebook/sam-vit-base", 12, "vision_encoder.layers.0.attn.qkv", "the encoder's blocks"),
}
"""Folder -> base, how many changes find their place in it, the first module, and a word on why."""


@cache
def index_of(folder: Path, name: str) -> BaseIndex:
    """A base of the right shapes, without weights."""
    import diffusers
    import transformers

    entry = json.loads((folder / "bases.json").read_text())[name]
    library, _, cls = entry["model_class"].partition(".")
    model_class: Any = getattr({"diffusers": diffusers, "transformers": transformers}[library], cls)
    with torch.device("meta"):
        if entry["config_class"]:
            model = model_class(getattr(transformers, entry["config_class"])(**entry["config_kwargs"]))
        else:
            model = model_class(**entry["config_kwargs"])
    return TorchModule().index_model(model, BaseRef(folder=name))


@pytest.fixture
def opened(real_adapters: Path, tmp_path: Path) -> Callable[[str], Path]:
    """A folder of safetensors: the adapter's own, or what its pickle was unpacked to."""

    def give(name: str) -> Path:
        folder = real_adapters / name
        if any(path.name.endswith(PICKLES) for path in folder.iterdir()):
            unpack(folder, tmp_path)
            return tmp_path
        return folder

    return give


def test_every_pickle_of_the_collection_is_named_here(real_adapters: Path) -> None:
    pickled = {path.parent.name for path in real_adapters.glob("*/*") if path.name.endswith(PICKLES)}
    assert pickled <= {*READ, *PARTS, *REFUSED}
    assert len(pickled) == 9


@pytest.mark.parametrize("name", READ)
def test_a_real_pickle_is_read_to_the_last_key(opened: Callable[[str], Path], registry: Registry, name: str) -> None:
    spelled, kinds, targets, ranks, scales, told = READ[name]
    header = open_header(opened(name), registry)
    assert (header.format, header.kinds, len(header.touches), header.ranks) == (spelled, kinds, targets, ranks)
    found = {group.options["scale"] for group in header.reading.groups if "scale" in group.options}
    assert tuple(sorted(found)) == scales  # type: ignore[type-var]  # numbers
    assert {finding.code for finding in header.findings} == told
    keys = [ref.key for group in header.reading.groups for ref in group.slots.values()]
    keys += [ref.key for part in header.reading.parts.values() for ref in part.tensors.values()]
    assert sorted(keys) == sorted(header.files.headers[header.reading.file].tensors)


@pytest.mark.parametrize("name", [*PARTS, *(each for each in READ if each not in (DISNEY, SAM))])
def test_an_unpacked_file_holds_what_torch_loads(real_adapters: Path, tmp_path: Path, name: str) -> None:
    (source,) = (path for path in (real_adapters / name).iterdir() if path.name.endswith(PICKLES))
    path = unpack(source, tmp_path)
    expected = torch.load(source, map_location="cpu", weights_only=True)
    if isinstance(expected, list):
        expected = {f"{place:03d}": each for place, each in enumerate(expected)}
    found = load_file(path)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in found)
    configs = {each.name for each in source.parent.glob("*.json")}
    assert {each.name for each in tmp_path.iterdir()} == {path.name, *configs}


@pytest.mark.parametrize("name", PLACED)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_real_pickle_finds_its_place_in_its_base(
    opened: Callable[[str], Path], real_adapters: Path, registry: Registry, name: str
) -> None:
    base, count, first, _ = PLACED[name]
    index = index_of(real_adapters, base)
    header = open_header(opened(name), registry, index=index)
    placement = place(header.reading.groups, registry.kinds, index, TorchModule())
    assert len(placement.placed) == count
    assert first in {each.target.module for each in placement.placed}
    assert "layout-undeclared" not in {each.code for each in header.findings}
    deltas = load(header, registry).deltas
    assert {each.target for each in placement.placed} <= deltas.keys()


def test_the_first_files_of_all_were_made_with_early_diffusers(
    opened: Callable[[str], Path], real_adapters: Path, registry: Registry
) -> None:
    header = open_header(opened(DISNEY), registry, index=index_of(real_adapters, "SD1-unet"))
    block = [
        group.module.rpartition("transformer_blocks.0.")[2] for group in header.reading.groups if group.module[0] == "d"
    ]
    assert block[:9] == [
        *(f"attn1.{end}" for end in ("to_q", "to_k", "to_v", "to_out.0")),
        "ff.net.0.proj",
        *(f"attn2.{end}" for end in ("to_q", "to_k", "to_v", "to_out.0")),
    ]


@pytest.mark.parametrize("name", PARTS)
def test_what_changes_no_weight_is_packaged(opened: Callable[[str], Path], registry: Registry, name: str) -> None:
    spelled, part = PARTS[name]
    header = open_header(opened(name), registry)
    assert (header.format, header.touches, list(header.reading.parts)) == (spelled, {}, [part])


def test_bottleneck_layers_are_not_merged(opened: Callable[[str], Path], registry: Registry) -> None:
    header = open_header(opened("adapter-hub__adapters__bottleneck_bigbird"), registry)
    with pytest.raises(UnsupportedKind, match="bottleneck layers, which cannot be merged"):
        load(header, registry)


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_broken_is_refused_for_the_right_reason(
    opened: Callable[[str], Path], registry: Registry, name: str
) -> None:
    error, reason = REFUSED[name]
    with pytest.raises(error) as refusal:
        open_header(opened(name), registry)
    assert reason in refusal.value.message
    assert refusal.value.hint


def test_nothing_was_left_out_of_any(opened: Callable[[str], Path], registry: Registry) -> None:
    header = open_header(opened(BLOOM), registry)
    assert left_out(header.files.headers[header.reading.file].metadata) == ()
