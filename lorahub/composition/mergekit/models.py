"""mergekit's names for models, ``path@revision+lora@revision``, as references.  Looks only whether a path is there."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorahub.errors import InvalidRef, RecipeError
from lorahub.names import Ref, printable

__all__ = ["Model", "Place", "model_of"]


@dataclass(frozen=True, slots=True)
class Place:
    """A repository or folder, and its revision."""

    path: str
    revision: str | None = None

    def __str__(self) -> str:
        return self.path + (f"@{self.revision}" if self.revision else "")

    def ref(self, folder: Path | None) -> str:
        """The reference; a folder that is there becomes a path relative to ``folder``.

        Raises:
            RecipeError: it is no reference.
        """
        try:
            local = Path(self.path).expanduser()
            if local.exists() or self.path.startswith(("/", ".", "~")):
                if self.revision:
                    raise RecipeError(f"{self}: a folder has no revision", "remove what follows the '@'")
                if folder is None or local.is_absolute():
                    return str(Ref(path=self.path if local.is_absolute() else f"./{self.path.removeprefix('./')}"))
                return str(Ref(path=f"./{Path(os.path.relpath(local, folder)).as_posix()}"))
            return str(Ref(repo=self.path, selector=self.revision))
        except InvalidRef as error:
            raise RecipeError(f"{printable(str(self))}: {error.message.splitlines()[0]}", error.hint) from None


@dataclass(frozen=True, slots=True)
class Model:
    """A model, and the adapter on it, if any."""

    model: Place
    lora: Place | None = None

    def __str__(self) -> str:
        return str(self.model) + (f"+{self.lora}" if self.lora else "")

    def ref(self, folder: Path | None) -> str:
        """The adapter's reference: what follows the '+', or the model, where it is itself an adapter."""
        return (self.lora or self.model).ref(folder)

    def base_ref(self, folder: Path | None) -> str:
        """The base's reference."""
        return self.model.ref(folder)

    def is_full_model(self) -> bool:
        """Whether it is a folder here with a whole model in it."""
        folder = Path((self.lora or self.model).path).expanduser()
        return (folder / "config.json").is_file() and not (folder / "adapter_config.json").exists()


def model_of(value: Any, refuse: Callable[..., RecipeError]) -> Model:
    """The model that a configuration names, as text or as a mapping.

    Args:
        value: as the file has it.
        refuse: makes the error.

    Raises:
        RecipeError: it names none.
    """
    if isinstance(value, str):
        base, *loras = value.split("+")
        if len(loras) > 1:
            raise refuse(f"{printable(value)}: more than one '+'", "one adapter stands on one base")
        return Model(_place(base, refuse), _place(loras[0], refuse) if loras else None)
    if isinstance(value, dict) and "model" in value:
        if value.get("override_architecture") is not None:
            raise refuse("override_architecture cannot be carried over", "remove it: adapters name modules themselves")
        lora = value.get("lora")
        return Model(_place(value["model"], refuse), _place(lora, refuse) if lora is not None else None)
    raise refuse(f"{printable(repr(value)[:80])} names no model", "write model: base+adapter")


def _place(value: Any, refuse: Callable[..., RecipeError]) -> Place:
    path: Any = None
    revision: Any = None
    if isinstance(value, dict):
        path, revision = value.get("path"), value.get("revision")
    elif isinstance(value, str):
        path, at, after = value.partition("@")
        revision = after if at else None
    if not isinstance(path, str) or not path or not (revision is None or (isinstance(revision, str) and revision)):
        raise refuse(f"{printable(repr(value)[:80])} names no repository and no folder")
    if "@" in (revision or ""):
        raise refuse(f"{printable(str(value))}: more than one '@'")
    return Place(path, revision)
