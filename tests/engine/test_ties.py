"""Ties that nobody declared: what a configuration and shapes tell of them."""

from __future__ import annotations

from typing import Any

import pytest

from lorahub.bases.index import BaseIndex, BaseRef, ParameterInfo
from lorahub.engine.planning.ties import undeclared_ties
from lorahub.findings import Verdict

WORDS, HEAD, OTHER = "model.embed_tokens.weight", "lm_head.weight", "model.layers.0.q.weight"


def index(*names: str, declared: bool = False, **config: Any) -> BaseIndex:
    shapes = {OTHER: (8, 8)}
    parameters = {
        name: ParameterInfo(shape=shapes.get(name, (50, 8)), dtype="F32", stored_as=name) for name in sorted(names)
    }
    return BaseIndex(ref=BaseRef(), framework="torch", parameters=parameters, config=config, declared=declared)


@pytest.mark.parametrize(
    ("base", "changed"),
    [
        (index(WORDS, OTHER, vocab_size=50), WORDS),
        (index(WORDS, OTHER, vocab_size=50, tie_word_embeddings=True), WORDS),
        (index(WORDS, HEAD, OTHER, vocab_size=50, tie_word_embeddings=True), HEAD),
        (index(WORDS, OTHER, text_config={"vocab_size": 50}), WORDS),
    ],
)
def test_a_change_of_an_embedding_that_may_be_the_output_layer_waits_for_a_word(base: BaseIndex, changed: str) -> None:
    (finding,) = undeclared_ties(base, {changed, OTHER})
    assert (finding.code, finding.level, finding.where) == ("tie-undeclared", Verdict.DEGRADED, (changed,))
    assert finding.allowable


@pytest.mark.parametrize(
    ("base", "changed"),
    [
        (index(WORDS, OTHER, vocab_size=50), OTHER),
        (index(WORDS, HEAD, OTHER, vocab_size=50), WORDS),
        (index(WORDS, OTHER, vocab_size=50, tie_word_embeddings=False), WORDS),
        (index(WORDS, OTHER, text_config={"vocab_size": 50, "tie_word_embeddings": False}), WORDS),
        (index(WORDS, OTHER), WORDS),
        (index(WORDS, OTHER, declared=True, vocab_size=50), WORDS),
    ],
)
def test_nothing_is_said_where_it_is_apart_untouched_or_declared(base: BaseIndex, changed: str) -> None:
    assert undeclared_ties(base, {changed}) == []
