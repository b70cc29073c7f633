"""Programs of the tests in processes of their own: alone, or several over gloo.

They are forked from one interpreter that has imported the libraries already, which takes a fresh one 7 seconds: what a program does
is tested here, and what a shell, torchrun and a clean interpreter make of it where `subprocess` is called.
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
import pkgutil
import runpy
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from functools import cache
from multiprocessing import connection, forkserver
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from unittest import mock

import torch
from accelerate import PartialState

from tests.hub_server import HubServer


ROOT = Path(__file__).parents[1]
# not hf_prune, so that a program may find out what there is without it
IMPORTED = ["transformers.trainer", "transformers.models.auto.modeling_auto", "datasets", "evaluate", "accelerate"]
TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
ENVIRONMENT = {
    "PYTHONPATH": str(ROOT),
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
}
AT_FIRST = dict(os.environ)  # before a test changes it


def launch(program: Path, *arguments: object, n_processes: int = 1, timeout: float = 300) -> None:
    """Run a program to its end, one thread a process."""
    done = attempt(program, *arguments, n_processes=n_processes, timeout=timeout)
    assert done.returncode == 0, done.stderr[-4000:]


def attempt(
    program: Path, *arguments: object, n_processes: int = 1, timeout: float = 300
) -> subprocess.CompletedProcess[str]:
    """The same for one that may fail, or be killed: what became of it."""
    return python(program, *arguments, n_processes=n_processes, timeout=timeout, ACCELERATE_USE_CPU="true")


def python(
    *command: object, folder: Path = ROOT, n_processes: int = 1, timeout: float = 300, **environment: str
) -> subprocess.CompletedProcess[str]:
    """What `python COMMAND` does in a folder, or torchrun in several processes, which end when one of them fails.

    Args:
        command: a file, "-m" and a module or "-c" and code, and the arguments.
        environment: what differs from the one at hand. Of what libraries read when they are imported they see the Hub alone.
    """
    inherited = {name: value for name, value in os.environ.items() if name not in TORCHRUN}
    environment = {**inherited, **ENVIRONMENT, **environment}
    words = [str(word) for word in command]
    with tempfile.TemporaryDirectory() as place:
        files = [Path(place, name) for name in ("out", "err")]
        ranks = []
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        for rank in range(n_processes):
            values = (rank, n_processes, rank, n_processes, "127.0.0.1", port)
            of_rank = dict(zip(TORCHRUN, map(str, values), strict=True)) if n_processes > 1 else {}
            ranks.append(_warm().Process(target=_become, args=(words, folder, {**environment, **of_rank}, files)))
            ranks[-1].start()
        code = _code(ranks, words, timeout)
        out, err = (file.read_text(encoding="utf-8", errors="replace") for file in files)
    return subprocess.CompletedProcess(words, code, out, err)


@cache
def _warm() -> ForkServerContext:
    """The interpreter that is forked, with empty caches of its own."""
    home = tempfile.mkdtemp()
    atexit.register(shutil.rmtree, home, ignore_errors=True)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(IMPORTED)
    with mock.patch.dict(os.environ, {**AT_FIRST, **ENVIRONMENT, "HF_HOME": home}, clear=True):
        forkserver.ensure_running()
    return context


def _become(words: Sequence[str], folder: Path, environment: dict[str, str], files: Sequence[Path]) -> None:
    for stream, file in enumerate(files, start=1):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
    os.environ.clear()
    os.environ.update(environment)
    if "HF_ENDPOINT" in environment:
        for name, constant in HubServer.constants(environment).items():
            owner, _, own = name.rpartition(".")
            setattr(pkgutil.resolve_name(owner), own, constant)
    os.chdir(folder)
    if words[0] == "-c":
        sys.argv = ["-c", *words[2:]]
        exec(compile(words[1], "<string>", "exec"), {"__name__": "__main__"})
    elif words[0] == "-m":
        sys.argv = list(words[1:])
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = list(words)
        sys.path.insert(0, str(Path(words[0]).parent))
        runpy.run_path(words[0], run_name="__main__")


def _code(ranks: Sequence[BaseProcess], words: Sequence[str], timeout: float) -> int:
    """The exit code when all have ended: that of the first that failed, whereupon the others are killed."""
    end, code = time.monotonic() + timeout, 0
    running = {process.sentinel: process for process in ranks}
    while running:
        ended = connection.wait(list(running), timeout=end - time.monotonic())
        processes = [running.pop(sentinel) for sentinel in ended]
        for process in processes:
            process.join()
            code = code or process.exitcode
        if code or not ended:
            for process in running.values():
                process.kill()
                process.join()
        if not ended:
            raise subprocess.TimeoutExpired(words, timeout)
    return code


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
