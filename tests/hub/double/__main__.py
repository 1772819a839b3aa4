"""The double as a process of its own, for trying things by hand: ``python -m hub.double --repos FOLDER``."""

from __future__ import annotations

import argparse
import sys
import threading
from pathlib import Path

from hub.double.server import TOKEN, Double


def main() -> None:
    """Serve until interrupted; the first line on stdout is the endpoint, the second a token that writes to acme."""
    options = argparse.ArgumentParser(prog="hub.double")
    options.add_argument("--repos", type=Path, help="a folder of namespace/name folders to begin with")
    options.add_argument("--port", type=int, default=0)
    options.add_argument("--resolve-cache", action="store_true", help="small files come by a relative redirect")
    asked = options.parse_args()
    with Double(port=asked.port) as double:
        double.site.resolve_cache = asked.resolve_cache
        if asked.repos is not None:
            double.load(asked.repos)
        sys.stdout.write(f"{double.endpoint}\n{TOKEN}\n")
        sys.stdout.flush()
        try:
            threading.Event().wait()
        except KeyboardInterrupt:
            return


if __name__ == "__main__":
    main()
