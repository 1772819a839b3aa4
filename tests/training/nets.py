"""A small model with a layer of every sort, data for it, and a loop."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

VOCABULARY, WIDTH, CLASSES = 20, 16, 5


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj = nn.Linear(WIDTH, WIDTH)
        self.up_proj = nn.Linear(WIDTH, 33)
        self.down_proj = nn.Linear(33, WIDTH, bias=False)
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + torch.tanh(self.q_proj(self.norm(x)))
        hidden: torch.Tensor = x + self.down_proj(torch.relu(self.up_proj(x)))
        return hidden


class Net(nn.Module):
    """Two numbered layers between an embedding and a head."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.embed = nn.Embedding(VOCABULARY, WIDTH)
            self.layers = nn.ModuleList([Block(), Block()])
            self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        logits: torch.Tensor = self.head(x.mean(1))
        return logits


def batch(rows: int = 16) -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.randint(0, VOCABULARY, (rows, 6), generator=torch.Generator().manual_seed(1))
    return ids, ids.sum(1) % CLASSES


def train(
    model: nn.Module,
    parameters: Iterable[nn.Parameter],
    steps: int = 6,
    *,
    optimizer: torch.optim.Optimizer | None = None,
    data: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> list[float]:
    """The loss of each step of AdamW over one batch."""
    ids, labels = batch() if data is None else data
    optimizer = optimizer or torch.optim.AdamW(parameters, lr=1e-2)
    losses = []
    for _ in range(steps):
        loss = nn.functional.cross_entropy(model(ids), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def numbers(model: nn.Module) -> dict[str, torch.Tensor]:
    """A copy of the base's own tensors."""
    return {name: value.clone() for name, value in model.state_dict().items() if not name.startswith("_lorahub.")}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    """Whether all tensors are equal, bit for bit."""
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
