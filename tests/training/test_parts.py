"""Parts of fused projections train beside the weight, as whole ones do: it is not made anew, and so not rounded."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import lorahub
from lorahub.live import desk, effective

pytestmark = pytest.mark.plugin("timm")

IMAGES = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
CLASSES = torch.tensor([0, 1, 2, 1])
KINDS: dict[str, dict[str, Any]] = {
    "dora": {"r": 2},
    "loha": {"r": 2},
    "lokr": {"r": 2},
    "ia3": {},
    "vera": {"r": 8},
    "oft": {"oft_block_size": 4},
}


def vit() -> Any:
    import timm

    torch.manual_seed(0)
    small = {"img_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 2, "num_classes": 3}
    model = timm.create_model("vit_tiny_patch16_224", **small).double().eval()
    with torch.no_grad():
        for own in model.parameters():  # timm begins with weights that change next to nothing
            own.mul_(3)
    return model


def loss(model: Any) -> torch.Tensor:
    return torch.nn.functional.cross_entropy(model(IMAGES), CLASSES)


def moved(trainee: Any, seed: int = 1) -> None:
    """Everything that is trained, away from where it began."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for own in trainee.parameters():
            own.add_(torch.randn(own.shape, generator=generator, dtype=own.dtype), alpha=0.3)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_a_part_is_trained_beside_the_fused_weight(kind, dropout, monkeypatch):
    if dropout and kind not in ("dora", "vera"):
        return  # these have none
    model = vit()
    more = {"dropout": dropout} if dropout else {}
    trainee = lorahub.create(model, kind, target_modules=["q", "v"], dtype=torch.float64, **KINDS[kind], **more)
    moved(trainee)

    def of_biases_only(raw: torch.Tensor, *arguments: Any, **more: Any) -> torch.Tensor:
        assert raw.dim() == 1, "the changed weight was made"
        return effective.changed(raw, *arguments, **more)

    monkeypatch.setattr(desk, "changed", of_biases_only)
    model.train()
    loss(model).backward()
    assert all(own.grad is not None and own.grad.norm() > 0 for own in trainee.parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_outputs_and_gradients_are_those_of_the_changed_weight(kind):
    """Without gradients the changed weight is made, so differences of its losses are another way to the same."""
    model = vit()
    with torch.no_grad():
        plain = model(IMAGES)
    trainee = lorahub.create(model, kind, target_modules=["q", "v"], dtype=torch.float64, **KINDS[kind])
    moved(trainee)
    found = model(IMAGES)
    with torch.no_grad():
        assert (found - plain).norm() > 1e-2 * plain.norm()
        assert (found - model(IMAGES)).abs().max() <= 1e-12 * found.abs().max()
    loss(model).backward()
    own = list(trainee.parameters())
    assert all(each.grad is not None and each.grad.norm() > 0 for each in own)
    if kind == "dora":
        return  # its lengths are constants to autograd, and no difference of losses knows that
    generator = torch.Generator().manual_seed(5)
    along = [torch.randn(each.shape, generator=generator, dtype=each.dtype) for each in own]
    slope = sum(float((each.grad * way).sum()) for each, way in zip(own, along, strict=True))
    step, ends = 1e-6, []
    for sign in (1, -2):
        with torch.no_grad():
            for each, way in zip(own, along, strict=True):
                each.add_(way, alpha=sign * step)
            ends.append(float(loss(model)))
    assert slope == pytest.approx((ends[0] - ends[1]) / (2 * step), rel=1e-5)
