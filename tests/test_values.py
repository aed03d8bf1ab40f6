from __future__ import annotations

import math
from dataclasses import FrozenInstanceError, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from robustfair.values import Batch, ClassTally, Forward, Loss, derive_seed, seeded_generator


def some_loss() -> Loss:
    label = torch.tensor([1.0, 2.0, 3.0, 4.0], requires_grad=True)
    other = torch.tensor([0.5, 0.5, 1.0, 0.0])
    return Loss.of(Forward(), label=(label, 1.0), consistency=(other, 6.0))


def test_total_is_the_mean_of_weight_times_weighted_terms() -> None:
    weight, factor = torch.tensor([1.0, 0.5, 2.0, 0.0]), torch.tensor([2.0, 1.0, 0.0, 3.0])
    loss = (
        some_loss().weighted(weight).scaled("consistency", factor).plus("extra", torch.ones(4), torch.full((4,), 2.0))
    )
    rows = [
        w * (a + 6 * f * b + 2)
        for w, f, a, b in zip(weight.tolist(), factor.tolist(), [1, 2, 3, 4], [0.5, 0.5, 1, 0], strict=True)
    ]
    assert loss.per_example().tolist() == pytest.approx(rows)
    assert loss.total().item() == pytest.approx(sum(rows) / 4)


def test_one_number_of_the_batch_joins_the_total_whatever_the_examples_weigh() -> None:
    whole, coef = torch.tensor(3.0, requires_grad=True), torch.tensor(0.5)
    rows = some_loss().weighted(torch.tensor([1.0, 0.5, 2.0, 0.0]))
    loss = rows.plus("whole", whole, coef)
    assert torch.equal(loss.per_example(), rows.per_example())
    assert loss.total().item() == pytest.approx(rows.total().item() + 1.5)
    twice = loss.weighted(torch.full((4,), 2.0)).total()
    assert twice.item() == pytest.approx(2 * rows.total().item() + 1.5)
    twice.backward()
    assert whole.grad.item() == 0.5


def test_terms_add_up_to_the_same_bits_in_whatever_order_they_came() -> None:
    rng = torch.Generator().manual_seed(0)
    per_example = {name: (torch.randn(50, generator=rng), torch.rand(50, generator=rng)) for name in "abc"}
    whole = {name: (torch.randn((), generator=rng), torch.rand((), generator=rng)) for name in "xyz"}
    totals = set()
    for names in ("abcxyz", "zcaybx", "yxzcba", "bxacyz"):
        loss = Loss.of(Forward(), label=(torch.ones(50), 1.0))
        for name in names:
            loss = loss.plus(name, *(per_example | whole)[name])
        totals.add(loss.total().item())
    assert len(totals) == 1


def test_edits_return_new_values_and_leave_the_old_alone() -> None:
    loss = some_loss()
    before = loss.total().item()
    loss.weighted(torch.zeros(4)), loss.scaled("label", torch.zeros(4)), loss.plus("new", torch.ones(4), torch.ones(4))
    assert loss.total().item() == before
    assert set(loss.terms) == {"label", "consistency"}
    with pytest.raises(FrozenInstanceError):
        loss.weight = torch.zeros(4)  # type: ignore[misc]


def test_edits_share_what_they_do_not_touch() -> None:
    loss = some_loss()
    edited = loss.scaled("label", torch.ones(4))
    assert edited.weight is loss.weight
    assert edited.out is loss.out
    assert edited.coef["consistency"] is loss.coef["consistency"]
    assert edited.terms["label"] is loss.terms["label"]


def test_coefficients_and_weights_carry_no_gradient() -> None:
    loss = some_loss()
    assert not loss.weight.requires_grad
    assert not any(coef.requires_grad for coef in loss.coef.values())
    loss.total().backward()
    assert loss.terms["label"].grad.tolist() == [0.25] * 4


def test_a_batch_draws_from_its_seed_and_the_name_alone() -> None:
    batch = Batch(x=torch.zeros(2, 1, 2, 2), y=torch.zeros(2).long(), index=torch.arange(2), seed=5)
    draw = torch.rand(4, generator=batch.rng("attack"))
    torch.manual_seed(9)
    assert torch.equal(torch.rand(4, generator=replace(batch, x=torch.ones(2, 1, 2, 2)).rng("attack")), draw)
    assert not torch.equal(torch.rand(4, generator=batch.rng("augment")), draw)
    assert not torch.equal(torch.rand(4, generator=replace(batch, seed=6).rng("attack")), draw)


@given(st.lists(st.one_of(st.integers(), st.text(max_size=5)), min_size=1, max_size=4))
@settings(max_examples=50, deadline=None)
def test_a_seed_fits_in_63_bits_and_depends_on_the_keys(keys: list) -> None:
    seed = derive_seed(*keys)
    assert 0 <= seed < 2**63
    assert seed == derive_seed(*keys)
    assert seed != derive_seed(*keys, "one more")
    seeded_generator("cpu", *keys)


def test_keys_do_not_run_together() -> None:
    assert derive_seed(1, 23) != derive_seed(12, 3)
    assert derive_seed("1", 23) != derive_seed(1, 23)


def test_tallies_add_up_with_missing_parts() -> None:
    counts = torch.tensor([[2, 1], [0, 3]])
    robust = ClassTally(robust_pred_true=counts)
    both = ClassTally(clean_pred_true=counts, robust_pred_true=counts)
    total = ClassTally() + robust + both
    assert total.robust_pred_true.tolist() == [[4, 2], [0, 6]]
    assert total.clean_pred_true.tolist() == counts.tolist()
    assert robust.robust_pred_true.tolist() == counts.tolist()


def test_rates_read_columns_as_the_true_class_and_absent_classes_as_nan() -> None:
    tally = ClassTally(robust_pred_true=torch.tensor([[3, 0, 1], [1, 0, 1], [0, 0, 0]]))
    assert tally.count.tolist() == [4, 0, 2]
    rates = tally.robust.tolist()
    assert rates[0] == 0.75
    assert math.isnan(rates[1])
    assert rates[2] == 0.0


def test_images_and_logits_are_found_by_name() -> None:
    x, x_adv, view = (torch.full((2, 1, 1, 1), value) for value in (0.1, 0.2, 0.3))
    y = torch.tensor([0, 1])
    batch = Batch(x=x, y=y, index=y, seed=0, x_adv=x_adv, views={"other": view})
    assert [batch.at(name) is images for name, images in (("x", x), ("x_adv", x_adv), ("other", view))] == [True] * 3
    clean, adv, other = (torch.full((2, 3), value) for value in (0.1, 0.2, 0.3))
    out = Forward(clean=clean, adv=adv, views={"other": other})
    assert [out.at(name) is z for name, z in (("x", clean), ("x_adv", adv), ("other", other))] == [True] * 3
    assert Forward(adv=adv).at("x") is adv
    assert Forward(clean=clean).at("x_adv") is clean
