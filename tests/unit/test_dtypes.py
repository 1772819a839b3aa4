"""The dtype table against torch and the reference implementation."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load, save

from lorahub.errors import UnsupportedFormat
from lorahub.files.dtypes import DTYPES, from_torch, nbytes, stored_shape, to_torch, torch_shape

WITH_TORCH = [code for code, dtype in DTYPES.items() if dtype.torch]


@pytest.mark.parametrize("code", WITH_TORCH)
def test_a_code_goes_to_torch_and_back(code):
    assert from_torch(to_torch(code)) == code


@pytest.mark.parametrize("code", WITH_TORCH)
def test_the_reference_writer_uses_the_same_code_size_and_shape(code):
    dtype = to_torch(code)
    tensor = torch.empty((3, 4), dtype=dtype)
    data = save({"t": tensor})
    shape = stored_shape(code, tensor.shape)
    assert f'"dtype":"{code}","shape":[{shape[0]},{shape[1]}]'.encode() in data
    length = int.from_bytes(data[:8], "little")
    assert nbytes(code, shape) == len(data) - 8 - length
    assert torch_shape(code, shape) == tuple(tensor.shape)
    if code not in {"F4", "F8_E8M0"}:  # its loader from bytes lacks these two, its loader from files has them
        assert load(data)["t"].dtype == dtype


def test_a_code_that_torch_lacks_is_refused_with_the_way_out():
    with pytest.raises(UnsupportedFormat, match="no dtype for F6_E2M3") as caught:
        to_torch("F6_E2M3")
    assert "copied as bytes" in caught.value.hint


@pytest.mark.parametrize("call", [lambda: to_torch("F31"), lambda: nbytes("f32", (1,)), lambda: torch_shape("", ())])
def test_an_unknown_code_is_refused_and_the_known_ones_listed(call):
    with pytest.raises(UnsupportedFormat, match="no safetensors dtype") as caught:
        call()
    assert "BF16" in caught.value.hint


@pytest.mark.parametrize("dtype", [torch.complex128, torch.qint8, torch.complex32])
def test_a_torch_dtype_that_files_cannot_hold_is_refused(dtype):
    with pytest.raises(UnsupportedFormat, match=str(dtype)):
        from_torch(dtype)


def test_a_scalar_takes_one_element_and_an_empty_tensor_none():
    assert nbytes("F32", ()) == 4
    assert nbytes("F32", (7, 0, 3)) == 0


def test_narrow_elements_must_fill_whole_bytes():
    assert nbytes("F6_E3M2", (4,)) == 3
    assert nbytes("F4", (3, 2)) == 3
    with pytest.raises(UnsupportedFormat, match="18 bits"):
        nbytes("F6_E3M2", (3,))


@pytest.mark.parametrize("shape", [(), (2, 3)])
def test_packed_elements_without_an_even_last_dimension_have_no_torch_shape(shape):
    with pytest.raises(UnsupportedFormat, match="no torch shape"):
        torch_shape("F4", shape)
