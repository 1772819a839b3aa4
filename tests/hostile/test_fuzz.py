"""Whatever an adapter's files say, the answer is an adapter or one of lorahub's own errors, and no key is lost.

Hypothesis changes a sound adapter's header and config at random; a longer search than the default run has time for.
"""

from __future__ import annotations

import copy
import json
import math
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st

from lorahub.adapter import load, open_header
from lorahub.errors import LorahubError
from lorahub.plugins import load_registry

pytestmark = pytest.mark.slow

REGISTRY = load_registry()
IN, OUT, R = 6, 8, 2

ALPHABET = st.sampled_from(
    [*list("abq.019_-/\\:@ AB"), "lora_A", "lora_down", "weight", "base_model.model.", "é", "\u202e"]
)
NAMES = st.lists(ALPHABET, min_size=1, max_size=8).map("".join)
ENDINGS = st.sampled_from(
    [
        "lora_A.weight lora_B.weight lora_embedding_A lora_embedding_B lora_magnitude_vector lora_B.bias lora_E bias",
        "hada_w1_a hada_w1_b hada_w2_a hada_w2_b hada_t1 lokr_w1 lokr_w2_a lokr_w2_b oft_R.weight boft_R hra_u ia3_l",
        "lora_down.weight lora_up.weight lora_mid.weight alpha dora_scale diff diff_b oft_blocks a1.weight w_norm",
        "lora_a lora_b m lora.down.weight lora_linear_layer.up.weight loras.x.lora_A lora_A.default.weight",
        "vera_lambda_b c3a_kernel miss_block shira_indices waveft_spectrum delora_A gralora_A base_layer.weight",
    ]
).flatmap(lambda row: st.sampled_from(row.split()))
STEMS = st.sampled_from(
    [
        "base_model.model.layers.0.q",
        "lora_unet_layers_0_q",
        "unet.layers.0.q",
        "diffusion_model.layers.0.q",
        "layers.0.q",
    ]
)
KEYS = st.one_of(NAMES, st.builds("{}.{}".format, STEMS, ENDINGS))
SHAPES = st.one_of(
    st.sampled_from(
        [(R, IN), (OUT, R), (IN, R), (R, OUT), (OUT, 1), (OUT,), (R,), (), (1,), (R, IN, 3, 3), (OUT, R, 1, 1)]
    ),
    st.lists(st.sampled_from([0, 1, 2, 3, 6, 8]), max_size=5).map(tuple),
)
DTYPES = st.sampled_from(["F32", "F32", "F32", "F16", "BF16", "F64", "I32", "U8", "BOOL", "F8_E4M3"])
WIDTH = {"F64": 8, "F32": 4, "I32": 4, "F16": 2, "BF16": 2, "U8": 1, "BOOL": 1, "F8_E4M3": 1}
TENSORS = st.dictionaries(KEYS, st.tuples(DTYPES, SHAPES), max_size=6)

SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(10**6), 10**6),
    st.floats(allow_nan=False, allow_infinity=False),
    NAMES,
    st.sampled_from(["LORA", "LOHA", "LOKR", "IA3", "OFT", "VERA", "all-linear", "q", "none", "all", ".*q", "(a|b)*"]),
)
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=3), max_leaves=6
)
TYPES = st.sampled_from(
    [
        "LORA",
        "ADALORA",
        "BOFT",
        "IA3",
        "LOHA",
        "LOKR",
        "OFT",
        "LN_TUNING",
        "VERA",
        "FOURIERFT",
        "GLORA",
        "HRA",
        "VBLORA",
        "MISS",
        "RANDLORA",
        "ROAD",
        "TRAINABLE_TOKENS",
        "HIRA",
        "SHIRA",
        "C3A",
        "WAVEFT",
        "DELORA",
        "GRALORA",
        "DEFT",
        "BONE",
        "XLORA",
        "PROMPT_TUNING",
        "P_TUNING",
        "SUPERTUNING",
        "BEFT",
    ]
)
FIELDS = st.one_of(
    NAMES,
    st.sampled_from(
        [
            "r",
            "lora_alpha",
            "alpha",
            "rank_pattern",
            "alpha_pattern",
            "use_rslora",
            "use_dora",
            "bias",
            "target_modules",
            "modules_to_save",
            "lora_bias",
            "init_lora_weights",
            "layer_replication",
            "target_parameters",
            "trainable_token_indices",
            "block_share",
            "scaling",
            "n_frequency",
            "feedforward_modules",
            "init_weights",
            "fan_in_fan_out",
            "megatron_config",
        ]
    ),
)
CONFIG: dict[str, Any] = {"peft_type": "LORA", "r": R, "lora_alpha": 4, "target_modules": ["q"], "bias": "none"}


@st.composite
def configs(draw: st.DrawFn) -> dict[str, Any]:
    config = copy.deepcopy(CONFIG) | {"peft_type": draw(TYPES)}
    return config | draw(st.dictionaries(FIELDS, VALUES, max_size=4))


def write(
    folder: Path, tensors: dict[str, tuple[str, tuple[int, ...]]], config: object, metadata: dict[str, str]
) -> None:
    entries: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    at = 0
    for key, (dtype, shape) in tensors.items():
        size = WIDTH[dtype] * math.prod(shape)
        entries[key] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, at + size]}
        at += size
    header = json.dumps(entries).encode()
    (folder / "adapter_model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + b"\x01" * at)
    if config is not None:
        (folder / "adapter_config.json").write_text(json.dumps(config))


def read(tensors: dict[str, tuple[str, tuple[int, ...]]], config: object, metadata: dict[str, str]) -> None:
    """Open and load; the header's promise is held by ``account``, which fails loudly where a key is lost."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write(folder, tensors, config, metadata)
        try:
            header = open_header(folder, REGISTRY)
        except LorahubError as error:
            event(type(error).__name__)
            lost = "not accounted for" in str(error)
            if lost:
                raise AssertionError("a format lost a key") from error
            return
        try:
            adapter = load(header, REGISTRY)
        except LorahubError as error:
            event(f"load: {type(error).__name__}")
            return
        event(f"{header.format}: {'+'.join(header.kinds)}")
        assert adapter.deltas.keys() == header.touches.keys()


SEARCH = settings(max_examples=3000, suppress_health_check=list(HealthCheck))


@SEARCH
@given(tensors=TENSORS, config=configs())
def test_any_tensors_under_any_config_are_read_or_refused(
    tensors: dict[str, tuple[str, tuple[int, ...]]], config: dict[str, Any]
) -> None:
    read(tensors, config, {})


@SEARCH
@given(tensors=TENSORS, metadata=st.dictionaries(NAMES, st.text(max_size=20), max_size=3))
def test_any_tensors_without_a_config_are_read_or_refused(
    tensors: dict[str, tuple[str, tuple[int, ...]]], metadata: dict[str, str]
) -> None:
    read(tensors, None, metadata)


@SEARCH
@given(config=VALUES)
def test_any_config_beside_sound_factors_is_read_or_refused(config: object) -> None:
    stem = "base_model.model.layers.0.q"
    read({f"{stem}.lora_A.weight": ("F32", (R, IN)), f"{stem}.lora_B.weight": ("F32", (OUT, R))}, config, {})
