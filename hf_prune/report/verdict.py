"""What a result is good for: how it loads, what can serve it, whether it runs faster; each with the reason.

What is said of engines is what is known of their formats, not tried here: see `ENGINES`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Engine:
    """A serving engine: whether it takes sizes that no stock config says, and why or why not; and the classes of which it
    takes them all the same, with whole layers, and how."""

    name: str
    takes_manifest: bool
    why: str
    classes: tuple[str, ...] = ()
    how: str = ""

    def says(self, content: Mapping[str, Any]) -> tuple[bool, str]:
        """Whether it takes this result, and why."""
        parts = any(site["target"].startswith("layers.") and site["removed"] for site in content.get("sites") or ())
        if content["model"]["class"] in self.classes and not parts:
            return True, self.how
        return self.takes_manifest, self.why


ENGINES = (
    Engine("ONNX Runtime", True, "an exported graph holds its own shapes"),
    Engine("OpenVINO", True, "an exported graph holds its own shapes"),
    Engine("vLLM", False, "it builds its models from the stock config, which doesn't say these sizes"),
    Engine("TGI", False, "it builds its models from the stock config, which doesn't say these sizes"),
    Engine(
        "llama.cpp",
        False,
        "sizes that differ by layer are in its format for whole layers of the Llama layout only",
        ("LlamaForCausalLM", "MistralForCausalLM"),
        "`hf-prune export --format gguf` writes its sizes by layer, where no biases were added",
    ),
)  # fmt: skip
# Matrix kernels work on tiles: widths that don't fill the last one gain less, or nothing (LLM-Pruner issue 33).
TILE = 8
# llama.cpp quantises rows in blocks of 32 numbers: other widths stay in 16 bits.
QUANTISED_BLOCK = 32


def verdict(content: Mapping[str, Any]) -> dict[str, str]:
    """Of a report's content: `loads`, `served_by`, `faster`, a line each; empty where no checkpoint was made.

    Args:
        content: as `PruningReport.to_dict()`.
    """
    checkpoint = content.get("checkpoint") or {}
    if not checkpoint:
        return {}
    return {"loads": _loads(checkpoint), "served_by": _served_by(content), "faster": _faster(content)}


def _loads(checkpoint: Mapping[str, Any]) -> str:
    needs = checkpoint["loads_with"]
    otherwise = ", or trust_remote_code=True where it isn't installed" if needs == "hf_prune" else ""
    return f"loads with {needs}{otherwise}: {checkpoint['why']}"


def _served_by(content: Mapping[str, Any]) -> str:
    checkpoint, name = content["checkpoint"], content["model"]["class"]
    if checkpoint["loads_with"] == "torch":
        return "served by: what runs the PyTorch module itself"
    if checkpoint["loads_with"] == "transformers":
        rough = [width for width in _widths(content) if width % QUANTISED_BLOCK]
        note = f"; llama.cpp quantises widths that {QUANTISED_BLOCK} divides, and {rough[0]} is none" if rough else ""
        return f"served by: whatever serves the dense {name}, since it is a stock checkpoint{note}"
    said = [(engine.name, *engine.says(content)) for engine in ENGINES]
    able = _by_reason((name, why) for name, takes, why in said if takes)
    unable = _by_reason((name, why) for name, takes, why in said if not takes)
    return f"served by: Transformers; {able}; not {unable}"


def _by_reason(engines: Iterator[tuple[str, str]]) -> str:
    """Names that share a reason, then the reason."""
    named: dict[str, list[str]] = {}
    for name, why in engines:
        named.setdefault(why, []).append(name)
    return "; ".join(f"{' and '.join(names)} ({why})" for why, names in named.items())


def _faster(content: Mapping[str, Any]) -> str:
    totals = content["totals"]
    dense, pruned = totals["dense"], totals["pruned"]
    if pruned["parameters"] >= dense["parameters"] and not _fewer(dense["macs"], pruned["macs"]):
        if any(site["removed"] for site in content.get("sites") or ()):
            return "faster: no, what left is masked and still computed; shrink_ removes it"
        if content.get("weights"):
            return (
                "faster: no, zeros cost what other numbers cost in dense kernels, and serving engines have dropped those "
                "for 2:4 (vLLM in its pull request 36799)"
            )
        return "faster: no, nothing left"
    what = "MACs" if _fewer(dense["macs"], pruned["macs"]) else "parameters"
    n_before, n_after = (totals[which][what.lower()] for which in ("dense", "pruned"))
    said = (
        f"faster: yes, on any hardware: its dense matrices are smaller, by {1 - n_after / n_before:.1%} of the {what}"
    )
    latency = content["measured"].get("latency_ms") or {}
    gains = [
        f"{latency['dense'][size] / after:.2f}× at batch {size}"
        for size, after in (latency.get("pruned") or {}).items()
        if after and latency.get("dense", {}).get(size)
    ]
    said += f"; measured {', '.join(gains)}" if gains else "; at small batches it gains less than that"
    rough = [width for width in _widths(content) if width % TILE]
    return said + (
        f"; round_to: {TILE} would give kernels widths that fill their tiles ({rough[0]} doesn't)" if rough else ""
    )


def _fewer(before: int | None, after: int | None) -> bool:
    return before is not None and after is not None and after < before


def _widths(content: Mapping[str, Any]) -> list[int]:
    """Feed-forward widths that pruning made."""
    sites = content.get("sites") or ()
    return sorted(
        {site["n_kept"] for site in sites if site["target"] == "ffn_neurons" and site["removed"] and site["n_kept"]}
    )
