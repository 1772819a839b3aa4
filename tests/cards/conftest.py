"""An adapter, and its card beside any README."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from cards.making import PEFT, RECORD, Made, peft_tensors, write

from lorahub.adapter import AdapterHeader
from lorahub.cards import Card, make_card
from lorahub.records import AdapterRecord


@pytest.fixture
def ink(tmp_path: Path) -> AdapterHeader:
    """A PEFT LoRA of three layers."""
    return write(tmp_path / "ink", "adapter_model.safetensors", peft_tensors(), adapter_config=PEFT)


@pytest.fixture
def made(ink: AdapterHeader) -> Made:
    """``made(README, field=value)``: the card of ``ink`` beside a README, with a record of these fields too."""

    def build(existing: str | None = None, **fields: Any) -> Card:
        record = AdapterRecord.from_json({key: value for key, value in (RECORD | fields).items() if value is not None})
        card = make_card(existing, ink, record, repo="acme/ink")
        assert make_card(card.text, ink, record, repo="acme/ink").text == card.text  # as a repeated push
        return card

    return build
