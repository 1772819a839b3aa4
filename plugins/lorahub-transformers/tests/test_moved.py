"""Routers that transformers renames on loading: both names find the one parameter, and PEFT's result is reached."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from transformers.conversion_mapping import get_checkpoint_conversion_mapping
from transformers.core_model_loading import WeightRenaming

import lorahub
from lorahub_transformers.moved import MOVED, moved

pytestmark = [
    # peft 0.21 asks transformers 5.23 for an attribute that it deprecates
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Could not find a config file in"),
]

MIXTURE: dict[str, Any] = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "intermediate_size": 24,
    "vocab_size": 50,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
}


@pytest.mark.parametrize("kind", MOVED)
def test_the_table_says_what_transformers_renames(kind: str) -> None:
    stored, live = MOVED[kind]
    name = f"model.layers.0.{stored}.weight"
    for each in get_checkpoint_conversion_mapping(kind) or ():
        if isinstance(each, WeightRenaming):
            name = each.rename_source_key(name)[0]
    assert name == f"model.layers.0.{live}.weight"


def test_either_name_is_an_alias_of_the_other_and_nothing_else_is() -> None:
    config = {"model_type": "mixtral"}
    stored, live = "model.layers.3.block_sparse_moe.gate", "model.layers.3.mlp.gate"
    assert moved(config, [f"{stored}.weight", "model.norm.weight"]) == ((f"{stored}.", f"{live}."),)
    assert moved(config, [f"{live}.weight"]) == ((f"{live}.", f"{stored}."),)
    assert moved({"model_type": "llama"}, [f"{stored}.weight"]) == ()
    assert moved({}, [f"{stored}.weight"]) == ()


def built(kind: str) -> Any:
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, **MIXTURE)
    return transformers.AutoModelForCausalLM.from_config(config).eval()


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("mixtral", {"modules_to_save": ["gate"]}),
        ("mixtral", {"target_parameters": ["mlp.gate.weight"]}),
        ("mixtral", {"modules_to_save": ["experts"]}),
        ("phimoe", {"modules_to_save": ["router"]}),
    ],
    ids=["saved router", "router with factors", "saved experts", "renamed router"],
)
def test_what_lies_elsewhere_in_the_checkpoint_merges_as_peft_merges_it(
    saved: Callable[..., Path], tmp_path: Path, kind: str, options: dict[str, Any]
) -> None:
    folder = saved(built(kind))
    before = type(built(kind)).from_pretrained(folder)
    untouched = {name: tensor.clone() for name, tensor in before.state_dict().items()}
    model = peft.get_peft_model(before, peft.LoraConfig(r=2, target_modules=["q_proj"], **options))
    generator = torch.Generator().manual_seed(3)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
    model.save_pretrained(tmp_path / "adapter")
    reference = model.merge_and_unload().state_dict()
    lorahub.merge(folder, {"adapter": tmp_path / "adapter"}, out=tmp_path / "merged")
    merged = type(before).from_pretrained(tmp_path / "merged").state_dict()
    part = MOVED[kind][1].partition(".")[2] if options.get("modules_to_save") != ["experts"] else "experts"
    changed = 0
    for name, wanted in reference.items():
        torch.testing.assert_close(merged[name], wanted, rtol=1e-5, atol=1e-6)
        if f".{part}." in name:
            change = (wanted - untouched[name]).norm() / untouched[name].norm()
            assert change > 1e-2
            changed += 1
    assert changed
