"""The architectures, as a table: which projections each keeps in one parameter and how, what is its attention.

Data alone: ``tests/test_fused.py`` holds every entry against what the real modules compute.  A pattern is the end of a
dotted path, in which ``*`` stands for a number.  An architecture that is not here is taken by names and shapes as they
are, and nothing inside its fused projections can be a target.  To add one, add a ``Family``.
"""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase

__all__ = ["FAMILIES", "NO_ROLE", "OPAQUE", "Family", "Fused", "Split", "Tied", "family_of"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Fused:
    """Several projections in one parameter, side by side along its rows.

    Attributes:
        module: end of the path of the module that has them, as "attn.qkv".
        word: the part of that path in whose place a projection's own name stands ("qkv" for "attn.q").
        parts: their names, in order.
        heads: where the rows of one head lie together, (path beside the attention module's parameters, axis) of the
            parameters whose size is the number of heads: the first that is there counts.  None: each projection's rows
            lie together.
        width: end of the path, beside the attention module's parameters, of a weight that has as many inputs as the
            last projection has rows; a shape that disagrees is not this entry's.
        even: all projections have as many rows; else the last has what ``width`` says, and the others alike.
        biases: (part, parameter beside the module) where a bias is a parameter of its own.
    """

    module: str
    word: str
    parts: tuple[str, ...]
    heads: tuple[tuple[str, int], ...] | None = None
    width: str = ""
    even: bool = True
    biases: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Split:
    """Projections that some models of a family keep apart, and others in one parameter: the fused name as a target.

    Attributes:
        module: end of the path of the fused module.
        parts: names of the modules that stand beside it instead, in the order of its rows.
    """

    module: str
    parts: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Tied:
    """Modules that are one: the first stands for all.

    Attributes:
        leader: path, ``{0}`` ... for what ``*`` stands for in the others.
        others: pattern of the whole path, with ``*`` for a number.
    """

    leader: str
    others: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """Architectures that are built alike.

    Attributes:
        name: what people call them.
        files: modules of ``timm.models`` that define them.
        architectures: names, with ``*`` for anything.
        attention: ends of paths of the linear (or pointwise) modules of their attention.
        fused, split: how its projections are stored.
        tied: modules that share their parameters.
        leftovers: buffers that older checkpoints hold and nobody reads, as ends of paths.
    """

    name: str
    files: tuple[str, ...]
    architectures: tuple[str, ...]
    attention: tuple[str, ...] = ()
    fused: tuple[Fused, ...] = ()
    split: tuple[Split, ...] = ()
    tied: tuple[Tied, ...] = ()
    leftovers: tuple[str, ...] = ()


NO_ROLE = (
    ("*efficientnet_cc_*", ("conv_pw", "conv_dw", "conv_pwl"), 2),  # several kernels, mixed for each image
    ("lowformer_*", ("upsampling",), 4),  # transposed
)
"""(architectures, ends of paths, axes): modules whose weight has that many and is neither linear nor a convolution's.

No other module of timm is; ``tests/test_index.py`` walks them."""

OPAQUE = frozenset({"attn_layer", "block_fn", "block_layer", "cfg", "transformer_cfg", "transformer_head_first"})
"""Arguments of a model that may change how its attention is laid out: with one of them nothing is declared."""

_QKV = ("q", "k", "v")
_APART = (("q", "q_bias"), ("v", "v_bias"))
_POOL = Fused(module="attn_pool.kv", word="kv", parts=("k", "v"), width="proj.weight")
_POOLED = ("attn_pool.q", "attn_pool.kv", "attn_pool.proj")


def _rows(attention: str = "attn", *, biases: tuple[tuple[str, str], ...] = ()) -> Fused:
    """Queries, then keys, then values."""
    return Fused(module=f"{attention}.qkv", word="qkv", parts=_QKV, width="proj.weight", biases=biases)


def _pair(parts: str, attention: str = "attn") -> Fused:
    return Fused(module=f"{attention}.{parts}", word=parts, parts=tuple(parts), width="proj.weight")


def _ends(attention: str, *leaves: str) -> tuple[str, ...]:
    return tuple(f"{attention}.{leaf}" for leaf in leaves)


def _by_head(module: str, word: str, parts: tuple[str, ...], width: str) -> Fused:
    heads = (("attention_biases", 0),)
    return Fused(module=module, word=word, parts=parts, heads=heads, width=width, even=False)


_IN_HEADS = (("rel_pos.relative_position_bias_table", 1), ("rel_pos.mlp.fc2.weight", 0))
_MIXED = _rows("token_mixer")
_WINDOWS = ("relative_position_index", "relative_coords_table", "attn_mask")

FAMILIES: tuple[Family, ...] = (
    Family(
        name="ViT, FlexiViT, AIMv2, SAM, ViTamin, NaFlexViT",
        files=(
            "vision_transformer",
            "vision_transformer_hybrid",
            "vision_transformer_relpos",
            "vision_transformer_sam",
            "vitamin",
            "naflexvit",
            "eva",  # several of its models are called vit_...
        ),
        architectures=(
            "vit_*",
            "flexivit_*",
            "aimv2_*",
            "beit3_*",
            "samvit_*",
            "vitamin_*",
            "naflexvit_*",
            "test_vit*",
        ),
        attention=(*_ends("attn", "qkv", "q_proj", "k_proj", "v_proj", "proj"), *_POOLED),
        fused=(_rows(biases=_APART), _POOL),
        split=(Split(module="attn.qkv", parts=("q_proj", "k_proj", "v_proj")),),
        leftovers=_WINDOWS,
    ),
    Family(
        name="DeiT, DeiT III",
        files=("deit", "vision_transformer"),
        architectures=("deit_*", "deit3_*"),
        attention=_ends("attn", "qkv", "proj"),
        fused=(_rows(),),
    ),
    Family(
        name="EVA, EVA-02",
        files=("eva", "vision_transformer"),
        architectures=("eva_*", "eva02_*"),
        attention=(*_ends("attn", "qkv", "q_proj", "k_proj", "v_proj", "proj"), *_POOLED),
        fused=(_rows(biases=_APART), _POOL),
        split=(Split(module="attn.qkv", parts=("q_proj", "k_proj", "v_proj")),),
    ),
    Family(
        name="BEiT, BEiT v2",
        files=("beit",),
        architectures=("beit_*", "beitv2_*"),
        attention=_ends("attn", "qkv", "proj"),
        fused=(_rows(biases=_APART),),
        leftovers=_WINDOWS,
    ),
    Family(
        name="Swin, Swin v2, Swin v2 CR",
        files=("swin_transformer", "swin_transformer_v2", "swin_transformer_v2_cr"),
        architectures=("swin_*", "swinv2_*"),
        attention=_ends("attn", "qkv", "proj"),
        fused=(_rows(biases=_APART),),
        leftovers=_WINDOWS,
    ),
    Family(
        name="PVT v2",
        files=("pvt_v2",),
        architectures=("pvt_v2_*",),
        attention=_ends("attn", "q", "kv", "proj"),
        fused=(_pair("kv"),),
    ),
    Family(
        name="Twins, VOLO",
        files=("twins", "volo"),
        architectures=("twins_*", "volo_*"),
        attention=_ends("attn", "qkv", "q", "kv", "v", "attn", "proj"),
        fused=(_rows(), _pair("kv")),
    ),
    Family(
        name="CaiT, CrossViT, PiT, NesT, ConViT, TNT",
        files=("cait", "crossvit", "pit", "nest", "convit", "tnt"),
        architectures=("cait_*", "crossvit_*", "pit_*", "nest_*", "convit_*", "tnt_*"),
        attention=(
            *_ends("attn", "qkv", "qk", "q", "k", "v", "wq", "wk", "wv", "proj"),
            *_ends("attn_in", "qk", "v", "proj"),
            *_ends("attn_out", "qk", "v", "proj"),
        ),
        fused=(_rows(), _pair("qk"), _pair("qk", "attn_in"), _pair("qk", "attn_out")),
    ),
    Family(
        name="Hiera, SAM 2 Hiera, Visformer",
        files=("hiera", "hieradet_sam2", "visformer"),
        architectures=("hiera_*", "hieradet_*", "sam2_*", "visformer_*"),
        attention=_ends("attn", "qkv", "proj"),
        fused=(_rows(),),
    ),
    Family(
        name="GC ViT",
        files=("gcvit",),
        architectures=("gcvit_*",),
        attention=_ends("attn", "qkv", "proj"),
        # where queries come from the whole image, the same name has keys and values alone
        fused=(_rows(), Fused(module="attn.qkv", word="qkv", parts=("k", "v"), width="proj.weight")),
        leftovers=_WINDOWS,
    ),
    Family(
        name="FastViT, CAFormer and other MetaFormers",
        files=("fastvit", "metaformer"),
        architectures=("fastvit_*", "caformer_*", "convformer_*", "poolformer_*", "poolformerv2_*"),
        attention=_ends("token_mixer", "qkv", "proj"),
        fused=(_MIXED,),
    ),
    Family(
        name="MaxViT with TensorFlow's weights",
        files=("maxxvit",),
        architectures=("maxvit_*_tf_*",),
        attention=(*_ends("attn", "qkv", "proj"),),
        fused=(_rows(),),
        leftovers=_WINDOWS,
    ),
    Family(
        name="MaxViT, MaxxViT, CoAtNet",
        files=("maxxvit",),
        architectures=(
            "maxvit_*",
            "maxxvit_*",
            "maxxvitv2_*",
            "coatnet_*",
            "coatnext_*",
            "test_maxvit*",
            "test_coatnet*",
        ),
        attention=tuple(end for block in ("attn", "attn_block", "attn_grid") for end in _ends(block, "qkv", "proj")),
        fused=tuple(
            Fused(module=f"{block}.qkv", word="qkv", parts=_QKV, heads=_IN_HEADS, width="proj.weight")
            for block in ("attn", "attn_block", "attn_grid")
        ),
        leftovers=_WINDOWS,
    ),
    Family(
        name="LeViT",
        files=("levit",),
        architectures=("levit_*",),
        attention=(
            *_ends("attn", "qkv.linear", "proj.ln.linear"),
            *_ends("attn_downsample", "q.ln.linear", "kv.linear", "proj.ln.linear"),
        ),
        fused=(
            _by_head("attn.qkv.linear", "qkv", _QKV, "proj.ln.linear.weight"),
            _by_head("attn_downsample.kv.linear", "kv", ("k", "v"), "proj.ln.linear.weight"),
        ),
        leftovers=("attention_bias_idxs",),
    ),
    Family(
        name="TinyViT",
        files=("tiny_vit",),
        architectures=("tiny_vit_*",),
        attention=_ends("attn", "qkv", "proj"),
        fused=(_by_head("attn.qkv", "qkv", _QKV, "proj.weight"),),
        leftovers=("attention_bias_idxs",),
    ),
    Family(
        name="EfficientFormer",
        files=("efficientformer",),
        architectures=("efficientformer_*",),
        attention=_ends("token_mixer", "qkv", "proj"),
        fused=(_by_head("token_mixer.qkv", "qkv", _QKV, "proj.weight"),),
    ),
    Family(
        name="CoaT",
        files=("coat",),
        architectures=("coat_*",),
        attention=tuple(end for at in ("", "2", "3", "4") for end in _ends(f"factoratt_crpe{at}", "qkv", "proj")),
        tied=(
            *(Tied(leader=f"cpe{at}", others=f"serial_blocks{at}.*.cpe") for at in "1234"),
            *(Tied(leader=f"crpe{at}", others=f"serial_blocks{at}.*.factoratt_crpe.crpe") for at in "1234"),
            *(Tied(leader=f"crpe{at}", others=f"parallel_blocks.*.factoratt_crpe{at}.crpe") for at in "234"),
            *(Tied(leader="parallel_blocks.{0}.mlp2", others=f"parallel_blocks.*.mlp{at}") for at in "34"),
        ),
    ),
    Family(
        name="ConvNeXt, ConvNeXt v2",
        files=("convnext",),
        architectures=("convnext_*", "convnextv2_*", "test_convnext*"),
    ),
    Family(
        name="EfficientNet, MobileNet, MixNet",
        files=("efficientnet", "mobilenetv3", "mobilenetv5"),
        architectures=(
            *("efficientnet_*", "efficientnetv2_*", "tf_efficientnet*", "test_efficientnet*"),
            *("mobilenet_*", "mobilenetv*", "tf_mobilenetv3_*", "mixnet_*", "tf_mixnet_*"),
        ),
        attention=_ends("attn", "query.proj", "key.proj", "value.proj", "output.proj"),
    ),
)
"""In order: the first whose names fit counts."""


def family_of(architecture: str) -> Family | None:
    """The family of an architecture ("vit_base_patch16_224"), without a tag."""
    return next(
        (family for family in FAMILIES if any(fnmatchcase(architecture, each) for each in family.architectures)), None
    )
