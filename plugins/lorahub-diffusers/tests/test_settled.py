"""Makers' names beside diffusers': weighed, compared and composed against a base they are one adapter, bit for bit.

Which module is which is written down here by hand; ``test_aliases`` holds the tables against diffusers' own code.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_diffusers import flux, sd, sdxl
from tiny_files import inverted

import lorahub
from lorahub.cli.main import main
from lorahub.composing.trying import Stage
from lorahub.errors import Incompatible

diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed")

RANK = 3
UNET = "UNet2DConditionModel"

Parts = tuple[tuple[str, int], ...]

SDXL: Mapping[str, tuple[int, Parts]] = {
    "lora_unet_input_blocks_3_1_transformer_blocks_1_attn2_to_k": (
        64,
        (("unet.down_blocks.1.attentions.0.transformer_blocks.1.attn2.to_k", 64),),
    ),
    "lora_unet_middle_block_1_transformer_blocks_0_ff_net_0_proj": (
        64,
        (("unet.mid_block.attentions.0.transformer_blocks.0.ff.net.0.proj", 512),),
    ),
    "lora_te1_text_model_encoder_layers_0_self_attn_q_proj": (
        32,
        (("text_encoder.text_model.encoder.layers.0.self_attn.q_proj", 32),),
    ),
    "lora_te2_text_model_encoder_layers_2_self_attn_v_proj": (
        32,
        (("text_encoder_2.text_model.encoder.layers.2.self_attn.v_proj", 32),),
    ),
}
FLUX: Mapping[str, tuple[int, Parts]] = {
    "lora_unet_double_blocks_0_img_attn_qkv": (
        32,
        tuple((f"transformer.transformer_blocks.0.attn.to_{each}", 32) for each in "qkv"),
    ),
    "lora_unet_double_blocks_0_txt_attn_proj": (32, (("transformer.transformer_blocks.0.attn.to_add_out", 32),)),
    "lora_unet_single_blocks_1_linear1": (
        32,
        (
            *((f"transformer.single_transformer_blocks.1.attn.to_{each}", 32) for each in "qkv"),
            ("transformer.single_transformer_blocks.1.proj_mlp", 128),
        ),
    ),
    "lora_unet_single_blocks_0_linear2": (160, (("transformer.single_transformer_blocks.0.proj_out", 32),)),
}
"""Module in a kohya file -> its inputs; and what it is under diffusers' names, each with its outputs."""


def factors(modules: Mapping[str, tuple[int, Parts]], seed: int) -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
    """(module in a kohya file, down, up), random."""
    generator = torch.Generator().manual_seed(seed)
    for stem, (into, parts) in modules.items():
        out = sum(rows for _, rows in parts)
        yield stem, torch.randn(RANK, into, generator=generator) / 3, torch.randn(out, RANK, generator=generator) / 3


def kohya(modules: Mapping[str, tuple[int, Parts]], seed: int, file: Path) -> Path:
    """An adapter as kohya's trainers write it."""
    tensors: dict[str, torch.Tensor] = {}
    for stem, down, up in factors(modules, seed):
        tensors |= {f"{stem}.lora_down.weight": down, f"{stem}.lora_up.weight": up}
        tensors[f"{stem}.alpha"] = torch.tensor(float(RANK))
    save_file(tensors, file)
    return file


def renamed(modules: Mapping[str, tuple[int, Parts]], seed: int, folder: Path) -> Path:
    """The same as diffusers writes it."""
    tensors: dict[str, torch.Tensor] = {}
    for stem, down, up in factors(modules, seed):
        parts = modules[stem][1]
        for (name, _), rows in zip(parts, up.split([rows for _, rows in parts]), strict=True):
            tensors |= {f"{name}.lora_A.weight": down.clone(), f"{name}.lora_B.weight": rows.clone()}
    folder.mkdir()
    save_file(tensors, folder / "pytorch_lora_weights.safetensors")
    return folder


def said(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    """What a command prints; it has to succeed."""
    with pytest.raises(SystemExit) as stop:
        main([str(word) for word in words])
    printed = capsys.readouterr()
    assert stop.value.code == 0, printed.err
    return printed.out


class Pairs:
    """Two adapters, each under both names, and the base that has diffusers'."""

    def __init__(self, make: Callable[[], Any], modules: Mapping[str, tuple[int, Parts]], place: Path) -> None:
        make().save_pretrained(place / "base")
        self.base = place / "base"
        self.makers = [kohya(modules, seed, place / f"{seed}.safetensors") for seed in (1, 2)]
        self.own = [renamed(modules, seed, place / f"own{seed}") for seed in (1, 2)]


@pytest.fixture(scope="module", params=["sdxl", "flux"])
def pairs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pairs:
    make, modules = {"sdxl": (sdxl, SDXL), "flux": (flux, FLUX)}[request.param]
    return Pairs(make, modules, tmp_path_factory.mktemp(request.param))


def test_it_weighs_the_same_under_either_name(pairs: Pairs) -> None:
    one, other = (lorahub.weigh(each[0], pairs.base) for each in (pairs.makers, pairs.own))
    assert one.targets == other.targets
    assert not one.left_out
    assert not other.left_out
    assert all(each.relative and each.relative > 1e-2 for each in one.targets)
    assert [each.code for each in one.findings] == ["names-translated"]
    assert not other.findings


def test_the_difference_is_none_and_its_measures_are_those_of_diffusers_names(pairs: Pairs) -> None:
    same = lorahub.diff(pairs.makers[0], pairs.own[0], base=pairs.base)
    assert {row.state for row in same.rows} == {"equal"}
    assert len(same.rows) == len(lorahub.weigh(pairs.own[0], pairs.base).targets)
    apart = lorahub.diff(pairs.makers[0], pairs.own[1], base=pairs.base)
    expected = lorahub.diff(pairs.own[0], pairs.own[1], base=pairs.base)
    assert apart.rows == expected.rows
    assert expected.whole.relative > 0.1
    assert [each.code for each in apart.findings] == ["names-translated"]


def test_similarity_is_that_of_diffusers_names(pairs: Pairs) -> None:
    mixed = [pairs.makers[0], pairs.own[1], pairs.makers[1]]
    plain = [pairs.own[0], pairs.own[1], pairs.own[1]]  # the third is the second under its other names
    found, expected = (lorahub.similarity(each, base=pairs.base).document() for each in (mixed, plain))
    for measure in ("norms", "cosines", "relative_differences", "overlaps_in", "targets"):
        assert found[measure] == expected[measure]
    assert found["cosines"][0][1] != found["cosines"][1][2] == 1.0


def test_composed_under_either_name_it_is_the_same_to_the_bit(pairs: Pairs) -> None:
    made = [
        lorahub.compose(each, weights=[0.7, -0.4], base=str(pairs.base))
        for each in (pairs.makers, [pairs.makers[0], pairs.own[1]], pairs.own)
    ]
    expected = made[-1].deltas
    for each in made:
        assert each.deltas.keys() == expected.keys()
        for target, delta in each.deltas.items():
            one, other = delta.tensors(), expected[target].tensors()
            assert one.keys() == other.keys()
            assert all(torch.equal(one[name], other[name]) for name in one)
    said = [{each.code for each in one.report.findings} for one in made]
    assert ["names-translated" in codes for codes in said] == [True, True, False]
    norms = [float(delta.low_rank().up.norm()) for delta in expected.values()]
    assert min(norms) > 1e-2


def test_what_is_composed_of_kohya_files_is_one_for_its_tools_and_lands_as_the_sum(
    pairs: Pairs, tmp_path: Path
) -> None:
    made = lorahub.compose(pairs.makers, weights=[0.7, -0.4], base=str(pairs.base), out=tmp_path / "sum")
    assert made.header is not None
    assert made.header.format == "kohya"
    (file,) = (tmp_path / "sum").glob("*.safetensors")
    given = {key.partition(".")[0] for key in load_file(pairs.makers[0])}
    assert {key.partition(".")[0] for key in load_file(file)} == given
    lorahub.merge(pairs.base, {"sum": str(tmp_path / "sum")}, out=tmp_path / "one")
    several = {"a": str(pairs.own[0]), "b": str(pairs.own[1])}
    lorahub.merge(pairs.base, several, weights=[0.7, -0.4], out=tmp_path / "two")
    moved = 0
    for path in (tmp_path / "two").rglob("*.safetensors"):
        place = path.relative_to(tmp_path / "two")
        before, expected, found = (load_file(each / place) for each in (pairs.base, tmp_path / "two", tmp_path / "one"))
        assert found.keys() == expected.keys()
        for name, each in expected.items():
            assert (found[name] - each).abs().max() <= 2**-20 * each.abs().max().clamp_min(1)
            moved += bool((each - before[name]).norm() > 1e-2 * before[name].norm())
    assert moved == len(made.deltas)


def test_a_composition_explains_itself_under_the_bases_names(pairs: Pairs, capsys: pytest.CaptureFixture[str]) -> None:
    def outlined(adapters: list[Path]) -> Any:
        return json.loads(said(capsys, "compose", *adapters, "--base", pairs.base, "--explain", "--json"))

    one, other = outlined(pairs.makers), outlined(pairs.own)
    assert one["targets"] == other["targets"]
    assert len(one["targets"]) >= len(SDXL)


def test_a_recipe_for_a_checkpoint_takes_makers_names_by_any_method(pairs: Pairs, tmp_path: Path) -> None:
    for name, adapters in (("makers", pairs.makers), ("own", pairs.own)):
        recipe = tmp_path / f"{name}.toml"
        listed = "".join(f'[[adapters]]\nref = "{path}"\nweight = 1.0\n' for path in adapters)
        recipe.write_text(
            f'schema_version = "1.0"\nmethod = "ties"\nbase = "{pairs.base}"\noutput = "checkpoint"\n{listed}'
        )
        lorahub.compose.checkpoint(recipe, tmp_path / name)
    for path in (tmp_path / "own").rglob("*.safetensors"):
        other = tmp_path / "makers" / path.relative_to(tmp_path / "own")
        assert path.read_bytes() == other.read_bytes()


@pytest.mark.parametrize(("make", "grouped"), [(sd, True), (sdxl, False)])
def test_a_unet_is_written_for_kohyas_trainers_as_they_name_it(
    make: Callable[[], Any], grouped: bool, tmp_path: Path
) -> None:
    """Stable Diffusion XL by Stability's names, older ones by diffusers'."""
    make().unet.save_pretrained(tmp_path / "pipe" / "unet")
    (tmp_path / "pipe" / "model_index.json").write_text(json.dumps({"_class_name": "X", "unet": ["diffusers", UNET]}))
    module = "mid_block.attentions.0.proj_in"
    own = {"lora_unet": (64, ((f"unet.{module}", 64),))}
    lorahub.convert(renamed(own, 1, tmp_path / "own"), "kohya", tmp_path / "out.safetensors", base=tmp_path / "pipe")
    stems = {key.partition(".")[0] for key in load_file(tmp_path / "out.safetensors")}
    assert stems == {f"lora_unet_{module}".replace(".", "_") if grouped else "lora_unet_middle_block_1_proj_in"}
    report = lorahub.convert(tmp_path / "out.safetensors", "diffusers", tmp_path / "back", base=tmp_path / "pipe")
    assert report.max_error == 0.0
    before, after = (load_file(tmp_path / each / "pytorch_lora_weights.safetensors") for each in ("own", "back"))
    assert before.keys() == after.keys()


def test_queries_in_a_file_of_the_makers_are_bands_for_an_adapter_of_diffusers(tmp_path: Path) -> None:
    pipe = flux()
    save_file(
        {name: each.contiguous() for name, each in inverted(pipe.transformer).items()}, tmp_path / "f.safetensors"
    )
    modules = {"lora_unet_double_blocks_0_img_attn_qkv": FLUX["lora_unet_double_blocks_0_img_attn_qkv"]}
    fused, apart = kohya(modules, 1, tmp_path / "fused.safetensors"), renamed(modules, 1, tmp_path / "apart")
    found = lorahub.diff(fused, apart, base=tmp_path / "f.safetensors")
    assert [(row.target, row.state) for row in found.rows] == [
        ("transformer:double_blocks.0.img_attn.qkv.weight", "equal")
    ]
    assert found.whole.norms[0] > 1e-2


def test_an_adapter_of_several_models_is_under_the_names_of_the_one_that_is_the_base(tmp_path: Path) -> None:
    flux().transformer.save_pretrained(tmp_path / "base")
    stem = "lora_te1_text_model_encoder_layers_0_self_attn_q_proj"
    both = {**FLUX, stem: SDXL[stem]}
    files = kohya(both, 1, tmp_path / "x.safetensors"), renamed(both, 1, tmp_path / "own")
    found = [
        [each for each in lorahub.weigh(file, tmp_path / "base").targets if each.relative is not None] for file in files
    ]
    assert [replace(each, energy=0.0) for each in found[0]] == [replace(each, energy=0.0) for each in found[1]]
    assert len(found[0]) == sum(len(parts) for _, parts in FLUX.values())
    rows = lorahub.diff(*files, base=tmp_path / "base").rows
    assert [row.state for row in rows if not row.target.startswith("text_encoder:")] == ["equal"] * len(found[0])


def test_what_is_composed_for_one_model_in_diffusers_layout_names_its_part(tmp_path: Path) -> None:
    flux().transformer.save_pretrained(tmp_path / "base")
    adapters = [renamed(FLUX, seed, tmp_path / str(seed)) for seed in (1, 2)]
    lorahub.compose(adapters, base=str(tmp_path / "base"), out=tmp_path / "sum")
    (file,) = (tmp_path / "sum").glob("*.safetensors")
    assert load_file(file).keys() == load_file(adapters[0] / file.name).keys()
    one, other = tmp_path / "one", tmp_path / "two"
    lorahub.merge(tmp_path / "base", {"sum": str(tmp_path / "sum")}, out=one)
    lorahub.merge(tmp_path / "base", {str(at): str(each) for at, each in enumerate(adapters)}, out=other)
    found, expected = (load_file(each / "diffusion_pytorch_model.safetensors") for each in (one, other))
    assert all((found[name] - each).abs().max() <= 2**-20 * each.abs().max() for name, each in expected.items())


def test_what_cannot_be_cut_is_said_with_the_parameter_and_the_reason(tmp_path: Path) -> None:
    pipe = flux()
    pipe.transformer.save_pretrained(tmp_path / "base")
    stem = "lora_unet_double_blocks_0_img_attn_qkv"
    generator = torch.Generator().manual_seed(0)
    blocks = torch.randn(4, 24, 24, generator=generator) / 10
    save_file({f"{stem}.oft_blocks": blocks, f"{stem}.alpha": torch.tensor(1e-3)}, tmp_path / "x.safetensors")
    found = lorahub.weigh(tmp_path / "x.safetensors", tmp_path / "base")
    assert not found.targets
    assert len(found.left_out) == 3
    assert all(f"cannot be brought to {name}" in reason for name, reason in found.left_out.items())
    with pytest.raises(Incompatible, match=r"cannot be brought to transformer_blocks\.0\.attn\.to_\w\.weight"):
        lorahub.diff(tmp_path / "x.safetensors", tmp_path / "x.safetensors", base=tmp_path / "base")


def test_a_search_draws_random_adapters_as_strong_as_a_dora_in_the_makers_words(tmp_path: Path) -> None:
    model = flux().transformer
    stem = "lora_unet_double_blocks_0_img_attn_qkv"
    (_, down, up), *_ = factors({stem: FLUX[stem]}, 1)
    lengths = torch.linspace(0.1, 1, 96)[:, None]
    tensors = {"lora_down.weight": down, "lora_up.weight": up, "dora_scale": lengths}
    save_file({f"{stem}.{name}": each for name, each in tensors.items()}, tmp_path / "x.safetensors")
    with Stage(model, {"one": str(tmp_path / "x.safetensors")}, seed=0) as stage:
        ((_, drawn),) = stage.random(0).values()
    (delta,) = drawn.deltas.values()
    weight = (
        torch.cat([getattr(model.transformer_blocks[0].attn, f"to_{each}").weight for each in "qkv"]).detach().double()
    )
    whole = weight + up.double() @ down.double()
    change = lengths.double() * whole / whole.norm(dim=1, keepdim=True) - weight
    low = delta.low_rank()
    assert float((low.scale * low.up @ low.down).norm()) == pytest.approx(float(change.norm()), rel=1e-5)


def test_the_commands_say_which_names_were_translated(pairs: Pairs, capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["inspect", pairs.makers[0]], ["diff", pairs.makers[0], pairs.own[0]]):
        assert "names-translated" in said(capsys, *words, "--base", pairs.base, "--json")
