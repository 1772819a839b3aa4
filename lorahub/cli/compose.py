"""``lorahub compose``."""

from __future__ import annotations

import shutil
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from lorahub.cli.compose_text import show_made, show_merged, show_methods, show_outline
from lorahub.cli.options import allow_option, base_option, compat_option, hub_option, output_options
from lorahub.cli.output import Output
from lorahub.cli.reducing import budget_options
from lorahub.composing.asked import Request, requested
from lorahub.composing.job import prepare_composition
from lorahub.composing.locking import demand_same, lock_of, pinned, read_lock
from lorahub.composition.gathering import MODES
from lorahub.composition.mergekit.reading import load_mergekit
from lorahub.deriving import DTYPES
from lorahub.engine.crew import crew_size
from lorahub.errors import Degraded, UsageError
from lorahub.plugins import load_registry
from lorahub.recipe_lock import RecipeLock

__all__ = ["compose"]


@click.command()
@click.argument("refs", metavar="RECIPE.toml | REF[:WEIGHT]...", nargs=-1)
@click.option("-o", "--out", "target", metavar="FOLDER", help="Where the result goes; a new folder.")
@click.option("--method", help="How changes become one: linear by default; see --methods.")
@click.option(
    "--set", "settings", metavar="NAME=VALUE", multiple=True, help="A parameter of the method, as density=0.4."
)
@budget_options
@click.option("--dtype", type=click.Choice(DTYPES), help="Of the result; float32 by default.")
@click.option("--format", "layout", help="Of the written adapter; that of the adapters where they share one.")
@click.option("--non-additive", type=click.Choice(MODES), help="What becomes of kinds that look at the weight (DoRA).")
@click.option("--seed", type=click.IntRange(min=0), help="What every random draw follows from.")
@click.option("--checkpoint", is_flag=True, help="Merge the result into --base, shard by shard.")
@click.option("--from-mergekit", metavar="FILE", help="Take the recipe from a mergekit YAML of adapters.")
@click.option("--explain", is_flag=True, help="Print plan, ranks, operations and memory, and stop.")
@click.option("--recipe", "recipe_only", is_flag=True, help="Print the recipe that this comes to, and stop.")
@click.option("--locked", is_flag=True, help="Compose exactly what the lock beside the recipe says, or refuse.")
@click.option("--methods", is_flag=True, help="List the methods and their parameters, and stop.")
@base_option
@click.option("--threads", type=click.IntRange(min=1), help="How many threads; the result does not depend on it.")
@allow_option
@compat_option
@hub_option
@output_options
def compose(
    refs: tuple[str, ...],
    target: str | None,
    method: str | None,
    settings: tuple[str, ...],
    rank: int | None,
    energy: float | None,
    error: float | None,
    adaptive: bool,
    parameters: int | None,
    dtype: str | None,
    layout: str | None,
    non_additive: str | None,
    seed: int | None,
    checkpoint: bool,
    from_mergekit: str | None,
    explain: bool,
    recipe_only: bool,
    locked: bool,
    methods: bool,
    base: str | None,
    threads: int | None,
    allow: tuple[str, ...],
    compat: str | None,
    hub: str | None,
    out: Output,
) -> None:
    """Make one adapter of several: an exact weighted sum, or another method.

    \b
      lorahub compose acme/ink@1.0:0.7 ./sql:0.3 -o mix
      lorahub compose a b c --method ties --set density=0.4 --rank 32 -o mix
      lorahub compose recipe.toml -o mix

    A recipe's file says all of it, and a lock beside it keeps what its references came to. Weights are never
    normalised unless a parameter asks for it. Of methods that look at elements (TIES, DARE) the result has as many
    ranks as the adapters have together, unless --rank or another budget says otherwise; the report says what that lost.
    """  # noqa: D301 - click takes a backspace for "leave these lines as they are"
    registry = load_registry()
    if methods:
        show_methods(registry.methods, out)
        return
    request = _request(
        refs,
        from_mergekit,
        out,
        method=method,
        parameters=_parameters(settings) or None,
        rank=rank,
        energy=energy,
        error=error,
        adaptive=adaptive or None,
        max_parameters=parameters,
        dtype=dtype,
        format=layout,
        non_additive=non_additive,
        seed=seed,
        output="checkpoint" if checkpoint else None,
        base=base,
        compat=compat,
    )
    if recipe_only:
        out.answer(request.recipe.document(), text=request.recipe.to_toml().rstrip(), bare=request.recipe.fingerprint())
        return
    if not target and not explain:
        raise UsageError("compose needs -o FOLDER, or --explain to only look", "lorahub compose ... -o FOLDER")
    lock = read_lock(request) if locked else None
    if lock is not None:
        request = pinned(request, lock)
    with out.progress("reading") as progress:
        composition = prepare_composition(request, allow=allow, hub=hub, progress=progress)
    if lock is not None:
        out.findings(demand_same(lock, composition))
    out.findings(composition.findings, allowed=composition.allowed)
    if explain:
        show_outline(composition.outline(), request.recipe, crew_size(threads), out)
        return
    assert target is not None
    if request.recipe.output == "checkpoint":
        with out.progress("pulling") as progress:
            composition = composition.pulled(progress)
        with out.progress("merging") as progress:
            merged = composition.merge(target, threads=threads, progress=progress)
        if request.file is not None and lock is None:
            lock_of(composition).save(RecipeLock.beside(request.file))
        show_merged(merged, target, out)
        return
    with out.progress("composing", unit="steps") as progress:
        made = composition.make(target, threads=threads, progress=progress)
    if lock is not None:
        try:
            demand_same(lock, composition, made.header)
        except Degraded:
            shutil.rmtree(target)
            raise
    elif request.file is not None:
        lock_of(composition, made.header).save(RecipeLock.beside(request.file))
    show_made(made.report, out)


def _request(refs: tuple[str, ...], from_mergekit: str | None, out: Output, **fields: Any) -> Request:
    """What the command line says: a recipe's file, a mergekit file, or references and options."""
    if from_mergekit is not None:
        if refs:
            raise UsageError("--from-mergekit names the adapters itself", "leave the references out")
        given = {name: value for name, value in fields.items() if value is not None}
        imported = load_mergekit(from_mergekit)
        for note in imported.notes:
            out.say(f"note: {note}")
        return requested(imported.recipe.changed(**given), folder=Path(from_mergekit).parent)
    if len(refs) == 1 and refs[0].endswith(".toml"):
        return requested(Path(refs[0]), **fields)
    if any(ref.endswith(".toml") for ref in refs):
        raise UsageError("a recipe stands alone", "lorahub compose recipe.toml -o FOLDER")
    return requested(refs, **fields)


def _parameters(settings: tuple[str, ...]) -> Mapping[str, Any]:
    """``NAME=VALUE`` as a recipe would have it: numbers, true and false, lists; everything else is a word."""
    found: dict[str, Any] = {}
    for each in settings:
        name, equals, text = each.partition("=")
        if not equals or not name.strip():
            raise UsageError(f"--set takes NAME=VALUE, not {each!r}", "--set density=0.4")
        try:
            found[name.strip()] = tomllib.loads(f"value = {text}")["value"]
        except (tomllib.TOMLDecodeError, KeyError):
            found[name.strip()] = text
    return found
