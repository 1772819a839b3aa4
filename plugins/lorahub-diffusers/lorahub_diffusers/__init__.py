"""lorahub for diffusers.  Importing it imports neither torch nor diffusers."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from lorahub.bases.framework import Framework
from lorahub.hookspecs import hookimpl
from lorahub_diffusers.framework import Diffusers
from lorahub_diffusers.pipelines import Pipelines
from lorahub_diffusers.single_file import SingleFile

if TYPE_CHECKING:
    from lorahub_diffusers.inversion import Words, load_textual_inversion
    from lorahub_diffusers.loading import Loras, load_lora_weights, loras

__all__ = [
    "LORAHUB_HOOKS",
    "Diffusers",
    "Loras",
    "Pipelines",
    "SingleFile",
    "Words",
    "load_lora_weights",
    "load_textual_inversion",
    "lorahub_frameworks",
    "loras",
]

LORAHUB_HOOKS = (1, 0)

_LATER = {
    "Loras": "loading",
    "Words": "inversion",
    "load_lora_weights": "loading",
    "load_textual_inversion": "inversion",
    "loras": "loading",
}
"""What needs torch -> the module that has it."""


def __getattr__(name: str) -> Any:
    """What needs torch, when it is asked for."""
    if name in _LATER:
        return getattr(import_module(f"lorahub_diffusers.{_LATER[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


@hookimpl
def lorahub_frameworks() -> list[Framework]:
    """The frameworks "diffusers", "diffusers-pipeline" and "diffusers-single-file"."""
    return [Diffusers(), Pipelines(), SingleFile()]
