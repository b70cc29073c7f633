"""`hf-prune recipes`."""

from __future__ import annotations

import sys


def recipes() -> None:
    """List the shipped recipes.

    Each can be run by its name, or copied and changed.

    Examples:

    ```
    hf-prune recipes
    hf-prune run quickstart
    ```
    """
    from rich.console import Console
    from rich.table import Table

    from hf_prune.recipe import Recipe
    from hf_prune.recipe.shipped import shipped_recipes

    table = Table(box=None, pad_edge=False)
    for column in ("name", "description", "path"):
        table.add_column(column, overflow="fold")
    for name, path in shipped_recipes().items():
        recipe = Recipe.from_yaml(path, ["training=null"])  # to check that would import Trainer, which takes seconds
        table.add_row(name, recipe.description or "", str(path))
    # piped output has no width to keep to: one line a recipe
    console = Console() if sys.stdout.isatty() else Console(width=1000)
    console.print(table)
