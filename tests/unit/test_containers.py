"""Weights files that are not safetensors: read as numpy and the gguf package read them, written as the latter does."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf.quants import dequantize, quantize

from lorahub.errors import CannotCarry, MissingDependency, NotFound, UnsupportedFormat, UsageError
from lorahub.files.containers import read_weights_header
from lorahub.files.emit import lay_out, save_weights
from lorahub.files.tensors import FileSource
from lorahub.files.writer import save_file
from lorahub.formats.survey import explain, survey

RANDOM = np.random.default_rng(0)
NUMPY: dict[str, Any] = {
    "bool": np.array([True, False]),
    "u8": np.arange(5, dtype=np.uint8),
    "i8": np.arange(-2, 3, dtype=np.int8),
    "i16": np.arange(-2, 3, dtype=np.int16),
    "u16": np.arange(5, dtype=np.uint16),
    "f16": RANDOM.standard_normal((2, 3)).astype(np.float16),
    "i32": np.arange(5, dtype=np.int32),
    "u32": np.arange(5, dtype=np.uint32),
    "f32": RANDOM.standard_normal((2, 3, 4)).astype(np.float32),
    "c64": np.array([1 + 2j], dtype=np.complex64),
    "f64": RANDOM.standard_normal((4, 1)),
    "i64": np.arange(5, dtype=np.int64),
    "u64": np.arange(5, dtype=np.uint64),
    "one number": np.float32(7),
    "a row": RANDOM.standard_normal((1, 6)).astype(np.float32).T,
    "nothing": np.zeros((0, 3), dtype=np.float32),
}


def written_gguf(path: Path, tensors: dict[str, Any], **values: object) -> Path:
    writer = gguf.GGUFWriter(path, "llama")
    for key, value in values.items():
        add = {str: writer.add_string, int: writer.add_uint32, float: writer.add_float32, list: writer.add_array}
        add[type(value)](key.replace("__", "."), value)
    for name, tensor in tensors.items():
        raw, kind = tensor if isinstance(tensor, tuple) else (tensor, None)
        writer.add_tensor(name, raw, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_an_npz_reads_as_numpy_reads_it(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", **NUMPY)
    with FileSource(tmp_path / "a.npz") as source:
        assert list(source.names()) == list(NUMPY)
        for name, array in NUMPY.items():
            found = source.read(name)
            assert tuple(found.shape) == array.shape
            np.testing.assert_array_equal(found.numpy(), array, strict=True)


def test_arrays_that_lie_column_by_column_are_turned(tmp_path: Path) -> None:
    arrays = {name: np.asfortranarray(NUMPY[name]) for name in ("f16", "f32", "f64", "one number", "a row")}
    np.savez(tmp_path / "a.npz", **arrays)
    with FileSource(tmp_path / "a.npz") as source:
        assert {name: info.turned for name, info in source.header.tensors.items()} == {
            "f16": True,
            "f32": True,
            "f64": False,
            "one number": False,
            "a row": False,
        }
        for name, array in arrays.items():
            found = source.read(name)
            assert found.is_contiguous()
            np.testing.assert_array_equal(found.numpy(), array)


def test_a_turned_array_and_its_transpose_have_two_digests(tmp_path: Path) -> None:
    square = RANDOM.standard_normal((3, 3)).astype(np.float32)
    np.savez(tmp_path / "a.npz", w=np.asfortranarray(square))
    np.savez(tmp_path / "b.npz", w=square.T.copy())  # the very same bytes
    with FileSource(tmp_path / "a.npz") as one, FileSource(tmp_path / "b.npz") as other:
        assert not torch.equal(one.read("w"), other.read("w"))
        assert one.digest() != other.digest()


def test_bfloat16_as_mlx_writes_it_is_read(tmp_path: Path) -> None:
    wanted = torch.randn(3, 2).bfloat16()
    header = "{'descr': '<V2', 'fortran_order': False, 'shape': (3, 2, )}"
    raw = b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header.encode()
    raw += wanted.view(torch.int16).numpy().tobytes()
    import zipfile

    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr("layers.0.w.npy", raw)
    with FileSource(tmp_path / "a.npz") as source:
        assert torch.equal(source.read("layers.0.w"), wanted)


def test_a_gguf_reads_as_the_gguf_package_reads_it(tmp_path: Path) -> None:
    arrays = {f"{name}.x": NUMPY[name] for name in ("i8", "i16", "i32", "i64", "f16", "f32", "f64")}
    path = written_gguf(tmp_path / "a.gguf", arrays, adapter__lora__alpha=0.1, n=7, words=["a", "bcd"], few=[1, -2])
    theirs = gguf.GGUFReader(path)
    ours = read_weights_header(path)
    assert list(ours.tensors) == [each.name for each in theirs.tensors]
    for each in theirs.tensors:
        assert ours.span(each.name) == (each.data_offset, each.n_bytes)
        assert ours.tensors[each.name].shape == tuple(reversed(each.shape.tolist()))
    assert ours.metadata["general.architecture"] == "llama"
    assert float(ours.metadata["adapter.lora.alpha"]) == float(np.float32(0.1))
    assert (ours.metadata["n"], ours.metadata["few"], ours.metadata["words"]) == ("7", "[1, -2]", "(2 strings)")
    with FileSource(path) as source:
        for name, array in arrays.items():
            np.testing.assert_array_equal(source.read(name).numpy(), array, strict=True)


def test_bfloat16_in_gguf_is_read(tmp_path: Path) -> None:
    wanted = torch.randn(3, 4).bfloat16()
    raw = wanted.view(torch.uint8).numpy()
    path = written_gguf(tmp_path / "a.gguf", {"w": (raw, gguf.GGMLQuantizationType.BF16)})
    with FileSource(path) as source:
        assert torch.equal(source.read("w"), wanted)


def test_a_vocabulary_longer_than_one_read_is_passed_over(tmp_path: Path) -> None:
    words = [f"{'x' * (at % 900)}{at}" for at in range(5000)]  # about two megabytes
    path = written_gguf(tmp_path / "a.gguf", {"w": NUMPY["f32"]}, words=words, many=[*range(3000)], last="here")
    header = read_weights_header(path)
    assert header.metadata["words"] == "(5000 strings)"
    assert (header.metadata["many"], header.metadata["last"]) == ("(3000 numbers)", "here")
    (theirs,) = gguf.GGUFReader(path).tensors
    assert header.span("w") == (theirs.data_offset, theirs.n_bytes)


def test_another_alignment_is_followed(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "a.gguf", "llama")
    writer.add_custom_alignment(128)
    for name in "ab":
        writer.add_tensor(name, NUMPY["f32"])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with FileSource(tmp_path / "a.gguf") as source:
        assert [source.header.span(name)[0] % 128 for name in "ab"] == [0, 0]
        np.testing.assert_array_equal(source.read("b").numpy(), NUMPY["f32"])


@pytest.mark.parametrize("name", ["Q4_0", "Q5_0", "Q8_0"])
def test_quantised_values_that_float32_holds_are_read_exactly(tmp_path: Path, name: str) -> None:
    kind = gguf.GGMLQuantizationType[name]
    raw = quantize(RANDOM.standard_normal((5, 64)).astype(np.float32), kind)
    path = written_gguf(tmp_path / "a.gguf", {"w": (raw, kind)})
    header = read_weights_header(path)
    assert (header.tensors["w"].dtype, header.tensors["w"].shape) == (name, (5, 64))
    with FileSource(path) as source:
        found = source.read("w")
    np.testing.assert_array_equal(found.numpy(), dequantize(raw, kind), strict=True)
    blocks = raw.reshape(-1, raw.shape[-1] // 2)  # 64 values are two blocks, each led by its half-precision scale
    scales = blocks[:, :2].copy().view(np.float16).astype(np.float64)
    whole = found.numpy().reshape(-1, 32).astype(np.float64) / scales
    np.testing.assert_array_equal(whole, np.round(whole))  # nothing was rounded: each is a multiple of its scale


def test_every_element_type_of_the_gguf_package_has_its_size_here() -> None:
    from lorahub.files.gguf import PLAIN, QUANTISED, WIDTH

    for kind, (block, width) in gguf.GGML_QUANT_SIZES.items():
        if int(kind) in QUANTISED:
            assert QUANTISED[int(kind)] == (kind.name, block, width)
        else:
            assert (PLAIN[int(kind)], block, width) == (kind.name, 1, WIDTH[kind.name])


def test_one_set_of_tensors_has_one_digest_in_every_container(tmp_path: Path) -> None:
    arrays = {name: NUMPY[name] for name in ("f32", "f16", "f64", "i32")}
    np.savez(tmp_path / "a.npz", **arrays)
    written_gguf(tmp_path / "a.gguf", arrays)
    save_file(tmp_path / "a.safetensors", {name: torch.from_numpy(array) for name, array in arrays.items()})
    digests = set()
    for suffix in ("npz", "gguf", "safetensors"):
        with FileSource(tmp_path / f"a.{suffix}") as source:
            digests.add(source.digest())
    assert len(digests) == 1


# ---- writing

TENSORS = {
    "blk.0.attn_q.weight.lora_a": torch.randn(2, 6),
    "blk.0.attn_q.weight.lora_b": torch.randn(4, 2).half(),
    "c": torch.randn(3, 5).bfloat16().T,
    "d": torch.randn(2).double(),
    "e": torch.zeros(0, 4),
}
METADATA = {"general.architecture": "llama", "adapter.lora.alpha": "0.5", "lorahub.lora.alpha": "0.1", "note": "ä"}


def test_a_written_gguf_is_what_the_gguf_package_reads(tmp_path: Path) -> None:
    path = save_weights(tmp_path / "a.gguf", TENSORS, METADATA)
    theirs = gguf.GGUFReader(path)
    found = {key: theirs.fields[key].contents() for key in METADATA}
    assert found == {"general.architecture": "llama", "adapter.lora.alpha": 0.5, "lorahub.lora.alpha": 0.1, "note": "ä"}
    assert [each.name for each in theirs.tensors] == list(TENSORS)
    for each in theirs.tensors:
        wanted = TENSORS[each.name].contiguous()
        assert tuple(reversed(each.shape.tolist())) == tuple(wanted.shape)
        assert each.data.tobytes() == wanted.flatten().view(torch.uint8).numpy().tobytes()
    assert path.stat().st_size == read_weights_header(path).size


def test_a_written_gguf_reads_back_and_is_laid_out_as_foretold(tmp_path: Path) -> None:
    path = save_weights(tmp_path / "a.gguf", TENSORS, METADATA)
    with FileSource(path) as source:
        assert all(torch.equal(source.read(name), tensor) for name, tensor in TENSORS.items())
        entries = {name: (info.dtype, info.shape) for name, info in source.header.tensors.items()}
        assert lay_out("a.gguf", entries, METADATA) == source.header


def test_the_same_tensors_give_the_same_bytes(tmp_path: Path) -> None:
    paths = [save_weights(tmp_path / f"{at}.gguf", TENSORS, METADATA) for at in range(2)]
    assert paths[0].read_bytes() == paths[1].read_bytes()


def test_what_gguf_cannot_hold_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    refused: dict[str, tuple[dict[str, torch.Tensor], dict[str, str], type[Exception]]] = {
        "dtype": ({"a": torch.zeros(2, dtype=torch.bool)}, {}, UnsupportedFormat),
        "dimensions": ({"a": torch.zeros(1, 1, 1, 1, 1)}, {}, UsageError),
        "name": ({"a" * 64: torch.zeros(1)}, {}, UsageError),
        "number": ({"a": torch.zeros(1)}, {"adapter.lora.alpha": "much"}, UsageError),
    }
    for tensors, metadata, error in refused.values():
        with pytest.raises(error):
            save_weights(tmp_path / "a.gguf", tensors, metadata)
    assert list(tmp_path.iterdir()) == []


def test_npz_is_read_and_not_written(tmp_path: Path) -> None:
    with pytest.raises(CannotCarry, match="not written"):
        save_weights(tmp_path / "a.npz", TENSORS, {})


# ---- which file of a folder


def test_safetensors_are_preferred_to_other_containers_and_any_can_be_named(tmp_path: Path) -> None:
    save_file(tmp_path / "a.safetensors", {"w": torch.zeros(1)})
    np.savez(tmp_path / "b.npz", v=np.zeros(1, dtype=np.float32))
    written_gguf(tmp_path / "c.gguf", {"u": np.zeros(1, dtype=np.float32)})
    assert list(survey(tmp_path).headers) == ["a.safetensors"]
    assert list(survey(tmp_path, weight_name="c.gguf").headers) == ["c.gguf"]
    assert list(survey(tmp_path / "b.npz").headers) == ["b.npz"]
    (tmp_path / "a.safetensors").unlink()
    assert list(survey(tmp_path).headers) == ["b.npz"]
    with pytest.raises(NotFound, match=r"holds no x\.gguf") as caught:
        survey(tmp_path, weight_name="x.gguf")
    assert "b.npz, c.gguf" in caught.value.hint


def test_an_adapter_from_before_gguf_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "ggml-adapter-model.bin").write_bytes(b"algg\x01\0\0\0" + bytes(100))
    error = explain(survey(tmp_path))
    assert isinstance(error, UnsupportedFormat)
    assert "ggla" in error.message


# ---- what need not be installed

HEADERS_ALONE = """
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {"torch", "numpy", "gguf", "safetensors"}:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Blocked())
from lorahub.files.containers import read_weights_header
print(sum(len(read_weights_header(path).tensors) for path in sys.argv[1:]))
"""


def test_headers_are_read_without_torch_numpy_and_the_gguf_package(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", a=np.zeros(2), b=np.zeros(3))
    path = written_gguf(tmp_path / "a.gguf", {"w": NUMPY["f32"]})
    done = subprocess.run(
        [sys.executable, "-c", HEADERS_ALONE, str(tmp_path / "a.npz"), str(path)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.stdout, done.stderr) == ("3\n", "")


def test_unpacking_without_the_gguf_package_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kind = gguf.GGMLQuantizationType.Q8_0
    path = written_gguf(tmp_path / "a.gguf", {"w": (quantize(np.ones((1, 32), dtype=np.float32), kind), kind)})
    monkeypatch.setitem(sys.modules, "gguf", None)
    with FileSource(path) as source, pytest.raises(MissingDependency, match="gguf") as caught:
        source.read("w")
    assert caught.value.hint == "pip install 'lorahub-core[gguf]'"
