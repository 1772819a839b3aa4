"""Flux2's adapters under every name that tools give its modules, against diffusers' own loader.

Bounds as in ``test_parity``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tiny_diffusers import diffusers
from tiny_files import inverted, weighted
from tiny_models import FAMILIES

import lorahub

single_file_utils = pytest.importorskip("diffusers.loaders.single_file_utils", reason="diffusers is not installed")

NOISE = 1e-4
SWAPPED = "final_layer.adaLN_modulation.1"
"""Whose halves diffusers swaps in checkpoints, and not in adapters: it puts an adapter's scale onto the shift."""

pytestmark = pytest.mark.filterwarnings("ignore:.*is deprecated and will be removed:FutureWarning")  # in diffusers


def sizes(model: Any, *, makers: bool, blocks: bool) -> Iterator[tuple[str, int, int]]:
    """(module, rows, columns) of every linear layer under one maker's names."""
    named = {name.removesuffix(".weight"): tuple(each.shape) for name, each in inverted(model).items()}
    for module, shape in (named if makers else weighted(model)).items():
        if len(shape) == 2 and module != SWAPPED and not (blocks and "blocks" not in module):
            yield module, shape[0], shape[1]


def lora(model: Any, *, makers: bool, before: str, flat: bool = False, blocks: bool = False) -> dict[str, torch.Tensor]:
    """A LoRA of rank 4 on every linear layer.

    Args:
        model: Flux2's transformer.
        makers: under Black Forest Labs' names, or those of diffusers.
        before: what stands before them.
        flat: kohya's spelling, at an alpha of 3; PEFT's, which is at a scale of 1.
        blocks: of the blocks alone.
    """
    torch.manual_seed(0)
    down, up = ("lora_down", "lora_up") if flat else ("lora_A", "lora_B")
    tensors: dict[str, torch.Tensor] = {}
    for module, rows, columns in sizes(model, makers=makers, blocks=blocks):
        stem = before + (module.replace(".", "_") if flat else module)
        tensors[f"{stem}.{down}.weight"] = torch.randn(4, columns) * 0.3
        tensors[f"{stem}.{up}.weight"] = torch.randn(rows, 4) * 0.3
        if flat:
            tensors[f"{stem}.alpha"] = torch.tensor(3.0)
    return tensors


def lokr(model: Any, *, makers: bool, before: str, flat: bool = False) -> dict[str, torch.Tensor]:
    """A LoKr on every linear layer of the blocks, its right factor cut to rank 2, at an alpha of 3."""
    torch.manual_seed(0)
    tensors: dict[str, torch.Tensor] = {}
    for module, rows, columns in sizes(model, makers=makers, blocks=True):
        stem = before + (module.replace(".", "_") if flat else module)
        tensors[f"{stem}.lokr_w1"] = torch.randn(4, 4) * 0.5
        tensors[f"{stem}.lokr_w2_a"] = torch.randn(rows // 4, 2) * 0.3
        tensors[f"{stem}.lokr_w2_b"] = torch.randn(2, columns // 4) * 0.3
        tensors[f"{stem}.alpha"] = torch.tensor(3.0)
    return tensors


FILES: Mapping[str, Callable[[Any], dict[str, torch.Tensor]]] = {
    "ComfyUI and AI Toolkit": lambda model: lora(model, makers=True, before="diffusion_model."),
    "AI Toolkit, of diffusers' names": lambda model: lora(model, makers=False, before="diffusion_model.", blocks=True),
    "PEFT": lambda model: lora(model, makers=True, before="base_model.model."),
    "diffusers": lambda model: lora(model, makers=False, before="transformer."),
    "kohya": lambda model: lora(model, makers=True, before="lora_unet_", flat=True, blocks=True),
    "LyCORIS": lambda model: lokr(model, makers=False, before="lycoris_", flat=True),
    "SimpleTuner's LoKr": lambda model: lokr(model, makers=False, before=""),
}
"""Who writes it -> a file."""


@pytest.mark.parametrize("name", FILES)
def test_a_file_does_here_what_it_does_in_diffusers(name: str, tmp_path: Path) -> None:
    family = FAMILIES["Flux2"]
    model = family.build()
    place = tmp_path / "x.safetensors"
    save_file(FILES[name](model), place)
    before = family.run(model)
    pipeline = diffusers.Flux2Pipeline
    state, metadata = pipeline.lora_state_dict(str(place), return_lora_metadata=True)
    pipeline.load_lora_into_transformer(state, model, metadata=metadata)
    expected = family.run(model)
    model.unload_lora()
    largest = float(expected.abs().max())
    assert float((expected - before).norm() / before.norm()) > 1e-2
    assert torch.equal(family.run(model), before)

    with lorahub.attach(model, {"x": place}) as live:
        assert float((family.run(model) - expected).abs().max()) <= NOISE * largest
        assert live.coverage() == {"x": ()}
    merged = lorahub.merge(model, {"x": place})
    assert float((family.run(model) - expected).abs().max()) <= NOISE * largest
    merged.undo()
    assert torch.equal(family.run(model), before)


def test_a_kronecker_product_on_a_fused_layer_does_here_what_it_does_in_diffusers_fused(tmp_path: Path) -> None:
    """AI Toolkit's, which diffusers takes where projections are fused alone; here they stay apart, and as they are."""
    family = FAMILIES["Flux2"]
    model, fused = family.build(), family.build()
    place = tmp_path / "x.safetensors"
    save_file(lokr(model, makers=True, before="diffusion_model."), place)
    before = family.run(model)
    fused.fuse_qkv_projections()
    pipeline = diffusers.Flux2Pipeline
    pipeline.load_lora_into_transformer(pipeline.lora_state_dict(str(place)), fused)
    expected = family.run(fused)
    largest = float(expected.abs().max())
    assert float((expected - before).norm() / before.norm()) > 1e-2
    with lorahub.attach(model, {"x": place}):
        assert float((family.run(model) - expected).abs().max()) <= NOISE * largest
    merged = lorahub.merge(model, {"x": place})
    assert float((family.run(model) - expected).abs().max()) <= NOISE * largest
    merged.undo()
    assert torch.equal(family.run(model), before)


def test_the_makers_names_are_those_of_checkpoints_that_diffusers_converts() -> None:
    model = FAMILIES["Flux2"].build()
    modules = weighted(model)
    found = single_file_utils.convert_flux2_transformer_checkpoint_to_diffusers(dict(inverted(model)))
    linear = [module for module, shape in modules.items() if len(shape) > 1]
    assert "norm_out.linear" in linear
    for module in linear:
        assert torch.equal(found[f"{module}.weight"], model.get_submodule(module).weight), module


def test_shift_and_scale_land_where_checkpoints_have_them(tmp_path: Path) -> None:
    """diffusers exchanges the two when it converts a checkpoint, so an adapter's change of one goes with it."""
    model = FAMILIES["Flux2"].build()
    weight = model.norm_out.linear.weight
    half = weight.shape[0] // 2
    torch.manual_seed(0)
    down, up = torch.randn(2, weight.shape[1]), torch.cat([torch.randn(half, 2), torch.zeros(half, 2)])
    stem = f"diffusion_model.{SWAPPED}"
    save_file({f"{stem}.lora_A.weight": down, f"{stem}.lora_B.weight": up}, tmp_path / "x.safetensors")
    before = weight.detach().clone()
    lorahub.merge(model, {"x": tmp_path / "x.safetensors"})
    change = weight.detach() - before
    assert not change[:half].any()
    assert (change[half:] - up[:half] @ down).abs().max() <= 1e-5 * float(weight.detach().abs().max())
