"""Inputs for any model: each argument of `forward` by its name, images and sounds at the places of the text they take."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from transformers import PreTrainedModel

from .shrinking import FIRST_WORD, WORDS


BATCH = 2
LENGTH = 12


class Draw:
    """Random inputs from one generator, and the sizes that the config and its sub-configs name."""

    def __init__(self, model: PreTrainedModel, seed: int) -> None:
        self.model = model
        self.generator = torch.Generator().manual_seed(seed)
        self.made: dict[str, Any] = {}
        self.configs = list(_configs(model.config))

    def size(self, *names: str, default: int = 0) -> Any:
        """The first of these fields that the config, or a sub-config, has."""
        for name in names:
            for config in self.configs:
                value = config.__dict__.get(name, config.__dict__.get(config.attribute_map.get(name, ""), None))
                if value is not None and not isinstance(value, bool):
                    return value
        return default

    def ids(self, *shape: int, low: int = FIRST_WORD, high: int = WORDS) -> torch.Tensor:
        words = self.size("vocab_size", default=high)
        return torch.randint(
            low, min(high, words) if isinstance(words, int) else high, shape, generator=self.generator
        )

    def floats(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=self.generator)


def _configs(config: Any) -> Any:
    yield config
    for value in list(config.__dict__.values()):
        if hasattr(value, "attribute_map"):
            yield from _configs(value)


def _pair(value: Any, default: int) -> tuple[int, int]:
    if isinstance(value, Mapping):
        return value.get("height", default), value.get("width", default)
    if isinstance(value, (list, tuple)):
        return (value[0], value[-1])
    return (value or default,) * 2


def _pixels(draw: Draw) -> torch.Tensor:
    height, width = _pair(draw.size("image_size", "img_size"), 32)
    return draw.floats(BATCH, draw.size("num_channels", "in_channels", "in_chans", default=3), height, width)


def _patches(draw: Draw, temporal: int) -> torch.Tensor:
    """Flattened patches of `BATCH` images of 4 × 4 patches."""
    patch, channels = (
        draw.size("patch_size", default=8),
        draw.size("in_channels", "in_chans", "num_channels", default=3),
    )
    return draw.floats(BATCH * 16, (channels if isinstance(channels, int) else 3) * temporal * patch**2)


def _video(draw: Draw) -> torch.Tensor:
    frames = draw.size("num_frames", "frames_per_clip", default=4)
    return torch.stack([_pixels(draw) for _ in range(frames)], dim=1)


def _features(draw: Draw) -> torch.Tensor:
    """Mel frames: channels first where the model says how many positions it has, else time first."""
    bins = draw.size("num_mel_bins", "n_mels", "feature_size", "input_feat_per_channel", "input_dim", default=16)
    positions = draw.size("max_source_positions")
    if positions and draw.size("num_mel_bins"):
        return draw.floats(BATCH, bins, 2 * positions)
    return draw.floats(BATCH, 64, bins)


Make = Callable[[Draw], Any]


def channels_first(draw: Draw) -> torch.Tensor:
    """Mel bins before frames, as many frames as the model has positions, if it says."""
    bins = draw.size("num_mel_bins", "n_mels", "feature_size", default=16)
    return draw.floats(BATCH, bins, 2 * draw.size("max_source_positions", default=32))


def wave(draw: Draw) -> torch.Tensor:
    """One channel of sound."""
    return draw.floats(BATCH, 1, 1920)


def several_images(draw: Draw) -> torch.Tensor:
    """Two images to a text."""
    return torch.stack([_pixels(draw), _pixels(draw)], dim=1)


def _frame_mask(draw: Draw) -> torch.Tensor:
    """Ones for every frame of the features: the axis that isn't the bins."""
    shape = draw.made["input_features"].shape
    bins = draw.size("num_mel_bins", "n_mels", "feature_size", "input_feat_size", default=16)
    return torch.ones(shape[0], shape[-1] if shape[1] == bins else shape[1], dtype=torch.long)


def _grid(draw: Draw) -> torch.Tensor:
    return torch.tensor([[1, 4, 4]] * BATCH)


def video(draw: Draw) -> torch.Tensor:
    """Frames before channels."""
    return _video(draw)


def flat(temporal: int) -> Make:
    """Flattened patches of this many frames each."""
    return lambda draw: _patches(draw, temporal)


def floats(*shape: int) -> Make:
    return lambda draw: draw.floats(BATCH, *shape)


def ids(*shape: int, high: int = WORDS) -> Make:
    return lambda draw: draw.ids(BATCH, *shape, high=high)


def constant(value: Any) -> Make:
    return lambda draw: value


def text_with(count: int, *fields: str) -> Make:
    """Words around this many tokens whose id is one of these fields of the config."""

    def make(draw: Draw) -> torch.Tensor:
        places = torch.full((BATCH, count), draw.size(*fields))
        return torch.cat([draw.ids(BATCH, 2), places, draw.ids(BATCH, LENGTH - 2)], dim=1)

    return make


def ones(*shape: int) -> Make:
    return lambda draw: torch.ones(BATCH, *shape, dtype=torch.long)


def _flat(draw: Draw) -> torch.Tensor:
    return _patches(draw, draw.size("temporal_patch_size", default=1))


# Argument of `forward` -> how to make it, in this order. Those of `ALWAYS` are given wherever `forward` has them, others
# if they are required, or if a type's entry names them.
MAKERS: dict[str, Make] = {
    "input_ids": lambda d: d.ids(BATCH, LENGTH),
    "decoder_input_ids": lambda d: d.ids(BATCH, 7),
    "bbox": lambda d: d.ids(BATCH, LENGTH, 2, low=0, high=9).repeat(1, 1, 2).cumsum(-1),
    "pixel_values": _pixels,
    "image_sizes": lambda d: torch.tensor([d.made["pixel_values"].shape[-2:]] * BATCH),
    "pixel_values_videos": _video,
    "input_features": _features,
    "input_features_mask": _frame_mask,
    "feature_attention_mask": _frame_mask,
    "input_values": lambda d: d.floats(BATCH, 4000),
    "inputs": lambda d: d.floats(BATCH, LENGTH, d.size("d_model", "hidden_size")),
    "inputs_embeds": lambda d: d.floats(BATCH, LENGTH, d.size("hidden_size")),
    "past_values": lambda d: d.floats(
        BATCH, d.size("context_length", default=32), d.size("num_input_channels", default=1)
    ),
    "pixel_mask": lambda d: torch.ones(BATCH, *_pair(d.size("image_size"), 32), dtype=torch.long),
}  # fmt: skip
ALWAYS = (
    "input_ids", "decoder_input_ids", "bbox", "pixel_values", "image_sizes", "input_features", "input_features_mask",
    "feature_attention_mask", "input_values", "past_values",
)  # fmt: skip
# Arguments that describe another, and are left out with it.
FOLLOWS = {
    "image_sizes": "pixel_values",
    "input_features_mask": "input_features",
    "feature_attention_mask": "input_features",
}
# What takes the place of these where `forward` has the grid of patches beside them.
FLAT = {"image_grid_thw": "pixel_values", "grid_thw": "hidden_states"}
# Which of a model's own methods counts the places that an input takes in the text, and the config fields of its token.
PLACES = (
    ("get_image_features", "pixel_values", ("image_token_id", "image_token_index")),
    ("get_audio_features", "input_features", ("audio_token_id", "audio_token_index")),
    ("get_audio_features", "input_values", ("audio_token_id", "audio_token_index")),
)  # fmt: skip


def make_inputs(model: PreTrainedModel, changes: Mapping[str, Make | None], seed: int) -> dict[str, Any]:
    """Keyword arguments of `forward`; `changes` gives makers of this type's own, None leaves an argument out."""
    draw, made = Draw(model, seed), {}
    draw.made = made
    parameters = inspect.signature(model.forward).parameters
    makers = MAKERS | dict(changes)
    for grid, patches in FLAT.items():
        if grid in parameters and grid not in changes:
            patches = patches if patches in parameters else "pixel_values"
            makers |= {grid: _grid} | ({} if patches in changes else {patches: _flat})
    for name, make in makers.items():
        wanted = name in ALWAYS or name in changes or name not in MAKERS
        follows = FOLLOWS.get(name, name)
        if follows != name and follows not in made:
            continue
        if name in parameters and make and (wanted or parameters[name].default is inspect.Parameter.empty):
            made[name] = make(draw)
    if "input_ids" in made:
        _place(draw, parameters)
        if "attention_mask" in parameters and "attention_mask" not in changes:
            made["attention_mask"] = torch.ones(made["input_ids"].shape[:2], dtype=torch.long)
    return made


def _place(draw: Draw, parameters: Mapping[str, Any]) -> None:
    """Puts as many image and audio tokens into the text as the model makes features of them."""
    made, ids = draw.made, draw.made["input_ids"]
    for method, source, fields in PLACES:
        features = [getattr(module, method) for module in draw.model.modules() if hasattr(module, method)]
        token = draw.size(*fields, default=-1)
        placed = int((ids == token).sum()) > BATCH  # the type's own entry puts them there
        if not features or token < 0 or source not in made or placed:
            continue
        takes = inspect.signature(features[-1]).parameters
        optional = (
            {"input_ids"}
            if takes.get("input_ids", inspect.Parameter).default is not inspect.Parameter.empty
            else set()
        )
        with torch.no_grad():
            given = {name: made[name] for name in made if name in takes and name not in optional}
            found = features[-1](**{source: made[source], **given})
        count = _rows(found) // BATCH
        ids = torch.cat([ids[:, :2], torch.full((BATCH, count), token), ids[:, 2:]], dim=1)
        if "mm_token_type_ids" in parameters:
            made["mm_token_type_ids"] = (ids == token).long()
    made["input_ids"] = ids


def _rows(found: Any) -> int:
    """How many vectors a model's features are."""
    pooled = getattr(found, "pooler_output", None)
    found = pooled if pooled is not None else getattr(found, "last_hidden_state", found)
    if isinstance(found, (list, tuple)):
        return sum(map(_rows, found))
    return found.numel() // found.shape[-1]
