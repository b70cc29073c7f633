"""Which slice of the model types a run of the tests takes: another one with each commit, so that the slices go round."""

from __future__ import annotations

import os
import subprocess
from functools import cache
from pathlib import Path


@cache
def turn() -> int:
    """The number of the run on GitHub, elsewhere of the commit: the same each time for the same commit; 0 without git."""
    if number := os.environ.get("GITHUB_RUN_NUMBER"):
        return int(number)
    counted = subprocess.run(
        ["git", "rev-list", "--count", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True, check=False
    )
    return int(counted.stdout) if counted.returncode == 0 else 0
