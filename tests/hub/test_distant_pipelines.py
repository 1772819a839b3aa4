"""Pipelines on a hub, looked at without their weights: components by their headers, as in a clone; whole or refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hub.bases import Files, tensors, weight_bytes, weights
from hub.double import Double

from lorahub.bases.open import survey_base
from lorahub.bases.weights import weights_digest
from lorahub.distant_bases import DistantBase, look_at
from lorahub.errors import UnsupportedFormat
from lorahub.fetching import quiet
from lorahub.files.shards import encode_index
from lorahub.hub.huggingface import HuggingFaceHub
from lorahub.names import Ref

INDEX: dict[str, Any] = {
    "_class_name": "StableDiffusionPipeline",
    "unet": ["diffusers", "UNet2DConditionModel"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "scheduler": ["diffusers", "EulerDiscreteScheduler"],
    "safety_checker": [None, None],
    "requires_safety_checker": False,
}


def pipeline() -> Files:
    """A pipeline whose transformer is in two shards, with the whole in one file beside it."""
    first, second = {"a.weight": [4, 8]}, {"b.weight": [2, 4]}
    where = {"a.weight": "diffusion_pytorch_model-00001-of-00002.safetensors"}
    where |= {"b.weight": "diffusion_pytorch_model-00002-of-00002.safetensors"}
    return {
        "model_index.json": json.dumps(INDEX).encode(),
        "everything.safetensors": weights(tensors(), 7),
        "unet/config.json": b'{"_class_name": "UNet2DConditionModel"}',
        "unet/diffusion_pytorch_model.safetensors.index.json": encode_index(where, 160),
        f"unet/{where['a.weight']}": weights(first),
        f"unet/{where['b.weight']}": weights(second),
        "text_encoder/config.json": b'{"model_type": "clip_text_model"}',
        "text_encoder/model.safetensors": weights({"a.weight": [4, 8]}, 3),
        "text_encoder/model.fp16.safetensors": weights({"a.weight": [4, 8]}, 4),
        "tokenizer/vocab.json": b"{}",
        "scheduler/scheduler_config.json": b"{}",
    }


def looked(double: Double) -> DistantBase:
    hub = HuggingFaceHub(endpoint=double.endpoint)
    return look_at(hub, hub.base_pin(Ref.parse("acme/pipe")))


def clone_of(files: Files, folder: Path) -> Path:
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


def test_what_is_looked_at_is_what_a_clone_holds(double: Double, tmp_path: Path) -> None:
    double.repo("acme/pipe").commit(pipeline())
    far, near = looked(double).files, survey_base(clone_of(pipeline(), tmp_path / "clone"))
    assert far.headers == near.headers
    assert far.configs == near.configs
    assert set(far.parts) == {"unet", "text_encoder"}
    assert {name: part.config for name, part in far.parts.items()} == {
        name: part.config for name, part in near.parts.items()
    }
    assert {"unet.a.weight", "unet.b.weight", "text_encoder.a.weight"} == set(far.tensors)


def test_no_byte_of_weights_is_read_and_what_lies_beside_the_components_is_left(double: Double) -> None:
    double.repo("acme/pipe").commit(pipeline())
    base = looked(double)
    assert weight_bytes(double) <= 3 * 4096
    assert not double.seen("everything.safetensors")
    assert "everything.safetensors" not in base.pin.files


def test_the_digest_is_that_of_the_pulled_copy(double: Double) -> None:
    double.repo("acme/pipe").commit(pipeline())
    base = looked(double)
    pulled = base.pulled(quiet)
    assert weights_digest(pulled) == base.weights
    assert pulled.headers == base.files.headers


def test_a_component_without_safetensors_is_refused_by_name(double: Double) -> None:
    files = {name: data for name, data in pipeline().items() if not name.startswith("text_encoder/model")}
    double.repo("acme/pipe").commit({**files, "text_encoder/pytorch_model.bin": b"x" * 64})
    with pytest.raises(UnsupportedFormat, match="no safetensors for text_encoder"):
        looked(double)
