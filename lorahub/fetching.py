"""From what people write to files here: a path is taken as it is, a reference is fetched from its hub.

Knows hubs and folders, and not what an adapter is.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from lorahub.errors import Degraded, InvalidRef, NotFound, UsageError
from lorahub.findings import Finding, Verdict, worst
from lorahub.hub import open_hub
from lorahub.hub.placing import put_at
from lorahub.names import Ref, no_weight, printable

if TYPE_CHECKING:
    from lorahub.hub.hub import Pin

__all__ = ["Place", "Progress", "Pulled", "Source", "as_ref", "locate", "pull", "quiet", "resolve"]

Source: TypeAlias = "str | os.PathLike[str] | Ref"
"""An adapter as people write it: a folder, a file, or ``ns/name[@SELECTOR][/path][:WEIGHT]``."""

Progress: TypeAlias = "Callable[[int, int], None]"
"""Called with (done, in all): bytes where files move, parameters where a live model changes."""


def quiet(_done: int, _total: int) -> None:
    """Progress that nobody watches."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pulled:
    """An adapter that was fetched.

    Attributes:
        folder: where its verified files lie.
        pin: exactly which commit and files it is.
        findings: what the hub let on meanwhile: a version that moved and was allowed, a new name, a successor.
    """

    folder: Path
    pin: Pin
    findings: tuple[Finding, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where an adapter lies: its folder, the weights file that the reference named (or ""), and what people call it."""

    folder: Path
    weight_name: str
    label: str


def as_ref(source: Source, *, bare: bool = False) -> Ref:
    """The reference; a path that exists is taken as a path, also where it could be a name on a hub.

    What exists as a whole is that path, also where it ends as a weight does (``runs/step:30``).

    Args:
        source: what was given.
        bare: also take names without a namespace, as old bases have ("gpt2").

    Raises:
        InvalidRef: it does not follow the grammar, or what is behind the ":" after a path that exists is no number.
        NotFound: one word that is no path here.
        UsageError: it is neither text nor a path.
    """
    if isinstance(source, Ref):
        return source
    given: object = source  # whatever its type says: people wrote it
    if not isinstance(given, str | os.PathLike):
        raise UsageError(
            f"a {type(given).__name__} is no path and no reference", "give a folder, a file, or NS/NAME[@SELECTOR]"
        )
    text = _of_the_hub(os.fspath(source))
    name, equals, place = text.partition("=")
    for head, tail in (("", text), (f"{name}=", place)) if equals else (("", text),):
        clear = Path(tail).is_absolute() or tail.startswith(("./", "../"))
        for path in (tail,) if clear else (f"./{tail}", *([tail] if tail.startswith("~") else [])):
            with suppress(InvalidRef):
                parsed = Ref.parse(f"{head}{path}")
                if parsed.weight is not None and _exists(path):
                    return Ref(name=parsed.name, path=path.rstrip("/"))
                if path != tail and parsed.path is not None and _exists(parsed.path):
                    return parsed
            if before := _unweighed(path):
                raise no_weight(text, f"{head}{before.removeprefix('./')}")
    try:
        return Ref.parse(text, bare=bare)
    except InvalidRef as error:
        if "/" in text or "@" in text or ":" in text:
            raise
        raise NotFound(f"there is no file or folder called {printable(text)} here", error.hint) from None


def _of_the_hub(text: str) -> str:
    """A pasted page of the hub that ``HF_ENDPOINT`` names, as the page of that name on huggingface.co."""
    endpoint = os.environ.get("HF_ENDPOINT", "").rstrip("/")
    return f"https://huggingface.co/{text.removeprefix(f'{endpoint}/')}" if _is_below(text, endpoint) else text


def _is_below(text: str, endpoint: str) -> bool:
    return "://" in endpoint and text.startswith(f"{endpoint}/")


def _unweighed(path: str) -> str:
    """The path before a ":" behind which stands no weight, where it exists and the whole does not; else ""."""
    before, _, after = path.rpartition(":")
    if not before.strip("./") or "/" in after or "\\" in after or _exists(path) or not _exists(before):
        return ""
    with suppress(InvalidRef):
        return "" if Ref.parse(f"./it:{after}").weight is not None else before
    return before


def _exists(path: str) -> bool:
    return os.path.exists(os.path.expanduser(path))  # noqa: PTH110, PTH111 - Path.exists raises for an over-long name


def _fetch(
    ref: Ref,
    hub: str | None,
    local_files_only: bool,
    progress: Progress,
    *,
    token: str | None = None,
    allow: Collection[str] = (),
    dest: Path | None = None,
) -> Pulled:
    opened = open_hub(hub, token=token, local_files_only=local_files_only)
    pin = opened.resolve(ref)
    _refuse(ref, pin, allow)
    folder = opened.pull(pin, progress=lambda _file, done, total: progress(done, total))
    if "tag-moved" in {each.code for each in pin.said}:
        opened.trust(pin)
    if dest is not None:
        folder = put_at(folder, dest)
    return Pulled(folder=folder, pin=pin, findings=pin.said)


def _refuse(ref: Ref, pin: Pin, allow: Collection[str]) -> None:
    """Raise what a hub let on and nobody allowed.

    Raises:
        Degraded: a version is another commit than it was.
    """
    stopping = tuple(each for each in pin.said if worst([each], allowed=allow) >= Verdict.DEGRADED)
    if stopping:
        codes = " ".join(f"--allow {code}" for code in sorted({each.code for each in stopping}))
        plain = Ref(repo=ref.repo, selector=ref.selector, subpath=ref.subpath)
        raise Degraded(
            f"{pin} is not what it was, so nothing was fetched", f"To accept it: lorahub pull {plain} {codes}", stopping
        )


def locate(
    source: Source, hub: str | None, local_files_only: bool, progress: Progress, *, token: str | None = None
) -> Place:
    """Where an adapter lies, fetched first where it is on a hub.

    Raises:
        NotFound: there is nothing at that path.
        Degraded, Unavailable, IntegrityError, WriteFailed: as ``pull``.
    """
    ref = as_ref(source)
    if ref.path is None:
        pulled = _fetch(ref, hub, local_files_only, progress, token=token)
        return Place(folder=pulled.folder, weight_name=pulled.pin.file, label=str(pulled.pin))
    path = Path(ref.path).expanduser()
    if path.is_dir():
        return Place(folder=path, weight_name="", label=ref.path)
    if path.is_file():
        return Place(folder=path.parent, weight_name=path.name, label=ref.path)
    raise NotFound(
        f"there is no adapter at {path}", "give a folder, a .safetensors file, or ns/name[@VERSION] on a hub"
    )


def pull(
    ref: Source,
    *,
    hub: str | None = None,
    token: str | None = None,
    local_files_only: bool = False,
    dest: str | os.PathLike[str] | None = None,
    allow: Collection[str] = (),
    progress: Progress = quiet,
) -> Pulled:
    """Fetch an adapter from a hub, verify every file, and say where it lies.

    Args:
        ref: ``ns/name[@SELECTOR][/folder-or-file]``.
        hub: path of a folder hub; None takes ``LORAHUB_HUB``, else Hugging Face.
        token: for Hugging Face; None takes ``HF_TOKEN`` or that of ``hf auth login``.
        local_files_only: use the cache alone.
        dest: also put a copy of the files here, whole or not at all: a folder that is not there yet, is empty, or holds
            just these files.
        allow: codes of findings to go on with all the same, such as "tag-moved", which is accepted from then on.
        progress: called with (bytes done, bytes in all).

    Raises:
        Degraded: a version tag is another commit than when this machine first saw it.
        Unavailable: it does not exist, is not accessible, or the network is needed and not there.
        IntegrityError: a file is not what the hub says it is.
        WriteFailed: it cannot be written, or there is too little room for it.
    """
    place = Path(dest) if dest is not None else None
    return _fetch(_on_hub(ref), hub, local_files_only, progress, token=token, allow=allow, dest=place)


def resolve(
    ref: Source,
    *,
    hub: str | None = None,
    token: str | None = None,
    local_files_only: bool = False,
    allow: Collection[str] = (),
) -> Pin:
    """What ``pull`` would fetch: the commit, its files and sizes; nothing is fetched.

    Raises:
        Degraded, Unavailable, IntegrityError: as ``pull``.
    """
    parsed = _on_hub(ref)
    pin = open_hub(hub, token=token, local_files_only=local_files_only).resolve(parsed)
    _refuse(parsed, pin, allow)
    return pin


def _on_hub(ref: Source) -> Ref:
    parsed = as_ref(ref)
    if parsed.path is not None:
        raise UsageError(f"{ref} is a local path; only hub references are pulled", "lorahub pull NS/NAME[@VERSION]")
    return parsed
