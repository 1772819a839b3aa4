"""Checksums by every twin against sums of Python's integers, as the definition has them."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys

import pytest
import torch

from lorahub.engine.kernels import checksum_torch, trials
from lorahub.engine.kernels.checksum_torch import COLUMNS, ROWS, STEP, checksum_weights
from lorahub.engine.kernels.choice import native

DEVICES = [
    "cpu",
    pytest.param(
        "cuda",
        marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")],
    ),
]
SIZES = (0, 1, 7, 511, 512, 513, 16_384, 70_001)  # bytes
LARGE = 2 * ROWS * 8 * COLUMNS + 100_003  # three tables


@pytest.fixture(params=DEVICES)
def device(request):
    return torch.device(request.param)


@pytest.fixture(params=["torch", "triton", "c"])
def sums(request, device):
    if request.param == "torch":
        return checksum_torch.checksums
    if request.param == "triton":
        pytest.importorskip("triton", reason="triton is not installed")
        if device.type == "cpu" and not os.environ.get("TRITON_INTERPRET"):
            pytest.skip("this platform compiles kernels for its device")
        return importlib.import_module("lorahub.engine.kernels.checksum_triton").checksums
    kernel = native().kernel
    if device.type != "cpu" or kernel is None:
        pytest.skip("the C kernel is for CPUs with a compiler")
    return lambda tensors: torch.tensor([kernel.checksum(tensor) for tensor in tensors], dtype=torch.int64)


def noise(size, device, seed=0):
    return torch.randint(256, (size,), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8).to(device)


def defined(data: bytes) -> int:
    """The checksum of bytes, in integers without end."""
    weights = checksum_weights(torch.device("cpu")).tolist()
    whole = len(data) // (8 * COLUMNS) * (8 * COLUMNS)
    words = [int.from_bytes(data[start : start + 8], sys.byteorder) for start in range(0, whole, 8)]
    rows = [words[start : start + COLUMNS] for start in range(0, len(words), COLUMNS)]
    total = 0
    for start in range(0, len(rows), ROWS):
        table = rows[start : start + ROWS]
        of_rows = sum(sum(row) * weight for row, weight in zip(table, weights, strict=False))
        of_columns = sum(
            sum(column) * weight for column, weight in zip(zip(*table, strict=True), weights[ROWS:], strict=True)
        )
        total = total * STEP + of_rows + of_columns
    if rest := data[whole:]:
        total = total * STEP + sum(byte * weight for byte, weight in zip(rest, weights, strict=False)) + len(data)
    total %= 1 << 64
    return total - (total >> 63 << 64)


def test_every_twin_gives_the_sums_of_the_definition(sums, device):
    given = [noise(size, device, size) for size in SIZES]
    assert sums(given).tolist() == [defined(bytes(each.tolist())) for each in given]
    assert sums([]).tolist() == []


def test_every_twin_gives_the_sum_of_several_tables(sums, device):
    large, small = noise(LARGE, device), noise(600, device, 1)
    expected = defined(large.cpu().numpy().tobytes())
    assert sums([small, large, small])[1].item() == expected
    large[-5] ^= 1
    assert sums([large]).item() != expected


def test_every_twin_takes_bits_whatever_their_dtype_shape_strides_and_place(sums, device):
    tensor = torch.randn(130, 70, generator=torch.Generator().manual_seed(0)).to(device)
    data = tensor.cpu().numpy().tobytes()
    beside = torch.cat([noise(1, device), tensor.view(-1).view(torch.uint8)])[1:]
    given = [tensor, tensor.T.contiguous().T, beside, torch.nn.Parameter(tensor), tensor.view(-1).double().float()]
    assert sums(given).tolist() == [defined(data)] * len(given)


def test_a_kernel_is_tried_before_it_is_believed(device):
    def forgetful(tensors):
        return checksum_torch.checksums([tensor[: len(tensor) // 512 * 512] for tensor in tensors])

    assert trials.sums_alike(checksum_torch.checksums, device)
    assert not trials.sums_alike(forgetful, device)


COMPILE = """
import json, sys
import triton
from triton.backends.compiler import GPUTarget
from lorahub.engine.kernels import checksum_triton as made

signature = {
    "table": "*i64", "part_of_tile": "*i32", "tiles": "i32", "weights": "*i64", "powers": "*i64", "sums": "*i64",
    "LINES": "constexpr", "WORDS": "constexpr", "ROWS": "constexpr",
}
constants = {"LINES": made._LINES, "WORDS": made.COLUMNS, "ROWS": made.ROWS}
source = triton.compiler.ASTSource(fn=made.sum_tiles, signature=signature, constexprs=constants)
found = triton.compile(source, target=GPUTarget("cuda", int(sys.argv[1]), 32), options={"num_warps": made._WARPS})
print(json.dumps({"shared": found.metadata.shared, "ptx": found.asm["ptx"]}))
"""


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90])
def test_the_kernel_compiles_for_devices_that_are_not_here(capability):
    pytest.importorskip("triton", reason="triton is not installed")
    around = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-W", "ignore", "-c", COMPILE, str(capability)]
    done = subprocess.run(command, env=around, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    code = json.loads(done.stdout)
    assert code["shared"] <= 48 << 10
    assert "ld.global" in code["ptx"]
