"""Layouts from before there were configs: what each means, against the arithmetic of the code that wrote it."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F  # noqa: N812 - as everybody calls it

from lorahub.adapter import AdapterHeader, load, open_header, recognise
from lorahub.bases.index import BaseIndex, BaseRef
from lorahub.bases.layout import Target
from lorahub.bases.torch_module import TorchModule
from lorahub.errors import BaseNeeded, CannotCarry, IntegrityError, LorahubError, UnsupportedFormat, UnsupportedKind
from lorahub.files.header import Header, TensorInfo
from lorahub.files.writer import save_file
from lorahub.findings import Verdict
from lorahub.formats.format import AdapterFiles
from lorahub.plugins import Registry

Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Tensors, header metadata and a config as a folder."""

    def make(
        tensors: Mapping[str, torch.Tensor],
        metadata: Mapping[str, str] | None = None,
        config: Mapping[str, Any] | None = None,
        name: str = "x.safetensors",
    ) -> Path:
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        folder.mkdir()
        save_file(folder / name, tensors, metadata)
        if config is not None:
            (folder / "adapter_config.json").write_text(json.dumps(config))
        return folder

    return make


def index_of(model: nn.Module) -> BaseIndex:
    return TorchModule().index_model(model, BaseRef())


def randn(*size: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed + sum(size)), dtype=torch.float64)


def codes(header: AdapterHeader) -> set[str]:
    return {finding.code for finding in header.findings}


def changes(header: AdapterHeader, registry: Registry, weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Target -> change of the given weight; every one of them moves something."""
    result = {}
    for target, delta in load(header, registry).deltas.items():
        if target.name in weights:
            weight = weights[target.name].double()
            result[target.name] = delta.delta(weight)
            assert result[target.name].norm() > 1e-2 * weight.norm()
    assert result
    return result


def close(found: torch.Tensor, expected: torch.Tensor) -> bool:
    return found.shape == expected.shape and torch.allclose(found, expected, rtol=1e-10, atol=1e-10)


# ---- microsoft/LoRA


class Loralib(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.query = nn.Linear(6, 8)
        self.c_attn = nn.Linear(6, 12)
        self.words = nn.Embedding(10, 6)
        self.conv = nn.Conv2d(4, 6, 3, groups=2)
        self.classifier = nn.Linear(8, 3)


def test_loralib_factors_of_a_linear_layer_add_their_product(write: Write, registry: Registry) -> None:
    model = Loralib()
    a, b, x = randn(2, 6), randn(8, 2), randn(5, 6)
    header = open_header(write({"query.lora_A": a, "query.lora_B": b}), registry, index=index_of(model))
    assert (header.format, header.kinds, header.ranks) == ("loralib", ("lora",), (2,))
    assert codes(header) == {"alpha-unknown"}
    found = changes(header, registry, {"query.weight": model.query.weight})["query.weight"]
    assert close(F.linear(x, found), x @ a.T @ b.T)


def test_loralib_alpha_can_be_stated_beside_the_file_or_in_it(write: Write, registry: Registry) -> None:
    tensors = {"query.lora_A": randn(2, 6), "query.lora_B": randn(8, 2)}
    for folder in (
        write(tensors, {"lora_alpha": "16"}),
        write(tensors, None, {"lora_alpha": 16, "r": 2, "base_model_name_or_path": "a/b"}),
        write(tensors, {"lora_alpha": "16"}, {"lora_alpha": 16}),
    ):
        header = open_header(folder, registry)
        assert header.findings == ()
        assert [group.options for group in header.reading.groups] == [
            {"scale": 8.0, "scale_rule": "alpha/r", "alpha": 16.0, "rank": 2}
        ]
    assert open_header(write(tensors, None, {"base_model_name_or_path": "a/b"}), registry).reading.base_repo == "a/b"


@pytest.mark.parametrize(
    ("metadata", "config", "says"),
    [
        ({"lora_alpha": "16"}, {"lora_alpha": 8}, "lora_alpha is 8 in adapter_config.json and 16"),
        ({"lora_alpha": "much"}, None, "'much', which is no number"),
        ({"lora_alpha": "true"}, None, "True, which is no number"),
        (None, {"lora_alpha": [16]}, "which is no number"),
        ({"enable_lora": "true"}, None, "no list of true and false"),
        ({"enable_lora": "[1, 0]"}, None, "no list of true and false"),
    ],
)
def test_what_is_stated_wrongly_is_refused(
    write: Write, registry: Registry, metadata: Mapping[str, str] | None, config: Mapping[str, Any] | None, says: str
) -> None:
    folder = write({"query.lora_A": randn(2, 6), "query.lora_B": randn(8, 2)}, metadata, config)
    with pytest.raises(IntegrityError, match=says):
        open_header(folder, registry)


def test_a_stated_rank_must_be_that_of_the_factors_and_other_fields_are_told(write: Write, registry: Registry) -> None:
    tensors = {"query.lora_A": randn(2, 6), "query.lora_B": randn(8, 2)}
    header = open_header(write(tensors, None, {"r": 4}), registry)
    assert "config-contradicts-tensors" in codes(header)
    assert "config-unknown" in codes(open_header(write(tensors, None, {"odd": 4}), registry))


def merged_reference(a: torch.Tensor, b: torch.Tensor, enabled: Sequence[bool], groups: int) -> torch.Tensor:
    """The change as MergedLinear computes it: a convolution with groups, then rows put where they belong."""
    rows = F.conv1d(a.unsqueeze(0), b.reshape(*b.shape[:2], 1), groups=groups).squeeze(0)
    band = b.shape[0] // sum(enabled)
    whole = torch.zeros(band * len(enabled), a.shape[1], dtype=a.dtype)
    source = 0
    for part, on in enumerate(enabled):
        for row in range(band if on else 0):
            whole[part * band + row] = rows[source]
            source += 1
    return whole


@pytest.mark.parametrize(
    "enabled", [[True, False, True], [True, True, True], [False, True, True], [False, False, True]]
)
def test_loralib_merged_layers_change_only_their_enabled_bands(
    write: Write, registry: Registry, enabled: list[bool]
) -> None:
    model, g = Loralib(), sum(enabled)
    a, b = randn(2 * g, 6), randn(4 * g, 2)
    folder = write({"c_attn.lora_A": a, "c_attn.lora_B": b}, None, {"lora_alpha": 4, "enable_lora": enabled})
    header = open_header(folder, registry, index=index_of(model))
    assert (header.kinds, header.ranks) == (("merged-lora",), (2,))
    found = changes(header, registry, {"c_attn.weight": model.c_attn.weight})["c_attn.weight"]
    assert close(found, 2.0 * merged_reference(a, b, enabled, g))
    (delta,) = load(header, registry).deltas.values()
    factors = delta.low_rank()
    assert factors is not None
    assert close(factors.scale * factors.up @ factors.down, found)


def test_loralib_bands_are_derived_where_all_are_enabled_and_never_guessed(write: Write, registry: Registry) -> None:
    model = Loralib()
    every = write({"c_attn.lora_A": randn(6, 6), "c_attn.lora_B": randn(12, 2)})
    header = open_header(every, registry, index=index_of(model))
    assert header.reading.groups[0].options["enabled"] == [True, True, True]
    some = write({"c_attn.lora_A": randn(4, 6), "c_attn.lora_B": randn(8, 2)})
    for index in (None, index_of(model)):
        header = open_header(some, registry, index=index)
        (finding,) = [each for each in header.findings if each.code == "kind-unsupported"]
        assert "enable_lora" in finding.message
        with pytest.raises(UnsupportedKind, match="MergedLinear"):
            load(header, registry)
    wrong = write({"c_attn.lora_A": randn(4, 6), "c_attn.lora_B": randn(8, 2)}, {"enable_lora": "[true, false]"})
    assert "kind-unsupported" in codes(open_header(wrong, registry))


def test_loralib_embeddings_are_stored_the_other_way_round(write: Write, registry: Registry) -> None:
    model = Loralib()
    a, b = randn(2, 10), randn(6, 2)
    header = open_header(write({"words.lora_A": a, "words.lora_B": b}), registry, index=index_of(model))
    assert header.reading.groups[0].role == "embedding"
    found = changes(header, registry, {"words.weight": model.words.weight})["words.weight"]
    assert close(found, (b @ a).T)
    named = open_header(write({"model.embed_tokens.lora_A": a, "model.embed_tokens.lora_B": b}), registry)
    assert named.reading.groups[0].role == "embedding"


def test_loralib_convolutions_are_a_view_of_the_product(write: Write, registry: Registry) -> None:
    model = Loralib()
    r, k = 2, 3
    a, b = randn(r * k, 4 * k), randn(6 // 2 * k, r * k)
    header = open_header(write({"conv.lora_A": a, "conv.lora_B": b}), registry, index=index_of(model))
    assert (header.kinds, header.ranks) == (("conv-view",), (2,))
    found = changes(header, registry, {"conv.weight": model.conv.weight})["conv.weight"]
    flat = [sum(float(b[i, n] * a[n, j]) for n in range(r * k)) for i in range(b.shape[0]) for j in range(a.shape[1])]
    assert close(found, torch.tensor(flat, dtype=torch.float64).reshape(6, 2, 3, 3))


def test_loralib_heads_replace_and_what_is_half_or_pruned_is_told(write: Write, registry: Registry) -> None:
    pair = {"query.lora_A": randn(2, 6), "query.lora_B": randn(8, 2)}
    header = open_header(write({**pair, "classifier.weight": randn(3, 8), "query.bias": randn(8)}), registry)
    assert {target.name for target in header.touches} == {"query.weight", "classifier.weight", "query.bias"}
    assert codes(header) == {"alpha-unknown"}
    header = open_header(write({**pair, "loose": randn(3), "key.lora_Z": randn(3)}), registry)
    assert [each.where for each in header.findings if each.code == "key-unknown"] == [("key.lora_Z", "loose")]
    assert "slot-missing" in codes(open_header(write({**pair, "key.lora_A": randn(2, 6)}), registry))
    pruned = open_header(write({**pair, "query.lora_E": randn(2, 1)}), registry)
    assert {"kind-unsupported", "key-unknown"} <= codes(pruned)


# ---- PEFT before 0.3

EARLY = {"peft_type": "LORA", "r": 2, "lora_alpha": 8, "fan_in_fan_out": True, "merge_weights": False, "bias": "none"}


@pytest.mark.parametrize("enabled", [[True, False, True], [True, True], [True, True, True]])
def test_early_peft_made_two_groups_whatever_it_enabled(write: Write, registry: Registry, enabled: list[bool]) -> None:
    n = sum(enabled)
    a, b = randn(2 * n, 6), randn(4 * n, n, 1)  # a convolution with groups=2 has n columns for 2 n inputs
    stem = "base_model.model.h.0.query_key_value"
    tensors = {f"{stem}.lora_A.weight": a, f"{stem}.lora_B.weight": b, "base_model.model.score.weight": randn(3, 6)}
    folder = write(tensors, None, {**EARLY, "enable_lora": enabled, "modules_to_save": ["score"]})
    header = open_header(folder, registry)
    assert (header.format, header.kinds, header.findings) == ("peft-merged", ("merged-lora", "replace"), ())
    weight = randn(4 * len(enabled), 6, seed=7)
    found = changes(header, registry, {"h.0.query_key_value.weight": weight})["h.0.query_key_value.weight"]
    assert close(found, 4.0 * merged_reference(a, b, enabled, 2))


def test_early_peft_configs_are_held_to_their_tensors(write: Write, registry: Registry) -> None:
    stem = "base_model.model.q"
    tensors = {f"{stem}.lora_A.weight": randn(4, 6), f"{stem}.lora_B.weight": randn(8, 2, 1)}
    early = {**EARLY, "enable_lora": [True, False, True]}
    assert "config-contradicts-tensors" in codes(open_header(write(tensors, None, {**early, "r": 3}), registry))
    assert "config-unknown" in codes(open_header(write(tensors, None, {**early, "odd": 1}), registry))
    loose = {**tensors, "base_model.model.loose.weight": randn(2)}
    assert "key-unknown" in codes(open_header(write(loose, None, early), registry))
    with pytest.raises(IntegrityError, match="enable_lora"):
        open_header(write(tensors, None, {**EARLY, "enable_lora": "q"}), registry)
    for listed in (None, [], False):  # as later releases up to 0.3 wrote it for plain LoRA
        plain = {f"{stem}.lora_A.weight": randn(2, 6), f"{stem}.lora_B.weight": randn(8, 2)}
        header = open_header(write(plain, None, {**EARLY, "enable_lora": listed}), registry)
        assert (header.format, header.kinds) == ("peft", ("lora",))


def test_a_head_that_the_task_implies_is_no_unknown_tensor(write: Write, registry: Registry) -> None:
    stem = "base_model.model.q"
    tensors = {f"{stem}.lora_A.weight": randn(2, 6), f"{stem}.lora_B.weight": randn(8, 2)}
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 8, "modules_to_save": None}
    for task, head in (("SEQ_CLS", "score"), ("TOKEN_CLS", "classifier"), ("QUESTION_ANS", "qa_outputs")):
        folder = write({**tensors, f"base_model.model.{head}.weight": randn(3, 6)}, None, {**config, "task_type": task})
        assert open_header(folder, registry).findings == ()
        folder = write({**tensors, f"base_model.model.{head}.weight": randn(3, 6)}, None, config)
        assert codes(open_header(folder, registry)) == {"key-unknown"}


def test_bone_is_read_as_miss(write: Write, registry: Registry) -> None:
    stem = "base_model.model.q"
    for init, block in ((True, randn(2, 8)), ("bat", randn(4, 2, 2))):
        config = {"peft_type": "BONE", "r": 2, "init_weights": init, "target_modules": ["q"], "task_type": None}
        header = open_header(write({f"{stem}.bone_block": block}, None, config), registry)
        assert (header.kinds, header.findings) == (("miss",), ())
        weight = randn(8, 6)
        found = changes(header, registry, {"q.weight": weight})["q.weight"]
        expected = torch.zeros(8, 6, dtype=torch.float64)
        for o in range(8):
            for i in range(6):
                if init is True:
                    expected[o, i] = block[i % 2, o]
                else:
                    piece = weight[o // 2 * 2 : o // 2 * 2 + 2, i // 2 * 2 : i // 2 * 2 + 2]
                    expected[o, i] = (piece @ block[o // 2] + block[o // 2])[o % 2, i % 2]
        assert close(found, expected)


# ---- cloneofsimo/lora


def walked(model: nn.Module, classes: set[str], search: tuple[type[nn.Module], ...]) -> list[str]:
    """The published walk over a live model: below each ancestor of those classes, every layer of those types."""
    names = {id(module): name for name, module in model.named_modules()}
    found = []
    for ancestor in model.modules():
        if type(ancestor).__name__ in classes:
            found += [names[id(each)] for _, each in ancestor.named_modules() if isinstance(each, search)]
    return found


def positional(model: nn.Module, names: Sequence[str], r: int = 2) -> list[torch.Tensor]:
    """Up, down, up, down ... with the sizes of those layers."""
    listed = []
    for seed, name in enumerate(names):
        weight = model.get_parameter(f"{name}.weight")
        ones = (1,) * (weight.dim() - 2)
        listed += [randn(weight.shape[0], r, *ones, seed=seed), randn(r, *weight.shape[1:], seed=seed + 99)]
    return listed


@pytest.fixture(scope="module")
def unet() -> nn.Module:
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        cross_attention_dim=12,
        attention_head_dim=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )


@pytest.fixture(scope="module")
def text_encoder() -> nn.Module:
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(0)
    return CLIPTextModel(
        CLIPTextConfig(vocab_size=20, hidden_size=8, intermediate_size=16, num_hidden_layers=12, num_attention_heads=2)
    )


def named(part: str, listed: Sequence[torch.Tensor], classes: Sequence[str]) -> tuple[dict[str, Any], dict[str, str]]:
    """As cloneofsimo's safetensors files have it."""
    tensors, metadata = {}, {part: json.dumps(list(classes))}
    for place in range(len(listed) // 2):
        tensors[f"{part}:{place}:up"], tensors[f"{part}:{place}:down"] = listed[2 * place], listed[2 * place + 1]
        metadata[f"{part}:{place}:rank"] = str(listed[2 * place + 1].shape[0])
    return tensors, metadata


@pytest.mark.parametrize(
    ("classes", "search"),
    [
        (("CrossAttention", "Attention", "GEGLU"), (nn.Linear,)),
        (("Attention",), (nn.Linear,)),
        (("ResnetBlock2D", "CrossAttention", "Attention", "GEGLU"), (nn.Linear, nn.Conv2d)),
    ],
    ids=["default", "attention", "extended"],
)
def test_positions_in_a_unet_are_those_of_the_published_walk(
    write: Write,
    registry: Registry,
    unet: nn.Module,
    classes: tuple[str, ...],
    search: tuple[type[nn.Module], ...],
) -> None:
    names = walked(unet, set(classes), search)
    listed = positional(unet, names)
    header = open_header(write(*named("unet", listed, classes)), registry, index=index_of(unet))
    assert (header.format, header.kinds, header.findings) == ("cloneofsimo", ("lora",), ())
    assert [group.module for group in header.reading.groups] == names
    found = changes(header, registry, {f"{name}.weight": unet.get_parameter(f"{name}.weight") for name in names})
    for place, name in enumerate(names):
        up, down = listed[2 * place], listed[2 * place + 1]
        assert close(found[f"{name}.weight"].flatten(1), up.flatten(1) @ down.flatten(1))


def test_positions_of_early_diffusers_have_the_feed_forward_layer_in_the_middle(
    write: Write, registry: Registry, unet: nn.Module
) -> None:
    names = walked(unet, {"Attention", "GEGLU"}, (nn.Linear,))
    early = []
    for start in range(0, len(names), 9):
        block = names[start : start + 9]
        early += [*block[:4], block[8], *block[4:8]]
    assert early != names
    header = open_header(
        write(*named("unet", positional(unet, early), ("Attention", "GEGLU"))), registry, index=index_of(unet)
    )
    assert [group.module for group in header.reading.groups] == early
    assert header.findings == ()


def test_a_bare_list_is_the_text_encoder_by_its_name_and_the_unet_without(
    write: Write, registry: Registry, unet: nn.Module, text_encoder: nn.Module
) -> None:
    for model, classes, name in (
        (text_encoder, {"CLIPAttention"}, "lora_x.text_encoder.safetensors"),
        (unet, {"Attention", "GEGLU"}, "lora_x.safetensors"),
        (unet, {"Attention"}, "lora_x.safetensors"),  # as its first release
        (unet, {"ResnetBlock2D", "Attention", "GEGLU"}, "lora_x.safetensors"),
    ):
        layers = (nn.Linear, nn.Conv2d) if "ResnetBlock2D" in classes else (nn.Linear,)
        names = walked(model, classes, layers)
        if model is text_encoder:  # transformers registers q, k, v, out today; when such files were made, k, v, q, out
            stems = dict.fromkeys(each.rpartition(".")[0] for each in names)
            names = [f"{stem}.{end}" for stem in stems for end in ("k_proj", "v_proj", "q_proj", "out_proj")]
        tensors = {f"{place:03d}": each for place, each in enumerate(positional(model, names))}
        header = open_header(write(tensors, name=name), registry, index=index_of(model))
        assert header.findings == ()
        assert [group.module for group in header.reading.groups] == names


def test_feed_forward_layers_of_a_text_encoder_follow_its_attention(
    write: Write, registry: Registry, text_encoder: nn.Module
) -> None:
    classes = ("CLIPAttention", "CLIPMLP")
    ends = ("self_attn.k_proj", "self_attn.v_proj", "self_attn.q_proj", "self_attn.out_proj", "mlp.fc1", "mlp.fc2")
    stems = dict.fromkeys(each.rsplit(".", 2)[0] for each in walked(text_encoder, set(classes), (nn.Linear,)))
    names = [f"{stem}.{end}" for stem in stems for end in ends]
    files = write(*named("text_encoder", positional(text_encoder, names), classes))
    header = open_header(files, registry, index=index_of(text_encoder))
    assert header.findings == ()
    assert [group.module for group in header.reading.groups] == names


def test_without_a_base_positions_stay_positions_and_nothing_is_loaded(
    write: Write, registry: Registry, text_encoder: nn.Module
) -> None:
    names = walked(text_encoder, {"CLIPAttention"}, (nn.Linear,))
    tensors, metadata = named("text_encoder", positional(text_encoder, names), ["CLIPAttention"])
    tensors["<token>"], metadata["<token>"] = randn(8), "<embed>"
    folder = write(tensors, metadata)
    header = open_header(folder, registry)
    assert [target.name for target in header.touches][:2] == ["text_encoder:0.weight", "text_encoder:1.weight"]
    assert list(header.reading.parts) == ["<token>"]
    assert codes(header) == {"base-needed", "kind-unsupported"}
    with pytest.raises(BaseNeeded, match="48 changes by position below CLIPAttention"):
        load(header, registry)
    placed = load(open_header(folder, registry, index=index_of(text_encoder)), registry)
    assert placed.deltas.keys() == {Target("", name, "weight") for name in names}


def test_positions_that_fit_no_walk_of_a_base_are_not_placed(
    write: Write, registry: Registry, unet: nn.Module, text_encoder: nn.Module
) -> None:
    names = walked(unet, {"Attention", "GEGLU"}, (nn.Linear,))
    fewer = named("unet", positional(unet, names[:-1]), ["Attention", "GEGLU"])
    (finding,) = open_header(write(*fewer), registry, index=index_of(unet)).findings
    assert (finding.code, finding.level) == ("layout-undeclared", Verdict.INCOMPATIBLE)
    listed = positional(unet, names)
    listed[0], listed[2] = listed[2][:3], listed[0]
    swapped = named("unet", listed, ["Attention", "GEGLU"])
    assert codes(open_header(write(*swapped), registry, index=index_of(unet))) == {"layout-undeclared"}
    whole = named("unet", positional(unet, names), ["Attention", "GEGLU"])
    header = open_header(write(*whole), registry, index=index_of(text_encoder))
    assert header.findings == ()  # that the base has no U-Net, placement says
    assert next(target.name for target in header.touches) == "unet:0.weight"


def test_positions_that_contradict_themselves_are_refused(write: Write, registry: Registry) -> None:
    good, metadata = named("unet", [randn(8, 2), randn(2, 6), randn(8, 2), randn(2, 6)], ["Attention"])
    for spoil, says in (
        ({"unet:1:up": None}, "unet:1 has only down"),
        ({"unet:1:down": randn(3, 6)}, "unet:1 has up"),
        ({"unet:5:up": randn(8, 2), "unet:5:down": randn(2, 6)}, "3 positions, the last 5"),
    ):
        tensors = {key: each for key, each in {**good, **spoil}.items() if each is not None}
        header = open_header(write(tensors, {"unet": metadata["unet"]}), registry)
        assert says in next(each.message for each in header.findings if each.code == "slot-misfit")
        with pytest.raises(IntegrityError):
            load(header, registry)
    assert "slot-misfit" in codes(open_header(write(good, {**metadata, "unet:0:rank": "4"}), registry))
    with pytest.raises(IntegrityError, match="no list of classes"):
        open_header(write(good, {"unet": "{}"}), registry)


# ---- LoRA-ViT and SAM


class Block(nn.Module):
    def __init__(self, *, fused: bool) -> None:
        super().__init__()
        self.attn = nn.Module()
        if fused:
            self.attn.qkv = nn.Linear(6, 12)
        else:
            self.attn.proj_q, self.attn.proj_k, self.attn.proj_v = (nn.Linear(6, 4) for _ in range(3))


class Vit(nn.Module):
    def __init__(self, count: int = 11, *, fused: bool = True, head: str = "head") -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(fused=fused) for _ in range(count))
        self.add_module(head, nn.Linear(6, 3))


def vit_factors(count: int = 11, r: int = 2) -> dict[str, torch.Tensor]:
    return {
        f"w_{side}_{at:03d}": randn(*size, seed=at)
        for at in range(2 * count)
        for side, size in (("a", (r, 6)), ("b", (4, r)))
    }


def test_lora_vit_changes_queries_and_values_as_its_forward_does(write: Write, registry: Registry) -> None:
    model, factors, x = Vit(), vit_factors(), randn(5, 6)
    header = open_header(write(factors), registry, index=index_of(model))
    assert (header.format, header.kinds, codes(header)) == ("lora-vit", ("qv-lora",), {"alpha-unknown"})
    found = changes(header, registry, dict(model.named_parameters()))
    assert len(found) == 11
    for at in range(11):
        qkv = torch.zeros(5, 12, dtype=torch.float64)
        qkv[:, :4] += x @ factors[f"w_a_{2 * at:03d}"].T @ factors[f"w_b_{2 * at:03d}"].T
        qkv[:, -4:] += x @ factors[f"w_a_{2 * at + 1:03d}"].T @ factors[f"w_b_{2 * at + 1:03d}"].T
        assert close(F.linear(x, found[f"blocks.{at}.attn.qkv.weight"]), qkv)


def test_lora_vit_finds_separate_projections_as_well(write: Write, registry: Registry) -> None:
    model, factors = Vit(3, fused=False), vit_factors(3)
    header = open_header(write(factors), registry, index=index_of(model))
    assert header.kinds == ("lora",)
    found = changes(header, registry, dict(model.named_parameters()))
    assert close(found["blocks.2.attn.proj_v.weight"], factors["w_b_005"] @ factors["w_a_005"])
    assert close(found["blocks.0.attn.proj_q.weight"], factors["w_b_000"] @ factors["w_a_000"])


@pytest.mark.parametrize(("alpha", "scale"), [(4, 2.0), (5, 2.0), (1, 0.0)])
def test_lora_vit_divides_alpha_as_an_integer(write: Write, registry: Registry, alpha: int, scale: float) -> None:
    header = open_header(write(vit_factors(2), {"lora_alpha": str(alpha)}), registry)
    assert {group.options["scale"] for group in header.reading.groups} == {scale}
    assert codes(header) == {"base-needed"} | ({"alpha-void"} if scale == 0 else set())


def test_lora_vit_places_only_what_fits_one_by_one(write: Write, registry: Registry) -> None:
    folder = write(vit_factors(3))
    with pytest.raises(BaseNeeded):
        load(open_header(folder, registry), registry)
    assert "layout-undeclared" in codes(open_header(folder, registry, index=index_of(Vit(4))))
    assert "layout-undeclared" not in codes(open_header(folder, registry, index=index_of(nn.Linear(2, 2))))
    factors = vit_factors(3)
    del factors["w_b_005"]
    assert "slot-misfit" in codes(open_header(write(factors), registry))
    assert "slot-misfit" in codes(open_header(write({**vit_factors(3), "w_b_000": randn(4, 3)}), registry))


@pytest.mark.parametrize("head", ["head", "fc"])
def test_lora_vit_heads_and_other_trained_parameters_replace(write: Write, registry: Registry, head: str) -> None:
    tensors = {**vit_factors(2), "fc_6in_3out": randn(3, 6), "mask_decoder.conv.weight": randn(2, 2), "loose": randn(1)}
    header = open_header(write(tensors), registry, index=index_of(Vit(2, head=head)))
    replaced = {target.name for target, touch in header.touches.items() if touch.replaces}
    assert replaced == {f"{head}.weight", "mask_decoder.conv.weight"}
    assert codes(header) == {"alpha-unknown", "head-without-bias", "key-unknown"}


# ---- (IA)3 without a config


def test_t_few_gains_multiply_what_a_layer_puts_out(write: Write, registry: Registry) -> None:
    layer, gain, x = nn.Linear(6, 8).double(), randn(8, 1), randn(5, 6)
    header = open_header(write({"k.multi_lora_b": gain, "norm.weight": randn(3)}), registry)
    assert (header.format, header.kinds, header.findings) == ("ia3-dump", ("ia3", "replace"), ())
    found = changes(header, registry, {"k.weight": layer.weight, "k.bias": layer.bias})
    changed = F.linear(x, layer.weight + found["k.weight"], layer.bias + found["k.bias"])
    assert close(changed, F.linear(x, layer.weight, layer.bias) * gain.flatten())


def test_gains_on_inputs_are_told_by_their_shape(write: Write, registry: Registry) -> None:
    layer, gain, x = nn.Linear(6, 8).double(), randn(1, 6), randn(5, 6)
    for key in ("wo.multi_lora_a", "wo.ia3_l", "base_model.model.wo.ia3_l.default"):
        header = open_header(write({key: gain}), registry)
        found = changes(header, registry, {"wo.weight": layer.weight})["wo.weight"]
        assert close(F.linear(x, layer.weight + found), F.linear(x * gain, layer.weight))


def test_gains_on_both_sides_and_of_no_shape_are_refused(write: Write, registry: Registry) -> None:
    both = open_header(write({"k.multi_lora_b": randn(8, 1), "k.multi_lora_a": randn(1, 6)}), registry)
    assert codes(both) == {"kind-unsupported"}
    assert "config-contradicts-tensors" in codes(open_header(write({"k.multi_lora_b": randn(8, 2)}), registry))


# ---- AdapterHub

HUB = {"model_name": "bert-base-uncased", "model_type": "bert", "model_class": "BertAdapterModel", "hidden_size": 6}
HUB_LORA = {
    "architecture": "lora",
    "alpha": 8,
    "attn_matrices": ["q", "v"],
    "composition_mode": "add",
    "dropout": 0.1,
    "dtype": None,
    "init_weights": "lora",
    "intermediate_lora": False,
    "leave_out": [],
    "output_lora": False,
    "r": 2,
    "selfattn_lora": True,
    "use_gating": False,
    "vera_b": None,
    "vera_d": None,
}


def hub(version: str = "adapters.1.2.0", **changed: Any) -> dict[str, Any]:
    return {**HUB, "name": "x", "version": version, "config": {**HUB_LORA, **changed}}


PAIR = {"bert.layer.0.query.loras.x.lora_A": randn(2, 6), "bert.layer.0.query.loras.x.lora_B": randn(8, 2)}


@pytest.mark.parametrize(
    ("version", "scale", "told"),
    [
        ("adapters.1.2.0", 4.0, set()),
        ("adapters.1.1.0", 4.0, set()),
        ("adapters.1.0.1", 1.0, {"alpha-void"}),
        ("adapters.0.2.1", 1.0, {"alpha-void"}),
        ("3.2.1", 4.0, set()),
        ("adapters.odd", 4.0, set()),
    ],
)
def test_adapterhub_lora_is_scaled_as_it_was_trained(
    write: Write, registry: Registry, version: str, scale: float, told: set[str]
) -> None:
    header = open_header(write(PAIR, None, hub(version), "adapter.safetensors"), registry)
    assert (header.format, header.kinds, codes(header)) == ("adapterhub", ("lora",), told)
    assert header.reading.base_repo == "bert-base-uncased"
    found = changes(header, registry, {"bert.layer.0.query.weight": randn(8, 6)})["bert.layer.0.query.weight"]
    a, b = PAIR.values()
    assert close(found, scale * (b @ a))


def test_adapterhub_fused_layers_and_gains(write: Write, registry: Registry) -> None:
    stem, a, b = "h.0.attn.c_attn.loras.x", randn(4, 6), randn(8, 2)
    header = open_header(write({f"{stem}.lora_A": a, f"{stem}.lora_B": b}, None, hub()), registry)
    found = changes(header, registry, {"h.0.attn.c_attn.weight": randn(12, 6)})["h.0.attn.c_attn.weight"]
    assert close(found, 4.0 * merged_reference(a, b, [True, False, True], 2))
    one = {f"{stem}.lora_A": randn(2, 6), f"{stem}.lora_B": randn(4, 2)}
    base = nn.Module()
    base.h = nn.ModuleList([nn.Module()])
    base.h[0].attn = nn.Module()
    base.h[0].attn.c_attn = nn.Linear(6, 12)
    header = open_header(write(one, None, hub(attn_matrices=["k"])), registry, index=index_of(base))
    assert header.reading.groups[0].options["enabled"] == [False, True, False]
    scaled = hub(composition_mode="scale", r=1, alpha=1, init_weights="ia3", attn_matrices=["k", "v"])
    gain, layer, x = randn(8, 1), nn.Linear(6, 8).double(), randn(5, 6)
    header = open_header(write({"key.loras.x.lora_B": gain}, None, scaled), registry)
    assert (header.kinds, header.findings) == (("ia3",), ())
    found_all = changes(header, registry, {"key.weight": layer.weight, "key.bias": layer.bias})
    changed = F.linear(x, layer.weight + found_all["key.weight"], layer.bias + found_all["key.bias"])
    assert close(changed, F.linear(x, layer.weight, layer.bias) * gain.view(-1))


@pytest.mark.parametrize(
    ("changed", "code"),
    [
        ({"use_gating": True}, "kind-unsupported"),
        ({"vera_d": 0.1}, "config-refused"),
        ({"architecture": "mtl_lora"}, "kind-unsupported"),
        ({"r": 4}, "config-contradicts-tensors"),
        ({"odd_field": 3}, "config-unknown"),
    ],
)
def test_adapterhub_settings_that_change_the_arithmetic_are_refused(
    write: Write, registry: Registry, changed: Mapping[str, Any], code: str
) -> None:
    header = open_header(write(PAIR, None, hub(**changed)), registry)
    assert code in codes(header)
    assert max(each.level for each in header.findings) >= Verdict.DEGRADED


@pytest.mark.parametrize(
    ("key", "part"),
    [
        ("bert.layer.0.output.adapters.x.adapter_down.0.weight", "bottleneck"),
        ("bert.layer.0.output.layer_text_task_adapters.x.adapter_up.weight", "bottleneck"),
        ("bert.layer.0.output.adapter_fusion_layer.x,y.query.weight", "adapter-fusion"),
        ("bert.invertible_adapters.x.F.0.weight", "invertible"),
        ("bert.prefix_tuning.prefix_tunings.x.self_prefix.wte.weight", "prefix-tuning"),
        ("bert.prompt_tuning.prompt_tunings.x.prompt_embedding.weight", "prompt-tuning"),
        ("bert.layer.0.refts.x.units.0.projection.weight", "reft"),
        ("bert.shared_parameters.x.phm_rule", "shared"),
    ],
)
def test_adapterhub_parts_are_packaged_and_stop_a_merge_by_name(
    write: Write, registry: Registry, key: str, part: str
) -> None:
    config = {**hub(), "config": {"architecture": None, "reduction_factor": 16}}
    header = open_header(write({key: randn(2, 2)}, None, config), registry)
    assert (list(header.reading.parts), header.kinds) == ([part], ())
    with pytest.raises(UnsupportedKind, match="cannot be merged"):
        load(header, registry)
    union = {**hub(), "config": {"architecture": "union", "configs": [{"architecture": "prefix_tuning"}, HUB_LORA]}}
    header = open_header(write({**PAIR, key: randn(2, 2)}, None, union), registry)
    assert (list(header.reading.parts), header.kinds) == ([part], ("lora",))
    assert [each.level for each in header.findings] == [Verdict.DEGRADED]


def test_adapterhub_names_what_it_does_not_know(write: Write, registry: Registry) -> None:
    header = open_header(write({**PAIR, "bert.odd.weight": randn(2)}, None, hub()), registry)
    assert codes(header) == {"key-unknown"}
    named_only = {**hub(), "config": "lora"}
    assert "kind-unsupported" in codes(open_header(write(PAIR, None, named_only), registry))
    with pytest.raises(IntegrityError, match="config is"):
        open_header(write(PAIR, None, {**hub(), "config": 3}), registry)


# ---- all of them


def test_a_state_dict_of_whole_parameters_is_named_and_sent_to_extract(write: Write, registry: Registry) -> None:
    tensors = {"model.layers.0.q_proj.weight": randn(2, 2), "model.norm.weight": randn(2), "lm_head.bias": randn(2)}
    with pytest.raises(UnsupportedFormat, match="whole parameters of a model") as refusal:
        open_header(write(tensors), registry)
    assert "lorahub extract" in refusal.value.hint


SAMPLES: Mapping[str, tuple[Mapping[str, torch.Tensor], Mapping[str, Any] | None]] = {
    "loralib": ({"q.lora_A": randn(2, 6), "q.lora_B": randn(8, 2)}, None),
    "peft-merged": (
        {"base_model.model.q.lora_A.weight": randn(4, 6), "base_model.model.q.lora_B.weight": randn(8, 2, 1)},
        {**EARLY, "enable_lora": [True, False, True]},
    ),
    "cloneofsimo": ({"unet:0:up": randn(8, 2), "unet:0:down": randn(2, 6)}, None),
    "lora-vit": (vit_factors(1), None),
    "ia3-dump": ({"k.multi_lora_b": randn(8, 1)}, None),
    "adapterhub": (PAIR, hub()),
}


def test_every_one_is_inspected_without_torch(write: Write) -> None:
    folders = {name: write(tensors, None, config) for name, (tensors, config) in SAMPLES.items()}
    script = (
        "import sys\n"
        "sys.modules['torch'] = None\n"
        "from lorahub.adapter import open_header\n"
        "from lorahub.plugins import load_registry\n"
        "registry = load_registry()\n"
        "for folder in sys.argv[1:]: print(open_header(folder, registry).format)\n"
    )
    done = subprocess.run([sys.executable, "-c", script, *folders.values()], capture_output=True, text=True, check=True)
    assert done.stdout.split() == list(folders)


SHAPES = st.lists(st.integers(0, 4), max_size=4).map(tuple)


@settings(max_examples=300)
@given(st.data())
def test_no_shapes_and_no_statements_do_more_than_make_findings(registry: Registry, data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(sorted(SAMPLES)))
    keys, config = SAMPLES[name]
    extra = [key.replace("0", "1") for key in keys] + ["q.bias", "fc_6in_3out", "a.b.c", "unet:0:up"]
    chosen = [*keys, *data.draw(st.lists(st.sampled_from(extra), unique=True))]
    tensors = {key: TensorInfo("F32", data.draw(SHAPES), 0, 0) for key in chosen}
    said = st.sampled_from(["4", "0", "-1", "[true]", "[true,false,true]", "[]", "{}", "NaN", '"x"', "1e400"])
    names = st.sampled_from(["lora_alpha", "enable_lora", "r", "unet", "unet:0:rank"])
    metadata = data.draw(st.dictionaries(names, said))
    values = st.sampled_from([0, 1, None, [], [True]])
    changed = data.draw(st.dictionaries(st.sampled_from(["r", "lora_alpha", "enable_lora"]), values))
    configs = {} if config is None else {"adapter_config.json": {**config, **changed}}
    header = Header(tensors=tensors, metadata=metadata, data_start=0, size=0)
    files = AdapterFiles(folder=Path(), headers={"x": header}, configs=configs)
    for index in (None, index_of(Loralib())):
        try:
            found = recognise(files, registry, index=index)
        except LorahubError:
            continue
        told = {key for finding in found.findings for key in finding.where}
        used = {ref.key for group in found.reading.groups for ref in group.slots.values()}
        assert set(chosen) <= told | used


@pytest.mark.parametrize("name", SAMPLES)
def test_no_one_writes_what_it_has_no_words_for(registry: Registry, name: str) -> None:
    with pytest.raises(CannotCarry) as refusal:
        registry.format(name).write({}, (), {})
    assert refusal.value.hint
