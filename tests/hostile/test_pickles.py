"""Pickles that want to run code, take all memory, or are something else: refused, and nothing of them runs."""

from __future__ import annotations

import io
import os
import pickle
import struct
import tarfile
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lorahub.errors import IntegrityError, LorahubError, UnsupportedFormat
from lorahub.files.pickles import PickleLimits, unpack

STORAGE = struct.pack("<4f", 1.0, 2.0, 3.0, 4.0)
MAGIC, VERSION = 0x1950A86A20F9469CFC6C, 1001


def zipped(program: bytes, entries: Mapping[str, bytes] | None = None, *, compress: bool = False) -> bytes:
    """A file as PyTorch writes it, around any pickle."""
    target = io.BytesIO()
    how = zipfile.ZIP_DEFLATED if compress else zipfile.ZIP_STORED
    with zipfile.ZipFile(target, "w", how) as archive:
        archive.writestr("archive/data.pkl", program)
        for name, data in (entries or {"archive/data/0": STORAGE, "archive/version": b"3\n"}).items():
            archive.writestr(name, data)
    return target.getvalue()


def text(value: str) -> bytes:
    raw = value.encode()
    return b"X" + struct.pack("<I", len(raw)) + raw


def number(value: int) -> bytes:
    raw = value.to_bytes(16, "little", signed=True)
    return b"\x8a\x10" + raw


def sizes(*values: int) -> bytes:
    return b"(" + b"".join(map(number, values)) + b"t"


def call(name: str, *arguments: str) -> bytes:
    """``module.name(*arguments)`` as instructions."""
    module, _, attribute = name.rpartition(".")
    return f"c{module}\n{attribute}\n".encode() + b"(" + b"".join(map(text, arguments)) + b"tR"


def member(value: bytes) -> bytes:
    """A pickle of ``{"weight": value}``."""
    return b"\x80\x02}" + text("weight") + value + b"s."


def storage(key: str = "0", count: int = 4, kind: str = "FloatStorage", *, more: bytes = b"") -> bytes:
    return (
        b"(" + text("storage") + f"ctorch\n{kind}\n".encode() + text(key) + text("cpu") + number(count) + more + b"tQ"
    )


def tensor(size: bytes, stride: bytes, *, offset: int = 0, of: bytes | None = None) -> bytes:
    """What makes a tensor in a file of PyTorch."""
    return (
        b"ctorch._utils\n_rebuild_tensor_v2\n("
        + (storage() if of is None else of)
        + number(offset)
        + size
        + stride
        + b"\x89ccollections\nOrderedDict\n)RtR"
    )


GOOD = tensor(sizes(2, 2), sizes(2, 1))
OLD = tensor(sizes(2, 2), sizes(2, 1), of=storage(more=b"N"))  # before 1.6, storages could be views of others

RUNNERS = (
    "__builtin__.eval",
    "asyncio.run",
    "bdb.Bdb",
    "builtins.__import__",
    "builtins.compile",
    "builtins.eval",
    "builtins.exec",
    "builtins.getattr",
    "builtins.open",
    "code.interact",
    "codecs.decode",
    "commands.getoutput",
    "copyreg._reconstructor",
    "ctypes.CDLL",
    "functools.partial",
    "importlib.import_module",
    "marshal.loads",
    "nt.system",
    "operator.attrgetter",
    "os.execv",
    "os.popen",
    "os.system",
    "pathlib.Path.touch",
    "pickle.loads",
    "pip.main",
    "platform.popen",
    "posix.system",
    "pty.spawn",
    "pydoc.pipepager",
    "runpy._run_code",
    "runpy.run_path",
    "shutil.rmtree",
    "socket.create_connection",
    "subprocess.Popen",
    "subprocess.check_output",
    "sys.exit",
    "timeit.timeit",
    "torch.hub.load",
    "torch.load",
    "torch.serialization.add_safe_globals",
    "torch.utils.cpp_extension.load",
    "torch._utils._rebuild_tensor_v2.__globals__",
    "types.CodeType",
    "types.FunctionType",
    "webbrowser.open",
    "zipfile.ZipFile",
)
"""What pickles in the wild call, and what they could."""


@pytest.fixture
def attempt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., LorahubError]:
    """Unpack bytes and give the refusal; a canary and the target folder prove that nothing happened."""
    inside = tmp_path / "work"
    inside.mkdir()
    monkeypatch.chdir(inside)  # every payload would leave its canary here

    def run(content: bytes, *, suffix: str = ".bin", limits: PickleLimits | None = None) -> LorahubError:
        path, target = tmp_path / f"file{suffix}", tmp_path / "target"
        path.write_bytes(content)
        target.mkdir(exist_ok=True)
        with pytest.raises(LorahubError) as refusal:
            unpack(path, target, limits=limits)
        assert list(target.iterdir()) == []
        assert list(inside.iterdir()) == [], "a payload has run"
        assert refusal.value.hint
        return refusal.value

    return run


class Runs:
    """Pickles as a call."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> Any:
        return self.call


def test_the_canary_would_sing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    pickle.loads(pickle.dumps(Runs(os.system, "touch canary")))
    assert (tmp_path / "canary").exists()


@pytest.mark.parametrize("name", RUNNERS)
def test_a_pickle_that_asks_for_code_is_refused_by_the_name_it_asks_for(
    attempt: Callable[..., LorahubError], name: str
) -> None:
    error = attempt(zipped(member(call(name, "touch canary"))))
    assert isinstance(error, UnsupportedFormat)
    assert name in error.message
    assert "nothing of it was run" in error.message


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("wrap", [zipped, bytes], ids=["in a zip", "bare"])
def test_every_protocol_of_pickle_is_seen_through(
    attempt: Callable[..., LorahubError], protocol: int, wrap: Callable[[bytes], bytes]
) -> None:
    for payload in (Runs(os.system, "touch canary"), {"state_dict": [Runs(os.system, "touch canary")]}):
        error = attempt(wrap(pickle.dumps(payload, protocol)))
        assert "system" in error.message


def _hidden() -> dict[str, bytes]:
    run = b"X\x0c\x00\x00\x00touch canary"
    return {
        "names from the memo": member(
            text("posix") + b"q\x01" + text("system") + b"q\x02" + b"h\x01h\x02\x93(" + run + b"tR"
        ),
        "the instruction INST": b"(" + run + b"iposix\nsystem\n.",
        "the instruction OBJ": b"(cposix\nsystem\n" + run + b"o.",
        "an object by NEWOBJ": member(b"csubprocess\nPopen\n(" + run + b"t\x81"),
        "an object with keywords": member(b"csubprocess\nPopen\n(" + run + b"t}\x92"),
        "a state for what was made": member(b"cposix\nsystem\n)\x81}b"),
        "an extension of copyreg": member(b"\x82\x01)R"),
        "beside good tensors": b"\x80\x02}("
        + text("a")
        + GOOD
        + text("b")
        + call("posix.system", "touch canary")
        + b"u.",
        "as a key": b"\x80\x02}" + call("posix.system", "touch canary") + GOOD + b"s.",
        "thrown away": member(call("posix.system", "touch canary") + b"0" + GOOD),
        "as the backward hooks of a tensor": member(
            b"ctorch._utils\n_rebuild_tensor_v2\n("
            + storage()
            + number(0)
            + sizes(4)
            + sizes(1)
            + b"\x89"
            + call("posix.system", "touch canary")
            + b"tR"
        ),
        "as the type of a tensor's class": member(
            b"ctorch._tensor\n_rebuild_from_type_v2\n(cposix\nsystem\nctorch.nn.parameter\nParameter\n(" + run + b"t}tR"
        ),
        "in what comes after a cut": b"\x80\x02}" + text("a") + call("posix.system", "touch canary") + b"s",
    }


@pytest.mark.parametrize("where", _hidden())
def test_code_is_found_wherever_a_pickle_hides_it(attempt: Callable[..., LorahubError], where: str) -> None:
    error = attempt(zipped(_hidden()[where]))
    assert any(name in error.message for name in ("posix.system", "subprocess.Popen", "copyreg.extension 1"))


def _old(*parts: bytes, storages: bytes = b"") -> bytes:
    """A file as PyTorch wrote it before 1.6."""
    names = (pickle.dumps(MAGIC, 2), pickle.dumps(VERSION, 2), pickle.dumps({"little_endian": True}, 2))
    given = list(names)
    for at, part in enumerate(parts):
        given[at : at + 1] = [part] if part else given[at : at + 1]
    return b"".join(given) + storages


NO_KEYS = pickle.dumps([], 2)
KEY = pickle.dumps(["0"], 2)
EVIL = pickle.dumps(Runs(os.system, "touch canary"), 2)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (_old(b"", b"", b"", EVIL, NO_KEYS), "system"),
        (_old(b"", b"", EVIL, member(GOOD), KEY), "system"),
        (_old(b"", EVIL, b"", member(GOOD), KEY), "system"),
        (_old(EVIL, b"", b"", member(GOOD), KEY), "system"),
        (_old(b"", b"", b"", member(GOOD), EVIL), "system"),
        (_old(b"", pickle.dumps(1002, 2), b"", member(GOOD), KEY), "version 1002"),
        (_old(b"", b"", b"", member(GOOD), KEY, storages=struct.pack("<q", 4) + STORAGE[:-1]), "should have"),
        (_old(b"", b"", b"", member(GOOD), KEY, storages=struct.pack("<q", 4) + STORAGE + b"x"), "should have"),
        (_old(b"", b"", b"", member(tensor(sizes(1), sizes(1), of=storage(count=1 << 40))), KEY), "should have"),
        (pickle.dumps(MAGIC, 2), "cut off, or no pickle"),
        (pickle.dumps({"weight": [1.0]}, 2), "none that PyTorch wrote"),
    ],
    ids=["object", "system", "version", "magic", "keys", "other version", "cut", "longer", "huge", "alone", "plain"],
)
def test_files_from_before_the_zip_are_held_to_the_same(
    attempt: Callable[..., LorahubError], content: bytes, says: str
) -> None:
    assert says in attempt(content).message


OUTSIDE = {
    "a size beyond the storage": tensor(sizes(5), sizes(1)),
    "an offset beyond the storage": tensor(sizes(1), sizes(1), offset=4),
    "a stride beyond the storage": tensor(sizes(2, 2), sizes(3, 1)),
    "a negative size": tensor(sizes(-1), sizes(1)),
    "a negative stride": tensor(sizes(2), sizes(-1), offset=1),
    "a negative offset": tensor(sizes(1), sizes(1), offset=-1),
    "one element repeated": tensor(sizes(1 << 40), sizes(0)),
    "fewer strides than sizes": tensor(sizes(2, 2), sizes(1)),
    "sizes that are no numbers": tensor(b"(" + text("2") + b"t", sizes(1)),
    "a storage that is none": tensor(sizes(1), sizes(1), of=text("0")),
    "a storage larger than its record": tensor(sizes(5), sizes(1), of=storage(count=5)),
    "a storage without a record": tensor(sizes(1), sizes(1), of=storage(key="7")),
    "a storage described twice": b"("
    + tensor(sizes(1), sizes(1))
    + tensor(sizes(1), sizes(1), of=storage(count=3))
    + b"t",
    "a storage of an unknown class": tensor(sizes(1), sizes(1), of=storage(kind="OddStorage")),
    "a storage by another sort of id": tensor(sizes(1), sizes(1), of=text("0") + b"Q"),
    "a storage made of nothing": b"ctorch.storage\nUntypedStorage\n" + number(1 << 40) + b"\x85R",
    "a storage's class called": b"ctorch\nFloatStorage\n" + number(1 << 40) + b"\x85R",
    "a dtype called": b"ctorch\nfloat32\n)R",
    "a parameter with a state": b"ctorch.nn.parameter\nParameter\n)\x81(" + storage() + number(0) + sizes(9) + b"tb",
    "a call of a string": text("posix") + b")R",
    "a dtype wider than said": (
        b"ctorch._utils\n_rebuild_tensor_v3\n("
        + storage(kind="ByteStorage", count=16)
        + number(0)
        + sizes(16)
        + sizes(1)
        + b"\x89}ctorch\nfloat64\ntR"
    ),
    "a dtype that is none": (
        b"ctorch._utils\n_rebuild_tensor_v3\n(" + storage() + number(0) + sizes(4) + sizes(1) + b"\x89}ctorch\nSize\ntR"
    ),
    "a tensor of too few arguments": b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage() + b"tR",
}


@pytest.mark.parametrize("what", OUTSIDE)
def test_tensors_that_do_not_lie_in_their_storages_are_refused_before_memory_is_taken(
    attempt: Callable[..., LorahubError], what: str
) -> None:
    assert isinstance(attempt(zipped(member(OUTSIDE[what]))), IntegrityError | UnsupportedFormat)


def _nested(depth: int) -> bytes:
    return b"\x80\x02" + b"]" * depth + GOOD + b"a" * depth + b"."


def _doubled(times: int) -> bytes:
    """A key of ``2 ** times`` values: a tuple of twice the one before, ``times`` times."""
    program = b"\x80\x02})q\x00"
    for level in range(times):
        program += b"0h" + bytes([level]) + b"h" + bytes([level]) + b"\x86q" + bytes([level + 1])
    return program + GOOD + b"s."


def _long_names(count: int, length: int) -> bytes:
    """Many dicts in one list, all with one long key."""
    first, again = text("x" * length) + b"q\x00", b"h\x00"
    inside = b"}" + text("w") + GOOD + b"s"
    return b"\x80\x02](}" + first + inside + b"s" + (b"}" + again + inside + b"s") * (count - 1) + b"e."


def _laughs(depth: int, width: int) -> bytes:
    """Lists of lists of one list: few instructions, ``width ** depth`` values."""
    program = b"\x80\x02](" + GOOD + b"eq\x00"
    for level in range(depth):
        program += b"](" + b"h" + bytes([level]) + (b"h" + bytes([level])) * (width - 1) + b"eq" + bytes([level + 1])
    return program + b"."


@pytest.mark.parametrize(
    ("program", "limits", "says"),
    [
        (_nested(40), None, "nests too deep"),
        (_nested(5000), None, "nests too deep"),
        (_laughs(9, 10), None, "holds too much"),
        (b"\x80\x02})" + b"\x85" * 1_000_000 + GOOD + b"s.", None, "nests tuples"),
        (_doubled(60), None, "nests tuples"),
        (_doubled(30), None, "nests tuples"),
        (_long_names(200, 1 << 20), None, "characters"),
        (b"\x80\x02]q\x00h\x00a.", None, "nests too deep"),
        (b"\x80\x02" + b"(" * 2000 + b"t" * 2000 + b".", None, "nests tuples"),
        (member(GOOD), PickleLimits(steps=10), "more instructions"),
        (member(GOOD), PickleLimits(pickle=10), "holds a pickle of"),
        (member(GOOD), PickleLimits(file=10), "over the limit"),
        (b"\x80\x02](" + GOOD * 9 + b"e.", PickleLimits(tensors=8), "makes 9 tensors"),
        (b"\x80\x02](" + GOOD * 99 + b"e.", PickleLimits(growth=0), "would grow"),
        (b"\x80\x02](" + b"I" + b"9" * 5000 + b"\ne.", None, "no pickle"),
        (b"\x80\x02X\xff\xff\xff\x7f.", None, "no pickle"),
        (b"\x80\x02\x8d\xff\xff\xff\xff\xff\xff\xff\x7f.", None, "no pickle"),
        (b"\x80\x02" + b"0" * 10 + b".", None, "empty stack"),
        (b"\x80\x02h\x05.", None, "memo"),
        (b"\x80\x02Pid\n.", None, "instruction PERSID"),
        (b"\x80\xff.", None, "empty stack"),
        (b"\x80\x04]\x94" + GOOD + b"a.", None, "protocol 4"),
        (member(GOOD)[:-1] + b"\x94.", None, "cannot be loaded: Unsupported operand"),
        (b"\x80\x02}.", None, "no tensors"),
        (b"\x80\x02}" + text("lr") + number(1) + b"s.", None, "no tensors"),
        (b"", None, "no pickle"),
        (b".", None, "empty stack"),
    ],
)
def test_bombs_and_nonsense_are_refused_in_bounded_time(
    attempt: Callable[..., LorahubError], program: bytes, limits: PickleLimits | None, says: str
) -> None:
    error = attempt(zipped(program), limits=limits)
    assert says in error.message, error.message


@pytest.mark.parametrize("cut", [1, 5, 20, 60, 100, 140])
def test_a_pickle_that_is_cut_off_is_refused(attempt: Callable[..., LorahubError], cut: int) -> None:
    assert isinstance(attempt(zipped(member(GOOD)[:-cut])), IntegrityError)


def _tar() -> bytes:
    target = io.BytesIO()
    with tarfile.open(fileobj=target, mode="w") as archive:
        info = tarfile.TarInfo("storages")
        info.size = len(EVIL)
        archive.addfile(info, io.BytesIO(EVIL))
    return target.getvalue()


def _overlapping() -> bytes:
    content = bytearray(zipped(member(GOOD)))
    directory = content.rfind(b"PK\x01\x02")
    content[directory + 42 : directory + 46] = struct.pack("<I", 0)  # the last entry lies where the first one does
    return bytes(content)


def _flagged(flag: int) -> bytes:
    content = bytearray(zipped(member(GOOD)))
    directory = content.find(b"PK\x01\x02")
    content[directory + 8] |= flag
    content[6] |= flag
    return bytes(content)


def _twice() -> bytes:
    target = io.BytesIO()
    with zipfile.ZipFile(target, "w") as archive:
        archive.writestr("archive/data.pkl", member(GOOD))
        with pytest.warns(UserWarning, match="Duplicate name"):
            archive.writestr("archive/data.pkl", EVIL)
    return target.getvalue()


def _commented() -> bytes:
    target = io.BytesIO(zipped(member(GOOD)))
    with zipfile.ZipFile(target, "a") as archive:
        archive.comment = b"a comment"
    return target.getvalue()


DATA = {"archive/data/0": STORAGE}
FILES: Mapping[str, tuple[Callable[[], bytes], type[LorahubError], str]] = {
    "empty": (lambda: b"", IntegrityError, "0 bytes"),
    "a Git LFS pointer": (lambda: b"version https://git-lfs.github.com/spec/v1\n", IntegrityError, "Git LFS pointer"),
    "a web page": (lambda: b"<!doctype html>", UnsupportedFormat, "web page"),
    "an error as JSON": (lambda: b'{"error": "gated"}', UnsupportedFormat, "JSON"),
    "gzip": (lambda: b"\x1f\x8b" + b"\0" * 30, UnsupportedFormat, "gzip"),
    "GGUF": (lambda: b"GGUF" + b"\0" * 30, UnsupportedFormat, "GGUF"),
    "a numpy array": (lambda: b"\x93NUMPY\x01\x00", UnsupportedFormat, "numpy array"),
    "HDF5": (lambda: b"\x89HDF\r\n\x1a\n", UnsupportedFormat, "HDF5"),
    "a tar of an old PyTorch": (_tar, UnsupportedFormat, "tar archive"),
    "nonsense": (lambda: b"\x80" + bytes(range(200)), IntegrityError, "no pickle"),
    "zeros": (lambda: b"\0" * 4096, IntegrityError, "no pickle"),
    "safetensors": (
        lambda: b"\x08\0\0\0\0\0\0\0{}      ",
        UnsupportedFormat,
        "safetensors file under another name",
    ),
    "arrays in a zip": (
        lambda: zipped(b"", {"a.npy": b"\x93NUMPY"}),
        UnsupportedFormat,
        "numpy arrays",
    ),
    "TorchScript": (
        lambda: zipped(member(GOOD), {**DATA, "archive/code/__torch__.py": b"import os"}),
        UnsupportedFormat,
        "TorchScript",
    ),
    "TorchScript's constants": (
        lambda: zipped(member(GOOD), {**DATA, "archive/constants.pkl": EVIL}),
        UnsupportedFormat,
        "TorchScript",
    ),
    "a zip of something else": (
        lambda: zipped(b"", {"readme.txt": b"hello"}).replace(b"data.pkl", b"data.txt"),
        UnsupportedFormat,
        "without PyTorch's data.pkl",
    ),
    "two pickles": (
        lambda: zipped(member(GOOD), {**DATA, "other/data.pkl": EVIL}),
        UnsupportedFormat,
        "without PyTorch's data.pkl",
    ),
    "something beside": (lambda: zipped(member(GOOD), {**DATA, "../evil": b"x"}), IntegrityError, "beside archive/"),
    "packed": (lambda: zipped(member(GOOD) + b"\0" * 9999, compress=True), IntegrityError, "compresses"),
    "a comment": (_commented, IntegrityError, "comment"),
    "an entry twice": (_twice, IntegrityError, "twice"),
    "entries that overlap": (_overlapping, IntegrityError, "overlap"),
    "encrypted": (lambda: _flagged(1), IntegrityError, "zip archive"),
    "big-endian": (
        lambda: zipped(member(GOOD), {**DATA, "archive/byteorder": b"big"}),
        UnsupportedFormat,
        "big-endian",
    ),
    "a zip that is cut off": (lambda: zipped(member(GOOD))[:-30], IntegrityError, "zip archive"),
    "a zip's first half": (lambda: zipped(member(GOOD))[:200], IntegrityError, "zip archive"),
    "only a zip's magic": (lambda: b"PK\x03\x04", IntegrityError, "zip archive"),
}


@pytest.mark.parametrize("what", FILES)
def test_what_is_no_file_of_tensors_is_refused_for_what_it_is(attempt: Callable[..., LorahubError], what: str) -> None:
    make, kind, says = FILES[what]
    for suffix in (".bin", ".pt"):
        error = attempt(make(), suffix=suffix)
        assert isinstance(error, kind)
        assert says in error.message, error.message


class Custom:
    """A class of somebody's own, as checkpoints hold them."""


def _saved(value: Any) -> bytes:
    target = io.BytesIO()
    torch.save(value, target)
    return target.getvalue()


def _objects() -> dict[str, tuple[Any, str]]:
    import numpy as np

    weight = torch.ones(2, 2)
    return {
        "a class": ({"weight": weight, "config": Custom()}, "Custom"),
        "a whole model": (torch.nn.Linear(2, 2), "torch.nn.modules.linear.Linear"),
        "an array": ({"weight": np.ones(3)}, "numpy objects"),
        "a number of numpy": ({"weight": weight, "step": np.float64(1)}, "numpy objects"),
        "a sparse tensor": ({"weight": weight.to_sparse()}, "_rebuild_sparse_tensor"),
        "a tensor without values": ({"weight": torch.empty(2, device="meta")}, "_rebuild_meta_tensor_no_storage"),
        "an expanded tensor": ({"weight": torch.ones(1).expand(1 << 30)}, "repeats"),
        "a path": ({"weight": weight, "where": Path("/etc/passwd")}, "pathlib"),
        "a name that leaves": ({"../weight": weight}, "leaves its folder"),
        "a name with control characters": ({"we\x1bight": weight}, "cannot be printed"),
        "a name that is endless": ({"w" * 5000: weight}, "characters"),
        "two names alike": ({"a": {"b": weight}, "a.b": weight}, "would be called"),
    }


@pytest.mark.parametrize("what", _objects())
def test_what_torch_saves_and_is_no_dense_tensor_is_named(attempt: Callable[..., LorahubError], what: str) -> None:
    value, says = _objects()[what]
    assert says in attempt(_saved(value)).message


def test_a_good_file_of_the_same_make_is_unpacked(tmp_path: Path) -> None:
    (tmp_path / "good.bin").write_bytes(zipped(member(GOOD)))
    (tmp_path / "old.bin").write_bytes(_old(b"", b"", b"", member(OLD), KEY, storages=struct.pack("<q", 4) + STORAGE))
    for name in ("good", "old"):  # or else everything above would be refused for another reason
        assert unpack(tmp_path / f"{name}.bin", tmp_path).read_bytes().endswith(STORAGE)


@settings(max_examples=150)
@given(st.data())
def test_no_change_to_a_good_file_does_anything_but_fail_or_unpack(data: st.DataObject) -> None:
    import tempfile

    content = bytearray(zipped(member(GOOD)))
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(content) - 1))
        content[at] = data.draw(st.integers(0, 255))
    with tempfile.TemporaryDirectory() as place:
        (Path(place) / "file.bin").write_bytes(content)
        try:
            unpack(Path(place) / "file.bin", place)
        except LorahubError:
            assert [path.name for path in Path(place).iterdir()] == ["file.bin"]
