"""Flux adapters of XLabs and Black Forest Labs: recognised to the last key, and honest about where they land."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from lorahub.adapter import load, open_header
from lorahub.errors import CannotCarry, LorahubError
from lorahub.files.header import Header, TensorInfo
from lorahub.files.writer import save_file
from lorahub.findings import Verdict
from lorahub.formats.assembly import account, touches
from lorahub.formats.bfl import BflFormat
from lorahub.formats.format import AdapterFiles
from lorahub.formats.xlabs import XlabsFormat
from lorahub.merging import merge
from lorahub.plugins import Registry

BLOCK = "double_blocks.0"


def xlabs(wide: int = 4, r: int = 2) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    sizes = {f"{BLOCK}.processor.{name}": out for name, out in (("qkv_lora1", 3 * wide), ("proj_lora2", wide))}
    sizes["single_blocks.0.processor.qkv_lora"] = 3 * wide
    return {
        f"{module}.{end}.weight": torch.randn(shape, generator=generator)
        for module, out in sizes.items()
        for end, shape in (("down", (r, wide)), ("up", (out, r)))
    }


def control(wide: int = 4, r: int = 2) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    tensors = {f"{BLOCK}.img_attn.norm.{name}_norm.scale": torch.ones(wide) for name in ("query", "key")}
    for module, out in ((f"{BLOCK}.img_attn.qkv", 3 * wide), ("img_in", wide)):
        tensors[f"{module}.lora_A.weight"] = torch.randn(r, wide, generator=generator)
        tensors[f"{module}.lora_B.weight"] = torch.randn(out, r, generator=generator)
        tensors[f"{module}.lora_B.bias"] = torch.randn(out, generator=generator)
    return tensors


def layout(path: Path) -> AdapterFiles:
    """A stored layout: names and shapes, no values."""
    tensors = {key: TensorInfo("BF16", tuple(shape), 0, 0) for key, shape in json.loads(path.read_text()).items()}
    header = Header(tensors=tensors, metadata={}, data_start=0, size=0)
    return AdapterFiles(folder=path.parent, headers={"lora.safetensors": header}, configs={})


def test_processors_keep_their_names_and_scale_one(registry: Registry, tmp_path: Path) -> None:
    tensors = xlabs()
    save_file(tmp_path / "lora.safetensors", tensors, {})
    header = open_header(tmp_path, registry)
    assert (header.format, header.kinds, header.ranks) == ("xlabs", ("lora",), (2,))
    deltas = {target.name: delta for target, delta in load(header, registry).deltas.items()}
    module = f"{BLOCK}.processor.qkv_lora1"
    assert set(deltas) == {
        f"{module}.weight",
        f"{BLOCK}.processor.proj_lora2.weight",
        "single_blocks.0.processor.qkv_lora.weight",
    }
    expected = tensors[f"{module}.up.weight"].double() @ tensors[f"{module}.down.weight"].double()
    torch.testing.assert_close(deltas[f"{module}.weight"].delta(torch.zeros(12, 4).double()), expected)


def test_a_merge_of_processors_is_refused_with_the_reason(registry: Registry, tmp_path: Path) -> None:
    (tmp_path / "lora").mkdir()
    (tmp_path / "base").mkdir()
    save_file(tmp_path / "lora" / "lora.safetensors", xlabs(), {})
    save_file(tmp_path / "base" / "model.safetensors", {f"{BLOCK}.img_attn.qkv.weight": torch.ones(12, 4)}, {})
    with pytest.raises(LorahubError) as refusal:
        merge(tmp_path / "base", [tmp_path / "lora"], out=tmp_path / "out")
    found = {finding.code: finding for finding in refusal.value.findings}
    assert "target-missing" in found
    assert "qkv_lora1 changes img_attn.qkv" in found["layout-undeclared"].message
    assert not (tmp_path / "out").exists()


def test_control_adapters_add_biases_and_replace_norms(registry: Registry, tmp_path: Path) -> None:
    tensors = control()
    save_file(tmp_path / "control.safetensors", tensors, {})
    header = open_header(tmp_path, registry)
    assert (header.format, header.kinds, header.findings) == ("bfl", ("lora", "replace"), ())
    deltas = {target.name: delta for target, delta in load(header, registry).deltas.items()}
    bias = deltas[f"{BLOCK}.img_attn.qkv.bias"].delta(torch.zeros(12))
    assert torch.equal(bias, tensors[f"{BLOCK}.img_attn.qkv.lora_B.bias"])
    assert deltas[f"{BLOCK}.img_attn.norm.key_norm.scale"].replacement() is not None


@pytest.mark.parametrize("make", [xlabs, control])
@pytest.mark.parametrize("key", ["strange.weight", f"{BLOCK}.other.scale", f"{BLOCK}.processor.odd_lora.down.weight"])
def test_keys_nobody_knows_are_findings(registry: Registry, tmp_path: Path, make: object, key: str) -> None:
    assert callable(make)
    save_file(tmp_path / "a.safetensors", make() | {key: torch.ones(2, 2)}, {})
    (finding,) = [each for each in open_header(tmp_path, registry).findings if each.level > Verdict.UNVERIFIED]
    assert (finding.code, finding.where) == ("key-unknown", (key,))


@pytest.mark.parametrize("carrier", [XlabsFormat(), BflFormat()])
def test_they_are_read_only(registry: Registry, carrier: XlabsFormat | BflFormat) -> None:
    with pytest.raises(CannotCarry):
        carrier.write({}, tuple(registry.kinds.values()), {})


@pytest.mark.parametrize(
    ("name", "file", "targets", "codes"),
    [
        ("xlabs", "flux_lora_xlabs_format.json", 12, ["layout-undeclared"]),
        ("bfl", "flux_control_lora_format.json", 780, []),
    ],
)
def test_a_real_layout_is_claimed_once_and_read_to_the_last_key(
    real_adapters: Path, registry: Registry, name: str, file: str, targets: int, codes: list[str]
) -> None:
    files = layout(real_adapters / "layouts" / file)
    assert [each.name for each in registry.formats.values() if each.claims(files)] == [name]
    reading = registry.formats[name].read(files, tuple(registry.kinds.values()), None)
    account(reading, files.headers["lora.safetensors"])
    changed, twice = touches(reading.groups, registry.kinds)
    assert (len(changed), twice) == (targets, [])
    assert [finding.code for finding in reading.findings] == codes


def test_no_real_layout_is_claimed_by_two_formats_alike(real_adapters: Path, registry: Registry) -> None:
    for path in sorted((real_adapters / "layouts").glob("flux*.json")):
        files = layout(path)
        scores = sorted(
            (claim.score for each in registry.formats.values() if (claim := each.claims(files))), reverse=True
        )
        assert len(scores) < 2 or scores[0] > scores[1], path.name
