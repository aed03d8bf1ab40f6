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


def test_a_row_that_ends_before_its_end_says_so_in_one_line(command: Command) -> None:
    outcome = command("explain", "hwnwb-decosam/table-2/wrn-28-5/trades+deco-sam")
    assert outcome.code == 0
    assert outcome.err.startswith("warning: hwnwb-decosam/table-2/wrn-28-5/trades+deco-sam ends before its stage 2")
    assert outcome.err.count("\n") == 1
    assert "stage 1, train: trades(beta=6)" in outcome.out
    assert "stage 2" not in outcome.out


def test_published_weights_are_explained_by_how_to_audit_them(command: Command) -> None:
    outcome = command("explain", "confusional-spectral/table-2/cifar10-linf-wrn-28-10/pang-2022")
    assert (outcome.code, outcome.err) == (0, "")
    assert outcome.out.splitlines()[-1].endswith(
        "robustfair audit robustbench:Pang2022Robustness_WRN28_10 --data cifar10"
    )


def test_a_row_with_worst_classes_alone_shows_them(command: Command) -> None:
    lines = command("explain", "fair-tat/table-4/at").out.splitlines()
    assert lines[1] == "  measured: last checkpoint of 1 run on cifar10-c, clean"
    assert "  reported in percent, average / worst class, cifar10-c/contrast: last - / 22.0" in lines
