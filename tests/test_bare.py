"""The library where only torch, numpy, safetensors and pillow are installed: load, train, audit, save."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import torch

from robustfair.data import ImageDataset, Splits
from robustfair.data.pack import write_pack

BLOCK = """
import sys

ABSENT = {
    "pyarrow", "datasets", "pandas", "scipy", "sklearn", "cyclopts", "rich", "yaml", "jinja2", "matplotlib"
}

class Hide:
    def __init__(self, finder):
        self.finder = finder

    def __getattr__(self, name):
        return getattr(self.finder, name)

    def find_spec(self, name, path=None, target=None):
        return None if name.split(".")[0] in ABSENT else self.finder.find_spec(name, path, target)

sys.meta_path[:] = [Hide(finder) for finder in sys.meta_path]
"""

WORK = """
from pathlib import Path
import robustfair as rf
from robustfair.training import fit
from robustfair.runs.checkpoint import read_checkpoint, read_state, write_state

packed, out = Path(sys.argv[1]), Path(sys.argv[2])
data = rf.load_dataset(packed, cache_dir=out / "cache")
model = rf.create_model("small-cnn", num_classes=data.train.num_classes, in_channels=1, width=4)
run = fit(
    model,
    data.train,
    rf.Trades(steps=2),
    methods=[rf.CCM(), rf.EMA()],
    schedule=rf.Schedule(epochs=2, batch_size=8),
    save=lambda state: write_state(out / "checkpoints", state, {"data": data.train.fingerprint}),
)
audit = rf.audit(run.model, data.test, attacks=["clean", "pgd-2"])
saved, _ = audit.save(out / "audit", "quick")
assert rf.load_audit(saved).worst("pgd-2") == audit.worst("pgd-2")
assert read_state(out / "checkpoints").epoch == 2
weights = dict(read_checkpoint(out / "checkpoints" / "ema").weights)
rf.create_model("small-cnn", num_classes=3, in_channels=1, width=4).load_state_dict(weights)
assert not ABSENT & {name.split(".")[0] for name in sys.modules}
print(data.train.fingerprint, data.test.fingerprint)
"""

ERRORS = """
import os
import robustfair as rf

os.environ.pop("ROBUSTFAIR_DATA", None)

def say(call):
    try:
        call()
    except rf.RobustFairError as error:
        print(error)

def tau():
    from robustfair.metrics import kendall
    kendall([1.0, 2.0, 3.0], [1.0, 3.0, 2.0])

def table():
    import robustfair.report.layout

say(lambda: rf.load_dataset("digits"))
say(lambda: rf.load_dataset("cifar10"))
say(lambda: rf.load_dataset(sys.argv[1]))
say(tau)
say(table)
"""


def run(code: str, *words: object) -> list[str]:
    command = [sys.executable, "-c", BLOCK + code, *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def images(count: int, seed: int) -> ImageDataset:
    rng = torch.Generator().manual_seed(seed)
    return ImageDataset(
        images=torch.randint(0, 256, (count, 1, 8, 8), generator=rng).to(torch.uint8),
        labels=torch.arange(count) % 3,
        class_names=("a", "b", "c"),
        name="bare",
        augment="none",
    )


def test_a_packed_data_set_is_enough_to_train_audit_and_save(tmp_path: Path) -> None:
    data = Splits(train=images(24, 0), test=images(9, 1))
    write_pack(data, tmp_path / "packed")
    assert run(WORK, tmp_path / "packed", tmp_path / "out") == [f"{data.train.fingerprint} {data.test.fingerprint}"]


def test_what_needs_more_says_what_it_needs(tmp_path: Path) -> None:
    (tmp_path / "train.parquet").write_bytes(b"PAR1")
    lines = run(ERRORS, tmp_path)
    needed = ("scikit-learn", "datasets", "pyarrow", "scipy", "rich")
    assert len(lines) == len(needed)
    for line, package in zip(lines, needed, strict=True):
        assert f"needs {package}, and there is no module" in line
        assert f"pip install {package}" in line
