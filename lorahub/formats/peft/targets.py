"""Which modules of a base a PEFT config is for, by PEFT's rules, and which of them a file lacks.

Knows names and the shapes of a base's weights; what is said where the rules cannot be decided here is nothing.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Final

from lorahub.bases.index import BaseIndex
from lorahub.deltas.kind import JSON, Group
from lorahub.errors import UnsupportedKind
from lorahub.findings import Finding, Verdict
from lorahub.formats.families import representatives
from lorahub.formats.peft.config import CONFIG, kept_by, names
from lorahub.formats.peft.keys import Names, Stems
from lorahub.formats.peft.rules import covers, of_layers

__all__ = ["targeted", "unfilled", "unsaved"]

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
            if covers(module, "target_modules", config)
            and not covers(module, "exclude_modules", config)
            and not any(f".{each}." in f".{module}." for each in kept)
            and (isinstance(given, str) or module in names(config, "target_modules") or of_layers(module, config))
        )
    except UnsupportedKind:  # a pattern beyond what is matched here
        return None


def unsaved(
    config: Mapping[str, JSON], found: Names, whole: Sequence[Group], stems: Stems, index: BaseIndex | None
) -> list[Finding]:
    """That a file lacks parameters which its config says were trained and saved whole.

    Args:
        config: the parsed config.
        found: the file's names.
        whole: the groups of parameters that the file replaces.
        stems: the base's modules.
        index: the base, or None.
    """
    if not found.factors or config.get("peft_type") != _TAG:
        return []
    saved = {(group.module, group.parameter) for group in representatives(whole)}
    findings = []
    kept = names(config, "modules_to_save")
    there = {entry for module, _ in saved for entry in kept if kept_by(module, [entry])}
    wanted = {entry: _modules_of(entry, index) for entry in kept} if index else {}
    lacking = [entry for entry in kept if entry not in there and wanted.get(entry)] or ([] if there else [*kept])
    if lacking:
        findings.append(_lacking(f"modules_to_save in {CONFIG} names {', '.join(lacking)}", lacking))
    if index is not None and all(stems.find(stem) == stem for stem in found.factors):
        trained = [name for name in _biases(config, found.factors, index) if tuple(name.rsplit(".", 1)) not in saved]
        if trained:
            findings.append(_lacking(f"bias in {CONFIG} covers {_counted(trained)} of the base", trained))
    return findings


def _counted(biases: Sequence[str]) -> str:
    return "a bias" if len(biases) == 1 else f"{len(biases)} biases"


def _lacking(what: str, where: Sequence[str]) -> Finding:
    return Finding(
        code="target-unfilled",
        axis="format",
        level=Verdict.UNVERIFIED,
        message=f"{what}, for which the file has no tensors; they stay as they are, and the file is incomplete",
        where=tuple(where),
        remedy="fetch the file again, or ask its author",
    )


def _modules_of(entry: str, index: BaseIndex) -> list[str]:
    """The modules of a base that an entry of ``modules_to_save`` covers."""
    return [module for module in index.modules() if kept_by(module, [entry])]


def _biases(config: Mapping[str, JSON], factors: Collection[str], index: BaseIndex) -> list[str]:
    """The biases of a base that were trained along: those of adapted modules, or all."""
    bias = config.get("bias")
    if bias == "all":
        return [name for name in index.parameters if name.endswith(".bias")]
    return [name for stem in factors if (name := f"{stem}.bias") in index.parameters] if bias == "lora_only" else []


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
