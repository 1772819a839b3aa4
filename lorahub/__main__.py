"""``python -m lorahub``."""

from __future__ import annotations

from lorahub.cli.main import main

if __name__ == "__main__":
    main()
