"""A head that an adapter brings travels with it: into a folder that timm loads, and into models built for it."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from tiny_timm import TINY, Tiny, build, images, timm

import lorahub
import lorahub_timm
from lorahub.bases.index import BaseRef
from lorahub.errors import BaseMismatch, LorahubError, UsageError
from lorahub_timm import Timm

pytestmark = [
    pytest.mark.filterwarnings("ignore:Could not find a config file in"),
    pytest.mark.filterwarnings("ignore:Unable to fetch remote file"),
]

CLASSES = 3


def trained(tiny: Tiny, folder: Path, *, base: Any, heads: tuple[str, ...] | None = None, seed: int = 3) -> Any:
    """What PEFT trains on a model whose head has ``CLASSES`` classes: the backbone of ``base``, and a new head."""
    model = timm.create_model(tiny.name, num_classes=CLASSES, **tiny.args).eval()
    own = model.state_dict()
    backbone = {name: each for name, each in base.state_dict().items() if own[name].shape == each.shape}
    model.load_state_dict(backbone, strict=False)
    config = peft.LoraConfig(
        r=4, target_modules=list(tiny.modules), modules_to_save=list(heads or (tiny.head,)), init_lora_weights=False
    )
    torch.manual_seed(seed)
    wrapped = peft.get_peft_model(model, config)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "modules_to_save" in name:
                parameter.add_(torch.randn_like(parameter))
    wrapped.save_pretrained(folder)
    return wrapped.merge_and_unload().eval()


def output(model: Any, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        found = model(x)
    return found if isinstance(found, torch.Tensor) else found[0]


def far(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).abs().max() / other.abs().max())


HEADED = ("vit", "swin", "convnext", "efficientnet", "maxvit")


@pytest.mark.parametrize("what", HEADED)
def test_a_merged_folder_has_the_adapters_classes_and_loads_in_timm(what: str, tmp_path: Path, saved: Any) -> None:
    tiny = TINY[what]
    base = build(tiny)
    folder = saved(base, model_config={"label_names": list("abcde")})
    theirs = trained(tiny, tmp_path / "adapter", base=base)

    lorahub.merge(folder, {"one": tmp_path / "adapter"}, out=tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["num_classes"] == CLASSES
    assert not config.get("label_names")
    loaded = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
    assert loaded.num_classes == CLASSES
    x = images(tiny)
    assert far(output(loaded, x), output(theirs, x)) < 1e-4
    again, _ = lorahub.open_base(tmp_path / "out").index, None
    assert again.parameters[f"{tiny.head}.weight"].shape[0] == CLASSES


@pytest.mark.parametrize("what", HEADED)
@pytest.mark.parametrize("merge", [False, True])
def test_create_model_builds_the_head_that_the_adapter_brings(
    what: str, merge: bool, tmp_path: Path, saved: Any
) -> None:
    tiny = TINY[what]
    base, x = build(tiny), images(tiny)
    folder = saved(base)
    theirs = trained(tiny, tmp_path / "adapter", base=base)
    model = lorahub_timm.create_model(f"local-dir:{folder}", adapter=tmp_path / "adapter", merge=merge).eval()
    assert model.num_classes == CLASSES
    assert far(output(model, x), output(theirs, x)) < 1e-4
    held = lorahub_timm.handle(model)
    if merge:
        held.undo()
    else:
        held.detach()
    own = base.state_dict()
    rest = {name: each for name, each in model.state_dict().items() if not name.startswith(tiny.head)}
    assert all(torch.equal(each, own[name]) for name, each in rest.items())


def test_a_weight_is_for_the_backbone_and_the_new_head_is_whole(tmp_path: Path, saved: Any) -> None:
    tiny = TINY["vit"]
    base, x = build(tiny), images(tiny)
    folder = saved(base)
    theirs = trained(tiny, tmp_path / "adapter", base=base)
    expected = copy.deepcopy(theirs)
    before = base.state_dict()
    with torch.no_grad():
        for name, each in expected.named_parameters():
            if not name.startswith("head"):
                each.copy_(before[name] + 0.5 * (each - before[name]))
    for merge in (False, True):
        model = lorahub_timm.create_model(
            f"local-dir:{folder}", adapter=tmp_path / "adapter", weight=0.5, merge=merge
        ).eval()
        assert far(output(model, x), output(expected, x)) < 1e-4
    assert far(output(theirs, x), output(expected, x)) > 1e-2


def test_two_heads_come_together_or_not_at_all(tmp_path: Path, saved: Any) -> None:
    tiny = TINY["deit"]
    base = build(tiny)
    folder = saved(base)
    trained(tiny, tmp_path / "both", base=base, heads=("head", "head_dist"))
    trained(tiny, tmp_path / "half", base=base, heads=("head",))
    lorahub.merge(folder, {"one": tmp_path / "both"}, out=tmp_path / "out")
    assert timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).head_dist.weight.shape[0] == CLASSES
    with pytest.raises(LorahubError, match="head_dist"):
        lorahub.merge(folder, {"one": tmp_path / "half"}, out=tmp_path / "none")


def test_a_base_without_a_head_gets_the_adapters(tmp_path: Path, saved: Any) -> None:
    tiny = TINY["vit"]
    base, x = build(tiny, num_classes=0), images(tiny)
    theirs = trained(tiny, tmp_path / "adapter", base=base)
    lorahub.merge(saved(base), {"one": tmp_path / "adapter"}, out=tmp_path / "out")
    loaded = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
    assert far(output(loaded, x), output(theirs, x)) < 1e-4


def test_a_number_of_classes_in_the_models_arguments_changes_too(framework: Timm) -> None:
    model = build(TINY["vit"])
    index = framework.index_model(model, BaseRef())
    created = {"head.weight": ((CLASSES, 24), "F32"), "head.bias": ((CLASSES,), "F32")}
    edits = framework.edits(index, created, {"id2label": {"0": "ant", "1": "bee", "2": "cat"}})
    assert edits is not None
    assert edits.config["model_args"]["num_classes"] == CLASSES  # type: ignore[index,call-overload]
    assert edits.config["label_names"] == ["ant", "bee", "cat"]
    assert not edits.missing


@pytest.mark.parametrize(
    "created",
    [
        {"fc.weight": ((3, 24), "F32")},
        {"head.weight": ((3, 24), "F32"), "head.bias": ((4,), "F32")},
        {"blocks.0.attn.qkv.weight": ((3, 24), "F32")},
    ],
)
def test_what_is_no_head_is_not_created(created: Any, framework: Timm) -> None:
    index = framework.index_model(build(TINY["vit"]), BaseRef())
    assert framework.edits(index, created, {}) is None


def test_another_number_of_classes_is_a_contradiction(tmp_path: Path, saved: Any) -> None:
    base = build(TINY["vit"])
    trained(TINY["vit"], tmp_path / "adapter", base=base)
    with pytest.raises(UsageError, match="3 classes"):
        lorahub_timm.create_model(f"local-dir:{saved(base)}", adapter=tmp_path / "adapter", num_classes=7)


@pytest.mark.parametrize("what", ["vit", "swin", "convnext"])
def test_without_a_head_the_adapter_comes_without_its_own(what: str, tmp_path: Path, saved: Any) -> None:
    tiny = TINY[what]
    base, x = build(tiny), images(tiny)
    theirs = trained(tiny, tmp_path / "adapter", base=base)
    folder = saved(base)
    model = lorahub_timm.create_model(f"local-dir:{folder}", adapter=tmp_path / "adapter", num_classes=0).eval()
    with torch.no_grad():
        expected = theirs.forward_head(theirs.forward_features(x), pre_logits=True)
        plain = base.forward_head(base.forward_features(x), pre_logits=True)
    assert far(output(model, x), expected) < 1e-4
    assert far(plain, expected) > 1e-2


FEATURES = ("vit", "swin", "convnext", "efficientnet", "pvt v2", "maxvit")


@pytest.mark.parametrize("what", FEATURES)
@pytest.mark.parametrize("merge", [False, True])
def test_features_are_those_of_the_adapted_model(what: str, merge: bool, tmp_path: Path, saved: Any) -> None:
    tiny = TINY[what]
    base, x = build(tiny), images(tiny)
    theirs = trained(tiny, tmp_path / "adapter", base=base)
    folder = saved(base)
    again = saved(theirs)
    levels: dict[str, Any] = {"features_only": True, "pretrained": True}
    levels |= {"out_indices": (0, 1)} if what == "vit" else {}
    reference = timm.create_model(f"local-dir:{again}", **levels).eval()
    model = lorahub_timm.create_model(f"local-dir:{folder}", adapter=tmp_path / "adapter", merge=merge, **levels).eval()
    plain = timm.create_model(f"local-dir:{folder}", **levels).eval()
    with torch.no_grad():
        found, expected, before = model(x), reference(x), plain(x)
    assert len(found) == len(expected) > 0
    assert all(far(one, other) < 1e-4 for one, other in zip(found, expected, strict=True))
    assert far(before[-1], expected[-1]) > 1e-2


def test_dynamic_and_other_image_sizes_take_the_same_adapter(tmp_path: Path, saved: Any) -> None:
    tiny = TINY["vit"]
    base = build(tiny)
    theirs = trained(tiny, tmp_path / "adapter", base=base)
    folder = saved(base)
    model = lorahub_timm.create_model(
        f"local-dir:{folder}", adapter=tmp_path / "adapter", dynamic_img_size=True, merge=True
    ).eval()
    reference = timm.create_model(f"local-dir:{saved(theirs)}", pretrained=True, dynamic_img_size=True).eval()
    x = torch.randn(2, 3, 48, 40)
    assert far(output(model, x), output(reference, x)) < 1e-4


def test_what_does_not_fit_is_refused_before_weights_are_loaded(
    tmp_path: Path, saved: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = build(TINY["vit"])
    trained(TINY["vit"], tmp_path / "adapter", base=base)
    other = build(TINY["pvt v2"])
    folder = saved(other)
    (folder / "model.safetensors").unlink()
    with pytest.raises(BaseMismatch):
        lorahub_timm.create_model(f"local-dir:{folder}", adapter=tmp_path / "adapter")


def test_without_a_name_the_recorded_base_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = TINY["vit"]
    base = build(tiny)
    trained(tiny, tmp_path / "adapter", base=base)
    lorahub.record(tmp_path / "adapter", base)
    asked: list[str] = []

    def create(name: str, **_: Any) -> Any:
        asked.append(name)
        raise KeyError(name)

    monkeypatch.setattr(timm, "create_model", create)
    with pytest.raises(KeyError):
        lorahub_timm.create_model(adapter=tmp_path / "adapter")
    assert asked == ["hf-hub:timm/vit_tiny_patch16_224.augreg_in21k_ft_in1k"]


def test_a_model_from_elsewhere_has_no_handle() -> None:
    with pytest.raises(UsageError, match="create_model"):
        lorahub_timm.handle(build(TINY["vit"]))


def test_an_adapter_attached_leaves_no_trace_and_goes_with_others(tmp_path: Path, saved: Any) -> None:
    tiny = TINY["vit"]
    base, x = build(tiny), images(tiny)
    folder = saved(base)
    for seed, name in enumerate(("one", "two")):
        trained(tiny, tmp_path / name, base=base, seed=seed)
    model = lorahub_timm.create_model(f"local-dir:{folder}", adapter=tmp_path / "one").eval()
    assert set(model.state_dict()) == set(base.state_dict())
    live: Any = lorahub_timm.handle(model)
    first = output(model, x)
    live.add("other", tmp_path / "two")
    live.set_adapters(["other"])
    second = output(model, x)
    assert far(second, first) > 1e-2
    live.set_adapters([live.adapters[0]])
    assert torch.equal(output(model, x), first)
    twin = copy.deepcopy(model)
    assert torch.equal(output(twin, x), first)
    other: Any = lorahub_timm.handle(twin)
    other.detach()
    assert far(output(twin, x), output(model, x)) > 1e-2


def test_statistics_of_normalisations_travel_where_their_modules_are_saved(tmp_path: Path) -> None:
    tiny = TINY["efficientnet"]
    base, x = build(tiny), images(tiny)
    config = peft.LoraConfig(
        r=4, target_modules=["conv_pw"], modules_to_save=["bn1", "bn2", "bn3", "classifier"], init_lora_weights=False
    )
    wrapped = peft.get_peft_model(copy.deepcopy(base), config).train()
    wrapped(images(tiny, 8))  # moves the running statistics
    wrapped.eval().save_pretrained(tmp_path / "adapter")
    theirs = wrapped.merge_and_unload()
    plain, expected = output(base, x), output(theirs, x)
    with lorahub.attach(base, {"one": tmp_path / "adapter"}):
        assert far(output(base, x), expected) < 1e-4
    assert torch.equal(output(base, x), plain)
    lorahub.merge(base, {"one": tmp_path / "adapter"})
    assert far(output(base, x), expected) < 1e-4
    assert far(plain, expected) > 1e-2


# peft 0.21 asks transformers 5.23 for an attribute that it deprecates
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_an_adapter_of_the_wrapper_in_transformers_lands_in_the_plain_model(tmp_path: Path) -> None:
    from transformers import TimmWrapperConfig, TimmWrapperForImageClassification

    tiny = TINY["vit"]
    config = TimmWrapperConfig(architecture=tiny.name, model_args=dict(tiny.args), num_labels=5)
    wrapper = TimmWrapperForImageClassification(config).eval()
    assert lorahub.open_base(wrapper).framework.name != "timm"  # it is a model of transformers
    base, x = build(tiny), images(tiny)
    wrapper.timm_model.load_state_dict(base.state_dict())
    modules = peft.LoraConfig(r=4, target_modules=["qkv", "fc1"], init_lora_weights=False)
    wrapped = peft.get_peft_model(wrapper, modules)
    wrapped.save_pretrained(tmp_path / "adapter")
    with torch.no_grad():
        expected = wrapped(pixel_values=x).logits
    plain = output(base, x)
    lorahub.merge(base, {"one": tmp_path / "adapter"})
    assert far(output(base, x), expected) < 1e-4
    assert far(plain, expected) > 1e-2
