"""One of the processes that share a model by Transformers' tensor parallelism; run by test_tensor_parallel.py.

Usage: tensor_parallel_ranks.py FOLDER GIVEN, with RANK and WORLD_SIZE set; what it found lies in FOLDER.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch.distributed import barrier, init_process_group
from transformers import LlamaForCausalLM

import lorahub
from lorahub.errors import LorahubError

WORDS = torch.arange(12).reshape(3, 4)


def load(base: str, **options: Any) -> LlamaForCausalLM:
    return LlamaForCausalLM.from_pretrained(base, dtype=torch.float32, **options)


@torch.no_grad()
def compare(given: Mapping[str, str]) -> dict[str, Any]:
    base, one, two, dora = (given[name] for name in ("base", "one", "two", "dora"))
    whole, parts = load(base), load(base, tp_plan="auto")
    untouched = whole(WORDS).logits
    live, here = lorahub.attach(whole, {"a": one}), lorahub.attach(parts, {"a": one})
    wanted, found = whole(WORDS).logits, parts(WORDS).logits
    live.add("b", two)
    here.add("b", two)
    both = [
        each.set_adapters(["a", "b"], weights=[0.5, -1.0]) or model(WORDS).logits
        for each, model in ((live, whole), (here, parts))
    ]
    live.detach()
    here.detach()
    with lorahub.merge(parts, {"a": one}):
        merged = parts(WORDS).logits
    back = parts(WORDS).logits
    try:
        lorahub.attach(parts, {"a": dora})
        parts(WORDS)
        said = "nothing"
    except LorahubError as error:
        said = f"{type(error).__name__}: {error}"
    return {
        "placements": str(parts.model.layers[0].mlp.down_proj.weight.placements),
        "change": float((wanted - untouched).abs().max()),
        "live": float((found - wanted).abs().max()),
        "several": float((both[0] - both[1]).abs().max()),
        "merged": float((merged - wanted).abs().max()),
        "back": float((back - untouched).abs().max()),
        "dora": said,
    }


if __name__ == "__main__":
    folder, given = Path(sys.argv[1]), json.loads(sys.argv[2])
    rank, world = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE"))
    torch.set_num_threads(1)
    init_process_group("gloo", init_method=f"file://{folder / 'meeting'}", rank=rank, world_size=world)
    (folder / f"found-{rank}.json").write_text(json.dumps(compare(given)))
    barrier()
    os._exit(0)  # threads of gloo's may still hold tensors, which the interpreter's end does not wait for
