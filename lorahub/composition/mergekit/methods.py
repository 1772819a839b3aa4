"""mergekit's merge methods (0.1.5) and how each is said here: its parameters, with mergekit's own defaults.

Data only.  Methods have mergekit's names here, but not always its defaults, and some of its parameters mean another
thing: what makes ours do as mergekit's does is written out.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Literal, TypeAlias

__all__ = ["METHODS", "OPTIONAL_BASE", "REFUSED", "WHOLE", "WHOLE_NUMBERS", "WITHOUT_EFFECT", "Inputs", "Spelling"]

Inputs: TypeAlias = Literal["changes", "two", "models"]
"""What mergekit's method works on: differences from the base; two models, of which the base is the first; or whole
models, the base among them if it is named."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Spelling:
    """How a method of mergekit's is said here.

    Attributes:
        inputs: what it works on there.
        each: parameter of each model -> mergekit's default; None where it must be given.
        common: parameter of all -> mergekit's default; None where it must be given.
        fixed: what makes ours do as theirs does.
        note: where the result is another nevertheless, and why.
    """

    inputs: Inputs = "changes"
    each: Mapping[str, float | None] = field(default_factory=dict)
    common: Mapping[str, float | bool | None] = field(default_factory=dict)
    fixed: Mapping[str, str] = field(default_factory=dict)
    note: str = ""


_DRAWS = "what is dropped at random is drawn anew: mergekit's draws follow from its own order of work"
WHOLE = (
    "mergekit takes lengths and angles of whole weights, in which the base outweighs every change; here they are those "
    "of the changes"
)
_ELECTED = {"election": "mergekit"}
_SPARSE: dict[str, float | None] = {"weight": None, "density": 1.0}
_SUM: dict[str, float | bool | None] = {"lambda": 1.0, "normalize": False, "rescale": False}

METHODS: Mapping[str, Spelling] = MappingProxyType(
    {
        "linear": Spelling(inputs="models", each={"weight": None}, common={"normalize": True}),
        "task_arithmetic": Spelling(each={"weight": None}, common={"lambda": 1.0, "normalize": False}),
        "ties": Spelling(each=_SPARSE, common=_SUM | {"normalize": True}, fixed=_ELECTED),
        "dare_linear": Spelling(each=_SPARSE, common=_SUM | {"rescale": True}, note=_DRAWS),
        "dare_ties": Spelling(each=_SPARSE, common=_SUM | {"rescale": True}, fixed=_ELECTED, note=_DRAWS),
        "della": Spelling(
            each=_SPARSE | {"epsilon": 0.15},
            common=_SUM | {"rescale": True, "normalize": True},
            fixed=_ELECTED,
            note=_DRAWS,
        ),
        "della_linear": Spelling(each=_SPARSE | {"epsilon": 0.15}, common=_SUM | {"rescale": True}, note=_DRAWS),
        "breadcrumbs": Spelling(each=_SPARSE | {"gamma": 0.01}, common=_SUM),
        "breadcrumbs_ties": Spelling(each=_SPARSE | {"gamma": 0.01}, common=_SUM, fixed=_ELECTED),
        "sce": Spelling(common={"select_topk": 1.0}),
        "model_stock": Spelling(common={"filter_wise": False}),
        "nearswap": Spelling(inputs="two", common={"t": None}),
        "slerp": Spelling(inputs="two", common={"t": None}, note=WHOLE),
        "nuslerp": Spelling(each={"weight": None}, common={"nuslerp_flatten": True, "nuslerp_row_wise": False}),
        "multislerp": Spelling(each={"weight": None}, common={"normalize_weights": True}),
        "karcher": Spelling(inputs="models", common={"max_iter": 10, "tol": 1e-5}, note=WHOLE),
    }
)
"""merge_method -> how it is said here, under the same name."""

OPTIONAL_BASE = frozenset({"nuslerp", "multislerp"})
"""Methods that work on whole models where no base is named."""

WHOLE_NUMBERS = frozenset({"max_iter"})

REFUSED: Mapping[str, str] = MappingProxyType(
    {
        "passthrough": "it stacks layers of models, and an adapter has none of its own; to put one into its base: "
        "lorahub merge",
        "arcee_fusion": "it looks at the base's weights themselves; choose a method on changes, such as ties or sce",
        "ram": "it is not built in; choose sce or ties, which also tell what adapters share from what one has alone",
        "ramplus_tl": "it is not built in; choose sce or ties, which also tell what adapters share from what one has",
    }
)
"""merge_method -> why it has no counterpart, and what to do."""

WITHOUT_EFFECT: Mapping[str, str] = MappingProxyType(
    {
        "int8_mask": "it changes how a mask is kept in memory, not the result",
        "eps": "it guards a division there, and has no counterpart",
    }
)
"""Parameter that may be left out -> why."""
