"""Recording and publishing, for scripts: write down what is known, then push it as a version."""

from __future__ import annotations

from lorahub.publishing.pushing import Pushed, push
from lorahub.publishing.recorded import record

__all__ = ["Pushed", "push", "record"]
