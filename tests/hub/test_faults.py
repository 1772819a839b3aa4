"""A walk over faults: every request of every job fails in every way; then the job ends well, or with one typed error.

After that the job is done again without a fault, and what is there must be exactly what a run without faults leaves.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Protocol

import pytest
from hub.double import TOKEN, Action, Cut, Double, DropAfter, DropBefore, Flip, Status, Truncate
from hub.double.faults import Fault
from manifest.team import Team, write_base

import lorahub
from lorahub.errors import LorahubError
from lorahub.files.atomic import is_partial
from lorahub.hub.cache import Cache
from lorahub.hub.huggingface import HuggingFaceHub
from lorahub.names import Ref

KINDS: dict[str, Action] = {
    "500": Status(500),
    "502": Status(502),
    "503": Status(503),
    "429": Status(429, {"Retry-After": "1"}),
    "401": Status(401),
    "drop before": DropBefore(),
    "drop after": DropAfter(),
    "cut": Cut(after=1),
    "truncate": Truncate(1),
    "flip": Flip(),
}

OLD = {"adapter_config.json": b'{"seed": 0}', "adapter_model.safetensors": bytes(5000), "README.md": b"# Old\n"}
NEW = {
    "adapter_config.json": b'{"base_model_name_or_path": "acme/base", "seed": 1}',
    "adapter_model.safetensors": bytes((7 * place + 1) % 251 for place in range(5000)),
}
NAME = "acme/ink"


class Job(Protocol):
    """Something to do at a Hub."""

    def fresh(self, root: Path) -> None:
        """A server and a folder as they are before anything was done."""

    def run(self) -> None:
        """Do it."""

    def wrong(self) -> list[str]:
        """What is not as it must be once it is done."""


class Push:
    """A version with weights, onto a repository that is there."""

    before = 1

    def __init__(self, double: Double) -> None:
        self.double = double

    def fresh(self, root: Path) -> None:
        self.root = root
        self.double.store.repos.pop(NAME, None)
        self.double.store.objects.clear()
        self.prepare()
        self.folder = root / "adapter"
        self.folder.mkdir(parents=True)
        for name, data in NEW.items():
            (self.folder / name).write_bytes(data)

    def prepare(self) -> None:
        self.double.repo(NAME).commit(OLD, "v1.0.0")

    def run(self) -> None:
        hub = HuggingFaceHub(api=self.double.api(TOKEN), cache=Cache(self.root / "cache"))
        hub.push(self.folder, Ref(repo=NAME), version="1.1.0")

    def wrong(self) -> list[str]:
        repo = self.double.repo(NAME)
        found = []
        if len(repo.history()) != self.before + 1:
            found.append(f"{len(repo.history())} commits")
        tags = {"v1.1.0", "v1.0.0"} if self.before and "v1.0.0" in repo.tags else {"v1.1.0"}
        if set(repo.tags) != tags or repo.tags["v1.1.0"] != repo.branches["main"]:
            found.append(f"tags {repo.tags}")
        found += [f"bytes of {name}" for name, data in NEW.items() if repo.files().get(name) != data]
        return found


class FirstPush(Push):
    """To a repository that is not there: the hub's own commit comes first."""

    def prepare(self) -> None:
        """Nothing is there."""


class Pull:
    """All files of a version."""

    def __init__(self, double: Double) -> None:
        self.double = double
        double.repo(NAME).commit(OLD | NEW, "v1.1.0")

    def fresh(self, root: Path) -> None:
        self.root, self.got = root, root

    def run(self) -> None:
        hub = HuggingFaceHub(api=self.double.api(TOKEN), cache=Cache(self.root / "cache"))
        self.got = hub.pull(hub.resolve(Ref.parse(f"{NAME}@1.1.0")))

    def wrong(self) -> list[str]:
        there = files_of(self.got)
        found = [] if there == OLD | NEW else [f"pulled files: {sorted(there)}"]
        return found + partial(self.root / "cache")


class LockAndSync:
    """A project with one adapter and its base, both at the Hub."""

    expected: dict[str, bytes] | None = None

    def __init__(self, double: Double, patch: pytest.MonkeyPatch, root: Path) -> None:
        self.patch = patch
        patch.setenv("LORAHUB_HUB", double.endpoint)
        patch.setenv("HF_TOKEN", TOKEN)
        write_base(root / "project" / "base")
        self.team = Team(folder=root / "project", hub=root / "hub", base=root / "project" / "base")
        self.weights = files_of(self.team.adapter(root / "made", seed=1))
        double.repo(NAME).commit(self.weights, "v1.2.0")
        double.repo("acme/base").commit(files_of(self.team.base))
        self.team.write(f'[adapters]\nink = "{NAME}@~=1.2"\n')

    def fresh(self, root: Path) -> None:
        self.root, self.folder = root, root / "project"
        shutil.copytree(self.team.folder, self.folder)
        self.patch.chdir(self.folder)
        self.patch.setenv("LORAHUB_CACHE", str(root / "cache"))

    def run(self) -> None:
        lorahub.lock()
        lorahub.sync()

    def wrong(self) -> list[str]:
        lock = (self.folder / "lorahub.lock").read_bytes()
        installed = files_of(self.folder / "adapters" / "ink")
        self.expected = self.expected or {"lock": lock}
        found = [] if lock == self.expected["lock"] else ["bytes of the lock"]
        found += [f"bytes of {name}" for name, data in self.weights.items() if installed.get(name) != data]
        return found + partial(self.root)


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def partial(folder: Path) -> list[str]:
    return [f"left over: {path.name}" for path in folder.rglob("*") if is_partial(path.name)]


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = SimpleNamespace(
        sleep=lambda _: None, monotonic=time.monotonic, time=time.time, perf_counter=time.perf_counter
    )
    for module in ("place", "download"):
        monkeypatch.setattr(f"lorahub.hub.huggingface.{module}.time", clock)
    monkeypatch.setattr("huggingface_hub.utils._http.time", clock)


@pytest.fixture
def job(request: pytest.FixtureRequest, double: Double, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Job:
    jobs: dict[str, Callable[[], Job]] = {
        "push": lambda: Push(double),
        "first push": lambda: FirstPush(double),
        "pull": lambda: Pull(double),
        "lock and sync": lambda: LockAndSync(double, monkeypatch, tmp_path / "team"),
    }
    return jobs[request.param]()


NAMES = ("push", "first push", "pull", "lock and sync")
JOBS = pytest.mark.parametrize("job", NAMES, indirect=True)
PAIRS = [
    pytest.param(job, kind, id=f"{kind}-{job}", marks=[] if (row + column) % 2 else [pytest.mark.slow])
    for row, job in enumerate(NAMES)
    for column, kind in enumerate(KINDS)
]
"""Every job with every kind of fault; by default each job with every other one, so that every kind meets two jobs."""


def clean(job: Job, double: Double, root: Path) -> list[str]:
    """The requests of a run without faults."""
    job.fresh(root)
    double.log.clear()
    job.run()
    assert job.wrong() == []
    return [f"{each.where} {each.method} {each.path}" for each in double.log]


def walked(job: Job, double: Double, root: Path, faults: list[Fault]) -> list[str]:
    """What went wrong in a run with these faults, and in one after it without."""
    job.fresh(root)
    double.faults[:] = faults
    found = []
    try:
        job.run()
        found += [f"after success: {each}" for each in job.wrong()]
    except LorahubError as error:
        if error.exit_code not in range(1, 7) or not str(error).strip():
            found.append(f"an error without a code or message: {error!r}")
    except Exception as error:  # noqa: BLE001 - any other error is what this looks for
        found.append(f"an error that is not ours: {error!r}")
    double.faults.clear()
    try:
        job.run()
        found += [f"after the second run: {each}" for each in job.wrong()]
    except Exception as error:  # noqa: BLE001 - the same
        found.append(f"the second run failed: {error!r}")
    shutil.rmtree(root, ignore_errors=True)
    return found


@pytest.mark.parametrize(("job", "kind"), PAIRS, indirect=["job"])
def test_a_fault_at_any_request_leaves_nothing_wrong(job: Job, kind: str, double: Double, tmp_path: Path) -> None:
    requests = clean(job, double, tmp_path / "clean")
    found = []
    for place, request in enumerate(requests):
        fault = Fault(KINDS[kind], after=place)
        wrong = walked(job, double, tmp_path / f"run-{place}", [fault])
        found += [f"{kind} at {place} ({request}): {each}" for each in wrong]
        assert fault.hits == 1, request
    assert not found, "\n".join([f"{len(requests)} runs, {len(found)} wrong", *found])


@pytest.mark.slow
@JOBS
def test_two_faults_at_any_requests_leave_nothing_wrong(job: Job, double: Double, tmp_path: Path) -> None:
    requests = clean(job, double, tmp_path / "clean")
    found, runs = [], count()
    for place, request in enumerate(requests):
        for number, (kind, action) in enumerate(KINDS.items()):
            other = list(KINDS)[(number + place + 1) % len(KINDS)]
            for later in (1, 3):
                faults = [Fault(action, after=place), Fault(KINDS[other], after=place + later)]
                wrong = walked(job, double, tmp_path / f"run-{next(runs)}", faults)
                found += [f"{kind} at {place} ({request}), {other} {later} later: {each}" for each in wrong]
    assert not found, "\n".join([f"{next(runs)} runs, {len(found)} wrong", *found])
