"""What each threat is met by: a table of the tests that show it, and the ones that need whole commands.

The table knows names of tests, and nothing of what they do.
"""

from __future__ import annotations

import ast
import json
import logging
import subprocess
import sys
from pathlib import Path

import pytest
from hub.bases import query_lora
from hub.double import TOKEN, Double
from hub.double.faults import DropBefore, Status, Swap

from lorahub.cli.main import main

TESTS = Path(__file__).parents[1]

THREATS: dict[str, tuple[str, ...]] = {
    "pickles": (
        "hostile/test_pickles.py::test_a_pickle_that_asks_for_code_is_refused_by_the_name_it_asks_for",
        "hub/test_contents.py::test_pickled_weights_are_named_as_the_reason",
        "hub/test_contents.py::test_a_base_with_pickles_alone_is_refused",
        "hub/test_threats.py::test_a_repository_of_pickles_alone_is_never_downloaded",
    ),
    "remote code": ("hub/test_threats.py::test_a_config_that_names_code_and_paths_opens_neither",),
    "path traversal": (
        "hub/test_huggingface_double.py::test_a_hostile_name_in_the_listing_is_refused_before_anything_is_fetched",
        "hub/test_contents.py::test_a_hostile_name_that_would_be_written_is_refused",
    ),
    "hostile ETag": (
        "hub/test_huggingface_double.py::test_hostile_headers_decide_no_path",
        "hub/test_read_errors.py::test_hostile_headers_place_nothing_outside_the_cache",
    ),
    "wrong bytes": (
        "hub/test_huggingface_double.py::test_a_flipped_byte_of_the_right_length_is_refused_and_nothing_is_kept",
    ),
    "links": (
        "hub/test_push.py::test_links_secrets_and_unknown_files_are_refused_all_at_once_without_a_request",
        "hub/test_push.py::test_a_file_that_becomes_a_link_during_the_push_is_not_followed",
    ),
    "stray secrets": (
        "hub/test_push.py::test_links_secrets_and_unknown_files_are_refused_all_at_once_without_a_request",
        "hub/test_contents.py::test_a_secret_is_found_wherever_it_hides",
        "hub/test_folder_hub.py::test_publishing_can_be_switched_off",
    ),
    "safetensors bombs": (
        "hostile/test_headers.py::test_a_malformed_file_is_one_header_error_that_says_what_is_wrong_and_what_now",
        "hostile/test_headers.py::test_no_header_within_the_limits_makes_the_reader_use_much_memory",
    ),
    "remote headers": ("hostile/test_headers.py::test_random_bytes_are_refused_or_true",),
    "rank bombs": (
        "hostile/test_adapters.py::test_all_of_them_take_little_memory_and_time",
        "hub/test_threats.py::test_bombs_in_a_config_take_little_memory",
    ),
    "slow patterns": ("hub/test_threats.py::test_bombs_in_a_config_take_little_memory",),
    "NaN weights": (
        "hub/test_push_folders.py::test_weights_that_are_not_finite_are_named",
        "cli/test_cli.py::test_a_nan_adapter_is_refused_and_nothing_is_written",
    ),
    "YAML and JSON bombs": (
        "cards/test_metadata.py::test_values_that_stand_for_exponentially_much_are_refused_before_they_are_built",
        "hub/test_threats.py::test_a_card_of_aliases_stops_no_command",
    ),
    "token leakage": (
        "hub/test_read_processes.py::test_the_token_is_in_no_output_with_debugging_on",
        "hub/test_push.py::test_no_failure_shows_the_token_or_comes_as_an_error_of_the_client",
        "manifest/test_on_the_hub.py::test_a_token_is_in_no_lock_and_no_output",
        "hub/test_threats.py::test_no_command_shows_or_keeps_the_token",
    ),
    "token to other origins": (
        "hub/test_read_errors.py::test_a_redirect_to_another_origin_takes_no_token_along",
        "hub/test_remote_inspect.py::test_no_token_reaches_another_host_and_the_hub_gets_it",
        "hub/test_huggingface_double.py::test_an_unencrypted_endpoint_elsewhere_is_refused",
    ),
    "moved tags": (
        "hub/test_read_noticed.py::test_the_command_line_refuses_a_moved_version_with_exit_code_3_and_the_way_on",
        "hub/test_read_noticed.py::test_a_commit_that_is_gone_is_its_own_finding_with_a_remedy",
        "manifest/test_on_the_hub.py::test_a_tag_that_moved_behind_the_lock_is_not_followed",
        "manifest/test_on_the_hub.py::test_a_commit_that_is_gone_is_installed_from_the_cache_alone",
    ),
    "base as a path": (
        "hub/test_check_bases.py::test_a_claimed_base_that_is_a_path_is_never_offered",
        "hub/test_threats.py::test_a_config_that_names_code_and_paths_opens_neither",
    ),
    "terminal escapes": (
        "cli/test_cli.py::test_control_characters_in_names_are_escaped",
        "hub/test_search.py::test_answers_that_name_no_repository_are_left_out_and_the_rest_is_made_safe",
        "hub/test_push_reconcile.py::test_the_words_of_a_foreign_commit_cannot_drive_the_terminal",
        "hub/test_threats.py::test_words_of_a_repository_cannot_drive_the_terminal",
    ),
}


@pytest.mark.parametrize("threat", THREATS)
def test_every_threat_has_the_tests_that_the_table_names(threat: str) -> None:
    for name in THREATS[threat]:
        path, function = name.split("::")
        defined = {
            node.name
            for node in ast.walk(ast.parse((TESTS / path).read_text(encoding="utf-8")))
            if isinstance(node, ast.FunctionDef)
        }
        assert function in defined, name


@pytest.fixture
def project(double: Double, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current folder of somebody whose hub is the double and whose token is set."""
    folder = tmp_path / "project"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setenv("LORAHUB_HUB", double.endpoint)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    return folder


def run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as stop:
        main(list(arguments))
    return int(stop.value.code or 0)


COMMANDS = {
    "pull": ("pull", "acme/ink@1.0.0"),
    "push": ("push", "acme/new", "{adapter}", "--version", "1.0.0"),
    "search": ("search", "ink"),
    "versions": ("versions", "acme/ink"),
    "inspect": ("inspect", "acme/ink@1.0.0"),
    "check": ("check", "acme/ink@1.0.0", "--base", "acme/base"),
    "record": ("record", "{adapter}", "--base", "acme/base"),
    "merge": ("merge", "acme/ink@1.0.0", "--base", "acme/base", "--plan"),
    "add": ("add", "acme/ink@1.0.0", "--name", "two"),
    "lock": ("lock", "--upgrade"),
    "sync": ("sync",),
    "outdated": ("outdated",),
}
FAULTS = {
    "none": None,
    "401": Status(401),
    "403": Status(403),
    "500": Status(500),
    "dropped": DropBefore(),
    "garbage": Swap(b"\x00<html>{"),
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("command", COMMANDS)
def test_no_command_shows_or_keeps_the_token(
    double: Double,
    recorded: Path,
    project: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
    command: str,
    fault: str,
) -> None:
    double.repo("acme/ink").commit({path.name: path.read_bytes() for path in recorded.iterdir()}, "v1.0.0")
    if command in ("add", "lock", "sync", "outdated"):
        assert run("add", "acme/ink@1.0.0") == 0
    capsys.readouterr()
    double.log.clear()
    if (action := FAULTS[fault]) is not None:
        double.fault(action, "", times=None)
    for name in ("lorahub", "huggingface_hub"):
        caplog.set_level(logging.DEBUG, name)
    code = run(*(part.format(adapter=recorded) for part in COMMANDS[command]))
    said = capsys.readouterr()
    records = [each.getMessage() for each in caplog.records if each.name.startswith(("lorahub", "huggingface_hub"))]
    assert TOKEN not in "\n".join([said.out, said.err, *records])
    assert "Traceback" not in said.err
    kept = [path for path in tmp_path.rglob("*") if path.is_file() and TOKEN.encode() in path.read_bytes()]
    assert kept == []
    if fault == "none":
        assert code in (0, 3), said.err
        assert double.log or command == "sync"


def test_a_repository_of_pickles_alone_is_never_downloaded(
    double: Double, project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    marker = project / "marker"
    pickled = b"cposix\nsystem\n(S'touch " + str(marker).encode() + b"'\ntR."
    double.repo("acme/ink").commit(
        {"adapter_model.bin": pickled, "adapter_config.json": query_lora()["adapter_config.json"]}, "v1.0.0"
    )
    codes = {run("pull", "acme/ink@1.0.0"), run("inspect", "acme/ink@1.0.0")}
    assert codes <= {4, 6}, capsys.readouterr().err
    assert double.bytes_of(".bin") == 0
    assert not marker.exists()


def _with_config(**changed: object) -> dict[str, bytes]:
    files = query_lora()
    config = json.loads(files["adapter_config.json"]) | changed
    changed_files: dict[str, bytes] = files | {"adapter_config.json": json.dumps(config).encode()}
    return changed_files


def _inspected(
    environment: dict[str, str], double: Double, folder: Path, watch: str
) -> subprocess.CompletedProcess[str]:
    """``inspect`` in a process of its own that runs ``watch`` first and prints ``TOLD`` as its last line."""
    script = (
        f"import os, sys\nTOLD = ''\n{watch}\n"
        "from lorahub.cli.main import main\n"
        "try:\n    main(['inspect', 'acme/ink@1.0.0'])\n"
        "except SystemExit as stop:\n"
        "    lines = open('/proc/self/status').read().splitlines() if os.path.exists('/proc/self/status') else []\n"
        "    peak = [line.split()[1] for line in lines if line.startswith('VmHWM')]\n"  # its own, not its parent's
        "    print('END', stop.code, *peak or [0], 'evil_code' in sys.modules, TOLD, sep='|')\n"
    )
    return subprocess.run(
        [sys.executable, "-c", script],
        env=environment | {"LORAHUB_HUB": double.endpoint},
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_a_config_that_names_code_and_paths_opens_neither(
    double: Double, environment: dict[str, str], project: Path
) -> None:
    outside = project / "inside" / "deep"
    outside.mkdir(parents=True)
    (project / "config.json").write_text("{}")
    (outside / "evil_code.py").write_text("raise SystemExit(99)")
    hostile = {"base_model_class": "Evil", "parent_library": "evil_code"}
    files = _with_config(
        base_model_name_or_path="../..", auto_mapping=hostile, auto_map={"AutoModel": "evil_code.Evil"}
    )
    double.repo("acme/ink").commit(files, "v1.0.0")
    watch = (
        "def hook(event, arguments):\n"
        "    global TOLD\n"
        f"    if event == 'open' and str(arguments[0]).startswith({str(project)!r}): TOLD = str(arguments[0])\n"
        "sys.addaudithook(hook)"
    )
    ended = _inspected(environment, double, outside, watch).stdout.splitlines()[-1].split("|")
    assert ended[0] == "END"
    assert ended[3:] == ["False", ""]


@pytest.mark.parametrize(
    "changed", [{"r": 500_000_000}, {"target_modules": "(a+)+$" + "|(.*a){30}"}], ids=["rank", "re"]
)
def test_bombs_in_a_config_take_little_memory(
    double: Double, environment: dict[str, str], project: Path, changed: dict[str, object]
) -> None:
    double.repo("acme/ink").commit(_with_config(**changed), "v1.0.0")
    done = _inspected(environment, double, project, "")
    ended = done.stdout.splitlines()[-1].split("|")
    assert ended[1] in {"0", "3", "4", "5"}, done.stderr
    if not int(ended[2]):
        pytest.skip("this platform does not tell how much memory a process took at most")
    assert int(ended[2]) < 400 * 1024


BOMB = ("---\na: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{new}: &{new} [{','.join([f'*{old}'] * 9)}]\n" for old, new in zip("abcdefgh", "bcdefghi", strict=True)
) + "---\n# Ink\n").encode()  # fmt: skip


def test_a_card_of_aliases_stops_no_command(
    double: Double,
    project: Path,
    recorded: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    files = {path.name: path.read_bytes() for path in recorded.iterdir()} | {"README.md": BOMB}
    monkeypatch.setattr("hub.double.store.card_data", lambda _: {})  # the double would expand the aliases itself
    double.repo("acme/ink").commit(files, "v1.0.0")
    for arguments in (("inspect",), ("check", "--base", "acme/base"), ("pull",)):
        assert run(arguments[0], "acme/ink@1.0.0", *arguments[1:]) in (0, 3), capsys.readouterr().err


def test_words_of_a_repository_cannot_drive_the_terminal(
    double: Double, project: Path, recorded: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    title = "\x1b]0;owned\x07"
    files = _with_config(base_model_name_or_path=f"acme/{title}")
    files["README.md"] = b'---\nlibrary_name: "\\e]0;owned\\a"\ntags: ["\\e[2J"]\n---\n# \x1b]0;owned\x07\n'
    repo = double.repo("acme/ink")
    repo.branches[f"odd{title}"] = repo.commit(files, "v1.0.0")
    for arguments in (("inspect", "acme/ink@1.0.0"), ("versions", "acme/ink"), ("search", "ink"), ("pull", "acme/ink")):
        run(*arguments)
        said = capsys.readouterr()
        assert "\x1b" not in said.out + said.err, arguments
        assert "\x07" not in said.out + said.err, arguments
