"""Installing: exactly what is locked, nothing that is not ours touched, killed runs finished by the next."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from manifest.team import LAYERS, WIDTH, Team, tree

import lorahub
from lorahub.errors import Degraded, DigestMismatch, NotFound, UsageError, WriteFailed
from lorahub.hub.folder import FolderHub
from lorahub.manifest.lockfile import Lock
from lorahub.names import Ref


def no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody may be asked from here on."""

    def refuse(*_args: object, **_kwargs: object) -> None:
        raise AssertionError("a hub was opened")

    monkeypatch.setattr("lorahub.manifest.installing.open_hub", refuse)
    monkeypatch.setattr("lorahub.manifest.resolving.open_hub", refuse)


def test_every_adapter_is_a_folder_with_the_locked_bytes(locked: Team) -> None:
    synced = lorahub.sync()
    assert dict(synced) == {name: locked.folder / "adapters" / name for name in ("ink", "own", "sql")}
    for adapter in Lock.load(locked.lock).adapter:
        files = {path: hashlib.sha256(data).hexdigest() for path, data in tree(synced[adapter.name]).items()}
        assert files == {each.path: each.sha256 for each in adapter.file}
    assert synced.weights == {"sql": 0.5}


def test_the_layout_is_the_one_that_the_filesystem_resolver_of_vllm_reads(locked: Team, tmp_path: Path) -> None:
    lorahub.sync(dest=tmp_path / "serve")
    config = json.loads((tmp_path / "serve" / "ink" / "adapter_config.json").read_text())
    assert (config["peft_type"], config["base_model_name_or_path"]) == ("LORA", "acme/base")  # both are looked at


def test_what_is_installed_attaches_to_a_model(locked: Team) -> None:
    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = torch.nn.ModuleList(
                torch.nn.ModuleDict({"q": torch.nn.Linear(WIDTH, WIDTH, bias=False)}) for _ in range(LAYERS)
            )

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for layer in self.layers:
                x = layer["q"](x)
            return x

    model, x = Model(), torch.ones(1, WIDTH)
    plain = model(x)
    synced = lorahub.sync()
    with lorahub.attach(model, synced, weights={**dict.fromkeys(synced, 1.0), **synced.weights}) as live:
        assert {*live.adapters} == {"ink", "own", "sql"}
        assert not torch.allclose(model(x), plain)


def test_a_second_run_writes_nothing_and_asks_nobody(locked: Team, monkeypatch: pytest.MonkeyPatch) -> None:
    lorahub.sync()
    places = sorted(locked.folder.joinpath("adapters").rglob("*"))
    before = {place: place.stat().st_mtime_ns for place in places}
    no_hub(monkeypatch)
    again = lorahub.sync(locked=True)
    assert set(again.done.values()) == {"kept"}
    assert {
        place: place.stat().st_mtime_ns for place in sorted(locked.folder.joinpath("adapters").rglob("*"))
    } == before


def test_a_folder_that_cannot_be_written_is_enough_where_all_is_in_place(
    locked: Team, monkeypatch: pytest.MonkeyPatch
) -> None:
    lorahub.sync()

    def full(*_args: object, **_kwargs: object) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(Path, "mkdir", full)
    monkeypatch.setattr("lorahub.manifest.placing.atomic_write", full)
    assert set(lorahub.sync(frozen=True).done.values()) == {"kept"}


def test_what_is_cached_installs_with_the_hub_gone(locked: Team) -> None:
    lorahub.sync()
    shutil.rmtree(locked.folder / "adapters")
    shutil.rmtree(locked.hub)
    assert lorahub.sync(locked=True, local_files_only=True).done["ink"] == "installed"


def test_a_changed_manifest_is_locked_first_refused_or_not_looked_at(locked: Team) -> None:
    lorahub.sync()
    locked.publish("acme/new", "1.0.0", seed=5)
    locked.write(locked.manifest.read_text() + 'new = "acme/new"\n')
    before = locked.lock.read_bytes()
    with pytest.raises(Degraded, match="new is not locked") as refused:
        lorahub.sync(locked=True)
    assert refused.value.exit_code == 3
    assert "new" not in lorahub.sync(frozen=True)
    assert locked.lock.read_bytes() == before
    synced = lorahub.sync()
    assert synced["new"].is_dir()
    assert [each.name for each in synced.changes] == ["new"]
    with pytest.raises(UsageError, match="--locked"):
        lorahub.sync(locked=True, frozen=True)


def test_frozen_without_a_lock_says_what_to_do(team: Team) -> None:
    team.write("[adapters]\n")
    with pytest.raises(UsageError) as refused:
        lorahub.sync(frozen=True)
    assert refused.value.hint == "lorahub lock"


def test_an_upgrade_replaces_the_folder_and_a_removal_takes_it_away(locked: Team) -> None:
    lorahub.sync()
    locked.publish("acme/ink", "1.3.0", seed=4)
    lorahub.lock(upgrade=["ink"])
    assert lorahub.sync().done == {"ink": "replaced", "own": "kept", "sql": "kept"}
    lorahub.remove("sql")
    assert lorahub.sync().done["sql"] == "removed"
    assert sorted(path.name for path in (locked.folder / "adapters").iterdir()) == [".lorahub", "ink", "own"]


def test_a_folder_that_is_not_from_here_is_never_replaced_or_removed(locked: Team) -> None:
    theirs = locked.folder / "adapters" / "ink"
    theirs.mkdir(parents=True)
    (theirs / "thesis.txt").write_text("the only copy")
    with pytest.raises(WriteFailed, match="is not from lorahub sync"):
        lorahub.sync()
    assert tree(theirs) == {"thesis.txt": b"the only copy"}
    lorahub.remove("ink")
    lorahub.sync()
    assert tree(theirs) == {"thesis.txt": b"the only copy"}


def test_a_link_in_the_place_of_a_folder_is_not_followed(locked: Team, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (locked.folder / "adapters").mkdir()
    (locked.folder / "adapters" / "ink").symlink_to(outside)
    with pytest.raises(WriteFailed, match="is not from lorahub sync"):
        lorahub.sync()
    assert list(outside.iterdir()) == []


def test_a_folder_that_somebody_changed_is_left_to_them(locked: Team) -> None:
    ink = lorahub.sync()["ink"]
    (ink / "notes.md").write_text("mine")
    assert lorahub.sync().done["ink"] == "kept"  # what is locked is in place
    locked.publish("acme/ink", "1.3.0", seed=4)
    lorahub.lock(upgrade=True)
    with pytest.raises(WriteFailed, match="was changed since it was installed") as refused:
        lorahub.sync()
    assert f"rm -r {ink}" in refused.value.hint
    assert (ink / "notes.md").read_text() == "mine"
    lorahub.remove("ink")
    left = lorahub.sync()
    assert [each.code for each in left.findings] == ["folder-left"]
    assert (ink / "notes.md").exists()


def test_a_command_in_a_hint_names_a_folder_with_a_space_as_one(locked: Team, tmp_path: Path) -> None:
    place = tmp_path / "what is served"
    lorahub.sync(dest=place)
    (place / "ink" / "adapter_model.safetensors").write_bytes(b"other")
    with pytest.raises(WriteFailed) as refused:
        lorahub.sync(dest=place)
    assert f"rm -r '{place / 'ink'}'" in refused.value.hint


def test_a_missing_file_comes_back_and_a_changed_one_is_refused(locked: Team) -> None:
    ink = lorahub.sync()["ink"]
    (ink / "adapter_config.json").unlink()
    assert lorahub.sync().done["ink"] == "replaced"
    (ink / "adapter_config.json").write_text("{}")
    with pytest.raises(WriteFailed, match="was changed since"):
        lorahub.sync()


def test_another_manifest_in_the_same_folder_keeps_what_is_its(locked: Team, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    (other / "lorahub.toml").write_text('[adapters]\nother = "acme/sql"\n')
    serve = tmp_path / "serve"
    lorahub.sync(dest=serve)
    lorahub.sync(manifest=other, dest=serve)
    lorahub.sync(dest=serve)
    assert sorted(path.name for path in serve.iterdir()) == [".lorahub", "ink", "other", "own", "sql"]


def test_another_manifest_does_not_replace_what_the_first_one_serves(locked: Team, tmp_path: Path) -> None:
    lorahub.sync(dest=tmp_path / "served")
    before = {path: path.read_bytes() for path in (tmp_path / "served" / "ink").iterdir()}
    other = tmp_path / "other"
    other.mkdir()
    (other / "lorahub.toml").write_text('[adapters]\nink = "acme/sql@1"\n')
    with pytest.raises(WriteFailed, match=r"lorahub\.toml has installed there") as refused:
        lorahub.sync(manifest=other, dest=tmp_path / "served")
    assert "--dest" in refused.value.hint
    assert {path: path.read_bytes() for path in (tmp_path / "served" / "ink").iterdir()} == before
    locked.manifest.unlink()  # nobody claims it any more
    assert lorahub.sync(manifest=other, dest=tmp_path / "served").done["ink"] == "replaced"


def test_a_file_of_the_project_that_is_not_the_locked_one_is_refused(locked: Team) -> None:
    weights = locked.folder / "own" / "adapter_model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    with pytest.raises(Degraded, match="other files"):
        lorahub.sync(locked=True)
    with pytest.raises(DigestMismatch, match="is not the file that was locked"):
        lorahub.sync(frozen=True)
    assert not (locked.folder / "adapters" / "own").exists()


def test_bytes_of_a_hub_that_are_not_the_locked_ones_are_refused(locked: Team) -> None:
    pin = FolderHub(locked.hub).resolve(Ref.parse("acme/ink@1.2.0"))
    sha256 = pin.files["adapter_model.safetensors"].sha256 or ""
    blob = next(path for path in locked.hub.rglob("*") if path.is_file() and sha256 in path.as_posix().replace("/", ""))
    blob.chmod(0o644)
    data = bytearray(blob.read_bytes())
    data[-1] ^= 1
    blob.write_bytes(data)
    with pytest.raises(DigestMismatch):
        lorahub.sync()
    assert not (locked.folder / "adapters" / "ink").exists()


def test_what_is_gone_from_the_hub_and_not_in_the_cache_is_said_with_its_code(locked: Team) -> None:
    shutil.rmtree(locked.hub)
    with pytest.raises(NotFound, match="ink is locked at commit") as refused:
        lorahub.sync()
    assert "commit-gone" in {each.code for each in refused.value.findings}
    assert refused.value.hint == "to lock what there is now: lorahub lock --upgrade ink"


def test_a_full_disk_leaves_what_was_there(locked: Team, monkeypatch: pytest.MonkeyPatch) -> None:
    lorahub.sync()
    before = tree(locked.folder / "adapters")
    locked.publish("acme/ink", "1.3.0", seed=4)
    lorahub.lock(upgrade=["ink"])

    def full(*_args: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("lorahub.manifest.installing.copy_range", full)
        with pytest.raises(WriteFailed, match="No space left") as refused:
            lorahub.sync()
    assert "free some space" in refused.value.hint
    assert tree(locked.folder / "adapters") == before
    assert lorahub.sync().done["ink"] == "replaced"


def test_a_folder_that_cannot_be_put_in_place_leaves_the_old_one(locked: Team, monkeypatch: pytest.MonkeyPatch) -> None:
    lorahub.sync()
    before = tree(locked.folder / "adapters")
    locked.publish("acme/ink", "1.3.0", seed=4)
    lorahub.lock(upgrade=["ink"])

    def fails(*_args: object) -> None:
        raise WriteFailed("not today")

    with monkeypatch.context() as patch:
        patch.setattr("lorahub.manifest.placing.replace_dir", fails)
        with pytest.raises(WriteFailed, match="not today"):
            lorahub.sync()
    assert tree(locked.folder / "adapters") == before
    assert lorahub.sync().done["ink"] == "replaced"


# -------------------------------------------------------------------------------------------------- compositions

MIX = """
[compositions.mix]
method = "ties"
parameters = { density = 0.5 }
adapters = ["ink", "sql"]
"""


def test_a_composition_is_made_and_its_output_locked(locked: Team) -> None:
    locked.write(locked.manifest.read_text() + MIX)
    lorahub.lock()
    (before,) = Lock.load(locked.lock).composition
    assert before.output is None
    mix = lorahub.sync()["mix"]
    (after,) = Lock.load(locked.lock).composition
    assert after.output is not None
    assert after.inputs == before.inputs
    wanted = lorahub.compose(
        {"ink": locked.folder / "adapters/ink", "sql": locked.folder / "adapters/sql"},
        weights=[1.0, 0.5],  # sql's own, from the manifest
        method="ties",
        density=0.5,
    )
    got = lorahub.load(mix)
    assert got.deltas.keys() == wanted.deltas.keys()
    for target, delta in wanted.deltas.items():
        weight = torch.zeros(WIDTH, WIDTH)
        assert torch.equal(got.deltas[target].delta(weight), delta.delta(weight))


def test_a_composition_that_is_in_place_is_not_made_again(locked: Team, monkeypatch: pytest.MonkeyPatch) -> None:
    locked.write(locked.manifest.read_text() + MIX)
    lorahub.sync()
    lock = locked.lock.read_bytes()
    monkeypatch.setattr("lorahub.manifest.installing.make", None)
    assert lorahub.sync(locked=True).done["mix"] == "kept"
    monkeypatch.undo()
    monkeypatch.setenv("LORAHUB_HUB", str(locked.hub))
    monkeypatch.setenv("LORAHUB_CACHE", str(locked.hub.parent / "cache"))
    shutil.rmtree(locked.folder / "adapters")
    lorahub.sync(locked=True, manifest=locked.folder)
    assert locked.lock.read_bytes() == lock  # and comes to the same


def test_a_composition_follows_what_goes_into_it_and_not_a_model_card(locked: Team) -> None:
    locked.write(locked.manifest.read_text() + MIX)
    lorahub.sync()
    (before,) = Lock.load(locked.lock).composition
    locked.publish("acme/ink", "1.3.0", seed=4)
    lorahub.lock(upgrade=["ink"])
    (after,) = Lock.load(locked.lock).composition
    assert after.inputs != before.inputs
    assert after.output is None
    assert lorahub.sync().done["mix"] == "replaced"


def test_a_composition_that_comes_to_something_else_is_refused(locked: Team) -> None:
    locked.write(locked.manifest.read_text() + MIX)
    lorahub.lock()
    lock = Lock.load(locked.lock)
    other = lock.composition[0].model_copy(update={"output": "sha256:" + "0" * 64})
    lock.model_copy(update={"composition": (other,)}).save(locked.lock)
    with pytest.raises(Degraded, match="did not come to what is locked") as refused:
        lorahub.sync()
    assert refused.value.hint.endswith("lorahub lock --upgrade mix")
    assert not (locked.folder / "adapters" / "mix").exists()
    lorahub.lock(upgrade=["mix"])
    assert lorahub.sync()["mix"].is_dir()


def test_a_recipes_file_is_locked_with_adapters_of_its_own(locked: Team) -> None:
    locked.publish("acme/far", "3.1.0", seed=6)
    (locked.folder / "own").rename(locked.folder / "my own")
    locked.write(locked.manifest.read_text().replace("./own", "./my own"))
    recipe = locked.folder / "two.toml"
    recipe.write_text(
        'method = "linear"\n[[adapters]]\nref = "acme/far@3"\nweight = 0.3\n[[adapters]]\nref = "./my own"\n'
    )
    locked.write(locked.manifest.read_text() + '[compositions.two]\nrecipe = "two.toml"\n')
    two = lorahub.sync()["two"]
    (composition,) = Lock.load(locked.lock).composition
    assert [(each.name, each.version) for each in composition.adapter] == [("far", "3.1.0"), ("my-own", None)]
    assert (two / "adapter_model.safetensors").exists()
    recipe.write_text(recipe.read_text().replace("0.3", "0.4"))
    with pytest.raises(Degraded, match="the recipe of two says something else"):
        lorahub.sync(locked=True)
    shutil.rmtree(two)
    with pytest.raises(Degraded, match="two is locked by another recipe"):
        lorahub.sync(frozen=True)


# -------------------------------------------------------------------------------------- verify


def test_verify_tells_changed_missing_and_extra_files(locked: Team) -> None:
    lorahub.sync()
    assert lorahub.verify().ok
    ink = locked.folder / "adapters" / "ink"
    weights = ink / "adapter_model.safetensors"
    data, status = bytearray(weights.read_bytes()), weights.stat()
    data[-1] ^= 1
    weights.write_bytes(data)
    os.utime(weights, ns=(status.st_atime_ns, status.st_mtime_ns))  # size and time are the same
    (ink / "adapter_config.json").unlink()
    (ink / "more.safetensors").write_bytes(b"x")
    (ink / "NOTES.md").write_text("harmless")
    found = lorahub.verify()
    assert not found.ok
    assert {each.path: each.state for each in found.files if each.name == "ink"} == {
        "README.md": "ok",
        "adapter_config.json": "missing",
        "adapter_model.safetensors": "changed",
        "lorahub.json": "ok",
        "more.safetensors": "extra",
        "NOTES.md": "extra",
    }
    assert all(each.ok for each in found.files if each.name != "ink")


def test_a_note_beside_an_adapter_is_told_and_no_failure(locked: Team) -> None:
    ink = lorahub.sync()["ink"]
    (ink / "README.txt").write_text("a note")
    found = lorahub.verify()
    assert found.ok
    assert [each.path for each in found.files if each.state == "extra"] == ["README.txt"]


def test_verify_of_nothing_installed_misses_everything(locked: Team) -> None:
    assert {each.state for each in lorahub.verify().files} == {"missing"}
