"""Wherever a module uses its parameters, and however: attached is merged.

The reference is the same model with the adapter merged into its weights, called as it is.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

from lorahub.deltas.dora import DoRA
from lorahub.deltas.full import Full
from lorahub.deltas.ia3 import Gain
from lorahub.deltas.lora import LoRA
from lorahub.deltas.replace import Replace
from lorahub.errors import UsageError


class FusedAttention(nn.Module):
    """Calls the function on a module's weight, never the module, as EVA and BEiT do."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(8, 24)
        self.proj = nn.Linear(8, 8)

    def forward(self, x):
        q, k, v = functional.linear(x, self.qkv.weight, self.qkv.bias).chunk(3, -1)
        return self.proj(functional.scaled_dot_product_attention(q, k, v))


class ScaledEmbedding(nn.Embedding):
    """Multiplies what it looks up, as Gemma does."""

    def forward(self, ids):
        return super().forward(ids) * 3.0


class StandardisedConv(nn.Conv2d):
    """Standardises its kernels before it uses them, as NFNets do."""

    def forward(self, x):
        flat = self.weight.flatten(1)
        kernel = (flat - flat.mean(1, keepdim=True)) / flat.std(1, keepdim=True)
        return functional.conv2d(x, kernel.view_as(self.weight), self.bias, self.stride, self.padding)


class Experts(nn.Module):
    """Keeps its experts in one parameter of three axes, which no module stands for."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(3, 6, 8))

    def forward(self, x):
        return torch.einsum("bti,eoi->btoe", x, self.up)


class Positions(nn.Module):
    """Adds a parameter that belongs to no other module."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(5, 8))

    def forward(self, x):
        return x + self.table


def lora(out: int, inp: int, *k: int) -> LoRA:
    generator = torch.Generator().manual_seed(0)
    down = torch.randn(4, inp, *k, generator=generator)
    return LoRA(torch.randn(out, 4, *(1 for _ in k), generator=generator), down, 0.15)


def ids() -> torch.Tensor:
    return torch.tensor([[1, 2, 3, 1, 0], [4, 0, 5, 6, 7], [7, 7, 2, 1, 3]])


def noise(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(5))


class Attention(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.mha = nn.MultiheadAttention(8, 2, batch_first=True, **options)

    def forward(self, x):
        return self.mha(x, x, x, need_weights=False)[0]


class Normed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(8)

    def forward(self, x):
        return self.norm(x.transpose(1, 2))


CASES: dict[str, tuple[Any, Any, Any]] = {
    # what -> (model, its input, deltas)
    "a linear layer": (lambda: nn.Linear(8, 6), lambda: noise(3, 5, 8), lambda: {"weight": lora(6, 8)}),
    "one row of a linear layer": (lambda: nn.Linear(8, 6), lambda: noise(8), lambda: {"weight": lora(6, 8)}),
    "a band of rows": (lambda: nn.Linear(8, 24), lambda: noise(3, 5, 8), lambda: {"weight[8:16]": lora(8, 8)}),
    "two bands of rows": (
        lambda: nn.Linear(8, 24),
        lambda: noise(3, 5, 8),
        lambda: {"weight[0:8]": lora(8, 8), "weight[16:24]": DoRA(noise(8, 2), noise(2, 8), 0.5, noise(8).abs(), 0)},
    ),
    "a bias": (lambda: nn.Linear(8, 6), lambda: noise(3, 5, 8), lambda: {"bias": Full(noise(6))}),
    "an embedding": (lambda: nn.Embedding(8, 6), ids, lambda: {"weight": lora(8, 6)}),
    "a scaled embedding": (lambda: ScaledEmbedding(8, 6), ids, lambda: {"weight": lora(8, 6)}),
    "an embedding that is rescaled when it is read": (
        lambda: nn.Embedding(8, 6, max_norm=1.0),
        ids,
        lambda: {"weight": lora(8, 6)},
    ),
    "a convolution": (
        lambda: nn.Conv2d(4, 6, 3, stride=2, padding="valid", dilation=2),
        lambda: noise(3, 4, 9, 9),
        lambda: {"weight": lora(6, 4, 3, 3)},
    ),
    "a convolution that reflects": (
        lambda: nn.Conv1d(4, 6, 3, padding="same", padding_mode="reflect"),
        lambda: noise(3, 4, 9),
        lambda: {"weight": lora(6, 4, 3)},
    ),
    "a convolution in groups": (
        lambda: nn.Conv2d(4, 6, 3, groups=2),
        lambda: noise(3, 4, 9, 9),
        lambda: {"weight": lora(6, 2, 3, 3)},
    ),
    "a standardised convolution": (
        lambda: StandardisedConv(4, 6, 3),
        lambda: noise(3, 4, 9, 9),
        lambda: {"weight": lora(6, 4, 3, 3)},
    ),
    "a transposed convolution": (
        lambda: nn.ConvTranspose2d(4, 6, 3),
        lambda: noise(3, 4, 9, 9),
        lambda: {"weight": lora(4, 6, 3, 3)},
    ),
    "fused attention": (FusedAttention, lambda: noise(3, 5, 8), lambda: {"qkv.weight": lora(24, 8)}),
    "multi-head attention": (
        Attention,
        lambda: noise(3, 5, 8),
        lambda: {"mha.in_proj_weight": lora(24, 8), "mha.out_proj.weight": lora(8, 8)},
    ),
    "the fast path of an encoder layer": (
        lambda: nn.TransformerEncoderLayer(8, 2, 16, batch_first=True),
        lambda: noise(3, 5, 8),
        lambda: {"linear1.weight": lora(16, 8), "self_attn.in_proj_weight": lora(24, 8)},
    ),
    "experts": (Experts, lambda: noise(3, 5, 8), lambda: {"up[1]": lora(6, 8)}),
    "a parameter of its own": (Positions, lambda: noise(3, 5, 8), lambda: {"table": Full(noise(5, 8))}),
    "a norm that is replaced": (
        Normed,
        lambda: noise(3, 5, 8),
        lambda: {"norm.weight": Replace(noise(8)), "norm.running_mean": Replace(noise(8))},
    ),
    "dora": (
        lambda: nn.Linear(8, 6),
        lambda: noise(3, 5, 8),
        lambda: {"weight": DoRA(noise(6, 2), noise(2, 8), 0.5, noise(6).abs(), 0)},
    ),
    "ia3": (
        lambda: nn.Linear(8, 6),
        lambda: noise(3, 5, 8),
        lambda: {"weight": Gain(noise(6, 1), 0), "bias": Gain(noise(6), 0)},
    ),
    "a recurrent layer": (
        lambda: nn.GRUCell(8, 6),
        lambda: noise(3, 8),
        lambda: {"weight_ih": lora(18, 8), "weight_hh": lora(18, 6)},
    ),
}


@pytest.mark.parametrize("grad", [False, True], ids=["no grad", "grad"])
@pytest.mark.parametrize("name", CASES)
def test_attached_is_merged(name, grad, bench, agree):
    make, inputs, deltas = CASES[name]
    torch.manual_seed(0)
    model, x = make().eval(), inputs()
    with torch.set_grad_enabled(grad):
        plain = model(x)
        expected = bench.merged(model, deltas(), 0.7)(x)
        live = bench.attach(model, {"one": deltas()})
        live.set_adapters(["one"], weights=[0.7])
        agree(model(x), expected, plain)
        live.set_adapters([])
        assert torch.equal(model(x), plain)


@pytest.mark.parametrize("name", CASES)
def test_nothing_of_the_model_changes(name, bench):
    make, inputs, deltas = CASES[name]
    model, x = make().eval(), inputs()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    objects = dict(model.named_parameters())
    with torch.no_grad():
        live = bench.attach(model, {"one": deltas()})
        model(x)
    assert list(model.state_dict()) == list(before)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(value is objects[key] for key, value in model.named_parameters())
    live.detach()
    assert all(type(module._parameters) is dict and type(module._buffers) is dict for module in model.modules())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_several_adapters_add_up_whatever_way_each_takes(bench, agree):
    model, x = nn.Linear(8, 6), noise(3, 5, 8)
    low, full = {"weight": lora(6, 8)}, {"weight": Full(noise(6, 8))}
    bent = {"weight": DoRA(noise(6, 2), noise(2, 8), 0.5, noise(6).abs(), 0)}
    weight = model.weight.detach()
    total = weight + sum(
        strength * each["weight"].delta(weight) for strength, each in ((0.5, low), (-0.3, full), (0.2, bent))
    )
    expected = functional.linear(x, total, model.bias)
    live = bench.attach(model, {"low": low, "full": full, "bent": bent, "idle": low})
    live.set_adapters(["full", "low", "bent"], weights=[-0.3, 0.5, 0.2])
    agree(model(x), expected, model(x) * 0 + functional.linear(x, weight, model.bias))


def test_a_module_that_is_never_called_is_named_by_coverage(bench):
    model = nn.ModuleDict({"used": nn.Linear(8, 6), "idle": nn.Linear(8, 6)})
    live = bench.attach(model, {"one": {"used.weight": lora(6, 8), "idle.weight": lora(6, 8)}})
    assert live.coverage() == {"one": ("used.weight", "idle.weight")}
    model["used"](noise(3, 8))
    assert live.coverage() == {"one": ("idle.weight",)}


def test_a_patched_forward_gets_the_changed_weight(bench, agree):
    model, x = nn.Linear(8, 6), noise(3, 8)
    model.forward = lambda x: functional.linear(x, model.weight * 2)
    deltas = {"weight": lora(6, 8)}
    plain = model(x)
    expected = functional.linear(x, (model.weight + deltas["weight"].delta(model.weight)) * 2)
    bench.attach(model, {"one": deltas})
    agree(model(x), expected, plain)


def test_tied_names_change_together_in_a_plain_module(bench, agree):
    model = nn.ModuleDict({"embed": nn.Embedding(8, 6), "head": nn.Linear(6, 8, bias=False)})
    model["head"].weight = model["embed"].weight
    deltas = {"embed.weight": lora(8, 6)}
    plain = model["head"](model["embed"](ids()))
    weight = model["embed"].weight + deltas["embed.weight"].delta(model["embed"].weight)
    expected = functional.linear(functional.embedding(ids(), weight), weight)
    bench.attach(model, {"one": deltas})
    agree(model["head"](model["embed"](ids())), expected, plain)


def test_whoever_handles_the_dictionary_of_parameters_gets_the_module_s_own(bench):
    model = FusedAttention().eval()
    own = model.qkv.weight
    bench.attach(model, {"one": {"qkv.weight": lora(24, 8)}})
    assert model.qkv.weight is not own
    assert model.qkv._parameters["weight"] is own
    assert model.get_parameter("proj.weight") is dict(model.named_parameters())["proj.weight"]
    model.proj.weight = nn.Parameter(own.detach()[:8].clone())  # putting another in its place goes on working
    assert model.proj.weight.shape == (8, 8)


class Cautious(nn.Module):
    """Looks at a weight's dtype before it calls the module, as T5 does."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(8, 6)

    def forward(self, x):
        weight = self.a.weight
        assert isinstance(weight, torch.Tensor)
        assert (weight.size(0), weight.dim(), len(weight), weight.device.type) == (6, 2, 6, "cpu")
        return self.a(x.to(weight.dtype))


def test_looking_at_a_weight_makes_no_copy_of_it(bench, agree, monkeypatch):
    model, x, deltas = Cautious().eval(), noise(3, 8), {"a.weight": lora(6, 8)}
    with torch.no_grad():
        plain = model(x)
        expected = bench.merged(model, deltas)(x)
        live = bench.attach(model, {"one": deltas})
        monkeypatch.setattr("lorahub.live.desk.changed", None)  # nothing asks for the changed weight
        agree(model(x), expected, plain)
        live.adapter_names = ["one", None, "one"]
        agree(model(x)[[0, 2]], expected[[0, 2]], plain[[0, 2]])


def test_rows_cannot_differ_where_a_weight_is_used_apart_from_its_module(bench):
    model = FusedAttention().eval()
    live = bench.attach(model, {"one": {"qkv.weight": lora(24, 8)}})
    live.adapter_names = ["one", None, "one"]
    with pytest.raises(UsageError, match=r"qkv\.weight is used apart from its module"):
        model(noise(3, 5, 8))


def test_what_stands_in_for_a_weight_computes_as_the_changed_one(bench):
    model, deltas = nn.Linear(8, 6), {"weight": lora(6, 8)}
    own = model.weight
    bench.attach(model, {"one": deltas})
    changed = own + deltas["weight"].delta(own)
    for found, expected in (
        (model.weight + 0, changed),
        (2 * model.weight, 2 * changed),
        (torch.cat([model.weight, own]), torch.cat([changed, own])),
        (model.weight.data.clone(), changed.detach()),
        (model.weight.t()[0], changed.t()[0]),
    ):
        assert type(found) is torch.Tensor
        torch.testing.assert_close(found, expected)
    (gradient,) = torch.autograd.grad((model.weight * 3).sum(), own)
    assert torch.equal(gradient, torch.full_like(own, 3))
