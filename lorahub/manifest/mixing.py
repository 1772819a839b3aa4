"""A manifest's compositions: as recipes, as what is locked of them, and made.

What goes in is named by pins alone, so that what comes out is a function of the lock.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

from lorahub import strict_json
from lorahub.composing.asked import Request, as_word
from lorahub.composing.job import prepare_composition
from lorahub.composing.locking import lock_of
from lorahub.errors import ManifestError, RecipeError
from lorahub.fetching import Progress
from lorahub.findings import Finding
from lorahub.manifest.document import FILENAME, Composition, Manifest
from lorahub.manifest.lockfile import LockedAdapter, LockedBase
from lorahub.names import Ref
from lorahub.recipe import Recipe

__all__ = ["Made", "Mix", "make", "mixes"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Mix:
    """One composition of a manifest, read.

    Attributes:
        name: what it is called.
        recipe: the document; adapters of the manifest stand in it as ``./name``.
        members: names of the manifest's adapters, in order; empty where a recipe's file names its own.
        own: label -> reference from the manifest's folder on, of a recipe's file.
        base: whether it composes over the manifest's base.
    """

    name: str
    recipe: Recipe
    members: tuple[str, ...]
    own: Mapping[str, str]
    base: bool

    def inputs(self, digests: Sequence[str], base: LockedBase | None) -> str:
        """``sha256:`` over everything that decides what comes out."""
        document = {
            "recipe": self.recipe.fingerprint(),
            "adapters": list(digests),
            "base": (base.weights or base.structure or "") if base and self.base else "",
        }
        return f"sha256:{hashlib.sha256(strict_json.compact(document).encode()).hexdigest()}"


def mixes(manifest: Manifest, folder: Path) -> dict[str, Mix]:
    """The compositions of the manifest in ``folder``, by name.

    Raises:
        RecipeError: one is no recipe.
        ManifestError: a recipe's file asks for what a manifest cannot lock.
        NotFound: a recipe's file is not there.
    """
    return {
        name: _from_file(name, made.recipe, manifest, folder) if made.recipe else _from_here(name, made, manifest)
        for name, made in sorted(manifest.compositions.items())
    }


def _from_here(name: str, made: Composition, manifest: Manifest) -> Mix:
    entries = manifest.entries()
    fields: dict[str, Any] = made.model_dump(
        mode="json", exclude_defaults=True, exclude={"adapters", "weights", "recipe", "base"}
    )
    given = made.model_dump(mode="json", include={"weights"})["weights"]
    weights = dict(zip(made.adapters, given, strict=True)) if isinstance(given, list) else given or {}
    document = {
        **fields,
        **({"base": str(manifest.base_ref())} if made.base else {}),
        "adapters": [
            {"ref": f"./{each}", "name": each, "weight": weights.get(each, entries[each].weight)}
            for each in made.adapters
        ],
    }
    recipe = Recipe.from_document(document, where=f"{FILENAME}: compositions.{name}")
    return Mix(name=name, recipe=recipe, members=made.adapters, own={}, base=made.base)


def _from_file(name: str, file: str, manifest: Manifest, folder: Path) -> Mix:
    path = folder / file
    recipe = Recipe.load(path)
    if recipe.output != "adapter":
        raise ManifestError(
            f"compositions.{name}: {file} makes a {recipe.output}, and only adapters are installed",
            f'write output = "adapter" in {file}, and merge what comes of it: lorahub merge',
        )
    base, here = recipe.base_reference(path.parent), manifest.base_ref()
    if base is not None and (here is None or _place(base, path.parent) != _place(here, folder)):
        raise ManifestError(
            f"compositions.{name}: {file} composes over {recipe.base}, which is not the base of {FILENAME}",
            f"lorahub add --base {recipe.base}",
        )
    own: dict[str, str] = {}
    for label, each in zip(recipe.labels(), recipe.adapters, strict=True):
        ref = Ref.parse(each.ref)
        if ref.local is not None and (ref.local.is_absolute() or (ref.path or "").startswith("~")):
            raise ManifestError(
                f"compositions.{name}: {each.ref} in {file} is a path on one machine", "write it from the file on"
            )
        word = as_word(label)
        word = next(new for n in count(1) if (new := word if n == 1 else f"{word}-{n}") not in own)
        own[word] = _from_folder(path.parent / (ref.path or ""), folder) if ref.path is not None else each.ref
    return Mix(name=name, recipe=recipe, members=(), own=own, base=base is not None)


def _place(ref: Ref, folder: Path) -> str:
    return ref.repo or os.path.abspath(folder / (ref.path or ""))  # noqa: PTH100 - Path.resolve would follow links


def _from_folder(place: Path, folder: Path) -> str:
    relative = Path(os.path.relpath(place, folder)).as_posix()
    return relative if relative.startswith("..") else f"./{relative}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Made:
    """What came of a composition: the digest of its tensors, and what there is to say."""

    output: str
    findings: tuple[Finding, ...]


def make(
    mix: Mix,
    adapters: Sequence[LockedAdapter],
    base: LockedBase | None,
    folder: Path,
    out: Path,
    *,
    hub: str | None,
    progress: Progress,
) -> Made:
    """Compose into the new folder ``out``.

    Args:
        mix: the composition.
        adapters: as they are locked, in its order.
        base: as it is locked.
        folder: the manifest's.
        out: a new folder.
        hub: path of a folder hub.
        progress: called with (targets done, in all).

    Raises:
        Degraded, BaseMismatch, Incompatible, RecipeError, CannotCarry, NotFinite: as ``lorahub.compose``.
        MissingDependency: torch is not installed.
    """
    recipe = mix.recipe
    if base is not None and mix.base:
        recipe = recipe.changed(base=str(base.reference(folder)))
    sources = [
        Ref(repo=each.repo, selector=each.commit, subpath=each.pin().path)
        if each.repo
        else Ref(path=os.path.abspath(folder / (each.path or "") / (each.weight_name or "")))  # noqa: PTH100 - as above
        for each in adapters
    ]
    made = prepare_composition(
        Request(recipe=recipe, sources=tuple(sources), folder=folder), hub=hub, progress=progress
    )
    composed = made.make(out, progress=progress)
    output = lock_of(made, composed.header).output
    if output is None:
        raise RecipeError(f"{mix.name} came to nothing that has tensors")
    return Made(output=output, findings=made.findings)
