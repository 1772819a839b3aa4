"""Base and adapter from disk, merged checkpoint to disk: lorahub's stream against PEFT, a plain copy and ``cp``.

Every side runs in a process of its own, from start to exit, and everything it wrote is on the disk when it ends
(``fsync``).  ``lorahub merge`` hashes a base the first time it sees it; that is measured once with and once without.
The plain copy is the same streaming code with a plan that changes nothing.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from measure import Sample, evict, fold, ratios, run_measured
from models import LLAMA, llama_on_disk, small

__all__ = ["cold", "warm"]

SIDES_FILE = Path(__file__).with_name("disk_sides.py")
PEFT, COPY, CP = "PEFT load, merge_and_unload, save_pretrained", "plain copy, same code", "cp and fsync"
COMMAND, FIRST, API = "lorahub merge", "lorahub merge, base never seen before", "lorahub.merge(..., out=)"
PAIRS = [
    (PEFT, COMMAND),
    (PEFT, API),
    (COMMAND, COPY),
    (API, COPY),
    (COMMAND, CP),
    (FIRST, COMMAND),
    (PEFT, CP),
]
WORK_PAIRS = [(PEFT, API), (API, COPY), (API, CP)]
ROOM = 4
"""Free space needed, in bases."""


def cold(quick: bool) -> dict[str, Any]:
    """The files dropped from the page cache before each run."""
    return _measure(quick, evicted=True)


def warm(quick: bool) -> dict[str, Any]:
    """The base in the page cache, as after a download or an earlier merge."""
    return _measure(quick, evicted=False)


def _measure(quick: bool, *, evicted: bool) -> dict[str, Any]:
    size = 0.05e9 if quick else 2.2e9
    repeats = 2 if quick else 5
    with tempfile.TemporaryDirectory(prefix="lorahub-bench-") as temporary:
        folder = Path(temporary)
        free = shutil.disk_usage(folder).free
        state = "not in the page cache" if evicted else "in the page cache"
        title = f"Load, merge, save a random Llama, {size / 1e9:.1f} GB in bf16, files {state}"
        if free < ROOM * size:
            needs = f"{ROOM * size / 1e9:.1f} GB of temporary space, and {free / 1e9:.1f} GB are free"
            return {"title": title, "skipped": f"it needs {needs}"}
        base, adapter = llama_on_disk(folder, small(LLAMA) if quick else LLAMA)
        sides = _sides(base, adapter, folder / "out", folder)
        samples: dict[str, list[Sample]] = {name: [] for name in sides}
        results: dict[str, Path] = {}
        for _ in range(repeats):
            for name, (command, environment, prepare) in sides.items():
                prepare()
                sources = [*base.glob("*.safetensors"), *adapter.glob("*.safetensors")]
                if evicted:
                    evict(sources)
                else:
                    _read(sources)
                samples[name].append(run_measured(command, environment=environment))
                if name in (PEFT, COMMAND) and name not in results:
                    results[name] = (folder / "out").rename(folder / f"kept-{len(results)}")
        agreement = _agreement(base, results[PEFT], results[COMMAND])
    return {
        "title": title,
        "repeats": repeats,
        "bytes": int(agreement.pop("bytes")),
        "agreement": agreement,
        "sides": {name: fold(each) for name, each in samples.items()},
        "ratios": ratios(samples, PAIRS, "wall_s"),
        "work_ratios": ratios(samples, WORK_PAIRS, "work_s"),
        "cpu_ratios": ratios(samples, PAIRS, "cpu_s"),
    }


def _sides(
    base: Path, adapter: Path, out: Path, folder: Path
) -> dict[str, tuple[list[str], dict[str, str], Callable[[], None]]]:
    """Side -> its command, its environment, and what has to be so before it starts."""
    fresh, seen = folder / "cache-fresh", folder / "cache-seen"

    def clear() -> None:
        shutil.rmtree(out, ignore_errors=True)

    def clear_all() -> None:
        clear()
        shutil.rmtree(fresh, ignore_errors=True)

    merge = [sys.executable, "-m", "lorahub", "merge", str(adapter), "--base", str(base), "-o", str(out)]
    run_measured([*merge, "--plan"], environment={"LORAHUB_CACHE": str(seen)})  # the base is hashed here
    own = [sys.executable, str(SIDES_FILE)]
    places = [str(base), str(adapter), str(out)]
    known = {"LORAHUB_CACHE": str(seen), "HF_HUB_OFFLINE": "1"}
    return {
        PEFT: ([*own, "peft", *places], known, clear),
        COMMAND: (merge, known, clear),
        API: ([*own, "api", *places], known, clear),
        FIRST: (merge, known | {"LORAHUB_CACHE": str(fresh)}, clear_all),
        COPY: ([*own, "copy", *places], known, clear),
        CP: (["sh", "-c", 'cp -r "$1" "$2" && sync "$2"/*', "sh", str(base), str(out)], {}, clear),
    }


def _read(paths: list[Path]) -> None:
    for path in paths:
        with path.open("rb", buffering=0) as file:
            while file.read(1 << 24):
                pass


def _agreement(base: Path, one: Path, other: Path) -> dict[str, float]:
    """Of two merged checkpoints: the share of weights that differ from the base, and from each other."""
    from safetensors import safe_open

    changed = different = total = 0
    with (
        safe_open(base / "model.safetensors", "pt") as before,
        safe_open(one / "model.safetensors", "pt") as a,
        safe_open(other / "model.safetensors", "pt") as b,
    ):
        for name in before.keys():  # noqa: SIM118 - not a mapping
            first = a.get_tensor(name)
            changed += int((before.get_tensor(name) != first).sum())
            different += int((first != b.get_tensor(name)).sum())
            total += first.numel()
    return {"changed": changed / total, "different": different / total, "bytes": 2 * total}
