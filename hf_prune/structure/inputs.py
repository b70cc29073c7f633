"""Inputs made up from what a model declares, for counting and for checks where the user gave no data."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from hf_prune.errors import UnsupportedModelError


def example_inputs(model: nn.Module, batch_size: int = 2, length: int = 16, seed: int = 0) -> dict[str, Tensor]:
    """Seeded random inputs that `model(**inputs)` takes: token ids, pixels or spectrogram features.

    Args:
        model: a Transformers model, whose config says sizes.
        batch_size: samples.
        length: tokens of a sequence, cut to what the model's positions allow.
        seed: of the private generator.

    Returns:
        Tensors on the model's device: int64 ids (batch, length), floats in the model's dtype.

    Raises:
        UnsupportedModelError: the model's main input is none of those; the remedy is to pass calibration data.
    """
    generator = torch.Generator().manual_seed(seed)
    parameter = next(model.parameters())
    config: Any = model.config
    text = _sub(config, "text_config")
    vision = _sub(config, "vision_config")
    inputs: dict[str, Tensor] = {}

    def ids(of: object) -> Tensor:
        positions = getattr(of, "max_position_embeddings", None) or getattr(of, "max_target_positions", None) or length
        # positions of RoBERTa-like models start after the padding token
        n_tokens = max(1, min(length, int(positions) - 2))
        vocabulary = int(getattr(of, "vocab_size", 0) or 0)
        special = {getattr(of, f"{name}_token_id", None) for name in ("pad", "eos", "bos")}
        low = max([token for token in special if isinstance(token, int) and token < vocabulary // 2], default=0) + 1
        return torch.randint(min(low, vocabulary - 1), vocabulary, (batch_size, n_tokens), generator=generator)

    main = getattr(model, "main_input_name", "input_ids")
    has_text = text is not config or main == "input_ids"
    if main == "input_features":
        frames = 2 * int(config.max_source_positions)
        inputs[main] = torch.randn(batch_size, int(config.num_mel_bins), frames, generator=generator)
    if main == "pixel_values" or vision is not config:
        size = vision.image_size
        height, width = size if isinstance(size, (list, tuple)) else (size, size)
        channels = int(getattr(vision, "num_channels", 3))
        inputs["pixel_values"] = torch.randn(batch_size, channels, int(height), int(width), generator=generator)
    if has_text:
        inputs["input_ids"] = ids(text)
        if parameter.device.type != "meta":  # all ones; code looks into a mask, and a number is what meta has not
            inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    if getattr(config, "is_encoder_decoder", False):
        inputs["decoder_input_ids"] = ids(text)
    if not inputs:
        raise UnsupportedModelError(
            f"{type(model).__name__} takes {main!r}, for which no inputs can be made up; pass `calibration`"
        )
    dtype = parameter.dtype if parameter.is_floating_point() else torch.float32
    return {
        name: value.to(parameter.device, dtype) if value.is_floating_point() else value.to(parameter.device)
        for name, value in inputs.items()
    }


def _sub(config: Any, name: str) -> Any:
    """A nested config, or the config itself."""
    return getattr(config, name, None) or config
