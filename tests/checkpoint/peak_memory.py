"""Run by test_memory.py in a process of its own: `peak_memory.py DIRECTORY DTYPE` prints what loading added, in bytes.

Pages of the weight files that are mapped count in what is resident, though the system drops them when it needs the room.
What is allocated is counted apart from them, read every millisecond.
"""

import json
import sys
import threading
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, LlamaForCausalLM

import hf_prune


def resident(which):
    status = Path("/proc/self/status").read_text()
    return int(next(line.split()[1] for line in status.splitlines() if line.startswith(f"{which}:"))) << 10


if __name__ == "__main__":
    assert hf_prune.__version__ and LlamaForCausalLM.from_pretrained  # imported before it is measured
    directory, dtype = sys.argv[1:]
    before = {which: resident(which) for which in ("VmRSS", "RssAnon")}
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    peaks, is_done = [0], threading.Event()

    def watch():
        while not is_done.wait(0.001):
            peaks[0] = max(peaks[0], resident("RssAnon"))

    watcher = threading.Thread(target=watch)
    watcher.start()
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=getattr(torch, dtype))
    total = sum(parameter.sum().item() for parameter in model.parameters())  # each page is touched
    is_done.set()
    watcher.join()
    added = {"resident": resident("VmHWM") - before["VmRSS"], "allocated": peaks[0] - before["RssAnon"]}
    print(json.dumps({**added, "total": total}))
