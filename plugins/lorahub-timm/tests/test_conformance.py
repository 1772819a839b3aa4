"""The framework keeps the laws of ``lorahub.testing``, for a model of each family, and breaking one is noticed."""

from __future__ import annotations

from typing import Any

import pytest
from tiny_timm import TINY, build, images

from lorahub.bases.index import BaseRef
from lorahub.bases.layout import Target
from lorahub.testing import FrameworkCase, check_framework
from lorahub_timm import Timm
from lorahub_timm.configs import described
from lorahub_timm.fused import parts_of

PRESETS = {"convnext": ("all-conv",), "efficientnet": ("all-conv",), "coatnet": ("attention", "all-conv")}


def case_of(what: str, saved: Any) -> FrameworkCase:
    model = build(TINY[what])
    index = Timm().index_model(model, BaseRef())
    about = described(index.config)
    assert about is not None
    assert about.family is not None
    return FrameworkCase(
        folder=saved(model),
        model=model,
        run=lambda model: model(images(TINY[what])),
        inside=tuple(Target("", path, "weight") for _, path in parts_of(about.family, index)),
        presets=PRESETS.get(what, ("attention", "all-linear")),
    )


@pytest.mark.parametrize("what", TINY)
def test_the_framework_keeps_every_law(what: str, saved: Any) -> None:
    check_framework(Timm(), case_of(what, saved))


def test_a_framework_that_breaks_a_law_is_told(saved: Any) -> None:
    class Forgetful(Timm):
        def layouts(self, index: Any, targets: Any) -> Any:
            return {}

    with pytest.raises(AssertionError, match="has no layout"):
        check_framework(Forgetful(), case_of("vit", saved))
