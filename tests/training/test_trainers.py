"""The trainers of transformers and TRL: sharded, on quantised bases, and what no gradient passes through is refused."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import lorahub
from lorahub.errors import Incompatible
from lorahub.storages.storage import held_in

pytestmark = pytest.mark.plugin("transformers")

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def llamas() -> Any:
    """Imported where the plugin is there."""
    from training import llamas

    return llamas


@pytest.fixture(scope="module")
def base(llamas: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp("base")
    llamas.llama(128).save_pretrained(folder)
    return folder


def nf4() -> Any:
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)


def int8_of_bitsandbytes() -> Any:
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(load_in_8bit=True)


def int8() -> Any:
    from torchao.quantization import Int8WeightOnlyConfig
    from transformers import TorchAoConfig

    return TorchAoConfig(Int8WeightOnlyConfig())


def float8() -> Any:
    from torchao.quantization import Float8WeightOnlyConfig
    from transformers import TorchAoConfig

    return TorchAoConfig(Float8WeightOnlyConfig())


def int8_inputs() -> Any:
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig
    from transformers import TorchAoConfig

    return TorchAoConfig(Int8DynamicActivationInt8WeightConfig())


def quantised(llamas: Any, base: Path, config: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what the libraries' imports say of others is not ours
        return llamas.LlamaForCausalLM.from_pretrained(base, quantization_config=config(), dtype=torch.float32)


@pytest.mark.parametrize(
    ("config", "kind"),
    [
        (nf4, "lora"),
        *(
            pytest.param(config, kind, marks=pytest.mark.slow)
            for config in (nf4, int8_of_bitsandbytes, int8, float8)
            for kind in ("lora", "dora", "ia3")
            if (config, kind) != (nf4, "lora")
        ),
    ],
)
def test_the_trainer_trains_on_a_quantised_base_and_goes_on_exactly(config, kind, llamas, base, tmp_path):
    model = quantised(llamas, base, config)
    before = {name: held.read().values() for name, held in held_in(model).items()}
    assert len(before) == 14
    trainer, trainee, losses = llamas.run(model, tmp_path / "out", kind)
    assert losses[-1] < losses[0] - 0.1
    trainer.save_model(tmp_path / "ink")
    trainee.detach()
    assert "_hf_peft_config_loaded" not in vars(model)
    assert all(torch.equal(held.read().values(), before[name]) for name, held in held_in(model).items())
    outputs = model(llamas.IDS, labels=llamas.IDS)
    with lorahub.attach(model, [tmp_path / "ink"]):
        trained = model(llamas.IDS, labels=llamas.IDS)
    assert outputs.loss.item() == pytest.approx(losses[0], rel=1e-6)
    assert trained.loss < losses[-1]
    again = quantised(llamas, base, config)
    _, _, more = llamas.run(again, tmp_path / "again", kind, seed=7, resume=tmp_path / "out" / "checkpoint-2")
    assert more == losses[2:]


def test_a_quantised_base_that_passes_no_gradient_is_refused_in_its_first_step(llamas, base, tmp_path):
    """torchao rounds the inputs of these, and autograd sees no way through."""
    model = quantised(llamas, base, int8_inputs)
    outputs = model.eval()(llamas.IDS).logits.detach()
    trainee = lorahub.create(model, r=4, target_modules="q_proj")
    with pytest.raises(Incompatible, match=r"no gradient passes through model\.layers\.\d\.\w+\.\w+_proj, .*int8"):
        model.train()(llamas.IDS, labels=llamas.IDS)
    with torch.no_grad():
        assert torch.equal(model(llamas.IDS).logits, outputs)  # as at the beginning
    trainee.detach()
    model(llamas.IDS, labels=llamas.IDS)  # nothing watches any more


@pytest.mark.slow
def test_the_trainer_shards_by_fsdp2_with_the_losses_of_one_process_and_goes_on_exactly(
    llamas: Any, run_script: Callable[..., Any], tmp_path: Path
) -> None:
    exits = run_script((HERE / "llamas.py").read_text(), tmp_path)
    assert exits == [0, 0], "\n".join((tmp_path / f"said-{rank}").read_text() for rank in range(2))
    model = llamas.llama()
    _, trainee, alone = llamas.run(model, tmp_path / "alone")
    for rank in range(2):
        found = json.loads((tmp_path / f"rank-{rank}.json").read_text())
        assert found["sharded"]
        assert found["losses"] == pytest.approx(alone, rel=1e-5)
        assert found["again"] == found["losses"][2:]
    outputs = model.eval()(llamas.IDS).logits.detach()
    trainee.detach()
    for folder in (tmp_path / "ink", tmp_path / "out" / "checkpoint-4"):
        with lorahub.attach(model, [folder]):
            assert (model(llamas.IDS).logits - outputs).norm() < 1e-4 * outputs.norm()


@pytest.mark.slow
@pytest.mark.parametrize("four_bits", [False, True])
def test_trl_trains_a_trainee_and_goes_on_exactly(four_bits, run_script, base, tmp_path):
    found = run_script((HERE / "tuning.py").read_text(), tmp_path, base if four_bits else "")
    assert found["losses"][-1] < found["losses"][0] - 0.1
    assert found["again"] == found["losses"][2:]
    # TRL keeps what is trained on four bits in bfloat16, as the paper of QLoRA does
    assert found["dtypes"] == ["torch.bfloat16" if four_bits else "torch.float32"]
    assert found["files"] >= ["adapter_config.json", "adapter_model.safetensors", "lorahub.json"]
    assert found["head"][-1] < found["head"][0] - 0.1  # TRL reads the head's weight apart from the head
