"""What somebody asks for when an adapter is made: a kind, its settings, and what holds for single modules.

Names and types are checked here, once; a kind then finds its settings complete.  Knows kinds; no models.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Literal, final

from lorahub.deltas.kind import JSON, Kind
from lorahub.deltas.starting import Setting, Starting
from lorahub.errors import UsageError
from lorahub.names import did_you_mean
from lorahub.registry import Registry

__all__ = ["Asked", "Biases", "asked", "demand_seed", "task_of", "trainable_kind"]

Biases = Literal["none", "all", "lora_only"]
"""Which of the base's biases are trained too: none, all of them, or those of the modules that take an adapter."""

_PATTERNS = ("r", "alpha")
"""Settings that patterns can choose for single modules."""


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """A kind and how it is to begin.

    Attributes:
        kind: which.
        starting: how its training begins.
        settings: complete, as they hold where nothing else is said.
        patterns: setting -> pattern of module paths -> value; of several patterns the first counts.
        dropout: the chance of an input of the adapter's own path to be dropped.
    """

    kind: Kind
    starting: Starting
    settings: Mapping[str, JSON]
    patterns: Mapping[str, Mapping[str, JSON]] = field(default_factory=lambda: MappingProxyType({}))
    dropout: float = 0.0

    def of(self, module: str) -> dict[str, JSON]:
        """The settings of one module.  Patterns are PEFT's: a regular expression for the path, or for its end."""
        own = dict(self.settings)
        for name, patterns in self.patterns.items():
            own[name] = next((value for pattern, value in patterns.items() if _fits(pattern, module)), own[name])
        return own

    def demand_used(self, modules: list[str]) -> None:
        """Refuse a pattern that means no module, for it would be ignored.

        Raises:
            UsageError: naming it.
        """
        for name, patterns in self.patterns.items():
            for pattern in patterns:
                if not any(_fits(pattern, module) for module in modules):
                    raise UsageError(
                        f"{_FIELDS[name]}: {pattern!r} is the name of no module that is trained."
                        f"{did_you_mean(pattern, [module.rpartition('.')[2] for module in modules])}",
                        f"they are: {', '.join(modules[:4])}{' ...' if len(modules) > 4 else ''}",
                    )


_FIELDS = {"r": "rank_pattern", "alpha": "alpha_pattern"}


def asked(
    kind: Kind,
    given: Mapping[str, JSON],
    *,
    rank_pattern: Mapping[str, int] | None = None,
    alpha_pattern: Mapping[str, float] | None = None,
) -> Asked:
    """Check what is asked of a kind, and complete it.

    Args:
        kind: a kind that can be trained.
        given: settings by name; None stands for the kind's own choice, and of ``alpha`` for ``r``.
        rank_pattern: pattern of module paths -> r there.
        alpha_pattern: pattern of module paths -> alpha there.

    Raises:
        UsageError: a setting that the kind does not have, or a value that it cannot be.
    """
    starting = kind.starting
    assert starting is not None
    settings = {name: setting.default for name, setting in starting.settings.items()}
    said = {name: value for name, value in given.items() if value is not None}
    for name, value in said.items():
        if name not in settings:
            raise UsageError(
                f"{kind.title} has no setting '{name}'.{did_you_mean(name, settings)}",
                f"its settings: {', '.join(settings)}",
            )
        settings[name] = _checked(kind, name, value, starting.settings[name])
    if "alpha" in settings and "alpha" not in said and "r" in said:
        settings["alpha"] = _number(said["r"])
    patterns: dict[str, Mapping[str, JSON]] = {}
    for name, chosen in zip(_PATTERNS, (rank_pattern, alpha_pattern), strict=True):
        if chosen:
            if name not in settings:
                raise UsageError(f"{kind.title} has no setting '{name}', and {_FIELDS[name]} chooses one")
            patterns[name] = {
                pattern: _checked(kind, f"{_FIELDS[name]}[{pattern!r}]", value, starting.settings[name])
                for pattern, value in chosen.items()
            }
    dropout = settings.get("dropout", 0.0)
    assert isinstance(dropout, int | float)
    if not 0 <= dropout < 1:
        raise UsageError(f"dropout is {dropout}", "it is a chance: 0 or more, and less than 1")
    return Asked(kind=kind, starting=starting, settings=settings, patterns=patterns, dropout=float(dropout))


TASKS = ("CAUSAL_LM", "FEATURE_EXTRACTION", "QUESTION_ANS", "SEQ_2_SEQ_LM", "SEQ_CLS", "TOKEN_CLS")
"""PEFT's words for what an adapter is for (``peft.TaskType``); a config with any other is one that it does not open."""


def task_of(given: object) -> str:
    """PEFT's word for a task, as its enumeration or its name gives it.

    Raises:
        UsageError: PEFT has no such word.
    """
    word = getattr(given, "value", given)
    if word in TASKS:
        return str(word)
    near = did_you_mean(word.upper(), TASKS) if isinstance(word, str) else ""
    raise UsageError(f"there is no task_type={word!r}.{near}", f"choose one of: {', '.join(TASKS)}")


_SEEDS = range(-(2**63), 2**64)


def demand_seed(seed: object) -> None:
    """Refuse what no generator takes.

    Raises:
        UsageError: it is no whole number, or one of more than 64 bits.
    """
    if isinstance(seed, bool) or not isinstance(seed, int) or seed not in _SEEDS:
        raise UsageError(f"seed is {seed!r}", "give a whole number of at most 64 bits")


def trainable_kind(name: str, registry: Registry) -> Kind:
    """The kind of that name.

    Raises:
        UsageError: there is none, or it cannot be trained here.
    """
    found = registry.kinds.get(name.lower().replace("_", "-")) or registry.kinds.get(name)
    able = sorted(kind.name for kind in registry.kinds.values() if kind.starting is not None)
    if found is None:
        raise UsageError(f"there is no kind '{name}'.{did_you_mean(name, able)}", f"kinds to train: {', '.join(able)}")
    if found.starting is None:
        raise UsageError(
            f"{found.title} can be read, merged and attached, but not be trained here",
            f"kinds to train: {', '.join(able)}",
        )
    return found


def _checked(kind: Kind, name: str, value: JSON, setting: Setting) -> JSON:
    """A value of the type that the default has; whole numbers count as numbers."""
    default = setting.default
    if setting.choices and value not in setting.choices:
        words = [each for each in setting.choices if isinstance(each, str)]
        near = did_you_mean(value, words) if isinstance(value, str) else ""
        raise UsageError(
            f"{kind.title} has no {name}={value!r}.{near}", f"choose one of: {', '.join(map(str, setting.choices))}"
        )
    wanted = type(default)
    if default is None or setting.choices or (wanted is list and isinstance(value, str)):
        return value
    given: object = value
    if wanted is list and isinstance(given, tuple | set | frozenset):  # as configs have them; sets in any order
        return sorted(given) if isinstance(given, set | frozenset) else [*given]
    fits = isinstance(value, int | float) and not isinstance(value, bool) if wanted is float else type(value) is wanted
    if not fits:
        raise UsageError(f"{kind.title}: {name} should be {_WORDS.get(wanted, wanted.__name__)}, not {value!r}")
    if name == "r" and isinstance(value, int) and isinstance(default, int) and value < 1 <= default:
        raise UsageError(f"{kind.title}: r is {value}", "a rank is 1 or more")
    if name.startswith("alpha") and value == 0:
        raise UsageError(
            f"{kind.title}: {name} is 0, by which the change is multiplied: nothing could be learned",
            "leave it out, or give another number",
        )
    return value


_WORDS = {int: "a whole number", float: "a number", bool: "true or false", str: "a word", list: "a list"}


def _number(value: JSON) -> float:
    assert isinstance(value, int | float)
    return float(value)


def _fits(pattern: str, module: str) -> bool:
    return re.match(rf"(.*\.)?({pattern})$", module) is not None
