"""Every error lorahub raises, one class for each decision a caller could make.

    LorahubError                        exit 1   something went wrong while doing what was asked
    ├── UsageError                      exit 2   the request itself is malformed
    │   ├── InvalidRef                           a reference that does not follow the grammar
    │   ├── RecipeError                          a recipe that does not follow its schema, or fits no target
    │   └── ManifestError                        a manifest that does not follow its schema, or cannot be edited
    ├── Degraded                        exit 3   it would run, but not as its author meant it: refused unless allowed
    ├── Incompatible                    exit 4   it cannot be done with these two things
    │   ├── BaseMismatch                         the adapter does not fit this base
    │   ├── BaseNeeded                           files leave out what only the base can tell, and it is not at hand
    │   ├── UnsupportedFormat                    no format claims the files, or two claim them alike
    │   ├── UnsupportedKind                      a kind that is recognised but cannot be computed here
    │   ├── CannotCarry                          the target format has no word for part of the adapter
    │   └── NotLocal                             a delta that cannot be cut to a region of its weight
    ├── IntegrityError                  exit 5   bytes are not what they claim to be
    │   ├── HeaderError                          a safetensors header that is malformed or over the limits
    │   ├── DigestMismatch                       content differs from its recorded sha256
    │   ├── UnsafePath                           a file name that could land outside its folder, or not on every system
    │   ├── NotFinite                            NaN or infinity where weights were expected
    │   └── RecordError                          a metadata record that does not follow its schema
    ├── Unavailable                     exit 6   it may exist, but not from here and now
    │   ├── NotFound                             no such repository, version, file or folder
    │   ├── AccessDenied                         private, gated or without permission
    │   └── Offline                              the network is needed and not allowed or not there
    ├── WriteFailed                     exit 1   the target could not be written (no space, no permission)
    ├── RankFailed                      exit 1   another process of the same run failed or is gone
    ├── PushRefused                     exit 1   the folder holds what must not be published
    ├── MissingDependency               exit 1   an optional package is needed for this
    └── PluginError                     exit 1   a plugin is broken, blocked or in conflict

A message says what is wrong and where; ``hint`` says what to do next, as a command where there is one.
To add a class: a caller must be able to act on it differently; draw it above; keep it picklable (arguments only).
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, ClassVar

if TYPE_CHECKING:
    from lorahub.findings import Finding

__all__ = [
    "AccessDenied",
    "BaseMismatch",
    "BaseNeeded",
    "CannotCarry",
    "Degraded",
    "DigestMismatch",
    "HeaderError",
    "Incompatible",
    "IntegrityError",
    "InvalidRef",
    "LorahubError",
    "ManifestError",
    "MissingDependency",
    "NotFinite",
    "NotFound",
    "NotLocal",
    "Offline",
    "PluginError",
    "PushRefused",
    "RankFailed",
    "RecipeError",
    "RecordError",
    "Unavailable",
    "UnsafePath",
    "UnsupportedFormat",
    "UnsupportedKind",
    "UsageError",
    "WriteFailed",
]


_ALLOWED = re.compile(r"--allow ([a-z0-9][a-z0-9-]*)")
"""How a hint names a finding's code."""


class LorahubError(Exception):
    """The root: ``message`` says what and where, ``hint`` what to do next, ``findings`` the evidence, if any."""

    exit_code: ClassVar[int] = 1

    def __init__(self, message: str, hint: str = "", findings: tuple[Finding, ...] = ()) -> None:
        super().__init__(message, hint, findings)
        self.message = message
        self.hint = hint
        self.findings = findings

    def __str__(self) -> str:
        """As people read it where no command line prints it: what is allowed there by an option is an argument here."""
        told = [finding.show() for finding in self.findings if finding.message not in self.message]
        lines = [self.message, *told, *filter(None, [self.hint])]
        codes = dict.fromkeys(code for line in lines[1:] for code in _ALLOWED.findall(line))
        if codes:
            lines.append("in Python: allow=[" + ", ".join(f'"{code}"' for code in codes) + "]")
        return "\n  ".join(lines)


class UsageError(LorahubError):
    """The request itself is malformed: a bad option, a bad combination, a path that is not what it must be."""

    exit_code = 2


class InvalidRef(UsageError, ValueError):
    """A reference that does not follow ``[NAME=]ns/name[@SELECTOR][/path][:WEIGHT]``."""


class RecipeError(UsageError, ValueError):
    """A recipe that does not follow its schema, or speaks of what is not there; the message carries the key path."""


class ManifestError(UsageError, ValueError):
    """A manifest that does not follow its schema, or has to be edited by hand; the message carries the key path."""


class Degraded(LorahubError):
    """It would run, but not as its author meant it; ``findings`` names each reason and ``--allow CODE`` accepts one."""

    exit_code = 3


class Incompatible(LorahubError):
    """It cannot be done with these two things, whatever is allowed."""

    exit_code = 4


class BaseMismatch(Incompatible):
    """The adapter does not fit this base: shapes differ, or nothing lands."""


class BaseNeeded(Incompatible):
    """The adapter's files leave out what follows from the base: give the base, or files that have it."""


class UnsupportedFormat(Incompatible):
    """No format claims the files, or two claim them with equal right."""


class UnsupportedKind(Incompatible):
    """The kind is recognised by name but is no weight change, or cannot be computed here."""


class CannotCarry(Incompatible):
    """The target format has no word for part of the adapter; the message lists the parts."""


class NotLocal(Incompatible):
    """This delta cannot be cut to a region of its weight: every element depends on all of it."""


class IntegrityError(LorahubError):
    """Bytes are not what they claim to be; nothing that came from them was used."""

    exit_code = 5


class HeaderError(IntegrityError, ValueError):
    """A safetensors header that is malformed or over the limits of the reader."""


class DigestMismatch(IntegrityError):
    """Content differs from its recorded sha256."""


class UnsafePath(IntegrityError, ValueError):
    """A file name that could land outside its folder, or that some system cannot hold; the message says why."""


class NotFinite(IntegrityError, ArithmeticError):
    """NaN or infinity where weights were expected."""


class RecordError(IntegrityError, ValueError):
    """A metadata record that does not follow its schema; the message carries the key path."""


class Unavailable(LorahubError):
    """It may exist, but it cannot be had from here and now."""

    exit_code = 6


class NotFound(Unavailable, LookupError):
    """No such repository, version, file or folder."""


class AccessDenied(Unavailable):
    """Private, gated, disabled, or without the permission this needs."""


class Offline(Unavailable):
    """The network is needed and is not allowed or not there."""


class WriteFailed(LorahubError):
    """The target could not be written: no space, no permission, or something is in the way."""


class RankFailed(LorahubError):
    """Another process of the same run failed or is gone; nothing was published, and what is finished is kept."""


class PushRefused(LorahubError):
    """The folder holds what must not be published, or publishing is switched off; nothing was sent."""


class MissingDependency(LorahubError):
    """An optional package is needed for this; the hint is the command that installs it."""


class PluginError(LorahubError):
    """A plugin is broken, blocked or in conflict with another; the message names the distribution."""
