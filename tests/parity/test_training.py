"""Trained side by side with PEFT: the same start, the same data, twenty steps of AdamW, the same adapter at the end.

Each adapter begins here (``Kind.starting``), is written, and PEFT goes on from the file.  In float32 the two sum in
another order, so losses may differ by some rounding errors of a sum, far below 1e-4 of them.  Rounding errors of
gradients that cancel to nothing are enlarged by Adam to whole steps, so tensors are held to each other by what they
change, and not element by element.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertForSequenceClassification, GPT2Config, GPT2LMHeadModel

import lorahub
from lorahub.adapter import Adapter
from lorahub.bases.layout import Target
from lorahub.deltas.delta import Delta
from lorahub.deltas.departed import Departed
from lorahub.deltas.kind import Group, TensorRef
from lorahub.deltas.lora import LoRA
from lorahub.deltas.starting import Ground
from lorahub.plugins import load_registry

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what PEFT's imports say of other packages is not ours
    from peft import LoraConfig, PeftModel, get_peft_model
    from peft.tuners.loha.layer import make_weight_cp

STEPS = 20
REGISTRY = load_registry()


def bert() -> nn.Module:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=53,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        max_position_embeddings=16,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        initializer_range=0.3,
        num_labels=3,
    )
    return BertForSequenceClassification(config)


def gpt2() -> nn.Module:
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=53,
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_positions=16,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        resid_pdrop=0.0,
        initializer_range=0.3,
        bos_token_id=0,
        eos_token_id=0,
    )
    return GPT2LMHeadModel(config)


class Convolutions(nn.Module):
    """A small network for images; its loss is that of three classes."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.second = nn.Conv2d(8, 8, 3, stride=2, padding=1)
        self.point = nn.Conv2d(8, 12, 1)
        self.head = nn.Linear(12, 3)

    def forward(self, image: torch.Tensor, labels: torch.Tensor) -> Any:
        hidden = torch.tanh(self.second(torch.tanh(self.first(image))))
        logits = self.head(torch.tanh(self.point(hidden)).mean((2, 3)))
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def convolutions() -> nn.Module:
    torch.manual_seed(0)
    return Convolutions()


def texts(step: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(100 + step % 4)
    ids = torch.randint(1, 53, (6, 10), generator=generator)
    return {"input_ids": ids, "labels": ids[:, 0] % 3}


def sentences(step: int) -> dict[str, torch.Tensor]:
    ids = texts(step)["input_ids"]
    return {"input_ids": ids, "labels": ids}


def images(step: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(100 + step % 4)
    image = torch.randn(6, 3, 8, 8, generator=generator)
    return {"image": image, "labels": (image[:, 0].mean((1, 2)) > 0).long() + (image[:, 1].mean((1, 2)) > 0).long()}


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """A model, its data, and the modules that adapters are put on."""

    model: Callable[[], nn.Module]
    batch: Callable[[int], dict[str, torch.Tensor]]
    names: Sequence[str]


PLACES = {
    "bert": Place(model=bert, batch=texts, names=("query", "value", "intermediate.dense")),
    "gpt2": Place(model=gpt2, batch=sentences, names=("c_attn", "c_fc")),
    "bert-embedding": Place(model=bert, batch=texts, names=("word_embeddings", "query")),
    "conv": Place(model=convolutions, batch=images, names=("first", "second", "point")),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One kind somewhere; ``lr`` is what makes twenty steps go far."""

    kind: str
    place: str
    lr: float
    settings: Mapping[str, Any] = field(default_factory=dict)


CASES = {
    "lora-bert": Case(kind="lora", place="bert", lr=1e-2, settings={"r": 4, "alpha": 8.0}),
    "lora-gpt2": Case(kind="lora", place="gpt2", lr=1e-2, settings={"r": 4, "alpha": 8.0}),
    "lora-embedding": Case(kind="lora", place="bert-embedding", lr=1e-2, settings={"r": 4}),
    "lora-conv": Case(kind="lora", place="conv", lr=1e-2, settings={"r": 4}),
    "lora-gaussian": Case(kind="lora", place="bert", lr=1e-2, settings={"r": 4, "init": "gaussian"}),
    "rslora-bert": Case(kind="lora", place="bert", lr=1e-2, settings={"r": 6, "use_rslora": True}),
    "dora-bert": Case(kind="dora", place="bert", lr=1e-2, settings={"r": 4, "alpha": 8.0}),
    "dora-gpt2": Case(kind="dora", place="gpt2", lr=1e-2, settings={"r": 4, "alpha": 8.0}),
    "dora-embedding": Case(kind="dora", place="bert-embedding", lr=1e-2, settings={"r": 4}),
    "dora-conv": Case(kind="dora", place="conv", lr=1e-2, settings={"r": 4}),
    "loha-bert": Case(kind="loha", place="bert", lr=2e-2, settings={"r": 4, "alpha": 8.0}),
    "loha-conv": Case(kind="loha", place="conv", lr=2e-2, settings={"r": 4}),
    "lokr-bert": Case(kind="lokr", place="bert", lr=2e-2, settings={"r": 2, "alpha": 4.0}),
    "lokr-whole": Case(kind="lokr", place="bert", lr=2e-2, settings={"r": 8, "decompose_factor": 4}),
    "lokr-conv": Case(kind="lokr", place="conv", lr=2e-2, settings={"r": 1}),
    "ia3-bert": Case(kind="ia3", place="bert", lr=2e-2, settings={"feedforward_modules": ["intermediate.dense"]}),
    "ia3-gpt2": Case(kind="ia3", place="gpt2", lr=2e-2, settings={"feedforward_modules": ["c_fc"]}),
    "ia3-conv": Case(kind="ia3", place="conv", lr=2e-2, settings={"feedforward_modules": ["second"]}),
    "vera-bert": Case(kind="vera", place="bert", lr=2e-2, settings={"r": 16}),
    "vera-gpt2": Case(kind="vera", place="gpt2", lr=2e-2, settings={"r": 16}),
    "oft-bert": Case(kind="oft", place="bert", lr=1e-2, settings={"oft_block_size": 8}),
    "oft-shared": Case(kind="oft", place="bert", lr=1e-2, settings={"oft_block_size": 8, "block_share": True}),
    "oft-cayley": Case(
        kind="oft", place="bert", lr=1e-2, settings={"r": 4, "oft_block_size": 0, "use_cayley_neumann": False}
    ),
}

OFTEN = frozenset(
    {
        "lora-bert",
        "lora-gpt2",
        "rslora-bert",
        "dora-gpt2",
        "loha-conv",
        "lokr-bert",
        "ia3-bert",
        "vera-gpt2",
        "oft-bert",
    }
)
"""Those that every run of the tests has."""


def ground(name: str, module: Any, settings: Mapping[str, Any], generator: torch.Generator) -> Ground:
    weight = module.weight.detach()
    turned = type(module).__name__ == "Conv1D"
    logical = weight.T if turned else weight
    role = "embedding" if isinstance(module, nn.Embedding) else "conv" if weight.dim() > 2 else "linear"
    return Ground(
        module=name,
        shape=tuple(logical.shape),
        role=role,
        groups=getattr(module, "groups", 1),
        device=torch.device("cpu"),
        weight=lambda: logical,
        settings=settings,
        generator=generator,
    )


def begin(model: nn.Module, case: Case, seed: int = 1) -> tuple[Adapter, list[torch.Tensor]]:
    """An adapter as ``Kind.starting`` begins it, and what is to be trained."""
    kind = REGISTRY.kinds[case.kind]
    assert kind.starting is not None
    generator = torch.Generator().manual_seed(seed)
    settings = {name: setting.default for name, setting in kind.starting.settings.items()} | dict(case.settings)
    names = PLACES[case.place].names
    grounds = [
        ground(name, module, settings, generator)
        for name, module in model.named_modules()
        if name.endswith(tuple(names)) and hasattr(module, "weight")
    ]
    shared = kind.starting.shared(grounds)
    deltas: dict[Target, Delta] = {}
    leaves: list[torch.Tensor] = []
    for each in grounds:
        started = kind.starting.start(each)
        trained = {slot: tensor.requires_grad_() for slot, tensor in started.trained.items()}
        leaves += trained.values()
        slots = {**trained, **started.fixed, **shared}
        refs = {
            slot: TensorRef(key=f"{each.module}.{slot}", shape=tuple(t.shape), dtype="F32") for slot, t in slots.items()
        }
        group = Group(module=each.module, kind=kind.name, role=each.role, slots=refs, options=started.options)
        for touch in kind.touches(group):
            assert touch.parameter in ("weight", "bias")
        for parameter, delta in kind.build(group, slots).items():
            if hasattr(model.get_submodule(each.module), parameter):
                deltas[Target("", each.module, parameter)] = delta
    roles = {Target("", each.module, "weight").name: each.role for each in grounds}
    return Adapter(deltas=deltas, hints={"roles": roles}), leaves


def train(model: nn.Module, leaves: Sequence[torch.Tensor], case: Case) -> list[float]:
    optimiser = torch.optim.AdamW(leaves, lr=case.lr, weight_decay=0.01)
    losses = []
    for step in range(STEPS):
        loss = model(**PLACES[case.place].batch(step))["loss"]
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        losses.append(loss.item())
    return losses


def frozen(case: Case) -> nn.Module:
    return PLACES[case.place].model().eval().requires_grad_(False)


def theirs(model: nn.Module, folder: Path, *, trains: bool) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # fan_in_fan_out is set by layer type, and said
        return PeftModel.from_pretrained(model, str(folder), is_trainable=trains).eval()


def change(adapter: Adapter, model: nn.Module) -> dict[str, torch.Tensor]:
    """What each delta does to its parameter, float64."""
    found = {}
    for target, delta in adapter.deltas.items():
        weight = model.get_parameter(target.name).detach().double()
        if type(model.get_submodule(target.module)).__name__ == "Conv1D" and weight.dim() > 1:
            weight = weight.T
        found[target.name] = delta.delta(weight).detach()
    return found


def far(found: Mapping[str, torch.Tensor], model: nn.Module) -> float:
    """The largest change of a parameter beside the parameter."""
    return max(float(each.norm() / model.get_parameter(name).norm()) for name, each in found.items())


def written(adapter: Adapter, folder: Path) -> None:
    """Saved; what counts from its start becomes plain LoRA of twice the rank."""
    deltas = {
        target: LoRA(*delta.stacked(), delta.scale) if isinstance(delta, Departed) else delta
        for target, delta in adapter.deltas.items()
    }
    lorahub.save(replace(adapter, deltas=deltas), folder, format="peft")


def attached(model: nn.Module, adapter: Adapter, folder: Path, **options: Any) -> Any:
    """The adapter on the model, found there by the names that its file has."""
    return lorahub.attach(model, {"mine": replace(lorahub.load(folder), deltas=adapter.deltas)}, **options)


def alike(found: Mapping[str, torch.Tensor], wanted: Mapping[str, torch.Tensor]) -> None:
    """Changes are one another's but for what Adam makes of rounding errors."""
    assert found.keys() == wanted.keys()
    for name, each in wanted.items():
        error = float((found[name] - each).norm() / each.norm().clamp_min(1e-6))
        assert error < 2e-3, f"{name} differs by {error:.1e} of its change"


def learnt(losses: Sequence[float]) -> float:
    """How far the loss of a batch went, of the four that come again and again."""
    return max(abs(losses[later] - losses[later % 4]) / losses[later % 4] for later in range(4, STEPS))


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, id=name, marks=() if name in OFTEN else pytest.mark.slow)  # each of the kinds once
        for name, case in CASES.items()
    ],
)
def test_twenty_steps_give_the_losses_and_the_adapter_of_peft(case: Case, tmp_path: Path) -> None:
    model, batch = frozen(case), PLACES[case.place].batch(0)
    state = copy.deepcopy(model.state_dict())
    plain = model(**batch)["logits"]
    adapter, leaves = begin(model, case)
    assert far(change(adapter, model), model) < 1e-6, "what it starts with changes something"
    written(adapter, tmp_path / "start")

    peft = theirs(frozen(case), tmp_path / "start", trains=True)
    trained = [parameter for parameter in peft.parameters() if parameter.requires_grad]
    assert sum(each.numel() for each in trained) == sum(each.numel() for each in leaves)
    wanted = train(peft, trained, case)

    with attached(model, adapter, tmp_path / "start") as live:
        found = train(model, leaves, case)
        assert not any(live.coverage().values())
        with torch.no_grad():
            outputs = model(**batch)["logits"]

    assert found == pytest.approx(wanted, rel=1e-4)
    assert learnt(wanted) > 1e-2
    assert far(change(adapter, model), model) > 1e-2
    assert (outputs - plain).norm() > 1e-2 * plain.norm()
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())

    peft.save_pretrained(str(tmp_path / "theirs"))
    read = lorahub.load(tmp_path / "theirs")
    alike(
        change(adapter, model),
        change(replace(read, deltas={each: read.deltas[each] for each in adapter.deltas}), model),
    )

    written(adapter, tmp_path / "mine")
    again = theirs(frozen(case), tmp_path / "mine", trains=False)
    with torch.no_grad():
        torch.testing.assert_close(again(**batch)["logits"], outputs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("init", ["pissa", pytest.param("olora", marks=pytest.mark.slow)])
def test_a_start_in_the_weight_is_trained_as_peft_trains_it_and_the_base_stays(init: str, tmp_path: Path) -> None:
    """PEFT takes the part away from its base, which is not to happen here; signs of singular vectors are no matter."""
    case = Case(kind="lora", place="bert", lr=3e-3, settings={"r": 4, "alpha": 8.0, "init": init})
    model = frozen(case)
    state = copy.deepcopy(model.state_dict())
    adapter, leaves = begin(model, case)
    assert far(change(adapter, model), model) == 0
    written(adapter, tmp_path / "start")

    config = LoraConfig(r=4, lora_alpha=8, init_lora_weights=init, target_modules=list(PLACES["bert"].names))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it asks transformers for a name that is to go
        peft = get_peft_model(frozen(case), config).eval()
    wanted = train(peft, [parameter for parameter in peft.parameters() if parameter.requires_grad], case)
    with attached(model, adapter, tmp_path / "start"):
        found = train(model, leaves, case)
    assert found == pytest.approx(wanted, rel=1e-4)
    assert learnt(wanted) > 1e-2
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    merged = peft.merge_and_unload().state_dict()
    alike(
        change(adapter, model), {name: merged[name].double() - state[name].double() for name in change(adapter, model)}
    )

    written(adapter, tmp_path / "mine")
    again = theirs(frozen(case), tmp_path / "mine", trains=False)
    assert again.peft_config["default"].r == 8
    batch = PLACES[case.place].batch(0)
    with torch.no_grad():
        torch.testing.assert_close(
            again(**batch)["logits"], peft.base_model.model(**batch)["logits"], rtol=1e-4, atol=1e-4
        )


def test_without_the_adapter_the_losses_are_others(tmp_path: Path) -> None:
    """The comparison notices an adapter that is left out."""
    case = CASES["lora-bert"]
    model = frozen(case)
    adapter, leaves = begin(model, case)
    written(adapter, tmp_path)
    with attached(model, adapter, tmp_path):
        found = train(model, leaves, case)
    with torch.no_grad():
        plain = [model(**PLACES["bert"].batch(step))["loss"].item() for step in range(STEPS)]
    assert found[0] == pytest.approx(plain[0], rel=1e-5)
    assert found != pytest.approx(plain, rel=1e-2)


def test_beside_cores_gradients_of_loha_are_those_of_the_formula_which_pefts_are_not() -> None:
    """Why LoHa with ``use_effective_conv2d`` is not trained side by side: PEFT 0.21.2 derives two factors wrongly."""
    model, case = (
        frozen(CASES["loha-conv"]),
        Case(kind="loha", place="conv", lr=0, settings={"r": 2, "use_effective_conv2d": True}),
    )
    adapter, _ = begin(model, case)
    delta = adapter.deltas[Target("", "second", "weight")]
    generator = torch.Generator().manual_seed(5)
    slots = {name: torch.randn(value.shape, generator=generator) for name, value in delta.tensors().items()}
    leaves = {name: value.double().requires_grad_() for name, value in slots.items()}
    upstream = torch.randn(8, 8, 3, 3, generator=generator).double()
    names = ("t1", "w1_a", "w1_b", "t2", "w2_a", "w2_b")

    def gradients(change: torch.Tensor) -> dict[str, torch.Tensor]:
        return dict(
            zip(names, torch.autograd.grad((change * upstream).sum(), [leaves[each] for each in names]), strict=True)
        )

    t1, w1_a, w1_b, t2, w2_a, w2_b = (leaves[each] for each in names)
    formula = torch.einsum("ijkl,jr,ip->prkl", t1, w1_b, w1_a) * torch.einsum("ijkl,jr,ip->prkl", t2, w2_b, w2_a)
    wanted = gradients(formula * 4.0)
    mine = gradients(replace(delta, **leaves).delta(torch.zeros(8, 8, 3, 3, dtype=torch.float64)))
    peft = gradients(make_weight_cp(t1, w1_a, w1_b, t2, w2_a, w2_b, scale=torch.tensor(4.0)))
    for name in names:
        torch.testing.assert_close(mine[name], wanted[name])
    wrong = {name for name in names if not torch.allclose(peft[name], wanted[name])}
    assert wrong == {"w1_a", "w2_a"}
