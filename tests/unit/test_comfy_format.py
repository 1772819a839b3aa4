"""Files under the original models' names: both spellings of factors, alphas, differences, and what is left unread."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from lorahub.adapter import AdapterHeader, load, open_header
from lorahub.bases.index import BaseIndex, BaseRef, ParameterInfo
from lorahub.errors import CannotCarry, IntegrityError
from lorahub.files.writer import save_file
from lorahub.findings import Verdict
from lorahub.formats.comfy import ComfyFormat
from lorahub.plugins import Registry

Q = "diffusion_model.blocks.0.self_attn.q"


def opened(
    folder: Path, registry: Registry, tensors: dict[str, torch.Tensor], index: BaseIndex | None = None
) -> AdapterHeader:
    save_file(folder / "some_lora.safetensors", tensors, {})
    return open_header(folder / "some_lora.safetensors", registry, index=index)


def pair(
    down: str = "lora_A.weight", up: str = "lora_B.weight", module: str = Q, r: int = 2
) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        f"{module}.{down}": torch.randn(r, 6, generator=generator),
        f"{module}.{up}": torch.randn(4, r, generator=generator),
    }


@pytest.mark.parametrize(
    ("down", "up"),
    [
        ("lora_A.weight", "lora_B.weight"),
        ("lora_A.default.weight", "lora_B.default.weight"),
        ("lora_down.weight", "lora_up.weight"),
        ("lora.down.weight", "lora.up.weight"),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_alpha_is_divided_by_the_rank_in_either_spelling(
    registry: Registry, tmp_path: Path, down: str, up: str, dtype: torch.dtype
) -> None:
    tensors = pair(down, up) | {f"{Q}.alpha": torch.tensor(3.0, dtype=dtype)}
    header = opened(tmp_path, registry, tensors)
    assert (header.format, header.findings, header.ranks) == ("comfy", (), (2,))
    ((target, delta),) = load(header, registry).deltas.items()
    assert target.name == "blocks.0.self_attn.q.weight"
    expected = 1.5 * tensors[f"{Q}.{up}"].double() @ tensors[f"{Q}.{down}"].double()
    torch.testing.assert_close(delta.delta(torch.zeros(4, 6).double()), expected, rtol=1e-12, atol=1e-12)


def test_without_an_alpha_it_is_the_rank(registry: Registry, tmp_path: Path) -> None:
    header = opened(tmp_path, registry, pair())
    options = header.reading.groups[0].options
    assert (options["scale"], options["scale_rule"]) == (1.0, "default")


@pytest.mark.parametrize("alpha", [0.0, float("nan")])
def test_an_alpha_of_nothing_counts_as_missing_and_is_mentioned(
    registry: Registry, tmp_path: Path, alpha: float
) -> None:
    header = opened(tmp_path, registry, pair() | {f"{Q}.alpha": torch.tensor(alpha)})
    assert header.reading.groups[0].options["scale"] == 1.0
    (finding,) = header.findings
    assert (finding.code, finding.level) == ("alpha-void", Verdict.UNVERIFIED)


def test_an_alpha_of_many_numbers_is_an_integrity_error(registry: Registry, tmp_path: Path) -> None:
    with pytest.raises(IntegrityError, match="single number"):
        opened(tmp_path, registry, pair() | {f"{Q}.alpha": torch.ones(2)})


def test_an_alpha_beside_nothing_is_noted(registry: Registry, tmp_path: Path) -> None:
    tensors = {"diffusion_model.head.diff": torch.ones(2, 2), "diffusion_model.head.alpha": torch.tensor(1.0)}
    (finding,) = opened(tmp_path, registry, tensors).findings
    assert (finding.code, finding.level) == ("alpha-unused", Verdict.EXACT)


def test_differences_of_weight_and_bias_are_added_as_they_are(registry: Registry, tmp_path: Path) -> None:
    tensors = pair() | {f"{Q}.diff_b": torch.arange(4.0), "diffusion_model.norm.diff": torch.arange(3.0)}
    header = opened(tmp_path, registry, tensors)
    assert header.findings == ()
    deltas = {target.name: delta for target, delta in load(header, registry).deltas.items()}
    assert set(deltas) == {"blocks.0.self_attn.q.weight", "blocks.0.self_attn.q.bias", "norm.weight"}
    assert torch.equal(deltas["blocks.0.self_attn.q.bias"].delta(torch.zeros(4)), torch.arange(4.0))
    assert torch.equal(deltas["norm.weight"].delta(torch.zeros(3)), torch.arange(3.0))


def test_a_difference_of_a_bare_parameter_lands_on_it_where_the_base_has_it(registry: Registry, tmp_path: Path) -> None:
    shape = {"blocks.0.modulation": (1, 6, 4), "norm.weight": (3,)}
    parameters = {name: ParameterInfo(shape=size, dtype="F32", stored_as=name) for name, size in sorted(shape.items())}
    index = BaseIndex(ref=BaseRef(), framework="tensors", parameters=parameters)
    tensors = {
        "diffusion_model.blocks.0.modulation.diff": torch.ones(1, 6, 4),
        "diffusion_model.norm.diff": torch.ones(3),
    }
    header = opened(tmp_path, registry, tensors, index)
    assert {target.name for target in header.touches} == set(shape)


@pytest.mark.parametrize(("shape", "axis"), [((4, 1), 0), ((1, 6), 1), ((4,), 0), ((6,), 1)])
def test_the_shape_of_dora_scale_says_which_lengths_are_kept(
    registry: Registry, tmp_path: Path, shape: tuple[int, ...], axis: int
) -> None:
    header = opened(tmp_path, registry, pair() | {f"{Q}.dora_scale": torch.full(shape, 2.0)})
    assert (header.kinds, header.findings) == (("dora",), ())
    (delta,) = load(header, registry).deltas.values()
    weight = torch.randn(4, 6, generator=torch.Generator().manual_seed(2)).double()
    lengths = (weight + delta.delta(weight)).norm(dim=1 - axis)
    torch.testing.assert_close(lengths, torch.full_like(lengths, 2.0))


@pytest.mark.parametrize("end", ["oft_diag", "initial_norm", "reshape_weight"])
def test_what_changes_weights_in_ways_not_read_here_makes_it_unusable(
    registry: Registry, tmp_path: Path, end: str
) -> None:
    tensors = pair() | {f"{Q}.{end}": torch.ones(2, 2), f"{Q}.alpha": torch.tensor(1.0)}
    (finding,) = opened(tmp_path, registry, tensors).findings
    assert (finding.code, finding.level) == ("kind-unsupported", Verdict.INCOMPATIBLE)
    assert sorted(finding.where) == sorted(tensors)


OTHERS: dict[str, tuple[dict[str, tuple[int, ...] | float], str]] = {
    "locon": ({"lora_down.weight": (2, 6, 1), "lora_mid.weight": (2, 2, 3), "lora_up.weight": (4, 2, 1)}, "locon"),
    "diag-oft": ({"oft_blocks": (2, 2, 2), "alpha": 0.0}, "diag-oft"),
    "boft": ({"oft_blocks": (2, 2, 2, 2), "rescale": (4, 1), "alpha": 0.01}, "lycoris-boft"),
    "glora": ({"a1.weight": (6, 2), "a2.weight": (2, 6), "b1.weight": (4, 2), "b2.weight": (2, 6)}, "lycoris-glora"),
    "ia3": ({"weight": (6,), "on_input": 1.0}, "lycoris-ia3"),
    "DoRA over LoKr": ({"lokr_w1": (2, 3), "lokr_w2": (2, 2), "dora_scale": (4, 1)}, "dora-lokr"),
    "OneTrainer's OFT": ({"oft_R.weight": (3, 1)}, "oft"),
}
"""Case -> ending -> shape or number, and the kind."""


@pytest.mark.parametrize("name", OTHERS)
def test_every_kind_of_lycoris_is_read_behind_dotted_names(registry: Registry, tmp_path: Path, name: str) -> None:
    entries, kind = OTHERS[name]
    tensors = {
        f"{Q}.{end}": torch.tensor(each) if isinstance(each, float) else torch.ones(each)
        for end, each in entries.items()
    }
    header = opened(tmp_path, registry, tensors)
    assert (header.format, header.kinds, header.findings) == ("comfy", (kind,), ())
    assert {ref.key for group in header.reading.groups for ref in group.slots.values()} == set(tensors)


def test_a_weight_without_a_flag_is_no_ia3(registry: Registry, tmp_path: Path) -> None:
    (finding,) = opened(tmp_path, registry, pair() | {"diffusion_model.norm.weight": torch.ones(3)}).findings
    assert (finding.code, finding.where) == ("key-unknown", ("diffusion_model.norm.weight",))


@pytest.mark.parametrize("beginning", ["diffusion_model", "transformer", "unet", ""])
def test_alpha_in_the_header_alone_is_honoured(registry: Registry, tmp_path: Path, beginning: str) -> None:
    """SimpleTuner keeps it nowhere else; ComfyUI and others that overlook it use a scale of 1."""
    said = {f"{beginning}.{name}" if beginning else name: value for name, value in {"r": 2, "lora_alpha": 8}.items()}
    save_file(tmp_path / "a.safetensors", pair(), {"lora_adapter_metadata": json.dumps(said)})
    header = open_header(tmp_path, registry)
    options = header.reading.groups[0].options
    assert (options["scale"], options["scale_rule"], options["alpha"]) == (4.0, "alpha/r", 8)
    assert header.findings == ()


@pytest.mark.parametrize("name", ["lora_alpha", "network_alpha", "alpha"])
def test_a_plain_alpha_in_the_header_is_honoured_too(registry: Registry, tmp_path: Path, name: str) -> None:
    save_file(tmp_path / "a.safetensors", pair(), {name: "8.0"})
    assert open_header(tmp_path, registry).reading.groups[0].options["scale"] == 4.0


def test_alpha_in_the_header_holds_for_lycoris_kinds_too(registry: Registry, tmp_path: Path) -> None:
    tensors = {f"{Q}.lokr_w1": torch.ones(2, 3), f"{Q}.lokr_w2_a": torch.ones(4, 2), f"{Q}.lokr_w2_b": torch.ones(2, 5)}
    said = json.dumps({"transformer.lora_alpha": 8})
    save_file(tmp_path / "a.safetensors", tensors, {"lora_adapter_metadata": said})
    assert open_header(tmp_path, registry).reading.groups[0].options["scale"] == 4.0


def test_two_alphas_that_differ_are_an_error_with_both(registry: Registry, tmp_path: Path) -> None:
    tensors = pair() | {f"{Q}.alpha": torch.tensor(2.0)}
    for metadata in ({"lora_alpha": "16"}, {"lora_adapter_metadata": json.dumps({"transformer.lora_alpha": 16})}):
        save_file(tmp_path / "a.safetensors", tensors, metadata)
        (finding,) = open_header(tmp_path, registry).findings
        assert (finding.code, finding.level) == ("alpha-conflict", Verdict.INCOMPATIBLE)
        assert "16" in finding.message
        assert "says 2" in finding.message
    metadata = {"lora_alpha": "16", "lora_adapter_metadata": json.dumps({"transformer.lora_alpha": 4})}
    save_file(tmp_path / "a.safetensors", pair(), metadata)
    assert "alpha-conflict" in {each.code for each in open_header(tmp_path, registry).findings}


def test_alphas_that_agree_but_for_half_precision_are_one(registry: Registry, tmp_path: Path) -> None:
    tensors = pair() | {f"{Q}.alpha": torch.tensor(0.1, dtype=torch.float16)}
    save_file(tmp_path / "a.safetensors", tensors, {"lora_alpha": "0.1"})
    header = open_header(tmp_path, registry)
    assert header.findings == ()
    assert header.reading.groups[0].options["alpha"] == float(torch.tensor(0.1, dtype=torch.float16))


def test_a_void_alpha_gives_way_to_the_header(registry: Registry, tmp_path: Path) -> None:
    save_file(tmp_path / "a.safetensors", pair() | {f"{Q}.alpha": torch.tensor(0.0)}, {"lora_alpha": "8"})
    header = open_header(tmp_path, registry)
    assert [each.code for each in header.findings] == ["alpha-void"]
    assert header.reading.groups[0].options["scale"] == 4.0


def test_text_encoders_under_comfys_names_are_parts_of_the_pipeline(registry: Registry, tmp_path: Path) -> None:
    tensors = pair() | pair(module="text_encoders.clip_g.transformer.text_model.encoder.layers.0.self_attn.q_proj")
    header = opened(tmp_path, registry, tensors)
    assert header.findings == ()
    assert {group.component for group in header.reading.groups} == {"", "text_encoder_2"}


@pytest.mark.parametrize(("whole", "scale"), [(True, 1.0), (False, 4.0)])
def test_lokr_is_read_as_lycoris_has_it_and_whole_factors_are_not_scaled(
    registry: Registry, tmp_path: Path, whole: bool, scale: float
) -> None:
    generator = torch.Generator().manual_seed(4)
    w1 = torch.randn(2, 3, generator=generator)
    a, b = torch.randn(4, 2, generator=generator), torch.randn(2, 5, generator=generator)
    second = {"lokr_w2": a @ b} if whole else {"lokr_w2_a": a, "lokr_w2_b": b}
    tensors = {f"{Q}.{name}": value for name, value in ({"lokr_w1": w1} | second).items()}
    header = opened(tmp_path, registry, tensors | {f"{Q}.alpha": torch.tensor(8.0)})
    assert (header.format, header.kinds, header.findings) == ("comfy", ("lokr",), ())
    (delta,) = load(header, registry).deltas.values()
    inner = (a @ b).double() if whole else a.double() @ b.double()
    expected = scale * torch.kron(w1.double(), inner)
    torch.testing.assert_close(delta.delta(torch.zeros(8, 15).double()), expected, rtol=1e-12, atol=1e-12)


def test_loha_is_the_product_of_two_products(registry: Registry, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(5)
    sizes = {"hada_w1_a": (4, 2), "hada_w1_b": (2, 6), "hada_w2_a": (4, 2), "hada_w2_b": (2, 6)}
    parts = {name: torch.randn(size, generator=generator) for name, size in sizes.items()}
    tensors = {f"{Q}.{name}": value for name, value in parts.items()} | {f"{Q}.alpha": torch.tensor(1.0)}
    header = opened(tmp_path, registry, tensors)
    assert (header.kinds, header.findings) == (("loha",), ())
    (delta,) = load(header, registry).deltas.values()
    one, two, three, four = (each.double() for each in parts.values())
    expected = 0.5 * (one @ two) * (three @ four)
    torch.testing.assert_close(delta.delta(torch.zeros(4, 6).double()), expected, rtol=1e-12, atol=1e-12)


def test_half_a_lokr_and_lengths_that_do_not_fit_make_it_unusable(registry: Registry, tmp_path: Path) -> None:
    whole = {f"{Q}.lokr_w1": torch.ones(2, 3), f"{Q}.lokr_w2": torch.ones(2, 2)}
    for tensors in ({f"{Q}.lokr_w1": torch.ones(2, 3)}, whole | {f"{Q}.dora_scale": torch.ones(5, 1)}):
        assert max(each.level for each in opened(tmp_path, registry, tensors).findings) is Verdict.INCOMPATIBLE


def test_lengths_that_could_be_of_rows_or_columns_are_refused(registry: Registry, tmp_path: Path) -> None:
    square = {f"{Q}.lora_A.weight": torch.ones(2, 4), f"{Q}.lora_B.weight": torch.ones(4, 2)}
    (finding,) = opened(tmp_path, registry, square | {f"{Q}.dora_scale": torch.ones(4)}).findings
    assert (finding.code, finding.level) == ("slot-misfit", Verdict.INCOMPATIBLE)


@pytest.mark.parametrize("key", ["diffusion_model.x.strange", "text_encoders.t5.lora_A.weight"])
def test_keys_nobody_knows_are_findings(registry: Registry, tmp_path: Path, key: str) -> None:
    (finding,) = opened(tmp_path, registry, pair() | {key: torch.ones(2, 2)}).findings
    assert (finding.code, finding.where, finding.allowable) == ("key-unknown", (key,), True)


def test_half_a_pair_and_factors_that_do_not_fit_make_it_unusable(registry: Registry, tmp_path: Path) -> None:
    tensors = pair()
    del tensors[f"{Q}.lora_B.weight"]
    assert [each.code for each in opened(tmp_path, registry, tensors).findings] == ["slot-missing"]
    tensors = pair() | {f"{Q}.lora_B.weight": torch.ones(4, 3)}
    assert [each.code for each in opened(tmp_path, registry, tensors).findings] == ["slot-misfit"]


def test_two_spellings_of_one_module_are_not_both_used(registry: Registry, tmp_path: Path) -> None:
    header = opened(tmp_path, registry, pair() | pair("lora_down.weight", "lora_up.weight"))
    (finding,) = header.findings
    assert finding.level is Verdict.INCOMPATIBLE
    assert header.reading.groups == ()


def test_it_is_read_only(registry: Registry) -> None:
    with pytest.raises(CannotCarry):
        ComfyFormat().write({}, tuple(registry.kinds.values()), {})
