"""Three small trainings through the command line, and a hash of all they leave: what a change of structure must keep.

`python tests/stored/record.py` prints the JSON that `tests/stored/results.json` holds. Rounding depends on the
processor, so the runs are pinned to plain instructions and one thread, and a probe of the same operations says whether
two machines round alike.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

PINNED = {
    "ATEN_CPU_CAPABILITY": "default",
    "ONEDNN_MAX_CPU_ISA": "AVX2",
    "MKL_CBWR": "COMPATIBLE",
    "MKL_NUM_THREADS": "1",
    "OMP_NUM_THREADS": "1",
}
RUNS = {
    "trades": (
        "trades(beta=6) + ccm(begin=1) + ccr(begin=1) + ema(decay=0.9)",
        ["--model", "small-cnn", "--width", "8", "--optimizer", "adam", "--lr", "0.002", "--schedule", "constant"],
    ),
    "pgd-at": (
        "pgd-at + awp + label-smoothing + swa(begin=1)",
        ["--model", "small-cnn", "--width", "8", "--lr", "0.05", "--select", "last"],
    ),
    "mart": (
        "mart(norm=l2) + friendly-at + ema(per=epoch, begin=1, buffers=average)",
        ["--model", "preact-resnet18", "--width", "16", "--lr", "0.05", "--schedule", "one-cycle", "--augment", "none"],
    ),
}
USUAL = ["--data", "digits", "--limit-per-class", "24", "--epochs", "3", "--batch-size", "32", "--validation", "0.1"]
CLOCK = ("seconds", "images_per_second")
PROBE = """
import hashlib, torch
from torch import nn
torch.manual_seed(0)
first, second = nn.Conv2d(1, 8, 3, padding=1), nn.Conv2d(8, 8, 3, 2, 1)
net = nn.Sequential(first, nn.BatchNorm2d(8), nn.ReLU(), second, nn.Flatten(), nn.Linear(128, 10))
x = torch.rand(32, 1, 8, 8)
torch.nn.functional.cross_entropy(net(x), torch.arange(32) % 10).backward()
parts = [p.grad for p in net.parameters()]
parts += [torch.softmax(torch.randn(32, 10), 1), torch.randn(64, 64) @ torch.randn(64, 64)]
print(hashlib.sha256(b"".join(part.numpy().tobytes() for part in parts)).hexdigest())
"""


def robustfair(*args: str, cwd: Path) -> str:
    """Standard output of one command, run as a user would, with arithmetic pinned."""
    command = [sys.executable, "-m", "robustfair.cli", *args]
    env = {**os.environ, **PINNED}
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return done.stdout


def probe() -> str:
    """How this machine rounds the operations that the runs are made of."""
    env = {**os.environ, **PINNED}
    return subprocess.run(
        [sys.executable, "-c", PROBE], env=env, capture_output=True, text=True, check=True
    ).stdout.strip()


def train(name: str, out: Path) -> None:
    """One of the runs, into `out`."""
    composition, flags = RUNS[name]
    radius = "0.5" if "l2" in composition else "0.15"
    options = [*USUAL, "--eps", radius, "--steps", "3", "--quiet", "--out", out.name, *flags]
    robustfair("train", composition, *options, cwd=out.parent)


def hashes(out: Path) -> dict[str, str]:
    """Of every tensor of the last checkpoint and of the exports, and of the history without clock times."""
    from safetensors.torch import load_file

    found = {}
    for path in sorted((out / "checkpoints").glob("*/*.safetensors")):
        if path.parent.name in ("last", "ema", "swa"):
            digest = hashlib.sha256()
            for key, tensor in sorted(load_file(path).items()):
                digest.update(f"{key} {tensor.dtype} {tuple(tensor.shape)}".encode() + tensor.numpy().tobytes())
            found[f"{path.parent.name}/{path.name}"] = digest.hexdigest()
    records = [json.loads(line) for line in (out / "history.jsonl").read_text().splitlines()]
    plain = [{key: value for key, value in record.items() if key not in CLOCK} for record in records]
    found["history"] = hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()
    return found


def record(folder: Path) -> dict[str, Any]:
    """Probe and hashes of all runs, trained into `folder`."""
    found: dict[str, Any] = {"probe": probe(), "runs": {}}
    for name in RUNS:
        train(name, folder / name)
        found["runs"][name] = hashes(folder / name)
    return found


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        print(json.dumps(record(Path(sys.argv[1] if len(sys.argv) > 1 else folder)), indent=1))
