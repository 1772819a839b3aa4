"""Small real models, built from a configuration, and scripts that run in processes of their own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from transformers import PreTrainedModel

sys.path.append(str(Path(__file__).parent))  # for what several test files share: they lie in no package
pytest.register_assert_rewrite("conversion.making")


@pytest.fixture
def tiny_model() -> Callable[..., PreTrainedModel]:
    """``tiny_model("gpt2", n_layer=1)``: a small real model of that architecture, the same each time."""
    import torch
    import transformers

    def build(family: str, *, seed: int = 0, **config: object) -> PreTrainedModel:
        name, fields = TINY[family]
        torch.manual_seed(seed)
        model_class = getattr(transformers, name)
        return model_class(model_class.config_class(**fields | config)).eval()

    return build


@pytest.fixture(scope="session")
def run_script(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    """``run_script(TEXT, *arguments)``: what a script of Python prints, read as JSON; it can import what lies here."""

    def run(text: str, *arguments: str | Path) -> Any:
        script = tmp_path_factory.mktemp("script") / "script.py"
        script.write_text(text)
        path = os.pathsep.join(filter(None, (str(Path(__file__).parent), os.environ.get("PYTHONPATH"))))
        done = subprocess.run(
            [sys.executable, str(script), *map(str, arguments)],
            env={**os.environ, "PYTHONPATH": path},
            capture_output=True,
            text=True,
            check=False,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    return run


_ENCODER = {
    "vocab_size": 50,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_attention_heads": 2,
    "num_hidden_layers": 2,
}

TINY: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": ("BertModel", _ENCODER),
    "roberta": ("RobertaModel", _ENCODER),
    "distilbert": ("DistilBertModel", {"vocab_size": 50, "dim": 16, "hidden_dim": 32, "n_heads": 2, "n_layers": 2}),
    "gpt2": ("GPT2LMHeadModel", {"vocab_size": 50, "n_embd": 16, "n_head": 2, "n_layer": 2, "n_positions": 32}),
    "gpt_neox": ("GPTNeoXForCausalLM", _ENCODER),
    "llama": ("LlamaForCausalLM", _ENCODER | {"num_key_value_heads": 1}),
    "t5": (
        "T5ForConditionalGeneration",
        {"vocab_size": 50, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_heads": 2, "num_layers": 2},
    ),
    "vit": ("ViTModel", {k: v for k, v in _ENCODER.items() if k != "vocab_size"} | {"image_size": 8, "patch_size": 4}),
}
"""Architecture -> (class, config)."""
