"""Converted files in the tools they are for: PEFT and diffusers load them, kohya's and MLX's keys are theirs.

References are the tools' own code: PEFT's merged outputs, LyCORIS's live ones, diffusers' own conversion to
kohya's spelling; for MLX, which runs on other machines, the formula of its LoRA layer written out.  Holds for PEFT
0.21.2, diffusers 0.42.1 and LyCORIS 4.1.3.
"""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import diffusers
import gguf
import numpy as np
import pytest
import torch
from diffusers.utils.state_dict_utils import convert_all_state_dict_to_peft, convert_state_dict_to_kohya
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

import lorahub
from lorahub.adapter import load, open_header
from lorahub.plugins import Registry

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what PEFT's and LyCORIS's imports say of other packages is not ours
    import peft
    from lycoris import LycorisNetwork, create_lycoris
    from peft import PeftModel, get_peft_model, get_peft_model_state_dict


def quietly(action: Callable[[], Any]) -> Any:
    """Run a peer's code, whose warnings and prints are its own affair."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return action()


class Net(nn.Module):
    """Linear layers and a convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(24, 36)
        self.block = nn.Sequential(nn.Linear(36, 36), nn.Tanh(), nn.Linear(36, 24))
        self.conv = nn.Conv2d(24, 16, 3)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        hidden = self.block(self.first(x))
        return hidden, self.conv(hidden.transpose(1, 2).reshape(-1, 24, 4, 4))


def net() -> Net:
    torch.manual_seed(3)
    return Net().eval()


INPUT = torch.randn(2, 16, 24, generator=torch.Generator().manual_seed(5))
LINEAR = ["first", "block.0", "block.2"]


def moved(model: nn.Module, *, size: float = 0.3) -> None:
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * size)


def outputs(model: nn.Module) -> list[torch.Tensor]:
    with torch.no_grad():
        return list(model(INPUT))


def alike(found: list[torch.Tensor], expected: list[torch.Tensor], without: list[torch.Tensor]) -> None:
    """Equal within float32, and further from what there is without the adapter."""
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
    assert any((one - other).norm() > 1e-2 * other.norm() for one, other in zip(expected, without, strict=True))


PEFT_CASES: Mapping[str, Any] = {
    "loha": peft.LoHaConfig(r=2, alpha=3, target_modules=[*LINEAR, "conv"]),
    "lokr": peft.LoKrConfig(r=2, alpha=3, target_modules=[*LINEAR, "conv"], decompose_factor=4),
    "adalora": peft.AdaLoraConfig(init_r=3, target_r=3, total_step=10, lora_alpha=5, target_modules=LINEAR),
    "vera": peft.VeraConfig(r=4, target_modules=["block.0"]),
    "vera of several sizes": peft.VeraConfig(r=4, target_modules=LINEAR),
    "miss": peft.MissConfig(r=4, target_modules=LINEAR),
    "gralora": peft.GraloraConfig(r=4, gralora_k=2, alpha=4, target_modules=LINEAR),
    "rslora": peft.LoraConfig(r=3, lora_alpha=5, use_rslora=True, target_modules=LINEAR),
}


@pytest.mark.parametrize("case", PEFT_CASES)
def test_what_peft_trained_as_another_kind_it_loads_as_plain_lora(case: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = quietly(lambda: get_peft_model(net(), PEFT_CASES[case]))
    moved(model)
    quietly(lambda: model.save_pretrained(tmp_path / "theirs"))
    report = lorahub.convert(tmp_path / "theirs", "peft", tmp_path / "lora", base=net(), kind="lora", verify=True)
    config = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    assert (config["peft_type"], report.unverified) == ("LORA", 0)
    assert report.max_error is not None
    assert report.max_error <= 1e-6
    again = quietly(lambda: PeftModel.from_pretrained(net(), tmp_path / "lora"))
    merged = quietly(model.merge_and_unload)
    alike(outputs(again.eval()), outputs(merged.eval()), outputs(net()))


LYCORIS_CASES: Mapping[str, dict[str, Any]] = {
    "lora": {"algo": "lora"},
    "locon with a core": {"algo": "locon", "use_tucker": True, "conv_dim": 2, "conv_alpha": 1},
    "loha": {"algo": "loha", "conv_dim": 2, "conv_alpha": 1},
    "loha with cores": {"algo": "loha", "use_tucker": True, "conv_dim": 2, "conv_alpha": 1},
    "lokr": {"algo": "lokr", "factor": 4, "conv_dim": 2, "conv_alpha": 1},
    "dora": {"algo": "lora", "dora_wd": True, "wd_on_output": True},
}


@pytest.mark.parametrize("case", LYCORIS_CASES)
def test_what_lycoris_trained_peft_loads(case: str, tmp_path: Path) -> None:
    options = dict(LYCORIS_CASES[case])
    algo = options.pop("algo")
    model = net()
    LycorisNetwork.apply_preset({"enable_conv": "conv_dim" in options, "target_module": ["Net"], "target_name": [".*"]})
    torch.manual_seed(0)
    made = quietly(lambda: create_lycoris(model, 1.0, linear_dim=3, linear_alpha=2, algo=algo, **options))
    made.apply_to()
    moved(made)
    weights = {key: each.detach().clone().contiguous() for key, each in made.state_dict().items()}
    (tmp_path / "theirs").mkdir()
    save_file(weights, tmp_path / "theirs" / "x.safetensors")
    expected = outputs(model.eval())  # live, as trained: merge_to scales LoHa and LoKr twice in this release
    report = lorahub.convert(tmp_path / "theirs" / "x.safetensors", "peft", tmp_path / "out", base=net(), kind="lora")
    assert len(report.targets) == len({key.partition(".")[0] for key in weights})
    again = quietly(lambda: PeftModel.from_pretrained(net(), tmp_path / "out"))
    alike(outputs(again.eval()), expected, outputs(net()))


def unet(seed: int = 0) -> Any:
    torch.manual_seed(seed)
    return diffusers.UNet2DConditionModel(
        block_out_channels=(8, 16),
        layers_per_block=1,
        sample_size=8,
        in_channels=4,
        out_channels=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=8,
        norm_num_groups=2,
        attention_head_dim=4,
    ).eval()


def pipeline() -> Any:
    return diffusers.StableDiffusionPipeline(
        vae=None,
        text_encoder=None,
        tokenizer=None,
        unet=unet(),
        scheduler=None,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


PROJECTIONS = ["to_q", "to_k", "to_v", "to_out.0"]


def adapted(**fields: Any) -> Any:
    model = unet()
    model.add_adapter(peft.LoraConfig(**{"r": 4, "lora_alpha": 4, "target_modules": PROJECTIONS} | fields))
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_A" in name or "lora_B" in name:
                parameter.normal_(std=0.3)
    return model


def predicted(model: Any) -> torch.Tensor:
    generator = torch.Generator().manual_seed(2)
    sample = torch.randn(1, 4, 8, 8, generator=generator)
    with torch.no_grad():
        result: torch.Tensor = model(sample, 3, torch.randn(1, 5, 8, generator=generator)).sample
    return result


def kohya_file(model: Any, place: Path) -> Path:
    """As diffusers' own script writes it; alpha is the rank there, whatever the config said."""
    state = {f"unet.{key}": each for key, each in get_peft_model_state_dict(model).items()}
    theirs = convert_state_dict_to_kohya(convert_all_state_dict_to_peft(state))
    save_file({key: each.detach().contiguous().clone() for key, each in theirs.items()}, place)
    return place


def test_a_kohya_file_becomes_what_diffusers_loads(tmp_path: Path) -> None:
    model = adapted()
    source = kohya_file(model, tmp_path / "x.safetensors")
    report = lorahub.convert(source, "diffusers", tmp_path / "out", base=unet(), component="unet")
    assert report.max_error == 0.0
    pipe = pipeline()
    quietly(lambda: pipe.load_lora_weights(tmp_path / "out"))
    alike([predicted(pipe.unet)], [predicted(model)], [predicted(unet())])


def test_what_diffusers_saved_becomes_kohyas_keys_one_by_one(tmp_path: Path, registry: Registry) -> None:
    model = adapted()
    diffusers.StableDiffusionPipeline.save_lora_weights(
        tmp_path / "theirs",
        unet_lora_layers=get_peft_model_state_dict(model),
        unet_lora_adapter_metadata=model.peft_config["default"].to_dict(),
    )
    lorahub.convert(tmp_path / "theirs", "kohya", tmp_path / "ours.safetensors")
    ours, theirs = load_file(tmp_path / "ours.safetensors"), load_file(kohya_file(model, tmp_path / "x.safetensors"))
    assert ours.keys() == theirs.keys()
    for key, each in theirs.items():
        assert torch.equal(ours[key].float().squeeze(), each.float().squeeze()), key
    pipe = pipeline()
    quietly(lambda: pipe.load_lora_weights(tmp_path / "ours.safetensors"))
    alike([predicted(pipe.unet)], [predicted(model)], [predicted(unet())])


def test_an_alpha_that_diffusers_own_script_forgets_is_kept(tmp_path: Path) -> None:
    model = adapted(lora_alpha=1)
    diffusers.StableDiffusionPipeline.save_lora_weights(
        tmp_path / "theirs",
        unet_lora_layers=get_peft_model_state_dict(model),
        unet_lora_adapter_metadata=model.peft_config["default"].to_dict(),
    )
    lorahub.convert(tmp_path / "theirs", "kohya", tmp_path / "ours.safetensors")
    alphas = {float(each) for key, each in load_file(tmp_path / "ours.safetensors").items() if key.endswith(".alpha")}
    assert alphas == {1.0}
    pipe = pipeline()
    quietly(lambda: pipe.load_lora_weights(tmp_path / "ours.safetensors"))
    alike([predicted(pipe.unet)], [predicted(model)], [predicted(unet())])


def test_one_part_of_a_pipelines_adapter_is_one_peft_loads(tmp_path: Path) -> None:
    model = adapted(lora_alpha=6)
    diffusers.StableDiffusionPipeline.save_lora_weights(
        tmp_path / "theirs",
        unet_lora_layers=get_peft_model_state_dict(model),
        unet_lora_adapter_metadata=model.peft_config["default"].to_dict(),
    )
    lorahub.convert(tmp_path / "theirs", "peft", tmp_path / "out", component="unet")
    again = quietly(lambda: PeftModel.from_pretrained(unet(), tmp_path / "out"))
    alike([predicted(again)], [predicted(model)], [predicted(unet())])


def test_a_peft_folder_is_one_a_pipeline_loads_once_its_component_is_named(tmp_path: Path) -> None:
    config = peft.LoraConfig(r=4, lora_alpha=6, use_rslora=True, target_modules=PROJECTIONS)
    model = quietly(lambda: get_peft_model(unet(), config))
    moved(model)
    quietly(lambda: model.save_pretrained(tmp_path / "theirs"))
    lorahub.convert(tmp_path / "theirs", "diffusers", tmp_path / "out", component="unet")
    pipe = pipeline()
    quietly(lambda: pipe.load_lora_weights(tmp_path / "out"))
    alike([predicted(pipe.unet)], [predicted(model.eval())], [predicted(unet())])


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    return LlamaForCausalLM(config).eval()


def test_what_peft_trained_has_mlxs_keys_shapes_and_arithmetic(tmp_path: Path) -> None:
    model = quietly(
        lambda: get_peft_model(llama(), peft.LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj", "down_proj"]))
    )
    moved(model)
    quietly(lambda: model.save_pretrained(tmp_path / "theirs"))
    lorahub.convert(tmp_path / "theirs", "mlx", tmp_path / "mlx")
    tensors = load_file(tmp_path / "mlx" / "adapters.safetensors")
    config = json.loads((tmp_path / "mlx" / "adapter_config.json").read_text())
    expected = {
        f"model.layers.{layer}.{module}.lora_{side}"
        for layer in range(2)
        for module in ("self_attn.q_proj", "mlp.down_proj")
        for side in "ab"
    }
    assert tensors.keys() == expected
    assert config["fine_tune_type"] == "lora"
    given = config["lora_parameters"]
    assert (given["rank"], given["scale"], sorted(given["keys"])) == (4, 1.5, ["mlp.down_proj", "self_attn.q_proj"])
    layer = model.base_model.model.model.layers[1].self_attn.q_proj
    x = torch.randn(3, 16, generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        theirs, bare = layer(x), layer.base_layer(x)
    a, b = (tensors[f"model.layers.1.self_attn.q_proj.lora_{side}"].numpy() for side in "ab")
    ours = bare.numpy() + given["scale"] * (x.numpy() @ a) @ b  # mlx_lm.tuner.lora.LoRALinear
    np.testing.assert_allclose(ours, theirs.numpy(), rtol=1e-5, atol=1e-5)
    assert float((theirs - bare).norm() / bare.norm()) > 1e-2


def test_what_mlx_trained_peft_loads(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(1)
    modules = [f"model.layers.{layer}.self_attn.q_proj" for layer in range(2)]
    tensors = {f"{each}.lora_a": torch.randn(16, 4, generator=generator) for each in modules}
    tensors |= {f"{each}.lora_b": torch.randn(4, 16, generator=generator) for each in modules}
    (tmp_path / "mlx").mkdir()
    save_file(tensors, tmp_path / "mlx" / "adapters.safetensors")
    config = {"fine_tune_type": "lora", "lora_parameters": {"rank": 4, "scale": 0.7, "dropout": 0.0}, "num_layers": 2}
    (tmp_path / "mlx" / "adapter_config.json").write_text(json.dumps(config))
    report = lorahub.convert(tmp_path / "mlx", "peft", tmp_path / "peft")
    assert report.max_error == 0.0
    reference = llama()
    with torch.no_grad():
        for each in modules:
            weight = reference.get_submodule(each).weight
            weight += 0.7 * (tensors[f"{each}.lora_a"] @ tensors[f"{each}.lora_b"]).T
    again = quietly(lambda: PeftModel.from_pretrained(llama(), tmp_path / "peft")).eval()
    tokens = torch.arange(6)[None]
    with torch.no_grad():
        alike([again(tokens).logits], [reference(tokens).logits], [llama()(tokens).logits])


def bert(cls: Any) -> Any:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, num_labels=3
    )
    return cls(config).eval()


@pytest.mark.plugin("transformers")
def test_names_become_those_of_the_base_it_is_read_against(tmp_path: Path) -> None:
    """Trained on the bare encoder, wanted under the names of the model around it, as releases rename them."""
    model = quietly(lambda: get_peft_model(bert(BertModel), peft.LoraConfig(r=2, target_modules=["query"])))
    moved(model)
    quietly(lambda: model.save_pretrained(tmp_path / "theirs"))
    bert(BertForSequenceClassification).save_pretrained(tmp_path / "base")
    lorahub.convert(tmp_path / "theirs", "peft", tmp_path / "out", base=tmp_path / "base")
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        again = PeftModel.from_pretrained(bert(BertForSequenceClassification), tmp_path / "out")
    assert not [each for each in said if "missing" in str(each.message).lower()]
    own, theirs = again.state_dict(), model.state_dict()
    factors = [key for key in theirs if "lora_" in key]
    assert len(factors) == 4
    for key in factors:
        assert torch.equal(own[key.replace("base_model.model.", "base_model.model.bert.")], theirs[key])


@pytest.mark.plugin("transformers")
def test_a_conv1d_keeps_its_way_round(tmp_path: Path, tiny_model: Any) -> None:
    fresh = tiny_model("gpt2")
    config = peft.LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True)
    model = quietly(lambda: get_peft_model(copy.deepcopy(fresh), config))
    moved(model)
    quietly(lambda: model.save_pretrained(tmp_path / "theirs"))
    fresh.save_pretrained(tmp_path / "base")
    lorahub.convert(tmp_path / "theirs", "kohya", tmp_path / "x.safetensors")
    lorahub.convert(tmp_path / "x.safetensors", "peft", tmp_path / "back", base=tmp_path / "base")
    assert json.loads((tmp_path / "back" / "adapter_config.json").read_text())["fan_in_fan_out"] is True
    again = quietly(lambda: PeftModel.from_pretrained(copy.deepcopy(fresh), tmp_path / "back")).eval()
    tokens = torch.arange(6)[None]
    with torch.no_grad():
        alike([again(tokens).logits], [model.eval()(tokens).logits], [fresh(tokens).logits])


def test_dora_goes_through_every_format_that_has_it(tmp_path: Path, registry: Registry) -> None:
    model = quietly(lambda: get_peft_model(llama(), peft.LoraConfig(r=4, use_dora=True, target_modules=["down_proj"])))
    moved(model, size=0.5)
    quietly(lambda: model.save_pretrained(tmp_path / "peft"))
    last = tmp_path / "peft"
    for step, name in enumerate(("kohya", "mlx", "diffusers", "peft")):
        lorahub.convert(last, name, tmp_path / f"{step}-{name}")
        last = tmp_path / f"{step}-{name}"
    assert load(open_header(last, registry), registry).deltas
    one, other = (load_file(each / "adapter_model.safetensors") for each in (tmp_path / "peft", last))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)
    again = quietly(lambda: PeftModel.from_pretrained(llama(), last)).eval()
    tokens = torch.arange(6)[None]
    with torch.no_grad():
        alike([again(tokens).logits], [model.eval()(tokens).logits], [llama()(tokens).logits])


STARTS = ["pissa", "olora"]


@pytest.mark.parametrize("init", STARTS)
def test_what_was_started_from_the_weight_becomes_plain_lora(init: str, tmp_path: Path) -> None:
    config = peft.LoraConfig(r=4, lora_alpha=4, init_lora_weights=init, target_modules=LINEAR)
    model = quietly(lambda: get_peft_model(net(), config))
    moved(model, size=0.05)
    quietly(lambda: model.save_pretrained(tmp_path / "theirs"))
    with pytest.raises(lorahub.LorahubError) as stop:
        lorahub.convert(tmp_path / "theirs", "kohya", tmp_path / "never.safetensors")
    assert "--base" in str(stop.value)
    report = lorahub.convert(tmp_path / "theirs", "peft", tmp_path / "out", base=net(), kind="lora")
    assert report.rules == {"pissa-to-lora": len(LINEAR)}
    assert {each.rank_after for each in report.targets} <= set(range(4, 9))
    said = json.loads((tmp_path / "out" / "adapter_config.json").read_text())["init_lora_weights"]
    assert said is True
    again = quietly(lambda: PeftModel.from_pretrained(net(), tmp_path / "out"))
    alike(outputs(again.eval()), outputs(model.eval()), outputs(net()))


LANGUAGE = ["peft", "kohya", "mlx", "torchtune", "gguf"]


@pytest.mark.parametrize("one", LANGUAGE)
@pytest.mark.parametrize("other", LANGUAGE)
def test_a_language_models_adapter_goes_anywhere_and_back_bit_for_bit(one: str, other: str, tmp_path: Path) -> None:
    """Names and rows of queries and keys change on the way (torchtune, llama.cpp); numbers never do."""
    llama().save_pretrained(tmp_path / "base")
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj", "k_proj", "o_proj", "up_proj"])
    model = quietly(lambda: get_peft_model(llama(), config))
    moved(model)
    quietly(lambda: model.save_pretrained(tmp_path / "theirs"))
    base = lorahub.open_base(tmp_path / "base")
    lorahub.convert(tmp_path / "theirs", one, tmp_path / "one", base=base)
    lorahub.convert(tmp_path / "one", other, tmp_path / "other", base=base)
    report = lorahub.convert(tmp_path / "other", "peft", tmp_path / "back", base=base)
    assert (dict(report.rules), report.max_error) == ({"rename": 8}, 0.0)
    theirs, back = (load_file(tmp_path / each / "adapter_model.safetensors") for each in ("theirs", "back"))
    assert theirs.keys() == back.keys()
    assert all(torch.equal(theirs[key], back[key]) for key in theirs)
    again = quietly(lambda: PeftModel.from_pretrained(llama(), tmp_path / "back")).eval()
    tokens = torch.arange(6)[None]
    with torch.no_grad():
        alike([again(tokens).logits], [model.eval()(tokens).logits], [llama()(tokens).logits])


def test_rank_stabilised_scales_reach_llama_cpp(tmp_path: Path) -> None:
    """llama.cpp's own converter ignores use_rslora; its runtime multiplies by alpha over the rank."""
    llama().save_pretrained(tmp_path / "base")
    config = peft.LoraConfig(r=4, lora_alpha=6, use_rslora=True, target_modules=["q_proj"])
    model = quietly(lambda: get_peft_model(llama(), config))
    quietly(lambda: model.save_pretrained(tmp_path / "theirs"))
    report = lorahub.convert(tmp_path / "theirs", "gguf", tmp_path / "x.gguf", base=tmp_path / "base")
    assert report.rules == {"rslora-folded": 2}
    reader = quietly(lambda: gguf.GGUFReader(tmp_path / "x.gguf"))
    assert float(reader.get_field("adapter.lora.alpha").contents()) == pytest.approx(6 / 4**0.5 * 4, rel=1e-7)
    assert {each.name for each in reader.tensors} == {f"blk.{n}.attn_q.weight.lora_{s}" for n in range(2) for s in "ab"}


def mixture() -> Qwen3MoeForCausalLM:
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=24,
        moe_intermediate_size=12,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        num_experts=4,
        num_experts_per_tok=2,
    )
    return Qwen3MoeForCausalLM(config).eval()


def test_experts_named_as_transformers_4_had_them_load_where_transformers_5_stacks_them(tmp_path: Path) -> None:
    projections = {"gate_proj": (12, 16), "up_proj": (12, 16), "down_proj": (16, 12)}
    generator = torch.Generator().manual_seed(1)
    changes, tensors = {}, {}
    for layer in range(2):
        for expert in range(4):
            for name, (out, into) in projections.items():
                stem = f"base_model.model.model.layers.{layer}.mlp.experts.{expert}.{name}"
                down = tensors[f"{stem}.lora_A.weight"] = torch.randn(3, into, generator=generator)
                up = tensors[f"{stem}.lora_B.weight"] = torch.randn(out, 3, generator=generator)
                changes[layer, expert, name] = 2 * up @ down
    (tmp_path / "old").mkdir()
    save_file(tensors, tmp_path / "old" / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 3, "lora_alpha": 6, "target_modules": list(projections)}
    (tmp_path / "old" / "adapter_config.json").write_text(json.dumps(config))
    report = lorahub.convert(tmp_path / "old", "peft", tmp_path / "new", base=mixture())
    assert (dict(report.rules), report.max_error) == ({"experts-to-stack": 4}, 0.0)

    again = quietly(lambda: PeftModel.from_pretrained(mixture(), tmp_path / "new")).eval()
    reference = mixture()
    with torch.no_grad():
        for (layer, expert, name), change in changes.items():
            experts = reference.model.layers[layer].mlp.experts
            if name == "down_proj":
                experts.down_proj[expert] += change
            else:
                experts.gate_up_proj[expert][slice(0, 12) if name == "gate_proj" else slice(12, 24)] += change
        tokens = torch.arange(8)[None]
        alike([again(tokens).logits], [reference(tokens).logits], [mixture()(tokens).logits])
