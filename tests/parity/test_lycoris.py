"""Against LyCORIS itself (lycoris-lora 4.1.3): what it saves is merged, from the file alone, as it merges it."""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import lorahub
from lorahub.adapter import load, open_header, save
from lorahub.plugins import Registry

logging.getLogger("LyCORIS").setLevel(logging.ERROR)
lycoris: Any = import_module("lycoris.wrapper")


class Block(nn.Module):
    """One of each layer that LyCORIS adapts; a square one among them."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 16)
        self.square = nn.Linear(16, 16, bias=False)
        self.norm = nn.LayerNorm(16)
        self.conv = nn.Conv2d(4, 8, 3, padding=1)
        self.point = nn.Conv2d(8, 16, 1, bias=False)
        self.line = nn.Conv1d(4, 8, 3)
        self.group = nn.GroupNorm(2, 16)

    def forward(self, flat: torch.Tensor, image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        image = self.conv(image)
        return self.norm(self.square(self.fc(flat))), self.group(self.point(image)), self.line(flat.reshape(2, 4, 6))


def model() -> nn.Module:
    torch.manual_seed(0)
    result = nn.ModuleDict({"mid": nn.ModuleList([Block()])}).eval()
    return result.requires_grad_(False)


def outputs(built: nn.Module) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    flat = torch.randn(8, 6, generator=generator)
    image = torch.randn(2, 4, 5, 5, generator=generator)
    with torch.no_grad():
        return [each.clone() for each in built["mid"][0](flat, image)]  # type: ignore[index]


def network(built: nn.Module, algo: str, **kwargs: Any) -> Any:
    lycoris.LycorisNetwork.apply_preset({"target_module": ["Block"], "enable_conv": True})
    options = {"lora_dim": 4, "conv_lora_dim": 4, "alpha": 3.0, "conv_alpha": 2.0} | kwargs
    made = lycoris.LycorisNetwork(built, network_module=algo, **options)
    assert len(made.loras) >= 5
    for each in made.loras:
        made.add_module(each.lora_name, each)  # as ``apply_to`` does, so that they are saved
    return made


def randomise(made: Any) -> None:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if name.endswith(("dora_scale", "rescale")):
                parameter.mul_(torch.rand(parameter.shape, generator=generator) + 0.5)
            else:
                parameter.copy_(parameter + 0.4 * noise)


def weights(built: nn.Module) -> dict[str, torch.Tensor]:
    return {name: each.detach().clone() for name, each in built.state_dict().items() if ".loras." not in name}


CASES: Mapping[str, tuple[str, dict[str, Any], set[str]]] = {
    "locon": ("locon", {}, {"lora"}),
    "locon tucker": ("locon", {"use_tucker": True}, {"lora", "locon"}),
    "locon scalar": ("locon", {"use_scalar": True}, {"lora"}),
    "locon rs": ("locon", {"rs_lora": True}, {"lora"}),
    "dora": ("locon", {"weight_decompose": True, "wd_on_out": True}, {"dora"}),
    "dora on inputs": ("locon", {"weight_decompose": True, "wd_on_out": False}, {"dora"}),
    "dora tucker": ("locon", {"weight_decompose": True, "use_tucker": True}, {"dora", "dora-locon"}),
    "dora tucker on inputs": (
        "locon",
        {"weight_decompose": True, "use_tucker": True, "wd_on_out": False},
        {"dora", "dora-locon"},
    ),
    "loha": ("loha", {}, {"loha"}),
    "loha tucker": ("loha", {"use_tucker": True}, {"loha"}),
    "loha scalar": ("loha", {"use_scalar": True}, {"loha"}),
    "loha rs": ("loha", {"rs_lora": True}, {"loha"}),
    "dora loha": ("loha", {"weight_decompose": True}, {"dora-loha"}),
    "dora loha on inputs": ("loha", {"weight_decompose": True, "wd_on_out": False}, {"dora-loha"}),
    "dora loha tucker": ("loha", {"weight_decompose": True, "use_tucker": True}, {"dora-loha"}),
    "lokr": ("lokr", {"lora_dim": 1, "conv_lora_dim": 1}, {"lokr"}),
    "lokr both": ("lokr", {"lora_dim": 1, "conv_lora_dim": 1, "decompose_both": True, "factor": 4}, {"lokr"}),
    "lokr tucker": ("lokr", {"lora_dim": 1, "conv_lora_dim": 1, "use_tucker": True, "factor": 2}, {"lokr"}),
    "lokr whole": ("lokr", {"full_matrix": True}, {"lokr"}),
    "lokr unbalanced": (
        "lokr",
        {"lora_dim": 1, "conv_lora_dim": 1, "unbalanced_factorization": True, "factor": 2},
        {"lokr"},
    ),
    "lokr rs": ("lokr", {"lora_dim": 2, "conv_lora_dim": 1, "rs_lora": True, "factor": 2}, {"lokr"}),
    "dora lokr": ("lokr", {"lora_dim": 1, "conv_lora_dim": 1, "weight_decompose": True}, {"dora-lokr"}),
    "dora lokr on inputs": (
        "lokr",
        {"lora_dim": 1, "conv_lora_dim": 1, "weight_decompose": True, "wd_on_out": False},
        {"dora-lokr"},
    ),
    "dora lokr whole": ("lokr", {"full_matrix": True, "weight_decompose": True}, {"dora-lokr"}),
    "diag-oft": ("diag-oft", {}, {"diag-oft"}),
    "diag-oft bounded": ("diag-oft", {"constraint": 0.01}, {"diag-oft"}),
    "diag-oft rescaled": ("diag-oft", {"rescaled": True, "constraint": 0.02}, {"diag-oft"}),
    "boft": ("boft", {}, {"lycoris-boft"}),
    "boft bounded": ("boft", {"constraint": 0.01}, {"lycoris-boft"}),
    "boft rescaled": ("boft", {"rescaled": True}, {"lycoris-boft"}),
    "glora": ("glora", {}, {"lycoris-glora"}),
    "glora scalar": ("glora", {"use_scalar": True}, {"lycoris-glora"}),
    "ia3": ("ia3", {}, {"lycoris-ia3"}),
    "ia3 on inputs": ("ia3", {"train_on_input": True}, {"lycoris-ia3"}),
    "full": ("full", {}, {"full"}),
    "norms": ("locon", {"train_norm": True}, {"lora", "full"}),
    "dylora": ("dylora", {"block_size": 2}, {"lora"}),
}
"""Case -> LyCORIS's algorithm, its options, and the kinds that the file is read as."""

SQUARED = {name for name, (algo, _, _) in CASES.items() if algo in ("loha", "lokr")}
"""Cases whose scale lycoris-lora 4.1.3 multiplies in twice when it merges (``get_diff_weight``), not in ``forward``."""

NO_MERGE = {"full", "dylora"}
"""``full`` keeps no weight to merge into once applied; ``dylora`` merges a random rank."""

NO_FORWARD = {"dylora"}
"""It computes with a random rank."""

WRITTEN = [name for name in CASES if name not in ("norms", "full", "dylora")]
"""Cases whose file is written again key for key: not where one kind has two words, or a factor lacks its ones."""


def case(name: str, folder: Path) -> tuple[nn.Module, Any]:
    """The model with LyCORIS beside it, random weights, and the file saved."""
    algo, options, _ = CASES[name]
    built = model()
    made = network(built, algo, **options).eval()
    if algo == "full":
        made.apply_to()
    randomise(made)
    made.save_weights(str(folder / "lora.safetensors"), None, {})
    return built, made


@pytest.mark.parametrize("name", [name for name in CASES if name not in SQUARED | NO_MERGE])
def test_a_file_is_merged_as_lycoris_merges_it(tmp_path: Path, name: str) -> None:
    theirs, made = case(name, tmp_path)
    ours, before = model(), weights(model())
    lorahub.merge(ours, [tmp_path])
    made.merge_to(1.0)
    expected, found = weights(theirs), weights(ours)
    moved = [key for key, each in before.items() if not torch.equal(each, expected[key])]
    assert len(moved) >= 5
    for key in before:
        torch.testing.assert_close(found[key], expected[key], rtol=0, atol=2e-5)
    for key in moved:
        assert float((expected[key] - before[key]).norm() / before[key].norm().clamp_min(1e-3)) > 1e-2


@pytest.mark.parametrize("name", [name for name in CASES if name not in NO_FORWARD])
def test_a_merged_file_computes_what_lycoris_computes(tmp_path: Path, name: str) -> None:
    theirs, made = case(name, tmp_path)
    if CASES[name][0] != "full":
        made.apply_to()
    expected = outputs(theirs)
    ours = model()
    plain = outputs(ours)
    lorahub.merge(ours, [tmp_path])
    for found, wanted, bare in zip(outputs(ours), expected, plain, strict=True):
        assert float((wanted - bare).norm() / bare.norm()) > 1e-2
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("name", CASES)
def test_a_file_is_read_as_what_it_is_to_the_last_key(tmp_path: Path, registry: Registry, name: str) -> None:
    case(name, tmp_path)
    header = open_header(tmp_path, registry)
    assert header.format == "kohya"
    assert set(header.kinds) == CASES[name][2]
    assert [finding.code for finding in header.findings] == []


@pytest.mark.parametrize("name", WRITTEN)
def test_what_is_read_is_written_again_key_for_key(tmp_path: Path, registry: Registry, name: str) -> None:
    case(name, tmp_path)
    adapter = load(open_header(tmp_path, registry), registry)
    again = save(adapter, tmp_path / "again", registry=registry, format="kohya")
    theirs, ours = load_file(tmp_path / "lora.safetensors"), load_file(again / "lora.safetensors")
    assert ours.keys() == theirs.keys()
    for key, tensor in theirs.items():
        if key.endswith(".alpha"):  # a scale has an alpha that gives it bit for bit, which need not be theirs
            assert CASES[name][0] == "lokr" or float(ours[key]) == pytest.approx(float(tensor), rel=1e-6)
        else:
            assert torch.equal(ours[key].to(tensor.dtype), tensor), key


@pytest.mark.parametrize("name", ["locon tucker", "dora", "loha", "lokr", "diag-oft rescaled", "boft", "glora", "ia3"])
def test_what_is_written_here_lycoris_loads_to_the_same_effect(tmp_path: Path, registry: Registry, name: str) -> None:
    case(name, tmp_path)
    adapter = load(open_header(tmp_path, registry), registry)
    again = save(adapter, tmp_path / "again", registry=registry, format="kohya")
    theirs = model()
    algo, options, _ = CASES[name]
    made = network(theirs, algo, **options)
    made.load_state_dict(load_file(again / "lora.safetensors"), strict=False)
    made.eval().apply_to()
    ours = model()
    lorahub.merge(ours, [again])
    for found, wanted in zip(outputs(ours), outputs(theirs), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=2e-5)


def test_lycoris_multiplies_the_scale_of_loha_in_twice_when_it_merges(tmp_path: Path) -> None:
    """Holds for lycoris-lora 4.1.3 (``LohaModule.get_diff_weight``); its forward pass, and this library, scale once."""
    theirs, made = case("loha", tmp_path)
    ours, before = model(), weights(model())
    lorahub.merge(ours, [tmp_path])
    made.merge_to(1.0)
    key, scale = "mid.0.fc.weight", 3.0 / 4
    once, twice = weights(ours)[key] - before[key], weights(theirs)[key] - before[key]
    torch.testing.assert_close(once * scale, twice, rtol=1e-4, atol=2e-5)
    assert float((once - twice).norm() / once.norm()) > 0.2


def test_dropping_the_file_leaves_what_lycoris_changes(tmp_path: Path) -> None:
    theirs, made = case("locon", tmp_path)
    made.merge_to(1.0)
    with pytest.raises(AssertionError):
        torch.testing.assert_close(weights(model())["mid.0.fc.weight"], weights(theirs)["mid.0.fc.weight"])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_file_in_half_precision_is_read_alike(tmp_path: Path, registry: Registry, dtype: torch.dtype) -> None:
    """Trainers cast every tensor, flags and alphas too."""
    for name in ("locon tucker", "diag-oft bounded", "ia3 on inputs", "lokr whole"):
        _, made = case(name, tmp_path)
        made.save_weights(str(tmp_path / "lora.safetensors"), dtype, {})
        header = open_header(tmp_path, registry)
        assert set(header.kinds) == CASES[name][2]
        assert header.findings == ()


def test_an_extracted_difference_is_the_difference_but_for_what_was_cut(tmp_path: Path) -> None:
    """Tensors made with LyCORIS's own ``make_sparse`` and stored as its ``extract_diff`` (4.1.3) stores them."""
    make_sparse = import_module("lycoris.utils").make_sparse
    torch.manual_seed(2)
    base = nn.Linear(6, 8, bias=False).requires_grad_(False)
    difference = torch.randn(8, 6) * 0.3
    up, values, down = torch.linalg.svd(difference)
    up, down = up[:, :2] * values[:2], down[:2]
    kept = make_sparse(difference - up @ down, 0.5).to_sparse().coalesce()
    stem = "lycoris_fc"
    save_file(
        {
            f"{stem}.lora_down.weight": down.contiguous(),
            f"{stem}.lora_up.weight": up.contiguous(),
            f"{stem}.alpha": torch.Tensor([2]).half(),
            f"{stem}.bias_indices": kept.indices().to(torch.int16),
            f"{stem}.bias_values": kept.values(),
            f"{stem}.bias_size": torch.tensor([8, 6], dtype=torch.int16),
        },
        tmp_path / "lora.safetensors",
    )
    built = nn.ModuleDict({"fc": copy.deepcopy(base)}).requires_grad_(False)
    lorahub.merge(built, [tmp_path])
    wanted = base.weight.detach() + up @ down + kept.to_dense()
    torch.testing.assert_close(built["fc"].weight, wanted, rtol=0, atol=2e-5)
    assert float(kept.to_dense().norm() / base.weight.norm()) > 1e-2
    assert math.isclose(kept.values().numel(), 24, abs_tol=1)


@pytest.mark.parametrize("algo", ["locon", "lokr", "diag-oft"])
def test_a_unet_of_diffusers_is_found_through_its_own_names(tmp_path: Path, algo: str) -> None:
    """Names of dots and underscores alike (``to_out.0``, ``down_blocks.0``) behind kohya's prefix."""

    def unet() -> nn.Module:
        torch.manual_seed(0)
        built = diffusers.UNet2DConditionModel(
            block_out_channels=(8, 16),
            layers_per_block=1,
            sample_size=8,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            cross_attention_dim=8,
            norm_num_groups=2,
            attention_head_dim=4,
        )
        assert isinstance(built, nn.Module)
        return built.eval().requires_grad_(False)

    theirs, ours = unet(), unet()
    lycoris.LycorisNetwork.apply_preset(
        {"target_module": ["Transformer2DModel", "ResnetBlock2D"], "lora_prefix": "lora_unet", "enable_conv": True}
    )
    try:
        made = lycoris.LycorisNetwork(theirs, network_module=algo, lora_dim=2, conv_lora_dim=2, alpha=2, conv_alpha=2)
    finally:
        lycoris.LycorisNetwork.apply_preset({"lora_prefix": "lycoris"})
    for each in made.loras:
        made.add_module(each.lora_name, each)
    randomise(made)
    made.save_weights(str(tmp_path / "lora.safetensors"), None, {})
    before = weights(ours)
    lorahub.merge(ours, [tmp_path])
    made.merge_to(1.0)
    expected, found = weights(theirs), weights(ours)
    assert sum(not torch.equal(each, expected[key]) for key, each in before.items()) == len(made.loras) > 20
    for key in before:
        torch.testing.assert_close(found[key], expected[key], rtol=0, atol=2e-5)
