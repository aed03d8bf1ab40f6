from __future__ import annotations

import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from reference.audits import made_audit, random_audit
from robustfair.errors import ConfigError
from robustfair.evaluate.compare import compare
from robustfair.evaluate.groups import read_groups, regroup
from robustfair.report.table import Table, table_of
from robustfair.report.text import escape_latex, latex, markdown

HOSTILE = ("50% _of_ {a}", "a & b\\c", "[x]* $y$ ~^<|>#--`z`\n", "Äpfel")


def hostile_audit(seed: int):
    return replace(random_audit(seed, model="a_b & c"), class_names=HOSTILE, groups=(0, 0, 1, 1))


def tables() -> dict[str, Table]:
    audit = hostile_audit(1)
    groups = regroup(audit, read_groups("superclass", audit), within="group")
    results = {"audit": audit, "groups": groups, "comparison": compare(audit, hostile_audit(2))}
    return {name: table_of(result) for name, result in results.items()}


def test_markdown_exact(small) -> None:
    lower, upper = (f"{100 * end:.1f}" for end in small.worst_interval("pgd-20"))
    assert markdown(table_of(small, ["pgd-20"])).splitlines() == [
        "**net on toy, linf eps 8/255, percent right**",
        "",
        "| class | images | pgd-20 |",
        "| :-- | --: | --: |",
        "| a | 4 | 75.0 [30.1, 95.4] |",
        "| b | 2 | **50.0** [9.5, 90.5] |",
        "| c | no images |  |",
        "| average |  | 66.7 [30.0, 90.3] |",
        f"| worst |  | 50.0 [{lower}, {upper}] |",
        "| worst is |  | b |",
        "| std |  | 12.5 |",
        "| range |  | 25.0 |",
        "",
        "Bold: worst of its column. Intervals: 95 %, Wilson; for worst, bootstrap.",
    ]


def test_latex_exact(small, small_repaired) -> None:
    lines = latex(table_of(compare(small, small_repaired), ["pgd-20"])).splitlines()
    assert lines[0] == "% net -> net repaired on toy, linf eps 8/255, percent right"
    begin = lines.index(r"\begin{tabular}{lrrrrrr}")
    assert all(line.startswith("% ") for line in lines[:begin])
    assert lines[begin + 1 : begin + 9] == [
        r"\toprule",
        r" &  & \multicolumn{5}{c}{pgd-20} \\",
        r"\cmidrule(lr){3-7}",
        r"class & images & before & after & change & lost/won & p \\",
        r"\midrule",
        r"a & 4 & 75.0 & \textbf{50.0} & $-$25.0 [$-$60.9, +27.6] & 1/0 & 1.000 \\",
        r"b & 2 & \textbf{50.0} & 100.0 & +50.0 [$-$39.8, +89.8] & 0/1 & 1.000 \\",
        r"c & no images &  &  &  &  &  \\",
    ]
    assert lines[-2:] == [r"\bottomrule", r"\end{tabular}"]


def test_an_interval_may_be_the_larger_distance_to_an_end(small) -> None:
    assert "| 75.0 ± 44.9 |" in markdown(table_of(small, ["pgd-20"]), intervals="pm")
    assert r"\textbf{50.0}\,$\pm$\,40.5 \\" in latex(table_of(small, ["pgd-20"]), intervals="pm")
    for write in (markdown, latex):
        with pytest.raises(ConfigError, match="brackets or pm, got 'percent'"):
            write(table_of(small), intervals="percent")


def test_what_is_beyond_chance_and_what_is_tiny() -> None:
    found = compare(random_audit(1, images=600, keeps=0.3), random_audit(2, images=600, keeps=0.9))
    table = table_of(found, ["robust"])
    assert "† [+" in markdown(table)
    assert " <0.001 |" in markdown(table)
    text = latex(table)
    assert r"$^\dagger$ [+" in text
    assert r" & $<$0.001 \\" in text


@pytest.mark.parametrize("name", ["audit", "groups", "comparison"])
def test_every_row_of_markdown_has_its_columns(name: str) -> None:
    rows = [line for line in markdown(tables()[name]).splitlines() if line.startswith("|")]
    cells = {len(re.findall(r"(?<!\\)\|", row)) for row in rows}
    assert len(cells) == 1
    assert not re.search(r"(?<!\\)[_`#~<]", re.sub(r"<0\.001", "", "\n".join(rows)))


@pytest.mark.parametrize("intervals", ["brackets", "pm"])
@pytest.mark.parametrize("name", ["audit", "groups", "comparison"])
def test_latex_is_balanced_and_every_row_has_its_columns(name: str, intervals: str) -> None:
    text = latex(tables()[name], intervals=intervals)
    body = "\n".join(line for line in text.splitlines() if not line.startswith("%"))
    plain = body.replace(r"\\", "\n").replace(r"\{", "").replace(r"\}", "")
    depth = 0
    for letter in plain:
        depth += {"{": 1, "}": -1}.get(letter, 0)
        assert depth >= 0
    assert depth == 0
    assert plain.replace(r"\$", "").count("$") % 2 == 0
    columns = len(re.search(r"\\begin\{tabular\}\{(\w+)\}", body)[1])
    for row in (line for line in body.splitlines() if line.endswith(r"\\")):
        spans = [int(width) for width in re.findall(r"\\multicolumn\{(\d+)\}", row)]
        assert len(re.findall(r"(?<!\\)&", row)) + 1 + sum(spans) - len(spans) == columns
        assert row[0] not in "[*"
    if name == "comparison":
        assert re.findall(r"\\cmidrule\(lr\)\{(\d+)-(\d+)\}", body)[:2] == [("3", "7"), ("8", "12")]


def test_letters_that_latex_reads_are_escaped() -> None:
    assert escape_latex("a_b & 5%") == r"a\_b \& 5\%"
    assert escape_latex("\\^~{}") == r"\textbackslash{}\textasciicircum{}\textasciitilde{}\{\}"
    assert escape_latex("x---y\n") == "x-{}-{}-y?"


@pytest.mark.skipif(shutil.which("pdflatex") is None, reason="no LaTeX here")
def test_latex_compiles(tmp_path: Path) -> None:
    written = "\n\n".join(latex(found, intervals=form) for found in tables().values() for form in ("brackets", "pm"))
    page = rf"\documentclass{{article}}\usepackage{{booktabs}}\begin{{document}}\tiny {written}\end{{document}}"
    (tmp_path / "page.tex").write_text(page, encoding="utf-8")
    command = ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "page.tex"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, timeout=60)
    assert done.returncode == 0, done.stdout[-2000:]


def test_a_tie_for_the_worst_is_said_and_marked_in_both_forms() -> None:
    labels = [c for c in range(3) for _ in range(2)]
    tied = made_audit(labels, {"clean": [0, 1, 1, 0, 2, 2]}, ("a_b", "b", "c"))
    assert "| worst is |  | a\\_b and 1 other |" in markdown(table_of(tied))
    assert markdown(table_of(tied)).count("**50.0**") == 2
    assert r"worst is &  & a\_b and 1 other \\" in latex(table_of(tied))
    equal = made_audit(labels, {"clean": labels})
    assert "| worst is |  | all classes |" in markdown(table_of(equal))
    assert "**100.0**" not in markdown(table_of(equal))
    assert "textbf" not in latex(table_of(equal)).split("Bold", 1)[1]
    compared = markdown(table_of(compare(tied, replace(equal, class_names=tied.class_names))))
    assert "| worst is |  | a\\_b and 1 other | all classes |" in compared
