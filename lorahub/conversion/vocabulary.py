"""What two tools call the same modules of one model: the original makers' names and those of diffusers.

Which family a model is of, and look-ups in that family's words, which ``words`` has as tables.  The UNet of Stable
Diffusion 1, 2 and XL is counted in another way by each, which is a rule (``unet_blocks``) and not a table.  Knows no
tensors.

Facts: Stability's ``generative-models``, OpenCLIP, and diffusers 0.42.1.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, replace

from lorahub.conversion.unet_blocks import counted, grouped, is_counted, is_grouped
from lorahub.conversion.word import Word, fused
from lorahub.conversion.words import TABLES

__all__ = [
    "PREFIXES",
    "Lexicon",
    "Word",
    "component_of",
    "family_of",
    "is_foreign",
    "lexicon",
    "lexicons",
    "speaks",
    "words",
]

PREFIXES = ("model.diffusion_model.", "diffusion_model.")
"""What original checkpoints put before a diffusion model's own names."""


_TELLING: Mapping[str, tuple[frozenset[str], ...]] = {
    "flux2": (
        frozenset({"double_stream_modulation_img.lin"}),
        frozenset({"double_stream_modulation_img.linear"}),
    ),
    "hunyuan": (
        frozenset({"double_blocks.0.img_attn_qkv"}),
        frozenset({"context_embedder.token_refiner.refiner_blocks.0.attn.to_q"}),
    ),
    "z-image": (
        frozenset({"noise_refiner.0.attention.to_q"}),
        frozenset({"layers.0.attention.qkv", "layers.0.adaLN_modulation.0"}),
    ),
    "lumina2": (
        frozenset({"time_caption_embed.timestep_embedder.linear_1", "layers.0.attn.to_q"}),
        frozenset({"layers.0.attention.qkv", "layers.0.adaLN_modulation.1", "cap_embedder.1"}),
    ),
    "flux": (
        frozenset({"double_blocks.0.img_attn.qkv"}),
        frozenset({"single_transformer_blocks.0.proj_mlp"}),
    ),
    "mochi": (
        frozenset({"transformer_blocks.0.attn1.add_q_proj", "time_embed.pooler.to_kv"}),
        frozenset({"blocks.0.attn.qkv_x"}),
    ),
    "sd3": (
        frozenset({"joint_blocks.0.x_block.attn.qkv"}),
        frozenset({"transformer_blocks.0.ff_context.net.0.proj"}),
    ),
    "wan": (frozenset({"blocks.0.self_attn.q"}), frozenset({"blocks.0.attn1.to_q"})),
    "auraflow": (frozenset({"joint_transformer_blocks.0.attn.to_q"}), frozenset({"double_layers.0.attn.w2q"})),
    "ltx": (
        frozenset({"transformer_blocks.0.attn1.norm_q", "time_embed.emb.timestep_embedder.linear_1", "proj_in"}),
        frozenset({"patchify_proj", "adaln_single.linear"}),
    ),
    "sana": (
        frozenset({"transformer_blocks.0.ff.conv_inverted", "time_embed.emb.timestep_embedder.linear_1"}),
        frozenset({"blocks.0.cross_attn.kv_linear", "blocks.0.mlp.inverted_conv.conv"}),
    ),
    "pixart": (
        frozenset({"transformer_blocks.0.attn1.to_q", "adaln_single.linear", "pos_embed.proj"}),
        frozenset({"blocks.0.cross_attn.kv_linear", "blocks.0.mlp.fc1"}),
    ),
    "flux3": (
        frozenset({"single_stream_modulations.image.linear", "single_transformer_blocks.0.ff.linear_in"}),
        frozenset({"content_mode_blocks.image.0.q_proj"}),
    ),
    "krea2": (frozenset({"text_fusion.projector", "time_mod_proj"}), frozenset({"txtfusion.projector", "tproj.1"})),
    "ideogram4": (
        frozenset({"layers.0.attention.to_q", "llm_cond_proj"}),
        frozenset({"layers.0.attention.qkv", "llm_cond_proj"}),
    ),
    "ace-step": (
        frozenset({"layers.0.cross_attn.to_q", "time_embed_r.linear_1"}),
        frozenset({"layers.0.cross_attn.q_proj", "time_embed_r.linear_1"}),
    ),
    "cosmos": (
        frozenset({"transformer_blocks.0.attn1.to_q", "time_embed.t_embedder.linear_1"}),
        frozenset({"blocks.0.self_attn.q_proj", "blocks.0.adaln_modulation_self_attn.1"}),
    ),
}
"""Family -> modules of which a model of it has all of one set; the first family that fits: some have Flux's."""

_CLASSES: Mapping[str, frozenset[str]] = {
    "flux2": frozenset({"Flux2Transformer2DModel"}),
    "hunyuan": frozenset({"HunyuanVideoTransformer3DModel"}),
    "flux": frozenset({"FluxTransformer2DModel", "ChromaTransformer2DModel"}),
    "sd3": frozenset({"SD3Transformer2DModel"}),
    "wan": frozenset({"SkyReelsV2Transformer3DModel", "WanTransformer3DModel", "WanVACETransformer3DModel"}),
}
"""Family -> diffusers' classes of such models; one that is missing here has words for reading alone."""

_EVIDENCE: Mapping[str, re.Pattern[str]] = {
    "flux": re.compile(r"(single_transformer_blocks|double_blocks|single_blocks)[._]\d"),
    "sd3": re.compile(r"joint_blocks[._]\d|transformer_blocks[._]\d{1,2}[._]attn2[._]"),
    "wan": re.compile(r"blocks[._]\d{1,3}[._](self_attn|cross_attn|attn[12])[._]"),
}
"""Family -> names that only its models have among these, where no base is known; others are not guessed."""

_DEPTH: Mapping[str, Mapping[str, int]] = {"flux": {"transformer_blocks": 19, "single_transformer_blocks": 38}}
"""Family -> how many blocks its models have: HunyuanVideo names its own as Flux does, and has more."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Lexicon:
    """The words of one family, as far as some modules need them.

    Attributes:
        family: which.
        original: whether the modules are in the original makers' vocabulary, not in that of diffusers.
        names: a module, dotted or with underscores for dots -> the word, and which of its parts; -1 for its name.
    """

    family: str
    original: bool
    names: Mapping[str, tuple[Word, int]]

    def sure(self, modules: Collection[str]) -> bool:
        """Whether one of the modules is of this family alone."""
        telling = _EVIDENCE.get(self.family)
        return telling is not None and any(map(telling.match, modules))


def lexicons(modules: Collection[str], base: Collection[str] = (), model: str = "") -> list[Lexicon]:
    """Every family that has a word for all of these modules, in one vocabulary; one that is sure leaves out others.

    Args:
        modules: of one model, without what a checkpoint puts before them; dotted, or with underscores for dots.
        base: the model's own modules, where they are known: what tells one family from the others.
        model: the model's class, where it is known.
    """
    if model or base:
        only = family_of(base, model)
        return [found for found in [lexicon(only, modules)] if found] if only else []
    possible = [family for family in _EVIDENCE if not _deeper(modules, _DEPTH.get(family, {}))]
    known = [found for family in possible if (found := lexicon(family, modules))]
    return [each for each in known if each.sure(modules)] or known


def lexicon(family: str, modules: Collection[str]) -> Lexicon | None:
    """The family's words for all of these modules, or None where it has not all."""
    for original in (True, False):
        names = _names(TABLES[family], modules, original=original)
        if all(module in names for module in modules):
            return Lexicon(family=family, original=original, names=names)
    return None


def family_of(base: Collection[str], model: str) -> str:
    """The family of a model with these modules or of this class; "" for another."""
    if model:
        return next((family for family, classes in _CLASSES.items() if model in classes), "")
    own = set(base)
    family = _told_by(own)
    if family not in _CLASSES or (family == "flux" and any(each.startswith("context_embedder.") for each in own)):
        return ""  # one that is only read, or another that names its blocks as Flux does
    return family


def _told_by(own: AbstractSet[str]) -> str:
    """The family of a model with these modules; "" for another."""
    return next((family for family, telling in _TELLING.items() if any(each <= own for each in telling)), "")


def _names(table: Collection[Word], modules: Collection[str], *, original: bool) -> dict[str, tuple[Word, int]]:
    numbers = sorted({int(each) for module in modules for each in re.findall(r"\d{1,4}", module)})
    result: dict[str, tuple[Word, int]] = {}
    for word in table:
        if not original and ".processor." in word.name:
            continue  # of XLabs's two names for a module, the model's own is the other
        for number in numbers if "{n}" in word.name else [0]:
            said = _with(word, number)
            named = [(said.name, -1)] if original else [(part, at) for at, part in enumerate(said.parts)]
            for name, at in named:
                result[name] = result[name.replace(".", "_")] = (said, at)
    return result


def _with(word: Word, number: int) -> Word:
    parts = tuple(part.replace("{n}", str(number)) for part in word.parts)
    return replace(word, name=word.name.replace("{n}", str(number)), parts=parts)


def _deeper(modules: Collection[str], depth: Mapping[str, int]) -> bool:
    """Whether there is a block that a model of this depth does not have."""
    for module in modules:
        stem, _, rest = module.partition(".")
        number = rest.partition(".")[0]
        if stem in depth and number.isdigit() and int(number) >= depth[stem]:
            return True
    return False


_FOREIGN = re.compile(
    r"(?P<surely>(double_blocks|single_blocks|joint_blocks|input_blocks|middle_block|output_blocks)[._]\d)"
    r"|((label_emb|time_embed)[._]\d|blocks[._]\d{1,4}[._](self_attn|cross_attn)[._]|final_layer[._](linear|adaLN))"
)


def is_foreign(module: str, *, surely: bool = False) -> bool:
    """Whether the original makers of a diffusion model gave a module its name, and diffusers has another.

    Args:
        module: without what a checkpoint puts before it; dotted, or with underscores for dots.
        surely: only where no other model has such names.
    """
    found = _FOREIGN.match(module)
    return found is not None and (not surely or found.group("surely") is not None)


_COMPONENTS = re.compile(
    r"(?P<unet>(down|up)_blocks\.\d+\.|mid_block\.)"
    r"|(?P<transformer>(single_)?transformer_blocks\.\d+\.|blocks\.\d+\.attn[12]\.)"
)


def component_of(modules: Collection[str]) -> str:
    """What a pipeline of diffusers calls a model with these modules: "unet", "transformer", or "" for nobody knows."""
    said = {found.lastgroup or "" for module in modules if (found := _COMPONENTS.match(module))}
    return said.pop() if len(said) == 1 else ""


_TEXT = "text_model."
_QUERY, _TOGETHER = "encoder.layers.0.self_attn.q_proj", "encoder.layers.0.self_attn"
"""Modules of CLIP's text encoder with weights of their own: the one, or the other where attention is fused."""


def speaks(modules: Collection[str]) -> bool:
    """Whether there is a word for a model with these modules, whichever vocabulary they are in."""
    named = is_grouped(modules) or is_counted(modules) or bool(_told_by(set(modules)))
    return named or any(f"{prefix}{each}" in modules for prefix in ("", _TEXT) for each in (_QUERY, _TOGETHER))


def words(modules: Collection[str]) -> Iterator[Word]:
    """Every word that speaks of a model with these modules, whichever vocabulary they are in.

    Args:
        modules: of one model, without what a checkpoint puts before them.
    """
    known = set(modules)
    numbers = sorted({int(part) for module in known for part in module.split(".") if part.isdigit() and len(part) < 6})
    family = _told_by(known)
    for word in TABLES[family] if family else ():
        for number in numbers if "{n}" in word.name else [0]:
            said = _with(word, number)
            if said.name in known or known.issuperset(said.parts):
                yield said
    if is_grouped(known):
        yield from (fused(name, module) for module, name in counted(known).items())
    elif is_counted(known):
        yield from (fused(name, module) for name, module in grouped(known).items())
    yield from _text_model(known)


def _text_model(modules: Collection[str]) -> Iterator[Word]:
    """CLIP's text encoder, which transformers kept below ``text_model.`` before its fifth release.

    OpenCLIP, as original checkpoints have it, keeps queries, keys and values of a layer in one ``in_proj``.
    """
    within = {module for module in modules if module.startswith(_TEXT)}
    if _QUERY in modules or _TOGETHER in modules:
        other = {module: f"{_TEXT}{module}" for module in modules if module}
    elif f"{_TEXT}{_QUERY}" in within or f"{_TEXT}{_TOGETHER}" in within:
        other = {module: module.removeprefix(_TEXT) for module in within}
    else:
        return
    yield from (fused(name, module) for module, name in other.items())
    for module, name in other.items():
        if module.endswith(".self_attn"):
            for spelled in (module, name):
                parts = tuple(f"{spelled}.{each}_proj" for each in "qkv")
                yield Word(name=module, parts=parts, shares=(1, 1, 1), parameter="in_proj_{}")
