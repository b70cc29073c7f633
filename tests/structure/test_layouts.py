"""Layouts by what they hold: tiny attentions and feed-forwards made up here, each proven masked ≡ sliced by its own forward."""

import pytest
import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention, silu

import hf_prune
from hf_prune.apply.masks import set_masks
from hf_prune.apply.shrink import remove_masked_
from hf_prune.errors import PruneError, UnsupportedModelError
from hf_prune.plan import KeepMasks
from hf_prune.structure import inspect_model, layouts, require_sites


@pytest.fixture
def registered(monkeypatch):
    """Layouts that a test registers are forgotten after it."""
    monkeypatch.setattr(layouts, "_registered", [])


class Attention(nn.Module):
    """Names that nobody has, queries of 4 heads, a scale by head."""

    def __init__(self):
        super().__init__()
        self.num_heads, self.head_dim = 4, 8
        self.ask, self.hold, self.say = nn.Linear(32, 32), nn.Linear(32, 32), nn.Linear(32, 32)
        self.write = nn.Linear(32, 32)

    def forward(self, hidden_states):
        def heads(x):
            return x.view(*x.shape[:-1], -1, self.head_dim).transpose(1, 2)

        mixed = scaled_dot_product_attention(*(heads(f(hidden_states)) for f in (self.ask, self.hold, self.say)))
        return self.write(mixed.transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    def __init__(self):
        super().__init__()
        self.widen, self.shrink = nn.Linear(32, 2 * 48), nn.Linear(48, 32)

    def forward(self, hidden_states):
        gate, up = self.widen(hidden_states).chunk(2, -1)
        return self.shrink(silu(gate) * up)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.mix, self.think, self.norm = Attention(), FeedForward(), nn.LayerNorm(32)

    def forward(self, hidden_states):
        hidden_states = hidden_states + self.mix(self.norm(hidden_states))
        return hidden_states + self.think(hidden_states)


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(2))

    def forward(self, hidden_states):
        for block in self.blocks:
            hidden_states = block(hidden_states)
        return hidden_states


def test_what_matches_no_layout_is_told_with_how_to_add_one(registered):
    structure = inspect_model(Model())
    assert not structure.of("attention_heads") and not structure.of("ffn_neurons")
    told = {refusal.name: refusal.reason for refusal in structure.refusals}
    assert "(ask, hold, say, write) match no known layout" in told["blocks.0.mix"]
    assert "widen and shrink match no known layout" in told["blocks.1.think"]
    assert "register_layout" in str(structure)
    with pytest.raises(UnsupportedModelError, match=r"has no ffn_neurons .*register_layout teaches it one"):
        require_sites(structure, "ffn_neurons")


class Stacked(nn.Module):
    def __init__(self, *shape):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(shape))


class GroupedExperts(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc1, self.fc2 = Stacked(4, 32, 96), Stacked(4, 48, 32)


def test_experts_whose_weights_are_stacked_in_modules_of_their_own_are_told(registered):
    """As in Aria, in Transformers 5.12."""
    model = Model()
    model.blocks[1].think = GroupedExperts()
    told = {refusal.name: refusal.reason for refusal in inspect_model(model).refusals}
    assert told["blocks.1.think"] == "its stacked experts (fc1.weight, fc2.weight) match no known layout"


def test_a_layout_of_ones_own_is_pruned_exactly(registered):
    hf_prune.register_layout(hf_prune.AttentionLayout(query="ask", key="hold", value="say", output="write"))
    hf_prune.register_layout(hf_prune.FeedForwardLayout(inputs=("widen",), output="shrink"))
    model = Model().double()
    structure = inspect_model(model)
    assert [site.n_units for site in structure.of("attention_heads")] == [4, 4]
    assert [site.n_units for site in structure.of("ffn_neurons")] == [48, 48]
    assert not structure.refusals
    x = torch.randn(2, 5, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    units = {site.key: torch.arange(site.n_units) % 3 != 1 for site in structure if site.target != "layers"}
    dense = model(x)
    set_masks(model, KeepMasks(units=units))
    masked = model(x)
    remove_masked_(model)
    assert (masked - dense).abs().max() > 1e-3
    assert torch.allclose(model(x), masked, rtol=1e-12)
    assert model.blocks[0].mix.ask.weight.shape == (24, 32) and model.blocks[1].think.widen.weight.shape == (64, 32)


def test_what_is_no_layout_is_refused(registered):
    with pytest.raises(PruneError, match="got a dict; expected an AttentionLayout or a FeedForwardLayout"):
        hf_prune.register_layout({"query": "q"})
