"""`hf-prune sensitivity`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hf_prune.errors import RecipeError


def sensitivity(
    model: Annotated[
        str,
        typer.Argument(
            help="A model (Hub id, directory, package:NAME/PATH), or a recipe (path, or name of a shipped one)."
        ),
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="KEY=VALUE", help="Keys of the recipe to set, such as data.max_length."),
    ] = None,
    data: Annotated[
        str | None, typer.Option(help="Of a model: what to measure on, as a recipe's data.name_or_path.")
    ] = None,
    task: Annotated[str | None, typer.Option(help="Of a model whose config doesn't tell it.")] = None,
    target: Annotated[
        list[str] | None,
        typer.Option(help="layers, attention_heads, ffn_neurons or weights; may be repeated. All, or the recipe's."),
    ] = None,
    criterion: Annotated[
        list[str] | None, typer.Option(metavar="TARGET=NAME", help="What chooses the units of a target.")
    ] = None,
    sparsity: Annotated[
        list[float] | None, typer.Option(help="A fraction of each site to take; may be repeated.")
    ] = None,
    samples: Annotated[int, typer.Option(help="How many calibration samples losses are measured on.")] = 8,
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write the figures, for allocation sensitivity.")
    ] = None,
    picture: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Draw the curves (.png, .svg, .pdf); needs Matplotlib.")
    ] = None,
) -> None:
    """Measure the loss with each layer, head group, feed-forward or matrix pruned alone, at several sparsities.

    One pass over the calibration data scores everything; then, site by site, only the blocks behind what is pruned run again.
    A recipe's own steps say which targets and criteria, unless the options do; nothing is changed or trained.

    Examples:

    ```
    hf-prune sensitivity HuggingFaceTB/SmolLM2-135M --data texts.txt --target ffn_neurons --json sensitivity.json
    hf-prune sensitivity quickstart --samples 32 --picture sensitivity.png
    ```
    """
    from hf_prune.cli.run import processes_on_cpu, quiet

    quiet()
    from accelerate import PartialState
    from rich.console import Console

    from hf_prune import job
    from hf_prune.report.report import plain_console
    from hf_prune.sensitivity import DEFAULT_SPARSITIES
    from hf_prune.sensitivity.curves import require_pictures

    if picture is not None:
        require_pictures()  # before the work, not after it
    recipe, is_recipe = job.recipe_to_scan(model, overrides or (), task, data)
    is_main = PartialState(cpu=processes_on_cpu()).is_main_process
    found = job.run_scan(
        recipe,
        job.Stages(Console(stderr=True, quiet=not is_main)),
        targets=target or (),
        criteria=_criteria(criterion or ()),
        sparsities=sparsity or DEFAULT_SPARSITIES,
        samples=samples,
        of_steps=is_recipe,
    )
    if is_main:
        out = plain_console()
        for table in found.tables():
            out.print(table)
        for note in found.notes:
            out.print(f"note: {note}", markup=False, highlight=False, soft_wrap=True)
        if json_file is not None:
            found.to_json(json_file)
            out.print(f"written to {json_file}", markup=False, highlight=False, soft_wrap=True)
        if picture is not None:
            found.draw(picture)
            out.print(f"drawn in {picture}", markup=False, highlight=False, soft_wrap=True)
    # several processes leave together, or the threads of the one that leaves first may abort another
    PartialState().wait_for_everyone()
    PartialState().destroy_process_group()


def _criteria(given: list[str] | tuple[()]) -> dict[str, str]:
    for each in given:
        if "=" not in each:
            raise RecipeError(f"--criterion {each}: expected TARGET=NAME, such as weights=ria")
    return dict(each.split("=", 1) for each in given)
