"""llama.cpp itself, in the fork that `ik-llama-cpp-python` brings: the oracle of what is written for it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch


def last_logits(path: Path, ids: Sequence[int], n_vocab: int) -> torch.Tensor:
    """Of the next token after `ids`, with values in float16."""
    from ik_llama_cpp import _ctypes_api as api
    from ik_llama_cpp._internals import IkModel
    from ik_llama_cpp.llama import make_batch_range

    model = IkModel(str(path))
    options = api.llama_context_default_params()
    options.type_k = 0  # float32; values have to be in float16 without flash attention
    options.flash_attn = False
    options.n_ctx, options.n_threads, options.n_threads_batch = 64, 1, 1
    context = api.llama_init_from_model(model.model, options)
    assert context, "llama.cpp refuses the file"
    batch = make_batch_range(list(ids), pos_start=0, logits_last=True)
    assert api.llama_decode(context, batch) == 0
    found = torch.tensor(api.llama_get_logits_ith(context, -1)[:n_vocab])
    api.llama_batch_free(batch)
    api.llama_free(context)
    model.close()
    return found
