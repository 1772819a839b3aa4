"""A LoRA adapter for a text classification task, trained with PEFT in a plain torch loop.

First a linear head alone on the untouched base, which is what the adapter has to beat; then LoRA on the query and
value projections, starting from that head. Nothing here is lorahub: what comes out is a PEFT model, saved by PEFT,
as anybody's trainer would leave it.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from docstrings import Task
from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from torch.nn.functional import cross_entropy
from transformers import AutoModel, AutoModelForSequenceClassification

__all__ = ["accuracy", "classifier", "features", "head_alone", "logits", "train", "with_lora"]

TOKENS = 32
BATCH = 16


def classifier(base: Path, task: Task) -> Any:
    """The base with an untrained classification head of the task's size."""
    return AutoModelForSequenceClassification.from_pretrained(base, num_labels=len(task.labels)).eval()


@torch.inference_mode()
def logits(model: Any, tokenizer: Any, texts: list[str]) -> torch.Tensor:
    """One row of class scores a text, [texts, classes] in float32; the batches are the same for every model."""
    model.eval()
    return torch.cat([model(**batch).logits for batch in _encoded(tokenizer, texts)])


def accuracy(scores: torch.Tensor, task: Task) -> float:
    """The share of the test set whose highest score is the right class."""
    truth = torch.tensor([label for _, label in task.test])
    return float((scores.argmax(-1) == truth).float().mean())


@torch.inference_mode()
def features(base: Path, tokenizer: Any, texts: list[str]) -> torch.Tensor:
    """What the untouched base makes of each text, [texts, hidden]: its pooled output, which a head classifies."""
    encoder = AutoModel.from_pretrained(base).eval()
    return torch.cat([encoder(**batch).pooler_output for batch in _encoded(tokenizer, texts)])


def head_alone(task: Task, of_train: torch.Tensor, of_test: torch.Tensor) -> tuple[torch.nn.Linear, float]:
    """A linear head on those features, trained until it no longer improves, and its accuracy on the test set."""
    truth = torch.tensor([label for _, label in task.train])
    head = torch.nn.Linear(of_train.shape[1], len(task.labels))
    torch.nn.init.zeros_(head.weight)
    optimizer = torch.optim.LBFGS(head.parameters(), max_iter=200, line_search_fn="strong_wolfe")

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        value = cross_entropy(head(of_train.clone()), truth) + 1e-3 * head.weight.square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    return head, accuracy(head(of_test.clone()), task)


def with_lora(base: Path, task: Task, head: torch.nn.Linear, *, seed: int, **options: Any) -> PeftModel:
    """The base with a fresh LoRA on query and value and a trainable copy of ``head``; options go to ``LoraConfig``."""
    torch.manual_seed(seed)
    model = classifier(base, task)
    model.classifier.load_state_dict(head.state_dict())
    config = LoraConfig(
        task_type=TaskType.SEQ_CLS, target_modules=["query", "value"], modules_to_save=["classifier"], **options
    )
    return get_peft_model(model, config)


def train(model: PeftModel, tokenizer: Any, task: Task, *, epochs: int, rate: float = 4e-3) -> Iterator[int]:
    """Train what is trainable in place, with AdamW and a linearly falling rate; yields after each epoch, from 1 on."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate)
    steps = epochs * -(-len(task.train) // BATCH)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    for epoch in range(1, epochs + 1):
        model.train()
        for rows in _batches(task):
            texts, labels = zip(*(task.train[row] for row in rows), strict=True)
            cross_entropy(model(**_encode(tokenizer, texts)).logits, torch.tensor(labels)).backward()
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        model.eval()
        yield epoch


def _batches(task: Task) -> list[list[int]]:
    """Row numbers of one epoch in random order; a batch holds texts of like length, so that little of it is padding."""
    rows: list[int] = torch.randperm(len(task.train)).tolist()
    batches: list[list[int]] = []
    for start in range(0, len(rows), 8 * BATCH):
        pool = sorted(rows[start : start + 8 * BATCH], key=lambda row: len(task.train[row][0]))
        batches += [pool[i : i + BATCH] for i in range(0, len(pool), BATCH)]
    return [batches[i] for i in torch.randperm(len(batches)).tolist()]


def _encoded(tokenizer: Any, texts: list[str]) -> Iterator[Any]:
    return (_encode(tokenizer, texts[start : start + 64]) for start in range(0, len(texts), 64))


def _encode(tokenizer: Any, texts: Any) -> Any:
    return tokenizer(list(texts), truncation=True, max_length=TOKENS, padding=True, return_tensors="pt")
