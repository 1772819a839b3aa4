"""What lies in an adapter folder, and in words why none of it can be read.

Headers and configs are opened, pickles never.  Knows no format; ``explain`` speaks when none has claimed the files.
"""

from __future__ import annotations

import os
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePath, PurePosixPath

from lorahub import strict_json
from lorahub.deltas.kind import JSON
from lorahub.errors import IntegrityError, LorahubError, NotFound, UnsupportedFormat, UnsupportedKind, UsageError
from lorahub.files.atomic import is_partial
from lorahub.files.containers import CONTAINERS, is_safetensors, read_weights_header
from lorahub.files.entries import forms_of
from lorahub.files.header import Header, Known
from lorahub.files.raw import open_regular
from lorahub.formats.format import AdapterFiles
from lorahub.formats.glimpse import PICKLE, is_pointer, of_any_name, of_pickles_name
from lorahub.formats.networks import network_of

__all__ = ["LARGEST", "RECENT", "Seen", "as_config", "explain", "header_fault", "survey", "survey_in"]

RECENT = Known()
"""Header texts that this process found sound, for surveys that share nothing else; bounded."""

_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_CONFIG = "adapter_config.json"
_RECORD = "lorahub.json"
_MISNAMED = (*_PICKLES, ".sft")
"""Ends of names under which safetensors are found too."""

LARGEST = 1 << 20
"""Bytes of a JSON file that can still be a config; tokenizers are larger."""

_WHOLE = (".weight", ".bias")
"""How the names of nearly all parameters of models end, and no change's where no format knows it."""

_ADAPTERHUB = ("adapter.bin", "pytorch_adapter.bin")
"""What AdapterHub's library calls a pickle that its config speaks of."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Listed:
    """The files of a folder.

    Attributes:
        configs: parsed JSON objects by name.
        others: the names of all other files, sorted.
    """

    configs: Mapping[str, Mapping[str, JSON]]
    others: tuple[str, ...]

    def holds(self, name: str) -> bool:
        """Whether there is such a file besides the configs."""
        at = bisect_left(self.others, name)
        return self.others[at : at + 1] == (name,)

    def without(self, names: Sequence[str]) -> tuple[str, ...]:
        """``others`` but for a few."""
        if len(names) != 1 or not self.holds(names[0]):
            return tuple(name for name in self.others if name not in names)
        at = bisect_left(self.others, names[0])  # a folder of thousands is cut for each of them
        return self.others[:at] + self.others[at + 1 :]


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """What surveys of many adapters share: each folder is listed once, headers of one structure are scanned once.

    Attributes:
        folders: folder -> its files.
        headers: see ``parse_header``.
    """

    folders: dict[Path, Listed] = field(default_factory=dict)
    headers: Known = field(default_factory=Known)

    def listed(self, folder: Path) -> Listed:
        """The files of a folder; its configs are read the first time.

        Raises:
            IntegrityError: ``adapter_config.json`` is no JSON object.
        """
        found = self.folders.get(folder)
        if found is None:
            with os.scandir(folder) as entries:
                names = sorted(entry.name for entry in entries if _is_file(entry) and not is_partial(entry.name))
            read = ((name, _config(folder / name)) for name in names if name.endswith(".json"))
            configs = {name: config for name, config in read if config is not None}
            found = Listed(configs=configs, others=tuple(name for name in names if name not in configs))
            self.folders[folder] = found
        return found


def _is_file(entry: os.DirEntry[str]) -> bool:
    """Whether it is a file, or a link that leads to one."""
    try:
        return entry.is_file()
    except OSError:  # a link to itself
        return False


def survey(
    path: str | os.PathLike[str], *, weight_name: str = "", subfolder: str = "", seen: Seen | None = None
) -> AdapterFiles:
    """Read the headers and configs of an adapter's folder.

    Args:
        path: the folder, or one weights file in it.
        weight_name: the file meant, where the folder holds several.
        subfolder: a folder inside ``path``.
        seen: one for many surveys in a row, empty at first; files that change meanwhile may go unnoticed.

    Raises:
        NotFound: nothing is there, or not the file that was named.
        UsageError: a name that leads out of the folder.
        UnsupportedFormat: the file that was named is no weights file.
        UnsupportedKind: it is a pickle that its config tells to be no weight change.
        HeaderError: a weights file is malformed, empty, or a Git LFS pointer.
        IntegrityError: ``adapter_config.json`` is no JSON object.
    """
    folder = Path(path) / _inside(subfolder) if subfolder else Path(path)
    if folder.is_file():
        if weight_name not in ("", folder.name):
            raise UsageError(
                f"{folder} is a file, and {weight_name!r} names another", "give the folder, or one of the two"
            )
        folder, weight_name = folder.parent, folder.name
    if not folder.is_dir():
        raise NotFound(f"there is no adapter at {folder}", "give a folder or a .safetensors file")
    if weight_name:
        named = folder / _inside(weight_name)
        folder, weight_name = named.parent, named.name
        if not named.is_file():
            raise NotFound(f"{folder} holds no {weight_name}", _listed(folder))
    return survey_in(folder, weight_name, seen or Seen(headers=RECENT))


def survey_in(folder: Path, weight_name: str, seen: Seen) -> AdapterFiles:
    """As ``survey``, of a folder that is known to be there: the named weights file, or all that it has.

    Raises:
        UnsupportedFormat, UnsupportedKind, HeaderError, IntegrityError: as ``survey``.
    """
    listed = seen.listed(folder)
    weights = [_demand_weights(folder, weight_name, listed)] if weight_name else _weights(folder, listed.others)
    return AdapterFiles(
        folder=folder,
        headers={name: read_weights_header(folder / name, known=seen.headers) for name in weights},
        configs=listed.configs,
        others=listed.without(weights),
    )


def _weights(folder: Path, names: Sequence[str]) -> list[str]:
    """The files that hold weights: those of the first container in the table of which there is any.

    Where there is none, those that are safetensors but for their names.
    """
    every = ([name for name in names if name.lower().endswith(suffix)] for suffix in CONTAINERS)
    if found := next((found for found in every if found), []):
        return found
    return [name for name in names if name.lower().endswith(_MISNAMED) and is_safetensors(folder / name)]


def _demand_weights(folder: Path, name: str, listed: Listed) -> str:
    """The name of one file, if it is a container by its name or safetensors by its content.

    Raises:
        UnsupportedFormat, UnsupportedKind: what it is instead.
    """
    if name.lower().endswith(tuple(CONTAINERS)) or is_safetensors(folder / name):
        return name
    if name.lower().endswith(_PICKLES):
        alone = AdapterFiles(folder=folder, headers={}, configs=listed.configs, others=(name,))
        if name in _ADAPTERHUB and (bottleneck := _bottleneck(alone, listed.configs.get(_CONFIG, {}))):
            raise bottleneck
        what = of_pickles_name(folder / name)
        raise UnsupportedFormat(f"{folder / name} {what}", _readable(folder, [name], what))
    what = of_any_name(folder / name)
    renamed = f"let its name end in .pt, and then: lorahub convert {folder / name}.pt --to peft --out FOLDER"
    raise UnsupportedFormat(
        f"{folder / name} {what}", renamed if what == PICKLE else "give a folder, or a .safetensors file"
    )


def _inside(name: str) -> str:
    parts = PurePosixPath(name.replace("\\", "/")).parts
    if not parts or parts[0] == "/" or ".." in parts or ":" in parts[0]:
        raise UsageError(f"{name!r} is no name inside the adapter's folder")
    return "/".join(parts)


def _listed(folder: Path) -> str:
    names = sorted(entry.name for entry in folder.iterdir() if entry.is_file() and _is_weights(entry.name))
    return f"there are {', '.join(names[:5])}" if names else "it holds no weights at all"


def _is_weights(name: str) -> bool:
    return name.lower().endswith((*CONTAINERS, *_PICKLES))


def _config(path: Path) -> dict[str, JSON] | None:
    """A JSON object, or None for what is none; only ``adapter_config.json`` has to be one."""
    if path.suffix != ".json" or path.name == _RECORD:
        return None
    with open_regular(path) as file:
        return as_config(file.read(LARGEST + 1) or b"", path)


def as_config(text: bytes, path: PurePath) -> dict[str, JSON] | None:
    """The JSON object in the text of a file, or None for what is none.

    Raises:
        IntegrityError: it is ``adapter_config.json``, which has to be one.
    """
    try:
        value = strict_json.read(text, limit=LARGEST)
        if isinstance(value, dict):
            return value
        fault = "it is no object"
    except strict_json.NotStrict as error:
        fault = str(error)
    if path.name == _CONFIG:
        raise IntegrityError(f"{path} cannot be read: {fault}", "fetch it again, or ask its author")
    return None


def explain(files: AdapterFiles) -> LorahubError:
    """Why no format claims these files: the error to raise."""
    config = files.configs.get(_CONFIG, {})
    if bottleneck := _bottleneck(files, config):
        return bottleneck
    for name, header in files.headers.items():
        if fault := header_fault(header):
            return UnsupportedFormat(
                f"{files.folder / name} {fault}", "this is no adapter: fetch it again, or ask its author"
            )
    if files.headers and not config and "architectures" in files.configs.get("config.json", {}):
        return UnsupportedFormat(
            f"{files.folder} holds a base model (config.json and {', '.join(files.headers)}), not an adapter",
            f"name the adapter, and this as its base: lorahub check ADAPTER --base {files.folder}",
        )
    if files.headers:
        keys = [key for header in files.headers.values() for key in header.tensors]
        if network := network_of(keys):
            return UnsupportedKind(
                f"{', '.join(files.headers)} in {files.folder} is {network.title}, which is {network.what}",
                network.use,
            )
        shown = ", ".join(keys[:3])
        if all(key.endswith(_WHOLE) for key in keys):
            return UnsupportedFormat(
                f"{', '.join(files.headers)} in {files.folder} holds whole parameters of a model ({len(keys)} of them, "
                f"first {shown}) and no change of any: a tuned checkpoint or a part of one, no adapter",
                f"to make an adapter of what was tuned: lorahub extract {files.folder} --base BASE --out FOLDER",
            )
        return UnsupportedFormat(
            f"no format knows {', '.join(files.headers)} in {files.folder}: {len(keys)} tensors, first {shown}",
            "lorahub plugins   (formats that are installed)",
        )
    pickles = [name for name in files.others if name.lower().endswith(_PICKLES)]
    if pickles:
        peft = " (a PEFT adapter, by its config)" if "peft_type" in config else ""
        what = " and ".join(f"{name} {of_pickles_name(files.folder / name)}" for name in pickles[:3])
        return UnsupportedFormat(
            f"{files.folder}{peft} holds no safetensors file; {what}", _readable(files.folder, pickles, what)
        )
    found = ", ".join([*files.configs, *files.others][:5]) or "nothing"
    return UnsupportedFormat(
        f"{files.folder} holds no weights: found {found}", "give the folder with the .safetensors file"
    )


def _readable(folder: Path, pickles: Sequence[str], what: str) -> str:
    """What to do about files with pickles' names, of which ``what`` was said."""
    if any(is_pointer(folder / name) for name in pickles):
        return "git lfs pull"
    convert = f"to read its tensors and run nothing: lorahub convert {folder / pickles[0]} --to peft --out FOLDER"
    return convert if PICKLE in what else "fetch it again, or ask its author"


def header_fault(header: Header) -> str:
    """Why a file cannot hold an adapter, whatever its names: no tensors, or single numbers only."""
    if not header.tensors:
        return "holds no tensors: its header is empty"
    if all(form.shape == () for form in forms_of(header.tensors).values()):
        return (
            f"holds single numbers only ({len(header.tensors)} of them): no factors, so nothing that changes a weight"
        )
    return ""


def _bottleneck(files: AdapterFiles, config: Mapping[str, JSON]) -> LorahubError | None:
    """What to say of AdapterHub's first kind of adapter, which its config tells whatever holds the weights."""
    inner = config.get("config")
    if not isinstance(inner, dict) or "reduction_factor" not in inner or "r" in inner:
        return None
    base = config.get("model_name") or config.get("model_type") or "an unnamed base"
    return UnsupportedKind(
        f"{files.folder} holds an AdapterHub adapter for {base}: bottleneck layers, which are new layers with a "
        "non-linearity and no change of weights",
        "use it with AdapterHub's own library, adapters",
    )
