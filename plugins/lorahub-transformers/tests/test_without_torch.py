"""Everything but opening a model works where neither torch nor transformers can be imported."""

from __future__ import annotations

import subprocess
import sys

import pytest

BLOCKED = """
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {"torch", "transformers"}:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name.partition(".")[0])

sys.meta_path.insert(0, Blocked())
"""

JOB = """
from pathlib import Path
from lorahub.bases.index import BaseRef
from lorahub.bases.layout import Target
from lorahub.bases.open import index_base, survey_base
from lorahub.bases.torch_module import TorchModule
from lorahub_transformers import lorahub_frameworks

(framework,) = lorahub_frameworks()
files = survey_base(sys.argv[1])
chosen, index = index_base(files, BaseRef(), {"torch": TorchModule(), "transformers": framework})
assert chosen is framework
targets = framework.targets(index, "all-linear")
assert len(framework.layouts(index, targets)) == len(targets) == 8
edits = framework.edits(index, {"score.weight": ((3, 16), "F32")}, {"task_type": "SEQ_CLS"})
assert edits.config["architectures"] == ["GPT2ForSequenceClassification"]
assert framework.untie(index, ["lm_head.weight"]).copied
assert framework.companions(files) == ("config.json", "generation_config.json")
assert not {"torch", "transformers"} & set(sys.modules)
print(index.structure)
"""

OPEN = """
from pathlib import Path
from lorahub.errors import MissingDependency
from lorahub_transformers import Transformers

try:
    Transformers().open_base(Path(sys.argv[1]))
except MissingDependency as error:
    print(error.hint)
"""


UNDECLARED = """
from lorahub.bases.index import BaseRef
from lorahub.bases.open import survey_base
from lorahub.errors import UsageError
from lorahub_transformers import Transformers

index = Transformers().index(BaseRef(), survey_base(sys.argv[1]))
try:
    Transformers().targets(index, "attention")
except UsageError as error:
    print(index.declared, len(index.parameters) > 10, error.hint)
"""

ENCODERS = """
from lorahub.bases.index import BaseRef
from lorahub.bases.open import survey_base
from lorahub_transformers import Transformers

for folder in sys.argv[1:]:
    index = Transformers().index(BaseRef(), survey_base(folder))
    targets = Transformers().targets(index, "attention")
    print(index.config["architectures"][0], index.declared, len(targets))
assert not {"torch", "transformers"} & set(sys.modules)
"""


def run(script: str, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", BLOCKED + script, *arguments],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.fixture
def folder(tiny, saved):
    return saved(tiny("gpt2", "GPT2LMHeadModel"))


def test_index_layouts_and_edits_need_neither_torch_nor_transformers(folder, framework, tiny):
    from lorahub.bases.index import BaseRef

    structure = framework.index_model(tiny("gpt2", "GPT2LMHeadModel"), BaseRef()).structure
    assert run(JOB, str(folder)) == structure


def test_opening_a_model_says_what_to_install(folder):
    assert run(OPEN, str(folder)) == "pip install 'transformers>=5.4,<6'"


def test_an_architecture_outside_the_table_is_taken_by_names_and_shapes(tiny, saved):
    folder = saved(tiny("opt", "OPTForCausalLM"))
    assert run(UNDECLARED, str(folder)) == "False True name the modules, or give the live model"


def test_text_encoders_of_pipelines_are_known_without_their_classes(tiny, saved):
    encoders = {
        "CLIPTextModel": "clip_text_model",
        "CLIPTextModelWithProjection": "clip_text_model",
        "CLIPVisionModelWithProjection": "clip_vision_model",
        "T5EncoderModel": "t5",
        "UMT5EncoderModel": "umt5",
        "Gemma2Model": "gemma2",
        "LlamaModel": "llama",
        "Qwen3Model": "qwen3",
        "BertModel": "bert",
    }
    folders = [str(saved(tiny(kind, name))) for name, kind in encoders.items()]
    assert run(ENCODERS, *folders).split("\n") == [f"{name} True 8" for name in encoders]
