"""Diagnostics of audits whose predictions are constructed, so that every case is known."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from robustfair.data import ImageDataset
from robustfair.errors import DataError
from robustfair.evaluate.diagnostics.results import diagnose, diagnose_change
from robustfair.evaluate.result import Audit
from robustfair.evaluate.run import audit
from robustfair.values import Threat

SETTINGS = {
    "clean": {},
    "fgsm": {"goal": "cross-entropy", "steps": 1},
    "pgd-20": {"goal": "cross-entropy", "steps": 20},
    "pgd-50": {"goal": "cross-entropy", "steps": 50},
    "cw-50(restarts=5)": {"goal": "margin", "steps": 50},
}
CW = "cw-50(restarts=5)"


def made(
    hits: dict[str, list[int]], *, per_class: int = 500, classes: int = 2, head_norms: list[float] | None = None
) -> Audit:
    """An audit with `hits[attack][c]` images right in class c: the first ones, so that attacks break nested sets."""
    labels = torch.arange(classes).repeat_interleave(per_class)
    rank = torch.arange(per_class).repeat(classes)

    def column(right: list[int]) -> Tensor:
        return torch.where(rank < torch.tensor(right)[labels], labels, (labels + 1) % classes)

    return Audit(
        model="made",
        data="made",
        class_names=tuple(f"class {c}" for c in range(classes)),
        index=torch.arange(len(labels)),
        labels=labels,
        predictions={attack: column(right) for attack, right in hits.items()},
        settings={attack: SETTINGS[attack] for attack in hits},
        threat=Threat(),
        head_norms=head_norms,
    )


def codes(audit: Audit) -> list[tuple[str, str]]:
    return [(diagnostic.code, diagnostic.severity) for diagnostic in diagnose(audit)]


def test_an_audit_without_fault_has_no_findings() -> None:
    assert diagnose(made({"clean": [450, 450], "pgd-20": [250, 250], CW: [248, 248]})) == ()


def test_a_flattered_figure_is_a_warning_with_its_numbers() -> None:
    audit = made({"clean": [450, 450], "pgd-20": [260, 261], CW: [220, 220]})
    (diagnostic,) = diagnose(audit)
    assert (diagnostic.code, diagnostic.severity) == ("flattered-attack", "warn")
    assert "pgd-20 reports 52.1 %, cw-50(restarts=5) 44.0 %: 8.1 points" in diagnostic.text
    assert "flat" not in diagnostic.text
    assert CW in diagnostic.advice


def test_the_reason_is_given_only_where_head_norms_are_equal() -> None:
    hits = {"clean": [450, 450], "pgd-20": [260, 261], CW: [220, 220]}
    assert "flat logits flatter PGD" in diagnose(made(hits, head_norms=[1.0, 1.0]))[0].text
    assert "flat logits" not in diagnose(made(hits, head_norms=[1.0, 1.2]))[0].text


def test_a_few_points_are_a_note() -> None:
    assert codes(made({"clean": [450, 450], "pgd-20": [260, 260], CW: [245, 245]})) == [("flattered-attack", "note")]


def test_a_difference_that_chance_explains_is_no_finding() -> None:
    assert codes(made({"clean": [45, 45], "pgd-20": [26, 26], CW: [25, 25]}, per_class=50)) == []


def test_another_attack_on_cross_entropy_flatters_without_that_reason() -> None:
    audit = made({"clean": [450, 450], "pgd-20": [300, 300], "pgd-50": [200, 200]}, head_norms=[1.0, 1.0])
    flattered = next(diagnostic for diagnostic in diagnose(audit) if diagnostic.code == "flattered-attack")
    assert "pgd-50 40.0 %" in flattered.text
    assert "flat logits" not in flattered.text


def test_one_step_is_never_called_flattered() -> None:
    assert codes(made({"clean": [450, 450], "fgsm": [400, 400], CW: [200, 200]})) == []


def test_pgd_that_is_weaker_than_one_step_is_found() -> None:
    found = diagnose(made({"clean": [450, 450], "pgd-20": [400, 400], "fgsm": [200, 200]}))
    assert [diagnostic.code for diagnostic in found] == ["flattered-attack", "weak-attacks"]
    assert "fgsm 40.0 %" in found[0].text


@pytest.mark.parametrize(
    ("classes", "right", "found"), [(2, 500, True), (2, 540, True), (2, 560, False), (10, 180, True), (10, 200, False)]
)
def test_clean_accuracy_near_chance_is_a_warning(classes: int, right: int, found: bool) -> None:
    audit = made({"clean": [right] * classes, CW: [0] * classes}, per_class=1000, classes=classes)
    assert codes(audit) == ([("clean-near-chance", "warn")] if found else [])


def test_classes_with_few_or_no_images_are_named() -> None:
    audit = made({"clean": [20, 20], CW: [10, 10]}, per_class=29)
    labels = torch.where(audit.labels == 1, 0, audit.labels)
    one = Audit(
        model="one",
        data="one",
        class_names=("a", "b"),
        index=audit.index,
        labels=labels,
        predictions={"clean": labels, CW: labels},
        settings=SETTINGS,
        threat=Threat(),
    )
    few, empty = diagnose(audit), diagnose(one)
    assert [(diagnostic.code, diagnostic.severity) for diagnostic in few] == [("few-images", "note")]
    assert "class 0 and class 1" in few[0].text
    assert [(diagnostic.code, diagnostic.severity) for diagnostic in empty] == [("no-images", "warn")]
    assert "No images of b" in empty[0].text


def test_a_long_list_of_classes_is_cut_short() -> None:
    audit = made({"clean": [3] * 9, CW: [2] * 9}, per_class=3, classes=9)
    assert "class 4 and 4 more" in next(
        diagnostic.text for diagnostic in diagnose(audit) if diagnostic.code == "few-images"
    )


@pytest.mark.parametrize("attacks", [("clean",), ("clean", "pgd-20"), ("clean", "fgsm", "pgd-20")])
def test_an_audit_without_a_second_goal_is_noted(attacks: tuple[str, ...]) -> None:
    audit = made({attack: [450, 450] for attack in attacks})
    assert codes(audit) == [("weak-attacks", "note")]


ENSEMBLE = ("apgd-ce", "apgd-t", "fab-t", "square(queries=50)", "apgd-dlr")


def broken(*numbers: int, members: tuple[str, ...] = ENSEMBLE, ran: float = 1.0) -> Audit:
    """Of a thousand images, `numbers[i]` fell to the i-th member of autoattack."""
    audit = made({"clean": [500, 500], CW: [500, 500]})
    column = torch.full_like(audit.labels, -1)
    column[: sum(numbers)] = torch.arange(len(numbers)).repeat_interleave(torch.tensor(numbers))
    return replace(
        audit,
        predictions={**audit.predictions, "autoattack": torch.where(column < 0, audit.labels, 1 - audit.labels)},
        settings={**audit.settings, "autoattack": {"goal": "ensemble", "ran": dict.fromkeys(members, ran)}},
        broken_by={"autoattack": column},
    )


def test_square_that_breaks_what_gradients_could_not_is_a_warning() -> None:
    (diagnostic,) = diagnose(broken(300, 20, 0, 10, 50))
    assert (diagnostic.code, diagnostic.severity) == ("square-beats-gradients", "warn")
    assert (
        "In autoattack square(queries=50) broke 10 images, 1.0 % of all, on which apgd-ce, apgd-t and fab-t had "
        "failed: a search without gradients does better" in diagnostic.text
    )
    assert "Do not quote gradient attacks" in diagnostic.advice
    assert diagnose(broken(300, 20, 0, 9)) == (), "less than one image in a hundred"
    assert diagnose(broken(300, 20, members=("square(queries=50)", "apgd-ce"))) == (), "no gradients before it"
    assert diagnose(broken(300, members=("square(queries=50)",))) == ()


def test_what_the_time_cut_is_told_in_the_words_of_the_audit() -> None:
    cut = broken(300, ran=0.5)
    (diagnostic,) = diagnose(replace(cut, provenance={"not_run": ["fab"]}))
    assert (diagnostic.code, diagnostic.severity) == ("cut-short", "warn")
    assert "the time budget left fab at 0 %, apgd-ce of autoattack at 50 %, " in diagnostic.text
    assert diagnostic.text.endswith("Robust accuracies are upper bounds.")


def test_points_without_a_class_are_told_as_losses() -> None:
    audit = broken(300)
    settings = {**audit.settings, "autoattack": {**audit.settings["autoattack"], "not_finite": 1200}}
    (diagnostic,) = diagnose(replace(audit, settings=settings))
    assert (diagnostic.code, diagnostic.severity) == ("not-finite", "warn")
    assert "autoattack met 1,200. Such images count as lost under every attack" in diagnostic.text
    assert "looks robust" not in diagnostic.text


def test_warnings_come_first() -> None:
    audit = made({"clean": [20, 20], "pgd-20": [20, 20], CW: [2, 2]}, per_class=25)
    assert [diagnostic.severity for diagnostic in diagnose(audit)] == ["warn", "note"]


# Before and after


def test_a_gain_that_the_stronger_attack_denies_is_a_warning() -> None:
    before = made({"clean": [450, 430], "pgd-20": [350, 150], CW: [320, 120]})
    after = made({"clean": [450, 430], "pgd-20": [345, 240], CW: [300, 125]})
    found = diagnose_change(before, after)
    assert [(diagnostic.code, diagnostic.severity) for diagnostic in found] == [("unconfirmed-gain", "warn")] * 2
    average, worst = (diagnostic.text for diagnostic in found)
    assert "Average: pgd-20 gains 8.5 points (50.0 % to 58.5 %), cw-50(restarts=5) loses 1.5 points" in average
    assert "Worst class: pgd-20 gains 18.0 points (30.0 % to 48.0 %), cw-50(restarts=5) gains 1.0 points" in worst
    assert "17.0 points (95 % interval" in worst


def test_a_gain_that_is_mostly_confirmed_is_a_note() -> None:
    before = made({"clean": [450, 430], "pgd-20": [350, 150], CW: [320, 120]})
    after = made({"clean": [450, 430], "pgd-20": [350, 240], CW: [320, 180]})
    found = diagnose_change(before, after)
    assert {(diagnostic.code, diagnostic.severity) for diagnostic in found} == {("unconfirmed-gain", "note")}


def test_a_confirmed_gain_and_a_loss_are_no_findings() -> None:
    before = made({"clean": [450, 430], "pgd-20": [350, 150], CW: [320, 120]})
    after = made({"clean": [450, 430], "pgd-20": [350, 240], CW: [320, 210]})
    assert diagnose_change(before, after) == ()
    assert diagnose_change(after, before) == ()
    assert diagnose_change(before, before) == ()


def test_a_small_audit_does_not_accuse() -> None:
    before = made({"clean": [18, 17], "pgd-20": [14, 6], CW: [13, 5]}, per_class=20)
    after = made({"clean": [18, 17], "pgd-20": [14, 7], CW: [13, 5]}, per_class=20)
    assert diagnose_change(before, after) == ()


def test_gains_under_pgd_alone_are_noted_as_unchecked() -> None:
    before, after = (made({"clean": [450, 430], "pgd-20": [350, right]}) for right in (150, 240))
    (diagnostic,) = diagnose_change(before, after)
    assert (diagnostic.code, diagnostic.severity) == ("gain-unchecked", "note")
    assert diagnose_change(made({"clean": [450, 430]}), made({"clean": [450, 440]})) == ()


def test_audits_of_other_images_are_not_compared() -> None:
    five = made({"clean": [4, 4]}, per_class=5)
    with pytest.raises(DataError, match="same images"):
        diagnose_change(five, made({"clean": [4, 4]}, per_class=6))
    with pytest.raises(DataError, match="different threats"):
        diagnose_change(five, replace(five, threat=Threat(eps=0.5)))


def test_a_model_that_rounds_its_gradient_away_is_called_masked() -> None:
    class Rounded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(4, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head((x * 16).round().flatten(1))

    torch.manual_seed(0)
    model = Rounded()
    images = torch.randint(0, 256, (60, 1, 2, 2), dtype=torch.uint8)
    labels = model(images / 255).argmax(1)
    data = ImageDataset(images=images, labels=labels, class_names=("a", "b"))
    masked = audit(model, data, attacks="clean,pgd-5", eps=0.3)
    plain = audit(nn.Sequential(nn.Flatten(), nn.Linear(4, 2)), data, attacks="clean,pgd-5", eps=0.3)
    assert "masked-gradient" in {diagnostic.code for diagnostic in diagnose(masked)}
    assert "masked-gradient" not in {diagnostic.code for diagnostic in diagnose(plain)}
