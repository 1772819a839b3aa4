"""The helper that kills: it kills where it says, counts what it says, and a failure is no death."""

from __future__ import annotations

import os
import signal

import pytest

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="this platform cannot fork")

SCRIPT = """
import json, os, sys
from pathlib import Path

from killing import run

folder = Path(sys.argv[1])


def work(place):
    place.mkdir()
    (place / "second").mkdir()
    if sys.argv[2] == "fails":
        raise RuntimeError("by itself")


ends = [run(lambda: work(folder / str(number)), ["mkdir"], number) for number in range(4)]
print(json.dumps([ends, [len([*(folder / str(number)).rglob("*")]) for number in range(4)]]))
"""


def test_work_dies_after_its_first_call_and_before_its_second_and_lives_where_there_is_no_third(run_script, tmp_path):
    ends, made = run_script(SCRIPT, tmp_path, "works")
    assert ends == [2, -signal.SIGKILL, -signal.SIGKILL, 2]
    assert made == [1, 0, 0, 1]
    assert (tmp_path / "1").exists()


def test_work_that_fails_by_itself_fails_the_script(run_script, tmp_path):
    with pytest.raises(AssertionError, match="by itself"):
        run_script(SCRIPT, tmp_path, "fails")
