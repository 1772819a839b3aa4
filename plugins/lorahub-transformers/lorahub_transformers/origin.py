"""Where a live model came from: its repository and commit, or its folder, as far as that can be shown.

A model remembers the name that it was loaded by, and since Transformers 5 no commit.  The files that it was read from
are still there, though: a snapshot in the Hub's cache, or a folder, whose numbers are those of the model.  The
beginning of every parameter is compared, so that nothing is written down that is only likely.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorahub.bases.framework import BaseFiles
from lorahub.bases.open import survey_base
from lorahub.bases.weights import weights_digest
from lorahub.errors import InvalidRef, LorahubError
from lorahub.files.dtypes import to_torch
from lorahub.files.header import Header
from lorahub.files.tensors import FileSource
from lorahub.findings import Finding, Verdict
from lorahub.hub.cache import pin_of
from lorahub.hub.hub import FilePin, digest_of
from lorahub.lazy import torch
from lorahub.names import COMMIT, Ref

if TYPE_CHECKING:
    from torch import nn

__all__ = ["MADE", "Origin", "base_of", "digest_of_files", "origin_of", "snapshots"]

MADE = "_lorahub_made"
"""Under which attribute a model that lorahub loaded knows where it came from."""

_SNAPSHOT = re.compile(r"models--(?P<repo>[^/\\]+)[/\\]snapshots[/\\](?P<commit>[0-9a-f]{40})[/\\]?$")
"""How a folder in the Hub's cache ends; of the repository's name, ``--`` stands for the slash."""

_BLOB = re.compile(r"[0-9a-f]{64}")
"""What the Hub's cache calls the content of a large file: its sha256."""

_COMPARED = 1 << 14
"""How many numbers of each parameter are compared, from its beginning."""

_FLOATS = frozenset({"F64", "F32", "F16", "BF16"})

_INFIXES = (".base_layer", ".original_module")
"""What PEFT puts into the names of the base's own parameters."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Origin:
    """Where a model came from.

    Attributes:
        repo: "ns/name", or "".
        commit: of that repository, or "" where it could not be shown.
        files: what it was read from, or None.
        said: what there is to say of it.
    """

    repo: str = ""
    commit: str = ""
    files: BaseFiles | None = None
    said: tuple[Finding, ...] = ()


def base_of(model: nn.Module) -> nn.Module:
    """The model that adapters were put into: what PEFT, ``torch.compile`` and data parallelism wrap."""
    inner: Any = model
    for name in ("_orig_mod", "module", "_orig_mod"):
        inner = getattr(inner, name, inner)
    found: nn.Module = inner.get_base_model() if hasattr(inner, "peft_config") else inner
    return found


def origin_of(model: nn.Module) -> Origin:
    """Where ``model``, without its wrapping, came from; reads a few parameters of it and of files, and asks no hub."""
    made = vars(model).get(MADE)
    known: Origin = made.origin if made is not None else Origin()
    if known.files is not None and _holds(known.files, model):  # nothing was merged into it since
        return known
    config: Any = getattr(model, "config", None)
    name = str(getattr(config, "_name_or_path", "") or "")
    if not name:
        return Origin(said=(_unknown("the model was built from a configuration, and not loaded from anywhere"),))
    if (folder := Path(name)).is_dir():
        return _of_folder(folder, model)
    try:
        repo = Ref.parse(name, bare=True).repo
    except InvalidRef:
        repo = None
    if repo != name:
        return Origin(said=(_unknown(f"it was loaded from {name!r}, which is neither a repository nor a folder now"),))
    found = [files for files in snapshots(repo) if _holds(files, model)]
    if not found:
        told = str(getattr(config, "_commit_hash", "") or "")
        if COMMIT.fullmatch(told):
            return Origin(repo=repo, commit=told, said=(_no_files(repo, told),))
        return Origin(repo=repo, said=(_no_commit(repo),))
    return Origin(repo=repo, commit=found[0].folder.name, files=found[0])


def digest_of_files(files: BaseFiles) -> str:
    """The digest of the weights; where they lie in the Hub's cache, from the hashes by which it names them."""
    pins = {}
    for name, header in files.headers.items():
        blob = (files.folder / name).resolve().name
        if not (files.folder / name).is_symlink() or not _BLOB.fullmatch(blob):
            return weights_digest(files)
        pins[name] = FilePin(size=header.size, sha256=blob)
    return digest_of(pins)


def _of_folder(folder: Path, model: nn.Module) -> Origin:
    """A folder; one in a cache has the name of a repository."""
    try:
        files = survey_base(folder)
    except LorahubError as error:
        return Origin(said=(_unknown(f"the folder that it was loaded from cannot be read: {error.message}"),))
    if not _holds(files, model):
        return Origin(said=(_unknown("the folder that it was loaded from holds other weights than the model has"),))
    place = folder.absolute()
    if found := _SNAPSHOT.search(str(place)):
        return Origin(repo=found["repo"].replace("--", "/"), commit=found["commit"], files=files)
    pin = pin_of(place)
    return Origin(repo=pin.repo, commit=pin.commit, files=files) if pin else Origin(files=files)


def snapshots(repo: str) -> Iterator[BaseFiles]:
    """What the Hub's cache holds of a repository; what its main branch was last seen at comes first."""
    from huggingface_hub import constants  # noqa: PLC0415 - slow to import, and a folder needs none of it

    place = Path(constants.HF_HUB_CACHE) / f"models--{repo.replace('/', '--')}"
    main = place / "refs" / "main"
    first = main.read_text().strip() if main.is_file() else ""
    snapshots = place / "snapshots"
    folders = [each for each in snapshots.iterdir() if COMMIT.fullmatch(each.name)] if snapshots.is_dir() else []
    for folder in sorted(folders, key=lambda each: (each.name != first, each.name)):
        try:
            yield survey_base(folder)
        except LorahubError:  # it was fetched in part, or holds pickles: nothing can be compared
            continue


def _holds(files: BaseFiles, model: nn.Module) -> bool:
    """Whether the files hold the numbers that the model has, in all parameters that they have by the same name."""
    live = dict(_own(model))
    prefix = getattr(model, "base_model_prefix", "")
    pairs: dict[str, torch.Tensor] = {}
    for stored, info in files.tensors.items():
        for name in (stored, f"{prefix}.{stored}", stored.removeprefix(f"{prefix}.")):
            if name in live and tuple(live[name].shape) == info.shape and info.dtype in _FLOATS:
                pairs[stored] = live[name]
                break
    return bool(pairs) and all(_agree(files.folder / file, header, pairs) for file, header in files.headers.items())


def _agree(path: Path, header: Header, pairs: Mapping[str, torch.Tensor]) -> bool:
    """Whether the parameters in one file begin as those of the model."""
    with FileSource(path) as source:
        for name, info in header.tensors.items():
            if name not in pairs or not pairs[name].numel():
                continue
            dtype, count = to_torch(info.dtype), min(pairs[name].numel(), _COMPARED)
            begins = bytearray(count * dtype.itemsize)
            source.read_into(name, 0, begins)
            if not _same(torch.frombuffer(begins, dtype=dtype), pairs[name].reshape(-1)[:count]):
                return False
    return True


def _own(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """The parameters that nobody trains, and that hold their numbers plainly, by the names of the bare model."""
    for name, parameter in model.named_parameters():
        plain = type(parameter) is torch.nn.Parameter and parameter.is_floating_point() and not parameter.is_meta
        if plain and not parameter.requires_grad:
            bare = name
            for infix in _INFIXES:
                bare = bare.replace(infix, "")
            yield bare, parameter.detach()


def _same(stored: torch.Tensor, live: torch.Tensor) -> bool:
    """Whether ``live`` is what loading gives, in its dtype or by way of 16 bits, as before training in 4 or 8 bits."""
    here = live.cpu()
    ways: Mapping[str, torch.Tensor] = {
        "": stored,
        "bfloat16": stored.to(torch.bfloat16),
        "float16": stored.to(torch.float16),
    }
    return any(torch.equal(each.to(here.dtype), here) for each in ways.values())


def _unknown(why: str) -> Finding:
    return Finding(
        code="base-unknown",
        axis="base",
        level=Verdict.UNVERIFIED,
        message=f"the base is recorded by its structure alone: {why}",
        remedy="say what it is: RecordCallback(base='NS/NAME@COMMIT') or RecordCallback(base=FOLDER)",
    )


def _no_commit(repo: str) -> Finding:
    return Finding(
        code="base-commit-unknown",
        axis="base",
        level=Verdict.UNVERIFIED,
        message=f"the base is recorded as {repo} without a commit: the Hub's cache holds no weights of it that are the "
        "model's",
        remedy=f"say which it is: RecordCallback(base='{repo}@COMMIT')",
    )


def _no_files(repo: str, commit: str) -> Finding:
    return Finding(
        code="base-files-gone",
        axis="base",
        level=Verdict.UNVERIFIED,
        message=f"the base is recorded as {repo}@{commit[:12]} without a digest of its weights: the Hub's cache has "
        "none that are the model's",
        remedy=f"where the Hub can be asked: lorahub record FOLDER --base {repo}@{commit}",
    )
