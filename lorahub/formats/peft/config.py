"""``adapter_config.json`` as PEFT writes it: which fields mean what, and what they say of the base.

Tables and look-ups over one JSON object.  Knows no tensors and no kinds but for the fields they declare.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType

from lorahub.deltas.kind import JSON, Field, Spelling
from lorahub.errors import IntegrityError
from lorahub.findings import Finding, Verdict

__all__ = [
    "COMMON",
    "CONFIG",
    "ancestors",
    "base_claim",
    "field_findings",
    "kept_by",
    "names",
    "trains_biases",
]

CONFIG = "adapter_config.json"

COMMON: Mapping[str, Field] = MappingProxyType(
    {
        "auto_mapping": Field(inert=True),
        "base_model_name_or_path": Field(used=True),
        "bias": Field(used=True),
        "exclude_modules": Field(inert=True),  # which modules were trained shows in the tensors
        "inference_mode": Field(inert=True),
        "layers_pattern": Field(inert=True),
        "layers_to_transform": Field(inert=True),
        "modules_to_save": Field(used=True),
        "peft_type": Field(used=True),
        "peft_version": Field(inert=True),
        "revision": Field(used=True),
        "runtime_config": Field(inert=True),
        "target_modules": Field(used=True),
        "task_type": Field(inert=True),
    }
)
"""Fields that mean the same for every adapter type."""

_FOUR_BIT = ("-unsloth-bnb-4bit", "-bnb-4bit")
"""Ends of the names of unsloth's 4-bit repositories."""

_HUB_NAME = re.compile(r"[A-Za-z0-9_][\w.-]*(/[\w.-]+)?", re.ASCII)


def field_findings(
    config: Mapping[str, JSON], spellings: Sequence[Spelling], present: Sequence[Spelling]
) -> Iterator[Finding]:
    """What is to be said of the config's fields.

    Args:
        config: the parsed file.
        spellings: of all kinds that share its ``peft_type``; a field that none of them knows is unknown.
        present: of the kinds that the tensors turned out to be; theirs decide what a field does.
    """
    for name, value in sorted(config.items()):
        about = _meanings(name, present) or _meanings(name, spellings)
        if not about:
            yield _unknown(name, value)
        elif not _blank(value):
            for meaning in about:
                if meaning.refuse and not any(_same(value, harmless) for harmless in meaning.harmless):
                    yield Finding(
                        code="config-refused",
                        axis="format",
                        level=Verdict.INCOMPATIBLE,
                        message=f"{name} = {_show(value)} cannot be honoured, because {meaning.refuse}",
                        where=(name,),
                    )
                    break


def _meanings(name: str, spellings: Sequence[Spelling]) -> list[Field]:
    common = [COMMON[name]] if name in COMMON else []
    return common + [spelling.fields[name] for spelling in spellings if name in spelling.fields]


def _unknown(name: str, value: JSON) -> Finding:
    if _blank(value):
        return Finding(
            code="config-unknown",
            axis="format",
            level=Verdict.EXACT,
            message=f"{CONFIG} has a field nobody here knows, {name} = {_show(value)}; empty, it changes nothing",
            where=(name,),
        )
    return Finding(
        code="config-unknown",
        axis="format",
        level=Verdict.DEGRADED,
        message=f"{CONFIG} says {name} = {_show(value)}, and nobody here knows whether that changes the arithmetic",
        where=(name,),
        remedy="if you know that it does not: --allow config-unknown",
        allowable=True,
    )


def _blank(value: JSON) -> bool:
    """Null, false or empty: such a value switches nothing on."""
    return value is None or value is False or value in ("", [], {})


def _same(left: JSON, right: JSON) -> bool:
    """Equality of JSON values, where true is not 1."""
    return isinstance(left, bool) == isinstance(right, bool) and left == right


def _show(value: JSON) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else f"{text[:77]}..."


def names(config: Mapping[str, JSON], field: str) -> tuple[str, ...]:
    """A field that lists module names; empty where it is null.

    Raises:
        IntegrityError: it is something else.
    """
    value = config.get(field)
    listed = [] if value is None else [value] if isinstance(value, str) else value
    if not isinstance(listed, list) or not all(isinstance(name, str) for name in listed):
        raise IntegrityError(f"{CONFIG}: {field} is {_show(value)}, not a list of module names")
    return tuple(str(name) for name in listed if name)


def trains_biases(config: Mapping[str, JSON]) -> bool:
    """Whether the base's own biases were trained and are saved along ("all", "lora_only", ...).

    Raises:
        IntegrityError: it is no word.
    """
    value = config.get("bias")
    if value is None or value is False:
        return False
    if not isinstance(value, str):
        raise IntegrityError(f"{CONFIG}: bias should be none, all or one kind's own, not {_show(value)}")
    return value != "none"


def ancestors(module: str) -> Iterator[str]:
    """``a``, ``a.b``, ``a.b.c`` for ``a.b.c``."""
    parts = module.split(".")
    return (".".join(parts[: count + 1]) for count in range(len(parts)))


def kept_by(module: str, entries: Sequence[str]) -> str | None:
    """The entry of ``modules_to_save`` that covers ``module`` or a module around it, as PEFT matches them, or None."""
    return next((entry for around in ancestors(module) for entry in entries if around.endswith(entry)), None)


def _sixteen_bit(name: str) -> str:
    """The repository that a 4-bit one of unsloth's was made from, which it publishes beside it; "" for all others."""
    end = next((each for each in _FOUR_BIT if name.endswith(each)), "")
    return name.removesuffix(end) if end and name.startswith("unsloth/") else ""


def base_claim(config: Mapping[str, JSON]) -> tuple[str, str, tuple[Finding, ...]]:
    """What the config says of the base: (repository, revision, findings); a path on somebody's machine says nothing.

    A 4-bit repository of unsloth's stands for the 16-bit one it was made from, and a finding says so.
    """
    name, revision = config.get("base_model_name_or_path"), config.get("revision")
    if not isinstance(name, str) or not name:
        return "", "", ()
    if _HUB_NAME.fullmatch(name):
        if plain := _sixteen_bit(name):
            note = Finding(
                code="base-is-quantised",
                axis="base",
                level=Verdict.EXACT,
                message=f"it was trained on {name}, a copy in 4 bits; {plain}, the same weights in 16 bits, is taken "
                "for its base",
                where=("base_model_name_or_path",),
                remedy=f"if that is not so: --base BASE, or lorahub record FOLDER --base {name}",
            )
            return plain, "", (note,)
        return name, revision if isinstance(revision, str) else "", ()
    note = Finding(
        code="base-is-a-local-path",
        axis="base",
        level=Verdict.EXACT,
        message=f"{CONFIG} names the base by a path on the machine it was trained on, {name!r}",
        where=("base_model_name_or_path",),
        remedy="lorahub record FOLDER --base BASE   (with the base it was trained on)",
    )
    return "", "", (note,)
