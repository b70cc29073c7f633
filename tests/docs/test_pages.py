"""What holds of every page: links lead somewhere, snippets run, code is of a language that is checked."""

import re
import tomllib

import pytest

from tests.docs.pages import PAGES, README, ROOT, anchors, blocks, links, prose


NEVER_RUN = {"text", "json"}  # what is shown, not done
CHECKED = {"python", "yaml", "bash"}
WITH_A_HUB = ROOT / "docs" / "sharing.md"  # test_sharing_page.py runs it


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_resolve(page):
    for link in links(page):
        if link.startswith("https://"):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{page.name} links to {link}"
        assert target.is_relative_to(ROOT)
        assert not anchor or anchor in anchors(target), f"{page.name} links to {link}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_block_is_of_a_kind_that_is_checked_or_only_shown(page):
    for block in blocks(page):
        assert block.language in NEVER_RUN | CHECKED, f"{block} is {block.info!r}"


@pytest.mark.parametrize(
    "page", [page for page in PAGES if page not in (README, WITH_A_HUB)], ids=lambda page: page.name
)
def test_python(page, stage):
    names: dict = {}
    for block in (block for block in blocks(page) if block.language == "python"):
        exec(compile(stage.fit(block.text), str(block), "exec"), names)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_files_that_are_named_exist(page):
    for name in re.findall(r"`((?:hf_prune|tests|docs|scripts|recipes)/[\w./-]+)`", prose(page)):
        assert (ROOT / name).exists(), f"{page.name} names {name}"


def test_the_versions_that_are_promised_are_those_of_the_package():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    (requirement,) = (each for each in project["dependencies"] if re.match(r"transformers\b", each))
    oldest = re.search(r">=([\d.]+)", requirement)[1]
    for page in (README, ROOT / "docs" / "checkpoint-format.md"):
        said = re.search(r"Transformers from ([\d.]+) on", page.read_text(encoding="utf-8"))
        assert said is not None and said[1].removesuffix(".0") == oldest.removesuffix(".0"), page.name
    assert f"Python from {project['requires-python'].removeprefix('>=')} on" in README.read_text(encoding="utf-8")
