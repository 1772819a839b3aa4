"""Model cards as the Hub reads them: the YAML at the top of README.md, and the tags it gives a repository."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any

import yaml  # type: ignore[import-untyped]

__all__ = ["base_models", "card", "card_data", "tags_of"]

_FRONT = re.compile(rb"\A\s*---[ \t]*\r?\n(.*?)^---[ \t]*\r?$", re.DOTALL | re.MULTILINE)


def card(text: str = "# A model\n", **data: Any) -> bytes:
    """A README: ``card(base_model="acme/base", license="mit")``."""
    return f"---\n{yaml.safe_dump(data, sort_keys=False)}---\n{text}".encode()


def card_data(readme: bytes) -> dict[str, Any]:
    """The mapping at the top of a README, or an empty one.

    Raises:
        ValueError: there is something at the top, and it is no mapping in YAML.
    """
    found = _FRONT.match(readme)
    if found is None:
        return {}
    try:
        data = yaml.safe_load(found[1])
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from None
    if data is not None and not isinstance(data, dict):
        raise ValueError("the metadata must be a mapping")
    return data or {}


def _several(value: Any) -> list[str]:
    return [] if value is None else [str(each) for each in value] if isinstance(value, list) else [str(value)]


def _relation(data: Mapping[str, Any], files: Collection[str]) -> str:
    """How a model stands to its base: as its card says, or as its files look."""
    return str(data.get("base_model_relation") or ("adapter" if "adapter_config.json" in files else "finetune"))


def base_models(data: Mapping[str, Any], files: Collection[str]) -> dict[str, Any] | None:
    """The ``baseModels`` of an info, or None without any."""
    names = _several(data.get("base_model"))
    return (
        {"relation": _relation(data, files), "models": [{"_id": name, "id": name} for name in names]} if names else None
    )


def tags_of(data: Mapping[str, Any], files: Collection[str]) -> list[str]:
    """What the Hub lets people filter by."""
    tags = [str(data[key]) for key in ("library_name", "pipeline_tag") if data.get(key)]
    tags += ["safetensors"] if any(path.endswith(".safetensors") for path in files) else []
    tags += _several(data.get("tags"))
    for name in _several(data.get("base_model")):
        tags += [f"base_model:{name}", f"base_model:{_relation(data, files)}:{name}"]
    tags += [f"dataset:{name}" for name in _several(data.get("datasets"))]
    tags += _several(data.get("language"))
    tags += [f"license:{name}" for name in _several(data.get("license"))]
    return list(dict.fromkeys([*tags, "region:us"]))
