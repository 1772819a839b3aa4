"""LoRA on a language model, in a plain loop, saved in PEFT's layout."""

import torch
from tiny import language_model, scratch, sentences

import lorahub

model = language_model()
trainee = lorahub.create(model, "lora", r=4, target_modules="attention", dropout=0.05, base="acme/tiny-llama")
print(trainee.trainable_parameters())

optimizer = torch.optim.AdamW(trainee.parameters(), lr=1e-2)
ids = sentences()
for step in range(30):
    loss = model.train()(input_ids=ids, labels=ids).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    if step % 10 == 0:
        print(f"step {step:2}: loss {loss:.2f}")

with scratch() as folder:
    saved = trainee.save(folder / "counting")
    print("saved:", ", ".join(sorted(path.name for path in saved.iterdir())))
    trainee.detach()
    print("the model is what it was, and the adapter is one:", lorahub.check(saved, model).verdict)
