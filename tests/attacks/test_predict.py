from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn

from robustfair.attacks.pgd import pgd
from robustfair.attacks.predict import predict, tally, tally_batches
from robustfair.data import ImageDataset, evaluation_batches
from robustfair.losses import MaximiseCE, MinimiseCE
from robustfair.values import Attack, Batch

Net = Callable[..., nn.Module]
Data = Callable[..., ImageDataset]


def pgd_on(eps: float, steps: int = 3) -> Callable[[Batch], Attack]:
    def attack_on(batch: Batch) -> Attack:
        flat = batch.x[:, 0, 0, 0]
        return Attack(torch.full_like(flat, eps), torch.full_like(flat, eps / 2), steps, MaximiseCE())

    return attack_on


def test_counts_equal_a_loop_over_images(tiny_net: Net, tiny_data: Data) -> None:
    model, data = tiny_net(seed=2), tiny_data((9, 4, 6))
    found = tally_batches(model, evaluation_batches(data, 5), 3, pgd_on(0.1))
    clean, robust = [[0] * 3 for _ in range(3)], [[0] * 3 for _ in range(3)]
    model.eval()
    for batch in evaluation_batches(data, 5):
        x_adv = pgd(model, batch.x, batch.y, pgd_on(0.1)(batch), batch.rng("attack"))
        with torch.no_grad():
            for y, before, after in zip(batch.y.tolist(), model(batch.x), model(x_adv), strict=True):
                seen = int(before.argmax())
                clean[seen][y] += 1
                robust[int(after.argmax()) if seen == y else seen][y] += 1
    assert found.clean_pred_true.tolist() == clean
    assert found.robust_pred_true.tolist() == robust
    assert found.count.tolist() == [9, 4, 6]


def test_a_robust_hit_is_a_clean_hit(tiny_data: Data) -> None:
    """Even where the "attack" leads every image to its own class."""

    def brighter_is_one(x: Tensor) -> Tensor:
        bright = 30 * (x.mean((1, 2, 3)) - 0.5)
        return torch.stack([-bright, bright], 1)

    def helpful(batch: Batch) -> Attack:
        return replace(pgd_on(0.5)(batch), goal=MinimiseCE())

    batches = list(evaluation_batches(tiny_data((8, 8)), 4))
    assert all(torch.equal(predict(brighter_is_one, batch, helpful), batch.y) for batch in batches)
    found = tally_batches(brighter_is_one, batches, 2, helpful)
    assert torch.equal(found.robust_pred_true, found.clean_pred_true)
    assert int(found.clean_pred_true.trace()) < 16


def test_no_radius_no_difference_and_no_attack_no_robust_part(tiny_net: Net, tiny_data: Data) -> None:
    model, data = tiny_net(), tiny_data()
    still = tally_batches(model, evaluation_batches(data, 10), 3, pgd_on(0.0))
    assert torch.equal(still.robust_pred_true, still.clean_pred_true)
    clean = tally_batches(model, evaluation_batches(data, 10), 3)
    assert clean.robust_pred_true is None
    assert torch.equal(clean.clean_pred_true, still.clean_pred_true)


def test_neither_mode_nor_buffers_nor_gradients_change(tiny_net: Net, tiny_data: Data) -> None:
    model = tiny_net(dropout=0.5)
    model.norm.eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    first = tally_batches(model, evaluation_batches(tiny_data(), 10), 3, pgd_on(0.1))
    again = tally_batches(model, evaluation_batches(tiny_data(), 10), 3, pgd_on(0.1))
    assert torch.equal(first.robust_pred_true, again.robust_pred_true), "dropout was on"
    assert model.training
    assert not model.norm.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


def test_predictions_come_without_a_graph(tiny_net: Net, tiny_data: Data) -> None:
    batch = next(evaluation_batches(tiny_data(), 7))
    for attack_on in (None, pgd_on(0.1)):
        found = predict(tiny_net(), batch, attack_on)
        assert found.shape == (7,)
        assert found.dtype == torch.int64


def test_a_tally_has_the_parts_it_is_given() -> None:
    y, guess = torch.tensor([0, 1, 1]), torch.tensor([0, 0, 1])
    assert tally(None, guess, y, 2).clean_pred_true is None
    assert tally(guess, None, y, 2).robust_pred_true is None
    assert tally(guess, None, y, 2).clean_pred_true.tolist() == [[1, 1], [0, 1]]
