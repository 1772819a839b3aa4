"""What configs say of the base: a 4-bit copy of unsloth's stands for its 16-bit relative, and it is said."""

from __future__ import annotations

import pytest

from lorahub.findings import Verdict
from lorahub.formats.peft.config import base_claim


@pytest.mark.parametrize(
    ("name", "relative"),
    [
        ("unsloth/Llama-3.2-1B-Instruct-bnb-4bit", "unsloth/Llama-3.2-1B-Instruct"),
        ("unsloth/Qwen3-8B-unsloth-bnb-4bit", "unsloth/Qwen3-8B"),
    ],
)
def test_a_4_bit_copy_of_unsloths_stands_for_the_weights_it_was_made_from(name: str, relative: str) -> None:
    repo, revision, (finding,) = base_claim({"base_model_name_or_path": name, "revision": "abc"})
    assert (repo, revision) == (relative, "")
    assert (finding.code, finding.level) == ("base-is-quantised", Verdict.EXACT)
    assert name in finding.message
    assert relative in finding.message


@pytest.mark.parametrize("name", ["unsloth/Llama-3.2-1B", "acme/model-bnb-4bit", "acme/unsloth-bnb-4bit"])
def test_every_other_name_is_taken_as_it_is(name: str) -> None:
    assert base_claim({"base_model_name_or_path": name, "revision": "abc"}) == (name, "abc", ())
