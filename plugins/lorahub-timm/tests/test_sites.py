"""Which weights act through their modules' outputs: the table held against calls of real models, on the meta device."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_timm import TINY, build, timm

from lorahub.bases.calls import site_of
from lorahub_timm import Timm
from lorahub_timm.sites import LOOKED_INTO, REGROUPED


def spread(names: list[str], count: int) -> list[str]:
    """So many of them, the first and the last among them."""
    return [names[at * (len(names) - 1) // max(count - 1, 1)] for at in range(count)] if len(names) > count else names


WALKED = (
    *("beit_base_patch16_224", "davit_tiny", "eva02_tiny_patch14_224", "gcvit_xxtiny", "efficientvit_m2"),
    *("maxvit_tiny_pm_256", "test_maxvit", "mobilevit_xxs", "mvitv2_tiny", "sam2_hiera_tiny", "tiny_vit_5m_224"),
    *(
        "swin_s3_tiny_224",
        "swinv2_tiny_window16_256",
        "swinv2_cr_tiny_224",
        "tnt_s_legacy_patch16_224",
        "tnt_s_patch16_224",
    ),
    *("xcit_nano_12_p8_224", "test_vit_relpos", "test_vit", "pvt_v2_b0", "levit_128s", "test_efficientnet"),
    *("convnext_atto", "test_coatnet", "vit_base_patch16_siglip_224", "twins_svt_small", "nextvit_small"),
)
FEW_OF_EACH_FILE = [name for file in timm.list_modules() for name in spread(timm.list_models(module=file), 4)]
SLOWER = frozenset(
    {
        *(
            "davit_tiny",
            "gcvit_xxtiny",
            "levit_128s",
            "maxvit_tiny_pm_256",
            "mvitv2_tiny",
            "nextvit_small",
            "pvt_v2_b0",
        ),
        *("swin_s3_tiny_224", "swinv2_cr_tiny_224", "tiny_vit_5m_224", "tnt_s_legacy_patch16_224", "twins_svt_small"),
        "vit_base_patch16_siglip_224",
    }
)
"""Those that are left to the slow walk, for time: of what looks into its projection, and of both ways, some stay."""

ROWS = 2


def judge(name: str) -> None:
    """No weight with a site is used apart from its module, and none is given other rows than the site says."""
    framework = Timm()
    with torch.device("meta"):
        model = timm.create_model(name, num_classes=7).eval()
    sites = {each: framework.site(model, f"{each}.weight") for each, module in model.named_modules() if weighs(module)}
    called: dict[str, set[int]] = {}
    for each, module in model.named_modules():
        if sites.get(each) is not None:
            module.register_forward_hook(
                lambda _module, args, _out, each=each: called.setdefault(each, set()).add(args[0].shape[0])
            )
    out = model(torch.empty(ROWS, *model.pretrained_cfg["input_size"], device="meta"))
    if not isinstance(out, torch.Tensor):
        out = torch.cat([each.flatten() for each in (out.values() if isinstance(out, dict) else out)])
    known = [each for each, site in sites.items() if site is not None]
    used = torch.autograd.grad(out.sum(), [model.get_parameter(f"{each}.weight") for each in known], allow_unused=True)
    passed_by = [
        each for each, gradient in zip(known, used, strict=True) if gradient is not None and each not in called
    ]
    assert not passed_by, f"{name}: {passed_by[:3]} are used, and not called"
    regrouped = [each for each, rows in called.items() if rows != {ROWS}]
    apart = [each for each in regrouped if sites[each].rows is not None]  # type: ignore[union-attr]
    assert not apart, f"{name}: {apart[:3]} are given other rows than the batch has"


def weighs(module: torch.nn.Module) -> bool:
    return isinstance(getattr(module, "weight", None), torch.nn.Parameter)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] if name in SLOWER else []) for name in WALKED]
)
def test_weights_with_a_site_are_used_by_calling_their_modules(name: str) -> None:
    judge(name)


@pytest.mark.slow
@pytest.mark.parametrize("name", FEW_OF_EACH_FILE)
def test_weights_with_a_site_are_used_by_calling_their_modules_in_every_file_of_timm(name: str) -> None:
    judge(name)


def test_attention_that_looks_into_its_projection_gives_it_no_site(framework: Timm) -> None:
    for what in ("beit", "eva", "swin v2"):
        model = build(TINY[what])
        names = [name for name, _ in model.named_modules() if name.endswith("attn.qkv")]
        assert names
        assert all(site_of(model, f"{name}.weight") is not None for name in names)
        assert all(framework.site(model, f"{name}.weight") is None for name in names)


def test_attention_that_calls_its_projection_keeps_the_site(framework: Timm) -> None:
    model = build(TINY["vit"])
    found = framework.site(model, "blocks.0.attn.qkv.weight")
    assert found is not None
    assert found.rows == 0


def test_classes_of_the_tables_are_timms() -> None:
    from importlib import import_module

    for kind in (*LOOKED_INTO, *REGROUPED):
        module, _, name = kind.rpartition(".")
        assert isinstance(getattr(import_module(module), name), type), kind


def test_convolutions_have_sites_in_groups_too(framework: Timm) -> None:
    model: Any = build(TINY["convnext"])
    found = framework.site(model, "stages.0.blocks.0.conv_dw.weight")
    assert found is not None
    assert found.groups == model.stages[0].blocks[0].conv_dw.groups > 1
