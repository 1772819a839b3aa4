"""One side of the composition benchmarks, in a process of its own: ``compose_sides.py SIDE REQUEST.json``.

What a side reads and makes stands in the request.  PEFT's clock starts when the model and all adapters are in memory
and stops before the result is saved; lorahub's takes in opening the files and writing and reading back the result.
"""

from __future__ import annotations

import json
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

__all__ = ["SIDES"]


def _peft(asked: dict[str, Any]) -> None:
    """``add_weighted_adapter`` on a model whose weights are never touched, and take no memory."""
    import torch
    from models import TINYLLAMA, layers_of, meta_llama, small
    from peft import PeftConfig, PeftModel, get_peft_model

    warnings.simplefilter("ignore")
    config = layers_of(small(TINYLLAMA) if asked["small"] else TINYLLAMA, asked["layers"])
    with torch.device("meta"):
        model = get_peft_model(meta_llama(config), PeftConfig.from_pretrained(asked["adapters"][0]), "unused")
    assert isinstance(model, PeftModel)
    model.to_empty(device="cpu")
    names = [f"x{number}" for number in range(len(asked["adapters"]))]
    for name, folder in zip(names, asked["adapters"], strict=True):
        model.load_adapter(folder, name)
    torch.manual_seed(0)
    with _work():
        model.add_weighted_adapter(names, [1.0] * len(names), "made", **asked["options"])
    if asked["out"]:
        model.save_pretrained(asked["out"], selected_adapters=["made"])


def _lorahub(asked: dict[str, Any]) -> None:
    import lorahub

    _ready()
    adapters = {f"x{number}": folder for number, folder in enumerate(asked["adapters"])}
    with _work():
        lorahub.compose(adapters, out=asked["out"], **asked["options"])


def _checkpoint(asked: dict[str, Any]) -> None:
    import lorahub

    _ready()
    with _work():
        lorahub.compose.checkpoint(asked["recipe"], asked["out"])


def _ground(asked: dict[str, Any]) -> None:
    """What a process holds that has everything imported and the adapters' headers read, and composes nothing."""
    from lorahub.composing.asked import requested
    from lorahub.composing.job import prepare_composition

    _ready()
    prepare_composition(requested({f"x{number}": folder for number, folder in enumerate(asked["adapters"])}))
    time.sleep(0.1)  # for the one who looks at the memory


def _elements_mergekit(asked: dict[str, Any]) -> None:
    """mergekit's own class on changes in memory, the base being zero; on all of PyTorch's threads."""
    import torch
    from mergekit.merge_methods import registry
    from mergekit.merge_methods.base import TensorGroup

    method, changes = registry.get(asked["method"]), _changes(asked)
    numbers = range(1, len(asked["adapters"]) + 1)
    each = {name: dict.fromkeys(numbers, value) for name, value in {"weight": 1.0, **asked["each"]}.items()}
    torch.manual_seed(0)
    with torch.inference_mode(), _work():
        for own in changes:
            group = TensorGroup.from_tensors([torch.zeros_like(own[0]), *own], base_index=0)
            method.merge_group(group, **each, **{"int8_mask": False, "lambda": 1.0, **asked["shared"]})


def _elements_lorahub(asked: dict[str, Any]) -> None:
    """The registered method on the same tensors, matrix by matrix on as many threads; factors of none of them."""
    from lorahub.composition.method import Terms
    from lorahub.engine.crew import crew_size, run_jobs
    from lorahub.plugins import load_registry

    _ready()
    method, changes = load_registry().method(asked["method"]).made(asked["options"]), _changes(asked)
    count = len(asked["adapters"])

    def job(own: list[Any]) -> Callable[[object], None]:
        terms = Terms(shape=own[0].shape, changes=tuple(own), weights=(1.0,) * count, seeds=tuple(range(count)))

        def run(_: object) -> None:
            method.combine(terms)

        return run

    with _work():
        run_jobs([job(own) for own in changes], crew_size(None))


def _changes(asked: dict[str, Any]) -> list[list[Any]]:
    """For every matrix the changes of all adapters, float32."""
    import lorahub

    loaded = [lorahub.load(folder).deltas for folder in asked["adapters"]]
    low = [[deltas[target].low_rank() for deltas in loaded] for target in loaded[0]]
    return [[each.up.float() @ each.down.float() * each.scale for each in own if each is not None] for own in low]


def _ready() -> None:
    """Everything that a first call would import or look up: it is left out of what ``_work`` says."""
    import lorahub
    from lorahub.plugins import load_registry

    import_module("torch")
    assert callable(lorahub.compose)  # names of lorahub load on first use
    load_registry()


@contextmanager
def _work() -> Iterator[None]:
    """Say how long the block took."""
    begun = time.perf_counter()
    yield
    print(f"\nwork_s={time.perf_counter() - begun:.6f}", flush=True)


SIDES: dict[str, Callable[[dict[str, Any]], None]] = {
    "peft": _peft,
    "lorahub": _lorahub,
    "checkpoint": _checkpoint,
    "ground": _ground,
    "elements-mergekit": _elements_mergekit,
    "elements-lorahub": _elements_lorahub,
}

if __name__ == "__main__":
    SIDES[sys.argv[1]](json.loads(Path(sys.argv[2]).read_text()))
