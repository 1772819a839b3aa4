"""Deltas that are read when they are asked for are those that are read at once."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import lorahub
from lorahub.adapter import load, open_deltas, open_header
from lorahub.errors import NotFinite
from lorahub.files.tensors import FileSource
from lorahub.formats import on_demand, pages
from lorahub.plugins import load_registry

peft = pytest.importorskip("peft")

WIDE = 96


class Base(nn.Module):
    """Two layers and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.q = nn.Linear(WIDE, WIDE, bias=False)
        self.v = nn.Linear(WIDE, WIDE, bias=False)
        self.head = nn.Linear(WIDE, 40, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.v(self.q(x)))


CONFIGS = {
    "lora": lambda: peft.LoraConfig(r=4, target_modules=["q", "v"], modules_to_save=["head"]),
    "dora": lambda: peft.LoraConfig(r=4, target_modules=["q"], use_dora=True),
    "vera": lambda: peft.VeraConfig(r=8, target_modules=["q", "v"]),
    "loha": lambda: peft.LoHaConfig(r=4, alpha=4, target_modules=["q", "v"]),
    "ia3": lambda: peft.IA3Config(target_modules=["q", "v"], feedforward_modules=["v"]),
}


@pytest.fixture
def make(tmp_path: Path):
    """An adapter of a kind, with numbers everywhere, and the base it is for."""

    def build(kind: str, dtype: torch.dtype = torch.float32) -> tuple[Path, Path]:
        torch.manual_seed(0)
        base = Base()
        (tmp_path / "base").mkdir(exist_ok=True)
        weights = {name: value.detach().to(torch.bfloat16).clone() for name, value in base.state_dict().items()}
        save_file(weights, tmp_path / "base" / "model.safetensors")
        model = peft.get_peft_model(base, CONFIGS[kind]())
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data + torch.randn_like(parameter) * (0.01 if "magnitude" in name else 0.1)
        model.save_pretrained(tmp_path / kind)
        path = tmp_path / kind / "adapter_model.safetensors"
        save_file({name: value.to(dtype) for name, value in load_file(path).items()}, path)
        return tmp_path / "base", tmp_path / kind

    return build


@pytest.mark.parametrize("kind", list(CONFIGS))
def test_they_are_the_same_tensors_and_the_same_numbers(make, kind):
    registry = load_registry()
    base, folder = make(kind)
    index = lorahub.open_base(base).index
    header = open_header(folder, registry, index=index, compat="peft")
    expected = load(header, registry).deltas
    with open_deltas(header, registry) as opened:
        assert opened.deltas.keys() == expected.keys()
        for target in [*expected, *expected]:
            found, wanted = opened.deltas[target], expected[target]
            assert type(found) is type(wanted)
            assert found.tensors().keys() == wanted.tensors().keys()
            assert all(torch.equal(found.tensors()[name], each) for name, each in wanted.tensors().items())
        again = opened.content
    with open_deltas(header, registry) as opened:
        assert opened.content == again


def test_what_is_asked_for_again_is_kept_up_to_a_limit(make, monkeypatch):
    registry = load_registry()
    _, folder = make("lora")
    header, reads, real = open_header(folder, registry), [], FileSource.read
    monkeypatch.setattr(FileSource, "read", lambda self, name: reads.append(name) or real(self, name))
    for limit, expected in ((on_demand.KEPT, 1), (0, 2)):
        monkeypatch.setattr(on_demand, "KEPT", limit)
        with open_deltas(header, registry) as opened:
            target = next(iter(opened.deltas))
            reads.clear()
            assert opened.deltas[target] is not None
            once = len(reads)
            assert opened.deltas[target] is not None
            assert len(reads) == expected * once


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn])
def test_a_number_that_is_none_is_found_before_anything_is_built(make, bad, dtype):
    registry = load_registry()
    _, folder = make("lora", dtype)
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    name = max(tensors)
    wide = tensors[name].float()
    wide.view(-1)[-1] = bad
    tensors[name] = wide.to(dtype)
    if torch.isfinite(tensors[name].float()).all():
        pytest.skip("this platform rounds infinity to the largest number")
    save_file(tensors, path)
    with pytest.raises(NotFinite, match=name), open_deltas(open_header(folder, registry), registry):
        pass


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_large_replacement_that_is_read_row_by_row_gives_the_same_file(make, tmp_path, monkeypatch, dtype):
    base, folder = make("lora", dtype)
    filled = []
    real = pages.Pages.fill
    monkeypatch.setattr(pages.Pages, "fill", lambda self, rows: filled.append(rows) or real(self, rows))
    lorahub.merge(base, {"a": folder}, out=tmp_path / "whole")
    assert not filled
    monkeypatch.setattr(pages, "FEWEST", 1)
    report = lorahub.merge(base, {"a": folder}, out=tmp_path / "paged")
    assert filled
    one, other = (tmp_path / each / "model.safetensors" for each in ("whole", "paged"))
    assert one.read_bytes() == other.read_bytes()
    value = load_file(folder / "adapter_model.safetensors")["base_model.model.head.weight"]
    assert torch.equal(load_file(other)["head.weight"], value.bfloat16())
    assert report.changes["head.weight"] is not None
    assert report.changes["head.weight"] > 1e-2


def test_rows_of_pages_are_there_when_filled_and_gone_when_dropped(tmp_path):
    values = torch.arange(8 * 4096, dtype=torch.float32).view(32, 1024)
    save_file({"w": values}, tmp_path / "w.safetensors")
    with FileSource(tmp_path / "w.safetensors") as source:
        held = pages.Pages(source, "w")
        held.fill(slice(3, 9))
        assert torch.equal(held.tensor[3:9], values[3:9])
        held.drop(slice(3, 6))
        assert torch.equal(held.tensor[6:9], values[6:9])
        assert not held.tensor[3:6].any()
        assert not held.tensor[:3].any()
