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
from typing import NamedTuple, final

from lorahub.adapter import AdapterHeader, open_header, recognise
from lorahub.bases.index import natural
from lorahub.errors import LorahubError, Unavailable
from lorahub.files.atomic import is_partial
from lorahub.files.containers import CONTAINERS
from lorahub.files.digest import data_digest, file_digest, tensors_digest
from lorahub.files.header import read_header
from lorahub.files.pickles import PICKLES, weights_among
from lorahub.findings import Verdict
from lorahub.formats.families import representatives
from lorahub.formats.format import AdapterFiles
from lorahub.formats.survey import Seen, survey, survey_in
from lorahub.inspection import base_of
from lorahub.lineage import label_of, modules_of
from lorahub.recall import Recall
from lorahub.records import FILENAME
from lorahub.registry import Registry

__all__ = ["COLUMNS", "Entry", "as_csv", "beside", "hashes", "is_collection", "list_folder", "ordered"]

_CONFIG = "adapter_config.json"
_MODEL = ("config.json", "model_index.json")
_PLACE = "\0"
"""Stands for a file's path in what is said of many."""

_WEIGHTS = tuple(CONTAINERS)
_USUAL = (
    "adapter_model.safetensors",
    "adapters.safetensors",
    "adapters.npz",
    "adapter.safetensors",
    "pytorch_adapter.safetensors",
    "pytorch_lora_weights.safetensors",
    "adapter_model.bin",
    "pytorch_adapter.bin",
    "pytorch_lora_weights.bin",
)
"""What libraries call the weights that their config lies beside."""


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
        looks_like: what the base may be, from its metadata or shapes.
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
    looks_like: str = ""
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
            "looks_like": self.looks_like,
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
        "base": lambda each: each.base or each.looks_like,
        "findings": lambda each: each.findings,
    }
)
"""Column -> what it is sorted by."""


def is_collection(path: Path) -> bool:
    """Whether a folder is no adapter or base itself, but holds several adapters, or folders with some."""
    if not path.is_dir() or any((path / name).is_file() for name in (_CONFIG, FILENAME, *_MODEL)):
        return False
    names = _files(path)
    direct = sum(1 for name in names if name.lower().endswith(_WEIGHTS))
    pickles = 0 if direct else len(_pickles(names))
    return direct > 1 or pickles > 1 or (direct + pickles == 0 and next(_items(path), None) is not None)


def beside(path: Path, file: str) -> tuple[str, ...]:
    """What else lies in and below an adapter's folder and is, or could be, an adapter: names below it, sorted.

    Args:
        path: the folder.
        file: its weights file that was read.
    """
    found = (item.name for item in _items(path) if item.name != file)
    return tuple(sorted(found, key=natural))


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
    items = sorted(_items(folder), key=lambda item: natural(item.name))
    lister = _Lister(registry, {} if duplicates else None)
    entries: list[Entry] = []
    for done, item in enumerate(items):
        progress(done, len(items))
        entries.append(lister.entry(item))
    progress(len(items), len(items))
    return tuple(entries)


class _Item(NamedTuple):
    """One adapter to look at: its folder, its weights file where that is known, and its name below the whole."""

    folder: Path
    file: str
    name: str

    @property
    def path(self) -> Path:
        """The file, or the folder."""
        return self.folder / self.file if self.file else self.folder


def _items(folder: Path) -> Iterator[_Item]:
    """Folders with a config or a record, all other weights files but a base's, and folders that are shut."""
    shut: list[OSError] = []
    for place, inner, names in os.walk(folder, onerror=shut.append):
        inner[:] = sorted(name for name in inner if not name.startswith(".") and not is_partial(name))
        here = Path(place)
        below = here.relative_to(folder).as_posix() if here != folder else ""
        named = bool({_CONFIG, FILENAME} & set(names) and below)
        if named or not set(_MODEL) & set(names):
            weights = [name for name in names if name.lower().endswith(_WEIGHTS) and not is_partial(name)]
            every = [*weights, *_pickles(names)]
            main = _main(weights) or _main(every[len(weights) :]) if named else ""
            if named and (main or not every):
                yield _Item(here, main, below)
            loose = (name for name in every if name != main)
            yield from (_Item(here, name, f"{below}/{name}" if below else name) for name in loose)
    for each in shut:
        if each.filename:
            closed = Path(os.fsdecode(each.filename))
            yield _Item(closed, "", closed.relative_to(folder).as_posix())


def _main(names: Sequence[str]) -> str:
    """The weights file that a config or record beside it is of; "" where nothing tells."""
    usual = next((name for name in _USUAL if name in names), "")
    return usual or (names[0] if len(names) == 1 else "")


def _pickles(names: Sequence[str]) -> list[str]:
    """Files that may hold an adapter's weights under other names than a container's, none of a training's states."""
    other = [name for name in names if name.lower().endswith(".sft") and not is_partial(name)]
    # one by one: together, the usual name hides the others
    return [*other, *(name for name in names if not is_partial(name) and weights_among([name]))]


def _files(folder: Path) -> list[str]:
    return [entry.name for entry in folder.iterdir() if entry.is_file() and not is_partial(entry.name)]


@final
class _Lister:
    """Makes entries, and remembers what they have in common."""

    def __init__(self, registry: Registry, digests: dict[str, str] | None) -> None:
        self._registry = registry
        self._digests = digests
        self._seen = Seen()
        self._recall = Recall(self._said)

    def entry(self, item: _Item) -> Entry:
        """The row of one adapter."""
        name = item.name
        try:
            if not item.file or self._seen.listed(item.folder).holds(item.file):
                files = survey_in(item.folder, item.file, self._seen)
            else:  # a link to nothing, or what is no file: to be told as for one adapter
                files = survey(item.path, seen=self._seen)
            recorded = self._seen.listed(files.folder).holds(FILENAME)  # and held against its files, each time
            found = self._recorded(item.path) if recorded else self._recall.of(files)
            if isinstance(found, Entry):
                return _unread(item, found.error.replace(_PLACE, str(item.path)), found.exit_code)
            file, entry = found
            file = file if file in files.headers else next(iter(files.headers))
            digest = "" if self._digests is None else tensors_digest(files.folder / file, files.headers[file])
        except LorahubError as error:
            pickle = item.file.lower().endswith(PICKLES) and error.hint
            return _unread(item, f"{error.message}; {error.hint}" if pickle else error.message, error.exit_code)
        except OSError as error:  # a folder that may not be listed
            return _unread(item, f"{name}: {error.strerror or error}", Unavailable.exit_code)
        same = name if self._digests is None else self._digests.setdefault(digest, name)
        return replace(entry, name=name, nbytes=files.headers[file].size, same_as="" if same == name else same)

    def _recorded(self, item: Path) -> tuple[str, Entry] | Entry:
        return self._facts(open_header(item, self._registry, seen=self._seen))

    def _said(self, files: AdapterFiles) -> tuple[str, Entry] | Entry:
        """What is remembered of a file: its facts, or why it cannot be read where the words would fit another too."""
        try:
            return self._facts(recognise(files, self._registry))
        except LorahubError as error:
            name = next(iter(files.headers)) if len(files.headers) == 1 else ""
            said = error.message.replace(str(files.folder / name), _PLACE)
            if name and name not in said and str(files.folder) not in said:
                return Entry(name="", error=said, exit_code=error.exit_code)
            raise

    def _facts(self, header: AdapterHeader) -> tuple[str, Entry]:
        """The weights file, and what its header says: all of a row that other files may share."""
        groups = header.reading.groups
        scales = {
            float(scale)
            for each in representatives(groups)
            if isinstance(scale := each.options.get("scale"), int | float)
        }
        metadata = header.files.headers[header.reading.file].metadata
        return header.reading.file, Entry(
            name="",
            format=header.format,
            kinds=header.kinds,
            ranks=header.ranks,
            scales=tuple(sorted(scales)),
            base=base_of(header),
            looks_like=label_of(metadata, lambda: modules_of(groups, self._registry.kinds)),
            codes=tuple(each.code for each in header.findings if each.level >= Verdict.UNVERIFIED),
        )


def _unread(item: _Item, why: str, exit_code: int) -> Entry:
    size = item.path.stat().st_size if item.file and item.path.is_file() else None
    return Entry(name=item.name, nbytes=size, error=why, exit_code=exit_code)


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
    writer.writerow(
        ["name", "format", "kinds", "ranks", "scale", "bytes", "base", "looks_like", "findings", "same_as", "error"]
    )
    for each in entries:
        several = (" ".join(map(str, values)) for values in (each.kinds, each.ranks))
        scales = " ".join(f"{scale:.17g}" if float(f"{scale:g}") != scale else f"{scale:g}" for scale in each.scales)
        size = "" if each.nbytes is None else str(each.nbytes)
        facts = [each.name, each.format, *several, scales, size, each.base, each.looks_like]
        writer.writerow([*facts, each.findings, each.same_as, each.error])
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
