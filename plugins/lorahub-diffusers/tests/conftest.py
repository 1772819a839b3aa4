"""The frameworks, and tiny pipelines with an adapter, made once for each file."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parent))  # for what several test files share: they lie in no package
