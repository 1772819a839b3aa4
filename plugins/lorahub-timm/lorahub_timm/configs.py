"""What timm writes down of a model: its architecture, its head, its arguments and where its weights come from.

The same from ``config.json`` of a folder and from a live model.  Text in, data out; imports neither torch nor timm.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

from lorahub.bases.index import BaseRef
from lorahub.deltas.kind import JSON
from lorahub_timm.families import OPAQUE, Family, family_of

__all__ = ["Described", "described", "live_config", "pretrained_ref"]

_OLD_FORM = frozenset({"first_conv", "input_size", "crop_pct", "interpolation", "classifier"})
"""Keys that the configuration of a pretrained model has; once they stood beside the architecture."""

_COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Described:
    """A configuration as far as it matters here.

    Attributes:
        architecture: timm's name of the model, without a tag.
        classifier: paths of the modules that give the classes; several where a model has several heads.
        family: how its projections are stored, or None where that is not declared.
    """

    architecture: str
    classifier: tuple[str, ...]
    family: Family | None


def described(config: Mapping[str, JSON]) -> Described | None:
    """What a configuration says, or None where timm did not write it."""
    architecture = config.get("architecture")
    pretrained = config.get("pretrained_cfg")
    if not isinstance(architecture, str) or "model_type" in config:  # transformers writes "architecture" as well
        return None
    if not isinstance(pretrained, dict):
        if len(_OLD_FORM & config.keys()) < 2:
            return None
        pretrained = dict(config)
    heads = pretrained.get("classifier")
    names = [heads] if isinstance(heads, str) else heads if isinstance(heads, list) else []
    arguments = config.get("model_args")
    opaque = isinstance(arguments, dict) and not OPAQUE.isdisjoint(arguments)
    return Described(
        architecture=architecture,
        classifier=tuple(name for name in names if isinstance(name, str)),
        family=None if opaque else family_of(architecture),
    )


def live_config(model: Any) -> dict[str, JSON]:
    """The configuration that a live model would be saved with, as far as JSON can say it."""
    pretrained = dict(getattr(model, "pretrained_cfg", None) or {})
    architecture = str(pretrained.pop("architecture", "") or "")
    arguments = dict(getattr(model, "_model_args", {}))
    family = family_of(architecture)
    home = type(model).__module__.rpartition(".")[2]
    if family is not None and home not in (*family.files, "_features"):
        arguments["block_fn"] = f"{type(model).__module__}.{type(model).__qualname__}"  # somebody's own class
    config: dict[str, Any] = {"architecture": architecture, "pretrained_cfg": pretrained}
    if (count := getattr(model, "num_classes", None)) is not None:
        config["num_classes"] = count
    if arguments:
        config["model_args"] = arguments
    return cast("dict[str, JSON]", json.loads(json.dumps(config, default=str)))


def pretrained_ref(config: Mapping[str, JSON]) -> BaseRef:
    """The repository whose weights a live model's configuration names; none of one that came from a folder."""
    pretrained = config.get("pretrained_cfg")
    if not isinstance(pretrained, dict) or pretrained.get("source") == "local-dir" or pretrained.get("file"):
        return BaseRef()
    named = pretrained.get("hf_hub_id")
    if not isinstance(named, str) or not named:
        return BaseRef()
    repo, _, revision = named.partition("@")
    if repo.endswith("/"):
        tag = pretrained.get("tag")
        repo += str(config.get("architecture")) + (f".{tag}" if tag else "")
    return BaseRef(repo=repo, commit=revision if _COMMIT.fullmatch(revision) else "")
