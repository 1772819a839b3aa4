"""The Hugging Face Hub: read and published to through its own client, and never believed."""

from __future__ import annotations

from lorahub.hub.huggingface.hub import HuggingFaceHub

__all__ = ["HuggingFaceHub"]
