"""Every architecture of transformers: headers and model tell the same, presets name targets, and they can be planned.

Models are built on the meta device from their default configurations, with few layers; their headers are those that
the library's own conversions write.  The default run walks a few of each sort, ``make test-all`` all of them.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from architectures import KINDS, UNBUILT, checkpoint, class_of, on_meta
from safetensors.torch import save_file

import lorahub
from lorahub.bases.index import BaseIndex, BaseRef
from lorahub.bases.layout import Target
from lorahub.errors import UsageError
from lorahub_transformers import Transformers, undeclared
from lorahub_transformers.families import FAMILIES
from lorahub_transformers.framework import _family
from lorahub_transformers.fusions import FUSED
from lorahub_transformers.presets import PRESETS, presets_of
from lorahub_transformers.table import rows, table
from lorahub_transformers.undeclared import from_model

REARRANGED: dict[str, str] = {
    "ernie4_5_vl_moe": "experts of words and of pictures are dealt out to two stacks",
    "gradium_phonon_tts": "rows are woven for rotary positions",
    "inkling2": "gates and their partners are woven",
    "inkling2_text": "gates and their partners are woven",
    "inkling_mm_model": "gates and their partners are woven",
    "kimi_k25": "rows are woven for rotary positions",
    "mistral_large4": "rows are woven for rotary positions",
    "step3p7": "tensors of three axes are put together",
}
"""Architectures with tensors that loading rearranges in a way that no layout says; these keep their stored names."""

NO_ATTENTION = {
    "bamba": "with the default configuration, layers of a state space alone",
    "bit": "convolutions",
    "convnext": "convolutions",
    "convnextv2": "convolutions",
    "dac": "convolutions",
    "dinov3_convnext": "convolutions",
    "edgetam_vision_model": "convolutions",
    "efficientnet": "convolutions",
    "encodec": "convolutions whose weight is a product of two parameters",
    "falcon_mamba": "a state space",
    "fnet": "Fourier transforms",
    "focalnet": "modulation",
    "gemma3n_vision": "convolutions of timm",
    "glm_image_vqmodel": "a codebook and convolutions",
    "granitemoehybrid": "with the default configuration, layers of a state space alone",
    "hgnet_v2": "convolutions",
    "ibert": "its linear modules are of a class of their own",
    "mamba": "a state space",
    "mamba2": "a state space",
    "mobilenet_v1": "convolutions",
    "mobilenet_v2": "convolutions",
    "mobilevitv2": "attention by convolutions",
    "muse_spark_audio": "a codec",
    "poolformer": "pooling",
    "pp_ocrv5_mobile_rec": "convolutions",
    "pp_ocrv5_server_rec": "convolutions",
    "pp_ocrv6_small_det": "convolutions",
    "pp_ocrv6_small_rec": "convolutions",
    "pp_ocrv6_tiny_rec": "convolutions",
    "regnet": "convolutions",
    "resnet": "convolutions",
    "squeezebert": "attention by convolutions",
    "textnet": "convolutions",
    "timm_wrapper": "convolutions of timm",
    "univnet": "convolutions",
    "uvdoc": "convolutions",
    "vibevoice_acoustic_tokenizer": "convolutions and feed-forwards",
    "vibevoice_acoustic_tokenizer_decoder": "convolutions and feed-forwards",
    "vibevoice_acoustic_tokenizer_encoder": "convolutions and feed-forwards",
    "xlnet": "its projections are parameters of three axes",
    "xlstm": "recurrent layers",
}
"""Architectures whose default model has no linear module in an attention, and what it has instead."""

NO_PLACE = {
    "encodec": "convolutions whose weight is a product of two parameters",
    "pe_audio_video": "the first module of each type is tied or grouped",
    "pp_ocrv5_mobile_rec": "the first module of each type is tied or grouped",
}
"""Architectures of which the walk takes no module for a small adapter, and why."""

USUAL = ("opt", "bart", "clip", "llava", "mixtral", "wav2vec2", "whisper", "mamba", "convnext", "gpt_bigcode", "gemma3")
"""What the default run walks: decoder, both, pairs, pictures, experts, sound, a state space, convolutions."""

SELECTED = [
    pytest.param(kind, marks=() if kind in USUAL else pytest.mark.slow) for kind in KINDS if kind not in UNBUILT
]


def plain(index: BaseIndex) -> dict[str, Any]:
    """The parameters, but for what a place calls them and for dtypes, which a file decides."""
    return {name: replace(info, stored_as="", dtype="") for name, info in index.parameters.items()}


def lands(framework: Transformers, index: BaseIndex, names: Collection[str]) -> None:
    targets = [Target("", *name.rpartition(".")[::2]) for name in names]
    layouts = framework.layouts(index, targets)
    assert not [target for target in targets if target not in layouts]
    for layout in layouts.values():
        assert all(piece.parameter in index.parameters for piece in layout.pieces)


def one_of_each(model: Any, index: BaseIndex) -> dict[str, str]:
    """One parameter for each class of module that has a matrix or a kernel."""
    modules = dict(model.named_modules(remove_duplicate=False))
    found: dict[str, str] = {}
    for name, info in index.parameters.items():
        owner = modules.get(info.stored_as.rpartition(".")[0])
        if info.role and owner is not None:
            found.setdefault(type(owner).__name__, name)
    return found


@pytest.mark.parametrize("kind", SELECTED)
def test_headers_and_model_tell_the_same_and_presets_land(kind: str) -> None:
    framework = Transformers()
    model = on_meta(kind)
    files = checkpoint(model)
    live, stored = framework.index_model(model, BaseRef()), framework.index(BaseRef(), files)

    assert stored.declared
    only_files = [name for name in stored.parameters if name not in live.parameters and name not in live.elsewhere]
    only_live = [name for name in live.parameters if name not in stored.parameters and name not in stored.elsewhere]
    assert bool(only_files or only_live) is (kind in REARRANGED)
    here, there = plain(stored), plain(live)
    assert not [name for name in here if name in there and here[name] != there[name]]
    assert stored.tied == live.tied
    if not stored.elsewhere and not only_files:
        assert stored.order == live.order
        assert stored.structure == live.structure

    roles = {info.role for info in live.parameters.values()}
    for preset, role in {"all-linear": "linear", "all-conv": "conv", "all-embedding": "embedding"}.items():
        if role not in roles:
            with pytest.raises(UsageError):
                framework.targets(live, preset)
    if kind in NO_ATTENTION:
        with pytest.raises(UsageError, match="attention"):
            framework.targets(live, "attention")
    else:
        attention = framework.targets(live, "attention")
        assert set(attention) <= set(framework.targets(live, "all-linear"))
    for preset in PRESETS:
        try:
            targets = framework.targets(live, preset)
        except UsageError:
            continue
        assert len(set(targets)) == len(targets)
        lands(framework, live, [target.name for target in targets])
        if kind not in REARRANGED:
            lands(framework, stored, [target.name for target in targets])
    for name in one_of_each(model, live).values():
        lands(framework, live, [name])


def test_the_walk_is_of_nearly_all_that_transformers_has() -> None:
    assert len(KINDS) > 500
    assert len(UNBUILT) < 0.05 * len(KINDS)
    assert set(UNBUILT) | set(NO_ATTENTION) | set(REARRANGED) | set(USUAL) <= set(KINDS)


@pytest.mark.slow
@pytest.mark.parametrize("kind", UNBUILT)
def test_what_the_walk_leaves_out_is_what_transformers_does_not_build(kind: str) -> None:
    with pytest.raises(Exception, match=r".*"):  # each fails in a way of its own
        on_meta(kind)


@pytest.mark.parametrize("kind", sorted(FAMILIES))
def test_what_classes_tell_is_what_the_table_says(kind: str) -> None:
    """The same architecture, once from the table and once as if it were not in it."""
    model = on_meta(kind)
    framework = Transformers()
    table = framework.index_model(model, BaseRef())
    seen = from_model(model, BaseRef(), table.config)
    canonical = {info.stored_as: name for name, info in table.parameters.items()}

    family = _family(table.config)
    assert family is not None
    for preset in ("attention", "all-linear", "feed-forward"):
        names = [canonical[name] for name in seen.presets.get(preset, ())]
        if preset != "feed-forward" or names:
            assert sorted(names) == sorted(target.name for target in framework.targets(table, preset))
    assert {(canonical[n], i.role, i.transposed) for n, i in seen.parameters.items()} == {
        (n, i.role, i.transposed) for n, i in table.parameters.items()
    }


@pytest.mark.parametrize("kind", SELECTED)
def test_a_small_adapter_on_one_module_of_each_type_is_planned(kind: str, tmp_path: Path) -> None:
    model = on_meta(kind)
    index = Transformers().index_model(model, BaseRef())
    tensors: dict[str, torch.Tensor] = {}
    chosen: list[str] = []
    for name in one_of_each(model, index).values():
        info, module = index.parameters[name], name.rpartition(".")[0]
        shape = info.shape[::-1] if info.transposed else info.shape
        site = Transformers().site(model, info.stored_as)
        if index.tied_with(name) or (site is not None and site.groups > 1):
            continue
        stem = f"base_model.model.{module}"
        if info.role == "embedding":
            tensors[f"{stem}.lora_embedding_A"] = torch.ones(1, shape[0])
            tensors[f"{stem}.lora_embedding_B"] = torch.ones(shape[1], 1)
        else:
            ones = (1,) * (len(shape) - 2)
            tensors[f"{stem}.lora_A.weight"] = torch.ones(1, *shape[1:])
            tensors[f"{stem}.lora_B.weight"] = torch.ones(shape[0], 1, *ones)
        chosen.append(name)
    if not chosen:
        assert kind in NO_PLACE
        return
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    modules = [name.rpartition(".")[0] for name in chosen]
    turned = any(index.parameters[name].transposed for name in chosen)
    settings = {"peft_type": "LORA", "r": 1, "lora_alpha": 1, "target_modules": modules, "fan_in_fan_out": turned}
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    planned = lorahub.plan(model, {"adapter": tmp_path})
    assert {step.source for step in planned.steps} == set(chosen)


def test_the_table_of_what_is_supported_has_every_entry() -> None:
    found = rows()
    assert {kind for row in found for kind in row.kinds} >= {
        *FAMILIES,
        *(kind for each in FUSED for kind in each.kinds),
    }
    assert found[-1].kinds == ()
    assert len(table().splitlines()) == len(found) + 2


def test_heads_are_in_no_preset() -> None:
    for kind, name, head in (
        ("opt", "OPTForCausalLM", "lm_head"),
        ("opt", "OPTForSequenceClassification", "score"),
        ("wav2vec2", "Wav2Vec2ForCTC", "lm_head"),
        ("whisper", "WhisperForConditionalGeneration", "proj_out"),
        ("mt5", "MT5ForConditionalGeneration", "lm_head"),
        ("llava", "LlavaForConditionalGeneration", "lm_head"),
    ):
        index = Transformers().index_model(on_meta(kind, name), BaseRef())
        linear = {target.module for target in Transformers().targets(index, "all-linear")}
        assert linear
        assert not [module for module in linear if module.split(".")[0] == head]


def test_without_the_classes_headers_alone_are_known_and_presets_are_refused(monkeypatch: Any) -> None:
    files = checkpoint(on_meta("opt"))
    monkeypatch.setattr(undeclared, "build", lambda config, stored: None)
    undeclared._seen.cache_clear()
    index = Transformers().index(BaseRef(), files)
    undeclared._seen.cache_clear()
    assert not index.declared
    assert set(index.parameters) == set(files.tensors)
    with pytest.raises(UsageError, match="name the modules, or give the live model"):
        Transformers().targets(index, "attention")


@pytest.mark.parametrize(
    "changed",
    [
        {"num_hidden_layers": 10**9},
        {"use_pretrained_backbone": True},
        {"backbone": "somebody/something"},
        {"architectures": ["EvilForCausalLM"]},
        {"model_type": "nobody-knows"},
        {"hidden_size": "wide"},
        {"architectures": ["LlamaForCausalLM"]},
    ],
    ids=str,
)
def test_a_configuration_that_cannot_be_built_is_taken_by_names_and_shapes(changed: dict[str, Any]) -> None:
    files = checkpoint(on_meta("opt"))
    config = {**files.config, **changed}
    index = Transformers().index(BaseRef(), replace(files, configs={"config.json": config}))
    assert not index.declared
    assert set(index.parameters) == set(files.tensors)


def test_presets_are_read_off_classes_and_not_off_names() -> None:
    model = on_meta("opt")
    index = Transformers().index_model(model, BaseRef())
    attention = {name.rpartition(".")[0] for name in index.presets["attention"]}
    assert {module.split(".")[-1] for module in attention} == {"q_proj", "k_proj", "v_proj", "out_proj"}
    assert presets_of(torch.nn.Linear(2, 2), {}) == {}
    assert issubclass(class_of("opt"), transformers.PreTrainedModel)
