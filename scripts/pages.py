"""The parts of the pages that are written from their source: python scripts/pages.py

In a page such a part stands between `<!-- NAME ARGUMENT -->` and `<!-- end -->`: the tables of docs/recipe.md come from the
recipe's schema, those of docs/recipes.md from the heads of the shipped recipes, one in docs/concepts.md from
docs/benchmarks.md. `--check` writes nothing and fails if a page isn't as it would be written.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any


ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
DOCS = ROOT / "docs"
_PART = re.compile(r"(?P<begin><!-- (?P<name>\w+) (?P<argument>[^>]*?) ?-->\n).*?(?P<end><!-- end -->)", re.DOTALL)

# defaults that depend on another key, or that are a section of their own
DEFAULTS = {
    ("RecipeDocument", "schedule"): "see below",
    ("RecipeDocument", "calibration"): "see below",
    ("Step", "criterion"): "`l2`; weights: `l1`",
    ("Step", "scope"): "`layer`; wanda: `output`",
    ("Step", "pattern"): "`unstructured`",
    ("Step", "schedule"): "the recipe's",
    ("Step", "include"): "all",
    ("Step", "compensation"): "`none`",
    ("ModelSection", "dtype"): "`float32`",
}
# heading of docs/benchmarks.md -> what kind of pruning it compares
MEASURED = {
    "50 % of the weights": "weights",
    "2:4": "weights, 2:4",
    "20 % of the parameters, structured": "neurons",
    "10 % of the layers": "layers",
    "20 % of the layers": "layers",
}


def written(text: str) -> str:
    """The page `text` with its generated parts written anew."""

    def part(found: re.Match[str]) -> str:
        lines = {"schema": schema_table, "recipes": recipes_table, "measured": measured_table}[found["name"]]
        return found["begin"] + "\n" + "\n".join(lines(found["argument"])) + "\n\n" + found["end"]

    return _PART.sub(part, text)


def schema_table(section: str) -> Iterator[str]:
    """Key, value, default and meaning of each key that a section of the recipe has."""
    from hf_prune.recipe import Recipe

    document = Recipe.json_schema()
    sections = {**document["$defs"], "RecipeDocument": document}
    schema = sections[section]
    yield from ("| key | value | default | meaning |", "|---|---|---|---|")
    for key, field in schema["properties"].items():
        default = DEFAULTS.get((section, key)) or _default(field, key in schema.get("required", ()))
        meaning = re.sub(r"docs/(\w+\.md)", r"[\1](\1)", field["description"])
        yield f"| `{key}` | {', '.join(dict.fromkeys(_words(field, sections)))} | {default} | {meaning} |"


def _default(field: Mapping[str, Any], is_required: bool) -> str:
    default = field.get("default")
    if is_required:
        return "required"
    if default is None or default == []:
        return "none"
    return f"`{str(default).lower() if isinstance(default, bool) else default}`"


def _words(schema: Mapping[str, Any], sections: Mapping[str, Any]) -> Iterator[str]:
    """What JSON Schema allows, in words: one for each way to write it."""
    match schema:
        case {"anyOf": ways}:
            for way in ways:
                yield from _words(way, sections)
        case {"const": value}:
            yield f"`{value}`"
        case {"enum": values}:
            # a long list has a page of its own
            yield from (f"`{value}`" for value in values) if len(values) <= 5 else ("a name",)
        case {"type": "array", "items": {"$ref": reference}}:
            yield f"list of {reference.rsplit('/', 1)[1].lower()}s"
        case {"type": "array", "items": items}:
            yield f"list of {'numbers' if items['type'] == 'integer' else 'globs'}"
        case {"properties": {"name": {"const": _}}}:
            yield "`{name: …, option: …}`"
        case {"additionalProperties": {} as values} if values:
            yield f"`{{glob: {' or '.join(_words(values, sections))}}}`"
        case {"properties": properties, "required": required} if len(required) == len(properties):
            yield f"`{{{', '.join(f'{key}: …' for key in properties)}}}`"
        case {"$ref": reference}:
            yield from _words(sections[reference.rsplit("/", 1)[1]], sections)
        case {"properties": _}:
            yield "section"
        case {"type": "boolean"}:
            yield from ("true", "false")
        case {"type": "string", "pattern": _}:
            yield '`"N:M"`'
        case {"type": "string"}:
            yield "text"
        case {"type": "integer" | "number"}:
            yield _number(schema)
        case {"type": "null"}:
            return
        case _:
            yield "mapping"


def _number(schema: Mapping[str, Any]) -> str:
    low, high = schema.get("minimum"), schema.get("maximum")
    above, below = schema.get("exclusiveMinimum"), schema.get("exclusiveMaximum")
    noun = {"integer": "integer"}.get(schema["type"], "number" if high is None and below is None else "fraction")
    start = f" from {low:g}" if low is not None else f" above {above:g}" if above is not None else ""
    # seeds end where NumPy's do, which nobody needs to know
    stop = f" to {high:g}" if high is not None and noun == "fraction" else f" to below {below:g}" if below else ""
    return noun + start + stop


def recipe_head(path: Path) -> tuple[str, str]:
    """The command that runs a recipe, and what its head says besides."""
    head = path.read_text(encoding="utf-8").split("version:")[0]
    command, _, said = "\n".join(line.removeprefix("#").strip() for line in head.splitlines()).partition("\n\n")
    return command.replace("\\\n", ""), " ".join(said.split())


def recipes_table(families: str) -> Iterator[str]:
    """Name, targets, description and head of the shipped recipes whose names begin with one of `families`."""
    from hf_prune.recipe import Recipe
    from hf_prune.recipe.shipped import shipped_recipes

    yield from ("| recipe | what it does | for whom, and what it costs |", "|---|---|---|")
    for name, path in shipped_recipes().items():
        if re.fullmatch(families, name):
            yield f"| [{name}](../recipes/{path.name}) | {Recipe.from_yaml(path).description} | {recipe_head(path)[1]} |"


def measured_table(tool: str) -> Iterator[str]:
    """The rows of docs/benchmarks.md that are of a tool."""
    yield from (
        "| kind | method | perplexity | parameters | zeros | CPU seconds |",
        "|---|---|---:|---:|---:|---:|",
    )
    for heading, (name, *_, perplexity, parameters, zeros, seconds, _) in _benchmarks():
        if heading in MEASURED and name.startswith(f"{tool} "):
            cells = (MEASURED[heading], name.removeprefix(f"{tool} "), perplexity, parameters, zeros, seconds)
            yield f"| {' | '.join(cells)} |"


def _benchmarks() -> Iterator[tuple[str, list[str]]]:
    heading = ""
    for line in (DOCS / "benchmarks.md").read_text(encoding="utf-8").splitlines():
        if line.startswith("## "):
            heading = line.removeprefix("## ")
        elif line.startswith("| ") and not line.startswith("| ---"):
            yield heading, [cell.strip() for cell in line.strip("|").split("|")]


def main() -> None:
    stale = []
    for page in sorted(DOCS.glob("*.md")):
        before = page.read_text(encoding="utf-8")
        if (after := written(before)) != before:
            stale.append(page.name)
            if "--check" not in sys.argv:
                page.write_text(after, encoding="utf-8")
    if stale and "--check" in sys.argv:
        sys.exit(f"not as python scripts/pages.py writes them: {', '.join(stale)}")


if __name__ == "__main__":
    main()
