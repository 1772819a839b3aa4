"""Routes by which files come in: which way each goes, LFS objects, and the commit that makes them one step."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Mapping
from typing import Any
from urllib.parse import urlencode

from hub.double.answers import Reply, document, refused
from hub.double.calls import Call, Upload
from hub.double.cards import card_data
from hub.double.cdn_routes import stored
from hub.double.files import File, is_lfs

__all__ = ["commit", "complete", "lfs_batch", "preupload", "verify"]

_LFS_JSON = {"Content-Type": "application/vnd.git-lfs+json"}
_MOST_REGULAR = 10_000_000

Tree = dict[str, File]


def preupload(call: Call) -> Reply:
    """Row 11; ``oid`` lets the client leave out what is there already."""
    here = call.commit().files if call.repo.branches else {}
    answers = []
    for each in call.asked.json()["files"]:
        lfs = is_lfs(each["path"], each["size"], base64.b64decode(each["sample"]))
        answer = {"path": each["path"], "uploadMode": "lfs" if lfs else "regular", "shouldIgnore": False}
        if (file := here.get(each["path"])) is not None:
            answer["oid"] = file.sha256 if file.lfs else file.oid
        answers.append(answer)
    return document({"files": answers})


def lfs_batch(call: Call) -> Reply:
    """Row 12; an object without actions is one the repository has."""
    asked = call.asked.json()
    multipart = "multipart" in asked.get("transfers", [])
    objects = [_object(call, each["oid"], each["size"], multipart) for each in asked["objects"]]
    large = multipart and any(each["size"] > call.site.multipart_above for each in asked["objects"])
    return document({"transfer": "multipart" if large else "basic", "objects": objects}, headers=_LFS_JSON)


def _object(call: Call, oid: str, size: int, multipart: bool) -> dict[str, Any]:
    site, entry = call.site, {"oid": oid, "size": size}
    if len(oid) != 64 or size < 0:
        return entry | {"error": {"code": 422, "message": "Invalid object"}}
    if oid in call.repo.oids:
        return entry
    number = f"u{next(site.numbers)}"
    site.uploads[number] = Upload(oid=oid, size=size, repo=call.repo.name)
    place = f"{site.cdn}/upload/{oid}"
    upload: dict[str, Any] = {"href": f"{place}?{urlencode({'signature': number})}"}
    if multipart and size > site.multipart_above:
        count = -(-size // site.chunk)
        parts = {str(part): f"{place}?{urlencode({'signature': number, 'part': part})}" for part in range(1, count + 1)}
        upload = {
            "href": f"{site.hub}/api/complete_multipart?{urlencode({'signature': number})}",
            "header": {"chunk_size": str(site.chunk), **parts},
        }
    check = {"href": f"{site.hub}/{call.repo.name}.git/info/lfs/objects/verify"}
    return entry | {"actions": {"upload": upload, "verify": check}}


def complete(call: Call) -> Reply:
    """Row 14: every part is named with the ETag it was given, in order."""
    upload = call.site.uploads.get(call.asked.option("signature"))
    if upload is None:
        raise refused(404, "No such upload")
    if call.asked.token is not None:
        raise refused(400, "Only one auth mechanism allowed")
    named = [(part["partNumber"], part["etag"].strip('"')) for part in call.asked.json()["parts"]]
    came = [(number, File.of("part", data, lfs=False).oid) for number, data in sorted(upload.parts.items())]
    if named != came:
        raise refused(400, "InvalidPart")
    return stored(call.site, upload, b"".join(data for _, data in sorted(upload.parts.items())))


def verify(call: Call) -> Reply:
    """Row 15."""
    asked = call.asked.json()
    data = call.site.store.objects.get(asked.get("oid", ""))
    if asked.get("oid") not in call.repo.oids or data is None or len(data) != asked.get("size"):
        raise refused(404, "Object not found")
    return document({})


# ----------------------------------------------------------------------------------------------------- commits


def commit(call: Call) -> Reply:
    """Row 16: parent compared, operations applied and the branch moved in one step."""
    name, repo = call.parts["rev"], call.repo
    propose = call.asked.flag("create_pr")
    tip = repo.find(name)
    pull = name.removeprefix("refs/pr/") if name.startswith("refs/pr/") else None
    branch = name.removeprefix("refs/heads/")
    if tip is None and (repo.branches or branch != "main"):
        raise refused(404, f"Invalid rev id: {name}", "RevisionNotFound")
    if pull is None and branch not in repo.branches and tip is not None:
        raise refused(400, f"Cannot commit to {name}: not a branch")
    header, operations = _operations(call)
    if "parentCommit" in header and not (tip or "").startswith(header["parentCommit"]):  # which may be abbreviated
        raise refused(412, "A commit has happened since. Please refresh and try again.")
    if not str(header.get("summary", "")).strip():
        raise refused(400, "A commit needs a summary")
    tree: Tree = dict(repo.commits[tip].files) if tip else {}
    for key, value in operations:
        _OPERATIONS[key](call, tree, value)
    _check_card(tree)
    title, message = header["summary"], header.get("description", "")
    author = call.user.name
    oid = repo.record(tree, parent=tip, title=title, message=message, author=author)
    answer = {"success": True, "commitOid": oid, "commitUrl": f"{call.site.hub}/{repo.name}/commit/{oid}"}
    answer["hookOutput"] = ""
    if propose:
        number = repo.propose(oid, title)
        answer["pullRequestUrl"] = f"{call.site.hub}/{repo.name}/discussions/{number}"
    elif pull is not None:
        repo.pulls[int(pull)] = oid
    else:
        repo.branches[branch] = oid
    return document(answer)


def _operations(call: Call) -> tuple[dict[str, Any], list[tuple[str, dict[str, Any]]]]:
    try:
        lines = [json.loads(line) for line in call.asked.body.splitlines() if line.strip()]
        pairs = [(line["key"], line["value"]) for line in lines]
    except (ValueError, KeyError, TypeError):
        raise refused(400, "Invalid ndjson") from None
    headers = [value for key, value in pairs if key == "header"]
    operations = [(key, value) for key, value in pairs if key != "header"]
    unknown = [key for key, _ in operations if key not in _OPERATIONS]
    if len(headers) != 1 or unknown:
        raise refused(400, f"Unknown operations {unknown}" if unknown else "One header is needed")
    for _, value in operations:
        _check_path(value.get("path"))
    return headers[0], operations


def _check_path(path: object) -> None:
    parts = path.rstrip("/").split("/") if isinstance(path, str) else [""]
    if any(part in {"", ".", "..", ".git"} for part in parts):
        raise refused(400, f"Invalid path: {path}")


def _add_regular(call: Call, tree: Tree, value: Mapping[str, Any]) -> None:
    data = base64.b64decode(value["content"]) if value.get("encoding") == "base64" else value["content"].encode()
    if len(data) > _MOST_REGULAR:
        raise refused(400, f"{value['path']} is too large: use LFS")
    tree[value["path"]] = File.of(value["path"], data, lfs=False)


def _add_lfs(call: Call, tree: Tree, value: Mapping[str, Any]) -> None:
    oid = str(value.get("oid"))
    _take_from_xet(call, oid, value)
    data = call.site.store.objects.get(oid)
    if oid not in call.repo.oids or data is None:
        raise refused(
            400, f"Your push was rejected because an LFS pointer pointed to a file that does not exist: {oid}"
        )
    if value.get("size", len(data)) != len(data):
        raise refused(400, f"The LFS pointer of {value['path']} states another size")
    tree[value["path"]] = File.of(value["path"], data, lfs=True)


def _take_from_xet(call: Call, oid: str, value: Mapping[str, Any]) -> None:
    """An object that came through Xet is the repository's from here on, and can be read in the plain way too."""
    cas = call.site.store.cas
    if cas is not None and oid not in call.repo.oids and (xet := cas.find(oid)) is not None:
        call.site.store.objects[oid] = cas.read(xet, int(value["size"]))
        call.repo.oids.add(oid)


def _delete_file(call: Call, tree: Tree, value: Mapping[str, Any]) -> None:
    if tree.pop(value["path"], None) is None:
        raise refused(404, f"A file to delete is not there: {value['path']}", "EntryNotFound")


def _delete_folder(call: Call, tree: Tree, value: Mapping[str, Any]) -> None:
    inside = [path for path in tree if path.startswith(f"{value['path'].rstrip('/')}/")]
    if not inside:
        raise refused(404, f"A folder to delete is not there: {value['path']}", "EntryNotFound")
    for path in inside:
        del tree[path]


_OPERATIONS: Mapping[str, Callable[[Call, Tree, Mapping[str, Any]], None]] = {
    "file": _add_regular,
    "lfsFile": _add_lfs,
    "deletedFile": _delete_file,
    "deletedFolder": _delete_folder,
}


def _check_card(tree: Tree) -> None:
    try:
        card_data(tree["README.md"].data if "README.md" in tree else b"")
    except ValueError as error:
        raise refused(400, f"Invalid metadata in README.md: {error}") from None
