"""An adapter from a folder and back: all or nothing, and everything that is odd said in words."""

from __future__ import annotations

import json
import subprocess
import sys
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType

import pytest
import torch

from lorahub.adapter import Adapter, AdapterHeader, load, open_header, save
from lorahub.bases.index import BaseIndex, BaseRef, ParameterInfo
from lorahub.bases.layout import Target
from lorahub.deltas.delta import Delta
from lorahub.deltas.dora import DoRA
from lorahub.deltas.kind import JSON, Kind
from lorahub.deltas.lora import LoRA
from lorahub.deltas.replace import Replace
from lorahub.errors import (
    CannotCarry,
    HeaderError,
    IntegrityError,
    LorahubError,
    NotFinite,
    NotFound,
    UnsupportedFormat,
    UnsupportedKind,
    UsageError,
    WriteFailed,
)
from lorahub.files.header import read_header
from lorahub.files.writer import save_file
from lorahub.findings import Claim, Verdict
from lorahub.formats.format import AdapterFiles, Part, Reading, Written
from lorahub.formats.peft import PeftFormat
from lorahub.plugins import Registry
from lorahub.records import AdapterRecord, BaseRecord

PREFIX = "base_model.model."
CONFIG: dict[str, JSON] = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "base_model_name_or_path": "acme/base"}


def factors(module: str = "q", *, out: int = 6, inside: int = 4, r: int = 2) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(len(module))
    return {
        f"{PREFIX}{module}.lora_A.weight": torch.randn(r, inside, generator=generator),
        f"{PREFIX}{module}.lora_B.weight": torch.randn(out, r, generator=generator),
    }


def write(
    folder: Path, tensors: Mapping[str, torch.Tensor] | None = None, config: Mapping[str, JSON] | None = None
) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    save_file(folder / "adapter_model.safetensors", factors() if tensors is None else tensors)
    (folder / "adapter_config.json").write_text(json.dumps(CONFIG if config is None else config))
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write(tmp_path / "adapter")


def conv1d(*names: str) -> BaseIndex:
    """A base that stores all its weights [in, out]."""
    parameters = {
        name: ParameterInfo(shape=(4, 6), dtype="F32", stored_as=name, transposed=not name.endswith("bias"))
        for name in names
    }
    return BaseIndex(ref=BaseRef(), framework="test", parameters=parameters, aliases=(("model.", ""),))


def with_format(registry: Registry, *formats: object) -> Registry:
    named = {each.name: each for each in formats}  # type: ignore[attr-defined]  # every format has a name
    return replace(registry, formats=MappingProxyType({**registry.formats, **named}))


def same(one: Delta, other: Delta) -> bool:
    ours, theirs = one.tensors(), other.tensors()
    return type(one) is type(other) and all(
        ours[name].dtype == theirs[name].dtype and torch.equal(ours[name], theirs[name]) for name in ours | theirs
    )


# --- opening ---------------------------------------------------------------------------------------------------------


def test_a_header_says_what_the_adapter_is_without_loading_torch(folder: Path) -> None:
    code = (
        "import sys\n"
        "from lorahub.adapter import open_header\n"
        "from lorahub.plugins import load_registry\n"
        f"header = open_header({str(folder)!r}, load_registry())\n"
        "assert (header.kinds, header.ranks, header.format) == (('lora',), (2,), 'peft'), header\n"
        "assert [target.name for target in header.touches] == ['q.weight']\n"
        "assert 'torch' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_folder_a_subfolder_and_a_file_are_opened_alike(folder: Path, registry: Registry) -> None:
    for header in (
        open_header(folder, registry),
        open_header(folder.parent, registry, subfolder=folder.name),
        open_header(folder / "adapter_model.safetensors", registry),
        open_header(folder, registry, weight_name="adapter_model.safetensors"),
        open_header(folder.parent, registry, weight_name="adapter/adapter_model.safetensors"),
    ):
        assert header.folder == folder
        assert header.reading.base_repo == "acme/base"
        assert header.label == "adapter"
    assert open_header(folder, registry, label="ink").label == "ink"


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"subfolder": "../adapter"}, UsageError),
        ({"subfolder": "/"}, UsageError),
        ({"weight_name": "../adapter/adapter_model.safetensors"}, UsageError),
        ({"subfolder": "elsewhere"}, NotFound),
        ({"weight_name": "other.safetensors"}, NotFound),
    ],
)
def test_names_that_lead_out_or_nowhere_are_refused(
    folder: Path, registry: Registry, arguments: dict[str, str], error: type[LorahubError]
) -> None:
    with pytest.raises(error):
        open_header(folder, registry, **arguments)


def test_of_several_weights_files_one_is_asked_for(folder: Path, registry: Registry) -> None:
    (folder / "adapter_model.safetensors").rename(folder / "one.safetensors")
    save_file(folder / "two.safetensors", factors("k"))
    with pytest.raises(UnsupportedFormat, match=r"one\.safetensors, two\.safetensors.*\n.*weight_name"):
        open_header(folder, registry)
    header = open_header(folder, registry, weight_name="two.safetensors")
    assert [target.module for target in header.touches] == ["k"]


class Claimant:
    """A format that claims everything and reads it as the test says."""

    name = "claimant"

    def __init__(self, score: float, reading: Reading | None = None) -> None:
        self.score, self.reading = score, reading

    def claims(self, files: AdapterFiles) -> Claim | None:
        return Claim(self.score, "it claims everything")

    def read(self, files: AdapterFiles, kinds: Sequence[Kind], index: BaseIndex | None) -> Reading:
        assert self.reading is not None
        return self.reading

    def write(self, *_: object) -> None:
        raise AssertionError


def test_the_strongest_claim_wins_and_equal_ones_are_refused_by_name(folder: Path, registry: Registry) -> None:
    assert open_header(folder, with_format(registry, Claimant(0.9))).format == "peft"
    with pytest.raises(UnsupportedFormat, match=r"claimant \(it claims everything\)") as refusal:
        open_header(folder, with_format(registry, Claimant(1.0)))
    assert "peft (adapter_config.json has a peft_type)" in str(refusal.value)


@pytest.mark.parametrize("case", ["lost", "twice", "invented"])
def test_a_format_that_does_not_account_for_every_key_once_is_caught(
    folder: Path, registry: Registry, case: str
) -> None:
    honest = open_header(folder, registry).reading
    (group,) = honest.groups
    groups = {
        "lost": (replace(group, slots={"down": group.slots["down"]}),),
        "twice": (group, replace(group, module="k")),
        "invented": (group, replace(group, slots={"down": replace(group.slots["down"], key="nowhere")})),
    }[case]
    with pytest.raises(IntegrityError, match="has not accounted for"):
        open_header(folder, with_format(registry, Claimant(2.0, replace(honest, groups=groups))))


# --- refusing --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n", "Git LFS pointer"),
        (b"", "empty (0 bytes)"),
        (b"\x80\x02}q\x00.", "Python pickle"),
    ],
)
def test_weights_that_are_only_a_pickle_are_refused_for_what_they_are(
    tmp_path: Path, registry: Registry, content: bytes, text: str
) -> None:
    (tmp_path / "adapter_model.bin").write_bytes(content)
    (tmp_path / "adapter_config.json").write_text(json.dumps(CONFIG))
    with pytest.raises(UnsupportedFormat) as refusal:
        open_header(tmp_path, registry)
    assert text in str(refusal.value)
    assert "adapter_model.bin" in str(refusal.value)


def test_a_pickle_is_described_from_its_table_of_contents_and_never_run(tmp_path: Path, registry: Registry) -> None:
    with zipfile.ZipFile(tmp_path / "adapter_model.bin", "w") as archive:
        archive.writestr("archive/data.pkl", "cos\nsystem\n(S'touch ran'\ntR.")
        archive.writestr("archive/data/0", b"\0" * 8)
        archive.writestr("archive/data/1", b"\0" * 4)
    with pytest.raises(UnsupportedFormat, match=r"single numbers only \(2 of them\): no factors"):
        open_header(tmp_path, registry)


@pytest.mark.parametrize(
    ("tensors", "text"),
    [
        ({}, "holds no tensors"),
        ({"a.alpha": torch.tensor(1.0), "b.alpha": torch.tensor(2)}, "single numbers only (2 of them)"),
        ({"mystery": torch.ones(2, 2)}, "no format knows adapter_model.safetensors"),
    ],
)
@pytest.mark.parametrize("peft", [True, False])
def test_safetensors_that_hold_no_adapter_are_refused_for_what_they_hold(
    tmp_path: Path, registry: Registry, tensors: dict[str, torch.Tensor], text: str, peft: bool
) -> None:
    write(tmp_path, tensors, CONFIG if peft else {"something": "else"})
    if peft and "mystery" in tensors:
        assert [finding.code for finding in open_header(tmp_path, registry).findings] == ["key-unknown"]
        return
    with pytest.raises(UnsupportedFormat) as refusal:
        open_header(tmp_path, registry)
    assert text in str(refusal.value)


def test_a_zero_byte_weights_file_and_an_lfs_pointer_are_header_errors(folder: Path, registry: Registry) -> None:
    weights = folder / "adapter_model.safetensors"
    weights.write_bytes(b"")
    with pytest.raises(HeaderError, match="0 bytes"):
        open_header(folder, registry)
    weights.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n")
    with pytest.raises(HeaderError, match="LFS pointer"):
        open_header(folder, registry)


def test_an_adapterhub_bottleneck_is_refused_by_name_as_no_weight_change(tmp_path: Path, registry: Registry) -> None:
    config = {"config": {"reduction_factor": 16}, "model_type": "bert", "model_name": "bert-base-uncased"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    (tmp_path / "pytorch_adapter.bin").write_bytes(b"\x80\x02}q\x00.")
    with pytest.raises(UnsupportedKind, match="AdapterHub adapter for bert-base-uncased: bottleneck"):
        open_header(tmp_path, registry)


def test_an_empty_folder_and_a_missing_one_are_told_apart(tmp_path: Path, registry: Registry) -> None:
    with pytest.raises(UnsupportedFormat, match="holds no weights: found nothing"):
        open_header(tmp_path, registry)
    with pytest.raises(NotFound):
        open_header(tmp_path / "nowhere", registry)


@pytest.mark.parametrize(
    "text", ["", "[]", "{", '{"r": 1, "r": 2}', '{"r": NaN}', "[" * 100_000, "\ufeff{}", '{"a": "\\ud800"}']
)
def test_a_malformed_config_is_an_integrity_error(folder: Path, registry: Registry, text: str) -> None:
    (folder / "adapter_config.json").write_text(text)
    with pytest.raises(IntegrityError, match=r"adapter_config\.json cannot be read"):
        open_header(folder, registry)


def test_other_json_files_need_not_be_well_formed(folder: Path, registry: Registry) -> None:
    (folder / "notes.json").write_text("{")
    (folder / ".lorahub-00.partial").write_text("left behind")
    assert open_header(folder, registry).files.others == ("notes.json",)


# --- findings --------------------------------------------------------------------------------------------------------


def test_a_parameter_changed_twice_is_found_from_headers(tmp_path: Path, registry: Registry) -> None:
    tensors = {**factors(), f"{PREFIX}q.lora_B.bias": torch.ones(6), f"{PREFIX}q.base_layer.bias": torch.ones(6)}
    header = open_header(write(tmp_path, tensors, {**CONFIG, "lora_bias": True, "bias": "all"}), registry)
    (finding,) = header.findings
    assert (finding.code, finding.level, finding.where) == ("parameter-twice", Verdict.INCOMPATIBLE, ("q.bias",))
    with pytest.raises(IntegrityError, match="parameter-twice"):
        load(header, registry)


def recorded(folder: Path, registry: Registry) -> Path:
    record = AdapterRecord(schema_version="1.0", kinds=("lora",), name="ink", version="1.0.0")
    adapter = replace(load(open_header(folder, registry), registry), record=record)
    return save(adapter, folder.parent / "recorded", registry=registry)


def test_a_record_that_fits_its_files_is_kept_whole(folder: Path, registry: Registry) -> None:
    header = open_header(recorded(folder, registry), registry)
    assert header.findings == ()
    assert header.record is not None
    assert header.record.name == "ink"
    assert [(module.path, module.scale, module.rank) for module in header.record.modules] == [("q", 2.0, 2)]


def test_a_changed_file_makes_the_record_stale_and_its_arithmetic_is_ignored(folder: Path, registry: Registry) -> None:
    place = recorded(folder, registry)
    config = place / "adapter_config.json"
    config.write_text(config.read_text().replace('"lora_alpha": 4', '"lora_alpha": 8'))
    header = open_header(place, registry)
    (finding,) = header.findings
    assert (finding.code, finding.level, finding.where) == ("record-stale", Verdict.DEGRADED, ("adapter_config.json",))
    assert finding.allowable
    assert header.record is not None
    assert (header.record.modules, header.record.name) == ((), "ink")
    assert header.reading.groups[0].options["scale"] == 4.0


def test_a_record_that_is_none_is_a_finding_and_the_adapter_still_opens(folder: Path, registry: Registry) -> None:
    (folder / "lorahub.json").write_text('{"schema_version": "1.0", "kinds": "lora"}')
    header = open_header(folder, registry)
    assert header.record is None
    assert [finding.code for finding in header.findings] == ["record-invalid"]
    assert "kinds" in header.findings[0].message


# --- loading ---------------------------------------------------------------------------------------------------------


def test_tensors_come_as_stored_and_in_the_orientation_of_the_slots(tmp_path: Path, registry: Registry) -> None:
    tensors = {
        f"{PREFIX}e.lora_embedding_A": torch.randn(2, 50).bfloat16(),
        f"{PREFIX}e.lora_embedding_B": torch.randn(4, 2).bfloat16(),
    }
    adapter = load(open_header(write(tmp_path, tensors), registry), registry)
    (delta,) = adapter.deltas.values()
    assert isinstance(delta, LoRA)
    assert (delta.up.dtype, delta.shape()) == (torch.bfloat16, (50, 4))
    assert torch.equal(delta.up, tensors[f"{PREFIX}e.lora_embedding_A"].T)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_numbers_that_are_not_finite_are_refused_with_their_keys(
    tmp_path: Path, registry: Registry, bad: float, dtype: torch.dtype
) -> None:
    tensors = {key: tensor.to(dtype) for key, tensor in factors().items()}
    tensors[f"{PREFIX}q.lora_B.weight"][3, 1] = bad
    header = open_header(write(tmp_path, tensors), registry)
    with pytest.raises(NotFinite, match=r"q\.lora_B\.weight") as refusal:
        load(header, registry)
    assert "lora_A" not in refusal.value.message
    assert len(load(header, registry, allow_nonfinite=True).deltas) == 1


def test_counters_and_small_floats_are_checked_as_what_they_are(tmp_path: Path, registry: Registry) -> None:
    small = torch.ones(4).to(torch.float8_e4m3fn)
    tensors = {
        **factors(),
        f"{PREFIX}head.num_batches_tracked": torch.tensor(7),
        f"{PREFIX}head.scale": small,
    }
    header = open_header(write(tmp_path, tensors, {**CONFIG, "modules_to_save": ["head"]}), registry)
    adapter = load(header, registry)
    counter = adapter.deltas[Target("", "head", "num_batches_tracked")].replacement()
    assert counter is not None
    assert (counter.dtype, counter.item()) == (torch.int64, 7)
    tensors[f"{PREFIX}head.scale"] = torch.full((4,), float("nan")).to(torch.float8_e4m3fn)
    header = open_header(write(tmp_path, tensors, {**CONFIG, "modules_to_save": ["head"]}), registry)
    with pytest.raises(NotFinite, match=r"head\.scale"):
        load(header, registry)


def test_a_file_that_contradicts_itself_is_not_loaded_at_all(tmp_path: Path, registry: Registry) -> None:
    tensors = {**factors(), **{key: tensor for key, tensor in factors("k").items() if "lora_A" in key}}
    header = open_header(write(tmp_path, tensors), registry)
    with pytest.raises(IntegrityError, match="slot-missing") as refusal:
        load(header, registry)
    assert [finding.code for finding in refusal.value.findings] == ["slot-missing"]


def test_a_kind_nobody_reads_is_opened_for_a_look_and_refused_for_use(tmp_path: Path, registry: Registry) -> None:
    tensors = {f"{PREFIX}q.no_such_factor": torch.ones(2, 2)}
    header = open_header(write(tmp_path, tensors, {"peft_type": "ADAMSS"}), registry)
    assert header.kinds == ()
    with pytest.raises(UnsupportedKind, match="AdaMSS"):
        load(header, registry)


def test_under_a_base_targets_get_its_names_and_replacements_its_logical_orientation(
    tmp_path: Path, registry: Registry
) -> None:
    index = conv1d("model.q.weight", "model.head.weight", "model.head.bias")
    value, bias = torch.randn(4, 6), torch.randn(6)
    tensors = {**factors(), f"{PREFIX}head.weight": value, f"{PREFIX}head.bias": bias}
    header = open_header(write(tmp_path / "a", tensors, {**CONFIG, "modules_to_save": ["head"]}), registry, index=index)
    adapter = load(header, registry)
    assert {target.name for target in adapter.deltas} == {"model.q.weight", "model.head.weight", "model.head.bias"}
    turned = adapter.deltas[Target("", "model.head", "weight")].replacement()
    assert turned is not None
    assert torch.equal(turned, value.T)
    assert torch.equal(adapter.deltas[Target("", "model.head", "bias")].replacement(), bias)

    save(adapter, tmp_path / "b", registry=registry)
    again = load(open_header(tmp_path / "b", registry), registry)
    stored = again.deltas[Target("", "model.head", "weight")].replacement()
    assert stored is not None
    assert torch.equal(stored, value)


def test_a_header_read_without_a_base_can_be_loaded_under_one(tmp_path: Path, registry: Registry) -> None:
    header = open_header(write(tmp_path), registry)
    index = conv1d("model.q.weight")
    assert [target.name for target in load(header, registry).deltas] == ["q.weight"]
    assert [target.name for target in load(header, registry, index=index).deltas] == ["model.q.weight"]


# --- saving ----------------------------------------------------------------------------------------------------------


def reopened(place: Path, registry: Registry) -> AdapterHeader:
    header = open_header(place, registry)
    assert header.findings == ()
    return header


def test_what_is_saved_reads_back_the_same_and_saves_to_the_same_bytes(folder: Path, registry: Registry) -> None:
    adapter = load(open_header(folder, registry), registry)
    first = save(adapter, folder.parent / "first", registry=registry)
    again = load(reopened(first, registry), registry)
    assert again.deltas.keys() == adapter.deltas.keys()
    assert all(same(again.deltas[target], delta) for target, delta in adapter.deltas.items())
    second = save(again, folder.parent / "second", registry=registry)
    assert sorted(path.name for path in first.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    for path in first.iterdir():
        assert (second / path.name).read_bytes() == path.read_bytes()


def test_the_arithmetic_travels_in_the_header_and_neither_version_nor_licence_does(
    folder: Path, registry: Registry
) -> None:
    record = AdapterRecord(schema_version="1.0", kinds=("lora",), version="1.0.0", license="mit")
    adapter = replace(load(open_header(folder, registry), registry), record=record)
    place = save(adapter, folder.parent / "out", registry=registry)
    metadata = read_header(place / "adapter_model.safetensors").metadata
    assert metadata["format"] == "pt"
    said = json.loads(metadata["lorahub"])
    assert set(said) == {"schema_version", "kinds", "modules"}
    assert said["modules"][0]["scale"] == 2.0
    assert metadata["lorahub"] == json.dumps(said, sort_keys=True, separators=(",", ":"))
    written = AdapterRecord.load(place / "lorahub.json")
    assert set(written.files) == {"adapter_config.json", "adapter_model.safetensors"}
    assert written.stale(place) == ()


def test_the_base_is_written_as_the_files_said_or_as_the_record_knows_better(folder: Path, registry: Registry) -> None:
    adapter = load(open_header(folder, registry), registry)
    place = save(adapter, folder.parent / "said", registry=registry)
    assert open_header(place, registry).reading.base_repo == "acme/base"
    base = BaseRecord(repo_id="acme/other", revision="0" * 40)
    record = AdapterRecord(schema_version="1.0", kinds=("lora",), base=base)
    place = save(replace(adapter, record=record), folder.parent / "recorded", registry=registry)
    reading = open_header(place, registry).reading
    assert (reading.base_repo, reading.base_revision) == ("acme/other", "0" * 40)


def test_saving_over_an_adapter_replaces_its_files_and_leaves_others_alone(folder: Path, registry: Registry) -> None:
    (folder / "tokenizer.json").write_text("mine")
    deltas: dict[Target, Delta] = {Target("", "k", "weight"): LoRA(torch.ones(3, 1), torch.ones(1, 5), 0.5)}
    save(Adapter(deltas=deltas), folder, registry=registry)
    header = reopened(folder, registry)
    assert [target.name for target in header.touches] == ["k.weight"]
    assert (folder / "tokenizer.json").read_text() == "mine"
    assert sorted(path.name for path in folder.parent.iterdir()) == [folder.name]


def test_a_save_that_fails_leaves_nothing_behind(folder: Path, registry: Registry) -> None:
    adapter = load(open_header(folder, registry), registry)
    (folder.parent / "file").write_text("in the way")
    with pytest.raises(WriteFailed):
        save(adapter, folder.parent / "file", registry=registry)
    with pytest.raises(WriteFailed):
        save(adapter, folder.parent / "missing" / "out", registry=registry)
    assert sorted(path.name for path in folder.parent.iterdir()) == ["adapter", "file"]


class Doubling:
    """PEFT's format, but for an alpha that it writes twice as large."""

    name = "peft"
    claims, read = PeftFormat.claims, PeftFormat.read

    def write(self, deltas: Mapping[Target, Delta], kinds: Sequence[Kind], hints: Mapping[str, JSON]) -> Written:
        written = PeftFormat().write(deltas, kinds, hints)
        config = dict(written.configs["adapter_config.json"])
        config["lora_alpha"] = 2
        return replace(written, configs={"adapter_config.json": config})


def test_what_would_not_read_back_the_same_is_refused_before_anything_is_written(
    tmp_path: Path, registry: Registry
) -> None:
    deltas: dict[Target, Delta] = {Target("", "q", "weight"): LoRA(torch.ones(3, 1), torch.ones(1, 5), 1.0)}
    with pytest.raises(CannotCarry, match=r"read back changed, first: q\.weight"):
        save(Adapter(deltas=deltas), tmp_path / "out", registry=with_format(registry, Doubling()))
    assert list(tmp_path.iterdir()) == []


def test_columns_of_an_embedding_need_the_hint_that_it_is_one(tmp_path: Path, registry: Registry) -> None:
    # On a square weight nothing but the hint tells columns from rows.
    lengths = DoRA(torch.randn(5, 2), torch.randn(2, 5), 0.5, torch.rand(5), 1)
    deltas: dict[Target, Delta] = {Target("", "e", "weight"): lengths}
    with pytest.raises(CannotCarry):
        save(Adapter(deltas=deltas), tmp_path / "out", registry=registry)
    save(Adapter(deltas=deltas, hints={"roles": {"e.weight": "embedding"}}), tmp_path / "out", registry=registry)
    (again,) = load(reopened(tmp_path / "out", registry), registry).deltas.values()
    assert same(again, lengths)


def test_what_is_no_weight_change_cannot_be_saved_as_one(folder: Path, registry: Registry) -> None:
    adapter = load(open_header(folder, registry), registry)
    parts = {"prompt-tuning": Part(kind="prompt-tuning", reason="", tensors={})}
    with pytest.raises(CannotCarry, match="prompt-tuning"):
        save(replace(adapter, parts=parts), folder.parent / "out", registry=registry)


class Forgetful:
    """PEFT's format, but for the tensors of ``k``, which it never writes."""

    name = "peft"
    claims, read = PeftFormat.claims, PeftFormat.read

    def write(self, deltas: Mapping[Target, Delta], kinds: Sequence[Kind], hints: Mapping[str, JSON]) -> Written:
        written = PeftFormat().write(deltas, kinds, hints)
        return replace(written, tensors={key: tensor for key, tensor in written.tensors.items() if ".k." not in key})


def test_a_format_that_loses_a_tensor_is_caught_before_it_is_written(tmp_path: Path, registry: Registry) -> None:
    deltas: dict[Target, Delta] = {
        Target("", name, "weight"): LoRA(torch.ones(3, 1), torch.ones(1, 5), 1.0) for name in ("q", "k")
    }
    with pytest.raises(CannotCarry, match=r"k\.weight"):
        save(Adapter(deltas=deltas), tmp_path / "out", registry=with_format(registry, Forgetful()))
    assert list(tmp_path.iterdir()) == []


class Adding:
    """PEFT's format, but for a tensor that it adds and its own config does not explain."""

    name = "peft"
    claims, read = PeftFormat.claims, PeftFormat.read

    def write(self, deltas: Mapping[Target, Delta], kinds: Sequence[Kind], hints: Mapping[str, JSON]) -> Written:
        written = PeftFormat().write(deltas, kinds, hints)
        return replace(written, tensors={**written.tensors, f"{PREFIX}norm.weight": torch.ones(3)})


def test_a_format_that_writes_what_it_would_question_is_caught(tmp_path: Path, registry: Registry) -> None:
    deltas: dict[Target, Delta] = {Target("", "q", "weight"): LoRA(torch.ones(3, 1), torch.ones(1, 5), 1.0)}
    with pytest.raises(CannotCarry, match="key-unknown"):
        save(Adapter(deltas=deltas), tmp_path / "out", registry=with_format(registry, Adding()))


def test_replacements_of_any_shape_survive(tmp_path: Path, registry: Registry) -> None:
    deltas: dict[Target, Delta] = {
        Target("", "q", "weight"): LoRA(torch.ones(3, 1), torch.ones(1, 5), 1.0),
        Target("", "norm", "weight"): Replace(torch.randn(7).half()),
        Target("", "norm", "num_batches_tracked"): Replace(torch.tensor(3)),
        Target("", "conv", "weight"): Replace(torch.randn(2, 3, 1, 2)),
    }
    save(Adapter(deltas=deltas), tmp_path / "out", registry=registry)
    again = load(reopened(tmp_path / "out", registry), registry)
    assert all(same(again.deltas[target], delta) for target, delta in deltas.items())
