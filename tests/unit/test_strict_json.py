"""JSON that is read under limits and written in one form."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorahub.strict_json import NotStrict, compact, pretty, read

VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"])),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(st.characters(exclude_categories=["Cs"])), inner),
    max_leaves=20,
)


@given(VALUES)
def test_what_is_written_reads_back_the_same_in_either_form(value: object) -> None:
    for write in (compact, pretty):
        text = write(value)
        assert read(text, limit=len(text.encode())) == json.loads(text) == value
        assert write(read(text, limit=len(text.encode()))) == text


@given(st.dictionaries(st.text(st.characters(exclude_categories=["Cs"])), st.integers(), min_size=2))
def test_the_order_of_keys_makes_no_difference(value: dict[str, int]) -> None:
    other = dict(reversed(list(value.items())))
    assert compact(other) == compact(value)
    assert pretty(other) == pretty(value)


def test_the_two_forms() -> None:
    value = {"b": [1, 2.5], "a": {"é": None}, "long": ["x" * 60, "y" * 60]}
    assert compact(value) == '{"a":{"é":null},"b":[1,2.5],"long":["' + "x" * 60 + '","' + "y" * 60 + '"]}'
    assert pretty(value) == (
        '{\n  "a": {"é": null},\n  "b": [1, 2.5],\n  "long": [\n    "'
        + "x" * 60
        + '",\n    "'
        + "y" * 60
        + '"\n  ]\n}\n'
    )


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "not JSON"),
        ('{"a": 1', "not JSON"),
        ('{"a": 1, "b": {"x": 1, "x": 2}}', "the key 'x' appears twice"),
        ("NaN", "NaN is no finite number"),
        ("[-Infinity]", "-Infinity is no finite number"),
        ("1e999", "1e999 is no finite number"),
        ("1" * 5000, "an integer of 5,000 digits"),
        ("[" * 33 + "]" * 33, "nested deeper than 32 levels"),
        ("[" * 50_000, "nested deeper than 32 levels"),
        ('{"a":' * 50_000, "nested deeper than 32 levels"),
        (b"\xff", "not UTF-8"),
        (b'{"\xef\xbb\xbf', "not JSON"),
        ('"\\ud800"', "half of a surrogate pair"),
        ('"' + "x" * 100_000 + '"', "100,002 bytes are more than the 100,001 allowed"),
    ],
)
def test_what_a_document_may_not_be(text: str | bytes, reason: str) -> None:
    with pytest.raises(NotStrict, match=reason):
        read(text, limit=100_001 if len(text) == 100_002 else 1 << 20)


def test_what_is_allowed_to_the_last_byte_and_level() -> None:
    deepest = "[" * 32 + "]" * 32
    assert read(deepest, limit=64) == json.loads(deepest)


def test_only_finite_numbers_are_written() -> None:
    for write in (compact, pretty):
        with pytest.raises(ValueError, match="float"):
            write({"a": float("nan")})
