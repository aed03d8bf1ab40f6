from __future__ import annotations

import ast
import base64
import hashlib
import re
from dataclasses import replace
from html.parser import HTMLParser
from importlib.resources import files
from pathlib import Path

import pytest

from reference.audits import made_audit
from robustfair.errors import ConfigError, DataError
from robustfair.evaluate.compare import compare
from robustfair.evaluate.gates import check, parse_gate
from robustfair.evaluate.groups import read_groups, regroup
from robustfair.report.html import breakable, render_report, write_report
from robustfair.report.rates import shown_attacks, strongest
from robustfair.report.words import percent, points

VOID = {"meta", "wbr", "br", "hr", "img", "input", "link"}
HOSTILE = "<script>alert('x')</script><b onclick=\"y\">&amp;"


class Page(HTMLParser):
    """Checks that tags are balanced; collects text, attributes and element ids."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.parts: list[str] = []
        self.feed(text)
        self.close()
        assert not self.open, self.open
        self.text = re.sub(r"\s+", " ", "".join(self.parts))

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        assert len(attrs) == len(dict(attrs)), f"an attribute of {tag} stands twice"
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open, f"</{tag}> closes nothing"
        assert self.open[-1] == tag, f"</{tag}> closes <{self.open[-1]}>"
        self.open.pop()
        if tag in ("td", "th", "dt", "dd", "p", "h1", "h2", "title"):
            self.parts.append(" ")

    def handle_data(self, data):
        if not self.open or self.open[-1] not in ("style", "script"):
            self.parts.append(data)

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attrs for name, attrs in self.tags if name == tag]


@pytest.fixture
def page(large, history):
    def make(classes: int, *, paired: bool = False) -> tuple[str, Page]:
        audit = large(classes)
        before = replace(audit, model="net before", head_norms=None) if paired else None
        text = render_report(audit, baseline=before, history=history(classes))
        return text, Page(text)

    return make


@pytest.mark.parametrize("paired", [False, True])
@pytest.mark.parametrize("classes", [2, 10, 30])
def test_page_is_whole_and_shows_every_class_and_rate(large, page, classes, paired):
    text, parsed = page(classes, paired=paired)
    audit = large(classes)
    for name in audit.class_names:
        assert name in parsed.text
    rows = [attrs["data-rates"] for attrs in parsed.all("tr") if "data-rates" in attrs]
    assert len(rows) == classes
    for c, row in enumerate(rows):
        assert row.split() == [f"{float(audit.rate(a)[c]):.6f}" for a in shown_attacks(audit)]
    for attack in shown_attacks(audit):
        lower, upper = audit.interval(attack)
        for c, rate in enumerate(audit.rate(attack).tolist()):
            assert percent(rate) in parsed.text
            if not paired:
                assert f"{percent(rate)} [{percent(lower[c])}, {percent(upper[c])}]" in parsed.text
    ids = [attrs["id"] for _, attrs in parsed.tags if "id" in attrs]
    assert len(ids) == len(set(ids))
    assert "nan" not in re.findall(r"[a-z]+", parsed.text)
    assert text.count("<main>") == 1


def test_page_asks_for_nothing_and_runs_only_its_own_script(page):
    text, parsed = page(10)
    assert "http:" not in text
    assert "https:" not in text
    assert "//" not in re.sub(r"/\*.*?\*/", "", text)
    assert "@import" not in text
    assert "url(" not in text
    for tag, attrs in parsed.tags:
        assert not {"src", "href", "srcset", "action", "data"} & set(attrs), tag
        assert not any(name.startswith("on") for name in attrs), tag
    policy = next(a["content"] for a in parsed.all("meta") if a.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'")
    script = re.search(r"<script>(.*)</script>", text, re.DOTALL).group(1)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in policy


def test_no_markup_is_put_together_from_texts_in_python():
    for path in (file for file in files("robustfair.report").iterdir() if file.name.endswith(".py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            pieces = node.values if isinstance(node, ast.JoinedStr) else []
            texts = [piece.value for piece in pieces if isinstance(piece, ast.Constant)]
            assert not [text for text in texts if re.search(r"</?[a-z]", text)], f"{path.name}, line {node.lineno}"


def test_everything_that_a_user_names_is_escaped(large, history):
    names = (HOSTILE, "plain", "{{ 7*7 }}")
    audit = large(
        3,
        names=names,
        model=HOSTILE,
        data=HOSTILE,
        fingerprint=HOSTILE,
        split=HOSTILE,
        provenance={"command": HOSTILE, HOSTILE: 1, "date": HOSTILE},
    )
    text = render_report(
        audit, baseline=audit, history=history(3), title=f"</title>{HOSTILE}", recipe={HOSTILE: HOSTILE}
    )
    parsed = Page(text)
    assert len(parsed.all("script")) == 1
    assert "{{ 7*7 }}" in parsed.text
    assert HOSTILE in parsed.text
    assert not any("onclick" in attrs for _, attrs in parsed.tags)


def test_the_map_of_a_thousand_classes_shows_those_in_the_largest_errors(large):
    audit = large(1000)
    page = render_report(audit, baseline=audit)
    assert len(page) < 10_000_000
    maps = page.partition("What is taken for what")[2].split("</section>")[0].split("heat-cells")[1:]
    assert [cells.count('class="diagonal"') for cells in maps] == [50, 50]
    assert "Drawn are the 50 of 1,000 classes in the largest errors" in page
    counts = audit.confusion(strongest(audit))
    share = counts / counts.sum(0)
    share.fill_diagonal_(0)
    true = int(share.max(0).values.argmax())
    assert all(f"class {true}, predicted class {int(share[:, true].argmax())}:" in cells for cells in maps)
    assert "Drawn are" not in render_report(large(100))


def test_absent_class_says_so_and_is_worst_nowhere(small, small_repaired):
    for baseline in (None, small):
        parsed = Page(render_report(small_repaired, baseline=baseline))
        assert parsed.text.count("no images") >= 2
        assert "n/a" in parsed.text
        (row,) = [a for a in parsed.all("tr") if a.get("data-rates") == "none none"]
        assert "class" not in row


def test_lead_states_worst_class_interval_and_average(small, small_repaired):
    lower, upper = small.worst_interval("pgd-20")
    lead = f"Under pgd-20 the worst class, b, keeps 50.0 % of its images [{percent(lower)}, {percent(upper)}]"
    assert f"{lead}; the average is 66.7 %." in Page(render_report(small)).text
    after = Page(render_report(small_repaired, baseline=small)).text
    assert "the worst class, a, keeps 50.0 %" in after
    assert "Before, the worst class was b with 50.0 %" in after


def test_baseline_shows_before_after_and_change(small, small_repaired):
    text = Page(render_report(small_repaired, baseline=small)).text
    assert "75.0 → to ▼worst class 50.0 -25.0 [-60.9, +27.6]" in text
    assert "50.0 → to 100.0 +50.0 [-39.8, +89.8]" in text
    assert "Compared with net" in text.replace("  ", " ")


def test_where_all_classes_are_equal_none_is_called_worst():
    labels = [c for c in range(10) for _ in range(3)]
    names = ("airplane", *(f"class {c}" for c in range(1, 10)))
    audit = made_audit(labels, {"clean": labels, "pgd-20": [(y + 1) % 10 for y in labels]}, names)
    page = Page(render_report(audit))
    assert "Under pgd-20 all classes keep 0.0 % of their images [" in page.text
    assert "worst class all classes [" in page.text
    assert "is airplane" not in page.text
    assert not {"badge", "cell-mark", "mark"} & {attrs.get("class") for attrs in page.all("span") + page.all("b")}
    assert not any((attrs.get("class") or "").endswith("worst") for _, attrs in page.tags)


def test_the_worst_of_several_are_all_marked_and_the_badge_names_the_attack():
    labels = [c for c in range(4) for _ in range(2)]
    columns = {"clean": [0, 0, 1, 1, 2, 2, 3, 0], "pgd-20": [1, 1, 0, 0, 2, 2, 3, 0]}
    page = Page(render_report(made_audit(labels, columns, ("airplane", "b", "c", "d"))))
    assert "Under pgd-20 the worst classes, airplane and 1 other, keep 0.0 % of their images [" in page.text
    assert [row.get("class") for row in page.all("tr")][1:5] == ["is-worst", "is-worst", None, "is-worst"]
    assert page.text.count("worst under pgd-20") == 2
    assert page.text.count("worst under clean") == 1
    assert "Worst class is d airplane and 1 other" in page.text
    assert "Best class is airplane and 2 others c" in page.text
    clean = columns | {"pgd-20": [0, 1, 1, 1, 2, 2, 0, 0]}
    both = Page(render_report(made_audit(labels, clean, ("airplane", "b", "c", "d"))))
    assert both.text.count("worst under clean, pgd-20") == 1


def test_a_change_is_bold_where_the_paired_test_decides(undecided):
    before, after = undecided
    entry = compare(before, after).under("clean")
    text = render_report(after, baseline=before)
    page = Page(text)
    tested = entry.classes[0]
    assert tested.difference.upper < 0
    assert not tested.significant
    assert f'<span class="change unsure">{points(tested.difference.change)}</span>' in text
    assert '<span class="change sure">-100.0†</span>' in text
    worst = f"{points(entry.worst.change)}† [{points(entry.worst.lower)}, {points(entry.worst.upper)}]"
    assert f"Worst class 100.0 → to 0.0 {worst} is class 1" in page.text
    assert text.count('class="change sure"') == 4, "class 1, average, worst class and range"
    assert 'class="change"' not in text, "a change without an interval, that of std, is not bold"
    assert "Bold, with † more than chance: by an exact McNemar test" in page.text


def test_findings_stand_above_the_numbers(small):
    text = Page(render_report(small)).text
    assert text.index("Warning No images of c") < text.index("Worst class and average")


def test_page_without_norms_history_recipe_or_attack(small):
    audit = replace(small, predictions={"clean": small.predictions["clean"]}, head_norms=None, provenance={})
    text = Page(render_report(audit)).text
    assert strongest(audit) == "clean"
    for heading in ("Head norms", "Head norm ", "Training", "Recipe", "Date"):
        assert heading not in text
    assert "On clean images all classes with images keep 100.0 % of their images [" in text
    assert "What is taken for what, on clean images" in text


def test_all_scalars_of_the_summary_are_printed(small):
    text = Page(render_report(small)).text
    for words in (
        "Average accuracy, % 100.0 66.7",
        "Mean over classes, % 100.0 62.5",
        "Worst class, % 100.0 50.0",
        "Worst class is all classes with images b",
        "Best class is all classes with images a",
        "Range, best - worst, points 0.0 25.0",
        "Standard deviation of classes, points 0.0 12.5",
        "Standard deviation / mean 0.000 0.200",
        "Head norms, largest / smallest 2.500 2.500",
        "Correlation of head norm and accuracy n/a 1.000",
    ):
        assert words in text


def test_settings_and_provenance_are_printed(small):
    text = Page(render_report(small, recipe={"objective": "trades(beta=6)", "seed": 0})).text
    for words in (
        "pgd-20 20 8/255",
        "data fingerprint c0ffee",
        "versions, torch 2.13.0",
        "seed 7",
        "command robustfair audit runs/x",
        "Date 2026-05-04",
        "objective: trades(beta=6)",
        "6 in 3 classes",
    ):
        assert words in text


def test_history_curves_state_their_numbers(small, history):
    labels = [attrs.get("aria-label", "") for attrs in Page(render_report(small, history=history(3))).all("svg")]
    charts = [label for label in labels if "over 3 epochs" in label]
    assert "Training loss over 3 epochs. loss 2 to 0.6667" in charts
    assert any(c.startswith("Training images") and "robust worst 20.0 % to 60.0 %" in c for c in charts)
    assert any(c.startswith("Validation, ema") and "robust average 20.0 % to 40.0 %" in c for c in charts)
    assert any(c.startswith("Classes, training radius") for c in charts)
    assert not any("loss weight" in c for c in charts), "a quantity that is equal in all classes needs no chart"


def test_history_with_missing_parts(small):
    records = [
        {"epoch": 1, "loss": 1.0, "train": {"count": [2, 0, 1], "clean": [1, 0, 1], "robust": None}},
        {"epoch": 2, "loss": None, "train": None, "validation": {}, "head_norms": None},
    ]
    Page(render_report(small, history=records))


def test_groups_and_gates_are_shown_where_there_are_some(large):
    audit = replace(large(10), groups=(0, 0, 0, 0, 0, 1, 1, 1, 1, 1), group_names=(HOSTILE, "other"))
    rates = regroup(audit, read_groups("superclass", audit))
    gates = check(map(parse_gate, ["average.clean=0", "worst.robust=1", "worst.pgd-20=0"]), audit, rates)
    gates[2] = replace(gates[2], status="undecided", line="undecided: worst.pgd-20 is not known, it did not run")
    text = render_report(audit, rates=rates, gates=gates)
    parsed = Page(text)
    assert HOSTILE not in text
    assert HOSTILE in parsed.text
    for attack in shown_attacks(audit):
        (lower, *_), (upper, *_) = rates.interval(attack)
        assert f"{percent(rates.rate(attack)[0])} [{percent(lower)}, {percent(upper)}]" in parsed.text
    assert all(gate.line in parsed.text for gate in gates)
    assert [a["class"] for a in parsed.all("li")][-3:] == [
        f"finding gate {status}" for status in ("passed", "failed", "undecided")
    ]
    bare = Page(render_report(audit)).text
    assert "Gates" not in bare
    assert "Group by group" not in bare


def test_groups_that_share_the_lowest_rate_are_all_marked_and_counted():
    labels = [c for c in range(4) for _ in range(2)]
    audit = made_audit(labels, {"clean": [0, 1, 1, 0, 2, 3, 3, 3]}, ("a", "b", "c", "d"))
    audit = replace(audit, groups=(0, 1, 2, 3), group_names=("w", "x_1", "y", "z"))
    rates = regroup(audit, read_groups("superclass", audit))
    page = Page(render_report(audit, rates=rates)).text
    table = page.partition("Group by group")[2].partition("What is taken for what")[0]
    assert table.count("▼worst group 50.0") == 3
    assert "worst is w and 2 others" in table


def test_same_audit_same_page(large):
    assert render_report(large(5)) == render_report(large(5))


def test_write_is_whole_or_not_at_all(small, tmp_path, monkeypatch):
    path = tmp_path / "new" / "report.html"
    assert write_report(path, small) == path
    Page(path.read_text(encoding="utf-8"))
    path.write_text("earlier")

    def refuse(*_):
        raise OSError("no space left")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", refuse)
        with pytest.raises(OSError, match="no space"):
            write_report(path, small)
    with pytest.raises(KeyError):
        write_report(path, small, history=[{"no": "epoch"}])
    assert path.read_text() == "earlier"
    assert [file.name for file in path.parent.iterdir()] == ["report.html"]


def test_a_folder_is_no_file_name(small, tmp_path):
    with pytest.raises(ConfigError, match=r"report\.html"):
        write_report(tmp_path, small)


def test_baseline_of_other_classes_is_refused_before_anything_is_written(small, large, tmp_path):
    path = tmp_path / "report.html"
    with pytest.raises(DataError, match="different classes"):
        write_report(path, small, baseline=large(3))
    assert not path.exists()


def test_names_that_are_no_unicode_do_not_break_the_page(small, tmp_path):
    audit = replace(small, class_names=("caf\udce9", "b", "c"))
    assert "caf?" in write_report(tmp_path / "r.html", audit).read_text(encoding="utf-8")


def test_breakable_escapes_every_piece():
    assert str(breakable("a_<b>-c/d")) == "a_&lt;b&gt;-<wbr>c/<wbr>d"


# Colours


def _palettes() -> dict[str, dict[str, str]]:
    css = files("robustfair.report").joinpath("templates", "report.css").read_text()
    light, dark, printed = re.findall(r":root \{(.*?)\}", css, re.DOTALL)
    return {
        name: dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6});", block))
        for name, block in (("light", light), ("dark", dark), ("print", printed))
    }


def _contrast(a: str, b: str) -> float:
    """WCAG 2 contrast ratio of two colours."""

    def luminance(colour: str) -> float:
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    high, low = sorted((luminance(a), luminance(b)), reverse=True)
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("scheme", ["light", "dark", "print"])
def test_contrast_is_at_least_wcag_aa(scheme):
    colours = _palettes()[scheme]
    for ground in ("paper", "panel"):
        for text in ("ink", "muted", "accent"):
            assert _contrast(colours[text], colours[ground]) >= 4.5, (text, ground)
    for mark in ("bar", "bar-faint", "accent", "whisker"):
        assert _contrast(colours[mark], colours["paper"]) >= 3, mark
    for step in range(1, 10):
        text = "h-low-ink" if step <= 5 else "h-high-ink"
        assert _contrast(colours[text], colours[f"h{step}"]) >= 4.5, step


def test_shades_of_the_heat_map_are_in_order():
    for scheme, colours in _palettes().items():
        steps = [_contrast(colours[f"h{step}"], colours["paper"]) for step in range(1, 10)]
        assert steps == sorted(steps), scheme
