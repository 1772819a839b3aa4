"""One training step with an adapter on the model: lorahub beside PEFT, kind by kind.

Both sides have one model's weights between them, are made from one and the same config of PEFT's, and take turns in one
process: forward, backward, AdamW.  Memory is what PyTorch's own allocator held at most during a step, above what it
held before that step; it is counted in a step of its own, since counting costs time.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from measure import Sample, fold, ratios
from models import TARGETS, meta_llama
from peft import IA3Config, LoHaConfig, LoKrConfig, LoraConfig, OFTConfig, PeftConfig, VeraConfig, get_peft_model
from torch import nn
from torch.profiler import ProfilerActivity, profile
from transformers import LlamaConfig

import lorahub

__all__ = ["KINDS", "steps"]

PEFT, OURS = "PEFT", "lorahub"

SIX = LlamaConfig(
    vocab_size=1000,
    hidden_size=512,
    intermediate_size=1536,
    num_hidden_layers=6,
    num_attention_heads=8,
    num_key_value_heads=8,
    tie_word_embeddings=False,
)
"""18 million parameters, nearly all of them in 42 linear layers."""

KINDS: Mapping[str, Callable[[], PeftConfig]] = {
    "lora": lambda: LoraConfig(r=16, lora_alpha=16, target_modules=TARGETS),
    "lora, dropout": lambda: LoraConfig(r=16, lora_alpha=16, target_modules=TARGETS, lora_dropout=0.1),
    "dora": lambda: LoraConfig(r=16, lora_alpha=16, target_modules=TARGETS, use_dora=True),
    "ia3": lambda: IA3Config(target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "oft": lambda: OFTConfig(oft_block_size=32, target_modules=TARGETS),
    "loha": lambda: LoHaConfig(r=8, alpha=8, target_modules=TARGETS),
    "lokr": lambda: LoKrConfig(r=8, alpha=8, target_modules=TARGETS),
    "vera": lambda: VeraConfig(r=256, target_modules=TARGETS),
}
"""Kind -> PEFT's config for it, which ``lorahub.create`` takes too."""


def steps(quick: bool) -> dict[str, Any]:
    """A step of every kind by both libraries; ratios above 1 are in lorahub's favour."""
    config = LlamaConfig(**(SIX.to_dict() | {"num_hidden_layers": 1})) if quick else SIX
    rows, tokens, repeats = (2, 16, 2) if quick else (2, 64, 7)
    ids = torch.randint(config.vocab_size, (rows, tokens), generator=torch.Generator().manual_seed(0))
    samples: dict[str, list[Sample]] = {}
    pairs: list[tuple[str, str]] = []
    for kind in KINDS:
        for side, each in _turns(config, kind, ids, repeats).items():
            samples[f"{kind}: {side}"] = each
        pairs.append((f"{kind}: {PEFT}", f"{kind}: {OURS}"))
    size = sum(value.numel() for value in meta_llama(config).parameters()) / 1e6
    return {
        "title": f"A training step, {rows} rows of {tokens} tokens: a Llama of {size:.0f} million parameters, fp32",
        "repeats": repeats,
        "sides": {name: fold(each) for name, each in samples.items()},
        "ratios": ratios(samples, pairs, "wall_s"),
        "memory_ratios": ratios(samples, pairs, "peak_bytes"),
    }


def _turns(config: LlamaConfig, kind: str, ids: torch.Tensor, repeats: int) -> dict[str, list[Sample]]:
    state = {
        name: torch.randn(value.shape, generator=torch.Generator().manual_seed(at)) * 0.02
        if value.dim() > 1
        else torch.ones(value.shape)
        for at, (name, value) in enumerate(meta_llama(config).state_dict().items())
    }
    acts, peaks = {}, {}
    for side in (PEFT, OURS):
        model = _model(config, state)
        if side == PEFT:
            trained: nn.Module = get_peft_model(model, KINDS[kind]())
        else:
            lorahub.create(model, config=KINDS[kind]())
            trained = model
        acts[side] = _step(trained.train(), ids)
        acts[side]()  # the first makes the optimizer's state
        peaks[side] = _peak(acts[side])
    samples: dict[str, list[Sample]] = {side: [] for side in acts}
    for _ in range(repeats):
        for side, act in acts.items():
            cpu, wall = time.process_time(), time.perf_counter()
            act()
            wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
            samples[side].append({"wall_s": wall, "cpu_s": cpu, "peak_bytes": float(peaks[side])})
    return samples


def _model(config: LlamaConfig, state: Mapping[str, torch.Tensor]) -> nn.Module:
    model = meta_llama(config).float()
    model.load_state_dict(state, assign=True)
    model.model.rotary_emb = type(model.model.rotary_emb)(config)  # its numbers are in no checkpoint
    return model


def _step(model: nn.Module, ids: torch.Tensor) -> Callable[[], None]:
    optimizer = torch.optim.AdamW([own for own in model.parameters() if own.requires_grad], lr=1e-4)

    def act() -> None:
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return act


def _peak(act: Callable[[], None]) -> int:
    """Bytes that PyTorch's allocator held at most while ``act`` ran, above what it held when it began."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        act()
    held = peak = 0
    for event in seen.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak
