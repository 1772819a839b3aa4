"""Whatever bytes are called .safetensors, reading their header gives a sound header or one HeaderError."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import deserialize

from lorahub.errors import HeaderError
from lorahub.files.header import parse_header, read_header


def framed(text: str | bytes, data: bytes = b"", *, length: int | None = None) -> bytes:
    raw = text.encode() if isinstance(text, str) else text
    return (len(raw) if length is None else length).to_bytes(8, "little") + raw + data


def item(dtype: str, shape: str, offsets: str) -> str:
    return f'{{"dtype":"{dtype}","shape":{shape},"data_offsets":{offsets}}}'


def one(name='"a"', dtype='"U8"', shape="[4]", offsets="[0,4]", *, extra="", data=b"1234") -> bytes:
    return framed(f'{{{name}:{{"dtype":{dtype},"shape":{shape},"data_offsets":{offsets}{extra}}}}}', data)


def two(first: str, second: str, data: bytes, shape="[4]") -> bytes:
    entries = (f'"{name}":{item("U8", shape, at)}' for name, at in (("a", first), ("b", second)))
    return framed("{" + ",".join(entries) + "}", data)


def meta(text: str) -> bytes:
    return framed(f'{{"__metadata__":{text}}}')


GOOD = one()
HUGE = str(2**63)

# name -> (content, what the message says)
MALFORMED: dict[str, tuple[bytes, str]] = {
    # not a safetensors file at all
    "empty": (b"", "empty"),
    "one byte": (b"\x08", "1 bytes, too few"),
    "seven bytes": (b"\x02\0\0\0\0\0\0", "7 bytes, too few"),
    "length alone": (bytes(8), "does not begin"),
    "zeros": (bytes(64), "does not begin"),
    "lfs pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 9\n", "Git LFS pointer"),
    "zip": (b"PK\x03\x04\0\0\x08\x08" + bytes(64), "PyTorch pickle"),
    "old pickle": (b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19." + bytes(64), "pickle"),
    "length that begins as a pickle does": (framed("{}", length=0x280), "cut off"),
    "length that begins as JSON does": (framed("{}", length=0x227B), "cut off"),
    "pickle": (b"\x80\x04\x95\x10\0\0\0\0\0\0\0}." + bytes(64), "pickle"),
    "gguf": (b"GGUF\x03\0\0\0" + bytes(64), "GGUF"),
    "html": (b"<!doctype html><html><body>404</body></html>", "web page"),
    "bare json": (b'{"error":"Repository not found"}', "without the length"),
    "random text": (b"hello, this is not it at all", "cut off, or not safetensors"),
    # the length
    "length beyond the file": (framed("{}", length=3), "cut off"),
    "length of 2**64-1": (b"\xff" * 8 + b"{}", "cut off"),
    "length of 2**63": ((2**63).to_bytes(8, "little") + b"{}", "cut off"),
    "length over the limit": (framed("{}" + " " * (8 << 20)), "over the limit"),
    "length too short": (framed('{"__metadata__":{}}', length=10), "not JSON"),
    "length in big-endian": (len(b"{}").to_bytes(8, "big") + b"{}", "cut off"),
    "header cut off": (GOOD[:30], "cut off"),
    # the text
    "not utf-8": (framed(b'{"\xff":1}'), "not UTF-8"),
    "utf-16": (framed('{"a":1}'.encode("utf-16")), "does not begin"),
    "byte order mark": (framed(b"\xef\xbb\xbf{}"), "does not begin"),
    "blank first": (framed(" {}"), "does not begin"),
    "array": (framed("[]"), "does not begin"),
    "null": (framed("null"), "does not begin"),
    "unclosed": (framed("{"), "not a string"),
    "key without value": (framed('{"a"}'), "':' was expected"),
    "value missing": (framed('{"a":}'), "not JSON"),
    "trailing comma": (framed('{"a":{"dtype":"U8","shape":[0],"data_offsets":[0,0]},}'), "not a string"),
    "comma first": (framed("{,}"), "not a string"),
    "two objects": (framed("{}{}"), "goes on after its end"),
    "nul after the end": (framed("{}\0\0"), "goes on after its end"),
    "single quotes": (framed("{'a':1}"), "not a string"),
    "comment": (framed("{/**/}"), "not a string"),
    "unquoted key": (framed("{a:1}"), "not a string"),
    "unclosed string": (framed('{"a'), "not JSON"),
    "bad escape": (framed(r'{"\x":1}'), "not JSON"),
    "raw newline in a name": (framed('{"a\nb":1}'), "not JSON"),
    "deep arrays": (framed('{"a":' + "[" * 100_000 + "]" * 100_000 + "}"), "nested too deeply"),
    "deep objects": (framed('{"a":' * 100_000 + "1" + "}" * 100_000), "nested too deeply|longer than"),
    "deep metadata": (meta('{"a":' * 100_000 + "1" + "}" * 100_000), "not a string"),
    # duplicates
    "tensor twice": (two("[0,4]", "[0,4]", b"1234").replace(b'"b"', b'"a"'), "appears twice"),
    "tensor twice by escape": (
        framed(r'{"a":{"dtype":"U8","shape":[0],"data_offsets":[0,0]},"\u0061":{}}'),
        "appears twice",
    ),
    "metadata twice": (framed('{"__metadata__":{},"__metadata__":{}}'), "appears twice"),
    "metadata key twice": (meta('{"k":"1","k":"2"}'), "appears twice"),
    "field twice": (one(extra=',"dtype":"U8"'), "appears twice"),
    # entries
    "entry null": (framed('{"a":null}'), "is no object"),
    "entry number": (framed('{"a":1}'), "is no object"),
    "entry string": (framed('{"a":"U8"}'), "is no object"),
    "entry array": (framed('{"a":["U8",[4],[0,4]]}', b"1234"), "is no object"),
    "entry true": (framed('{"a":true}'), "is no object"),
    "entry empty": (framed('{"a":{}}'), "has the fields"),
    "dtype missing": (framed('{"a":{"shape":[4],"data_offsets":[0,4]}}', b"1234"), "has the fields"),
    "shape missing": (framed('{"a":{"dtype":"U8","data_offsets":[0,4]}}', b"1234"), "has the fields"),
    "offsets missing": (framed('{"a":{"dtype":"U8","shape":[4]}}', b"1234"), "has the fields"),
    "field unknown": (one(extra=',"strides":[1]'), "has the fields"),
    "entry too long": (one(shape="[" + "1," * 3000 + "4]"), "longer than"),
    # dtype
    "dtype unknown": (one(dtype='"F31"'), "unknown dtype"),
    "dtype in lower case": (one(dtype='"u8"'), "unknown dtype"),
    "dtype of torch": (one(dtype='"torch.uint8"'), "unknown dtype"),
    "dtype empty": (one(dtype='""'), "unknown dtype"),
    "dtype null": (one(dtype="null"), "unknown dtype"),
    "dtype number": (one(dtype="8"), "unknown dtype"),
    "dtype list": (one(dtype='["U8"]'), "unknown dtype"),
    "dtype object": (one(dtype="{}"), "unknown dtype"),
    "dtype wider than its bytes": (one(dtype='"F32"'), "data_offsets span 4"),
    "dtype not in whole bytes": (one(dtype='"F4"', shape="[7]"), "takes 3.5 bytes"),
    # shape
    "shape null": (one(shape="null"), "no list of sizes"),
    "shape number": (one(shape="4"), "no list of sizes"),
    "shape string": (one(shape='"4"'), "no list of sizes"),
    "shape of strings": (one(shape='["4"]'), "no list of sizes"),
    "shape nested": (one(shape="[[4]]"), "no list of sizes"),
    "shape negative": (one(shape="[-4]"), "no list of sizes"),
    "shape twice negative": (one(shape="[-2,-2]"), "no list of sizes"),
    "shape true": (one(shape="[true,4]"), "no list of sizes"),
    "shape float": (one(shape="[4.0]"), "not an integer"),
    "shape exponent": (one(shape="[4e0]"), "not an integer"),
    "shape NaN": (one(shape="[NaN]"), "not an integer"),
    "shape Infinity": (one(shape="[Infinity]"), "not an integer"),
    "shape minus Infinity": (one(shape="[-Infinity]"), "not an integer"),
    "shape null inside": (one(shape="[null]"), "no list of sizes"),
    "shape with leading zero": (one(shape="[04]"), "not JSON"),
    "shape overflowing": (one(shape=f"[{2**62},4]"), "too large to count"),
    "shape overflowing to the right size": (one(shape=f"[{2**32},{2**32},4]", offsets="[0,0]", data=b""), "too large"),
    "shape overflowing around a zero": (one(shape=f"[0,{2**62},{2**62}]", offsets="[0,0]", data=b""), "too large"),
    "shape of 2**63": (one(shape=f"[{HUGE}]"), "too large to count"),
    "shape of twenty digits": (one(shape="[10000000000000000000]"), "is too large"),
    "shape of four thousand digits": (one(shape=f"[{'9' * 4000}]"), "too large"),
    "shape smaller than its bytes": (one(shape="[3]"), "data_offsets span 4"),
    "shape of zero with bytes": (one(shape="[0]"), "data_offsets span 4"),
    # offsets
    "offsets null": (one(offsets="null"), "no .start, stop."),
    "offsets empty": (one(offsets="[]"), "no .start, stop."),
    "offsets single": (one(offsets="[4]"), "no .start, stop."),
    "offsets three": (one(offsets="[0,4,4]"), "no .start, stop."),
    "offsets object": (one(offsets='{"0":4}'), "no .start, stop."),
    "offsets reversed": (one(offsets="[4,0]"), "no .start, stop."),
    "offsets negative": (one(offsets="[-4,0]"), "no .start, stop."),
    "offsets false": (one(offsets="[false,4]"), "no .start, stop."),
    "offsets float": (one(offsets="[0.0,4.0]"), "not an integer"),
    "offsets string": (one(offsets='["0","4"]'), "no .start, stop."),
    "offsets huge": (one(offsets=f"[{2**62},{2**62 + 4}]"), "leaves a hole after the start"),
    "offsets of twenty digits": (one(offsets="[0,99999999999999999999]"), "too large"),
    "offsets into the header": (one(offsets="[-50,-46]"), "no .start, stop."),
    # the data
    "data cut off": (GOOD[:-1], "cut off: 1 of 4"),
    "data absent": (GOOD[:-4], "cut off: 4 of 4"),
    "trailing byte": (GOOD + b"x", "1 bytes follow"),
    "trailing data without tensors": (framed("{}", b"hidden"), "6 bytes follow"),
    "hole at the start": (one(offsets="[1,5]", data=b"12345"), "leaves a hole after the start"),
    "hole between": (two("[0,4]", "[5,9]", b"123456789"), "leaves a hole after 'a'"),
    "overlap": (two("[0,4]", "[2,6]", b"123456"), "overlaps 'a'"),
    "the same bytes twice": (two("[0,4]", "[0,4]", b"1234"), "overlaps"),
    "empty tensor inside another": (
        framed(f'{{"a":{item("U8", "[4]", "[0,4]")},"b":{item("U8", "[0]", "[2,2]")}}}', b"1234"),
        "overlaps",
    ),
    "empty tensor beyond the end": (one(shape="[0]", offsets="[9,9]", data=b""), "leaves a hole"),
    # metadata
    "metadata nullified": (meta("nullx"), "',' or '}' was expected"),
    "metadata null twice": (framed('{"__metadata__":null,"__metadata__":null}'), "appears twice"),
    "metadata string": (meta('"x"'), "'{' was expected"),
    "metadata array": (meta("[]"), "'{' was expected"),
    "metadata value number": (meta('{"k":1}'), "is not a string"),
    "metadata value null": (meta('{"k":null}'), "is not a string"),
    "metadata value true": (meta('{"k":true}'), "is not a string"),
    "metadata value object": (meta('{"k":{}}'), "is not a string"),
    "metadata value half a surrogate": (meta(r'{"k":"\ud800"}'), "surrogate"),
    "metadata key half a surrogate": (meta(r'{"\udfff":"v"}'), "surrogate"),
    "metadata too large": (meta(f'{{"k":"{"v" * (1 << 20)}"}}'), "takes more than"),
    "metadata too large in sum": (
        meta("{" + ",".join(f'"{number}":"{"v" * 10_000}"' for number in range(110)) + "}"),
        "takes more than",
    ),
    "metadata too large in bytes": (meta(f'{{"k":"{"ü" * 600_000}"}}'), "takes more than"),
    # names
    "name empty": (one(name='""'), "is empty"),
    "name with NUL": (one(name=r'"a\u0000b"'), "cannot be printed"),
    "name with newline": (one(name=r'"a\nb"'), "cannot be printed"),
    "name with escape sequence": (one(name=r'"\u001b]0;owned\u0007"'), "cannot be printed"),
    "name with delete": (one(name='"a\x7fb"'), "cannot be printed"),
    "name written right to left": (one(name=r'"a\u202eb"'), "cannot be printed"),
    "name with zero-width space": (one(name=r'"a\u200bb"'), "cannot be printed"),
    "name half a surrogate": (one(name=r'"\ud800"'), "surrogate"),
    "name climbing": (one(name='"../../etc/passwd"'), "leaves its folder"),
    "name climbing inside": (one(name='"a/../../b"'), "leaves its folder"),
    "name of two dots": (one(name='".."'), "leaves its folder"),
    "name absolute": (one(name='"/etc/passwd"'), "leaves its folder"),
    "name with backslash": (one(name=r'"a\\..\\b"'), "leaves its folder"),
    "name too long": (one(name=f'"{"a" * 1025}"'), "1025 characters"),
    # numbers of things
    "too many tensors": (
        framed("{" + ",".join(f'"{number:x}":{item("U8", "[0]", "[0,0]")}' for number in range(100_001)) + "}"),
        "more than 100000 tensors",
    ),
}  # fmt: skip


def test_there_are_enough_malformed_files_and_no_two_alike():
    contents = [content for content, _ in MALFORMED.values()]
    assert len(contents) == len(set(contents)) >= 60


@pytest.mark.parametrize("name", MALFORMED)
def test_a_malformed_file_is_one_header_error_that_says_what_is_wrong_and_what_now(name, tmp_path):
    content, reason = MALFORMED[name]
    path = tmp_path / "it.safetensors"
    path.write_bytes(content)
    with pytest.raises(HeaderError) as caught:
        read_header(path)
    assert type(caught.value) is HeaderError
    where, _, what = caught.value.message.partition(": ")
    assert where == str(path)
    assert re.search(reason, what)
    assert what.isascii(), "a foreign name would reach the terminal unescaped"
    assert what.isprintable()
    assert len(what) < 500
    assert caught.value.hint


def outcome(content):
    """The header, or the HeaderError; anything else escapes."""
    try:
        return parse_header(lambda offset, length: content[offset : offset + length], len(content), where="it")
    except HeaderError as error:
        return error


def proven(content):
    """Read the header; where one is given, it must be true of the bytes and the reference must agree."""
    header = outcome(content)
    if isinstance(header, HeaderError):
        return
    assert header.size == len(content)
    end = header.data_start
    for name in header.tensors:
        offset, length = header.span(name)
        assert offset == end
        end += length
    assert end == len(content)
    reference = {name: (view["dtype"], view["shape"], bytes(view["data"])) for name, view in deserialize(content)}
    assert reference == {
        name: (info.dtype, list(info.shape), content[header.data_start + info.start : header.data_start + info.stop])
        for name, info in header.tensors.items()
    }


def test_a_file_cut_anywhere_is_one_header_error():
    for stop in range(len(GOOD)):
        assert isinstance(outcome(GOOD[:stop]), HeaderError)
    assert not isinstance(outcome(GOOD), HeaderError)


SEEDS = [
    GOOD,
    two("[0,4]", "[4,8]", b"12345678"),
    framed('{"__metadata__":{"format":"pt","k":"v"},"s":{"dtype":"F32","shape":[],"data_offsets":[0,4]}}', b"1234"),
    framed(f'{{"a.b":{item("BF16", "[2,1]", "[0,4]")},"e":{item("I64", "[0]", "[4,4]")}}}  ', b"1234"),
]
TOKENS = [
    *(bytes([char]) for char in b'{}[]:,"01- \n\0\xff\\'),
    *(b"1e9", b"NaN", b"null", b"true", b"{}", b"[]", b"[0,4]", b"../", b"9" * 30, b"[" * 500, b"\\u0000", b"\\ud800"),
    *(b'"a"', b'"F32"', b'"F4"', b'"dtype"', b'"shape"', b'"data_offsets"', b'"__metadata__"'),
]


@st.composite
def mutated(draw):
    """A good file with a few tokens inserted, replaced or removed; its length field usually made right again."""
    seed = draw(st.sampled_from(SEEDS))
    length = int.from_bytes(seed[:8], "little")
    text, data = seed[8 : 8 + length], seed[8 + length :]
    for _ in range(draw(st.integers(1, 4))):
        start = draw(st.integers(0, len(text)))
        stop = draw(st.integers(start, min(len(text), start + 12)))
        new = draw(st.one_of(st.just(b""), st.sampled_from(TOKENS), st.binary(max_size=3)))
        text = text[:start] + new + text[stop:]
    data = draw(st.sampled_from([data, data, data, data + b"x", data[:-1], b""]))
    return framed(text, data, length=draw(st.sampled_from([None, None, None, None, len(text) + 1, 0, 2**40])))


@settings(max_examples=400, deadline=None)
@given(mutated())
def test_a_mutated_header_is_refused_or_true(content):
    proven(content)


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=200))
def test_random_bytes_are_refused_or_true(content):
    proven(content)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=12,
)
NAME = st.sampled_from(["a", "b", "__metadata__", "x/../y"]) | st.text(max_size=4)
FIELD = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["U8", "F32", "F4", "BOOL"]) | VALUES,
        "shape": st.lists(st.integers(-1, 5), max_size=3) | VALUES,
        "data_offsets": st.lists(st.integers(-1, 9), min_size=2, max_size=2) | VALUES,
    }
)


@settings(max_examples=200, deadline=None)
@given(st.dictionaries(NAME, FIELD | VALUES, max_size=3))
def test_any_json_is_refused_or_true(header):
    text = json.dumps(header)
    for size in (0, 4, 8):
        proven(framed(text, bytes(size)))


BOMBS = """
import resource, sys
from lorahub.errors import HeaderError
from lorahub.files.header import parse_header

FULL = 8 << 20
ENTRY = '{"dtype":"U8","shape":[0],"data_offsets":[0,0]}'

def filled(start, part, end):
    return start + part * ((FULL - len(start) - len(end)) // len(part)) + end

bombs = {
    "lists": filled('{"a":[', "[],", "1]}"),
    "lists as a shape": filled('{"a":{"dtype":"U8","data_offsets":[0,0],"shape":[', "[],", "0]}}"),
    "objects": filled('{"a":[', "{},", "1]}"),
    "numbers": filled('{"a":[', "12345,", "1]}"),
    "strings": filled('{"a":["', 'ab","', '"]}'),
    "brackets": filled('{"a":', "[", ""),
    "one metadata value": filled('{"__metadata__":{"k":"', "v", '"}}'),
    "escapes": filled('{"__metadata__":{"k":"', "\\u0076", '"}}'),
    "metadata keys": filled('{"__metadata__":{', '"":"",', '"k":"v"}}'),
    "one name": filled('{"', "n", '":1}'),
    "tiny tensors": "{" + ",".join(f'"{n:x}":{ENTRY}' for n in range(140_000)) + "}",
    "blanks": filled("{", " ", "}x"),
}
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for name, text in bombs.items():
    content = len(text).to_bytes(8, "little") + text.encode()
    try:
        parse_header(lambda offset, length: content[offset : offset + length], len(content), where=name)
    except HeaderError as error:
        continue
    sys.exit(f"{name} was accepted")
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""


def test_no_header_within_the_limits_makes_the_reader_use_much_memory():
    ran = subprocess.run(
        [sys.executable, "-c", BOMBS], check=True, capture_output=True, text=True, cwd=Path(__file__).parents[2]
    )
    used = float(ran.stdout)  # MiB; json.loads takes more than 150 for the lists alone
    assert used < 100
