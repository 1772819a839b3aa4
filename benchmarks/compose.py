"""Composing adapters: lorahub against PEFT's ``add_weighted_adapter`` and against mergekit, and what memory it takes.

All sides get the same files: three adapters of rank 16 with bfloat16 factors on every linear layer of a Llama in
TinyLlama's shape.  Every side runs in a process of its own (``compose_sides.py``); "after imports" is what its work
took.  PEFT's work begins with the model and the adapters in memory and ends before the result is saved; lorahub's
begins with the files' names and ends when the result is written and read back.  PEFT cuts by an SVD of whole matrices,
which takes minutes for all layers, so that it gets one block of the 22, and lorahub the same block and all of them.
"""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from agreement import adapters_apart, checkpoints_apart, weights
from measure import Sample, fold, ratios, run_measured
from models import RANK, TINYLLAMA, adapters_on_disk, base_on_disk, layers_of, small
from transformers import LlamaConfig

import lorahub

__all__ = ["elementwise", "factors", "memory", "mergekit"]

SIDES_FILE = Path(__file__).with_name("compose_sides.py")
ADAPTERS = 3
REPEATS = 3
LAYERS = 22

TIES = {"density": 0.2}
DARE = {"density": 0.5}
WITH_MERGEKIT = {"ties": TIES, "dare_ties": DARE}
"""What is held against mergekit: method -> its parameters."""

NARROW = LlamaConfig(
    **TINYLLAMA.to_dict()
    | {"hidden_size": 1024, "intermediate_size": 2816, "num_attention_heads": 16, "num_key_value_heads": 2}
    | {"vocab_size": 2000, "head_dim": 64}
)
"""Half as wide as TinyLlama, with few words.  mergekit's command goes through every parameter of every model, also
where nothing changes, and takes seconds for each million; embeddings of full size would be three quarters of that."""

AS_PEFT = {"election": "peft"}
AS_MERGEKIT = {"election": "mergekit", "normalize": True, "rescale": False}


def _nothing() -> None:
    pass


@dataclass(frozen=True, slots=True, kw_only=True)
class Side:
    """One side: a command, where its result goes, and what has to be so before it starts."""

    command: list[str]
    out: Path | None = None
    environment: Mapping[str, str] = field(default_factory=dict)
    prepare: Callable[[], None] = _nothing


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """A temporary folder with adapters for as many blocks as are asked for, of TinyLlama where nothing else is said."""

    folder: Path
    quick: bool
    whole: LlamaConfig | None = None

    @property
    def shape(self) -> LlamaConfig:
        """Of the whole model."""
        return layers_of(small(TINYLLAMA), 2) if self.quick else self.whole or TINYLLAMA

    @property
    def layers(self) -> int:
        """How many blocks the whole has."""
        return int(self.shape.num_hidden_layers)

    def adapters(self, layers: int, base: Path | None = None) -> list[Path]:
        """The adapters for the first blocks; the factors of a block are its own."""
        folder = self.folder / f"of-{layers}"
        if not folder.exists():
            adapters_on_disk(folder, layers_of(self.shape, layers), ADAPTERS, base)
        return [folder / f"a{number}" for number in range(ADAPTERS)]

    def side(self, kind: str, name: str, layers: int, *, out: bool = True, **asked: Any) -> Side:
        """A side of ``compose_sides.py`` on the adapters for so many blocks."""
        word = "".join(each if each.isalnum() else "-" for each in name)
        place = self.folder / f"out-{word}" if out else None
        request = {"adapters": [str(each) for each in self.adapters(layers)], "layers": layers, "small": self.quick}
        file = self.folder / f"{word}.json"
        file.write_text(json.dumps({**request, "out": str(place) if place else None, **asked}))
        return Side(command=[sys.executable, str(SIDES_FILE), kind, str(file)], out=place)


def factors(quick: bool) -> dict[str, Any]:
    """Methods that stay in factor space: svd, cat and PEFT's linear."""
    with tempfile.TemporaryDirectory(prefix="lorahub-bench-") as temporary:
        place = Place(folder=Path(temporary), quick=quick)
        one, every = _blocks(place)
        svd = {"method": "svd", "rank": RANK}
        sides = {
            f"PEFT svd, {one}": _peft(place, "svd", 1, svd_rank=RANK),
            f"lorahub svd, {one}": place.side("lorahub", "svd-1", 1, options=svd),
            f"lorahub svd, {every}": place.side("lorahub", "svd", place.layers, options=svd),
            f"lorahub compose (command) svd, {every}": _command(place, svd),
            f"PEFT cat, {every}": _peft(place, "cat", place.layers),
            f"lorahub cat, {every}": place.side("lorahub", "cat", place.layers, options={"method": "linear"}),
            f"PEFT linear, {every}": _peft(place, "linear", place.layers),
            f"lorahub peft_linear, {every}": place.side(
                "lorahub", "lin", place.layers, options={"method": "peft_linear"}
            ),
        }
        pairs = [
            (f"PEFT svd, {one}", f"lorahub svd, {one}"),
            (f"PEFT svd, {one}", f"lorahub svd, {every}"),
            (f"PEFT cat, {every}", f"lorahub cat, {every}"),
            (f"PEFT linear, {every}", f"lorahub peft_linear, {every}"),
        ]
        samples = _turns(sides, 1 if quick else REPEATS)
        says = [
            adapters_apart("svd", _out(sides[f"PEFT svd, {one}"]), _out(sides[f"lorahub svd, {one}"])),
            adapters_apart("cat", _out(sides[f"PEFT cat, {every}"]), _out(sides[f"lorahub cat, {every}"])),
            adapters_apart(
                "linear", _out(sides[f"PEFT linear, {every}"]), _out(sides[f"lorahub peft_linear, {every}"])
            ),
        ]
        return _result(f"Compose three adapters in factor space: {_about(place)}", samples, pairs, says)


def elementwise(quick: bool) -> dict[str, Any]:
    """Methods that look at every element of the changes, and cut what comes of it to the rank of one adapter."""
    with tempfile.TemporaryDirectory(prefix="lorahub-bench-") as temporary:
        place = Place(folder=Path(temporary), quick=quick)
        one, _ = _blocks(place)
        sides, pairs = {}, []
        for name, settings in (("ties", TIES), ("dare_ties", DARE)):
            options = {"method": name, "rank": RANK, **settings, **AS_PEFT}
            theirs, ours = f"PEFT {name}_svd, {one}", f"lorahub {name}, {one}"
            sides[theirs] = _peft(place, f"{name}_svd", 1, svd_rank=RANK, **settings)
            sides[ours] = place.side("lorahub", f"{name}-1", 1, options=options)
            pairs += [(theirs, ours)]
        samples = _turns(sides, 1 if quick else REPEATS)
        says = [adapters_apart("ties", _out(sides[f"PEFT ties_svd, {one}"]), _out(sides[f"lorahub ties, {one}"]))]
        return _result(f"Compose three adapters element by element: {_about(place)}", samples, pairs, says)


def mergekit(quick: bool) -> dict[str, Any]:
    """From a base and adapters to a merged checkpoint, and the arithmetic alone."""
    with tempfile.TemporaryDirectory(prefix="lorahub-bench-") as temporary:
        folder = Path(temporary)
        layers = 1
        place = Place(folder=folder, quick=quick, whole=NARROW)
        base = folder / "base"
        base_on_disk(base, layers_of(place.shape, layers))
        adapters = place.adapters(layers, base)
        merged = [folder / f"merged-{number}" for number in range(ADAPTERS)]
        for adapter, out in zip(adapters, merged, strict=True):
            lorahub.merge(base, {"a": adapter}, out=out)
        sides: dict[str, Side] = {}
        pairs = []
        for name, settings in WITH_MERGEKIT.items():
            together = [f"{base}+{each}" for each in adapters]
            whole, known = f"mergekit-yaml {name}, base + adapters", f"mergekit-yaml {name}, merged checkpoints"
            ours = f"lorahub compose --checkpoint, {name}"
            sides[whole] = _mergekit(folder, name, settings, base, together, fresh=True)
            sides[known] = _mergekit(folder, name, settings, base, [str(each) for each in merged], fresh=False)
            sides[ours] = _checkpoint(folder, name, settings, base, adapters)
            theirs, mine = f"mergekit {name}, arithmetic alone", f"lorahub {name}, arithmetic alone"
            shared = {key: value for key, value in AS_MERGEKIT.items() if key != "election"}
            sides[theirs] = place.side(
                "elements-mergekit", f"{name}-theirs", layers, out=False, method=name, each=settings, shared=shared
            )
            sides[mine] = place.side(
                "elements-lorahub", f"{name}-mine", layers, out=False, method=name, options={**settings, **AS_MERGEKIT}
            )
            pairs += [(whole, ours), (known, ours), (theirs, mine)]
        samples = _turns(sides, 1)  # mergekit's command takes half a minute, and is run four times
        known, ours = "mergekit-yaml ties, merged checkpoints", "lorahub compose --checkpoint, ties"
        difference = checkpoints_apart(base, _out(sides[known]), _out(sides[ours]))
        said = (
            f"ties: the merged weights differ by {difference:.2%} of the change that mergekit makes of checkpoints, "
            "whose changes were rounded to bfloat16 before; lorahub's go in as they are."
        )
        title = f"Compose into a checkpoint, against mergekit: {layers} block, half as wide as TinyLlama's"
        return _result(f"{title}{', small' if quick else ''}", samples, pairs, [said]) | _peers("mergekit")


def memory(quick: bool) -> dict[str, Any]:
    """Peak anonymous memory above that of a process which has read the headers, and what ``--explain`` says."""
    asked: dict[str, tuple[bool, dict[str, Any]]] = {
        "linear": (True, {"method": "linear"}),
        f"svd, rank {RANK}": (True, {"method": "svd", "rank": RANK}),
        f"ties, rank {RANK}": (False, {"method": "ties", "rank": RANK}),
        f"dare_ties, rank {RANK}": (False, {"method": "dare_ties", "rank": RANK}),
        f"core, rank {RANK}": (True, {"method": "core", "rank": RANK}),
        f"tsv, rank {RANK}": (True, {"method": "tsv", "rank": RANK}),
    }
    with tempfile.TemporaryDirectory(prefix="lorahub-bench-") as temporary:
        place = Place(folder=Path(temporary), quick=quick)
        sides, rows = {}, {}
        for name, (whole, options) in asked.items():
            layers = place.layers if whole else 1
            label = f"{name}, {layers} {'block' if layers == 1 else 'blocks'}"
            rows[label] = _estimate(place.adapters(layers), options)
            sides[f"nothing composed, {layers}"] = place.side("ground", f"ground-{layers}", layers, out=False)
            sides[label] = place.side("lorahub", label, layers, options=options)
        samples = _turns(sides, 1 if quick else REPEATS)
        found = {}
        for label, told in rows.items():
            ground = samples[f"nothing composed, {label.split()[-2]}"]
            taken = [
                one["peak_anon_bytes"] - idle["peak_anon_bytes"]
                for one, idle in zip(samples[label], ground, strict=True)
            ]
            written = sum(file.stat().st_size for file in weights(_out(sides[label])))
            found[label] = {"peak_bytes": max(taken), "result_bytes": written, **told}
        result = _result(f"Memory of a composition, and what --explain says: {_about(place)}", samples, [], [])
        return result | {"memory": found, "threads": torch.get_num_threads()}


def _estimate(adapters: Sequence[Path], options: Mapping[str, Any]) -> dict[str, float]:
    """What ``--explain`` says of the peak, and the largest target as a matrix of float32."""
    said = subprocess.run(
        [*_compose(adapters, options), "--explain", "--json"], capture_output=True, text=True, check=True
    ).stdout
    outline = json.loads(said)
    largest = max(4 * math.prod(target["shape"]) for target in outline["targets"])
    return {"estimate_bytes": outline["peak_bytes"], "largest_bytes": largest}


def _compose(adapters: Sequence[Path], options: Mapping[str, Any]) -> list[str]:
    """The command."""
    command = [sys.executable, "-m", "lorahub", "compose", *map(str, adapters), "--method", options["method"]]
    return [*command, *(["--rank", str(options["rank"])] if "rank" in options else [])]


def _blocks(place: Place) -> tuple[str, str]:
    return "1 block", f"all {place.layers} blocks"


def _about(place: Place) -> str:
    shape = "a small Llama" if place.quick else "TinyLlama"
    return f"{place.layers} blocks, {7 * place.layers} linear layers of {shape}, rank {RANK}, bf16 factors"


def _out(side: Side) -> Path:
    """Where a side's result lies."""
    assert side.out is not None  # asked only of those that have one
    return side.out


def _peft(place: Place, kind: str, layers: int, **options: Any) -> Side:
    return place.side("peft", f"peft-{kind}", layers, options={"combination_type": kind, **options})


def _command(place: Place, options: Mapping[str, Any]) -> Side:
    out = place.folder / "out-command"
    return Side(command=[*_compose(place.adapters(place.layers), options), "-o", str(out)], out=out)


def _mergekit(
    folder: Path, method: str, settings: Mapping[str, float], base: Path, models: Sequence[str], *, fresh: bool
) -> Side:
    """mergekit's command; with models given as base + adapter it merges these first, into a cache that is fresh."""
    word = f"{method}-{'fresh' if fresh else 'known'}"
    file, out, cache = folder / f"{word}.yml", folder / f"out-{word}", folder / "lora-cache"
    document = {
        "merge_method": method,
        "base_model": str(base),
        "dtype": "bfloat16",
        "parameters": {key: value for key, value in AS_MERGEKIT.items() if key != "election"},
        "models": [{"model": each, "parameters": {"weight": 1.0, **settings}} for each in models],
    }
    file.write_text(json.dumps(document))  # JSON is YAML
    command = [str(Path(sys.executable).with_name("mergekit-yaml")), str(file), str(out), "--quiet"]
    command += ["--no-copy-tokenizer", "--no-write-model-card", "--random-seed", "0", "--lora-merge-cache", str(cache)]
    return Side(
        command=command,
        out=out,
        environment={"HF_HUB_OFFLINE": "1"},
        prepare=lambda: shutil.rmtree(cache, ignore_errors=True),
    )


def _checkpoint(folder: Path, method: str, settings: Mapping[str, float], base: Path, adapters: Sequence[Path]) -> Side:
    """lorahub's command, the base having been hashed before."""
    out = folder / f"out-checkpoint-{method}"
    given = {"election": "mergekit", "normalize": "true", "rescale": "false", **settings}
    pairs = [part for name, value in given.items() for part in ("--set", f"{name}={value}")]
    command = [sys.executable, "-m", "lorahub", "compose", *map(str, adapters), "--method", method, *pairs]
    command += ["--base", str(base), "--checkpoint", "-o", str(out)]
    environment = {"LORAHUB_CACHE": str(folder / "cache")}
    run_measured([*command[:-2], "--explain"], environment=environment)  # the base is hashed here
    return Side(command=command, out=out, environment=environment)


def _turns(sides: Mapping[str, Side], repeats: int) -> dict[str, list[Sample]]:
    """Each side in turn, repeat by repeat; the last results stay."""
    samples: dict[str, list[Sample]] = {name: [] for name in sides}
    for _ in range(repeats):
        for name, side in sides.items():
            if side.out is not None:
                shutil.rmtree(side.out, ignore_errors=True)
            side.prepare()
            samples[name].append(run_measured(side.command, environment=side.environment))
    return samples


def _result(
    title: str, samples: Mapping[str, Sequence[Sample]], pairs: Sequence[tuple[str, str]], says: Sequence[str]
) -> dict[str, Any]:
    result: dict[str, Any] = {
        "title": title,
        "repeats": len(next(iter(samples.values()))),
        "sides": {name: fold(each) for name, each in samples.items()},
        "says": list(says),
    }
    return result | ({"work_ratios": ratios(samples, pairs, "work_s")} if pairs else {})


def _peers(*names: str) -> dict[str, Any]:
    from importlib import metadata

    return {"peers": {name: metadata.version(name) for name in names}}
