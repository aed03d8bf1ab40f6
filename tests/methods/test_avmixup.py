from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from reference import avmixup as reference
from robustfair.attacks.pgd import pgd
from robustfair.data import ImageDataset, evaluation_batches
from robustfair.errors import ConfigError, ConflictError
from robustfair.methods import AWP, CCM, EMA, SWA, AVmixup, FriendlyAT, LabelSmoothing, Method, compose
from robustfair.objectives import FGSMAT, MART, PGDAT, ARoW, Objective, Standard, Trades
from robustfair.runs.composition import read_composition
from robustfair.values import Batch

Net = Callable[..., nn.Module]
Data = Callable[..., ImageDataset]
Run = Callable[..., Any]

EPS = 0.2
CONFIGS = (
    AVmixup(),
    AVmixup(gamma=1.3, lambda1=0.9, lambda2=0.4),
    AVmixup(gamma=4.0, lambda1=0.5, lambda2=0.7, clip_vertex=False),
)


@pytest.fixture(params=[torch.float64, torch.float32], ids=["double", "single"])
def batch(request: pytest.FixtureRequest, tiny_net: Net, tiny_data: Data) -> Batch:
    """Twelve images, some of whose pixels are 0 or 1, and where PGD takes them."""
    clean = next(evaluation_batches(tiny_data((5, 4, 3)), 12))
    clean = replace(clean, x=clean.x.to(request.param))
    x_adv = pgd(tiny_net(), clean.x, clean.y, PGDAT(eps=EPS).attack(clean), clean.rng("attack"))
    return replace(clean, x_adv=x_adv)


def mixed(run: Run, batch: Batch, method: AVmixup, *beside: Method) -> Batch:
    """The batch as the objective gets it."""
    plan = compose(PGDAT(eps=EPS), [*beside, method])
    return plan.examples(batch, plan.at_epoch({}, run(objective=PGDAT(eps=EPS))), run())


def drawn(batch: Batch) -> Tensor:
    """The mixing weights, (B,)."""
    return torch.empty(len(batch.y), dtype=batch.x.dtype).uniform_(0, 1, generator=batch.rng("avmixup"))


def weigh_all_by(value: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Tensor, "uniform_", lambda self, *_, generator: self.fill_(value))


def slow(batch: Batch, method: AVmixup) -> list[tuple[list[float], list[float]]]:
    """Pixels and label of every image by the loop."""
    assert batch.x_adv is not None
    images = batch.x.flatten(1), batch.x_adv.flatten(1)
    rows = zip(*(part.tolist() for part in (*images, batch.y, drawn(batch))), strict=True)
    options = {"gamma": method.gamma, "lambda1": method.lambda1, "lambda2": method.lambda2, "clip": method.clip_vertex}
    return [reference.example(*row, num_classes=3, **options) for row in rows]


@pytest.mark.parametrize("method", CONFIGS, ids=str)
def test_images_and_labels_are_the_loop_over_pixels_and_classes(
    stand_in_run: Run, batch: Batch, method: AVmixup
) -> None:
    found = mixed(stand_in_run, batch, method)
    images, labels = zip(*slow(batch, method), strict=True)
    assert found.x_adv.dtype == found.soft.dtype == batch.x.dtype
    torch.testing.assert_close(found.x_adv.flatten(1).double(), torch.tensor(images).double(), rtol=0, atol=1e-6)
    torch.testing.assert_close(found.soft.double(), torch.tensor(labels).double(), rtol=0, atol=1e-6)
    assert replace(found, x_adv=batch.x_adv, soft=None) == batch, "nothing else moves"


@pytest.mark.parametrize("method", CONFIGS, ids=str)
def test_loss_and_gradient_are_those_of_the_loop(
    tiny_net: Net, tiny_data: Data, stand_in_run: Run, batch: Batch, method: AVmixup
) -> None:
    model, twin = tiny_net(dtype=torch.float64), tiny_net(dtype=torch.float64)
    ours = PGDAT(eps=EPS)(model, mixed(stand_in_run, batch, method)).total()
    images, labels = zip(*slow(batch, method), strict=True)
    logits = twin(torch.tensor(images, dtype=torch.float64).view_as(batch.x))
    value, at_logits = reference.loss(logits.tolist(), labels)
    assert ours.item() == pytest.approx(value, rel=1e-6)
    expected = torch.autograd.grad(logits, list(twin.parameters()), torch.tensor(at_logits, dtype=torch.float64))
    for found, gradient in zip(torch.autograd.grad(ours, list(model.parameters())), expected, strict=True):
        torch.testing.assert_close(found, gradient, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("method", CONFIGS, ids=str)
def test_labels_sum_to_one_and_images_stay_within_gamma_eps(stand_in_run: Run, batch: Batch, method: AVmixup) -> None:
    found = mixed(stand_in_run, batch, method)
    torch.testing.assert_close(found.soft.sum(1), torch.ones_like(found.soft[:, 0]))
    assert float(found.soft.min()) >= 0
    far = (found.x_adv - batch.x).abs().amax((1, 2, 3))
    assert float(far.max()) <= method.gamma * EPS + 1e-6
    assert float(far.max()) > EPS, "some go beyond the attack"
    inside = (found.x_adv >= 0) & (found.x_adv <= 1)
    assert bool(inside.all()) == method.clip_vertex


def test_gamma_zero_mixes_labels_alone(stand_in_run: Run, batch: Batch) -> None:
    found = mixed(stand_in_run, batch, AVmixup(gamma=0.0))
    torch.testing.assert_close(found.x_adv, batch.x)
    torch.testing.assert_close(found.soft, mixed(stand_in_run, batch, AVmixup()).soft, rtol=0, atol=0)


def test_mass_one_on_both_ends_is_hard_labels(stand_in_run: Run, batch: Batch) -> None:
    found = mixed(stand_in_run, batch, AVmixup(lambda1=1.0, lambda2=1.0))
    hard = nn.functional.one_hot(batch.y, 3).to(batch.x.dtype)
    torch.testing.assert_close(found.soft, hard)
    assert torch.equal(found.soft == 0, hard == 0)


def test_ten_classes_have_the_uniform_label_at_the_vertex_and_a_hundred_have_not(stand_in_run: Run) -> None:
    for num_classes, elsewhere in ((10, 0.1), (100, 0.9 / 99)):
        run = stand_in_run()
        run.num_classes = num_classes
        labels = AVmixup().at_epoch({}, run)["vertex_labels"]
        torch.testing.assert_close(labels.diagonal(), torch.full((num_classes,), 0.1, dtype=torch.float64))
        others = labels[~torch.eye(num_classes, dtype=torch.bool)]
        torch.testing.assert_close(others, torch.full_like(others, elsewhere))
        row = torch.tensor(reference.kept_mass(3, 0.1, num_classes), dtype=torch.float64)
        torch.testing.assert_close(labels[3], row)


def test_at_the_vertex_with_gamma_one_it_is_pgd_at(
    tiny_net: Net, stand_in_run: Run, batch: Batch, monkeypatch: pytest.MonkeyPatch
) -> None:
    weigh_all_by(0.0, monkeypatch)
    found = mixed(stand_in_run, batch, AVmixup(gamma=1.0, lambda2=1.0))
    losses = [PGDAT(eps=EPS)(tiny_net(dtype=torch.float64), given).total() for given in (found, batch)]
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-6, atol=0)


def test_at_the_other_end_is_the_clean_image_with_the_first_label(
    stand_in_run: Run, batch: Batch, monkeypatch: pytest.MonkeyPatch
) -> None:
    weigh_all_by(1.0, monkeypatch)
    found = mixed(stand_in_run, batch, AVmixup(lambda1=0.7))
    assert torch.equal(found.x_adv, batch.x)
    labels = [reference.kept_mass(y, 0.7, 3) for y in batch.y.tolist()]
    torch.testing.assert_close(found.soft, torch.tensor(labels, dtype=batch.x.dtype))


def test_one_weight_per_image_mixes_pixels_and_label_alike(stand_in_run: Run, batch: Batch) -> None:
    found = mixed(stand_in_run, batch, AVmixup(lambda1=1.0, lambda2=0.4, clip_vertex=False))
    by_label = (found.soft.gather(1, batch.y[:, None])[:, 0] - 0.4) / 0.6
    perturbation = 2 * (batch.x_adv - batch.x).flatten(1)
    by_pixel = 1 - (found.x_adv - batch.x).flatten(1) / perturbation
    w = drawn(batch)
    torch.testing.assert_close(by_label, w, rtol=0, atol=1e-5)
    moved = perturbation.abs() > 1e-2
    assert bool(moved.any(1).all())
    torch.testing.assert_close(by_pixel[moved], w[:, None].expand_as(by_pixel)[moved], rtol=0, atol=1e-4)
    assert w.unique().numel() == len(w)


def test_the_weights_are_of_the_batch_and_no_other_method_moves_them(stand_in_run: Run, batch: Batch) -> None:
    alone = mixed(stand_in_run, batch, AVmixup())
    assert torch.equal(alone.x_adv, mixed(stand_in_run, batch, AVmixup()).x_adv)
    beside = mixed(stand_in_run, batch, AVmixup(), CCM(), AWP(), EMA(), SWA(), FriendlyAT(omega=0.1))
    assert torch.equal(alone.x_adv, beside.x_adv)
    assert torch.equal(alone.soft, beside.soft)
    other = mixed(stand_in_run, replace(batch, seed=batch.seed + 1), AVmixup())
    assert not torch.allclose(alone.soft, other.soft)


@pytest.mark.parametrize(
    ("objective", "reason"),
    [
        (
            Trades(),
            "avmixup sets labels of x_adv, and trades asks for those of x: use fgsm-at or n-fgsm or pgd-at, or drop",
        ),
        (ARoW(), "avmixup sets labels of x_adv, and arow asks for those of x: "),
        (Standard(), "avmixup sets labels of x_adv, and standard asks for those of x: "),
        (MART(), "avmixup sets batch.soft, but mart does not read soft: drop avmixup"),
    ],
    ids=lambda value: getattr(value, "name", ""),
)
def test_it_is_refused_where_its_labels_are_not_those_of_the_attacked_images(objective: Objective, reason: str) -> None:
    with pytest.raises(ConflictError, match=reason):
        compose(objective, [AVmixup()])


def test_it_acts_on_both_objectives_that_train_on_attacked_images_alone() -> None:
    for objective in (PGDAT(), FGSMAT()):
        compose(objective, [AVmixup()])
    with pytest.raises(ConflictError, match=r"both set batch\.soft \(the soft labels\)"):
        compose(PGDAT(), [AVmixup(), LabelSmoothing()])


def test_the_defaults_are_those_of_the_authors_code() -> None:
    method = AVmixup()
    assert (method.gamma, method.lambda1, method.lambda2, method.clip_vertex) == (2.0, 1.0, 0.1, True)


@pytest.mark.parametrize(
    ("field", "wrong"),
    [
        ("gamma", -0.5),
        ("gamma", float("nan")),
        ("gamma", float("inf")),
        ("lambda1", -0.1),
        ("lambda1", 1.1),
        ("lambda2", -0.1),
        ("lambda2", 2.0),
        ("lambda2", float("nan")),
    ],
)
def test_a_wrong_value_is_refused_with_owner_and_field(field: str, wrong: float) -> None:
    with pytest.raises(ConfigError, match=f"^avmixup: {field} must be"):
        AVmixup(**{field: wrong})
    with pytest.raises(ConfigError, match=f"^avmixup: {field} must be"):
        read_composition(f"pgd-at + avmixup({field}={wrong})")
