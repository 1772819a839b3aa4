"""Runtime tables: what ``check --for vllm`` says about adapters as PEFT writes them."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from math import prod
from pathlib import Path
from typing import Any

import pytest

from lorahub.adapter import AdapterHeader, open_header
from lorahub.bases.index import BaseIndex, BaseRef, ParameterInfo
from lorahub.findings import Finding, Verdict
from lorahub.plugins import Registry
from lorahub.runtimes.runtime import Rule, Runtime
from lorahub.runtimes.vllm import RANKS, RULES, VLLM

Shapes = Mapping[str, tuple[int, ...]]
Open = Callable[..., AdapterHeader]

PREFIX = "base_model.model."
QUERY = "model.layers.0.self_attn.q_proj"
CONFIG: dict[str, Any] = {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "target_modules": ["q_proj"], "bias": "none"}


def factors(module: str = QUERY, rank: int = 8, *, prefix: str = PREFIX, size: int = 64) -> dict[str, tuple[int, ...]]:
    return {f"{prefix}{module}.lora_A.weight": (rank, size), f"{prefix}{module}.lora_B.weight": (size, rank)}


@pytest.fixture
def adapter(tmp_path: Path, registry: Registry) -> Open:
    """Write an adapter of zeros and open it."""

    def write(shapes: Shapes, index: BaseIndex | None = None, **config: object) -> AdapterHeader:
        header: dict[str, Any] = {}
        end = 0
        for name, shape in shapes.items():
            header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [end, end + 4 * prod(shape)]}
            end += 4 * prod(shape)
        text = json.dumps(header).encode()
        (tmp_path / "adapter_model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + bytes(end))
        (tmp_path / "adapter_config.json").write_text(json.dumps({**CONFIG, **config}), encoding="utf-8")
        return open_header(tmp_path, registry, index=index)

    return write


def judged(header: AdapterHeader) -> dict[str, Finding]:
    return {finding.code: finding for finding in VLLM.judge(header)}


def test_a_plain_lora_is_accepted(adapter: Open) -> None:
    findings = judged(adapter(factors()))
    assert list(findings) == ["runtime-accepts"]
    assert findings["runtime-accepts"].level is Verdict.EXACT
    assert "vLLM 0.33" in findings["runtime-accepts"].message


@pytest.mark.parametrize("config", [{"use_rslora": True}, {"rank_pattern": {"q_proj": 8}}, {"lora_dropout": 0.1}])
def test_what_vllm_honours_is_accepted(adapter: Open, config: dict[str, object]) -> None:
    assert list(judged(adapter(factors(), **config))) == ["runtime-accepts"]


@pytest.mark.parametrize("rank", [1, 8, 16])
def test_ranks_up_to_the_default_need_no_flag(adapter: Open, rank: int) -> None:
    assert list(judged(adapter(factors(rank=rank), r=rank))) == ["runtime-accepts"]


@pytest.mark.parametrize(
    ("rank", "setting"), [(17, 32), (32, 32), (33, 64), (129, 256), (257, 320), (321, 512), (512, 512)]
)
def test_a_rank_over_the_default_ends_in_the_command_that_raises_it(adapter: Open, rank: int, setting: int) -> None:
    header = adapter(factors(rank=rank), r=rank)
    finding = judged(header)["vllm-rank"]
    assert finding.level is Verdict.DEGRADED
    assert finding.allowable
    assert finding.where == (QUERY,)
    command = f"vllm serve BASE --enable-lora --max-lora-rank {setting} --lora-modules NAME={header.label}"
    assert finding.remedy == command


def test_the_largest_rank_counts_wherever_it_is(adapter: Open) -> None:
    header = adapter(
        factors() | factors("model.layers.1.self_attn.q_proj", 40), rank_pattern={"layers.1.self_attn.q_proj": 40}
    )
    finding = judged(header)["vllm-rank"]
    assert "--max-lora-rank 64" in finding.remedy
    assert finding.where == ("model.layers.1.self_attn.q_proj",)


def test_a_rank_over_every_setting_cannot_be_served(adapter: Open) -> None:
    findings = judged(adapter(factors(rank=513, size=8), r=513))
    assert list(findings) == ["vllm-rank-limit"]
    assert findings["vllm-rank-limit"].level is Verdict.INCOMPATIBLE
    assert RANKS[-1] == 512


def test_dora_ends_in_the_merge_that_serves_it(adapter: Open) -> None:
    header = adapter(
        {**factors(), f"{PREFIX}{QUERY}.lora_magnitude_vector": (64,)},
        use_dora=True,
    )
    findings = judged(header)
    assert list(findings) == ["vllm-dora"]
    assert findings["vllm-dora"].where == (QUERY,)
    assert findings["vllm-dora"].remedy == f"lorahub merge {header.label} --base BASE -o merged && vllm serve merged"


@pytest.mark.parametrize(
    ("code", "config"),
    [
        ("vllm-bias", {"bias": "all"}),
        ("vllm-bias", {"bias": "lora_only"}),
        ("vllm-lora-bias", {"lora_bias": True}),
        ("vllm-activated", {"alora_invocation_tokens": [1, 2]}),
        ("vllm-layer-replication", {"layer_replication": [[0, 4], [2, 6]]}),
        ("vllm-block-diagonal", {"use_bdlora": {"nblocks": 2}}),
        ("vllm-qalora", {"use_qalora": True}),
        ("vllm-changed-base", {"init_lora_weights": "pissa"}),
        ("vllm-changed-base", {"init_lora_weights": "pissa_niter_16"}),
        ("vllm-changed-base", {"init_lora_weights": "OLoRA"}),
        ("vllm-changed-base", {"init_lora_weights": "corda"}),
        ("vllm-changed-base", {"init_lora_weights": "loftq"}),
    ],
)
def test_a_config_field_that_vllm_refuses_is_named(adapter: Open, code: str, config: dict[str, object]) -> None:
    findings = judged(adapter(factors(), **config))
    assert list(findings) == [code]
    assert findings[code].where == tuple(config)
    assert findings[code].level is Verdict.INCOMPATIBLE
    assert findings[code].remedy


@pytest.mark.parametrize(
    "config",
    [
        {"bias": "none"},
        {"lora_bias": False},
        {"alora_invocation_tokens": None},
        {"layer_replication": None},
        {"init_lora_weights": True},
        {"init_lora_weights": "gaussian"},
        {"modules_to_save": []},
    ],
)
def test_a_harmless_value_is_no_reason(adapter: Open, config: dict[str, object]) -> None:
    assert list(judged(adapter(factors(), **config))) == ["runtime-accepts"]


@pytest.mark.parametrize("head", ["score", "classifier"])
def test_a_classifiers_head_is_taken(adapter: Open, head: str) -> None:
    header = adapter({**factors(), f"{PREFIX}{head}.weight": (3, 64)}, modules_to_save=[head])
    assert list(judged(header)) == ["runtime-accepts"]


def test_another_replaced_module_is_refused_by_name(adapter: Open) -> None:
    header = adapter({**factors(), f"{PREFIX}lm_head.weight": (50, 64)}, modules_to_save=["lm_head"])
    findings = judged(header)
    assert list(findings) == ["vllm-modules-to-save"]
    assert findings["vllm-modules-to-save"].where == ("lm_head",)
    assert "classifier and score" in findings["vllm-modules-to-save"].message


def test_another_kind_is_refused_by_name(adapter: Open) -> None:
    header = adapter(
        {f"{PREFIX}{QUERY}.ia3_l": (64, 1)}, peft_type="IA3", feedforward_modules=[], r=None, lora_alpha=None, bias=None
    )
    findings = judged(header)
    assert list(findings) == ["vllm-kind"]
    assert "ia3" in findings["vllm-kind"].message


def test_factors_of_a_convolution_are_refused(adapter: Open) -> None:
    module = "features.conv"
    shapes = {f"{PREFIX}{module}.lora_A.weight": (8, 4, 3, 3), f"{PREFIX}{module}.lora_B.weight": (16, 8, 1, 1)}
    findings = judged(adapter(shapes, target_modules=["conv"]))
    assert list(findings) == ["vllm-convolution"]
    assert findings["vllm-convolution"].where == (module,)


def test_a_prefix_that_only_lorahub_resolves_is_told(adapter: Open) -> None:
    base = BaseIndex(
        ref=BaseRef(repo="acme/base"),
        framework="torch",
        parameters={f"{QUERY}.weight": ParameterInfo(shape=(64, 64), dtype="F32", stored_as=f"{QUERY}.weight")},
        aliases=(("model.", ""),),
    )
    short = QUERY.removeprefix("model.")
    assert list(judged(adapter(factors(), index=base))) == ["runtime-accepts"]
    findings = judged(adapter(factors(short), index=base))
    assert list(findings) == ["vllm-prefix"]
    assert findings["vllm-prefix"].where == (f"{PREFIX}{short}.lora_A.weight",)
    assert "apply nothing" in findings["vllm-prefix"].message


def test_several_reasons_are_told_together(adapter: Open) -> None:
    header = adapter(
        {**factors(rank=64), f"{PREFIX}{QUERY}.lora_magnitude_vector": (64,)}, r=64, use_dora=True, use_qalora=True
    )
    assert list(judged(header)) == ["vllm-dora", "vllm-qalora", "vllm-rank"]


def test_every_rule_has_a_code_of_its_own_and_says_what_to_do() -> None:
    codes = [rule.code for rule in RULES]
    assert len(codes) == len(set(codes))
    for rule in RULES:
        assert rule.code.startswith("vllm-")
        assert rule.message
        assert rule.remedy


def test_only_what_a_setting_helps_may_be_allowed(adapter: Open) -> None:
    header = adapter(factors())
    for level in (Verdict.DEGRADED, Verdict.INCOMPATIBLE):
        from lorahub.runtimes.runtime import Case

        rule = Rule(
            code="x", level=level, message="{value} of {adapter}", remedy="{adapter}", look=lambda _: Case(value="7")
        )
        (finding,) = Runtime(name="x", title="X", versions="1", rules=(rule,)).judge(header)
        assert finding.allowable is (level is Verdict.DEGRADED)
        assert finding.message == f"7 of {header.label}"
