"""The LoRA paper's own checkpoint for RoBERTa base on MNLI: converted to PEFT's layout, merged, and worked out again.

``LORAHUB_REAL_ADAPTERS`` names the folder that holds it (``microsoft__LoRA__roberta_base_mnli``, from
https://github.com/microsoft/LoRA/releases).  The file states no alpha: the published training script says 16.  The base
has RoBERTa's shapes and random weights, so what is checked is the arithmetic, element by element in float64.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from claims import Row, WrongClaim, demand, main
from transformers import RobertaConfig, RobertaForSequenceClassification

import lorahub

__all__ = ["rows"]

FOLDER, FILE = "microsoft__LoRA__roberta_base_mnli", "roberta_base_lora_mnli.bin"
RANK, ALPHA, SAMPLE = 8, 16, 32
EPSILON = 2.0**-24
"""Half a unit in the last place of a float32, relative: the one rounding of the result."""


def rows() -> list[Row]:
    """What was converted, and how far the merged weights are from the loop's.

    Raises:
        WrongClaim: an element is further from it than one rounding of the result and of its terms.
        KeyError: ``LORAHUB_REAL_ADAPTERS`` is not set.
    """
    source = Path(os.environ["LORAHUB_REAL_ADAPTERS"]) / FOLDER / FILE
    stored = torch.load(source, weights_only=True, map_location="cpu")
    factors = [name for name in stored if "lora_" in name]
    torch.manual_seed(0)
    model: Any = RobertaForSequenceClassification(
        RobertaConfig(vocab_size=50265, max_position_embeddings=514, type_vocab_size=1, num_labels=3)
    )
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with tempfile.TemporaryDirectory() as name:
        given = Path(name) / "given"
        given.mkdir()
        shutil.copy(source, given)
        (given / "adapter_config.json").write_text(json.dumps({"lora_alpha": ALPHA}))
        lorahub.convert(given, "peft", Path(name) / "peft")
        lorahub.merge(model, {"mnli": lorahub.load(Path(name) / "peft")})
    after = model.state_dict()
    demand("parameters changed", sum(not torch.equal(after[key], before[key]) for key in after), len(factors) // 2 + 4)
    worst, moved = 0.0, []
    for module in sorted({name.rpartition(".")[0] for name in factors}):
        down, up = (stored[f"{module}.lora_{side}"].double() for side in "AB")
        old, new = (state[f"{module}.weight"].double() for state in (before, after))
        worst = max(worst, _furthest(old, new, down, up))
        moved.append(float((new - old).norm() / old.norm()))
    for key in ("classifier.dense.weight", "classifier.out_proj.weight", "classifier.out_proj.bias"):
        demand(f"{key} is the checkpoint's", bool(torch.equal(after[key], stored[key])), True)
    trained = sum(stored[name].numel() for name in factors)
    return [
        Row("parameters in its factors", "12 x 2 x 2 x 768 x 8", "0.3M", f"{trained:,}"),
        Row("modules converted, with the head in full", "12 layers x 2", "", f"{len(factors) // 2} + 2, the same bits"),
        Row(
            "merged, against a loop in float64 over single elements",
            "w + 16 / 8 x sum of b a",
            "",
            f"at most {worst:.2f} of one rounding to float32; weights change by {min(moved):.0%} to {max(moved):.0%}",
        ),
    ]


def _furthest(old: torch.Tensor, new: torch.Tensor, down: torch.Tensor, up: torch.Tensor) -> float:
    """The largest distance of a sampled element from what a loop makes of it, in roundings of the result."""
    worst = 0.0
    for row in range(0, old.shape[0], SAMPLE):
        for column in range(0, old.shape[1], SAMPLE):
            value = float(old[row, column])
            for k in range(RANK):
                value += ALPHA / RANK * float(up[row, k]) * float(down[k, column])
            size = max(abs(value), abs(float(old[row, column])))
            worst = max(worst, abs(float(new[row, column]) - value) / (EPSILON * size))
    if worst > RANK + 2:  # a sum of RANK products in float32, and one rounding of the result
        raise WrongClaim(f"an element is {worst:.1f} roundings away")
    return worst


if __name__ == "__main__":
    sys.exit(main(__file__, rows))
