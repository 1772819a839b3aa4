"""A small file of each layout in the wild, written from its description: one format, and every key accounted for.

Names and shapes only; factors are ones.  The same files are inspected by a process that cannot import torch.
"""

from __future__ import annotations

import json
import math
import struct
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from lorahub.adapter import open_header
from lorahub.findings import Verdict
from lorahub.plugins import Registry

IN, OUT, R = 8, 12, 2

Shapes = Mapping[str, tuple[int, ...]]


def pair(down: str, up: str, *, rank: int = R) -> Shapes:
    """Factors as most layouts store them: [r, in] and [out, r]."""
    return {down: (rank, IN), up: (OUT, rank)}


def lora(stem: str, a: str = "lora_A.weight", b: str = "lora_B.weight") -> Shapes:
    return pair(f"{stem}.{a}", f"{stem}.{b}")


def kohya(stem: str) -> Shapes:
    return {**lora(stem, "lora_down.weight", "lora_up.weight"), f"{stem}.alpha": ()}


def peft(peft_type: str, **fields: object) -> dict[str, dict[str, object]]:
    return {"adapter_config.json": {"peft_type": peft_type, "target_modules": ["q"], **fields}}


@dataclass(frozen=True, kw_only=True)
class Layout:
    """A file as somebody's tool writes it, and what it is to be taken for."""

    format: str
    tensors: Shapes
    kinds: tuple[str, ...] = ("lora",)
    parts: tuple[str, ...] = ()
    file: str = "adapter_model.safetensors"
    metadata: Mapping[str, str] = field(default_factory=dict)
    configs: Mapping[str, Mapping[str, object]] = field(default_factory=dict)
    marks: tuple[str, ...] = ()  # tensors without numbers, which say what a file is

    def write(self, folder: Path, extra: Shapes | None = None) -> Path:
        """The folder with these files; single numbers are 1, so is everything else."""
        folder.mkdir()
        tensors = {**self.tensors, **(extra or {})}
        entries: dict[str, object] = {"__metadata__": dict(self.metadata)} if self.metadata else {}
        data = b""
        for key, shape in tensors.items():
            values = struct.pack("<f", 1.0) * math.prod(shape)
            entries[key] = {"dtype": "F32", "shape": list(shape), "data_offsets": [len(data), len(data) + len(values)]}
            data += values
        header = json.dumps(entries).encode()
        (folder / self.file).write_bytes(len(header).to_bytes(8, "little") + header + data)
        for name, config in self.configs.items():
            (folder / name).write_text(json.dumps(config))
        return folder


P = "base_model.model.model.layers.0.self_attn.q"
DIFFUSERS = "pytorch_lora_weights.safetensors"
UNET = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1"
FLAT = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"

LAYOUTS: dict[str, Layout] = {
    "PEFT LoRA": Layout(format="peft", tensors=lora(P), configs=peft("LORA", r=R, lora_alpha=4)),
    "PEFT LoHa": Layout(
        format="peft",
        tensors={f"{P}.hada_w{i}_{ab}": (OUT, R) if ab == "a" else (R, IN) for i in (1, 2) for ab in "ab"},
        configs=peft("LOHA", r=R, alpha=4),
        kinds=("loha",),
    ),
    "PEFT LoKr": Layout(
        format="peft",
        tensors={f"{P}.lokr_w1": (3, 2), f"{P}.lokr_w2_a": (4, R), f"{P}.lokr_w2_b": (R, 4)},
        configs=peft("LOKR", r=R, alpha=4),
        kinds=("lokr",),
    ),
    "PEFT IA3": Layout(
        format="peft", tensors={f"{P}.ia3_l": (OUT, 1)}, configs=peft("IA3", feedforward_modules=[]), kinds=("ia3",)
    ),
    "PEFT dump": Layout(
        format="state-dict", tensors=lora("blocks.0.q", "lora_A.default.weight", "lora_B.default.weight")
    ),
    "DiffSynth": Layout(
        format="state-dict",
        tensors=lora("transformer_blocks.0.attn.to_q", "lora_A.default.weight", "lora_B.default.weight"),
        file="lora.safetensors",
    ),
    "diffusers": Layout(format="diffusers", tensors=lora(f"{UNET}.to_q"), file=DIFFUSERS),
    "diffusers with alpha in the header": Layout(
        format="diffusers",
        tensors=lora(f"{UNET}.to_q"),
        file=DIFFUSERS,
        metadata={"format": "pt", "lora_adapter_metadata": json.dumps({"unet.r": R, "unet.lora_alpha": 4})},
    ),
    "diffusers, second generation": Layout(
        format="diffusers", tensors=lora(f"{UNET}.to_q", "lora.down.weight", "lora.up.weight"), file=DIFFUSERS
    ),
    "diffusers, first generation": Layout(
        format="diffusers",
        tensors=lora(f"{UNET}.processor.to_q_lora", "down.weight", "up.weight"),
        file=DIFFUSERS,
    ),
    "diffusers, text encoder of old": Layout(
        format="diffusers",
        tensors=lora(
            "text_encoder.text_model.encoder.layers.0.self_attn.q_proj.lora_linear_layer", "down.weight", "up.weight"
        ),
        file=DIFFUSERS,
    ),
    "kohya SD": Layout(format="kohya", tensors=kohya(FLAT), file="style.safetensors"),
    "kohya SDXL": Layout(
        format="kohya",
        tensors={
            **kohya("lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q"),
            **kohya("lora_te1_text_model_encoder_layers_0_self_attn_q_proj"),
        },
        file="style.safetensors",
        metadata={"ss_network_module": "networks.lora", "ss_base_model_version": "sdxl_base_v1-0"},
    ),
    "kohya Flux": Layout(
        format="kohya", tensors=kohya("lora_unet_double_blocks_0_img_attn_qkv"), file="style.safetensors"
    ),
    "musubi Wan": Layout(format="kohya", tensors=kohya("lora_unet_blocks_0_self_attn_q"), file="style.safetensors"),
    "kohya DoRA": Layout(
        format="kohya",
        tensors={**kohya(FLAT), f"{FLAT}.dora_scale": (OUT, 1)},
        kinds=("dora",),
        file="style.safetensors",
    ),
    "LyCORIS LoHa": Layout(
        format="kohya",
        tensors={f"{FLAT}.hada_w{i}_{ab}": (OUT, R) if ab == "a" else (R, IN) for i in (1, 2) for ab in "ab"}
        | {f"{FLAT}.alpha": ()},
        kinds=("loha",),
        file="style.safetensors",
    ),
    "LyCORIS LoKr": Layout(
        format="kohya",
        tensors={
            "lycoris_layers_0_q.lokr_w1": (3, 2),
            "lycoris_layers_0_q.lokr_w2": (4, 4),
            "lycoris_layers_0_q.alpha": (),
        },
        kinds=("lokr",),
        file="style.safetensors",
    ),
    "OneTrainer, legacy": Layout(
        format="kohya", tensors=kohya("lora_transformer_transformer_blocks_0_attn_to_q"), file="style.safetensors"
    ),
    "ComfyUI": Layout(format="comfy", tensors=lora("diffusion_model.blocks.0.self_attn.q"), file="style.safetensors"),
    "ComfyUI with down and up": Layout(
        format="comfy", tensors=kohya("diffusion_model.layers.0.attention.qkv"), file="style.safetensors"
    ),
    "XLabs": Layout(
        format="xlabs",
        tensors=lora("double_blocks.0.processor.qkv_lora1", "down.weight", "up.weight"),
        file="lora.safetensors",
    ),
    "BFL control": Layout(
        format="bfl",
        tensors={
            **lora("img_in"),
            **lora("double_blocks.0.img_attn.qkv"),
            "double_blocks.0.img_attn.qkv.lora_B.bias": (OUT,),
            "img_in.lora_B.bias": (OUT,),
            "double_blocks.0.img_attn.norm.query_norm.scale": (4,),
            "double_blocks.0.img_attn.norm.key_norm.scale": (4,),
        },
        kinds=("lora", "replace"),  # the bias beside a factor is a slot of LoRA; the norms are whole
        file="lora.safetensors",
    ),
    "Stability's Control-LoRA": Layout(
        format="control-lora",
        tensors={
            "lora_controlnet": (0,),
            "input_blocks.1.0.in_layers.2.up": (OUT, R, 1, 1),
            "input_blocks.1.0.in_layers.2.down": (R, IN, 3, 3),
            "input_blocks.1.0.in_layers.2.bias": (OUT,),
            "time_embed.0.up": (OUT, R),
            "time_embed.0.down": (R, IN),
            "zero_convs.0.0.weight": (OUT, OUT, 1, 1),
            "zero_convs.0.0.bias": (OUT,),
        },
        kinds=("lora", "replace"),
        file="control-lora-canny-rank128.safetensors",
        marks=("lora_controlnet",),
    ),
    "MLX": Layout(
        format="mlx",
        tensors={"model.layers.0.self_attn.q_proj.lora_a": (IN, R), "model.layers.0.self_attn.q_proj.lora_b": (R, OUT)},
        file="adapters.safetensors",
        configs={
            "adapter_config.json": {
                "fine_tune_type": "lora",
                "num_layers": 1,
                "lora_parameters": {"rank": R, "scale": 20.0, "dropout": 0.0},
            }
        },
    ),
    "torchtune": Layout(
        format="torchtune",
        tensors=lora("layers.0.attn.q_proj", "lora_a.weight", "lora_b.weight"),
        configs={"adapter_config.json": {"r": R, "lora_alpha": 4, "target_modules": ["q_proj"]}},
    ),
    "Tinker": Layout(
        format="tinker",
        tensors={
            **lora("base_model.model.model.unembed_tokens"),
            "base_model.model.model.layers.0.mlp.experts.w1.lora_A.weight": (1, R, IN),
            "base_model.model.model.layers.0.mlp.experts.w1.lora_B.weight": (3, OUT, R),
        },
        kinds=("expert-lora", "lora"),
        configs={"adapter_config.json": {"peft_type": "LORA", "r": R, "lora_alpha": 4}},
    ),
    "loralib": Layout(
        format="loralib",
        tensors=pair(
            "roberta.encoder.layer.0.attention.self.query.lora_A", "roberta.encoder.layer.0.attention.self.query.lora_B"
        ),
    ),
    "cloneofsimo": Layout(
        format="cloneofsimo",
        tensors={
            "unet:0:down": (R, IN),
            "unet:0:up": (OUT, R),
            "text_encoder:0:down": (R, IN),
            "text_encoder:0:up": (OUT, R),
        },
        metadata={
            "unet": '["CrossAttention"]',
            "text_encoder": '["CLIPAttention"]',
            "unet:0:rank": "2",
            "text_encoder:0:rank": "2",
        },
        file="lora.safetensors",
    ),
    "LoRA-ViT": Layout(
        format="lora-vit",
        tensors={"w_a_000": (R, IN), "w_b_000": (OUT, R), "w_a_001": (R, IN), "w_b_001": (OUT, R)},
        kinds=("qv-lora",),
        file="lora_rank2.safetensors",
    ),
    "PEFT before 0.3 on fused layers": Layout(
        format="peft-merged",
        tensors={
            "base_model.model.h.0.query_key_value.lora_A.weight": (2 * R, IN),
            "base_model.model.h.0.query_key_value.lora_B.weight": (2 * OUT, R, 1),
        },
        kinds=("merged-lora",),
        file="adapter_model.safetensors",
        configs={
            "adapter_config.json": {
                "peft_type": "LORA",
                "r": R,
                "lora_alpha": 4,
                "enable_lora": [True, False, True],
                "merge_weights": False,
            }
        },
    ),
    "T-Few (IA)3": Layout(
        format="ia3-dump",
        tensors={"encoder.block.0.layer.0.SelfAttention.k.multi_lora_b": (OUT, 1)},
        kinds=("ia3",),
        file="finish.safetensors",
    ),
    "AdapterHub LoRA": Layout(
        format="adapterhub",
        tensors=pair(
            "bert.encoder.layer.0.attention.self.query.loras.mine.lora_A",
            "bert.encoder.layer.0.attention.self.query.loras.mine.lora_B",
        ),
        file="adapter.safetensors",
        configs={
            "adapter_config.json": {
                "config": {"architecture": "lora", "r": R, "alpha": 4, "composition_mode": "add", "use_gating": False},
                "hidden_size": IN,
                "model_class": "BertModelWithHeads",
                "model_name": "bert-base-uncased",
                "model_type": "bert",
                "name": "mine",
                "version": "adapters.1.2.0",
            }
        },
    ),
    "textual inversion": Layout(
        format="textual-inversion",
        tensors={"<ink>": (768,)},
        kinds=(),
        parts=("textual-inversion",),
        file="learned_embeds.safetensors",
    ),
    "textual inversion of two encoders": Layout(
        format="textual-inversion",
        tensors={"clip_l": (2, 768), "clip_g": (2, 1280)},
        kinds=(),
        parts=("textual-inversion",),
        file="ink.safetensors",
    ),
}
"""Each layout -> its files; made from its description, not from a sample."""


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_layout_is_one_format_and_all_of_it_is_read(name: str, tmp_path: Path, registry: Registry) -> None:
    layout = LAYOUTS[name]
    header = open_header(layout.write(tmp_path / "adapter"), registry)
    assert header.format == layout.format
    assert header.kinds == layout.kinds
    kinds = tuple(sorted({part.kind for part in header.reading.parts.values()}))
    assert kinds == layout.parts
    assert [each for each in header.findings if each.level > Verdict.UNVERIFIED] == []
    refs = [ref.key for group in header.reading.groups for ref in group.slots.values()]
    refs += [ref.key for part in header.reading.parts.values() for ref in part.tensors.values()]
    assert sorted([*refs, *layout.marks]) == sorted(layout.tensors)


@pytest.mark.parametrize("name", LAYOUTS)
def test_no_two_formats_are_as_sure_of_a_layout(name: str, tmp_path: Path, registry: Registry) -> None:
    layout = LAYOUTS[name]
    files = open_header(layout.write(tmp_path / "adapter"), registry).files
    claims = sorted((claim.score, each.name) for each in registry.formats.values() if (claim := each.claims(files)))
    assert claims[-1][1] == layout.format
    assert len(claims) == 1 or claims[-1][0] > claims[-2][0], claims


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_key_that_the_layout_has_no_word_for_is_named(name: str, tmp_path: Path, registry: Registry) -> None:
    folder = LAYOUTS[name].write(tmp_path / "adapter", {"nobody.knows.this": (3, 5)})
    header = open_header(folder, registry)
    named = [each for each in header.findings if "nobody.knows.this" in each.where]
    assert [each.level > Verdict.UNVERIFIED for each in named] == [True]


WITHOUT_TORCH = """
import json, sys
class NoTorch:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {"torch", "transformers", "safetensors", "peft", "diffusers"}:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, NoTorch())
import lorahub
print(json.dumps({path: lorahub.inspect(path).format for path in sys.argv[1:]}))
"""


def test_every_layout_is_inspected_where_torch_cannot_be_imported(tmp_path: Path) -> None:
    folders = {str(layout.write(tmp_path / str(at))): layout for at, layout in enumerate(LAYOUTS.values())}
    done = subprocess.run([sys.executable, "-c", WITHOUT_TORCH, *folders], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {path: layout.format for path, layout in folders.items()}


def test_every_built_in_format_has_a_layout_here(registry: Registry) -> None:
    elsewhere = {"gguf": "tests/unit/test_gguf_format.py: it is no safetensors file"}
    assert set(registry.formats) - set(elsewhere) == {layout.format for layout in LAYOUTS.values()}
