"""Wrong use of any command: one line, exit 2, nothing written."""

from __future__ import annotations

import pytest

from reference.commands import AUDIT, Refuses, case, training

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
    ("argv", "fragments"), [*UNKNOWN_NAMES, *COMPOSITIONS, *RADII, *VALUES, *FOLDERS, *RESUMING, *RECIPES]
)
def test_wrong_use_is_one_line_and_changes_nothing(
    refuses: Refuses, argv: list[str], fragments: tuple[str, ...]
) -> None:
    refuses(argv, fragments)
