"""Which modules the fields of a PEFT config cover, by PEFT's rules for names.

Knows no files and no bases.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping

from lorahub.deltas.kind import JSON
from lorahub.deltas.patterns import full_match
from lorahub.errors import UnsupportedKind
from lorahub.formats.peft.config import names

__all__ = ["covers", "left_out", "of_layers", "untargeted"]


def covers(module: str, field: str, config: Mapping[str, JSON]) -> bool:
    """Whether a list of names or a pattern in the config covers ``module``."""
    given = config.get(field)
    if isinstance(given, str) and given:
        return full_match(given, module, field=field)
    return any(f".{module}".endswith(f".{name}") for name in names(config, field))


def of_layers(module: str, config: Mapping[str, JSON]) -> bool:
    """Whether ``layers_to_transform`` and ``layers_pattern`` let in a module that is targeted by its name's end."""
    layers = config.get("layers_to_transform")
    if layers is None or layers == []:
        return True
    wanted = layers if isinstance(layers, list) else [layers]
    parts, patterns = module.split("."), names(config, "layers_pattern")
    numbered = (at for at in range(1, len(parts) - 1) if re.fullmatch(r"\d+", parts[at], re.ASCII))
    # without a pattern PEFT 0.21.2 wants two names before the number
    at = next((at for at in numbered if (parts[at - 1] in patterns if patterns else at > 1)), None)
    return at is not None and int(parts[at]) in wanted


def untargeted(modules: Collection[str], config: Mapping[str, JSON]) -> list[str]:
    """The modules that ``target_modules`` does not cover, by PEFT's rules; none where it does not say.

    Raises:
        IntegrityError: it is neither a list of names nor a pattern.
    """
    given = config.get("target_modules")
    if given is None or given == "all-linear":
        return []
    if isinstance(given, str):
        try:
            return [module for module in modules if not full_match(given, module, field="target_modules")]
        except UnsupportedKind:  # a pattern beyond what is understood; the tensors tell which modules were trained
            return []
    listed = names(config, "target_modules")
    ends = tuple(f".{name}" for name in listed)
    return [module for module in modules if module not in listed and not module.endswith(ends)]


def left_out(modules: Collection[str], config: Mapping[str, JSON]) -> dict[str, list[str]]:
    """Field -> those of ``modules`` that PEFT would not adapt because of it.

    Raises:
        IntegrityError: a field that lists names holds something else.
    """
    found = {"target_modules": untargeted(modules, config), "exclude_modules": [], "layers_to_transform": []}
    given, seen = config.get("target_modules"), set(found["target_modules"])
    try:
        for module in modules:
            if module in seen:
                continue
            if config.get("exclude_modules") and covers(module, "exclude_modules", config):
                found["exclude_modules"].append(module)
            elif isinstance(given, list) and module not in given and not of_layers(module, config):
                found["layers_to_transform"].append(module)
    except UnsupportedKind:  # a pattern beyond what is understood; the tensors tell which modules were trained
        pass
    return {field: some for field, some in found.items() if some}
