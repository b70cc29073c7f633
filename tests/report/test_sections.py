"""What a person writes into a card survives the next push; what is ours is renewed."""

import logging

import pytest
import yaml

from hf_prune.report.sections import add, change, mark, merge, split


def generated(number, sections=("Quality", "Limits"), **header):
    body = "".join(f"## {name}\n\n{name} is {number}.\n\n" for name in sections)
    return mark(f"---\n{yaml.safe_dump({'tags': ['pruned'], **header})}---\n\n# small\n\nA model.\n\n{body}")


def header(card):
    return yaml.safe_load(card.split("---\n")[1])


def test_marks_are_comments_and_sections_are_headings():
    card = mark("---\na: 1\n---\n# T\n\n```yaml\n# no heading\n## nor this\n```\n\n## What left\n\n### part\n\nx\n")
    assert [section.name for section in split(card.split("---\n", 2)[2])] == ["title", "what-left"]
    lines = card.splitlines()
    assert [line for line in lines if not line.startswith("<!-- hf_prune: ")].count("## nor this") == 1


def test_without_a_persons_hand_the_new_card_stays_as_it_is():
    assert merge(generated(2), generated(1)) == generated(2)
    assert merge(generated(2), "") == generated(2)


OWN = "## Ethics\n\nWritten by a person.\n"


@pytest.mark.parametrize("place", ["# small", "## Quality", "## Limits", "end"])
@pytest.mark.parametrize("ends", ["\n", "\r\n"])
def test_a_section_of_a_person_stays_in_its_place(place, ends):
    old = generated(1)
    old = old + "\n" + OWN if place == "end" else old.replace(place, OWN + "\n" + place)
    merged = merge(generated(2), old.replace("\n", ends))
    assert merged.count(OWN) == 1 and "Quality is 2" in merged and "is 1" not in merged
    before = (
        "Limits is 2"
        if place == "end"
        else {"# small": "---", "## Quality": "A model", "## Limits": "Quality is"}[place]
    )
    assert merged.rindex(before) < merged.index(OWN)
    if place != "end":
        assert merged.index(OWN) < merged.index("\n" + place)
    assert merge(generated(3), merged).count(OWN) == 1, "and the push after that"
    assert merge(merged, merged) == merged


def test_a_section_that_a_person_changed_stays_changed_and_that_is_said(caplog):
    old = generated(1).replace("Limits is 1.", "Limits is what I say.")
    with caplog.at_level(logging.WARNING):
        merged = merge(generated(2), old)
    assert "Limits is what I say." in merged and "Limits is 2" not in merged and "Quality is 2" in merged
    assert "'limits' was changed by hand" in caplog.text
    again = merge(generated(3), merged)
    assert "Limits is what I say." in again and "Quality is 3" in again


def test_one_that_was_changed_in_the_folder_goes_before_that_on_the_hub():
    new = generated(2).replace("Limits is 2.", "Limits is mine here.")
    old = generated(1).replace("Limits is 1.", "Limits is mine there.")
    assert "mine here" in merge(new, old)


def test_a_changed_section_that_would_no_longer_be_there_stays_at_the_end():
    old = generated(1).replace("Quality is 1.", "Quality is dear to me.")
    assert "Quality is dear to me." in merge(generated(2, sections=["Limits"]), old)


def test_the_header_keeps_what_a_person_set():
    old = generated(1, license="mit", base_model="a/old", library_name="transformers", language="en")
    old = old.replace("tags:\n- pruned", "tags:\n- pruned\n- chemistry\ninference: false")
    merged = header(merge(generated(2, license="apache-2.0", base_model="a/new", library_name="transformers"), old))
    assert merged["license"] == "mit" and merged["inference"] is False and merged["language"] == "en"
    assert merged["tags"] == ["pruned", "chemistry"] and merged["base_model"] == "a/new"


def test_metrics_that_were_not_measured_again_leave():
    index = [{"name": "small", "results": []}]
    old = generated(1, **{"model-index": index})
    assert "model-index" not in header(merge(generated(2, sections=["Limits"]), old))
    theirs = generated(1, sections=["Limits"], **{"model-index": index})
    assert header(merge(generated(2, sections=["Limits"]), theirs))["model-index"] == index, "a person wrote those"


def test_cards_that_are_not_ours():
    hand = "---\nlicense: mit\n---\n# My model\n\nFor birds.\n"
    merged = merge(generated(1), hand)
    assert merged.index("For birds.") < merged.index("# small") and header(merged)["license"] == "mit"
    assert merge(generated(2), merged).count("For birds.") == 1
    nobody = "# x\n\n<!-- This model card has been generated automatically according to the Trainer -->\n"
    assert merge(generated(1), nobody) == generated(1)
    assert merge(hand, generated(1)) == hand, "a folder's card without marks is a person's own"


def test_what_is_ours_can_be_changed_and_added_to():
    card = generated(1).replace("Limits is 1.", "Limits is mine, 1.")
    changed = change(card, lambda text: text.replace("1", "one"))
    assert "Quality is one." in changed and "Limits is mine, 1." in changed
    assert merge(generated(2), changed).count("Quality is 2.") == 1
    drawn = add(add(card, "picture", "## Picture\n", after="quality"), "picture", "## Picture\n", after="quality")
    assert drawn.count("## Picture") == 1 and drawn.index("Quality is 1") < drawn.index("Picture") < drawn.index(
        "Limits"
    )
