"""Comparisons of audits whose predictions are written down."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from scipy.stats import binomtest

from reference import metrics as reference
from reference.audits import made_audit, random_audit
from robustfair import metrics
from robustfair.attacks.named import CROSS_ENTROPY
from robustfair.errors import ConfigError, DataError, UnknownNameError
from robustfair.evaluate.compare import check_comparable, compare, compare_many
from robustfair.evaluate.diagnostics.base import paired_difference
from robustfair.evaluate.diagnostics.results import diagnose
from robustfair.evaluate.result import Audit, shortfall
from robustfair.values import Threat

CW = "cw-50(restarts=5)"


def test_every_number_is_that_of_plain_loops() -> None:
    before, after = random_audit(1, model="old"), random_audit(2, model="new", keeps=0.8)
    found = compare(before, after)
    assert (found.before, found.after, found.data, found.images) == ("old", "new", "toy", 60)
    assert [entry.attack for entry in found.attacks] == ["clean", "pgd-20", CW, "robust"]
    labels = before.labels.tolist()
    for entry in found.attacks:
        old, new = before.hits(entry.attack).tolist(), after.hits(entry.attack).tolist()
        table = reference.paired_table(old, new, labels, 4)
        p = [reference.mcnemar(cells[1][0], cells[0][1]) if sum(map(sum, cells)) else math.nan for cells in table]
        for tested, cells, plain, adjusted in zip(entry.classes, table, p, reference.holm(p), strict=True):
            n = sum(map(sum, cells))
            assert (tested.n, tested.lost, tested.won) == (n, cells[1][0], cells[0][1])
            assert (tested.p, tested.p_adjusted) == pytest.approx((plain, adjusted), nan_ok=True)
            if n:
                assert tested.difference.before == pytest.approx(sum(cells[1]) / n)
                assert tested.difference.after == pytest.approx((cells[0][1] + cells[1][1]) / n)
                interval = reference.paired_interval(cells[1][1], cells[1][0], cells[0][1], cells[0][0], 0.95)
                assert (tested.difference.lower, tested.difference.upper) == pytest.approx(interval)
        lost, won = sum(cells[1][0] for cells in table), sum(cells[0][1] for cells in table)
        assert (entry.average.n, entry.average.lost, entry.average.won) == (60, lost, won)
        assert entry.average.p == entry.average.p_adjusted == pytest.approx(binomtest(lost, lost + won).pvalue)
        difference = entry.average.difference
        assert difference.before == pytest.approx(before.average(entry.attack))
        expected = paired_difference(after.hits(entry.attack), before.hits(entry.attack))
        assert (difference.change, difference.lower, difference.upper) == pytest.approx(expected)


def test_worst_and_range_are_those_of_the_audits_with_a_paired_bootstrap() -> None:
    before, after = random_audit(1), random_audit(2, keeps=0.8)
    for entry in compare(before, after, level=0.9).attacks:
        assert entry.worst_before == before.worst(entry.attack)
        assert entry.worst_after == after.worst(entry.attack)
        ranges = [metrics.accuracy_range(audit.rate(entry.attack)) for audit in (before, after)]
        assert (entry.range.before, entry.range.after) == pytest.approx(ranges)
        table = metrics.paired_table(before.hits(entry.attack), after.hits(entry.attack), before.labels, 4)
        for name, difference in (("worst", entry.worst), ("range", entry.range)):
            interval = metrics.bootstrap_difference(table, name, level=0.9)
            assert difference.change == pytest.approx(interval.estimate)
            assert (difference.lower, difference.upper) == (interval.lower, interval.upper)


def test_a_class_without_images_is_nan_and_not_counted_by_holm() -> None:
    entry = compare(random_audit(1), random_audit(2)).under("robust")
    absent = entry.classes[3]
    assert (absent.n, absent.significant) == (0, False)
    assert all(map(math.isnan, (absent.p, absent.p_adjusted, absent.difference.change, absent.difference.lower)))
    least = min(entry.classes[:3], key=lambda tested: tested.p)
    assert least.p_adjusted == pytest.approx(min(1, 3 * least.p))


def test_a_model_against_itself_has_no_change() -> None:
    audit = random_audit(3)
    for entry in compare(audit, audit).attacks:
        assert [tested.p for tested in entry.classes[:3]] == [1, 1, 1]
        assert not any(tested.significant for tested in (*entry.classes, entry.average))
        for difference in (entry.average.difference, entry.worst, entry.range):
            assert difference.change == 0
            assert difference.lower < 0 < difference.upper
            assert not difference.sure


def test_a_clear_gain_is_significant_and_the_other_classes_are_not() -> None:
    labels = [0] * 100 + [1] * 100
    wrong = [2] * 60 + [0] * 40 + [1] * 100
    before, after = made_audit(labels, {"clean": wrong}), made_audit(labels, {"clean": labels})
    entry = compare(before, after).under("clean")
    assert [tested.significant for tested in entry.classes] == [True, False, False]
    assert entry.average.significant
    assert (entry.worst.before, entry.worst.after) == (0.4, 1.0)
    assert entry.worst.sure
    assert entry.range.upper < 0


def test_robust_is_over_the_attacks_that_both_hold() -> None:
    both = random_audit(1)
    fewer = replace(both, model="fewer", predictions={name: both.predictions[name] for name in ("clean", "pgd-20")})
    found = compare(both, fewer)
    assert [entry.attack for entry in found.attacks] == ["clean", "pgd-20", "robust"]
    assert found.under("robust").average.difference.change == 0
    assert found.notes == ("robust is over the attacks that both audits hold: clean, pgd-20",)
    assert both.average("robust") < fewer.average("robust")


def test_attacks_are_chosen_in_any_spelling() -> None:
    one, two = random_audit(1), random_audit(2)
    found = compare(one, two, attacks=["Robust", "PGD_20"])
    assert [entry.attack for entry in found.attacks] == ["robust", "pgd-20"]
    assert found.under("pgd_20") is found.attacks[1]
    with pytest.raises(UnknownNameError, match="unknown attack of both audits 'pgd-21': did you mean pgd-20"):
        compare(one, two, attacks=["pgd-21"])
    with pytest.raises(UnknownNameError, match="attack of this comparison"):
        found.under("clean")
    with pytest.raises(ConfigError, match="at least one of clean, pgd-20"):
        compare(one, two, attacks=[])
    with pytest.raises(ConfigError, match="level"):
        compare(one, two, level=95)


def test_clean_alone_has_no_robust_beside_it() -> None:
    audit = made_audit([0, 1, 2], {"clean": [0, 1, 1]})
    assert [entry.attack for entry in compare(audit, audit).attacks] == ["clean"]


def other(audit: Audit, what: str) -> Audit:
    changes: dict[str, Any] = {
        "classes": {"class_names": ("a", "b", "c", "d")},
        "images": {"index": audit.index + 1},
        "pixels": {"fingerprint": "beef", "data": "toy-c"},
        "radius": {"threat": Threat(eps=0.5)},
        "norm": {"threat": Threat(norm="l2")},
        "settings": {"settings": {**audit.settings, "pgd-20": {"steps": 20, "step_size": 1 / 255}}},
    }
    if what == "labels":
        labels = audit.labels.roll(1).tolist()
        return made_audit(labels, {"clean": labels}, audit.class_names)
    return replace(audit, model="other", **changes[what])


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("classes", r"over different classes, \(class 0, class 1, class 2 and 1 more\) and \(a, b, c and 1 more\)"),
        ("images", r"not of the same images \(60 and 60\)"),
        ("labels", r"not of the same images \(60 and 60\)"),
        ("pixels", r"not of the same images \(toy and toy-c, with other pixels\)"),
        ("radius", r"under different threats, linf eps 8/255 and linf eps 0\.5"),
        ("norm", r"under different threats, linf eps 8/255 and l2 eps 8/255"),
        ("settings", r"pgd-20 ran with step_size 2/255 on net and 1/255 on other: audit both with the same settings"),
    ],
)
def test_what_cannot_be_compared_is_refused_with_its_difference(what: str, message: str) -> None:
    audit = random_audit(1)
    audit = replace(audit, settings={**audit.settings, "pgd-20": {"steps": 20, "step_size": 2 / 255}})
    with pytest.raises(DataError, match=message) as caught:
        compare(audit, other(audit, what))
    assert "\n" not in str(caught.value)
    if what != "settings":
        with pytest.raises(DataError):
            check_comparable(audit, other(audit, what))


@pytest.mark.parametrize("given", ["a.json", Path("a.json"), None, {}], ids=str)
def test_something_else_than_an_audit_is_refused_with_the_next_step(given: Any) -> None:
    audit = random_audit(1)
    for pair, which in (((given, audit), "before"), ((audit, given), "after")):
        with pytest.raises(
            ConfigError, match=rf"compare: {which} must be an Audit, got .*robustfair\.load_audit\(path\)"
        ):
            compare(*pair)
    with pytest.raises(ConfigError, match=r"load_audit\(path\)"):
        compare_many([given, audit])


def test_settings_of_an_attack_that_is_not_compared_may_differ() -> None:
    audit = random_audit(1)
    changed = replace(audit, settings={**audit.settings, CW: {"steps": 7}})
    assert compare(audit, changed, attacks=["pgd-20"]).attacks[0].attack == "pgd-20"
    with pytest.raises(DataError, match="cw-50"):
        compare(audit, changed, attacks=["robust"])


def cut(audit: Audit, **ran: float) -> Audit:
    ran = {name.replace("_", "-"): share for name, share in ran.items()}
    return replace(audit, settings={**audit.settings, CW: {**audit.settings[CW], "ran": ran, "not_finite": 2}})


def test_what_a_time_budget_cut_is_noted() -> None:
    audit, short = random_audit(1), cut(random_audit(2, model="short"), apgd_ce=1.0, apgd_t=0.4, square=0.0)
    assert audit.unfinished(CW) == short.unfinished("pgd-20") == short.unfinished("clean") == {}
    parts = {f"apgd-t of {CW}": 0.4, f"square of {CW}": 0.0}
    assert short.unfinished(CW) == short.unfinished("robust") == short.unfinished() == parts
    assert audit.complete
    assert not short.complete
    words = f"the time budget left apgd-t of {CW} at 40 %, square of {CW} at 0 %"
    assert shortfall(parts) == words
    assert compare(audit, short).notes == (f"short: {words}; its accuracy there is an upper bound",)
    assert compare(audit, short, attacks=["clean"]).notes == ()
    missing = replace(audit, provenance={"not_run": ["fab-t"]})
    assert missing.unfinished() == missing.unfinished("fab-t") == {"fab-t": 0.0}
    assert missing.unfinished("pgd-20") == {}
    assert not missing.complete


def test_many_are_compared_with_the_first() -> None:
    audits = [random_audit(seed, model=f"net {seed}") for seed in range(3)]
    found = compare_many(audits, attacks=["pgd-20"])
    assert [(one.before, one.after) for one in found] == [("net 0", "net 1"), ("net 0", "net 2")]
    assert found[1].to_dict() == compare(audits[0], audits[2], attacks=["pgd-20"]).to_dict()
    with pytest.raises(ConfigError, match="at least two, got 1"):
        compare_many(audits[:1])


def test_json_holds_every_number_and_no_nan() -> None:
    found = compare(random_audit(1), random_audit(2))
    about = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert about["schema"] == "robustfair.compare/1"
    assert list(about["attacks"]) == ["clean", "pgd-20", CW, "robust"]
    entry, stored = found.under("robust"), about["attacks"]["robust"]
    assert stored["classes"][0]["p_adjusted"] == entry.classes[0].p_adjusted
    assert stored["classes"][3]["change"] is None
    assert stored["average"]["interval"] == [entry.average.difference.lower, entry.average.difference.upper]
    assert stored["worst"]["class_after"] == entry.worst_after.class_name
    assert stored["range"]["change"] == pytest.approx(entry.range.after - entry.range.before)


def test_the_order_of_images_does_not_matter() -> None:
    before, after = random_audit(1), random_audit(2)
    order = torch.randperm(60, generator=torch.Generator().manual_seed(0))

    def shuffled(audit: Audit) -> Audit:
        columns = {name: column[order] for name, column in audit.predictions.items()}
        return replace(audit, index=audit.index[order], labels=audit.labels[order], predictions=columns)

    assert compare(shuffled(before), shuffled(after)).to_dict() == compare(before, after).to_dict()


def test_a_tie_for_the_worst_is_said_in_json() -> None:
    labels = [c for c in range(3) for _ in range(2)]
    before, after = made_audit(labels, {"clean": [0, 1, 1, 0, 2, 2]}), made_audit(labels, {"clean": labels})
    about = compare(before, after).to_dict()["attacks"]["clean"]["worst"]
    assert (about["class_before"], about["class_after"]) == ("cat and 1 other", "all classes")
    assert (about["classes_before"], about["classes_after"]) == (["cat", "dog"], [])
    stored = before.to_dict()["attacks"]["clean"]["worst"]
    assert (stored["class_name"], stored["indices"], stored["others"]) == ("cat", [0, 1], "and 1 other")


def of_a_sample(seed: int, keeps: float) -> Audit:
    sizes = {"drawn_from": (400, 100, 20, 0), "provenance": {"sample": "60 of 520 images, by hand"}}
    return random_audit(seed, keeps=keeps, **sizes)


def test_the_average_of_a_sample_weighs_classes_by_their_share_of_the_data() -> None:
    before, after = of_a_sample(1, 0.3), of_a_sample(2, 0.7)
    found = compare(before, after)
    entry = found.under("pgd-20")
    tested = entry.average.difference
    assert (tested.before, tested.after) == (before.average("pgd-20"), after.average("pgd-20"))
    weights = [400 / 520, 100 / 520, 20 / 520]
    change = sum(w * each.difference.change for w, each in zip(weights, entry.classes, strict=False))
    assert tested.change == pytest.approx(change)
    assert tested.lower < change < tested.upper
    plain = compare(replace(before, drawn_from=None), replace(after, drawn_from=None)).under("pgd-20").average
    assert (entry.average.lost, entry.average.won, entry.average.p) == (plain.lost, plain.won, plain.p)
    assert plain.difference.before != tested.before
    assert "of a sample: 60 of 520 images, by hand" in found.notes
    assert "the average weighs every class by its share of all images; its test does not" in found.notes


def test_samples_of_other_data_are_not_of_the_same_images() -> None:
    before, after = of_a_sample(1, 0.3), replace(of_a_sample(2, 0.7), drawn_from=(100, 100, 20, 0))
    with pytest.raises(DataError, match="are not of the same images"):
        compare(before, after)


def test_flattery_is_measured_in_the_shares_of_the_data() -> None:
    labels = [label for label in range(3) for _ in range(200)]

    def column(*right: int) -> list[int]:
        return [label if place % 200 < right[label] else (label + 1) % 3 for place, label in enumerate(labels)]

    columns = {"clean": column(200, 200, 200), "pgd-20": column(150, 150, 150), "cw-20": column(150, 150, 50)}
    about = {"pgd-20": {"goal": CROSS_ENTROPY, "steps": 20}, "cw-20": {"goal": "margin", "steps": 20}}
    audit = made_audit(labels, columns, settings=about)
    (plain,) = (each for each in diagnose(audit) if each.code == "flattered-attack")
    assert "pgd-20 reports 75.0 %, cw-20 58.3 %: 16.7 points" in plain.text
    (weighed,) = (
        each for each in diagnose(replace(audit, drawn_from=(200, 200, 4000))) if each.code == "flattered-attack"
    )
    assert "pgd-20 reports 75.0 %, cw-20 29.5 %: 45.5 points" in weighed.text
