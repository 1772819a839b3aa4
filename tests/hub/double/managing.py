"""Routes that change what a repository is called, shows and points to; files go by ``uploading``."""

from __future__ import annotations

from hub.double.answers import Reply, document, refused
from hub.double.calls import Call
from hub.double.cards import card_data
from hub.double.files import File
from hub.double.store import Repo

__all__ = [
    "branch",
    "create",
    "delete",
    "discuss",
    "move",
    "settings",
    "squash",
    "tag",
    "unbranch",
    "untag",
    "validate_yaml",
]

_ATTRIBUTES = b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n*.bin filter=lfs diff=lfs merge=lfs -text\n"


def create(call: Call) -> Reply:
    """Row 2: a new repository has a commit with .gitattributes, as the Hub makes it."""
    asked = call.asked.json()
    name = _full_name(call)
    call.own(name.partition("/")[0])
    url = f"{call.site.hub}/{name}"
    if name in call.site.store.repos:
        raise refused(409, "You already created this model repo", url=url)
    private = asked.get("visibility", "private" if asked.get("private") else "public") == "private"
    repo = call.site.store.repo(name, private=private)
    first = {".gitattributes": File.of(".gitattributes", _ATTRIBUTES)}
    repo.branches["main"] = repo.record(first, parent=None, title="initial commit", author=call.user.name)
    return document({"url": url, "name": name, "id": name})


def _full_name(call: Call) -> str:
    asked = call.asked.json()
    return f"{asked.get('organization') or call.user.name}/{asked.get('name')}"


def _owned(call: Call, name: str) -> Repo:
    repo = call.site.store.repos.get(name)
    if repo is None:
        raise refused(404, "Repository not found", "RepoNotFound")
    call.own(repo.namespace)
    return repo


def delete(call: Call) -> Reply:
    """Row 3."""
    del call.site.store.repos[_owned(call, _full_name(call)).name]
    return document({})


def move(call: Call) -> Reply:
    """Row 3: the old name redirects."""
    asked = call.asked.json()
    repo, name = _owned(call, str(asked.get("fromRepo"))), str(asked.get("toRepo"))
    call.own(name.partition("/")[0])
    if name in call.site.store.repos:
        raise refused(409, f"A repository {name} already exists")
    call.site.store.move(repo.name, name)
    return document({"url": f"{call.site.hub}/{name}"})


def validate_yaml(call: Call) -> Reply:
    """Row 4."""
    try:
        data = card_data(str(call.asked.json().get("content", "")).encode())
    except ValueError as error:
        return document({"errors": [{"message": str(error)}], "warnings": []}, 400)
    wrong = [key for key in ("tags", "datasets") if not isinstance(data.get(key, []), (list, str, type(None)))]
    errors = [{"message": f'"{key}" must be an array of strings'} for key in wrong]
    return document({"errors": errors, "warnings": []}, 400 if errors else 200)


def tag(call: Call) -> Reply:
    """Row 17: a tag is never moved by being made again."""
    asked = call.asked.json()
    name, commit = str(asked.get("tag")), call.commit()
    if name in call.repo.tags:
        raise refused(409, f"Tag reference exists already: refs/tags/{name}")
    call.repo.tags[name] = commit.oid
    return Reply(200)


def untag(call: Call) -> Reply:
    """Row 17."""
    if call.repo.tags.pop(call.parts["rev"], None) is None:
        raise refused(404, f"Invalid rev id: {call.parts['rev']}", "RevisionNotFound")
    return Reply(200)


def branch(call: Call) -> Reply:
    """Row 18."""
    name = call.parts["rev"]
    if name in call.repo.branches:
        raise refused(409, f"Reference refs/heads/{name} already exists")
    call.repo.branches[name] = call.commit(call.asked.json().get("startingPoint") or "main").oid
    return Reply(200)


def unbranch(call: Call) -> Reply:
    """Row 18."""
    name = call.parts["rev"]
    if name == "main":
        raise refused(403, "Cannot delete the default branch")
    if call.repo.branches.pop(name, None) is None:
        raise refused(404, f"Invalid rev id: {name}", "RevisionNotFound")
    return Reply(200)


def settings(call: Call) -> Reply:
    """Row 19."""
    asked = call.asked.json()
    call.repo.gated = asked.get("gated", call.repo.gated)
    if (visibility := asked.get("visibility")) is not None or "private" in asked:
        call.repo.private = visibility == "private" or bool(asked.get("private"))
    return document({})


def discuss(call: Call) -> Reply:
    """Row 19: a discussion, or an empty pull request; anybody with a token that writes may open one."""
    asked = call.asked.json()
    title = str(asked.get("title"))
    if call.user.role != "write":
        raise refused(403, "This token only reads.")
    if asked.get("pullRequest"):
        return document({"num": call.repo.propose(call.commit("main").oid, title)})
    number = len(call.repo.discussions) + 1
    call.repo.discussions[number] = title
    return document({"num": number})


def squash(call: Call) -> Reply:
    """One commit in place of a branch's history; the others are gone."""
    call.repo.squash(call.parts["rev"], message=str(call.asked.json().get("message")))
    return Reply(200)
