"""Bases on a hub, looked at without their weights: what is read and how often, what it must equal, and hostile ones.

Hugging Face is the double, asked through the real client.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hub.bases import base, codes, headers_of, tensors, weight_bytes, weights
from hub.double import Double
from hub.double.faults import Cut, Edit, Flip, Status, Swap

from lorahub import fetching
from lorahub.bases.open import survey_base
from lorahub.bases.weights import weights_digest
from lorahub.errors import DigestMismatch, HeaderError, IntegrityError, LorahubError, NotFound, Offline
from lorahub.findings import Verdict
from lorahub.hub.huggingface import HuggingFaceHub
from lorahub.names import Ref
from lorahub.opening import open_base


@pytest.mark.parametrize("shards", [1, 3])
def test_a_base_is_judged_without_one_byte_of_its_weights(double: Double, adapter: Path, at: Any, shards: int) -> None:
    files = base(shards=shards)
    double.repo("acme/base").commit(files)
    report = at(adapter, "acme/base")
    assert codes(report) == {"base-unrecorded"}
    assert report.axes["placement"] is Verdict.EXACT
    for name, size in headers_of(files).items():
        assert double.bytes_of(name, where="cdn") == size  # the header, and nothing behind it
    assert not double.seen("tokenizer.json")


@pytest.mark.parametrize("shards", [1, 4])
def test_looking_asks_the_hub_once_for_the_listing_each_config_and_each_weights_file(
    double: Double, adapter: Path, at: Any, shards: int
) -> None:
    commit = double.repo("acme/base").commit(base(shards=shards))
    at(adapter, f"acme/base@{commit}")
    small = ["config.json", "model.safetensors.index.json"] if shards > 1 else ["config.json"]
    assert len(double.seen("/api/", where="hub")) == 1
    assert [len(double.seen(f"/{name}", where="hub")) for name in small] == [1] * len(small)
    assert len(double.seen(where="hub")) == 1 + len(small) + shards <= 3 + shards
    assert len(double.seen(where="cdn")) == 2 * shards  # how long a header is, and the header


def test_a_second_look_costs_the_resolving_alone_and_by_commit_nothing(double: Double, adapter: Path, at: Any) -> None:
    commit = double.repo("acme/base").commit(base(shards=2))
    first = at(adapter, "acme/base")
    double.log.clear()
    assert at(adapter, "acme/base") == first
    assert double.paths() == ["/api/models/acme/base/revision/main"]
    double.log.clear()
    assert at(adapter, f"acme/base@{commit}") == first
    assert double.log == []


def test_a_fork_with_the_same_weights_is_known_by_their_hashes_and_its_headers_are_not_read_again(
    double: Double, recorded: Path, at: Any
) -> None:
    double.repo("mallory/copy").commit(base() | {"README.md": b"# Mine\n"})
    report = at(recorded, "mallory/copy")
    assert codes(report) == {"base-repo-differs-weights-equal"}
    assert report.axes["base"] is Verdict.EXACT
    assert double.bytes_of(".safetensors") == 0


def test_without_a_network_what_was_looked_at_before_is_judged_from_the_cache(
    double: Double, recorded: Path, at: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for ref in ("acme/base", f"acme/base@{double.repo('acme/base').find('main')}", None):
        assert at(recorded, ref).axes["base"] is Verdict.EXACT
    double.repo("acme/other").commit(base(seed=5))
    with pytest.raises(Offline):
        at(recorded, "acme/other")
    assert double.log == []


def test_without_a_network_a_base_that_was_pulled_is_judged_from_its_files(
    double: Double, adapter: Path, at: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    double.repo("acme/base").commit(base(shards=2))
    HuggingFaceHub(endpoint=double.endpoint).pull_base(Ref.parse("acme/base"))
    double.log.clear()
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert codes(at(adapter, "acme/base")) == {"base-unrecorded"}
    assert open_base("acme/base", hub=double.endpoint).index.weights.startswith("sha256:")
    assert double.log == []


LAYOUTS = {
    "one file": base(),
    "shards": base(shards=3),
    "one file and its shards": base(shards=2) | {"model.safetensors": weights(tensors())},
    "two precisions": base() | {"model.fp16.safetensors": weights(tensors(), 9), "model.bf16.safetensors": b"x" * 99},
    "shards, and the same in one file of another name": base(shards=2)
    | {"consolidated.safetensors": weights(tensors())},
    "one file of any name": {
        ("bert.safetensors" if name == "model.safetensors" else name): data for name, data in base().items()
    },
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_listed_digest_is_that_of_a_pulled_copy_and_of_a_clone(double: Double, tmp_path: Path, layout: str) -> None:
    files = LAYOUTS[layout]
    double.repo("acme/base").commit(files)
    clone = tmp_path / "clone"
    clone.mkdir()
    for name, data in files.items():
        (clone / name).write_bytes(data)
    far = open_base("acme/base", hub=double.endpoint)
    assert weight_bytes(double) <= sum(headers_of(files).values())
    near = far.pulled()
    assert far.index.weights == near.index.weights
    assert near.files is not None
    assert far.index.weights == weights_digest(near.files)
    if layout != "one file of any name":  # of a clone with several, nobody knows which is meant
        assert far.index.weights == open_base(clone, digest=True).index.weights
    pin = HuggingFaceHub(endpoint=double.endpoint).base_pin(Ref.parse("acme/base"))
    assert pin.digest() == far.index.weights


def test_what_is_seen_from_afar_is_what_is_seen_in_the_folder(double: Double, tmp_path: Path) -> None:
    files = base(shards=3)
    double.repo("acme/base").commit(files)
    far = open_base("acme/base", hub=double.endpoint)
    assert far.distant is not None
    near = survey_base(HuggingFaceHub(endpoint=double.endpoint).pull_base(Ref.parse("acme/base")))
    assert dict(far.distant.files.headers) == dict(near.headers)
    assert dict(far.distant.files.configs) == dict(near.configs)
    assert set(far.distant.files.others) == set(near.others)


def test_weights_that_are_kept_in_git_itself_are_hashed_since_no_list_says_their_sha256(
    double: Double, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hub.double.files.is_lfs", lambda *_: False)
    files = base()
    double.repo("acme/base").commit(files)
    (tmp_path / "here").mkdir()
    for name, data in files.items():
        (tmp_path / "here" / name).write_bytes(data)
    here = open_base(tmp_path / "here", digest=True).index.weights
    assert open_base("acme/base", hub=double.endpoint).index.weights == here


# ------------------------------------------------------------------------------------------------------- hostility


@pytest.mark.plugin("transformers")
def test_a_header_that_lies_is_found_out_when_the_files_are_there(double: Double, adapter: Path, at: Any) -> None:
    files = base()
    double.repo("acme/base").commit(files)
    honest = files["model.safetensors"]
    lie = honest.replace(b"pooler.dense.bias", b"pooler.dense.bIAS")
    fault = double.fault(Swap(lie), "model.safetensors", where="cdn", times=None)
    far = open_base("acme/base", hub=double.endpoint)
    assert "bert.pooler.dense.bIAS" in far.index.parameters
    double.faults.remove(fault)
    with pytest.raises(IntegrityError, match="other ones than the hub showed"):
        far.pulled()
    assert (
        "bert.pooler.dense.bias" in open_base("acme/base", hub=double.endpoint).index.parameters
    )  # the lie is not kept


@pytest.mark.parametrize(
    ("spoil", "error"),
    [
        (lambda _data: b"\x80\x04\x95" + b"x" * 500, HeaderError),
        (lambda data: (1 << 40).to_bytes(8, "little") + data[8:], HeaderError),
        (lambda data: data[:-50], HeaderError),
        (lambda data: data + b"more", HeaderError),
        (lambda data: data.replace(b'"F32"', b'"F99"', 1), HeaderError),
        (lambda _data: b"", HeaderError),
        (lambda _data: b"abc", HeaderError),
    ],
    ids=["pickle", "endless", "cut", "longer", "dtype", "empty", "three bytes"],
)
def test_a_malformed_weights_file_is_one_kind_of_error(
    double: Double, adapter: Path, at: Any, spoil: Callable[[bytes], bytes], error: type[LorahubError]
) -> None:
    files = base()
    double.repo("acme/base").commit(files | {"model.safetensors": spoil(files["model.safetensors"])})
    with pytest.raises(error):
        at(adapter, "acme/base")


def test_an_index_that_names_a_missing_shard_is_refused(double: Double, adapter: Path, at: Any) -> None:
    files = base(shards=3)
    del files["model-00002-of-00003.safetensors"]
    double.repo("acme/base").commit(files)
    with pytest.raises(NotFound, match="names 3 shards and 1 are missing: model-00002"):
        at(adapter, "acme/base")


@pytest.mark.parametrize(
    ("index", "error"),
    [
        (b'{"weight_map": {"a": "../x.safetensors"}}', HeaderError),
        (b"{" * 5000, HeaderError),
        (b'{"weight_map": {"a": "model-00001-of-00002.safetensors"}}', IntegrityError),
    ],
    ids=["outside", "deep", "of another checkpoint"],
)
def test_an_index_that_cannot_be_true_is_refused(
    double: Double, adapter: Path, at: Any, index: bytes, error: type[LorahubError]
) -> None:
    double.repo("acme/base").commit(base(shards=2) | {"model.safetensors.index.json": index})
    with pytest.raises(error):
        at(adapter, "acme/base")


@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json"])
def test_a_config_larger_than_any_is_refused_before_a_byte_of_it_is_read(
    double: Double, adapter: Path, at: Any, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lorahub.distant_bases.INDEX_BYTES", 5 << 20)
    double.repo("acme/base").commit(base(shards=2) | {name: b" " * ((5 << 20) + 1)})
    with pytest.raises(IntegrityError, match=r"5,242,881 bytes"):
        at(adapter, "acme/base")
    assert not double.seen(f"/{name}")


@pytest.mark.parametrize("config", [b"{" * 100_000, b"[]", b"\xff", b"nothing"])
def test_a_config_that_is_no_object_is_refused(double: Double, adapter: Path, at: Any, config: bytes) -> None:
    double.repo("acme/base").commit(base() | {"config.json": config})
    with pytest.raises(IntegrityError, match=r"config\.json"):
        at(adapter, "acme/base")


def test_a_config_that_was_replaced_since_it_was_listed_is_refused(double: Double, adapter: Path, at: Any) -> None:
    files = base()
    double.repo("acme/base").commit(files)
    double.fault(Flip(at=3), "config.json", times=None)
    with pytest.raises(DigestMismatch):
        at(adapter, "acme/base")
    double.faults.clear()
    assert codes(at(adapter, "acme/base")) == {"base-unrecorded"}


def test_weights_that_were_replaced_since_they_were_listed_are_refused(double: Double, adapter: Path, at: Any) -> None:
    double.repo("acme/base").commit(base())
    other = weights(tensors(layers=1))
    double.fault(Swap(other), "model.safetensors", where="cdn", times=None)
    with pytest.raises(HeaderError):
        at(adapter, "acme/base")
    double.faults.clear()
    assert codes(at(adapter, "acme/base")) == {"base-unrecorded"}


@pytest.mark.parametrize("name", ["../evil.safetensors", "a\\b.safetensors"])
def test_a_listed_name_that_no_file_may_have_is_refused(double: Double, adapter: Path, at: Any, name: str) -> None:
    files = base()
    del files["model.safetensors"]
    double.repo("acme/base").commit(files)
    entry = {
        "rfilename": name,
        "size": 10,
        "blobId": "0" * 40,
        "lfs": {"sha256": "0" * 64, "size": 10, "pointerSize": 1},
    }
    double.fault(Edit(lambda info: info["siblings"].append(entry)), "/revision/", times=None)
    with pytest.raises((IntegrityError, NotFound)):
        at(adapter, "acme/base")


def test_a_gated_base_is_explained_and_a_transient_failure_tried_again(double: Double, adapter: Path, at: Any) -> None:
    double.repo("acme/base").commit(base())
    double.fault(Status(503), "/resolve/", times=2)
    assert codes(at(adapter, "acme/base")) == {"base-unrecorded"}
    double.repo("acme/locked").commit(base(seed=2))
    double.repo("acme/locked").gate()
    with pytest.raises(LorahubError) as caught:
        at(adapter, "acme/locked")
    assert caught.value.exit_code == 6
    assert "acme/locked" in str(caught.value)


def test_a_reply_that_breaks_off_gives_no_short_header(double: Double, adapter: Path, at: Any) -> None:
    double.repo("acme/base").commit(base())
    double.fault(Cut(after=20), "model.safetensors", where="cdn", times=None)
    with pytest.raises(LorahubError) as caught:
        at(adapter, "acme/base")
    assert caught.value.exit_code in {5, 6}


def test_a_name_that_is_no_repository_and_no_folder_says_both(double: Double, adapter: Path, at: Any) -> None:
    with pytest.raises(NotFound, match="nor is there a folder acme/none here"):
        at(adapter, "acme/none")
    assert fetching.as_ref("acme/none").repo == "acme/none"
