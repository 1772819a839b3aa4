"""Projections inside fused parameters: the table's rows held against what the modules of diffusers compute.

The reference is the model's own: which of a fused layer's outputs the queries, keys, values and gates that it goes on
to use depend on, by their gradients.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tiny_classes import CONFIGS, classes, on_meta
from tiny_diffusers import diffusers, unet
from tiny_models import FAMILIES, TIME
from torch.overrides import TorchFunctionMode

import lorahub
from lorahub.bases.index import BaseRef
from lorahub.bases.layout import Layout, Target
from lorahub.errors import BaseMismatch
from lorahub_diffusers import Diffusers
from lorahub_diffusers.fused import parts_of
from lorahub_diffusers.fusions import FUSED

pytestmark = pytest.mark.filterwarnings("ignore:.*is deprecated and will be removed:FutureWarning")  # in diffusers


def numbers(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def _states(dim: int) -> torch.Tensor:
    return numbers(2, 5, dim)


CALLS: Mapping[str, Callable[[Any, Any], Any]] = MappingProxyType(
    {
        "attn.to_qkv_mlp_proj": lambda above, linear: above.attn(_states(linear.in_features)),
        "img_qkv_proj": lambda above, linear: above(_states(linear.in_features), _states(linear.in_features)),
        "txt_kv_proj": lambda above, linear: above(_states(linear.in_features), _states(linear.in_features)),
        "img_attn_qkv": lambda above, linear: above(_states(linear.in_features), _states(linear.in_features)),
        "txt_attn_qkv": lambda above, linear: above(_states(linear.in_features), _states(linear.in_features)),
        "self_attn.to_qkv": lambda above, linear: above.self_attn(_states(linear.in_features), rope=numbers(5, 16)),
        "cross_attn.to_kv": lambda above, linear: above.cross_attn(_states(64), _states(linear.in_features)),
        "attn.qkv": lambda above, linear: above.attn(_states(linear.in_features), HW=(1, 1, 5)),
        "kv_linear": lambda above, linear: above(_states(linear.in_features), _states(linear.in_features)),
        "to_kv": lambda above, linear: above(_states(linear.in_features), _states(above.to_q.in_features)),
        "pooler.to_kv": lambda above, linear: above.pooler(_states(linear.in_features), torch.ones(2, 5).bool()),
        "net.0.proj": lambda above, linear: above(_states(linear.in_features)),
        "linear_in": lambda above, linear: above(_states(linear.in_features)),
        "ff.proj_in": lambda above, linear: above.ff(_states(linear.in_features)),
        "gate_up_proj": lambda above, linear: above(_states(linear.in_features)),
        "ff_in": lambda above, linear: above(_states(linear.in_features), (numbers(5, 8), numbers(5, 8))),
        "proj_mlp": lambda above, linear: above(*(_states(linear.in_features) for _ in range(2)), numbers(2, 32)),
    }
)
"""End of the path of a fused module -> a call of the module of diffusers that uses it."""

MEANT = {
    **dict.fromkeys(("to_q",), "query"),
    **dict.fromkeys(("to_k", "add_k_proj", "k_linear"), "key"),
    **dict.fromkeys(("to_v", "add_v_proj", "v_linear"), "value"),
    "add_q_proj": "query",
    "gate_proj": "gate",
}
"""What a part is called -> how the model uses it; of what is left, the rest is used otherwise."""


_ROLES = ("query", "key", "value")


class Used(TorchFunctionMode):
    """Which tensors become queries, keys, values and gates."""

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[str, list[torch.Tensor]] = {}
        self._products = 0
        self._told = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = "" if self._told else getattr(func, "__name__", "")
        if name == "scaled_dot_product_attention":
            given = [*args, *((kwargs or {}).get(each) for each in _ROLES if each in (kwargs or {}))]
            for role, tensor in zip(_ROLES, given, strict=False):
                self.found.setdefault(role, []).append(tensor)
        elif name in ("matmul", "__matmul__"):  # attention by hand: queries by keys, and what that gives by values
            self.found.setdefault(("key", "value")[self._products % 2], []).append(args[1])
            self._products += 1
        elif name in ("silu", "gelu"):
            self.found.setdefault("gate", []).append(args[0])
        result = func(*args, **(kwargs or {}))
        if name == "unbind" and len(result) == len(_ROLES):  # linear attention, which multiplies them in its own order
            self.found = {role: [tensor] for role, tensor in zip(_ROLES, result, strict=True)}
            self._told = True
        return result


@contextmanager
def leaf(linear: torch.nn.Module) -> Iterator[list[torch.Tensor]]:
    """What a layer gives, as tensors that gradients can be taken by."""
    given: list[torch.Tensor] = []

    def keep(_module: object, _args: object, output: torch.Tensor) -> torch.Tensor:
        given.append(output.detach().requires_grad_())
        return given[-1]

    hook = linear.register_forward_hook(keep)
    yield given
    hook.remove()


def channels(linear: torch.nn.Module, call: Callable[[], object]) -> dict[str, set[int]]:
    """Use -> the outputs of the layer that it depends on, as the model computes."""
    with leaf(linear) as given, Used() as used:
        call()
    (output,) = given
    found: dict[str, set[int]] = {}
    for role, tensors in used.found.items():
        total = sum((tensor * torch.rand_like(tensor)).sum() for tensor in tensors if tensor.requires_grad)
        if not isinstance(total, torch.Tensor):
            continue
        (slope,) = torch.autograd.grad(total, output, retain_graph=True, allow_unused=True)
        if slope is not None:
            found[role] = set(slope.flatten(0, -2).ne(0).any(0).nonzero().flatten().tolist())
    return found


def built(name: str) -> Any:
    kind, config = CONFIGS[name]
    torch.manual_seed(0)
    model = getattr(diffusers, kind)(**config).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, dtype=torch.float64) * 0.05)
    return model


def rows_of(layout: Layout) -> set[int]:
    (piece,) = layout.pieces
    assert isinstance(piece.of_parameter.rows, slice)
    return set(range(piece.of_parameter.rows.start, piece.of_parameter.rows.stop))


def judge(model: Any) -> set[str]:
    """Hold every declared projection of a model against it; the ends of the modules that have them."""
    framework = Diffusers()
    index = framework.index_model(model, BaseRef())
    inside: dict[tuple[str, str], list[str]] = {}
    for fused, module, part in parts_of(type(model).__name__, index):
        inside.setdefault((fused.module, module), []).append(part)
    for (end, module), parts in inside.items():
        linear = model.get_submodule(module)
        above = model.get_submodule(module.removesuffix(end).rstrip("."))
        used = channels(linear, lambda end=end, above=above, linear=linear: CALLS[end](above, linear))  # type: ignore[misc]
        whole = set(range(linear.out_features))
        named = {MEANT[last] for part in parts if (last := part.rpartition(".")[2]) in MEANT}
        left = whole.difference(*(used[role] for role in named if role != "gate" or "proj_mlp" not in parts))
        covered: set[int] = set()
        for part in parts:
            target = Target("", part, "weight")
            rows = rows_of(framework.layouts(index, [target])[target])
            last = part.rpartition(".")[2]
            if last == "proj_mlp":
                assert rows == whole - used["query"] - used["key"] - used["value"]
            else:
                assert rows == (used[MEANT[last]] if last in MEANT else left), part
            covered |= rows
        assert covered == whole
    return {end for end, _ in inside}


@pytest.mark.parametrize("name", CONFIGS)
def test_each_band_of_a_fused_layer_is_what_the_model_uses_it_for(name: str) -> None:
    declared = {fused.module for fused in FUSED if CONFIGS[name][0] in fused.kinds}
    assert judge(built(name)) >= declared != set()


def test_the_halves_of_gated_feed_forwards_are_told_by_the_layer_behind_them() -> None:
    assert judge(unet().double()) == {"net.0.proj"}


# Adapters on one band


def _run(name: str, model: Any) -> torch.Tensor:
    """What a model gives for fixed inputs."""
    torch.manual_seed(7)
    time = TIME.double() / 1000
    given: Mapping[str, Any] = {
        "flux2": {
            "hidden_states": numbers(2, 16, 4),
            "encoder_hidden_states": numbers(2, 5, 32),
            "img_ids": torch.zeros(16, 4).double(),
            "txt_ids": torch.zeros(5, 4).double(),
            "guidance": torch.tensor([1.0, 2.0]).double(),
        },
        "prx": {"hidden_states": numbers(2, 4, 8, 8), "encoder_hidden_states": numbers(2, 5, 16)},
        "stable audio 3": {
            "hidden_states": numbers(2, 4, 6),
            "encoder_hidden_states": numbers(2, 5, 8),
            "global_hidden_states": numbers(2, 8),
        },
    }
    with torch.no_grad():
        result: torch.Tensor = model(**given[name], timestep=time, return_dict=False)[0]
    return result


BANDS: Mapping[str, tuple[str, str, Callable[[torch.Tensor], torch.Tensor]]] = {
    "single_transformer_blocks.0.attn.to_k": (
        "flux2",
        "single_transformer_blocks.0.attn.to_qkv_mlp_proj",
        lambda weight: weight[:96].chunk(3)[1],
    ),
    "single_transformer_blocks.0.proj_mlp": (
        "flux2",
        "single_transformer_blocks.0.attn.to_qkv_mlp_proj",
        lambda weight: weight[96:],
    ),
    "transformer_blocks.0.ff.gate_proj": (
        "flux2",
        "transformer_blocks.0.ff.linear_in",
        lambda weight: weight.chunk(2)[0],
    ),
    "blocks.0.attention.to_v": ("prx", "blocks.0.attention.img_qkv_proj", lambda weight: weight.chunk(3)[2]),
    "blocks.0.attention.add_k_proj": ("prx", "blocks.0.attention.txt_kv_proj", lambda weight: weight.chunk(2)[0]),
    "transformer_blocks.0.self_attn.to_q": (
        "stable audio 3",
        "transformer_blocks.0.self_attn.to_qkv",
        lambda weight: torch.cat(weight.chunk(5)[:2]),
    ),
    "transformer_blocks.0.cross_attn.to_v": (
        "stable audio 3",
        "transformer_blocks.0.cross_attn.to_kv",
        lambda weight: weight.chunk(3)[2],
    ),
}
"""A target inside a fused layer -> the model, the layer, and its rows of that layer's weight, as the model splits."""


def lora(module: str, out: int, into: int, file: Path) -> torch.Tensor:
    """Write a LoRA of one module as diffusers does; what it adds to the weight, in float64."""
    torch.manual_seed(3)
    down, up = torch.randn(2, into), torch.randn(out, 2)
    save_file({f"transformer.{module}.lora_A.weight": down, f"transformer.{module}.lora_B.weight": up}, file)
    return up.double() @ down.double()


@pytest.mark.parametrize("module", BANDS)
def test_an_adapter_on_one_band_changes_these_rows_and_no_others(module: str, tmp_path: Path) -> None:
    """Attached and merged, in outputs and weights, against the same rows changed in float64."""
    name, layer, band = BANDS[module]
    model = built(name)
    weight = model.get_submodule(layer).weight
    out, into = band(weight).shape
    change = lora(module, out, into, tmp_path / "x.safetensors")
    other = deepcopy(model)
    with torch.no_grad():
        there = other.get_submodule(layer).weight
        marked = band(torch.arange(len(there))[:, None])[:, 0]
        there[marked] += change
    before, expected = _run(name, model), _run(name, other)
    assert change.norm() / weight.norm() > 1e-2
    assert (expected - before).norm() / before.norm() > 1e-4  # one of many layers, and a small band of it
    bound = 2**-40 * float(expected.abs().max())

    with lorahub.attach(model, {"x": tmp_path / "x.safetensors"}):
        assert (_run(name, model) - expected).abs().max() <= bound
    assert torch.equal(_run(name, model), before)
    merged = lorahub.merge(model, {"x": tmp_path / "x.safetensors"})
    assert (_run(name, model) - expected).abs().max() <= bound
    assert (weight - there).detach().abs().max() <= 2**-50 * float(there.detach().abs().max())
    merged.undo()
    assert torch.equal(_run(name, model), before)


def test_a_fused_name_lands_in_the_projections_that_are_apart(tmp_path: Path) -> None:
    model = built("flux2")
    attention = model.transformer_blocks[0].attn
    parts = (attention.to_q, attention.to_k, attention.to_v)
    before = torch.cat([each.weight.detach().clone() for each in parts])
    change = lora("transformer_blocks.0.attn.to_qkv", *before.shape, tmp_path / "x.safetensors")
    lorahub.merge(model, {"x": tmp_path / "x.safetensors"})
    after = torch.cat([each.weight.detach() for each in parts])
    assert (after - before - change).abs().max() <= 2**-50 * float(after.abs().max())


def test_a_band_of_a_class_that_nobody_declared_is_refused(tmp_path: Path) -> None:
    """The same names on another class: its feed-forward is no gated one."""
    model = FAMILIES["CogVideoX"].build()
    lora("transformer_blocks.0.ff.net.0.gate_proj", 32, 16, tmp_path / "x.safetensors")
    with pytest.raises(BaseMismatch) as stop:
        lorahub.merge(model, {"x": tmp_path / "x.safetensors"})
    assert any("gate_proj" in name for each in stop.value.findings for name in each.where)


WHOLE = frozenset({"AutoencoderSAME", "AutoencoderKLMiniMaxH3Audio"})
"""Classes whose fused projections are left whole: nobody has adapters for autoencoders."""

TOLD = re.compile(r"(\w+_)?(qkv|kv)(_\w+)?|gate_up_proj|linear_in|ff_in")
"""What fused layers are called, gated ones of diffusers' own besides."""

OTHER = frozenset({"kv_mapper"})
"""What is called so, and is one projection."""


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_no_fused_layer_of_any_class_is_forgotten() -> None:
    from diffusers.models.activations import GEGLU, SwiGLU

    framework, seen = Diffusers(), set()
    for name in classes():
        try:
            model = on_meta(name)
        except (TypeError, ValueError):  # it needs arguments that are models or constants of its own
            continue
        declared = {module for _, module, _ in parts_of(name, framework.index_model(model, BaseRef()))}
        linear = {at for at, each in model.named_modules() if isinstance(each, torch.nn.Linear)}
        gated = {f"{at}.proj" for at, each in model.named_modules() if isinstance(each, GEGLU | SwiGLU)}
        called = {at for at in linear if TOLD.fullmatch(at.rpartition(".")[2])}
        forgotten = {at for at in gated | called if at.rpartition(".")[2] not in OTHER} - declared
        assert not forgotten or name in WHOLE, (name, sorted(forgotten)[:4])
        assert declared <= linear
        seen |= {name} if declared else set()
    unseen = {"OmniGenTransformer2DModel", "ConsisIDTransformer3DModel"}  # these are fused, or built, by an argument
    assert seen >= {kind for kind, _ in CONFIGS.values()} - unseen
    assert "UNet2DConditionModel" in seen
