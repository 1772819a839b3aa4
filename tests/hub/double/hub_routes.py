"""The hub's routes as a table, and the order of its refusals: token, name, visibility, gate, right to write."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypeAlias
from urllib.parse import unquote

from hub.double import managing, reading, uploading
from hub.double.answers import Asked, Reply, refused
from hub.double.calls import Call, Site
from hub.double.store import Account, Repo

__all__ = ["ROUTES", "Route", "answer_hub"]

Handler: TypeAlias = Callable[[Call], Reply]

Needs = Literal["nothing", "login", "description", "files", "propose", "write"]
"""What the one who asks must be allowed: the last four are about the repository in the address."""


@dataclass(frozen=True, slots=True)
class Route:
    """One row: ``{repo}`` stands for namespace/name, ``{rev}`` for a quoted name, ``{path}`` for the rest."""

    methods: str
    pattern: str
    handler: Handler
    needs: Needs = "description"

    def match(self, asked: Asked) -> dict[str, str] | None:
        """What the pattern names in this address, unquoted, or None."""
        if asked.method not in self.methods.split():
            return None
        found = _compiled(self.pattern).fullmatch(asked.path)
        return {key: unquote(value) for key, value in found.groupdict().items()} if found else None


_SHAPES = {"repo": "[^/]+/[^/]+?", "rev": "[^/]+", "path": ".+", "number": "[0-9]+"}
_KNOWN: dict[str, re.Pattern[str]] = {}


def _compiled(pattern: str) -> re.Pattern[str]:
    if pattern not in _KNOWN:
        text = re.escape(pattern).replace(r"\{", "{").replace(r"\}", "}")
        _KNOWN[pattern] = re.compile(re.sub(r"\{(\w+)\}", lambda m: f"(?P<{m[1]}>{_SHAPES[m[1]]})", text))
    return _KNOWN[pattern]


_API = "/api/models/{repo}"

ROUTES: tuple[Route, ...] = (
    Route("GET", "/api/agent-harnesses", reading.harnesses, "nothing"),
    Route("GET", "/api/whoami-v2", reading.whoami, "login"),
    Route("POST", "/api/repos/create", managing.create, "login"),
    Route("DELETE", "/api/repos/delete", managing.delete, "login"),
    Route("POST", "/api/repos/move", managing.move, "login"),
    Route("POST", "/api/validate-yaml", managing.validate_yaml, "nothing"),
    Route("POST", "/api/complete_multipart", uploading.complete, "nothing"),
    Route("GET", "/api/models", reading.models, "nothing"),
    Route("GET", f"{_API}/refs", reading.repo_refs),
    Route("GET HEAD", f"{_API}/revision/{{rev}}", reading.model_info),
    Route("GET", f"{_API}/tree/{{rev}}", reading.repo_tree),
    Route("GET", f"{_API}/tree/{{rev}}/{{path}}", reading.repo_tree),
    Route("POST", f"{_API}/paths-info/{{rev}}", reading.paths_info),
    Route("GET", f"{_API}/commits/{{rev}}", reading.commits),
    Route("GET", f"{_API}/auth-check", reading.auth_check, "files"),
    Route("GET", f"{_API}/auth-check/write", reading.auth_check, "write"),
    Route("POST", f"{_API}/preupload/{{rev}}", uploading.preupload, "propose"),
    Route("POST", f"{_API}/commit/{{rev}}", uploading.commit, "propose"),
    Route("POST", "/{repo}.git/info/lfs/objects/batch", uploading.lfs_batch, "propose"),
    Route("POST", "/{repo}.git/info/lfs/objects/verify", uploading.verify, "propose"),
    Route("POST", f"{_API}/tag/{{rev}}", managing.tag, "write"),
    Route("DELETE", f"{_API}/tag/{{rev}}", managing.untag, "write"),
    Route("POST", f"{_API}/branch/{{rev}}", managing.branch, "write"),
    Route("DELETE", f"{_API}/branch/{{rev}}", managing.unbranch, "write"),
    Route("POST", f"{_API}/super-squash/{{rev}}", managing.squash, "write"),
    Route("PUT", f"{_API}/settings", managing.settings, "write"),
    Route("POST", f"{_API}/discussions", managing.discuss),
    Route("GET", f"{_API}/discussions", reading.discussions),
    Route("GET", f"{_API}/discussions/{{number}}", reading.discussion),
    Route("GET", f"{_API}/xet-read-token/{{rev}}", reading.xet_token, "files"),
    Route("GET", f"{_API}/xet-write-token/{{rev}}", reading.xet_token, "propose"),
    Route("GET HEAD", "/api/resolve-cache/models/{repo}/{rev}/{path}", reading.resolve_cache, "files"),
    Route("GET HEAD", "/{repo}/resolve/{rev}/{path}", reading.resolve, "files"),
    Route("GET HEAD", _API, reading.model_info),
)


def answer_hub(site: Site, asked: Asked) -> Reply:
    """The answer to any request there; the first row that fits decides.

    Raises:
        Reply: a refusal.
    """
    for route in ROUTES:
        if (parts := route.match(asked)) is not None:
            with site.store.lock:
                account = _account(site, asked)
                if "repo" not in parts:
                    return route.handler(Call(site=site, asked=asked, account=account, parts=parts))
                repo = _repo(site, asked, parts["repo"], account)
                _check(route.needs, asked, repo, account)
                return route.handler(Call(site=site, asked=asked, account=account, parts=parts, found=repo))
    raise refused(404, f"No route {asked.method} {asked.path}")


def _account(site: Site, asked: Asked) -> Account | None:
    """Who asks."""
    if asked.token is None:
        return None
    account = site.store.accounts.get(asked.token)
    if account is None:
        raise refused(401, "Invalid credentials in Authorization header")
    return account


def _repo(site: Site, asked: Asked, name: str, account: Account | None) -> Repo:
    """The repository of that name, if the one who asks may know of it."""
    repo = site.store.repos.get(name)
    if repo is None and (new := site.store.moved.get(name)) is not None:
        raise Reply(307, headers={"Location": asked.target.replace(f"/{name}", f"/{new}", 1)})
    if repo is None or (repo.private and (account is None or not account.owns(repo.namespace))):
        # On an unencrypted address the client knows a missing repository by this code alone.
        status, message = (401, "Invalid username or password.") if account is None else (404, "Repository not found")
        raise refused(status, message, "RepoNotFound")
    return repo


def _check(needs: Needs, asked: Asked, repo: Repo, account: Account | None) -> None:
    """Pass if what the route needs is allowed."""
    if repo.disabled == "whole" or (repo.disabled and needs != "description"):
        raise refused(403, "Access to this resource is disabled.")
    member = account is not None and account.owns(repo.namespace)
    if needs == "files" and repo.gated and not member and (account is None or account.name not in repo.granted):
        message = f"Access to model {repo.name} is restricted and you are not in the authorized list."
        raise refused(401 if account is None else 403, message, "GatedRepo")
    if needs in {"write", "propose"}:
        if account is None:
            raise refused(401, "Invalid username or password.", "RepoNotFound")
        if account.role != "write" or not (member or (needs == "propose" and _proposes(asked))):
            raise refused(403, f"You don't have the required permissions to write to {repo.name}.")


def _proposes(asked: Asked) -> bool:
    """Anybody may propose a change to a repository, and upload what it holds."""
    return asked.flag("create_pr") or ".git/info/lfs/" in asked.path or "/refs%2Fpr%2F" in asked.path
