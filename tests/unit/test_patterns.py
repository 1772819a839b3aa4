"""Module-name patterns answer as ``re`` does, without its worst case."""

from __future__ import annotations

import re

import pytest
from hypothesis import given, reject, settings
from hypothesis import strategies as st

from lorahub.deltas import patterns
from lorahub.deltas.patterns import first_match, full_match
from lorahub.errors import UnsupportedKind

MODULE = "model.layers.0.self_attn.q_proj"


def by_re(keys: list[str], module: str) -> str | None:
    """PEFT's own rule."""
    return next((key for key in keys if re.match(rf"(.*\.)?({key})$", module)), None)


@pytest.mark.parametrize(
    "key",
    [
        "q_proj",
        "proj",
        "self_attn.q_proj",
        "selfXattn.q_proj",
        "layers.0.self.attn.q_proj",
        "model.layers.0.self_attn.q_proj",
        "x.model.layers.0.self_attn.q_proj",
        "^model.layers.0.self_attn.q_proj",
        "^layers.0.self_attn.q_proj",
        r"^model\.layers\.0\.self_attn\.q_proj$",
        r"model\.layers\.0\.self\.attn\.q_proj",
        r".*\.q_proj",
        r"layers\.\d+\.self_attn\.(q|v)_proj",
        r"layers\.[1-9]\..*",
        r"layers\.[0-9]{1,2}\..*",
        "",
        ".*",
        "k_proj|q_proj",
        "^q_proj|self_attn.q_proj",
    ],
)
def test_a_key_is_found_where_peft_finds_it(key: str):
    assert first_match([key], MODULE, field="rank_pattern") == by_re([key], MODULE)


def test_the_first_key_in_the_order_of_the_file_wins():
    keys = ["k_proj", "q_proj", MODULE]
    assert first_match(keys, MODULE, field="rank_pattern") == "q_proj"
    assert first_match(reversed(keys), MODULE, field="rank_pattern") == MODULE


CHARS = st.sampled_from(
    ["a", "b", "1", "_", "-", ".", r"\.", "[ab]", "[^a]", r"[\d.]", "[a-b1]", r"\d", r"\w", r"\S", "^", "$"]
)
REPEATS = st.sampled_from(["", "", "", "*", "+", "?", "*?", "{2}", "{1,}", "{,2}", "{0,1}", "{,}", "{", "{}"])


def larger(inner: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    group = st.sampled_from(["(", "(?:"])
    return st.one_of(
        st.tuples(inner, inner).map("".join),
        st.tuples(inner, inner).map("|".join),
        st.tuples(group, inner, st.just(")"), REPEATS).map("".join),
    )


SMALL = st.tuples(CHARS, REPEATS).map("".join)


@settings(deadline=None)
@given(pattern=st.recursive(SMALL, larger, max_leaves=5), module=st.text("ab1_-.x", max_size=7))
def test_every_understood_pattern_answers_as_re_does(pattern: str, module: str):
    try:
        found = full_match(pattern, module, field="f"), first_match([pattern], module, field="f")
    except UnsupportedKind as refusal:
        if re.search("repeats an anchor|possessive|repeats a repetition", refusal.message):
            reject()  # some of these ``re`` allows
        raise
    assert found == (re.fullmatch(pattern, module) is not None, by_re([pattern], module))


@settings(deadline=None)
@given(key=st.text("ab.-_1", min_size=1, max_size=4), module=st.text("ab.-_1", max_size=8), anchored=st.booleans())
def test_plain_names_answer_as_re_does(key: str, module: str, anchored: bool):
    key = f"^{key}$" if anchored else key
    assert first_match([key], module, field="f") == by_re([key], module)
    assert first_match([re.escape(key)], module, field="f") == by_re([re.escape(key)], module)


def test_a_pattern_that_explodes_under_backtracking_takes_few_steps():
    automaton = patterns._automaton("(a+)+$", "f", suffix=True)
    entered = 0

    class Counting(tuple):
        __slots__ = ()

        def __getitem__(self, at):
            nonlocal entered
            entered += 1
            return tuple.__getitem__(self, at)

    name = "a" * 2000 + "b"
    assert not patterns._Automaton(Counting(automaton.steps)).accepts(name)
    assert entered <= 4 * len(automaton.steps) * (len(name) + 1)
    assert first_match(["(a+)+$"], name, field="f") is None
    assert first_match(["(a|a)*b", "(a+)+$"], name, field="f") == "(a|a)*b"


@pytest.mark.parametrize(
    ("pattern", "why"),
    [
        (r"(a)\1", r"'\1'"),
        (r"\bword", r"'\b'"),
        ("(?=a)a", "group extension"),
        ("(?i)a", "group extension"),
        ("(?P<name>a)", "group extension"),
        ("a*+", "possessive"),
        ("a**", "repeats a repetition"),
        ("*a", "repeats nothing"),
        ("a|{2}", "repeats nothing"),
        ("^*", "repeats an anchor"),
        ("a{3,2}", "exchanged"),
        ("(a", "does not close"),
        ("a)", "not opened"),
        ("a)|(b", "not opened"),
        ("[a", "ends too early"),
        ("a\\", "ends too early"),
        ("[b-a]", "no range"),
        (r"[\d-z]", "no range"),
        ("(" * 50 + "a" + ")" * 50, "deeper"),
        ("((a{999}){999}){999}", "repeats too much"),
        ("a" * 30_000, "longer"),
    ],
)
def test_what_is_not_understood_is_refused_with_field_pattern_and_reason(pattern: str, why: str):
    with pytest.raises(UnsupportedKind) as caught:
        first_match([pattern], MODULE, field="alpha_pattern")
    assert caught.value.message.startswith("alpha_pattern: the pattern '")
    assert why in caught.value.message
    assert len(caught.value.message) < 250
