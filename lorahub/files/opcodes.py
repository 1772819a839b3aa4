"""What a pickle would build, told from its instructions without carrying out a single one.

A pickle is a program for a small stack machine.  Here that machine runs with nothing behind it: a name stays a name, a
call is written down and never made, and containers are one opaque value.  What comes out is every name the program
asks for, every storage and how every tensor lies in one, so all limits are tested before anything is built.  Knows the
instructions (the standard library's table) and how PyTorch writes tensors; opens no file.
"""

from __future__ import annotations

import io
import pickletools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, TypeAlias

from lorahub.files.storages import DTYPES, ITEMS, Storage, View

__all__ = ["HARMLESS", "NotAProgram", "Program", "trace"]

_TENSORS: Mapping[str, tuple[int, int]] = MappingProxyType(
    {"_rebuild_tensor": (4, 4), "_rebuild_tensor_v2": (6, 7), "_rebuild_tensor_v3": (7, 8)}
)
"""How PyTorch makes a tensor from (storage, offset, size, stride, ...) -> least and most arguments."""

_DICT = "collections.OrderedDict"

_CALLED = frozenset(
    (
        _DICT,
        "torch.Size",
        "torch.device",
        "torch.nn.parameter.Parameter",
        "torch._tensor._rebuild_from_type_v2",
        "torch._utils._rebuild_parameter",
        "torch._utils._rebuild_parameter_with_state",
        *(f"torch._utils.{name}" for name in _TENSORS),
    )
)
HARMLESS = _CALLED | {
    *(f"{module}.{name}" for name in ITEMS for module in ("torch", "torch.storage")),
    *(f"torch.{name}" for name in DTYPES),
}
"""Names that a file of dense tensors needs; all of them are among those that ``weights_only`` knows."""

_LONGEST = 120
"""Characters of a name that are shown."""

_DEEPEST, _HEAVIEST = 32, 1_000_000
"""How deep tuples may nest and how many values one may hold, each as often as it occurs: a dict hashes its keys."""


class NotAProgram(ValueError):
    """Bytes that are no pickle, or one over a limit; the message follows the name of the file."""


@dataclass(slots=True)
class Program:
    """What one pickle asks for.

    Attributes:
        result: its value where that is a number or a string; opaque otherwise.
        names: every ``module.name`` it looks up, in order.
        storages: by key.
        views: every tensor it makes.
        faults: what is wrong with tensors and storages, in words.
        protocol: the version of pickle that it says it is.
        size: bytes of the pickle.
    """

    result: Any = None
    names: dict[str, None] = field(default_factory=dict)
    storages: dict[str, Storage] = field(default_factory=dict)
    views: list[View] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)
    protocol: int = 0
    size: int = 0

    @property
    def foreign(self) -> tuple[str, ...]:
        """The names that no file of tensors needs."""
        return tuple(name for name in self.names if name not in HARMLESS)


@dataclass(frozen=True, slots=True)
class _Name:
    path: str


class _Opaque:
    """A value that nothing depends on."""

    __slots__ = ()


class _Tuple(tuple[Any, ...]):  # noqa: SLOT001 - tuples cannot have slots
    """A tuple that knows how deep it nests and how many values it holds."""

    depth: int
    weight: int

    @classmethod
    def of(cls, items: Iterable[Any]) -> _Tuple:
        made = cls(items)
        inside = [each for each in made if isinstance(each, _Tuple)]
        made.depth = 1 + max((each.depth for each in inside), default=0)
        made.weight = len(made) + sum(each.weight for each in inside)
        if made.depth > _DEEPEST or made.weight > _HEAVIEST:
            raise NotAProgram("nests tuples as no file of tensors does")
        return made


_MARK, _THING, _ORDERED = object(), _Opaque(), _Opaque()

_Step: TypeAlias = "Callable[[_Machine, Any], None]"


def trace(data: bytes, *, steps: int) -> Program:
    """Follow the first pickle in ``data``.

    Args:
        data: begins with a pickle; what follows it is not looked at.
        steps: how many instructions it may have.

    Raises:
        NotAProgram: there is no whole pickle, or one with more instructions.
    """
    machine = _Machine()
    try:
        for number, (code, argument, at) in enumerate(pickletools.genops(io.BytesIO(data))):
            if code.name == "STOP":
                machine.program.result = machine.pop()
                machine.program.size = (at or 0) + 1
                return machine.program
            if code.name not in _STEPS or number >= steps:
                _refuse(code.name, known=code.name in _STEPS)
            _STEPS[code.name](machine, argument if code.arg is not None else code.name)
    except NotAProgram as error:
        # the names are what a reader needs to know about a pickle that is broken as well
        raise _after(machine.program, str(error)) from None
    except (ValueError, IndexError, OverflowError, UnicodeError, RecursionError) as error:
        raise _after(machine.program, f"is cut off, or no pickle: {error}") from None
    raise _after(machine.program, "ends without its last instruction")


def _after(program: Program, what: str) -> NotAProgram:
    wants = f", and asks for {', '.join(program.foreign[:3])}" if program.foreign else ""
    return NotAProgram(f"{what}{wants}")


class _Machine:
    """The stack and the memo, with the program that is being written down."""

    __slots__ = ("memo", "program", "stack")

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}
        self.program = Program()

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def pop(self) -> Any:
        if not self.stack:
            raise NotAProgram("takes from an empty stack")
        return self.stack.pop()

    def to_mark(self) -> list[Any]:
        items = []
        while (value := self.pop()) is not _MARK:
            items.append(value)
        return items[::-1]

    def look_up(self, module: Any, name: Any) -> None:
        known = isinstance(module, str) and isinstance(name, str)
        path = f"{module}.{name}"[:_LONGEST] if known else "a name made at run time"
        path = path if path.isprintable() else ascii(path)
        self.program.names[path] = None
        self.push(_Name(path))

    def call(self, callee: Any, arguments: Any) -> Any:
        """What a call would give: a tensor's place is written down, a size is itself, all else is opaque."""
        if not isinstance(callee, _Name) or not isinstance(arguments, tuple):
            self.program.names["a call of what is no name"] = None
            return _THING
        name = callee.path.rpartition(".")[2]
        if callee.path in HARMLESS - _CALLED:
            self.program.faults.append(f"{callee.path} is called like a function")
        if callee.path == _DICT:
            return _ORDERED
        if callee.path == "torch.Size":
            return arguments[0] if len(arguments) == 1 and isinstance(arguments[0], tuple) else _THING
        if callee.path == "torch._tensor._rebuild_from_type_v2" and len(arguments) == 4:
            return self.call(arguments[0], arguments[2])
        if callee.path.startswith("torch._utils.") and name in _TENSORS:
            self.tensor(name, arguments)
        return _THING

    def tensor(self, name: str, arguments: tuple[Any, ...]) -> None:
        least, most = _TENSORS[name]
        storage, offset, size, stride = (*arguments, None, None, None, None)[:4]
        fine = least <= len(arguments) <= most and isinstance(storage, Storage) and _whole(offset)
        if not fine or not _sizes(size) or not _sizes(stride):
            self.program.faults.append(f"{name} is given what makes no tensor")
            return
        own = arguments[6] if name.endswith("v3") else None
        dtype = own.path.removeprefix("torch.") if isinstance(own, _Name) else ""
        if own is not None and dtype not in DTYPES:
            self.program.faults.append(f"{name} is given no dtype")
            return
        view = View(storage, offset, size, stride, DTYPES[dtype] if dtype else ITEMS[storage.type])
        if fault := view.fault():
            self.program.faults.append(f"a tensor {fault}")
        self.program.views.append(view)

    def persistent(self, given: Any) -> None:
        """A storage: ("storage", class, key, device, elements), and in older files a sixth value."""
        kind, key, count = (given[1], given[2], given[4]) if _is_storage(given) else (None, None, None)
        type_ = kind.path.rpartition(".")[2] if isinstance(kind, _Name) else ""
        if type_ not in ITEMS or not isinstance(key, str) or not isinstance(count, int) or not _whole(count):
            self.program.faults.append("a storage is described as no storage is")
            self.push(_THING)
            return
        found = Storage(key, type_, count)
        if self.program.storages.setdefault(key, found) != found:
            self.program.faults.append(f"the storage {key[:40]!r} is described twice, and differently")
        self.push(found)


def _is_storage(given: Any) -> bool:
    return isinstance(given, tuple) and len(given) in (5, 6) and given[0] in ("storage", b"storage")


def _whole(value: Any) -> bool:
    return type(value) is int and 0 <= value < 1 << 60


def _sizes(value: Any) -> bool:
    return isinstance(value, tuple) and len(value) <= 64 and all(type(each) is int for each in value)


def _refuse(name: str, *, known: bool) -> None:
    if known:
        raise NotAProgram("has more instructions than any file of tensors needs")
    raise NotAProgram(f"has the instruction {name}, which no file of tensors has")


def _protocol(machine: _Machine, argument: Any) -> None:
    machine.program.protocol = argument


def _constant(value: Any) -> _Step:
    return lambda machine, _: machine.push(value)


def _literal(machine: _Machine, argument: Any) -> None:
    machine.push(argument)


def _container(machine: _Machine, _: Any) -> None:
    machine.push(_THING)


def _from_mark(machine: _Machine, _: Any) -> None:
    machine.to_mark()
    machine.push(_THING)


def _no_more(machine: _Machine, _: Any) -> None:
    machine.to_mark()


def _build(machine: _Machine, _: Any) -> None:
    """State for what was made before: dicts may have attributes, and nothing else is given any."""
    machine.pop()
    if machine.stack[-1] is not _ORDERED:
        machine.program.faults.append("something other than a dict is given a state")


def _drop(count: int) -> _Step:
    def step(machine: _Machine, _: Any) -> None:
        for _each in range(count):
            machine.pop()

    return step


def _tuple(count: int) -> _Step:
    def step(machine: _Machine, _: Any) -> None:
        machine.push(_Tuple.of([machine.pop() for _each in range(count)][::-1]))

    return step


def _put(machine: _Machine, argument: Any) -> None:
    machine.memo[len(machine.memo) if argument == "MEMOIZE" else argument] = machine.stack[-1]


def _get(machine: _Machine, argument: Any) -> None:
    if argument not in machine.memo:
        raise NotAProgram("takes from the memo what was never put there")
    machine.push(machine.memo[argument])


def _global(machine: _Machine, argument: Any) -> None:
    machine.look_up(*str(argument).split(" ", 1))


def _stack_global(machine: _Machine, _: Any) -> None:
    name, module = machine.pop(), machine.pop()
    machine.look_up(module, name)


def _inst(machine: _Machine, argument: Any) -> None:
    machine.to_mark()
    machine.look_up(*str(argument).split(" ", 1))


def _obj(machine: _Machine, _: Any) -> None:
    made = machine.to_mark()
    machine.push(machine.call(made[0] if made else None, tuple(made[1:])))


def _reduce(machine: _Machine, name: Any) -> None:
    if name == "NEWOBJ_EX":
        machine.pop()
    arguments, callee = machine.pop(), machine.pop()
    machine.push(machine.call(callee, arguments))


def _extension(machine: _Machine, argument: Any) -> None:
    machine.look_up("copyreg", f"extension {argument}")


_STEPS: Mapping[str, _Step] = MappingProxyType(
    {
        "PROTO": _protocol,
        "FRAME": lambda _machine, _: None,
        "MARK": _constant(_MARK),
        "NONE": _constant(None),
        "NEWTRUE": _constant(True),
        "NEWFALSE": _constant(False),
        "EMPTY_TUPLE": _constant(()),
        **dict.fromkeys(("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4"), _literal),
        **dict.fromkeys(("FLOAT", "BINFLOAT"), _literal),
        **dict.fromkeys(("UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"), _literal),
        **dict.fromkeys(("STRING", "BINSTRING", "SHORT_BINSTRING"), _literal),
        **dict.fromkeys(("BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8"), _literal),
        **dict.fromkeys(("EMPTY_LIST", "EMPTY_DICT", "EMPTY_SET"), _container),
        **dict.fromkeys(("LIST", "DICT", "FROZENSET"), _from_mark),
        "TUPLE": lambda machine, _: machine.push(_Tuple.of(machine.to_mark())),
        "TUPLE1": _tuple(1),
        "TUPLE2": _tuple(2),
        "TUPLE3": _tuple(3),
        **dict.fromkeys(("POP", "APPEND"), _drop(1)),
        "BUILD": _build,
        "SETITEM": _drop(2),
        **dict.fromkeys(("POP_MARK", "APPENDS", "SETITEMS", "ADDITEMS"), _no_more),
        "DUP": lambda machine, _: machine.push(machine.stack[-1]),
        **dict.fromkeys(("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"), _put),
        **dict.fromkeys(("GET", "BINGET", "LONG_BINGET"), _get),
        "GLOBAL": _global,
        "STACK_GLOBAL": _stack_global,
        "INST": _inst,
        "OBJ": _obj,
        **dict.fromkeys(("REDUCE", "NEWOBJ", "NEWOBJ_EX"), _reduce),
        **dict.fromkeys(("EXT1", "EXT2", "EXT4"), _extension),
        "BINPERSID": lambda machine, _: machine.persistent(machine.pop()),
    }
)
"""Instruction -> what it does to the stack; one that is not listed makes no tensors."""
