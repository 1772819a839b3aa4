"""What training holds beside the weights: gradients and Adam's state, of full fine-tuning and of LoRA.

Each side is a process of its own that takes three steps on one model.  Gradients and optimizer state are counted to the
byte; the peak is the highest resident memory of the process, above what it held when the model was built.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from claims import Row, demand, main
from transformers import GPT2Config, GPT2LMHeadModel

import lorahub

__all__ = ["SMALL", "measured", "rows"]

SMALL: Mapping[str, Any] = {"n_layer": 12, "n_embd": 768, "n_head": 12, "vocab_size": 50257}
"""GPT-2 small: 124 million parameters."""

RANK, STEPS, TOKENS = 8, 3, 64
_FLOAT, _STATES = 4, 2
"""Bytes of a float32, and how many numbers Adam keeps for each parameter."""


def rows(size: Mapping[str, Any] = SMALL) -> list[Row]:
    """Bytes of both sides beside each other.

    Raises:
        WrongClaim: gradients or states are more or fewer bytes than the parameters that are trained ask for.
    """
    full, lora = (measured(side, size) for side in ("full", "lora"))
    for side in (full, lora):
        demand("bytes of gradients", side["gradients"], _FLOAT * side["trained"])
        demand("bytes of Adam's states", side["states"], _FLOAT * _STATES * side["trained"])
    claim = f"GPT-2 with {full['trained'] / 1e6:.0f}M parameters, fp32, Adam, LoRA r={RANK} on query and value"
    kept = [each["weights"] + each["gradients"] + each["states"] for each in (full, lora)]
    return [
        Row(
            f"{claim}: gradients",
            "4 bytes x trained",
            "",
            f"{_mb(full['gradients'])} full, {_mb(lora['gradients'])} LoRA",
        ),
        Row(
            "the same: Adam's states",
            "8 bytes x trained",
            "",
            f"{_mb(full['states'])} full, {_mb(lora['states'])} LoRA",
        ),
        Row(
            "the same: weights, gradients and states",
            "full / LoRA: at most 16 / 4 = 4",
            "up to 3 times less (GPT-3: 1.2 TB, 350 GB)",
            f"{_mb(kept[0])} full, {_mb(kept[1])} LoRA: {kept[0] / kept[1]:.2f} times less",
        ),
        Row(
            "the same: peak resident memory above the built model, measured",
            "",
            "",
            f"{_mb(full['peak'])} full, {_mb(lora['peak'])} LoRA: {full['peak'] / max(1, lora['peak']):.1f} times less",
        ),
    ]


def _mb(count: int) -> str:
    return f"{count / 1e6:,.1f} MB" if count < 1e8 else f"{count / 1e6:,.0f} MB"


def measured(side: str, size: Mapping[str, Any]) -> dict[str, int]:
    """One side in a process of its own: bytes, and how many parameters are trained."""
    command = [sys.executable, __file__, "--side", side, json.dumps(dict(size))]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found: dict[str, int] = json.loads(done.stdout.splitlines()[-1])
    return found


def _train(side: str, size: Mapping[str, Any]) -> dict[str, int]:
    model: Any = GPT2LMHeadModel(GPT2Config(**dict(size)))
    if side == "lora":
        lorahub.create(model, r=RANK, target_modules=["q_proj", "v_proj"])
    trained = [own for own in model.parameters() if own.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=1e-5)
    ids = torch.randint(size["vocab_size"], (1, TOKENS), generator=torch.Generator().manual_seed(0))
    built = _resident("VmRSS")
    for _ in range(STEPS):
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    states = [value for state in optimizer.state.values() for value in state.values() if value.dim()]
    return {
        "trained": sum(own.numel() for own in trained),
        "weights": sum(own.nbytes for own in model.parameters()),
        "gradients": sum(own.grad.nbytes for own in model.parameters() if own.grad is not None),
        "states": sum(value.nbytes for value in states),
        "peak": max(0, _resident("VmHWM") - built),
    }


def _resident(what: str) -> int:
    """Bytes, as Linux counts them for this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(what))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--side"]:
        print(json.dumps(_train(sys.argv[2], json.loads(sys.argv[3]))))
    else:
        sys.exit(main(__file__, rows))
