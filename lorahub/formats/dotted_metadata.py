"""``lora_adapter_metadata``: the PEFT configs that diffusers keeps in a header, one for each component.

Reads the object and says what its fields mean; knows no tensors.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

from lorahub import strict_json
from lorahub.deltas.kind import JSON
from lorahub.errors import IntegrityError
from lorahub.files.header import Header
from lorahub.findings import Finding
from lorahub.formats.dotted_spellings import SPELLINGS
from lorahub.formats.peft.config import CONFIG, field_findings

__all__ = ["METADATA", "configs_of", "field_notes"]

METADATA = "lora_adapter_metadata"
"""Header key: JSON object, ``component.field`` -> value, the fields being those of PEFT's ``LoraConfig``."""

_LARGEST = 1 << 20
"""Bytes of that object; a header holds no more."""


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
