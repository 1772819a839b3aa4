"""How the Hub describes a repository: infos, trees, refs and histories, as the JSON that the client reads."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime
from pathlib import PurePosixPath
from typing import Any

from hub.double.cards import base_models, tags_of
from hub.double.files import Commit, File, git_id
from hub.double.store import Repo

__all__ = ["commit_entry", "info", "path_entries", "refs", "stamp", "tree"]

_ALWAYS = ("_id", "id", "modelId")


def stamp(date: datetime) -> str:
    """A date as the Hub writes it."""
    return date.strftime("%Y-%m-%dT%H:%M:%S.000Z")


def info(repo: Repo, commit: Commit | None, *, blobs: bool = False, expand: Iterable[str] = ()) -> dict[str, Any]:
    """A model at a commit; ``blobs``: with sizes and hashes of files; ``expand``: only those fields."""
    files = commit.files if commit else {}
    data = repo.card(commit)
    history = repo.history(commit.oid) if commit else []
    described: dict[str, Any] = {
        "_id": git_id(repo.name.encode())[:24],
        "id": repo.name,
        "modelId": repo.name,
        "author": repo.namespace,
        "sha": commit.oid if commit else None,
        "lastModified": stamp(commit.date) if commit else None,
        "createdAt": stamp(history[-1].date) if history else None,
        "private": repo.private,
        "gated": repo.gated,
        "disabled": bool(repo.disabled),
        "downloads": repo.downloads,
        "likes": repo.likes,
        "tags": tags_of(data, files),
        "library_name": data.get("library_name"),
        "pipeline_tag": data.get("pipeline_tag"),
        "cardData": data or None,
        "siblings": [_sibling(path, file, blobs) for path, file in files.items()],
        "baseModels": base_models(data, files),
        "spaces": [],
        "usedStorage": sum(len(repo.store.objects[oid]) for oid in repo.oids if oid in repo.store.objects),
    }
    wanted = {*_ALWAYS, *expand}
    return {key: value for key, value in described.items() if not expand or key in wanted}


def _sibling(path: str, file: File, blobs: bool) -> dict[str, Any]:
    if not blobs:
        return {"rfilename": path}
    lfs = {"sha256": file.sha256, "size": file.size, "pointerSize": len(file.pointer)}
    return {"rfilename": path, "blobId": file.oid, "size": file.size} | ({"lfs": lfs} if file.lfs else {})


def tree(commit: Commit, folder: str, *, recursive: bool, expand: bool) -> list[dict[str, Any]] | None:
    """What lies in a folder of a commit, or None where there is no such folder."""
    prefix = f"{folder.strip('/')}/" if folder.strip("/") else ""
    inside = [path for path in commit.files if path.startswith(prefix)]
    if prefix and not inside:
        return None
    names = {path for path in inside if recursive or "/" not in path.removeprefix(prefix)}
    names |= {
        str(parent)
        for path in inside
        for parent in PurePosixPath(path).parents
        if str(parent).startswith(prefix) and str(parent) != "."
        if recursive or "/" not in str(parent).removeprefix(prefix)
    }
    return path_entries(commit, sorted(names), expand=expand)


def path_entries(commit: Commit, paths: Iterable[str], *, expand: bool = False) -> list[dict[str, Any]]:
    """Files and folders of a commit; names that are neither are left out."""
    return [entry for path in paths if (entry := _entry(commit, path, expand)) is not None]


def _entry(commit: Commit, path: str, expand: bool) -> dict[str, Any] | None:
    more: dict[str, Any] = {}
    if expand:
        last = {"id": commit.oid, "title": commit.title, "date": stamp(commit.date)}
        more = {"lastCommit": last, "securityFileStatus": {"status": "safe", "avScan": None, "pickleImportScan": None}}
    file = commit.files.get(path)
    if file is not None:
        more |= {"lfs": {"oid": file.sha256, "size": file.size, "pointerSize": len(file.pointer)}} if file.lfs else {}
        more |= {"xetHash": file.xet} if file.xet else {}
        return {"type": "file", "oid": file.oid, "size": file.size, "path": path, **more}
    inside = [f"{name}{each.oid}" for name, each in commit.files.items() if name.startswith(f"{path.rstrip('/')}/")]
    if inside:
        return {"type": "directory", "oid": git_id("".join(inside).encode()), "size": 0, "path": path, **more}
    return None


def refs(repo: Repo, *, pulls: bool) -> dict[str, Any]:
    """Branches and tags, and pull requests if asked for."""

    def each(kind: str, found: dict[str, str]) -> list[dict[str, str]]:
        return [{"name": name, "ref": f"refs/{kind}/{name}", "targetCommit": oid} for name, oid in found.items()]

    found = {"branches": each("heads", repo.branches), "converts": [], "tags": each("tags", repo.tags)}
    numbered = {str(number): oid for number, oid in repo.pulls.items()}
    return found | ({"pullRequests": each("pr", numbered)} if pulls else {})


def commit_entry(commit: Commit) -> dict[str, Any]:
    """A commit in a history."""
    return {
        "id": commit.oid,
        "title": commit.title,
        "message": commit.message,
        "date": stamp(commit.date),
        "authors": [{"user": commit.author}],
    }
