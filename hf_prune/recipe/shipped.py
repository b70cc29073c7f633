"""The recipes that come with the package."""

from __future__ import annotations

from pathlib import Path


# in a wheel inside the package; in a checkout at the top, where people look for them
_FOLDERS = (Path(__file__).parents[1] / "_recipes", Path(__file__).parents[2] / "recipes")


def shipped_recipes() -> dict[str, Path]:
    """Path of each shipped recipe, by name."""
    folder = next((folder for folder in _FOLDERS if folder.is_dir()), None)
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))} if folder else {}


def find_recipe(path_or_name: str) -> Path:
    """A path as it is, the path of a shipped recipe for its name; a path that isn't there is left to fail."""
    path = Path(path_or_name)
    return path if path.exists() else shipped_recipes().get(path_or_name, path)
