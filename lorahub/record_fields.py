"""The parts of the metadata record, each a table of fields, and the patterns that their values follow.

Data only: ``records.py`` reads, writes and judges.  Every field may be missing unless it says otherwise, and unknown
keys are kept.  ``schemas/adapter.schema.json`` is generated from here.
"""

from __future__ import annotations

from types import MappingProxyType
from typing import Annotated, Any, Literal, Self

from packaging.specifiers import InvalidSpecifier, SpecifierSet
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, JsonValue, ValidationError

from lorahub.errors import RecordError

__all__ = [
    "PATTERNS",
    "BaseRecord",
    "Commit",
    "Compat",
    "Dataset",
    "Derivation",
    "Digest",
    "Digests",
    "Evaluation",
    "FileRecord",
    "Finite",
    "KindName",
    "ModuleRecord",
    "Moment",
    "Name",
    "Parent",
    "Path",
    "Recipe",
    "RecordPart",
    "RepoId",
    "SchemaVersion",
    "Strength",
    "Trainer",
    "Training",
    "Version",
    "enumerate_problems",
    "explain",
]

_REPO = r"[A-Za-z0-9_][A-Za-z0-9_.-]*(/[A-Za-z0-9_][A-Za-z0-9_.-]*)?"
_DOTTED = r"[0-9]+(\.[0-9]+)*"
_LOCAL = r"[A-Za-z0-9]+(\.[A-Za-z0-9]+)*"
_CLOCK = r"[0-2][0-9]:[0-5][0-9]"
_RANGE = r"(~=|===?|!=|<=?|>=?)\s*[0-9][A-Za-z0-9.!+*_-]*"
_PART = r"[^./\\:\x00-\x1f][^/\\:\x00-\x1f]*"

PATTERNS = MappingProxyType(
    {
        "schema": (r"^1\.(0|[1-9][0-9]{0,5})$", "a version of this schema, such as '1.0'"),
        "name": (rf"^{_REPO}$", "a name such as 'ink' or 'acme/ink'"),
        "version": (
            rf"^{_DOTTED}(-?(a|b|rc|alpha|beta)\.?[0-9]+)?(\.post[0-9]+)?(\.dev[0-9]+)?(\+{_LOCAL})?$",
            "a version such as '1.2.0' or '1.2.0rc1'",
        ),
        "moment": (
            rf"^[0-9]{{4}}-[01][0-9]-[0-3][0-9](T{_CLOCK}:[0-6][0-9](\.[0-9]+)?(Z|[+-]{_CLOCK}))?$",
            "a date, or a time with its zone: '2026-01-31' or '2026-01-31T12:00:00Z'",
        ),
        "kind": (r"^[a-z0-9]+([._-][a-z0-9]+)*$", "a kind in lower case, such as 'lora'"),
        "repo": (rf"^{_REPO}$", "a repository such as 'acme/base', not a path"),
        "commit": (r"^[0-9a-f]{40}$", "a full commit, 40 lower-case hex digits (a branch or tag may move)"),
        "digest": (r"^sha256:[0-9a-f]{64}$", "a digest such as 'sha256:' and 64 lower-case hex digits"),
        "sha256": (r"^[0-9a-f]{64}$", "64 lower-case hex digits"),
        "range": (rf"^{_RANGE}(\s*,\s*{_RANGE})*$", "a version range such as '>=5,<6'"),
        "known base": (
            rf"^(sha256:[0-9a-f]{{64}}|{_REPO}(@[0-9a-f]{{40}})?)$",
            "a weights digest, 'acme/base' or 'acme/base@' and a commit",
        ),
        "path": (rf"^{_PART}(/{_PART})*$", "a path within the folder, without '..' or hidden parts"),
    }
)
"""Name -> (regular expression, what it means); the expressions are read alike by pydantic and by JSON Schema."""


def _text(name: str) -> Any:
    return Field(pattern=PATTERNS[name][0], max_length=1024)


def _specifier(text: str) -> str:
    try:
        SpecifierSet(text)
    except InvalidSpecifier:
        raise ValueError(f"{text!r} is not {PATTERNS['range'][1]}") from None
    return text


SchemaVersion = Annotated[str, _text("schema")]
Name = Annotated[str, _text("name")]
Version = Annotated[str, _text("version")]
Moment = Annotated[str, _text("moment")]
KindName = Annotated[str, _text("kind")]
RepoId = Annotated[str, _text("repo")]
Commit = Annotated[str, _text("commit")]
Digest = Annotated[str, _text("digest")]
Sha256 = Annotated[str, _text("sha256")]
Range = Annotated[str, _text("range"), AfterValidator(_specifier)]
KnownBase = Annotated[str, _text("known base")]
Path = Annotated[str, _text("path")]
Finite = Annotated[float, Field(allow_inf_nan=False)]
Count = Annotated[int, Field(ge=0)]
Positive = Annotated[int, Field(ge=1)]


_SHORTER = {"missing": "is missing", "too_short": "is empty", "model_type": "is no object"}


def explain(where: str, error: ValidationError) -> str:
    """What pydantic found, as text: every problem on its line, with its key path and what belongs there."""
    meanings = dict(PATTERNS.values())
    problems = []
    for one in error.errors(include_url=False):
        text = _SHORTER.get(one["type"]) or one["msg"].removeprefix("Value error, ")
        if one["type"] == "string_pattern_mismatch":
            text = f"{str(one['input'])[:80]!r} is not {meanings[one['ctx']['pattern']]}"
        problems.append(f"{_key_path(one['loc'])}: {text}")
    return enumerate_problems(f"{where} does not follow the schema of a record", problems)


def _key_path(loc: tuple[int | str, ...]) -> str:
    parts = [part for part in loc if part != "[key]"]  # pydantic's word for the key itself
    path = "".join(f".{part}" if isinstance(part, str) and part.isidentifier() else f"[{part!r}]" for part in parts)
    return path.removeprefix(".") or "the whole"


def enumerate_problems(head: str, items: list[str]) -> str:
    """A heading and its items: on one line where there is one item."""
    return "\n  ".join([f"{head}:", *items]) if len(items) > 1 else f"{head}: {items[0]}"


class RecordPart(BaseModel):
    """A part of the record: frozen, and unknown keys are kept as they are."""

    model_config = ConfigDict(frozen=True, extra="allow")

    @classmethod
    def checked(cls, **fields: Any) -> Self:
        """A part made from what a person gave.

        Raises:
            RecordError: a value does not follow the schema.
        """
        try:
            return cls.model_validate(fields)
        except ValidationError as error:
            raise RecordError(explain(cls.__name__, error)) from None


class ModuleRecord(RecordPart):
    """How one module changes."""

    path: str = Field(min_length=1, description="Dotted module path, canonical where a base was known.")
    kind: KindName = Field(description="How it changes, as 'lora'.")
    component: str = Field(default="", description="Part of a pipeline, as 'unet'; empty where there is one model.")
    parameter: str = Field(default="weight", min_length=1, description="Which parameter of the module.")
    role: str = Field(default="", description="What the module is: 'linear', 'conv', 'embedding', 'expert'.")
    rank: Positive | None = Field(default=None, description="r, for kinds that have one.")
    scale: Finite | None = Field(default=None, description="The factor on the stored change, as it is applied.")
    scale_rule: str = Field(default="", description="Where the scale comes from, as 'alpha/r' or 'alpha/sqrt(r)'.")
    alpha: Finite | None = Field(default=None, description="alpha, where the scale is made from one.")
    shape: tuple[Count, ...] = Field(default=(), description="Shape of the changed parameter: [out, in, ...].")
    dtype: str = Field(default="", description="safetensors code of the stored tensors, as 'BF16'.")
    groups: Positive | None = Field(default=None, description="Groups of a convolution.")
    dora_axis: str = Field(
        default="", description="Which axis DoRA's norm is taken over, where it is not the usual one."
    )
    fused: dict[str, JsonValue] = Field(
        default={}, description="A fused projection: its parts, and how they lie in it."
    )


class BaseRecord(RecordPart):
    """The base the adapter was made for."""

    repo_id: RepoId | None = Field(
        default=None, description="Repository on the Hub; missing for a base that is in none."
    )
    revision: Commit | None = Field(default=None, description="Commit of that repository, in full.")
    subfolder: Path | None = Field(default=None, description="Folder within the repository.")
    library: str | None = Field(default=None, description="What loads it, as 'transformers'.")
    architecture: str | None = Field(
        default=None, description="What its configuration calls it, as 'LlamaForCausalLM'."
    )
    weights_digest: Digest | None = Field(
        default=None, description="Over its weight files: the same numbers wherever they lie."
    )
    structure: Digest | None = Field(default=None, description="Over the names and shapes of all its parameters.")
    targets: Digest | None = Field(default=None, description="Over the names and shapes that the adapter touches.")
    quantization: dict[str, JsonValue] = Field(
        default={}, description="How the base was quantised in training: method, bits."
    )


class Compat(RecordPart):
    """What else the adapter goes with, as its author declares."""

    requires: dict[str, Range] = Field(
        default={}, description="Library -> version range (PEP 440), as {'peft': '>=0.15'}."
    )
    bases: tuple[KnownBase, ...] = Field(
        default=(), description="Further bases: weights digests, commits or repositories."
    )
    choice: Literal["peft", "strict"] | None = Field(
        default=None, description="Whose result counts where PEFT's is not the declared one."
    )


class Parent(RecordPart):
    """An adapter this one was composed from."""

    ref: str = Field(min_length=1, description="How it was named, as 'acme/ink@1.2'.")
    revision: Commit | None = Field(default=None, description="The commit that was used.")
    digest: Digest | None = Field(default=None, description="Digest of its tensors.")
    weight: Finite | None = Field(default=None, description="Its weight in the composition.")
    role: str = Field(default="", description="What it was there for, where that differs.")


class Recipe(RecordPart):
    """How the parents became this adapter."""

    method: str = Field(min_length=1, description="The composition method, as 'dare_ties'.")
    params: dict[str, JsonValue] = Field(default={}, description="Its parameters.")
    seed: int | None = Field(default=None, description="The seed, where the method draws.")
    tool: str = Field(default="", description="What composed it.")
    tool_version: str = Field(default="", description="In which version.")
    text: str = Field(default="", description="The recipe as written.")
    digest: Digest | None = Field(default=None, description="Digest of the recipe and its inputs.")


class Derivation(RecordPart):
    """How the files came about, where they were converted."""

    converted_from: str = Field(min_length=1, description="The format before, as 'kohya'.")
    tool: str = Field(default="", description="What converted it.")
    tool_version: str = Field(default="", description="In which version.")
    sources: dict[Path, Sha256] = Field(default={}, description="The files before -> digest of their bytes.")
    rules: dict[str, Count] = Field(
        default={}, description="Which exact or approximate rewriting was applied to how many targets."
    )
    max_error: Finite | None = Field(
        default=None, description="The largest relative difference of a target's change, before and after."
    )
    losses: tuple[str, ...] = Field(
        default=(), description="What the new format has no word for; empty: nothing was lost."
    )


class Dataset(RecordPart):
    """A dataset that was trained on."""

    id: RepoId = Field(description="Its repository on the Hub; local data is described, never located.")
    revision: Commit | None = Field(default=None, description="Its commit.")


class Trainer(RecordPart):
    """What trained the adapter."""

    name: str = Field(min_length=1, description="As 'peft' or 'kohya sd-scripts'.")
    version: str = Field(default="", description="In which version.")
    commit: Commit | None = Field(default=None, description="Or at which commit.")


class Training(RecordPart):
    """How the adapter was trained; never a path."""

    datasets: tuple[Dataset, ...] = Field(default=(), description="What it was trained on.")
    steps: Count | None = Field(default=None, description="Optimizer steps.")
    epochs: Finite | None = Field(default=None, description="Passes over the data.")
    lr: Finite | None = Field(default=None, description="Learning rate at its highest.")
    optimizer: str = Field(default="", description="As 'AdamW'.")
    seed: int | None = Field(default=None, description="The seed of the run.")
    loss: Finite | None = Field(default=None, description="Training loss, as it was last reported.")
    config_digest: Digest | None = Field(default=None, description="Digest of the trainer's whole configuration.")
    trainer: Trainer | None = Field(default=None, description="What trained it.")
    versions: dict[str, str] = Field(
        default={}, description="Library -> version that took part, as {'torch': '2.8.0'}."
    )


class Strength(RecordPart):
    """Which weights make sense for the whole adapter."""

    recommended: Finite | None = Field(default=None, description="What to start with.")
    min: Finite | None = Field(default=None, description="Below this nothing is seen.")
    max: Finite | None = Field(default=None, description="Above this it breaks.")


class Evaluation(RecordPart):
    """One measured result."""

    task: str = Field(min_length=1, description="As 'text-classification'.")
    dataset: str = Field(default="", description="What it was measured on.")
    metric: str = Field(min_length=1, description="As 'accuracy'.")
    value: Finite = Field(description="The result.")
    delta_vs_base: Finite | None = Field(default=None, description="The result minus that of the bare base.")


class FileRecord(RecordPart):
    """A native file as it was when the record was written."""

    size: Count = Field(description="Bytes.")
    sha256: Sha256 = Field(description="Digest of its bytes.")


class Digests(RecordPart):
    """What stays the same when files are written anew."""

    tensors: Digest | None = Field(default=None, description="Over sorted (name, dtype, shape, bytes) of its tensors.")
    metadata: Digest | None = Field(default=None, description="Over the canonical record without this field.")
