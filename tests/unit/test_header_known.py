"""Headers read one after the other, the earlier ones remembered: the same headers and the same errors as alone."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorahub.errors import HeaderError
from lorahub.files.header import Header, Known, parse_header


def file(text: str, data: int) -> bytes:
    raw = text.encode()
    return len(raw).to_bytes(8, "little") + raw + b"\0" * data


def parsed(data: bytes, known: Known | None) -> Header | str:
    try:
        return parse_header(lambda at, count: data[at : at + count], len(data), where="x", known=known)
    except HeaderError as error:
        return error.message


def entry(start: int, stop: int) -> dict[str, object]:
    return {"dtype": "U8", "shape": [stop - start], "data_offsets": [start, stop]}


TENSORS = {"a": entry(0, 3), "b": entry(3, 10)}
META = {"__metadata__": {"k": "v"}}
TEXTS = [
    json.dumps(META | TENSORS),
    json.dumps(META | TENSORS, separators=(",", ":")),
    json.dumps({"__metadata__": {"other": "x" * 50}} | TENSORS, separators=(",", ":")) + "   ",
    json.dumps(TENSORS | META, separators=(",", ":")),
    json.dumps({"a": TENSORS["a"]} | META | {"b": TENSORS["b"]}, separators=(",", ":")),
    json.dumps(TENSORS, separators=(",", ":")),
    '{"__metadata__":null,' + json.dumps(TENSORS, separators=(",", ":"))[1:],
    '{"__metadata__":{"k":"v"},' + json.dumps(TENSORS | META, separators=(",", ":"))[1:],
    '{"__metadata__":{"k":"v"}' + json.dumps(TENSORS, separators=(",", ":"))[1:],
    '{"__metadata__":{"k":"v"},,' + json.dumps(TENSORS, separators=(",", ":"))[1:],
    '{"__metadata__":{"k":7},' + json.dumps(TENSORS, separators=(",", ":"))[1:],
    '{"__metadata__":{"k":"v"},"a":' + json.dumps(entry(0, 3)) + "}",
    '{"__metadata__":{"k":"v"}}',
    "{}",
]


@given(st.lists(st.tuples(st.sampled_from(TEXTS), st.sampled_from([0, 3, 9, 10, 11])), max_size=12))
def test_what_is_known_changes_neither_headers_nor_errors(files: list[tuple[str, int]]) -> None:
    known = Known()
    for text, size in files:
        assert parsed(file(text, size), known) == parsed(file(text, size), None)


def test_tensors_of_one_structure_are_shared_whatever_the_metadata_and_the_padding() -> None:
    known = Known()
    body = json.dumps(TENSORS, separators=(",", ":"))[1:]
    headers = [
        parsed(file(f'{{"__metadata__":{{"k":"{"v" * count}"}},{body}{" " * count}', 10), known) for count in range(9)
    ]
    assert all(isinstance(header, Header) for header in headers)
    assert len({id(header.tensors) for header in headers if isinstance(header, Header)}) == 1
    assert len(known.structures) == 1


@pytest.mark.parametrize("size", [9, 11])
def test_a_known_structure_still_has_to_fill_its_file(size: int) -> None:
    known = Known()
    text = json.dumps(META | TENSORS, separators=(",", ":"))
    assert isinstance(parsed(file(text, 10), known), Header)
    assert isinstance(parsed(file(text, size), known), str)
