"""Control adapters, which give Flux's first layer more inputs: planned, written, and the same as diffusers makes."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_diffusers import flux
from tiny_files import inverted

import lorahub
from lorahub.errors import BaseMismatch, CannotCarry, Incompatible, UsageError

diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed")

WIDE, NARROW, WIDTH = 8, 4, 32
FIRST = "x_embedder.weight"
QUERY = "transformer_blocks.0.attn.to_q"


def quietly(action: Callable[[], Any]) -> Any:
    """Run a peer's code, whose warnings are its own affair."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return action()


def factors(module: str, out: int, into: int, seed: int, *, prefix: str = "transformer.") -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        f"{prefix}{module}.lora_A.weight": torch.randn(2, into, generator=generator) / 3,
        f"{prefix}{module}.lora_B.weight": torch.randn(out, 2, generator=generator) / 3,
    }


@pytest.fixture(scope="module")
def pipe() -> Any:
    return flux()


@pytest.fixture(scope="module")
def base(pipe: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp("base")
    pipe.transformer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file: Path = tmp_path_factory.mktemp("adapter") / "pytorch_lora_weights.safetensors"
    save_file(factors("x_embedder", WIDTH, WIDE, 1) | factors(QUERY, WIDTH, WIDTH, 2), file)
    return file


def test_the_plan_says_that_a_layer_is_widened_and_what_the_configuration_says_then(base: Path, adapter: Path) -> None:
    planned = lorahub.plan(base, {"depth": str(adapter)})
    step = next(each for each in planned.steps if each.out == FIRST)
    assert step.widened
    assert not step.made_whole
    assert (step.before and step.before.shape, step.after.shape) == ((WIDTH, NARROW), (WIDTH, WIDE))
    assert planned.config_edits == {"in_channels": WIDE, "out_channels": NARROW}
    assert "widened" in planned.explain()
    assert f"[{WIDTH}, {NARROW}] F32 -> [{WIDTH}, {WIDE}] F32" in planned.explain()


def test_a_widened_model_is_the_one_that_diffusers_makes(base: Path, adapter: Path, tmp_path: Path) -> None:
    lorahub.merge(base, {"depth": str(adapter)}, weights=[0.8], out=tmp_path / "merged")
    model = diffusers.FluxTransformer2DModel.from_pretrained(tmp_path / "merged").eval()
    assert (model.config.in_channels, model.config.out_channels) == (WIDE, NARROW)
    theirs = flux()
    quietly(lambda: theirs.load_lora_weights(adapter.parent))
    quietly(lambda: theirs.fuse_lora(components=["transformer"], lora_scale=0.8))
    theirs.transformer.unload_lora()
    expected = theirs.transformer.state_dict()
    found = model.state_dict()
    assert found.keys() == expected.keys()
    for name, each in found.items():
        assert (each - expected[name]).abs().max() <= 4e-6 * expected[name].abs().max().clamp_min(1)
    stored = load_file(base / "diffusion_pytorch_model.safetensors")
    assert (found[FIRST][:, :NARROW] - stored[FIRST]).norm() / stored[FIRST].norm() > 1e-2
    assert found[FIRST][:, NARROW:].norm() > 1e-2
    torch.manual_seed(0)
    given = {"hidden_states": torch.randn(1, 4, WIDE), "encoder_hidden_states": torch.randn(1, 3, WIDTH)}
    more = {"pooled_projections": torch.randn(1, WIDTH), "timestep": torch.tensor([0.5])}
    ids = {"img_ids": torch.zeros(4, 3), "txt_ids": torch.zeros(3, 3)}
    with torch.no_grad():
        ours, other = (each(**given, **more, **ids, return_dict=False)[0] for each in (model, theirs.transformer))
    assert ours.shape == (1, 4, NARROW)
    assert (ours - other).abs().max() <= 1e-4 * other.abs().max()


def test_a_narrow_adapter_beside_it_changes_the_columns_that_it_knows(
    base: Path, adapter: Path, tmp_path: Path
) -> None:
    save_file(factors("x_embedder", WIDTH, NARROW, 5), tmp_path / "style.safetensors")
    both = {"style": str(tmp_path / "style.safetensors"), "depth": str(adapter)}
    lorahub.merge(base, both, weights=[0.5, 1.0], out=tmp_path / "merged")
    found = load_file(tmp_path / "merged" / "diffusion_pytorch_model.safetensors")[FIRST].double()
    stored = load_file(base / "diffusion_pytorch_model.safetensors")[FIRST].double()
    style, depth = (load_file(path) for path in (tmp_path / "style.safetensors", adapter))
    one, other = (
        each["transformer.x_embedder.lora_B.weight"].double() @ each["transformer.x_embedder.lora_A.weight"].double()
        for each in (style, depth)
    )
    expected = other.clone()
    expected[:, :NARROW] += stored + 0.5 * one
    assert (found - expected).abs().max() <= 2**-22 * expected.abs().max()
    assert one.norm() / stored.norm() > 1e-2


def test_the_result_does_not_depend_on_the_number_of_threads(base: Path, adapter: Path, tmp_path: Path) -> None:
    for threads in (1, 3):
        lorahub.merge(base, {"depth": str(adapter)}, out=tmp_path / str(threads), threads=threads)
    one, other = (tmp_path / name / "diffusion_pytorch_model.safetensors" for name in "13")
    assert one.read_bytes() == other.read_bytes()


def test_a_whole_pipeline_is_widened_in_its_component(pipe: Any, adapter: Path, tmp_path: Path) -> None:
    pipe.save_pretrained(tmp_path / "pipe")
    lorahub.merge(tmp_path / "pipe", {"depth": str(adapter)}, out=tmp_path / "merged")
    config = json.loads((tmp_path / "merged" / "transformer" / "config.json").read_text())
    assert (config["in_channels"], config["out_channels"]) == (WIDE, NARROW)
    model = diffusers.FluxTransformer2DModel.from_pretrained(tmp_path / "merged" / "transformer")
    assert tuple(model.x_embedder.weight.shape) == (WIDTH, WIDE)


def original(folder: Path) -> Path:
    """A control adapter as Black Forest Labs publish theirs: biases too, and whole norms."""
    tensors = factors("img_in", WIDTH, WIDE, 1, prefix="") | factors(
        "double_blocks.0.img_attn.qkv", 3 * WIDTH, WIDTH, 2, prefix=""
    )
    tensors |= {
        "img_in.lora_B.bias": torch.linspace(0.1, 1, WIDTH),
        "double_blocks.0.img_attn.qkv.lora_B.bias": torch.linspace(0.1, 1, 3 * WIDTH),
        "double_blocks.0.img_attn.norm.query_norm.scale": torch.linspace(0.5, 1.5, 16),
        "double_blocks.0.img_attn.norm.key_norm.scale": torch.linspace(1.5, 0.5, 16),
        "single_blocks.1.norm.query_norm.scale": torch.linspace(0.9, 1.1, 16),
    }
    file = folder / "flux-depth-lora.safetensors"
    save_file(tensors, file)
    return file


@pytest.mark.parametrize("single", [False, True])
def test_a_file_of_their_makers_brings_biases_and_norms_too(
    single: bool, pipe: Any, base: Path, tmp_path: Path
) -> None:
    adapter = original(tmp_path)
    own = {name: each.double() for name, each in inverted(pipe.transformer).items()}
    tensors = {name: each.double() for name, each in load_file(adapter).items()}
    if single:
        save_file({name: each.float() for name, each in own.items()}, tmp_path / "flux.safetensors")
        lorahub.merge(tmp_path / "flux.safetensors", {"depth": str(adapter)}, out=tmp_path / "merged.safetensors")
        found = {name: each.double() for name, each in load_file(tmp_path / "merged.safetensors").items()}
    else:
        lorahub.merge(base, {"depth": str(adapter)}, out=tmp_path / "merged")
        model = diffusers.FluxTransformer2DModel.from_pretrained(tmp_path / "merged")
        found = {name: each.double() for name, each in inverted(model).items()}
    first = tensors["img_in.lora_B.weight"] @ tensors["img_in.lora_A.weight"]
    first[:, :NARROW] += own["img_in.weight"]
    qkv = "double_blocks.0.img_attn.qkv"
    expected = {
        **own,
        "img_in.weight": first,
        "img_in.bias": own["img_in.bias"] + tensors["img_in.lora_B.bias"],
        f"{qkv}.weight": own[f"{qkv}.weight"] + tensors[f"{qkv}.lora_B.weight"] @ tensors[f"{qkv}.lora_A.weight"],
        f"{qkv}.bias": own[f"{qkv}.bias"] + tensors[f"{qkv}.lora_B.bias"],
        **{name: each for name, each in tensors.items() if name.endswith(".scale")},
    }
    assert found.keys() == expected.keys()
    for name, each in expected.items():
        assert (found[name] - each).abs().max() <= 2**-20 * each.abs().max().clamp_min(1)


def converted(source: Path, to: str, out: Path, **more: Any) -> dict[str, torch.Tensor]:
    """The file that a conversion writes."""
    report = lorahub.convert(source, to, out, **more)
    assert report.max_error == 0.0
    tensors: dict[str, torch.Tensor] = load_file(next(out.glob("*.safetensors")) if out.is_dir() else out)
    return tensors


@pytest.mark.parametrize("known", ["pipeline", "model", "nothing"])
def test_a_file_of_their_makers_becomes_one_that_diffusers_reads(
    known: str, pipe: Any, base: Path, tmp_path: Path
) -> None:
    adapter, more = original(tmp_path), {}
    if known == "pipeline":
        pipe.save_pretrained(tmp_path / "pipe")
        more = {"base": tmp_path / "pipe"}
    elif known == "model":
        more = {"base": base, "component": "transformer"}
    found = converted(adapter, "diffusers", tmp_path / "out", **more)
    assert found["transformer.x_embedder.lora_A.weight"].shape == (2, WIDE)
    norm = "transformer.transformer_blocks.0.attn.norm_q.weight"
    assert torch.equal(found[norm], load_file(adapter)["double_blocks.0.img_attn.norm.query_norm.scale"])
    theirs = flux()
    quietly(lambda: theirs.load_lora_weights(tmp_path / "out"))
    quietly(lambda: theirs.fuse_lora(components=["transformer"]))
    theirs.transformer.unload_lora()
    lorahub.merge(base, {"makers": str(adapter)}, out=tmp_path / "one")
    lorahub.merge(base, {"diffusers": str(tmp_path / "out")}, out=tmp_path / "two")
    one, two = (load_file(tmp_path / each / "diffusion_pytorch_model.safetensors") for each in ("one", "two"))
    before = load_file(base / "diffusion_pytorch_model.safetensors")
    assert one.keys() == two.keys() == theirs.transformer.state_dict().keys()
    for name, each in theirs.transformer.state_dict().items():
        assert torch.equal(one[name], two[name])
        assert (one[name] - each).abs().max() <= 4e-6 * each.abs().max().clamp_min(1)
    changed = {
        name for name in one if one[name].shape != before[name].shape or not torch.equal(one[name], before[name])
    }
    assert len(changed) == 2 + 6 + 3  # the first layer, three projections, each with its bias, and norms


@pytest.mark.parametrize("to", ["peft", "kohya"])
def test_a_widening_adapter_goes_to_other_layouts_and_back(to: str, pipe: Any, base: Path, tmp_path: Path) -> None:
    pipe.save_pretrained(tmp_path / "pipe")
    stacked = factors("x_embedder", WIDTH, WIDE, 1) | factors("transformer_blocks.0.attn.to_out.0", WIDTH, WIDTH, 2)
    (tmp_path / "own").mkdir()
    save_file(stacked, tmp_path / "own" / "pytorch_lora_weights.safetensors")
    there = tmp_path / ("there" if to == "peft" else "there.safetensors")
    converted(tmp_path / "own", to, there, base=base if to == "peft" else tmp_path / "pipe")
    back = converted(there, "diffusers", tmp_path / "back", base=base, component="transformer")
    assert back.keys() == stacked.keys()
    assert all(torch.equal(back[name], each) for name, each in stacked.items())


def test_norms_have_no_word_for_kohyas_tools(pipe: Any, tmp_path: Path) -> None:
    pipe.save_pretrained(tmp_path / "pipe")
    with pytest.raises(CannotCarry) as stop:
        lorahub.convert(original(tmp_path), "kohya", tmp_path / "out.safetensors", base=tmp_path / "pipe")
    (found,) = stop.value.findings
    assert set(found.where) == {
        "unet:double_blocks.0.img_attn.norm.key_norm.scale",
        "unet:double_blocks.0.img_attn.norm.query_norm.scale",
        "unet:single_blocks.1.norm.query_norm.scale",
    }


def test_a_conversion_widens_nothing_but_the_first_layer(base: Path, tmp_path: Path) -> None:
    save_file(factors(QUERY, WIDTH, 2 * WIDTH, 3), tmp_path / "odd.safetensors")
    with pytest.raises(BaseMismatch) as stop:
        lorahub.convert(tmp_path / "odd.safetensors", "peft", tmp_path / "out", base=base)
    assert "shape-mismatch" in {each.code for each in stop.value.findings}


def test_a_live_model_keeps_its_layers_and_says_what_to_do(adapter: Path) -> None:
    model = flux().transformer
    before = model.x_embedder.weight.clone()
    with pytest.raises(Incompatible) as stop:
        lorahub.merge(model, {"depth": str(adapter)})
    assert "-o FOLDER" in stop.value.hint
    with pytest.raises(Incompatible) as stop:
        lorahub.attach(model, {"depth": str(adapter)})
    assert "-o FOLDER" in stop.value.hint
    assert torch.equal(model.x_embedder.weight, before)


def test_files_are_not_widened_in_place(adapter: Path, tmp_path: Path) -> None:
    flux().transformer.save_pretrained(tmp_path / "base")
    before = (tmp_path / "base" / "diffusion_pytorch_model.safetensors").read_bytes()
    with pytest.raises(UsageError):
        lorahub.merge(tmp_path / "base", {"depth": str(adapter)}, in_place=True)
    assert (tmp_path / "base" / "diffusion_pytorch_model.safetensors").read_bytes() == before


@pytest.mark.parametrize(("module", "out", "into"), [(QUERY, WIDTH, 2 * WIDTH), ("x_embedder", 2 * WIDTH, NARROW)])
def test_what_no_pipeline_widens_is_a_misfit(module: str, out: int, into: int, base: Path, tmp_path: Path) -> None:
    save_file(factors(module, out, into, 3), tmp_path / "odd.safetensors")
    with pytest.raises(BaseMismatch) as stop:
        lorahub.merge(base, {"odd": str(tmp_path / "odd.safetensors")}, out=tmp_path / "merged")
    assert "shape-mismatch" in {each.code for each in stop.value.findings}
