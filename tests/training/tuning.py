"""TRL's supervised fine-tuning of a trainee, in a process of its own; run by test_trainers.py."""

from __future__ import annotations

import json
import os
import sys
import warnings
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
warnings.simplefilter("ignore")  # what the imports say of other packages is not ours

import torch  # noqa: E402
from datasets import Dataset  # noqa: E402
from tokenizers import Tokenizer, models, pre_tokenizers  # noqa: E402
from training.llamas import Losses, llama  # noqa: E402
from transformers import BitsAndBytesConfig, LlamaForCausalLM, PreTrainedTokenizerFast  # noqa: E402
from trl import SFTConfig, SFTTrainer  # noqa: E402

import lorahub  # noqa: E402
from lorahub_transformers import RecordCallback, TraineeCallback  # noqa: E402

WORDS = ["<pad>", "<eos>", "<unk>", *(f"w{number}" for number in range(45))]


def tokenizer() -> Any:
    own = Tokenizer(models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="<unk>"))
    own.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=own, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")


def run(base: str, folder: Path, *, targets: str = "all-linear", seed: int = 0, resume: Path | None = None) -> Any:
    if base:
        four = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
        model = LlamaForCausalLM.from_pretrained(base, quantization_config=four)
    else:
        model = llama()
    trainee = lorahub.create(model, r=4, target_modules=targets, seed=seed)
    arguments = SFTConfig(
        output_dir=str(folder),
        max_steps=4,
        per_device_train_batch_size=4,
        save_steps=2,
        logging_steps=1,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        report_to=[],
        use_cpu=True,
        bf16=False,
        disable_tqdm=True,
        max_length=16,
    )
    text = " ".join(f"w{number * 3 % 45}" for number in range(8))
    losses = Losses()
    trainer = SFTTrainer(
        model,
        arguments,
        train_dataset=Dataset.from_dict({"text": [text] * 8}),
        processing_class=tokenizer(),
        callbacks=[TraineeCallback(trainee), losses, RecordCallback(trainee)],
    )
    trainer.train(resume_from_checkpoint=str(resume) if resume else None)
    return trainer, trainee, losses.found


def main(folder: Path, base: str) -> dict[str, Any]:
    trainer, trainee, losses = run(base, folder / "out")
    trainer.save_model(str(folder / "ink"))
    return {
        "losses": losses,
        "dtypes": sorted({str(own.dtype) for own in trainee.parameters()}),
        "files": sorted(each.name for each in (folder / "ink").iterdir()),
        "again": run(base, folder / "again", seed=5, resume=folder / "out" / "checkpoint-2")[2],
        "head": run(base, folder / "head", targets="lm_head")[2],
    }


if __name__ == "__main__":
    said, sys.stdout = sys.stdout, sys.stderr
    said.write(json.dumps(main(Path(sys.argv[1]), sys.argv[2])))
