"""Models after removal, and how their outputs are compared."""

import torch

from hf_prune.apply.masks import set_masks
from hf_prune.apply.shrink import remove_masked_
from hf_prune.checkpoint import settle_config_
from hf_prune.plan import KeepMasks
from hf_prune.structure import inspect_model
from tests import zoo


torch.set_num_threads(1)


def shrunk(name, dtype=torch.float32, targets=("ffn_neurons", "attention_heads", "layers"), uneven=True):
    """The tiny model `name` without half its heads, 8 or 16 neurons a site and the first block, and the verdict."""
    model = zoo.build(name, dtype)
    return model, shrink_(model, targets, uneven)


def shrink_(model, targets, uneven=True):
    units = {}
    for number, site in enumerate(inspect_model(model).sites):
        if site.kind in targets:
            n_removed = {
                "layers": 1,
                "layers.attention": 1,
                "layers.feed_forward": 1,
                "attention_heads": site.n_units // 2,
                "ffn_neurons": 8 + 8 * uneven * (number % 2),
            }
            keep = torch.ones(site.n_units, dtype=torch.bool)
            keep[: n_removed[site.kind]] = False
            units[site.key] = keep
    set_masks(model, KeepMasks(units=units))
    return settle_config_(model, remove_masked_(model).kept_layers)


def outputs(model, inputs):
    with torch.no_grad():
        return {key: value for key, value in model.eval()(**inputs).items() if isinstance(value, torch.Tensor)}


def assert_close(a, b, tolerance=1e-6):
    assert a.keys() == b.keys()
    for key in a:
        assert (a[key] - b[key]).abs().max() <= tolerance * a[key].abs().max()
