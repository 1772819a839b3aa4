"""MLX's folder: factors turned, the scale taken as it is, and refusals that say why."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open

from lorahub.adapter import Adapter, load, open_header, save
from lorahub.bases.index import BaseIndex, BaseRef, ParameterInfo
from lorahub.bases.layout import Target
from lorahub.deltas.delta import Delta
from lorahub.deltas.dora import DoRA
from lorahub.deltas.full import Full
from lorahub.deltas.lora import LoRA
from lorahub.deltas.replace import Replace
from lorahub.errors import CannotCarry, IntegrityError, UnsupportedFormat
from lorahub.files.writer import save_file
from lorahub.findings import Verdict
from lorahub.formats.mlx import MlxFormat
from lorahub.plugins import Registry, load_registry

Q = "model.layers.3.self_attn.q_proj"


def write(folder: Path, tensors: dict[str, torch.Tensor], **config: object) -> Path:
    folder.mkdir()
    save_file(folder / "adapters.safetensors", tensors, {})
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def factors(module: str = Q, *, wide: int = 6, out: int = 4, r: int = 2) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        f"{module}.lora_a": torch.randn(wide, r, generator=generator),
        f"{module}.lora_b": torch.randn(r, out, generator=generator),
    }


def loops(a: torch.Tensor, b: torch.Tensor, scale: float) -> torch.Tensor:
    """``scale * (a @ b)`` of [in, r] and [r, out], element by element, as [out, in]."""
    (wide, r), out = a.shape, b.shape[1]
    rows = [[sum(float(a[i, k] * b[k, o]) for k in range(r)) * scale for i in range(wide)] for o in range(out)]
    return torch.tensor(rows, dtype=torch.float64)


@given(wide=st.integers(1, 5), out=st.integers(1, 5), r=st.integers(1, 3), scale=st.floats(-30, 30, allow_nan=False))
def test_a_linear_delta_is_scale_times_a_b_turned(wide: int, out: int, r: int, scale: float) -> None:
    registry = load_registry()
    tensors = {key: value.double() for key, value in factors(wide=wide, out=out, r=r).items()}
    delta = read_one(registry, tensors, {"lora_parameters": {"rank": r, "scale": scale}})
    expected = loops(tensors[f"{Q}.lora_a"], tensors[f"{Q}.lora_b"], scale)
    torch.testing.assert_close(delta.delta(torch.zeros(out, wide).double()), expected, rtol=1e-12, atol=1e-12)


def read_one(registry: Registry, tensors: dict[str, torch.Tensor], config: dict[str, object]) -> Delta:
    with tempfile.TemporaryDirectory() as place:
        folder = write(Path(place) / "one", tensors, **config)
        (delta,) = load(open_header(folder, registry), registry).deltas.values()
    return delta


def test_the_scale_is_no_alpha_and_20_where_nothing_is_said(registry: Registry, tmp_path: Path) -> None:
    said = open_header(write(tmp_path / "a", factors(), lora_parameters={"rank": 2, "scale": 3}), registry)
    silent = open_header(write(tmp_path / "b", factors(), lora_parameters={"rank": 2}), registry)
    assert [each.reading.groups[0].options["scale"] for each in (said, silent)] == [3.0, 20.0]
    assert said.reading.groups[0].options["scale_rule"] == "absolute"
    assert said.findings == silent.findings == ()


def test_an_embedding_is_not_turned(registry: Registry, tmp_path: Path) -> None:
    tensors = factors("model.embed_tokens", wide=9, out=4)
    folder = write(tmp_path / "a", tensors, lora_parameters={"rank": 2, "scale": 2.0})
    (delta,) = load(open_header(folder, registry), registry).deltas.values()
    assert delta.shape() == (9, 4)
    expected = 2 * tensors["model.embed_tokens.lora_a"].double() @ tensors["model.embed_tokens.lora_b"].double()
    torch.testing.assert_close(delta.delta(torch.zeros(9, 4).double()), expected)


@pytest.mark.parametrize(("module", "shape"), [(Q, (4, 6)), ("model.embed_tokens", (9, 4))])
def test_dora_keeps_the_length_of_rows(registry: Registry, tmp_path: Path, module: str, shape: tuple[int, int]) -> None:
    out, wide = shape
    first, second = (out, wide) if module.endswith("embed_tokens") else (wide, out)
    tensors = factors(module, wide=first, out=second) | {f"{module}.m": torch.arange(1.0, out + 1)}
    folder = write(tmp_path / "a", tensors, fine_tune_type="dora", lora_parameters={"rank": 2, "scale": 0.5})
    header = open_header(folder, registry)
    (delta,) = load(header, registry).deltas.values()
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(3)).double()
    merged = weight + delta.delta(weight)
    torch.testing.assert_close(merged.norm(dim=1), torch.arange(1.0, out + 1).double())
    a, b = (tensors[f"{module}.{name}"].double() for name in ("lora_a", "lora_b"))
    moved = weight + 0.5 * (a @ b if module.endswith("embed_tokens") else (a @ b).T)
    torch.testing.assert_close(merged, moved / moved.norm(dim=1, keepdim=True) * merged.norm(dim=1, keepdim=True))
    assert header.kinds == ("dora",)


def test_full_fine_tuning_replaces_parameters(registry: Registry, tmp_path: Path) -> None:
    tensors = {"model.norm.weight": torch.ones(4), f"{Q}.weight": torch.ones(4, 4)}
    adapter = load(open_header(write(tmp_path / "a", tensors, fine_tune_type="full"), registry), registry)
    assert {target.name for target in adapter.deltas} == set(tensors)
    assert {delta.kind for delta in adapter.deltas.values()} == {"replace"}


def test_kernels_of_full_fine_tuning_are_said_to_be_left_out(registry: Registry, tmp_path: Path) -> None:
    header = open_header(
        write(tmp_path / "a", {"conv.weight": torch.ones(4, 3, 3, 2)}, fine_tune_type="full"), registry
    )
    (finding,) = header.findings
    assert (finding.code, finding.level, finding.where) == ("key-unknown", Verdict.DEGRADED, ("conv.weight",))


def experts() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "mlp.switch_mlp.up_proj.lora_a": torch.randn(3, 2, 6, generator=generator),
        "mlp.switch_mlp.up_proj.lora_b": torch.randn(3, 4, 2, generator=generator),
    }


@pytest.mark.parametrize("woven", [False, True], ids=["[E, r, in]", "[E * r, in]"])
def test_stacks_of_experts_are_a_product_for_each(registry: Registry, tmp_path: Path, *, woven: bool) -> None:
    a, b = experts().values()
    tensors = experts() | ({"mlp.switch_mlp.up_proj.lora_a": a.reshape(6, 6)} if woven else {})
    header = open_header(write(tmp_path / "a", tensors, lora_parameters={"rank": 2, "scale": 3.0}), registry)
    assert (header.kinds, header.ranks, header.findings) == (("expert-lora",), (2,), ())
    (delta,) = load(header, registry).deltas.values()
    expected = torch.stack([3 * b[each] @ a[each] for each in range(3)])
    torch.testing.assert_close(delta.delta(torch.zeros(3, 4, 6)), expected)


@pytest.mark.parametrize("name", ["up_proj", "w3"])
def test_in_a_base_with_a_module_for_each_expert_each_is_a_lora_of_its_own(
    registry: Registry, tmp_path: Path, name: str
) -> None:
    known = [f"mlp.experts.{at}.{name}" for at in range(3)]
    parameters = {
        f"{module}.weight": ParameterInfo(shape=(4, 6), dtype="F32", stored_as=f"{module}.weight") for module in known
    }
    index = BaseIndex(ref=BaseRef(), framework="test", parameters=parameters)
    folder = write(tmp_path / "a", experts(), lora_parameters={"rank": 2, "scale": 3.0})
    deltas = load(open_header(folder, registry, index=index), registry).deltas
    assert [target.module for target in deltas] == known
    a, b = experts().values()
    for at, delta in enumerate(deltas.values()):
        torch.testing.assert_close(delta.delta(torch.zeros(4, 6)), 3 * b[at] @ a[at])


def test_stacks_of_experts_are_written_as_they_are_read(registry: Registry, tmp_path: Path) -> None:
    adapter = load(
        open_header(write(tmp_path / "a", experts(), lora_parameters={"rank": 2, "scale": 3.0}), registry), registry
    )
    place = save(adapter, tmp_path / "o", registry=registry, format="mlx")
    with safe_open(place / "adapters.safetensors", "pt") as file:
        assert all(torch.equal(file.get_tensor(key), value) for key, value in experts().items())
    assert json.loads((place / "adapter_config.json").read_text())["fine_tune_type"] == "lora"


@pytest.mark.parametrize(
    ("config", "tensors", "code"),
    [
        ({"lora_parameters": {"rank": 9, "scale": 1.0}}, factors(), "config-contradicts-tensors"),
        ({"lora_parameters": {"rank": 2, "alpha": 16.0}}, factors(), "config-unknown"),
        ({"lora_parameters": {"rank": 2}, "new_maths": 3}, factors(), "config-unknown"),
        ({"lora_parameters": {"rank": 2}}, {**factors(), "lm_head.weight": torch.ones(2, 2)}, "key-unknown"),
        ({"lora_parameters": {"rank": 2}}, {f"{Q}.lora_a": torch.ones(6, 2)}, "slot-missing"),
        ({"lora_parameters": {"rank": 2}, "fine_tune_type": "dora"}, factors(), "slot-missing"),
        (
            {"lora_parameters": {"rank": 2}},
            {f"{Q}.lora_a": torch.ones(6, 2), f"{Q}.lora_b": torch.ones(3, 4)},
            "slot-misfit",
        ),
    ],
)
def test_what_does_not_add_up_is_a_finding(
    registry: Registry, tmp_path: Path, config: dict[str, object], tensors: dict[str, torch.Tensor], code: str
) -> None:
    header = open_header(write(tmp_path / "a", tensors, **config), registry)
    assert [each.code for each in header.findings] == [code]


def test_without_its_config_the_scale_is_assumed_and_has_to_be_allowed(registry: Registry, tmp_path: Path) -> None:
    folder = write(tmp_path / "a", factors())
    (folder / "adapter_config.json").unlink()
    header = open_header(folder, registry)
    (finding,) = header.findings
    assert (finding.code, finding.level, finding.allowable) == ("scale-assumed", Verdict.DEGRADED, True)
    assert header.reading.groups[0].options["scale"] == 20.0


def test_the_npz_of_the_first_trainer_is_read_with_the_number_it_always_used(
    registry: Registry, tmp_path: Path
) -> None:
    np.savez(tmp_path / "adapters.npz", **{key: value.numpy() for key, value in factors().items()})
    header = open_header(tmp_path, registry)
    assert (header.format, header.reading.file) == ("mlx", "adapters.npz")
    assert [(each.code, each.level) for each in header.findings] == [("scale-assumed", Verdict.UNVERIFIED)]
    (delta,) = load(header, registry).deltas.values()
    a, b = factors().values()
    torch.testing.assert_close(delta.delta(torch.zeros(4, 6)), 20 * (a @ b).T)


def test_the_last_of_several_npz_files_is_the_adapter(registry: Registry, tmp_path: Path) -> None:
    for name in ("0000100_adapters.npz", "adapters.npz"):
        np.savez(tmp_path / name, **{key: value.numpy() for key, value in factors().items()})
    assert open_header(tmp_path, registry).reading.file == "adapters.npz"


def test_a_way_of_tuning_that_nobody_knows_is_refused(registry: Registry, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedFormat, match="'new'"):
        open_header(write(tmp_path / "a", factors(), fine_tune_type="new"), registry)


@pytest.mark.parametrize("given", [{"scale": "2"}, {"scale": True}, {"rank": [2]}, 7])
def test_a_config_of_the_wrong_type_is_an_integrity_error(registry: Registry, tmp_path: Path, given: object) -> None:
    with pytest.raises(IntegrityError):
        open_header(write(tmp_path / "a", factors(), lora_parameters=given, fine_tune_type="lora"), registry)


def lora(r: int = 2, scale: float = 0.7) -> LoRA:
    generator = torch.Generator().manual_seed(r)
    return LoRA(torch.randn(4, r, generator=generator), torch.randn(r, 6, generator=generator), scale)


REFUSED: dict[str, Callable[[], dict[Target, Delta]]] = {
    "one scale": lambda: {Target("", "a", "weight"): lora(scale=1.0), Target("", "b", "weight"): lora(scale=2.0)},
    "one rank": lambda: {Target("", "a", "weight"): lora(2), Target("", "b", "weight"): lora(3)},
    "no components": lambda: {Target("unet", "a", "weight"): lora()},
    "no word for full": lambda: {Target("", "a", "weight"): Full(torch.ones(2, 2))},
    "lengths of rows only": lambda: {
        Target("", "a", "weight"): DoRA(torch.ones(4, 2), torch.ones(2, 6), 1.0, torch.ones(6), 1)
    },
    "order of axes": lambda: {Target("", "a", "weight"): Replace(torch.ones(2, 2, 2))},
}


@pytest.mark.parametrize("reason", REFUSED)
def test_what_mlx_has_no_word_for_is_refused(registry: Registry, reason: str) -> None:
    with pytest.raises(CannotCarry, match=reason):
        MlxFormat().write(REFUSED[reason](), tuple(registry.kinds.values()), {})


def test_written_and_read_again_it_is_the_same_and_names_its_modules(registry: Registry, tmp_path: Path) -> None:
    deltas: dict[Target, Delta] = {Target("", Q, "weight"): lora(), Target("", "lm_head", "weight"): lora()}
    place = save(
        Adapter(deltas=deltas, hints={"base_repo": "acme/base"}), tmp_path / "o", registry=registry, format="mlx"
    )
    config = json.loads((place / "adapter_config.json").read_text())
    assert config["lora_parameters"] == {
        "rank": 2,
        "scale": 0.7,
        "dropout": 0.0,
        "keys": ["lm_head", "self_attn.q_proj"],
    }
    assert (config["num_layers"], config["fine_tune_type"]) == (-1, "lora")
    header = open_header(place, registry)
    assert (header.format, header.reading.base_repo, header.findings) == ("mlx", "acme/base", ())
    again = load(header, registry).deltas
    for target, delta in deltas.items():
        found = again[target]
        assert isinstance(found, LoRA)
        assert isinstance(delta, LoRA)
        assert torch.equal(found.up, delta.up)
        assert torch.equal(found.down, delta.down)
        assert found.scale == delta.scale


def test_converted_to_peft_alpha_is_scale_times_rank(registry: Registry, tmp_path: Path) -> None:
    folder = write(tmp_path / "a", factors(), lora_parameters={"rank": 2, "scale": 10.0})
    adapter = load(open_header(folder, registry), registry)
    place = save(adapter, tmp_path / "peft", registry=registry)
    assert json.loads((place / "adapter_config.json").read_text())["lora_alpha"] == 20
    (one,), (other,) = adapter.deltas.values(), load(open_header(place, registry), registry).deltas.values()
    zero = torch.zeros(4, 6)
    assert torch.equal(one.delta(zero), other.delta(zero))


def test_a_real_mlx_adapter_is_read_to_the_last_key(real_adapters: Path, registry: Registry) -> None:
    folder = real_adapters / "ml-explore__mlx-lm__mlx_qwen05"
    header = open_header(folder, registry)
    assert (header.format, header.kinds, header.ranks, len(header.touches)) == ("mlx", ("lora",), (8,), 4)
    assert header.reading.base_repo == "mlx-community/Qwen2.5-0.5B-Instruct-4bit"
    assert header.findings == ()
    deltas = load(header, registry).deltas
    with safe_open(folder / "adapters.safetensors", "pt") as file:
        stored = {key: file.get_tensor(key).double() for key in file.keys()}  # noqa: SIM118 - no mapping
    for target, delta in deltas.items():
        a, b = (stored[f"{target.module}.{name}"] for name in ("lora_a", "lora_b"))
        assert delta.shape() == (b.shape[1], a.shape[0])
        weight = torch.zeros(b.shape[1], a.shape[0], dtype=torch.float64)
        torch.testing.assert_close(delta.delta(weight), 20 * (a @ b).T, rtol=1e-12, atol=1e-15)
