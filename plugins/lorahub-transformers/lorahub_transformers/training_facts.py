"""What a run of Transformers' ``Trainer``, or of one that is built on it, was: the facts that a record keeps.

Never a path: of data, only what is a repository on the Hub.
"""

from __future__ import annotations

import hashlib
import re
import sys
from collections.abc import Iterable, Iterator
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from lorahub.errors import InvalidRef
from lorahub.names import Ref
from lorahub.record_fields import Dataset, Trainer, Training

__all__ = ["datasets_in", "training_of"]

_VERSIONS = ("torch", "transformers", "accelerate", "peft", "trl", "bitsandbytes", "torchao", "datasets")
"""Libraries whose version may matter to whoever wants to train the same again."""

_ON_HUB = re.compile(r"hf://datasets/(?P<repo>[^/@]+/[^/@]+)@(?P<commit>[0-9a-f]{40})/")
"""How ``datasets`` names a file that it fetched."""

_MOST_FILES = 10_000


def training_of(args: Any, state: Any, datasets: Iterable[Dataset] = ()) -> Training:
    """What is known of a run by now.

    Args:
        args: its ``TrainingArguments``.
        state: its ``TrainerState``.
        datasets: what it was trained on.
    """
    maker = type(args).__module__.partition(".")[0]
    losses = [entry["loss"] for entry in state.log_history if isinstance(entry.get("loss"), int | float)]
    said: dict[str, Any] = {
        "datasets": tuple(datasets),
        "steps": state.global_step,
        "epochs": state.epoch,
        "lr": args.learning_rate,
        "optimizer": getattr(args.optim, "value", args.optim),
        "seed": args.seed,
        "loss": losses[-1] if losses else None,
        "config_digest": f"sha256:{hashlib.sha256(args.to_json_string().encode()).hexdigest()}",
        "trainer": Trainer.checked(name=maker, version=_version(maker)),
        "versions": {name: str(sys.modules[name].__version__) for name in _VERSIONS if name in sys.modules},
    }
    finite = {key: value for key, value in said.items() if not isinstance(value, float) or value - value == 0}
    return Training.checked(**{key: value for key, value in finite.items() if value is not None})


def datasets_in(named: Iterable[str], loader: Any) -> tuple[Dataset, ...]:
    """The datasets that were named (``ns/name[@COMMIT]``); where none was, those that the training data came from.

    Args:
        named: as people write them.
        loader: the data loader of a training, or None.

    Raises:
        RecordError: a name is no repository, or what follows it no commit.
    """
    given = []
    for each in named:
        repo, _, commit = each.partition("@")
        given.append(Dataset.checked(id=repo, **({"revision": commit} if commit else {})))
    return tuple(given) or tuple(dict.fromkeys(_fetched(loader)))


def _fetched(loader: Any) -> Iterator[Dataset]:
    info = getattr(getattr(loader, "dataset", None), "info", None)
    for number, url in enumerate(getattr(info, "download_checksums", None) or ()):
        if number == _MOST_FILES:
            return
        if isinstance(url, str) and (found := _ON_HUB.match(url)) and _is_repo(found["repo"]):
            yield Dataset.checked(id=found["repo"], revision=found["commit"])


def _is_repo(text: str) -> bool:
    try:
        return Ref.parse(text, bare=True).repo == text
    except InvalidRef:
        return False


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""
