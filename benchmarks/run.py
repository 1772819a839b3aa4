"""Run the benchmarks: ``make bench``.  Results go to JSON, and from there into the tables of ``README.md``.

Usage:
    python benchmarks/run.py                    everything
    python benchmarks/run.py --only disk-warm   one case; the others' tables stay
    python benchmarks/run.py --quick            everything, tiny: does it run? (no files unless --out is given)
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from datetime import UTC, datetime
from multiprocessing import get_context
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

from machine import describe_machine, versions
from tables import rewrite

__all__ = ["CASES", "main"]

HERE = Path(__file__).resolve().parent
DEFAULT = HERE / "out" / "results.json"
CASES = {
    "memory-layers": ("memory", "layers"),
    "memory-many": ("memory", "many"),
    "memory-llama": ("memory", "llama"),
    "memory-float32": ("memory", "layers32"),
    "memory-kinds": ("memory", "kinds"),
    "swap-layers": ("swapping", "layers"),
    "swap-many": ("swapping", "many"),
    "device-llama": ("device", "llama"),
    "device-unet": ("device", "unet"),
    "device-vit": ("device", "vit"),
    "disk-warm": ("disk", "warm"),
    "disk-cold": ("disk", "cold"),
    "live-one": ("live", "one"),
    "live-rows": ("live", "rows"),
    "live-load": ("live", "load"),
    "training": ("training", "steps"),
    "listing": ("listing", "listing"),
    "listing-different": ("listing", "different"),
    "compose-factors": ("compose", "factors"),
    "compose-elements": ("compose", "elementwise"),
    "compose-mergekit": ("compose", "mergekit"),
    "compose-memory": ("compose", "memory"),
    "compose-tasks": ("tasks", "tasks"),
}
"""Name -> the module here, and its function; each takes ``quick`` and returns JSON-ready results."""


def _measure(name: str, quick: bool) -> dict[str, Any]:
    module, function = CASES[name]
    result: dict[str, Any] = getattr(importlib.import_module(module), function)(quick)
    return result


def _run(name: str, quick: bool) -> dict[str, Any]:
    """One case in a process of its own, with what it depended on."""
    before = describe_machine()
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        result = pool.submit(_measure, name, quick).result()
    return result | {
        "command": f"python benchmarks/run.py --only {name}{' --quick' if quick else ''}",
        "when": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": before | {"load_after": describe_machine()["load"]},
        "versions": versions() | result.pop("peers", {}),
    }


def main() -> int:
    """Run the chosen cases; 0 if all of them ran."""
    parser = argparse.ArgumentParser(description="lorahub's benchmarks")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: does it run?")
    parser.add_argument("--only", choices=CASES, action="append", help="run only this case; may be repeated")
    parser.add_argument("--out", type=Path, help="where the JSON goes (default: benchmarks/out/results.json)")
    options = parser.parse_args()
    out = options.out or (None if options.quick else DEFAULT)
    results: dict[str, Any] = json.loads(out.read_text()) if out and out.exists() else {}
    for name in options.only or CASES:
        print(f"{name} ...", file=sys.stderr, flush=True)
        results[name] = _run(name, options.quick)
        shown = {
            key: results[name].get(key)
            for key in ("skipped", "ratios", "work_ratios", "agreement", "says", "memory")
            if key in results[name]
        }
        print(json.dumps(shown, indent=1) if options.quick else "  done", file=sys.stderr, flush=True)
        of = results[name].get("ratios") or results[name].get("work_ratios", {})
        for pair, spread in of.items():
            least, most = spread["min"], spread["max"]
            print(f"  {spread['median']:8.2f}  ({least:.2f} to {most:.2f})  {pair}", file=sys.stderr, flush=True)
        if out:
            out.parent.mkdir(parents=True, exist_ok=True)
            out.write_text(json.dumps(results, indent=1) + "\n")
    if out == DEFAULT:
        there = {name: result for name, result in results.items() if not result.get("elsewhere")}
        rewrite(HERE / "README.md", there, tuple(CASES))
    return 0


if __name__ == "__main__":
    sys.exit(main())
