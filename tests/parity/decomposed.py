"""Models and adapters of PEFT's kinds that take the weight apart, or draw numbers again; nothing is trained.

Every adapter parameter is moved by seeded noise, and saved.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.pytorch_utils import Conv1D

from lorahub.adapter import Adapter, load, open_header
from lorahub.bases.index import BaseIndex, BaseRef
from lorahub.bases.torch_module import TorchModule
from lorahub.plugins import Registry

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what PEFT's imports say of other packages is not ours
    import peft
    from peft import PeftConfig, PeftModel, get_peft_model
    from peft.tuners.lora.config import KasaConfig


class Layers(nn.Module):
    """Every layer type that PEFT adapts with one of these kinds; the order is not that of the names."""

    def __init__(self) -> None:
        super().__init__()
        self.third = nn.Linear(16, 16)
        self.embed = nn.Embedding(11, 12)
        self.first = nn.Linear(12, 8)
        self.second = nn.Linear(8, 12, bias=False)
        self.odd = nn.Linear(7, 9)
        self.turned = Conv1D(8, 12)
        self.square = Conv1D(12, 12)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.third(self.first(self.embed(tokens)).repeat(1, 1, 2))


def base() -> Layers:
    torch.manual_seed(3)
    return Layers()


def index() -> BaseIndex:
    return TorchModule().index_model(base(), BaseRef())


def quietly(action: Callable[[], Any]) -> Any:
    """Run PEFT's code, whose warnings are its own affair."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return action()


@dataclass(frozen=True)
class Case:
    """A PEFT config, and what comes of it."""

    config: Callable[[], PeftConfig]
    kind: str
    changed: int = 1
    noise: float = 0.5
    codes: tuple[str, ...] = ()  # of findings
    needs_base: bool = False
    reloaded: float = 0.0  # how far PEFT is from itself after saving and loading


THREE = ["first", "second", "third"]
FIVE = [*THREE, "turned", "embed"]


def case(
    kind: str, cls: type[PeftConfig], changed: int, *, about: Mapping[str, Any] | None = None, **fields: Any
) -> Case:
    return Case(lambda: quietly(lambda: cls(**fields)), kind, changed, **(about or {}))


SIGNS = {"codes": ("result-of-this-machine",), "reloaded": 1e-6}  # lorahub writes another alpha, which cancels
DRAWN = {"codes": ("drawn-again",), "needs_base": True}

CASES: Mapping[str, Case] = {
    "kasa": case("kasa", peft.LoraConfig, 3, r=3, kasa_config=KasaConfig(), target_modules=THREE),
    "kasa, bias and rslora": case(
        "kasa",
        peft.LoraConfig,
        4,
        r=2,
        lora_alpha=5,
        use_rslora=True,
        lora_bias=True,
        kasa_config=KasaConfig(),
        target_modules=["first", "third"],
    ),
    "pissa": case("pissa", peft.LoraConfig, 3, r=3, lora_alpha=5, init_lora_weights="pissa", target_modules=THREE),
    "pissa, rslora and stored transposed": case(
        "pissa",
        peft.LoraConfig,
        2,
        r=4,
        lora_alpha=5,
        use_rslora=True,
        init_lora_weights="pissa",
        target_modules=["turned", "first"],
        rank_pattern={"first": 2},
    ),
    "olora": case("pissa", peft.LoraConfig, 3, r=3, lora_alpha=5, init_lora_weights="olora", target_modules=THREE),
    "osf": case("osf", peft.OSFConfig, 3, target_modules=THREE),
    "osf, by module": case(
        "osf", peft.OSFConfig, 3, effective_rank=0.25, rank_pattern={"first": 6, "thi": 0.8}, target_modules=THREE
    ),
    "peanut": case("peanut", peft.PeanutConfig, 3, r=3, target_modules=THREE),
    "peanut, deep": case(
        "peanut", peft.PeanutConfig, 2, r=4, depth=2, act_fn="gelu_new", scaling=0.7, target_modules=["first", "third"]
    ),
    "psoft": case("psoft", peft.PsoftConfig, 3, r=4, target_modules=THREE, about=SIGNS),
    "psoft, from random projections": case(
        "psoft",
        peft.PsoftConfig,
        3,
        r=3,
        psoft_svd="lowrank",
        psoft_svd_lowrank_niter=3,
        random_seed=5,
        ab_svd_init="pissa_init",
        target_modules=THREE,
        about=SIGNS,
    ),
    "psoft, from one random projection": case(
        "psoft",
        peft.PsoftConfig,
        1,
        r=2,
        psoft_svd="lowrank",
        psoft_svd_lowrank_niter=0,
        target_modules=["third"],
        about=SIGNS,
    ),
    "psoft, one angle less": case("psoft", peft.PsoftConfig, 1, r=1, target_modules=["third"], about=SIGNS),
    "psoft, free": case(
        "psoft",
        peft.PsoftConfig,
        1,
        r=4,
        psoft_alpha=3,
        psoft_orth=False,
        psoft_mag_a=False,
        psoft_mag_b=False,
        target_modules=["third"],
        about=SIGNS,
    ),
    **{
        f"psoft, a series of {terms}": case(
            "psoft",
            peft.PsoftConfig,
            1,
            r=4,
            use_cayley_neumann=True,
            num_cayley_neumann_terms=terms,
            cayley_neumann_eps=bound,
            psoft_mag_b=False,
            target_modules=["third"],
            about=SIGNS,
        )
        for terms, bound in {2: None, 3: 0.9, 4: None, 5: 0.5}.items()
    },
    "frod": case("frod", peft.FrodConfig, 3, sparse_rate=0.1, progressbar=False, target_modules=THREE),
    "frod, stored transposed": case(
        "frod", peft.FrodConfig, 1, progressbar=False, fan_in_fan_out=True, target_modules=["turned"]
    ),
    "frod, no places": case("frod", peft.FrodConfig, 1, sparse_rate=0.0, progressbar=False, target_modules=["first"]),
    "tinylora": case("tinylora", peft.TinyLoraConfig, 5, r=3, u=6, target_modules=FIVE),
    "tinylora, some tied": case(
        "tinylora", peft.TinyLoraConfig, 5, r=2, u=4, weight_tying=0.5, projection_seed=9, target_modules=FIVE
    ),
    "tinylora, all tied": case("tinylora", peft.TinyLoraConfig, 3, r=20, u=4, weight_tying=1.0, target_modules=THREE),
    "tinylora, drawn": case(
        "tinylora",
        peft.TinyLoraConfig,
        5,
        r=2,
        u=4,
        weight_tying=0.3,
        save_projection=False,
        target_modules=FIVE,
        about=DRAWN,
    ),
    "unilora": case("unilora", peft.UniLoraConfig, 3, r=3, theta_d_length=13, save_indices=True, target_modules=THREE),
    "unilora, drawn": case(
        "unilora",
        peft.UniLoraConfig,
        4,
        r=3,
        theta_d_length=13,
        proj_seed=5,
        target_modules=[*THREE, "turned"],
        about=DRAWN,
    ),
    "unilora, more numbers than places": case(
        "unilora", peft.UniLoraConfig, 1, r=2, theta_d_length=500, target_modules=["second"], about=DRAWN
    ),
    "supertuning, the largest": case(
        "supertuning",
        peft.SupertuningConfig,
        3,
        sparsity=0.7,
        r=2,
        lora_alpha=3,
        save_precomputed_indices=False,
        target_modules=THREE,
    ),
    "supertuning, the smallest": case(
        "supertuning",
        peft.SupertuningConfig,
        1,
        sparsity=0.5,
        select_top=False,
        save_precomputed_indices=False,
        target_modules=["third"],
    ),
    **{
        f"waveft, {family}": case(
            "waveft",
            peft.WaveFTConfig,
            3,
            n_frequency=50,
            scaling=2.0,
            wavelet_family=family,
            target_modules=["first", "odd", "turned"],
            fan_in_fan_out=turned,
        )
        for family, turned in {
            "db2": False,
            "db10": False,
            "sym2": True,
            "sym5": False,
            "coif1": False,
            "coif4": True,
        }.items()
    },
    "vera, drawn": case(
        "vera", peft.VeraConfig, 3, r=4, save_projection=False, projection_prng_key=5, target_modules=THREE, about=DRAWN
    ),
    "pvera, drawn": case("pvera", peft.PveraConfig, 3, r=4, save_projection=False, target_modules=THREE, about=DRAWN),
    "randlora, drawn": case(
        "randlora",
        peft.RandLoraConfig,
        3,
        r=3,
        randlora_alpha=4,
        save_projection=False,
        target_modules=THREE,
        about=DRAWN,
    ),
    "randlora, drawn sparse": case(
        "randlora",
        peft.RandLoraConfig,
        1,
        r=3,
        randlora_alpha=2,
        sparse=True,
        save_projection=False,
        target_modules=["first"],
        about=DRAWN,
    ),
    "randlora, drawn very sparse": case(
        "randlora",
        peft.RandLoraConfig,
        1,
        r=5,
        randlora_alpha=2,
        very_sparse=True,
        save_projection=False,
        fan_in_fan_out=True,
        target_modules=["turned"],
        about=DRAWN,
    ),
}


def trained(case: Case, folder: Path) -> PeftModel:
    """A PEFT model with every trainable number moved, saved to ``folder``."""
    model = quietly(lambda: get_peft_model(base(), case.config()))
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * case.noise)
    quietly(lambda: model.save_pretrained(folder))
    return model.eval()


def loaded(folder: Path, registry: Registry, *, with_base: bool) -> Adapter:
    return load(open_header(folder, registry, index=index() if with_base else None), registry)


def merged_by_hand(adapter: Adapter, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Every parameter of the base that the adapter changes, with the change, in the base's orientation."""
    weights = base().state_dict()
    result = {}
    for target, delta in adapter.deltas.items():
        turned = target.name in ("turned.weight", "square.weight")
        weight = weights[target.name].to(dtype)
        logical = weight.T if turned else weight
        logical = logical + delta.delta(logical)
        result[target.name] = logical.T if turned else logical
    return result


def config_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "adapter_config.json").read_text())


def rewrite(folder: Path, **fields: Any) -> None:
    """Change config fields; None removes one."""
    config = {name: value for name, value in (config_of(folder) | fields).items() if value is not None}
    (folder / "adapter_config.json").write_text(json.dumps(config))


def edit(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Change the stored tensors."""
    tensors = load_file(folder / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
