"""Sections of a card, each with a mark of what was generated, so that what a person wrote into it survives a second push.

A mark is a comment at a section's end: its name, and a digest of its text. Text that its mark matches is ours, and the next
push replaces it; text that no longer matches, or has no mark, is somebody's, and stays where it is.
"""

from __future__ import annotations

import hashlib
import logging
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import yaml
from huggingface_hub.utils import yaml_dump


logger = logging.getLogger(__name__)

_MARK = re.compile(r"\n<!-- hf_prune: ([\w-]+) ([0-9a-f]{12}) -->[ \t]*(?=\n|$)")
_HEADING = re.compile(r"^#{1,2} (.+)$", re.MULTILINE)
_HEADER = re.compile(r"\A\s*---[ \t]*\n(.*?)^---[ \t]*(?:\n|\Z)", re.DOTALL | re.MULTILINE)
_FENCED = re.compile(r"^(`{3,})[^\n]*\n.*?^\1[ \t]*$", re.DOTALL | re.MULTILINE)
# what Transformers and its Trainer say of cards that nobody wrote
_NOBODYS = re.compile("generated automatically|automatically generated", re.IGNORECASE)
# of the header, what follows from the model and is never kept from an earlier push
_OURS = {"library_name", "base_model_relation"}


@dataclass(frozen=True)
class Section:
    """A part of a card's body: with the name and digest of its mark, or with neither where a person wrote it."""

    text: str
    name: str | None = None
    digest: str | None = None

    @property
    def is_ours(self) -> bool:
        """Whether nobody changed it since it was generated."""
        return self.digest == _digest(self.text)


def mark(card: str) -> str:
    """The card that was generated just now, with a mark at the end of each section."""
    header, body = _halves(card)
    quoted = [match.span() for match in _FENCED.finditer(body)]
    headings = [match for match in _HEADING.finditer(body) if not any(a <= match.start() < b for a, b in quoted)]
    ends = [match.start() for match in headings[1:]] + [len(body)]
    starts = [0, *ends[:-1]]
    names = ["title", *(re.sub(r"\W+", "-", match[1].lower()).strip("-") for match in headings[1:])]
    return _written(header, [_marked(name, body[a:b]) for name, a, b in zip(names, starts, ends, strict=True)])


def change(card: str, function: Callable[[str], str]) -> str:
    """The card with `function` applied to the text of each section that is ours; a person's stays as it is."""
    header, body = _halves(card)
    sections = split(body)
    if not any(section.name for section in sections):
        return card
    return _written(header, [_marked(s.name, function(s.text)) if s.name and s.is_ours else s for s in sections])


def add(card: str, name: str, text: str, after: str) -> str:
    """The card with one more section of ours behind that called `after`; as it is if that isn't there."""
    header, body = _halves(card)
    sections = [section for section in split(body) if section.name != name or not section.is_ours]
    for position, section in enumerate(sections):
        if section.name == after:
            return _written(header, [*sections[: position + 1], _marked(name, text), *sections[position + 1 :]])
    return card


def merge(new: str, old: str) -> str:
    """The new card with what a person wrote into the old one: sections, changes of sections, keys of the header.

    Args:
        new: as generated; a card without marks is a person's own, and nothing is put into it.
        old: as it is on the Hub. One that we never wrote goes first and whole, unless a program wrote it.
    """
    new, old = _unix(new), _unix(old)
    (new_header, new_body), (old_header, old_body) = _halves(new), _halves(old)
    fresh, held = split(new_body), split(old_body)
    if not any(section.name for section in fresh):
        return new
    if not any(section.name for section in held):
        if _NOBODYS.search(old_body) or not old_body.strip():
            return new
        return _written(_merged_header(new_header, old_header, held), [Section(old_body), *fresh])
    theirs: dict[str | None, list[Section]] = {}  # by the section of ours that they stand behind
    edited: dict[str, Section] = {}
    anchor: str | None = None
    for section in held:
        if section.name is None:
            theirs.setdefault(anchor, []).append(section)
            continue
        anchor = section.name
        if not section.is_ours:
            edited[anchor] = section
    sections = theirs.pop(None, [])
    for section in fresh:
        kept = edited.pop(section.name, None) if section.name else None
        if kept is not None and section.is_ours:
            logger.warning("the card's section %r was changed by hand, and stays so", section.name)
            section = kept
        sections = [*sections, section, *theirs.pop(section.name, [])]
    # what stood at a section that is no more
    sections += [*edited.values(), *(section for group in theirs.values() for section in group)]
    return _written(_merged_header(new_header, old_header, held), _once(sections))


def split(body: str) -> list[Section]:
    """The sections of a body, in order."""
    pieces = _MARK.split(body)
    sections = []
    for chunk, name, digest in zip(pieces[::3], pieces[1::3], pieces[2::3], strict=False):
        # a person's section may stand before ours under the same mark: ours is the end that the digest fits
        starts = [0, *(match.start() for match in _HEADING.finditer(chunk))]
        start = next((start for start in starts if _digest(chunk[start:]) == digest), 0)
        if chunk[:start].strip():
            sections.append(Section(chunk[:start]))
        sections.append(Section(chunk[start:], name, digest))
    if pieces[-1].strip():
        sections.append(Section(pieces[-1]))
    return sections


def _once(sections: list[Section]) -> list[Section]:
    """Without a person's text that is there a second time: in the folder and on the Hub."""
    seen: set[str] = set()
    kept = []
    for section in sections:
        text = section.text.strip()
        if section.name is None and text in seen:
            continue
        seen |= {text} if section.name is None else set()
        kept.append(section)
    return kept


def _merged_header(new: dict[str, Any], old: dict[str, Any], held: list[Section]) -> dict[str, Any]:
    merged = dict(new)
    for key, value in old.items():
        if key == "model-index":
            # metrics of ours that were not measured again are no longer so
            if key not in new and not any(section.name == "quality" for section in held):
                merged[key] = value
        elif key in ("tags", "datasets", "metrics") and isinstance(value, list) and isinstance(new.get(key), list):
            merged[key] = list(dict.fromkeys([*new[key], *value]))
        elif key not in _OURS or key not in new:
            merged[key] = value
    if "base_model" in new:
        merged["base_model"] = new["base_model"]
    return merged


def _marked(name: str, text: str) -> Section:
    return Section(text, name, _digest(text))


def _written(header: dict[str, Any], sections: list[Section]) -> str:
    parts = [f"---\n{yaml_dump(header)}---\n"] if header else []
    for section in sections:
        ending = f"\n\n<!-- hf_prune: {section.name} {section.digest} -->" if section.name else ""
        parts.append(section.text.strip("\n") + ending + "\n")
    return "\n".join(parts)


def _halves(card: str) -> tuple[dict[str, Any], str]:
    found = _HEADER.match(card)
    try:
        header = yaml.safe_load(found[1]) if found else None
    except yaml.YAMLError:
        header = None
    return (header, card[found.end() :]) if found and isinstance(header, dict) else ({}, card)


def _digest(text: str) -> str:
    """Of the words: editors change spaces and line ends."""
    return hashlib.sha256(" ".join(text.split()).encode()).hexdigest()[:12]


def _unix(text: str) -> str:
    return text.replace("\r\n", "\n")
