"""GGUF, for llama.cpp: decoders of the Llama layout, with the sizes of a stock config or sizes that differ by layer.

Sizes that differ by layer go under llama.cpp's architecture `deci`, which reads them as lists. What is written here is
what llama.cpp's own converter writes for the same weights: queries and keys have the two halves of each head interleaved,
as the rotary embedding of `llama` and `deci` wants them.

Axes: n_heads, d_head, d_model.
"""

from __future__ import annotations

import json
import os
import re
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hf_prune.errors import PruneError, UnsupportedModelError, VerificationError
from hf_prune.export.runtimes import REPORT, TOLERANCE, require_empty
from hf_prune.structure.inputs import example_inputs


if TYPE_CHECKING:
    import gguf
    from transformers import PreTrainedModel

FILE = "model.gguf"


@dataclass(frozen=True)
class Layout:
    """How llama.cpp names a model type: its architecture, the one for sizes that differ by layer, and whether rotary
    halves are interleaved."""

    architecture: str
    by_layer: str | None
    interleaves: bool


LAYOUTS = {
    "llama": Layout("LLAMA", "DECI", interleaves=True),
    "mistral": Layout("LLAMA", "DECI", interleaves=True),
    "qwen2": Layout("QWEN2", None, interleaves=False),
}


@dataclass(frozen=True)
class Written:
    """What was written. `max_difference` is that of the logits of Transformers reading the file; None for an architecture that
    it doesn't read, of which all tensors were read back and compared."""

    format: str
    architecture: str
    max_difference: float | None
    has_tokenizer: bool


def require_writable(config: Any) -> Layout:
    """The layout of a config, once it is known that GGUF can say it.

    Raises:
        PruneError: the package `gguf` is missing.
        UnsupportedModelError: with what can't be said.
    """
    if find_spec("gguf") is None:
        raise PruneError("--format gguf needs gguf, which isn't installed: `pip install 'hf_prune[export]'`")
    kind = config.model_type
    if kind not in LAYOUTS:
        raise UnsupportedModelError(f"--format gguf writes {', '.join(LAYOUTS)}; this is a {kind}")
    rope = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    layers = set(getattr(config, "layer_types", None) or ())
    for said, wanted, found in (
        ("rotary embeddings", "default", rope),
        ("hidden_act", "silu", config.hidden_act),
        ("attention", "over the whole text", "sliding" if "sliding_attention" in layers else "over the whole text"),
    ):
        if found != wanted:
            raise UnsupportedModelError(f"--format gguf writes {kind} with {said} {wanted}; here they are {found}")
    return LAYOUTS[kind]


def export_gguf(
    model: PreTrainedModel,
    directory: str | Path,
    *,
    dtype: torch.dtype = torch.float32,
    tokenizer_from: str | Path | None = None,
) -> Written:
    """Write `model` to `directory/model.gguf`, read the file again and compare; all of it or nothing.

    Args:
        model: in float32.
        directory: where to; made if it isn't there, and refused if it holds something.
        dtype: of the matrices in the file, that which the checkpoint was saved in: float32, bfloat16 or float16.
        tokenizer_from: a GGUF of the dense model, whose tokenizer is copied. Without it the file has none, and llama.cpp takes
            token ids only.

    Raises:
        PruneError: the package is missing or the directory isn't empty; nothing was begun.
        UnsupportedModelError: GGUF can't say the model; nothing was begun.
        VerificationError: the file holds something else; nothing was written.
    """
    layout, directory = require_writable(model.config), require_empty(directory)
    tensors = {name: value.detach() for name, value in model.state_dict().items()}
    sizes = _sizes(model, tensors)
    is_equal = all(len(set(values)) == 1 for values in sizes.values()) and not getattr(model.config, "hf_prune", None)
    if not is_equal and layout.by_layer is None:
        raise UnsupportedModelError(
            f"llama.cpp has one size for all layers of a {model.config.model_type}; prune it with uniform: true"
        )
    architecture = layout.architecture if is_equal or layout.by_layer is None else layout.by_layer
    named = dict(_named(tensors, architecture, sizes, layout.interleaves))
    directory.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".hf_prune-", suffix=".partial", dir=directory.parent) as scratch:
        beside = Path(scratch) / "export"
        beside.mkdir()
        _write(beside / FILE, model.config, layout, architecture, sizes, named, dtype, tokenizer_from)
        _compare_tensors(beside / FILE, named)
        reads_it = architecture == layout.architecture
        difference = _compare_logits(model, beside) if reads_it else None
        written = Written("gguf", architecture.lower(), difference, tokenizer_from is not None)
        (beside / REPORT).write_text(json.dumps(asdict(written), indent=2) + "\n", encoding="utf-8")
        if directory.exists():
            directory.rmdir()
        os.replace(beside, directory)
    return written


def _sizes(model: PreTrainedModel, tensors: Mapping[str, Tensor]) -> dict[str, list[int]]:
    """Heads, key/value heads and feed-forward width, layer by layer."""
    config = model.config
    d_head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    roles = {"heads": "self_attn.q_proj", "kv_heads": "self_attn.k_proj", "d_ff": "mlp.gate_proj"}
    sizes: dict[str, list[int]] = {}
    for size, module in roles.items():
        for layer in range(config.num_hidden_layers):
            weight = tensors.get(f"model.layers.{layer}.{module}.weight")
            if weight is None:
                raise UnsupportedModelError(
                    f"--format gguf: layer {layer} has no {module}; drop whole layers, not their parts"
                )
            sizes.setdefault(size, []).append(weight.shape[0] // (1 if size == "d_ff" else d_head))
    return sizes | {"d_head": [d_head]}


def _named(
    tensors: Mapping[str, Tensor], architecture: str, sizes: Mapping[str, list[int]], interleaves: bool
) -> Iterator[tuple[str, Tensor]]:
    """The weights under the names of GGUF."""
    import gguf

    kind = gguf.MODEL_ARCH[architecture]
    names = gguf.get_tensor_name_map(kind, len(sizes["heads"]))
    tied = tensors.get("lm_head.weight") is not None and (
        tensors["lm_head.weight"].data_ptr() == tensors["model.embed_tokens.weight"].data_ptr()
    )
    for name, tensor in tensors.items():
        if name == "lm_head.weight" and tied:
            continue
        found = names.get_name(name, try_suffixes=(".weight", ".bias"))
        has_bias = architecture == "QWEN2" and re.search(r"[qkv]_proj\.bias$", name)
        if found is None or (name.endswith(".bias") and not has_bias):
            raise UnsupportedModelError(f"--format gguf: llama.cpp's {architecture.lower()} has no {name}")
        match = re.search(r"layers\.(\d+)\.self_attn\.([qk])_proj", name)
        if interleaves and match:
            n_heads = sizes["heads" if match[2] == "q" else "kv_heads"][int(match[1])]
            # (n_heads, 2, d_head / 2, …) -> (n_heads, d_head / 2, 2, …)
            halves = tensor.reshape(n_heads, 2, -1, *tensor.shape[1:])
            tensor = halves.transpose(1, 2).reshape(tensor.shape)
        yield found, tensor


def _write(
    path: Path,
    config: Any,
    layout: Layout,
    architecture: str,
    sizes: Mapping[str, list[int]],
    named: Mapping[str, Tensor],
    dtype: torch.dtype,
    tokenizer_from: str | Path | None,
) -> None:
    import gguf

    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[gguf.MODEL_ARCH[architecture]])
    plain = {size: values[0] if architecture == layout.architecture else values for size, values in sizes.items()}
    d_head = sizes["d_head"][0]
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_vocab_size(config.vocab_size)
    writer.add_head_count(plain["heads"])
    writer.add_head_count_kv(plain["kv_heads"])
    writer.add_feed_forward_length(plain["d_ff"])
    writer.add_key_length(d_head)
    writer.add_value_length(d_head)
    writer.add_rope_dimension_count(d_head)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    if tokenizer_from is None:
        writer.add_tokenizer_model("none")
    else:
        for field in gguf.GGUFReader(tokenizer_from).fields.values():
            if field.name.startswith("tokenizer."):
                writer.add_key_value(field.name, field.contents(), *field.types[:2])
    for name, tensor in named.items():
        kind = _type(tensor, dtype)
        values = gguf.quants.quantize(tensor.float().contiguous().numpy(), kind)
        writer.add_tensor(name, values, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _type(tensor: Tensor, dtype: torch.dtype) -> gguf.GGMLQuantizationType:
    import gguf

    types = {torch.float16: gguf.GGMLQuantizationType.F16, torch.bfloat16: gguf.GGMLQuantizationType.BF16}
    return types.get(dtype, gguf.GGMLQuantizationType.F32) if tensor.dim() > 1 else gguf.GGMLQuantizationType.F32


def _compare_tensors(path: Path, named: Mapping[str, Tensor]) -> None:
    import gguf

    found = {each.name: each for each in gguf.GGUFReader(path).tensors}
    for name, tensor in named.items():
        held = found.pop(name, None)
        values = None if held is None else torch.from_numpy(gguf.quants.dequantize(held.data, held.tensor_type).copy())
        if values is None or not torch.equal(values.reshape(tensor.shape), tensor.float()):
            raise VerificationError(f"the GGUF file doesn't hold {name} as the model does. Nothing was written")
    if found:
        raise VerificationError(f"the GGUF file holds {min(found)}, which is none of the model. Nothing was written")


@torch.no_grad()
def _compare_logits(model: PreTrainedModel, directory: Path) -> float:
    """With Transformers reading the file, of the largest logit."""
    from transformers import AutoModelForCausalLM

    again = AutoModelForCausalLM.from_pretrained(directory, gguf_file=FILE, dtype=torch.float32).eval()
    inputs = example_inputs(model, batch_size=1, length=min(16, model.config.max_position_embeddings))
    expected, found = model.eval()(**inputs).logits, again(**inputs).logits
    worst = float((expected - found).abs().max() / expected.abs().max().clamp_min(1e-12))
    if not worst <= TOLERANCE:
        raise VerificationError(
            f"the GGUF file differs from the model by {worst:.1e} of the largest logit; expected at most {TOLERANCE:.0e}. "
            "Nothing was written"
        )
    return worst
