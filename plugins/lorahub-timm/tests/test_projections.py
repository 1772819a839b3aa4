"""LoRA on queries and values alone: placed inside the fused parameter, trained there, written and read back.

References are float64 loops over the rows that the model's own attention uses.
"""

from __future__ import annotations

from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
import torch
from tiny_timm import TINY, build, images

import lorahub
from lorahub.adapter import Adapter
from lorahub.bases.index import BaseRef
from lorahub.bases.layout import Target
from lorahub.deltas.lora import LoRA
from lorahub.errors import BaseMismatch
from lorahub_timm import Timm
from lorahub_timm.configs import described
from lorahub_timm.fused import parts_of

RANK = 3
FUSED = ("vit", "vit with an attention pool", "deit", "swin", "swin v2", "beit", "eva", "pvt v2", "maxvit", "levit")


def targets_of(model: torch.nn.Module, parts: str) -> dict[Target, str]:
    """Projections of those names -> the fused module that each is in."""
    index = Timm().index_model(model, BaseRef())
    about = described(index.config)
    assert about is not None
    assert about.family is not None
    return {
        Target("", path, "weight"): module
        for module, path in parts_of(about.family, index)
        if {one for one, other in zip(path.split("."), module.split("."), strict=True) if one != other} <= set(parts)
    }


def drawn(model: torch.nn.Module, targets: Any, *, zero: bool = False) -> dict[Target, LoRA]:
    index = Timm().index_model(model, BaseRef())
    layouts = Timm().layouts(index, list(targets))
    generator = torch.Generator().manual_seed(1)
    found = {}
    for target in targets:
        (piece,) = layouts[target].pieces
        out, width, *kernel = piece.of_parameter.shape(index.parameters[piece.parameter].shape)
        up = torch.randn(out, RANK, *kernel, generator=generator) * (0 if zero else 0.4)
        down = torch.randn(RANK, width, *kernel, generator=generator) * 0.4
        found[target] = LoRA(up, down, 0.5)
    return found


def written(deltas: Any, folder: Path) -> Path:
    lorahub.save(Adapter(deltas=MappingProxyType(deltas)), folder)
    return folder


def rows_of(model: Any, what: str, module: str, part: str) -> list[int]:
    """The rows of a projection as the model's own code reshapes them: heads first, or projections first."""
    above = model.get_submodule(module.removesuffix(".linear").rpartition(".")[0])
    total = model.get_parameter(f"{module}.weight").shape[0]
    names = "kv" if module.removesuffix(".linear").endswith("kv") and "qkv" not in module else "qkv"
    at = names.index(part)
    if what == "levit":
        sizes = [above.key_dim] * (len(names) - 1) + [above.val_dim]
        return [
            head * sum(sizes) + sum(sizes[:at]) + row for head in range(above.num_heads) for row in range(sizes[at])
        ]
    if what in ("maxvit", "coatnet"):
        assert above.head_first
        each = above.dim_head
        return [head * 3 * each + at * each + row for head in range(above.num_heads) for row in range(each)]
    each = total // len(names)
    return list(range(at * each, (at + 1) * each))


@pytest.mark.parametrize("what", FUSED)
def test_a_change_of_a_projection_lands_in_its_rows_and_nowhere_else(what: str, tmp_path: Path) -> None:
    model = build(TINY[what])
    targets = targets_of(model, "v" if what in ("pvt v2", "vit with an attention pool") else "qv")
    deltas = drawn(model, targets)
    before = {name: each.clone().double() for name, each in model.state_dict().items()}
    merged = lorahub.merge(model, {"one": written(deltas, tmp_path / "adapter")})

    expected = {name: each.clone() for name, each in before.items()}
    for target, delta in deltas.items():
        module = targets[target]
        part = next(one for one, other in zip(target.module.split("."), module.split("."), strict=True) if one != other)
        weight = expected[f"{module}.weight"].flatten(1)
        up, down = delta.up.double().flatten(1), delta.down.double().flatten(1)
        for number, row in enumerate(rows_of(model, what, module, part)):
            for rank in range(RANK):
                weight[row] += 0.5 * up[number, rank] * down[rank]
    for name, each in model.state_dict().items():
        bound = 2e-7 * max(1.0, float(expected[name].abs().max())) if each.is_floating_point() else 0
        assert float((each.double() - expected[name]).abs().max() if each.numel() else 0) <= bound, name
    changed = {name for name in before if not torch.equal(before[name], model.state_dict()[name].double())}
    assert changed == {f"{module}.weight" for module in targets.values()}
    largest = max(float((expected[name] - before[name]).norm() / before[name].norm()) for name in changed)
    assert largest > 1e-2
    merged.undo()
    assert all(torch.equal(before[name], each.double()) for name, each in model.state_dict().items())


@pytest.mark.parametrize("what", FUSED)
def test_attached_it_gives_what_merged_gives(what: str, tmp_path: Path) -> None:
    model = build(TINY[what])
    adapter = written(drawn(model, targets_of(model, "qkv")), tmp_path / "adapter")
    x = images(TINY[what])

    def output() -> torch.Tensor:
        with torch.no_grad():
            found = model(x)
        return found if isinstance(found, torch.Tensor) else found[0]

    plain = output()
    with lorahub.attach(model, {"one": adapter}):
        attached = output()
    assert torch.equal(output(), plain)
    with lorahub.merge(model, {"one": adapter}):
        merged = output()
    assert float((attached - merged).abs().max() / merged.abs().max()) < 1e-4
    assert float((plain - merged).abs().max() / merged.abs().max()) > 1e-3


@pytest.mark.parametrize("what", ["vit", "beit", "swin v2", "maxvit", "levit"])
def test_queries_and_values_train_through_the_fused_parameter(what: str, tmp_path: Path) -> None:
    model = build(TINY[what])
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    start = drawn(model, targets_of(model, "qv"), zero=True)
    adapter = lorahub.load(written(start, tmp_path / "start"))
    trained: list[torch.Tensor] = []
    for delta in adapter.deltas.values():
        trained += [each.requires_grad_(True) for each in delta.tensors().values()]
    x, goal = images(TINY[what]), torch.tensor([1, 3])
    optimiser = torch.optim.AdamW(trained, lr=0.02)
    losses = []
    with lorahub.attach(model, {"one": adapter}) as live:
        for _ in range(8):
            found = model(x)
            loss = torch.nn.functional.cross_entropy(found if isinstance(found, torch.Tensor) else found[0], goal)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            losses.append(float(loss.detach()))
        assert not any(live.coverage().values())
    assert losses[-1] < losses[0] - 1e-3
    assert all(parameter.grad is None for parameter in model.parameters())
    lorahub.save(adapter, tmp_path / "trained")
    again = lorahub.load(tmp_path / "trained")
    with lorahub.merge(model, {"one": again}), torch.no_grad():
        found = model(x)
        loss = torch.nn.functional.cross_entropy(found if isinstance(found, torch.Tensor) else found[0], goal)
    assert float(loss) < losses[0]


def test_a_change_of_the_whole_lands_across_projections_that_are_apart(tmp_path: Path) -> None:
    model = build(TINY["eva apart"])
    generator = torch.Generator().manual_seed(2)
    up, down = torch.randn(72, RANK, generator=generator), torch.randn(RANK, 24, generator=generator)
    folder = written({Target("", "blocks.0.attn.qkv", "weight"): LoRA(up, down, 0.5)}, tmp_path / "adapter")
    before = {name: each.clone() for name, each in model.state_dict().items()}
    lorahub.merge(model, {"one": folder})
    change = torch.cat(
        [
            model.get_parameter(name).detach() - before[name]
            for name in (f"blocks.0.attn.{part}_proj.weight" for part in "qkv")
        ]
    )
    torch.testing.assert_close(change, 0.5 * up @ down, atol=1e-5, rtol=1e-5)


def test_an_architecture_without_a_declared_layout_refuses_projections(tmp_path: Path) -> None:
    from tiny_timm import timm

    model = timm.create_model("xcit_nano_12_p8_224", num_classes=5)
    up, down = torch.randn(128, RANK), torch.randn(RANK, 128)
    folder = written({Target("", "blocks.0.attn.q", "weight"): LoRA(up, down, 0.5)}, tmp_path / "adapter")
    with pytest.raises(BaseMismatch, match=r"blocks\.0\.attn\.q"):
        lorahub.merge(model, {"one": folder})
