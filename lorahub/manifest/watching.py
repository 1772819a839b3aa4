"""``lorahub outdated``: how what is locked stands on its hub now; changes nothing.

Two requests for an adapter: its refs, and what the hub says of the repository.  One more where nothing points at the
locked commit any more, to see whether it is still there; two more for each repository in a chain of successors.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

from packaging.version import Version

from lorahub.errors import AccessDenied, LorahubError, NotFound, UsageError
from lorahub.fetching import Progress, quiet
from lorahub.hub import open_hub
from lorahub.hub.cache import Cache
from lorahub.hub.hub import Hub, Standing
from lorahub.hub.versions import Picked, pick, version_tags
from lorahub.manifest.lockfile import Lock, LockedAdapter, LockedBase
from lorahub.manifest.project import Project
from lorahub.names import Ref, Selector, printable

__all__ = ["Row", "Standings", "State", "outdated"]

State: TypeAlias = Literal[
    "current",
    "newer-in-range",
    "newer-outside",
    "tag-moved",
    "commit-gone",
    "renamed",
    "private-or-gone",
    "gated",
    "disabled",
    "superseded",
    "local",
    "unknown",
]

_HOPS = 10
_DENIED: tuple[State, ...] = ("gated", "disabled")


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """How one locked thing stands.

    Attributes:
        name: the adapter, or "base".
        locked: what is locked, as "v1.2.3" or a commit's first digits.
        states: everything that is so, what matters most first; never empty.
        newest: the newest that the reference means now, or "".
        notes: one sentence for each state that is not plain.
    """

    name: str
    locked: str
    states: tuple[State, ...]
    newest: str = ""
    notes: tuple[str, ...] = ()

    def document(self) -> dict[str, Any]:
        """The row as JSON-ready values."""
        return {
            "name": self.name,
            "locked": self.locked,
            "state": self.states[0],
            "states": list(self.states),
            "newest": self.newest or None,
            "notes": list(self.notes),
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Standings:
    """How everything that is locked stands."""

    rows: tuple[Row, ...]

    @property
    def checked(self) -> bool:
        """Whether anything could be asked at all."""
        return not self.rows or any(each.states[0] != "unknown" for each in self.rows)

    def document(self) -> dict[str, Any]:
        """The outcome as JSON-ready values."""
        return {"adapters": [each.document() for each in self.rows]}


def outdated(
    *,
    manifest: str | os.PathLike[str] | None = None,
    hub: str | None = None,
    local_files_only: bool = False,
    progress: Progress = quiet,
) -> Standings:
    """Ask how everything that is locked stands on its hub now.

    What cannot be asked is "unknown"; nothing is raised for it.

    Args:
        manifest: its file or folder; None takes the nearest ``lorahub.toml`` from the current folder upwards.
        hub: path of a folder hub; None takes ``LORAHUB_HUB``, else Hugging Face.
        local_files_only: ask nobody; then everything is unknown.
        progress: called with (adapters done, adapters in all).

    Raises:
        UsageError, ManifestError, RecordError: manifest or lock are not there, or are none.
    """
    project = Project.open(manifest)
    lock = project.lock()
    if lock is None:
        raise UsageError(f"there is no {project.lock_path.name} beside {project.path}", "lorahub lock")
    asked = [*_asked(lock, hub, local_files_only)]
    rows = []
    for number, ask in enumerate(asked, start=1):
        rows.append(ask())
        progress(number, len(asked))
    return Standings(rows=tuple(rows))


def _asked(lock: Lock, hub: str | None, offline: bool) -> list[Callable[[], Row]]:
    """One call for each row."""
    asks: list[Callable[[], Row]] = []
    if lock.base is not None and lock.base.repo:
        base = lock.base
        asks.append(lambda: _row_of_base(base, hub, offline))
    asks += [_for_adapter(each, hub, offline) for each in lock.places()]
    return asks


def _for_adapter(locked: LockedAdapter, hub: str | None, offline: bool) -> Callable[[], Row]:
    def ask() -> Row:
        if locked.repo is None:
            return Row(name=locked.name, locked=locked.path or "", states=("local",))
        short = _short(locked.resolved or "", locked.commit or "")
        return _row(
            locked.name, short, locked.repo, lambda: open_hub(hub, local_files_only=offline),
            lambda opened, standing: _states(opened, standing, locked, hub),
        )  # fmt: skip

    return ask


def _row_of_base(base: LockedBase, hub: str | None, offline: bool) -> Row:
    named = hub if hub is not None else os.environ.get("LORAHUB_HUB", "")
    place = named if "://" in named else "hf"  # a folder holds no bases
    repo, commit = base.repo or "", base.commit or ""

    def states(_hub: Hub, standing: Standing) -> tuple[dict[State, str], str]:
        found = _of_repository(repo, standing)
        ref = Ref.parse(base.requested, bare=True)
        now = _now(ref.selector or "refs/heads/main", standing, repo)
        if now is not None and now.commit != commit:
            found["newer-in-range"] = f"{base.requested} is commit {now.commit[:12]} now"
        return found, now.commit[:12] if now is not None else ""

    return _row("base", commit[:12], repo, lambda: open_hub(place, local_files_only=offline), states)


def _row(
    name: str,
    locked: str,
    repo: str,
    opens: Callable[[], Hub],
    states: Callable[[Hub, Standing], tuple[dict[State, str], str]],
) -> Row:
    """One row; what a hub refuses is a state."""
    try:
        hub = opens()
        found, newest = states(hub, hub.standing(repo))
    except NotFound:
        found, newest = {"private-or-gone": f"{printable(repo)} is private, or there is no such repository"}, ""
    except AccessDenied as error:
        codes = {each.code for each in error.findings}
        found, newest = {next((state for state in _DENIED if state in codes), "private-or-gone"): error.message}, ""
    except LorahubError as error:  # whatever keeps it from being asked
        found, newest = {"unknown": error.message}, ""
    return Row(
        name=name,
        locked=locked,
        states=tuple(found) or ("current",),
        newest=newest,
        notes=tuple(note for note in found.values() if note),
    )


def _states(hub: Hub, standing: Standing, locked: LockedAdapter, named: str | None) -> tuple[dict[State, str], str]:
    """Every state of an adapter's repository but "current", what matters most first, and the newest that fits."""
    repo, commit, resolved = locked.repo or "", locked.commit or "", locked.resolved or ""
    found: dict[State, str] = {}
    if commit not in {*standing.tags.values(), *standing.branches.values()} and _is_gone(locked, named):
        found["commit-gone"] = f"commit {commit[:12]} is not there any more; it can be had from a cache alone"
    if locked.pin().tag is not None and standing.tags.get(resolved) != commit:
        at = standing.tags.get(resolved)
        found["tag-moved"] = f"{printable(resolved)} is {f'commit {at[:12]}' if at else 'gone'}, and was {commit[:12]}"
    found |= _of_repository(repo, standing)
    if standing.successor:
        found["superseded"] = f"its card names {' -> '.join(_successors(hub, repo, standing))}"
    now = _now(Ref.parse(locked.requested).selector, standing, repo)
    if now is not None and now.commit != commit and (now.tag is None or now.tag != resolved):
        found["newer-in-range"] = f"{_short(now.tag or '', now.commit)} fits {locked.requested}"
    stable = [each for each in version_tags(standing.tags) if not each.version.is_prerelease]
    newest = stable[0] if stable else None
    if newest and locked.version and newest.version > Version(locked.version) and (not now or now.tag != newest.tag):
        found["newer-outside"] = f"{printable(newest.tag)} is there, which {locked.requested} does not mean"
    if standing.gated:
        found["gated"] = "its authors grant access to its files"
    return found, _short(now.tag or "", now.commit) if now is not None else ""


def _of_repository(repo: str, standing: Standing) -> dict[State, str]:
    found: dict[State, str] = {}
    if standing.disabled:
        found["disabled"] = "the hub or its author disabled it"
    if standing.repo != repo:
        found["renamed"] = f"it is called {printable(standing.repo)} now"
    return found


def _now(selector: str | None, standing: Standing, repo: str) -> Picked | None:
    """What the reference means now, or None where it means nothing any more."""
    try:
        return pick(
            Selector.parse(selector) if selector is not None else None, standing.tags, standing.branches, repo=repo
        )
    except LorahubError:
        return None


def _is_gone(locked: LockedAdapter, named: str | None) -> bool:
    """Whether the hub has the commit no more; asked past the cache, which has what was pulled."""
    with tempfile.TemporaryDirectory() as empty:
        try:
            open_hub(named, cache=Cache(Path(empty))).resolve(Ref(repo=locked.repo, selector=locked.commit))
        except NotFound:
            return True
        except LorahubError:  # it answers, whatever else is wrong
            return False
    return False


def _successors(hub: Hub, repo: str, standing: Standing) -> list[str]:
    """The chain of newer repositories, each named by the card of the one before."""
    chain: list[str] = []
    seen = {repo}
    while standing.successor and len(chain) < _HOPS:
        name = printable(standing.successor)
        if name in seen:
            return [*chain, f"{name} (in a circle)"]
        chain.append(name)
        seen.add(name)
        try:
            Ref(repo=name)
            standing = hub.standing(name)
        except LorahubError:  # the chain ends where nobody answers
            return chain
    return chain


def _short(resolved: str, commit: str) -> str:
    """What was resolved, for people."""
    if resolved in {"", commit}:
        return commit[:12]
    return f"{resolved.removeprefix('refs/heads/')} ({commit[:7]})" if resolved.startswith("refs/") else resolved
