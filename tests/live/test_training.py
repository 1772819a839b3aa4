"""Attached adapters while they train: gradients, dropout, and what is kept for the way back."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from lorahub.deltas.delta import Delta
from lorahub.deltas.dora import DoRA
from lorahub.deltas.ia3 import Gain
from lorahub.deltas.loha import LoHa
from lorahub.deltas.lora import LoRA
from lorahub.deltas.oft import Turn
from lorahub.deltas.vera import VeRA
from lorahub.errors import UsageError
from lorahub.plugins import load_registry
from lorahub.testing import cases

KINDS = load_registry().kinds


def trained(delta: Delta, dtype: torch.dtype = torch.float64) -> Delta:
    """The same with tensors that want gradients."""
    real = {name: value for name, value in delta.tensors().items() if value.is_floating_point()}
    return replace(
        delta, **{name: value.detach().to(dtype, copy=True).requires_grad_() for name, value in real.items()}
    )  # type: ignore[type-var]


def leaves(*deltas: Delta) -> list[torch.Tensor]:
    return [value for delta in deltas for value in delta.tensors().values() if value.requires_grad]


def modules(weight: torch.Tensor) -> list[tuple[nn.Module, torch.Tensor]]:
    """Modules that have a weight of this shape, frozen and in float64, each with a batch of three."""
    generator = torch.Generator().manual_seed(3)
    made: list[tuple[nn.Module, torch.Tensor]] = []
    if weight.dim() == 2:
        made.append(
            (nn.Linear(weight.shape[1], weight.shape[0]), torch.randn(3, 5, weight.shape[1], generator=generator))
        )
        made.append((nn.Embedding(*weight.shape), torch.randint(weight.shape[0], (3, 9), generator=generator)))
    elif weight.dim() == 4:
        conv = nn.Conv2d(2 * weight.shape[1], weight.shape[0], weight.shape[2:], groups=2, stride=2, padding=1)
        made.append((conv, torch.randn(3, 2 * weight.shape[1], 6, 6, generator=generator)))
    for module, _ in made:
        module.double().requires_grad_(False)
        module.weight.copy_(weight)
    return [(module, x.double() if x.is_floating_point() else x) for module, x in made]


def examples(name: str) -> list[tuple[Any, nn.Module, torch.Tensor]]:
    shapes = [(8, 6), (4, 6, 3, 2)]
    first = {tuple(case.weight.shape): case for case in cases(KINDS[name]) if tuple(case.weight.shape) in shapes}
    return [(case, module, x) for case in first.values() for module, x in modules(case.weight)]


STARTED = frozenset(name for name, kind in KINDS.items() if kind.starting is not None)
"""Kinds that are trained here, and not only on from files."""


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name in STARTED else pytest.mark.slow)
        for name in KINDS
        if name != "expert-lora"  # it stands on no module that is called
    ],
)
def test_gradients_are_those_of_the_changed_weight(bench, name):
    tried = 0
    for case, module, x in examples(name):
        one, other = trained(case.delta), trained(case.other)
        if case.delta.reads or not leaves(one):
            continue
        weight = module.weight.detach()
        for strengths in ({"one": 1.0}, {"one": 0.75, "other": -0.5}):
            used = {"one": one, "other": other}
            own = leaves(*(used[each] for each in strengths))
            with bench.attach(module, {each: {"weight": used[each]} for each in strengths}, active=[]) as live:
                live.set_adapters([*strengths], weights=[*strengths.values()])
                found = module(x)
                aim = torch.randn(found.shape, generator=torch.Generator().manual_seed(9), dtype=found.dtype)
                mine = torch.autograd.grad((found - aim).square().sum(), own, allow_unused=True)
            changed = weight + sum(by * used[each].delta(weight) for each, by in strengths.items())
            wanted = torch.func.functional_call(module, {"weight": changed}, x)
            theirs = torch.autograd.grad((wanted - aim).square().sum(), own, allow_unused=True)
            torch.testing.assert_close(found, wanted)
            assert any(each is not None and each.norm() > 1e-6 for each in theirs)
            for got, due in zip(mine, theirs, strict=True):
                assert (got is None) == (due is None)
                if due is not None:
                    torch.testing.assert_close(got, due, rtol=1e-6, atol=1e-8 * float(due.norm()))
            tried += 1
    assert tried or name not in STARTED


def test_a_gain_on_outputs_multiplies_what_a_module_gives_with_its_bias(bench):
    module, x = nn.Linear(6, 8).requires_grad_(False), bench.randn(3, 6)
    gain = (bench.randn(8, seed=2) * 0.2 + 1).reshape(8, 1).requires_grad_()
    plain = module(x)
    bench.attach(module, {"one": {"weight": Gain(gain, 0), "bias": Gain(gain.reshape(-1), 0)}})
    y = module(x)
    torch.testing.assert_close(y, plain * gain.T)
    (found,) = torch.autograd.grad(y.square().sum(), [gain])
    (wanted,) = torch.autograd.grad((plain * gain.T).square().sum(), [gain])
    torch.testing.assert_close(found, wanted)


def test_a_gain_on_a_bias_alone_leaves_the_rest_of_the_output(bench):
    module, x = nn.Linear(6, 8).requires_grad_(False), bench.randn(3, 6)
    weight, bias = module.weight.detach().clone(), module.bias.detach().clone()
    gain = (bench.randn(8, seed=2) + 1).requires_grad_()
    bench.attach(module, {"one": {"bias": Gain(gain, 0)}})
    torch.testing.assert_close(module(x), x @ weight.T + bias * gain)


def test_gains_that_are_not_one_act_each_on_its_own(bench):
    """As after a change by hand: the weight's and the bias's differ."""
    module, x = nn.Linear(6, 8).requires_grad_(False), bench.randn(3, 6)
    weight, bias = module.weight.detach().clone(), module.bias.detach().clone()
    one, other = ((bench.randn(8, seed=seed) + 1).requires_grad_() for seed in (2, 3))
    bench.attach(module, {"one": {"weight": Gain(one.reshape(8, 1), 0), "bias": Gain(other, 0)}})
    torch.testing.assert_close(module(x), x @ weight.T * one + bias * other)


class Saved:
    """The largest tensor kept for the way back, that is no parameter's, in elements."""

    def __init__(self, module: nn.Module) -> None:
        self.known = {each.untyped_storage().data_ptr() for each in module.parameters()}
        self.largest = 0

    def __call__(self, tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in self.known:
            self.largest = max(self.largest, tensor.untyped_storage().nbytes() // tensor.element_size())
        return tensor


def large(bench: Any) -> dict[str, Delta]:
    """One of each on a weight of 96 by 64."""
    flat = {"generator": torch.Generator().manual_seed(1)}
    return {
        "lora": LoRA.example((96, 64), r=4, **flat),
        "dora": DoRA(*(LoRA.example((96, 64), r=4, **flat).tensors().values()), 0.5, bench.randn(96).abs(), 0),
        "loha": LoHa.example((96, 64), r=3, **flat),
        "ia3-out": Gain(bench.randn(96, 1), 0),
        "ia3-in": Gain(bench.randn(1, 64), 1),
        "vera": VeRA.example((96, 64), r=8, **flat),
        "oft": Turn(bench.randn(8, 28) * 0.1, (2.0, 2.0, 2.0, 1.0)),
    }


@pytest.mark.parametrize("name", ["lora", "dora", "loha", "ia3-out", "ia3-in", "vera", "oft"])
def test_nothing_as_large_as_the_weight_is_kept_for_the_way_back(bench, name):
    module = nn.Linear(64, 96).requires_grad_(False)
    delta = trained(large(bench)[name], torch.float32)
    if isinstance(delta, VeRA):  # its projections are fixed, and the adapter's own
        delta = replace(delta, up=delta.up.detach(), down=delta.down.detach())
    bench.attach(module, {"one": {"weight": delta}})
    x = bench.randn(4, 64)
    saved = Saved(module)
    saved.known |= {each.untyped_storage().data_ptr() for each in delta.tensors().values()}
    with torch.autograd.graph.saved_tensors_hooks(saved, lambda each: each):
        loss = module(x).square().sum()
    loss.backward()
    assert all(each.grad is not None and each.grad.norm() > 0 for each in leaves(delta))
    assert saved.largest < 96 * 64 / 4


def test_a_change_beside_a_weight_of_few_bits_is_not_rounded_with_it(bench):
    """A step far below the weight's own precision moves the output all the same."""
    module, x = nn.Linear(8, 8).requires_grad_(False).to(torch.bfloat16), bench.randn(3, 8).to(torch.bfloat16)
    kept = module.weight
    small = LoHa(*(bench.randn(*size, seed=seed) for seed, size in enumerate(((8, 3), (3, 8), (8, 3), (3, 8)))), 1e-4)
    assert small.low_rank() is None
    bench.attach(module, {"one": {"weight": trained(small, torch.float32)}})
    seen = []
    original = functional.linear
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(
            functional, "linear", lambda x, weight, bias=None: seen.append(weight) or original(x, weight, bias)
        )
        module(x)
    assert any(each is kept for each in seen)
    change = small.delta(torch.zeros(8, 8))
    assert any(each.shape == (8, 8) and torch.allclose(each.float(), change, rtol=0.05, atol=1e-6) for each in seen)


# ---- dropout


def own_linear() -> tuple[nn.Linear, torch.Tensor, torch.Tensor]:
    """A layer with its weight and bias, which are not to be had from it once adapters are attached."""
    module = nn.Linear(6, 8).requires_grad_(False)
    return module, module.weight.detach().clone(), module.bias.detach().clone()


def dropping(bench: Any, delta: Delta, chance: float, module: nn.Module | None = None) -> tuple[nn.Module, Any]:
    module = nn.Linear(6, 8).requires_grad_(False) if module is None else module
    live = bench.attach(module, {})
    live.add("one", {"weight": delta}, dropout=chance)
    live.set_adapters(["one"])
    return module, live


def test_dropout_is_on_the_input_of_the_adapters_path_alone(bench):
    delta, x = trained(bench.lora(8, 6), torch.float32), bench.randn(5, 6)
    module, weight, bias = own_linear()
    dropping(bench, delta, 0.5, module)
    torch.manual_seed(11)
    found = module(x)
    torch.manual_seed(11)
    masked = functional.dropout(x, 0.5)
    wanted = functional.linear(x, weight, bias) + masked @ delta.down.T @ delta.up.T * delta.scale
    torch.testing.assert_close(found, wanted)
    assert (masked == 0).any()
    assert not torch.equal(module(x), found)


def test_dropout_of_dora_is_as_in_peft_on_the_direction_and_its_weight(bench):
    lora, x = bench.lora(8, 6), bench.randn(5, 6)
    delta = trained(DoRA(lora.up, lora.down, lora.scale, bench.randn(8, seed=4).abs() + 0.5, 0), torch.float32)
    module, weight, bias = own_linear()
    dropping(bench, delta, 0.5, module)
    torch.manual_seed(11)
    found = module(x)
    torch.manual_seed(11)
    masked = functional.dropout(x, 0.5)
    direction = weight + delta.scale * delta.up @ delta.down
    factor = delta.magnitude / direction.norm(dim=1)
    wanted = bias + x @ weight.T + masked @ (factor[:, None] * direction - weight).T
    torch.testing.assert_close(found, wanted)


def test_dropout_of_vera_is_on_the_input(bench):
    vera = trained(VeRA.example((8, 6), r=4, generator=torch.Generator().manual_seed(0)), torch.float32)
    (module, weight, bias), x = own_linear(), bench.randn(5, 6)
    dropping(bench, vera, 0.5, module)
    torch.manual_seed(11)
    found = module(x)
    torch.manual_seed(11)
    masked = functional.dropout(x, 0.5)
    plain = functional.linear(x, weight, bias)
    torch.testing.assert_close(found, plain + masked @ vera.delta(torch.zeros(8, 6)).T)


def test_nothing_is_dropped_in_evaluation_or_of_an_adapter_that_is_not_trained(bench):
    module, x = nn.Linear(6, 8).requires_grad_(False), bench.randn(5, 6)
    _, live = dropping(bench, trained(bench.lora(8, 6), torch.float32), 0.5, module)
    module.eval()
    assert torch.equal(module(x), module(x))
    evaluated = module(x)
    live.detach()
    module.train()
    dropping(bench, bench.lora(8, 6), 0.5, module)
    torch.testing.assert_close(module(x), evaluated)


def test_adapters_together_each_have_a_mask_of_their_own(bench):
    (module, weight, bias), x = own_linear(), bench.randn(5, 6)
    first, second = (trained(bench.lora(8, 6, seed=seed), torch.float32) for seed in (1, 2))
    live = bench.attach(module, {})
    for name, delta in (("one", first), ("two", second)):
        live.add(name, {"weight": delta}, dropout=0.5)
    live.set_adapters(["one", "two"], weights=[1.0, 0.5])
    torch.manual_seed(11)
    found = module(x)
    torch.manual_seed(11)
    wanted = functional.linear(x, weight, bias)
    for by, delta in ((1.0, first), (0.5, second)):
        wanted = wanted + by * functional.dropout(x, 0.5) @ delta.down.T @ delta.up.T * delta.scale
    torch.testing.assert_close(found, wanted)


def test_rows_with_adapters_of_their_own_are_dropped_alike(bench):
    (module, weight, bias), x = own_linear(), bench.randn(3, 6)
    deltas = {name: trained(bench.lora(8, 6, seed=seed), torch.float32) for seed, name in enumerate(("one", "two"))}
    live = bench.attach(module, {})
    for name, delta in deltas.items():
        live.add(name, {"weight": delta}, dropout=0.5)
    live.adapter_names = ["two", None, "one"]
    torch.manual_seed(11)
    found = module(x)
    torch.manual_seed(11)
    masked, plain = functional.dropout(x, 0.5), functional.linear(x, weight, bias)
    for row, name in ((0, "two"), (2, "one")):
        delta = deltas[name]
        torch.testing.assert_close(found[row], plain[row] + masked[row] @ delta.down.T @ delta.up.T * delta.scale)
    torch.testing.assert_close(found[1], plain[1])


@pytest.mark.parametrize(
    ("delta", "chance", "says"),
    [
        (Gain(torch.ones(8, 1), 0), 0.1, "ia3, whose inputs are not dropped"),
        (
            LoHa.example((8, 6), r=2, generator=torch.Generator()),
            0.1,
            "loha, whose inputs are not dropped.*rank_dropout",
        ),
        (LoRA.example((8, 6), r=2, generator=torch.Generator()), 1.0, "a dropout of 1.0 is none"),
    ],
    ids=["ia3", "loha", "too much"],
)
def test_a_dropout_that_a_kind_does_not_have_is_refused_by_name(bench, delta, chance, says):
    module = nn.Linear(6, 8)
    live = bench.attach(module, {})
    with pytest.raises(UsageError, match=says):
        live.add("one", {"weight": delta}, dropout=chance)
    assert live.adapters == ()


# ---- loops


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(6, 8)
        self.b = nn.Linear(8, 6)

    def block(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(torch.tanh(self.a(x)))

    def forward(self, x: torch.Tensor, how: bool | None = None) -> torch.Tensor:
        if how is None:
            return self.block(x).square().mean()
        found: torch.Tensor = checkpoint(self.block, x, use_reentrant=how)
        return found.square().mean()


def on_net(bench: Any, kind: str) -> dict[str, Delta]:
    def bent(out: int, inputs: int, seed: int) -> DoRA:
        lora = bench.lora(out, inputs, seed=seed)
        return DoRA(lora.up, lora.down, lora.scale, bench.randn(out, seed=seed).abs() + 0.5, 0)

    made: dict[str, dict[str, Delta]] = {
        "lora": {"a.weight": bench.lora(8, 6, seed=1), "b.weight": bench.lora(6, 8, seed=2)},
        "dora": {"a.weight": bent(8, 6, 1), "b.weight": bent(6, 8, 2)},
        "oft": {"a.weight": Turn(bench.randn(2, 3) * 0.2, (2.0, 2.0, 1.0)), "b.weight": Turn(bench.randn(2, 6) * 0.2)},
        "ia3": {"a.weight": Gain(bench.randn(8, 1), 0), "b.weight": Gain(bench.randn(1, 8), 1)},
        "loha": {"a.weight": LoHa.example((8, 6), r=2, generator=torch.Generator())},
    }
    return {name: trained(delta, torch.float32) for name, delta in made[kind].items()}


KINDS_ON_NET = ["lora", "dora", "oft", "ia3", "loha"]


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("kind", KINDS_ON_NET)
def test_a_checkpointed_model_has_the_same_loss_and_gradients(bench, kind, reentrant):
    model, deltas = Net().requires_grad_(False), on_net(bench, kind)
    own, x = leaves(*deltas.values()), bench.randn(4, 6).requires_grad_()
    live = bench.attach(model, {})
    live.add("one", deltas, dropout=0.5 if kind in ("lora", "dora") else 0.0)
    live.set_adapters(["one"])
    torch.manual_seed(3)
    plain = model(x)
    wanted = torch.autograd.grad(plain, own)
    torch.manual_seed(3)
    loss = model(x, reentrant)
    torch.testing.assert_close(loss, plain)
    loss.backward()
    for each, due in zip(own, wanted, strict=True):
        torch.testing.assert_close(each.grad, due)
        assert due.norm() > 1e-6


@pytest.mark.parametrize("kind", KINDS_ON_NET)
def test_autocast_trains_in_few_bits_and_gives_whole_gradients(bench, kind):
    model, deltas = Net().requires_grad_(False), on_net(bench, kind)
    own, x = leaves(*deltas.values()), bench.randn(4, 6)
    bench.attach(model, {"one": deltas})
    wanted = torch.autograd.grad(model(x), own)
    with torch.autocast("cpu", torch.bfloat16):
        assert model.a(x).dtype == torch.bfloat16
        loss = model(x)
    found = torch.autograd.grad(loss, own)
    assert all(each.dtype == torch.float32 for each in found)
    error = sum(float((each - due).norm() ** 2) for each, due in zip(found, wanted, strict=True)) ** 0.5
    assert error < 0.1 * sum(float(due.norm() ** 2) for due in wanted) ** 0.5


@pytest.mark.parametrize("kind", KINDS_ON_NET)
def test_evaluation_between_steps_sees_the_last_step(bench, kind):
    model, deltas = Net().requires_grad_(False), on_net(bench, kind)
    own, x = leaves(*deltas.values()), bench.randn(4, 6)
    bench.attach(model, {"one": deltas})
    optimiser = torch.optim.SGD(own, lr=0.1)
    seen = []
    for _ in range(3):
        loss = model(x)
        model.eval()
        with torch.no_grad():
            seen.append(model(x).item())
        model.train()
        torch.testing.assert_close(torch.tensor(seen[-1]), loss.detach())
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
    assert len(set(seen)) == 3


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        ("lora", torch.float32),
        ("lora", torch.bfloat16),
        ("dora", torch.float32),
        ("loha", torch.float32),
        pytest.param("oft", torch.float32, marks=pytest.mark.slow),
        pytest.param("ia3", torch.float32, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_a_compiled_model_trains_as_the_model_itself(bench, kind, dtype):
    torch.compiler.reset()
    model, deltas = Net().requires_grad_(False).to(dtype), on_net(bench, kind)
    own, x = leaves(*deltas.values()), bench.randn(4, 6).to(dtype)
    bench.attach(model, {"one": deltas})
    wanted = torch.autograd.grad(model(x), own)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    found = torch.autograd.grad(compiled(x), own)
    for each, due in zip(found, wanted, strict=True):
        torch.testing.assert_close(
            each, due, rtol=0, atol=float(due.abs().max()) * (1e-5 if dtype.itemsize > 2 else 0.05)
        )
        assert due.norm() > 0
    torch.compiler.reset()
