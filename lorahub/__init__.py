"""lorahub: LoRA-family adapters as dependable, versioned artefacts.

    import lorahub

    ink = lorahub.load("acme/ink@1.2")
    merged = lorahub.merge(model, {"ink": ink}, weights=[0.8])
    merged.undo()

The names below load on first use; ``import lorahub`` itself imports neither torch nor pydantic.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

__version__ = "0.1.0"

if TYPE_CHECKING:
    from lorahub.adapter import Adapter as Adapter
    from lorahub.adapter import save as save
    from lorahub.attaching import attach as attach
    from lorahub.attaching import handle as handle
    from lorahub.carding import card as card
    from lorahub.comparing import diff as diff
    from lorahub.comparing import interference as interference
    from lorahub.comparing import similarity as similarity
    from lorahub.comparing import subspace_overlap as subspace_overlap
    from lorahub.composing import compose as compose
    from lorahub.converting import convert as convert
    from lorahub.creating import create as create
    from lorahub.dequantising import dequantise as dequantise
    from lorahub.deriving import extract as extract
    from lorahub.deriving import resize as resize
    from lorahub.errors import LorahubError as LorahubError
    from lorahub.fetching import pull as pull
    from lorahub.findings import Finding as Finding
    from lorahub.findings import Verdict as Verdict
    from lorahub.hookspecs import hookimpl as hookimpl
    from lorahub.manifest.adding import add as add
    from lorahub.manifest.adding import remove as remove
    from lorahub.manifest.locking import lock as lock
    from lorahub.manifest.syncing import sync as sync
    from lorahub.manifest.verifying import verify as verify
    from lorahub.manifest.watching import outdated as outdated
    from lorahub.merging import merge as merge
    from lorahub.merging import plan as plan
    from lorahub.merging.checking import check as check
    from lorahub.names import Ref as Ref
    from lorahub.opening import open_base as open_base
    from lorahub.publishing import push as push
    from lorahub.publishing import record as record
    from lorahub.searching import search as search
    from lorahub.searching import versions as versions
    from lorahub.sources import inspect as inspect
    from lorahub.sources import load as load
    from lorahub.sources import weigh as weigh
    from lorahub.tagging import tag as tag

_HOME = {
    "Adapter": "adapter",
    "Finding": "findings",
    "LorahubError": "errors",
    "Ref": "names",
    "Verdict": "findings",
    "add": "manifest.adding",
    "attach": "attaching",
    "card": "carding",
    "check": "merging.checking",
    "compose": "composing",
    "convert": "converting",
    "create": "creating",
    "dequantise": "dequantising",
    "diff": "comparing",
    "extract": "deriving",
    "handle": "attaching",
    "hookimpl": "hookspecs",
    "inspect": "sources",
    "interference": "comparing",
    "load": "sources",
    "lock": "manifest.locking",
    "merge": "merging",
    "open_base": "opening",
    "outdated": "manifest.watching",
    "plan": "merging",
    "pull": "fetching",
    "push": "publishing",
    "record": "publishing",
    "remove": "manifest.adding",
    "resize": "deriving",
    "save": "adapter",
    "search": "searching",
    "similarity": "comparing",
    "subspace_overlap": "comparing",
    "sync": "manifest.syncing",
    "tag": "tagging",
    "verify": "manifest.verifying",
    "versions": "searching",
    "weigh": "sources",
}

__all__ = ["__version__", *_HOME]  # noqa: PLE0604 - the table is the list


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module 'lorahub' has no attribute {name!r}")
    value = getattr(import_module(f"lorahub.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
