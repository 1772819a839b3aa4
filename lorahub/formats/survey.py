"""What lies in an adapter folder, and in words why none of it can be read.

Headers and configs are opened, pickles never: a zip's table of contents tells enough to name what is in one.  Knows
no format; ``explain`` speaks when none has claimed the files.
"""

from __future__ import annotations

import os
import struct
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath

from lorahub import strict_json
from lorahub.deltas.kind import JSON
from lorahub.errors import IntegrityError, LorahubError, NotFound, UnsupportedFormat, UnsupportedKind, UsageError
from lorahub.files.atomic import is_partial
from lorahub.files.header import Header, read_header
from lorahub.files.raw import open_regular, read_into
from lorahub.formats.format import AdapterFiles

__all__ = ["explain", "header_fault", "survey"]

_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_CONFIG = "adapter_config.json"
_RECORD = "lorahub.json"
_LARGEST = 1 << 20
"""Bytes of a JSON file that can still be a config; tokenizers are larger."""

_SCALAR = 8
"""Bytes of the widest single number."""

_LFS = b"version https://git-lfs"


def survey(path: str | os.PathLike[str], *, weight_name: str = "", subfolder: str = "") -> AdapterFiles:
    """Read the headers and configs of an adapter's folder.

    Args:
        path: the folder, or one weights file in it.
        weight_name: the file meant, where the folder holds several.
        subfolder: a folder inside ``path``.

    Raises:
        NotFound: nothing is there, or not the file that was named.
        UsageError: a name that leads out of the folder.
        HeaderError: a safetensors file is malformed, empty, or a Git LFS pointer.
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
    names = sorted(entry.name for entry in folder.iterdir() if entry.is_file() and not is_partial(entry.name))
    weights = [name for name in ([weight_name] if weight_name else names) if name.endswith(".safetensors")]
    configs = {name: parsed for name in names if (parsed := _config(folder / name)) is not None}
    return AdapterFiles(
        folder=folder,
        headers={name: read_header(folder / name) for name in weights},
        configs=configs,
        others=tuple(name for name in names if name not in weights and name not in configs),
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
    return name.endswith((".safetensors", *_PICKLES))


def _config(path: Path) -> dict[str, JSON] | None:
    """A JSON object, or None for what is none; only ``adapter_config.json`` has to be one."""
    if path.suffix != ".json" or path.name == _RECORD:
        return None
    with open_regular(path) as file:
        text = file.read(_LARGEST + 1) or b""
    try:
        value = strict_json.read(text, limit=_LARGEST)
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
    if isinstance(config.get("config"), dict) and ("model_type" in config or "model_name" in config):
        return _adapter_hub(files, config)
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
        shown = ", ".join(keys[:3])
        return UnsupportedFormat(
            f"no format knows {', '.join(files.headers)} in {files.folder}: {len(keys)} tensors, first {shown}",
            "lorahub plugins   (formats that are installed)",
        )
    pickles = [name for name in files.others if name.endswith(_PICKLES)]
    if pickles:
        peft = " (a PEFT adapter, by its config)" if "peft_type" in config else ""
        what = " and ".join(f"{name} {_peek(files.folder / name)}" for name in pickles[:3])
        pointer = any(_is_pointer(files.folder / name) for name in pickles)
        return UnsupportedFormat(
            f"{files.folder}{peft} holds no safetensors file; {what}",
            "git lfs pull" if pointer else "ask its author for safetensors, or convert it where you trust it",
        )
    found = ", ".join([*files.configs, *files.others][:5]) or "nothing"
    return UnsupportedFormat(
        f"{files.folder} holds no weights: found {found}", "give the folder with the .safetensors file"
    )


def header_fault(header: Header) -> str:
    """Why a file cannot hold an adapter, whatever its names: no tensors, or single numbers only."""
    shapes = [info.shape for info in header.tensors.values()]
    if not shapes:
        return "holds no tensors: its header is empty"
    if all(shape == () for shape in shapes):
        return f"holds single numbers only ({len(shapes)} of them): no factors, so nothing that changes a weight"
    return ""


def _adapter_hub(files: AdapterFiles, config: Mapping[str, JSON]) -> LorahubError:
    inner = config["config"]
    assert isinstance(inner, dict)
    where = f"{files.folder} holds an AdapterHub adapter for {config.get('model_name') or config.get('model_type')}"
    if "reduction_factor" in inner and "r" not in inner:
        return UnsupportedKind(
            f"{where}: bottleneck layers, which are new layers with a non-linearity and no change of weights",
            "use it with AdapterHub's own library, adapters",
        )
    return UnsupportedFormat(
        f"{where}, which no installed format reads", "lorahub plugins   (formats that are installed)"
    )


def _peek(path: Path) -> str:
    """What a file with a pickle's name is, without unpickling."""
    size = path.stat().st_size
    if _is_pointer(path):
        return "is a Git LFS pointer, not the file itself"
    if not size:
        return "is empty (0 bytes)"
    sizes = list(_storages(path))
    if sizes and max(sizes) <= _SCALAR:
        return f"holds single numbers only ({len(sizes)} of them): no factors, so nothing that changes a weight"
    return "is a Python pickle, which is never opened here: it can run any code"


def _is_pointer(path: Path) -> bool:
    with open_regular(path) as file:
        start = bytearray(min(len(_LFS), path.stat().st_size))
        read_into(file, 0, start)
    return start == _LFS


def _storages(path: Path) -> Iterator[int]:
    """Bytes of each tensor storage in a PyTorch zip, from the table of contents; none for other files."""
    try:
        with zipfile.ZipFile(path) as archive:
            for entry in archive.infolist():
                if "/data/" in entry.filename:
                    yield entry.file_size
    except (
        zipfile.BadZipFile,
        struct.error,
        OSError,
        ValueError,
        NotImplementedError,
    ):  # damaged, or no zip: nothing to tell
        return
