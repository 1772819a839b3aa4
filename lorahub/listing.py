"""A folder of adapters as rows: one a file or adapter folder, what each is, what cannot be read, what is there twice.

The document behind ``lorahub inspect DIR/``.  Headers only, save where tensors are compared or hashes are asked for.
"""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType

from lorahub.adapter import open_header
from lorahub.bases.index import natural
from lorahub.errors import LorahubError, Unavailable
from lorahub.files.atomic import is_partial
from lorahub.files.digest import data_digest, file_digest, tensors_digest
from lorahub.files.header import read_header
from lorahub.findings import Verdict
from lorahub.inspection import inspect
from lorahub.records import FILENAME
from lorahub.registry import Registry

__all__ = ["COLUMNS", "Entry", "as_csv", "hashes", "is_collection", "list_folder", "ordered"]

_CONFIG = "adapter_config.json"
_MODEL = ("config.json", "model_index.json")
_WEIGHTS = ".safetensors"


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One adapter of a folder, or what could not be read as one.

    Attributes:
        name: path below the folder, with slashes.
        format: registered name; "" where it cannot be read.
        kinds: every kind it uses.
        ranks: every rank, ascending.
        scales: every scale, ascending.
        nbytes: of its weights file; None where there is none.
        base: what it says of its base.
        findings: how many things there are to say, notes not counted; codes says which.
        same_as: the first entry with the very same tensors, where that was looked for.
        error: why it cannot be read, or "".
        exit_code: of that error, or 0.
    """

    name: str
    format: str = ""
    kinds: tuple[str, ...] = ()
    ranks: tuple[int, ...] = ()
    scales: tuple[float, ...] = ()
    nbytes: int | None = None
    base: str = ""
    codes: tuple[str, ...] = ()
    same_as: str = ""
    error: str = ""
    exit_code: int = 0

    @property
    def findings(self) -> int:
        """How many things there are to say."""
        return len(self.codes)

    def document(self) -> dict[str, object]:
        """JSON-ready values."""
        return {
            "name": self.name,
            "format": self.format,
            "kinds": list(self.kinds),
            "ranks": list(self.ranks),
            "scales": list(self.scales),
            "bytes": self.nbytes,
            "base": self.base,
            "findings": list(self.codes),
            "same_as": self.same_as,
            "error": self.error,
        }


COLUMNS: Mapping[str, Callable[[Entry], object]] = MappingProxyType(
    {
        "name": lambda each: natural(each.name),
        "format": lambda each: each.format,
        "kinds": lambda each: each.kinds,
        "ranks": lambda each: each.ranks,
        "scale": lambda each: each.scales,
        "size": lambda each: each.nbytes,
        "base": lambda each: each.base,
        "findings": lambda each: each.findings,
    }
)
"""Column -> what it is sorted by."""


def is_collection(path: Path) -> bool:
    """Whether a folder is no adapter or base itself, but holds several adapters, or folders with some."""
    if not path.is_dir() or any((path / name).is_file() for name in (_CONFIG, FILENAME, *_MODEL)):
        return False
    direct = sum(1 for name in _files(path) if name.endswith(_WEIGHTS))
    return direct > 1 or (direct == 0 and next(_items(path), None) is not None)


def list_folder(
    folder: Path,
    registry: Registry,
    *,
    duplicates: bool = False,
    progress: Callable[[int, int], None] = lambda _done, _total: None,
) -> tuple[Entry, ...]:
    """Every adapter below ``folder``, by name; what cannot be read is an entry too.

    Args:
        folder: where to look, in folders inside it as well; hidden ones and links to folders are left alone.
        registry: kinds and formats.
        duplicates: also read all tensors and say which files hold the same.
        progress: called with (entries done, entries in all).
    """
    items = sorted(_items(folder), key=lambda item: natural(item.relative_to(folder).as_posix()))
    entries: list[Entry] = []
    seen: dict[str, str] = {}
    for done, item in enumerate(items):
        progress(done, len(items))
        entries.append(_entry(item, item.relative_to(folder).as_posix(), registry, seen if duplicates else None))
    progress(len(items), len(items))
    return tuple(entries)


def _items(folder: Path) -> Iterator[Path]:
    """Folders with a config or a record, weights files in other folders but a base's, and folders that are shut."""
    shut: list[OSError] = []
    for place, inner, names in os.walk(folder, onerror=shut.append):
        inner[:] = sorted(name for name in inner if not name.startswith(".") and not is_partial(name))
        here = Path(place)
        if {_CONFIG, FILENAME} & set(names) and here != folder:
            yield here
        elif not set(_MODEL) & set(names):
            yield from (here / name for name in names if name.endswith(_WEIGHTS) and not is_partial(name))
    yield from (Path(os.fsdecode(each.filename)) for each in shut if each.filename)


def _files(folder: Path) -> list[str]:
    return [entry.name for entry in folder.iterdir() if entry.is_file() and not is_partial(entry.name)]


def _entry(item: Path, name: str, registry: Registry, seen: dict[str, str] | None) -> Entry:
    bare = Entry(name=name, nbytes=item.stat().st_size if item.is_file() else None)
    try:
        header = open_header(item, registry, label=name)
        found = inspect(header, registry)
        stored = header.files.headers[found.file]
        digest = "" if seen is None else tensors_digest(header.folder / found.file, stored)
    except LorahubError as error:
        return replace(bare, error=error.message, exit_code=error.exit_code)
    except OSError as error:  # a folder that may not be listed
        return replace(bare, error=f"{name}: {error.strerror or error}", exit_code=Unavailable.exit_code)
    entry = Entry(
        name=name,
        format=found.format,
        kinds=tuple(sorted({row.kind for row in found.rows})),
        ranks=header.ranks,
        scales=tuple(sorted({row.scale for row in found.rows if row.scale is not None})),
        nbytes=stored.size,
        base=found.base,
        codes=tuple(each.code for each in found.findings if each.level >= Verdict.UNVERIFIED),
    )
    if seen is None:
        return entry
    first = seen.setdefault(digest, name)
    return entry if first == name else replace(entry, same_as=first)


def ordered(entries: Sequence[Entry], column: str) -> tuple[Entry, ...]:
    """Sorted by a column of ``COLUMNS``, then by name; entries that say nothing there come last."""
    key = COLUMNS[column]
    by_name = sorted(entries, key=lambda each: natural(each.name))
    silent = [each for each in by_name if _silent(each, column)]
    said = [each for each in by_name if not _silent(each, column)]
    return (*sorted(said, key=key), *silent)  # type: ignore[arg-type]  # one type to a column


def _silent(entry: Entry, column: str) -> bool:
    if column == "findings":
        return bool(entry.error)
    return COLUMNS[column](entry) in (None, "", ())


def as_csv(entries: Sequence[Entry]) -> str:
    """The entries as CSV with a header line; several values of one cell are separated by spaces."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["name", "format", "kinds", "ranks", "scale", "bytes", "base", "findings", "same_as", "error"])
    for each in entries:
        several = (" ".join(map(str, values)) for values in (each.kinds, each.ranks))
        scales = " ".join(f"{scale:.17g}" if float(f"{scale:g}") != scale else f"{scale:g}" for scale in each.scales)
        size = "" if each.nbytes is None else str(each.nbytes)
        writer.writerow(
            [each.name, each.format, *several, scales, size, each.base, each.findings, each.same_as, each.error]
        )
    return text.getvalue()


def hashes(path: Path) -> dict[str, str]:
    """A weights file under the names that sites know it by.

    ``sha256`` of the file; ``autov2``, its first 10 digits; ``autov3``, the first 12 of the sha256 of everything behind
    the header, which edits of the metadata leave as it is.

    Raises:
        HeaderError: it is no safetensors file.
        NotFound, AccessDenied, IntegrityError: it cannot be read, or changes meanwhile.
    """
    header = read_header(path)
    sha256, _ = file_digest(path)
    return {"sha256": sha256, "autov2": sha256[:10], "autov3": data_digest(path, header)[:12]}
