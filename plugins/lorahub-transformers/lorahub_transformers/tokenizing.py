"""The tokenizer that belongs to a model with adapters: an adapter's own where it brings one, else the base's."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorahub.errors import NotFound, UsageError
from lorahub.files.digest import file_digest
from lorahub_transformers.made import made_of

if TYPE_CHECKING:
    from torch import nn

__all__ = ["tokenizer_of"]

_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")


def tokenizer_of(model: nn.Module, *, adapter: str | None = None, **kwargs: Any) -> Any:
    """The tokenizer for a model from ``from_pretrained``.

    Args:
        model: the model.
        adapter: whose, where several adapters bring different ones; "" for the base's.
        kwargs: of ``AutoTokenizer.from_pretrained``.

    Raises:
        UsageError: the model is not from there, or the adapters disagree and none was named.
        NotFound: neither adapter nor base has one.
    """
    made = made_of(model)
    folders = {name: folder for name, folder in made.folders.items() if _has_one(folder)}
    if adapter is not None:
        folders = {name: folder for name, folder in folders.items() if name == adapter}
        if adapter and not folders:
            raise UsageError(f"the adapter '{adapter}' brings no tokenizer", "adapter='' gives the base's")
    elif len({_content(folder) for folder in folders.values()}) > 1:
        raise UsageError(
            f"{', '.join(folders)} bring tokenizers that differ", "name the one that is meant: adapter=..."
        )
    base = made.origin.files.folder if made.origin.files is not None else None
    folder = next(iter(folders.values()), base)
    if folder is None or not _has_one(folder):
        raise NotFound("neither the adapters nor the base have a tokenizer", "give the one that was trained with")
    auto: Any = import_module("transformers").AutoTokenizer
    return auto.from_pretrained(folder, **{"local_files_only": True, "trust_remote_code": False, **kwargs})


def _has_one(folder: Path) -> bool:
    return any((folder / name).is_file() for name in _FILES)


def _content(folder: Path) -> tuple[object, ...]:
    return tuple((name, file_digest(folder / name)[0]) for name in _FILES if (folder / name).is_file())
