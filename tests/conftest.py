"""For all tests: the command in this process, which is quick; and a model type that the Transformers at hand does not know, or that
can't be built with it, is skipped."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import transformers
from transformers import CONFIG_MAPPING


def pytest_collection_modifyitems(items):
    typed = [item for item in items if "model_type" in getattr(getattr(item, "callspec", None), "params", ())]
    if not typed:
        return
    from tests.reach.zoo import REASONS  # seconds that other tests need not wait

    for item in typed:
        model_type = item.callspec.params["model_type"]
        why = REASONS.get(model_type)
        if model_type not in CONFIG_MAPPING:
            why = f"Transformers {transformers.__version__} does not know it"
        if why:
            item.add_marker(pytest.mark.skip(reason=f"{model_type}: {why}"))


def pytest_collection_finish():
    """Trainer collects garbage at each start: what the tests are made of need not be looked through each time."""
    gc.collect()
    gc.freeze()


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
        from hf_prune.cli.main import main  # seconds that other tests need not wait

        code = 0
        try:
            main()
        except SystemExit as stop:
            code = stop.code or 0
        out, err = capfd.readouterr()
        return Outcome(code, out, err)

    return run
