"""Headers in the usual words: the quick reader accepts a part of what the scanner accepts, with the same result."""

from __future__ import annotations

import json
import time
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorahub.errors import HeaderError
from lorahub.files import header as scanning
from lorahub.files import tiles
from lorahub.files.entries import Limits, Tensors
from lorahub.files.grammar import Malformed, Scanner
from lorahub.files.header import parse_header
from lorahub.files.tiles import Known, tiled

FORMS = [("F32", [2, 3], 24), ("F16", [], 2), ("BF16", [4, 1, 1], 8), ("U8", [0], 0), ("BOOL", [3], 3), ("I64", [1], 8)]
NAMES = [
    "a",
    "lora_unet_x.alpha",
    "m.lora_A.weight",
    "é",
    "a b",
    "q\\u00e9",
    '\\"',
    "x/y",
    "",
    "../x",
    "__metadata__",
    "a\x01",
]


def scanned(text: str, limits: Limits) -> Tensors | None:
    """What the scanner makes of the same tensors."""
    try:
        listed, metadata = scanning._walk(Scanner("{" + text[1:]), limits)
        assert not metadata
        return scanning._contiguous(listed)
    except Malformed:
        return None


def agrees(text: str, limits: Limits | None = None, known: Known | None = None) -> bool:
    """Whether the quick reader says nothing, or the same; and whether it says anything."""
    limits = limits or Limits()
    quick = tiled(text, limits, Known(limits) if known is None else known)
    if quick is not None:
        slow = scanned(text, limits)
        assert slow is not None, text
        assert [*quick.items()] == [*slow.items()]
        assert quick.end == slow.end
    return quick is not None


@st.composite
def spelled(draw: st.DrawFn) -> str:
    """A header's tensors as the safetensors library spells them, most of the time sound."""
    entries, at = [], 0
    for name in draw(st.lists(st.sampled_from(NAMES), min_size=1, max_size=6, unique=draw(st.booleans()))):
        dtype, shape, size = draw(st.sampled_from(FORMS))
        entries.append(
            f'"{name}":{{"dtype":"{dtype}","shape":{json.dumps(shape, separators=(",", ":"))},'
            f'"data_offsets":[{at},{at + size}]}}'
        )
        at += size
    if draw(st.booleans()):
        entries = draw(st.permutations(entries))
    return f",{','.join(entries)}}}"


@given(spelled())
def test_what_the_quick_reader_accepts_the_scanner_accepts_too(text: str) -> None:
    agrees(text)


@given(spelled(), st.data())
def test_so_does_it_where_a_header_was_changed(text: str, data: st.DataObject) -> None:
    known = Known()
    agrees(text, known=known)
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(text)))
        cut = data.draw(st.integers(0, 3))
        piece = data.draw(
            st.sampled_from(["", "0", "1", "-", ",", '"', "{", "}", "[", "]", " ", "\\", "e", "a", ".", "null"])
        )
        text = text[:at] + piece + text[at + cut :]
    agrees(text, known=known)


@given(spelled())
def test_what_the_scanner_accepts_in_usual_words_is_read_quickly(text: str) -> None:
    if '\\"' not in text:  # a name with a quote in it is left to the scanner
        assert agrees(text) == (scanned(text, Limits()) is not None)


def entry(name: str, start: int, stop: int, form: str = '"dtype":"U8","shape":[{}]') -> str:
    return f',"{name}":{{{form.format(stop - start)},"data_offsets":[{start},{stop}]}}'


@pytest.mark.parametrize(
    "text",
    [
        ",}",
        "}",
        entry("a", 0, 3) + "} ",
        entry("a", 0, 3) + "}}",
        entry("a", 0, 3),
        entry("a", 0, 3).replace("0,3", "00,3") + "}",
        entry("a", 0, 3).replace("],", "]") + "}",
        entry("a", 0, 3).replace("],", "],,") + "}",
        entry("a", 0, 3).replace("0,3", "0,+3") + "}",
        entry("b", 3, 5) + entry("a", 0, 3).replace("0,3", "0,+3") + "}",
        entry("b", 3, 5) + entry("a", 0, 3).replace("0,3", "0,3,3") + "}",
        entry("b", 3, 5) + entry("a", 0, 3).replace("0,3", "") + "}",
        entry("b", 3, 5) + entry("a", 0, 3).replace("0,3", f"0,{'9' * 5000}") + "}",
        entry("a", 0, 3).replace("0,3]}", "0,3]},3,5]}") + entry("b", 3, 5).replace("3,5]}", "") + "}",
        entry("a", 0, 3).replace("0,3", "0,03") + "}",
        entry("a", 1, 4) + "}",
        entry("a", 0, 3) + entry("b", 2, 5) + "}",
        entry("a", 0, 3) + entry("b", 4, 5) + "}",
        entry("a", 0, 3) + entry("a", 3, 5) + "}",
        entry("a", 0, 3) + entry("\\u0061", 3, 5) + "}",
        entry("a", 0, 3, '"dtype":"U9","shape":[{}]') + "}",
        entry("a", 0, 3, '"dtype":"F4","shape":[7]') + "}",
        entry("a", 0, 3, '"dtype":"U8","shape":[03]') + "}",
        entry("a", 0, 3, '"dtype":"U8","shape":[3,]') + "}",
        entry("a", 0, 0, '"dtype":"U8","shape":[0,4294967296,4294967296]') + "}",
        entry("a", 0, 3, '"dtype":"U8","shape":[99999999999999999999]') + "}",
    ],
)
def test_what_is_not_sound_is_left_to_the_scanner(text: str) -> None:
    assert not agrees(text)


def test_limits_hold_for_what_is_known_too() -> None:
    known = Known()
    text = entry("abcdef", 0, 3) + entry("b", 3, 4) + "}"
    for limits, fine in ((Limits(), True), (Limits(name=3), False), (Limits(tensors=1), False)):
        data = b"{" + text[1:].encode()
        file = len(data).to_bytes(8, "little") + data + b"1234"
        read: Callable[[int, int], bytes] = lambda at, count, file=file: file[at : at + count]  # noqa: E731
        if fine:
            assert len(parse_header(read, len(file), where="x", limits=limits, known=known).tensors) == 2
            continue
        with pytest.raises(HeaderError):
            parse_header(read, len(file), where="x", limits=limits, known=known)


def test_names_and_forms_that_are_remembered_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiles, "_NAMES", 8)
    monkeypatch.setattr(tiles, "_FORMS", 4)
    known = Known()
    for number in range(50):
        assert agrees(entry(f"n{number}", 0, number) + entry(f"m{number}", number, number + 1) + "}", known=known)
        assert len(known.names) <= 8
        assert len(known.forms) <= 6


@pytest.mark.parametrize(
    "piece", [',"', ',"a":{', "{", '"', ',"a":{"dtype":"F16","shape":[', ',"a":{"dtype":"', "],", '],"data_offsets":[']
)
def test_no_text_takes_more_than_time_in_proportion(piece: str) -> None:
    def steps(length: int) -> float:
        text = piece * (length // len(piece)) + '],"data_offsets":[0,1]}}'
        begin = time.process_time()
        assert tiled(text, Limits(tensors=10**9), Known()) is None
        return time.process_time() - begin

    steps(1 << 10)
    assert steps(1 << 20) < 5  # seconds; in proportion to the square it would be hours
