"""Adapters on a model that Transformers shards over processes (``tp_plan="auto"``); real processes, gloo."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import peft
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

pytest.importorskip("transformers.distributed.tensor_parallel", reason="this Transformers shards in another way")

SCRIPT = Path(__file__).with_name("tensor_parallel_ranks.py")
TARGETS = ["q_proj", "v_proj", "o_proj", "up_proj", "down_proj", "lm_head"]


def write_adapter(base: Path, folder: Path, seed: int, **options: object) -> str:
    torch.manual_seed(seed)
    model = peft.get_peft_model(LlamaForCausalLM.from_pretrained(base), peft.LoraConfig(r=4, **options))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(folder)
    return str(folder)


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # PEFT asks for it
@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`:UserWarning")
def test_adapters_act_and_merge_as_on_the_whole_model(tmp_path):
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 64}
    torch.manual_seed(0)
    base = tmp_path / "base"
    LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2)).save_pretrained(base)
    given = {
        "base": str(base),
        "one": write_adapter(base, tmp_path / "one", 1, target_modules=[*TARGETS, "embed_tokens"]),
        "two": write_adapter(base, tmp_path / "two", 2, target_modules=TARGETS),
        "dora": write_adapter(base, tmp_path / "dora", 3, target_modules=["up_proj"], use_dora=True),
    }
    command, world = [sys.executable, str(SCRIPT), str(tmp_path), json.dumps(given)], {"WORLD_SIZE": "2"}
    ranks = [
        subprocess.Popen(command, env=os.environ | world | {"RANK": n, "LOCAL_RANK": n}, stderr=subprocess.PIPE)
        for n in "01"
    ]
    for rank in ranks:
        _, said = rank.communicate(timeout=200)
        assert rank.returncode == 0, said.decode()
    for found in (json.loads((tmp_path / f"found-{n}.json").read_text()) for n in range(2)):
        assert "Shard(dim=1)" in found["placements"]
        assert found["change"] > 0.1
        assert found["live"] < 1e-5
        assert found["several"] < 1e-5
        assert found["merged"] < 1e-5
        assert found["back"] < 1e-5
        assert "up_proj.weight is tensor-parallel, and only changes of low rank" in found["dora"]
