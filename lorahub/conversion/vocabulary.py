"""What two tools call the same modules of one model: the original makers' names and those of diffusers.

Which family a model is of, and look-ups in that family's words, which ``words`` has as tables.  The UNet of Stable
Diffusion 1, 2 and XL is counted in another way by each, which is a rule and not a table.  Knows no tensors.

Facts: Stability's ``generative-models``, and diffusers 0.42.1.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass

from lorahub.conversion.words import TABLES, Word, fused

__all__ = ["PREFIXES", "Lexicon", "Word", "component_of", "family_of", "is_foreign", "lexicon", "lexicons", "words"]

PREFIXES = ("model.diffusion_model.", "diffusion_model.")
"""What original checkpoints put before a diffusion model's own names."""


_TELLING: Mapping[str, frozenset[str]] = {
    "flux2": frozenset({"double_stream_modulation_img.lin", "double_stream_modulation_img.linear"}),
    "hunyuan": frozenset({"double_blocks.0.img_attn_qkv", "context_embedder.token_refiner.refiner_blocks.0.attn.to_q"}),
    "z-image": frozenset({"noise_refiner.0.attention.to_q"}),
    "flux": frozenset({"double_blocks.0.img_attn.qkv", "single_transformer_blocks.0.proj_mlp"}),
    "sd3": frozenset({"joint_blocks.0.x_block.attn.qkv", "transformer_blocks.0.ff_context.net.0.proj"}),
    "wan": frozenset({"blocks.0.self_attn.q", "blocks.0.attn1.to_q"}),
}
"""Family -> modules of which a model of it has one in either vocabulary; the first that fits: some have Flux's."""

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


def _told_by(own: Collection[str]) -> str:
    """The family of a model with these modules; "" for another."""
    return next((family for family, telling in _TELLING.items() if not telling.isdisjoint(own)), "")


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
    return Word(
        name=word.name.replace("{n}", str(number)),
        parts=tuple(part.replace("{n}", str(number)) for part in word.parts),
        shares=word.shares,
        halves_swapped=word.halves_swapped,
    )


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
    if any(module.startswith("down_blocks.0.") for module in known):
        yield from _unet(known)
    yield from _text_model(known)


_RESNET: Mapping[str, str] = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_OUTER: Mapping[str, str] = {
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
}
_TEXT = "text_model."
_BLOCK = re.compile(r"(down|up)_blocks\.(\d{1,2})\.(resnets|attentions|downsamplers|upsamplers)\.(\d{1,2})\.(.+)")
_MIDDLE = re.compile(r"mid_block\.(resnets|attentions)\.(\d{1,2})\.(.+)")


def _unet(modules: Collection[str]) -> Iterator[Word]:
    """Diffusers' UNet, whose blocks Stability counts through: a word for each module that has another name there."""
    depth = len({module.split(".")[3] for module in modules if module.startswith("down_blocks.0.resnets.")})
    above = [module.split(".") for module in modules if module.startswith("up_blocks.")]
    attending = {path[1] for path in above if "attentions" in path}
    for module in modules:
        if name := _OUTER.get(module) or _middle(module) or _counted(module, depth, attending):
            yield fused(name, module)


def _text_model(modules: Collection[str]) -> Iterator[Word]:
    """CLIP's text encoder, which transformers kept below ``text_model.`` before its fifth release."""
    within = {module for module in modules if module.startswith(_TEXT)}
    if "encoder.layers.0.self_attn.q_proj" in modules:
        yield from (fused(f"{_TEXT}{module}", module) for module in modules if module)
    elif f"{_TEXT}encoder.layers.0.self_attn.q_proj" in within:
        yield from (fused(module.removeprefix(_TEXT), module) for module in within)


def _middle(module: str) -> str:
    found = _MIDDLE.fullmatch(module)
    if not found:
        return ""
    sort, number, rest = found[1], int(found[2]), found[3]
    if sort == "attentions":
        return f"middle_block.{2 * number + 1}.{rest}"
    return f"middle_block.{2 * number}.{_RESNET[rest]}" if rest in _RESNET else ""


def _counted(module: str, depth: int, attending: Collection[str]) -> str:
    found = _BLOCK.fullmatch(module)
    if not found:
        return ""
    way, block, sort, at, rest = found[1], int(found[2]), found[3], int(found[4]), found[5]
    first = (depth + 1) * block + (1 if way == "down" else 0)
    side = "input_blocks" if way == "down" else "output_blocks"
    match sort:
        case "resnets":
            return f"{side}.{first + at}.0.{_RESNET[rest]}" if rest in _RESNET else ""
        case "attentions":
            return f"{side}.{first + at}.1.{rest}"
        case "downsamplers":
            return f"{side}.{first + depth}.0.op" if rest == "conv" else ""
        case _:
            return f"{side}.{first + depth}.{2 if str(block) in attending else 1}.{rest}"
