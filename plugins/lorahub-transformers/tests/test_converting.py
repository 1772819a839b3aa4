"""Names and shapes that transformers converts on loading: every entry of its table, and adapters of its last release.

Which conversions a layout says exactly is data here, so that a release of transformers with another one is noticed.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from architectures import checkpoint, on_meta
from safetensors.torch import load_file, save_file
from tiny_architectures import built, inputs
from transformers import conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming

import lorahub
from lorahub.bases.index import BaseRef
from lorahub.bases.layout import Target
from lorahub.bases.open import survey_base
from lorahub_transformers import Transformers
from lorahub_transformers.converting import WAYS, way

pytestmark = [
    # peft 0.21 asks transformers 5.23 for an attribute that it deprecates
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Could not find a config file in"),
]

EXACT = {
    (("Chunk", 0),): "a tensor taken apart by rows",
    (("Concatenate", 0),): "tensors put one below the other",
    (("MergeModulelist", 0),): "experts stacked",
    (("MergeModulelist", 0), ("Concatenate", 1)): "experts stacked, gates above their partners",
    (("Split", 0),): "a tensor taken apart by rows, of unequal parts",
    (("Transpose", 0, 1),): "a matrix turned",
}
REFUSED = {
    (("Chunk", 0), ("PermuteForRope",)): "rows woven for rotary positions",
    (("Concatenate", 1),): "stacks put side by side",
    (("ErnieFuseAndSplitTextVisionExperts",),): "experts dealt out to two stacks",
    (("Interleave", 0), ("Chunk", 0)): "rows woven",
    (("Interleave", 1),): "rows of stacks woven",
    (("Interleave", 1), ("Chunk", 1)): "rows of stacks woven",
    (("PermuteForRope",),): "rows woven for rotary positions",
    (("Transpose", 1, 2),): "stacks of turned matrices",
}
"""Operations of a conversion -> what they do; the tensors of these keep their stored names, and nothing lands there
under the live ones."""


def entries() -> list[Any]:
    mapping = conversion_mapping._build_checkpoint_conversion_mapping()
    return [entry for each in mapping.values() for entry in each]


def test_every_conversion_of_the_library_is_a_renaming_or_known() -> None:
    ways = {way(entry.operations) for entry in entries() if isinstance(entry, WeightConverter)}
    unknown = ways - EXACT.keys() - REFUSED.keys()
    assert not unknown, f"transformers {transformers.__version__} converts in ways that nobody looked at"
    assert all(isinstance(entry, (WeightConverter, WeightRenaming)) for entry in entries())
    assert EXACT.keys() - {(("Chunk", 0),), (("Split", 0),)} == WAYS.keys()
    renamings = sum(isinstance(entry, WeightRenaming) for entry in entries())
    exact = sum(isinstance(e, WeightConverter) and way(e.operations) in EXACT for e in entries())
    assert renamings > 1000
    assert exact > 100


# an architecture -> what its checkpoints, and with them adapters of the fourth release, call a module of the model
OLDER = {
    "llava": ("model.language_model.layers.0.self_attn.q_proj", "language_model.model.layers.0.self_attn.q_proj"),
    "qwen2_vl": ("model.language_model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.q_proj"),
    "mixtral": ("layers.0.mlp.gate", "layers.0.block_sparse_moe.gate"),
    "deit": ("layers.0.attention.q_proj", "encoder.layer.0.attention.attention.query"),
}

NAMES = {"llava": "LlavaForConditionalGeneration", "qwen2_vl": "Qwen2VLForConditionalGeneration"}


@pytest.mark.parametrize("kind", OLDER)
def test_modules_are_found_under_their_older_names(kind: str) -> None:
    live, older = OLDER[kind]
    model = on_meta(kind, NAMES.get(kind, ""))
    framework = Transformers()
    for index in (framework.index_model(model, BaseRef()), framework.index(BaseRef(), checkpoint(model))):
        assert live in index.modules()
        assert older in index.spellings(live)


KINDS: dict[str, Callable[[], Any]] = {
    "lora": lambda: peft.LoraConfig(r=2, target_modules=r".*language_model.*\.(q_proj|down_proj)"),
    "dora": lambda: peft.LoraConfig(r=2, target_modules=r".*language_model.*\.q_proj", use_dora=True),
    "loha": lambda: peft.LoHaConfig(r=2, target_modules=r".*language_model.*\.q_proj"),
    "oft": lambda: peft.OFTConfig(oft_block_size=4, target_modules=r".*language_model.*\.q_proj"),
    "ia3": lambda: peft.IA3Config(target_modules=r".*language_model.*\.q_proj", feedforward_modules=[]),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.filterwarnings("ignore:.*Cayley:UserWarning")
def test_an_adapter_with_the_names_of_the_fourth_release_lands_whatever_its_kind(
    kind: str, saved: Callable[..., Path], tmp_path: Path
) -> None:
    base = built("pictures and words")
    folder = saved(base)
    wrapped = peft.get_peft_model(copy.deepcopy(base), KINDS[kind]())
    generator = torch.Generator().manual_seed(3)
    for name, parameter in wrapped.named_parameters():
        if parameter.requires_grad:
            scale = 0.1 if "magnitude" in name else 0.3
            parameter.data.add_(torch.randn(parameter.shape, generator=generator) * scale)
    wrapped.save_pretrained(tmp_path / "adapter")
    with torch.no_grad():
        wanted = wrapped(**inputs("pictures and words"))[0]
        reference = wrapped.merge_and_unload().state_dict()
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(file)
    older = {key.replace(".model.language_model.", ".language_model.model."): each for key, each in tensors.items()}
    assert not older.keys() & tensors.keys()
    save_file(older, file)
    settings = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    settings["target_modules"] = ["q_proj", *(["down_proj"] if kind == "lora" else [])]
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(settings))

    before = {key: tensor.clone() for key, tensor in base.state_dict().items()}
    options = {"compat": "peft"} if kind == "oft" else {}
    with torch.no_grad(), lorahub.attach(base, {"adapter": tmp_path / "adapter"}, **options):
        torch.testing.assert_close(base(**inputs("pictures and words"))[0], wanted, atol=2e-5, rtol=2e-4)
    lorahub.merge(folder, {"adapter": tmp_path / "adapter"}, out=tmp_path / "out", **options)
    lorahub.merge(base, {"adapter": tmp_path / "adapter"}, **options)
    opened = type(base).from_pretrained(tmp_path / "out").state_dict()
    changed = 0
    for key, tensor in base.state_dict().items():
        torch.testing.assert_close(tensor, reference[key], atol=1e-5, rtol=1e-5)
        assert torch.equal(opened[key], tensor)
        changed += bool((tensor - before[key]).norm() / before[key].norm() > 1e-2)
    assert changed >= 2


def test_a_projection_that_loading_takes_out_of_a_fused_tensor_is_rows_of_it(
    saved: Callable[..., Path], tmp_path: Path
) -> None:
    """Nomic's encoder keeps queries, keys and values in one tensor on disk, and apart in the model."""
    config = transformers.AutoConfig.for_model(
        "nomic_bert",
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=24,
        vocab_size=50,
        max_position_embeddings=20,
    )
    torch.manual_seed(0)
    base = transformers.AutoModel.from_config(config).eval()
    folder = saved(base)
    framework = Transformers()
    files = framework.index(BaseRef(), survey_base(folder))
    live = framework.index_model(base, BaseRef())
    query = next(name for name in live.parameters if name.endswith("q_proj.weight"))
    fused = next(name for name in files.parameters if "qkv" in name and name.endswith("weight"))
    assert query not in files.parameters
    target = Target("", query.removesuffix(".weight"), "weight")
    assert framework.layouts(files, [target])[target].pieces[0].parameter == fused
    back = Target("", fused.removesuffix(".weight"), "weight")
    pieces = framework.layouts(live, [back])[back].pieces
    assert [piece.parameter.split(".")[-2] for piece in pieces] == ["q_proj", "k_proj", "v_proj"]

    wrapped = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    for parameter in wrapped.parameters():
        if parameter.requires_grad:
            parameter.data.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(5)) * 0.3)
    wrapped.save_pretrained(tmp_path / "adapter")
    reference = wrapped.merge_and_unload().state_dict()
    lorahub.merge(folder, {"adapter": tmp_path / "adapter"}, out=tmp_path / "out")
    merged = type(base).from_pretrained(tmp_path / "out").state_dict()
    for key, tensor in merged.items():
        torch.testing.assert_close(tensor, reference[key], atol=1e-5, rtol=1e-5)
    change = (merged[query] - base.state_dict()[query]).norm() / base.state_dict()[query].norm()
    assert change > 1e-2
