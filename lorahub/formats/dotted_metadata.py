"""What headers of files under dotted names say of alpha: ``lora_adapter_metadata``, and numbers by themselves.

The first is a JSON object with one PEFT config for each component, as diffusers and SimpleTuner write it; the others
are plain strings (``lora_alpha``, ``network_alpha``, ``alpha``).  Says what they mean for a module; knows no tensors.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import final

from lorahub import strict_json
from lorahub.deltas.kind import JSON
from lorahub.deltas.peft_config import chosen
from lorahub.errors import IntegrityError, UnsupportedKind
from lorahub.files.header import Header
from lorahub.findings import Finding
from lorahub.formats.dotted_spellings import SPELLINGS
from lorahub.formats.gather import Trouble
from lorahub.formats.peft.config import CONFIG, field_findings
from lorahub.formats.stems import NOTHING, TOLERANCE, Stated

__all__ = ["METADATA", "Statements", "configs_of", "field_notes"]

METADATA = "lora_adapter_metadata"
"""Header key: JSON object, ``component.field`` -> value, the fields being those of PEFT's ``LoraConfig``."""

_LARGEST = 1 << 20
"""Bytes of that object; a header holds no more."""


_PATTERNS: Mapping[str, str] = {"r": "rank_pattern", "lora_alpha": "alpha_pattern"}
"""Field -> the one with exceptions to it, by pattern of a module's name."""

_PLAIN = ("lora_alpha", "network_alpha", "alpha")
"""Header keys that are an alpha for all modules, as text."""


def configs_of(header: Header) -> dict[str, dict[str, JSON]]:
    """Component -> its fields, from the header.

    Raises:
        IntegrityError: what is there is no JSON object.
    """
    text = header.metadata.get(METADATA)
    if text is None:
        return {}
    fault = "it is no object"
    try:
        fields = strict_json.read(text, limit=_LARGEST)
    except strict_json.NotStrict as error:
        fields, fault = None, str(error)
    if not isinstance(fields, dict):
        raise IntegrityError(f"{METADATA} in the header cannot be read: {fault}", "fetch the file again")
    result: dict[str, dict[str, JSON]] = {}
    for name, value in fields.items():
        component, _, field = name.rpartition(".")
        result.setdefault(component, {})[field] = value
    return result


def field_notes(configs: Mapping[str, Mapping[str, JSON]], present: set[str]) -> Iterator[Finding]:
    """What is to be said of the fields in the header."""
    spelled = [spelling for name, spelling in SPELLINGS.items() if name in present]
    for component, config in configs.items():
        for finding in field_findings(config, [*SPELLINGS.values()], spelled):
            where = tuple(f"{component}.{name}" if component else name for name in finding.where)
            yield replace(finding, message=finding.message.replace(CONFIG, f"{METADATA} in the header"), where=where)


@final
class Statements:
    """What a header says of each module.

    Args:
        header: of the weights file.
        aliases: component as the keys have it -> others under which the header may speak of it.

    Raises:
        IntegrityError: the header's JSON is no object.
    """

    def __init__(self, header: Header, aliases: Mapping[str, Sequence[str]] | None = None) -> None:
        self.configs = configs_of(header)
        self._aliases = aliases or {}
        self._alike: dict[str, Stated] = {}
        self._plain = {name: text for name in _PLAIN if (text := header.metadata.get(name)) is not None}

    def __bool__(self) -> bool:
        return bool(self.configs or self._plain)

    def of(self, component: str, module: str, keys: Mapping[str, str], trouble: Trouble) -> Stated:
        """What holds for a module, a pattern's number before a config's, and that before a plain one.

        Args:
            component: as the keys have it.
            module: as the keys have it.
            keys: suffix -> key; what is wrong with it concerns these.
            trouble: takes what contradicts itself or cannot be read.
        """
        if not self:
            return NOTHING
        config = self._config(component)
        if any(config.get(pattern) for pattern in _PATTERNS.values()):
            return self._of(config, module, keys, trouble)
        if component not in self._alike:  # nothing depends on the module
            self._alike[component] = self._of(config, module, keys, apart := Trouble())
            if apart:
                del self._alike[component]
                return self._of(config, module, keys, trouble)
        return self._alike[component]

    def _of(self, config: Mapping[str, JSON], module: str, keys: Mapping[str, str], trouble: Trouble) -> Stated:
        numbers: dict[str, JSON] = dict(config)
        where = METADATA
        try:
            for field, pattern in _PATTERNS.items():
                value, said = chosen(config, pattern, field, module)
                numbers[field] = value
                numbers.pop(pattern, None)
                where = f"{METADATA} ({said})" if field == "lora_alpha" else where
        except (IntegrityError, UnsupportedKind) as error:
            trouble.add("slot-misfit", keys.values(), f"{METADATA} in the header: {error.message}")
        alpha = numbers.pop("lora_alpha", None)
        stated = float(alpha) if isinstance(alpha, int | float) else None
        for name, text in self._plain.items():
            value = _number(text)
            if value is None:
                continue  # words, such as "auto": nothing is stated
            if stated is None:
                stated, where = value, name
            elif abs(stated - value) > TOLERANCE * max(abs(value), abs(stated)):
                trouble.add("alpha-conflict", [], f"{where} in the header says {stated:g}, and {name} says {value:g}")
        return Stated(alpha=stated, source=f"{where} in the header", numbers=numbers)

    def _config(self, component: str) -> Mapping[str, JSON]:
        names = (component, *self._aliases.get(component, ()))
        found = [self.configs[name] for name in names if name in self.configs]
        return found[0] if found else {}


def _number(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None
