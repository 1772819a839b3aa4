"""A small Llama under the trainer of transformers, in one process or in several that shard it."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from training import forks
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

import lorahub
from lorahub_transformers import RecordCallback, TraineeCallback

VOCABULARY, STEPS = 48, 4
IDS = torch.randint(0, VOCABULARY, (4, 8), generator=torch.Generator().manual_seed(0))


def llama(width: int = 32) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=width,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            initializer_range=0.2,
            bos_token_id=None,
            eos_token_id=1,
            pad_token_id=0,
        )
        return LlamaForCausalLM(config)


class Losses(TrainerCallback):
    def __init__(self) -> None:
        self.found: list[float] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        if "loss" in logs:
            self.found.append(logs["loss"])


def run(
    model: Any,
    folder: Path,
    kind: str = "lora",
    *,
    seed: int = 0,
    resume: Path | None = None,
    shards: bool = False,
    **arguments: Any,
) -> tuple[Any, Any, list[float]]:
    """Train in four steps over one batch, with a checkpoint in the middle: the trainer, the trainee, the losses."""
    trainee = lorahub.create(model, kind, target_modules="all-linear", seed=seed)
    settings = TrainingArguments(
        output_dir=str(folder),
        max_steps=STEPS,
        save_steps=STEPS // 2,
        logging_steps=1,
        learning_rate=1e-2,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        **{"per_device_train_batch_size": len(IDS), **arguments},
    )
    if shards:  # the arguments have found the processes by now
        forks.shards_here()
    losses = Losses()
    data = [{"input_ids": row, "labels": row} for row in IDS]
    callbacks = [TraineeCallback(trainee), losses, RecordCallback(trainee)]
    trainer = Trainer(model, settings, train_dataset=data, callbacks=callbacks)
    trainer.train(resume_from_checkpoint=str(resume) if resume else None)
    return trainer, trainee, losses.found


def sharded(folder: Path, rank: int) -> dict[str, Any]:
    """A training under FSDP2 as the trainer sets it up, and its second half once more from the checkpoint."""
    config = {
        "fsdp_version": 2,
        "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"],
        "state_dict_type": "FULL_STATE_DICT",
        "cpu_ram_efficient_loading": False,
    }
    more: dict[str, Any] = {
        "shards": True,
        "fsdp": True,
        "fsdp_config": config,
        "per_device_train_batch_size": len(IDS) // forks.RANKS,
    }
    model = llama()
    trainer, trainee, losses = run(model, folder / "out", **more)
    trainer.save_model(str(folder / "ink"))
    split = trainer.accelerator.is_fsdp2 and all(hasattr(own, "device_mesh") for own in trainee.parameters())
    _, _, again = run(llama(), folder / "again", seed=7, resume=folder / "out" / "checkpoint-2", **more)
    return {"losses": losses, "again": again, "sharded": split, "rank": rank}


if __name__ == "__main__":
    sys.stdout.write(json.dumps(forks.together(Path(sys.argv[1]), sharded)))
