"""Routes that only tell: who one is, models and their description, and files by their address."""

from __future__ import annotations

from typing import Any
from urllib.parse import parse_qs, quote

from hub.double.answers import Reply, document, refused
from hub.double.calls import Call
from hub.double.describing import commit_entry, info, path_entries, refs, tree
from hub.double.files import File
from hub.double.store import Repo

__all__ = [
    "auth_check",
    "commits",
    "discussion",
    "discussions",
    "harnesses",
    "model_info",
    "models",
    "paths_info",
    "repo_refs",
    "repo_tree",
    "resolve",
    "resolve_cache",
    "whoami",
    "xet_token",
]

_SORTS = {"createdAt": "createdAt", "lastModified": "lastModified", "downloads": "downloads", "likes": "likes"}
_SHORT: tuple[str, ...] = (
    "_id",
    "id",
    "modelId",
    "author",
    "createdAt",
    "downloads",
    "gated",
    "lastModified",
    "library_name",
    "likes",
)
_SHORT += ("pipeline_tag", "private", "sha", "tags")


def harnesses(_call: Call) -> Reply:
    """What the client looks up about the program it runs in."""
    return document({"standardEnvVars": [], "harnesses": {}})


def whoami(call: Call) -> Reply:
    """Row 1 of the contract."""
    orgs = [{"type": "org", "name": name} for name in call.user.orgs]
    token = {"displayName": "test", "role": call.user.role}
    return document({"type": "user", "name": call.user.name, "orgs": orgs, "auth": {"accessToken": token}})


def auth_check(call: Call) -> Reply:
    """Reading was already allowed when this is reached."""
    return document({})


def model_info(call: Call) -> Reply:
    """A model, at the revision in the address or at main, which need not have a commit."""
    commit = call.commit() if "rev" in call.parts else call.repo.head()
    found = info(call.repo, commit, blobs=call.asked.flag("blobs"), expand=call.asked.query.get("expand", []))
    if call.asked.flag("securityStatus"):
        found["securityRepoStatus"] = {"scansDone": True, "filesWithIssues": []}
    return document(found)


def models(call: Call) -> Reply:
    """Models that pass every filter, in the order asked for, in pages."""
    asked = call.asked
    wanted = set(asked.query.get("filter", [])) | set(asked.query.get("pipeline_tag", []))
    found: list[dict[str, Any]] = []
    for repo in call.site.store.repos.values():
        described = info(repo, repo.head(), expand=asked.query.get("expand", ()))
        tags = set(described.get("tags") or info(repo, repo.head())["tags"])
        fits = (
            _visible(call, repo)
            and wanted <= tags
            and asked.option("search").lower() in repo.name.lower()
            and asked.option("author", repo.namespace) == repo.namespace
            and ("gated" not in asked.query or asked.flag("gated") == bool(repo.gated))
        )
        if fits:
            found.append(described | {"_repo": repo})
    if (sort := asked.option("sort")) in _SORTS:
        found.sort(key=lambda each: _rank(info(each["_repo"], each["_repo"].head())[_SORTS[sort]]), reverse=True)
    elif sort:
        found.sort(key=lambda each: each["id"])
    return call.page([_short(call, each) for each in found])


def _rank(value: Any) -> tuple[bool, Any]:
    """What has no date comes last; a count of 0 is a count."""
    return value is not None, value


def _short(call: Call, described: dict[str, Any]) -> dict[str, Any]:
    del described["_repo"]
    if "expand" in call.asked.query or call.asked.flag("full"):
        return described
    shown = {*_SHORT, *(["cardData"] if call.asked.flag("cardData") else [])}
    return {key: value for key, value in described.items() if key in shown}


def _visible(call: Call, repo: Repo) -> bool:
    return not repo.private or (call.account is not None and call.account.owns(repo.namespace))


def repo_tree(call: Call) -> Reply:
    """Row 7."""
    commit = call.commit()
    folder = call.parts.get("path", "")
    found = tree(commit, folder, recursive=call.asked.flag("recursive"), expand=call.asked.flag("expand"))
    if found is None:
        raise refused(404, f"{folder} does not exist on {call.parts['rev']!r}", "EntryNotFound", commit=commit.oid)
    return call.page(found, commit=commit.oid)


def paths_info(call: Call) -> Reply:
    """Row 8: the paths come as a form."""
    form = parse_qs(call.asked.body.decode())
    return document(path_entries(call.commit(), form.get("paths", []), expand=form.get("expand", [""])[0] == "true"))


def repo_refs(call: Call) -> Reply:
    """Row 9."""
    return document(refs(call.repo, pulls=call.asked.flag("include_prs")))


def commits(call: Call) -> Reply:
    """Row 10."""
    return call.page([commit_entry(commit) for commit in call.repo.history(call.commit().oid)])


def discussion(call: Call) -> Reply:
    """One discussion or pull request."""
    number = int(call.parts["number"])
    if number not in call.repo.discussions:
        raise refused(404, "Discussion not found")
    pull = number in call.repo.pulls
    changes = {"base": "refs/heads/main", "mergeCommitId": None} if pull else None
    more: dict[str, Any] = {"events": [], "filesWithConflicts": [], "changes": changes, "diff": ""}
    return document(_discussion(call.repo, number) | more)


def discussions(call: Call) -> Reply:
    """All of them, newest first, in one page."""
    found = [_discussion(call.repo, number) for number in sorted(call.repo.discussions, reverse=True)]
    return document({"discussions": found, "count": len(found), "start": 0})


def _discussion(repo: Repo, number: int) -> dict[str, Any]:
    return {
        "num": number,
        "title": repo.discussions[number],
        "author": {"name": repo.commits[repo.pulls[number]].author if number in repo.pulls else "alice"},
        "createdAt": "2025-01-01T00:00:00.000Z",
        "status": "open",
        "repo": {"name": repo.name, "type": "model"},
        "isPullRequest": number in repo.pulls,
    }


def xet_token(call: Call) -> Reply:
    """Row 20: where Xet stores, or 404 on a Hub without it."""
    cas = call.site.store.cas
    if cas is None:
        raise refused(404, "Xet is not enabled here")
    return document(cas.token(), headers=cas.headers())


# ------------------------------------------------------------------------------------------------------ files


def resolve(call: Call) -> Reply:
    """Rows 21 and 22: a small file itself, an LFS file by an address elsewhere."""
    commit, path = call.commit(), call.parts["path"]
    file = commit.files.get(path)
    if file is None:
        raise refused(404, "Entry not found", "EntryNotFound", commit=commit.oid)
    linked = {
        "X-Repo-Commit": commit.oid,
        "X-Linked-Size": str(file.size),
        "X-Linked-Etag": f'"{file.sha256 if file.lfs else file.oid}"',
    }
    if file.lfs:
        where = {"Location": call.site.sign(call.repo, path, file.sha256)}
        return Reply(302, headers=where | linked | _xet(call, file))
    if call.site.resolve_cache:
        place = f"/api/resolve-cache/models/{call.repo.name}/{commit.oid}/{quote(path)}"
        return Reply(307, headers={"Location": place} | linked)
    return _small(file, commit.oid)


def resolve_cache(call: Call) -> Reply:
    """Where small files are since the Hub keeps them apart."""
    commit = call.commit()
    return _small(commit.files[call.parts["path"]], commit.oid)


def _small(file: File, commit: str) -> Reply:
    headers = {"ETag": f'"{file.oid}"', "X-Repo-Commit": commit, "Content-Type": "text/plain; charset=utf-8"}
    return Reply(200, file.data, headers, ranged=True)


def _xet(call: Call, file: File) -> dict[str, str]:
    if file.xet is None:
        return {}
    route = f"{call.site.hub}/api/models/{call.repo.name}/xet-read-token/{quote(call.parts['rev'], safe='')}"
    return {"X-Xet-Hash": file.xet, "Link": f'<{route}>; rel="xet-auth"'}
