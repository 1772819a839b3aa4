"""Reading many tensors at once gives what reading them one by one gives, in memory of the reader's own."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import lorahub
from lorahub.errors import IntegrityError, NotFinite, NotFound, UsageError
from lorahub.files import bulk
from lorahub.files.bulk import Span, read_views
from lorahub.files.tensors import FileSource

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.uint8, torch.bool, torch.float8_e4m3fn)


def some_tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    tensors = {
        f"{name}-{at}": (torch.rand(shape, generator=generator) * 7).to(dtype)
        for at, dtype in enumerate(DTYPES)
        for name, shape in (("matrix", (5, 3)), ("odd", (7,)), ("scalar", ()), ("none", (0, 4)))
    }
    return tensors | {"large": torch.rand(40, 1000, generator=generator)}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    save_file(some_tensors(), tmp_path / "some.safetensors")
    return tmp_path / "some.safetensors"


@pytest.mark.parametrize("large", [1, 1 << 30], ids=["large pages", "usual pages"])
def test_reading_all_at_once_is_reading_each(file: Path, large: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bulk, "LARGE", large)
    expected = some_tensors()
    with FileSource(file) as source:
        found = source.read_all([*expected, "large"])
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype is tensor.dtype
        assert found[name].shape == tensor.shape
        assert torch.equal(found[name].view(torch.uint8), tensor.view(torch.uint8)) if tensor.dim() else True
        assert found[name].is_contiguous()
        assert found[name].data_ptr() % tensor.element_size() == 0


def test_a_few_of_many_are_read_without_what_lies_between(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bulk, "GAP", 0)
    with FileSource(file) as source:
        names = ["matrix-0", "odd-3", "matrix-1"]
        found = source.read_all(names)
        assert list(found) == names
        assert all(torch.equal(found[name], source.read(name)) for name in names)
        assert (
            sum(
                storage.nbytes()
                for storage in {id(s): s for s in map(torch.Tensor.untyped_storage, found.values())}.values()
            )
            < 500
        )


def test_tensors_read_together_may_be_changed_one_by_one(file: Path) -> None:
    with FileSource(file) as source:
        found, again = source.read_all(some_tensors()), source.read_all(some_tensors())
    for name in found:
        found[name].zero_()
        assert name.startswith("none") or not torch.equal(found[name], again[name]) or not again[name].any()
        others = [other for other in found if found[other].any()]
        assert all(torch.equal(found[other], again[other]) for other in others)
        found[name].copy_(again[name])


def test_writing_to_a_tensor_read_with_others_counts_as_a_change_of_that_one_alone(file: Path) -> None:
    with FileSource(file) as source:
        found = source.read_all(["matrix-0", "odd-0", "large"])
    found["large"].mul_(2)
    assert [tensor._version for tensor in found.values()] == [0, 0, 1]
    assert not any(tensor._is_view() for tensor in found.values())
    weight = found["matrix-0"].requires_grad_()
    loss = (weight * found["odd-0"][0]).sum()
    found["large"].add_(1)
    loss.backward()
    assert weight.grad is not None


def test_a_place_that_does_not_suit_a_dtype_gives_a_copy() -> None:
    content = bytes(range(64))

    def fill(offset: int, view: memoryview) -> None:
        view[:] = content[offset : offset + len(view)]

    first, second = read_views([Span(8, 9, torch.uint8, (1,)), Span(9, 17, torch.float32, (2,))], fill)
    assert first.tolist() == [8]
    assert torch.equal(second.view(torch.uint8), torch.tensor(list(content[9:17]), dtype=torch.uint8))
    assert second.data_ptr() % 4 == 0


def test_a_file_that_ends_early_or_was_closed_is_an_error(file: Path) -> None:
    source = FileSource(file)
    file.write_bytes(file.read_bytes()[:-50_000])
    with pytest.raises(IntegrityError, match="more were expected"):
        source.read_all(["large", "matrix-0"])
    with pytest.raises(NotFound):
        source.read_all(["nobody"])
    source.close()
    with pytest.raises(UsageError, match="was closed"):
        source.read_all(["matrix-0"])


def test_nothing_asked_for_is_nothing_read(file: Path) -> None:
    with FileSource(file) as source:
        assert source.read_all([]) == {}


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_number_that_is_none_is_found_among_tensors_read_together(
    bad: float, dtype: torch.dtype, tmp_path: Path
) -> None:
    tensors = {}
    for at in range(4):
        tensors[f"layers.{at}.lora_A.weight"] = torch.rand(4, 8).to(dtype)
        tensors[f"layers.{at}.lora_B.weight"] = torch.rand(8, 4).to(dtype)
    prefixed = {f"base_model.model.{name}": tensor for name, tensor in tensors.items()}
    config = '{"peft_type": "LORA", "r": 4, "lora_alpha": 4, "target_modules": ["0", "1", "2", "3"]}'
    (tmp_path / "adapter_config.json").write_text(config)
    save_file(prefixed, tmp_path / "adapter_model.safetensors")
    assert len(lorahub.load(tmp_path).deltas) == 4
    prefixed["base_model.model.layers.2.lora_B.weight"][3, 1] = bad
    save_file(prefixed, tmp_path / "adapter_model.safetensors")
    with pytest.raises(NotFinite, match=r"infinity in base_model.model.layers.2.lora_B.weight\n"):
        lorahub.load(tmp_path)


def test_numbers_too_large_to_be_summed_are_still_numbers(tmp_path: Path) -> None:
    largest = torch.full((8, 4), torch.finfo(torch.float16).max, dtype=torch.float16)
    tensors = {"base_model.model.a.lora_A.weight": largest.T.contiguous(), "base_model.model.a.lora_B.weight": largest}
    (tmp_path / "adapter_config.json").write_text(
        '{"peft_type": "LORA", "r": 4, "lora_alpha": 4, "target_modules": ["a"]}'
    )
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    assert len(lorahub.load(tmp_path).deltas) == 1
