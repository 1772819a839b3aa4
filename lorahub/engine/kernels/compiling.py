"""Compiles a kernel's C source for this machine, once, and loads it.

What was compiled is kept in ``LORAHUB_KERNELS``, or beside lorahub's other caches, under a name made of the source and
of everything that the compiler says of itself and of the machine: another compiler, or another processor on the same
home, finds nothing and compiles again.  Knows nothing of what the kernels compute.
"""

from __future__ import annotations

import ctypes
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from functools import lru_cache
from hashlib import sha256
from pathlib import Path

from lorahub.files.user import cache_root

__all__ = ["NotCompiled", "SwitchedOff", "library"]

_SWITCH = "LORAHUB_KERNELS"
_COMPILERS = ("cc", "gcc", "clang")
_NATIVE = ("-mcpu=native",) if platform.machine().lower() in {"arm64", "aarch64"} else ("-march=native",)
_FLAGS = ("-std=gnu11", "-O3", "-fPIC", "-shared", *_NATIVE)
_PATIENCE = 120.0  # seconds; compiling takes about one


class NotCompiled(Exception):
    """Why there is no library."""


class SwitchedOff(NotCompiled):
    """There is none because somebody wants none."""


@lru_cache(maxsize=8)
def library(source: Path, *headers: Path) -> ctypes.CDLL:
    """The compiled source.

    Args:
        source: one C file.
        headers: all that it includes and that is not the compiler's, from the same folder.

    Raises:
        SwitchedOff: ``LORAHUB_KERNELS=off``.
        NotCompiled: there is no compiler, or it cannot do it.
    """
    chosen = os.environ.get(_SWITCH, "")
    if chosen.lower() == "off":
        raise SwitchedOff(f"{_SWITCH} is off")
    compiler = _compiler()
    try:
        text = b"".join(file.read_bytes() for file in (source, *headers))
        about = _run([*compiler, *_NATIVE, "-dM", "-E", "-x", "c", os.devnull])
        name = f"{source.stem}-{sha256(b'|'.join((text, about, repr(_FLAGS).encode()))).hexdigest()[:32]}.so"
        with suppress(OSError):
            kept = _own(Path(chosen).expanduser() if chosen else cache_root() / "kernels")
            return ctypes.CDLL(str(_compiled(source, compiler, kept / name)))
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as scratch:  # no folder can be written to
            return ctypes.CDLL(str(_compiled(source, compiler, Path(scratch) / name)))
    except OSError as error:
        raise NotCompiled(f"what {compiler[0]} made of {source.name} cannot be loaded: {error}") from None


def _compiler() -> Sequence[str]:
    asked = shlex.split(os.environ.get("CC", ""))
    found = next((path for name in (asked[:1] or _COMPILERS) if (path := shutil.which(name))), None)
    if found is None:
        raise NotCompiled(f"there is no C compiler here ({', '.join(asked[:1] or _COMPILERS)})")
    if sys.platform == "darwin" and found.startswith("/usr/bin/"):
        _run(["xcode-select", "-p"])  # without the tools, what lies there would ask the user to install them
    return [found, *asked[1:]]


def _own(folder: Path) -> Path:
    """The folder, made where it is missing.

    Raises:
        OSError: it cannot be made, or somebody else could put something there.
    """
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    about = folder.stat()
    if hasattr(os, "getuid") and (about.st_uid != os.getuid() or about.st_mode & 0o022):
        raise PermissionError(f"{folder} can be written to by others")
    return folder


def _compiled(source: Path, compiler: Sequence[str], target: Path) -> Path:
    """``target``, made where it is missing; several processes may be at it."""
    if not target.exists():
        handle, name = tempfile.mkstemp(dir=target.parent, suffix=target.suffix)
        os.close(handle)
        made = Path(name)
        try:
            _run([*compiler, *_FLAGS, "-o", name, str(source)])
            made.replace(target)
        finally:
            made.unlink(missing_ok=True)
    return target


def _run(command: Sequence[str]) -> bytes:
    try:
        done = subprocess.run(command, capture_output=True, timeout=_PATIENCE, check=False, stdin=subprocess.DEVNULL)  # noqa: S603 - the user's compiler on our source
    except (OSError, subprocess.SubprocessError) as error:
        raise NotCompiled(f"{command[0]} cannot be run: {error}") from None
    if done.returncode:
        said = done.stderr.decode(errors="replace").splitlines()
        why = next((line.strip() for line in said if "error" in line), "it does not say why")
        raise NotCompiled(f"{command[0]} failed: {why}")
    return done.stdout
