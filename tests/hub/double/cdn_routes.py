"""The other origin: where LFS objects lie.  It knows signed addresses and digests, and wants to see no token."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from typing import TypeAlias

from hub.double.answers import Asked, Reply
from hub.double.calls import Site, Upload
from hub.double.files import git_id

__all__ = ["answer_cdn", "stored"]

Handler: TypeAlias = Callable[[Site, Asked], Reply]


def _xml(status: int, code: str) -> Reply:
    return Reply(status, f"<Error><Code>{code}</Code></Error>".encode(), {"Content-Type": "application/xml"})


def stored(site: Site, upload: Upload, data: bytes) -> Reply:
    """Keep an object if it is what was announced; 400 BadDigest if not."""
    if len(data) != upload.size or hashlib.sha256(data).hexdigest() != upload.oid:
        return _xml(400, "BadDigest")
    with site.store.lock:
        site.store.objects[upload.oid] = data
        if (repo := site.store.repos.get(upload.repo)) is not None:
            repo.oids.add(upload.oid)
    return Reply(200, headers={"ETag": f'"{git_id(data)}"'})


def _put(site: Site, asked: Asked) -> Reply:
    """Row 13: a whole object, or one part of it."""
    upload = site.uploads.get(asked.option("signature"))
    if upload is None or f"/upload/{upload.oid}" != asked.path:
        return _xml(403, "SignatureDoesNotMatch")
    if part := asked.option("part"):
        upload.parts[int(part)] = asked.body
        return Reply(200, headers={"ETag": f'"{git_id(asked.body)}"'})
    return stored(site, upload, asked.body)


def _get(site: Site, asked: Asked) -> Reply:
    sha256 = site.downloads.get(asked.option("signature"))
    if sha256 is None or sha256 not in asked.path:
        return _xml(403, "SignatureDoesNotMatch")
    if sha256 not in site.store.objects:
        return _xml(404, "NoSuchKey")
    headers = {"ETag": f'"{sha256[:32]}"', "Content-Type": "application/octet-stream"}
    return Reply(200, site.store.objects[sha256], headers, ranged=True)


_METHODS: Mapping[str, Handler] = {"GET": _get, "HEAD": _get, "PUT": _put}


def answer_cdn(site: Site, asked: Asked) -> Reply:
    """The answer to any request there."""
    if "authorization" in asked.headers:
        return _xml(400, "OnlyOneAuthMechanismAllowed")
    handler = _METHODS.get(asked.method)
    return handler(site, asked) if handler else _xml(405, "MethodNotAllowed")
