"""The one door for pickles: a PyTorch file becomes a safetensors file, and no instruction of it runs unchecked.

First the file is looked at from outside (``pickle_checks``), down to every instruction of the pickle, none of which is
carried out (``opcodes``).  Only a program that makes dense tensors inside its own storages, and asks for nothing else,
reaches ``torch.load``, and that with ``weights_only``.  Tensors are mapped where the file allows it and written one
after the other; those that share memory are written each for itself.  Knows no adapters: keys stay as they are,
except that lists count and nested dicts are joined by dots.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lorahub import strict_json
from lorahub.errors import IntegrityError, LorahubError, NotFound, UnsupportedFormat, UsageError
from lorahub.files.atomic import atomic_write, is_partial
from lorahub.files.dtypes import from_torch, stored_shape
from lorahub.files.grammar import show
from lorahub.files.header import name_fault
from lorahub.files.pickle_checks import AGAIN, ASK, PickleLimits, demand, examine
from lorahub.files.tensors import tensor_bytes
from lorahub.files.writer import StreamWriter, usual_order
from lorahub.lazy import torch

__all__ = ["ORIGIN", "PICKLES", "PickleLimits", "left_out", "unpack", "weights_among"]

PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
"""Endings under which PyTorch files are stored."""

ORIGIN = "lorahub.pickle"
"""The header key of an unpacked file that says what it was: see ``left_out``."""

_USUAL = ("adapter_model.bin", "pytorch_adapter.bin", "pytorch_lora_weights.bin")
"""What libraries call an adapter's weights; alone of these in a folder, one is meant."""

_BESIDE = ("optimizer", "pytorch_model_head.", "random_states", "rng_state", "scaler.", "scheduler.", "training_args.")
"""How the names of files begin that are no adapter's weights."""

_RECORD = "lorahub.json"  # it was written for other files

_WRAPPERS = frozenset(
    ("adapter", "lora", "lora_state_dict", "model", "model_state_dict", "module", "network", "params", "state_dict")
) | {"weights"}
"""Names under which a checkpoint keeps the state dict itself; they are no part of a tensor's name."""

_TRAINING = frozenset(
    ("amp", "callbacks", "grad_scaler", "loops", "lr_scheduler", "lr_schedulers", "optimizer", "optimizer_state_dict")
) | {"optimizer_states", "optimizers", "random_states", "rng_state", "scaler", "scheduler", "scheduler_state_dict"}
"""Names under which a checkpoint keeps what only its training needs."""

_TOLD = "WeightsUnpickler error:"
_LARGEST = 1 << 64
_DEEPEST, _NODES, _NAME = 12, 150_000, 1024
_NOTES, _NOTE = 500, 200
"""How many values that are no tensors are kept, and how many characters of each: all fit into a header."""


def unpack(path: str | os.PathLike[str], folder: str | os.PathLike[str], *, limits: PickleLimits | None = None) -> Path:
    """Write what a PyTorch file holds as safetensors into ``folder``, with the JSON files beside it; the file's path.

    The file keeps its name but for the ending.  A list's tensors are called by their places, ``000`` on; a nested
    dict's by all its keys, joined with dots; the wrapping of a checkpoint (``state_dict``, ``model``) is taken off.
    Strings and numbers beside the tensors become header metadata; what else there is, ``left_out`` names.

    Args:
        path: the file, or a folder that holds one.
        folder: where to; it exists.
        limits: how much the file may ask for.

    Raises:
        NotFound: there is no such file.
        UsageError: the folder holds several.
        UnsupportedFormat: it is no file of tensors: it asks for code (named), or is numpy's, TorchScript, a tar, ...
        IntegrityError: it is damaged, over a limit, or a Git LFS pointer.
        MissingDependency: torch is not installed.
        WriteFailed: no space or no permission.
    """
    source, target = _file(Path(path)), Path(folder)
    bounds = limits or PickleLimits()
    if not target.is_dir():
        raise NotFound(f"there is no folder {target}", f"mkdir -p {target}")
    mapped = examine(source, bounds)
    found = _flatten(source, _load(source, mapped=mapped))
    name = source.with_suffix(".safetensors").name
    _write(source, target / name, found, bounds)
    for config in _configs(source.parent, bounds):
        atomic_write(target / config.name, config.read_bytes())
    return target / name


def weights_among(names: Iterable[str]) -> list[str]:
    """The files that may hold an adapter's weights, sorted; trainers leave others of the same endings beside them."""
    found = sorted(name for name in names if name.endswith(PICKLES) and not name.startswith(_BESIDE))
    usual = [name for name in found if name in _USUAL]
    return usual if len(usual) == 1 else found


def left_out(metadata: Mapping[str, str]) -> tuple[str, ...]:
    """What an unpacked file's header says was not taken along; nothing for any other header."""
    try:
        about = strict_json.read(metadata.get(ORIGIN, "{}"), limit=1 << 20)
    except strict_json.NotStrict:
        return ()
    listed = about.get("left_out") if isinstance(about, dict) else None
    return tuple(str(each) for each in listed) if isinstance(listed, list) else ()


def _file(path: Path) -> Path:
    if not path.is_dir():
        return path
    names = weights_among(each.name for each in path.iterdir() if each.is_file() and not is_partial(each.name))
    if not names:
        raise NotFound(f"{path} holds no file that ends in {', '.join(PICKLES)}", "name the file itself")
    if len(names) > 1:
        raise UsageError(f"{path} holds several files: {', '.join(names[:5])}", "name the one that is meant")
    return path / names[0]


def _load(path: Path, *, mapped: bool) -> Any:
    """The file's object, on the CPU whatever device it was saved from."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except LorahubError:  # torch is not installed
        raise
    except Exception as error:  # noqa: BLE001 - what torch raises for files that are damaged has no one class
        told = str(error).partition(_TOLD)[2] or str(error)  # and nothing of how to run whatever is in the file
        text = " ".join(told.partition("Check the documentation")[0].split())[:300] or type(error).__name__
        raise IntegrityError(f"{path} cannot be loaded: {text}", AGAIN) from None


@dataclass(slots=True)
class _Found:
    """What a file's object holds: tensors and notes by name, and what is neither."""

    container: str
    wrapper: str = ""
    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)
    left: list[str] = field(default_factory=list)


def _flatten(path: Path, root: Any) -> _Found:
    """Sort everything in ``root`` by what it is.

    Raises:
        IntegrityError: it nests too deep, two tensors would have one name, or a name cannot be written.
        UnsupportedFormat: there are no tensors, or some are no dense ones.
    """
    found = _Found(container=type(root).__name__ if isinstance(root, dict | list | tuple) else "tensor")
    wrapper = _wrapper(root)
    if wrapper:
        found.wrapper = wrapper
    nodes = 0
    pending = [("", key, value, 1) for key, value in _members(root, wrapper, found)]
    while pending:
        within, key, value, depth = pending.pop()
        nodes += 1
        branch = isinstance(value, torch.Tensor | dict | list | tuple)
        length = len(within) + len(key)  # before the two become one: a long name may stand for many values
        demand(not branch or length < _NAME, path, f"has a name of {length:,} characters")
        name = f"{within}.{key[:_NAME]}" if within else key[:_NAME]
        demand(depth <= _DEEPEST and nodes <= _NODES, path, f"nests too deep or holds too much at {show(name)}")
        if isinstance(value, torch.Tensor):
            demand(name not in found.tensors, path, f"has two tensors that would be called {show(name)}")
            found.tensors[name] = _dense(path, name, value)
        elif branch:
            pending += [(name, inner, each, depth + 1) for inner, each in _members(value, "", found, name)]
        else:
            _note(found, name, value)
    if not found.tensors:
        raise UnsupportedFormat(f"{path} holds no tensors", "is it the right file?")
    for name in found.tensors:
        if fault := name_fault(name):
            raise IntegrityError(f"{path}: the tensor name {show(name)} {fault}", ASK)
    return found


def _wrapper(root: Any) -> str:
    """The one key under which a checkpoint keeps its state dict, or ""."""
    if not isinstance(root, dict):
        return ""
    named = [key for key in root if isinstance(key, str) and key in _WRAPPERS and isinstance(root[key], dict)]
    return named[0] if len(named) == 1 else ""


def _members(value: Any, wrapper: str, found: _Found, within: str = "") -> Iterator[tuple[str, Any]]:
    """(name, value) of what a container holds; what only training needs is left out."""
    if isinstance(value, torch.Tensor) or not isinstance(value, dict | list | tuple):
        yield "tensor", value
        return
    if not isinstance(value, dict):
        digits = max(3, len(str(len(value) - 1)))
        yield from ((f"{place:0{digits}}", each) for place, each in enumerate(value))
        return
    for key, each in value.items():
        if not isinstance(key, str) and not (isinstance(key, int) and abs(key) < _LARGEST):
            found.left.append(f"{within or 'the file'} under a key of type {type(key).__name__}")
        elif wrapper and key == wrapper:
            yield from _members(each, "", found)
        elif not within and key in _TRAINING and not isinstance(each, torch.Tensor):
            found.left.append(str(key))
        else:
            yield str(key), each


def _dense(path: Path, name: str, tensor: torch.Tensor) -> torch.Tensor:
    if tensor.layout is not torch.strided or tensor.device.type != "cpu" or tensor.is_quantized:
        raise UnsupportedFormat(f"{path}: {show(name)} is no dense tensor, but {tensor.layout}", ASK)
    return tensor.detach()


def _note(found: _Found, name: str, value: Any) -> None:
    """A string or number as metadata, where it is small and there are not too many."""
    plain = value if isinstance(value, str) else None
    if isinstance(value, bool | float | None) or (isinstance(value, int) and abs(value) < _LARGEST):
        plain = json.dumps(value)
    small = plain is not None and len(plain) <= _NOTE and len(name) <= _NOTE and len(found.notes) < _NOTES
    ours = name == "format" or name.startswith("lorahub")
    if plain is None or not small or ours or not plain.isprintable() or not name.isprintable():
        found.left.append(name)
    else:
        found.notes[name] = plain


def _write(source: Path, target: Path, found: _Found, limits: PickleLimits) -> None:
    entries = {}
    for name, tensor in found.tensors.items():
        code = from_torch(tensor.dtype)
        entries[name] = (code, stored_shape(code, tensor.shape))
    demand(len(entries) <= limits.tensors, source, f"holds {len(entries):,} tensors")
    short = (name[:_NOTE] for name in sorted(found.left))
    shown = [name if name.isprintable() else ascii(name) for name in short]
    about = {
        "container": found.container,
        "file": source.name,
        "left_out": shown[:_NOTES] if len(shown) <= _NOTES else [*shown[:_NOTES], f"and {len(shown) - _NOTES} more"],
        "wrapper": found.wrapper,
    }
    metadata = {**found.notes, "format": "pt", ORIGIN: strict_json.compact(about)}
    with StreamWriter(target, usual_order(entries), metadata) as out:
        for name in out.header.tensors:
            out.write(name, 0, tensor_bytes(found.tensors[name]))
        out.commit()


def _configs(folder: Path, limits: PickleLimits) -> Iterator[Path]:
    """The JSON objects in a folder, but for the record and tables of shards, which speak of other files."""
    for path in sorted(folder.glob("*.json")):
        if path.name == _RECORD or path.name.endswith(".index.json") or is_partial(path.name):
            continue
        if not path.is_file() or path.stat().st_size > limits.config:
            continue
        try:
            if isinstance(strict_json.read(path.read_bytes(), limit=limits.config), dict):
                yield path
        except strict_json.NotStrict:
            continue
