"""``load_lora_weights`` beside diffusers' own: weights by component and block, exchange, merging, saving, mixing.

Bounds as in ``test_parity``.
"""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_diffusers import flux, sd, sdxl, unet, wan
from tiny_loras import loadable, outputs, save_lora

import lorahub
import lorahub_diffusers
from lorahub.errors import LorahubError, UsageError
from lorahub.findings import Verdict
from lorahub_diffusers import load_lora_weights, loras

NOISE = 1e-4

pytestmark = pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute")  # diffusers, with several


class World:
    """A pipeline, two adapters for it, and what it gives without them."""

    def __init__(self, folder: Path) -> None:
        self.pipe: Any = sd()
        self.one = save_lora(self.pipe, folder / "one", seed=1)
        self.two = save_lora(self.pipe, folder / "two", seed=2, alpha=None)
        self.before = outputs(self.pipe)

    def diffusers(self, names: list[str], weights: Any = None) -> dict[str, torch.Tensor]:
        """What diffusers' own loader makes of it."""
        try:
            for name in names:
                self.pipe.load_lora_weights(getattr(self, name), adapter_name=name)
            self.pipe.set_adapters(names, weights)
            return outputs(self.pipe)
        finally:
            self.pipe.unload_lora_weights()


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("world"))


@pytest.fixture
def world(made: World) -> Any:
    yield made
    made.pipe.unload_lora_weights()
    with suppress(UsageError):
        loras(made.pipe).unload()
    assert_untouched(made)


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    for component, value in expected.items():
        assert float((found[component] - value).abs().max()) <= NOISE * float(value.abs().max()), component


def assert_untouched(world: World) -> None:
    assert all(torch.equal(world.before[name], value) for name, value in outputs(world.pipe).items())


WEIGHTS = [
    0.6,
    {"unet": 0.4, "text_encoder": 1.5},
    {"unet": {"down": 0.3, "mid": 0.9, "up": {"block_0": 0.5}}, "text_encoder": 0.2},
    pytest.param({"unet": {"up": {"block_0": [0.5, 0.7]}}}, marks=pytest.mark.slow),
    pytest.param({"unet": 0.0}, marks=pytest.mark.slow),
]


@pytest.mark.parametrize("weights", WEIGHTS)
def test_weights_by_component_and_block_are_those_of_diffusers(world: World, weights: Any) -> None:
    expected = world.diffusers(["one"], weights)
    load_lora_weights(world.pipe, world.one, weights=weights)
    assert_same(outputs(world.pipe), expected)


def test_two_adapters_act_together_and_are_chosen_and_weighed_as_in_diffusers(world: World) -> None:
    both = world.diffusers(["one", "two"], [0.7, {"unet": 0.2, "text_encoder": 0.9}])
    alone = world.diffusers(["two"], 0.5)
    handle = load_lora_weights(world.pipe, world.one, weights=0.7)
    assert load_lora_weights(world.pipe, world.two, weights={"unet": 0.2, "text_encoder": 0.9}) is handle
    assert_same(outputs(world.pipe), both)
    handle.set_adapters("two", 0.5)
    assert_same(outputs(world.pipe), alone)
    assert handle.active == {"two": 0.5}
    handle.set_adapters(["one", "two"], [0.7, {"unet": 0.2, "text_encoder": 0.9}])
    assert_same(outputs(world.pipe), both)
    assert handle.components == {"one": ("text_encoder", "unet"), "two": ("text_encoder", "unet")}


def test_several_are_loaded_in_one_call_by_list_or_by_name(world: World) -> None:
    both = world.diffusers(["one", "two"], [0.7, 0.2])
    load_lora_weights(world.pipe, [world.one, world.two], weights=[0.7, 0.2])
    assert_same(outputs(world.pipe), both)
    loras(world.pipe).unload()
    handle = load_lora_weights(world.pipe, {"a": world.one, "b": world.two}, weights={"a": 0.7, "b": 0.2})
    assert_same(outputs(world.pipe), both)
    assert handle.adapters == ("a", "b")


def test_swapping_and_removing_leave_the_others_as_they_are(world: World) -> None:
    two = world.diffusers(["two"], {"unet": 0.5})
    handle = load_lora_weights(world.pipe, world.one, adapter_name="style", weights={"unet": 0.5})
    handle.swap("style", world.two)
    assert_same(outputs(world.pipe), two)
    load_lora_weights(world.pipe, world.one, adapter_name="other")
    handle.remove("other")
    assert_same(outputs(world.pipe), two)
    assert handle.adapters == ("style",)


def test_block_weights_as_kohya_has_them_leave_out_what_they_say(world: World) -> None:
    load_lora_weights(world.pipe, world.one, weights={"blocks": {"BASE": 1.0}, "default": 0.0})
    found = outputs(world.pipe)
    assert torch.equal(found["unet"], world.before["unet"])
    assert not torch.equal(found["text_encoder"], world.before["text_encoder"])


@pytest.mark.parametrize("weights", [0.8, WEIGHTS[2]])
def test_merging_gives_what_acted_and_undoing_what_was_before(world: World, weights: Any) -> None:
    handle = load_lora_weights(world.pipe, world.one, weights=weights)
    acting = outputs(world.pipe)
    merged = handle.merge_into()
    assert_same(outputs(world.pipe), acting)
    assert not torch.equal(outputs(world.pipe)["unet"], world.before["unet"])
    merged.undo()


@pytest.mark.slow
def test_a_pipeline_with_merged_weights_is_saved_and_loaded_by_diffusers(world: World, tmp_path: Path) -> None:
    merged = load_lora_weights(world.pipe, world.one, weights=WEIGHTS[2]).merge_into()
    expected = outputs(world.pipe)
    world.pipe.save_pretrained(tmp_path / "merged")
    merged.undo()
    again = type(world.pipe).from_pretrained(tmp_path / "merged", local_files_only=True)
    for component in loadable(again):
        getattr(again, component).eval()
    assert_same(outputs(again), expected)


def test_what_is_saved_loads_in_diffusers_with_the_same_outputs(world: World, tmp_path: Path) -> None:
    expected = world.diffusers(["one"])
    load_lora_weights(world.pipe, world.one).save("one", tmp_path / "saved")
    loras(world.pipe).unload()
    world.pipe.load_lora_weights(tmp_path / "saved")
    try:
        assert_same(outputs(world.pipe), expected)
    finally:
        world.pipe.unload_lora_weights()


def test_a_file_in_kohyas_names_is_the_same_adapter_and_comes_back_as_diffusers(world: World, tmp_path: Path) -> None:
    expected = world.diffusers(["one"])
    flat = tmp_path / "one.safetensors"
    lorahub.convert(world.one, "kohya", flat)
    with load_lora_weights(world.pipe, flat) as handle:
        assert_same(outputs(world.pipe), expected)
        handle.save("one", tmp_path / "back")
    world.pipe.load_lora_weights(tmp_path / "back")
    assert_same(outputs(world.pipe), expected)


@pytest.mark.parametrize("first", ["diffusers", "lorahub"])
def test_adapters_of_the_pipelines_own_loader_act_beside_whichever_came_first(world: World, first: str) -> None:
    both = world.diffusers(["one", "two"], [1.0, 0.5])
    if first == "diffusers":
        world.pipe.load_lora_weights(world.one, adapter_name="one")
        load_lora_weights(world.pipe, world.two, weights=0.5)
    else:
        load_lora_weights(world.pipe, world.two, weights=0.5)
        world.pipe.load_lora_weights(world.one, adapter_name="one")
    assert_same(outputs(world.pipe), both)
    world.pipe.unload_lora_weights()
    only = outputs(world.pipe)
    assert not torch.equal(only["unet"], world.before["unet"])
    loras(world.pipe).unload()
    assert_untouched(world)
    assert_same(only, world.diffusers(["two"], 0.5))


def test_the_pipelines_own_adapters_can_be_fused_and_weighed_beside(world: World) -> None:
    both = world.diffusers(["one", "two"], [0.3, 0.5])
    load_lora_weights(world.pipe, world.two, weights=0.5)
    world.pipe.load_lora_weights(world.one, adapter_name="one")
    world.pipe.set_adapters("one", 0.3)
    assert_same(outputs(world.pipe), both)
    weights = {name: value.clone() for name, value in world.pipe.unet.state_dict().items() if "lora" not in name}
    weights |= {f"te.{name}": value.clone() for name, value in world.pipe.text_encoder.state_dict().items()}
    world.pipe.fuse_lora(components=["unet", "text_encoder"])
    assert_same(outputs(world.pipe), both)
    world.pipe.unfuse_lora(components=["unet", "text_encoder"])
    own = world.pipe.unet.state_dict() | {f"te.{n}": v for n, v in world.pipe.text_encoder.state_dict().items()}
    with torch.no_grad():
        for name, value in weights.items():
            own[name].copy_(value)  # diffusers' way back is not exact
    loras(world.pipe).unload()
    assert "fuse_lora" not in vars(world.pipe)


def test_a_weight_for_what_is_not_there_is_refused_by_name_and_nothing_changes(world: World) -> None:
    with pytest.raises(LorahubError, match="text_encoder_2"):
        load_lora_weights(world.pipe, world.one, weights={"text_encoder_2": 0.5})
    assert_untouched(world)
    handle = load_lora_weights(world.pipe, world.one)
    acting = outputs(world.pipe)
    with pytest.raises(LorahubError, match="block_7"):
        handle.set_adapters("one", {"unet": {"down": {"block_7": 1}}})
    with pytest.raises(UsageError, match="weight of 'one'"):
        handle.set_adapters("one", "strong")
    assert all(torch.equal(acting[name], value) for name, value in outputs(world.pipe).items())


def test_names_are_taken_once_and_handles_end(world: World) -> None:
    with load_lora_weights(world.pipe, world.one) as handle:
        with pytest.raises(UsageError, match="there is an adapter 'one'"):
            load_lora_weights(world.pipe, world.two, adapter_name="one")
        with pytest.raises(UsageError, match="no adapter 'three'"):
            handle.set_adapters("three")
    with pytest.raises(UsageError, match="were taken off"):
        handle.set_adapters("one")
    with pytest.raises(UsageError, match="nothing was loaded"):
        loras(world.pipe)
    with pytest.raises(UsageError, match="no pipeline"):
        load_lora_weights(world.pipe.unet, world.one)
    for odd in (True, "0.5"):
        with pytest.raises(UsageError, match="no number"):
            load_lora_weights(world.pipe, world.one, weights=odd)


def test_an_adapter_for_another_pipeline_is_refused_and_says_what_of_it_is_not_there(tmp_path: Path) -> None:
    pipe, other = flux(), sdxl()
    adapter = save_lora(pipe, tmp_path / "flux")
    with pytest.raises(LorahubError, match="transformer"):
        load_lora_weights(other, adapter)
    report = lorahub.check(adapter, other)
    assert report.verdict >= Verdict.DEGRADED


def test_fused_projections_are_refused_with_the_way_back(tmp_path: Path) -> None:
    pipe = flux()
    adapter = save_lora(pipe, tmp_path / "flux")
    expected = outputs(pipe)
    pipe.transformer.fuse_qkv_projections()
    with pytest.raises(LorahubError, match="are fused") as caught:
        load_lora_weights(pipe, adapter)
    assert "unfuse_qkv_projections" in caught.value.hint
    pipe.transformer.unfuse_qkv_projections()
    with load_lora_weights(pipe, adapter):
        assert not torch.equal(outputs(pipe)["transformer"], expected["transformer"])


def test_fused_projections_that_an_adapter_leaves_alone_do_not_matter(world: World) -> None:
    expected = world.diffusers(["one"])["unet"]
    world.pipe.fuse_qkv_projections(unet=False)  # those of the autoencoder
    with load_lora_weights(world.pipe, world.one):
        assert torch.allclose(outputs(world.pipe)["unet"], expected, atol=1e-4)
    world.pipe.unfuse_qkv_projections(unet=False)


def test_a_single_model_takes_its_component_of_an_adapter(world: World) -> None:
    own = unet()
    own.load_state_dict(world.pipe.unet.state_dict())
    expected = world.diffusers(["one"])["unet"]
    with lorahub.attach(own, {"one": world.one}, allow=["component-elsewhere"]):
        world.pipe.unet, kept = own, world.pipe.unet
        try:
            found = outputs(world.pipe)["unet"]
        finally:
            world.pipe.unet = kept
    assert float((found - expected).abs().max()) <= NOISE * float(expected.abs().max())


@pytest.mark.slow
def test_one_adapter_for_each_of_two_transformers_as_diffusers_loads_them(tmp_path: Path) -> None:
    pipe = wan()
    high = save_lora(pipe, tmp_path / "high", seed=1, only=("transformer",))
    low = save_lora(pipe, tmp_path / "low", seed=2, only=("transformer",))
    before = outputs(pipe)
    pipe.load_lora_weights(high, adapter_name="high")
    pipe.load_lora_weights(low, adapter_name="low", load_into_transformer_2=True)
    expected = outputs(pipe)
    pipe.unload_lora_weights()
    assert set(expected) == {"transformer", "transformer_2"}
    for component, value in before.items():
        assert float((expected[component] - value).norm() / value.norm()) > 1e-2
    handle = load_lora_weights(pipe, high)
    assert torch.equal(outputs(pipe)["transformer_2"], before["transformer_2"])
    load_lora_weights(pipe, low, component="transformer_2", weights=1.0)
    assert_same(outputs(pipe), expected)
    with pytest.raises(UsageError, match="another component"):
        handle.merge_into()
    with pytest.raises(UsageError, match="no component 'transformer_3'"):
        load_lora_weights(pipe, low, adapter_name="third", component="transformer_3")
    handle.unload()
    assert all(torch.equal(before[name], value) for name, value in outputs(pipe).items())


def test_the_package_says_what_it_has() -> None:
    assert set(lorahub_diffusers.__all__) <= set(dir(lorahub_diffusers)) | {
        "Loras",
        "Words",
        "load_lora_weights",
        "load_textual_inversion",
        "loras",
    }
    with pytest.raises(AttributeError):
        _ = lorahub_diffusers.nothing
