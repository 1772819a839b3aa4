"""What formats without a config have in common: parameters saved whole, and numbers that people state themselves.

A file that is a part of a state dict may hold a trained head beside its factors, under the parameters' own names.  What
such a file leaves out, people can write into an ``adapter_config.json`` beside it: ``{"lora_alpha": 16}``.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence

from lorahub import strict_json
from lorahub.deltas.kind import JSON, Group, TensorRef
from lorahub.errors import IntegrityError
from lorahub.files.header import Header
from lorahub.findings import Finding, Verdict
from lorahub.formats.format import AdapterFiles
from lorahub.formats.peft.config import CONFIG
from lorahub.formats.peft.keys import MODEL, Stems
from lorahub.formats.suffixes import unknown_fields

__all__ = [
    "about_config",
    "alpha_unknown",
    "is_plain",
    "own_config",
    "say",
    "stated_flags",
    "stated_number",
    "whole_parameters",
]

_LONGEST = 4096
_OTHERS = {"config", "fine_tune_type", "lora_parameters", "peft_type"}

_PARAMETERS = frozenset(("bias", "num_batches_tracked", "running_mean", "running_var", "weight"))
"""What the layers of a new head call their parameters; the base need not have them."""


def whole_parameters(
    header: Header, keys: Collection[str], stems: Stems, taken: Sequence[Group]
) -> tuple[list[Group], list[str]]:
    """A replacement for each key that reads as a parameter of a module, and the keys that do not.

    Args:
        header: of the weights file.
        keys: what no factor is.
        stems: the base's modules; a parameter that the base has may have any name.
        taken: groups there are already; two keys that mean one parameter both stay over.
    """
    found: dict[tuple[str, str], list[str]] = {}
    left = []
    for key in keys:
        spelled, dot, parameter = key.rpartition(".")
        if dot and spelled and (parameter in _PARAMETERS or stems.has(spelled, parameter)):
            found.setdefault((stems.find(spelled) or spelled, parameter), []).append(key)
        else:
            left.append(key)
    used = {(group.module, group.parameter) for group in taken}
    groups = []
    for (module, parameter), same in found.items():
        if len(same) > 1 or (module, parameter) in used:
            left += same
            continue
        info = header.tensors[same[0]]
        ref = TensorRef(key=same[0], shape=info.shape, dtype=info.dtype)
        groups.append(Group(module=module, parameter=parameter, kind="replace", slots={"value": ref}))
    return groups, left


def is_plain(files: AdapterFiles) -> bool:
    """Whether no config lies beside the weights that makes them another format's, or none of their names is PEFT's."""
    if not _OTHERS & files.configs.get(CONFIG, {}).keys():
        return True
    return not any(key.startswith(MODEL) for header in files.headers.values() for key in header.tensors)


def own_config(files: AdapterFiles) -> Mapping[str, JSON]:
    """What people wrote beside the weights; empty where the config is one that another format writes."""
    config = files.configs.get(CONFIG, {})
    return {} if _OTHERS & config.keys() else config


def stated_number(files: AdapterFiles, file: str, name: str) -> float | None:
    """A finite number that a config beside the file or its header states, or None where neither does.

    Raises:
        IntegrityError: one states something else, or both differ.
    """
    values = _stated(files, file, name)
    for value in values:
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise IntegrityError(f"{file}: {name} is stated as {value!r}, which is no number", f"{{{name!r}: 16}}")
    return float(values[0]) if values and isinstance(values[0], int | float) else None


def stated_flags(files: AdapterFiles, file: str, name: str) -> list[bool] | None:
    """A list of true and false that a config beside the file or its header states, or None where neither does.

    Raises:
        IntegrityError: one states something else, or both differ.
    """
    values = _stated(files, file, name)
    for value in values:
        if not isinstance(value, list) or not value or not all(isinstance(each, bool) for each in value):
            raise IntegrityError(
                f"{file}: {name} is stated as {value!r}, which is no list of true and false", say(name)
            )
    return [each is True for each in values[0]] if values and isinstance(values[0], list) else None


def _stated(files: AdapterFiles, file: str, name: str) -> list[JSON]:
    """What is stated, the config first.

    Raises:
        IntegrityError: config and header differ.
    """
    values: list[JSON] = []
    if (said := own_config(files).get(name)) is not None:
        values.append(said)
    if (text := files.headers[file].metadata.get(name)) is not None:
        try:
            values.append(strict_json.read(text, limit=_LONGEST))
        except strict_json.NotStrict:
            values.append(text)
    if len(values) == 2 and values[0] != values[1]:
        raise IntegrityError(
            f"{name} is {values[0]!r} in {CONFIG} and {values[1]!r} in the header of {file}",
            "ask its author which one holds, and correct the other",
        )
    return values


def say(name: str) -> str:
    """How people can state what a file leaves out."""
    return f"""where you know it, write it into an {CONFIG} beside the file: {{"{name}": {_EXAMPLES[name]}}}"""


_EXAMPLES: Mapping[str, str] = {"lora_alpha": "16", "enable_lora": "[true, false, true]"}


def alpha_unknown(file: str, what: str) -> Finding:
    """What to say where nothing tells the scale, which is then 1."""
    return Finding(
        code="alpha-unknown",
        axis="format",
        level=Verdict.UNVERIFIED,
        message=f"{what}: alpha is taken for the rank, so the scale for 1",
        where=(file,),
        remedy=say("lora_alpha"),
    )


def about_config(files: AdapterFiles, known: Collection[str]) -> list[Finding]:
    """Fields of a config beside the weights that the format has no use for; nothing where there are none."""
    config = own_config(files)
    return unknown_fields({name: value for name, value in config.items() if name not in known})
