"""A weight that gets more columns than the base has: zeros first, and then what is added; from disk to disk alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import lorahub
from lorahub.bases.framework import Edits
from lorahub.bases.index import BaseIndex
from lorahub.bases.torch_module import TorchModule
from lorahub.engine.planning.steps import Form, Step
from lorahub.errors import BaseMismatch
from lorahub.plugins import Registry

ROWS, NARROW, WIDE = 3001, 70, 150


class Widening(TorchModule):
    """The built-in framework, able to widen one layer."""

    def widening(self, index: BaseIndex, name: str, shape: tuple[int, ...]) -> Edits | None:
        return Edits() if name == "first.weight" and shape > index.parameters[name].shape else None


@pytest.fixture
def widens(monkeypatch: pytest.MonkeyPatch, registry: Registry) -> None:
    """The built-in framework is that one; a protocol is looked for in classes, so it is another class."""
    monkeypatch.setattr(registry.frameworks["torch"], "__class__", Widening)


def drawn(*size: int, seed: int) -> torch.Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed))


def written(folder: Path, dtype: torch.dtype, module: str = "first") -> tuple[Path, Path]:
    """A base, and an adapter of rank 3 whose factors stand for a wider layer."""
    base, adapter = folder / "base.safetensors", folder / "adapter.safetensors"
    tensors = {"first.weight": drawn(ROWS, NARROW, seed=0), "other.weight": drawn(8, NARROW, seed=1)}
    save_file({name: each.to(dtype) for name, each in tensors.items()}, base)
    factors = {"lora_down": drawn(3, WIDE, seed=2), "lora_up": drawn(ROWS, 3, seed=3)}
    save_file({f"lora_unet_{module}.{name}.weight": each for name, each in factors.items()}, adapter)
    return base, adapter


@pytest.mark.usefixtures("widens")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_new_columns_are_what_the_adapter_brings_and_old_ones_are_added_to(dtype: torch.dtype, tmp_path: Path) -> None:
    base, adapter = written(tmp_path, dtype)
    lorahub.merge(base, {"one": str(adapter)}, weights=[0.5], out=tmp_path / "out.safetensors")
    before, after, factors = load_file(base), load_file(tmp_path / "out.safetensors"), load_file(adapter)
    down, up = (factors[f"lora_unet_first.lora_{end}.weight"].double() for end in ("down", "up"))
    expected = 0.5 * up @ down
    expected[:, :NARROW] += before["first.weight"].double()
    rounding = 2**-23 if dtype is torch.float32 else 2**-8
    assert after["first.weight"].dtype == dtype
    assert (after["first.weight"].double() - expected).abs().max() <= rounding * expected.abs().max()
    assert expected[:, NARROW:].norm() / expected.norm() > 1e-2
    assert torch.equal(after["other.weight"], before["other.weight"])


@pytest.mark.usefixtures("widens")
def test_the_bytes_do_not_depend_on_the_number_of_threads(tmp_path: Path) -> None:
    base, adapter = written(tmp_path, torch.float32)
    for threads in (1, 4):
        lorahub.merge(base, {"one": str(adapter)}, out=tmp_path / f"{threads}.safetensors", threads=threads)
    assert (tmp_path / "1.safetensors").read_bytes() == (tmp_path / "4.safetensors").read_bytes()


@pytest.mark.parametrize("able", [False, True])
def test_what_no_framework_widens_is_a_misfit(able: bool, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    if able:
        request.getfixturevalue("widens")
    base, adapter = written(tmp_path, torch.float32, module="other" if able else "first")
    with pytest.raises(BaseMismatch) as stop:
        lorahub.merge(base, {"one": str(adapter)}, out=tmp_path / "out.safetensors")
    assert "shape-mismatch" in {each.code for each in stop.value.findings}
    assert not (tmp_path / "out.safetensors").exists()


def test_a_step_in_another_shape_is_widened_or_made_whole_but_never_both() -> None:
    step = Step(out="a", source="a", before=Form((2, 3), "F32"), after=Form((2, 5), "F32"), terms=())
    assert (step.widened, step.made_whole) == (True, False)
    created = Step(out="a", source=None, before=None, after=Form((2, 5), "F32"), terms=())
    assert (created.widened, created.made_whole) == (False, True)
