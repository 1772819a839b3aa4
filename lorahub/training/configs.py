"""PEFT's configs as arguments of ``create``: an object, its dictionary, or ``adapter_config.json``.

A field that would change what is trained and has no counterpart is refused by name, never ignored.  Knows names of
fields; imports no PEFT.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from lorahub import strict_json
from lorahub.deltas.kind import Kind
from lorahub.errors import UnsupportedKind, UsageError
from lorahub.files.raw import open_regular

__all__ = ["arguments"]

_KINDS: Mapping[str, str] = MappingProxyType(
    {"LORA": "lora", "LOHA": "loha", "LOKR": "lokr", "IA3": "ia3", "VERA": "vera", "OFT": "oft"}
)

_SAME = frozenset({"r", "rank_pattern", "alpha_pattern", "modules_to_save", "bias", "task_type", "target_parameters"})
"""Fields that ``create`` calls the same."""

_RENAMED: Mapping[str, str] = MappingProxyType(
    {
        "lora_alpha": "alpha",
        "lora_dropout": "dropout",
        "vera_dropout": "dropout",
        "layers_to_transform": "layers",
    }
)

_INERT = frozenset(
    {
        *("auto_mapping", "base_model_name_or_path", "revision", "inference_mode", "peft_type", "peft_version"),
        *("runtime_config", "fan_in_fan_out", "megatron_core", "qalora_group_size", "save_projection", "use_dora"),
    }
)
"""Fields that change nothing here: the framework says how weights lie, and what concerns loading is decided then."""

_INITS = frozenset({"init_lora_weights", "init_weights", "init_ia3_weights"})
"""Fields that say how factors begin: true for the default, or a word."""

_LIMIT = 4 << 20


def arguments(config: object, kinds: Mapping[str, Kind]) -> dict[str, Any]:
    """The arguments of ``create`` that a config of PEFT stands for.

    Args:
        config: a ``peft.PeftConfig``, its dictionary, or the path of an ``adapter_config.json`` or its folder.
        kinds: by name, for the settings that a kind has.

    Raises:
        UsageError: it is no config, or has a field that has no counterpart here.
        UnsupportedKind: it is of a kind that cannot be trained here.
        NotFound, IntegrityError: the file is not there, or no JSON.
    """
    fields = _fields(config)
    tag = str(getattr(fields.get("peft_type"), "value", fields.get("peft_type")) or "LORA")
    name = _KINDS.get(tag)
    if name is None:
        raise UnsupportedKind(
            f"a config of {tag} is for what cannot be trained here", f"configs that can: {', '.join(_KINDS)}"
        )
    if fields.get("use_dora"):
        name = "dora"
    kind = kinds[name]
    assert kind.starting is not None
    settings = kind.starting.settings
    found: dict[str, Any] = {"kind": name}
    refused: list[str] = []
    for field, value in fields.items():
        plain = getattr(value, "value", value)
        if field in _RENAMED and (_RENAMED[field] in settings or _RENAMED[field] == "layers"):
            found[_RENAMED[field]] = plain
        elif field in ("target_modules", "exclude_modules"):
            found[field] = _patterns(plain)
        elif field in _INITS:
            known = settings["init"].choices if "init" in settings else ()
            if plain not in (True, None, *known):
                raise UsageError(
                    f"the config begins with {field}={plain!r}, which is not done here",
                    f"choose one of: {', '.join(['true', *map(str, known)])}",
                )
            if isinstance(plain, str):
                found["init"] = plain
        elif field in _SAME or field in settings:
            found[field] = sorted(plain) if isinstance(plain, set | frozenset) else plain
        elif field not in _INERT and not _says_nothing(plain):
            refused.append(field)
    if refused:
        raise UsageError(
            f"the config sets {', '.join(sorted(refused))}, which has no counterpart for {kind.title} here",
            f"leave it out; settings of {kind.title}: {', '.join(settings)}",
        )
    kept = {*settings, "target_modules"}  # of which none is something else than nothing said
    return {name: value for name, value in found.items() if name in kept or not _says_nothing(value)}


def _says_nothing(value: object) -> bool:
    return value is None or value is False or value in ({}, [], (), "", 0) or value == set()


def _patterns(value: Any) -> Any:
    """A word is a preset or a regular expression for PEFT; sets come in any order."""
    if isinstance(value, str):
        return value if value == "all-linear" else re.compile(value)
    return sorted(value) if isinstance(value, set | frozenset) else value


def _fields(config: object) -> dict[str, Any]:
    if isinstance(config, Mapping):
        return dict(config)
    if isinstance(config, str | os.PathLike):
        path = Path(config)
        path = path / "adapter_config.json" if path.is_dir() else path
        with open_regular(path) as file:
            text = file.read(_LIMIT) or b""
        try:
            read = strict_json.read(text, limit=_LIMIT)
        except (strict_json.NotStrict, ValueError) as error:
            raise UsageError(f"{path}: {error}") from None
        if not isinstance(read, dict):
            raise UsageError(f"{path} holds no object")
        return dict(read)
    to_dict = getattr(config, "to_dict", None)
    if not callable(to_dict):
        raise UsageError(
            f"a {type(config).__name__} is no config of PEFT", "give a LoraConfig, its dictionary, or a path"
        )
    found = to_dict()
    assert isinstance(found, dict)
    return found
