"""Pulling at once from many processes, killed, on a full disk, into a read-only cache, and without a network."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hub.double import TOKEN, Hold, Status

from lorahub.errors import Offline
from lorahub.hub.cache import Cache
from lorahub.hub.huggingface import HuggingFaceHub
from lorahub.names import Ref

WEIGHTS = bytes(range(251)) * 16_000  # about 4 MiB
INK = {"adapter_config.json": b'{"peft_type": "LORA"}', "adapter_model.safetensors": WEIGHTS, "README.md": b"# Ink\n"}
CHUNK = 1 << 20

Start = Callable[..., "subprocess.Popen[str]"]

pytestmark = pytest.mark.skipif(os.name == "nt", reason="this platform has no SIGKILL and no limits of a process")


@pytest.fixture
def repo(double):
    repo = double.repo("acme/ink")
    repo.commit(INK, "v1.0.0")
    return repo


@pytest.fixture
def start(environment) -> Start:
    """Start Python on a script with arguments, as a user of the double."""

    def start(script: str, *arguments: object, **options: object) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-c", script, *map(str, arguments)],
            env={**environment, **options.pop("env", {})},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            **options,
        )

    return start


def outcome(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=60)
    return process.returncode, out, err


def files_in(folder: Path | str) -> dict[str, bytes]:
    place = Path(folder)
    return {path.relative_to(place).as_posix(): path.read_bytes() for path in place.rglob("*") if path.is_file()}


def entries(root: Path) -> list[Path]:
    """What may be taken for a pulled folder."""
    return [place for place in root.rglob("pin.json") if not place.parent.name.endswith(".partial")]


CLI = "import sys; from lorahub.cli.main import main; main(sys.argv[1:])"


# ------------------------------------------------------------------------------------------------------ at once


def test_fifty_pulls_at_once_fetch_each_file_once_and_all_have_it(double, repo, start, environment):
    root = Path(environment["LORAHUB_CACHE"])
    processes = [start(CLI, "pull", "acme/ink@1.0.0", "-q") for _ in range(4)]

    def pull(_: int) -> Path:
        hub = HuggingFaceHub(api=double.api(TOKEN), cache=Cache(root))
        return hub.pull(hub.resolve(Ref.parse("acme/ink@1.0.0")))

    with ThreadPoolExecutor(max_workers=46) as pool:
        folders = set(pool.map(pull, range(46)))
    results = [outcome(process) for process in processes]
    assert [code for code, _, _ in results] == [0] * 4, results
    assert folders | {Path(out.strip()) for _, out, _ in results} == folders
    (folder,) = folders
    assert files_in(folder) == INK
    assert len(entries(root)) == 1
    assert double.bytes_of("adapter_model.safetensors") == len(WEIGHTS)
    assert not list(root.rglob("*.partial"))


# ------------------------------------------------------------------------------------------------------- deaths

DIES = """
import os, signal, sys
from lorahub.fetching import pull
at = int(sys.argv[2])
def told(done, total):
    if done >= at:
        os.kill(os.getpid(), signal.SIGKILL)
pull(sys.argv[1], progress=told)
"""


@pytest.mark.parametrize("at", [1, 1_500_000, len(WEIGHTS), sum(map(len, INK.values()))])
def test_a_pull_that_was_killed_goes_on_where_it_stopped(double, repo, start, environment, at):
    root = Path(environment["LORAHUB_CACHE"])
    assert outcome(start(DIES, "acme/ink@1.0.0", at))[0] == -signal.SIGKILL
    assert entries(root) == []
    here = sum(path.stat().st_size for path in root.rglob("adapter_model.safetensors"))
    double.log.clear()
    code, out, err = outcome(start(CLI, "pull", "acme/ink@1.0.0", "-q"))
    assert (code, err) == (0, "")
    assert files_in(out.strip()) == INK
    assert double.bytes_of("adapter_model.safetensors") <= len(WEIGHTS) - here
    assert here >= min(at, len(WEIGHTS)) - len(INK["README.md"]) - len(INK["adapter_config.json"]) - CHUNK


def test_a_pull_that_is_killed_again_and_again_gets_there_with_little_asked_for_twice(double, repo, start, environment):
    root = Path(environment["LORAHUB_CACHE"])
    asked = 0
    for at in (1_200_000, 2_300_000, 3_400_000):
        before = sum(path.stat().st_size for path in root.rglob("adapter_model.safetensors"))
        assert outcome(start(DIES, "acme/ink@1.0.0", at))[0] == -signal.SIGKILL
        asked += sum(path.stat().st_size for path in root.rglob("adapter_model.safetensors")) - before
    double.log.clear()
    code, out, _ = outcome(start(CLI, "pull", "acme/ink@1.0.0", "-q"))
    assert (code, files_in(out.strip())) == (0, INK)
    assert asked + double.bytes_of("adapter_model.safetensors") <= len(WEIGHTS) + CHUNK


@pytest.mark.parametrize("part", ["/revision/", "adapter_model"])
def test_a_pull_killed_while_it_waits_for_an_answer_leaves_nothing_in_the_way(double, repo, start, environment, part):
    hold = double.fault(Hold(), part).action
    process = start(CLI, "pull", "acme/ink@1.0.0", "-q")
    assert hold.reached.wait(60)
    process.kill()
    process.communicate()
    hold.release()
    code, out, err = outcome(start(CLI, "pull", "acme/ink@1.0.0", "-q"))
    assert (code, err) == (0, "")
    assert files_in(out.strip()) == INK
    assert len(entries(Path(environment["LORAHUB_CACHE"]))) == 1


KILLS = """
import json, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from killing import run
from huggingface_hub import HfApi
from lorahub.hub.cache import Cache, pin_of
from lorahub.hub.huggingface import HuggingFaceHub
from lorahub.names import Ref
commit, root, CALLS = sys.argv[2], Path(sys.argv[3]), ["replace", "rename", "fsync", "mkdir", "unlink", "write"]
ref = Ref.parse(f"acme/ink@{commit}")
def pull(cache):
    hub = HuggingFaceHub(cache=Cache(cache))
    return hub.pull(hub.resolve(ref))
made, bad = run(lambda: pull(root / "count"), CALLS), []
for at in range(1, made + 1, max(made // 8, 1)):
    cache = root / str(at)
    run(lambda: pull(cache), CALLS, at)
    for place in cache.rglob("pin.json"):
        if not place.parent.name.endswith(".partial") and sum(1 for _ in (place.parent / "ink").iterdir()) != 3:
            bad.append(at)
    if run(lambda: pull(cache), CALLS) < 0 or list(cache.rglob("*.partial")):
        bad.append(at)
print(json.dumps({"made": made, "bad": bad}))
"""


def test_a_pull_killed_at_any_change_of_the_disk_leaves_no_half_folder_and_runs_again(double, repo, start, tmp_path):
    code, out, err = outcome(start(KILLS, Path(__file__).parent.parent, repo.tags["v1.0.0"], tmp_path / "caches"))
    assert code == 0, err
    told = json.loads(out)
    assert told["made"] > 12
    assert told["bad"] == []


# -------------------------------------------------------------------------------------------------------- disks


def limit_files(nbytes: int) -> Callable[[], None]:
    """Makes every file of the child as a full disk would, after so many bytes."""

    def limit() -> None:
        import resource

        resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, nbytes))

    return limit


def test_a_disk_that_takes_no_more_is_one_line_and_the_rest_comes_later(double, repo, start, environment):
    code, out, err = outcome(start(CLI, "pull", "acme/ink@1.0.0", preexec_fn=limit_files(2_000_000)))
    assert (code, out) == (1, "")
    assert "cannot be written" in err
    assert "Hint:" in err
    assert "Traceback" not in err
    assert entries(Path(environment["LORAHUB_CACHE"])) == []
    code, out, _ = outcome(start(CLI, "pull", "acme/ink@1.0.0", "-q"))
    assert (code, files_in(out.strip())) == (0, INK)


READ_ONLY = """
import os, sys
from pathlib import Path
from lorahub.cli.main import main
try:
    main(["pull", "acme/ink@1.0.0", "-q", "--dry-run"])  # imports what another user may not be able to
except SystemExit:
    print(flush=True)
for path in [root := Path(os.environ["LORAHUB_CACHE"]), *root.rglob("*")]:
    path.chmod(0o555 if path.is_dir() else 0o444)
if os.getuid() == 0:
    os.setgroups([]); os.setgid(65534); os.setuid(65534)
try:
    (root / "probe").write_bytes(b"")
except OSError:
    main(sys.argv[1:])
sys.exit(99)
"""


def test_a_cache_that_cannot_be_written_serves_what_it_holds_and_says_what_it_cannot(double, repo, start):
    import tempfile

    repo.commit(INK | {"README.md": b"two"}, "v2.0.0")
    root = Path(tempfile.mkdtemp())  # where another user may look, unlike where tests write
    try:
        root.chmod(0o755)
        env = {"LORAHUB_CACHE": str(root)}
        assert outcome(start(CLI, "pull", "acme/ink@1.0.0", env=env))[0] == 0
        for asked in (f"acme/ink@{repo.tags['v1.0.0']}", "acme/ink@1.0.0"):
            code, out, err = outcome(start(READ_ONLY, "pull", asked, "-q", env=env))
            out = out.partition("\n\n")[2]
            if code == 99:
                pytest.skip("this file system or user is not bound by permissions")
            assert (code, err) == (0, "")
            assert files_in(out.strip()) == INK
        code, out, err = outcome(start(READ_ONLY, "pull", "acme/ink@2.0.0", env=env))
        assert (code, out.partition("\n\n")[2]) == (1, "")
        assert "cannot be written" in err
        assert "Traceback" not in err
    finally:
        for path in [root, *root.rglob("*")]:
            path.chmod(0o700)
        shutil.rmtree(root)


# ------------------------------------------------------------------------------------------------------ offline

NO_SOCKETS = """
import socket, sys
def refuse(*_, **__):
    raise AssertionError("a socket was asked for")
socket.socket.connect = socket.create_connection = socket.getaddrinfo = refuse
from lorahub.cli.main import main
main(sys.argv[1:])
"""


def test_what_is_pinned_and_pulled_opens_no_socket(double, repo, start):
    code, out, _ = outcome(start(CLI, "pull", "acme/ink@1.0.0", "-q"))
    assert code == 0
    double.log.clear()
    pinned = f"acme/ink@{repo.tags['v1.0.0']}"
    for env, asked in [({}, pinned), ({"HF_HUB_OFFLINE": "1"}, pinned), ({"HF_HUB_OFFLINE": "1"}, "acme/ink@~=1.0")]:
        assert outcome(start(NO_SOCKETS, "pull", asked, "-q", env=env)) == (0, out, "")
    code, _, err = outcome(start(NO_SOCKETS, "pull", "acme/other", env={"HF_HUB_OFFLINE": "1"}))
    assert code == 6
    assert "nothing of it was pulled" in err
    assert double.log == []


def test_offline_a_folder_that_lost_files_is_an_error_that_names_them(double, repo, hub, offline):
    folder = hub.pull(hub.resolve(Ref.parse("acme/ink")))
    (folder / "adapter_model.safetensors").unlink()
    (folder / "README.md").write_bytes(b"")
    double.log.clear()
    pin = offline.resolve(Ref.parse("acme/ink"))
    with pytest.raises(Offline, match=r"of 3 files there is no whole README\.md, adapter_model\.safetensors"):
        offline.pull(pin)
    assert double.log == []
    assert files_in(hub.pull(hub.resolve(Ref.parse("acme/ink")))) == INK


def test_of_a_folder_that_lost_a_file_only_that_file_is_fetched_again(double, repo, hub):
    folder = hub.pull(hub.resolve(Ref.parse("acme/ink")))
    (folder / "README.md").unlink()
    (folder / "adapter_config.json").write_bytes(b"x" * len(INK["adapter_config.json"]))
    double.log.clear()
    assert hub.pull(hub.resolve(Ref.parse("acme/ink"))) == folder
    assert files_in(folder) == INK
    assert sorted(each.path.rpartition("/")[2] for each in double.seen("/resolve/")) == [
        "README.md",
        "adapter_config.json",
    ]


def test_what_lies_in_the_place_of_a_file_is_cleared_away(double, repo, hub, tmp_path):
    folder = hub.pull(hub.resolve(Ref.parse("acme/ink")))
    (folder / "README.md").unlink()
    (folder / "README.md" / "deep").mkdir(parents=True)
    (folder / "adapter_config.json").unlink()
    (tmp_path / "secret").write_bytes(INK["adapter_config.json"])
    (folder / "adapter_config.json").symlink_to(tmp_path / "secret")
    assert files_in(hub.pull(hub.resolve(Ref.parse("acme/ink")))) == INK
    assert not (folder / "adapter_config.json").is_symlink()


def test_offline_what_a_pull_left_unfinished_is_told_too(double, repo, hub, offline, cache):
    pin = hub.resolve(Ref.parse("acme/ink"))
    double.fault(Status(403), "adapter_model", times=None)
    with pytest.raises(Exception, match="does not give access"):
        hub.pull(pin)
    with pytest.raises(Offline, match=r"no whole adapter_model\.safetensors\)"):
        offline.pull(pin)


def test_a_changed_file_of_the_cache_is_seen_and_mended(double, repo, hub):
    ref = Ref.parse(f"acme/ink@{repo.tags['v1.0.0']}")
    folder = hub.pull(hub.resolve(ref))
    (folder / "adapter_model.safetensors").write_bytes(WEIGHTS[:-1] + b"\x00")
    assert files_in(hub.pull(hub.resolve(ref))) == INK


@pytest.mark.parametrize("answer", [None, Status(401), Status(403)], ids=["good", "refused", "forbidden"])
def test_the_token_is_in_no_output_with_debugging_on(double, repo, start, tmp_path, answer):
    if answer is not None:
        double.fault(answer, "adapter_model", times=None)
    pulling = start(CLI, "pull", "acme/ink@1.0.0", env={"HF_DEBUG": "1", "PYTHONDEVMODE": "1"})
    code, out, err = outcome(pulling)
    assert (code == 0) == (answer is None)
    assert "curl" in err  # it was on
    assert TOKEN not in out + err
    for path in tmp_path.rglob("*"):
        assert not path.is_file() or TOKEN.encode() not in path.read_bytes()
