"""`robustfair explain` as a user meets it."""

from __future__ import annotations

from pathlib import Path

from reference.commands import Command
from reference.runs import CFA, changes, tree


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


def test_stages_are_explained_one_by_one(place: Path, command: Command) -> None:
    (place / "two.yaml").write_text(
        "stages:\n- train: trades + ccm\n- edit: long-tail\n- train: pgd-at + ema\n- repair: hwnwb\n"
    )
    outcome = command("explain", "two.yaml")
    assert (outcome.code, outcome.err) == (0, "")
    lines = [line for line in outcome.out.splitlines() if line.startswith("stage ")]
    assert lines == [
        "stage 1, train: trades + ccm",
        "stage 2, edit: long-tail",
        "stage 3, train: pgd-at + ema",
        "stage 4, repair: hwnwb",
    ]
    assert outcome.out.count("acts in:") == 2


def test_a_bundle_is_explained_with_what_it_became_and_refused_beside_its_parts(command: Command) -> None:
    outcome = command("explain", "trades + cfa")
    assert (outcome.code, outcome.err) == (0, "")
    assert "  stands for: ccm, ccr, fawa\n" in outcome.out
    refused = command("explain", "trades + cfa + ccm")
    assert refused.code == 2
    assert "cfa stands for ccm, ccr, fawa and ccm is listed too" in refused.err


def test_a_row_of_a_table_is_explained_with_what_its_paper_reports(command: Command) -> None:
    outcome = command("explain", "cfa/table-1/AT + EMA")
    assert (outcome.code, outcome.err) == (0, "")
    lines = outcome.out.splitlines()
    assert lines[0].startswith("cfa/table-1/at+ema: Wei et al. 2023")
    assert lines[1] == "  measured: best and last checkpoint of 5 runs, clean, autoattack"
    assert "  reported in percent, average / worst class, autoattack: best 49.6 / 21.3, last 44.3 / 18.1" in lines
    assert any(line.startswith("  departure: Best is the epoch") for line in lines)
    assert "  decay=0.85, per=epoch, begin=50, buffers=average, init=copy, ramp=false" in lines


def test_a_row_that_cannot_run_is_explained_as_far_as_it_is_there_and_not_trained(command: Command) -> None:
    name = "hwnwb-decosam/table-2/wrn-28-5/trades+deco-sam"
    outcome = command("explain", name)
    assert (outcome.code, outcome.err) == (0, "")
    lines = outcome.out.splitlines()
    assert "stage 1, train: trades(beta=6)" in lines
    assert lines[-1].startswith(f"{name} cannot run yet: its stage 2, train: trades(beta=6) + deco-sam(")
    assert lines[-1].endswith("what comes before that is hwnwb-decosam/table-2/wrn-28-5/trades")
    refused = command("train", name, "--out", "run")
    assert (refused.code, refused.err) == (2, f"robustfair: {lines[-1]}\n")


def test_a_row_says_what_it_trains_with_and_what_is_guessed(command: Command) -> None:
    lines = command("explain", "confusional-spectral/table-1/trades-awp+frl-rwrm-0.05").out.splitlines()
    assert lines[1] == "  measured: best checkpoint of (not stated how many) runs, autoattack"
    assert any(line.startswith("  guess: FRL has a rate of 0.001, a tenth of it after 40 epochs") for line in lines)
    first, second = (number for number, line in enumerate(lines) if line.startswith("stage "))
    assert lines[first + 1 : first + 6] == [
        "  images: data=cifar10, augment=crop-flip-zero, validation=0.06",
        "  model: model=wrn-34-10, start=scratch",
        "  schedule: epochs=200, batch_size=128, optimizer=sgd, lr=0.1, schedule=multistep, milestones=[0.495, 0.745], "
        "gamma=0.1, momentum=0.9, nesterov=false, weight_decay=0.0005",
        "  rate drops after epochs: 99, 149",
        "  keeps: select=last",
    ]
    assert "  model: model=wrn-34-10, start=previous" in lines[second:]
    assert "  keeps: select=average+worst" in lines[second:]
    assert (
        command("explain", "confusional-spectral/table-4/trades")
        .out.splitlines()[1]
        .startswith("  measured: last (not stated) checkpoint")
    )


def test_a_network_that_does_not_train_is_said(command: Command) -> None:
    outcome = command("explain", "confusional-spectral/table-7/imagenet/csr")
    assert (outcome.code, outcome.err) == (0, "")
    assert "\n  cannot run: model timm:resnet50 can be audited and not be trained: --model names" in outcome.out
    found = command("list", "recipes", "confusional-spectral/table-7", "--json").json()
    assert "(timm:resnet50 does not train)" in found["confusional-spectral/table-7/imagenet/csr"]
    assert "does not train" not in found["confusional-spectral/table-7/cifar100/csr"]


def test_a_file_is_explained_with_its_keys_and_a_composition_without(place: Path, command: Command) -> None:
    (place / "one.yaml").write_text("train: pgd-at\nschedule: fast\nprecision: bf16\n")
    lines = command("explain", "one.yaml").out.splitlines()
    assert lines[:2] == [
        "  images: data=(to be named), augment=(that of the data), validation=0.02",
        "  model: model=preact-resnet18, start=scratch",
    ]
    assert lines[2].endswith("weight_decay=0.0005, precision=bf16")
    assert "warmup=0.4" in lines[2]
    assert "milestones" not in lines[2]
    assert "  images:" not in command("explain", "pgd-at").out


def test_published_weights_are_explained_by_how_to_audit_them(command: Command) -> None:
    outcome = command("explain", "confusional-spectral/table-2/cifar10-linf-wrn-28-10/pang-2022")
    assert (outcome.code, outcome.err) == (0, "")
    assert outcome.out.splitlines()[-1].endswith(
        "robustfair audit robustbench:Pang2022Robustness_WRN28_10 --data cifar10"
    )


def test_a_row_with_worst_classes_alone_shows_them(command: Command) -> None:
    lines = command("explain", "fair-tat/table-4/at").out.splitlines()
    assert lines[1] == "  measured: last checkpoint of (not stated how many) runs on cifar10-c, clean"
    assert "  reported in percent, average / worst class, cifar10-c/contrast: last - / 22.0" in lines
