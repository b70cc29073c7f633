"""`hf-prune run`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import typer

from hf_prune.errors import RecipeError


def run(
    recipe: Annotated[
        str,
        typer.Argument(
            help="A recipe's path, the name of a shipped one, or a model of the Hub that has one (user/model)."
        ),
    ],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Keys of the recipe to set.")
    ] = None,
    plan_only: Annotated[
        bool, typer.Option("--plan-only", help="Only say sizes and verdict; reads no weight.")
    ] = False,
    smoke: Annotated[bool, typer.Option("--smoke", help="Do it all on a tiny model with made-up data.")] = False,
) -> None:
    """Load, train or calibrate, prune, verify, evaluate before and after, save, report; push if asked.

    Examples:

    ```
    hf-prune run quickstart
    hf-prune run my.yaml prune.0.sparsity=0.3 output.dir=outputs/light
    hf-prune run my.yaml --plan-only
    hf-prune run my.yaml --smoke
    hf-prune run user/model output.dir=outputs/mine
    torchrun --nproc_per_node 2 -m hf_prune run my.yaml
    accelerate launch --multi_gpu --num_processes 2 -m hf_prune run my.yaml
    ```
    """
    from hf_prune.recipe import Recipe

    if plan_only and smoke:
        raise RecipeError("--plan-only reads sizes and --smoke tries the steps; give one of them")
    checked = Recipe.find(recipe, overrides or ())
    quiet()
    from accelerate import PartialState
    from rich.console import Console

    from hf_prune import job
    from hf_prune.report.report import plain_console

    is_main = PartialState(cpu=processes_on_cpu()).is_main_process
    stages = job.Stages(Console(stderr=True, quiet=not is_main))
    out = plain_console(quiet=not is_main)
    if plan_only:
        job.plan_only(checked).print_to(out)
    elif smoke:
        job.smoke(checked, stages)
        done = ("trained, " if job.smoke_trains(checked) else "") + "pruned, verified, saved and loaded"
        out.print(f"the recipe works: {done} on a tiny model", highlight=False)
    else:
        report = job.run(checked, stages)
        report.print_to(out)
        _say_how_to_load(out, report, checked.output.dir if checked.output else None)
    # several processes leave together, or the threads of the one that leaves first may abort another
    PartialState().wait_for_everyone()
    PartialState().destroy_process_group()


def processes_on_cpu() -> bool:
    """Whether several processes were launched where there is no accelerator; Trainer is told too.

    Accelerate would take each of them for the only one, and all would write to the same directory.
    """
    import torch

    found = torch.accelerator.is_available() if hasattr(torch, "accelerator") else torch.cuda.is_available()
    if found or int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return False
    os.environ["ACCELERATE_USE_CPU"] = "true"  # read by TrainingArguments, which sets the state anew
    return True


def _say_how_to_load(out: Any, report: Any, directory: str | None) -> None:
    from hf_prune.recipe.schema import OutputSection

    checkpoint, directory = report.content["checkpoint"], directory or OutputSection().dir
    lines = ["", f"saved in {Path(directory)}; load it with", ""]
    if checkpoint["loads_with"] == "hf_prune":
        lines.append("    import hf_prune")
    lines.append(f"    from transformers import {checkpoint['class']}")
    lines.append(f'    model = {checkpoint["class"]}.from_pretrained("{directory}")')
    if pushed := report.content.get("pushed_to"):
        lines += ["", f"pushed to {pushed}"]
    for line in lines:
        out.print(line, markup=False, highlight=False, soft_wrap=True)


def quiet() -> None:
    """Leave the terminal to us: warnings of the libraries below stay, their bars and advice don't."""
    import datasets
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()
