"""What lorahub publishes loads unchanged in PEFT, Transformers and diffusers from the Hub, and theirs loads here."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("diffusers", reason="diffusers is not installed")
sys.path.append(str(Path(__file__).parents[3] / "tests"))  # for the double of the Hub, which lies in no package

from hub.double import TOKEN, Double, card

import lorahub

pytestmark = [
    # peft 0.21 asks transformers 5.23 for an attribute that it deprecates
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    # huggingface_hub 2.4 hands its plain uploads to httpx2 in a way that it deprecates
    pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning"),
]

LOADS = """
import json, sys, warnings
warnings.filterwarnings("ignore")
import torch
from transformers import LlamaForCausalLM

base, *folders = sys.argv[1:]
x = torch.arange(12).reshape(1, 12) % 50

def run(load=None):
    model = LlamaForCausalLM.from_pretrained(base).eval()
    model = load(model) if load else model
    with torch.no_grad():
        return model(x).logits

def by_peft(model, name, **more):
    from peft import PeftModel
    return PeftModel.from_pretrained(model, name, **more).eval()

def by_transformers(model, name, **more):
    model.load_adapter(name, adapter_kwargs=more)
    return model.eval()

bare, found = run(), {}
for load in (by_peft, by_transformers):
    near = [run(lambda model: load(model, folder)) for folder in folders]
    far = [run(lambda model: load(model, "acme/ink", revision=revision)) for revision in ("v1.2.0", "v1.3.0")]
    found[load.__name__] = {
        "same": [[bool(torch.equal(one, other)) for other in far] for one in near],
        "change": [float((each - bare).norm() / bare.norm()) for each in far],
    }
print(json.dumps(found))
"""

LOADS_STYLE = """
import json, sys, warnings
warnings.filterwarnings("ignore")
import torch
from diffusers import UNet2DConditionModel
from diffusers.loaders import StableDiffusionLoraLoaderMixin

base, local = sys.argv[1:]

class Pipeline(StableDiffusionLoraLoaderMixin):
    components = {}
    hf_device_map = None
    def __init__(self):
        self.text_encoder = None
        self.unet = UNet2DConditionModel.from_pretrained(base).eval()

def run(*name, **more):
    pipe = Pipeline()
    if name:
        pipe.load_lora_weights(*name, **more)
    torch.manual_seed(0)
    with torch.no_grad():
        return pipe.unet(torch.randn(1, 4, 8, 8), 1, torch.randn(1, 3, 8)).sample

bare, near, far = run(), run(local), run("acme/style", revision="v1.0.0")
print(json.dumps([bool(torch.equal(near, far)), float((far - bare).norm() / bare.norm())]))
"""

UPLOADS = """
import sys, warnings
warnings.filterwarnings("ignore")
from peft import PeftModel
from transformers import LlamaForCausalLM

base, local = sys.argv[1:]
PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(base), local).push_to_hub("acme/theirs")
"""


SERVES = """
import contextlib, io, json, sys, traceback
for line in sys.stdin:
    sys.argv = json.loads(line)
    said, trouble = io.StringIO(), ""
    with contextlib.redirect_stdout(said):
        try:
            exec(sys.argv[0], {"__name__": "__main__"})
        except BaseException:
            trouble = traceback.format_exc()
    print(json.dumps([said.getvalue(), trouble]), flush=True)
"""
"""Runs one script after another, so that the peers are imported once; they read at import which Hub is theirs."""


@pytest.fixture(scope="module")
def hub() -> Iterator[Double]:
    with Double() as double:
        yield double
    assert not [each for each in double.log if each.where == "cdn" and "authorization" in each.headers]


@pytest.fixture
def double(hub: Double, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Double]:
    """A Hub, and no variable of the one who runs the tests."""
    from huggingface_hub import constants
    from huggingface_hub.utils import close_session

    for name in ("HF_TOKEN", "HF_ENDPOINT", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_HUB_CACHE", "LORAHUB_HUB"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"HF_HUB_OFFLINE": False, "HF_HUB_DISABLE_XET": True, "HF_HUB_DISABLE_TELEMETRY": True}.items():
        monkeypatch.setattr(constants, name, value)
    monkeypatch.setenv("LORAHUB_CACHE", str(tmp_path / "cache"))
    close_session()
    yield hub
    close_session()


@pytest.fixture(scope="module")
def run(hub: Double, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., str]]:
    """``run(SCRIPT, *arguments)``: what a script prints in a process that has the double as its Hub."""
    theirs = {"HF_TOKEN", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_HUB_CACHE"}
    environment = {name: value for name, value in os.environ.items() if name not in theirs} | {
        "HF_ENDPOINT": hub.endpoint,
        "HF_TOKEN": TOKEN,
        "HF_HOME": str(tmp_path_factory.mktemp("home")),
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_XET": "1",
    }
    with subprocess.Popen(
        [sys.executable, "-c", SERVES], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        asked, answers = process.stdin, process.stdout
        assert asked is not None
        assert answers is not None

        def start(script: str, *arguments: str | Path) -> str:
            asked.write(json.dumps([script, *map(str, arguments)]) + "\n")
            asked.flush()
            said, trouble = json.loads(answers.readline())
            assert not trouble, trouble
            return str(said)

        yield start
        asked.close()


@pytest.fixture
def base(tiny: Callable[..., Any], tmp_path: Path) -> Path:
    tiny("llama", "LlamaForCausalLM").save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def trained(base: Path, folder: Path, seed: int, **options: Any) -> Path:
    """An adapter by PEFT, as its trainers save it, with random factors in place of training."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaForCausalLM

    torch.manual_seed(seed)
    config = LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False, task_type="CAUSAL_LM", **options)
    model = get_peft_model(LlamaForCausalLM.from_pretrained(base), config)
    model.save_pretrained(folder)
    (folder / "README.md").unlink()
    written = folder / "adapter_config.json"  # as if it had been trained on the base's name
    written.write_text(json.dumps(json.loads(written.read_text()) | {"base_model_name_or_path": "acme/base"}))
    return folder


def push(double: Double, folder: Path, name: str, version: str, **options: Any) -> None:
    lorahub.push(folder, name, version=version, license="mit", hub=double.endpoint, token=TOKEN, **options)


def test_published_versions_load_as_the_folders_they_came_from(double, base, run, tmp_path):
    folders = [trained(base, tmp_path / name, seed) for seed, name in enumerate(("one", "two"), 1)]
    before = [(folder / "adapter_model.safetensors").read_bytes() for folder in folders]
    for folder, version in zip(folders, ("1.2.0", "1.3.0"), strict=True):
        push(double, folder, "acme/ink", version)
    assert [(folder / "adapter_model.safetensors").read_bytes() for folder in folders] == before
    found = json.loads(run(LOADS, base, *folders).splitlines()[-1])
    assert found.keys() == {"by_peft", "by_transformers"}
    for each in found.values():
        assert each["same"] == [[True, False], [False, True]]  # each version is its folder, and not the other
        assert min(each["change"]) > 1e-2


def test_a_published_style_loads_in_diffusers_as_the_folder_it_came_from(double, run, tmp_path):
    import torch
    from diffusers import UNet2DConditionModel
    from diffusers.loaders import StableDiffusionLoraLoaderMixin
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        cross_attention_dim=8,
        attention_head_dim=4,
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    )
    unet.save_pretrained(tmp_path / "unet")
    unet.add_adapter(LoraConfig(r=4, target_modules=["to_q", "to_v"], init_lora_weights=False))
    StableDiffusionLoraLoaderMixin.save_lora_weights(tmp_path / "style", get_peft_model_state_dict(unet))
    (tmp_path / "style" / "README.md").write_bytes(card(base_model="acme/sd", license="mit"))
    push(double, tmp_path / "style", "acme/style", "1.0.0")
    same, change = json.loads(run(LOADS_STYLE, tmp_path / "unet", tmp_path / "style").splitlines()[-1])
    assert same
    assert change > 1e-2


def test_what_peft_pushes_is_pulled_and_merged_as_peft_merges_it(double, base, run, tmp_path):
    import torch
    from peft import PeftModel
    from transformers import LlamaForCausalLM

    folder = trained(base, tmp_path / "one", 1)
    run(UPLOADS, base, folder)
    assert "adapter_model.safetensors" in double.repo("acme/theirs").files("main")
    near = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(base), folder).merge_and_unload().state_dict()
    model = LlamaForCausalLM.from_pretrained(base)
    bare = {name: value.clone() for name, value in model.state_dict().items()}
    adapter = lorahub.load("acme/theirs", hub=double.endpoint, token=TOKEN)
    merged = lorahub.merge(model, {"theirs": adapter})
    name = "model.layers.0.self_attn.q_proj.weight"
    assert (model.state_dict()[name] - bare[name]).norm() > 1e-2 * bare[name].norm()
    for key, value in model.state_dict().items():
        torch.testing.assert_close(value, near[key], rtol=1e-6, atol=1e-7)
    merged.undo()
