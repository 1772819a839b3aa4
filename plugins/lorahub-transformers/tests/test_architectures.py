"""Architectures that are in no table: PEFT trains, lorahub merges, attaches and plans, from files and in memory.

References are PEFT's own merged model and a float64 sum; the conformance suite runs over every one of them.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from tiny_architectures import ARCHITECTURES, built, inputs

import lorahub
from lorahub.bases.index import BaseRef
from lorahub.bases.layout import Target
from lorahub.bases.open import survey_base
from lorahub.testing import FrameworkCase, check_framework
from lorahub.testing.frameworks import FRAMEWORK_LAWS
from lorahub_transformers import Transformers

pytestmark = [
    # peft 0.21 asks transformers 5.23 for an attribute that it deprecates
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to"),
    pytest.mark.filterwarnings("ignore:Could not find a config file in"),
    pytest.mark.filterwarnings("ignore:Unable to fetch remote file"),
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`"),
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`"),
    pytest.mark.filterwarnings("ignore:Model with `tie_word_embeddings=True`"),
]

PRESETS = {
    "sound": ("attention", "feed-forward", "all-linear", "all-conv"),
    "state space": ("all-linear", "all-conv", "all-embedding"),
    "convolutions": ("all-linear", "all-conv"),
    "experts": ("attention", "all-linear", "all-embedding", "experts"),
    "turned matrices": ("attention", "feed-forward", "all-linear", "all-embedding"),
    "pictures and words": ("attention", "feed-forward", "all-linear", "all-conv", "all-embedding"),
}
USUAL = ("attention", "all-linear", "all-embedding")

TARGETS = {
    # a regular expression for PEFT: a linear module, and every other type that the model has
    "encoder": r".*\.(query|intermediate\.dense|token_type_embeddings)",
    "decoder": r".*\.(q_proj|fc1|out_proj)",
    "encoder and decoder": r".*\.(v_proj|out_proj|fc2)",
    "pictures and words": r".*\.(q_proj|up_proj|linear_1|patch_embedding)",
    "experts": r".*\.(q_proj|shared_expert\.down_proj)",
    "turned matrices": r".*\.(c_attn|c_fc|positions_embed)",
    "sound": r".*\.(k_proj|intermediate_dense|conv_layers\.1\.conv)",
    "state space": r".*\.(in_proj|x_proj)",
    "convolutions": r".*\.(pwconv1|downsampling_layer\.1|patch_embeddings)",
}


def some(*usual: str) -> list[Any]:
    """All architectures, of which the default run takes these."""
    return [pytest.param(each, marks=() if each in usual else pytest.mark.slow) for each in ARCHITECTURES]


def spread(wrapped: Any) -> None:
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if parameter.requires_grad:
                scale = 0.1 if "magnitude" in name else 0.3
                parameter.add_(torch.randn(parameter.shape, generator=generator) * scale)


@pytest.mark.parametrize("what", some("encoder", "experts", "turned matrices", "sound"))
def test_the_framework_keeps_every_law(what: str, saved: Callable[..., Path]) -> None:
    model = built(what)
    folder = saved(model)
    case = FrameworkCase(
        folder=folder, model=model, run=lambda model: model(**inputs(what)), presets=PRESETS.get(what, USUAL)
    )
    if what == "experts":  # checkpoints keep experts one by one: files and model have other names for them
        for name, law in FRAMEWORK_LAWS.items():
            if name not in {
                "files_and_model_tell_the_same",
                "layouts_cover_their_targets",
                "presets_name_targets_in_order",
            }:
                law(Transformers(), case)
        return
    check_framework(Transformers(), case)


@pytest.mark.parametrize(
    "what", some("decoder", "encoder and decoder", "pictures and words", "experts", "convolutions")
)
def test_merged_and_attached_equal_peft_in_memory_and_from_files(
    what: str, saved: Callable[..., Path], tmp_path: Path
) -> None:
    base = built(what)
    folder = saved(base)
    wrapped = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(r=2, lora_alpha=6, target_modules=TARGETS[what]))
    spread(wrapped)
    wrapped.save_pretrained(tmp_path / "adapter")
    with torch.no_grad():
        wanted = wrapped(**inputs(what))[0]
        reference = wrapped.merge_and_unload().state_dict()
        plain = base(**inputs(what))[0]
    assert (wanted - plain).norm() / plain.norm() > 1e-2

    with torch.no_grad(), lorahub.attach(base, {"adapter": tmp_path / "adapter"}):
        torch.testing.assert_close(base(**inputs(what))[0], wanted, atol=2e-5, rtol=2e-4)
    before = {key: tensor.clone() for key, tensor in base.state_dict().items()}
    lorahub.merge(folder, {"adapter": tmp_path / "adapter"}, out=tmp_path / "out")
    lorahub.merge(base, {"adapter": tmp_path / "adapter"})
    opened = type(base).from_pretrained(tmp_path / "out").state_dict()
    changed = 0
    for key, tensor in base.state_dict().items():
        torch.testing.assert_close(tensor, reference[key], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(opened[key], tensor, atol=0, rtol=0)
        if not torch.equal(tensor, before[key]):
            assert (tensor - before[key]).norm() / before[key].norm() > 1e-2
            changed += 1
    assert changed >= 2


@pytest.mark.parametrize(
    ("what", "kind"),
    [
        ("encoder", "dora"),
        ("pictures and words", "loha"),
        ("turned matrices", "ia3"),  # PEFT puts no LoHa into Conv1D
        *(
            pytest.param(what, kind, marks=pytest.mark.slow)
            for what, kind in (
                ("encoder", "loha"),
                ("encoder", "ia3"),
                ("pictures and words", "dora"),
                ("pictures and words", "ia3"),
                ("turned matrices", "dora"),
            )
        ),
    ],
)
def test_other_kinds_merge_as_peft_merges_them(what: str, kind: str, tmp_path: Path) -> None:
    base = built(what)
    words = {"encoder": "query", "pictures and words": "q_proj", "turned matrices": "c_fc"}[what]
    config: Any = {
        "dora": lambda: peft.LoraConfig(r=2, use_dora=True, target_modules=[words]),
        "loha": lambda: peft.LoHaConfig(r=2, target_modules=[words]),
        "ia3": lambda: peft.IA3Config(target_modules=[words], feedforward_modules=[]),
    }
    wrapped = peft.get_peft_model(copy.deepcopy(base), config[kind]())
    spread(wrapped)
    wrapped.save_pretrained(tmp_path / "adapter")
    reference = wrapped.merge_and_unload().state_dict()
    before = {key: tensor.clone() for key, tensor in base.state_dict().items()}
    lorahub.merge(base, {"adapter": tmp_path / "adapter"})
    for key, tensor in base.state_dict().items():
        torch.testing.assert_close(tensor, reference[key], atol=1e-5, rtol=1e-5)
    assert max(float((t - before[k]).norm() / (before[k].norm() + 1e-9)) for k, t in base.state_dict().items()) > 1e-2


def test_presets_of_a_mixture_land_in_experts_that_are_kept_one_by_one(saved: Callable[..., Path]) -> None:
    model = built("experts")
    framework = Transformers()
    live = framework.index_model(model, BaseRef())
    files = framework.index(BaseRef(), survey_base(saved(model)))
    for preset in PRESETS["experts"]:
        targets = framework.targets(live, preset)
        assert targets
        assert framework.layouts(files, targets).keys() == set(targets)
    (layout,) = framework.layouts(files, [Target("", "model.layers.0.mlp.experts", "gate_up_proj")]).values()
    assert [piece.parameter.split(".")[-3:-1] for piece in layout.pieces[:2]] == [["0", "gate_proj"], ["0", "up_proj"]]
