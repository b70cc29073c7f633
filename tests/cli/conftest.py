"""A working folder with a tiny model, data and a recipe."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from tests.job import inputs


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Model and data, made once; tests get copies."""
    folder = tmp_path_factory.mktemp("made")
    inputs.text_model(folder / "model")
    inputs.texts(folder / "data.csv")
    return folder


@pytest.fixture
def folder(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with `model`, `data.csv` and `recipe.yaml` for them; the current directory."""
    work = tmp_path / "work"
    shutil.copytree(made, work)
    inputs.write_recipe(work / "recipe.yaml")
    monkeypatch.chdir(work)
    return work


def snapshot(directory: Path) -> dict[str, bytes]:
    """Every file below `directory`, by relative path."""
    return {os.path.relpath(path, directory): path.read_bytes() for path in directory.rglob("*") if path.is_file()}
