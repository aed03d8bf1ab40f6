"""Wrong use of what audits a model: one line, exit 2, nothing written."""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path

import pytest
import torch

from reference.commands import AUDIT, WEIGHTS, Command, Refuses, case, training
from reference.runs import changes, tree

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

SAMPLES = [
    case("audit run --images 0", "sample: images must be a whole number from 1 to 359, all there are, got 0"),
    case("audit run --images 360", "from 1 to 359, all there are, got 360"),
    case("audit run --images 9 --stratified", "from 10, one of every class, to 359, all there are, got 9"),
    case("audit run --images ten", "--images", "ten"),
    case("audit run --stratified", "stratified must be given with --images, how many to draw"),
    case("audit run --images 20 --limit-per-class 2", "images must be left out beside --limit-per-class, got 20"),
    case("audit run --images 40 --stratified --group-by parity.csv", "another share of some classes than of others"),
    case("audit baseline.json --images 20", "got '--images'", "only read"),
    case("audit baseline.json --until worst.robust=+-2", "got '--until'", "only read"),
    case("audit run --images 20 --baseline baseline.json", "not of the same images"),
    case("audit run --until worst.robust=+-2 --baseline baseline.json", "baseline must be left out beside --until"),
    case("audit run --until worst.robust=+-2 --group-by parity.csv", "group-by must be left out beside --until"),
    case("audit run --until worst.robust", "stopping rule: text must be name=+-points, like worst.robust=+-2"),
    case("audit run --until worst.robust=2", "like worst.robust=+-2, got 'worst.robust=2'"),
    case("audit run --until worst.robust=+-0.02", "percentage points from 0.1 to 50", "Did you mean +-2?"),
    case("audit run --until wrost.robust=+-2", "unknown measure of a stopping rule 'wrost'", "worst"),
    case("audit run --until worst.cw-20=+-2", "unknown attack in the stopping rule worst.cw-20=+-2"),
    case("audit run --until class.cat.robust=+-2", "unknown class in the stopping rule class.cat.robust=+-2"),
    case("audit run --until group.even.robust=+-2", "measure must be over classes, not groups"),
]

ATTACKS = [
    case(["audit", "run", "--attacks", ""], "names like clean,pgd-20"),
    case(["audit", "run", "--attacks", " , "], "names like clean,pgd-20"),
    case("audit run --attacks pgd-2,PGD_2", "each attack once", "pgd-2"),
    case("audit run --attacks clean,clean", "each attack once", "clean"),
    case(["audit", "run", "--attacks", "clean pgd-2"], "cannot read 'clean pgd-2'"),
    case("audit run --attacks clean+pgd-2", "separate them by commas"),
    case("audit run --attacks pgd", "unknown attack 'pgd'", "pgd-20"),
    case("audit run --attacks pgd-0", "steps must be >= 1, got 0"),
    case("audit run --attacks pgd-2(restarts=0)", "restarts must be >= 1, got 0"),
    case("audit run --attacks pgd-2(restarts=2", "cannot read"),
    case("audit run --attacks clean(restarts=2)", "clean: options must be none"),
    case("repair run --out new --attacks pgd", "unknown attack 'pgd'"),
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


@pytest.mark.parametrize(("argv", "fragments"), [*DATA, *MODELS, *SAMPLES, *ATTACKS, *STRONG, *GATES, *GROUPS])
def test_wrong_use_is_one_line_and_changes_nothing(
    refuses: Refuses, argv: list[str], fragments: tuple[str, ...]
) -> None:
    refuses(argv, fragments)


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
