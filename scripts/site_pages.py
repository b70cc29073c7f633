"""What MkDocs is told besides mkdocs.yml: pages that lie outside docs/, and links that lead there.

Pages are written for GitHub, where a link may lead to any file. On the site README.md is the home page, and every other file
that is linked becomes a page that shows it, so that no link needs a network.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path, PurePosixPath
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files, InclusionLevel


ROOT = Path(__file__).resolve().parent.parent
# page of the site -> the file that it is, where that lies outside docs/
OUTSIDE = {"index.md": "README.md", "contributing.md": "CONTRIBUTING.md", "changelog.md": "CHANGELOG.md"}
# what stands after a block's language says how tests run it, and is no option of MkDocs
_FENCE = re.compile(r"^(`{3,}\w+) [a-z]+$", re.MULTILINE)
_LINK = re.compile(r"\]\((?!https?:|#|mailto:)([^)#\s]+)(#[^)\s]*)?\)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages outside docs/, and one for each other file or directory that a page links to."""
    for page, path in OUTSIDE.items():
        files.append(File.generated(config, page, content=(ROOT / path).read_text(encoding="utf-8")))
    waiting = {
        path
        for file in files.documentation_pages()
        for link, _ in _LINK.findall(file.content_string)
        if _is_source(path := _in_repository(file.src_uri, link))
    }
    done: set[str] = set()
    while waiting:
        done.add(path := waiting.pop())
        if (ROOT / path).is_dir():
            inside = [f"{path}/{file.name}" for file in sorted((ROOT / path).iterdir()) if file.is_file()]
            content = "\n".join([f"# {path}", "", *(f"- [{name}]({_page(name, path)})" for name in inside)])
            waiting |= {*inside} - done
        else:
            text = (ROOT / path).read_text(encoding="utf-8")
            language = {".py": "python", ".sh": "bash"}.get(Path(path).suffix, Path(path).suffix.lstrip(".") or "text")
            content = f"# {path}\n\n`````{language}\n{text}\n`````\n"
        files.append(File.generated(config, _uri(path), content=content, inclusion=InclusionLevel.NOT_IN_NAV))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Links and fenced blocks as MkDocs wants them: from one page of the site to another, with a language and no more."""
    here = page.file.src_uri
    if here.startswith("source/"):
        return markdown

    def relative(found: re.Match[str]) -> str:
        target = _uri(_in_repository(here, found[1]))
        return f"]({posixpath.relpath(target, posixpath.dirname(here) or '.')}{found[2] or ''})"

    return _LINK.sub(relative, _FENCE.sub(r"\1", markdown))


def _in_repository(page: str, link: str) -> str:
    """The path in the repository that a page of the site links to."""
    source = OUTSIDE.get(page, f"docs/{page}")
    return posixpath.normpath(posixpath.join(posixpath.dirname(source), link))


def _is_source(path: str) -> bool:
    """Whether it lies outside docs/ and is no page of its own; what isn't there is left for MkDocs to complain of."""
    return not path.startswith("docs/") and path not in OUTSIDE.values() and (ROOT / path).exists()


def _uri(path: str) -> str:
    """Where the site has what the repository has at `path`."""
    for page, source in OUTSIDE.items():
        if path == source:
            return page
    return f"source/{path}.md" if _is_source(path) else path.removeprefix("docs/")


def _page(path: str, directory: str) -> str:
    return posixpath.relpath(f"source/{path}.md", PurePosixPath("source", directory).parent.as_posix())
