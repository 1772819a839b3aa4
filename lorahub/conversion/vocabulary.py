"""What two tools call the same modules of one model: the original makers' names and those of diffusers.

A word says that one module of the first vocabulary is one or several of the second, and how many shares of its rows
each of those has: ``qkv`` is ``to_q``, ``to_k`` and ``to_v``.  ``{n}`` stands for a number, the same in both.  The UNet
of Stable Diffusion 1, 2 and XL is counted in another way by each, which is a rule and not a table.  Data and look-ups
over names; knows no tensors.

Facts: Black Forest Labs' ``flux``, Stability's ``generative-models`` and ``sd3``, Wan-Video's ``Wan2.1``, and diffusers
0.42.1.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass

__all__ = ["PREFIXES", "Lexicon", "Word", "component_of", "family_of", "is_foreign", "lexicon", "lexicons", "words"]

PREFIXES = ("model.diffusion_model.", "diffusion_model.")
"""What original checkpoints put before a diffusion model's own names."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Word:
    """One module in one vocabulary, and what it is in the other.

    Attributes:
        name: of the one module.
        parts: of the other ones, in the order of their rows.
        shares: of the rows, one for each part.
        halves_swapped: its second half of rows comes first in the other vocabulary.
    """

    name: str
    parts: tuple[str, ...]
    shares: tuple[int, ...] = (1,)
    halves_swapped: bool = False


def _fused(name: str, *parts: str, shares: tuple[int, ...] = ()) -> Word:
    return Word(name=name, parts=parts, shares=shares or (1,) * len(parts))


def _flux() -> tuple[Word, ...]:
    double, single, block = "double_blocks.{n}", "single_blocks.{n}", "transformer_blocks.{n}"
    lone = "single_transformer_blocks.{n}"
    return (
        _fused(f"{double}.img_attn.qkv", *(f"{block}.attn.to_{each}" for each in "qkv")),
        _fused(f"{double}.txt_attn.qkv", *(f"{block}.attn.add_{each}_proj" for each in "qkv")),
        _fused(f"{double}.img_attn.proj", f"{block}.attn.to_out.0"),
        _fused(f"{double}.txt_attn.proj", f"{block}.attn.to_add_out"),
        _fused(f"{double}.img_mlp.0", f"{block}.ff.net.0.proj"),
        _fused(f"{double}.img_mlp.2", f"{block}.ff.net.2"),
        _fused(f"{double}.txt_mlp.0", f"{block}.ff_context.net.0.proj"),
        _fused(f"{double}.txt_mlp.2", f"{block}.ff_context.net.2"),
        _fused(f"{double}.img_mod.lin", f"{block}.norm1.linear"),
        _fused(f"{double}.txt_mod.lin", f"{block}.norm1_context.linear"),
        _fused(
            f"{single}.linear1",
            *(f"{lone}.attn.to_{each}" for each in "qkv"),
            f"{lone}.proj_mlp",
            shares=(1, 1, 1, 4),
        ),
        _fused(f"{single}.linear2", f"{lone}.proj_out"),
        _fused(f"{single}.modulation.lin", f"{lone}.norm.linear"),
        # XLabs' processors, which are no modules of either
        _fused(f"{double}.processor.qkv_lora1", *(f"{block}.attn.to_{each}" for each in "qkv")),
        _fused(f"{double}.processor.qkv_lora2", *(f"{block}.attn.add_{each}_proj" for each in "qkv")),
        _fused(f"{double}.processor.proj_lora1", f"{block}.attn.to_out.0"),
        _fused(f"{double}.processor.proj_lora2", f"{block}.attn.to_add_out"),
        _fused(f"{single}.processor.qkv_lora", *(f"{lone}.attn.to_{each}" for each in "qkv")),
        _fused(f"{single}.processor.proj_lora", f"{lone}.proj_out"),
        _fused("img_in", "x_embedder"),
        _fused("txt_in", "context_embedder"),
        *(
            _fused(f"{name}.{layer}_layer", f"time_text_embed.{other}.linear_{number}")
            for name, other in (
                ("time_in", "timestep_embedder"),
                ("vector_in", "text_embedder"),
                ("guidance_in", "guidance_embedder"),
            )
            for layer, number in (("in", 1), ("out", 2))
        ),
        # shift and scale, which diffusers keeps the other way round
        Word(name="final_layer.adaLN_modulation.1", parts=("norm_out.linear",), halves_swapped=True),
        _fused("final_layer.linear", "proj_out"),
    )


def _wan() -> tuple[Word, ...]:
    block = "blocks.{n}"
    attention = {"q": "to_q", "k": "to_k", "v": "to_v", "o": "to_out.0", "norm_q": "norm_q", "norm_k": "norm_k"}
    image = {"k_img": "add_k_proj", "v_img": "add_v_proj", "norm_k_img": "norm_added_k"}
    embedders = (("text_embedding", "text_embedder"), ("time_embedding", "time_embedder"))
    return (
        *(_fused(f"{block}.self_attn.{one}", f"{block}.attn1.{other}") for one, other in attention.items()),
        *(_fused(f"{block}.cross_attn.{one}", f"{block}.attn2.{other}") for one, other in (attention | image).items()),
        _fused(f"{block}.ffn.0", f"{block}.ffn.net.0.proj"),
        _fused(f"{block}.ffn.2", f"{block}.ffn.net.2"),
        _fused(f"{block}.norm3", f"{block}.norm2"),
        *(
            _fused(f"{one}.{at}", f"condition_embedder.{other}.linear_{number}")
            for one, other in embedders
            for at, number in ((0, 1), (2, 2))
        ),
        _fused("time_projection.1", "condition_embedder.time_proj"),
        *(
            _fused(f"img_emb.proj.{at}", f"condition_embedder.image_embedder.{other}")
            for at, other in ((0, "norm1"), (1, "ff.net.0.proj"), (3, "ff.net.2"), (4, "norm2"))
        ),
        _fused("head.head", "proj_out"),
        _fused("patch_embedding", "patch_embedding"),
    )


def _sd3() -> tuple[Word, ...]:
    joint, block = "joint_blocks.{n}", "transformer_blocks.{n}"
    return (
        _fused(f"{joint}.x_block.attn.qkv", *(f"{block}.attn.to_{each}" for each in "qkv")),
        _fused(f"{joint}.context_block.attn.qkv", *(f"{block}.attn.add_{each}_proj" for each in "qkv")),
        _fused(f"{joint}.x_block.attn.proj", f"{block}.attn.to_out.0"),
        _fused(f"{joint}.context_block.attn.proj", f"{block}.attn.to_add_out"),
        _fused(f"{joint}.x_block.mlp.fc1", f"{block}.ff.net.0.proj"),
        _fused(f"{joint}.x_block.mlp.fc2", f"{block}.ff.net.2"),
        _fused(f"{joint}.context_block.mlp.fc1", f"{block}.ff_context.net.0.proj"),
        _fused(f"{joint}.context_block.mlp.fc2", f"{block}.ff_context.net.2"),
        _fused(f"{joint}.x_block.adaLN_modulation.1", f"{block}.norm1.linear"),
        _fused(f"{joint}.x_block.attn2.qkv", *(f"{block}.attn2.to_{each}" for each in "qkv")),
        _fused(f"{joint}.x_block.attn2.proj", f"{block}.attn2.to_out.0"),
        _fused("x_embedder.proj", "pos_embed.proj"),
        _fused("context_embedder", "context_embedder"),
        *(
            _fused(f"{one}.mlp.{at}", f"time_text_embed.{other}.linear_{number}")
            for one, other in (("t_embedder", "timestep_embedder"), ("y_embedder", "text_embedder"))
            for at, number in ((0, 1), (2, 2))
        ),
        Word(name="final_layer.adaLN_modulation.1", parts=("norm_out.linear",), halves_swapped=True),
        _fused("final_layer.linear", "proj_out"),
    )


_TABLES: Mapping[str, tuple[tuple[Word, ...], frozenset[str]]] = {
    "flux": (_flux(), frozenset({"double_blocks.0.img_attn.qkv", "single_transformer_blocks.0.proj_mlp"})),
    "sd3": (
        _sd3(),
        frozenset({"joint_blocks.0.x_block.attn.qkv", "transformer_blocks.0.ff_context.net.0.proj"}),
    ),
    "wan": (_wan(), frozenset({"blocks.0.self_attn.q", "blocks.0.attn1.to_q"})),
}
"""Family -> its words, and modules of which a model of it has one in either vocabulary."""

_CLASSES: Mapping[str, frozenset[str]] = {
    "flux": frozenset({"FluxTransformer2DModel", "ChromaTransformer2DModel"}),
    "sd3": frozenset({"SD3Transformer2DModel"}),
    "wan": frozenset({"SkyReelsV2Transformer3DModel", "WanTransformer3DModel", "WanVACETransformer3DModel"}),
}
"""Family -> diffusers' classes of such models."""

_EVIDENCE: Mapping[str, re.Pattern[str]] = {
    "flux": re.compile(r"(single_transformer_blocks|double_blocks|single_blocks)[._]\d"),
    "sd3": re.compile(r"joint_blocks[._]\d|transformer_blocks[._]\d{1,2}[._]attn2[._]"),
    "wan": re.compile(r"blocks[._]\d{1,3}[._](self_attn|cross_attn|attn[12])[._]"),
}
"""Family -> names that only its models have among these, for adapters whose base is not known."""

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
        return any(_EVIDENCE[self.family].match(module) for module in modules)


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
    possible = [family for family in _TABLES if not _deeper(modules, _DEPTH.get(family, {}))]
    known = [found for family in possible if (found := lexicon(family, modules))]
    return [each for each in known if each.sure(modules)] or known


def lexicon(family: str, modules: Collection[str]) -> Lexicon | None:
    """The family's words for all of these modules, or None where it has not all."""
    for original in (True, False):
        names = _names(_TABLES[family][0], modules, original=original)
        if all(module in names for module in modules):
            return Lexicon(family=family, original=original, names=names)
    return None


def family_of(base: Collection[str], model: str) -> str:
    """The family of a model with these modules or of this class; "" for another."""
    if model:
        return next((family for family, classes in _CLASSES.items() if model in classes), "")
    own = set(base)
    if any(module.startswith("context_embedder.") for module in own):
        return ""  # HunyuanVideo, whose blocks are named as Flux's
    return next((family for family, (_, telling) in _TABLES.items() if telling & own), "")


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
    family = next((name for name, (_, telling) in _TABLES.items() if telling & known), "")
    for word in _TABLES[family][0] if family else ():
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
            yield _fused(name, module)


def _text_model(modules: Collection[str]) -> Iterator[Word]:
    """CLIP's text encoder, which transformers kept below ``text_model.`` before its fifth release."""
    within = {module for module in modules if module.startswith(_TEXT)}
    if "encoder.layers.0.self_attn.q_proj" in modules:
        yield from (_fused(f"{_TEXT}{module}", module) for module in modules if module)
    elif f"{_TEXT}encoder.layers.0.self_attn.q_proj" in within:
        yield from (_fused(module.removeprefix(_TEXT), module) for module in within)


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
