"""An adapter on a hub, inspected without its weights: which bytes are read, how often, and what is made of them.

Hugging Face is the double, asked through the real client; the folder hub is itself.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hub.double import TOKEN, Double, Flip, Status, Swap
from hypothesis import given
from hypothesis import strategies as st

from lorahub import fetching, sources
from lorahub.errors import (
    DigestMismatch,
    HeaderError,
    IntegrityError,
    LorahubError,
    NotFound,
    Offline,
    Unavailable,
    UnsupportedFormat,
)
from lorahub.files.header import read_header
from lorahub.files.writer import StreamWriter, encode_header
from lorahub.hub.cache import Cache
from lorahub.hub.folder import FolderHub
from lorahub.hub.huggingface import HuggingFaceHub
from lorahub.hub.ranges import MOST, coalesce, cut
from lorahub.inspection import Inspection
from lorahub.names import Ref
from lorahub.plugins import load_registry
from lorahub.remote import Cost, open_remote

WIDTH, RANK = 768, 8
MODULES = [f"down_blocks_{block}_attentions_0_proj_in" for block in range(12)]


def weights(entries: dict[str, tuple[str, list[int]]], metadata: dict[str, str], numbers: dict[str, bytes]) -> bytes:
    """A safetensors file of zeros, save for the single numbers."""
    encoded = encode_header(entries, metadata)
    data = bytearray()
    for name, (dtype, shape) in entries.items():
        count = 1
        for size in shape:
            count *= size
        data += numbers.get(name, b"\0" * (count * (2 if dtype == "F16" else 4)))
    return bytes(encoded) + bytes(data)


def kohya(alpha: float = 4.0, **metadata: str) -> bytes:
    """Alphas between their factors, as sorted names put them."""
    entries: dict[str, tuple[str, list[int]]] = {}
    numbers = {}
    for module in MODULES:
        entries[f"lora_unet_{module}.alpha"] = ("F16", [])
        entries[f"lora_unet_{module}.lora_down.weight"] = ("F16", [RANK, WIDTH])
        entries[f"lora_unet_{module}.lora_up.weight"] = ("F16", [WIDTH, RANK])
        numbers[f"lora_unet_{module}.alpha"] = struct.pack("<e", alpha)
    return weights(entries, metadata, numbers)


def peft() -> dict[str, bytes]:
    entries: dict[str, tuple[str, list[int]]] = {}
    for layer in range(4):
        stem = f"base_model.model.model.layers.{layer}.self_attn.q_proj"
        entries[f"{stem}.lora_A.weight"] = ("F32", [RANK, 4096])
        entries[f"{stem}.lora_B.weight"] = ("F32", [4096, RANK])
    config = {
        "peft_type": "LORA",
        "r": RANK,
        "lora_alpha": 16,
        "target_modules": ["q_proj"],
        "base_model_name_or_path": "acme/base",
    }
    return {
        "adapter_config.json": json.dumps(config).encode(),
        "adapter_model.safetensors": weights(entries, {"format": "pt"}, {}),
        "README.md": b"# Ink\n",
        "tokenizer.json": b"{}" * 5000,
    }


def header_bytes(data: bytes) -> int:
    return 8 + int.from_bytes(data[:8], "little")


@pytest.fixture
def look(double: Double, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Inspection]:
    """Inspect ``acme/ink``, which the double then holds with ``files``."""
    monkeypatch.setenv("LORAHUB_CACHE", str(tmp_path / "cache"))

    def inspect(files: dict[str, bytes] | None = None, ref: str = "acme/ink") -> Inspection:
        if files is not None:
            double.repo("acme/ink").commit(files, tag="v1.0.0")
        return sources.inspect(ref, hub=double.endpoint)

    return inspect


def ranges(double: Double, suffix: str = ".safetensors") -> list[tuple[int, int]]:
    """(offset, length) of every request to the CDN for files with that end."""
    found = []
    for each in double.seen(where="cdn"):
        if each.path.endswith(suffix):
            first, _, last = each.headers["range"].removeprefix("bytes=").partition("-")
            found.append((int(first), int(last) + 1 - int(first)))
    return found


def test_a_header_comes_in_two_requests_and_not_a_byte_more_than_it_takes(double: Double, look: Any) -> None:
    files = peft()
    found = look(files)
    size = header_bytes(files["adapter_model.safetensors"])
    assert ranges(double) == [(0, 8), (8, size - 8)]
    assert found.format == "peft"
    assert {row.kind for row in found.rows} == {"lora"}
    assert found.base == "acme/base"
    assert found.distance is not None
    assert found.distance.bytes_read == size + len(files["adapter_config.json"])
    assert found.distance.requests == 3
    assert not [path for path in double.paths() if "tokenizer" in path or "README" in path]
    assert double.bytes_of(".safetensors") == size


def test_what_is_found_is_what_the_pulled_folder_says(double: Double, look: Any) -> None:
    far = look(peft())
    folder = fetching.pull("acme/ink", hub=double.endpoint).folder
    near = sources.inspect(str(folder))
    assert far.rows == near.rows
    assert far.groups == near.groups
    assert far.findings == near.findings
    assert (far.metadata, far.size, far.guess, far.confidence) == (
        near.metadata,
        near.size,
        near.guess,
        near.confidence,
    )
    again = look()
    assert again.distance.requests == 0  # it is here now


def test_alphas_are_read_a_few_bytes_each_and_give_the_right_scales(double: Double, look: Any) -> None:
    data = kohya(alpha=4.0, ss_base_model_version="sdxl_base_v1-0")
    found = look({"style.safetensors": data})
    assert {row.scale for row in found.rows} == {0.5}
    assert found.distance.bytes_read == header_bytes(data) + 2 * len(MODULES)
    assert found.distance.requests == 2 + len(MODULES)
    assert found.distance.sha256 == hashlib.sha256(data).hexdigest()
    assert found.distance.document()["autov2"] == hashlib.sha256(data).hexdigest()[:10]


def test_only_the_first_of_many_parts_goes_through_the_redirect(double: Double, look: Any) -> None:
    look({"style.safetensors": kohya()})
    asked = [path for path in double.paths("hub") if "resolve" in path]
    assert len(asked) == 1  # the header's length; the header and all alphas from where that came to
    assert len(double.paths("cdn")) == 2 + len(MODULES)


def test_an_address_that_serves_no_more_is_given_up_for_the_hubs(double: Double, look: Any) -> None:
    fault = double.fault(Status(403, body=b"expired"), "style", where="cdn", after=4)
    assert {row.scale for row in look({"style.safetensors": kohya()}).rows} == {0.5}
    assert fault.hits == 1
    assert len([path for path in double.paths("hub") if "resolve" in path]) >= 2  # the first way there, and another


def test_what_was_read_is_kept_so_that_a_second_look_reads_nothing(double: Double, look: Any) -> None:
    first = look({"style.safetensors": kohya()}, ref="acme/ink@1.0.0")
    before = len(double.log)
    second = look(ref="acme/ink@1.0.0")
    assert second.distance.requests == second.distance.bytes_read == 0
    assert (second.rows, second.metadata) == (first.rows, first.metadata)
    assert not [path for path in double.paths()[before:] if "resolve" in path]
    before = len(double.log)
    assert look(ref=f"acme/ink@{first.distance.commit}").rows == first.rows
    assert len(double.log) == before  # a commit never changes: no request at all


def test_what_was_looked_at_online_can_be_looked_at_offline(
    double: Double, look: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = look({"style.safetensors": kohya()})
    before = len(double.log)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert look().rows == first.rows
    assert len(double.log) == before
    with pytest.raises(Offline):
        fetching.pull("acme/ink", hub=double.endpoint)
    with pytest.raises(Offline):
        sources.inspect("acme/other", hub=double.endpoint)


def test_parts_that_arrived_wrong_are_not_kept(double: Double, look: Any) -> None:
    double.fault(Flip(), where="cdn", times=None)
    with pytest.raises(HeaderError):
        look({"style.safetensors": kohya()})
    double.faults.clear()
    assert look().format == "kohya"


def test_kept_parts_and_listings_that_are_damaged_are_asked_for_again(
    double: Double, look: Any, tmp_path: Path
) -> None:
    first = look({"style.safetensors": kohya()})
    for pattern in ("ranges/*", "pulled/*/*/*/listing.json"):
        (kept,) = (tmp_path / "cache").glob(pattern)
        for damage in (kept.read_bytes()[:-3], b"", b"[[0, 8], [8]]\n12345678", b"\xff" * 50, b"[[-4, 8]]\n12345678"):
            kept.write_bytes(damage)
            found = look()
            assert found.rows == first.rows
            assert found.distance.requests == (first.distance.requests if pattern == "ranges/*" else 0)


def test_a_cache_that_cannot_be_written_only_costs_time(
    double: Double, look: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cache").write_text("a file where the folder should be")
    first = look({"style.safetensors": kohya()})
    assert look().distance.requests == first.distance.requests


def test_a_changed_file_is_read_anew(double: Double, look: Any) -> None:
    assert {row.scale for row in look({"style.safetensors": kohya(4.0)}).rows} == {0.5}
    double.repo("acme/ink").commit({"style.safetensors": kohya(8.0)}, tag="v2.0.0")
    assert {row.scale for row in look().rows} == {1.0}


@pytest.mark.parametrize(
    ("data", "error", "says"),
    [
        (b"", HeaderError, "empty"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n", HeaderError, "LFS pointer"),
        (b"<html><body>Sign in to your account, please</body></html>", HeaderError, "web page"),
        ((1 << 40).to_bytes(8, "little") + b"{}" * 40, HeaderError, "claims"),
        ((9 << 20).to_bytes(8, "little") + b" " * (9 << 20), HeaderError, "limit"),
        ((2).to_bytes(8, "little") + b"{}", UnsupportedFormat, "no tensors"),
        ((40).to_bytes(8, "little") + b"[" * 40, HeaderError, "does not begin"),
    ],
)
def test_what_is_no_adapter_is_refused_by_name_after_a_few_bytes(
    double: Double, look: Any, data: bytes, error: type[LorahubError], says: str
) -> None:
    with pytest.raises(error, match=says):
        look({"style.safetensors": data})
    assert sum(length for _, length in ranges(double)) <= 200


def test_a_config_that_is_not_what_the_hub_lists_is_refused(double: Double, look: Any) -> None:
    files = peft()
    other = files["adapter_config.json"].replace(b'"r": 8', b'"r": 9')
    double.fault(Swap(other), "adapter_config.json", times=None)
    with pytest.raises(DigestMismatch):
        look(files)


def test_a_config_over_the_limit_is_refused_as_in_a_folder(double: Double, look: Any) -> None:
    files = peft()
    files["adapter_config.json"] = files["adapter_config.json"].ljust(3 << 20)
    with pytest.raises(IntegrityError, match="1,048,577 bytes are more than the 1,048,576 allowed"):
        look(files)
    assert double.bytes_of("adapter_config.json") == (1 << 20) + 1
    with pytest.raises(IntegrityError, match="1,048,577 bytes are more than the 1,048,576 allowed"):
        sources.inspect(str(fetching.pull("acme/ink", hub=double.endpoint).folder))


def test_a_hub_that_sends_too_little_is_an_integrity_failure(double: Double, look: Any) -> None:
    data = kohya()
    double.fault(Status(206, body=data[:5]), "style", where="hub", times=None)
    with pytest.raises(IntegrityError, match="fewer"):
        look({"style.safetensors": data})


def test_a_hub_that_knows_no_ranges_is_read_all_the_same(double: Double, look: Any) -> None:
    data = kohya()
    double.fault(Status(201, body=data), ".safetensors", times=None)
    assert look({"style.safetensors": data}).format == "kohya"


def test_a_transient_failure_is_tried_again(double: Double, look: Any) -> None:
    fault = double.fault(Status(503, body=b"busy"), "/resolve/", times=2)
    assert look({"style.safetensors": kohya()}).format == "kohya"
    assert fault.hits == 2


def test_gated_missing_and_unreachable_adapters_are_typed(double: Double, look: Any) -> None:
    with pytest.raises(NotFound):
        look(ref="acme/nothing")
    with pytest.raises(NotFound):
        look({"style.safetensors": kohya()}, ref="acme/ink@9.9.9")
    double.repo("acme/ink").gate()
    with pytest.raises(Unavailable, match="gated"):
        look()


def test_numbers_all_over_a_file_are_too_many_requests() -> None:
    spans = [(number << 20, 2) for number in range(MOST + 1)]
    with pytest.raises(Unavailable, match="one by one"):
        coalesce(spans, (MOST + 1) << 20)


def test_close_parts_come_in_one_request() -> None:
    large = 1 << 30
    assert coalesce([(100, 4), (0, 8), (50, 2), (100, 4), (7, 0)], large) == [(0, 104)]
    assert coalesce([(0, 8), (20_000, 4)], large) == [(0, 8), (20_000, 4)]
    assert coalesce([(0, 50), (10, 5)], large) == [(0, 50)]
    assert coalesce([(0, 50), (50, 5)], 55) == [(0, 55)]
    assert coalesce([], large) == []
    assert cut([(10, b"abcdef")], (12, 3)) == b"cde"
    assert cut([(10, b"abcdef")], (14, 3)) is None
    assert cut([], (14, 0)) == b""


@given(st.lists(st.tuples(st.integers(0, 60_000), st.integers(0, 3000)), max_size=40), st.integers(63_000, 200_000))
def test_what_is_asked_for_holds_every_part_and_little_besides(spans: list[tuple[int, int]], size: int) -> None:
    asked = coalesce(spans, size)
    assert asked == sorted(asked)
    assert all(before[0] + before[1] < after[0] for before, after in pairwise(asked))
    for offset, length in spans:
        assert not length or any(start <= offset and offset + length <= start + count for start, count in asked)
    wanted = {at for offset, length in spans for at in range(offset, offset + length)}
    assert sum(length for _, length in asked) - len(wanted) <= size // 8


def test_no_token_reaches_another_host_and_the_hub_gets_it(double: Double, look: Any, tmp_path: Path) -> None:
    double.repo("acme/ink").commit({"style.safetensors": kohya()})
    hub = HuggingFaceHub(endpoint=double.endpoint, token=TOKEN, cache=Cache(tmp_path / "own"))
    open_remote(hub, hub.resolve(Ref.parse("acme/ink")), load_registry(), Cost())
    asked = double.seen("/resolve/", where="hub")
    assert asked
    assert all(each.headers["authorization"] == f"Bearer {TOKEN}" for each in asked)
    # the fixture of the double looks at every request to the other host


@pytest.fixture
def shelf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LORAHUB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "shelf"


def publish(shelf: Path, folder: Path, files: dict[str, bytes], version: str = "1.0.0") -> None:
    folder.mkdir(exist_ok=True)
    for name, data in files.items():
        (folder / name).write_bytes(data)
    FolderHub(shelf).push(folder, Ref.parse("acme/ink"), version=version)


def test_a_folder_hub_is_read_in_ranges_too(shelf: Path, tmp_path: Path) -> None:
    files = peft()
    publish(shelf, tmp_path / "ink", files)
    found = sources.inspect("acme/ink", hub=str(shelf))
    size = header_bytes(files["adapter_model.safetensors"])
    assert found.distance is not None
    assert found.distance.bytes_read == size + len(files["adapter_config.json"])
    assert found.distance.pin == "acme/ink@v1.0.0"
    assert found.distance.files["tokenizer.json"] == len(files["tokenizer.json"])
    assert found.format == "peft"
    assert not list((tmp_path / "cache" / "pulled").rglob("*.safetensors"))


def test_numbers_of_a_folder_hub_are_read_in_place(shelf: Path, tmp_path: Path) -> None:
    data = kohya(alpha=2.0)
    publish(shelf, tmp_path / "ink", {"style.safetensors": data})
    found = sources.inspect("acme/ink", hub=str(shelf))
    assert {row.scale for row in found.rows} == {0.25}
    assert found.distance is not None
    assert found.distance.bytes_read < header_bytes(data) + 2000


def test_a_folder_hubs_altered_config_is_refused(shelf: Path, tmp_path: Path) -> None:
    files = peft()
    publish(shelf, tmp_path / "ink", files)
    (blob,) = [
        each for each in shelf.rglob("*") if each.is_file() and each.read_bytes() == files["adapter_config.json"]
    ]
    blob.chmod(0o644)
    blob.write_bytes(files["adapter_config.json"].replace(b'"r": 8', b'"r": 9'))
    with pytest.raises(DigestMismatch):
        sources.inspect("acme/ink", hub=str(shelf))


def test_a_record_counts_as_far_as_what_is_read_agrees_with_it(shelf: Path, tmp_path: Path) -> None:
    files = peft()
    record = {
        "schema_version": "1.0",
        "kinds": ["lora"],
        "name": "ink",
        "trigger_words": ["sumi"],
        "files": {
            name: {"size": len(files[name]), "sha256": hashlib.sha256(files[name]).hexdigest()}
            for name in ("adapter_config.json", "adapter_model.safetensors")
        },
    }
    publish(shelf, tmp_path / "ink", {**files, "lorahub.json": json.dumps(record).encode()})
    found = sources.inspect("acme/ink", hub=str(shelf))
    assert found.triggers == ("sumi",)
    assert "record-stale" not in {each.code for each in found.findings}
    record["files"]["adapter_model.safetensors"]["sha256"] = "0" * 64  # type: ignore[index]
    publish(shelf, tmp_path / "ink", {**files, "lorahub.json": json.dumps(record).encode()}, version="2.0.0")
    assert "record-stale" in {each.code for each in sources.inspect("acme/ink", hub=str(shelf)).findings}
    publish(shelf, tmp_path / "ink", {**files, "lorahub.json": b"{}"}, version="3.0.0")
    assert "record-invalid" in {each.code for each in sources.inspect("acme/ink", hub=str(shelf)).findings}


def test_a_header_read_in_ranges_is_the_header_of_the_file(tmp_path: Path, shelf: Path) -> None:
    """Also where it is longer than what a reader of whole files looks at first."""
    entries = {f"lora_unet_mid_block_{number}_{'x' * 60}.lora_down.weight": ("F16", [1, 1]) for number in range(1500)}
    folder = tmp_path / "ink"
    folder.mkdir()
    with StreamWriter(folder / "long.safetensors", entries, {"note": "n" * 500}) as out:
        for name in entries:
            out.write(name, 0, b"\0\0")
        out.commit()
    local = read_header(folder / "long.safetensors")
    assert local.data_start > 200_000
    hub = FolderHub(shelf)
    hub.push(folder, Ref.parse("acme/ink"), version="1.0.0")
    cost = Cost()
    found = open_remote(hub, hub.resolve(Ref.parse("acme/ink")), load_registry(), cost)
    assert found.files.headers["long.safetensors"] == local
    assert cost.nbytes == local.data_start
    assert cost.requests == 2
