"""A write-ahead journal: byte ranges of files in one folder, replaced all or none, whenever the process dies.

Until ``commit`` no file is touched, and a draft that is left behind is dropped.  From ``commit`` on, which renames a
journal that is on the disk, the change is decided: ``apply`` makes it, as often as it takes, and ``settle`` completes
it for a process that died.  Where the old bytes were kept, ``revert`` is the same thing backwards.
Knows files and ranges; no tensors.
"""

from __future__ import annotations

import io
import os
import shutil
import stat
import threading
import zlib
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, final

from lorahub.deltas.kind import JSON
from lorahub.errors import IntegrityError, NotFound, WriteFailed
from lorahub.files.atomic import atomic_write, flush, flush_folder, put_in_place, write_failed
from lorahub.files.journal_content import JOURNAL, Content, Range, encode, read_content
from lorahub.files.locks import Lock
from lorahub.files.raw import Bytes, as_bytes, open_regular, read_into, write_at
from lorahub.names import check_path

__all__ = ["PENDING", "Draft", "demand_settled", "demand_writable", "hold_settled", "revert", "settle"]

DRAFT = ".lorahub-in-place.partial"
PENDING = ".lorahub-in-place"
REVERTING = ".lorahub-in-place-undo"
KEPT = ".lorahub-undo-"

_NEW, _OLD = "new.bin", "old.bin"
_PARTIAL = ".lorahub-in-place-file.partial"  # one name, so that whoever completes the change uses what is left of it
_CHUNK = 8 << 20


@final
class Draft:
    """A change that is being written down.  ``replace`` may be called from several threads.

        with Draft(folder, keep=False) as draft:
            draft.replace("model.safetensors", 4096, old, new)
            draft.commit({})
            draft.apply()

    The caller holds the folder's lock.
    """

    def __init__(self, folder: Path, *, keep: bool) -> None:
        """Start an empty one.

        Args:
            folder: where the files lie; settled.
            keep: keep the old bytes, for ``revert``.

        Raises:
            WriteFailed: it cannot be created.
        """
        self._folder, self._place, self._keep = folder, folder / DRAFT, keep
        self._content, self._end, self._lock = Content(), 0, threading.Lock()
        self._logs: dict[str, io.FileIO] = {}
        try:
            self._place.mkdir()
            for name in (_NEW, _OLD) if keep else (_NEW,):
                self._logs[name] = (self._place / name).open("x+b", buffering=0)
        except OSError as error:
            self.discard()
            raise write_failed(self._place, error) from None

    @property
    def nbytes(self) -> int:
        """Bytes of files that will change."""
        return self._end

    def replace(self, file: str, offset: int, old: Bytes, new: Bytes) -> None:
        """Note that ``old``, which lies at ``offset`` of a file, shall become ``new``; nothing where they are equal.

        Raises:
            WriteFailed: no space.
        """
        was, will = as_bytes(old), as_bytes(new)
        before, after = zlib.crc32(was), zlib.crc32(will)
        if before == after and bytes(was) == bytes(will):  # views compare byte by byte, many times slower
            return
        with self._lock:
            at, self._end = self._end, self._end + len(will)
        try:
            write_at(self._logs[_NEW], at, will)
            if self._keep:
                write_at(self._logs[_OLD], at, was)
        except OSError as error:
            raise write_failed(self._place, error) from None
        entry = Range(file, offset, len(will), at, after, before)
        with self._lock:
            self._content.ranges.append(entry)

    def small(self, name: str, content: bytes) -> None:
        """Note that a small file shall have this content; nothing where it has.

        Raises:
            WriteFailed: no space.
            UnsafePath: the name leaves the folder.
        """
        check_path(name)
        path = self._folder / name
        try:
            before = path.read_bytes() if path.is_file() else None
            if before == content:
                return
            for folder, value in ((_NEW, content), (_OLD, before if self._keep else None)):
                if value is not None:
                    kept = self._place / f"{folder}.d" / name
                    kept.parent.mkdir(parents=True, exist_ok=True)
                    atomic_write(kept, value)
                    flush_folder(self._place / f"{folder}.d")
        except OSError as error:
            raise write_failed(path, error) from None
        self._content.small[name] = before is not None

    def commit(self, about: Mapping[str, JSON]) -> None:
        """Decide the change: from here on it will be made, by this process or by the next that looks.

        Args:
            about: what ``settle`` and ``revert`` give back.

        Raises:
            WriteFailed: it could not be brought to the disk; nothing is decided.
        """
        content = self._content
        content.ranges.sort(key=lambda each: (each.file, each.offset))
        content.sizes = {name: (self._folder / name).stat().st_size for name in {each.file for each in content.ranges}}
        content.about = about
        try:
            for log in self._logs.values():
                flush(log)
                log.close()
            atomic_write(self._place / JOURNAL, encode(content))
            _rename(self._place, self._folder / PENDING)
        except OSError as error:
            if not self._place.exists():  # renamed, and that may not be on the disk yet
                raise _half_made(self._folder, error) from None
            raise write_failed(self._place, error) from None

    def apply(self) -> None:
        """Make the change.

        Raises:
            WriteFailed: the system refuses; the change stays decided, and ``settle`` goes on with it.
        """
        _finish(self._folder, self._folder / PENDING, self._content)

    def discard(self) -> None:
        """Forget a change that was not decided; nothing happens after ``commit``."""
        for log in self._logs.values():
            log.close()
        _remove(self._place)

    def __enter__(self) -> Draft:
        return self

    def __exit__(self, *_: object) -> None:
        self.discard()


def hold_settled(folder: Path) -> tuple[Lock, Mapping[str, Any] | None]:
    """Hold a folder, complete what a process that died had decided there, and drop what it had not.

    Returns:
        The lock, which the caller releases, and what ``commit`` was given for the completed change, if there was one;
        ``"undone"`` is true there where it was taken back.

    Raises:
        WriteFailed: another process holds the folder, or the system refuses; the change stays decided.
        IntegrityError: the journal or a file is not what was written.
    """
    lock = Lock(folder)
    try:
        about: Mapping[str, Any] | None = None
        _remove(folder / DRAFT)
        for place in (folder / PENDING, folder / REVERTING):
            if place.is_dir():
                content = read_content(place)
                _finish(folder, place, content)
                about = {**content.about, "undone": place.name == REVERTING}
    except BaseException:
        lock.release()
        raise
    return lock, about


def settle(folder: Path) -> Mapping[str, Any] | None:
    """As ``hold_settled``, without keeping the folder."""
    lock, about = hold_settled(folder)
    lock.release()
    return about


def revert(folder: Path) -> Mapping[str, Any]:
    """Put back the bytes that the last kept change replaced, all or none.

    Returns:
        What ``commit`` was given for it.

    Raises:
        NotFound: no change was kept there.
        IntegrityError: the files changed since; nothing was put back.
        WriteFailed: the system refuses; where that is half-way, ``settle`` goes on with it.
    """
    lock, about = hold_settled(folder)
    try:
        if about is not None and about.get("undone"):  # the process that was asked for it died
            return about
        kept = _kept(folder)
        if not kept:
            raise NotFound(
                f"{folder} has no kept journal to undo a merge with",
                "merge with --in-place --keep-undo next time; this time, fetch the base again",
            )
        content = read_content(kept[-1])
        _demand_unchanged(folder, kept[-1], content)
        try:
            _rename(kept[-1], folder / REVERTING)
        except OSError as error:
            raise _half_made(folder, error) from None
        _finish(folder, folder / REVERTING, content)
        return {**content.about, "undone": True}
    finally:
        lock.release()


def demand_settled(folder: Path) -> None:
    """Return where no change is half made.

    Raises:
        IntegrityError: some files may be old and some new.
    """
    if (folder / PENDING).is_dir() or (folder / REVERTING).is_dir():
        raise IntegrityError(
            f"a merge in place was interrupted in {folder}, and its weights are partly old, partly new",
            f"complete it first, by giving the command again: lorahub merge ... --base {folder} --in-place",
        )


def demand_writable(path: Path) -> None:
    """Return where a file's bytes may be replaced without changing any other.

    Raises:
        WriteFailed: it is a link, or one of several names of its content, or read-only.
    """
    try:
        found = path.lstat()
    except OSError as error:
        raise write_failed(path, error) from None
    hint = "merge to a new folder with -o, or copy the base first: cp -rL"
    if stat.S_ISLNK(found.st_mode):
        raise WriteFailed(f"{path} is a link, and what it points at may be shared (a hub's cache)", hint)
    if not stat.S_ISREG(found.st_mode):
        raise WriteFailed(f"{path} is no regular file", hint)
    if found.st_nlink > 1:
        raise WriteFailed(f"{path} has {found.st_nlink} names (hard links), and all would change with it", hint)
    if not found.st_mode & stat.S_IWUSR or not os.access(path, os.W_OK):
        raise WriteFailed(f"{path} is read-only", f"if it is yours to change: chmod u+w {path}")


def _finish(folder: Path, place: Path, content: Content) -> None:
    """Make a decided change and take its journal away, or put it aside where the old bytes were kept."""
    back = place.name == REVERTING
    try:
        for name in dict.fromkeys(each.file for each in content.ranges):
            _write_file(folder / name, place, content, back=back)
        for name, existed in content.small.items():
            _write_small(folder / name, place / f"{_OLD if back else _NEW}.d" / name, remove=back and not existed)
        aside = folder / (DRAFT if back or not (place / _OLD).exists() else f"{KEPT}{len(_kept(folder)) + 1}")
        place.rename(aside)
    except OSError as error:
        raise _half_made(folder, error) from None
    with suppress(OSError):  # all is made; were the rename lost, it would be made again
        flush_folder(folder)
        (aside / _NEW).unlink()  # of a kept change: what it made is known by its checksums
    _remove(folder / DRAFT)


def _half_made(folder: Path, error: OSError) -> WriteFailed:
    failed = write_failed(folder, error)
    return WriteFailed(
        f"{failed.message}; the change is decided and partly made",
        f"{failed.hint or 'see to that'}, then give the command again: it goes on from there",
    )


def _write_file(path: Path, place: Path, content: Content, *, back: bool) -> None:
    """Replace the ranges of one file and bring them to the disk."""
    demand_writable(path)
    buffer = memoryview(bytearray(_CHUNK))
    with open_regular(place / (_OLD if back else _NEW)) as log, path.open("r+b", buffering=0) as file:
        if os.fstat(file.fileno()).st_size != content.sizes[path.name]:
            raise IntegrityError(f"{path} has another size than when the change was decided", "fetch the base again")
        for each in content.ranges:
            if each.file != path.name:
                continue
            if _crc(log, each.at, each.nbytes, buffer) != (each.old if back else each.new):
                raise IntegrityError(f"{place} is damaged", f"fetch the base again, and remove {place}")
            for start in range(0, each.nbytes, _CHUNK):
                part = buffer[: each.nbytes - start]
                read_into(log, each.at + start, part)
                write_at(file, each.offset + start, part)
        flush(file)


def _write_small(path: Path, content: Path, *, remove: bool) -> None:
    if remove:
        path.unlink(missing_ok=True)
        flush_folder(path.parent)
    elif content.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(_PARTIAL)
        with partial.open("w+b", buffering=0) as file:
            write_at(file, 0, content.read_bytes())
            flush(file)
        put_in_place(partial, path)


def _demand_unchanged(folder: Path, place: Path, content: Content) -> None:
    """Every range still holds what the change made it."""
    buffer = memoryview(bytearray(_CHUNK))
    for name in dict.fromkeys(each.file for each in content.ranges):
        demand_writable(folder / name)
        with open_regular(folder / name) as file:
            same = os.fstat(file.fileno()).st_size == content.sizes[name] and all(
                _crc(file, each.offset, each.nbytes, buffer) == each.new for each in content.ranges if each.file == name
            )
        if not same:
            raise _changed(folder / name)
    for name in content.small:
        if (folder / name).read_bytes() != (place / f"{_NEW}.d" / name).read_bytes():
            raise _changed(folder / name)


def _changed(path: Path) -> IntegrityError:
    return IntegrityError(
        f"{path} changed since the merge, so what was there before it does not belong there any more",
        "undo that change yourself, or fetch the base again",
    )


def _crc(file: io.FileIO, offset: int, nbytes: int, buffer: memoryview) -> int:
    value = 0
    for start in range(0, nbytes, len(buffer)):
        part = buffer[: nbytes - start]
        read_into(file, offset + start, part)
        value = zlib.crc32(part, value)
    return value


def _kept(folder: Path) -> list[Path]:
    """Kept journals, the oldest first."""
    numbers = [path.name.removeprefix(KEPT) for path in folder.glob(f"{KEPT}*") if path.is_dir()]
    return [folder / f"{KEPT}{number}" for number in sorted(int(each) for each in numbers if each.isdecimal())]


def _rename(before: Path, after: Path) -> None:
    flush_folder(before)
    before.rename(after)
    flush_folder(after.parent)


def _remove(place: Path) -> None:
    if place.is_dir():
        shutil.rmtree(place, ignore_errors=True)  # its name says that it is unfinished, wherever it stays
