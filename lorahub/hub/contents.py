"""Which files belong to an adapter folder: the one table, used when pushing and when pulling.

Every file is of one role.  Behaviour files decide what the adapter computes, companions and pictures travel along,
leftovers of training stay behind, and everything else is refused.  Nothing here knows a hub.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias

from lorahub.errors import NotFound, PushRefused, UsageError
from lorahub.files.atomic import is_partial
from lorahub.findings import Finding, Verdict
from lorahub.names import matches, path_problem, printable

__all__ = [
    "Found",
    "Role",
    "Rule",
    "Survey",
    "collisions",
    "is_behaviour",
    "is_safetensors",
    "is_weights",
    "rule_for",
    "secret_in",
    "survey",
]

Role: TypeAlias = Literal[
    "behaviour", "companion", "document", "picture", "leftover", "secret", "pickle", "base", "unknown"
]

MIB, GIB = 1 << 20, 1 << 30

_WEIGHTS = (".safetensors", ".gguf", ".npz")
"""Endings of files that can hold an adapter's weights."""

MOST_FILES = 2000
SCANNED = MIB
"""Bytes at the start of every file that are searched for secrets."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """One row: names of one role.

    Attributes:
        role: what the names have in common.
        files: patterns of file names, in lower case; the first row that matches decides.
        folders: patterns of folder names; what lies below them is not looked at.
        limit: bytes such a file may have.
    """

    role: Role
    files: tuple[str, ...] = ()
    folders: tuple[str, ...] = ()
    limit: int = 0


def _files(role: Role, limit: int, patterns: str) -> Rule:
    return Rule(role=role, files=tuple(patterns.split()), limit=limit)


def _folders(role: Role, patterns: str) -> Rule:
    return Rule(role=role, folders=tuple(patterns.split()))


RULES: tuple[Rule, ...] = (
    _folders("leftover", ".cache .git .ipynb_checkpoints __pycache__ checkpoint-* global_step* lightning_logs"),
    _folders("leftover", "mlruns runs tensorboard wandb"),
    _files("secret", 0, ".env* *.env .netrc .npmrc .pypirc .git-credentials .huggingface .htpasswd"),
    _files("secret", 0, "*.pem *.key *.p12 *.pfx id_rsa* id_dsa* id_ecdsa* id_ed25519*"),
    _files("secret", 0, "token tokens token.txt *.token hf_token hf_token.txt stored_tokens"),
    _files("secret", 0, "credentials credentials.* secret secret.* secrets secrets.*"),
    _files("leftover", 0, "optimizer*.pt optimizer*.bin scheduler*.pt scheduler*.bin scaler*.pt"),
    _files("leftover", 0, "rng_state*.pth random_states_*.pkl trainer_state.json training_args.*"),
    _files("leftover", 0, "*tfevents* all_results.json train_results.json eval_results.json predict_results.json"),
    _files("leftover", 0, "latest zero_to_fp32.py .gitattributes .gitignore .ds_store thumbs.db desktop.ini *.log"),
    _files("base", 0, "model.safetensors model.*.safetensors model-*-of-*.safetensors model.safetensors.index.json"),
    _files("base", 0, "diffusion_pytorch_model* consolidated*.safetensors pytorch_model* tf_model.h5 *.msgpack"),
    _files("behaviour", 64 * GIB, "*.safetensors *lora*.gguf *adapter*.gguf adapters.npz"),
    _files("behaviour", 16 * MIB, "adapter_config.json lorahub.json"),
    _files("companion", 256 * MIB, "tokenizer*.json tokenizer.model* special_tokens_map.json added_tokens.json"),
    _files("companion", 256 * MIB, "vocab*.json vocab*.txt vocab.bpe merges.txt bpe.codes *.tiktoken"),
    _files("companion", 256 * MIB, "spiece.model sentencepiece*.model source.spm target.spm"),
    _files("companion", 4 * MIB, "*.jinja chat_template*.json generation_config.json *processor_config.json"),
    _files("companion", 4 * MIB, "feature_extractor_config.json"),
    _files("document", 4 * MIB, "readme readme.* license* licence* notice* copying* citation.* changelog.md"),
    _files("picture", 32 * MIB, "*.png *.jpg *.jpeg *.webp *.gif *.svg"),
    _files("pickle", 0, "*.bin *.pt *.pth *.ckpt *.pkl *.pickle *.joblib *.npy *.npz"),
)
_UNKNOWN = Rule(role="unknown")

_SECRET_TEXT = re.compile(
    rb"hf_[A-Za-z0-9]{30,}|gh[pousr]_[A-Za-z0-9]{36}|AKIA[0-9A-Z]{16}|-----BEGIN [A-Z ]{0,20}PRIVATE KEY-----"
)

# code -> (what is so, what to do about it); the order in which findings are listed
_REFUSALS: Mapping[str, tuple[str, str]] = {
    "secret-file": ("names of files that hold keys or passwords", "Move them out of the folder."),
    "secret-text": ("an access token or private key in the text", "Remove it, and revoke it if it was ever shared."),
    "link": ("links, which would publish what they point at", "Copy the file in place of the link."),
    "pickle-weights": (
        "pickled files, which run code when they are opened",
        "Save the adapter as safetensors, as save_pretrained does.",
    ),
    "base-weights": (
        "weights of a whole model, not of an adapter",
        "Publish the adapter alone; if it is one, rename the file.",
    ),
    "unknown-file": ("files that do not belong to an adapter", "Move them out of the folder."),
    "bad-name": ("names that not every system can hold", "Rename them."),
    "case-collision": ("names that differ only in case", "Rename one of each."),
    "too-large": ("files larger than such a file may be", "See whether it is the right file."),
    "not-a-file": ("pipes, sockets or devices", "Remove them."),
    "unreadable": ("files that cannot be read", "Look at their permissions: ls -l"),
    "too-many-files": (f"more than {MOST_FILES} files", "Publish the adapter's folder alone."),
    "no-weights": ("no weights: not one .safetensors or .gguf file", "Save the adapter there first."),
}
_CODE_OF: Mapping[Role, str] = {
    "secret": "secret-file",
    "pickle": "pickle-weights",
    "base": "base-weights",
    "unknown": "unknown-file",
}


def rule_for(path: str) -> Rule:
    """The row of the table that ``path``, relative to the adapter's folder, falls under."""
    *folders, name = path.lower().split("/")
    for rule in RULES:
        if any(matches(pattern, folder) for pattern in rule.folders for folder in folders):
            return rule
        if any(matches(pattern, name) for pattern in rule.files):
            return rule
    return _UNKNOWN


def is_behaviour(path: str) -> bool:
    """Whether the file decides what the adapter computes, and so counts in its digest."""
    return rule_for(path).role == "behaviour"


def is_safetensors(path: str) -> bool:
    """Whether the file holds tensors, of an adapter or a base."""
    return path.lower().endswith(".safetensors")


def secret_in(data: bytes) -> bool:
    """Whether what looks like an access token or a private key stands in the text."""
    return _SECRET_TEXT.search(data) is not None


def is_weights(path: str) -> bool:
    """Whether the file holds an adapter's weights."""
    return path.lower().endswith(_WEIGHTS) and is_behaviour(path)


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """One file of a folder that may be published: its role and its size in bytes."""

    role: Role
    size: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Survey:
    """What lies in a folder.

    Attributes:
        folder: the folder.
        files: path -> what may be published, sorted.
        skipped: leftovers that stay behind, folders with a closing slash, sorted.
        refused: what must not be published, one finding for each reason.
    """

    folder: Path
    files: Mapping[str, Found]
    skipped: tuple[str, ...]
    refused: tuple[Finding, ...]

    def demand(self) -> None:
        """Raise if anything is refused.

        Raises:
            PushRefused: lists every reason and every file.
        """
        if not self.refused:
            return
        lines = [f"{self.folder} holds what must not be published; nothing was sent"]
        for finding in self.refused:
            lines.append(f"  {finding.code}: {finding.message}")
            lines += [f"    {place}" for place in finding.where[:20]]
            lines += [f"    and {len(finding.where) - 20} more"] * (len(finding.where) > 20)
        raise PushRefused("\n".join(lines), self.refused[0].remedy, self.refused)


def survey(folder: Path) -> Survey:
    """Look at every file of a folder once and say which may be published; follows no link and writes nothing.

    Raises:
        NotFound: there is no such folder.
        UsageError: it is a file.
    """
    if not folder.is_dir():
        if folder.exists():
            raise UsageError(f"{folder} is a file", "Name the adapter's folder.")
        raise NotFound(f"there is no folder {folder}")
    files: dict[str, Found] = {}
    skipped: list[str] = []
    refused: dict[str, list[str]] = {code: [] for code in _REFUSALS}
    for path, entry in _walk(folder, ""):
        if len(files) > MOST_FILES:
            refused["too-many-files"] = [str(folder)]
            break
        verdict = _judge(path, entry)
        if verdict == "skipped":
            skipped.append(path)
            continue
        if isinstance(verdict, str):
            refused[verdict].append(path)
        else:
            files[path] = verdict
    refused["case-collision"] = collisions(files)
    seen = [*files, *(path for paths in refused.values() for path in paths)]
    if not any(is_weights(path) or rule_for(path).role in {"base", "pickle"} for path in seen):
        refused["no-weights"] = [str(folder)]
    return Survey(
        folder=folder,
        files=dict(sorted(files.items())),
        skipped=tuple(sorted(map(printable, skipped))),
        refused=tuple(
            Finding(
                code=code,
                axis="policy",
                level=Verdict.INCOMPATIBLE,
                message=_REFUSALS[code][0],
                where=tuple(sorted(map(printable, set(paths)))),
                remedy=_REFUSALS[code][1],
            )
            for code, paths in refused.items()
            if paths
        ),
    )


def collisions(paths: Iterable[str]) -> list[str]:
    """Pairs of names that some system takes for one, as "a, b": equal but for case, or a file where a folder is."""
    spellings: dict[str, str] = {}
    found: list[str] = []
    for path in sorted(paths):
        for end in (at for at, character in enumerate(path) if character == "/"):
            folder = f"{path[:end]}/"
            if (other := spellings.setdefault(path[:end].casefold(), folder)) != folder:
                found.append(f"{other}, {folder}")
        if (other := spellings.setdefault(path.casefold(), path)) != path:
            found.append(f"{other}, {path}")
    return list(dict.fromkeys(found))


def _walk(folder: Path, prefix: str) -> Iterator[tuple[str, os.DirEntry[str]]]:
    """Every entry that is not a folder, and every folder that is a leftover or not entered, as (path, entry)."""
    with os.scandir(folder) as entries:
        ordered = sorted(entries, key=lambda entry: entry.name)
    for entry in ordered:
        path = prefix + entry.name
        if not entry.is_dir(follow_symlinks=False):
            yield path, entry
        elif rule_for(f"{path}/x").role == "leftover" or is_partial(entry.name) or path_problem(path):
            yield f"{path}/", entry
        else:
            yield from _walk(Path(entry.path), f"{path}/")


def _judge(path: str, entry: os.DirEntry[str]) -> Found | str:
    """What may be published, "skipped", or the code of the refusal."""
    if entry.is_symlink():
        return "link"
    if path.endswith("/"):
        return "skipped" if rule_for(f"{path}x").role == "leftover" or is_partial(entry.name) else "bad-name"
    rule = rule_for(path)
    if rule.role == "leftover" or is_partial(entry.name):
        return "skipped"
    try:
        status = entry.stat(follow_symlinks=False)
        if not stat.S_ISREG(status.st_mode):
            return "not-a-file"
        if rule.role in _CODE_OF:
            return _CODE_OF[rule.role]
        if path_problem(path):
            return "bad-name"
        if status.st_size > rule.limit:
            return "too-large"
        with Path(entry.path).open("rb") as file:
            secret = secret_in(file.read(SCANNED))
        return "secret-text" if secret else Found(role=rule.role, size=status.st_size)
    except OSError:
        return "unreadable"
