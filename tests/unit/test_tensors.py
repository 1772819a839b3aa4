"""Lazy sources of tensors: one file, shards with an index, memory."""

from __future__ import annotations

import json
import os
import threading

import pytest
import safetensors.torch as reference
import torch
from torch.testing._internal.two_tensor import TwoTensor

from lorahub.errors import HeaderError, IntegrityError, NotFound, UnsupportedFormat, UsageError
from lorahub.files import raw
from lorahub.files.digest import tensors_digest
from lorahub.files.dtypes import DTYPES, to_torch
from lorahub.files.shards import encode_index, read_index, read_shards
from lorahub.files.tensors import DictSource, FileSource, ShardedSource, open_weights, tensor_bytes

GENERATOR = torch.Generator().manual_seed(7)


def random_bits(dtype, *shape):
    """Any bit pattern of a dtype, NaNs included; for BOOL the two it has."""
    size = torch.empty((), dtype=dtype).element_size()
    high = 2 if dtype is torch.bool else 256
    bits = torch.randint(0, high, (*shape[:-1], shape[-1] * size), dtype=torch.uint8, generator=GENERATOR)
    return bits.view(dtype)


def bits_equal(one, other):
    return (
        one.dtype == other.dtype
        and one.shape == other.shape
        and torch.equal(one.contiguous().view(-1).view(torch.uint8), other.contiguous().view(-1).view(torch.uint8))
    )


def some_tensors():
    return {
        "a.weight": torch.randn(5, 3, generator=GENERATOR),
        "b.weight": torch.randn(4, generator=GENERATOR).bfloat16(),
        "scalar": torch.tensor(2.5),
        "empty": torch.zeros(0, 7),
        "flags": torch.tensor([True, False, True]),
    }


def sharded(folder, parts, **changes):
    """Write a checkpoint of several files; ``changes`` replace entries of the weight map (None removes)."""
    weight_map, total = {}, 0
    for number, tensors in enumerate(parts, 1):
        shard = f"model-{number:05}-of-{len(parts):05}.safetensors"
        reference.save_file(tensors, folder / shard)
        weight_map |= dict.fromkeys(tensors, shard)
        total += sum(tensor.nbytes for tensor in tensors.values())
    weight_map = {name: shard for name, shard in (weight_map | changes).items() if shard is not None}
    path = folder / "model.safetensors.index.json"
    path.write_bytes(encode_index(weight_map, total))
    return path


@pytest.fixture(params=["file", "shards", "memory"])
def source(request, tmp_path):
    """The same tensors from each kind of source: (source, tensors)."""
    tensors = some_tensors()
    if request.param == "file":
        reference.save_file(tensors, tmp_path / "model.safetensors")
        made = open_weights(tmp_path)
    elif request.param == "shards":
        items = list(tensors.items())
        made = open_weights(sharded(tmp_path, [dict(items[:2]), dict(items[2:])]))
    else:
        made = DictSource(tensors)
    with made:
        yield made, tensors


def test_a_source_gives_every_tensor_bit_for_bit(source):
    made, tensors = source
    assert set(made.names()) == set(tensors)
    assert len(made) == len(tensors)
    for name, tensor in tensors.items():
        assert name in made
        assert bits_equal(made.read(name), tensor)
        info = made.info(name)
        assert (to_torch(info.dtype), info.shape, info.nbytes) == (tensor.dtype, tuple(tensor.shape), tensor.nbytes)


def test_what_was_read_belongs_to_the_reader(source):
    made, tensors = source
    made.read("a.weight").zero_()
    assert bits_equal(made.read("a.weight"), tensors["a.weight"])
    assert tensors["a.weight"].any()


def test_any_part_of_a_tensor_can_be_read_into_a_buffer(source):
    made, tensors = source
    whole = bytes(tensor_bytes(tensors["a.weight"]))
    for start, stop in [(0, 60), (7, 23), (60, 60), (0, 0), (59, 60)]:
        buffer = bytearray(stop - start)
        made.read_into("a.weight", start, buffer)
        assert buffer == whole[start:stop]
    rows = torch.zeros(2, 3)
    made.read_into("a.weight", 12, rows.numpy().data)
    assert torch.equal(rows, tensors["a.weight"][1:3])


@pytest.mark.parametrize(("start", "length"), [(-1, 1), (0, 61), (60, 1), (61, 0)])
def test_bytes_outside_a_tensor_are_not_given(source, start, length):
    made, _ = source
    with pytest.raises(UsageError, match="which has 60"):
        made.read_into("a.weight", start, bytearray(length))


def test_an_absent_tensor_is_not_found(source):
    made, _ = source
    assert "absent" not in made
    for call in (made.read, made.info, made.location, lambda name: made.read_into(name, 0, bytearray())):
        with pytest.raises(NotFound, match="no tensor 'absent'"):
            call("absent")


def test_the_digest_is_the_same_wherever_the_tensors_lie(source, tmp_path):
    made, tensors = source
    path = tmp_path / "again.safetensors"
    reference.save_file(dict(reversed(tensors.items())), path, metadata={"other": "metadata"})
    with FileSource(path) as again:
        assert made.digest() == again.digest() == tensors_digest(path, again.header)


def test_the_location_is_where_the_bytes_lie(source):
    made, tensors = source
    if isinstance(made, DictSource):
        assert made.location("a.weight") is None
        assert not made.headers
        return
    for name in tensors:
        path, offset, length = made.location(name)
        assert path.read_bytes()[offset : offset + length] == tensor_bytes(tensors[name])
        assert name in made.headers[path].tensors


def test_a_large_tensor_comes_in_chunks(tmp_path, monkeypatch):
    monkeypatch.setattr("lorahub.files.tensors.CHUNK", 100)
    tensor = torch.arange(1001, dtype=torch.uint8)
    reference.save_file({"t": tensor}, tmp_path / "t.safetensors")
    for made in (FileSource(tmp_path / "t.safetensors"), DictSource({"t": tensor[::1]})):
        with made:
            chunks = [bytes(chunk) for chunk in made.chunks("t")]
        assert [len(chunk) for chunk in chunks] == [100] * 10 + [1]
        assert b"".join(chunks) == bytes(tensor.tolist())


@pytest.mark.parametrize("code", [code for code, dtype in DTYPES.items() if dtype.torch])
def test_every_dtype_that_torch_has_is_read_as_the_reference_wrote_it(code, tmp_path):
    tensor = random_bits(to_torch(code), 3, 4)
    reference.save_file({"t": tensor}, tmp_path / "t.safetensors")
    with FileSource(tmp_path / "t.safetensors") as made:
        assert bits_equal(made.read("t"), tensor)
        assert made.digest() == DictSource({"t": tensor}).digest()


def test_a_dtype_that_torch_lacks_can_be_copied_but_not_read(tmp_path):
    text = b'{"t":{"dtype":"F6_E2M3","shape":[4],"data_offsets":[0,3]}}'
    (tmp_path / "t.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + b"abc")
    with FileSource(tmp_path / "t.safetensors") as made:
        assert b"".join(map(bytes, made.chunks("t"))) == b"abc"
        with pytest.raises(UnsupportedFormat):
            made.read("t")


def test_a_truth_value_other_than_0_and_1_is_refused(tmp_path):
    text = b'{"t":{"dtype":"BOOL","shape":[2],"data_offsets":[0,2]}}'
    (tmp_path / "t.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + b"\x01\x02")
    with FileSource(tmp_path / "t.safetensors") as made, pytest.raises(IntegrityError, match=r"'t'.*BOOL"):
        made.read("t")


def test_a_file_cut_after_its_header_was_read_is_an_integrity_error(tmp_path):
    path = tmp_path / "t.safetensors"
    reference.save_file({"t": torch.ones(1000)}, path)
    with FileSource(path) as made:
        os.truncate(path, path.stat().st_size - 1)
        with pytest.raises(IntegrityError, match="1 more were expected"):
            made.read("t")
        made.read_into("t", 0, bytearray(3999))


def test_a_closed_source_says_so(tmp_path):
    index = sharded(tmp_path, [{"t": torch.ones(2)}])
    for made in (open_weights(index), FileSource(tmp_path / "model-00001-of-00001.safetensors")):
        made.close()
        made.close()
        with pytest.raises(UsageError, match="was closed"):
            made.read("t")


@pytest.mark.parametrize("missing", [("preadv",), ("preadv", "pread")])
def test_platforms_without_positioned_reads_give_the_same_bytes_from_many_threads(tmp_path, monkeypatch, missing):
    for name in missing:
        monkeypatch.delattr(os, name)
    monkeypatch.setattr(raw, "CHUNK", 1000)
    tensors = {f"t{number}": torch.full((3000,), number, dtype=torch.uint8) for number in range(8)}
    reference.save_file(tensors, tmp_path / "t.safetensors")
    with FileSource(tmp_path / "t.safetensors") as made:
        got = {}
        threads = [threading.Thread(target=lambda name=name: got.update({name: made.read(name)})) for name in tensors]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert all(bits_equal(got[name], tensors[name]) for name in tensors)


# memory


def test_tensors_in_any_strides_and_with_lazy_signs_are_given_as_they_read():
    base = torch.complex(torch.randn(4, 3, generator=GENERATOR), torch.randn(4, 3, generator=GENERATOR))
    tensors = {
        "transposed": base.real.T,
        "strided": base.real[::2, ::2],
        "expanded": base.real[:1].expand(5, 3),
        "conjugate": base.conj(),
        "negative": base.conj().imag,
        "gradient": torch.nn.Parameter(torch.ones(2)),
    }
    made = DictSource(tensors)
    for name, tensor in tensors.items():
        read = made.read(name)
        assert torch.equal(read, tensor)
        assert read.is_contiguous()
        assert not any((read.is_conj(), read.is_neg(), read.requires_grad))


@pytest.mark.parametrize(
    ("tensor", "reason"),
    [
        (torch.ones(2, device="meta"), "meta device"),
        (torch.eye(2).to_sparse(), "not dense"),
        (torch.ones(2, dtype=torch.complex128), "complex128"),
        (TwoTensor(torch.ones(2), torch.ones(2)), "TwoTensor, which keeps its data in other tensors"),
        (torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged), "not dense"),
    ],
    ids=["meta", "sparse", "complex128", "wrapper", "jagged"],
)
def test_a_tensor_that_no_file_could_hold_is_refused(tensor, reason):
    with pytest.raises(UnsupportedFormat, match=reason):
        DictSource({"t": tensor})


# finding weights in a folder


def test_a_folder_is_searched_in_the_order_transformers_searches(tmp_path):
    reference.save_file({"diffusion": torch.ones(1)}, tmp_path / "diffusion_pytorch_model.safetensors")
    with open_weights(tmp_path) as made:
        assert made.names() == ("diffusion",)
    index = sharded(tmp_path, [{"shards": torch.ones(1)}])
    with open_weights(tmp_path) as made:
        assert isinstance(made, ShardedSource)
        assert made.names() == ("shards",)
    reference.save_file({"single": torch.ones(1)}, tmp_path / "model.safetensors")
    with open_weights(tmp_path) as made:
        assert made.names() == ("single",)
    index.rename(tmp_path / "diffusion_pytorch_model.safetensors.index.json")
    for name in ("model.safetensors", "diffusion_pytorch_model.safetensors"):
        (tmp_path / name).unlink()
    with open_weights(tmp_path) as made:
        assert made.names() == ("shards",)


def test_a_file_of_any_name_can_be_named_itself(tmp_path):
    reference.save_file({"t": torch.ones(1)}, tmp_path / "sd_xl.safetensors")
    with open_weights(tmp_path / "sd_xl.safetensors") as made:
        assert made.names() == ("t",)


def test_a_folder_without_weights_is_told_what_was_looked_for_and_what_is_there(tmp_path):
    with pytest.raises(NotFound, match=r"model\.safetensors, model\.safetensors\.index\.json, diffusion_pytorch"):
        open_weights(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80")
    with pytest.raises(NotFound, match=r"pytorch_model\.bin may be pickles, which are never opened"):
        open_weights(tmp_path)
    (tmp_path / "lora.safetensors").touch()
    with pytest.raises(NotFound, match=r"it holds lora\.safetensors") as caught:
        open_weights(tmp_path)
    assert caught.value.hint == "name the file itself"
    with pytest.raises(NotFound, match="does not exist"):
        open_weights(tmp_path / "nowhere")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "a.pt", "a.ckpt"])
def test_a_pickle_is_never_opened(tmp_path, name):
    os.mkfifo(tmp_path / name)  # opening it would wait for ever
    with pytest.raises(UnsupportedFormat, match="pickle"):
        open_weights(tmp_path / name)


# shards


def two_parts():
    return [{"a": torch.ones(1), "b": torch.ones(2)}, {"c": torch.ones(3)}]


def test_an_index_is_written_as_transformers_writes_it():
    text = '{\n  "metadata": {\n    "total_size": 6\n  },\n  "weight_map": {\n    "a": "2",\n    "b": "1"\n  }\n}\n'
    assert encode_index({"b": "1", "a": "2"}, 6).decode() == text


def test_headers_of_all_shards_come_in_the_order_of_their_names(tmp_path):
    headers = read_shards(sharded(tmp_path, two_parts()))
    assert [path.name for path in headers] == ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    assert [list(header.tensors) for header in headers.values()] == [["a", "b"], ["c"]]


def test_shards_that_are_missing_are_listed(tmp_path):
    index = sharded(tmp_path, two_parts())
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(NotFound, match=r"names 2 shards and 1 are missing: model-00002-of-00002\.safetensors"):
        open_weights(index)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        (
            {"a": "model-00002-of-00002.safetensors"},
            "1 tensors are not in the shard the index names, first 'a' in .*2-of",
        ),
        ({"d": "model-00002-of-00002.safetensors"}, "1 tensors are not in the shard the index names, first 'd'"),
        ({"a": None}, "1 tensors are not in the index, first 'a' in model-00001"),
    ],
)
def test_an_index_that_disagrees_with_its_shards_is_refused(tmp_path, changes, reason):
    with pytest.raises(IntegrityError, match=reason) as caught:
        open_weights(sharded(tmp_path, two_parts(), **changes))
    assert type(caught.value) is IntegrityError


def test_a_tensor_in_two_shards_is_refused(tmp_path):
    with pytest.raises(IntegrityError, match="not in the index, first 'a'"):
        open_weights(sharded(tmp_path, [{"a": torch.ones(1), "b": torch.ones(1)}, {"a": torch.ones(1)}]))


def test_a_malformed_shard_is_named(tmp_path):
    index = sharded(tmp_path, two_parts())
    (tmp_path / "model-00002-of-00002.safetensors").write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(HeaderError, match=r"model-00002-of-00002\.safetensors: this is a Git LFS pointer"):
        open_weights(index)


@pytest.mark.parametrize(
    "shard",
    ["../model.safetensors", "/etc/model.safetensors", "sub/model.safetensors", "..\\m.safetensors", "C:m.safetensors",
     "", "model.bin", "m\n.safetensors", "..", "model.safetensors\0"],
)  # fmt: skip
def test_a_shard_outside_the_folder_is_never_opened(tmp_path, shard):
    path = tmp_path / "model.safetensors.index.json"
    path.write_text(json.dumps({"weight_map": {"a": shard}}))
    with pytest.raises(HeaderError, match="no safetensors file beside the index"):
        read_index(path)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "'{' was expected"),
        ("[]", "'{' was expected"),
        ("{}", "no weight_map"),
        ('{"weight_map":{}}', "no weight_map"),
        ('{"weight_map":null}', "'{' was expected"),
        ('{"weight_map":{"a":1}}', "is not a string"),
        ('{"weight_map":{"a":"m.safetensors","a":"n.safetensors"}}', "appears twice"),
        ('{"weight_map":{"a":"m.safetensors"},"weight_map":{"a":"n.safetensors"}}', "appears twice"),
        ('{"weight_map":{"../a":"m.safetensors"}}', "leaves its folder"),
        ('{"weight_map":{"a":"m.safetensors"}} x', "goes on after its end"),
        ('{"metadata":' + "[" * 50_000 + "]" * 50_000 + "}", "nested too deeply"),
        ('{"metadata":[' + "[]," * 50_000 + "1]}", "longer than 65536"),
        ('{"weight_map":{"\\ud800":"m.safetensors"}}', "surrogate"),
        (b"\xff", "not UTF-8"),
    ],
)
def test_a_malformed_index_is_a_header_error(tmp_path, text, reason):
    path = tmp_path / "model.safetensors.index.json"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(HeaderError, match=reason) as caught:
        open_weights(path)
    assert caught.value.hint


def test_metadata_of_an_index_may_hold_anything_small(tmp_path):
    path = tmp_path / "model.safetensors.index.json"
    path.write_text('{"metadata":{"total_size":1.3e10,"x":[null,{"y":true}]},"weight_map":{"a":"m.safetensors"}}')
    assert read_index(path) == {"a": "m.safetensors"}
