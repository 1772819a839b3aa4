"""Heads on architectures outside the table: merged onto the plain base, and loaded by plain ``from_pretrained``."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers

import lorahub
from lorahub.errors import LorahubError

pytestmark = [
    # peft 0.21 asks transformers 5.23 for an attribute that it deprecates
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Could not find a config file in"),
    pytest.mark.filterwarnings("ignore:Unable to fetch remote file"),
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`"),
]

_WORDS: dict[str, Any] = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "vocab_size": 50,
    "max_position_embeddings": 20,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_MODERN = {**_WORDS, "cls_token_id": 1, "sep_token_id": 2}

# the base's class, that of the adapter, settings, PEFT's task, modules of the attention
CASES: dict[str, tuple[str, str, dict[str, Any], str, list[str]]] = {
    "electra, bare": (
        "ElectraModel",
        "ElectraForSequenceClassification",
        {**_WORDS, "embedding_size": 16},
        "SEQ_CLS",
        ["query", "value"],
    ),
    "convnext": (
        "ConvNextModel",
        "ConvNextForImageClassification",
        {"hidden_sizes": [8, 16], "depths": [1, 1], "num_stages": 2, "image_size": 16, "patch_size": 2},
        "",
        ["pwconv1"],
    ),
    "electra": (
        "ElectraForPreTraining",
        "ElectraForSequenceClassification",
        {**_WORDS, "embedding_size": 16},
        "SEQ_CLS",
        ["query", "value"],
    ),
    "deberta-v2": (
        "DebertaV2ForMaskedLM",
        "DebertaV2ForTokenClassification",
        _WORDS,
        "TOKEN_CLS",
        ["query_proj", "value_proj"],
    ),
    "opt": (
        "OPTForCausalLM",
        "OPTForSequenceClassification",
        {**_WORDS, "ffn_dim": 24, "word_embed_proj_dim": 16},
        "SEQ_CLS",
        ["q_proj", "v_proj"],
    ),
    "modernbert": (
        "ModernBertForMaskedLM",
        "ModernBertForSequenceClassification",
        _MODERN,
        "SEQ_CLS",
        ["Wqkv"],
    ),
}


def build(kind: str, name: str, settings: dict[str, Any], **more: Any) -> Any:
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind.partition(",")[0], **settings, **more)
    return getattr(transformers, name)(config).float().eval()


@pytest.mark.parametrize("kind", CASES)
def test_a_head_is_merged_onto_a_base_without_it_and_computes_what_peft_computes(
    kind: str, saved: Callable[..., Path], tmp_path: Path
) -> None:
    base_class, target, settings, task, modules = CASES[kind]
    base = build(kind, base_class, settings)
    folder = saved(base)
    model = getattr(transformers, target).from_pretrained(folder, num_labels=5).eval()
    wrapped = peft.get_peft_model(
        copy.deepcopy(model),
        peft.LoraConfig(
            task_type=task or None,
            r=2,
            lora_alpha=4,
            target_modules=modules,
            modules_to_save=None if task else ["classifier"],
        ),
    )
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    wrapped.eval().save_pretrained(tmp_path / "adapter")
    words = torch.arange(3, 13).view(2, 5) if task else torch.randn(2, 3, 16, 16, generator=generator)
    with torch.no_grad():
        wanted, plain = wrapped(words).logits, model(words).logits
    assert (wanted - plain).norm() / plain.norm() > 1e-2

    lorahub.merge(folder, {"adapter": tmp_path / "adapter"}, out=tmp_path / "out")
    auto = {
        "SEQ_CLS": transformers.AutoModelForSequenceClassification,
        "TOKEN_CLS": transformers.AutoModelForTokenClassification,
        "": transformers.AutoModelForImageClassification,
    }[task]
    loaded, told = auto.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(told[each] for each in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert type(loaded).__name__ == target
    assert loaded.config.num_labels == 5
    with torch.no_grad():
        torch.testing.assert_close(loaded.eval()(words).logits, wanted, atol=1e-5, rtol=1e-4)


def test_a_class_with_parts_that_nobody_has_is_refused_by_their_names(
    saved: Callable[..., Path], tmp_path: Path
) -> None:
    folder = saved(build("deberta-v2", "DebertaV2ForMaskedLM", _WORDS))
    model = transformers.DebertaV2ForSequenceClassification.from_pretrained(folder, num_labels=5)
    config = peft.LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["query_proj"])
    peft.get_peft_model(model, config).save_pretrained(tmp_path / "adapter")
    with pytest.raises(LorahubError, match=r"pooler\.dense"):
        lorahub.merge(folder, {"adapter": tmp_path / "adapter"}, out=tmp_path / "out")


def test_a_head_that_no_class_has_is_refused(saved: Callable[..., Path], tmp_path: Path) -> None:
    folder = saved(build("opt", "OPTForCausalLM", CASES["opt"][2]))
    model = transformers.OPTForSequenceClassification.from_pretrained(folder, num_labels=5)
    model.score = torch.nn.Linear(16, 5)  # the class's own has no bias
    config = peft.LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["q_proj"])
    peft.get_peft_model(model, config).save_pretrained(tmp_path / "adapter")
    with pytest.raises(LorahubError, match="score"):
        lorahub.merge(folder, {"adapter": tmp_path / "adapter"}, out=tmp_path / "out")
