"""Which of a repository's files a reference means: one adapter's folder, one weight file, or a base.

Works on listed names alone, so that what is pulled is decided before a byte moves.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from lorahub.errors import IntegrityError, NotFound, UnsafePath, UsageError
from lorahub.hub.contents import GIB, MIB, is_safetensors, is_weights, rule_for
from lorahub.hub.hub import FilePin
from lorahub.names import did_you_mean, path_problem, printable

__all__ = ["Selection", "adapter_folders", "select_adapter", "select_base"]

_CONFIGS = ("adapter_config.json", "lorahub.json")
_CARD = "README.md"
_TRAVELS = frozenset({"behaviour", "companion", "document", "picture"})
_BASE_JSON_LIMIT = 256 * MIB
_BASE_LIMIT = 64 * GIB


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """The files that are meant: ``subfolder`` of the repository, the one weight ``file`` or "", and path -> content."""

    subfolder: str
    file: str
    files: Mapping[str, FilePin]


def select_adapter(listing: Mapping[str, FilePin], subpath: str, *, repo: str) -> Selection:
    """The adapter at ``subpath`` (a folder, a weight file, or "" for the whole) of a repository's listing.

    Folders within it that are adapters of their own stay out, and so does everything that no adapter folder holds.

    Raises:
        NotFound: there is no such folder, no weights in it, or several adapters below it.
        UsageError: ``subpath`` is a file that is no weight file.
        UnsafePath, IntegrityError: a file that would be pulled has a hostile name, or more bytes than such a file may.
    """
    place = f"{repo}/{subpath}" if subpath else repo
    subfolder, file = subpath, ""
    if subpath in listing:
        subfolder, _, file = subpath.rpartition("/")
        if not is_weights(file):
            raise UsageError(f"{place} is not a weight file", f"Name the folder: {f'{repo}/{subfolder}'.rstrip('/')}")
    inside = _inside(listing, subfolder, repo)
    adapters = adapter_folders(inside)
    if not any("/" not in path and (is_weights(path) or path in _CONFIGS) for path in inside) and adapters:
        raise NotFound(
            f"{place} is no adapter itself but holds {len(adapters)}: {', '.join(map(printable, adapters[:8]))}",
            f"Name one: {place}/{printable(adapters[0])}",
        )
    chosen = {
        path: pin
        for path, pin in inside.items()
        if rule_for(path).role in _TRAVELS
        and not any(path.startswith(f"{folder}/") for folder in adapters)
        and (not file or path == file or not is_weights(path))
        and not (rule_for(path).role == "picture" and (path_problem(path) or pin.size > rule_for(path).limit))
    }
    if not any(map(is_weights, chosen)):
        raise _no_weights(place, inside)
    _check(chosen, {path: rule_for(path).limit for path in chosen}, place)
    return Selection(subfolder=subfolder, file=file, files=chosen)


def adapter_folders(paths: Collection[str]) -> list[str]:
    """The folders below the root that a config shows to be adapters of their own, sorted."""
    configs = [path.rpartition("/") for path in paths if rule_for(path).role == "behaviour"]
    return sorted({folder for folder, _, name in configs if folder and name in _CONFIGS})


def select_base(listing: Mapping[str, FilePin], subpath: str, *, repo: str) -> Selection:
    """A base at ``subpath``: its safetensors (one precision, sharded or not), configs, tokenizer, processor and card.

    Where there is a ``model_index.json``, the component folders come along.  ``subpath`` may be one weights file.

    Raises:
        NotFound: there is no such folder, or no safetensors in it.
        UnsafePath, IntegrityError: as ``select_adapter``.
    """
    place = f"{repo}/{subpath}" if subpath else repo
    file = ""
    if subpath in listing and is_safetensors(subpath):
        subpath, _, file = subpath.rpartition("/")
    inside = _inside(listing, subpath, repo)
    depth = 1 if "model_index.json" in inside else 0
    near = {path: pin for path, pin in inside.items() if path.count("/") <= depth}
    present = [path for path in near if is_safetensors(path)]
    if depth and any("/" in path for path in present):  # what lies beside a pipeline's components is the same once more
        present = [path for path in present if "/" in path]
    weights = {file} if file else _plain_weights(present)
    chosen = {
        path: pin
        for path, pin in near.items()
        if path in weights or path.endswith(".json") or path == _CARD or rule_for(path).role == "companion"
    }
    if not weights:
        raise _no_weights(place, inside)
    _check(chosen, {path: _BASE_LIMIT if path in weights else _BASE_JSON_LIMIT for path in chosen}, place)
    return Selection(subfolder=subpath, file=file, files=chosen)


def _inside(listing: Mapping[str, FilePin], subfolder: str, repo: str) -> dict[str, FilePin]:
    if not subfolder:
        return dict(listing)
    inside = {p.removeprefix(f"{subfolder}/"): pin for p, pin in listing.items() if p.startswith(f"{subfolder}/")}
    if not inside:
        folders = {path.rpartition("/")[0] for path in listing} | {path for path in listing if is_weights(path)}
        near = did_you_mean(subfolder, sorted(folders)).strip()
        has = ", ".join(
            map(printable, sorted(filter(None, {*adapter_folders(listing), *filter(is_weights, listing)}))[:8])
        )
        raise NotFound(f"{repo} holds no '{printable(subfolder)}'", near or (f"It holds {has}." if has else ""))
    return inside


def _plain_weights(paths: Collection[str]) -> set[str]:
    """Weights in one precision, once: no ``.fp16.`` twin, and a single file before its shards."""
    by_folder: dict[str, list[str]] = {}
    for path in paths:
        by_folder.setdefault(path.rpartition("/")[0], []).append(path)
    kept: set[str] = set()
    for folder, members in by_folder.items():
        names = {path: path.removeprefix(f"{folder}/") for path in members}
        plain = [path for path, name in names.items() if name.count(".") == 1] or members
        single = [path for path in plain if names[path] in {"model.safetensors", "diffusion_pytorch_model.safetensors"}]
        shards = [path for path in plain if names[path].startswith(("model-", "diffusion_pytorch_model-"))]
        kept.update(single or shards or plain)
    return kept


def _check(files: Mapping[str, FilePin], limits: Mapping[str, int], place: str) -> None:
    if hostile := [f"'{printable(path)}' {problem}" for path in files if (problem := path_problem(path))]:
        raise UnsafePath(
            f"{place} lists files that must not be written: {'; '.join(hostile[:5])}",
            "Nothing was fetched.  Ask its author to rename them, or take another adapter.",
        )
    if large := [path for path, pin in files.items() if pin.size > limits[path]]:
        sizes = "; ".join(f"{path} has {files[path].size:,} bytes, at most {limits[path]:,}" for path in large[:5])
        raise IntegrityError(f"{place} lists files larger than such files may be: {sizes}")


def _no_weights(place: str, inside: Collection[str]) -> NotFound:
    models = [path for path in inside if rule_for(path).role == "base" and is_safetensors(path)]
    if models:
        return NotFound(f"{place} holds a base model, not an adapter: {printable(models[0])}", "Use it as --base.")
    pickles = [path for path in inside if path.endswith((".bin", ".pt", ".ckpt"))]
    if pickles:
        return NotFound(
            f"{place} has its weights only as pickles, which are never downloaded: {printable(pickles[0])}",
            "Ask its author for safetensors.",
        )
    return NotFound(f"{place} holds no .safetensors file")
