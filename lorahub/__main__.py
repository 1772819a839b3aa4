"""``lorahub`` and ``python -m lorahub``: the command line, quiet also where it is interrupted before it is loaded."""

from __future__ import annotations

import sys

__all__ = ["main"]


def main() -> None:
    """Load the command line, run it, and exit; see ``lorahub.cli.main.main``."""
    try:
        from lorahub.cli.main import main as run  # noqa: PLC0415 - an interruption while it is loaded is caught
    except KeyboardInterrupt:
        sys.exit(130)
    run()


if __name__ == "__main__":
    main()
