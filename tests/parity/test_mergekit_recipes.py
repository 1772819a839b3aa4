"""A mergekit configuration resolves here to the numbers to which mergekit's own classes resolve it.

The reference is mergekit 0.1.5: its configuration classes, its parameter resolver and its merge methods.
"""

from __future__ import annotations

import textwrap
import warnings
from collections.abc import Mapping
from typing import Any

import pytest
import torch
import yaml

from lorahub.bases.layout import Target
from lorahub.composition.mergekit.reading import from_mergekit
from lorahub.composition.method import Terms
from lorahub.composition.weights.resolve import parameters_of, weights_of
from lorahub.deltas.delta import LowRank
from lorahub.plugins import load_registry
from lorahub.recipe import Ingredient

with warnings.catch_warnings():
    warnings.filterwarnings("ignore", "numpy.core is deprecated", DeprecationWarning)
    from mergekit.common import ModelReference
    from mergekit.config import ConfigReader, InputSliceDefinition, MergeConfiguration, OutputSliceDefinition
    from mergekit.merge_methods import registry
    from mergekit.merge_methods.base import TensorEntry, TensorGroup
    from mergekit.parameter_resolver import resolve_parameters

LAYERS = 5
BASE = "acme/base@v1"
PLACES = ("self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj")
TARGETS = [
    Target("", "model.embed_tokens", "weight"),
    *(Target("", f"model.layers.{n}.{place}", "weight") for n in range(LAYERS) for place in PLACES),
    Target("", "lm_head", "weight"),
]


def models(*parameters: str) -> str:
    """The models of a configuration, each with parameters in flow style."""
    letters = "abcdef"
    lines = [
        f"  - model: {BASE}+acme/{letters[at]}@main\n" + (f"    parameters: {each}\n" if each else "")
        for at, each in enumerate(parameters)
    ]
    return "models:\n" + "".join(lines)


CONFIGS: dict[str, str] = {
    "task_arithmetic": models("{weight: 0.7}", "{weight: -0.2}") + "parameters: {lambda: 0.9, normalize: true}",
    "ties": models("{weight: 0.7, density: 0.4}", "{weight: [0, 0.5, 1.0], density: [0.2, 0.9]}"),
    "ties-common": models("{weight: 1}", "") + "parameters: {weight: 0.3, density: 1e-1, lambda: [1, 2]}",
    "breadcrumbs": models("{weight: 1, density: 0.9, gamma: 0.02}", "{weight: 2}"),
    "breadcrumbs_ties": models("{weight: 1, density: 0.9}", "{weight: 2, gamma: 0.03}"),
    "dare_linear": models("{weight: 0.5, density: 1}", "{weight: 0.5, density: 1}"),
    "dare_ties": models("{weight: 0.5}", "{weight: 0.5}") + "parameters: {rescale: false}",
    "della": models("{weight: 0.5}", "{weight: 0.25, epsilon: 0.05}"),
    "della_linear": models("{weight: 0.5}", "{weight: 0.25, epsilon: 0.05}"),
    "linear": models("{weight: 0.5}", "{weight: 0.7}"),
    "linear-filters": models(
        "{weight: [{filter: q_proj, value: [0.1, 0.9, 0.3]}, {filter: mlp, value: 0.4}, {value: 1}]}",
        "{weight: [{filter: self_attn, value: 0.25}]}",
    )
    + "parameters: {weight: [{filter: embed, value: 3}, {value: [1, 2]}]}",
    "sce": models("", "") + "parameters: {select_topk: 0.6}",
    "model_stock": models("", "", ""),
    "nuslerp": models("{weight: 1}", "{weight: 3}"),
    "multislerp": models("{weight: 1}", "{weight: 3}", "{weight: 2}"),
}
TWO: dict[str, str] = {
    "slerp": models("", "")
    + "parameters:\n  t:\n    - {filter: self_attn, value: [0, 0.5, 0.3, 0.7, 1]}\n    - {filter: mlp, value: [1, 0]}\n"
    "    - {value: 0.5}",
    "nearswap": models("", "") + "parameters: {t: [0.001, 0.01]}",
}


def text_of(name: str) -> str:
    body = CONFIGS.get(name) or TWO[name]
    base = BASE if name in CONFIGS else f"{BASE}+acme/a@main"
    named = "" if name.startswith("linear") else f"base_model: {base}\n"
    return f"merge_method: {name.partition('-')[0]}\n{named}{body}\n"


def theirs(text: str, target: Target) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """What mergekit resolves for one tensor: shared parameters, and those of each adapter."""
    config = MergeConfiguration.model_validate(yaml.safe_load(text))
    method = registry.get(config.merge_method)
    sources = [
        InputSliceDefinition(model=each.model, layer_range=(0, LAYERS), parameters=each.parameters)
        for each in config.models
    ]
    parts = target.module.split(".")
    t = int(parts[2]) / (LAYERS - 1) if parts[1:2] == ["layers"] else 0.0
    reader = ConfigReader(config=config, t=t).for_out_slice(OutputSliceDefinition(sources=sources))
    name = f"{target.module}.{target.parameter}"
    base = config.base_model
    inputs = {each.model: name for each in sources if each.model != base or method.spec.name in ("slerp", "nearswap")}
    shared, each = resolve_parameters(
        method.spec, tensor_name=name, inputs=inputs, sources=reader.parameter_sources, base_model=base, t=t
    )
    return shared, {str(model.lora.path): values for model, values in each.items()}


@pytest.mark.parametrize("name", [*CONFIGS, *TWO])
def test_every_number_is_mergekits_for_every_target(name: str) -> None:
    text = text_of(name)
    recipe = from_mergekit(text).recipe
    weights = weights_of(recipe, [TARGETS] * len(recipe.adapters))
    parameters = parameters_of(recipe, TARGETS)
    compared = 0
    for target in TARGETS:
        shared, each = theirs(text, target)
        for key, value in shared.items():
            if key in ("int8_mask", "eps") or (name == "task_arithmetic" and key == "rescale"):
                continue  # without effect on the result
            ours = parameters[target][key]
            assert ("l1" if key == "rescale" and value else value) == (
                pytest.approx(ours, rel=1e-12) if isinstance(ours, float) else ours
            )
            compared += 1
        for at, adapter in enumerate(recipe.adapters):
            for key, value in each[adapter.ref.partition("@")[0]].items():
                if name == "task_arithmetic" and key == "density":
                    continue  # it is read, and used by nothing
                ours = weights[at][target] if key == "weight" else parameters[target][key][at]
                assert ours == pytest.approx(value, rel=1e-12), (target, key)
                compared += 1
    assert compared >= len(TARGETS)


def test_gradients_and_filters_do_vary() -> None:
    recipe = from_mergekit(text_of("linear-filters")).recipe
    first, second = weights_of(recipe, [TARGETS] * 2)
    assert len(set(first.values())) >= 6
    assert len(set(second.values())) >= 6
    assert first[TARGETS[0]] == 1
    assert second[TARGETS[0]] == 3


def test_slices_over_all_layers_resolve_as_mergekits_slices() -> None:
    text = textwrap.dedent(f"""
        slices:
          - sources:
              - {{model: {BASE}+acme/a, layer_range: [0, {LAYERS}]}}
              - {{model: {BASE}+acme/b, layer_range: [0, {LAYERS}]}}
            parameters: {{t: [{{filter: mlp, value: [1, 0, 0.5]}}]}}
        merge_method: slerp
        base_model: {BASE}+acme/a
        parameters: {{t: [0.25, 0.75]}}
        dtype: bfloat16
    """)
    imported = from_mergekit(text)
    found = parameters_of(imported.recipe, TARGETS)
    config = MergeConfiguration.model_validate(yaml.safe_load(text))
    spec = registry.get("slerp").spec
    for target in TARGETS:
        parts = target.module.split(".")
        t = int(parts[2]) / (LAYERS - 1) if parts[1:2] == ["layers"] else 0.0
        reader = ConfigReader(config=config, t=t).for_out_slice(config.slices[0])
        shared, _ = resolve_parameters(
            spec, tensor_name=f"{target.module}.weight", inputs={}, sources=reader.parameter_sources, t=t
        )
        assert found[target]["t"] == pytest.approx(shared["t"], rel=1e-12)
    assert len({values["t"] for values in found.values()}) >= 5
    assert imported.recipe.dtype == "bfloat16"


EXACT = ("task_arithmetic", "ties", "breadcrumbs", "breadcrumbs_ties", "dare_linear", "linear", "sce", "model_stock")
EXACT += ("nuslerp", "multislerp", "nearswap")
"""Methods that draw nothing here, and whose result does not depend on the base's own weights."""


def change(seed: int, rank: int = 2, scale: float = 1.0) -> LowRank:
    generator = torch.Generator().manual_seed(seed)
    up, down = torch.randn(12, rank, generator=generator), torch.randn(rank, 9, generator=generator)
    return LowRank(up * scale, down, 1.0)


@pytest.mark.parametrize("name", EXACT)
def test_the_imported_recipe_computes_what_mergekit_computes_from_whole_models(name: str) -> None:
    text, target = text_of(name), TARGETS[4]
    recipe = from_mergekit(text).recipe
    weights = weights_of(recipe, [TARGETS] * len(recipe.adapters))
    parameters = parameters_of(recipe, TARGETS)[target]
    changes = tuple(change(number) for number in range(len(recipe.adapters)))
    base = torch.randn(12, 9, generator=torch.Generator().manual_seed(99)).double()
    method = load_registry().methods[recipe.method].made(parameters)
    terms = Terms(
        shape=(12, 9),
        changes=changes,
        weights=tuple(each[target] for each in weights),
        seeds=tuple(range(len(changes))),
    )
    ours = method.combine(terms)
    made = dense(ours) if isinstance(ours, LowRank) else ours
    expected = reference(text, target, base, changes, recipe.adapters)
    assert float(expected.norm() / base.norm()) > 1e-2
    assert torch.allclose(made.double(), expected, atol=2e-5 * float(expected.abs().max()) + 1e-6)
    assert not torch.allclose(base + expected, base, atol=1e-3)


def reference(
    text: str, target: Target, base: torch.Tensor, changes: tuple[LowRank, ...], adapters: tuple[Ingredient, ...]
) -> torch.Tensor:
    """mergekit's own merge of whole matrices in float64, minus the base."""
    config = MergeConfiguration.model_validate(yaml.safe_load(text))
    shared, each = theirs(text, target)
    wholes = {
        str(adapter.ref.partition("@")[0]): base + dense(one) for adapter, one in zip(adapters, changes, strict=True)
    }
    method = registry.get(config.merge_method)
    two = method.spec.name in ("slerp", "nearswap")
    entries = [
        TensorEntry(id=name, tensor=tensor, is_base=two and at == 0) for at, (name, tensor) in enumerate(wholes.items())
    ]
    if config.base_model is not None and not two:
        entries = [TensorEntry(id="base", tensor=base, is_base=True), *entries]
    given: Mapping[str, Any] = {
        **shared,
        **{key: {name: values[key] for name, values in each.items()} for key in next(iter(each.values()), {})},
    }
    (result,) = method([TensorGroup(entries=tuple(entries))], parameters=given)
    return result - base


def dense(one: LowRank) -> torch.Tensor:
    return (one.up.double() * one.scale) @ one.down.double()


def test_their_class_reads_the_models_as_ours_does() -> None:
    text = text_of("ties")
    config = MergeConfiguration.model_validate(yaml.safe_load(text))
    recipe = from_mergekit(text).recipe
    loras: list[ModelReference] = [each.model for each in config.models]
    assert [f"{each.lora.path}@{each.lora.revision}" for each in loras] == [each.ref for each in recipe.adapters]
    assert recipe.base == f"{loras[0].model.path}@{loras[0].model.revision}"
