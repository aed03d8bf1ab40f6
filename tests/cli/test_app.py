"""The command line as a user meets it: what it prints, how it exits, and which files it touches."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import pickle
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import typing
import warnings
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from reference.layouts import IMAGE, cells, class_label, pixels, write_images, write_parquet
from reference.runs import CFA, TINY, changes, cut_in_half, history, tensors, tree
from robustfair.attacks.autoattack.square import Square
from robustfair.cli.app import app, main
from robustfair.data import load_dataset
from robustfair.evaluate.diagnostics import masking
from robustfair.models import create_model
from robustfair.report.listing import listing
from robustfair.runs import run as runner
from robustfair.runs.load import load_target
from robustfair.runs.recipe import Recipe, read_recipe

TEN = tuple("0123456789")
INTERRUPTED = "robustfair: interrupted; training goes on with --resume, a saved audit with the same command"
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


@dataclass(frozen=True)
class Outcome:
    """What a command left behind."""

    code: int
    out: str
    err: str

    def json(self) -> dict[str, Any]:
        """The one line of JSON on stdout."""
        assert self.code == 0, self.err
        assert self.out.count("\n") == 1
        return json.loads(self.out, parse_constant=pytest.fail)


Command = Callable[..., Outcome]


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


def training(composition: str = "pgd-at", **keys: Any) -> list[str]:
    """The words that train a tiny run into the folder `new`; None leaves a key out."""
    given = {key: value for key, value in ({"out": "new"} | TINY | keys).items() if value is not None}
    return ["train", composition, *(word for key, value in given.items() for word in (flag(key), str(value)))]


def flag(key: str) -> str:
    return f"--{key.replace('_', '-')}"


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


# Wrong use: one line, exit 2, nothing written

AUDIT = ("--attacks", "clean", "--limit-per-class", "1")
WEIGHTS = ("--arch", "small-cnn", "--width", "4", "--data", "digits", *AUDIT)


def case(argv: list[str] | str, *fragments: str) -> Any:
    words = shlex.split(argv) if isinstance(argv, str) else argv
    return pytest.param(words, fragments, id=label(words))


def label(words: list[str]) -> str:
    """A command without the words that most commands here have."""
    text = " ".join(words)
    for key, value in ({"out": "new"} | TINY).items():
        text = text.replace(f" {flag(key)} {value}", "")
    return text.replace(" ".join(AUDIT), "").strip()


UNKNOWN_NAMES = [
    case("trian trades --data digits --out new", "did you mean", "train"),
    case(training("tradez"), "unknown objective or method 'tradez'", "trades"),
    case(training("trades + ccn"), "unknown objective or method 'ccn'", "ccr"),
    case(training("trades(betta=6)"), "unknown key of trades 'betta'", "beta"),
    case(training("trades + ccm(lamb=1)"), "unknown key of ccm 'lamb'", "lam"),
    case("train trades --data digits --out new --batchsize 3", "--batchsize", "--batch-size"),
    case("audit run --atacks clean", "--atacks", "--attacks"),
    case(training(model="smal-cnn"), "unknown model 'smal-cnn'", "small-cnn"),
    case(training(data="digit"), "unknown data set 'digit'", "digits"),
    case(training(augment="crop-flop"), "unknown augmentation 'crop-flop'", "crop-flip"),
    case("train demmo/x --data digits --out new", "unknown recipe 'demmo/x'", "demo"),
    case("train unknown.yaml --out new", "unknown key of recipe 'momentun'", "momentum"),
    case("audit run --attacks clean,pdg-20", "unknown attack 'pdg-20'", "pgd-20"),
    case("audit run --attacks pgd-2(restart=2)", "unknown option of pgd-2 'restart'", "restarts"),
    case("audit run --checkpoint bset", "unknown checkpoint of run 'bset'", "best"),
    case(["audit", "good.safetensors", "--arch", "smal-cnn", "--data", "digits"], "unknown model", "small-cnn"),
    case("repair run --out new --method hwnb", "unknown repair 'hwnb'", "hwnwb"),
    case("repair run --out new --method hwnwb(target=mean)", "unknown key of hwnwb 'target'", "target_norm"),
    case("repair run --out new --checkpoint lst", "unknown checkpoint of run 'lst'", "last"),
    case("explain trades+cmm", "unknown objective or method 'cmm'", "ccm"),
    case("list recipe", "unknown kind of entry 'recipe'", "recipes"),
    case("demo --epocs 2", "--epocs", "--epochs"),
]

COMPOSITIONS = [
    case(training(""), "train is missing", "trades + ccm"),
    case(training("trades(beta="), "position 13", "expected a value"),
    case(training("ccm + ccr"), "exactly one objective", "found none"),
    case(training("trades + pgd-at"), "exactly one objective", "found trades and pgd-at"),
    case(training("trades + ccm + ccm"), "ccm is listed twice"),
    case(training("pgd-at + ccr"), "ccr needs the loss term 'consistency'", "pgd-at"),
    case(training("standard + ccm", eps=None, steps=None), "ccm sets attack.eps", "standard trains without an attack"),
    case(["explain", "pgd-at + ccr"], "ccr needs the loss term 'consistency'"),
    case(training("trades + ema(decay=2)"), "ema: decay must be in [0, 1], got 2"),
]

RADII = [
    case(training(eps="8"), "eps must be", "Did you mean 8/255?"),
    case(training("trades(eps=8)", eps=None), "eps must be", "Did you mean 8/255?"),
    case(training("trades(eps='8')", eps=None), "eps must be", "Did you mean 8/255?"),
    case("train eps.yaml --out new", "eps must be", "Did you mean 8/255?"),
    case("train eps-text.yaml --out new", "eps must be", "Did you mean 8/255?"),
    case("audit run --eps 8", "eps must be", "Did you mean 8/255?"),
    case("audit run --eps 8/0", "eps must be", "'8/0'"),
    case(["audit", "run", "--eps", "", *AUDIT], "eps must be", "''"),
    case("repair run --out new --attacks clean --eps 8", "eps must be", "Did you mean 8/255?"),
    case(training(step_size="2"), "step_size must be", "Did you mean 2/255?"),
    case(training("trades(eps=8/255)", eps="0.2"), "eps is 8/255 in trades(eps=8/255) and 0.2 beside it"),
    case(training("trades(steps=3)", steps=4), "steps is 3", "4 beside it"),
    case(training("trades(step_size=0.1)", step_size="0.2"), "step_size is 0.1", "0.2 beside it"),
    case(training("trades(alpha=0.1)", alpha="0.2"), "step_size", "give it once"),
    case(training("trades(norm=linf)", norm="l2"), "norm is linf", "l2 beside it"),
    case(training("trades(norm=l2)", norm="linf"), "norm is l2", "linf beside it"),
]

VALUES = [
    case(training(epochs=0), "epochs must be", "got 0"),
    case(training(batch_size=0), "batch_size must be", "got 0"),
    case(training(limit_per_class=0), "limit_per_class must be", "got 0"),
    case(training(seed="x"), "--seed", '"x"'),
    case(training(lr="nan"), "lr must be", "got nan"),
    case(training(gamma="nan"), "gamma must be", "got nan"),
    case(training(gamma="-1"), "gamma must be", "got -1"),
    case(training(momentum="-1"), "momentum must be", "got -1"),
    case(training(steps="-1"), "steps must be", "got -1"),
    case(training(width=0), "width must be", "got 0"),
    case(training(image_size=0), "image_size must be", "got 0"),
    case(training(precision="fp16"), "--precision", "fp32"),
    case(training(select="first"), "--select", "worst"),
    case(training(schedule="step"), "--schedule", "multistep"),
    case(training(norm="l1"), "norm", "linf"),
    case(training(validation=0), "validation must be", "or --select last"),
    case(training(validation=1.5), "1.5"),
    case(training(validation=-0.1), "-0.1"),
    case(training(validation="nan"), "nan"),
    case(training(device="gpu"), "device must be", "'gpu'"),
    case(training(augment="crop", image_size=4), "padding must be", "got 4"),
    case(["audit", "run", "--batch-size", "0", *AUDIT], "batch_size must be", "got 0"),
    case("audit run --limit-per-class 0", "limit_per_class must be", "got 0"),
    case(["audit", "run", "--image-size", "0", *AUDIT], "image_size must be", "got 0"),
    case(["audit", "run", "--precision", "fp16", *AUDIT], "precision must be one of auto, fp32, bf16"),
    case(["audit", "run", "--norm", "l1", *AUDIT], "norm must be linf or l2"),
    case(["audit", "run", "--device", "gpu", *AUDIT], "device must be", "'gpu'"),
    case("corruptions run --which fog --device gpu --limit-per-class 1", "device must be", "'gpu'"),
    case("corruptions run --which fog --frost nowhere --limit-per-class 1", "frost: 'nowhere' is not a folder"),
    case("demo --epochs 0 --out new", "epochs must be", "got 0"),
    case("demo --seed x --out new", "--seed", '"x"'),
]

DATA = [
    case(training(data="high.npz"), "labels outside the range 0 to 9, the first is 12 at index 3"),
    case(training(data="negative.npz"), "labels outside the range 0 to 9, the first is -1 at index 3"),
    case(training(data="table-high"), "labels outside the range 0 to 9, the first is 12 at index 3"),
    case(["audit", "run", "--data", "high.npz"], "labels outside the range"),
    case(training(data="nothing"), "nothing holds no images"),
    case(training(data="pictures-none"), "no images", "pictures-none"),
    case(training(data="none.npz"), "no images"),
    case(training(data="pictures-bad"), "001.png", "cannot be decoded"),
    case(training(data="cut.npz"), "cut.npz cannot be read"),
    case(training(data="table-cut"), "train-0.parquet cannot be read"),
    case(training(data="float.npz"), "uint8", "float64"),
    case(training(data="notes/plan.txt"), "plan.txt"),
    case(training(data="./absent"), "absent", "does not exist"),
    case(training(data=""), ""),
    case(training(data=None), "--data"),
    case(["audit", "run", "--data", ""], ""),
    case(["audit", "zoo_of_test:tiny", *AUDIT], "--data"),
    case(["audit", "good.safetensors", "--arch", "small-cnn", "--width", "4", *AUDIT], "--data"),
    case(["audit", "run", "--data", "seven.npz", *AUDIT], "run", "seven"),
    case(["audit", "run", "--data", "letters.npz", *AUDIT], "run", "a, b, c, d", "labels would not mean the same"),
    case("repair run --out new --attacks clean --data letters.npz", "labels would not mean the same"),
    case(["audit", "run", "--baseline", "baseline.json", *AUDIT], "not of the same images"),
    case(["audit", "run", "--baseline", "absent.json", *AUDIT], "absent.json does not exist"),
    case("audit baseline.json --baseline absent.json", "absent.json does not exist"),
    case(["audit", "run", "--baseline", "run/manifest.json", *AUDIT], "run/manifest"),
]

MODELS = [
    case(["audit", "zoo_of_test:seven", "--data", "digits", *AUDIT], "7 outputs", "10 classes"),
    case(["audit", "seven.safetensors", *WEIGHTS], "7 outputs", "10"),
    case(["audit", "zoo_of_test:tiny", "--weights", "seven.safetensors", "--data", "digits"], "7 outputs", "10"),
    case(["audit", "zoo_of_test:NotFinite", "--data", "digits", *AUDIT], "logits that are not finite"),
    case(["audit", "zoo_of_test:broken", "--data", "digits"], "OSError: no weights anywhere"),
    case(["audit", "zoo_of_test:nothing", "--data", "digits"], "must return a torch.nn.Module, got NoneType"),
    case(["audit", "zoo_of_test:needs", "--data", "digits"], "TypeError", "argument"),
    case(["audit", "zoo_of_test:absent", "--data", "digits"], "cannot import it", "package.module:factory"),
    case(["audit", "absent_zoo:tiny", "--data", "digits"], "cannot import it", "absent_zoo"),
    case(["audit", "zoo_that_fails:tiny", "--data", "digits"], "zoo_that_fails", "ZeroDivisionError", "at import"),
    case(["audit", "good.safetensors", "--data", "digits"], "add --arch"),
    case(["audit", "good.safetensors", "--arch", "resnet9", "--data", "digits"], "do not fit"),
    case(["audit", "good.safetensors", "--arch", "small-cnn", "--data", "digits"], "width"),
    case(["audit", "cut-good.safetensors", *WEIGHTS], "cut-good.safetensors: cut, corrupt or not a weight file"),
    case(["audit", "cut-good.pt", *WEIGHTS], "cut-good.pt: cut, corrupt or not a weight file"),
    case(["audit", "empty.pt", *WEIGHTS], "empty.pt: cut, corrupt or not a weight file"),
    case(["audit", "code.pt", *WEIGHTS], "code.pt: holds the Python object", "run code"),
    case(["audit", "pickle.pt", *WEIGHTS], "pickle.pt"),
    case(["audit", "absent.pt", *WEIGHTS], "absent.pt: no such file"),
    case(["audit", "absent", "--data", "digits"], "no such file or folder", "package.module:factory"),
    case(["audit", "notes", "--data", "digits"], "notes holds no run"),
    case(["audit", "good.pt", "--checkpoint", "best", *WEIGHTS], "--checkpoint", "good.pt is none"),
    case(["audit", "good.pt", "--data", "digits"], "good.pt holds weights only: add --arch"),
    case(["audit", "pointer.pt", "--data", "digits"], "pointer.pt: is a pointer of Git LFS", "git lfs pull"),
    case(["audit", "two.ckpt", *WEIGHTS], "several sets of weights, best, last. Name", "with --select-weights"),
    case(["corruptions", "two.ckpt", *WEIGHTS[:-4]], "several sets of weights, best, last. Name", "--select-weights"),
    case(["audit", "two.ckpt", "--select-weights", "lats", *WEIGHTS], "unknown set of weights 'lats'", "mean last"),
    case(["audit", "more", *WEIGHTS], "hold the unknown fc2.weight", "save the file without"),
    case("audit run --select-weights last", "leave --arch, --weights, --select-weights and --width out; --checkpoint"),
    case("repair good.pt --out new", "good.pt"),
    case("repair zoo_of_test:tiny --out new", "no run folder", "rf.repair(model)"),
    case("repair repaired --out new", "repaired already", "run"),
]

ATTACKS = [
    case(["audit", "run", "--attacks", ""], "names like clean,pgd-20"),
    case(["audit", "run", "--attacks", " , "], "names like clean,pgd-20"),
    case("audit run --attacks pgd-2,PGD_2", "each attack once", "pgd-2"),
    case("audit run --attacks clean,clean", "each attack once", "clean"),
    case(["audit", "run", "--attacks", "clean pgd-2"], "cannot read 'clean pgd-2'"),
    case("audit run --attacks clean+pgd-2", "separated by commas"),
    case("audit run --attacks pgd", "unknown attack 'pgd'", "pgd-20"),
    case("audit run --attacks pgd-0", "steps must be >= 1, got 0"),
    case("audit run --attacks pgd-2(restarts=0)", "restarts must be >= 1, got 0"),
    case("audit run --attacks pgd-2(restarts=2", "cannot read"),
    case("audit run --attacks clean(restarts=2)", "clean: options must be none"),
    case("repair run --out new --attacks pgd", "unknown attack 'pgd'"),
]

GATES = [
    case(["audit", "run", *AUDIT, "--fail-under", "worst.robust"], "name=value, like worst.robust=0.30"),
    case(["audit", "run", *AUDIT, "--fail-under", "robust=0.3"], "a measure and an attack"),
    case(["audit", "run", *AUDIT, "--fail-under", "worst.robust=30"], "Did you mean 30%?"),
    case(["audit", "run", *AUDIT, "--fail-under", "worst.robust=x"], "a fraction of 1"),
    case(["audit", "run", *AUDIT, "--fail-under", "worst.robust=130%"], "up to 100%"),
    case(["audit", "run", *AUDIT, "--fail-under", "worts.robust=0.3"], "unknown measure of a gate 'worts'", "worst"),
    case(["audit", "run", *AUDIT, "--fail-under", "worst.pgd-9=0.3"], "attack in the gate worst.pgd-9=0.3", "clean"),
    case(["audit", "run", *AUDIT, "--fail-under", "class.cat.clean=0.3"], "unknown class in the gate", "'cat'"),
    case(["audit", "run", *AUDIT, "--fail-under", "range.robust=0.3"], "<= or >= for the range"),
    case(["audit", "run", *AUDIT, "--fail-under", "interval.worst.robust.low=0.3"], "lower or upper"),
    case(["audit", "run", *AUDIT, "--fail-under", "worst-group.robust=0.3"], "used with --group-by"),
    case(["audit", "run", *AUDIT, "--fail-under", "worst.robust=0", "--fail-under", "best=0"], "measure and an attack"),
    case(
        ["audit", "run", *AUDIT, "--group-by", "parity.csv", "--fail-under", "group.prime.robust=0.3"],
        "unknown group in the gate",
        "even, odd",
    ),
]

GROUPS = [
    case(["audit", "run", *AUDIT, "--group-by", "superclass"], "digits has no super-classes", "class,group"),
    case(["audit", "run", *AUDIT, "--group-by", "absent.csv"], "absent.csv does not exist"),
    case(["audit", "run", *AUDIT, "--group-by", "notes"], "notes is a folder", "class,group"),
    case("audit baseline.json --attacks clean", "flags of a stored audit", "'--attacks'", "name the run"),
    case("audit baseline.json --report new.html --out new", "'--out'", "--report, --baseline"),
    case("audit baseline.json --eps 8/255 --norm l2 --step-size 0.1", "'--norm, --eps, --step-size'"),
    case("audit baseline.json --precision bf16 --engine reference", "'--precision, --engine'"),
    case("audit baseline.json --max-minutes 5 --points --checks", "'--max-minutes, --points, --checks'"),
    case("audit baseline.json --data digits --seed 1 --batch-size 7", "'--data, --batch-size, --seed'"),
    case("audit baseline.json --image-size 8 --limit-per-class 2", "'--image-size, --limit-per-class'"),
    case("audit baseline.json --checkpoint best --device cpu", "'--device, --checkpoint'"),
    case(["audit", "baseline.json", *WEIGHTS[:4]], "'--arch, --width'"),
    case("audit baseline.json --weights good.pt --normalise none", "'--weights, --normalise'"),
    case("audit baseline.json --report notes", "file name"),
    case("audit baseline.json --report new.html --fail-under worst.fgsm=0", "fgsm"),
    case("audit baseline.json --group-by notes", "notes is a folder", "class,group"),
    case(["audit", "run", *AUDIT, "--group-by", "missing.csv"], "missing.csv, line 9", "without class 8 and 1 more"),
    case(["audit", "run", *AUDIT, "--group-by", "twice.csv"], "twice.csv, line 12", "class 3 has a group on line 5"),
    case(["audit", "run", *AUDIT, "--group-by", "unknown.csv"], "unknown.csv, line 12", "'cat'"),
    case(["audit", "run", *AUDIT, "--group-by", "header.csv"], "header.csv, line 1", "class,group or index,group"),
    case(["audit", "run", *AUDIT, "--group-by", "empty-cell.csv"], "empty-cell.csv, line 11", "neither of them empty"),
    case(["audit", "run", *AUDIT, "--group-by", "images.csv"], "images.csv, line 12", "none of the 10 images"),
    case(["audit", "run", *AUDIT, "--group-by", "good.npz"], "good.npz"),
    case(["audit", "good.safetensors", *WEIGHTS, "--group-by", "missing.csv"], "missing.csv, line 9"),
]

COMPARING = [
    case("compare", "at least two runs or audits, got 0"),
    case("compare run", "at least two runs or audits, got 1"),
    case("compare stored/before run", "run holds no audit: run robustfair audit run"),
    case("compare stored/before notes", "notes holds no audit"),
    case("compare stored/before absent.json", "absent.json does not exist"),
    case("compare stored/before run/manifest.json", "run/manifest"),
    case("compare stored/before stored/fewer", "not of the same images (40 and 30)"),
    case("compare stored/before stored/pixels", "not of the same images", "with other pixels"),
    case("compare stored/before stored/letters", "over different classes", "(0, 1, 2 and 7 more)"),
    case("compare stored/before stored/radius", "under different threats, linf eps 0.1 and linf eps 0.2"),
    case("compare stored/before stored/step --paired", "pgd-2 ran with step_size", "same settings"),
    case("compare stored/before stored/step", "pgd-2 ran with step_size", "same settings"),
    case("compare stored/before stored/after stored/fewer", "not of the same images (40 and 30)"),
    case("compare stored/before stored/after --attacks fgsm", "unknown attack of both audits 'fgsm'", "pgd-2"),
    case(["compare", "stored/before", "stored/after", "--attacks", ""], "unknown attack of both audits ''"),
    case("compare stored/before stored/after --format html", "--format", "markdown"),
    case("compare stored/before stored/after --pared", "--paired"),
    case("compare stored/before stored/after --out notes/plan.txt/x", "notes/plan.txt"),
    case("compare stored/before stored/after --out notes", "out must be a file name", "notes/comparison.txt"),
]

STRONG = [
    case("audit run --attacks autoatack", "unknown attack 'autoatack'", "autoattack"),
    case("audit run --attacks autoattack(version=foo)", "unknown version of autoattack 'foo'", "plus, standard"),
    case("audit run --attacks square(queries=0)", "queries must be >= 1, got 0"),
    case("audit run --attacks apgd-ce(step=3)", "unknown option of apgd-ce 'step'", "steps"),
    case(["audit", "run", *AUDIT, "--engine", "pyautoattack"], "engine must be one of native, reference"),
    case(
        "audit run --engine reference --attacks square(per_image_windows=true)",
        "per_image_windows must be false with engine=reference",
    ),
    case(["audit", "run", *AUDIT, "--max-minutes", "0"], "max_minutes must be > 0, got 0"),
    case(["audit", "run", *AUDIT, "--max-minutes", "nan"], "max_minutes must be > 0, got nan"),
    case(["audit", "run", *AUDIT, "--max-minutes", "soon"], "--max-minutes", '"soon"'),
    case(["audit", "good.safetensors", *WEIGHTS, "--points"], "points must be saved in a folder", "--out"),
    case(["audit", "run", *AUDIT, "--format", "html"], "--format", "markdown"),
    case(["audit", "run", *AUDIT, "--fromat", "json"], "--fromat", "--format"),
]

FOLDERS = [
    case(training(out="run"), "run already holds a run", "--resume"),
    case(training(out="notes"), "notes is not empty", "another folder"),
    case(training(out="notes/plan.txt"), "plan.txt is a file"),
    case(training(out="notes/plan.txt/run"), "notes/plan.txt"),
    case(training(out=None), "--out"),
    case("repair run --out repaired", "repaired already holds a run"),
    case("repair run --out run", "run already holds a run"),
    case("repair run --out notes", "notes is not empty"),
    case("repair run --out notes/plan.txt/run", "notes/plan.txt"),
    case("repair run", "--out"),
    case("demo --out notes", "notes is not empty"),
    case("demo --out notes/plan.txt/run", "notes/plan.txt"),
    case(["audit", "run", "--report", "notes", *AUDIT], "notes", "file name"),
    case(["audit", "run", "--report", "notes/plan.txt/report.html", *AUDIT], "notes/plan.txt"),
    case(["audit", "run", "--out", "notes/plan.txt", *AUDIT], "notes/plan.txt"),
]

RESUMING = [
    case("train --out new --resume", "new holds no run"),
    case("train --out notes --resume", "notes holds no run"),
    case("train --out notes/plan.txt --resume", "plan.txt holds no run"),
    case("train --out new", "name a composition"),
    case("train --out run --resume --seed 1", "seed is 1", "begun with 0"),
    case("train --out run --resume --epochs 9", "epochs is 9", "begun with 2"),
    case("train --out run --resume --limit_per_class 9", "limit_per_class is 9", "begun with 20"),
    case([*training("trades", out="run"), "--resume"], "train is trades", "ccm"),
    case("train --out repaired --resume", "repaired holds a repair of run", "into a new folder"),
    case("train pgd-at --data digits --out new --resume", "new holds no run", "leave --resume out"),
]

RECIPES = [
    case("train broken.yaml --out new", "broken.yaml is not YAML at line"),
    case("train binary.yaml --out new", "binary.yaml"),
    case("train list.yaml --out new", "list.yaml holds no keys"),
    case("train empty.yaml --out new", "empty.yaml holds no keys"),
    case("train type.yaml --out new", "epochs must be", "'three'"),
    case("train number-as-text.yaml --out new", "epochs must be", "'3'"),
    case("train schema.yaml --out new", "schema must be 'robustfair.recipe/1', got 'robustfair.recipe/9'"),
    case("train no-train.yaml --out new", "train"),
    case("train number-key.yaml --out new", "3"),
    case("train code.yaml --out new", "code.yaml is not YAML"),
    case("train absent.yaml --out new", "absent.yaml does not exist"),
]


@pytest.mark.parametrize(
    ("argv", "fragments"),
    [
        *UNKNOWN_NAMES,
        *COMPOSITIONS,
        *RADII,
        *VALUES,
        *DATA,
        *MODELS,
        *ATTACKS,
        *STRONG,
        *GATES,
        *GROUPS,
        *COMPARING,
        *FOLDERS,
        *RESUMING,
        *RECIPES,
    ],
)
def test_wrong_use_is_one_line_and_changes_nothing(
    place: Path, command: Command, argv: list[str], fragments: tuple[str, ...]
) -> None:
    before = tree(place)
    outcome = command(*argv)
    assert outcome.code == 2
    assert changes(before, tree(place)) == []
    assert outcome.out == ""
    (said,) = (line for line in outcome.err.splitlines() if not line.startswith("note: "))
    assert said.startswith("robustfair: "), outcome.err
    for fragment in fragments:
        assert fragment.lower() in said.lower()


@pytest.mark.skipif(torch.cuda.is_available(), reason="here is a GPU")
@pytest.mark.parametrize(
    "argv",
    [
        training(device="cuda"),
        ["audit", "run", "--device", "cuda", *AUDIT],
        shlex.split("repair run --out new --attacks clean --device cuda"),
    ],
    ids=["train", "audit", "repair"],
)
def test_a_gpu_that_is_not_there(place: Path, command: Command, argv: list[str]) -> None:
    before = tree(place)
    outcome = command(*argv)
    assert (outcome.code, outcome.out) == (2, "")
    assert re.fullmatch(r"robustfair: .*device must be auto, cpu, or .* got 'cuda'\n", outcome.err)
    assert changes(before, tree(place)) == []


@pytest.mark.parametrize("name", ["weights.safetensors", "state.safetensors", "state.json"])
@pytest.mark.parametrize(
    "damage", [cut_in_half, lambda path: path.write_bytes(b""), Path.unlink], ids=["cut", "empty", "gone"]
)
@pytest.mark.parametrize(
    "argv",
    [
        ["audit", "run", "--checkpoint", "best", *AUDIT],
        ["audit", "run", "--checkpoint", "last", *AUDIT],
        ["repair", "run", "--out", "new", "--checkpoint", "best"],
        ["train", "--out", "run", "--resume"],
    ],
    ids=["audit best", "audit last", "repair", "resume"],
)
def test_a_damaged_checkpoint_is_refused_and_left_as_it_is(
    place: Path, command: Command, argv: list[str], name: str, damage: Callable[[Path], Any]
) -> None:
    for checkpoint in ("best", "last"):
        damage(place / "run" / "checkpoints" / checkpoint / name)
    before = tree(place)
    outcome = command(*argv)
    assert changes(before, tree(place)) == []
    assert (outcome.code, outcome.out) == (2, "")
    assert re.fullmatch(r"robustfair: .*(best|last).*\n", outcome.err)


@pytest.mark.parametrize(
    ("name", "argv"),
    [
        ("manifest.json", ["train", "--out", "run", "--resume"]),
        ("manifest.json", ["repair", "run", "--out", "new"]),
        ("recipe.yaml", ["train", "--out", "run", "--resume"]),
        ("recipe.yaml", ["audit", "run", *AUDIT]),
        ("recipe.yaml", ["repair", "run", "--out", "new"]),
        ("history.jsonl", ["train", "--out", "run", "--resume"]),
    ],
    ids=lambda value: value if isinstance(value, str) else value[0],
)
def test_a_damaged_run_folder_is_refused_and_left_as_it_is(
    place: Path, command: Command, name: str, argv: list[str]
) -> None:
    cut_in_half(place / "run" / name)
    before = tree(place)
    outcome = command(*argv)
    assert changes(before, tree(place)) == []
    assert (outcome.code, outcome.out) == (2, "")
    assert re.fullmatch(r"robustfair: .+\n", outcome.err)


# Training


def test_train_says_on_stderr_what_runs_and_on_stdout_where_it_is(place: Path, command: Command) -> None:
    outcome = command(*training("trades + ema"))
    assert outcome.code == 0
    first, *images, few, one, two = outcome.err.splitlines()
    assert first.startswith("trades + ema on 140 images of digits, small-cnn with 1,674 parameters, 2 epochs")
    assert images[0] == "digits, train part: 140 images of 10 classes (14 each)"
    assert images[1] == "digits, validation part: 60 images of 10 classes (6 each)"
    assert images[2].startswith("digits, test part: 359 images of 10 classes (0: 36, 1: 36, 2: 35, ")
    assert len(images) == 3
    assert few.startswith("warning: weights are selected on 6 validation images of a class")
    assert few.endswith("give --validation a larger share, or take --select last")
    assert [line.split()[:2] for line in (one, two)] == [["epoch", "1"], ["epoch", "2"]]
    result, following = outcome.out.splitlines()
    assert result.startswith("new: 2 epochs; the model is '")
    assert following.startswith("next: robustfair audit new ")


def test_quiet_json_prints_one_line_of_json_and_nothing_else(place: Path, command: Command) -> None:
    outcome = command(*training("trades + ema"), "--select", "last", "--json", "--quiet")
    assert outcome.err == ""
    selected = json.loads((place / "new" / "manifest.json").read_text())["selected"]
    assert outcome.json() == {
        "out": "new",
        "candidate": selected["candidate"],
        "epoch": selected["epoch"],
        "epochs": 2,
    }


def test_the_stored_recipe_repeats_the_run_bit_for_bit(place: Path, command: Command) -> None:
    assert command("train", "run/recipe.yaml", "--out", "new").code == 0
    assert tensors(place / "new") == tensors(place / "run")
    assert history(place / "new") == history(place / "run")
    assert (place / "new" / "recipe.yaml").read_bytes() == (place / "run" / "recipe.yaml").read_bytes()


def test_a_flag_overrides_a_recipe_file(place: Path, command: Command) -> None:
    assert command("train", "run/recipe.yaml", "--out", "new", "--seed", 3).code == 0
    begun, other = (read_recipe(str(place / name / "recipe.yaml"), {}) for name in ("run", "new"))
    assert other == dataclasses.replace(begun, seed=3)
    assert tensors(place / "new") != tensors(place / "run")


def sample(hint: Any) -> tuple[list[str], Any]:
    """Words for a flag of this type, and the value they mean."""
    choices = typing.get_args(hint)
    if typing.get_origin(hint) is typing.Literal:
        return [choices[-1]], choices[-1]
    if typing.get_origin(hint) is tuple:
        word, value = sample(choices[0])
        return word, (value,)
    if type(None) in choices:
        return sample(choices[0])
    return {int: (["3"], 3), float: (["0.25"], 0.25), str: (["word"], "word"), bool: ([], True)}[hint]


KEYS = [(key, hint) for key, hint in typing.get_type_hints(Recipe).items() if key not in ("train", "stages")]


@pytest.mark.parametrize("spelling", [flag, lambda key: f"--{key}"], ids=["hyphens", "underscores"])
@pytest.mark.parametrize(("key", "hint"), KEYS, ids=[key for key, _ in KEYS])
def test_every_key_of_a_recipe_is_a_flag(key: str, hint: Any, spelling: Callable[[str], str]) -> None:
    words, value = sample(hint)
    argv = ["train", "trades", "--out", "new", spelling(key), *words]
    given = vars(bound(argv)["flags"])
    assert {name for name, found in given.items() if found is not None} == {key}
    assert getattr(read_recipe("trades", {"data": "digits", key: given[key]}), key) == value


def bound(argv: list[str]) -> dict[str, Any]:
    """The arguments of the command that `argv` names, read and not run."""
    return app.parse_args(argv, exit_on_error=False, print_error=False)[1].arguments


def test_step_size_has_the_alias_alpha() -> None:
    argv = ["train", "trades", "--out", "new", "--alpha", "2/255"]
    assert bound(argv)["flags"].step_size == "2/255"
    assert bound(["audit", "run", "--alpha", "2/255"])["step_size"] == "2/255"


@pytest.mark.parametrize(("norm", "stored"), [("Linf", "linf"), ("l_inf", "linf"), ("L2", "l2"), ("L_2", "l2")])
def test_norms_in_any_usual_spelling(place: Path, command: Command, norm: str, stored: str) -> None:
    outcome = command(*training(norm=norm, epochs=1, limit_per_class=5), "--json")
    assert outcome.code == 0, outcome.err
    assert json.loads((place / "new" / "manifest.json").read_text())["threat"]["norm"] == stored
    assert command("audit", "new", "--norm", norm, *AUDIT, "--json").json()["threat"]["norm"] == stored


def test_a_radius_given_twice_may_agree(place: Path, command: Command) -> None:
    composition = "pgd-at(eps=51/255, step_size=0.1, steps=2, norm=l2)"
    assert command(*training(composition, eps="0.2", step_size="0.1", steps=2, norm="l2", epochs=1)).code == 0
    assert json.loads((place / "new" / "manifest.json").read_text())["threat"]["eps"] == 0.2


def test_what_a_composition_says_reaches_the_attack(place: Path, command: Command) -> None:
    assert command(*training("pgd-at(eps=0.2)", eps=None, epochs=1)).code == 0
    assert json.loads((place / "new" / "manifest.json").read_text())["threat"] == {
        "norm": "linf",
        "eps": 0.2,
        "step_size": 0.05,
    }
    assert history(place / "new")[0]["per_class"]["eps"] == pytest.approx([0.2] * 10)


def test_warnings_are_one_line_each(place: Path, command: Command) -> None:
    outcome = command(*training("trades + ccm", eps="0.031", epochs=1), "--quiet")
    assert outcome.code == 0
    lines = outcome.err.splitlines()
    assert all(line.startswith("warning: ") for line in lines)
    assert any("0.031 is 7.91/255, not 8/255" in line for line in lines)
    assert sum("ccm begins at epoch 10" in line for line in lines) == 1


def test_a_flag_that_the_objective_would_ignore_is_not_taken_in_silence(place: Path, command: Command) -> None:
    outcome = command(*training("standard", eps="0.2", steps=None, epochs=1), "--quiet")
    assert "eps" in outcome.err


@pytest.mark.parametrize("out", [".", "empty", "new/deeper", "../place/empty/"])
def test_a_run_may_fill_an_empty_folder(tmp_path: Path, place: Path, command: Command, out: str) -> None:
    (place / "empty").mkdir()
    with contextlib.chdir(place / "empty" if out == "." else place):
        outcome = command(*training(out=out, epochs=1))
        assert outcome.code == 0, outcome.err
        assert (Path(out) / "manifest.json").is_file()
        assert command("train", "--out", out, "--resume").code == 0
    assert [path.name for path in place.rglob(".*")] == []


# Runs that stop


@pytest.mark.parametrize("words", [["--resume"], ["--resume", "--json"], ["--resume", "--epochs", "2"]])
def test_resuming_a_finished_run_changes_nothing(place: Path, command: Command, words: list[str]) -> None:
    before = tree(place)
    outcome = command("train", "--out", "run", *words)
    assert outcome.code == 0, outcome.err
    assert changes(before, tree(place)) == []
    assert "Traceback" not in outcome.err


def test_resuming_with_the_recipe_it_was_begun_with(place: Path, command: Command) -> None:
    before = tree(place)
    assert command(*training(CFA, out="run"), "--resume").code == 0
    assert command("train", "run/recipe.yaml", "--out", "run", "--resume").code == 0
    assert changes(before, tree(place)) == []


def test_a_run_that_diverges_at_once_says_where(place: Path, command: Command) -> None:
    outcome = command(*training(lr="1e9"))
    assert outcome.code == 1
    assert outcome.out == ""
    said = [line for line in outcome.err.splitlines() if line.startswith("robustfair: ")]
    assert outcome.err.splitlines()[-1:] == said
    assert "Traceback" not in outcome.err
    report = json.loads((place / "new" / "diverged.json").read_text(), parse_constant=pytest.fail)
    assert f"epoch {report['epoch']}, step {report['step']}, counted from 0 (lr 1e+09)" in said[0]
    assert "the last checkpoint" not in said[0]
    assert json.loads((place / "new" / "manifest.json").read_text())["status"] == "diverged"
    refused = command("audit", "new", *AUDIT)
    assert refused.code == 2
    assert "Traceback" not in refused.err


def test_a_run_that_diverges_later_keeps_the_epochs_before(place: Path, command: Command) -> None:
    keys = {"lr": "0.1", "gamma": "1e12", "milestones": 0.5, "schedule": "multistep"}
    outcome = command(*training("trades + ccm(begin=1) + ema", **keys))
    assert outcome.code == 1
    assert outcome.err.splitlines()[-1].startswith("robustfair: the loss is not finite")
    report = json.loads((place / "new" / "diverged.json").read_text(), parse_constant=pytest.fail)
    assert {"epoch", "step", "lr", "class_state", "per_class", "train"} <= report.keys()
    seen = history(place / "new")
    assert [record["epoch"] for record in seen] == [1]
    robust, count = seen[0]["train"]["robust"], seen[0]["train"]["count"]
    expected = [0.3 + hits / n for hits, n in zip(robust, count, strict=True)]
    assert report["class_state"]["ccm"]["scale"] == pytest.approx(expected)
    manifest = json.loads((place / "new" / "manifest.json").read_text())
    assert (manifest["status"], manifest["epochs_done"]) == ("diverged", 1)
    for checkpoint in ("best", "last", "ema"):
        assert command("audit", "new", "--checkpoint", checkpoint, *AUDIT).code == 0
    files = tree(place / "new" / "checkpoints")
    again = command("train", "--out", "new", "--resume")
    assert again.code == 1
    assert changes(files, tree(place / "new" / "checkpoints")) == []


def test_control_c_is_one_line_and_exit_130(place: Path, command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*args: Any, **keys: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(runner, "fit", interrupt)
    outcome = command(*training(), "--select", "last", "--quiet")
    assert outcome.code == 130
    assert outcome.err == f"{INTERRUPTED}\n"


def test_a_run_interrupted_by_a_signal_goes_on_with_resume(place: Path, command: Command) -> None:
    argv = training(CFA, epochs=400, limit_per_class=4)
    process = subprocess.Popen(
        [sys.executable, "-m", "robustfair.cli", *argv],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background job ignores it
    )
    try:
        until = time.monotonic() + 60
        while not (place / "new" / "checkpoints" / "last").exists() and process.poll() is None:
            assert time.monotonic() < until
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130
    assert "Traceback" not in err
    assert err.splitlines()[-1] == INTERRUPTED
    assert json.loads((place / "new" / "manifest.json").read_text())["status"] == "running"
    assert 0 < len(history(place / "new")) < 400
    assert command("audit", "new", *AUDIT).code == 0


# Auditing


def test_an_audit_is_printed_as_the_json_it_stores(place: Path, command: Command) -> None:
    outcome = command("audit", "run", "--attacks", "clean,pgd-2", "--limit-per-class", 3, "--json")
    printed = outcome.json()
    (stored,) = (place / "run" / "audit").glob("*.json")
    assert printed == json.loads(stored.read_text())
    assert printed["schema"] == "robustfair.audit/2"
    assert list(printed["attacks"]) == ["clean", "pgd-2"]
    arrays = np.load(stored.with_suffix(".npz"))
    assert set(arrays.files) == {"index", "labels", "clean", "pgd-2"}
    for attack, found in printed["attacks"].items():
        confusion = np.zeros((10, 10), dtype=int)
        np.add.at(confusion, (arrays[attack], arrays["labels"]), 1)
        counts = found["confusion"]
        assert counts["count"] == confusion[counts["predicted"], counts["true"]].tolist()
        assert sum(counts["count"]) == confusion.sum()
        assert found["correct"] == confusion.diagonal().tolist()


def test_an_audit_takes_data_and_threat_from_the_run(place: Path, command: Command) -> None:
    found = command("audit", "run", "--attacks", "clean,pgd-2", "--json").json()
    test = load_dataset("digits").test
    assert found["data"] | {"split": ""} == {
        "name": "digits",
        "fingerprint": test.fingerprint,
        "images": len(test),
        "split": "",
    }
    assert found["threat"] == {"norm": "linf", "eps": 0.1, "step_size": 0.025}
    assert found["attacks"]["pgd-2"]["settings"]["eps"] == 0.1


def test_an_audit_takes_norm_and_image_size_from_the_run(place: Path, command: Command) -> None:
    assert command(*training(norm="l2", eps="0.5", image_size=10, epochs=1)).code == 0
    found = command("audit", "new", "--attacks", "clean,fgsm", "--json").json()
    assert (found["threat"]["norm"], found["threat"]["eps"]) == ("l2", 0.5)
    assert found["data"]["fingerprint"] == load_dataset("digits", image_size=10).test.fingerprint


def test_flags_of_an_audit_go_before_what_the_run_says(place: Path, command: Command) -> None:
    words = ["--eps", "8/255", "--step-size", "1/255", "--data", "good.npz", "--seed", 5]
    found = command("audit", "run", "--attacks", "clean,pgd-2", *words, "--json").json()
    assert found["threat"] == {"norm": "linf", "eps": 8 / 255, "step_size": 1 / 255}
    assert found["data"]["images"] == 20
    assert found["provenance"]["seed"] == 5


def test_another_norm_does_not_take_the_radius_of_the_run(place: Path, command: Command) -> None:
    found = command("audit", "run", "--norm", "l2", *AUDIT, "--json").json()
    assert (found["threat"]["norm"], found["threat"]["eps"]) == ("l2", 128 / 255)


def test_training_images_are_not_recorded_as_test_images(place: Path, command: Command) -> None:
    assert command(*training(data="good.npz", limit_per_class=None, epochs=1)).code == 0
    assert command("audit", "new", "--attacks", "clean", "--json").json()["data"]["split"] == "train"


def test_a_class_without_training_images_is_named_before_training(place: Path, command: Command) -> None:
    images, labels = np.zeros((40, 8, 8), np.uint8), np.arange(40) % 10
    arrays = {"test_images": images, "test_labels": labels}
    np.savez("gap.npz", train_images=images, train_labels=np.where(labels == 3, 4, labels), **arrays)
    outcome = command(*training(data="gap.npz", limit_per_class=None, epochs=1))
    assert outcome.code == 0
    lines = outcome.err.splitlines()
    (named,) = [number for number, line in enumerate(lines) if "gap: no training image of class 3: " in line]
    assert lines[named].startswith("warning: ")
    assert named < next(number for number, line in enumerate(lines) if line.startswith("epoch"))
    assert any(line.startswith("gap, train part: 30 images of 10 classes (0: 3, ") for line in lines)
    assert any(line.endswith("3, 9: 3), none of 3") for line in lines)
    np.savez("gap.npz", train_images=images, train_labels=labels + 1, test_images=images, test_labels=labels + 1)
    outcome = command(*training(data="gap.npz", limit_per_class=None, out="other"))
    assert (outcome.code, outcome.err.count("\n")) == (2, 1)
    assert "labels run from 1 to 10 and none is 0: they count from one, or class 0 has no images" in outcome.err
    assert not Path("other").exists()


def test_an_audit_says_what_was_left_out_and_counts_its_images(place: Path, command: Command) -> None:
    for part in ("train", "val"):
        write_images(Path("pictures", part), {"car": pixels(1, channels=1), "dog": pixels(1, channels=1, seed=1)})
    Path("pictures/logs").mkdir()
    assert command(*training(data="pictures", limit_per_class=None, epochs=1, validation=0, select="last")).code == 0
    outcome = command("audit", "new", "--attacks", "clean", "--json")
    assert outcome.code == 0
    assert outcome.json()["data"]["split"] == "test"
    lines = outcome.err.splitlines()
    assert "warning: pictures: left out: logs/ (no image in it)" in lines
    assert "warning: pictures: the validation part is the test part" in lines
    assert "pictures, test part: 2 images of 2 classes (1 each)" in lines


def test_images_that_changed_since_the_run_are_refused(place: Path, command: Command) -> None:
    assert command(*training(data="good.npz", limit_per_class=None, epochs=1)).code == 0
    np.savez(place / "good.npz", images=pixels(20, channels=1, seed=1), labels=np.arange(20) % 10)
    before = tree(place)
    for argv in (["audit", "new", *AUDIT], ["train", "--out", "new", "--resume"]):
        outcome = command(*argv)
        assert outcome.code == 2, argv[0]
        assert "changed" in outcome.err
    assert changes(before, tree(place)) == []


def test_a_weight_file_audits_as_the_run_it_came_from(place: Path, command: Command) -> None:
    words = ["--attacks", "clean,pgd-2", "--limit-per-class", 9, "--json"]
    of_run = command("audit", "run", "--checkpoint", "last", *words).json()
    file = "run/checkpoints/last/weights.safetensors"
    given = ["--data", "digits", "--eps", "0.1", *words]
    of_file = command("audit", file, "--arch", "small-cnn", "--width", 4, *given).json()
    of_factory = command("audit", "zoo_of_test:tiny", "--weights", file, *given).json()
    for other in (of_file, of_factory):
        for key in ("attacks", "robust", "threat", "data", "class_names", "head_norms", "count"):
            assert other[key] == of_run[key]
    assert len(set(of_run["attacks"]["clean"]["confusion"]["predicted"])) > 2
    assert (of_file["model"], of_factory["model"]) == (file, f"zoo_of_test:tiny ({file})")


def test_a_pt_file_without_code_is_read(place: Path, command: Command) -> None:
    safetensors, pt = (command("audit", name, *WEIGHTS, "--json").json() for name in ("good.safetensors", "good.pt"))
    assert pt["count"] == safetensors["count"]
    assert torch.load("good.pt", weights_only=True).keys() == load_file("good.safetensors").keys()


def test_keys_beside_the_network_and_further_sets_are_said_and_can_be_chosen(place: Path, command: Command) -> None:
    raw = command("audit", "beside.pth.tar", *WEIGHTS, "--json", "--out", "raw")
    assert raw.code == 0
    assert (
        "note: weights from 'state_dict'; not taken: 'ema_state_dict' (--select-weights chooses); prefix 'model.' "
        "removed; unused keys: criterion.weight; Python objects not read: args (argparse.Namespace)\n"
    ) in raw.err
    averaged = command("audit", "beside.pth.tar", "--select-weights", "ema", *WEIGHTS, "--json", "--out", "raw")
    assert "note: weights from 'ema_state_dict'; not taken: 'state_dict.model'" in averaged.err
    assert averaged.json()["model"] == "beside.pth.tar (ema)"
    assert len(list((place / "raw").glob("*.json"))) == 2
    few = ("--which", "fog", "--severities", "1", "--limit-per-class", "1")
    assert command("corruptions", "two.ckpt", "--select-weights", "best", *WEIGHTS[:-4], *few).code == 0


def test_a_model_from_elsewhere_leaves_files_only_where_it_is_told(place: Path, command: Command) -> None:
    before = tree(place)
    assert command("audit", "good.safetensors", *WEIGHTS).code == 0
    assert changes(before, tree(place)) == []
    assert (
        command("audit", "good.safetensors", *WEIGHTS, "--out", "deep/audits", "--report", "deep/page.html").code == 0
    )
    written = changes(before, tree(place))
    assert {Path(path).suffix for path in written} == {"", ".json", ".npz", ".html"}
    assert all(path.startswith("deep") for path in written)


def test_checkpoints_are_audited_by_name(place: Path, command: Command) -> None:
    found = {
        name: command("audit", "run", "--checkpoint", name, "--attacks", "clean", "--json").json()
        for name in ("best", "last", "ema")
    }
    assert found["last"]["attacks"] != found["ema"]["attacks"]
    selected = json.loads((place / "run" / "manifest.json").read_text())["selected"]
    assert found["best"]["model"] == f"run (best: {selected['candidate']}, epoch {selected['epoch']})"
    assert found["last"]["model"] == "run (last: model, epoch 2)"
    assert found["ema"]["model"] == "run (ema: ema, epoch 2)"
    plain = command("audit", "run", "--attacks", "clean", "--json").json()
    assert plain["attacks"] == found["best"]["attacks"]


def test_the_same_audit_replaces_itself_and_no_other(place: Path, command: Command) -> None:
    def files() -> set[str]:
        return {path.name for path in (place / "run" / "audit").glob("*.json")}

    first = ["audit", "run", "--attacks", "clean,pgd-2", "--limit-per-class", 2]
    assert command(*first).code == 0
    seen = files()
    assert command(*first).code == 0
    assert files() == seen
    for other in (
        ["--data", "good.npz"],
        ["--checkpoint", "last"],
        ["--seed", 1],
        ["--eps", "0.2"],
        ["--norm", "l2"],
        ["--alpha", "0.05"],
        ["--precision", "bf16"],
    ):
        assert command(*first, *other).code == 0
        assert len(files()) == len(seen) + 1, other
        seen = files()


def test_two_models_may_share_a_folder_of_audits(place: Path, command: Command) -> None:
    for name in ("good.safetensors", "run/checkpoints/last/weights.safetensors"):
        assert command("audit", name, *WEIGHTS, "--out", "audits").code == 0
    assert len(list((place / "audits").glob("*.json"))) == 2


def test_an_audit_beside_a_baseline_shows_both(place: Path, command: Command) -> None:
    outcome = command(
        *("audit", "repaired", "--attacks", "clean", "--limit-per-class", 2),
        *("--baseline", "baseline.json", "--report", "page.html"),
    )
    assert outcome.code == 0, outcome.err
    lines = outcome.out.splitlines()
    for part in ("before", "after"):
        assert any(line.startswith(f"{part}  ") and "clean" in line and "average" in line for line in lines)
    for name in TEN:
        assert sum(line.split()[:2] == [name, "2"] for line in lines) == 1
    assert "before" in (place / "page.html").read_text(encoding="utf-8").lower()


def test_an_audit_prints_a_line_per_class_and_what_it_wrote(place: Path, command: Command) -> None:
    outcome = command("audit", "run", "--attacks", "clean,pgd-2", "--limit-per-class", 3)
    assert outcome.code == 0
    lines = outcome.out.splitlines()
    for name in TEN:
        assert sum(line.split()[:2] == [name, "3"] for line in lines) == 1
    wrote = [Path(line.removeprefix("wrote ")) for line in lines if line.startswith("wrote ")]
    assert [path.suffix for path in wrote] == [".json", ".npz", ".html"]
    assert all(path.is_file() for path in wrote)


# The AutoAttack family, budgets, gates, groups and formats

FAST = "clean,apgd-ce(steps=5),square(queries=20)"


@pytest.mark.parametrize("engine", ["native", "reference"])
def test_an_audit_by_either_engine(place: Path, command: Command, engine: str) -> None:
    words = ["--attacks", "apgd-ce(steps=5)", "--engine", engine, "--limit-per-class", 3]
    found = command("audit", "run", *words, "--json").json()
    assert list(found["attacks"]) == ["clean", "apgd-ce(steps=5)"]
    about = found["attacks"]["apgd-ce(steps=5)"]
    assert about["settings"]["ran"] == {"apgd-ce(steps=5)": 1.0}
    assert found["provenance"]["engine"] == engine
    lost = [c - r for c, r in zip(found["attacks"]["clean"]["correct"], about["correct"], strict=True)]
    assert about["fell_to"] == {"apgd-ce(steps=5)": lost}
    assert sum(lost) > 0


def test_engines_and_points_are_audits_of_their_own(place: Path, command: Command) -> None:
    words = ["audit", "run", "--attacks", "apgd-ce(steps=3)", "--limit-per-class", 2]
    for engine in ("native", "reference"):
        assert command(*words, "--engine", engine).code == 0
    assert len(list((place / "run" / "audit").glob("*.json"))) == 2


def test_points_are_saved_beside_the_audit(place: Path, command: Command) -> None:
    outcome = command("audit", "run", "--attacks", FAST, "--limit-per-class", 3, "--points")
    assert outcome.code == 0, outcome.err
    wrote = [Path(line.removeprefix("wrote ")) for line in outcome.out.splitlines() if line.startswith("wrote ")]
    assert [path.suffix for path in wrote] == [".json", ".npz", ".safetensors", ".html"]
    points, arrays = load_file(wrote[2]), np.load(wrote[1])
    images = load_dataset("digits").test.limit_per_class(3).images / 255
    model = load_target("run").model
    assert len(points["apgd-ce(steps=5)/image"])
    for name in ("apgd-ce(steps=5)", "square(queries=20)"):
        rows = points[f"{name}/image"].tolist()
        assert sorted(rows) == (arrays[f"{name}:broken_by"] == 0).nonzero()[0].tolist()
        for row, point in zip(rows, points[f"{name}/pixels"], strict=True):
            assert (point - images[row]).abs().max() <= 0.1 + 1e-6
            assert int(model(point[None]).argmax()) == arrays[name][row] != arrays["labels"][row]


def test_checks_say_what_hides_gradients(place: Path, command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(masking, "SAMPLE", 10)
    monkeypatch.setattr(masking, "SQUARE", "square(queries=20)")
    words = ["--attacks", "fgsm", "--limit-per-class", 2, "--checks"]
    plain = command("audit", "run", *words, "--json").json()["provenance"]["checks"]
    assert {check["code"] for check in plain} <= {"not-converged"}
    torch.manual_seed(0)
    noisy = command("audit", "zoo_of_test:Noisy", "--data", "digits", *words)
    assert noisy.code == 0
    lines = noisy.out.splitlines()
    assert sum("The same images give other logits at every pass" in line for line in lines) == 1
    assert any(line.startswith("warning: The same images give other logits at every pass") for line in lines)
    told = [line for line in noisy.err.splitlines() if line.startswith("check ")]
    assert any(line.startswith("check pgd-100: ") for line in told)


def test_checks_of_a_model_without_gradients_keep_the_audit(
    place: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(masking, "SAMPLE", 10)
    monkeypatch.setattr(masking, "SQUARE", "square(queries=20)")
    words = ["--data", "digits", "--attacks", "square(queries=20)", "--limit-per-class", 2, "--checks"]
    found = command("audit", "zoo_of_test:Blind", *words, "--out", "kept")
    assert found.code == 0, found.err
    (line,) = (line for line in found.out.splitlines() if "could not be made: the model gives no gradient" in line)
    assert line.startswith("warning: The checks with gradients, by pgd-20, ")
    assert "square(queries=20) by itself leaves" in line
    assert sorted(path.suffix for path in (place / "kept").iterdir()) == [".json", ".npz"]


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="no folder here refuses root")
def test_a_folder_that_cannot_be_written_is_one_line(place: Path, command: Command) -> None:
    outcome = command("audit", "run", *AUDIT, "--quiet", "--out", "/proc/self")
    assert (outcome.code, outcome.out) == (2, "")
    assert re.fullmatch(r"robustfair: /proc/self/unfinished-\w+\.safetensors: .+\n", outcome.err)


def test_random_output_is_said_without_being_asked(place: Path, command: Command) -> None:
    found = command("audit", "zoo_of_test:Noisy", "--data", "digits", *AUDIT, "--json").json()
    assert "random-output" in {check["code"] for check in found["provenance"]["checks"]}


@pytest.mark.parametrize(
    ("gates", "code", "lines"),
    [
        (["worst.robust=0"], 0, [r"passed: worst\.robust is 0\.\d+ \(\d( and \d others?)?\), at least 0\.00"]),
        (["average.clean>=0.99"], 1, [r"failed: average\.clean is 0\.\d+, below 0\.99"]),
        (
            ["range.robust<=1", "average.clean=99%", "interval.worst.robust.lower=0"],
            1,
            [r"passed: range\.robust is .*, at most 1\.00", r"failed: average\.clean .*", r"passed: interval\.worst.*"],
        ),
        (
            ["class.3.pgd-2=0", "worst-10pct.clean=0"],
            0,
            [r"passed: class\.3\.pgd-2 .*", r"passed: worst-10pct\.clean .*"],
        ),
    ],
)
def test_gates_decide_the_exit_code(
    place: Path, command: Command, gates: list[str], code: int, lines: list[str]
) -> None:
    words = [word for gate in gates for word in ("--fail-under", gate)]
    audit = ["audit", "run", "--attacks", "clean,pgd-2", "--limit-per-class", 3]
    outcome = command(*audit, *words)
    assert outcome.code == code, outcome.err
    said = outcome.out.splitlines()[-len(lines) :]
    assert all(re.fullmatch(line, text) for line, text in zip(lines, said, strict=True)), said
    assert list((place / "run" / "audit").glob("*.json")), "an audit that fails a gate is saved too"
    as_json = command(*audit, *words, "--json")
    assert as_json.code == code
    found = json.loads(as_json.out)["gates"]
    assert [gate["gate"] for gate in found] == gates
    assert {gate["status"] for gate in found} <= {"passed", "failed"}
    assert [line for line in as_json.err.splitlines() if re.match("passed|failed", line)] == [
        gate["line"] for gate in found
    ]


def test_groups_of_classes_and_of_images(place: Path, command: Command) -> None:
    audit = ["audit", "run", "--attacks", "clean,pgd-2", "--limit-per-class", 2]
    stored = command(*audit, "--json").json()
    right = stored["attacks"]["pgd-2"]["correct"]
    found = command(*audit, "--group-by", "parity.csv", "--json").json()["by_group"]
    assert found["groups"] == ["even", "odd"]
    assert found["count"] == [10, 10]
    assert found["attacks"]["pgd-2"]["correct"] == [sum(right[0::2]), sum(right[1::2])]
    by_image = command(*audit, "--group-by", "images.csv", "--json").json()["by_group"]
    assert by_image["groups"] == ["first", "rest"]
    assert by_image["count"] == [5, 15]
    shown = command(
        *audit, "--group-by", "parity.csv", "--fail-under", "group.odd.clean=0", "--fail-under", "worst-group.pgd-2=1"
    )
    assert shown.code == 1
    for name in ("even", "odd"):
        assert sum(line.split()[:2] == [name, "10"] for line in shown.out.splitlines()) == 1
    assert shown.out.splitlines()[-2].startswith("passed: group.odd.clean is ")
    assert shown.out.splitlines()[-1].startswith("failed: worst-group.pgd-2 is ")


def test_an_audit_for_papers(place: Path, command: Command) -> None:
    audit = ["audit", "run", "--attacks", "clean,pgd-2", "--limit-per-class", 2, "--group-by", "parity.csv"]
    outcomes = {form: command(*audit, "--format", form) for form in ("markdown", "latex", "json", "table")}
    assert all(outcome.code == 0 for outcome in outcomes.values())
    assert "wrote" not in "".join(outcomes[form].out for form in ("markdown", "latex", "json"))
    assert re.search(r"^\|.*pgd-2.*\|$", outcomes["markdown"].out, re.MULTILINE)
    assert outcomes["latex"].out.count(r"\begin{tabular}") == 2
    assert outcomes["latex"].out.count(r"\bottomrule") == 2
    for text in (outcomes["markdown"].out, outcomes["latex"].out):
        assert "even" in text
        assert "odd" in text
    assert outcomes["json"].json()["by_group"]["groups"] == ["even", "odd"]
    assert "wrote" in outcomes["table"].out


def test_a_budget_ends_an_audit_and_the_same_command_goes_on(place: Path, command: Command) -> None:
    audit = ["audit", "run", "--attacks", FAST, "--limit-per-class", 2]
    cut = command(*audit, "--max-minutes", "1e-9", "--fail-under", "worst.robust=0")
    assert cut.code == 1
    warned = [line for line in cut.err.splitlines() if line.startswith("warning: ")]
    assert len(warned) == 1
    assert "minutes are over: the time budget left " in warned[0]
    assert "square(queries=20) at 0 %" in warned[0]
    assert "The same command goes on" in warned[0]
    assert any(line.startswith("warning: Not all attacks ran to their end: the time") for line in cut.out.splitlines())
    assert cut.out.splitlines()[-1].startswith("undecided: worst.robust is ")
    first = {path.name for path in (place / "run" / "audit").iterdir()}
    assert sum("_cut_" in name for name in first) == 2
    (unfinished,) = (name for name in first if name.startswith("unfinished-"))
    whole = command(*audit, "--json").json()
    second = {path.name for path in (place / "run" / "audit").iterdir()}
    assert first - second == {unfinished}
    assert not any("_cut_" in name for name in second - first)
    assert list(whole["attacks"]) == ["clean", "apgd-ce(steps=5)", "square(queries=20)"]
    assert not whole["provenance"]["not_run"]
    fresh = command("audit", "run", "--attacks", FAST, "--limit-per-class", 2, "--out", "fresh", "--json").json()
    assert fresh["attacks"] == whole["attacks"]


def test_a_budget_without_a_folder_promises_nothing(place: Path, command: Command) -> None:
    before = tree(place)
    model = ["good.safetensors", "--arch", "small-cnn", "--width", 4, "--data", "digits"]
    outcome = command("audit", *model, "--attacks", "square(queries=9)", "--max-minutes", "1e-9")
    assert outcome.code == 0
    assert "the time budget left square(queries=9) at " in outcome.err
    assert "goes on" not in outcome.err
    assert changes(before, tree(place)) == []


def test_control_c_in_an_audit_is_one_line_and_the_same_command_goes_on(
    place: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    audit = ["audit", "run", "--attacks", FAST, "--limit-per-class", 2]
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    turn, turns, gone_on = Square.turn, [], []

    def interrupted(self: Square, *args: Any) -> Any:
        turns.append(1)
        if len(turns) == 7 and not gone_on:
            signal.raise_signal(signal.SIGINT)
        return turn(self, *args)

    monkeypatch.setattr(Square, "turn", interrupted)
    try:
        outcome = command(*audit)
    finally:
        signal.signal(signal.SIGINT, before)
    assert (outcome.code, outcome.out) == (130, "")
    images, *progress, last = outcome.err.splitlines()
    assert images == "digits, test part: 20 images of 10 classes (2 each)"
    assert last == INTERRUPTED
    assert all(" images, " in line for line in progress)
    (left,) = (place / "run" / "audit").iterdir()
    assert left.name.startswith("unfinished-")
    turns.clear()
    gone_on.append(True)
    found = command(*audit, "--json").json()
    assert len(turns) == 15, "the turns of Square that were done are not done again"
    assert not left.exists()
    fresh = command(*audit, "--out", "fresh", "--json").json()
    assert fresh["attacks"] == found["attacks"]


@pytest.mark.parametrize("damage", [cut_in_half, lambda path: path.write_bytes(b"")], ids=["cut", "empty"])
def test_a_damaged_journal_is_refused_and_left_as_it_is(
    place: Path, command: Command, damage: Callable[[Path], Any]
) -> None:
    audit = ["audit", "run", "--attacks", FAST, "--limit-per-class", 2]
    command(*audit, "--max-minutes", "1e-9")
    (left,) = (place / "run" / "audit").glob("unfinished-*")
    damage(left)
    before = tree(place)
    outcome = command(*audit)
    assert (outcome.code, outcome.out) == (2, "")
    assert re.fullmatch(r"robustfair: .*unfinished-\w+\.safetensors is damaged .*delete it.*\n", outcome.err)
    assert changes(before, tree(place)) == []


@pytest.mark.parametrize(
    ("words", "said"),
    [(["--weights", "good.pt"], "there is no module timm: pip install"), ([], "add --weights with its")],
)
def test_a_network_of_timm_without_timm(
    place: Path, command: Command, monkeypatch: pytest.MonkeyPatch, words: list[str], said: str
) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    before = tree(place)
    outcome = command("audit", "timm:resnet50", "--data", "digits", *words, *AUDIT)
    assert (outcome.code, outcome.out) == (2, "")
    assert re.fullmatch(r"robustfair: timm:resnet50\b.*\n", outcome.err)
    assert said in outcome.err
    assert changes(before, tree(place)) == []


# Comparing


def test_two_stored_audits_side_by_side(place: Path, command: Command) -> None:
    before = tree(place)
    outcome = command("compare", "stored/before", "stored/after")
    assert outcome.code == 0, outcome.err
    lines = outcome.out.splitlines()
    for name in TEN:
        assert sum(line.split()[:2] == [name, "4"] for line in lines) == 1
    for part in ("before", "after"):
        assert any(line.startswith(f"{part}  ") and "pgd-2" in line for line in lines)
    notes = [line for line in outcome.err.splitlines() if line.startswith("note: stored/")]
    assert len(notes) == 2
    assert changes(before, tree(place)) == []


def test_paired_tests_of_two_runs(place: Path, command: Command) -> None:
    for run in ("run", "repaired"):
        assert command("audit", run, "--attacks", "clean,pgd-2", "--limit-per-class", 4).code == 0
    outcome = command("compare", "run", "repaired", "--paired")
    assert outcome.code == 0, outcome.err
    for word in ("McNemar", "Holm", "pgd-2", "clean", "worst"):
        assert word in outcome.out
    found = command("compare", "run", "repaired", "--paired", "--json").json()
    assert found["schema"] == "robustfair.compare/1"
    assert list(found["attacks"]) == ["clean", "pgd-2", "robust"]
    arrays = [np.load(next((place / run / "audit").glob("*.npz"))) for run in ("run", "repaired")]
    hits = [stored["pgd-2"] == stored["labels"] for stored in arrays]
    average = found["attacks"]["pgd-2"]["average"]
    assert (average["lost"], average["won"]) == (int((hits[0] & ~hits[1]).sum()), int((~hits[0] & hits[1]).sum()))
    assert average["change"] == pytest.approx(hits[1].mean() - hits[0].mean())
    assert [tested["name"] for tested in found["attacks"]["pgd-2"]["classes"]] == list(TEN)


def test_comparisons_of_some_attacks_in_other_forms(place: Path, command: Command) -> None:
    pair = ["compare", "stored/before", "stored/after"]
    only = command(*pair, "--attacks", "PGD_2", "--json").json()
    assert list(only["attacks"]) == ["pgd-2"]
    for attacks, chosen in (
        ("robust", ["robust"]),
        ("Robust", ["robust"]),
        ("clean,robust", ["clean", "robust"]),
        ("robust, PGD_2", ["robust", "pgd-2"]),
    ):
        outcome = command(*pair, "--paired", "--attacks", attacks, "--json")
        assert outcome.code == 0, outcome.err
        assert list(outcome.json()["attacks"]) == chosen
    for form, mark in (("markdown", "|"), ("latex", r"\begin{tabular}")):
        outcome = command(*pair, "--format", form)
        assert outcome.code == 0
        assert mark in outcome.out
    outcome = command(*pair, "--paired", "--out", "deep/table.txt")
    assert outcome.out == "wrote deep/table.txt\n"
    assert (place / "deep" / "table.txt").read_text() == command(*pair, "--paired").out


def test_a_third_is_compared_with_the_first(place: Path, command: Command) -> None:
    outcome = command("compare", "stored/before", "stored/after", "stored/before", "--json")
    found = outcome.json()
    assert len(found) == 2
    assert found[1]["attacks"]["pgd-2"]["average"]["change"] == 0
    assert found[1]["attacks"]["pgd-2"]["average"]["p"] == 1


# Repairing


def test_a_repair_writes_a_new_run_and_leaves_the_old_one(place: Path, command: Command) -> None:
    before = tree(place)
    outcome = command("repair", "run", "--out", "new")
    assert outcome.code == 0
    assert outcome.out.startswith("hwnwb: head norms ")
    assert all(path == "new" or path.startswith("new/") for path in changes(before, tree(place)))
    old = load_file("run/checkpoints/best/weights.safetensors")
    new = load_file("new/checkpoints/repaired/weights.safetensors")
    assert {name for name in old if not torch.equal(old[name], new[name])} == {"head.weight"}
    torch.testing.assert_close(new["head.weight"].norm(dim=1), torch.ones(10))
    manifest = json.loads((place / "new" / "manifest.json").read_text())
    assert manifest["repaired_from"] == {"run": "run", "checkpoint": "best"}
    assert manifest["repair"] == "hwnwb"
    assert manifest["status"] == "complete"
    assert command("audit", "new", *AUDIT, "--json").json()["threat"]["eps"] == 0.1


def test_stages_give_the_weights_of_train_then_repair(place: Path, command: Command) -> None:
    stored = read_recipe(str(place / "repaired" / "recipe.yaml"), {})
    assert [stage.does for stage in stored.stages] == ["train", "repair"]
    outcome = command("train", "repaired/recipe.yaml", "--out", "new")
    assert (outcome.code, outcome.out.count("\n")) == (0, 4)
    weights = "checkpoints/repaired/weights.safetensors"
    made = place / "new" / "stages"
    assert (made / "2-repair" / weights).read_bytes() == (place / "repaired" / weights).read_bytes()
    assert tensors(made / "1-train") == tensors(place / "run")
    assert "(repaired: " in command("audit", "new", *AUDIT, "--json").json()["model"]
    before = tree(place)
    assert command("train", "--out", "new", "--resume", "--json").json()["model"].endswith("2-repair")
    assert changes(before, tree(place)) in ([], ["new/manifest.json"])


@pytest.mark.parametrize("checkpoint", ["last", "ema"])
def test_another_checkpoint_can_be_repaired(place: Path, command: Command, checkpoint: str) -> None:
    outcome = command(
        "repair", "run", "--out", "new", "--checkpoint", checkpoint, "--method", "hwnwb(target_norm=mean)"
    )
    assert outcome.code == 0
    old = load_file(f"run/checkpoints/{checkpoint}/weights.safetensors")
    new = load_file("new/checkpoints/repaired/weights.safetensors")
    assert torch.equal(old["conv1.weight"], new["conv1.weight"])
    norms = old["head.weight"].norm(dim=1)
    torch.testing.assert_close(new["head.weight"].norm(dim=1), norms.mean().expand(10))


def test_a_repair_can_show_before_and_after(place: Path, command: Command) -> None:
    outcome = command("repair", "run", "--out", "new", "--attacks", "clean,pgd-2", "--limit-per-class", 3)
    assert outcome.code == 0
    wrote = [Path(line.removeprefix("wrote ")) for line in outcome.out.splitlines() if line.startswith("wrote ")]
    assert {path.parts[0] for path in wrote} == {"run", "new"}
    assert Path("new/report.html") in wrote
    assert not list(place.rglob("*unfinished-*"))
    for name in TEN:
        assert sum(line.split()[:2] == [name, "3"] for line in outcome.out.splitlines()) == 1


# The other commands


def test_explain_says_who_edits_what(command: Command) -> None:
    outcome = command("explain", "trades(eps=8/255) + ccm + ema", "--epochs", 5)
    assert (outcome.code, outcome.err) == (0, "")
    lines = outcome.out.splitlines()
    assert "  attack: 10 steps of 2/255 in linf" in lines
    assert lines[lines.index("  sets: attack.eps") - 1] == "  acts in: attack, at_epoch"
    assert any(line.startswith("  note: ccm begins at epoch 10") for line in lines)


def test_explain_runs_nothing(place: Path, command: Command) -> None:
    before = tree(place)
    assert command("explain", CFA).code == 0
    assert command("explain", "demo").code == 0
    assert changes(before, tree(place)) == []


KINDS = ["recipes", "objectives", "methods", "models", "datasets", "attacks", "repairs", "edits"]


@pytest.mark.parametrize("kind", KINDS)
def test_list_prints_a_line_per_entry(command: Command, kind: str) -> None:
    entries = dict(listing(kind))
    lines = command("list", kind).out.splitlines()
    assert [line.split()[0] for line in lines] == list(entries)
    assert command("list", kind, "--json").json() == entries


@pytest.mark.parametrize(
    "argv", [[], ["--help"], *([name, "--help"] for name in ["train", "audit", "repair", "explain", "list", "demo"])]
)
def test_help_goes_to_stdout_and_exits_0(command: Command, argv: list[str]) -> None:
    outcome = command(*argv)
    assert (outcome.code, outcome.err) == (0, "")
    assert "Usage: robustfair" in outcome.out


def test_the_help_of_train_tells_every_key(command: Command) -> None:
    text = command("train", "--help").out
    for field in dataclasses.fields(Recipe):
        if field.name not in ("train", "stages"):
            assert flag(field.name) in text


def test_the_version_is_that_of_the_package(command: Command) -> None:
    from importlib.metadata import version

    assert command("--version").out.strip() == version("robustfair")


def test_demo_trains_audits_repairs_and_reports(place: Path, command: Command) -> None:
    (place / "runs" / "demo").mkdir(parents=True)
    outcome = command("demo", "--epochs", 2)
    assert outcome.code == 0, outcome.err
    base = place / "runs" / "demo-2"
    assert {path.name for path in base.iterdir()} == {"trained", "repaired"}
    for name in ("trained", "repaired"):
        assert (base / name / "manifest.json").is_file()
        assert (base / name / "report.html").stat().st_size > 10_000
        (stored,) = (base / name / "audit").glob("*.json")
        attacks = json.loads(stored.read_text())["attacks"]
        assert list(attacks) == ["clean", "pgd-20", "cw-50(restarts=5)"]
    lines = outcome.out.splitlines()
    for name in TEN:
        assert sum(line.split()[:1] == [name] for line in lines) == 1
    assert any(line.startswith("before  ") and "cw-50" in line for line in lines)
    assert any(line.startswith("after   ") and "cw-50" in line for line in lines)
    assert "Traceback" not in outcome.err
    assert changes({}, tree(place / "runs" / "demo")) == []


def test_images_in_folders_with_odd_names_go_all_the_way(place: Path, command: Command) -> None:
    names = ("Äpfel, rot", "b c+(d)=e", "<b>&\"'")
    write_images(place / "meine Bilder", {name: pixels(8, seed=row) for row, name in enumerate(names)})
    keys = {"data": "meine Bilder", "out": "läufe/a b+c", "limit_per_class": None, "epochs": 1}
    assert command(*training("trades", **keys)).code == 0
    found = command("audit", "läufe/a b+c", "--attacks", "clean,fgsm", "--json").json()
    assert found["class_names"] == sorted(names)
    outcome = command("repair", "läufe/a b+c", "--out", "läufe/ü", "--attacks", "clean")
    assert outcome.code == 0, outcome.err
    page = (place / "läufe" / "ü" / "report.html").read_text(encoding="utf-8")
    assert "<b>&\"'" not in page


# Real processes


def process(*argv: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "robustfair.cli", *argv], cwd=cwd, capture_output=True, text=True)


def test_a_process_reports_wrong_use_in_one_line(tmp_path: Path) -> None:
    done = process("train", "trades + ccm", "--dta", "digits", "--out", "new", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert re.fullmatch(r"robustfair: .*--dta.*--data.*\n", done.stderr)
    assert list(tmp_path.iterdir()) == []


def test_a_reader_that_stops_early_is_no_error(tmp_path: Path) -> None:
    words = [sys.executable, "-m", "robustfair.cli", "list", "models"]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as running:
        assert running.stdout is not None
        assert running.stderr is not None
        running.stdout.close()
        assert running.stderr.read() == ""


def test_a_stored_audit_is_read_again_without_attacking(place: Path, command: Command) -> None:
    first = command("audit", "run", "--attacks", "clean,pgd-2", "--limit-per-class", 2, "--json")
    stored = next(path for path in (place / "run" / "audit").glob("clean,pgd-2*.json"))
    before = tree(place)
    again = command("audit", stored, "--json", "--fail-under", "average.clean=0")
    assert again.code == 0
    assert json.loads(again.out)["attacks"] == json.loads(first.out)["attacks"]
    assert command("audit", stored, "--fail-under", "worst.pgd-2=100%").code == 1
    assert changes(before, tree(place)) == []


def test_a_gate_on_what_nothing_measured_is_undecided_everywhere(place: Path, command: Command) -> None:
    words = ["--attacks", "clean", "--limit-per-class", 2, "--fail-under", "worst.robust=0"]
    outcome = command("audit", "run", *words, "--report", "page.html", "--quiet")
    line = "undecided: worst.robust is not known, nothing attacked the model, the audit is of clean images alone"
    assert (outcome.code, outcome.out.splitlines()[-1]) == (1, line)
    assert line in (place / "page.html").read_text(encoding="utf-8")
    found = command("audit", "run", *words, "--json")
    assert found.code == 1
    assert json.loads(found.out)["gates"] == [
        {"gate": "worst.robust=0", "value": None, "status": "undecided", "line": line}
    ]
    assert line in found.err
    stored = next(path for path in (place / "run" / "audit").glob("clean_*.json"))
    again = command("audit", stored, "--fail-under", "worst.robust=0")
    assert (again.code, again.out.splitlines()[-1]) == (1, line)


def test_a_stored_audit_beside_a_baseline_is_shown_as_a_run_is(place: Path, command: Command) -> None:
    (before,) = (place / "stored" / "before").glob("*.json")
    (after,) = (place / "stored" / "after").glob("*.json")
    files = tree(place)
    outcome = command("audit", after, "--baseline", before)
    assert outcome.code == 0, outcome.err
    for part in ("before", "after"):
        assert any(line.startswith(f"{part}  ") and "pgd-2" in line for line in outcome.out.splitlines())
    for name in TEN:
        assert sum(line.split()[:2] == [name, "4"] for line in outcome.out.splitlines()) == 1
    found = command("audit", after, "--baseline", before, "--json").json()
    assert found["comparison"] == command("compare", before, after, "--json").json()
    assert found["attacks"] == json.loads(after.read_text())["attacks"]
    (other,) = (place / "stored" / "fewer").glob("*.json")
    for form in ("table", "json"):
        refused = command("audit", after, "--baseline", other, "--format", form)
        assert (refused.code, refused.out) == (2, "")
        assert "not of the same images" in refused.err
        assert command("audit", after, "--baseline", other, "--report", "page.html", "--format", form).code == 2
    assert changes(files, tree(place)) == []


def test_a_stored_audit_gets_its_report(place: Path, command: Command) -> None:
    (before,) = (place / "stored" / "before").glob("*.json")
    (after,) = (place / "stored" / "after").glob("*.json")
    files = tree(place)
    outcome = command("audit", after, "--report", "deep/one.html", "--quiet")
    assert outcome.code == 0, outcome.err
    assert outcome.out.splitlines()[-1] == "wrote deep/one.html"
    command("audit", after, "--baseline", before, "--report", "deep/two.html", "--json").json()
    one, two = ((place / "deep" / f"{name}.html").read_text(encoding="utf-8") for name in ("one", "two"))
    name = json.loads(before.read_text())["model"]
    assert (name in one, name in two) == (False, True)
    judged = command("audit", after, "--report", "deep/three.html", "--fail-under", "average.clean=1", "--quiet")
    assert judged.code == 1
    assert "failed: average.clean is" in (place / "deep" / "three.html").read_text(encoding="utf-8")
    assert "failed:" not in one
    new = {path for path in tree(place) if path not in files}
    assert {Path(path).suffix for path in new} <= {"", ".html"}


def test_a_run_beside_a_baseline_has_the_comparison_in_its_json(place: Path, command: Command) -> None:
    words = ["--attacks", "clean", "--limit-per-class", 2, "--baseline", "baseline.json", "--json"]
    found = command("audit", "repaired", *words).json()
    assert list(found["comparison"]["attacks"]) == ["clean"]


def test_audits_of_two_models_in_one_folder_stay_apart(place: Path, command: Command) -> None:
    shutil.copytree(place / "run", place / "other")
    for run in ("run", "other"):
        assert command("audit", run, "--attacks", "clean", "--limit-per-class", 2, "--out", "shared").code == 0
        which = ["--which", "fog", "--severities", 1, "--limit-per-class", 2]
        assert command("corruptions", run, *which, "--out", "shared").code == 0
    assert len(list((place / "shared").glob("clean_*.json"))) == 2
    assert len(list((place / "shared").glob("corruptions_*.json"))) == 2


def test_a_baseline_of_other_images_is_refused_before_any_attack(place: Path, command: Command) -> None:
    command("audit", "run", "--attacks", "clean", "--limit-per-class", 2)
    stored = next(path for path in (place / "run" / "audit").glob("clean_*20-images*.json"))
    outcome = command("audit", "run", "--attacks", "clean,pgd-400(restarts=50)", "--baseline", stored)
    assert outcome.code == 2
    assert "not of the same images" in outcome.err


# Paths as a user writes them


@pytest.fixture
def home(place: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The place of the stock as the home folder, and an empty working folder in it."""
    monkeypatch.setenv("HOME", str(place))
    monkeypatch.setenv("USERPROFILE", str(place))
    monkeypatch.syspath_prepend(place)
    (place / "here").mkdir()
    monkeypatch.chdir(place / "here")
    return place


def test_a_tilde_is_the_home_folder_in_every_path(home: Path, command: Command) -> None:
    (home / "plan.yaml").write_text("train: standard\ndata: ~/good.npz\nmodel: small-cnn\nwidth: 4\nepochs: 1\n")
    (home / "groups.csv").write_text("class,group\n" + "".join(f"{name},g{int(name) % 2}\n" for name in TEN))
    few = ("--quiet", "--attacks", "clean", "--limit-per-class", "1")
    plain, small = ("--validation", "0", "--select", "last", "--quiet"), ("--arch", "small-cnn", "--width", "4")
    grouped = ("--group-by", "~/groups.csv", "--baseline", "~/baseline.json", "--limit-per-class", "2")
    for words, made in (
        (("train", "~/plan.yaml", "--out=~/plain", *plain), "plain/manifest.json"),
        (
            (
                "train",
                "standard",
                "--data=~/good.npz",
                "--model",
                "small-cnn",
                "--width",
                "4",
                "--epochs",
                "1",
                "--out=~/named",
                *plain,
            ),
            "named/manifest.json",
        ),
        (("audit", "~/run", *few, "--out=~/audits", "--report=~/page.html"), "page.html"),
        (("audit", "~/run", "--attacks", "clean", *grouped, "--out", "~/grouped", "--quiet"), "grouped"),
        (("audit", "~/good.pt", *small, "--data", "~/good.npz", *few, "--report", "~/weights.html"), "weights.html"),
        (("audit", "zoo_of_test:tiny", "--weights=~/good.pt", "--data", "digits", *few, "--out=~/zoo"), "zoo"),
        (("audit", "~/baseline.json", "--report=~/again.html"), "again.html"),
        (("compare", "~/grouped", "~/baseline.json", "--out=~/compared.txt"), "compared.txt"),
        (("repair", "~/run", "--out=~/mended"), "mended/manifest.json"),
        (("corruptions", "~/run", "--which", "fog", "--out=~/fog", "--limit-per-class", "1", "--quiet"), "fog"),
        (("data", "pack", "~/good.npz", "--out=~/packed"), "packed"),
        (("explain", "~/plan.yaml"), "plan.yaml"),
    ):
        outcome = command(*words)
        assert outcome.code == 0, (words, outcome.err)
        assert (home / made).exists(), words
        assert list((home / "here").iterdir()) == [], words


def test_the_next_command_is_one_that_a_shell_takes(place: Path, command: Command) -> None:
    for words in (training(out="a run"), ["repair", "a run", "--out", "it's mended"]):
        outcome = command(*words, "--quiet")
        assert outcome.code == 0, outcome.err
        line = outcome.out.splitlines()[-1]
        _, name, *rest = shlex.split(line)
        assert (name, rest[:2]) == ("robustfair", ["audit", words[words.index("--out") + 1]])
        assert command(*rest, "--limit-per-class", 1, "--quiet").code == 0
    (place / "no audit").mkdir()
    advice = command("compare", "no audit", "run").err.partition(": run ")[2]
    assert shlex.split(advice) == ["robustfair", "audit", "no audit"]
