"""What a measurement depends on besides the code: the machine, and the versions of what is compared."""

from __future__ import annotations

import os
import platform
import sys
from importlib import metadata
from pathlib import Path

import torch

__all__ = ["HERE", "describe_machine", "versions"]

HERE = torch.backends.cpu.get_cpu_capability()
"""The instructions that PyTorch chooses its kernels by: "AVX2", "AVX512", "DEFAULT" and others.  Part of the titles of
what is computed in bfloat16, where they make several times the difference."""

COMPARED = ("lorahub-core", "torch", "peft", "transformers", "safetensors", "numpy")


def describe_machine() -> dict[str, object]:
    """CPU model, cores this process may use, memory in bytes, kernel; ``load`` is the one-minute load as of now."""
    memory = _value("/proc/meminfo", "MemTotal").removesuffix(" kB") or "0"
    return {
        "cpu": _value("/proc/cpuinfo", "model name") or platform.processor() or platform.machine(),
        "instructions": HERE,
        "cores": len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count(),
        "memory_bytes": int(memory) * 1024,
        "system": f"{platform.system()} {platform.release()}",
        "load": round(os.getloadavg()[0], 2),
    }


def versions() -> dict[str, str]:
    """Python's version and those of the distributions that are compared."""
    return {"python": platform.python_version()} | {name: metadata.version(name) for name in COMPARED}


def _value(path: str, name: str) -> str:
    """The first value of that name in a file of ``name: value`` lines, or "" where the system has no such file."""
    try:
        lines = Path(path).read_text().splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(name)), "")
