"""The names people type: references, version selectors, globs, file names, and the nearest word to a mistyped one.

Pure text, save that the hint of a refused reference may look whether a folder of that name lies here.  Knows no hub
and not what a repository holds; ``hub/versions.py`` decides what a selector comes to there.
"""

from __future__ import annotations

import math
import os
import re
import unicodedata
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Literal, Self
from urllib.parse import unquote, urlsplit

from packaging.specifiers import InvalidSpecifier, SpecifierSet
from packaging.version import InvalidVersion, Version

from lorahub.errors import InvalidRef, UnsafePath

__all__ = [
    "COMMIT",
    "Ref",
    "Selector",
    "as_version",
    "check_path",
    "did_you_mean",
    "matches",
    "no_weight",
    "path_problem",
    "printable",
]

COMMIT = re.compile(r"[0-9a-f]{40}", re.ASCII)
"""A commit in full; a shorter prefix is never taken for one."""

EXAMPLE = "A reference looks like acme/ink, acme/ink@1.2, ink=acme/ink@~=1.2/folder:0.8 or ./folder."

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_.-]{0,63}", re.ASCII)
_WEIGHT = re.compile(r"[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?", re.ASCII)
_REPO_PART = re.compile(r"[A-Za-z0-9_](?:[A-Za-z0-9_.-]*[A-Za-z0-9_])?", re.ASCII)
_LOCAL = re.compile(r"(?:\.{0,2}|~[^/\\]*|[A-Za-z]:)[/\\]|(?:\.{1,2}|~[^/\\]*)$")
_HUB = re.compile(
    r"(?P<repo>[^/@]*/[^/@]*)(?:@(?P<selector>refs/(?:pr|heads|tags)/[^/]*|[^/]*))?(?:/(?P<subpath>.*))?", re.DOTALL
)
_BARE = re.compile(r"(?P<repo>[^/@]+)(?:@(?P<selector>refs/(?:pr|heads|tags)/[^/]*|[^/]*))?(?P<subpath>$)")
_URL = re.compile(r"(?:https?://|hf://|(?:huggingface\.co|hf\.co)/)", re.IGNORECASE)
_HOSTS = frozenset({"huggingface.co", "www.huggingface.co", "hf.co"})
_PAGES = frozenset({"tree", "blob", "resolve", "raw", "commit"})
_NOT_ADAPTERS = frozenset({"datasets", "spaces", "kernels", "buckets", "collections", "papers", "docs", "api"})
_LONGEST = 4096
_INVISIBLE = "it holds a control or invisible character"
_SECRET = re.compile(r"hf_[A-Za-z0-9]{8,}|(?<=//)[^/@\s]+(?=@)|(?i:(?<=bearer )\S+)")


def printable(text: str) -> str:
    """``text`` safe to show: control and invisible characters escaped, tokens and URL credentials masked."""
    shown = "".join(c if _shows(c) else c.encode("unicode_escape", "surrogatepass").decode("ascii") for c in text)
    return _SECRET.sub("***", shown)


def _shows(character: str) -> bool:
    return unicodedata.category(character) not in {"Cc", "Cs", "Cf", "Zl", "Zp"}


def did_you_mean(word: str, choices: Iterable[str]) -> str:
    """``" Did you mean 'x'?"`` for the choice nearest to ``word``, or ``""`` where none is near."""
    near = get_close_matches(word, list(choices), n=1, cutoff=0.6)
    return f" Did you mean '{printable(near[0])}'?" if near else ""


def matches(pattern: str, name: str) -> bool:
    """Whether ``name`` matches ``pattern`` as a whole, where ``*`` stands for any run of characters, dots included.

    Case counts, and every other character stands for itself.  Time is linear in the two lengths, whatever the pattern.
    """
    first, *rest = pattern.split("*")
    if not rest:
        return name == pattern
    *middle, last = rest
    if len(name) < len(first) + len(last) or not name.startswith(first) or not name.endswith(last):
        return False
    start, stop = len(first), len(name) - len(last)
    for piece in middle:
        start = name.find(piece, start, stop)
        if start < 0:
            return False
        start += len(piece)
    return True


# --------------------------------------------------------------------------------------------------- file names

_RESERVED = re.compile(r"(?i:con|prn|aux|nul|com[0-9¹²³]|lpt[0-9¹²³])(?:\..*)?", re.DOTALL)
_DEEPEST = 8
_LONGEST_PART = 255

_FORBIDDEN = frozenset('\\:*?"<>|')

_PART_RULES: tuple[tuple[str, Callable[[str], bool]], ...] = (
    ("has an empty component", lambda part: not part),
    ("climbs out with '.' or '..'", lambda part: part in {".", ".."}),
    ("holds a control or invisible character", lambda part: not all(map(_shows, part))),
    ('holds one of \\ : * ? " < > |', lambda part: not _FORBIDDEN.isdisjoint(part)),
    ("has a component that ends in a dot or a space", lambda part: part[-1] in ". "),
    ("has a component reserved by Windows", lambda part: _RESERVED.fullmatch(part) is not None),
    ("is not in Unicode normal form C", lambda part: not unicodedata.is_normalized("NFC", part)),
    ("has a component over 255 bytes", lambda part: len(part.encode()) > _LONGEST_PART),
)


def path_problem(name: str) -> str:
    """What keeps ``name`` from being a file name within a folder on every system, or ``""`` where nothing does."""
    if name.startswith("/"):
        return "is absolute"
    parts = name.split("/")
    if len(parts) > _DEEPEST:
        return f"lies more than {_DEEPEST} folders deep"
    return next((problem for part in parts for problem, holds in _PART_RULES if holds(part)), "")


def check_path(name: str) -> str:
    """``name`` itself, if it is a safe file name within a folder: relative, ``/`` between components, portable.

    Raises:
        UnsafePath: it could land outside its folder, or some system cannot hold it; the message says which rule.
    """
    if problem := path_problem(name):
        raise UnsafePath(f"the file name '{printable(name)}' {problem}")
    return name


# --------------------------------------------------------------------------------------------------- references


@dataclass(frozen=True, slots=True, kw_only=True)
class Ref:
    """What a person writes to name an adapter: ``[NAME=]ns/name[@SELECTOR][/folder-or-file][:WEIGHT]``.

    Instead of ``ns/name[@SELECTOR]`` there may be a local path or a pasted Hub URL.  A path is local when it starts
    with ``/``, ``./``, ``../``, ``~`` or a drive letter, or is ``.`` or ``..``; everything else is a hub reference,
    whether or not a folder of that name lies here.  A local path is versionless: ``@`` belongs to its name, and so does
    a ``:`` unless a number follows it to the end (``./a:1:1`` is folder ``a:1`` at weight 1).  A ``/`` within a branch
    name is written ``%2F``, except in ``refs/pr/N``, ``refs/heads/X`` and ``refs/tags/X``.

    Attributes:
        name: what the adapter is called from here on, or None.
        repo: "ns/name" (bare "name" only for bases), or None for a local path.
        path: the local path as typed, or None.
        selector: text of the ``Selector``, or None.
        subpath: folder or file within the repository, or "".
        weight: finite multiplier, or None where none was given.
    """

    name: str | None = None
    repo: str | None = None
    path: str | None = None
    selector: str | None = None
    subpath: str = ""
    weight: float | None = None

    def __post_init__(self) -> None:
        if problem := _problem(self):
            raise _invalid(str(self), *problem)

    @property
    def local(self) -> Path | None:
        """The local path with ``~`` expanded, or None for a hub reference."""
        return None if self.path is None else Path(self.path).expanduser()

    def __str__(self) -> str:
        text = f"{self.name}=" if self.name is not None else ""
        text += (self.path if self.path is not None else self.repo) or ""
        if self.selector is not None:
            text += f"@{_quote(self.selector)}"
        text += f"/{self.subpath}" if self.subpath else ""
        if self.weight is not None:
            return f"{text}:{self.weight!r}"
        # A name that ends as if in a weight is told apart by a closing slash.
        return f"{text}/" if self.path is not None and _split_weight(text)[1] is not None else text

    @classmethod
    def parse(cls, text: str, *, bare: bool = False) -> Self:
        """The reference that ``text`` spells.

        ``bare`` also takes a repository without namespace ("gpt2"), as some bases have.

        Raises:
            InvalidRef: ``text`` does not follow the grammar; the message points at the place.
        """
        if len(text) > _LONGEST:
            raise InvalidRef(f"a reference of {len(text)} characters is too long", EXAMPLE)
        if odd := next((c for c in text if not _shows(c)), ""):
            raise _invalid(text, odd, _INVISIBLE)
        match = re.match(rf"({_NAME.pattern})=", text)
        name, body = (match[1], text[match.end() :]) if match else (None, text)
        body, weight = _split_weight(body)
        if _LOCAL.match(body):
            short = body.rstrip("/")  # "/" and "C:/" are roots and keep their slash
            return cls(name=name, path=short if _LOCAL.match(short) else body, weight=weight)
        if ":" in (rest := _URL.sub("", body, count=1)) and not _URL.match(body):
            tail = rest[rest.index(":") :]
            why = f"'{printable(tail[1:])}' is no weight: after ':' comes the weight, a plain number, and nothing else"
            raise _invalid(text, tail, why)
        found = _from_url(text, body) if _URL.match(body) else _from_hub(text, body, bare=bare)
        repo, selector, subpath = found
        return cls(name=name, repo=repo, selector=selector, subpath=subpath.rstrip("/"), weight=weight)


def _split_weight(text: str) -> tuple[str, float | None]:
    body, colon, tail = text.rpartition(":")
    return (body, float(tail)) if colon and body and _WEIGHT.fullmatch(tail) else (text, None)


def no_weight(text: str, place: str) -> InvalidRef:
    """The error for a reference ``text`` to a ``place`` that is there, behind which stands no weight."""
    error = _invalid(text, said := text[text.rindex(":") + 1 :], f"'{printable(said)}' is no weight, a finite number")
    return InvalidRef(error.message, f"write the weight as a number, {printable(place)}:0.8, or leave it out")


def _quote(selector: str) -> str:
    prefix = next((p for p in ("refs/pr/", "refs/heads/", "refs/tags/") if selector.startswith(p)), "")
    return prefix + selector[len(prefix) :].replace("%", "%25").replace("/", "%2F")


def _from_hub(text: str, body: str, *, bare: bool) -> tuple[str, str | None, str]:
    match = _HUB.fullmatch(body) or (_BARE.fullmatch(body) if bare else None)
    if match is None:
        raise _invalid(text, body, "a repository is written 'namespace/name'")
    selector = match["selector"]
    return match["repo"], unquote(selector) if selector is not None else None, match["subpath"] or ""


def _from_url(text: str, body: str) -> tuple[str, str | None, str]:
    if body.lower().startswith("hf://"):
        inner = body[len("hf://") :].removeprefix("models/")
        _refuse_other_types(text, inner.split("/")[0])
        return _from_hub(text, inner, bare=False)
    try:
        parts = urlsplit(body if "://" in body else f"https://{body}")
    except ValueError:
        raise _invalid(text, body, "it is no address") from None
    if parts.netloc.lower() not in _HOSTS:
        raise _invalid(text, parts.netloc, "only pages of huggingface.co can be pasted")
    segments = [unquote(segment) for segment in parts.path.split("/") if segment]
    _refuse_other_types(text, segments[0] if segments else "")
    if len(segments) < 2:
        raise _invalid(text, parts.path, "the page names no repository")
    repo, rest = "/".join(segments[:2]), segments[2:]
    if not rest:
        return repo, None, ""
    if rest[0] not in _PAGES or len(rest) < 2:
        raise _invalid(text, rest[0], "that page of a repository is neither a folder nor a file")
    length = 4 if rest[1] == "refs" else 2
    return repo, "/".join(rest[1:length]), "/".join(rest[length:])


def _refuse_other_types(text: str, segment: str) -> None:
    if segment in _NOT_ADAPTERS:
        raise _invalid(text, segment, f"'{segment}' hold no adapters; name a model repository")


def _problem(ref: Ref) -> tuple[str, str] | None:
    """The first field that is not as it must be, as (fragment of the text, why)."""
    if ref.name is not None and not _NAME.fullmatch(ref.name):
        return ref.name, "a name is letters, digits, '_', '-' or '.', and starts with a letter"
    if ref.weight is not None and not math.isfinite(ref.weight):
        return repr(ref.weight), "the weight must be finite"
    if (ref.repo is None) == (ref.path is None):
        return "", "it names either a repository or a local path"
    if ref.path is not None:
        if not all(map(_shows, ref.path)):
            return "", _INVISIBLE
        return (ref.path, "a local path starts with /, ./, ../ or ~") if not _LOCAL.match(ref.path) else None
    repo = ref.repo or ""
    if (kind := repo.split("/")[0]) in _NOT_ADAPTERS:
        return kind, f"'{kind}' hold no adapters; name a model repository"
    for part in repo.split("/"):
        if not _REPO_PART.fullmatch(part) or ".." in part or "--" in part or part.endswith(".git"):
            return part, "a repository is 'namespace/name': letters, digits, '_', and single '-' or '.' between them"
        if problem := path_problem(part):
            return part, f"the repository's name {problem}"
    if repo.count("/") > 1 or len(repo) > 96:
        return repo, "a repository is 'namespace/name' of at most 96 characters"
    if ref.selector is not None:
        try:
            Selector.parse(ref.selector)
        except InvalidRef as error:
            return _quote(ref.selector), error.message
    if ref.subpath and (problem := path_problem(ref.subpath)):
        return ref.subpath, f"the path within the repository {problem}"
    return None


def _invalid(text: str, fragment: str, why: str) -> InvalidRef:
    """The error for a reference that is wrong at ``fragment``, with the place marked below the text."""
    shown, mark = printable(text), printable(fragment)
    place = shown.rfind(mark) if mark else len(shown)
    hint = EXAMPLE
    if "://" not in text and os.path.exists(text):  # noqa: PTH110 - Path.exists raises for an over-long name
        hint = f"To use the folder or file that lies here, write ./{shown}"
    return InvalidRef(f"'{shown}' is not a reference: {why}\n  {shown}\n  {' ' * max(place, 0)}^", hint)


# ---------------------------------------------------------------------------------------------------- selectors

SelectorKind = Literal["commit", "ref", "range", "series", "version", "name"]

_BAD_IN_REF = re.compile(r"[\s~^:?*\[\\@\x00-\x1f\x7f]|\.\.|//|^[/.-]|[/.]$|\.lock$")


@dataclass(frozen=True, slots=True, kw_only=True)
class Selector:
    """Which state of a repository: the part of a reference after ``@``.

    ``commit``   40 hex digits
    ``ref``      ``refs/pr/N``, ``refs/heads/X``, ``refs/tags/X``: exactly that, for where names collide
    ``range``    a PEP 440 range, ``~=1.2`` or ``>=1,<2``: the newest version tag within
    ``series``   ``1`` or ``1.2``: the newest version tag that starts so
    ``version``  ``1.2.3``, ``1.0rc1``: the tag of exactly that version
    ``name``     anything else: a tag or a branch
    """

    text: str
    kind: SelectorKind

    @classmethod
    def parse(cls, text: str) -> Self:
        """The selector that ``text`` spells.

        Raises:
            InvalidRef: it is empty, no valid range, or no possible name of a branch or tag.
        """
        if COMMIT.fullmatch(text.lower()):
            return cls(text=text.lower(), kind="commit")
        if text[:1] in set("~=<>!"):
            try:
                operators = {clause.operator for clause in SpecifierSet(text)}
            except InvalidSpecifier:
                operators = {"==="}
            if "===" in operators:
                raise InvalidRef(f"'{printable(text)}' is not a version range; write ~=1.2 or >=1,<2", EXAMPLE)
            return cls(text="".join(text.split()), kind="range")
        if not text or len(text) > 255 or _BAD_IN_REF.search(text) or not all(map(_shows, text)):
            why = f"'{printable(text)}' cannot name" if text else "after '@' comes"
            raise InvalidRef(f"{why} a branch, tag, version or commit", EXAMPLE)
        if re.match(r"refs/(?:pr/\d+$|heads/.|tags/.)", text):
            return cls(text=text, kind="ref")
        if re.fullmatch(r"v?\d+(?:\.\d+)?", text, re.ASCII):
            return cls(text=text, kind="series")
        return cls(text=text, kind="name" if as_version(text) is None else "version")


def as_version(text: str) -> Version | None:
    """``text`` as a PEP 440 version, an optional ``v`` before it, or None where it is none."""
    try:
        return Version(text)
    except InvalidVersion:
        return None
