"""The command in this process (quick), and a working folder with a tiny model, data and a recipe."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from hf_prune.cli.main import main
from tests.job import inputs


@dataclass
class Outcome:
    """What a command left: its exit code and the two streams."""

    code: int
    out: str
    err: str


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Callable[..., Outcome]:
    """`cli("run", "recipe.yaml")`: as the shell would do it, but in this process."""
    monkeypatch.setenv("COLUMNS", "100")

    def run(*arguments: object) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["hf-prune", *map(str, arguments)])
        capfd.readouterr()
        code = 0
        try:
            main()
        except SystemExit as stop:
            code = stop.code or 0
        out, err = capfd.readouterr()
        return Outcome(code, out, err)

    return run


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
