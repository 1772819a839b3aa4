"""Textual inversion: recognised, inspected, recorded and pushed; a merge is refused by name and with the reason."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import lorahub
from lorahub.adapter import load, open_header
from lorahub.errors import CannotCarry, Degraded, Incompatible, UnsupportedFormat
from lorahub.files.writer import save_file
from lorahub.findings import Verdict
from lorahub.formats.textual_inversion import TextualInversionFormat
from lorahub.plugins import Registry

FILES: dict[str, tuple[dict[str, tuple[int, ...]], str]] = {
    "diffusers": ({"<ink>": (768,)}, "<ink>"),
    "diffusers, several vectors": ({"<ink>": (4, 768)}, "<ink>"),
    "AUTOMATIC1111": ({"emb_params": (8, 768)}, "ink"),
    "the original implementation": ({"string_to_param.*": (3, 768), "string_to_token.*": (1,)}, "ink"),
    "SDXL": ({"clip_l": (8, 768), "clip_g": (8, 1280)}, "ink"),
    "OneTrainer, Flux": ({"clip_l": (2, 768), "t5": (2, 4096), "t5_out": (2, 4096)}, "ink"),
}
"""Writer -> tensors, and the name of the part."""


def written(folder: Path, shapes: dict[str, tuple[int, ...]]) -> Path:
    folder.mkdir(exist_ok=True)
    save_file(folder / "ink.safetensors", {key: torch.full(shape, 0.1) for key, shape in shapes.items()}, {})
    return folder


@pytest.mark.parametrize("name", FILES)
def test_every_writers_file_is_parts_to_the_last_key(tmp_path: Path, registry: Registry, name: str) -> None:
    shapes, called = FILES[name]
    header = open_header(written(tmp_path / "ti", shapes), registry)
    assert (header.format, header.reading.groups, header.findings) == ("textual-inversion", (), ())
    (part,) = header.reading.parts.values()
    assert [*header.reading.parts] == [called]
    assert (part.kind, set(part.tensors)) == ("textual-inversion", set(shapes))
    assert {key: ref.shape for key, ref in part.tensors.items()} == shapes
    assert load(header, registry).deltas == {}


def test_a_key_that_is_no_vector_is_named(tmp_path: Path, registry: Registry) -> None:
    header = open_header(written(tmp_path / "ti", {"clip_l": (8, 768), "clip_g": (8, 4), "else": (2, 2, 2)}), registry)
    (finding,) = header.findings
    assert (finding.code, finding.where, finding.level) == ("key-unknown", ("else",), Verdict.DEGRADED)


@pytest.mark.parametrize(
    "shapes",
    [
        {"clip_l": (768, 3072, 3)},
        {"text_model.embeddings.token_embedding.weight": (49408, 768)},
        {"<ink>": ()},
        {"ink": (768,)},
        {"clip_l": (8, 768), "a.weight": (4, 4, 4), "b.weight": (4, 4, 4)},
    ],
)
def test_what_only_looks_like_it_is_not_claimed(
    tmp_path: Path, registry: Registry, shapes: dict[str, tuple[int, ...]]
) -> None:
    with pytest.raises(UnsupportedFormat):
        open_header(written(tmp_path / "ti", shapes), registry)


def test_a_merge_is_refused_by_name(tmp_path: Path) -> None:
    folder = written(tmp_path / "ti", {"<ink>": (4,)})
    model = torch.nn.ModuleDict({"fc": torch.nn.Linear(4, 4)})
    before = model["fc"].weight.detach().clone()
    with pytest.raises(Incompatible, match=r"textual-inversion \(<ink>\), which cannot be merged"):
        lorahub.merge(model, [folder])
    assert torch.equal(model["fc"].weight, before)


def test_it_is_inspected_recorded_pushed_and_pulled_like_any_adapter(tmp_path: Path) -> None:
    folder = written(tmp_path / "ti", {"<ink>": (768,)})
    hub = tmp_path / "hub"

    found = lorahub.inspect(folder)
    assert (found.format, found.parts) == ("textual-inversion", ("<ink>",))
    base = tmp_path / "base"
    base.mkdir()
    save_file(base / "model.safetensors", {"fc.weight": torch.ones(4, 4)}, {})
    record = lorahub.record(folder, base, base_repo="acme/sd", base_revision="0" * 40, license="mit")
    assert record.kinds == ("textual-inversion",)
    assert record.base is not None
    pushed = lorahub.push(folder, "acme/ink", version="1.0.0", hub=str(hub))
    assert pushed.pin.files
    place = lorahub.pull("acme/ink@1.0.0", hub=str(hub)).folder
    assert (place / "ink.safetensors").read_bytes() == (folder / "ink.safetensors").read_bytes()


def test_vectors_bundled_with_an_adapter_are_parts_beside_its_changes(tmp_path: Path, registry: Registry) -> None:
    """OneTrainer's ``bundle_emb.<token>.<text encoder>``."""
    tensors = {
        "lora_unet_fc.lora_down.weight": torch.ones(2, 4),
        "lora_unet_fc.lora_up.weight": torch.ones(4, 2),
        "bundle_emb.<ink>.clip_l": torch.ones(2, 8),
        "bundle_emb.<ink>.t5": torch.ones(2, 16),
        "bundle_emb.v1.5.string_to_param.*": torch.ones(2, 8),
    }
    folder = tmp_path / "lora"
    folder.mkdir()
    save_file(folder / "lora.safetensors", tensors, {})
    header = open_header(folder, registry)
    assert (header.format, header.kinds) == ("kohya", ("lora",))
    (finding,) = header.findings
    assert (finding.code, finding.level, finding.allowable) == ("kind-unsupported", Verdict.DEGRADED, True)
    assert {name: len(part.tensors) for name, part in header.reading.parts.items()} == {"<ink>": 2, "v1.5": 1}
    model = torch.nn.ModuleDict({"fc": torch.nn.Linear(4, 4)}).requires_grad_(False)
    with pytest.raises(Degraded, match="kind-unsupported") as refusal:
        lorahub.merge(model, [folder])
    assert "would leave out the vectors of 2 words (<ink>, v1.5)" in str(refusal.value)
    before = model["fc"].weight.clone()
    lorahub.merge(model, [folder], allow=["kind-unsupported"])
    torch.testing.assert_close(model["fc"].weight, before + 2.0)


def test_bundled_vectors_travel_under_dotted_names_too(tmp_path: Path, registry: Registry) -> None:
    for name, beginning in {"a": "transformer.", "b": "diffusion_model."}.items():
        tensors = {
            f"{beginning}fc.lora_A.weight": torch.ones(2, 4),
            f"{beginning}fc.lora_B.weight": torch.ones(4, 2),
            "bundle_emb.ink.clip_l": torch.ones(2, 8),
        }
        save_file(tmp_path / f"{name}.safetensors", tensors, {})
        header = open_header(tmp_path / f"{name}.safetensors", registry)
        assert [finding.code for finding in header.findings] == ["kind-unsupported"]
        assert [*header.reading.parts] == ["ink"]


def test_it_is_read_only(registry: Registry) -> None:
    with pytest.raises(CannotCarry):
        TextualInversionFormat().write({}, tuple(registry.kinds.values()), {})
    assert json.dumps(TextualInversionFormat.name)
