"""Puts `core/` on the path: the training scripts are part of the repository, not of the wheel."""

import sys
from pathlib import Path

CORE = str(Path(__file__).parents[2] / "core")
if CORE not in sys.path:
    sys.path.insert(0, CORE)
