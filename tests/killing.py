"""Work that is killed: done in child processes that kill themselves at their n-th call of the system.

For scripts that tests start with ``run_script`` (``conftest.py``): forking the process that runs the tests, which has
threads, could leave a lock held for ever in the child.
"""

from __future__ import annotations

import os
import signal
import traceback
from collections.abc import Callable, Collection


def run(work: Callable[[], object], calls: Collection[str], kill_at: int = 0) -> int:
    """Do ``work`` in a child process that is killed at its ``kill_at``-th call; 0 lets it live.

    It is killed before the call where the number is even, and after it where it is odd.

    Args:
        work: what to do.
        calls: the functions of ``os`` that count.
        kill_at: at which of them, from 1.

    Returns:
        The number of calls that it made, or minus the signal that ended it.

    Raises:
        ChildProcessError: it failed by itself; its traceback is on standard error.
    """
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        _work(work, calls, kill_at, writer)
    os.close(writer)
    status = os.waitpid(child, 0)[1]
    made = os.read(reader, 100)
    os.close(reader)
    if os.WIFSIGNALED(status):
        return -os.WTERMSIG(status)
    if not made:
        raise ChildProcessError("what was to be killed failed by itself")
    return int(made)


def _work(work: Callable[[], object], calls: Collection[str], kill_at: int, writer: int) -> None:
    """The child's side; never comes back."""
    made = 0
    real = {name: getattr(os, name) for name in calls}

    def deadly(function: Callable[..., object]) -> Callable[..., object]:
        def call(*args: object, **kwargs: object) -> object:
            nonlocal made
            made += 1
            number = made
            if number == kill_at and kill_at % 2 == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            try:
                return function(*args, **kwargs)
            finally:
                if number == kill_at:
                    os.kill(os.getpid(), signal.SIGKILL)

        return call

    try:
        for name, function in real.items():
            setattr(os, name, deadly(function))
        work()
        for name, function in real.items():
            setattr(os, name, function)
        os.write(writer, str(made).encode())
    except BaseException:  # noqa: BLE001 - the parent hears of it; a second script must not run on
        traceback.print_exc()
        os._exit(1)
    os._exit(0)
