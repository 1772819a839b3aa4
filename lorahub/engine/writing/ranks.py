"""Several processes, on one host or many, that make one folder together: who makes what, and who is still there.

All they share is a folder.  Each writes a small file there again and again; one whose file stands still, or says that
it failed, is given up, and so is the run.  No process group, no ports.  Knows nothing of weights.
"""

from __future__ import annotations

import os
import secrets
import threading
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeVar, final

from lorahub.errors import RankFailed, UsageError
from lorahub.files.atomic import write_failed
from lorahub.files.locks import Lock
from lorahub.files.raw import write_at

__all__ = ["ALONE", "Ranks", "Roll"]

_BEAT = 0.5  # seconds between two signs of life
_FAILED = " failed: "


class _Sized(Protocol):
    @property
    def name(self) -> str: ...

    @property
    def nbytes(self) -> int: ...


S = TypeVar("S", bound=_Sized)


@dataclass(frozen=True, slots=True, kw_only=True)
class Ranks:
    """One process of several.

    Attributes:
        rank: which, from 0; that one writes what there is once.
        world: how many.
        patience: seconds without a sign of life after which another counts as gone.
    """

    rank: int = 0
    world: int = 1
    patience: float = 60.0

    def __post_init__(self) -> None:
        """Refuse what is no rank of that many."""
        if not 0 <= self.rank < self.world or not self.patience > 0:
            raise UsageError(f"rank {self.rank} of {self.world}, patience {self.patience:g}: no such process")

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] | None = None) -> Ranks:
        """What ``torchrun`` and its like say in ``RANK`` and ``WORLD_SIZE``; one process alone where they say nothing.

        Raises:
            UsageError: they are no such numbers.
        """
        said = os.environ if environment is None else environment
        rank, world = said.get("RANK", "0"), said.get("WORLD_SIZE", "1")
        if not (rank.isdecimal() and world.isdecimal()):
            raise UsageError(f"RANK={rank} and WORLD_SIZE={world} in the environment are no numbers of processes")
        return cls(rank=int(rank), world=int(world))

    @property
    def alone(self) -> bool:
        """Whether there is only one."""
        return self.world == 1

    def share(self, pieces: Iterable[S], rank: int | None = None) -> tuple[S, ...]:
        """The pieces that a rank makes (this one by default), about as many bytes as every other's."""
        loads = [0] * self.world
        mine = []
        wanted = self.rank if rank is None else rank
        for piece in sorted(pieces, key=lambda each: (-each.nbytes, each.name)):
            least = loads.index(min(loads))
            loads[least] += piece.nbytes
            if least == wanted:
                mine.append(piece)
        return tuple(sorted(mine, key=lambda each: each.name))


ALONE = Ranks()


@final
class Roll:
    """Who is there: this process's own sign of life, and a look at the others'.

    Attributes:
        nonce: drawn for this process; what it writes carries it, so that nothing of an earlier run is taken for it.
    """

    def __init__(self, folder: Path, ranks: Ranks) -> None:
        """Sign on.

        Raises:
            WriteFailed: another process is this rank, or the folder cannot be written to.
        """
        self._folder, self._ranks = folder, ranks
        self.nonce = secrets.token_hex(8)
        self._first = {rank: self._read(rank) for rank in range(ranks.world) if rank != ranks.rank}
        now = time.monotonic()
        self._last = {rank: (text, now) for rank, text in self._first.items()}
        self._stop = threading.Event()
        path = self._path(ranks.rank)
        try:
            path.touch()
            self._file = path.open("r+b", buffering=0)
            try:
                self._lock = Lock(path)
                self._file.truncate(0)
                self._write(0)
            except BaseException:
                self._file.close()
                raise
        except OSError as error:
            raise write_failed(path, error) from None
        self._thread = threading.Thread(target=self._beat, name="lorahub-roll", daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Return while everybody is there.

        Raises:
            RankFailed: one says that it failed, or has given no sign of life for too long.
        """
        now = time.monotonic()
        for rank, (before, since) in self._last.items():
            text = self._read(rank)
            if text != before:
                self._last[rank] = text, now
            elif now - since > self._ranks.patience:
                raise RankFailed(
                    f"rank {rank} of {self._ranks.world} gave no sign of life for {self._ranks.patience:g} seconds",
                    "start all of them again: what is finished is kept",
                )
            if _FAILED in text and text != self._first[rank] and text.endswith("\n"):
                reason = text.partition(_FAILED)[2].strip()
                raise RankFailed(f"rank {rank} of {self._ranks.world} failed: {reason}", "see what it says itself")

    def present(self, rank: int) -> str:
        """The nonce of another rank of this run, or "" as long as nothing was seen of it."""
        text = self._last[rank][0]
        return text.partition(" ")[0] if text != self._first[rank] else ""

    def fail(self, reason: str) -> None:
        """Tell the others why this one gives up."""
        self._silence()
        try:
            self._file.truncate(0)
            write_at(self._file, 0, f"{self.nonce}{_FAILED}{' '.join(reason.split())[:500]}\n".encode())
        except OSError:  # they will notice its silence
            return

    def sign_off(self) -> None:
        """Give no more signs of life; twice does no harm."""
        self._silence()
        self._lock.release()
        self._file.close()

    def _silence(self) -> None:
        self._stop.set()
        self._thread.join()

    def _beat(self) -> None:
        number = 0
        while not self._stop.wait(_BEAT):
            number += 1
            try:
                self._write(number)
            except OSError:  # a full disk is for the writers to say
                continue

    def _write(self, number: int) -> None:
        write_at(self._file, 0, f"{self.nonce} {number:012d}\n".encode())

    def _read(self, rank: int) -> str:
        try:
            return self._path(rank).read_text(encoding="utf-8", errors="replace")
        except OSError:  # not there yet, or gone with the folder
            return ""

    def _path(self, rank: int) -> Path:
        return self._folder / f"rank-{rank}"
