"""A folder with runs, weight files, images and recipes, and the command line to try on them."""

from __future__ import annotations

import contextlib
import os
import pickle
import shutil
import sys
import warnings
from argparse import Namespace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from reference.commands import TEN, Command, Outcome, Refuses, training
from reference.layouts import IMAGE, cells, class_label, pixels, write_images, write_parquet
from reference.runs import CFA, changes, cut_in_half, tree
from robustfair.cli.app import main
from robustfair.models import create_model

FACTORIES = """
import torch
from robustfair import create_model

def tiny(num_classes=10):
    return create_model("small-cnn", num_classes=num_classes, in_channels=1, width=4)

def seven():
    return tiny(7)

def nothing():
    return None

def broken():
    raise OSError("no weights\\nanywhere")

def needs(argument):
    return argument

class Noisy(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.model = tiny()

    def forward(self, x):
        return self.model(x + 0.1 * torch.randn_like(x))

class Blind(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.model = tiny()

    def forward(self, x):
        return self.model(x.detach())

class NotFinite(torch.nn.Module):
    def forward(self, x):
        return torch.full((len(x), 10), float("nan"))
"""

STORED = {
    "before": "run --attacks clean,pgd-2 --limit-per-class 4",
    "after": "repaired --attacks clean,pgd-2,fgsm --limit-per-class 4",
    "fewer": "repaired --attacks clean,pgd-2 --limit-per-class 3",
    "pixels": "repaired --attacks clean,pgd-2 --limit-per-class 4 --image-size 12",
    "letters": "good.pt --arch small-cnn --width 4 --attacks clean,pgd-2 --eps 0.1 --data letters.npz",
    "radius": "repaired --attacks clean,pgd-2 --limit-per-class 4 --eps 0.2",
    "step": "repaired --attacks clean,pgd-2 --limit-per-class 4 --alpha 0.05",
}
"""Folders of one audit each, by the words that made it."""


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Command:
    """Runs a command in this process; warnings reach stderr as they do in a fresh interpreter."""

    def run(*argv: object) -> Outcome:
        capsys.readouterr()
        with warnings.catch_warnings():
            warnings.simplefilter("default")
            for quiet in (DeprecationWarning, PendingDeprecationWarning, ImportWarning, ResourceWarning):
                warnings.simplefilter("ignore", quiet)
            warnings.showwarning = lambda message, category, filename, lineno, file=None, line=None: sys.stderr.write(
                warnings.formatwarning(message, category, filename, lineno, line)
            )
            code = main([str(word) for word in argv])
        captured = capsys.readouterr()
        return Outcome(code, captured.out, captured.err)

    return run


@pytest.fixture(scope="session")
def stock(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with runs, weight files, images and recipes, good and bad; tests work on copies."""
    root = tmp_path_factory.mktemp("stock")
    with contextlib.chdir(root):
        assert main([*training(CFA, out="run"), "--quiet"]) == 0
        assert (
            main(["audit", "run", "--attacks", "clean", "--limit-per-class", "2", "--out", "baseline", "--quiet"]) == 0
        )
        for path in (root / "baseline").iterdir():
            path.rename(root / f"baseline{path.suffix}")
        (root / "baseline").rmdir()
        assert main(["repair", "run", "--out", "repaired"]) == 0
        (root / "run" / "report.html").unlink()
        _stock_weights(root)
        _stock_images(root)
        _stock_recipes(root)
        _stock_groups(root)
        (root / "zoo_of_test.py").write_text(FACTORIES)
        (root / "zoo_that_fails.py").write_text("raise ZeroDivisionError('at import')\n")
        (root / "notes").mkdir()
        (root / "notes" / "plan.txt").write_text("keep")
        for name, words in STORED.items():
            out = ["--out", f"stored/{name}", "--report", "page.html", "--quiet"]
            assert main(["audit", *words.split(), *out]) == 0
        (root / "page.html").unlink()
    return root


def _stock_weights(root: Path) -> None:
    weights = create_model("small-cnn", in_channels=1, width=4).state_dict()
    save_file(weights, root / "good.safetensors")
    save_file(create_model("small-cnn", in_channels=1, width=4, num_classes=7).state_dict(), root / "seven.safetensors")
    torch.save(weights, root / "good.pt")
    torch.save({"state_dict": weights, "hook": _Runs("pwned")}, root / "code.pt")
    (root / "pickle.pt").write_bytes(pickle.dumps(_Runs("pwned")))
    for name in ("good.safetensors", "good.pt"):
        shutil.copy(root / name, root / f"cut-{name}")
        cut_in_half(root / f"cut-{name}")
    (root / "empty.pt").write_bytes(b"")
    torch.save({"best": weights, "last": weights}, root / "two.ckpt")
    beside = {f"model.{name}": value for name, value in weights.items()} | {"criterion.weight": torch.ones(10)}
    torch.save({"state_dict": beside, "ema_state_dict": weights, "args": Namespace(lr=1)}, root / "beside.pth.tar")
    torch.save(weights | {"fc2.weight": torch.ones(1)}, root / "more")
    (root / "pointer.pt").write_text("version https://git-lfs.github.com/spec/v1\n")


class _Runs:
    """An object whose pickle leaves a file where it is loaded."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (self.name,)


def _stock_images(root: Path) -> None:
    images, labels = pixels(20, channels=1), np.arange(20) % 10
    wrong, negative = labels.copy(), labels.copy()
    wrong[3], negative[3] = 12, -1
    np.savez(root / "good.npz", images=images, labels=labels)
    np.savez(root / "high.npz", images=images, labels=wrong, class_names=np.array(TEN))
    np.savez(root / "negative.npz", images=images, labels=negative)
    np.savez(root / "seven.npz", images=images, labels=labels % 7)
    np.savez(root / "letters.npz", images=images, labels=labels, class_names=np.array(tuple("abcdefghij")))
    np.savez(root / "float.npz", images=images / 255, labels=labels)
    np.savez(root / "none.npz", images=images[:0], labels=labels[:0])
    shutil.copy(root / "good.npz", root / "cut.npz")
    cut_in_half(root / "cut.npz")
    columns = {"image": cells(images), "label": labels.tolist()}
    features = {"image": IMAGE, "label": class_label(TEN)}
    write_parquet(root / "table" / "train-0.parquet", columns, features)
    write_parquet(root / "table-high" / "train-0.parquet", columns | {"label": wrong.tolist()}, features)
    write_parquet(root / "table-cut" / "train-0.parquet", columns, features)
    cut_in_half(root / "table-cut" / "train-0.parquet")
    write_images(root / "pictures-bad", {name: pixels(2, channels=1) for name in "ab"})
    (root / "pictures-bad" / "b" / "001.png").write_bytes(b"no picture")
    (root / "pictures-none" / "a").mkdir(parents=True)
    (root / "nothing").mkdir()


def _stock_recipes(root: Path) -> None:
    texts = {
        "broken": "train: [trades\ndata: }",
        "list": "- trades\n- digits\n",
        "empty": "",
        "unknown": "train: trades\ndata: digits\nmomentun: 0.9\n",
        "type": "train: trades\ndata: digits\nepochs: three\n",
        "number-as-text": "train: trades\ndata: digits\nepochs: '3'\n",
        "schema": "schema: robustfair.recipe/9\ntrain: trades\ndata: digits\n",
        "eps": "train: trades\ndata: digits\neps: 8\n",
        "eps-text": "train: trades\ndata: digits\neps: '8'\n",
        "no-train": "data: digits\n",
        "number-key": "train: trades\ndata: digits\n3: 4\n",
        "code": "train: !!python/object/apply:os.mkdir [pwned]\ndata: digits\n",
    }
    for name, text in texts.items():
        (root / f"{name}.yaml").write_text(text)
    (root / "binary.yaml").write_bytes(b"\xff\xfe\x00\x80")


def _stock_groups(root: Path) -> None:
    parity = [f"{c},{'odd' if c % 2 else 'even'}" for c in range(10)]
    images = [f"{n},{'first' if n < 5 else 'rest'}" for n in range(20)]
    tables = {
        "parity": ["class,group", *parity],
        "images": ["index,group", *images],
        "missing": ["class,group", *parity[:-2]],
        "twice": ["class,group", *parity, "3,even"],
        "unknown": ["class,group", *parity, "cat,even"],
        "header": ["classes,group", *parity],
        "empty-cell": ["class,group", *parity[:-1], "9,"],
    }
    for name, lines in tables.items():
        (root / f"{name}.csv").write_text("\n".join(lines) + "\n")


@pytest.fixture
def place(stock: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the stock, as the working folder; no data but what it holds, decoded images kept elsewhere."""
    root = tmp_path / "place"
    shutil.copytree(stock, root)
    monkeypatch.chdir(root)
    monkeypatch.setenv("ROBUSTFAIR_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("ROBUSTFAIR_DATA", raising=False)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    for name in ("zoo_of_test", "zoo_that_fails"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return root


@pytest.fixture
def refuses(place: Path, command: Command) -> Refuses:
    """Runs a command that is wrong use: one line with these fragments, exit 2, nothing written."""

    def run(argv: list[str], fragments: tuple[str, ...]) -> None:
        before = tree(place)
        outcome = command(*argv)
        assert outcome.code == 2
        assert changes(before, tree(place)) == []
        assert outcome.out == ""
        (said,) = (line for line in outcome.err.splitlines() if not line.startswith("note: "))
        assert said.startswith("robustfair: "), outcome.err
        for fragment in fragments:
            assert fragment.lower() in said.lower()

    return run
