"""The oldest versions that the tests run on are the lower bounds that users are told."""

import tomllib
from pathlib import Path

from packaging.requirements import Requirement
from packaging.version import Version


ROOT = Path(__file__).parents[2]


def versions(lines, operator):
    required = [Requirement(line) for line in lines]
    return {
        each.name.lower(): Version(specifier.version)
        for each in required
        for specifier in each.specifier
        if specifier.operator == operator
    }


def test_constraints_oldest_holds_the_lower_bounds():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = (ROOT / "constraints-oldest.txt").read_text().splitlines()
    oldest = versions([line for line in lines if not line.startswith("#")], "==")
    bounds = versions(project["dependencies"], ">=")
    # torch's bound is Transformers' own, and the tests run on one version
    assert oldest.pop("torch") >= bounds.pop("torch")
    assert oldest == bounds
