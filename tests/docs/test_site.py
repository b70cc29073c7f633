"""The site of the pages: it is built without a warning and without a network, from all pages, and asks for none."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest

import hf_prune
from scripts import pages
from tests.docs.pages import PAGES, ROOT


NO_NETWORK = """
import socket
def connect(*_):
    raise OSError("no network in this test")
socket.socket.connect = socket.socket.connect_ex = connect
"""


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    (folder / "without").mkdir()
    (folder / "without" / "sitecustomize.py").write_text(NO_NETWORK)
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder / "site")],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(folder / "without"), "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"{done.stdout}{done.stderr}"
    return folder / "site"


def html(site: Path, page: str) -> str:
    return (site / page / "index.html").read_text(encoding="utf-8")


def test_every_page_is_in_the_navigation(site):
    home = html(site, "")
    for page in PAGES:
        assert f'href="{page.stem}/"' in home or page.name == "README.md", page.name


def test_what_a_page_links_to_is_there(site):
    """Files outside docs/ too, which are shown as pages; MkDocs itself has compared anchors."""
    for path in site.rglob("*.html"):
        text = path.read_text(encoding="utf-8")
        for link in re.findall(r'(?:href|src)="([^"#?:]+)["#?]', text):
            target = (site / link.lstrip("/")) if link.startswith("/") else (path.parent / link)
            assert target.exists(), f"{path.relative_to(site)} links to {link}"


def test_a_reader_s_browser_fetches_nothing_from_elsewhere(site):
    for path in [*site.rglob("*.html"), *site.rglob("*.css")]:
        text = path.read_text(encoding="utf-8")
        assert not re.search(r"""(?:<script[^>]+src|<link[^>]+(?:stylesheet|icon)[^>]+href)=["']https?:""", text), path
        assert not re.search(r"""(?:@import|url\()\s*["']?https?:""", text), path


def test_every_public_name_is_shown_with_its_docstring(site):
    text = html(site, "api")
    for name in hf_prune.__all__:
        assert f'id="hf_prune.{name}"' in text or name == "__version__", name
    assert "the recipe, the data or the model won't do, or verification failed" in text


@pytest.mark.parametrize("page", sorted((ROOT / "docs").glob("*.md")), ids=lambda page: page.name)
def test_generated_parts_are_as_they_would_be_written(page):
    text = page.read_text(encoding="utf-8")
    assert text == pages.written(text), "run python scripts/pages.py"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_lists_begin_after_a_blank_line(page):
    """GitHub takes them for lists without, the site doesn't."""
    lines = page.read_text(encoding="utf-8").splitlines()
    item, inside = re.compile(r"([-*]|\d+\.) "), False
    for before, line in pairwise(lines):
        inside = inside != before.startswith("```")
        if not inside and item.match(line) and before.strip() and not item.match(before):
            assert before.startswith("  "), f"{page.name}: {line}"
