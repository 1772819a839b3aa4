"""Every architecture of transformers, on the meta device, with few layers; and what a checkpoint of it looks like."""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers.models.auto.modeling_auto import MODEL_MAPPING, MODEL_MAPPING_NAMES

from lorahub.bases.framework import BaseFiles
from lorahub.files.dtypes import from_torch
from lorahub.files.header import Header, TensorInfo
from lorahub_transformers.converting import stored_shapes

__all__ = ["KINDS", "SETTINGS", "UNBUILT", "checkpoint", "class_of", "on_meta"]

UNBUILT = {
    "aya_vision": "the defaults of its two parts do not fit",
    "chameleon": "its vocabulary has no default",
    "cohere_compass": "its rotary settings have no default",
    "cohere_compass_text": "its rotary settings have no default",
    "dbrx": "transformers reads a setting that its configuration lacks",
    "deepseek_ocr2": "settings without a default",
    "diffusion_gemma": "settings without a default",
    "dinat": "needs natten",
    "emu3": "its vocabulary has no default",
    "granite4_vision": "settings without a default",
    "higgs_audio_v2_tokenizer": "needs torchaudio",
    "layoutlmv2": "needs detectron2",
    "moonshine_streaming": "transformers reads a setting that its configuration lacks",
    "musicgen": "made of other models, and has no configuration of its own",
    "musicgen_melody": "made of other models, and has no configuration of its own",
    "perception_lm": "settings without a default",
    "pp_ocrv6_medium_det": "settings without a default",
    "qwen4_exp": "settings without a default",
    "qwen4_exp_text": "settings without a default",
    "t5gemma2_encoder": "its configuration is another class's",
    "timm_backbone": "a model of timm, which its own plugin knows",
    "voxtral_realtime_text": "the library names a class that it does not have",
}
"""``model_type`` -> why transformers does not build it from a configuration of its own."""

_COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
_FEW = 2
_EXPERTS = frozenset({"moe_num_experts", "n_routed_experts", "num_experts", "num_local_experts"})
_SOME = 8

_HEAD_DIM: dict[str, Any] = {"head_dim": 128}

SETTINGS: dict[str, dict[str, Any]] = {
    "autoformer": {"prediction_length": 4, "context_length": 8},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1},
    "esm": {"vocab_size": 33},
    "hunyuan_v1_dense": _HEAD_DIM,
    "hunyuan_v1_moe": _HEAD_DIM,
    "hunyuan_vl": {"text_config": _HEAD_DIM},
    "hunyuan_vl_text": _HEAD_DIM,
    "informer": {"prediction_length": 4, "context_length": 8},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_hidden_layers": 2},
    "ministral": _HEAD_DIM,
    "nemotron": {"num_key_value_heads": 8},
    "time_series_transformer": {"prediction_length": 4, "context_length": 8},
}
"""What a configuration needs besides its defaults."""

WHOLE = frozenset({"sam3_lite_text_text_model"})
"""Architectures whose first and last layers are of another kind than those between them."""

KINDS = sorted(MODEL_MAPPING_NAMES)
"""Every ``model_type`` with a model."""


def class_of(kind: str) -> Any:
    """The bare model's class."""
    found = MODEL_MAPPING[transformers.CONFIG_MAPPING[kind]]
    return found[0] if isinstance(found, (list, tuple)) else found


def on_meta(kind: str, name: str = "") -> Any:
    """A model of the default configuration, and ``SETTINGS``, on the meta device, with few layers where that works."""
    with warnings.catch_warnings(), torch.device("meta"):
        warnings.simplefilter("ignore")
        chosen = getattr(transformers, name) if name else class_of(kind)
        config = transformers.CONFIG_MAPPING[kind](**SETTINGS.get(kind, {}))
        if kind in WHOLE:
            return chosen(config).eval()
        try:
            few = _shallow(copy.deepcopy(config))
            return chosen(type(few).from_dict(few.to_dict())).eval()  # as it will be read from a file
        except Exception:  # noqa: BLE001 - whatever a constructor says to fewer layers, it takes its defaults
            return chosen(config).eval()


def _shallow(config: Any) -> Any:
    """The configuration with two layers, or as many as it takes to have each of its kinds."""
    for value in list(vars(config).values()):
        if isinstance(value, transformers.PretrainedConfig):
            _shallow(value)
    for key in _EXPERTS & vars(config).keys():
        if isinstance(vars(config)[key], int):
            setattr(config, key, min(vars(config)[key], _SOME))
    count = next((each for each in _COUNTS if isinstance(vars(config).get(each), int)), "")
    if not count or getattr(config, count) <= _FEW:
        return config
    before = getattr(config, count)
    lists = {key: value for key, value in vars(config).items() if isinstance(value, list) and len(value) == before}
    few = _FEW
    for value in lists.values():
        kinds = [json.dumps(each) for each in value]
        few = max(few, *(kinds.index(each) + 1 for each in set(kinds)))
    firsts = [vars(config).get(key, 0) for key in ("first_k_dense_replace", "attn_layer_offset")]
    firsts.append(len(vars(config).get("block_types") or ()) - 1)  # a pattern that comes again and again
    few = min(max(few, *(first + 1 for first in firsts if isinstance(first, int))), before)
    setattr(config, count, few)
    for key, value in lists.items():
        setattr(config, key, value[:few])
    return config


def checkpoint(model: Any, folder: Path = Path("nowhere")) -> BaseFiles:
    """What saving a model would leave, headers only, as the library's own conversions name and shape it."""
    config = json.loads(model.config.to_json_string()) | {"architectures": [type(model).__name__]}
    tensors = dict(_headers(model))
    header = Header(tensors=tensors, metadata={}, data_start=0, size=0)
    return BaseFiles(folder=folder, headers={"model.safetensors": header}, configs={"config.json": config})


def _headers(model: Any) -> Iterator[tuple[str, TensorInfo]]:
    shared: set[str] = set(getattr(model, "all_tied_weights_keys", {}))
    dropped = set(getattr(model, "_keys_to_ignore_on_save", None) or ())
    state = {name: tensor for name, tensor in model.state_dict().items() if name not in shared | dropped}
    for name, shape in stored_shapes(model, {name: tuple(tensor.shape) for name, tensor in state.items()}).items():
        yield name, TensorInfo(dtype=from_torch(torch.float32), shape=shape, start=0, stop=0)
