"""Programs of the tests in processes of their own: alone, or several by torchrun over gloo."""

import os
import subprocess
import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch
from accelerate import PartialState


ROOT = Path(__file__).parents[1]


def launch(program: Path, *arguments: object, n_processes: int = 1, timeout: float = 300) -> None:
    """Run a program to its end, one thread a process."""
    done = attempt(program, *arguments, n_processes=n_processes, timeout=timeout)
    assert done.returncode == 0, done.stderr[-4000:]


def attempt(
    program: Path, *arguments: object, n_processes: int = 1, timeout: float = 300
) -> subprocess.CompletedProcess[str]:
    """The same for one that may fail, or be killed: what became of it."""
    inherited = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    ours = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    command = [sys.executable, str(program), *map(str, arguments)]
    if n_processes > 1:
        command[1:1] = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={n_processes}"]
    return subprocess.run(
        command, env=inherited | ours, cwd=ROOT, capture_output=True, text=True, check=False, timeout=timeout
    )


def run(main: Callable[[int, int], None]) -> None:
    """What a program does: `main(rank, world)` as one of the processes that `launch` started."""
    torch.set_num_threads(1)
    is_one_of_several = "RANK" in os.environ
    if is_one_of_several:
        PartialState(cpu=True, timeout=timedelta(seconds=int(os.environ.get("HF_PRUNE_TEST_PATIENCE", "600"))))
    main(int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1)))
    if is_one_of_several:
        # together, or the threads of the one that leaves first may abort the other
        PartialState().wait_for_everyone()
        PartialState().destroy_process_group()
