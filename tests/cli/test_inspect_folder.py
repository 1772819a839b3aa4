"""``lorahub inspect DIR/``: a row for every adapter, readable or not; and the hashes of a single file."""

from __future__ import annotations

import csv
import errno
import hashlib
import io
import json
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path, PurePath
from typing import Any

import pytest
import torch

from lorahub import sources
from lorahub.files.writer import save_file
from lorahub.findings import Verdict
from lorahub.formats import survey as survey_module
from lorahub.formats.format import AdapterFiles
from lorahub.formats.survey import Seen, survey
from lorahub.listing import COLUMNS, Entry, is_collection, list_folder, ordered
from lorahub.plugins import load_registry
from lorahub.recall import Recall

Cli = Callable[..., Any]
Make = Callable[..., Path]


@pytest.fixture
def shelf(tmp_path: Path, make_adapter: Make) -> Path:
    """Two loose files, one broken, a PEFT folder and a folder inside a folder."""
    place = tmp_path / "shelf"
    (place / "deep").mkdir(parents=True)
    for name, r in (("b10", 2), ("b2", 4)):
        save_file(place / f"{name}.safetensors", comfy(r), {})
    save_file(place / "deep" / "c.safetensors", comfy(2), {"note": "the same tensors as b10"})
    (place / "broken.safetensors").write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    shutil.copytree(make_adapter("ink"), place / "ink")
    return place


def comfy(r: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(r)
    stem = "diffusion_model.q"
    return {
        f"{stem}.lora_A.weight": torch.randn(r, 6, generator=generator),
        f"{stem}.lora_B.weight": torch.randn(4, r, generator=generator),
    }


def test_every_adapter_is_a_row_and_the_unreadable_one_says_why(lorahub: Cli, shelf: Path) -> None:
    run = lorahub("inspect", shelf)
    assert run.code == 0
    header, *rows = run.out.splitlines()
    assert header.split() == list(COLUMNS)
    assert [row.split()[0] for row in rows] == [
        "b2.safetensors",
        "b10.safetensors",
        "broken.safetensors",
        "deep/c.safetensors",
        "ink",
    ]
    assert "Git LFS pointer" in rows[2]
    assert rows[4].split()[1:5] == ["peft", "lora", "4", "2"]
    assert "acme/base" in rows[4]
    assert "1 of 5 cannot be read" in run.err


def test_json_has_every_value(lorahub: Cli, shelf: Path) -> None:
    document = lorahub("inspect", shelf, "--json").json()
    by_name = {each["name"]: each for each in document["adapters"]}
    assert by_name["ink"] == {
        "name": "ink",
        "format": "peft",
        "kinds": ["lora"],
        "ranks": [4],
        "scales": [2.0],
        "bytes": (shelf / "ink" / "adapter_model.safetensors").stat().st_size,
        "base": "acme/base",
        "looks_like": "",
        "findings": [],
        "same_as": "",
        "error": "",
    }
    broken = by_name["broken.safetensors"]
    assert broken["error"]
    assert broken["bytes"] == (shelf / "broken.safetensors").stat().st_size


def test_csv_reads_back_row_by_row(lorahub: Cli, shelf: Path) -> None:
    run = lorahub("inspect", shelf, "--csv", "--sort", "size")
    rows = list(csv.DictReader(io.StringIO(run.out)))
    sizes = [int(row["bytes"]) for row in rows]
    assert len(rows) == 5
    assert sizes == sorted(sizes)
    assert {row["name"]: row["ranks"] for row in rows}["b2.safetensors"] == "4"


def test_duplicates_are_found_by_tensors_and_only_when_asked_for(lorahub: Cli, shelf: Path) -> None:
    plain = lorahub("inspect", shelf, "--json").json()
    assert {each["same_as"] for each in plain["adapters"]} == {""}
    compared = lorahub("inspect", shelf, "--json", "--duplicates").json()
    same = {each["name"]: each["same_as"] for each in compared["adapters"] if each["same_as"]}
    assert same == {"deep/c.safetensors": "b10.safetensors"}
    assert "same tensors as b10.safetensors" in lorahub("inspect", shelf, "--duplicates").out


def test_findings_are_counted_and_do_not_stop_the_listing(lorahub: Cli, shelf: Path) -> None:
    save_file(shelf / "odd.safetensors", comfy(2) | {"diffusion_model.strange": torch.ones(1)}, {})
    document = lorahub("inspect", shelf, "--json").json()
    assert {each["name"]: each["findings"] for each in document["adapters"]}["odd.safetensors"] == ["key-unknown"]
    (row,) = [line for line in lorahub("inspect", shelf).out.splitlines() if line.startswith("odd")]
    assert row.split()[-1] == "1"


def test_where_nothing_can_be_read_the_exit_code_says_so(lorahub: Cli, tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / f"{name}.safetensors").write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    run = lorahub("inspect", tmp_path)
    assert run.code == 5
    assert len(run.out.splitlines()) == 3


def test_a_dangling_link_is_a_row(lorahub: Cli, shelf: Path) -> None:
    try:
        (shelf / "gone.safetensors").symlink_to(shelf / "nowhere")
    except OSError:
        pytest.skip("this file system has no links")
    run = lorahub("inspect", shelf)
    assert run.code == 0
    assert "there is no adapter at" in run.out


def test_a_folder_that_is_shut_is_a_row(lorahub: Cli, shelf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("scandir", "listdir"):
        monkeypatch.setattr(os, name, shut(getattr(os, name), shelf / "deep"))
    run = lorahub("inspect", shelf)
    assert run.code == 0
    (row,) = [line for line in run.out.splitlines() if line.startswith("deep")]
    assert "Permission denied" in row
    assert "b10.safetensors" in run.out


def shut(real: Callable[..., Any], folder: Path) -> Callable[..., Any]:
    """``real``, save that ``folder`` may not be listed."""

    def listed(path: Any = ".") -> Any:
        if Path(path) == folder:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return real(path)

    return listed


def test_an_adapters_or_a_bases_own_folder_is_no_collection(adapter: Path, base: Path, tmp_path: Path) -> None:
    save_file(adapter / "second.safetensors", comfy(2), {})
    save_file(base / "second.safetensors", comfy(2), {})
    (base / "config.json").write_text(json.dumps({"architectures": ["X"]}))
    (tmp_path / "empty").mkdir()
    assert [is_collection(each) for each in (adapter, base, tmp_path / "empty", tmp_path)] == [
        False,
        False,
        False,
        True,
    ]


def test_a_base_among_adapters_is_left_out(lorahub: Cli, shelf: Path, base: Path) -> None:
    (base / "config.json").write_text(json.dumps({"architectures": ["X"]}))
    shutil.copytree(base, shelf / "base")
    names = [each["name"] for each in lorahub("inspect", shelf, "--json").json()["adapters"]]
    assert "ink" in names
    assert not [name for name in names if name.startswith("base")]


def kohya(alpha: float, rank: int, **metadata: str) -> dict[str, Any]:
    """What ``save_file`` takes."""
    stem = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k"
    tensors = {
        f"{stem}.alpha": torch.tensor(alpha),
        f"{stem}.lora_down.weight": torch.ones(rank, 768),
        f"{stem}.lora_up.weight": torch.ones(4, rank),
    }
    return {"tensors": tensors, "metadata": metadata}


def test_files_of_one_structure_are_told_apart_by_their_numbers_and_metadata(tmp_path: Path) -> None:
    variants = [
        kohya(alpha, rank, ss_output_name=f"n{number}" * number, **more)
        for number, (alpha, rank, more) in enumerate(
            (alpha, rank, more)
            for alpha in (1.0, 2.0, 0.0, 1.0)
            for rank in (2, 4)
            for more in (
                {},
                {"ss_base_model_version": "sdxl_base_v1-0"},
                {"ss_sd_model_name": "pony.safetensors"},
                {"ss_network_module": "networks.lora", "ss_network_alpha": "1.0"},
            )
        )
    ]
    for number, each in enumerate(variants):
        save_file(tmp_path / f"{number}.safetensors", **each)
    listed = list_folder(tmp_path, load_registry())
    assert len(listed) == len(variants)
    for entry in listed:
        alone = sources.inspect(str(tmp_path / entry.name))
        assert entry.scales == tuple(sorted({row.scale for row in alone.rows if row.scale is not None}))
        assert entry.ranks == tuple(sorted({row.rank for row in alone.rows if row.rank is not None}))
        assert entry.looks_like == (alone.guess.label if alone.guess else "")
        assert entry.codes == tuple(each.code for each in alone.findings if each.level >= Verdict.UNVERIFIED)
        assert entry.nbytes == alone.size
    assert len({(each.scales, each.ranks, each.looks_like, each.codes) for each in listed}) > 12


def test_files_that_cannot_be_read_for_one_reason_are_each_named(tmp_path: Path) -> None:
    for name in ("a", "b"):
        save_file(tmp_path / f"{name}.safetensors", {"a.alpha": torch.tensor(1.0)})
    one, other = list_folder(tmp_path, load_registry())
    assert str(tmp_path / "a.safetensors") in one.error
    assert str(tmp_path / "b.safetensors") in other.error


def test_what_was_remembered_is_used_where_nothing_it_depends_on_differs(tmp_path: Path) -> None:
    asked: list[str] = []

    def make(files: AdapterFiles) -> str:
        ((file, header),) = files.headers.items()
        asked.append(file)
        said = f"{header.metadata.get('a')} {files.numbers[file]['alpha'].hex()}"
        return f"{said} {len(header.metadata)}" if "all" in header.metadata else said

    seen, recall = Seen(), Recall(make)

    def of(number: int, alpha: float, **metadata: str) -> str:
        path = tmp_path / f"{number}.safetensors"
        save_file(path, {"alpha": torch.tensor(alpha), "w": torch.ones(3)}, metadata)
        return recall.of(survey(path, seen=seen))

    first = of(1, 1.0, a="x", other="1")
    assert of(2, 1.0, a="x", other="2", longer="33333") == first
    assert asked == ["1.safetensors"]
    assert of(3, 2.0, a="x") != first
    assert of(4, 1.0, a="y") != first
    assert of(5, 1.0) != first
    assert len(asked) == 4
    whole = of(6, 1.0, a="x", all="yes")
    assert whole.endswith(" 2")
    assert of(7, 1.0, a="x", all="yes", more="yes").endswith(" 3")


def test_what_is_remembered_is_bounded(tmp_path: Path) -> None:
    seen = Seen()
    recall: Recall[tuple[str, ...]] = Recall(lambda files: tuple(files.headers))
    for number in range(80):
        path = tmp_path / f"{number}.safetensors"
        save_file(path, {f"w{number}": torch.ones(1)}, {})
        assert recall.of(survey(path, seen=seen)) == (path.name,)
    assert len(seen.headers.structures) <= 64
    assert len(recall._answers) <= 64


def test_a_config_beside_many_files_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in range(20):
        save_file(tmp_path / f"{name}.safetensors", comfy(2), {})
    (tmp_path / "notes.json").write_text("{}")
    read: list[str] = []
    real = survey_module.as_config

    def counted(text: bytes, path: PurePath) -> Any:
        read.append(path.name)
        return real(text, path)

    monkeypatch.setattr(survey_module, "as_config", counted)
    assert {each.error for each in list_folder(tmp_path, load_registry())} == {""}
    assert read == ["notes.json"]


def test_what_says_nothing_in_a_column_sorts_last() -> None:
    entries = [Entry(name="a"), Entry(name="b", ranks=(8,)), Entry(name="c", ranks=(2, 4))]
    assert [each.name for each in ordered(entries, "ranks")] == ["c", "b", "a"]
    assert [each.name for each in ordered(entries, "base")] == ["a", "b", "c"]


@pytest.mark.parametrize("option", [["--sort", "rank"], ["--csv", "--json"], ["--hashes"]])
def test_options_that_make_no_sense_for_a_folder_are_usage_errors(lorahub: Cli, shelf: Path, option: list[str]) -> None:
    assert lorahub("inspect", shelf, *option).code == 2


@pytest.mark.parametrize("option", [["--sort", "name"], ["--csv"], ["--duplicates"]])
def test_options_of_a_folder_are_usage_errors_for_one_adapter(lorahub: Cli, adapter: Path, option: list[str]) -> None:
    assert lorahub("inspect", adapter, *option).code == 2


def test_every_weights_file_beside_a_config_is_a_row_of_its_own(lorahub: Cli, shelf: Path) -> None:
    save_file(shelf / "ink" / "other.safetensors", comfy(2), {})
    (shelf / "ink" / "old.bin").write_bytes(b"\x80\x02}q\x00.")
    (shelf / "ink" / "optimizer.pt").write_bytes(b"\x80\x02}q\x00.")
    shutil.copytree(shelf / "ink", shelf / "ink" / "second", ignore=shutil.ignore_patterns("o*"))
    by_name = {each["name"]: each for each in lorahub("inspect", shelf, "--json").json()["adapters"]}
    assert [name for name in by_name if name.startswith("ink")] == [
        "ink",
        "ink/old.bin",
        "ink/other.safetensors",
        "ink/second",
    ]
    assert [by_name[f"ink{rest}"]["format"] for rest in ("", "/other.safetensors", "/second")] == [
        "peft",
        "comfy",
        "peft",
    ]


def test_a_lone_pickle_is_a_row_that_names_the_command(lorahub: Cli, shelf: Path) -> None:
    (shelf / "lone").mkdir()
    (shelf / "lone" / "old.pt").write_bytes(b"\x80\x02}q\x00.")
    (row,) = [line for line in lorahub("inspect", shelf).out.splitlines() if line.startswith("lone")]
    assert "is a Python pickle" in row
    assert f"lorahub convert {shelf / 'lone' / 'old.pt'}" in row


def test_a_pickle_beside_a_config_is_a_row_called_after_the_folder(lorahub: Cli, shelf: Path) -> None:
    (shelf / "ink" / "adapter_model.safetensors").unlink()
    (shelf / "ink" / "adapter_model.bin").write_bytes(b"\x80\x02}q\x00.")
    (row,) = [line for line in lorahub("inspect", shelf).out.splitlines() if line.startswith("ink")]
    assert "lorahub convert" in row


def test_one_adapters_folder_says_what_lies_beside_it(lorahub: Cli, adapter: Path) -> None:
    assert "beside it" not in lorahub("inspect", adapter).out
    shutil.copytree(adapter, adapter / "other one")
    save_file(adapter / "second.safetensors", comfy(2), {})
    run = lorahub("inspect", adapter)
    assert "beside it" in run.out
    assert "other one" in run.out
    assert "second.safetensors" in run.out
    assert lorahub("inspect", adapter, "--json").json()["beside"] == ["other one", "second.safetensors"]
    names = lorahub("inspect", adapter, "--sort", "name", "-q").out.splitlines()
    assert names == ["adapter_model.safetensors", "other one", "second.safetensors"]


def test_quiet_prints_the_readable_names(lorahub: Cli, shelf: Path) -> None:
    assert lorahub("inspect", shelf, "-q").out.split() == [
        "b2.safetensors",
        "b10.safetensors",
        "deep/c.safetensors",
        "ink",
    ]


def test_hashes_are_those_that_sites_know_a_file_by(lorahub: Cli, shelf: Path) -> None:
    def hashes(name: str) -> dict[str, str]:
        found: dict[str, str] = lorahub("inspect", shelf / name, "--hashes", "--json").json()["hashes"]
        return found

    raw = (shelf / "b10.safetensors").read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    assert hashes("b10.safetensors") == {
        "sha256": hashlib.sha256(raw).hexdigest(),
        "autov2": hashlib.sha256(raw).hexdigest()[:10],
        "autov3": hashlib.sha256(raw[8 + length :]).hexdigest()[:12],
    }
    other = hashes("deep/c.safetensors")
    assert other["autov3"] == hashes("b10.safetensors")["autov3"]
    assert other["autov2"] != hashes("b10.safetensors")["autov2"]
    assert other["autov2"] in lorahub("inspect", shelf / "deep" / "c.safetensors", "--hashes").out


def test_a_shelf_of_real_adapters_is_listed_whole(lorahub: Cli, real_adapters: Path) -> None:
    document = lorahub("inspect", real_adapters, "--json").json()
    by_name = {each["name"]: each for each in document["adapters"]}
    assert by_name["ml-explore__mlx-lm__mlx_qwen05"]["format"] == "mlx"
    assert "0 bytes" in by_name["invoke-ai__InvokeAI__zero_byte/model.safetensors"]["error"]
    assert len([each for each in document["adapters"] if each["error"]]) < len(document["adapters"])
    folders = {path.name for path in real_adapters.iterdir() if path.is_dir()} - {"layouts", "configs"}
    assert {name.partition("/")[0] for name in by_name} == folders
