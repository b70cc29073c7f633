"""Writing a file so that there is the old one or the new one, never half of it."""

from __future__ import annotations

import os
from pathlib import Path


def replace_file(path: Path, text: str) -> None:
    """Write `text`, UTF-8, beside `path` and rename it; if that fails, what was there stays and nothing else is left.

    Raises:
        OSError: writing failed.
    """
    beside = path.with_name(f".{path.name}.partial")
    try:
        beside.write_text(text, encoding="utf-8")
        os.replace(beside, path)
    except OSError:
        beside.unlink(missing_ok=True)
        raise
