"""Which modules of a base a PEFT config is for, by PEFT's rules, and which of them a file lacks.

Knows names and the shapes of a base's weights; what is said where the rules cannot be decided here is nothing.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from typing import Final

from lorahub.bases.index import BaseIndex
from lorahub.deltas.kind import JSON, Group
from lorahub.deltas.patterns import full_match
from lorahub.errors import UnsupportedKind
from lorahub.findings import Finding, Verdict
from lorahub.formats.peft.config import CONFIG, kept_by, names
from lorahub.formats.peft.keys import Names, Stems

__all__ = ["targeted", "unfilled"]

_TAG: Final = "LORA"
"""The only type of adapter that has tensors of its own for each of its modules, whatever its settings."""


def targeted(modules: Sequence[str], config: Mapping[str, JSON]) -> tuple[str, ...] | None:
    """Those of ``modules`` that PEFT would adapt, or None where the config does not say."""
    given = config.get("target_modules")
    if not given or given == "all-linear":
        return None
    kept = names(config, "modules_to_save")
    try:
        return tuple(
            module
            for module in modules
            if _named(module, "target_modules", config)
            and not _named(module, "exclude_modules", config)
            and not any(f".{each}." in f".{module}." for each in kept)
            and (isinstance(given, str) or module in names(config, "target_modules") or _of_layers(module, config))
        )
    except UnsupportedKind:  # a pattern beyond what is matched here
        return None


def unfilled(
    config: Mapping[str, JSON], found: Names, whole: Collection[Group], stems: Stems, index: BaseIndex | None
) -> list[Finding]:
    """That a file has nothing for modules of the base that its config is for.

    Only where the file's names are the base's own: in a model of another class other modules may have such names.

    Args:
        config: the parsed config.
        found: the file's names.
        whole: the groups of parameters that the file replaces or adds to without factors.
        stems: the base's modules.
        index: the base, or None.
    """
    if index is None or config.get("peft_type") != _TAG or not found.factors:
        return []
    if config.get("layer_replication") and index.repeated is None:
        return []
    if any(stems.find(stem) != stem for stem in found.factors):
        return []
    kept = names(config, "modules_to_save")
    matrices = []
    for module in index.modules():
        info = index.parameters.get(f"{module}.weight")  # of tied names the first: the others have no weight
        if info is not None and len(info.shape) == 2 and kept_by(module, kept) is None:
            matrices.append(module)
    seen = {*found.factors, *(group.module for group in whole if group.parameter == "weight")}
    lacking = [module for module in targeted(matrices, config) or () if module not in seen]
    if not lacking:
        return []
    return [
        Finding(
            code="target-unfilled",
            axis="format",
            level=Verdict.UNVERIFIED,
            message=f"target_modules in {CONFIG} covers {len(lacking)} modules of the base for which the file has no "
            "tensors; they stay as they are, and if the adapter was trained on them, the file is incomplete",
            where=tuple(lacking),
            remedy="fetch the file again, or ask its author",
        )
    ]


def _named(module: str, field: str, config: Mapping[str, JSON]) -> bool:
    """Whether a list of names or a pattern in the config covers ``module``."""
    given = config.get(field)
    if isinstance(given, str) and given:
        return full_match(given, module, field=field)
    return any(f".{module}".endswith(f".{name}") for name in names(config, field))


def _of_layers(module: str, config: Mapping[str, JSON]) -> bool:
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
