"""Table, lines, heat maps and page of a corruption audit."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch

from robustfair.data.corruptions.names import CORRUPTIONS, STANDARD
from robustfair.errors import ConfigError
from robustfair.evaluate.corruptions import CorruptionAudit
from robustfair.report.corruptions import (
    corruption_map,
    corruption_table,
    render_corruption_report,
    shown_sets,
    summary_lines,
    write_corruption_report,
)
from robustfair.report.figures import rate_map
from robustfair.report.layout import render


@pytest.fixture
def make() -> Callable[..., CorruptionAudit]:
    """A factory: ten images each of classes a and b, none of c. Of a, `severity` more are lost than of b."""

    def build(names: tuple[str, ...] = CORRUPTIONS, severities: tuple[int, ...] = (1, 2, 5), **fields: Any):
        labels = torch.arange(2).repeat_interleave(10)

        def column(lost_a: int, lost_b: int) -> torch.Tensor:
            rank = torch.arange(20) % 10
            return torch.where(rank < torch.tensor([lost_a, lost_b])[labels], 2, labels)

        defaults: dict[str, Any] = {
            "model": "net",
            "data": "toy",
            "class_names": ("a", "b", "c"),
            "index": torch.arange(20),
            "labels": labels,
            "severities": severities,
            "clean": column(1, 0),
            "predictions": {
                name: torch.stack([column(min(9, i % 4 + s), i % 4) for s in severities])
                for i, name in enumerate(names)
            },
            "split": "test",
            "provenance": {"seed": 0, "source": {"frost": "synthetic ice crystals"}},
        }
        return CorruptionAudit(**{**defaults, **fields})

    return build


def cells(drawing: str) -> list[tuple[str, str, str]]:
    """(shade, number, tooltip) of every cell of a heat map, in reading order."""
    tree = ElementTree.fromstring(drawing)
    groups = [group for group in tree.iter("g") if re.fullmatch(r"h\d", group.get("class") or "")]
    return [(g.get("class") or "", g.findtext("text") or "", g.findtext("title") or "") for g in groups]


def test_table(make: Callable[..., CorruptionAudit]) -> None:
    audit = make(("fog", "snow"))
    lines = render(corruption_table(audit)).splitlines()
    assert lines[0] == "net on toy, common corruptions, percent right"
    assert re.sub(r" +", " ", lines[2]).strip() == "corruption s1 s2 s5 average worst worst is"
    fog = re.sub(r" +", " ", next(line for line in lines if line.startswith(" fog"))).strip()
    assert fog.startswith("fog 95.0/90.0 90.0/80.0 75.0/50.0 86.7 [")
    assert fog.endswith("] a")
    snow = re.sub(r" +", " ", next(line for line in lines if line.startswith(" snow"))).strip()
    assert snow.startswith("snow 85.0/80.0 80.0/70.0 65.0/40.0 *76.7 [")
    assert " *63.3 [" in snow
    assert any(line.startswith(" mean of all 2") for line in lines)
    assert [line.split()[0] for line in lines if "*" in line] == ["snow", "By"]


def test_summary_lines(make: Callable[..., CorruptionAudit]) -> None:
    audit = make()
    lines = summary_lines(audit)
    assert [line.split("  ")[0] for line in lines] == [
        "clean",
        "mean of standard 15",
        "mean of FAIR-TAT's 18",
        "mean of all 19",
        "defocus blur and 3 others",
    ]
    assert lines[0].split("  ")[-1].startswith("worst class 90.0 [")
    assert all(line.endswith(", a") for line in lines)
    assert len({line.index("worst class") for line in lines}) == 1


def test_sets_that_say_the_same_are_shown_once(make: Callable[..., CorruptionAudit]) -> None:
    assert shown_sets(make()) == ("standard", "fair_tat", "all")
    assert shown_sets(make(STANDARD)) == ("standard",)
    assert shown_sets(make(("fog", "snow"))) == ("all",)
    assert shown_sets(make(("fog",))) == ()


def test_map_has_a_cell_for_every_corruption_and_severity(make: Callable[..., CorruptionAudit]) -> None:
    audit = make(("fog", "snow"))
    average, worst = (cells(corruption_map(audit, measure)) for measure in ("average", "worst"))
    assert [number for _, number, _ in average] == [
        *("95.0", "90.0", "75.0", "86.7"),
        *("85.0", "80.0", "65.0", "76.7"),
        *("90.0", "85.0", "70.0", "81.7"),
    ]
    assert [number for _, number, _ in worst][:4] == ["90.0", "80.0", "50.0", "73.3"]
    assert worst[2][2].startswith("fog, severity 5: a 50.0 % [")
    assert average[7][2].startswith("snow, mean over severities: 76.7 % [")
    # One scale for both: from 95 % (clean too) to the 40 % of the worst class under snow.
    assert (average[0][0], worst[6]) == ("h0", ("h9", "40.0", worst[6][2]))
    assert average[2][0] == f"h{math.ceil((95 - 75) / (95 - 40) * 9)}"


def test_map_of_one_severity_has_no_column_of_means(make: Callable[..., CorruptionAudit]) -> None:
    drawing = corruption_map(make(("fog", "snow"), (3,)), "average")
    assert len(cells(drawing)) == 3
    assert "mean over" not in drawing


def test_rate_map_leaves_out_what_is_not_known_and_escapes_names() -> None:
    drawing = rate_map(
        [[1.0, math.nan], [0.0, 0.5]],
        ["<b>", "row"],
        ["x", "&"],
        scale=(1.0, 0.0),
        tips=[["one", "two"], ["three", '"four"']],
        label="rates",
    )
    assert [(shade, number) for shade, number, _ in cells(drawing)] == [("h0", "100.0"), ("h9", "0.0"), ("h5", "50.0")]
    titles = [title.text for title in ElementTree.fromstring(drawing).iter("title")]
    assert titles == ["<b>", "row", "one", "three", '"four"']


def test_page_is_whole_and_offline(make: Callable[..., CorruptionAudit], tmp_path: Path) -> None:
    audit = make(class_names=("<script>alert(1)</script>", "b & b", "c"), model="net & <co>")
    path = write_corruption_report(tmp_path / "deep" / "report.html", audit)
    page = path.read_text(encoding="utf-8")
    assert page == render_corruption_report(audit)
    assert not re.search(r"https?://|<script|<img|<link|@import|url\(", page)
    assert "default-src 'none'" in page
    assert "<title>Common corruptions: net &amp; &lt;co&gt;</title>" in page
    assert page.count('class="heat"') == 2
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page
    assert "synthetic ice crystals" in page
    assert all(name.replace("_", " ") in page for name in CORRUPTIONS)
    means = page.partition('id="h-means"')[2]
    for row in (row for row in corruption_table(audit, by_severity=False).rows if row[1].mark):
        assert f'<b class="mark">{row[1].text}</b> <span class="span">{row[1].interval}</span>' in means
    assert means.count(">lowest </span>") == 4 + 4, "four corruptions tie in the average, and for the worst class"
    body = page[page.index("<main>") : page.index("</main>") + len("</main>")]
    ElementTree.fromstring(body.replace("<wbr>", ""))
    assert not re.search(r"\bnan\b|\{[a-z]+\}", body)


def test_page_may_have_a_title_and_is_no_folder(make: Callable[..., CorruptionAudit], tmp_path: Path) -> None:
    assert "<h1>Mine</h1>" in render_corruption_report(make(("fog",)), title="Mine")
    with pytest.raises(ConfigError, match="report: path must be a file name"):
        write_corruption_report(tmp_path, make(("fog",)))
