"""Choosing, weighting, exchanging and taking off adapters; gradients; dtypes and devices."""

from __future__ import annotations

import copy
import gc
import weakref

import pytest
import torch
from torch import nn
from torch.nn import functional

from lorahub.bases.site import Site
from lorahub.deltas.dora import DoRA
from lorahub.deltas.full import Full
from lorahub.errors import UsageError
from lorahub.live.hooks import Output


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(8, 6)
        self.b = nn.Linear(6, 6)

    def forward(self, x):
        return self.b(torch.tanh(self.a(x)))


def low(bench, seed=0, **options):
    return {"a.weight": bench.lora(6, 8, seed=seed, **options), "b.weight": bench.lora(6, 6, seed=seed + 1, **options)}


def bent(bench, seed=0):
    return {"a.weight": DoRA(bench.randn(6, 2, seed=seed), bench.randn(2, 8), 0.5, bench.randn(6).abs(), 0)}


def test_weights_of_a_choice_replace_those_of_attaching(bench, agree):
    model, x = Two().eval(), bench.randn(3, 8)
    plain = model(x)
    live = bench.attach(model, {"one": low(bench)})
    agree(model(x), bench.merged(model, low(bench))(x), plain)
    live.set_adapters(["one"], weights=[-0.4])
    agree(model(x), bench.merged(model, low(bench), -0.4)(x), plain)
    assert live.active == {"one": -0.4}
    live.set_adapters(["one"])
    agree(model(x), bench.merged(model, low(bench))(x), plain)


def test_rows_take_their_own_adapters_or_none(bench, agree):
    model, x = Two().eval(), bench.randn(4, 8)
    plain = model(x)
    expected = plain.clone()
    expected[0] = bench.merged(model, low(bench, 1))(x)[0]
    expected[2] = bench.merged(model, bent(bench, 5), 0.5)(x)[2]
    live = bench.attach(model, {"one": low(bench, 1), "two": bent(bench, 5)})
    live.set_rows(["one", None, "two", None], weights={"two": 0.5})
    assert live.adapter_names == ("one", None, "two", None)
    agree(model(x), expected, plain)
    live.set_adapters(["one"])
    assert live.adapter_names is None


def test_rows_that_do_not_match_the_batch_are_refused(bench):
    model = Two().eval()
    live = bench.attach(model, {"one": low(bench)})
    live.adapter_names = ["one", None, None]
    with pytest.raises(UsageError, match=r"a\.weight: adapters are named for 3 rows"):
        model(bench.randn(4, 8))


def test_rows_without_names_take_again_what_all_of_them_took_before(bench):
    model, x = Two().eval(), bench.randn(3, 8)
    live = bench.attach(model, {"one": low(bench), "two": bent(bench)})
    live.set_adapters(["one"], weights=[0.5])
    together = model(x)
    for names in (["one", None, "two"], ["two", "two", "two"]):
        live.adapter_names = names
        live.adapter_names = ["one", None, None]
        assert not torch.equal(model(x), together)
        live.adapter_names = None
        assert live.active == {"one": 0.5}
        assert torch.equal(model(x), together)
        live.adapter_names = None
        assert live.active == {"one": 0.5}


def test_an_adapter_whose_change_is_all_rows_alike_is_refused_for_some_of_them(bench):
    model, x = nn.Sequential(nn.Linear(8, 6), nn.LayerNorm(6)).eval(), bench.randn(2, 8)
    live = bench.attach(model, {"one": {"0.weight": bench.lora(6, 8)}, "norm": {"1.weight": Full(bench.randn(6))}})
    with pytest.raises(UsageError, match=r"'norm' changes 1\.weight"):
        live.adapter_names = ["one", "norm"]
    live.adapter_names = ["norm", "norm"]  # every row the same: as if it were chosen for all
    torch.testing.assert_close(model(x), bench.merged(model, {"1.weight": Full(bench.randn(6))})(x))


@pytest.mark.parametrize("capacity", [0, 8])
def test_rows_take_their_own_biases(bench, agree, capacity):
    model, x = nn.Sequential(nn.Linear(8, 6), nn.Unflatten(1, (2, 3)), nn.Conv1d(2, 4, 2)).eval(), bench.randn(4, 8)
    one = {"0.bias": Full(bench.randn(6)), "2.bias": Full(bench.randn(4, seed=1)), "0.weight": bench.lora(6, 8)}
    two = {"0.bias": Full(bench.randn(6, seed=2))}
    plain = model(x)
    expected = plain.clone()
    expected[1], expected[3] = bench.merged(model, one)(x)[1], bench.merged(model, two, 0.5)(x)[3]
    live = bench.attach(model, {"one": one, "two": two}, capacity=capacity)
    live.set_rows([None, "one", None, "two"], weights={"two": 0.5})
    agree(model(x), expected, plain)
    assert not any(live.coverage().values())
    live.set_adapters(["one", "two"], weights=[1.0, 0.5])
    both = model(x)
    live.set_adapters(["one"])
    agree(model(x), bench.merged(model, one)(x), plain)
    assert not torch.equal(both, model(x))


def test_rows_lie_along_the_second_axis_where_batches_do(bench, agree):
    model = nn.TransformerEncoderLayer(8, 2, 16, batch_first=False, dropout=0.0)
    x, deltas = bench.randn(3, 3, 8), {"linear1.weight": bench.lora(16, 8)}
    plain = model(x)
    expected = plain.clone()
    expected[:, 1] = bench.merged(model, deltas)(x)[:, 1]
    live = bench.attach(model, {"one": deltas})
    live.adapter_names = [None, "one", None]
    agree(model(x), expected, plain)


def test_one_name_and_one_number_need_no_list(bench, agree):
    model, x = Two().eval(), bench.randn(3, 8)
    plain = model(x)
    live = bench.attach(model, {"one": low(bench), "two": low(bench, 5)})
    live.set_adapters(["one"], weights=[0.5])
    half = model(x)
    for act in (
        lambda: live.set_adapters("one", weights=0.5),
        lambda: live.set_adapters(["one"], weights=torch.tensor(0.5)),
        lambda: live.set_adapters(["one"], weights={"one": 0.5}),
    ):
        live.set_adapters([])
        act()
        agree(model(x), half, plain)
        assert live.active == {"one": 0.5}
    with live.using("two"):
        assert live.active == {"two": 1.0}
    live.set_adapters(["one", "two"], weights=0.25)
    assert live.active == {"one": 0.25, "two": 0.25}


@pytest.mark.parametrize(
    ("act", "says"),
    [
        (lambda live: live.set_adapters(["three"]), "no adapter 'three'"),
        (lambda live: live.set_adapters("o"), "no adapter 'o'"),
        (lambda live: live.set_rows("one"), "one name and not one for each row"),
        (lambda live: live.set_adapters(["one", "one"]), "named twice"),
        (lambda live: live.set_adapters(["one"], weights=[1, 2]), "2 weights for 1"),
        (lambda live: live.set_adapters(["one"], weights=[float("nan")]), "nan"),
        (lambda live: live.set_adapters(["one"], weights="1"), "are no weights"),
        (lambda live: live.set_adapters(["one"], weights=["1"]), "the weight of one is '1', which is no number"),
        (lambda live: live.set_adapters(["one"], weights={"two": 1}), "weights name two"),
        (lambda live: live.add("one", {}), "'one' already"),
        (lambda live: live.swap("three", {}), "no adapter 'three'"),
        (lambda live: live.remove("one"), "'one' is chosen"),
    ],
)
def test_a_mistake_is_named_and_changes_nothing(bench, act, says):
    model, x = Two().eval(), bench.randn(3, 8)
    live = bench.attach(model, {"one": low(bench)})
    before = model(x)
    with pytest.raises(UsageError, match=says):
        act(live)
    assert torch.equal(model(x), before)
    assert live.adapters == ("one",)


def test_adding_removing_and_swapping(bench, agree):
    model, x = Two().eval(), bench.randn(3, 8)
    plain = model(x)
    live = bench.attach(model, {"one": low(bench)})
    before = model(x)
    live.add("two", bent(bench), weight=0.5)
    assert torch.equal(model(x), before)
    live.set_adapters(["two"])
    agree(model(x), bench.merged(model, bent(bench), 0.5)(x), plain)
    live.swap("two", low(bench, 9))
    agree(model(x), bench.merged(model, low(bench, 9), 0.5)(x), plain)
    live.remove("one")
    assert live.adapters == ("two",)
    with pytest.raises(UsageError, match="another adapter"):
        live.swap("two", {"a.weight": bench.lora(5, 8)})
    agree(model(x), bench.merged(model, low(bench, 9), 0.5)(x), plain)


def test_after_detaching_the_model_is_what_it_was(bench):
    model, x = Two().eval(), bench.randn(3, 8)
    plain, state = model(x), copy.deepcopy(model.state_dict())
    with bench.attach(model, {"one": low(bench), "two": bent(bench)}) as live:
        assert not torch.equal(model(x), plain)
    assert torch.equal(model(x), plain)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    live.detach()
    for act in (lambda: live.set_adapters([]), lambda: live.add("x", {}), live.refresh):
        with pytest.raises(UsageError, match="were detached"):
            act()


def test_a_failed_attachment_leaves_no_trace(bench):
    model = Two()
    live = bench.attach(model, {})
    with pytest.raises(UsageError, match="another adapter"):
        live.add("bad", {"a.weight": bench.lora(6, 8), "b.weight": bench.lora(5, 6)})
    assert not any(isinstance(hook, Output) for each in model.modules() for hook in each._forward_hooks.values())


@pytest.mark.parametrize("part", ["whole", "part"])
def test_a_model_is_attached_to_once(bench, part):
    model = Two()
    bench.attach(
        model.a if part == "part" else model, {"one": {"weight" if part == "part" else "a.weight": bench.lora(6, 8)}}
    )
    with pytest.raises(UsageError, match="attached already"):
        bench.attach(model, {})


def test_functional_calls_put_adapters_on_the_weights_they_bring(bench):
    model, x = Two().eval(), bench.randn(3, 8)
    deltas = bent(bench) | {"b.weight": bench.lora(6, 6)}
    bench.attach(model, {"one": deltas})
    before = model(x)
    weight = bench.randn(6, 8, seed=3)
    with torch.no_grad():
        found = torch.func.functional_call(model, {"a.weight": weight}, x)
        changed = functional.linear(x, weight + deltas["a.weight"].delta(weight), model.a.bias)
        own = dict(model.named_parameters())["b.weight"]
        expected = functional.linear(torch.tanh(changed), own + deltas["b.weight"].delta(own), model.b.bias)
    assert not torch.equal(found, before)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(model(x), before)
    assert all(isinstance(each, nn.Parameter) for each in model.parameters())


def test_base_weights_that_change_are_noticed(bench, agree):
    model, x = Two().eval(), bench.randn(3, 8)
    deltas = bent(bench)
    live = bench.attach(model, {"one": deltas})
    with torch.no_grad():
        before = model(x)
        dict(model.named_parameters())["a.weight"].mul_(0.5)
        after = model(x)
        live.set_adapters([])
        plain = model(x)
    assert not torch.equal(before, after)
    live.detach()
    agree(after, bench.merged(model, deltas)(x), plain)


def test_gradients_flow_to_inputs_factors_and_base(bench):
    model, x = Two(), bench.randn(3, 8).requires_grad_()
    deltas = low(bench) | {"a.bias": Full(bench.randn(6))} | {"b.weight": bent(bench)["a.weight"]}
    deltas["b.weight"] = DoRA(bench.randn(6, 2), bench.randn(2, 6), 0.5, bench.randn(6).abs(), 0)
    leaves = [t.requires_grad_() for delta in deltas.values() for t in delta.tensors().values()]
    wanted = [x, *leaves, *model.parameters()]

    def reference(x):
        weights = dict(model.named_parameters())
        used = {name: value + deltas[name].delta(value) if name in deltas else value for name, value in weights.items()}
        return functional.linear(
            torch.tanh(functional.linear(x, used["a.weight"], used["a.bias"])), used["b.weight"], used["b.bias"]
        )

    expected = torch.autograd.grad(reference(x).square().sum(), wanted)
    bench.attach(model, {"one": deltas})
    for _ in range(2):  # the second time nothing of the first graph is left over
        found = torch.autograd.grad(model(x).square().sum(), wanted)
        for one, other in zip(found, expected, strict=True):
            assert other.norm() > 0
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_factors_that_train_are_seen_at_each_step(bench):
    model, x = Two().requires_grad_(False), bench.randn(3, 8)
    deltas = low(bench, dtype=torch.float64)  # not the model's dtype, so that they are converted
    leaf = deltas["a.weight"].up.requires_grad_()
    bench.attach(model, {"one": deltas})
    optimizer, losses = torch.optim.SGD([leaf], lr=1e-2), []
    for _ in range(5):
        optimizer.zero_grad()
        loss = model(x).square().sum()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_adapters_compute_in_the_dtype_of_the_output_and_round_once(bench, dtype):
    model, x = nn.Linear(64, 48).to(dtype), bench.randn(16, 64).to(dtype)
    deltas = {"weight": bench.lora(48, 64)}
    plain = model(x)
    bench.attach(model, {"one": deltas})
    found = model(x)
    assert found.dtype == dtype
    weight = model.state_dict()["weight"]
    exact = functional.linear(
        x.double(), weight.double() + deltas["weight"].delta(weight.double()), model.bias.double()
    )
    size = functional.linear(x.double().abs(), weight.double().abs() + deltas["weight"].delta(weight.double()).abs())
    assert (exact - plain).norm() / plain.double().norm() > 1e-1
    assert ((found.double() - exact).abs() <= 4 * torch.finfo(dtype).eps * size + 1e-6 * size).all()


def test_a_model_can_change_its_dtype_while_adapters_are_attached(bench):
    model, x = Two().eval(), bench.randn(3, 8)
    bench.attach(model, {"one": low(bench) | {"a.bias": Full(bench.randn(6))}})
    single = model(x)
    model.double()
    assert model(x.double()).dtype == torch.float64
    torch.testing.assert_close(model(x.double()).float(), single, rtol=1e-5, atol=1e-5)
    model.float()
    torch.testing.assert_close(model(x), single, rtol=1e-6, atol=1e-6)


def test_autocast_decides_the_dtype(bench):
    model, x = Two().eval(), bench.randn(3, 8)
    bench.attach(model, {"one": low(bench)})
    exact = model(x)
    with torch.autocast("cpu", torch.bfloat16):
        found = model(x)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), exact, rtol=0.1, atol=0.2)
    torch.testing.assert_close(model(x), exact)


def test_inference_mode_and_training_may_alternate(bench):
    model, x = Two(), bench.randn(3, 8)
    bench.attach(model, {"one": bent(bench)})
    with torch.inference_mode():
        first = model(x)
    model(x).sum().backward()
    with torch.inference_mode():
        assert torch.equal(model(x), first)


def test_choosing_takes_nothing_from_adapters_that_are_not_chosen(bench):
    model, x = Two().eval(), bench.randn(3, 8)
    names = [f"a{number}" for number in range(40)]
    live = bench.attach(model, {name: low(bench, seed) for seed, name in enumerate(names)})
    live.set_adapters(["a7"])
    desk = live._desk
    filled = len(desk._stacks)
    model(x)
    assert len(desk._stacks) == filled + 1
    assert [adapter.name for adapter in live._desk.choice().view.adapters] == ["a7"]


def test_an_idle_model_pays_nothing_but_the_question(bench, monkeypatch):
    model, x = Two().eval(), bench.randn(3, 8)
    live = bench.attach(model, {"one": low(bench), "two": bent(bench)})
    live.set_adapters([])
    asked = []
    monkeypatch.setattr(Site, "inner", lambda *_: asked.append(1))
    model(x)
    assert not asked
    assert not live._desk._stacks


def test_a_detached_adapter_is_freed(bench):
    model, x = Two().eval(), bench.randn(3, 8)
    delta = bench.lora(6, 8)
    tensor = weakref.ref(delta.up)
    live = bench.attach(model, {"one": {"a.weight": delta}})
    bench.opened.clear()
    model(x)
    live.detach()
    del live, delta
    gc.collect()
    assert tensor() is None


def test_changed_weights_are_kept_for_the_latest_choices_only(bench):
    model, x = Two().eval(), bench.randn(3, 8)
    live = bench.attach(model, {f"a{seed}": bent(bench, seed) for seed in range(5)}, active=["a0"])
    outputs = []
    with torch.no_grad():
        for name in live.adapters:
            live.set_adapters([name])
            outputs.append(model(x))
        holding = [view for view in live._desk._views.values() if any(view.kept.values())]
        assert len(holding) == 2
        for name, expected in zip(live.adapters, outputs, strict=True):  # whoever comes back has them made again
            live.set_adapters([name])
            assert torch.equal(model(x), expected)
