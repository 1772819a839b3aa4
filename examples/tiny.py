"""What the examples share: models as small as they get, made from configurations, and a hub in a temporary folder.

Nothing is downloaded.  With a real model, ``from_pretrained`` takes the place of these functions, and the rest stays.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
import transformers

import lorahub

transformers.utils.logging.disable_progress_bar()

__all__ = ["language_model", "published", "scratch", "sentences", "unet", "vision_model"]

WORDS = 64


def language_model() -> Any:
    """A Llama of two layers."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=WORDS,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
        initializer_range=0.1,
    )
    return transformers.LlamaForCausalLM(config).eval()


def sentences(step: int = 1) -> torch.Tensor:
    """Word numbers [8, 12]: each row counts on in steps, which is what there is to learn."""
    return (torch.arange(8).unsqueeze(1) + step * torch.arange(12)) % WORDS


def vision_model() -> Any:
    """A ViT of two layers for images of 16 x 16 points, with a head for two classes."""
    torch.manual_seed(0)
    config = transformers.ViTConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=16,
        patch_size=4,
        num_labels=2,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    return transformers.ViTForImageClassification(config).eval()


def unet() -> Any:
    """A UNet that is told by text what to draw."""
    import diffusers

    torch.manual_seed(0)
    return diffusers.UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(32, 64),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=32,
        attention_head_dim=8,
        norm_num_groups=8,
    )


@contextmanager
def scratch() -> Iterator[Path]:
    """A temporary folder with a hub in ``hub``, and a cache of its own, as long as the block lasts."""
    old = os.environ.get("LORAHUB_CACHE")
    with tempfile.TemporaryDirectory(prefix="lorahub-example-") as name:
        os.environ["LORAHUB_CACHE"] = str(Path(name) / "cache")
        (Path(name) / "hub").mkdir()
        try:
            yield Path(name)
        finally:
            if old is None:
                del os.environ["LORAHUB_CACHE"]
            else:
                os.environ["LORAHUB_CACHE"] = old


def published(folder: Path, *names: str) -> str:
    """Adapters of the language model, one for each name on a hub as version 1.0.0; the path of that hub."""
    model = language_model()
    model.save_pretrained(folder / "base")
    for seed, name in enumerate(names):
        with lorahub.create(model, r=4, target_modules="attention") as trainee:
            generator = torch.Generator().manual_seed(seed)
            for own in trainee.parameters():  # as if it had been trained
                own.data.normal_(0, 0.2, generator=generator)
            saved = trainee.save(folder / name.replace("/", "-"))
        lorahub.record(saved, folder / "base", base_repo="acme/tiny-llama", base_revision="1" * 40)
        lorahub.push(saved, name, version="1.0.0", license="apache-2.0", hub=str(folder / "hub"))
    return str(folder / "hub")
