from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from reference import logit_adjustment as reference
from robustfair.data import ImageDataset
from robustfair.errors import ConfigError, ConflictError, RobustFairWarning
from robustfair.methods import ClassBalanced, LogitAdjustment, compose
from robustfair.methods.logit_adjustment import log_prior, measured_prior
from robustfair.objectives import BAT, FGSMAT, MART, PGDAT, ARoW, Objective, Standard, Trades
from robustfair.runs.composition import read_composition
from robustfair.training import Schedule, fit
from robustfair.values import Batch, ClassTally

Net = Callable[..., nn.Module]
Data = Callable[..., ImageDataset]
Run = Callable[..., Any]

COUNTS = (500, 100, 10)
READS_SHIFT = (Standard(), PGDAT(eps=0.1), FGSMAT(eps=0.1), Trades(eps=0.1))


def batch_of(b: int = 9) -> Batch:
    rng = torch.Generator().manual_seed(0)
    x = torch.rand(b, 1, 5, 5, generator=rng, dtype=torch.float64)
    return Batch(x=x, y=torch.arange(b) % 3, index=torch.arange(b), seed=1, x_adv=x.flip(0))


def label_terms(run: Run, model: nn.Module, objective: Objective, method: LogitAdjustment, batch: Batch) -> Tensor:
    """The label term (B,) under `method`."""
    plan = compose(objective, [method])
    stand_in = run(objective=objective)
    states = plan.at_epoch({}, stand_in)
    batch = replace(plan.prepare(replace(batch, x_adv=None), states, stand_in), x_adv=batch.x_adv)
    return plan.loss(model, batch, states, stand_in).terms["label"]


@pytest.mark.parametrize("objective", READS_SHIFT, ids=lambda objective: objective.name)
@pytest.mark.parametrize("tau", [0.5, 1.0, 2.0])
def test_value_and_gradient_are_the_formula(tiny_net: Net, stand_in_run: Run, objective: Objective, tau: float) -> None:
    model, twin, batch = tiny_net(dtype=torch.float64), tiny_net(dtype=torch.float64), batch_of()
    ours = label_terms(stand_in_run, model, objective, LogitAdjustment(prior=COUNTS, tau=tau), batch).mean()
    logits = twin(batch.x if objective.label_at == "x" else batch.x_adv)
    slow = reference.loss(logits.tolist(), batch.y.tolist(), COUNTS, tau)
    assert ours.item() == pytest.approx(slow, rel=1e-9)
    by_logits = torch.tensor(
        reference.loss_gradient(logits.tolist(), batch.y.tolist(), COUNTS, tau), dtype=torch.float64
    )
    found = torch.autograd.grad(ours, list(model.parameters()))
    expected = torch.autograd.grad(logits, list(twin.parameters()), by_logits)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("prior", [COUNTS, (0.2, 0.3, 0.5), (1.0, 1e-9, 1e9)])
@pytest.mark.parametrize("tau", [0.0, 0.3, 1.0, 1.5])
def test_the_logarithm_of_the_prior(prior: tuple[float, ...], tau: float) -> None:
    found = log_prior(torch.tensor(prior), tau)
    assert found.dtype == torch.float64
    single = torch.tensor(prior).tolist()
    assert found.tolist() == pytest.approx(reference.log_prior(single, tau), rel=1e-9)


@pytest.mark.parametrize("objective", READS_SHIFT, ids=lambda objective: objective.name)
@pytest.mark.parametrize("changes", [{"prior": (7, 7, 7)}, {"prior": COUNTS, "tau": 0}], ids=["equal", "tau 0"])
def test_an_equal_prior_changes_neither_value_nor_gradient(
    tiny_net: Net, stand_in_run: Run, objective: Objective, changes: dict[str, Any]
) -> None:
    model, twin, batch = tiny_net(dtype=torch.float64), tiny_net(dtype=torch.float64), batch_of()
    with pytest.warns(RobustFairWarning, match="logit-adjustment moves all logits alike"):
        ours = label_terms(stand_in_run, model, objective, LogitAdjustment(**changes), batch).mean()
    plain = objective(twin, batch).terms["label"].mean()
    torch.testing.assert_close(ours, plain, rtol=1e-12, atol=1e-12)
    pairs = zip(
        torch.autograd.grad(ours, list(model.parameters())),
        torch.autograd.grad(plain, list(twin.parameters())),
        strict=True,
    )
    for a, b in pairs:
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_a_prior_is_known_up_to_a_factor() -> None:
    one, two = log_prior(torch.tensor(COUNTS)), log_prior(torch.tensor(COUNTS) / 610)
    torch.testing.assert_close(one, two, rtol=0, atol=1e-6)


# Where the prior comes from


def test_counts_are_those_of_the_training_images(stand_in_run: Run) -> None:
    run = stand_in_run(images=(torch.rand(5, 1, 4, 4),))  # classes 0, 1, 2, 0, 1
    shift = LogitAdjustment().at_epoch({}, run)["shift"]
    assert shift.tolist() == pytest.approx(reference.log_prior([2, 2, 1], 1), rel=1e-9)


@pytest.mark.parametrize("prior", ["accuracy", "predicted"])
@pytest.mark.parametrize("seed", range(3))
def test_a_measured_prior_is_that_of_plain_loops(prior: Any, seed: int) -> None:
    rng = torch.Generator().manual_seed(seed)
    counts = torch.randint(0, 4, (4, 4), generator=rng) + torch.eye(4, dtype=torch.int64)
    counts[seed, seed] = 0  # a class without a hit
    counts[3] = 0  # one that is never predicted
    counts[2, 3] += 1
    slow = reference.accuracy if prior == "accuracy" else reference.predicted_counts
    assert measured_prior(counts, prior).tolist() == pytest.approx(slow(counts.tolist()), rel=1e-12)


@pytest.mark.parametrize("prior", ["accuracy", "predicted"])
def test_a_measured_prior_is_of_the_images_that_the_label_is_asked_of(stand_in_run: Run, prior: str) -> None:
    clean = torch.tensor([[8, 1, 2], [1, 7, 2], [1, 2, 6]])
    robust = torch.tensor([[4, 3, 3], [3, 2, 4], [3, 5, 3]])
    method = LogitAdjustment(prior=prior, tau=0.5)
    for objective, both, expected in (
        (Standard(), ClassTally(clean, None), clean),
        (Trades(), ClassTally(clean, robust), clean),
        (PGDAT(), ClassTally(clean, robust), robust),
        (PGDAT(), ClassTally(None, robust), robust),
        (BAT(), ClassTally(clean, robust), clean),
    ):
        run = replace(stand_in_run(objective=objective), train=both, epoch=1)
        slow = (reference.accuracy if prior == "accuracy" else reference.predicted_counts)(expected.tolist())
        found = method.at_epoch({}, run)["shift"].tolist()
        assert found == pytest.approx(reference.log_prior(slow, 0.5), rel=1e-9)


@pytest.mark.parametrize("prior", ["accuracy", "predicted"])
@pytest.mark.parametrize("decay", [0.0, 0.8, 1.0])
def test_earlier_epochs_count_less_by_the_decay(stand_in_run: Run, prior: str, decay: float) -> None:
    method, rng = LogitAdjustment(prior=prior, decay=decay), torch.Generator().manual_seed(0)
    state = method.at_epoch({}, stand_in_run())
    sums = [[0.0] * 3 for _ in range(3)]
    for epoch in range(1, 4):
        counts = torch.randint(0, 9, (3, 3), generator=rng) + 1
        state = method.at_epoch(state, replace(stand_in_run(epoch=epoch), train=ClassTally(counts, None)))
        sums = [[decay * a + b for a, b in zip(*rows, strict=True)] for rows in zip(sums, counts.tolist(), strict=True)]
        slow = (reference.accuracy if prior == "accuracy" else reference.predicted_counts)(sums)
        assert state["shift"].tolist() == pytest.approx(reference.log_prior(slow, 1), rel=1e-9)


@pytest.mark.parametrize("prior", ["accuracy", "predicted"])
def test_a_measured_prior_begins_with_the_second_epoch(stand_in_run: Run, prior: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        shift = LogitAdjustment(prior=prior).at_epoch({}, stand_in_run())["shift"]
    assert float(shift.max() - shift.min()) == 0


@pytest.mark.parametrize(
    "given", [(0.5, 0.25, 0.25), [0.5, 0.25, 0.25], torch.tensor([0.5, 0.25, 0.25]), "0.5, 0.25, 0.25", "(0.5,.25,.25)"]
)
def test_numbers_are_read_in_every_form(given: Any) -> None:
    assert LogitAdjustment(prior=given).prior == (0.5, 0.25, 0.25)
    assert hash(LogitAdjustment(prior=given)) == hash(LogitAdjustment(prior=(0.5, 0.25, 0.25)))


def test_a_composition_names_words_in_any_spelling_and_numbers_as_text() -> None:
    _, (word,) = read_composition("standard + logit-adjustment(prior=Predicted, tau=2)")
    _, (numbers,) = read_composition('standard + logit-adjustment(prior="3, 2, 1")')
    assert word == LogitAdjustment(prior="predicted", tau=2)
    assert numbers == LogitAdjustment(prior=(3, 2, 1))


# What it sets, and what is refused


def test_it_sets_the_shift_and_nothing_else(stand_in_run: Run) -> None:
    batch, run = batch_of(), stand_in_run()
    method = LogitAdjustment(prior=COUNTS)
    edited = method.prepare(batch, method.at_epoch({}, run), run)
    assert replace(edited, shift=None) == batch
    assert edited.shift is not None
    assert edited.shift.dtype == batch.x.dtype
    assert method.hooks() == ["prepare", "at_epoch"]


@pytest.mark.parametrize("objective", [MART(), ARoW()], ids=lambda objective: objective.name)
def test_it_is_refused_where_no_shift_is_read(objective: Objective) -> None:
    with pytest.raises(ConflictError, match=f"logit-adjustment sets batch.shift, but {objective.name} does not read"):
        compose(objective, [LogitAdjustment()])


def test_one_method_at_a_time_moves_weight_between_classes() -> None:
    with pytest.raises(ConflictError, match=r"class-balanced and logit-adjustment both set role\.class_weight"):
        compose(Standard(), [ClassBalanced(), LogitAdjustment()])
    compose(Standard(), [ClassBalanced(), LogitAdjustment()], allow=frozenset({"role.class_weight"}))
    with pytest.raises(
        ConflictError, match=r"logit-adjustment sets batch\.shift, and class-balanced replaces the term"
    ):
        compose(Standard(), [ClassBalanced(kind="focal"), LogitAdjustment()], allow=frozenset({"role.class_weight"}))


@pytest.mark.parametrize(
    "wrong",
    ["count", "", "1", "0.5, x", (1.0, 0.0), (1.0, -1.0), torch.tensor([1.0, 0.0]), (1.0,)],
)
def test_a_wrong_prior_is_refused(wrong: Any) -> None:
    with pytest.raises(
        ConfigError, match=r"^logit-adjustment: prior must be counts, accuracy, predicted, or a positive"
    ):
        LogitAdjustment(prior=wrong)


def test_other_wrong_values_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"^logit-adjustment: tau must be"):
        LogitAdjustment(tau=-1)
    with pytest.raises(ConfigError, match=r"^logit-adjustment: decay must be in \[0, 1\]"):
        LogitAdjustment(decay=1.1)
    with pytest.raises(ConfigError, match=r"^logit-adjustment: prior must be a valid string or a list"):
        LogitAdjustment(prior=(1.0, float("inf")))
    with pytest.raises(ConfigError, match=r"^logit-adjustment: prior must be"):
        read_composition("standard + logit-adjustment(prior=3)")


def test_classes_that_do_not_fit_are_refused_before_the_first_step(tiny_net: Net, tiny_data: Data) -> None:
    def train(method: LogitAdjustment, counts: tuple[int, ...]) -> None:
        model = tiny_net()
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        try:
            fit(model, tiny_data(counts), Standard(), methods=[method], validation=0, select="last")
        finally:
            assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())

    with pytest.raises(ConfigError, match="logit-adjustment: prior must be 3 numbers, one a class, got 2"):
        train(LogitAdjustment(prior=(1, 2)), (4, 4, 4))
    for prior in ("counts", "accuracy"):
        with (
            pytest.warns(RobustFairWarning, match="no training image of class class 1"),
            pytest.raises(ConfigError, match=f"got '{prior} without an image of class 1'. Give a positive number"),
        ):
            train(LogitAdjustment(prior=prior), (4, 0, 4))
    for prior in ("predicted", (1, 1, 1)):
        LogitAdjustment(prior=prior).check_classes(torch.tensor([4, 0, 4]))


def test_equal_counts_are_said_in_training_once(tiny_net: Net, tiny_data: Data) -> None:
    def said(counts: tuple[int, ...], **rest: Any) -> list[str]:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            options: dict[str, Any] = {"validation": 0, "select": "last", "schedule": Schedule(epochs=2, batch_size=6)}
            fit(tiny_net(), tiny_data(counts), Standard(), methods=[LogitAdjustment()], **options)
        return [str(each.message) for each in caught if "logit-adjustment" in str(each.message)]

    assert said((5, 5, 5)) == [
        "logit-adjustment moves all logits alike, since all classes have the same prior: it changes nothing; give "
        "another prior"
    ]
    assert said((5, 5, 4)) == []


def test_a_prior_of_large_numbers_is_that_of_their_ratios() -> None:
    for largest in (1.0, 1e200, 1.7e308):
        assert log_prior(torch.tensor([largest, largest, largest / 2], dtype=torch.float64)).exp().tolist() == (
            pytest.approx([0.4, 0.4, 0.2], rel=1e-9)
        )
