"""How many parameters LoRA trains, and how large its files are: on models without weights, up to GPT-3.

The models are built on the meta device, where they take no memory, and ``lorahub.create`` puts LoRA on query and value
of every layer.  What it counts must be the formula's number exactly; beside it stands what arXiv 2106.09685 prints
(tables 2, 3, 4 and 15).  The paper's counts leave out the classification head, and so do these.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from claims import Row, demand, main
from transformers import (
    DebertaV2Config,
    DebertaV2Model,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedModel,
    RobertaConfig,
    RobertaModel,
)

import lorahub

__all__ = ["CASES", "Case", "rows"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One model of the paper: how it is built, what of it is adapted, and what the paper says of it."""

    name: str
    build: Callable[[], PreTrainedModel]
    targets: tuple[str, str]
    layers: int
    width: int
    rank: int
    paper: str


def _roberta(**size: Any) -> PreTrainedModel:
    return RobertaModel(RobertaConfig(vocab_size=50265, max_position_embeddings=514, type_vocab_size=1, **size))


def _deberta() -> PreTrainedModel:
    """deberta-v2-xxlarge."""
    positions: dict[str, Any] = {"relative_attention": True, "position_buckets": 256, "norm_rel_ebd": "layer_norm"}
    positions |= {"share_att_key": True, "pos_att_type": ["p2c", "c2p"], "position_biased_input": False}
    size: dict[str, Any] = {
        "hidden_size": 1536,
        "num_hidden_layers": 48,
        "num_attention_heads": 24,
        "intermediate_size": 6144,
    }
    return DebertaV2Model(
        DebertaV2Config(vocab_size=128100, type_vocab_size=0, conv_kernel_size=3, **positions, **size)
    )


def _gpt2(layers: int, width: int, heads: int, positions: int = 1024) -> PreTrainedModel:
    return GPT2LMHeadModel(GPT2Config(n_layer=layers, n_embd=width, n_head=heads, n_positions=positions))


_LARGE = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096}
_BERT, _DEBERTA, _GPT = ("query", "value"), ("query_proj", "value_proj"), ("q_proj", "v_proj")
_GPT3 = partial(_gpt2, 96, 12288, 96, 2048)

CASES = (
    Case(name="RoBERTa base", build=_roberta, targets=_BERT, layers=12, width=768, rank=8, paper="0.3M"),
    Case(
        name="RoBERTa large", build=partial(_roberta, **_LARGE), targets=_BERT, layers=24, width=1024, rank=8,
        paper="0.8M",
    ),
    Case(name="DeBERTa XXL", build=_deberta, targets=_DEBERTA, layers=48, width=1536, rank=16, paper="4.7M"),
    Case(
        name="GPT-2 medium", build=partial(_gpt2, 24, 1024, 16), targets=_GPT, layers=24, width=1024, rank=4,
        paper="0.35M",
    ),
    Case(
        name="GPT-2 large", build=partial(_gpt2, 36, 1280, 20), targets=_GPT, layers=36, width=1280, rank=4,
        paper="0.77M",
    ),
    Case(name="GPT-3", build=_GPT3, targets=_GPT, layers=96, width=12288, rank=1, paper="4.7M"),
    Case(name="GPT-3", build=_GPT3, targets=_GPT, layers=96, width=12288, rank=4, paper="18.8M"),
    Case(name="GPT-3", build=_GPT3, targets=_GPT, layers=96, width=12288, rank=8, paper="37.7M"),
)  # fmt: skip
"""The models of tables 2 to 4, with the ranks that give their figures."""

_HALF = 2
"""Bytes of a number in fp16."""


def rows() -> list[Row]:
    """A row for each model, and GPT-3's files.

    Raises:
        WrongClaim: what is trained is not what the formula says.
    """
    made, files = [], []
    for case in CASES:
        trained, base = counted(case)
        demand(f"{case.name}, r={case.rank}", trained, case.layers * 2 * 2 * case.width * case.rank)
        formula = f"{case.layers} layers x 2 projections x 2 factors x {case.width} x {case.rank}"
        claim = f"{case.name} ({base / 1e6:,.0f}M), r={case.rank}: parameters trained"
        made.append(Row(claim, formula, case.paper, f"{trained:,}"))
        if case.name == "GPT-3" and case.rank == 4:
            files = _files(base, trained)
    return [*made, *files]


def counted(case: Case) -> tuple[int, int]:
    """Parameters trained, and parameters of the base."""
    with torch.device("meta"):
        model = case.build()
    with lorahub.create(model, "lora", r=case.rank, target_modules=case.targets) as trainee:
        found = trainee.trainable_parameters()
    return found.trained, found.total - found.trained


def _files(base: int, trained: int) -> list[Row]:
    """GPT-3's checkpoint and what is kept of it for each task at r=4, in fp16."""
    whole, adapter = base * _HALF, trained * _HALF
    return [
        Row("GPT-3: a full checkpoint, fp16", f"{base:,} x 2 bytes", "350 GB", f"{whole / 1e9:,.0f} GB"),
        Row(
            "GPT-3: an adapter's checkpoint, r=4, fp16",
            f"{trained:,} x 2 bytes",
            "35 MB",
            f"{adapter / 1e6:.1f} MB ({adapter / 2**20:.0f} MiB)",
        ),
        Row("GPT-3: the one over the other", "", "about 10,000", f"{whole / adapter:,.0f}"),
    ]


if __name__ == "__main__":
    sys.exit(main(__file__, rows))
