"""What a card tells to do, done: each of its snippets by itself in a clean process, from the Hub."""

from __future__ import annotations

import re
import textwrap

import pytest
import torch
from huggingface_hub import ModelCard

from hf_prune.hub.push import push_folder
from tests.hub.pruned import STOCK, UNEVEN, logits, pruned
from tests.processes import python


REPO = "ada/small"


@pytest.mark.parametrize(
    ("recipe", "name", "needs"), [(UNEVEN, "bert", ["hf_prune", "remote code"]), (STOCK, "llama", ["nothing"])]
)
def test_the_snippets_of_the_card_load_what_was_pushed(hub, tmp_path, recipe, name, needs):
    model = pruned(recipe, name)
    model.save_pretrained(tmp_path / "model")
    push_folder(tmp_path / "model", REPO)
    section = ModelCard.load(REPO).text.split("## How to load it")[1].split("\n## ")[0]
    snippets = re.findall(r"```python\n(.*?)```", section, flags=re.DOTALL)
    assert len(snippets) == len(needs)
    for snippet, need in zip(snippets, needs, strict=True):
        assert ("import hf_prune" in snippet) == (need == "hf_prune")
        assert ("trust_remote_code=True" in snippet) == (need == "remote code")
        home = tmp_path / need
        home.mkdir()
        before = "" if need == "hf_prune" else 'import sys; sys.modules["hf_prune"] = None'
        after = f"""
            import torch
            with torch.no_grad():
                found = model.eval()(input_ids=torch.arange(3, 15).reshape(2, 6)).logits
            torch.save(found, {str(home / "logits.pt")!r})
        """
        done = python("-c", "\n".join([before, snippet, textwrap.dedent(after)]), folder=home, **hub.env(home))
        assert done.returncode == 0, done.stderr
        assert torch.equal(torch.load(home / "logits.pt"), logits(model))
