"""PEFT trains with Transformers' Trainer, and every checkpoint says which base and run it came from."""

import transformers
from peft import LoraConfig, get_peft_model
from tiny import language_model, scratch, sentences

import lorahub
from lorahub_transformers import RecordCallback

with scratch() as folder:
    language_model().save_pretrained(folder / "base")
    model = transformers.LlamaForCausalLM.from_pretrained(folder / "base")
    wrapped = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "v_proj"]))
    rows = [{"input_ids": row, "labels": row} for row in sentences()]
    recorder = RecordCallback(license="apache-2.0")
    asked = {"max_steps": 2, "save_steps": 1, "report_to": [], "disable_tqdm": True, "use_cpu": True}
    arguments = transformers.TrainingArguments(str(folder / "run"), **asked)
    trainer = transformers.Trainer(wrapped, arguments, train_dataset=rows, callbacks=[recorder])
    trainer.train()
    for checkpoint in sorted((folder / "run").glob("checkpoint-*")):
        print(f"{checkpoint.name}:", lorahub.check(checkpoint, folder / "base").verdict)
