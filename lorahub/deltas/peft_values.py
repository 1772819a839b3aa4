"""Single values in a PEFT config, and the fields that nearly every config class has.

Beside ``peft_config``, which reads LoRA-like ranks and alphas: switches and numbers with PEFT's own defaults, and the
older rule by which some config classes find a module's number.  Knows one JSON object and module names; no tensors.
"""

from __future__ import annotations

import re
import sys
from collections import Counter
from collections.abc import Mapping
from types import MappingProxyType

from lorahub.deltas.kind import JSON, Field
from lorahub.deltas.peft_config import INERT
from lorahub.errors import CannotCarry, IntegrityError

__all__ = ["PLACES", "by_dotted_end", "integer", "number", "seed", "switch"]

PLACES: Mapping[str, Field] = MappingProxyType(
    {
        "exclude_modules": INERT,
        "inference_mode": INERT,
        "init_weights": INERT,  # how the tensors began; nothing is left of it in them
        "layers_pattern": INERT,
        "layers_to_transform": INERT,
        "peft_version": INERT,
        "target_modules": INERT,
        "task_type": INERT,
    }
)
"""Which modules were trained and how they began: the tensors say it."""

_PLAIN = re.compile(r"[\w.\-]+")


def switch(config: Mapping[str, JSON], name: str, default: bool) -> bool:
    """A field that is true or false, or ``default`` where it is missing or null.

    Raises:
        IntegrityError: it is something else.
    """
    value = config.get(name)
    if value is None:
        return default
    if not isinstance(value, bool):
        raise IntegrityError(f"{name} should be true or false, not {value!r}")
    return value


def number(config: Mapping[str, JSON], name: str, default: float) -> float:
    """A field that is a finite number, or ``default`` where it is missing or null.

    Raises:
        IntegrityError: it is something else.
    """
    value = config.get(name)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= sys.float_info.max:
        raise IntegrityError(f"{name} should be a number, not {value!r}")
    return float(value)


def integer(config: Mapping[str, JSON], name: str, default: int) -> int:
    """A field that is a whole number, or ``default`` where it is missing or null.

    Raises:
        IntegrityError: it is something else.
    """
    value = config.get(name)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int):
        raise IntegrityError(f"{name} should be a whole number, not {value!r}")
    return value


def seed(config: Mapping[str, JSON], name: str, default: int) -> int:
    """A field that is a seed, or ``default`` where it is missing or null.

    Raises:
        IntegrityError: it is none that torch and numpy both take.
    """
    value = integer(config, name, default)
    if not 0 <= value < 2**63:
        raise IntegrityError(f"{name} should be a seed of 63 bits, not {value}")
    return value


def by_dotted_end(values: Mapping[str, int], field: str) -> tuple[int, dict[str, JSON]]:
    r"""The commonest number, and the others by module name, found as C3A and FourierFT look them up.

    PEFT 0.21.2 takes the first key with ``re.match(rf".*\.{key}$", name)``, and only then one equal to the name.

    Raises:
        CannotCarry: PEFT would find another module's number under these names.
    """
    base = Counter(values.values()).most_common(1)[0][0]
    plain = {name: value for name, value in values.items() if value != base}
    odd = [name for name in plain if not _PLAIN.fullmatch(name)]
    for name, value in values.items() if not odd else ():
        key = next((key for key in plain if re.match(rf".*\.{key}$", name)), name)
        if plain.get(key, base) != value:
            odd.append(name)
    if odd:
        raise CannotCarry(f"no {field} tells these modules from others whose names end alike: {', '.join(sorted(odd))}")
    return base, dict(plain)
