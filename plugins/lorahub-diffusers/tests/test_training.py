"""Training a denoiser: as a model by itself, with files that pipelines load."""

from __future__ import annotations

from typing import Any

import torch
from tiny_diffusers import diffusers, sd, sd3

import lorahub
from lorahub.findings import Verdict

BOUND = 64 * torch.finfo(torch.float32).eps
NOISE, PROMPT, WANTED = (
    torch.randn(size, generator=torch.Generator().manual_seed(seed))
    for seed, size in enumerate([(2, 4, 8, 8), (2, 3, 16), (2, 4, 8, 8)])
)


def unet() -> Any:
    torch.manual_seed(0)
    return diffusers.UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        layers_per_block=1,
        block_out_channels=(16, 32),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=16,
        attention_head_dim=8,
        norm_num_groups=8,
    )


def denoised(model: Any) -> torch.Tensor:
    result: torch.Tensor = model(NOISE, torch.tensor([3, 3]), PROMPT).sample
    return result


def train(model: Any, trainee: Any, steps: int = 5) -> list[float]:
    optimizer = torch.optim.AdamW(trainee.parameters(), lr=2e-2)
    losses = []
    for _ in range(steps):
        loss = (denoised(model) - WANTED).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_a_denoiser_is_trained_and_diffusers_loads_what_is_saved(tmp_path):
    model, base = unet(), unet()
    plain = denoised(model).detach()
    trainee = lorahub.create(model, r=4, target_modules=["to_q", "to_k", "to_v", "to_out.0"])
    losses = train(model, trainee)
    assert losses[-1] < losses[0]
    outputs = denoised(model).detach()
    assert (outputs - plain).norm() > 1e-2 * plain.norm()
    trainee.save(tmp_path / "out", format="diffusers", component="unet")
    model.save_pretrained(tmp_path / "base")
    trainee.detach()
    assert all(torch.equal(own, base.state_dict()[name]) for name, own in model.state_dict().items())
    again = diffusers.UNet2DConditionModel.from_pretrained(tmp_path / "base")
    assert torch.equal(denoised(again), plain)
    again.load_lora_adapter(str(tmp_path / "out"), prefix="unet", use_safetensors=True)
    assert (denoised(again) - outputs).abs().max() <= BOUND * outputs.abs().max()


def test_checkpointing_and_an_output_that_is_trained_in_full(tmp_path):
    model = unet()
    trainee = lorahub.create(model, r=2, target_modules="to_v", modules_to_save="conv_out")
    plain = train(model, trainee, 3)
    again = unet().train()
    again.enable_gradient_checkpointing()
    trainee = lorahub.create(again, r=2, target_modules="to_v", modules_to_save="conv_out")
    assert all(abs(one - other) <= 1e-5 for one, other in zip(train(again, trainee, 3), plain, strict=True))
    outputs = denoised(again).detach()
    trainee.save(tmp_path / "out")
    trainee.detach()
    with lorahub.attach(again, [tmp_path / "out"]):
        assert (denoised(again) - outputs).abs().max() <= BOUND * outputs.abs().max()


def test_what_was_trained_on_one_component_is_known_again_in_the_pipeline(tmp_path):
    pipe = sd()
    trainee = lorahub.create(pipe.unet, r=2, target_modules="attention")
    with torch.no_grad():
        for own in trainee.parameters():
            own.normal_(generator=torch.Generator().manual_seed(1))
    trainee.save(tmp_path / "out", format="diffusers", component="unet")
    trainee.detach()
    report = lorahub.check(tmp_path / "out", pipe)
    assert {finding.code for finding in report.findings} == {"base-unrecorded", "components"}
    assert "lands on 32 targets in unet" in str([finding.message for finding in report.findings])
    assert lorahub.check(tmp_path / "out", sd3()).verdict == Verdict.INCOMPATIBLE
