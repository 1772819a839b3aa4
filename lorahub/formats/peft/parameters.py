"""Which parameter a PEFT module's factors change, where that is not its weight.

Two of PEFT's wrappers leave it out of the key.  ``target_parameters`` adapts any parameter of a module; several of one
module are wrapped one around the other, in the order in which the module registers them, and the inner ones have
``base_layer`` in their names.  A MultiheadAttention has factors for ``in_proj_weight`` under its own name, and those of
``out_proj`` behind ``base_layer``.  What the keys leave out follows from the config, the shapes, the base, or from
what was written down; where it does not, it is said.  Works on names and shapes; computes nothing.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

from lorahub.bases.index import BaseIndex
from lorahub.deltas.kind import JSON
from lorahub.files.header import Header
from lorahub.formats.peft.config import names
from lorahub.formats.peft.keys import WRAPPED, Bare, Names, Stems
from lorahub.formats.peft.owner import Owner
from lorahub.formats.peft.tying import shared_weights
from lorahub.formats.peft.wrappers import Wrappers

__all__ = ["ATTENTION", "OUTPUT", "attention_outputs", "in_order", "owners"]

ATTENTION = "in_proj_weight"
"""The parameter of a MultiheadAttention that PEFT's factors of the module itself change."""

OUTPUT = "out_proj"
"""The module inside a MultiheadAttention that has factors of its own."""


def attention_outputs(found: Names) -> frozenset[str]:
    """Take ``base_layer`` out of the names of MultiheadAttentions' outputs; the stems of these attentions."""
    behind, plain = f".{WRAPPED}.{OUTPUT}", f".{OUTPUT}"
    attentions = {
        stem.removesuffix(behind)
        for stem in found.factors
        if stem.endswith(behind)
        and stem.removesuffix(behind) in found.factors
        and stem.removesuffix(behind) + plain not in found.factors
    }
    for attention in attentions:
        found.factors[attention + plain] = found.factors.pop(attention + behind)
    for key, bare in found.bare.items() if attentions else ():
        if bare.module.endswith(behind) and bare.module.removesuffix(behind) in attentions:
            module = bare.module.removesuffix(behind) + plain
            found.bare[key] = Bare(module, bare.parameter, bare.wrapper)
    return frozenset(attentions)


def owners(
    found: Names,
    header: Header,
    config: Mapping[str, JSON],
    stems: Stems,
    index: BaseIndex | None,
    attentions: Collection[str],
) -> dict[str, Owner]:
    """Stem -> the parameter that its factors change, for every stem where that is not a module's weight.

    Args:
        found: the file's names.
        header: of the file.
        config: the parsed config.
        stems: the base's modules.
        index: the base, or None.
        attentions: stems of MultiheadAttentions.

    Raises:
        IntegrityError: ``target_parameters`` is no list of names, or what was written down is damaged.
    """
    wanted = names(config, "target_parameters")
    nested = any(stem.endswith(f".{WRAPPED}") for stem in found.factors)
    result: dict[str, Owner] = {}
    if wanted or nested:
        reader = Wrappers(found, header, config, stems, index, wanted)
        modules: dict[str, dict[int, str]] = {}
        for stem in found.factors:
            module, depth = stem, 0
            while module.endswith(f".{WRAPPED}"):
                module, depth = module.removesuffix(f".{WRAPPED}"), depth + 1
            modules.setdefault(module, {})[depth] = stem
        for module, by_depth in modules.items():
            if len(by_depth) > 1 or max(by_depth) or reader.candidates(module):
                result |= reader.read(module, by_depth)
    for stem in attentions:
        if stem not in result:  # PEFT wraps the attention itself; else it is a parameter among others
            result[stem] = Owner(module=stem, parameter=ATTENTION, named=stem)
            output = f"{stem}.{OUTPUT}"
            result[output] = Owner(module=output, parameter="weight", named=stem, twice=True)
    for stem, count in shared_weights(config, found, stems, index).items():
        if stem not in result:
            result[stem] = Owner(module=stem, parameter="weight", named=stem, names=count)
    return result


def in_order(owned: Mapping[str, Owner]) -> dict[str, JSON]:
    """The hint ``parameter_order``: module -> its parameters, the innermost first, where it has several."""
    found: dict[str, list[tuple[int, str]]] = {}
    for stem, owner in owned.items():
        if owner.named != owner.module and not owner.twice and not owner.problem:
            found.setdefault(owner.module, []).append((-len(stem), owner.parameter))
    several: dict[str, JSON] = {
        module: [name for _, name in sorted(each)] for module, each in found.items() if len(each) > 1
    }
    return {"parameter_order": several} if several else {}
