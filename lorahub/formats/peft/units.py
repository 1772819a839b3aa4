"""Deltas on parameters, laid out in the wrappers that PEFT would have around their module: the stems of their keys.

The inverse of ``parameters``, which reads them.  What PEFT's keys leave out, which parameter is meant and which way
round a stack is, goes into the file's metadata, where PEFT looks for nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from lorahub import strict_json
from lorahub.bases.layout import Target
from lorahub.deltas.delta import Delta
from lorahub.deltas.disputes import Compat
from lorahub.deltas.expert_lora import ExpertLoRA
from lorahub.deltas.kind import JSON
from lorahub.deltas.lora import LoRA
from lorahub.formats.peft.keys import WRAPPED
from lorahub.formats.peft.parameters import ATTENTION, OUTPUT
from lorahub.formats.peft.wrappers import in_registration_order
from lorahub.formats.peft.written import METADATA

__all__ = ["Unit", "described", "layouts"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Unit:
    """Deltas that go behind one stem.

    Attributes:
        stem: what their keys begin with.
        named: what the config calls them, a module or a parameter; "" where another unit speaks for them.
        deltas: by parameter, as the kind knows it.
        module: the module they belong to, where that is not the stem.
        parameter: the parameter they change, where the keys leave it out.
        role: of the module, or "".
        choice: whose result the delta is, where that makes a difference.
    """

    stem: str
    named: str
    deltas: Mapping[str, Delta]
    module: str = ""
    parameter: str = ""
    role: str = ""
    choice: Compat | None = None


def layouts(
    modules: Mapping[str, Mapping[str, Delta]], hints: Mapping[str, JSON], lost: dict[str, list[str]]
) -> dict[str, tuple[Unit, ...]]:
    """Module -> its units, for modules of which parameters other than the weight are adapted.

    Args:
        modules: deltas by module and parameter.
        hints: ``parameter_order``: module -> its adapted parameters in the order in which it registers them.
        lost: reason -> names; what PEFT has no word for is added.
    """
    result: dict[str, tuple[Unit, ...]] = {}
    for module, parameters in modules.items():
        own = {name: delta for name, delta in parameters.items() if _on_a_parameter(delta)}
        if not any(name != "weight" or isinstance(delta, ExpertLoRA) for name, delta in own.items()):
            continue
        output = f"{module}.{OUTPUT}"
        found = _attention(module, own, modules.get(output, {}))
        if found is not None:
            result[module], result[output] = found
            continue
        order = _order(module, own, hints)
        if order is None:
            says = "PEFT tells parameters of a module apart by the order in which it registers them, which is not known"
            lost.setdefault(says, []).extend(_names(module, own))
        elif others := [name for name in parameters if name not in own and parameters[name].replacement() is None]:
            says = "PEFT adapts a module or its parameters, not both"
            lost.setdefault(says, []).extend(_names(module, others))
        else:
            result[module] = tuple(
                Unit(
                    stem=module + f".{WRAPPED}" * (len(order) - 1 - at),
                    named=Target("", module, name).name,
                    deltas={"weight": own[name]},
                    module=module,
                    parameter=name,
                )
                for at, name in enumerate(order)
            )
    return result


def _on_a_parameter(delta: Delta) -> bool:
    """Whether PEFT could have such a change on any parameter: of matrices alone."""
    return isinstance(delta, ExpertLoRA) or (isinstance(delta, LoRA) and len(delta.shape()) == 2)


def _names(module: str, parameters: Iterable[str]) -> list[str]:
    return [Target("", module, name).name for name in parameters]


def _attention(
    module: str, own: Mapping[str, Delta], output: Mapping[str, Delta]
) -> tuple[tuple[Unit, ...], tuple[Unit, ...]] | None:
    """A MultiheadAttention and its output, which PEFT adapts together, or None where these are not such a pair."""
    into, out = own.get(ATTENTION), output.get("weight")
    if len(own) != 1 or not isinstance(into, LoRA) or not isinstance(out, LoRA):
        return None
    times: Mapping[float, Compat] = {into.scale: "strict", 2 * into.scale: "peft"}
    choice = times.get(out.scale)
    if choice is None or into.down.shape[0] != out.down.shape[0]:
        return None
    outer = Unit(stem=module, named=module, deltas={"weight": into}, module=module)
    inner = Unit(
        stem=f"{module}.{WRAPPED}.{OUTPUT}",
        named="",
        deltas={"weight": out},
        module=f"{module}.{OUTPUT}",
        choice=choice,
    )
    return (outer,), (inner,)


def _order(module: str, own: Iterable[str], hints: Mapping[str, JSON]) -> tuple[str, ...] | None:
    given = hints.get("parameter_order")
    known = given.get(module) if isinstance(given, dict) else None
    if isinstance(known, list) and sorted(map(str, known)) == sorted(own):
        return tuple(map(str, known))
    return in_registration_order(own)


def described(units: Iterable[Unit]) -> dict[str, str]:
    """What PEFT's keys leave out, as metadata of the file; empty where nothing is in doubt."""
    said: dict[str, JSON] = {}
    for unit in units:
        if unit.parameter:
            (delta,) = unit.deltas.values()
            way = delta.transposed if isinstance(delta, ExpertLoRA) else None
            said[unit.stem] = {"parameter": unit.parameter, "transposed": way}
    return {METADATA: strict_json.compact(said)} if said else {}
