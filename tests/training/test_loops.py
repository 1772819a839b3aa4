"""Every loop trains what a plain one does: the same losses, or the same but for the arithmetic that was asked for."""

from __future__ import annotations

import copy
import warnings

import accelerate
import bitsandbytes
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from training.nets import Net, batch, numbers, same, train

import lorahub

ARGUMENTS = {"r": 4, "target_modules": "all-linear", "modules_to_save": "head"}
STEPS = 8


class Checkpointed(Net):
    """The same, with every layer computed again on the way back."""

    reentrant = False

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            x = checkpoint(layer, x, use_reentrant=self.reentrant)
        logits: torch.Tensor = self.head(x.mean(1))
        return logits


class Reentrant(Checkpointed):
    reentrant = True
    gradient_checkpointing = False


@pytest.fixture(scope="module")
def plain() -> list[float]:
    model = Net()
    return train(model, lorahub.create(model, **ARGUMENTS).parameters(), STEPS)


def test_a_plain_loop_learns(plain):
    assert plain[-1] < plain[0] - 0.1


def test_gradients_are_those_of_the_formula():
    """Of LoRA: dB = scale * dW @ A.T and dA = scale * B.T @ dW, with dW of the same model trained in full."""
    model, (ids, labels) = Net(), batch()
    trainee = lorahub.create(model, r=4, alpha=8, target_modules="q_proj")
    train(model, trainee.parameters(), 3)
    whole = Net()
    with torch.no_grad():
        for target, delta in trainee.adapter.deltas.items():
            whole.get_parameter(target.name).add_(delta.scale * delta.up @ delta.down)
    for each in (model, whole):
        each.zero_grad()
        nn.functional.cross_entropy(each(ids), labels).backward()
    own = dict(trainee.named_parameters())
    for layer in (0, 1):
        up, down = (own[f"_lorahub.default.layers.{layer}.q_proj.weight_{slot}"] for slot in ("up", "down"))
        gradient = whole.layers[layer].q_proj.weight.grad.double()
        for found, expected in (
            (up.grad, 2 * gradient @ down.double().T),
            (down.grad, 2 * up.double().T @ gradient),
        ):
            assert (found - expected).norm() <= 1e-5 * expected.norm()
            assert expected.norm() > 0


@pytest.mark.parametrize("kind", [Checkpointed, Reentrant])
def test_checkpointing_changes_nothing(kind, plain):
    model = kind()
    trainee = lorahub.create(model, **ARGUMENTS)
    if kind is Reentrant:
        trainee.require_input_grads()
    assert train(model, trainee.parameters(), STEPS) == pytest.approx(plain, rel=1e-6)


def test_a_switch_for_checkpointing_lets_inputs_want_gradients(plain):
    model = Reentrant()
    trainee = lorahub.create(model, **ARGUMENTS)
    model.gradient_checkpointing = True
    assert train(model, trainee.parameters(), STEPS) == pytest.approx(plain, rel=1e-6)


def test_in_autocast_losses_are_those_of_full_precision_but_for_bfloat16(plain):
    model = Net()
    before = numbers(model)
    trainee = lorahub.create(model, **ARGUMENTS)
    with torch.autocast("cpu", torch.bfloat16):
        losses = train(model, trainee.parameters(), STEPS)
    assert losses == pytest.approx(plain, rel=2**-5)
    assert losses != plain
    assert same(numbers(model), before)


def test_a_base_in_bfloat16_is_trained_by_numbers_in_float32(plain):
    model = Net().bfloat16()
    before = numbers(model)
    trainee = lorahub.create(model, **ARGUMENTS)
    assert {own.dtype for own in trainee.parameters()} == {torch.float32}
    assert train(model, trainee.parameters(), STEPS) == pytest.approx(plain, rel=2**-4)
    assert same(numbers(model), before)


@pytest.mark.slow
def test_a_compiled_model_trains_alike(plain):
    model = Net()
    trainee = lorahub.create(model, **ARGUMENTS)
    compiled = torch.compile(model, backend="aot_eager")
    assert train(compiled, trainee.parameters(), STEPS) == pytest.approx(plain, rel=1e-5)


def test_accelerate_trains_saves_and_goes_on(plain, tmp_path):
    losses: list[float] = []
    for seed in (0, 5):
        model = Net()
        trainee = lorahub.create(model, **ARGUMENTS, seed=seed)
        accelerator = accelerate.Accelerator(cpu=True)
        wrapped, optimizer = accelerator.prepare(model, torch.optim.AdamW(trainee.parameters(), lr=1e-2))
        if losses:
            accelerator.load_state(tmp_path)
        losses += train(wrapped, [], STEPS // 2, optimizer=optimizer)
        accelerator.save_state(tmp_path)
    assert losses == plain


class Product(torch.autograd.Function):
    """As losses over the head are that go through it in parts: no class of tensors is asked what it makes of this."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return x @ weight.T

    @staticmethod
    def backward(ctx, gradient):
        x, weight = ctx.saved_tensors
        return gradient @ weight, gradient.T @ x


class Fused(Net):
    """The head's weight is multiplied apart from the head."""

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        found: torch.Tensor = Product.apply(x.mean(1), self.head.weight) + self.head.bias
        return found


@pytest.mark.parametrize("kind", ["lora", "dora", "ia3"])
def test_a_weight_that_is_multiplied_apart_from_its_module_is_trained(kind):
    arguments = {"target_modules": ["q_proj", "head"]}
    model = Net()
    own = train(model, lorahub.create(model, kind, **arguments).parameters(), STEPS)
    model = Fused()
    trainee = lorahub.create(model, kind, **arguments)
    assert train(model, trainee.parameters(), STEPS) == pytest.approx(own, rel=1e-5)
    assert all(each.grad is not None for each in trainee.parameters())


def test_lightning_trains_saves_and_goes_on(plain, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what its imports say of other packages is not ours
        import lightning

    class Module(lightning.LightningModule):
        def __init__(self, seed: int) -> None:
            super().__init__()
            self.model = Net()
            self.trainee = lorahub.create(self.model, **ARGUMENTS, seed=seed)
            self.losses: list[float] = []

        def training_step(self, data: list[torch.Tensor], _: int) -> torch.Tensor:
            loss = nn.functional.cross_entropy(self.model(data[0]), data[1])
            self.losses.append(loss.item())
            return loss

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.AdamW(self.trainee.parameters(), lr=1e-2)

    losses: list[float] = []
    data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*batch()), batch_size=16)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # advice on workers and loggers
        for seed, steps, start in ((0, STEPS // 2, None), (5, STEPS, tmp_path / "half.ckpt")):
            module = Module(seed)
            trainer = lightning.Trainer(
                max_epochs=steps,
                accelerator="cpu",
                logger=False,
                enable_checkpointing=False,
                enable_progress_bar=False,
                enable_model_summary=False,
                default_root_dir=tmp_path,
            )
            trainer.fit(module, data, ckpt_path=start, **({"weights_only": False} if start else {}))
            losses += module.losses
            trainer.save_checkpoint(tmp_path / "half.ckpt")
    assert losses == pytest.approx(plain, rel=1e-6)


@pytest.mark.parametrize("kind", ["lora", "dora", "ia3"])
def test_a_base_in_four_bits_is_trained_on_and_keeps_its_codes(kind):
    model = Net()
    for layer in model.layers:
        own = layer.q_proj
        quantised = bitsandbytes.nn.Linear4bit(16, 16, compute_dtype=torch.float32, quant_type="nf4")
        quantised.weight = bitsandbytes.nn.Params4bit(own.weight.data.clone(), requires_grad=False, quant_type="nf4")
        quantised.bias = own.bias
        layer.q_proj = quantised.to("cpu")
    codes = {name: own.detach().clone() for name, own in model.named_parameters()}
    trainee = lorahub.create(model, kind, target_modules=["q_proj", "down_proj"])
    total = trainee.trainable_parameters()
    assert total.total - total.trained == sum(own.numel() for own in Net().parameters())
    losses = train(model, trainee.parameters(), STEPS)
    assert losses[-1] < losses[0] - 1e-3
    trainee.detach()
    assert all(torch.equal(own, codes[name]) for name, own in model.named_parameters())


def test_a_copy_of_a_model_that_is_trained_can_be_begun_anew():
    model = Net()
    trainee = lorahub.create(model, **ARGUMENTS)
    train(model, trainee.parameters(), 2)
    again = copy.deepcopy(model)
    lorahub.handle(again).detach()
    assert train(again, lorahub.create(again, **ARGUMENTS).parameters(), 2)
