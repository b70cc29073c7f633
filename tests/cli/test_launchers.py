"""`hf-prune run` by the launchers that people use, on two processes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoModelForSequenceClassification

from hf_prune.checkpoint import is_complete


@pytest.mark.slow
def test_accelerate_launch(folder):
    launch = ["--multi_gpu", "--num_processes=2", "--num_machines=1", "--mixed_precision=no", "--dynamo_backend=no"]
    saving = ["training.save_strategy=steps", "training.save_steps=5"]
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("ACCELERATE_")}
    done = subprocess.run(
        [sys.executable, "-m", "accelerate.commands.launch", *launch, "-m", "hf_prune", "run", "recipe.yaml", *saving],
        cwd=folder,
        env={**inherited, "PYTHONPATH": str(Path(__file__).parents[2]), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.count("load it with") == 1, "by the first process alone"
    assert is_complete(folder / "out")
    AutoModelForSequenceClassification.from_pretrained(folder / "out")
    # each of the two wrote its own random state: they trained together, and not each for itself
    assert {path.name for path in (folder / "out" / "training").glob("**/checkpoint-5/rng_state*")} == {
        "rng_state_0.pth",
        "rng_state_1.pth",
    }
