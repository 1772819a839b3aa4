"""The laws every runtime table keeps: rules that can be told apart, read and acted on, and that no file breaks.

    from lorahub.testing import check_runtime
    def test_my_runtime():
        check_runtime(MY_RUNTIME)

Holds rules against adapters of every kind in every format that is registered.  Whether a rule is true only the
runtime's own code can say: read it, and cite the versions.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from lorahub.findings import Verdict
from lorahub.formats.format import AdapterFiles, Reading
from lorahub.plugins import load_registry
from lorahub.runtimes.runtime import Runtime
from lorahub.testing.judging import hold
from lorahub.testing.specimens import FormatCase, specimens

__all__ = ["RUNTIME_LAWS", "check_runtime"]

_CODE = re.compile(r"[a-z0-9]+(?:-[a-z0-9]+)*")
_FIELDS = {"adapter", "value"}


@dataclass(frozen=True, slots=True)
class _Subject:
    label: str
    files: AdapterFiles
    reading: Reading
    index: None = None


def rules_can_be_told_apart(runtime: Runtime) -> None:
    """Codes are kebab-case and belong to one rule each; the table says which versions it was read from."""
    hold(bool(runtime.title and runtime.versions), f"{runtime.name}: no title, or no versions that it is true for")
    hold(bool(runtime.rules), f"{runtime.name}: a table without rules accepts everything")
    for code, count in Counter(rule.code for rule in runtime.rules).items():
        hold(bool(_CODE.fullmatch(code)), f"{runtime.name}: the code {code!r} is not like 'some-code'")
        hold(count == 1, f"{runtime.name}: {count} rules have the code {code}")


def rules_say_what_to_do(runtime: Runtime) -> None:
    """Each has a level that is seen, a message and a remedy; the gaps in them are ``{adapter}`` and ``{value}``."""
    for rule in runtime.rules:
        says = f"{runtime.name}: {rule.code}"
        hold(rule.level > Verdict.EXACT, f"{says}: a rule that says nothing against an adapter is no rule")
        hold(bool(rule.message and rule.remedy), f"{says}: a message or a remedy is missing")
        for text in (rule.message, rule.remedy):
            gaps = {name for _, name, _, _ in string.Formatter().parse(text) if name is not None}
            hold(gaps <= _FIELDS, f"{says}: nobody fills {', '.join(sorted(gaps - _FIELDS))} in {text!r}")


def every_adapter_is_judged(runtime: Runtime) -> None:
    """Whatever the adapter, the answer is one finding or several, of the axis of libraries, with codes of the table."""
    codes = {rule.code for rule in runtime.rules} | {"runtime-accepts"}
    for subject in _subjects():
        found = runtime.judge(subject)
        says = f"{runtime.name}: {subject.label}"
        hold(bool(found), f"{says}: nothing is said")
        for finding in found:
            hold(finding.axis == "libraries", f"{says}: {finding.code} is about {finding.axis}")
            hold(finding.code in codes, f"{says}: {finding.code} is the code of no rule")
            hold("{" not in finding.message, f"{says}: {finding.code} shows a gap that was not filled")
        again = runtime.judge(subject)
        hold(found == again, f"{says}: asked twice, it says something else")


RUNTIME_LAWS: Mapping[str, Callable[[Runtime], None]] = MappingProxyType(
    {law.__name__: law for law in (rules_can_be_told_apart, rules_say_what_to_do, every_adapter_is_judged)}
)
"""Name -> law; each takes a runtime and raises ``AssertionError``."""


def check_runtime(runtime: Runtime) -> None:
    """Run every law; raises ``AssertionError`` with the first sentence that does not hold."""
    for law in RUNTIME_LAWS.values():
        law(runtime)


def _subjects() -> Iterator[_Subject]:
    case = FormatCase()
    for carrier in load_registry().formats.values():
        for specimen in specimens(carrier, case):
            reading = carrier.read(specimen.files, case.kinds_given, specimen.index)
            yield _Subject(f"{carrier.name}: {specimen.label}", specimen.files, reading)
