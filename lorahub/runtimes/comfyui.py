"""ComfyUI: what its LoRA loaders apply otherwise than the adapter means it, or not at all.

Known from what its files and users show, as of October 2025: it goes by keys, tells those that it does not know in its
log alone ("lora key not loaded"), and reads alphas from tensors only.
"""

from __future__ import annotations

from lorahub.findings import Verdict
from lorahub.hookspecs import hookimpl
from lorahub.runtimes.keys import keys, other_alpha, unread_format
from lorahub.runtimes.runtime import Case, Rule, Runtime, Subject

__all__ = ["COMFYUI", "lorahub_runtimes"]

READ = frozenset({"diffusers", "kohya", "comfy", "xlabs", "bfl", "textual-inversion"})
"""Formats whose names it knows, of the models that it knows."""

KOHYA = "lorahub convert {adapter} --to kohya --base MODEL -o lora.safetensors"
MERGE = "lorahub merge {adapter} --base model.safetensors -o merged.safetensors"


def _peft(subject: Subject) -> Case | None:
    return Case(where=(subject.reading.file,)) if subject.reading.format == "peft" else None


def _unknown(subject: Subject) -> Case | None:
    where = tuple(key for each in subject.reading.findings if each.code == "key-unknown" for key in each.where)
    return Case(value=str(len(where)), where=where) if where else None


RULES = (
    Rule(
        code="comfyui-format",
        level=Verdict.INCOMPATIBLE,
        message="ComfyUI reads one safetensors file under names of diffusion models, and this is {value}",
        remedy=KOHYA,
        look=unread_format(READ | {"peft"}),
    ),
    Rule(
        code="comfyui-peft",
        level=Verdict.UNVERIFIED,
        message="PEFT keeps alpha in adapter_config.json, which ComfyUI does not read, and whether it knows PEFT's "
        "names depends on the model",
        remedy=KOHYA,
        look=_peft,
    ),
    Rule(
        code="comfyui-alpha-unread",
        level=Verdict.INCOMPATIBLE,
        message="ComfyUI reads alphas from tensors alone: these modules have theirs in the header, and would be "
        "applied as if alpha were the rank",
        remedy=KOHYA,
        look=other_alpha,
    ),
    Rule(
        code="comfyui-dora",
        level=Verdict.DEGRADED,
        message="ComfyUI divides DoRA by another norm than it was trained with, 2 % off where that was measured",
        remedy=MERGE,
        look=keys(r"\.(dora_scale|lora_magnitude_vector(\.weight)?)$"),
    ),
    Rule(
        code="comfyui-oft",
        level=Verdict.DEGRADED,
        message="ComfyUI applies OFT with the square of its strength: it is right at strength 1 alone",
        remedy=MERGE,
        look=keys(r"\.(oft_blocks|oft_diag|oft_R(\.weight)?)$"),
    ),
    Rule(
        code="comfyui-unknown",
        level=Verdict.DEGRADED,
        message="ComfyUI leaves out keys that it does not know, and says so in its log alone; {value} are of no kind "
        "that is known here",
        remedy="lorahub inspect {adapter}",
        look=_unknown,
    ),
)

COMFYUI = Runtime(name="comfyui", title="ComfyUI", versions="of October 2025", rules=RULES)


@hookimpl
def lorahub_runtimes() -> list[Runtime]:
    """The table of ComfyUI."""
    return [COMFYUI]
