"""Small real models of every architecture, built from configurations and saved for real."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

if TYPE_CHECKING:
    from lorahub_transformers import Transformers

sys.path.append(str(Path(__file__).parent))  # for what several test files share: they lie in no package

_USUAL: dict[str, Any] = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
}
_SHORT = {**_USUAL, "vocab_size": 50, "max_position_embeddings": 20}
_GROUPED = {**_SHORT, "num_key_value_heads": 1}
_T5 = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2, "vocab_size": 50}

CONFIGS: dict[str, dict[str, Any]] = {
    "bert": _SHORT,
    "camembert": _SHORT,
    "clip_text_model": {**_SHORT, "projection_dim": 8, "bos_token_id": 1, "eos_token_id": 2},
    "clip_vision_model": {**_USUAL, "image_size": 8, "patch_size": 4, "projection_dim": 8},
    "distilbert": {
        "dim": 16,
        "n_layers": 2,
        "n_heads": 2,
        "hidden_dim": 24,
        "vocab_size": 50,
        "max_position_embeddings": 20,
    },
    "gemma2": {**_GROUPED, "head_dim": 8},
    "gpt2": {"n_embd": 16, "n_layer": 2, "n_head": 2, "vocab_size": 50, "n_positions": 20},
    "gpt_neox": _SHORT,
    "llama": _GROUPED,
    "mistral": _GROUPED,
    "mt5": _T5,
    "openai_privacy_filter": {
        **_GROUPED,
        "head_dim": 8,
        "num_local_experts": 2,
        "num_experts_per_tok": 1,
        "pad_token_id": 0,
    },
    "opt": {**_USUAL, "vocab_size": 50, "ffn_dim": 24, "word_embed_proj_dim": 16, "max_position_embeddings": 20},
    "qwen2": _GROUPED,
    "qwen3": {**_GROUPED, "head_dim": 8},
    "roberta": _SHORT,
    "t5": _T5,
    "umt5": _T5,
    "vit": {**_USUAL, "image_size": 8, "patch_size": 4},
    "xlm-roberta": _SHORT,
}

Tiny = Callable[..., Any]


def build(kind: str, name: str, *, seed: int = 0, dtype: torch.dtype = torch.float32, **more: Any) -> Any:
    """A model of class ``name`` with random weights; ``more`` are settings of its configuration."""
    import transformers

    config = transformers.AutoConfig.for_model(kind, **{**CONFIGS[kind], **more})
    torch.manual_seed(seed)
    return getattr(transformers, name)(config).to(dtype).eval()


@pytest.fixture
def tiny() -> Tiny:
    return build


@pytest.fixture
def framework() -> Transformers:
    from lorahub_transformers import Transformers

    return Transformers()


@pytest.fixture
def saved(tmp_path: Path) -> Callable[..., Path]:
    """Save a model as transformers does, into a new folder."""
    count = iter(range(1000))

    def save(model: Any, **options: Any) -> Path:
        folder = tmp_path / f"saved{next(count)}"
        model.save_pretrained(folder, **options)
        return folder

    return save


@pytest.fixture
def words() -> Any:
    """A tokenizer of whole words (w3 ... w49), made here."""
    import tokenizers
    import transformers

    vocabulary = {"<pad>": 0, "<eos>": 1, "<unk>": 2} | {f"w{number}": number for number in range(3, 50)}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    special = {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>", "padding_side": "left"}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made, **special)


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    yield
    transformers.logging.enable_progress_bar()
