"""LoRA on the attention of a diffusion model: noise is added to latents, and the model learns to tell it apart."""

import torch
from tiny import scratch, unet

import lorahub

model = unet()
trainee = lorahub.create(model, "lora", r=4, target_modules="attention")
print(trainee.trainable_parameters())

optimizer = torch.optim.AdamW(trainee.parameters(), lr=2e-2)
generator = torch.Generator().manual_seed(0)
latents, text = (torch.randn(shape, generator=generator) for shape in ((4, 4, 8, 8), (4, 6, 32)))
noise = torch.randn(latents.shape, generator=generator)
noisy = 0.6 * latents + 0.8 * noise
for step in range(16):
    loss = torch.nn.functional.mse_loss(model.train()(noisy, 500, encoder_hidden_states=text).sample, noise)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    if step % 5 == 0:
        print(f"step {step:2}: loss {loss:.3f}")

with scratch() as folder:  # in the layout of pipe.load_lora_weights
    saved = trainee.save(folder / "ink", format="diffusers", component="unet")
    print("saved:", ", ".join(sorted(path.name for path in saved.iterdir())))
