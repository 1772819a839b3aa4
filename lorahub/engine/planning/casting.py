"""A plan whose result is stored in another dtype: every floating-point parameter, also those that no adapter changes.

A checkpoint has one dtype for people and loaders alike, so a result in another is that throughout.  Left as they are:
8-bit and integer tensors, which are codes and not just numbers, and tensors that are no parameters (buffers such as
rotary frequencies, which models compute in float32).  Knows headers; no tensors.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from lorahub.bases.index import BaseIndex
from lorahub.deltas.kind import JSON
from lorahub.engine.planning.plan import Plan
from lorahub.engine.planning.steps import Form, Step
from lorahub.errors import UsageError
from lorahub.files.dtypes import nbytes

__all__ = ["DTYPES", "cast"]

DTYPES: Mapping[str, str] = {
    "bfloat16": "BF16",
    "bf16": "BF16",
    "float16": "F16",
    "fp16": "F16",
    "float32": "F32",
    "fp32": "F32",
}
"""What people write -> safetensors dtype code."""

_FLOATS = frozenset({"BF16", "F16", "F32", "F64"})
_WORDS = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}  # as in configurations
_KEYS = ("dtype", "torch_dtype")


def cast(plan: Plan, index: BaseIndex, dtype: str) -> Plan:
    """The plan with every floating-point parameter of the result in ``dtype``.

    Raises:
        UsageError: that is no dtype to store in.
    """
    code = DTYPES.get(dtype)
    if code is None:
        raise UsageError(f"{dtype!r} is no dtype that a result can be stored in", f"one of {', '.join(DTYPES)}")
    steps = [_stored(step, code) for step in plan.steps]
    untouched: list[str] = []
    for name in plan.untouched:
        info = index.parameters[name]
        form = Form(tuple(info.shape), info.dtype)
        step = Step(
            out=name,
            source=name,
            before=form,
            after=form,
            terms=(),
            stored_as=info.stored_as,
            saved_as=plan.renamed.get(info.stored_as, info.stored_as),
        )
        changed = _stored(step, code)
        if changed is step:
            untouched.append(name)
        else:
            steps.append(changed)
    return replace(
        plan,
        steps=tuple(steps),
        untouched=tuple(untouched),
        untouched_bytes=sum(nbytes(index.parameters[name].dtype, index.parameters[name].shape) for name in untouched),
        config_edits={**plan.config_edits, **_edits(index.config, _WORDS[code])},
        config_before={**plan.config_before, **{key: index.config[key] for key in _edits(index.config, _WORDS[code])}},
    )


def _stored(step: Step, code: str) -> Step:
    """The step with its result in another dtype; the same one where that is no number or has it already."""
    if step.after.dtype == code or step.after.dtype not in _FLOATS:
        return step
    return replace(step, after=replace(step.after, dtype=code))


def _edits(config: Mapping[str, JSON], word: str) -> dict[str, JSON]:
    """What a configuration says of the dtype, here and one level down (text and vision parts)."""
    edits: dict[str, JSON] = {}
    for key, value in config.items():
        if key in _KEYS and value != word:
            edits[key] = word
        elif isinstance(value, dict) and any(value.get(each, word) != word for each in _KEYS):
            edits[key] = {**value, **{each: word for each in _KEYS if each in value}}
    return edits
