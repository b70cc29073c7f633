"""Calibration samples that a language model writes itself: text of all the kinds that it knows, where data at hand are of one.

Miles Williams, George Chrysostomou, Nikolaos Aletras, "Self-calibration for Language Model Quantization and Pruning", NAACL 2025
(arXiv:2410.17170); before them, for quantization-aware training, Zechun Liu et al., "LLM-QAT", 2023 (arXiv:2305.17888).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers import GenerationConfig

from hf_prune.calibration.batches import Inputs
from hf_prune.calibration.loss import predicts_next_token
from hf_prune.calibration.reduction import from_all_processes, rank_and_world
from hf_prune.errors import CalibrationError
from hf_prune.structure.cost import evaluating


AT_ONCE = 32  # samples; fixed, so that what is written depends neither on calibration.batch_size nor on the number of processes
N_OPENING = 8  # tokens drawn as the model has it, so that texts differ
TEMPERATURE = 0.8  # of the others, so that they stay text


def self_generated(model: nn.Module, samples: int, length: int, batch_size: int, seed: int) -> list[Inputs]:
    """Texts drawn from a causal language model's own distribution, as calibration batches of ids.

    Each begins after the token that begins texts, which isn't in it, and goes on past tokens that end one. The first few tokens are
    drawn at temperature 1, the others at 0.8. Processes share the work, and all return all of it.

    Args:
        model: on its device; it is left as it was, random numbers too.
        samples: how many; none for an empty list.
        length: tokens of each.
        batch_size: samples of each batch that is returned.
        seed: of the draws.

    Raises:
        CalibrationError: the model doesn't write text, has no token to begin with, or fewer positions than `length`.
    """
    if not samples:
        return []
    begin = _first_token(model, length)
    rank, world = rank_and_world()
    parts = range(0, samples, AT_ONCE)
    with torch.no_grad(), evaluating(model), _plain_generation(model):
        mine = {
            start: _write(model, begin, min(AT_ONCE, samples - start), length, seed + start)
            for start in parts[rank::world]
        }
    written = {start: ids for part in from_all_processes(mine) for start, ids in part.items()}
    ids = torch.cat([written[start] for start in parts])
    return [{"input_ids": batch} for batch in ids.split(batch_size)]


def _write(model: nn.Module, begin: int, samples: int, length: int, seed: int) -> Tensor:
    """(samples, length) ids, int64, on the CPU."""
    device = next(model.parameters()).device
    ids = torch.full((samples, 1), begin, device=device)
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        for n_tokens, temperature in ((min(N_OPENING, length), 1.0), (length - N_OPENING, TEMPERATURE)):
            if n_tokens > 0:
                how = GenerationConfig(
                    do_sample=True,
                    temperature=temperature,
                    top_k=0,
                    top_p=1.0,
                    max_new_tokens=n_tokens,
                    pad_token_id=begin,
                    use_cache=True,
                )
                ids = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=how)  # type: ignore[operator]
    return ids[:, 1:].cpu()


def _first_token(model: nn.Module, length: int) -> int:
    if not predicts_next_token(model):
        raise CalibrationError(
            f"calibration.self_generated: {type(model).__name__} isn't a causal language model, which alone can write its own "
            "calibration text; leave it out and pass data"
        )
    config = model.config.get_text_config()  # type: ignore[union-attr, operator]
    n_positions = getattr(config, "max_position_embeddings", None)
    if n_positions is not None and length > n_positions:  # the last token isn't read, but the one to begin with is
        raise CalibrationError(
            f"calibration.length is {length}, and the model, which is to write samples itself, has {n_positions} positions; "
            f"set calibration.length to at most {n_positions}"
        )
    for source in (model.generation_config, config):
        for name in ("bos_token_id", "eos_token_id"):
            token = getattr(source, name, None)
            token = token[0] if isinstance(token, list) and token else token
            if isinstance(token, int):
                return token
    raise CalibrationError(
        "calibration.self_generated: the model's generation_config has neither bos_token_id nor eos_token_id, after which a text "
        "could begin; set one of them, or leave it out and pass data"
    )


@contextmanager
def _plain_generation(model: nn.Module) -> Iterator[None]:
    """Without the model's own settings, which would end texts, punish repetitions or cut off rare words."""
    own = model.generation_config
    model.generation_config = GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = own
