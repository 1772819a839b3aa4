"""A Hub that stores by Xet, and one that does not: the same files come, with the same digests.

What is pulled comes over plain HTTPS from either; what the client itself brought by Xet is taken over.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from huggingface_hub import constants, snapshot_download

from lorahub.hub.cache import Cache, pin_of
from lorahub.hub.huggingface import HuggingFaceHub
from lorahub.names import Ref

pytest.importorskip("hf_xet", reason="this platform has no hf_xet")

WEIGHTS = bytes(range(251)) * 9_000
INK = {"adapter_config.json": b'{"peft_type": "LORA"}', "adapter_model.safetensors": WEIGHTS, "README.md": b"# Ink\n"}
REF = Ref.parse("acme/ink@1.0.0")


def files_in(folder: Path | str) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def test_a_pull_gives_the_same_files_and_digests_with_xet_and_without(double, xet, tmp_path, monkeypatch):
    double.repo("acme/ink").commit(INK, "v1.0.0")
    digests = set()
    for disabled in (True, False):
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", disabled)
        hub = HuggingFaceHub(api=double.api(), cache=Cache(tmp_path / f"cache-{disabled}"))
        folder = hub.pull(hub.resolve(REF))
        assert files_in(folder) == INK
        pin = pin_of(folder)
        assert pin is not None
        digests.add(pin.digest())
    assert len(digests) == 1


def test_a_hub_without_xet_gives_the_same_digest(double, xet, cache, tmp_path):
    from hub.double import TOKEN, Double

    double.repo("acme/ink").commit(INK, "v1.0.0")
    hub = HuggingFaceHub(api=double.api(TOKEN), cache=cache)
    here = pin_of(hub.pull(hub.resolve(REF)))
    with Double() as plain:
        plain.repo("acme/ink").commit(INK, "v1.0.0")
        other = HuggingFaceHub(api=plain.api(TOKEN), cache=Cache(tmp_path / "other"))
        there = pin_of(other.pull(other.resolve(REF)))
    assert here is not None
    assert there is not None
    assert here.digest() == there.digest()


def test_what_the_client_brought_by_xet_is_verified_and_not_fetched_again(double, xet, hub, tmp_path):
    repo = double.repo("acme/ink")
    commit = repo.commit(INK, "v1.0.0")
    snapshot_download("acme/ink", revision=commit, endpoint=double.endpoint, cache_dir=constants.HF_HUB_CACHE)
    assert double.seen("xet-read-token")
    double.log.clear()
    assert files_in(hub.pull(hub.resolve(REF))) == INK
    assert double.seen("/resolve/") == []
    assert double.bytes_of("adapter_model.safetensors") == 0
