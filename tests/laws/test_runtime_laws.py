"""Every built-in table of a runtime keeps the laws of ``lorahub.testing``."""

from __future__ import annotations

from dataclasses import replace

import pytest

from lorahub.findings import Verdict
from lorahub.plugins import load_registry
from lorahub.runtimes.runtime import Case, Rule, Runtime
from lorahub.testing import check_runtime
from lorahub.testing.runtimes import rules_can_be_told_apart, rules_say_what_to_do

RULE = Rule(
    code="too-wide",
    level=Verdict.INCOMPATIBLE,
    message="it takes no rank over {value}",
    remedy="lorahub resize {adapter} --rank 8 -o OUT",
    look=lambda _: Case(value="8"),
)
TABLE = Runtime(name="acme", title="Acme", versions="1 to 2", rules=(RULE,))


@pytest.mark.slow
@pytest.mark.parametrize("name", load_registry().runtimes)
def test_a_table_keeps_every_law(name: str) -> None:
    check_runtime(load_registry().runtimes[name])


@pytest.mark.parametrize("runtime", load_registry().runtimes.values(), ids=load_registry().runtimes)
def test_rules_can_be_read_and_told_apart(runtime: Runtime) -> None:
    rules_can_be_told_apart(runtime)
    rules_say_what_to_do(runtime)


def test_a_sound_table_passes() -> None:
    check_runtime(TABLE)


def raises(_subject: object) -> Case:
    raise AssertionError("the rule's own look ran")


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"code": "Too Wide"}, "acme: the code 'Too Wide' is not like 'some-code'"),
        ({"level": Verdict.EXACT}, "a rule that says nothing against an adapter is no rule"),
        ({"remedy": ""}, "a message or a remedy is missing"),
        ({"message": "{value} of {module}"}, "nobody fills module in '{value} of {module}'"),
        ({"look": raises}, "the rule's own look ran"),
    ],
)
def test_a_table_that_breaks_a_law_is_told(change: dict[str, object], sentence: str) -> None:
    with pytest.raises(AssertionError) as told:
        check_runtime(replace(TABLE, rules=(replace(RULE, **change),)))
    assert sentence in str(told.value)


def test_two_rules_of_one_code_and_a_table_of_none_are_told() -> None:
    with pytest.raises(AssertionError, match="2 rules have the code too-wide"):
        check_runtime(replace(TABLE, rules=(RULE, RULE)))
    with pytest.raises(AssertionError, match="a table without rules accepts everything"):
        check_runtime(replace(TABLE, rules=()))
