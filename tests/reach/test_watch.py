"""The watcher against modules written by hand, of which it is plain what they hold."""

import torch
from torch import nn

from tests.reach.watch import watch


D, N = 8, 12


class Attention(nn.Module):
    def __init__(self, mix="softmax"):
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(D, D) for _ in range(4))
        self.mix = mix

    def forward(self, x):
        if self.mix == "sdpa":
            heads = [each(x)[:, None] for each in (self.q, self.k, self.v)]
            return self.o(nn.functional.scaled_dot_product_attention(*heads)[:, 0])
        scores = self.q(x) @ self.k(x).transpose(1, 2)
        return self.o((scores.softmax(-1) if self.mix == "softmax" else scores) @ self.v(x))


class FeedForward(nn.Module):
    def __init__(self, d_in=D, d_ff=N, d_out=D, act=torch.relu):
        super().__init__()
        self.one, self.two, self.act = nn.Linear(d_in, d_ff), nn.Linear(d_ff, d_out), act

    def forward(self, x):
        return self.two(self.act(self.one(x)))


class Gated(FeedForward):
    def __init__(self):
        super().__init__(d_ff=2 * N)
        self.two = nn.Linear(N, D)

    def forward(self, x):
        gate, up = self.one(x).chunk(2, -1)
        return self.two(nn.functional.silu(gate) * up)


class Pointwise(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.deep, self.two = nn.Conv1d(D, N, 1), nn.Conv1d(N, N, 3, padding=1, groups=N), nn.Conv1d(N, D, 1)

    def forward(self, x):
        return self.two(nn.functional.gelu(self.deep(self.one(x.transpose(1, 2))))).transpose(1, 2)


class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        self.router = nn.Linear(D, 2)
        self.one, self.two = nn.Parameter(torch.randn(2, N, D)), nn.Parameter(torch.randn(2, D, N))

    def forward(self, x):
        chosen = self.router(x).softmax(-1)
        each = [nn.functional.linear(torch.relu(nn.functional.linear(x, self.one[e])), self.two[e]) for e in (0, 1)]
        return sum(chosen[..., e : e + 1] * each[e] for e in (0, 1))


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention, self.mlp = Attention(), FeedForward(act=nn.functional.gelu)

    def forward(self, x):
        x = x + self.attention(x)
        return x + self.mlp(x)


class Chain(nn.Module):
    def __init__(self, *parts):
        super().__init__()
        self.parts = nn.ModuleList(parts)

    def forward(self, x):
        for part in self.parts:
            x = x + part(x)
        return x


class SideBySide(Chain):
    def forward(self, x):
        return [part(x) for part in self.parts]


class Twice(Chain):
    def forward(self, x):
        return self.parts[0](self.parts[0](x))


def found(model):
    return watch(model, {"x": torch.randn(2, 5, D)})


def test_attention_is_a_softmax_over_a_product_of_activations():
    assert found(Attention()).attention == found(Attention("sdpa")).attention == {""}
    assert not found(Attention("linear")).attention
    assert not found(Experts()).attention, "a router's softmax is over a product with a weight"


def test_a_feed_forward_leads_from_d_to_n_to_d_around_a_nonlinearity():
    for one in (FeedForward(), FeedForward(act=torch.tanh), Gated(), Pointwise(), Experts()):
        assert found(one).feed_forward == {""}, type(one).__name__
    assert not found(FeedForward(act=lambda x: 2 * x)).feed_forward
    assert not found(FeedForward(d_out=D + 1)).feed_forward
    assert not found(Attention()).feed_forward


def test_a_norm_written_out_is_no_nonlinearity():
    assert not found(FeedForward(act=lambda x: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True)))).feed_forward


def test_a_gelu_written_as_a_sum_is_a_nonlinearity():
    def new(x):
        return 0.5 * x * (1 + torch.tanh(0.8 * (x + 0.04 * x**3)))

    assert found(FeedForward(act=new)).feed_forward == {""}


def test_maps_of_different_blocks_make_no_pair():
    wide = nn.Sequential(nn.Linear(D, N), nn.Linear(N, D))
    assert not found_in_sequence(Chain(wide, nn.Sequential(nn.ReLU(), nn.Linear(D, N), nn.Linear(N, D))))


def found_in_sequence(model):
    return found(model).feed_forward


def test_layers_are_blocks_of_one_class_one_after_the_other():
    assert found(Chain(Block(), Block())).layers == {"parts"}
    assert found(Twice(Block())).layers == {"parts"}
    assert not found(Chain(Block())).layers
    assert not found(SideBySide(Block(), FeedForward())).layers
    assert not found(Chain(nn.Linear(D, D), nn.Linear(D, D))).layers, "a block holds more than one map"


def test_places_are_the_innermost_modules_that_hold_the_weights():
    seen = found(Chain(Block(), Block()))
    assert seen.attention == {"parts.0.attention", "parts.1.attention"}
    assert seen.feed_forward == {"parts.0.mlp", "parts.1.mlp"}
