"""`kill -9`: what resumes ends bit for bit where the uninterrupted run ends."""

import json
import shutil
import sys
from functools import partial
from pathlib import Path

import pytest

from hf_prune.training.checkpoints import last_complete
from tests.processes import attempt
from tests.training.data import trainer
from tests.training.job import recipe
from tests.training.test_when_final_ddp import alike, ended, losses, same_moments


start = partial(attempt, Path(__file__).with_name("job.py"))
# of 32 steps, masks change after 3 and 8, with the latter the model becomes small; every second is saved
DEATHS = [
    ({"kill_at": 5}, 4),  # inside the schedule
    ({"kill_in": [6, "model.safetensors"]}, 4),
    ({"kill_at": 7}, 6),  # what resumes shrinks
    ({"kill_in": [10, "model.safetensors"]}, 8),  # beside, then moved; what resumes is small from the beginning
    ({"kill_in": [12, "optimizer.pt"]}, 10),
]
MORE = [
    ({"kill_at": 2}, 2),  # before the schedule
    *DEATHS,
    ({"kill_at": 13}, 12),
    ({"kill_in": [16, "trainer_state.json"]}, 14),
    ({"kill_at": 31}, 30),
]


@pytest.mark.slow
@pytest.mark.parametrize(("n_processes", "deaths"), [(1, MORE), (2, DEATHS)], ids=["alone", "two"])
def test_killed_again_and_again_it_ends_as_the_uninterrupted_run(tmp_path, n_processes, deaths):
    run = partial(start, n_processes=n_processes)
    options = {"recipe": recipe("when_final"), "training": {"save_strategy": "steps", "save_steps": 2}}
    done = run(tmp_path, "whole", json.dumps(options))
    assert done.returncode == 0, done.stderr[-4000:]
    again = {**options, "run": "killed"}
    for death, newest in deaths:
        done = run(tmp_path, "killed", json.dumps({**again, **death}))
        assert done.returncode == -9 or "Signal 9 (SIGKILL)" in done.stderr, done.stderr[-4000:]
        assert last_complete(tmp_path / "killed", n_processes).name == f"checkpoint-{newest}", death
        again["resume"] = True
    done = run(tmp_path, "killed", json.dumps(again))
    assert done.returncode == 0, done.stderr[-4000:]

    told, weights, moments = ended(tmp_path, "killed", n_processes)
    whole, expected, expected_moments = ended(tmp_path, "whole", n_processes)
    assert losses(told) == losses(whole) and len(losses(whole)) == 32
    for rank in range(n_processes):
        assert alike(weights[rank], expected[rank])
        assert same_moments(moments[rank], expected_moments[rank])
    assert told["report"]["sparsity"] == whole["report"]["sparsity"]

    other = recipe("when_final")
    other["prune"][2]["sparsity"] = 0.5
    done = run(tmp_path, "killed", json.dumps({**again, "recipe": other}))
    assert done.returncode == 1
    assert "prune.2.sparsity: the checkpoint has 0.25, this run 0.5" in done.stderr


class Snapshots:
    """The output directory as it is before each operation on a file in it: what `kill -9` could leave."""

    def __init__(self, directory, into):
        self.directory, self.into, self.taken, self.is_on = directory, into, [], True
        sys.addaudithook(self)  # for the rest of this process's life

    def __call__(self, event, args):
        is_writing = event in ("os.rename", "os.remove", "os.mkdir", "os.rmdir") or (
            event == "open" and isinstance(args[1], str) and set(args[1]) & set("wax+")
        )
        if self.is_on and is_writing and str(self.directory) in str(args[0]):
            self.take()

    def take(self):
        self.is_on = False
        self.taken.append(self.into / str(len(self.taken)))
        if self.directory.exists():
            shutil.copytree(self.directory, self.taken[-1])
        self.is_on = True


def contents(directory):
    return {path.relative_to(directory): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


@pytest.mark.parametrize("shrink", ["at_end", "when_final"])
def test_at_any_moment_the_newest_that_is_called_complete_is_whole(tmp_path, shrink):
    directory = tmp_path / "run"
    one = trainer(
        directory,
        recipe=recipe(shrink),
        num_train_epochs=4,
        max_steps=12,
        save_strategy="steps",
        save_steps=3,
        save_total_limit=1,
    )
    snapshots, whole = Snapshots(directory, tmp_path / "snapshots"), {}
    rotate = one._save_checkpoint

    def save(*args):
        rotate(*args)
        snapshots.is_on = False
        (path,) = directory.glob("checkpoint-*")
        whole[path.name] = contents(path)
        snapshots.is_on = True

    one._save_checkpoint = save
    one.train()
    snapshots.is_on = False
    assert whole.keys() == {"checkpoint-3", "checkpoint-6", "checkpoint-9", "checkpoint-12"}
    found = []
    for taken in snapshots.taken:
        if found or (taken / "checkpoint-3" / "trainer_state.json").exists():
            newest = last_complete(taken, 1)
            # but for the newest, Trainer may be deleting what is older
            assert contents(newest) == whole[newest.name], taken
            found.append(newest.name)
    assert list(dict.fromkeys(found)) == list(whole)
    assert len(found) > 30
