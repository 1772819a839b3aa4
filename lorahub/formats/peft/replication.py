"""``layer_replication``: adapters of a model that is made of its base's layers, some of them several times.

PEFT keeps one weight for all copies of a layer and an adapter for each of them.  Here it is read what that model looks
like and what stands in the way; which of the base's tensors are its layers, the base knows.  No number is computed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping

from lorahub.bases.index import BaseIndex
from lorahub.bases.layers import REPEATED, as_ranges, shown, twice
from lorahub.deltas.disputes import Choice, Dispute
from lorahub.deltas.kind import JSON
from lorahub.deltas.peft_lora import from_the_weight, start
from lorahub.findings import Axis, Finding, Verdict
from lorahub.formats.peft.config import CONFIG
from lorahub.formats.peft.keys import Names, Stems

__all__ = ["replication"]

_FIELD = "layer_replication"

_SUMMED = Dispute(
    topic="layer-replication",
    says="PEFT keeps one weight for all copies of a layer, and its merge adds the changes of all of them to it, though "
    "each copy was trained with its own",
    upstream="https://github.com/huggingface/peft/issues/1707",
    holds="PEFT 0.10 to 0.21.2, whose check against it looks up an adapter of that name",
    peft="the changes of all copies in every one of them",
    strict="every copy with its own change",
    followed={},
    declared={},
)


def replication(
    config: Mapping[str, JSON], found: Names, stems: Stems, index: BaseIndex | None, choice: Choice
) -> tuple[dict[str, JSON], list[Finding]]:
    """What the field says, as a hint, and what is to be said of it.

    Args:
        config: the parsed config.
        found: the file's names.
        stems: the base's modules.
        index: the base.
        choice: takes note of the targets for which PEFT's merge is not what was trained.
    """
    value = config.get(_FIELD)
    if value is None or value is False or value == []:
        return {}, []
    try:
        ranges = as_ranges(value)
    except ValueError as error:
        text = json.dumps(value)
        says = f"{CONFIG}: {_FIELD} = {text if len(text) <= 80 else f'{text[:77]}...'} {error}"
        return {}, [_stop("config-contradicts-tensors", "integrity", says)]
    count = sum(stop - begin for begin, stop in ranges)
    message = f"it is for a deeper model, of {count} layers, made of its base's {shown(ranges)}"
    findings = [
        Finding(code="layers-repeated", axis="base", level=Verdict.EXACT, message=message, where=(_FIELD,)),
    ]
    if twice(ranges):
        repeated = index.repeated if index else None
        for stem, keys in found.factors.items():
            if repeated is None or len(repeated.copies(f"{stems.find(stem) or stem}.")) > 1:
                choice.settle(_SUMMED, {}, target=stem, keys=keys.values())
        if config.get("kasa_config") or from_the_weight(config):
            how = "kasa_config" if config.get("kasa_config") else f"init_lora_weights = {start(config)}"
            says = (
                f"{_FIELD} with {how} cannot be honoured, because training started by taking a part out of the weight"
            )
            findings.append(_stop("config-refused", "format", f"{says} that all copies share, once for each of them"))
    return {REPEATED: value}, findings


def _stop(code: str, axis: Axis, message: str) -> Finding:
    return Finding(code=code, axis=axis, level=Verdict.INCOMPATIBLE, message=message, where=(_FIELD,))
