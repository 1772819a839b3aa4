"""A recipe and its lock: compose exactly what was composed before, or say precisely what is otherwise now."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from importlib import metadata

from lorahub import __version__
from lorahub.adapter import AdapterHeader
from lorahub.composing.asked import Request
from lorahub.composing.ingredients import Opened
from lorahub.composing.job import Composition
from lorahub.errors import Degraded, NotFound, UsageError
from lorahub.files.digest import file_digest, tensors_digest
from lorahub.findings import Finding, Verdict
from lorahub.names import Ref
from lorahub.recipe_lock import LockedAdapter, LockedBase, RecipeLock, compare

__all__ = ["demand_same", "lock_of", "pinned", "read_lock"]


def read_lock(request: Request) -> RecipeLock:
    """The lock beside a recipe's file.

    Raises:
        UsageError: the recipe lies in no file, or has no lock beside it.
        RecordError: what lies there is no lock.
    """
    if request.file is None:
        raise UsageError("only a recipe's file has a lock beside it", "lorahub compose recipe.toml --locked -o FOLDER")
    place = RecipeLock.beside(request.file)
    try:
        return RecipeLock.load(place)
    except NotFound:
        raise UsageError(
            f"there is no {place.name} beside {request.file}", "compose once without --locked, which writes it"
        ) from None


def pinned(request: Request, lock: RecipeLock) -> Request:
    """The request with every reference to a hub at the commit that was locked.

    Raises:
        Degraded: the recipe is another than the one that was locked.
    """
    if lock.recipe != request.recipe.fingerprint():
        now = lock.model_copy(update={"recipe": request.recipe.fingerprint()})
        _refuse(compare(lock, now), request)
    sources = [
        Ref(repo=each.repo, selector=one.commit, subpath=each.subpath)
        if isinstance(each, Ref) and each.repo and one.commit
        else each
        for each, one in zip(request.sources, lock.adapters, strict=True)
    ]
    return replace(request, sources=tuple(sources))


def lock_of(composition: Composition, output: AdapterHeader | None = None) -> RecipeLock:
    """What a composition came to.

    Args:
        composition: opened.
        output: the adapter that was made of it.

    Raises:
        UsageError: an adapter was given open, and no recipe can name it again.
    """
    recipe, base = composition.recipe, composition.base
    try:
        torch = metadata.version("torch")
    except metadata.PackageNotFoundError:
        torch = None
    ref = base.index.ref if base else None
    return RecipeLock(
        recipe=recipe.fingerprint(),
        method=recipe.method,
        output=_tensors(output) if output else None,
        lorahub=__version__,
        torch=torch,
        base=LockedBase(
            ref=recipe.base or "",
            repo=ref.repo or None,
            commit=ref.commit or None,
            weights=base.index.weights or None,
            structure=base.index.structure or None,
        )
        if base and ref
        else None,
        adapters=tuple(
            _locked(ingredient.ref, ingredient.name, one)
            for ingredient, one in zip(recipe.adapters, composition.opened, strict=True)
        ),
    )


def demand_same(lock: RecipeLock, composition: Composition, output: AdapterHeader | None = None) -> tuple[Finding, ...]:
    """What is otherwise than when it was locked, where that does not change the result.

    Raises:
        Degraded: something is that does.
    """
    findings = tuple(compare(lock, lock_of(composition, output)))
    _refuse(findings, composition.request)
    return findings


def _refuse(findings: Sequence[Finding], request: Request) -> None:
    stopping = tuple(each for each in findings if each.level >= Verdict.DEGRADED)
    if stopping:
        raise Degraded(
            f"{request.file} is not what was locked, and --locked takes nothing else",
            f"to take it as it is now, and lock that: lorahub compose {request.file} -o FOLDER",
            stopping,
        )


def _locked(ref: str, name: str | None, one: Opened) -> LockedAdapter:
    if one.header is None:
        raise UsageError(f"{one.label} was made in memory, and no lock can name it", "save it, and name its folder")
    header, pin = one.header, one.pin
    files = {header.reading.file, *header.files.configs}
    return LockedAdapter(
        ref=ref,
        name=name,
        repo=pin.repo if pin else None,
        commit=pin.commit if pin else None,
        format=header.format,
        tensors=_tensors(header),
        files={path: file_digest(header.folder / path)[0] for path in sorted(files)},
    )


def _tensors(header: AdapterHeader) -> str:
    """The digest of the tensors as they are, whatever a record says of them."""
    file = header.reading.file
    if file.endswith(".safetensors"):
        return tensors_digest(header.folder / file, header.files.headers[file])
    return f"sha256:{file_digest(header.folder / file)[0]}"
