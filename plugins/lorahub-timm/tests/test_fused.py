"""Queries, keys and values inside fused parameters: the table's rows held against what real attention computes.

The reference is the model's own: what it multiplies with each other inside its attention, for inputs it was given.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from tiny_timm import TINY, Tiny, build, images, timm
from torch.overrides import TorchFunctionMode

from lorahub.bases.index import BaseRef
from lorahub.bases.layout import Target
from lorahub_timm import Timm
from lorahub_timm.configs import described
from lorahub_timm.families import FAMILIES, Fused, family_of
from lorahub_timm.fused import _rows, fused_layout, parts_of
from lorahub_timm.paths import ends_with

MORE: dict[str, Tiny] = {
    "deit without distillation": Tiny("deit3_small_patch16_224", TINY["vit"].args),
    "vit with relative positions": Tiny("vit_relpos_small_patch16_224", TINY["vit"].args),
    "flexivit": Tiny("flexivit_small", {**TINY["vit"].args, "img_size": 32}),
    "naflexvit": Tiny("naflexvit_base_patch16_gap", {"embed_dim": 24, "depth": 1, "num_heads": 3}, side=32),
    "eva of vit's name": Tiny("vit_base_patch16_rope_224", TINY["vit"].args),
    "swin v2 cr": Tiny("swinv2_cr_tiny_224", {"img_size": 64, "embed_dim": 12, "depths": (1, 1, 1, 1)}, side=64),
    "twins": Tiny("twins_svt_small", {"embed_dims": (32, 64, 96, 128), "depths": (2, 2, 2, 2)}, side=224),
    "volo": Tiny("volo_d1_224", side=224),
    "cait": Tiny("cait_xxs24_224", {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 1, "num_heads": 3}),
    "crossvit": Tiny("crossvit_tiny_240", side=240),
    "pit": Tiny("pit_ti_224", side=224),
    "nest": Tiny("nest_tiny", side=224),
    "convit": Tiny("convit_tiny", {"embed_dim": 24, "depth": 2, "num_heads": 3, "local_up_to_layer": 1}, side=224),
    "tnt": Tiny("tnt_s_legacy_patch16_224", {"depth": 1}, side=224),
    "hiera": Tiny("hiera_tiny_224", {"embed_dim": 16, "stages": (1, 1, 1, 1)}, side=224),
    "sam 2": Tiny("sam2_hiera_tiny", {"embed_dim": 16}, side=64),
    "visformer": Tiny("visformer_tiny", side=224),
    "gc vit": Tiny("gcvit_xxtiny", side=224),
    "fastvit": Tiny("fastvit_sa12", {"embed_dims": (16, 32, 32, 64), "layers": (1, 1, 1, 1)}, side=128),
    "caformer": Tiny("caformer_s18", side=64),
    "tiny vit": Tiny("tiny_vit_5m_224", side=224),
    "efficientformer": Tiny("efficientformer_l1", side=224),
    "levit of convolutions": Tiny("levit_conv_128s", TINY["levit"].args, side=224),
}
MODELS = {**TINY, **MORE}
LARGE = (
    "twins",
    "volo",
    "crossvit",
    "pit",
    "nest",
    "visformer",
    "gc vit",
    "fastvit",
    "caformer",
    "tiny vit",
    "efficientformer",
)
POOLING = ("hiera", "sam 2")  # queries are pooled before they meet keys
WITHOUT = ("convnext", "efficientnet", "eva apart")  # nothing of theirs is fused
CASES = [pytest.param(each, marks=pytest.mark.slow if each in LARGE else ()) for each in MODELS if each not in WITHOUT]


class Watch(TorchFunctionMode):
    """What a module of that weight is given, and what is multiplied with what after that."""

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        self.weight = weight
        self.x: torch.Tensor | None = None
        self.operands: list[torch.Tensor] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        taken = len(args) > 1 and args[1] is self.weight
        if taken or kwargs.get("weight") is self.weight:
            self.x, self.operands = args[0].detach(), []
        elif self.x is not None and len(self.operands) < 2:
            if name == "normalize":  # cosine attention
                self.operands.append(args[0].detach())
            elif name == "scaled_dot_product_attention":
                self.operands = [args[0].detach(), args[1].detach()]
            elif name in ("matmul", "__matmul__"):
                self.operands = [args[0].detach(), args[1].detach().transpose(-2, -1)]
        return func(*args, **kwargs)


@contextmanager
def inputs_of(module: torch.nn.Module) -> Iterator[list[torch.Tensor]]:
    seen: list[torch.Tensor] = []
    hook = module.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach().clone()))
    yield seen
    hook.remove()


def plain(tiny: Tiny) -> torch.nn.Module:
    """A model in float64 whose projections have no biases, and norms after them that change nothing."""
    model = build(tiny).double()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("qkv.bias", "kv.bias", "qk.bias", "q_bias", "v_bias", "linear.bias", "bn.bias")):
                parameter.zero_()
            if name.endswith("bn.weight"):
                parameter.fill_(1)
    return model


def projections(model: torch.nn.Module) -> dict[str, dict[str, Target]]:
    """Fused module -> its projections' names -> targets."""
    index = Timm().index_model(model, BaseRef())
    about = described(index.config)
    assert about is not None
    assert about.family is not None
    found: dict[str, dict[str, Target]] = {}
    for module, path in parts_of(about.family, index):
        part = next(a for a, b in zip(path.split("."), module.split("."), strict=True) if a != b)
        found.setdefault(module, {})[part] = Target("", path, "weight")
    return found


def lengths(x: torch.Tensor, rows: torch.Tensor, heads: int) -> torch.Tensor:
    """The lengths of a projection's vectors, one for each position and head, by loops over heads; sorted."""
    flat = x.flatten(2).transpose(1, 2) if rows.dim() == 4 else x
    flat = flat.reshape(-1, flat.shape[-1])
    matrix = rows.flatten(1)
    each = matrix.shape[0] // heads
    found = []
    for head in range(heads):
        out = torch.zeros(flat.shape[0], dtype=torch.float64)
        for row in matrix[head * each : (head + 1) * each]:
            out += (flat * row).sum(1) ** 2
        found.append(out.sqrt())
    return torch.cat(found).sort().values


def same_up_to_scale(one: torch.Tensor, other: torch.Tensor) -> bool:
    if one.shape != other.shape:
        return False
    return torch.allclose(one / one.norm(), other / other.norm(), rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("what", CASES)
def test_the_rows_of_queries_and_keys_are_those_that_attention_multiplies(what: str) -> None:
    tiny = MODELS[what]
    model = plain(tiny)
    layouts = Timm().layouts(
        index := Timm().index_model(model, BaseRef()),
        [target for parts in projections(model).values() for target in parts.values()],
    )
    assert layouts
    checked = 0
    for module, parts in projections(model).items():
        weight = model.get_parameter(f"{module}.weight")
        with Watch(weight) as watch, torch.no_grad():
            model(images(tiny, 1, dtype=torch.float64))
        assert watch.x is not None, f"{module} was never used"
        if len(watch.operands) < 2:
            continue
        stored = {part: layouts[target].pieces[0].of_parameter.of(weight.detach()) for part, target in parts.items()}
        assert all(len(layouts[target].pieces) == 1 for target in parts.values())
        for part, operand in (("q", watch.operands[0]), ("k", watch.operands[1])):
            if part not in stored or operand.dim() < 3:
                continue
            seen = operand.norm(dim=-1).flatten().sort().values
            heads = stored[part].shape[0] // operand.shape[-1]
            expected = lengths(watch.x, stored[part], heads)
            if what in POOLING and part == "q" and seen.numel() < expected.numel():
                continue
            assert same_up_to_scale(seen, expected), f"{module}: {part}"
            others = [name for name in stored if name != part and stored[name].shape == stored[part].shape]
            assert not any(same_up_to_scale(seen, lengths(watch.x, stored[name], heads)) for name in others)
            checked += 1
    assert checked
    assert index.declared


@pytest.mark.parametrize("what", CASES)
def test_without_the_rows_of_the_values_attention_gives_nothing(what: str) -> None:
    tiny = MODELS[what]
    model = plain(tiny)
    index = Timm().index_model(model, BaseRef())
    for module, parts in projections(model).items():
        if "v" not in parts:
            continue
        layout = Timm().layouts(index, [parts["v"]])[parts["v"]]
        family = family_of(tiny.name)
        assert family is not None
        fused = next(each for each in family.fused if ends_with(module, [each.module]) and _rows(each, index, module))
        above = module.removesuffix(fused.module) + fused.module.partition(f".{fused.word}")[0]
        after = model.get_submodule(f"{above}.{fused.width.removesuffix('.weight')}")
        weight = model.get_parameter(f"{module}.weight")
        kept = weight.detach().clone()
        with torch.no_grad(), inputs_of(after) as seen:
            model(images(tiny, 1, dtype=torch.float64))
            region = layout.pieces[0].of_parameter
            region.put(weight, torch.zeros_like(region.of(weight)))
            model(images(tiny, 1, dtype=torch.float64))
            weight.copy_(kept)
        before, nothing = seen
        assert before.abs().max() > 1e-6
        assert nothing.abs().max() < 1e-12, module


@pytest.mark.parametrize("what", CASES)
def test_projections_cover_a_fused_parameter_exactly_once(what: str) -> None:
    model = build(MODELS[what])
    index = Timm().index_model(model, BaseRef())
    for module, parts in projections(model).items():
        total = index.parameters[f"{module}.weight"].shape[0]
        rows: list[int] = []
        for target in parts.values():
            (piece,) = Timm().layouts(index, [target])[target].pieces
            chosen = piece.of_parameter.rows
            rows += list(range(total))[chosen] if isinstance(chosen, slice) else chosen
        assert sorted(rows) == list(range(total)), module


def test_every_family_of_the_table_with_something_fused_is_tested() -> None:
    tested = {family_of(each.name) for each in MODELS.values()}
    assert all(family in tested for family in FAMILIES if family.fused)


def target(name: str) -> Target:
    module, _, parameter = name.rpartition(".")
    return Target("", module, parameter)


def test_biases_that_are_parameters_of_their_own_are_the_projections_biases(framework: Timm) -> None:
    index = framework.index_model(build(TINY["beit"]), BaseRef())
    found = framework.layouts(index, [target(f"blocks.0.attn.{part}.bias") for part in "qkv"])
    assert {each.name: layout.pieces[0].parameter for each, layout in found.items()} == {
        "blocks.0.attn.q.bias": "blocks.0.attn.q_bias",
        "blocks.0.attn.v.bias": "blocks.0.attn.v_bias",
    }


def test_a_fused_bias_is_cut_as_its_weight_is(framework: Timm) -> None:
    index = framework.index_model(build(TINY["maxvit"]), BaseRef())
    *_, module = (name.removesuffix(".qkv.bias") for name in index.parameters if name.endswith(".qkv.bias"))
    found = framework.layouts(index, [target(f"{module}.k.{parameter}") for parameter in ("weight", "bias")])
    rows = {tuple(layout.pieces[0].of_parameter.rows) for layout in found.values()}
    assert len(rows) == 1


def test_a_fused_name_lands_across_projections_that_are_apart(framework: Timm) -> None:
    model = build(TINY["eva apart"])
    index = framework.index_model(model, BaseRef())
    whole = target("blocks.0.attn.qkv.weight")
    layout = framework.layouts(index, [whole])[whole]
    assert [piece.parameter.split(".")[-2] for piece in layout.pieces] == ["q_proj", "k_proj", "v_proj"]
    sides = [piece.of_delta.rows for piece in layout.pieces]
    assert [(each.start, each.stop) for each in sides] == [(0, 24), (24, 48), (48, 72)]


@pytest.mark.parametrize(
    ("name", "args"),
    [
        ("botnet26t_256", {}),  # not in the table
        ("vit_tiny_patch16_224", {**TINY["vit"].args, "attn_layer": "diff"}),  # another attention than the table's
        ("test_maxvit", {"transformer_head_first": False}),
    ],
)
def test_a_layout_that_is_not_declared_is_refused(name: str, args: dict[str, Any], framework: Timm) -> None:
    with torch.device("meta"):
        try:
            model = timm.create_model(name, **args)
        except (KeyError, TypeError):
            pytest.fail(f"timm takes other arguments for {name}")
    index = framework.index_model(model, BaseRef())
    fused = [module for module in index.modules() if module.endswith("qkv")]
    assert fused
    wanted = [Target("", f"{module.removesuffix('qkv')}{part}", "weight") for module in fused for part in "qkv"]
    assert not framework.layouts(index, wanted)
    assert len(framework.layouts(index, [Target("", module, "weight") for module in fused])) == len(fused)


def test_shapes_that_contradict_the_table_are_refused(framework: Timm) -> None:
    index = framework.index_model(build(TINY["vit"]), BaseRef())
    other = Fused(module="attn.qkv", word="qkv", parts=("k", "v"), width="proj.weight")
    family = family_of("vit_tiny_patch16_224")
    assert family is not None
    changed = type(family)(name="", files=(), architectures=(), fused=(other,))
    assert fused_layout(family, index, target("blocks.0.attn.v.weight")) is not None
    assert fused_layout(changed, index, target("blocks.0.attn.v.weight")) is None


def test_a_class_of_ones_own_under_a_name_of_timms_declares_nothing(framework: Timm) -> None:
    class Mine(type(build(TINY["vit"]))):  # type: ignore[misc]
        pass

    model = build(TINY["vit"])
    model.__class__ = Mine
    index = framework.index_model(model, BaseRef())
    assert not framework.layouts(index, [target("blocks.0.attn.q.weight")])
