"""The words that the tool reads which a format is for: diffusers' names for diffusers, the original makers' for kohya.

A model that two makers name differently has its modules in one vocabulary or the other, and a file whose names are of
the wrong one is read as empty by the tool at home there.  So what is written is in that tool's words, through the
vocabulary where it is complete and exact, and is refused else.  Splitting and fusing is done as everywhere, on layouts;
knows no files.

Facts: kohya's sd-scripts and musubi-tuner train and read Flux, Stable Diffusion 3 and Wan under their makers' names
behind ``lora_unet_``, Stable Diffusion XL's UNet under Stability's, Qwen-Image under its own, and CLIP below
``text_model.``; ComfyUI and OneTrainer read diffusers' names behind ``lora_transformer_``.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType

from lorahub.bases.index import BaseIndex, natural
from lorahub.conversion.change import Change, Weight
from lorahub.conversion.rewording import in_words, short
from lorahub.conversion.unet_blocks import counted
from lorahub.conversion.vocabulary import Lexicon, component_of, family_of, is_foreign, lexicons
from lorahub.conversion.vocabulary import lexicon as lexicon_of
from lorahub.deltas.kind import JSON
from lorahub.errors import CannotCarry
from lorahub.findings import Finding, Verdict

__all__ = ["FORMATS", "AtHome", "at_home", "called", "known_words"]

_DIFFUSERS, _ORIGINAL = "diffusers", "original"

FORMATS: Mapping[str, str] = MappingProxyType({"diffusers": _DIFFUSERS, "peft": _DIFFUSERS, "kohya": _ORIGINAL})
"""Format -> whose words its tools read; any other takes the names it is given."""

_MODELS = frozenset({"", "unet", "transformer", "transformer_2"})
"""Parts of a pipeline that are the diffusion model itself."""

_QWEN = re.compile(r"transformer_blocks\.\d+\.(img|txt)_(mlp|mod)\.|txt_norm$")
_CLIP = re.compile(r"(encoder\.layers\.\d+\.(self_attn|mlp|layer_norm[12])\.?|embeddings\.|final_layer_norm$)")
_T5 = re.compile(r"encoder\.block\.\d+\.")

_COUNTED_BY = "add_embedding.linear_1"
"""Of UNets, those of Stable Diffusion XL have it, which sd-scripts names as Stability does; of older ones as diffusers.
"""

_BASE = "--base DIFFUSERS_FOLDER"


@dataclass(frozen=True, slots=True, kw_only=True)
class AtHome:
    """Changes under the names that are written.

    Attributes:
        changes: all of them.
        hints: what goes along to the format for them.
        findings: what there is to say of the names.
        settled: modules that the vocabulary has, as they were called.
    """

    changes: list[Change]
    hints: Mapping[str, JSON] = field(default_factory=lambda: MappingProxyType({}))
    findings: tuple[Finding, ...] = ()
    settled: frozenset[str] = frozenset()


def known_words(modules: Collection[str], to: str, index: BaseIndex | None) -> frozenset[str]:
    """Those of one model's modules whose names the vocabulary has whole, so that no base is needed to tell them.

    Args:
        modules: as spelled.
        to: the format that is written.
        index: the base, or None.
    """
    bare = {short(module) for module in modules}
    known = lexicons(bare, *_told(index, "")) if to in FORMATS else []
    return frozenset(modules) if len(known) == 1 and (index or known[0].sure(bare)) else frozenset()


def called(component: str, present: Collection[str]) -> str:
    """What the changes call the part of a pipeline that is asked for: kohya's trainers call every model the UNet."""
    other = {"transformer": "unet", "unet": "transformer"}.get(component, "")
    return other if other and component not in present and other in present else component


def at_home(changes: Sequence[Change], to: str, index: BaseIndex | None, weight: Weight) -> AtHome:
    """The changes in the words that the tools of ``to`` read.

    Args:
        changes: under the base's names, or the source's own without one.
        to: the format.
        index: the base, or None.
        weight: its weights, for kinds that must become LoRA before they are cut or fused.

    Raises:
        CannotCarry: they have other words there, and these are not known in full, or the parts cannot be fused.
    """
    wanted = FORMATS.get(to, "")
    if not wanted or (to == "peft" and index is not None):
        return AtHome(changes=list(changes))  # a base that is given for PEFT is the model that PEFT wraps
    parts: dict[str, list[Change]] = {}
    for change in changes:
        parts.setdefault(change.target.component, []).append(change)
    models = [component for component in parts if component in _MODELS]
    result: list[Change] = []
    findings: list[Finding] = []
    families: set[str] = set()
    settled: set[str] = set()
    for component, some in parts.items():
        if component not in _MODELS:
            continue
        family, moved, notes = _model(some, component, to, index, weight, alone=len(models) == 1)
        families.add(family)
        settled |= {change.target.module for change in some} if family else set()
        result += moved
        findings += notes
    for component, some in parts.items():
        if component not in _MODELS:
            result += [_text(change, families) for change in some] if wanted == _ORIGINAL else some
    hints: dict[str, JSON] = {}
    if wanted == _ORIGINAL and families & {"flux", "sd3"} and "text_encoder" in parts:
        hints["kohya_prefixes"] = {"text_encoder": "lora_te1"}
    return AtHome(changes=result, hints=hints, findings=tuple(findings), settled=frozenset(settled))


def _model(
    changes: list[Change], component: str, to: str, index: BaseIndex | None, weight: Weight, *, alone: bool
) -> tuple[str, list[Change], list[Finding]]:
    """The diffusion model's own changes: its family, the changes under their new names, and what there is to say."""
    wanted = FORMATS[to]
    modules = {short(change.target.module) for change in changes}
    known = lexicons(modules, *_told(index, component))
    foreign = sorted((module for module in modules if is_foreign(module, surely=to == "peft")), key=natural)
    if index is None and (
        any(map(_QWEN.match, modules))
        or not (component or component_of(modules) or any(each.sure(modules) for each in known))
    ):
        known = []  # another model, or one of which nothing says that it is a diffusion model
    guessed = index is None and len(known) == 1 and not known[0].sure(modules)
    if (guessed or not _agree(known, modules)) and (wanted == _ORIGINAL) != known[0].original:
        raise _unknown(to, modules, "are what several models call theirs, whose makers' words differ", _BASE)
    if not known and foreign and wanted == _DIFFUSERS:
        raise _unknown(to, foreign, "are the original makers' names, which diffusers does not have", _BASE)
    if not known:
        return _as_they_are(changes, component, modules, to, index)
    lexicon = known[0]
    named = (_diffusers_name if wanted == _DIFFUSERS else _kohya_name)(component, to, alone=alone)
    remedy = _BASE if wanted == _DIFFUSERS else "--to diffusers"
    moved = list(changes)
    if wanted == _ORIGINAL and any(".processor." in module for module in modules):  # XLabs', which are no modules
        moved = in_words(changes, lexicon, component, to, remedy, weight)
        lexicon = lexicon_of(lexicon.family, {change.target.module for change in moved}) or lexicon
    if lexicon.original == (wanted == _ORIGINAL):
        return lexicon.family, [_renamed(each, named, _dotted(each, lexicon)) for each in changes], []
    notes = [_for_diffusers()] if to == "peft" else []
    return lexicon.family, in_words(moved, lexicon, named, to, remedy, weight), notes


def _for_diffusers() -> Finding:
    return Finding(
        code="names-of-diffusers",
        axis="format",
        level=Verdict.COMPATIBLE,
        message="the modules are named as in diffusers' model, which PEFT is to wrap",
        remedy="for the makers' own model: --base THAT_MODEL",
    )


def _agree(known: Sequence[Lexicon], modules: Collection[str]) -> bool:
    """Whether it makes no difference which of these families the modules are of."""
    return all(each.names[module] == known[0].names[module] for each in known[1:] for module in modules)


def _as_they_are(
    changes: list[Change], component: str, modules: set[str], to: str, index: BaseIndex | None
) -> tuple[str, list[Change], list[Finding]]:
    """Changes of a model that everybody names alike, or of which nobody knows other names; the part is named."""
    if to != "kohya":
        said = component_of(modules) if to == "diffusers" else ""
        name = said if said and component in ("", "unet", "transformer") else component
        return "", [_renamed(change, name, short(change.target.module)) for change in changes], []
    own, model = _told(index, component)
    if any(_QWEN.match(module) for module in (*modules, *own)) or model.startswith("QwenImage"):
        return "qwen", [_renamed(change, "unet", short(change.target.module)) for change in changes], []
    if component not in ("transformer", "transformer_2") and component_of(modules) != "transformer":
        names = counted(own) if _COUNTED_BY in own else {}
        bare = [(change, short(change.target.module)) for change in changes]
        return "", [_renamed(change, component, names.get(module, module)) for change, module in bare], []
    if told := family_of(*_told(index, component)):
        raise _unknown(to, modules, f"are not all known under {told}'s own names", "--to diffusers")
    prefix = "lora_transformer_" if component == "transformer" else "lycoris_"
    note = Finding(
        code="names-of-diffusers",
        axis="format",
        level=Verdict.UNVERIFIED,
        message=f"the modules keep diffusers' names behind {prefix}: ComfyUI and OneTrainer read those where they know "
        "the model, and sd-scripts and musubi-tuner read the makers' own names, which are not known here",
        where=tuple(sorted(modules, key=natural)),
        remedy="for diffusers: --to diffusers",
    )
    return "", changes, [note]


def _text(change: Change, families: Collection[str]) -> Change:
    """A text encoder's change as kohya names it: CLIP below ``text_model.``, Flux's T5 as the third."""
    target = change.target
    if not target.component.startswith("text_encoder"):
        return change
    if _CLIP.match(target.module):
        return replace(change, target=replace(target, module=f"text_model.{target.module}"))
    if "flux" in families and target.component == "text_encoder_2" and _T5.match(target.module):
        return replace(change, target=replace(target, component="text_encoder_3"))
    return change


def _diffusers_name(component: str, to: str, *, alone: bool) -> str:
    """What a pipeline calls such a model; PEFT has no parts."""
    return component if to == "peft" or not alone or component == "transformer_2" else "transformer"


def _kohya_name(component: str, to: str, *, alone: bool) -> str:
    """Kohya's trainers call it the UNet, whatever it is.

    Raises:
        CannotCarry: there are two of them, and the format has one name.
    """
    if not alone:
        raise CannotCarry(
            f"the format '{to}' has one name for a diffusion model, and this adapter changes two",
            f"convert them one at a time: --component {component}",
        )
    return "unet"


def _renamed(change: Change, component: str, module: str) -> Change:
    return replace(change, target=replace(change.target, component=component, module=module))


def _dotted(change: Change, lexicon: Lexicon) -> str:
    word, at = lexicon.names[short(change.target.module)]
    return word.name if at < 0 else word.parts[at]


def _told(index: BaseIndex | None, component: str) -> tuple[list[str], str]:
    """A base's modules without what comes before them, and its class; nothing without one."""
    if index is None:
        return [], ""
    named = [name.rpartition(":") for name in index.modules()]
    own = [short(module) for part, _, module in named if part in ("", component) or not component]
    model = index.config.get("_class_name")
    return own, model if isinstance(model, str) and not model.endswith("Pipeline") else ""


def _unknown(to: str, modules: Collection[str], why: str, remedy: str) -> CannotCarry:
    where = tuple(sorted(modules, key=natural))
    found = Finding(
        code="names-unknown",
        axis="format",
        level=Verdict.INCOMPATIBLE,
        message=f"{len(where)} modules {why}",
        where=where,
        remedy=remedy,
    )
    return CannotCarry(f"these modules cannot be named in '{to}': {found.message}", f"add: {remedy}", (found,))
