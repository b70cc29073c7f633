"""Two hosts: network namespaces joined by a cable (veth), one process on each, torchrun's rendezvous over their addresses."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hf_prune.training.checkpoints import last_complete
from tests.processes import ROOT
from tests.training.job import recipe
from tests.training.test_when_final_ddp import alike, ended, losses, trained


pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        shutil.which("ip") is None or os.geteuid() != 0, reason="making network namespaces takes root and iproute2"
    ),
]
ADDRESSES = ("10.201.77.1", "10.201.77.2")
TRAINING = {"save_strategy": "steps", "save_steps": 4}
PATIENCE = 20  # seconds that a process waits for the other


def ip(*arguments):
    return subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)


@pytest.fixture
def hosts():
    names = [f"hf-prune-{os.getpid()}-{number}" for number in (0, 1)]
    ends = [f"hfp{number}" for number in (0, 1)]
    try:
        for name in names:
            ip("netns", "add", name)
            ip("-n", name, "link", "set", "lo", "up")
        ip("-n", names[0], "link", "add", ends[0], "type", "veth", "peer", "name", ends[1], "netns", names[1])
        for name, end, address in zip(names, ends, ADDRESSES, strict=True):
            ip("-n", name, "address", "add", f"{address}/24", "dev", end)
            ip("-n", name, "link", "set", end, "up")
        yield list(zip(names, ends, ADDRESSES, strict=True))
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "delete", name], check=False)


def start(host, directory, options):
    """The part of the job that runs on one host."""
    name, end, address = host
    meets_here = address == ADDRESSES[0]  # torchrun can't tell by the host's name, which both have
    torchrun = ["-m", "torch.distributed.run", "--nnodes=2", "--nproc_per_node=1", "--rdzv_backend=c10d"]
    torchrun += [f"--rdzv_endpoint={ADDRESSES[0]}:29411", "--rdzv_id=job", f"--local_addr={address}"]
    torchrun += [f"--rdzv_conf=is_host={meets_here}"]
    ours = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "GLOO_SOCKET_IFNAME": end}
    program = [str(Path(__file__).with_name("job.py")), str(directory), "hosts", json.dumps(options)]
    return subprocess.Popen(
        ["ip", "netns", "exec", name, sys.executable, *torchrun, *program],
        cwd=ROOT,
        env=os.environ | ours | {"HF_PRUNE_TEST_PATIENCE": str(PATIENCE)},
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,  # torchrun and what it starts, to be ended together
    )


def test_one_is_cut_off_the_job_fails_clearly_and_resumes(tmp_path, hosts):
    options = {"recipe": recipe("when_final"), "training": TRAINING, "run": "run"}
    parts = [start(host, tmp_path, {**options, "wait_at": 10}) for host in hosts]
    try:
        waiting = [tmp_path / f"waits-{rank}" for rank in (0, 1)]
        for _ in range(3000):
            if all(path.exists() for path in waiting) or any(part.poll() is not None for part in parts):
                break
            time.sleep(0.1)
        assert all(path.exists() for path in waiting), [part.communicate()[1][-4000:] for part in parts]
        ip("-n", hosts[1][0], "link", "set", hosts[1][1], "down")
        (tmp_path / "go").touch()
        said = parts[0].communicate(timeout=300)[1]
    finally:
        for part in parts:
            if part.poll() is None:
                os.killpg(part.pid, signal.SIGKILL)
    assert parts[0].returncode == 1
    assert "Timed out waiting" in said or "Connection" in said, said[-4000:]
    assert last_complete(tmp_path / "run", 2).name == "checkpoint-8"

    ip("-n", hosts[1][0], "link", "set", hosts[1][1], "up")
    parts = [start(host, tmp_path, {**options, "resume": True}) for host in hosts]
    said = [part.communicate(timeout=300)[1] for part in parts]
    assert [part.returncode for part in parts] == [0, 0], said[0][-4000:] + said[1][-4000:]
    told, weights, _ = ended(tmp_path, "hosts")
    # two processes on one host, never interrupted
    expected, by_one_host, _ = trained(tmp_path, "whole", "when_final", model={}, training={**TRAINING, "weight_decay": 0.0, "max_grad_norm": 1.0})  # fmt: skip
    assert losses(told) == losses(expected)
    assert alike(weights[0], by_one_host[0]) and alike(weights[1], by_one_host[0])
