"""Adapters in, one adapter or checkpoint out, for scripts: ``lorahub.compose``.

What people ask for becomes a recipe, whether they wrote one or not (``asked``); its adapters are opened and held
against each other (``ingredients``), made into one (``job``), and kept with what they came from (``result``,
``locking``).
"""

from __future__ import annotations

import os
from collections.abc import Collection
from typing import Any, Final, final

from lorahub.composing.asked import Asked, Weighing, requested
from lorahub.composing.job import prepare_composition
from lorahub.composing.learning import learn
from lorahub.composing.result import Composed, ComposeReport
from lorahub.composing.searching import search
from lorahub.engine.report import MergeReport
from lorahub.errors import UsageError
from lorahub.fetching import Progress, quiet
from lorahub.recipe import Recipe

__all__ = ["Compose", "ComposeReport", "Composed", "compose"]


@final
class Compose:
    """``lorahub.compose``: call it to make one adapter of several; ``search`` and ``learn`` find weights for them."""

    search = staticmethod(search)
    learn = staticmethod(learn)

    def __call__(
        self,
        adapters: Asked,
        *,
        weights: Weighing | None = None,
        method: str | None = None,
        rank: int | None = None,
        energy: float | None = None,
        error: float | None = None,
        adaptive: bool | None = None,
        max_parameters: int | None = None,
        dtype: str | None = None,
        format: str | None = None,  # noqa: A002 - what people call it
        base: str | None = None,
        non_additive: str | None = None,
        seed: int | None = None,
        compat: str | None = None,
        out: str | os.PathLike[str] | None = None,
        allow: Collection[str] = (),
        hub: str | None = None,
        threads: int | None = None,
        progress: Progress = quiet,
        **parameters: Any,
    ) -> Composed:
        """Make one adapter of several: an exact weighted sum, or any registered method.

        Args:
            adapters: name -> adapter, a list, a sum of open adapters (``0.7 * a - b``), a ``Recipe`` or the path of
                one; a recipe says all that follows but ``out`` to ``progress``.
            weights: one number for all, or one for each, in order or by name; 1 by default, or the weight in the
                reference.  Each is a number or a rule as recipes have them (what ``learn`` gives).  They are never
                normalised unless a parameter asks for it.
            method: "linear" by default; see ``lorahub compose --methods``.
            rank: of every target, at most; without a budget the result keeps every rank that the method gives, and of
                methods that look at elements (TIES, DARE) as many as the adapters have together: the report says what
                that lost, and the smaller side of the largest matrix as a rank loses nothing.
            energy: keep at least this share of the squared norm of each change.
            error: lose at most this share of the norm of each change.
            adaptive: meet energy or error over all targets together.
            max_parameters: spend so many numbers on all factors together.
            dtype: of the result, "float32" by default; "bfloat16" or "float16".
            format: of the written adapter; that of the adapters where they share one, else "peft".
            base: the base, a folder or ``ns/name[@COMMIT]``: where formats name modules differently, adapters bring new
                values, or kinds look at the weights.
            non_additive: "refuse", "linearise" (a DoRA's factors without its lengths) or "dense" (the change that a
                kind makes to the base's weight).
            seed: what every random draw follows from, with the adapter and the target; 0 by default.
            compat: see ``lorahub.load``.
            out: a new folder; None: a temporary one, which lives as long as the result.
            allow: finding codes to accept.
            hub: path of a folder hub.
            threads: how many; the result does not depend on it.
            progress: called with (bytes fetched, in all), then with (targets done, in all).
            parameters: the method's own, as ``density=0.4``; ``lambda_`` for ``lambda``.

        Raises:
            RecipeError, UsageError: what is asked for makes no sense.
            Degraded, BaseMismatch, Incompatible: the adapters do not go together; the findings say how.
            NotFinite: NaN or infinity, or the result does not fit into its dtype.
            WriteFailed: ``out`` exists, or there is no space.
        """
        request = requested(
            adapters,
            weights,
            method=method,
            rank=rank,
            energy=energy,
            error=error,
            adaptive=adaptive,
            max_parameters=max_parameters,
            dtype=dtype,
            format=format,
            base=base,
            non_additive=non_additive,
            seed=seed,
            compat=compat,
            parameters={name.rstrip("_"): value for name, value in parameters.items()} or None,
        )
        if request.recipe.output == "checkpoint":
            raise UsageError(
                "this recipe makes a checkpoint, and no adapter", "lorahub.compose.checkpoint(recipe, out=FOLDER)"
            )
        made = prepare_composition(request, allow=allow, hub=hub, progress=progress)
        return made.make(out, threads=threads, progress=progress)

    def checkpoint(
        self,
        recipe: Recipe | str | os.PathLike[str],
        out: str | os.PathLike[str],
        *,
        allow: Collection[str] = (),
        hub: str | None = None,
        threads: int | None = None,
        progress: Progress = quiet,
    ) -> MergeReport:
        """Merge what a recipe makes into its base, shard by shard, in one pass.

        Args:
            recipe: a ``Recipe`` or its file; it names a base.
            out: a new folder, or a file that ends in ".safetensors".
            allow: finding codes to accept.
            hub: path of a folder hub.
            threads: how many; the result does not depend on it.
            progress: called with (bytes done, in all).

        Raises:
            UsageError: it names no base, or ``out`` exists.
            RecipeError, Degraded, BaseMismatch, Incompatible, NotFinite: as when called.
        """
        made = prepare_composition(requested(recipe), allow=allow, hub=hub, progress=progress)
        return made.merge(out, threads=threads, progress=progress)


compose: Final = Compose()
"""Adapters in, one adapter out; see ``Compose.__call__``."""
