"""A double of the Hugging Face Hub: the HTTP contract that the real ``huggingface_hub`` client speaks, on loopback.

Two servers on two ports are two origins: the **hub**, and the **cdn** that LFS objects go to and come from.  The cdn
refuses any ``Authorization``, and the ``double`` fixture fails a test in which one was sent there.

Fixtures (tests/hub/conftest.py): ``double``; ``cache``; ``hub`` (a ``HuggingFaceHub`` that may write to ``acme``);
``anonymous`` (the same without a token), ``stranger`` (a token of somebody else), ``reader`` (a token of a member that
only reads); ``offline``; ``xet``; ``environment`` (variables for a subprocess that is to use the double);
``make_adapter``.

Fill it::

    repo = double.repo("acme/ink")                       # made empty if need be; private=True
    one = repo.commit({"adapter_model.safetensors": data, "README.md": card(base_model="acme/base")}, "v1.0.0")
    two = repo.edit({"README.md": b"new"}, "v1.1.0")      # keeps the other files; both: (files, tag, branch="main")
    number = repo.open_pull({...})                        # refs/pr/<number>
    repo.tags["v1.0.0"] = two                             # move a tag behind somebody's back; also branches, pulls
    repo.private = True; repo.gate(); repo.gate(granted=("mallory",)); repo.disable(); repo.disable(whole=True)
    repo.rename("acme/sumi"); repo.squash(); repo.forget(one); repo.downloads = 12
    double.store.accounts["hf_..."] = Account(name="bob", role="read", orgs=("acme",))

``commit`` gives the commit's id.  Members of a namespace pass its gate, as on the Hub: ask as ``anonymous`` or
``stranger`` to be refused.  A repository that a client creates starts with a commit of .gitattributes; one made by
``double.repo`` has no commit until it is given one.

Look at it: ``repo.files("main")`` (path -> bytes), ``repo.history("main")`` (newest first: .oid .parent .title
.author .files), ``repo.tags``, ``repo.branches``, ``repo.pulls``, ``repo.find(revision)``.

The log: ``double.log`` (each: .where .method .target .path .headers .status .served .received), ``log.clear()``,
``double.seen(part, where=, method=)``, ``double.paths(where)`` (without queries), ``double.writes()`` (requests that
may have changed something: create, commit, tag, PUT of bytes, ...; refused ones too, see .status, which is 0 where no
answer was sent) and ``double.bytes_of(".safetensors")``::

    assert double.bytes_of(".safetensors") == 0          # no weight byte was read
    assert double.log == []                              # no request at all
    assert len(double.seen("/commit/main", method="POST")) == 1

Addresses at the cdn end in the file's name when they are read (``/acme/ink/<sha256>/adapter_model.safetensors``), and
are ``/upload/<sha256>`` when written.

Break it: ``double.fault(ACTION, part, where=, method=, times=1, after=0)``, where ``part`` is found in path or query,
``times=None`` is for ever, and ``after`` so many requests of the kind pass first; ``double.faults.clear()``::

    double.fault(Status(503), "/refs", times=2)                       # not applied
    double.fault(Status(429, {"Retry-After": "3"}), "/api/", times=None)
    double.fault(Status(429, {"RateLimit": '"api";r=0;t=3', "RateLimit-Policy": '"fixed window";"api";q=500;w=300'}))
    double.fault(DropAfter(), "/commit/")                             # applied, and no answer
    double.fault(DropBefore(), "/commit/")                            # not applied, and no answer
    double.fault(Flip(at=100), ".safetensors", where="cdn", times=None)
    double.fault(Cut(after=2_000_000), where="cdn")                   # Content-Length is whole, the connection breaks
    double.fault(Truncate(100), "adapter_config.json")                # as if there were no more
    double.fault(Swap(b"other"), "adapter_config.json")
    double.fault(Headers({"ETag": '"../../../x"', "X-Repo-Commit": "../x"}), "/resolve/", times=None)
    double.fault(Edit(lambda info: info["siblings"].append({"rfilename": "../evil"})), "/revision/")
    double.fault(Do(lambda: repo.edit({"a.txt": b"theirs"})), "/commit/")    # somebody is faster
    hold = double.fault(Hold(), "/commit/").action       # hold.reached.wait(30); kill the client; hold.release()
    double.fault(Delay(0.2), "/refs")

Several faults that fit one request are nested, the first outermost.  An action is any callable of
``(asked, answer) -> Reply``.

Settings: ``double.site.page_size``, ``.multipart_above``, ``.chunk``, ``.resolve_cache = True`` (small files by a
relative redirect).  Tokens: ``TOKEN`` (alice, writes, of acme), ``READER`` (alice's, only reads), ``STRANGER``
(mallory, writes, of nothing), ``NOBODY`` (no account: 401).  ``double.api(token)`` is the real client.

Xet: ``double.enable_xet(tmp_path / "cas")`` before anything is committed; the ``xet`` fixture does it and switches
Xet on in this process's client.  Files then carry a Xet hash, and bytes move through the folder without a request (so
``bytes_of`` does not see them, and ``seen("xet-write-token")`` and ``seen("xet-read-token")`` do).  Plain clients are
served the same files.  A subprocess: ``environment | {"HF_HUB_DISABLE_XET": "0"}``.

As a process: ``python -m hub.double --repos FOLDER`` with tests/ on ``PYTHONPATH`` prints the endpoint and serves
every FOLDER/namespace/name until it is interrupted.

A request that did not come whole (its client was killed) is neither applied nor logged.  HEAD and GET of a model or
file, and every address of the contract, are rows of ``hub_routes.ROUTES``.

Not served: datasets and spaces, short commit ids, .gitignore rules, likes, webhooks.
"""

from __future__ import annotations

from hub.double.answers import Asked, Hangup, Reply
from hub.double.cards import card
from hub.double.faults import (
    Action,
    Cut,
    Delay,
    Do,
    DropAfter,
    DropBefore,
    Edit,
    Fault,
    Flip,
    Headers,
    Hold,
    Status,
    Swap,
    Truncate,
)
from hub.double.files import Commit, File, git_id
from hub.double.server import NOBODY, READER, STRANGER, TOKEN, Double
from hub.double.store import Account, Repo
from hub.double.wire import Seen

__all__ = [
    "NOBODY",
    "READER",
    "STRANGER",
    "TOKEN",
    "Account",
    "Action",
    "Asked",
    "Commit",
    "Cut",
    "Delay",
    "Do",
    "Double",
    "DropAfter",
    "DropBefore",
    "Edit",
    "Fault",
    "File",
    "Flip",
    "Hangup",
    "Headers",
    "Hold",
    "Reply",
    "Repo",
    "Seen",
    "Status",
    "Swap",
    "Truncate",
    "card",
    "git_id",
]
