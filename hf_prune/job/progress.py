"""What a waiting person sees, on stderr: a line a stage, and on a terminal bars that move."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from transformers import TrainerCallback


class Stages:
    """Announces stages, times them, and shows progress inside them where stderr is a terminal."""

    def __init__(self, console: Console):
        self.console = console
        self.seconds: dict[str, float] = {}

    @contextmanager
    def stage(self, name: str, total: int | None = None) -> Iterator[Bar]:
        """One stage; `total` steps if they are known."""
        started = time.perf_counter()
        if self.console.is_terminal:
            columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
            with Progress(
                *columns,
                TimeElapsedColumn(),
                TextColumn("{task.fields[note]}"),
                console=self.console,
                transient=True,
            ) as progress:
                yield Bar(progress, progress.add_task(name, total=total, note=""))
        else:
            yield Bar(None, None)
        self.seconds[name] = time.perf_counter() - started
        self.console.print(f"{name}: {self.seconds[name]:.1f} s", highlight=False)


class Bar(TrainerCallback):
    """The bar of one stage; as a callback it follows a Trainer."""

    def __init__(self, progress: Progress | None, task: Any):
        self.progress, self.task = progress, task

    def update(self, **fields: Any) -> None:
        if self.progress is not None:
            self.progress.update(self.task, **fields)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.update(total=state.max_steps, completed=state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.update(completed=state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        shown = {key: value for key, value in (logs or {}).items() if key == "loss" or key.startswith("sparsity/")}
        self.update(note=", ".join(f"{key} {float(value):.3g}" for key, value in shown.items()))
