"""Publishing a folder as a trainer left it: what is made of it, and everything that keeps it from being published."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from hub.double import TOKEN
from hub.trained import CARD, LAYER, trained_folder, weights

import lorahub
from lorahub.cli.main import main
from lorahub.errors import LorahubError, PushRefused, UsageError
from lorahub.publishing import Pushed
from lorahub.records import AdapterRecord

Trained = Callable[..., Path]


@pytest.fixture
def trained(tmp_path: Path) -> Trained:
    """``trained(NAME)``: a folder of that name as a trainer leaves it; see ``trained_folder``."""
    return lambda name="out", **content: trained_folder(tmp_path / name, **content)


def push(double, folder: Path, **options: object) -> Pushed:
    """As from a script, at the double."""
    options = {"version": "1.0.0", "hub": double.endpoint, "token": double.api().token} | options
    return lorahub.push(folder, "acme/ink", **options)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def codes(caught: pytest.ExceptionInfo[LorahubError]) -> set[str]:
    return {each.code for each in caught.value.findings}


# ---------------------------------------------------------------------------------------------- as a trainer left it


def test_a_trainers_folder_is_published_as_it_is(double, trained):
    folder = trained()
    pushed = push(double, folder)
    repo = double.repo("acme/ink")
    assert set(pushed.skipped) == {"checkpoint-10/", "runs/", "training_args.bin"}
    published = repo.files("v1.0.0")
    assert {path: data for path, data in contents(folder).items() if path in published} == {
        path: data for path, data in published.items() if path != ".gitattributes"
    }
    record = AdapterRecord.load(folder / "lorahub.json")
    assert record.base is not None
    assert (record.base.repo_id, record.base.revision, record.base.weights_digest) == ("acme/base", None, None)
    assert (record.name, record.version, record.license) == ("ink", "1.0.0", "apache-2.0")
    assert record.stale(folder) == ()
    assert b"Trained with TRL." in published["README.md"]
    assert {"lorahub.json", "README.md"} <= set(pushed.written)


def test_the_same_again_publishes_nothing_and_writes_nothing(double, trained):
    folder = trained()
    first = push(double, folder)
    before = contents(folder)
    double.log.clear()
    again = push(double, folder)
    assert (again.pin.commit, again.pin.why, again.written) == (first.pin.commit, "already published as v1.0.0", ())
    assert (double.writes(), contents(folder)) == ([], before)


def test_a_dry_run_writes_nothing_anywhere_and_shows_what_would_be(double, trained):
    folder = trained()
    before = contents(folder)
    planned = push(double, folder, dry_run=True)
    assert {"lorahub.json", "README.md"} <= set(planned.written)
    assert {"lorahub.json", "README.md", "tokenizer.json"} <= set(planned.pin.files)
    assert (double.writes(), contents(folder)) == ([], before)
    assert push(double, folder).pin.files == planned.pin.files


def test_the_commit_of_the_base_is_recorded_where_the_config_gives_one(double, trained):
    assert push(double, trained(revision="a" * 40)).record.base.revision == "a" * 40
    assert push(double, trained("two", revision="main", seed=1), version="1.1.0").record.base.revision is None


def test_the_card_is_left_alone_where_that_is_asked_for(double, trained):
    push(double, trained(), card=False)
    assert double.repo("acme/ink").files()["README.md"] == CARD.encode()


def test_a_folder_that_cannot_be_written_is_published_all_the_same(double, trained):
    folder = trained()
    if os.geteuid() == 0:
        pytest.skip("runs as root, whom permissions do not bind")
    folder.chmod(0o500)
    try:
        pushed = push(double, folder)
    finally:
        folder.chmod(0o700)
    assert [each.code for each in pushed.said][-1] == "folder-not-updated"
    assert "lorahub.json" in double.repo("acme/ink").files()


def test_what_was_published_is_an_adapter_that_can_be_inspected(double, trained, tmp_path, monkeypatch):
    monkeypatch.setenv("LORAHUB_CACHE", str(tmp_path / "cache"))
    push(double, trained())
    pulled = lorahub.pull("acme/ink@1", hub=double.endpoint)
    assert AdapterRecord.load(pulled.folder / "lorahub.json").stale(pulled.folder) == ()
    assert lorahub.inspect(pulled.folder).document()["kinds"] == ["lora"]


# ----------------------------------------------------------------------------------------------------- refusals


def test_everything_that_is_wrong_is_said_at_once_without_a_request(double, trained, tmp_path):
    folder = trained(
        base_model_name_or_path="./base",
        files={
            "adapter_model.safetensors": weights(spoilt=b"\x80\x7f"),
            "README.md": b"# No licence\n",
            ".env": b"KEY=1",
            "train.py": b"pass",
            "a\\b.safetensors": weights(),
            "LICENSE": b"hf_" + b"x" * 34,
        },
    )
    (folder / "link.png").symlink_to(tmp_path / "nothing")
    before = contents(folder)
    with pytest.raises(PushRefused) as caught:
        push(double, folder, version=None)
    assert codes(caught) == {
        "secret-file",
        "secret-text",
        "unknown-file",
        "link",
        "not-finite",
        "version-missing",
        "license-missing",
        "base-is-a-local-path",
        "bad-name",
    }
    assert all(each.remedy for each in caught.value.findings)
    assert double.log == []
    assert contents(folder) == before


def test_a_version_is_no_branch_and_that_is_said_first(double, trained):
    with pytest.raises(UsageError, match="no branch to push to"):
        lorahub.push(trained(), "acme/ink@1.0.0", hub=double.endpoint)
    assert double.log == []


def test_a_folder_of_adapters_says_how_to_push_each(double, trained, tmp_path):
    trained("zoo/ink")
    trained("zoo/pen")
    with pytest.raises(PushRefused, match="holds 2: ink, pen") as caught:
        lorahub.push(tmp_path / "zoo", "acme/zoo", version="1.0.0", hub=double.endpoint)
    assert f"lorahub push acme/zoo/ink {tmp_path / 'zoo' / 'ink'}" in caught.value.hint


@pytest.mark.parametrize(
    "number", [b"\x80\x7f", b"\x80\xff", b"\xc0\x7f", b"\x81\xff"], ids=["inf", "-inf", "nan", "-nan"]
)
def test_weights_that_are_not_finite_are_named(double, trained, number):
    folder = trained(files={"adapter_model.safetensors": weights(spoilt=b"\x00\x3c" + number)})
    with pytest.raises(PushRefused) as caught:
        push(double, folder)
    (found,) = caught.value.findings
    assert (found.code, found.where) == ("not-finite", (f"adapter_model.safetensors: {LAYER}.lora_A.weight",))
    assert double.log == []


@pytest.mark.parametrize("base", ["./base", "/data/base", "~/base", "..", "C:\\models\\base"])
def test_a_base_that_is_a_path_is_refused_with_the_command_that_names_it(double, trained, base):
    with pytest.raises(PushRefused) as caught:
        push(double, trained(base_model_name_or_path=base, files={"README.md": b"---\nlicense: mit\n---\n"}))
    (found,) = caught.value.findings
    assert found.code == "base-is-a-local-path"
    assert "--base NS/NAME" in found.remedy
    assert double.log == []


def test_a_folder_that_lies_here_is_no_name_of_a_base(double, trained, tmp_path, monkeypatch):
    (tmp_path / "outputs" / "sft").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(PushRefused) as caught:
        push(double, trained(base_model_name_or_path="outputs/sft", files={"README.md": b"---\nlicense: mit\n---\n"}))
    assert codes(caught) == {"base-is-a-local-path"}


def test_the_readme_names_the_base_where_the_config_has_only_a_path(double, trained):
    assert push(double, trained(base_model_name_or_path="/data/base")).record.base.repo_id == "acme/base"


def test_a_base_that_cannot_be_had_is_named_in_the_readme_as_the_refusal_says(double, trained):
    folder = trained(base_model_name_or_path="", files={"README.md": None})
    with pytest.raises(PushRefused) as caught:
        push(double, folder, license="mit")
    (found,) = caught.value.findings
    assert found.code == "base-unknown"
    assert f"base_model: NS/NAME between two lines of --- in {folder / 'README.md'}" in found.remedy
    (folder / "README.md").write_text("---\nbase_model: gone/base\n---\n")
    assert push(double, folder, license="mit").record.base.repo_id == "gone/base"


def test_a_licence_is_asked_for_and_can_be_given(double, trained):
    folder = trained(files={"README.md": None})
    with pytest.raises(PushRefused) as caught:
        push(double, folder)
    (found,) = caught.value.findings
    assert found.code == "license-missing"
    assert "--license apache-2.0" in found.remedy
    assert push(double, folder, license="mit").record.license == "mit"


def test_a_version_is_recorded_without_its_v_and_must_be_one(double, trained):
    assert push(double, trained(), version="v1.2.0").record.version == "1.2.0"
    for version in ("one", "1.0+local", "1!2.0"):
        with pytest.raises(UsageError):
            push(double, trained("two", seed=1), version=version)


def test_a_stale_record_is_refused(double, trained):
    folder = trained()
    push(double, folder)
    (folder / "adapter_model.safetensors").write_bytes(weights(5))
    with pytest.raises(PushRefused) as caught:
        push(double, folder, version="1.1.0")
    assert "record-stale" in codes(caught)
    assert f"lorahub record {folder} " in caught.value.findings[0].remedy


def test_a_record_that_is_none_is_refused_and_kept(double, trained):
    folder = trained(files={"lorahub.json": b"{nothing"})
    with pytest.raises(PushRefused) as caught:
        push(double, folder)
    assert "record-invalid" in codes(caught)
    assert (folder / "lorahub.json").read_bytes() == b"{nothing"


def test_a_refused_version_leaves_the_folder_as_it_was(double, trained):
    push(double, trained("one"))
    folder = trained("two", seed=3)
    before = contents(folder)
    with pytest.raises(PushRefused, match="already"):
        push(double, folder)
    assert contents(folder) == before


# ------------------------------------------------------------------------------------------------ the command line


def run(environment: dict[str, str], *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "lorahub", *map(str, arguments)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


def test_the_command_says_where_it_is_and_how_to_fetch_it(double, trained, environment):
    folder = trained()
    done = run(environment, "push", "acme/ink", folder, "--version", "1.0.0")
    assert done.returncode == 0, done.stderr
    commit = double.repo("acme/ink").tags["v1.0.0"]
    assert f"{double.endpoint}/acme/ink/tree/v1.0.0" in done.stdout
    assert "lorahub pull acme/ink@1.0.0" in done.stderr
    assert run(environment, "push", "acme/ink", folder, "--version", "1.0.0", "-q").stdout == f"{commit}\n"
    said = json.loads(run(environment, "push", "acme/ink", folder, "--version", "1.0.0", "--json").stdout)
    assert (said["pin"]["commit"], said["pin"]["why"]) == (commit, "already published as v1.0.0")
    assert environment["HF_TOKEN"] not in done.stdout + done.stderr


def test_a_base_that_is_only_named_is_told_with_the_command_that_pins_it(double, trained, environment):
    folder = trained("my out")
    arguments = ["push", "acme/ink", str(folder), "--version", "1.0.0"]
    done = run(environment, *arguments)
    assert f"lorahub record '{folder}' --base acme/base" in done.stderr


def test_a_quiet_dry_run_says_what_would_be(double, trained, monkeypatch, capsys):
    monkeypatch.setenv("LORAHUB_HUB", double.endpoint)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    with pytest.raises(SystemExit) as stop:
        main(["push", "acme/ink", str(trained()), "--version", "1.0.0", "--dry-run", "-q"])
    assert stop.value.code == 0
    assert capsys.readouterr() == ("would be published as v1.0.0 in a new repository\n", "")
    assert double.writes() == []


def test_the_hub_is_told_which_version_asks(double, trained):
    push(double, trained())
    asked = {each.headers["user-agent"].partition(";")[0] for each in double.log if each.where != "cdn"}
    assert asked == {f"lorahub/{lorahub.__version__}"}


def test_a_refusal_is_a_list_with_commands_and_no_traceback(double, trained, environment):
    folder = trained(files={"README.md": b"x", ".env": b"KEY=1"})
    done = run(environment, "push", "acme/ink", folder)
    assert done.returncode == 1
    for part in ("secret-file", ".env", "version-missing", "--version 1.0.0", "license-missing", "--license"):
        assert part in done.stderr
    assert "Traceback" not in done.stderr
    assert double.log == []


def test_a_proposal_says_how_to_merge_it(double, trained, environment):
    push(double, trained())
    done = run(environment, "push", "acme/ink", trained("two", seed=1), "--version", "1.1.0", "--create-pr")
    assert done.returncode == 0, done.stderr
    assert "hf discussions merge acme/ink 1" in done.stderr
    assert "/acme/ink/discussions/1" in done.stdout
    assert "lorahub pull acme/ink@refs/pr/1" in done.stderr


def test_publishing_imports_no_torch(double, trained, environment):
    code = "import sys, lorahub.publishing; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
    code = (
        "import sys; sys.modules['torch'] = sys.modules['numpy'] = None\n"
        "import lorahub; print(lorahub.push(sys.argv[1], 'acme/ink', version='1.0.0').pin.commit)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(trained())],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert double.repo("acme/ink").tags["v1.0.0"] == done.stdout.strip()
