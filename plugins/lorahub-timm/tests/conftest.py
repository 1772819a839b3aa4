"""The framework, and models saved as timm saves them."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from lorahub_timm import Timm

sys.path.append(str(Path(__file__).parent))  # for what several test files share: they lie in no package


@pytest.fixture
def framework() -> Timm:
    from lorahub_timm import Timm

    return Timm()


@pytest.fixture
def saved(tmp_path: Path) -> Callable[..., Path]:
    """Save a model as timm does for the Hub, into a new folder."""
    from timm.models._hub import save_for_hf

    count = iter(range(1000))

    def save(model: Any, **options: Any) -> Path:
        folder = tmp_path / f"saved{next(count)}"
        save_for_hf(model, folder, safe_serialization=True, **options)
        return folder

    return save
