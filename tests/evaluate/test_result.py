"""The result of an audit, on predictions that are made by hand, and on disk."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from reference.audits import made_audit, random_audit
from robustfair import metrics
from robustfair.errors import CheckpointError, DataError, UnknownNameError
from robustfair.evaluate.compare import compare
from robustfair.evaluate.gates import check, parse_gate
from robustfair.evaluate.result import Audit, load_audit
from robustfair.report.forms import audit_lines
from robustfair.values import Threat


def by_hand() -> Audit:
    """Three classes, the last without images; eight images."""
    column = lambda *values: torch.tensor(values)  # noqa: E731
    return Audit(
        model="by hand",
        data="eight images",
        class_names=("a", "b", "none"),
        index=torch.arange(8),
        labels=column(0, 0, 0, 0, 1, 1, 1, 1),
        predictions={
            "clean": column(0, 0, 0, 1, 1, 1, 1, 1),
            "pgd-20": column(0, 2, 0, 1, 1, 0, 1, 1),
            "cw-20(step_size=2/255)": column(0, 0, 1, 1, 1, 2, 0, 1),
        },
        settings={"clean": {}, "pgd-20": {"steps": 20}, "cw-20(step_size=2/255)": {"steps": 20}},
        threat=Threat(),
        fingerprint="f",
        split="test",
        head_norms=[1.0, 2.0, 3.0],
        groups=(0, 0, 1),
        provenance={"seed": 0},
    )


def test_rates_and_counts_by_hand() -> None:
    found = by_hand()
    assert found.count().tolist() == [4, 4, 0]
    assert found.confusion("pgd-20").tolist() == [[2, 1, 0], [1, 3, 0], [1, 0, 0]]
    assert found.correct("pgd-20").tolist() == [2, 3, 0]
    assert found.rate("pgd-20").tolist() == pytest.approx([0.5, 0.75, math.nan], nan_ok=True)
    assert found.average("pgd-20") == 5 / 8
    assert found.worst("pgd-20")[:3] == (0, "a", 0.5)
    assert found.average_interval("pgd-20") == pytest.approx(tuple(map(float, metrics.wilson(5, 8))))
    lower, upper = found.interval("pgd-20", level=0.9)
    assert (float(lower[1]), float(upper[1])) == pytest.approx(tuple(map(float, metrics.wilson(3, 4, 0.9))))
    assert math.isnan(lower[2])
    low, high = found.worst_interval("pgd-20")
    assert 0 <= low <= 0.5 <= high <= 1


def test_robust_is_the_first_wrong_prediction_of_any_attack() -> None:
    found = by_hand()
    expected = []
    for row, label in enumerate(found.labels.tolist()):
        wrong = [int(column[row]) for column in found.predictions.values() if int(column[row]) != label]
        expected.append(wrong[0] if wrong else label)
    assert found.prediction("robust").tolist() == expected == [0, 2, 1, 1, 1, 0, 0, 1]
    assert found.attacks == ("clean", "pgd-20", "cw-20(step_size=2/255)")
    assert all(bool((found.hits("robust") <= found.hits(attack)).all()) for attack in found.attacks)


def test_summary_by_hand() -> None:
    found = by_hand().summary("pgd-20")
    assert (found["average"], found["worst"], found["worst_class"], found["range"]) == (0.625, 0.5, 0, 0.25)
    assert found["nsd"] == pytest.approx(0.125 / 0.625)
    assert found["cfps"] == pytest.approx([1 / 3, 1 / 3, 1 / 3])
    assert found["cfns"] == pytest.approx([2 / 3, 1 / 3, 0])
    assert found["one_vs_rest_accuracy"] == pytest.approx([5 / 8, 6 / 8, 7 / 8])
    assert found["natural_error"] == pytest.approx([0.25, 0, math.nan], nan_ok=True)
    assert found["boundary_error"] == pytest.approx([0.25, 0.25, math.nan], nan_ok=True)
    assert found["head_norm_ratio"] == 3
    assert found["head_norm_correlation"] == pytest.approx(1)
    without = replace(by_hand(), head_norms=None)
    assert math.isnan(without.head_norm_ratio)
    assert math.isnan(without.summary("clean")["head_norm_correlation"])


def test_attacks_are_found_in_any_spelling() -> None:
    found = by_hand()
    assert found.average("PGD_20") == found.average("pgd-20")
    with pytest.raises(UnknownNameError, match="did you mean pgd-20"):
        found.average("pgd-10")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": torch.tensor([], dtype=torch.int64)}, "no images"),
        ({"labels": torch.full((8,), 3)}, "class outside 0 to 2"),
        ({"index": torch.arange(7)}, "index must be int64"),
        ({"predictions": {}}, "must be those on clean images"),
        ({"predictions": {"pgd-20": torch.zeros(8, dtype=torch.int64)}}, "must be those on clean images"),
        ({"predictions": {"clean": torch.zeros(8)}}, "clean must be int64"),
        ({"predictions": {"clean": torch.ones(8).long(), "pgd-20": torch.zeros(8).long()}}, "wrong when clean"),
    ],
)
def test_predictions_that_do_not_fit_are_refused(change: dict, message: str) -> None:
    with pytest.raises(DataError, match=message):
        replace(by_hand(), **change)


def strong() -> Audit:
    """`by_hand` with a strong attack of two members: images 1 and 2 fell to the first, image 5 to the second."""
    found = by_hand()
    members = {"apgd-ce(steps=5)": 1.0, "square(p_init=0.5)": 1.0}
    return replace(
        found,
        predictions={**found.predictions, "autoattack(version=plus)": torch.tensor([0, 2, 1, 1, 1, 0, 1, 1])},
        settings={**found.settings, "autoattack(version=plus)": {"ran": members}},
        broken_by={"autoattack(version=plus)": torch.tensor([-1, 0, 0, -1, -1, 1, -1, -1])},
        points={"autoattack(version=plus)": {2: torch.rand(1, 2, 2), 5: torch.rand(1, 2, 2), 1: torch.rand(1, 2, 2)}},
    )


@pytest.mark.parametrize(
    "name", ["autoattack(version=plus)", "AutoAttack( Version = plus )", "auto_attack(version=plus)"]
)
def test_who_broke_what_is_found_in_any_spelling(name: str) -> None:
    found = strong()
    fell = found.fell_to(name)
    assert {member: count.tolist() for member, count in fell.items()} == {
        "apgd-ce(steps=5)": [2, 0, 0],
        "square(p_init=0.5)": [0, 1, 0],
    }
    assert found.average(name) == 4 / 8


def test_an_attack_without_members_broke_by_none_and_an_unknown_one_is_refused() -> None:
    found = strong()
    assert found.fell_to("PGD-20") == found.fell_to("clean") == found.fell_to("robust") == {}
    with pytest.raises(UnknownNameError, match="attack of this audit 'pgd-21': did you mean pgd-20"):
        found.fell_to("pgd-21")


# On disk


def test_points_are_read_back(tmp_path: Path) -> None:
    first = strong()
    second = load_audit(first.save(tmp_path, "audit")[0])
    (points,) = second.points.values()
    assert list(points) == [2, 5, 1]
    assert all(torch.equal(points[row], point) for row, point in first.points["autoattack(version=plus)"].items())
    none = replace(first, points={"autoattack(version=plus)": {}})
    assert load_audit(none.save(tmp_path, "none")[0]).points == none.points
    assert second.save(tmp_path, "again")[2].read_bytes() == (tmp_path / "audit.points.safetensors").read_bytes()
    assert compare(second, first).under("robust").average.difference.change == 0


@pytest.mark.parametrize("damage", ["cut", "empty", "lengths", "names"])
def test_damaged_points_are_one_clear_error(tmp_path: Path, damage: str) -> None:
    path = strong().save(tmp_path, "audit")[2]
    content, tensors = path.read_bytes(), load_file(path)
    if damage in ("cut", "empty"):
        path.write_bytes(content[: len(content) // 2] if damage == "cut" else b"")
    elif damage == "lengths":
        save_file({name: value[:2] if name.endswith("/image") else value for name, value in tensors.items()}, path)
    else:
        save_file({"weight": torch.zeros(3)}, path)
    with pytest.raises(CheckpointError, match=r"audit\.points\.safetensors") as caught:
        load_audit(tmp_path / "audit")
    assert "\n" not in str(caught.value)
    path.unlink()
    assert load_audit(tmp_path / "audit").points == {}


def test_round_trip(tmp_path: Path) -> None:
    first = by_hand()
    json_path, npz_path = first.save(tmp_path / "audit", "clean,pgd-20,cw-20(step_size=2/255)")
    assert sorted(path.name for path in (tmp_path / "audit").iterdir()) == [json_path.name, npz_path.name]
    for path in (json_path, npz_path, str(json_path).removesuffix(".json")):
        second = load_audit(path)
        assert second.attacks == first.attacks
        assert all(torch.equal(first.prediction(name), second.prediction(name)) for name in (*first.attacks, "robust"))
        assert torch.equal(first.labels, second.labels)
        assert torch.equal(first.index, second.index)
        for name in (
            "model",
            "data",
            "class_names",
            "settings",
            "threat",
            "fingerprint",
            "split",
            "head_norms",
            "groups",
        ):
            assert getattr(second, name) == getattr(first, name)
        assert second.provenance == first.provenance
        assert second.to_dict() == first.to_dict()


def test_the_json_is_strict_and_holds_counts(tmp_path: Path) -> None:
    json_path, _ = by_hand().save(tmp_path, "audit")

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    about = json.loads(json_path.read_text(), parse_constant=refuse)
    assert about["schema"] == "robustfair.audit/2"
    assert list(about["attacks"]) == ["clean", "pgd-20", "cw-20(step_size=2/255)"]
    entry = about["attacks"]["pgd-20"]
    assert entry["confusion"] == {"predicted": [0, 0, 1, 1, 2], "true": [0, 1, 0, 1, 0], "count": [2, 1, 1, 3, 1]}
    assert (entry["correct"], entry["count"]) == ([2, 3, 0], [4, 4, 0])
    assert entry["wilson"]["lower"][2] is None
    assert entry["summary"]["natural_error"] == [0.25, 0.0, None]
    assert about["robust"]["correct"] == [1, 2, 0]


def test_an_audit_with_whole_confusion_matrices_reads_as_ever(tmp_path: Path) -> None:
    first = by_hand()
    json_path, _ = first.save(tmp_path, "audit")
    about = json.loads(json_path.read_text())
    about["schema"] = "robustfair.audit/1"
    for name, entry in {**about["attacks"], "robust": about["robust"]}.items():
        del entry["confusion"]
        entry["confusion_pred_true"] = first.confusion(name).tolist()
    json_path.write_text(json.dumps(about))
    assert load_audit(json_path).to_dict() == first.to_dict()
    about["attacks"]["clean"]["confusion_pred_true"][0][1] += 1
    json_path.write_text(json.dumps(about))
    with pytest.raises(CheckpointError, match="disagree on clean"):
        load_audit(json_path)


def test_a_thousand_classes_are_not_many_bytes(tmp_path: Path) -> None:
    first = random_audit(1, classes=1001, images=2000)
    json_path, npz_path = first.save(tmp_path, "audit")
    assert json_path.stat().st_size < 2_000_000
    assert npz_path.stat().st_size < 100_000
    again = load_audit(json_path)
    assert torch.equal(again.confusion("robust"), first.confusion("robust"))


def test_a_tilde_is_the_home_folder_from_python_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home, here = tmp_path / "home", tmp_path / "here"
    here.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("USERPROFILE", str(home))
    monkeypatch.chdir(here)
    first = by_hand()
    assert first.save("~/audits", "a")[0] == home / "audits" / "a.json"
    assert load_audit("~/audits/a").to_dict() == first.to_dict()
    assert first.to_html(Path("~/page.html")) == home / "page.html"
    assert list(here.iterdir()) == []


def test_the_arrays_need_no_pickle(tmp_path: Path) -> None:
    _, npz_path = by_hand().save(tmp_path, "audit")
    with np.load(npz_path, allow_pickle=False) as stored:
        assert set(stored.files) == {"index", "labels", *by_hand().attacks}
        assert stored["cw-20(step_size=2/255)"].tolist() == [0, 0, 1, 1, 1, 2, 0, 1]


@pytest.mark.parametrize("suffix", [".json", ".npz"])
@pytest.mark.parametrize("share", [0, 0.5, 0.95])
def test_a_cut_file_is_one_clear_error(tmp_path: Path, suffix: str, share: float) -> None:
    by_hand().save(tmp_path, "audit")
    path = tmp_path / f"audit{suffix}"
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(CheckpointError, match=f"audit{suffix}") as caught:
        load_audit(tmp_path / "audit")
    assert "\n" not in str(caught.value)


def test_foreign_files_are_refused(tmp_path: Path) -> None:
    json_path, npz_path = by_hand().save(tmp_path, "audit")
    about = json.loads(json_path.read_text())

    def refused(match: str, **change: object) -> None:
        json_path.write_text(json.dumps({**about, **change}))
        with pytest.raises(CheckpointError, match=match) as caught:
            load_audit(json_path)
        assert "\n" not in str(caught.value)

    refused("schema 'robustfair.audit/9'", schema="robustfair.audit/9")
    refused("lacks 'fgsm'", attacks={**about["attacks"], "fgsm": about["attacks"]["clean"]})
    refused("does not describe an audit", threat={"eps": 1, "norms": "linf"})
    refused("does not describe an audit", attacks=["clean"])
    refused("does not describe an audit", data=None)
    refused("does not describe an audit", class_names=["a"])
    refused("disagree on pgd-20", attacks={**about["attacks"], "pgd-20": about["attacks"]["clean"] | {"settings": {}}})
    del about["threat"]
    refused("lacks 'threat'")
    npz_path.write_bytes(json_path.read_bytes())
    json_path.write_text(json.dumps(about))
    with pytest.raises(CheckpointError, match=r"audit\.npz"):
        load_audit(json_path)


def test_files_of_two_audits_are_not_one(tmp_path: Path) -> None:
    first = by_hand()
    other = replace(first, predictions={**first.predictions, "pgd-20": first.predictions["clean"]})
    first.save(tmp_path, "first")
    other.save(tmp_path, "other")
    (tmp_path / "other.npz").replace(tmp_path / "first.npz")
    with pytest.raises(CheckpointError, match="disagree on pgd-20"):
        load_audit(tmp_path / "first.json")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"none\.json does not exist"):
        load_audit(tmp_path / "none")
    by_hand().save(tmp_path, "audit")
    (tmp_path / "audit.npz").unlink()
    with pytest.raises(CheckpointError, match=r"audit\.npz does not exist"):
        load_audit(tmp_path / "audit.json")


def test_saving_again_replaces(tmp_path: Path) -> None:
    by_hand().save(tmp_path, "audit")
    replace(by_hand(), model="second").save(tmp_path, "audit")
    assert load_audit(tmp_path / "audit").model == "second"
    assert len(list(tmp_path.iterdir())) == 2


def test_to_html_writes_the_report(tmp_path: Path) -> None:
    path = by_hand().to_html(tmp_path / "report.html", title="Eight images by hand")
    assert path == tmp_path / "report.html"
    assert "Eight images by hand" in path.read_text(encoding="utf-8")


# Samples


def sampled() -> Audit:
    """Ten images of each of three classes, drawn from 100, 10 and 890: clean 10, 9, 8 and robust 8, 4, 2 are right."""
    labels = [label for label in range(3) for _ in range(10)]

    def column(*right: int) -> list[int]:
        return [label if place % 10 < right[label] else (label + 1) % 3 for place, label in enumerate(labels)]

    columns = {"clean": column(10, 9, 8), "pgd-20": column(8, 4, 2)}
    return made_audit(labels, columns, drawn_from=(100, 10, 890), provenance={"sample": "30 of 1,000 images, by hand"})


def test_the_average_of_a_sample_weighs_classes_by_their_share_of_the_data() -> None:
    audit = sampled()
    assert audit.reweighted
    assert audit.shares.tolist() == [0.1, 0.01, 0.89]
    assert audit.average("clean") == pytest.approx(0.1 * 1 + 0.01 * 0.9 + 0.89 * 0.8)
    assert audit.average("pgd-20") == audit.summary("pgd-20")["average"] == pytest.approx(0.08 + 0.004 + 0.178)
    lower, upper = audit.average_interval("pgd-20")
    assert (lower, upper) == metrics.stratified_wilson(
        torch.tensor([8, 4, 2]), torch.tensor([10] * 3), torch.tensor([100, 10, 890])
    )
    assert lower < 0.262 < upper
    assert audit.average_interval("pgd-20", level=0.99)[0] < lower


def test_metrics_that_mix_classes_are_those_of_a_set_with_the_shares_of_the_data() -> None:
    whole = [label for label, n in enumerate((100, 10, 890)) for _ in range(n)]
    right = {"clean": (100, 9, 712), "pgd-20": (80, 4, 178)}
    columns = {}
    for name, correct in right.items():
        left = list(correct)
        columns[name] = []
        for label in whole:
            left[label] -= 1
            columns[name].append(label if left[label] >= 0 else (label + 1) % 3)
    expected, found = made_audit(whole, columns).summary("pgd-20"), sampled().summary("pgd-20")
    for key, value in expected.items():
        assert found[key] == pytest.approx(value, nan_ok=True), key


def test_a_sample_with_the_shares_of_the_data_has_the_usual_numbers() -> None:
    audit = replace(sampled(), drawn_from=(70, 70, 70))
    plain = replace(audit, drawn_from=None)
    assert not audit.reweighted
    assert audit.average_interval("pgd-20") == plain.average_interval("pgd-20")
    assert audit.to_dict()["attacks"] == plain.to_dict()["attacks"]


def test_the_average_is_not_known_where_a_class_of_the_data_has_no_image_in_the_sample() -> None:
    audit = sampled()
    audit = replace(audit, class_names=("cat", "dog", "car", "jet"), drawn_from=(100, 10, 890, 5))
    assert math.isnan(audit.average("clean"))
    assert all(math.isnan(end) for end in audit.average_interval("clean"))
    (gate,) = check([parse_gate("average.pgd-20=0")], audit)
    assert (gate.status, gate.line) == ("undecided", "undecided: average.pgd-20 has no images")
    assert replace(audit, drawn_from=(100, 10, 890, 0)).average("clean") == pytest.approx(sampled().average("clean"))


def test_a_sample_is_stored_as_one(tmp_path: Path) -> None:
    audit = sampled()
    audit = replace(audit, index=torch.arange(30) * 7)
    json_path, *_ = audit.save(tmp_path, "sample")
    assert json.loads(json_path.read_text())["data"]["drawn_from"] == [100, 10, 890]
    read = load_audit(json_path)
    assert read.to_dict() == audit.to_dict()
    assert torch.equal(read.index, audit.index)
    assert "drawn_from" not in by_hand().to_dict()["data"]


def test_reports_say_that_it_is_a_sample() -> None:
    lines = audit_lines(sampled())
    assert "30 of 1,000 images, by hand" in lines
    assert "average: every class weighs by its share of the 1,000 images" in lines
    assert not any("weighs" in line for line in audit_lines(by_hand()))


def test_the_folder_of_a_run_is_no_audit_and_where_its_audits_lie_is_said(tmp_path: Path) -> None:
    (tmp_path / "runs").mkdir()
    with pytest.raises(CheckpointError, match=r"runs is a folder: name the \.json of an audit; a run keeps .*/audit$"):
        load_audit(tmp_path / "runs")
