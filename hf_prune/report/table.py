"""The printed report: what left site by site, dense beside pruned, and what tables don't say."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any

from rich.table import Table

from hf_prune.report.verdict import verdict


_FEW = 8  # units that are named one by one
_WORST = 3  # classes or domains that are named in a line


def site_table(content: Mapping[str, Any]) -> Table:
    """What left of each site, and what is kept."""
    table = Table()
    for column in ("target", "site", "of", "kept", "left"):
        table.add_column(column, justify="right" if column in ("of", "kept") else "left", overflow="fold")
    for target, name, n_units, n_kept, left in site_rows(content):
        table.add_row(target, name, f"{n_units:,}", f"{n_kept:,}", left)
    return table


def site_rows(content: Mapping[str, Any]) -> Iterator[tuple[str, str, int, int, str]]:
    """Target, sites, units of each, kept of each, what left in words; one row for sites that differ by number only."""
    alike: dict[tuple[str, str, int, int, str], list[str]] = {}
    for site in content.get("sites") or ():
        if site["removed"]:
            row = site["target"], _pattern(site["name"]), site["n_units"], site["n_kept"], _left(site)
            alike.setdefault(row, []).append(site["name"])
    for weight in content.get("weights") or ():
        n_entries, n_zero = weight["n_entries"], weight["n_zero"]
        if n_zero:
            row = "weights", _pattern(weight["name"]), n_entries, n_entries - n_zero, f"{n_zero / n_entries:.1%} zero"
            alike.setdefault(row, []).append(weight["name"])
    for (target, _, n_units, n_kept, left), names in alike.items():
        yield target, _together(names), n_units, n_kept, left


def totals_table(content: Mapping[str, Any]) -> Table:
    """Dense beside pruned: what was counted, then what was measured, then what was estimated."""
    table = Table()
    table.add_column("")
    for column in ("dense", "pruned", "change"):
        table.add_column(column, justify="right")
    totals, measured, estimated = content["totals"], content["measured"], content["estimated"]
    dense, pruned = totals["dense"], totals["pruned"]
    counted = [
        ("parameters", dense["parameters"], pruned["parameters"], relative_change),
        (f"MACs, {sample_shape(totals)}", dense["macs"], pruned["macs"], relative_change),
    ]
    if files := measured.get("bytes_on_disk"):
        counted.append(("bytes on disk", files["dense"], files["pruned"], relative_change))
    else:
        counted.append(("bytes in memory", dense["bytes"], pruned["bytes"], relative_change))
    metrics, latency = measured.get("metrics", {}), measured.get("latency_ms", {})
    gain = _gain if is_smaller(content) else no_change
    # not every run measures the dense model
    runs = [
        (name, metrics.get("dense", {}).get(name), new, difference) for name, new in metrics.get("pruned", {}).items()
    ]
    runs += [
        (f"latency, batch of {size} (ms)", latency.get("dense", {}).get(size), new, gain)
        for size, new in latency.get("pruned", {}).items()
    ]
    guesses = [
        (name, estimated["dense"].get(name), new, relative_change) for name, new in estimated.get("pruned", {}).items()
    ]
    for title, rows in (("counted", counted), ("measured", runs), ("estimated", guesses)):
        if rows:
            table.add_section()
            table.add_row(f"[italic]{title}[/italic]")
            for name, old, new, change in rows:
                table.add_row(f"  {name}", shown(old), shown(new), change(old, new))
    return table


def lines(content: Mapping[str, Any]) -> list[str]:
    """What the tables don't say."""
    said = []
    removed = {target: share for target, share in content["sparsity"].items() if target != "weights"}
    if removed:
        shares = ", ".join(f"{share:.1%} of {target}" for target, share in removed.items())
        said.append(f"left: {shares} (heads and neurons: of those in kept layers)")
    if "weights" in content["sparsity"]:
        zeros = content["sparsity"]["weights"]
        said.append(f"zero: {zeros:.1%} of the entries of pruned weights; zeros make no dense kernel faster")
    if content.get("n_near_ties"):
        said.append(
            f"near-ties: {content['n_near_ties']} units or weights scored so close to the cut that other hardware may "
            "choose differently"
        )
    if content["measured"].get("metrics", {}).get("dense"):
        said.append(f"dense: {dense_words(content)}")
    if rows := part_rows(content):
        about = content["measured"]["by_part"]
        worst = "; ".join(f"{name} {shown(old)} → {shown(new)} ({n})" for name, n, old, new in rows[:_WORST])
        said.append(f"by {about['of']}, {about['metric']} where it got worst (samples): {worst}; of {len(rows)}")
    check = content["verification"]
    if check:
        said.append(
            f"verified on {check['inputs']} inputs: the smaller model differs from the masked one by at most "
            f"{check['max_difference']:.1e} of the largest output ({check['dtype']}, tolerance {check['tolerance']:.0e})"
        )
    said += verdict(content).values()
    said += [f"note: {note}" for note in content["notes"]]
    if times := content.get("seconds"):
        said.append("seconds: " + ", ".join(f"{name} {spent:.1f}" for name, spent in times.items()))
    where = ", ".join(f"{name} {version}" for name, version in content["versions"].items())
    return [*said, f"on {hardware_words(content)}; seed {content['seed']}; {where}"]


def part_rows(content: Mapping[str, Any]) -> list[tuple[str, int, float, float]]:
    """Class or domain, samples, dense and pruned value; first what lost most: points of accuracy, or times the perplexity."""
    about = (content.get("measured") or {}).get("by_part") or {}
    dense, pruned = about.get("dense") or {}, about.get("pruned") or {}
    rows = [(name, about["n_samples"][name], dense[name], new) for name, new in pruned.items() if name in dense]
    is_accuracy = about.get("metric") == "accuracy"
    return sorted(rows, key=lambda row: row[3] - row[2] if is_accuracy else -row[3] / row[2])


def dense_words(content: Mapping[str, Any]) -> str:
    """What the pruned model was compared with."""
    if (content.get("recipe") or {}).get("training"):
        return "the same model, trained alike for as long without pruning"
    return "the model before pruning"


def is_smaller(content: Mapping[str, Any]) -> bool:
    """Whether anything left: zeros alone change neither parameters nor MACs, and no time measured is theirs."""
    totals = content.get("totals") or {}
    dense, pruned = totals.get("dense") or {}, totals.get("pruned") or {}
    return any((pruned.get(name) or 0) < (dense.get(name) or 0) for name in ("parameters", "macs"))


def sample_shape(totals: Mapping[str, Any]) -> str:
    """The input that MACs were counted on."""
    shapes = totals.get("macs_of") or {}
    shape = shapes.get("input_ids") or next(iter(shapes.values()), None)
    return f"input {' × '.join(map(str, shape))}" if shape else "not counted"


def hardware_words(content: Mapping[str, Any]) -> str:
    """The machine in a few words."""
    found = content.get("hardware") or {}
    named = [str(found[name]) for name in ("gpu", "cpu", "machine") if found.get(name)]
    counts = [f"{found[name]} {name}" for name in ("cores", "threads") if found.get(name)]
    return ", ".join([*named, *counts])


def shown(value: Any) -> str:
    """A number as people read it."""
    if value is None:
        return "-"
    return f"{value:,}" if isinstance(value, int) else f"{value:,.4g}" if abs(value) < 1e4 else f"{value:,.0f}"


def difference(old: Any, new: Any) -> str:
    """Of a metric; a percentage of an accuracy would be taken for points."""
    return f"{new - old:+.4g}" if old is not None and new is not None else ""


def relative_change(old: Any, new: Any) -> str:
    """Of a size: how much it changed by."""
    return f"{new / old - 1:+.1%}" if old and new is not None else ""


def _gain(old: Any, new: Any) -> str:
    return f"{old / new:.2f}× as fast" if old and new else ""


def no_change(old: Any, new: Any) -> str:
    """Of the times of a model from which nothing left: a difference is chance."""
    return ""


def _left(site: Mapping[str, Any]) -> str:
    removed = site["removed"]
    if not site["n_kept"]:
        return "all, with its layer"
    share = f"{len(removed) / site['n_units']:.1%}"
    return f"{share}: {', '.join(map(str, removed))}" if len(removed) <= _FEW else share


def _pattern(name: str) -> str:
    return re.sub(r"(?<=\.)\d+(?=\.|$)", "*", name)


def _together(names: Sequence[str]) -> str:
    """`layer.{0,2-4}.self` for names that differ in one number; in several, the pattern and how many."""
    if len(names) == 1:
        return names[0]
    columns = list(zip(*(name.split(".") for name in names), strict=True))
    if sum(len(set(column)) > 1 for column in columns) > 1:
        return f"{_pattern(names[0])} ({len(names)} of them)"
    return ".".join(
        column[0] if len(set(column)) == 1 else f"{{{_runs(sorted(map(int, column)))}}}" for column in columns
    )


def _runs(numbers: Sequence[int]) -> str:
    """0, 2, 3, 4 as "0,2-4"."""
    found = []
    for _, pairs in groupby(enumerate(numbers), key=lambda pair: pair[1] - pair[0]):
        run = [number for _, number in pairs]
        found.append(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]))
    return ",".join(found)
