"""Diffusers trains, saves and loads; lorahub attaches and merges from the same file: outputs are diffusers' own.

Bounds: a change is a sum of four products in float32, rounded in another order by the two, and an output passes
through as many layers as the model has.  1e-4 of the largest output is far above both, and far below what the adapter
does.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_diffusers import PIPELINES
from tiny_loras import loadable, outputs, save_lora

import lorahub
from lorahub.opening import open_base

NOISE = 1e-4


class Case:
    """A pipeline, an adapter for it, and what diffusers makes of both."""

    def __init__(self, name: str, folder: Path) -> None:
        self.pipe: Any = PIPELINES[name]()
        self.adapter = save_lora(self.pipe, folder)
        self.before = outputs(self.pipe)
        self.pipe.load_lora_weights(self.adapter)
        self.expected = outputs(self.pipe)
        self.pipe.unload_lora_weights()


@pytest.fixture(scope="module", params=PIPELINES)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    return Case(request.param, tmp_path_factory.mktemp(request.param))


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for component, value in expected.items():
        assert float((found[component] - value).abs().max()) <= NOISE * float(value.abs().max()), component


def test_the_adapter_changes_what_every_component_gives(case: Case) -> None:
    for component, before in case.before.items():
        change = float((case.expected[component] - before).norm() / before.norm())
        assert change > 1e-2, component


def test_attached_outputs_are_those_of_diffusers_and_afterwards_those_of_before(case: Case) -> None:
    with lorahub.attach(case.pipe, {"style": case.adapter}) as live:
        assert_same(outputs(case.pipe), case.expected)
        assert live.coverage() == {"style": ()}
        live.set_adapters([])
        assert all(torch.equal(case.before[name], value) for name, value in outputs(case.pipe).items())
    assert all(torch.equal(case.before[name], value) for name, value in outputs(case.pipe).items())


def test_merged_outputs_are_those_of_diffusers_and_undone_exactly(case: Case) -> None:
    merged = lorahub.merge(case.pipe, {"style": case.adapter})
    assert_same(outputs(case.pipe), case.expected)
    merged.undo()
    assert all(torch.equal(case.before[name], value) for name, value in outputs(case.pipe).items())


def test_a_merged_folder_loads_in_diffusers_with_the_same_outputs(case: Case, tmp_path: Path) -> None:
    case.pipe.save_pretrained(tmp_path / "base")
    lorahub.merge(tmp_path / "base", {"style": case.adapter}, out=tmp_path / "merged")
    again = type(case.pipe).from_pretrained(tmp_path / "merged", local_files_only=True)
    for component in loadable(again):
        getattr(again, component).eval()
    assert_same(outputs(again), case.expected)


def test_a_check_says_that_all_of_it_lands_and_in_which_components(case: Case, tmp_path: Path) -> None:
    case.pipe.save_pretrained(tmp_path / "base")
    plan = lorahub.merging.plan(tmp_path / "base", {"style": case.adapter})
    touched = {open_base(tmp_path / "base").index.parameters[step.out].component for step in plan.steps}
    assert touched == set(loadable(case.pipe))
    assert plan.digest() == lorahub.merging.plan(case.pipe, {"style": case.adapter}).digest()
    report = lorahub.check(case.adapter, tmp_path / "base")
    assert report.verdict.name in ("UNVERIFIED", "COMPATIBLE", "EXACT")
