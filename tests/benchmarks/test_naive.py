from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from benchmarks.naive import EPS, STEP_SIZE, STEPS, NaiveTraining, PerImage, naive_attack, naive_loader
from benchmarks.train_step import starting_noise
from benchmarks.workload import Step, build, one_batch, synthetic
from robustfair.attacks.pgd import pgd
from robustfair.objectives import PGDAT
from robustfair.values import Batch


def random_batch(size: int, dtype: torch.dtype) -> Batch:
    batch = one_batch(size, "cpu")
    return replace(batch, x=batch.x.to(dtype))


def our_step(model: torch.nn.Module, size: int) -> Step:
    return Step(model, PGDAT(), precision="fp32", compile=False, device="cpu", batch_size=size)


def test_its_threat_model_is_the_default_of_pgd_at() -> None:
    objective = PGDAT()
    assert (objective.radius, objective.step, objective.steps) == (EPS, STEP_SIZE, STEPS)


def test_its_attack_ends_where_ours_ends_from_the_same_start() -> None:
    model = build("preact-resnet18", 2).double().eval()
    batch = random_batch(6, torch.float64)
    noise = starting_noise(batch)
    x = batch.x.contiguous()
    theirs = naive_attack(model, x, batch.y, noise)
    attack = PGDAT().attack(batch)
    ours = pgd(model, x, batch.y, attack, batch.rng("attack"), x_init=(x + noise).clamp(0, 1))
    torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-12)
    assert (theirs - x).abs().max() <= EPS + 1e-12
    assert not torch.equal(theirs, (x + noise).clamp(0, 1))
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_a_step_has_our_loss_from_the_same_start_in_float32() -> None:
    model = build("small-cnn", 4)
    batch = random_batch(8, torch.float32)
    naive, ours = NaiveTraining(model), our_step(model, 8)
    noise = starting_noise(batch)
    for _ in range(2):
        theirs, _ = naive.step(batch.x.contiguous(), batch.y, noise)
        assert ours(batch).item() == pytest.approx(theirs, abs=1e-5)


def test_steps_leave_our_weights_and_batch_norm_statistics() -> None:
    model = build("preact-resnet18", 2).double()
    batch = random_batch(8, torch.float64)
    naive, ours = NaiveTraining(model), our_step(model, 8)
    for _ in range(3):
        theirs, accuracy = naive.step(batch.x.contiguous(), batch.y, starting_noise(batch))
        assert ours(batch).item() == pytest.approx(theirs, abs=1e-10)
        assert accuracy * 8 in range(9)
    expected = naive.model.state_dict()
    for name, value in ours.model.state_dict().items():
        torch.testing.assert_close(value, expected[name], rtol=0, atol=1e-10)
    assert not torch.equal(expected["stem.weight"], model.state_dict()["stem.weight"])


def test_an_epoch_weighs_batches_by_their_size(monkeypatch: pytest.MonkeyPatch) -> None:
    steps = iter([(1.0, 0.5), (4.0, 0.0)])
    naive = NaiveTraining(build("small-cnn", 2))
    monkeypatch.setattr(naive, "step", lambda x, y, noise: next(steps))
    batches = [(torch.zeros(n, 3, 8, 8), torch.zeros(n, dtype=torch.int64)) for n in (2, 1)]
    assert naive.epoch(batches, "cpu") == (2.0, pytest.approx(1 / 3))


def test_an_epoch_trains_on_every_image() -> None:
    naive = NaiveTraining(build("small-cnn", 2), steps=1)
    before = naive.model.state_dict()["head.weight"].clone()
    loss, accuracy = naive.epoch(naive_loader(synthetic(20), 8, workers=0), "cpu")
    assert 0 < loss < 10
    assert accuracy * 20 == pytest.approx(round(accuracy * 20), abs=1e-4)
    assert not torch.equal(naive.model.state_dict()["head.weight"], before)


def test_images_are_windows_of_the_padded_image_mirrored_or_not() -> None:
    data = synthetic(2)
    images = PerImage(data, padding=1)
    padded = torch.nn.functional.pad(data.images[1].float() / 255, (1, 1, 1, 1), mode="reflect")
    windows = [padded[:, top : top + 32, left : left + 32] for top in range(3) for left in range(3)]
    torch.manual_seed(0)
    drawn: set[tuple[int, bool]] = set()
    for _ in range(60):
        image, label = images[1]
        assert label == int(data.labels[1])
        drawn.add(next((i, flip) for i, w in enumerate(windows) for flip in (False, True) if _same(image, w, flip)))
    assert {flip for _, flip in drawn} == {False, True}
    assert {i for i, _ in drawn} == set(range(9))


def _same(image: Tensor, window: Tensor, flip: bool) -> bool:
    return torch.equal(image, window.flip(2) if flip else window)
