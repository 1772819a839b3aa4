"""Why a change does not fit the parameter it is for, where more is known than two shapes.

Sentences only: that there is a misfit, and what follows from it, is decided in ``place``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from lorahub.bases.index import BaseIndex
from lorahub.deltas.kind import TensorRef, Touch
from lorahub.shapes import Binding, ShapeMisfit, instantiate, unify

__all__ = ["reason"]

_Slots = Sequence[tuple[str, TensorRef]]


def reason(index: BaseIndex, touch: Touch, slots: _Slots, shape: tuple[int, ...], turned: Callable[[], bool]) -> str:
    """What more is known about a misfit, as a sentence, or "".

    Args:
        index: the base.
        touch: the change.
        slots: (pattern, tensor) of what it is made of.
        shape: of the parameter, [out, in, *k].
        turned: whether it would fit the other way round; asked of matrices only.
    """
    if shape and shape[0] == _words(index) and (size := _wanted_words(touch, slots, shape)):
        rows = "" if touch.replaces else ", with the rows that it had then, since new ones are drawn at random"
        return (
            f"the base knows {shape[0]} words and the adapter was trained with {size}, after its vocabulary had been "
            f"changed: change the base alike, model.resize_token_embeddings({size}){rows}, save it with the "
            "adapter's tokenizer, and merge into that"
        )
    if len(shape) == 2 and not index.declared:
        if not turned():
            return ""
        return (
            "turned around it would fit, so this base seems to store it [in, out]; that is not guessed at: install "
            "the plugin of its framework, or merge into the live model"
        )
    inputs = {ref.shape[1] for _, ref in slots if len(ref.shape) == len(shape) > 2}
    if any(size != shape[1] and shape[1] and size % shape[1] == 0 for size in inputs):
        return (
            "the weight is that of a grouped convolution, where every output sees only its own group's inputs; the "
            "adapter's factors connect all of them, so no weight of this layer equals what was trained"
        )
    return ""


def _words(index: BaseIndex) -> int | None:
    """How many words the base knows, as its configuration says."""
    inner = index.config.get("text_config")
    said = [config.get("vocab_size") for config in (index.config, inner) if isinstance(config, Mapping)]
    return next((size for size in said if isinstance(size, int)), None)


def _wanted_words(touch: Touch, slots: _Slots, shape: tuple[int, ...]) -> int | None:
    """How many rows a parameter of that shape would need, where rows are all that disagrees; else None."""
    binding: Binding = {}
    try:
        for dims, ref in slots:
            binding = unify(dims, ref.shape, binding, name=ref.key)
        wanted = instantiate(touch.dims, binding)
    except (ShapeMisfit, KeyError):
        return None
    return wanted[0] if wanted[1:] == shape[1:] and wanted != shape else None
