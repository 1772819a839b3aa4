"""DoRA on a vision transformer, with a head that is trained in full and travels with the adapter."""

import torch
from tiny import scratch, vision_model

import lorahub

model = vision_model()
trainee = lorahub.create(model, "dora", r=4, target_modules=["q_proj", "v_proj"], modules_to_save=["classifier"])
print(trainee.trainable_parameters())

images = torch.randn(64, 3, 16, 16, generator=torch.Generator().manual_seed(0))
labels = (images[:, 0, :8].mean((1, 2)) > images[:, 0, 8:].mean((1, 2))).long()  # is the upper half brighter?
optimizer = torch.optim.AdamW(trainee.parameters(), lr=1e-2)
for step in range(40):
    answer = model.train()(pixel_values=images, labels=labels)
    answer.loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    if step % 13 == 0:
        print(f"step {step:2}: loss {answer.loss:.2f}, {(answer.logits.argmax(-1) == labels).float().mean():.0%} right")

with scratch() as folder:
    for row in lorahub.inspect(trainee.save(folder / "brightness")).rows:
        print(f"{row.kind} on {row.modules} modules called {row.targets}")
