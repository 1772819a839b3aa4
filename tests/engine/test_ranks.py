"""Several processes that make one checkpoint together: shares, the same bytes, and what happens when one dies."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace

import pytest

from lorahub.engine.writing.ranks import Ranks, Roll
from lorahub.engine.writing.staging import Staging, staging_of
from lorahub.errors import RankFailed, UsageError, WriteFailed
from lorahub.files.atomic import is_partial


def _piece(name: str, nbytes: int) -> SimpleNamespace:
    return SimpleNamespace(name=name, nbytes=nbytes)


@pytest.mark.parametrize("world", [1, 2, 3, 4, 7])
def test_every_shard_is_one_ranks_and_the_bytes_are_about_equal(world):
    pieces = [_piece(f"s{n}", 100 + (n * 37) % 11) for n in range(20)]
    shares = [Ranks(rank=rank, world=world).share(pieces) for rank in range(world)]
    assert sorted(each.name for share in shares for each in share) == sorted(each.name for each in pieces)
    loads = [sum(each.nbytes for each in share) for share in shares]
    assert max(loads) - min(loads) <= max(each.nbytes for each in pieces)
    assert [Ranks(world=world).share(reversed(pieces), rank) for rank in range(world)] == shares


def test_the_environment_says_which_rank_this_is():
    assert Ranks.from_environment({}) == Ranks()
    assert Ranks.from_environment({"RANK": "2", "WORLD_SIZE": "4"}) == Ranks(rank=2, world=4)
    for bad in ({"RANK": "x", "WORLD_SIZE": "2"}, {"RANK": "2", "WORLD_SIZE": "2"}, {"WORLD_SIZE": "0"}):
        with pytest.raises(UsageError):
            Ranks.from_environment(bad)


def test_two_processes_cannot_be_one_rank_and_one_alone_cannot_join_several(tmp_path):
    out = tmp_path / "out"
    held = Staging(out, {}, Ranks(rank=1, world=2))
    with pytest.raises(WriteFailed, match="another run"):
        Staging(out, {}, Ranks(rank=1, world=2))
    with pytest.raises(WriteFailed, match="another run"):
        Staging(out, {})
    held.release()
    Staging(out, {}).release()


def test_what_an_earlier_run_said_of_a_rank_is_not_taken_for_this_one(tmp_path):
    two = Ranks(world=2, patience=30)
    first = Roll(tmp_path, Ranks(rank=1, world=2))
    first.fail("boom")
    first.sign_off()
    roll = Roll(tmp_path, two)
    try:
        roll.check()
        assert roll.present(1) == ""
        again = Roll(tmp_path, Ranks(rank=1, world=2))
        roll.check()
        assert roll.present(1) == again.nonce
        again.fail("no space\nleft")
        again.sign_off()
        with pytest.raises(RankFailed, match="rank 1 of 2 failed: no space left"):
            roll.check()
    finally:
        roll.sign_off()


def test_a_rank_that_gives_no_sign_of_life_is_given_up(tmp_path):
    roll = Roll(tmp_path, Ranks(world=2, patience=1e-9))
    with pytest.raises(RankFailed, match="no sign of life"):
        roll.check()
    roll.sign_off()


RANKS = """
import json, os, signal, sys
from pathlib import Path

from engine import conftest as doubles
import torch
from lorahub.engine.writing.ranks import Ranks
from lorahub.engine.writing.stream import stream_merge
from lorahub.errors import LorahubError

root = Path(sys.argv[1])
base = doubles.World({f"m.{n}.weight": doubles.weights(8 + n, 8, seed=n) for n in range(8)})
adapter = {f"m.{n}.weight": doubles.lora(8 + n, 8, seed=n) for n in range(6)}
files = base.save(root / "base", shards=6)
base.stream(files, root / "expected", adapter, companions={"config.json": b"{}"})


def start(folder, rank, world, *, dies=0, spoiled=False, patience=20.0):
    child = os.fork()
    if child:
        return child
    if dies:
        real, made = os.pwrite, [0]

        def call(*args):
            made[0] += 1
            if made[0] == dies:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args)

        os.pwrite = call
    if spoiled:
        bad = adapter["m.0.weight"]
        bad.up[0] = torch.inf
    said = {}
    try:
        report = stream_merge(
            files, base.plan(adapter), doubles.bring(adapter), folder / "out", companions={"config.json": b"{}"},
            threads=1, ranks=Ranks(rank=rank, world=world, patience=patience),
        )
        said = {"changed": sum(value is not None for value in report.changes.values()), "resumed": report.resumed}
    except LorahubError as error:
        said = {"error": type(error).__name__, "message": error.message}
    (folder / f"said-{rank}.json").write_text(json.dumps(said))
    os._exit(0)


def run(folder, world, *, patience=20.0, **options):
    of_rank = [{name: value.get(rank, 0) for name, value in options.items()} for rank in range(world)]
    children = [start(folder, rank, world, patience=patience, **of_rank[rank]) for rank in range(world)]
    for child in children:
        os.waitpid(child, 0)
    found = []
    for rank in range(world):
        path = folder / f"said-{rank}.json"
        found.append(json.loads(path.read_text()) if path.exists() else None)
        path.unlink(missing_ok=True)
    return {"said": found, "out": (folder / "out").exists()}


def results(folder, world, what):
    folder.mkdir()
    if what == "together":
        yield run(folder, world)
    elif what == "killed":  # one after the other: each rank dies once, and all start again after it
        for rank in range(world):
            yield run(folder, world, dies={rank: 2 if rank else 7}, patience=2.0)
        yield run(folder, world)
    elif what == "spoiled":
        yield run(folder, world, spoiled={rank: True for rank in range(world)})
        yield run(folder, world)


asked = [("together", 2), ("together", 3), ("together", 4), ("killed", 3), ("spoiled", 2)]
print(json.dumps({f"{what} {world}": list(results(root / f"{what} {world}", world, what)) for what, world in asked}))
"""
"""Ranks as processes of their own, forked from one that has imported everything."""


@pytest.fixture(scope="module")
def started(run_script, tmp_path_factory):
    """``started(WHAT, WORLD)``: what each start of that many ranks came to, and where they worked."""
    root = tmp_path_factory.mktemp("ranks")
    found = run_script(RANKS, root)
    return lambda what, world: (found[f"{what} {world}"], root / f"{what} {world}")


def _demand_complete(tools, folder: Path) -> None:
    assert tools.contents(folder / "out") == tools.contents(folder.parent / "expected")
    assert not any(is_partial(path.name) for path in folder.iterdir())


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this platform cannot fork")
@pytest.mark.parametrize("world", [2, 3, 4])
def test_several_ranks_write_the_bytes_that_one_process_does(tools, started, world):
    (result,), folder = started("together", world)
    _demand_complete(tools, folder)
    assert result["said"][0]["changed"] == 6  # rank 0 tells of all
    assert sum(each["changed"] for each in result["said"][1:]) <= 6


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this platform cannot fork")
def test_a_rank_that_is_killed_ends_the_others_and_the_next_run_goes_on(tools, started):
    (*killed, last), folder = started("killed", 3)
    for rank, result in enumerate(killed):
        assert result["said"][rank] is None  # it died
        others = [said for number, said in enumerate(result["said"]) if number != rank]
        assert all(said["error"] == "RankFailed" for said in others)
        assert any(f"rank {rank} of 3" in said["message"] for said in others)
        assert not result["out"]
    assert last["out"]
    assert last["said"][0]["resumed"] > 0
    _demand_complete(tools, folder)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this platform cannot fork")
def test_a_rank_that_fails_tells_the_others_why(tools, started):
    (failed, again), folder = started("spoiled", 2)
    errors = sorted(said["error"] for said in failed["said"])
    assert errors == ["NotFinite", "RankFailed"]
    assert any("failed: NotFinite" in said["message"] for said in failed["said"] if said["error"] == "RankFailed")
    assert not failed["out"]
    assert again["out"]
    _demand_complete(tools, folder)


def test_the_folder_of_a_failed_run_is_known_as_unfinished(tmp_path):
    staging = Staging(tmp_path / "out", {}, Ranks(rank=0, world=2))
    staging.abandon(KeyboardInterrupt(), resumable=True)
    staging.release()
    assert is_partial(staging_of(tmp_path / "out").name)
