"""The table of fused projections against the classes: each is called with the number of every row in its place.

A class is taken out of a model on the meta device, what it is made of passes things on, and its fused layer gives the
number of each row.  What its products, or its activation, are then given tells which rows are queries, keys, values or
gates, and in which order.
"""

from __future__ import annotations

import copy
import inspect
import json
import warnings
from collections.abc import Iterator, Mapping
from functools import cache
from importlib import import_module
from typing import Any

import pytest
import torch
import transformers
from architectures import KINDS, UNBUILT, on_meta
from torch import nn
from torch.overrides import TorchFunctionMode

from lorahub.bases.index import BaseIndex, BaseRef
from lorahub.bases.layout import Target
from lorahub.bases.torch_module import live_entries
from lorahub_transformers.fused import fused_layouts, parts_of
from lorahub_transformers.fusions import FUSED

BY_CLASS: dict[str, tuple[str, dict[str, Any]]] = {
    "blip_2_vision_model": ("Blip2VisionModel", {}),
    "blip_vision_model": ("BlipVisionModel", {}),
    "bridgetower_vision_model": ("models.bridgetower.modeling_bridgetower.BridgeTowerVisionModel", {}),
    "coarse_acoustics": ("BarkCoarseModel", {}),
    "colmodernvbert": ("ColModernVBertForRetrieval", {}),
    "colqwen2": ("ColQwen2ForRetrieval", {}),
    "dbrx": ("DbrxModel", {"attn_config": {"kv_n_heads": 2, "rope_theta": 1e4}, "n_layers": 1}),
    "deepseek_ocr2_sam_vision_model": (
        "models.deepseek_ocr2.modeling_deepseek_ocr2.DeepseekOcr2SamVisionEncoder",
        {},
    ),
    "deepseek_ocr2_vision": ("models.deepseek_ocr2.modeling_deepseek_ocr2.DeepseekOcr2VisionModel", {}),
    "dia_decoder": ("models.dia.modeling_dia.DiaDecoder", {}),
    "dia_encoder": ("models.dia.modeling_dia.DiaEncoder", {}),
    "dots3_note_audio_encoder": ("models.dots3_note.modeling_dots3_note.Dots3NoteAudioModel", {}),
    "dots3_note_vision_encoder": ("models.dots3_note.modeling_dots3_note.Dots3NoteVisionModel", {}),
    "ernie4_5_vl_moe_vision": (
        "models.ernie4_5_vl_moe.modeling_ernie4_5_vl_moe.Ernie4_5_VLMoeVisionTransformerPretrainedModel",
        {},
    ),
    "fine_acoustics": ("BarkFineModel", {}),
    "florence_vision": ("models.florence2.modeling_florence2.Florence2VisionBackbone", {}),
    "got_ocr2_vision": ("models.got_ocr2.modeling_got_ocr2.GotOcr2VisionEncoder", {}),
    "instructblip_vision_model": ("InstructBlipVisionModel", {}),
    "instructblipvideo_vision_model": ("InstructBlipVideoVisionModel", {}),
    "granitemoeshared": ("GraniteMoeSharedModel", {"shared_intermediate_size": 64, "num_hidden_layers": 2}),
    "phi4_multimodal_audio": ("models.phi4_multimodal.modeling_phi4_multimodal.Phi4MultimodalAudioModel", {}),
    "phi4_multimodal_vision": ("models.phi4_multimodal.modeling_phi4_multimodal.Phi4MultimodalVisionModel", {}),
    "pp_formulanet": ("models.pp_formulanet.modeling_pp_formulanet.PPFormulaNetModel", {}),
    "pp_formulanet_vision": ("models.pp_formulanet.modeling_pp_formulanet.PPFormulaNetVisionModel", {}),
    "qwen2_vl_vision": ("models.qwen2_vl.modeling_qwen2_vl.Qwen2VisionTransformerPretrainedModel", {}),
    "qwen3_omni_moe": ("Qwen3OmniMoeForConditionalGeneration", {"enable_audio_output": False}),
    "qwen3_omni_moe_vision_encoder": ("models.qwen3_omni_moe.modeling_qwen3_omni_moe.Qwen3OmniMoeVisionEncoder", {}),
    "semantic": ("BarkSemanticModel", {}),
    "shieldgemma2": ("ShieldGemma2ForImageClassification", {}),
    "slanext": ("models.slanext.modeling_slanext.SLANeXtBackbone", {}),
    "slanext_vision": ("models.slanext.modeling_slanext.SLANeXtVisionEncoder", {}),
    "unlimited_ocr_sam_vision_model": (
        "models.unlimited_ocr.modeling_unlimited_ocr.UnlimitedOcrSamVisionEncoder",
        {},
    ),
    "unlimited_ocr_vision": ("models.unlimited_ocr.modeling_unlimited_ocr.UnlimitedOcrVisionModel", {}),
}
"""Architectures that are a part of others, or need settings: their class."""


@cache
def built(kind: str) -> tuple[Any, BaseIndex]:
    """A model on the meta device, and as much of its index as layouts ask for."""
    if kind not in BY_CLASS:
        model = on_meta(kind)
    else:
        name, settings = BY_CLASS[kind]
        place, _, last = name.rpartition(".")
        owner: Any = transformers
        for part in place.split(".") if place else []:
            owner = getattr(owner, part)
        chosen = getattr(owner, last)
        with torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = chosen(chosen.config_class(**settings))
    entries, tied = live_entries(model)
    config = json.loads(model.config.to_json_string())
    return model, BaseIndex(ref=BaseRef(), framework="transformers", parameters=entries, tied=tied, config=config)


WHOLE = frozenset(
    {
        "Attention",
        "BloomAttention",
        "CodeGenAttention",
        "DbrxAttention",
        "DisentangledSelfAttention",
        "DecisionTransformerGPT2Attention",
        "FalconAttention",
        "GPT2Attention",
        "GPTBigCodeAttention",
        "GPTNeoXAttention",
        "GPTNeoXJapaneseAttention",
        "ImageGPTAttention",
        "ModernBertAttention",
        "MptAttention",
        "PersimmonAttention",
        "Phi3Attention",
    }
)
"""Classes that ``test_fused.py`` holds to the table in models that run as a whole."""

FLAT: dict[str, str] = {
    "CohereCompassVisionAttention": "cohere_compass_vision",
    "Dots3NoteVisionAttention": "dots3_note_vision_encoder",
    "Ernie4_5_VLMoeVisionAttention": "ernie4_5_vl_moe_vision",
    "Exaone4_5_VisionAttention": "exaone4_5_vision",
    "Glm4vMoeVisionAttention": "glm4v_moe_vision",
    "Glm4vVisionAttention": "glm4v_vision",
    "Glm5NextVisionAttention": "glm5_next_vision",
    "GlmImageVisionAttention": "glm_image_vision",
    "GlmOcrVisionAttention": "glm_ocr_vision",
    "Qwen2_5_VLVisionAttention": "qwen2_5_vl_vision",
    "Qwen3OmniMoeVisionAttention": "qwen3_omni_moe_vision_encoder",
    "Qwen3VLMoeVisionAttention": "qwen3_vl_moe_vision",
    "Qwen3VLVisionAttention": "qwen3_vl_vision",
    "Qwen3_5MoeVisionAttention": "qwen3_5_moe_vision",
    "Qwen3_5VisionAttention": "qwen3_5_vision",
    "Qwen4ExpVisionAttention": "qwen4_exp_vision",
    "VisionAttention": "qwen2_vl_vision",
}
"""Attention over patches of all pictures in one row -> an architecture that has it."""

GRIDS: dict[str, str] = {
    "DeepseekOcr2SamVisionSdpaAttention": "deepseek_ocr2_vision",
    "Florence2VisionWindowAttention": "florence_vision",
    "GotOcr2VisionAttention": "got_ocr2_vision",
    "PPFormulaNetVisionAttention": "pp_formulanet_vision",
    "SLANeXtVisionAttention": "slanext_vision",
    "Sam2MultiScaleAttention": "sam2_hiera_det_model",
    "SamHQVisionSdpaAttention": "sam_hq_vision_model",
    "SamVisionSdpaAttention": "sam_vision_model",
    "SegGptAttention": "seggpt",
    "UnlimitedOcrSamVisionSdpaAttention": "unlimited_ocr_vision",
    "VitDetAttention": "vitdet",
}
"""Attention over patches in rows and columns."""

ROWS: dict[str, str] = {
    "BarkSelfAttention": "semantic",
    "Blip2Attention": "blip_2_vision_model",
    "BlipAttention": "blip_vision_model",
    "Florence2VisionChannelAttention": "florence_vision",
    "HieraMaskUnitAttention": "hiera",
    "InstructBlipAttention": "instructblip_vision_model",
    "InstructBlipVideoAttention": "instructblipvideo_vision_model",
    "MgpstrAttention": "mgp-str",
    "MiniMaxLightningAttention": "minimax",
    "Phi4MultimodalAttention": "phi4_multimodal",
    "TimesformerSelfAttention": "timesformer",
}
"""Attention over sequences in a batch."""

LINEAR: dict[str, str] = {
    "Qwen3NextGatedDeltaNet": "qwen3_next",
    "Qwen3_5GatedDeltaNet": "qwen3_5_text",
    "Qwen3_5MoeGatedDeltaNet": "qwen3_5_moe_text",
}
"""Attention by a state that is updated at each step."""

GATES: dict[str, str] = {
    "DiaMLP": "dia_encoder",
    "Dots3NoteAudioMLP": "dots3_note_audio_encoder",
    "Glm4MLP": "glm4",
    "Glm4vTextMLP": "glm4v_text",
    "GlmImageTextMLP": "glm_image_text",
    "GlmMLP": "glm",
    "GlmOcrTextMLP": "glm_ocr_text",
    "GraniteMoeHybridMLP": "granitemoehybrid",
    "GraniteMoeSharedMLP": "granitemoeshared",
    "MiniMaxM3VLDenseMLP": "minimax_m3_vl_text",
    "ModernBertDecoderMLP": "modernbert-decoder",
    "ModernBertMLP": "modernbert",
    "Phi3MLP": "phi3",
    "Phi4MultimodalAudioMLP": "phi4_multimodal_audio",
    "Phi4MultimodalMLP": "phi4_multimodal",
    "Zamba2MLP": "zamba2",
}
"""Feed-forwards with gates."""


class Numbers(nn.Module):
    """In the place of a fused layer: gives the number of each row."""

    def __init__(self, rows: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(rows, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = len(self.weight)
        return torch.arange(1.0, rows + 1).expand(*x.shape[:-1], rows).clone()


class Nothing(nn.Module):
    """In the place of another linear layer."""

    def __init__(self, rows: int) -> None:
        super().__init__()
        self.rows = rows

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.zeros(*x.shape[:-1], self.rows)


class Kept(nn.Module):
    """In the place of an activation or a norm: passes its first input on and keeps all of them."""

    def __init__(self) -> None:
        super().__init__()
        self.given: list[torch.Tensor] = []

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        self.given += inputs
        return inputs[0]


class Products(TorchFunctionMode):
    """Keeps what goes into products and into attention."""

    def __init__(self) -> None:
        super().__init__()
        self.given: list[torch.Tensor] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name in {"matmul", "bmm", "baddbmm", "__matmul__", "scaled_dot_product_attention"}:
            self.given += [each.detach() for each in [*args, *(kwargs or {}).values()] if torch.is_tensor(each)]
        return func(*args, **(kwargs or {}))


def fused_in(kind: str, name: str) -> dict[str, tuple[Any, dict[str, list[int]]]]:
    """What the first of this class in an architecture has fused -> that module, and each projection's rows."""
    model, index = built(kind)
    found: dict[str, tuple[Any, dict[str, list[int]]]] = {}
    first = None
    for fused, part in parts_of(index):
        place = fused if name == "MultiheadAttention" else fused.rpartition(".")[0]
        owner = model.get_submodule(place)
        if type(owner).__name__ != name or first not in (None, place):
            continue
        first = place
        ((_, layout),) = fused_layouts(index, [Target("", part, "weight")])
        (piece,) = layout.pieces
        assert not piece.of_parameter.transposed
        rows = piece.of_parameter.rows
        numbers = range(index.parameters[piece.parameter].shape[0])
        taken = [*numbers[rows]] if isinstance(rows, slice) else [*rows]
        found.setdefault(fused, (owner, {}))[1][part.rpartition(".")[2]] = taken
    assert found, f"no {name} in {kind}"
    for _, parts in found.values():  # every row belongs to one projection
        assert sorted(row for rows in parts.values() for row in rows) == list(range(sum(map(len, parts.values()))))
    return found


def passing(module: Any, fused: str) -> Any:
    """The module with numbers for its fused layer, and nothing else that changes anything."""
    made = copy.deepcopy(module)
    for path, child in list(made.named_modules()):
        if not path or list(child.children()):
            continue
        owner, last = made.get_submodule(path.rpartition(".")[0]), path.rpartition(".")[2]
        if path == fused:
            setattr(owner, last, Numbers(len(child.weight)))
        elif isinstance(child, nn.Linear):
            setattr(owner, last, Nothing(child.out_features))
        elif "Norm" in type(child).__name__ or not list(child.parameters()):
            setattr(owner, last, Kept())
    made.to_empty(device="cpu")
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.zero_()
        for buffer in made.buffers():
            buffer.fill_(1)
    return made.eval()


def called(module: Any, hidden: torch.Tensor) -> None:
    """Call an attention in the way that its signature asks for."""
    head = getattr(module, "head_dim", 8)
    turns = torch.ones(*hidden.shape[:-1], head), torch.zeros(*hidden.shape[:-1], head)
    known = {
        "attention_mask": None,
        "cu_seqlens": torch.tensor([0, len(hidden)], dtype=torch.int32),
        "position_embeddings": turns,
    }
    asked = inspect.signature(module.forward).parameters
    with torch.no_grad():
        module(hidden, **{name: value for name, value in known.items() if name in asked})


def looked_at(given: list[torch.Tensor]) -> Iterator[list[float]]:
    """The numbers in tensors, all of them and those of the first position, each one once."""
    for tensor in given:
        cuts = (tensor[..., :1, :], tensor[..., :1]) if tensor.dim() > 1 else ()
        for cut in (tensor, *cuts):
            yield list(dict.fromkeys(cut.flatten().tolist()))


def is_among(rows: list[int], given: list[torch.Tensor], *, scaled: bool) -> bool:
    """Whether one of the tensors holds these rows, in this order; scaled where queries and keys may be."""
    wanted = torch.tensor(rows, dtype=torch.float64) + 1
    for numbers in looked_at(given):
        if len(numbers) != len(rows):
            continue
        found = torch.tensor(numbers, dtype=torch.float64)
        if torch.allclose(found / (found[0] / wanted[0] if scaled else 1), wanted, rtol=1e-5, atol=0):
            return True
    return False


SHAPES = {"flat": (FLAT, (64,)), "grid": (GRIDS, (1, 4, 4)), "rows": (ROWS, (1, 64))}
USUAL = ("BlipAttention", "Exaone4_5_VisionAttention", "Qwen2_5_VLVisionAttention", "SamVisionSdpaAttention")


def some(names: Mapping[str, str], *usual: str) -> list[Any]:
    """All classes, of which the default run takes these."""
    return [pytest.param(name, marks=() if name in usual else pytest.mark.slow) for name in names]


@pytest.mark.parametrize("name", some({**FLAT, **GRIDS, **ROWS}, *USUAL))
def test_queries_keys_and_values_are_the_rows_that_products_take(name: str) -> None:
    names, shape = next((names, shape) for names, shape in SHAPES.values() if name in names)
    ((fused, (owner, parts)),) = fused_in(names[name], name).items()
    module = passing(owner, fused.rpartition(".")[2])
    width = built(names[name])[1].parameters[f"{fused}.weight"].shape[1]
    with Products() as products:
        called(module, torch.zeros(*shape, width))
    assert parts.keys() == {"q_proj", "k_proj", "v_proj"}
    for part, rows in parts.items():
        assert is_among(rows, products.given, scaled=part != "v_proj"), f"{part}: no product takes these rows"


def test_a_pooling_attention_of_torch_keeps_queries_keys_and_values_one_after_the_other(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ((_, (owner, parts)),) = fused_in("siglip_vision_model", "MultiheadAttention").items()
    module = copy.deepcopy(owner).to_empty(device="cpu")
    seen: list[torch.Tensor] = []

    def attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_args: Any) -> torch.Tensor:
        seen.extend([query, key, value])
        return value

    monkeypatch.setattr(nn.functional, "scaled_dot_product_attention", attention)
    with torch.no_grad():
        module.in_proj_weight.zero_()
        module.in_proj_bias.copy_(torch.arange(1.0, len(module.in_proj_bias) + 1))
    hidden = torch.zeros(1, 4, module.embed_dim)
    module(hidden, hidden, hidden, need_weights=False)  # without gradients torch would compute it in one kernel
    assert len(seen) == 3
    for (part, rows), tensor in zip(parts.items(), seen, strict=True):
        assert is_among(rows, [tensor.detach()], scaled=False), part


@pytest.mark.parametrize("name", some(GATES, "ModernBertMLP", "Phi4MultimodalAudioMLP"))
def test_gates_are_the_rows_that_the_activation_is_given(name: str) -> None:
    ((fused, (owner, parts)),) = fused_in(GATES[name], name).items()
    module = passing(owner, fused.rpartition(".")[2])
    seen: list[torch.Tensor] = []

    class Activations(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if getattr(func, "__name__", "") == "sigmoid":  # the one class that has no module for it
                seen.append(args[0])
            return func(*args, **(kwargs or {}))

    if hasattr(module, "swiglu_limit"):
        module.swiglu_limit, module.swiglu_alpha = 1e9, 1.0
    hidden = torch.zeros(1, 1, built(GATES[name])[1].parameters[f"{fused}.weight"].shape[1])
    with torch.no_grad(), Activations():
        module(hidden, *list(getattr(module, "layer_dic", ()))[:1])  # some ask which layer of theirs is called
    seen += [each for child in module.modules() if isinstance(child, Kept) for each in child.given]
    assert parts.keys() == {"gate_proj", "up_proj"}
    assert is_among(parts["gate_proj"], seen, scaled=False)
    assert not is_among(parts["up_proj"], seen, scaled=False)


@pytest.mark.parametrize("name", some(LINEAR, "Qwen3NextGatedDeltaNet"))
def test_a_linear_attention_is_given_its_rows_and_its_gates(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found = fused_in(LINEAR[name], name)
    seen: dict[str, torch.Tensor] = {}

    def rule(query: Any, key: Any, value: Any, *, g: Any, beta: Any, **_more: Any) -> Any:
        seen.update(q_proj=query, k_proj=key, v_proj=value, in_proj_a=g, in_proj_b=beta)
        return value, None

    for fused, (owner, parts) in found.items():
        place = import_module(type(owner).__module__)
        monkeypatch.setattr(place, "causal_conv1d_fn", lambda x, *_args, **_more: x)
        monkeypatch.setattr(place, "torch_chunk_gated_delta_rule", rule)
        module = passing(owner, fused.rpartition(".")[2])
        module.norm = Kept()
        called(module, torch.zeros(1, 4, built(LINEAR[name])[1].parameters[f"{fused}.weight"].shape[1]))
        seen["in_proj_z"] = module.norm.given[1].reshape(1, 4, -1)
        # a rate is the softplus of its row, negated, and a gate of the rule its sigmoid
        given = {"in_proj_a": lambda x: -nn.functional.softplus(x), "in_proj_b": torch.sigmoid}
        for part, rows in parts.items():
            wanted = given.get(part, lambda x: x)(torch.tensor(rows, dtype=torch.float32) + 1)
            torch.testing.assert_close(seen[part][0, 0].flatten(), wanted, rtol=1e-6, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("kind", sorted({kind for fused in FUSED for kind in fused.kinds}))
def test_every_architecture_of_the_table_has_the_classes_that_were_called(kind: str) -> None:
    model, index = built(kind)
    assert index.config["model_type"] == kind
    entries = {fused.module: fused for fused in FUSED if kind in fused.kinds}
    met: set[str] = set()
    for module, _ in parts_of(index):
        (entry,) = [each for each in entries if f".{module}".endswith(f".{each}")]
        met.add(entry)
        owner = model.get_submodule(module if entries[entry].own else module.rpartition(".")[0])
        assert type(owner).__name__ in {*WHOLE, *FLAT, *GRIDS, *ROWS, *LINEAR, *GATES, "MultiheadAttention"}
    assert met == entries.keys()


@pytest.mark.slow
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in UNBUILT])
def test_no_architecture_keeps_one_of_these_classes_without_an_entry(kind: str) -> None:
    model, index = built(kind)
    declared = {module for module, _ in parts_of(index)}
    known = {*FLAT, *GRIDS, *ROWS, *LINEAR, *GATES}
    for path, module in model.named_modules():
        if type(module).__name__ in known and type(module).__module__.startswith("transformers."):
            assert any(each.startswith(f"{path}.") for each in declared), f"{path}, a {type(module).__name__}"
