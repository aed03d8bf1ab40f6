"""Checks of a GPU pass on a CPU, and fail where something is wrong."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.gpu import checks, passes, training, verdicts
from benchmarks.gpu.check import Check, Setting, moved, starts_from_cpu
from benchmarks.gpu.checks import GROUPS, all_checks, failed
from robustfair.attacks.pgd import STARTS
from robustfair.data import evaluation_batches
from robustfair.methods import CCM
from robustfair.values import Attack, Batch, seeded_generator

HERE = Setting("cpu", small=True, compiled=False)


def names_of(found: list[Check]) -> list[str]:
    return [check.name for check in found if check.difference > check.tolerance]


@pytest.mark.parametrize("group", [name for name in GROUPS if name not in ("members", "runs", "waits")])
def test_a_group_passes_on_a_cpu(group: str) -> None:
    found = GROUPS[group](HERE)
    assert bool(found) is (group != "compiled step")
    assert names_of(found) == []


def test_verdicts_of_every_member_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verdicts, "RADII", {"linf": 0.05})
    found = verdicts.members(HERE)
    assert names_of(found) == []
    assert {name.split(", ")[2].split("(")[0].split(":")[0] for name in (check.name for check in found)} >= {
        "apgd-ce",
        "apgd-dlr",
        "apgd-t",
        "fab",
        "fab-t",
        "square",
    }


def test_a_difference_that_is_no_number_does_not_pass() -> None:
    assert failed([Check("a", "b", float("nan"), 1.0).row(), Check("c", "d", 1.0, 1.0).row()]) == ["a"]


def test_a_group_that_fails_to_run_is_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(setting: Setting) -> list[Check]:
        raise RuntimeError("no kernel image\nand a long story")

    monkeypatch.setattr(checks, "GROUPS", {"replays": failing, "fine": lambda setting: [Check("fine", "itself", 0.0)]})
    rows = all_checks(HERE)
    assert rows[0]["error"] == "RuntimeError: no kernel image"
    assert "long story" in rows[0]["traceback"]
    assert failed(rows) == ["replays"]


def test_pixels_that_are_slightly_off_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def off(batch: Batch, device: str) -> Batch:
        there = moved(batch, device)
        return replace(there, x=there.x * (1 + 1e-4))

    for module in (passes, training):
        monkeypatch.setattr(module, "moved", off)
    assert {"logits, fp32", "gradient of images, fp32"} <= set(names_of(passes.passes(HERE)))
    wrong = [f"loss and gradient, {name}" for name in ("trades", "mart", "arow")]
    assert names_of(training.objectives(HERE)) == wrong  # the others train on attacked images alone


@pytest.mark.parametrize("wrong", ["radius", "step", "target"])
def test_an_attack_with_a_wrong_setting_is_found(monkeypatch: pytest.MonkeyPatch, wrong: str) -> None:
    usual, calls = passes.pgd, [0]

    def off(model: Any, x: Tensor, y: Tensor, attack: Attack, rng: torch.Generator, **more: Any) -> Tensor:
        calls[0] += 1
        if calls[0] % 4 == 3:  # the one on the device
            changes = {"radius": {"eps": attack.eps.mean().expand_as(attack.eps)}, "step": {"steps": 3}}
            target = None if attack.target is None else attack.target.roll(1)
            attack = replace(attack, **changes.get(wrong, {"target": target}))
        return usual(model, x, y, attack, rng, **more)

    monkeypatch.setattr(passes, "pgd", off)
    found = names_of(passes.attacks(HERE))
    images = [name for name in found if name.startswith("attacked images")]
    if wrong == "target":
        assert images == ["attacked images, target"]
    else:
        assert {"attacked images, linf", "attacked images, l2", "attacked images, target"} <= set(images)


def test_a_recording_that_is_not_replayed_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(run: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        return (lambda: None), run()

    monkeypatch.setattr(passes, "taped", never)
    found = names_of(passes.replays(HERE))
    assert {"replayed, fp32, linf: pixels", "replayed, bf16, target: pixels"} <= set(found)
    assert not any("best point" in name for name in found)  # which is never recorded


def test_a_class_with_another_radius_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    name = "pgd-at, ccm, ema"
    monkeypatch.setattr(training, "RUNS", {name: training.RUNS[name]})
    assert names_of(training.runs(HERE)) == []
    usual, calls = CCM.at_epoch, [0]

    def off(self: CCM, state: Any, run: Any) -> Any:
        calls[0] += 1
        found = usual(self, state, run)
        if calls[0] > 6:  # of three runs with three boundaries the last, the one on the device
            found["scale"][3] *= 0.9
        return found

    monkeypatch.setattr(CCM, "at_epoch", off)
    assert names_of(training.runs(HERE)) == [f"what 6 steps change, {name}"]


def test_nothing_waits_in_two_of_the_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "RUNS", dict(list(training.RUNS.items())[:2]))
    found = training.waits(HERE)
    assert names_of(found) == []
    assert {check.against for check in found} == {"none, and a CPU is never waited for"}


def test_starts_are_the_same_wherever_they_are_drawn() -> None:
    batch = next(evaluation_batches(training.data_of(4), 4))
    attack = passes.attack_on(batch, "linf")
    before = dict(STARTS)
    with starts_from_cpu():
        one = STARTS["uniform"](batch.x, attack, seeded_generator("cpu", 5))
        two = STARTS["uniform"](batch.x, attack, seeded_generator("cpu", 5))
        other = STARTS["uniform"](batch.x, attack, seeded_generator("cpu", 6))
    assert torch.equal(one, two)
    assert not torch.equal(one, other)
    assert before == STARTS
    assert ((one - batch.x).abs().flatten(1).amax(1) <= attack.eps + 1e-6).all()


def test_tf32_is_emulated_by_ten_bits() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(1, 1, bias=False))
    model[0].weight.data.fill_(1 + 2**-10 + 2**-13)
    rounded = passes.rounded_products(model)
    assert float(rounded(torch.ones(1, 1))) == 1 + 2**-10
