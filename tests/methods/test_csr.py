from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from reference import awp as awp_reference
from reference import csr as reference
from reference import losses
from robustfair.data import ImageDataset
from robustfair.errors import ConfigError, ConflictError
from robustfair.methods import AWP, CCR, CSR, LabelSmoothing, Method, Run, compose
from robustfair.methods.csr import confused_with, shifted, spectral_gradient, spread
from robustfair.metrics import spectral_norm_confusion
from robustfair.objectives import NFGSM, PGDAT, Objective, Standard, Trades
from robustfair.runs.composition import read_composition
from robustfair.training import Schedule, fit
from robustfair.training.state import TrainState
from robustfair.values import Batch, Loss, State

Net = Callable[..., nn.Module]
Data = Callable[..., ImageDataset]
MakeRun = Callable[..., Any]

NO_RUN: Any = None
VECTOR = torch.tensor([[0.0, 10, 30], [20, 0, 5], [40, 15, 0]])
MODES: list[dict[str, Any]] = [
    {"mode": "official"},
    {"mode": "official", "gamma": 0.1},
    {"mode": "official", "gamma": 0.4, "gamma_kind": "additive"},
    {"mode": "paper"},
    {"mode": "paper", "gamma": 0.1},
    {"mode": "paper", "gamma": 0.3, "gamma_kind": "relative"},
]


def random_confusion(classes: int, seed: int) -> Tensor:
    """Shares of errors: some zero, a zero diagonal, every class at another level."""
    rng = torch.Generator().manual_seed(seed)
    errors = torch.rand(classes, classes, generator=rng, dtype=torch.float64)
    errors = errors * (torch.rand(classes, classes, generator=rng) < 0.7) * torch.rand(classes, generator=rng)
    return errors.fill_diagonal_(0.0)


def batch_of(b: int = 30, classes: int = 3, *, seed: int = 0) -> Batch:
    rng = torch.Generator().manual_seed(seed)
    x = torch.rand(b, 1, 5, 5, generator=rng, dtype=torch.float64)
    x_adv = (x + 0.2 * torch.randn(x.shape, generator=rng, dtype=torch.float64)).clamp(0, 1)
    y = torch.randint(classes, (b,), generator=rng)
    return Batch(x=x, y=y, index=torch.arange(b), seed=1, x_adv=x_adv)


def measured(run: Any, method: CSR) -> tuple[list[list[float]], list[int]]:
    """The errors of the run's images under the attack of the pass, counted one by one, and the class sizes."""
    logits, labels = [], []
    kind = method.gamma_kind or ("relative" if method.mode == "official" else "additive")
    attacked = "x_adv" in run.objective.reads

    def attack_on(batch: Batch) -> Any:
        return replace(run.objective.evaluation_attack(batch), start="uniform-unclipped")

    for batch in run.batches("train", attack_on if attacked else None):
        logits += run.predict(batch.x_adv if attacked else batch.x).tolist()
        labels += batch.y.tolist()
    return reference.confusion(logits, labels, run.num_classes, method.gamma, kind)


@pytest.fixture
def spectral_run(tiny_net: Net, stand_in_run: MakeRun) -> MakeRun:
    """A function that builds a run in float64 with 40 images, on which every class is confused with another."""

    def build(objective: Objective, *, sizes: tuple[int, ...] = (25, 15), **rest: Any) -> Any:
        rng = torch.Generator().manual_seed(5)
        images = tuple(torch.rand(b, 1, 5, 5, generator=rng, dtype=torch.float64) for b in sizes)
        model = tiny_net(dtype=torch.float64)
        with torch.no_grad():
            model.head.bias -= model.eval()(torch.cat(images)).mean(0)  # type: ignore[union-attr]
        return stand_in_run(model=model.train(), objective=objective, images=images, **rest)

    return build


# The spectral gradient


def test_the_published_vector() -> None:
    sigma, u, v = reference.top_vectors(VECTOR.tolist())
    assert torch.linalg.svdvals(VECTOR.double()).tolist() == pytest.approx([47.121064, 31.203122, 7.481343], abs=1e-6)
    assert (sigma, u, v) == (
        pytest.approx(47.121064, abs=1e-6),
        pytest.approx([0.160932, 0.412890, 0.896450], abs=1e-6),
        pytest.approx([0.936222, 0.319519, 0.146270], abs=1e-6),
    )
    ours = spectral_gradient(VECTOR)
    assert ours.flatten().tolist() == pytest.approx([a * b for a in u for b in v], abs=1e-12)
    expected = [[0.321691, 0.078359, 0.01], [0.900034, 0.275739, 0.100357], [2.01, 0.654554, 0.273773]]
    for row, published in zip(spread(ours).tolist(), expected, strict=True):
        assert row == pytest.approx(published, abs=1e-6)


@pytest.mark.parametrize("classes", [2, 3, 10, 30])
@pytest.mark.parametrize("seed", range(5))
def test_it_is_the_product_of_the_top_singular_vectors(classes: int, seed: int) -> None:
    errors = random_confusion(classes, seed)
    if not bool((errors > 0).any()):
        return
    sigma, u, v = reference.top_vectors(errors.tolist())
    ours = spectral_gradient(errors)
    torch.testing.assert_close(ours, torch.tensor(reference.outer(u, v), dtype=torch.float64), rtol=0, atol=1e-6)
    assert bool((ours >= 0).all())
    assert float((ours * errors).sum()) == pytest.approx(sigma, rel=1e-10), "u^T C v is the norm"
    assert float(torch.linalg.matrix_norm(errors, 2)) == pytest.approx(sigma, rel=1e-10)
    left, _, right = torch.linalg.svd(errors)
    torch.testing.assert_close(ours, left[:, :1] @ right[:1], rtol=0, atol=1e-9)  # a common sign cancels


def test_it_is_the_derivative_of_the_norm_in_every_entry() -> None:
    errors, h = random_confusion(6, 3), 1e-6
    ours = spectral_gradient(errors)
    for i in range(6):
        for j in range(6):
            ends = []
            for sign in (1, -1):
                moved = errors.clone()
                moved[i, j] += sign * h
                ends.append(float(torch.linalg.matrix_norm(moved, 2)))
            assert (ends[0] - ends[1]) / (2 * h) == pytest.approx(float(ours[i, j]), abs=1e-7)


def test_scale_and_axes_of_the_counts() -> None:
    errors = random_confusion(8, 1)
    ours = spectral_gradient(errors)
    for scale in (1e-6, 0.1, 5000.0):
        torch.testing.assert_close(spectral_gradient(scale * errors), ours, rtol=0, atol=1e-12)
        torch.testing.assert_close(spread(spectral_gradient(scale * errors)), spread(ours), rtol=0, atol=1e-10)
    torch.testing.assert_close(spectral_gradient(errors.T), ours.T, rtol=0, atol=1e-12)
    torch.testing.assert_close(spread(spectral_gradient(errors.T)), spread(ours).T, rtol=0, atol=1e-10)


@pytest.mark.parametrize("seed", range(4))
def test_weights_lie_between_their_ends(seed: int) -> None:
    weights = spread(spectral_gradient(random_confusion(10, seed)))
    assert float(weights.min()) == pytest.approx(0.01, abs=1e-15)
    assert float(weights.max()) == pytest.approx(2.01, abs=1e-12)
    assert weights.tolist() == [
        pytest.approx(row, abs=1e-9) for row in reference.spread(spectral_gradient(random_confusion(10, seed)).tolist())
    ]


def test_norms_bound_each_other() -> None:
    for seed in range(20):
        errors = random_confusion(10, seed)
        one, two, top = (float(torch.linalg.matrix_norm(errors, ord)) for ord in (1, 2, torch.inf))
        assert two <= math.sqrt(one * top) + 1e-12
        assert one <= math.sqrt(10) * two + 1e-12


@pytest.mark.parametrize(
    "errors",
    [[[0.0, 0.3], [0.3, 0.0]], [[0, 0.2, 0, 0], [0.2, 0, 0, 0], [0, 0, 0, 0.2], [0, 0, 0.2, 0]]],
    ids=["two classes", "two pairs"],
)
def test_where_the_top_value_is_not_simple_some_top_vectors_are_taken(errors: list[list[float]]) -> None:
    matrix = torch.tensor(errors, dtype=torch.float64)
    ours = spectral_gradient(matrix)
    assert bool((ours >= 0).all())
    assert float((ours * matrix).sum()) == pytest.approx(float(torch.linalg.matrix_norm(matrix, 2)), rel=1e-12)
    assert float(torch.linalg.matrix_norm(ours)) == pytest.approx(1)


@pytest.mark.parametrize("classes", [3, 10, 100])
def test_confusion_that_is_the_same_everywhere_weighs_all_alike(classes: int) -> None:
    """In the code this is 0 / 0, or rounding blown up to the whole range."""
    even = torch.full((classes, classes), 0.1, dtype=torch.float64).fill_diagonal_(0.0)
    assert torch.equal(spread(spectral_gradient(even)), torch.ones(classes, classes, dtype=torch.float64))


# Which images are confused


@pytest.mark.parametrize("kind", ["additive", "relative"])
@pytest.mark.parametrize("gamma", [0.0, 0.1, 0.5])
def test_images_are_confused_as_one_by_one(kind: Any, gamma: float) -> None:
    rng = torch.Generator().manual_seed(2)
    z = torch.randn(200, 4, generator=rng, dtype=torch.float64)
    y = torch.randint(4, (200,), generator=rng)
    moved = shifted(z, y, gamma, kind)
    assert moved.tolist() == [
        reference.shifted(*pair, gamma, kind) for pair in zip(z.tolist(), y.tolist(), strict=True)
    ]
    expected = [reference.confused_with(*pair, gamma, kind) for pair in zip(z.tolist(), y.tolist(), strict=True)]
    assert confused_with(moved, y).tolist() == expected
    assert 40 < sum(i != j for i, j in zip(expected, y.tolist(), strict=True)) < 200


def test_the_relative_shift_helps_a_negative_logit() -> None:
    z, y = torch.tensor([[-1.0, -0.95]]), torch.tensor([0])
    assert confused_with(z, y).tolist() == [1]
    assert confused_with(shifted(z, y, 0.1, "relative"), y).tolist() == [0]
    assert confused_with(shifted(z, y, 0.1, "additive"), y).tolist() == [1]


def test_a_tie_is_a_confusion() -> None:
    assert confused_with(torch.zeros(3, 3), torch.arange(3)).tolist() == [1, 0, 0]


# The pass over the training images


@pytest.mark.parametrize("settings", MODES, ids=str)
@pytest.mark.parametrize("text", ["trades(eps=0.1)", "pgd-at(eps=0.1, norm=l2)", "standard", "n-fgsm(eps=0.1)"])
def test_the_state_is_what_a_count_one_by_one_gives(spectral_run: MakeRun, text: str, settings: dict[str, Any]) -> None:
    run, method = spectral_run(read_composition(text)[0]), CSR(**settings)
    state = method.at_epoch({}, run)
    counts, sizes = measured(run, method)
    _, u, v = reference.top_vectors(reference.rates(counts, sizes))
    gradient = reference.outer(u, v)
    if method.mode == "official":
        expected = reference.spread(gradient)
    else:
        scale = [sum(sizes) / size for size in sizes]
        expected = [[0 if i == j else gradient[i][j] * scale[j] for j in range(3)] for i in range(3)]
    torch.testing.assert_close(
        state["weights_pred_true"], torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-6
    )
    assert state["alpha"].item() == 0.3
    assert sum(map(sum, counts)) > 3


def test_the_gradient_is_that_of_the_norm_the_audit_reports(spectral_run: MakeRun) -> None:
    """The metric `spectral_norm` of a report and the method speak of the same matrix."""
    run, method = spectral_run(Trades(eps=0.1)), CSR()
    counts, sizes = measured(run, method)
    sigma, *_ = reference.top_vectors(reference.rates(counts, sizes))
    whole = torch.tensor(counts) + torch.diag(torch.tensor(sizes) - torch.tensor(counts).sum(0))
    assert spectral_norm_confusion(whole) == pytest.approx(sigma, rel=1e-10)


@pytest.mark.parametrize("sizes", [(25, 15), (22,)])
def test_counts_point_as_rates_do_only_on_balanced_classes(spectral_run: MakeRun, sizes: tuple[int, ...]) -> None:
    run = spectral_run(Standard(), sizes=sizes)
    counts, of_class = measured(run, CSR())
    _, u, v = reference.top_vectors([[float(count) for count in row] for row in counts])
    raw = CSR(normalise=False).at_epoch({}, run)["weights_pred_true"]
    expected = torch.tensor(reference.spread(reference.outer(u, v)), dtype=torch.float64)
    torch.testing.assert_close(raw, expected, rtol=0, atol=1e-6)
    assert not torch.equal(raw, CSR().at_epoch({}, run)["weights_pred_true"]), of_class
    balanced = spectral_run(Standard(), sizes=(24, 15))
    pair = [CSR(normalise=n).at_epoch({}, balanced)["weights_pred_true"] for n in (True, False)]
    torch.testing.assert_close(*pair, rtol=0, atol=1e-10)


def test_the_pass_is_pgd_10_on_cross_entropy_or_the_attack_of_training(spectral_run: MakeRun) -> None:
    run = spectral_run(NFGSM(eps=0.1, attack_mode="train"))
    seen: list[Any] = []
    batches = run.batches

    def watching(split: str, attack: Any = None) -> Any:
        def watched(batch: Batch) -> Any:
            seen.append(attack(batch))
            return seen[-1]

        return batches(split, None if attack is None else watched)

    run.batches = watching
    CSR().at_epoch({}, run)
    assert {(attack.steps, attack.start, attack.ball, type(attack.goal).__name__) for attack in seen} == {
        (10, "uniform-unclipped", True, "MaximiseCE")
    }
    assert float(seen[0].step_size[0]) == pytest.approx(0.025)
    seen.clear()
    CSR(adversary="training").at_epoch({}, run)
    own = run.objective.attack(next(iter(batches("train"))))
    assert [replace(a, eps=own.eps, step_size=own.step_size) for a in seen] == [own] * 2


def test_a_share_of_the_images_is_the_first_of_the_epoch(spectral_run: MakeRun) -> None:
    sizes = (10, 10, 10, 10)
    whole, part = spectral_run(Standard(), sizes=sizes), spectral_run(Standard(), sizes=sizes)
    part.images = part.images[:2]
    expected = CSR().at_epoch({}, part)["weights_pred_true"]
    for share in (0.3, 0.5):
        taken = CSR(share=share).at_epoch({}, whole)["weights_pred_true"]
        assert torch.equal(taken, expected)
    assert not torch.equal(CSR(share=0.51).at_epoch({}, whole)["weights_pred_true"], expected)


def test_it_counts_anew_every_few_epochs_and_not_after_the_last(spectral_run: MakeRun) -> None:
    old: dict[str, Tensor] = {"weights_pred_true": torch.zeros(3, 3), "alpha": torch.zeros(())}
    for refresh, epoch, anew in ((1, 0, True), (1, 3, True), (3, 0, True), (3, 1, False), (3, 3, True), (1, 10, False)):
        run = spectral_run(Standard(), epoch=epoch)
        state = CSR(refresh=refresh).at_epoch(old, run)
        assert (state is not old) == anew, (refresh, epoch)


def test_counts_are_totals_over_processes(spectral_run: MakeRun, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another process that has seen one confusion more moves the weights of this one."""
    run = spectral_run(Standard())
    alone = CSR(mode="paper").at_epoch({}, run)["weights_pred_true"]
    other = torch.tensor([[0, 9, 0], [0, 0, 0], [0, 0, 0]])
    monkeypatch.setattr(run, "total", lambda part: part + other, raising=False)
    together = CSR(mode="paper").at_epoch({}, run)["weights_pred_true"]
    counts, sizes = measured(run, CSR(mode="paper"))
    counts[0][1] += 9
    sizes[1] += 9
    _, u, v = reference.top_vectors(reference.rates(counts, sizes))
    assert float(together[0, 1]) == pytest.approx(u[0] * v[1] * sum(sizes) / sizes[1], abs=1e-6)
    assert not torch.equal(alone, together)


@pytest.mark.parametrize("mode", ["official", "paper"])
def test_a_class_without_images_does_not_disturb_the_others(spectral_run: MakeRun, mode: Any) -> None:
    run = spectral_run(Standard())

    def without_class_2(split: str, attack: Any = None) -> Any:
        for x in run.images:
            yield Batch(x=x, y=torch.arange(len(x)) % 2, index=torch.arange(len(x)), seed=0)

    run.batches = without_class_2
    weights = CSR(mode=mode).at_epoch({}, run)["weights_pred_true"]
    assert bool(torch.isfinite(weights).all())
    assert weights[:, 2].tolist() == [0.01 if mode == "official" else 0.0] * 3
    assert float(weights[:, :2].max()) > 1


# The loss


@pytest.mark.parametrize("settings", MODES, ids=str)
@pytest.mark.parametrize("base", ["trades", "standard", "pgd-at"])
def test_the_loss_is_the_formula_and_the_loop(spectral_run: MakeRun, base: str, settings: dict[str, Any]) -> None:
    objective = read_composition(base)[0]
    run, method, batch = spectral_run(objective), CSR(alpha=0.3, **settings), batch_of()
    state = method.at_epoch({}, run)
    counts, sizes = measured(run, method)
    plain = objective(run.model, batch)
    loss = method.loss(plain, batch, state, run)
    logits = plain.out.clean if base == "standard" else plain.out.adv
    assert logits is not None
    rows, labels = logits.tolist(), batch.y.tolist()
    _, u, v = reference.top_vectors(reference.rates(counts, sizes))
    gradient = reference.outer(u, v)
    label = plain.terms["label"].mean().item()
    rest = plain.total().item() - label
    if method.mode == "official":
        expected = 0.7 * label + rest + 0.3 * reference.official_regulariser(rows, labels, reference.spread(gradient))
    else:
        kind = method.gamma_kind or "additive"
        expected = label + rest + 0.3 * reference.paper_regulariser(rows, labels, gradient, sizes, method.gamma, kind)
    assert loss.total().item() == pytest.approx(expected, abs=1e-6)
    assert abs(loss.total().item() - plain.total().item()) > 1e-3


def test_over_all_training_images_the_papers_term_is_the_sum_over_cells(spectral_run: MakeRun) -> None:
    """The batch estimator averages to sum_ij u_i v_j L_ij, whatever the sizes of the classes."""
    run, method = spectral_run(Standard(), sizes=(31,)), CSR(mode="paper", gamma=0.1)
    state = method.at_epoch({}, run)
    (batch,) = run.batches("train")
    with torch.no_grad():
        logits = run.predict(batch.x)
        loss = method.loss(Standard()(run.predict, batch), batch, state, run)
    counts, sizes = measured(run, method)
    assert len(set(sizes)) > 1
    _, u, v = reference.top_vectors(reference.rates(counts, sizes))
    expected = reference.surrogate(logits.tolist(), batch.y.tolist(), reference.outer(u, v), sizes, 0.1)
    assert float(loss.terms["spectral"].mean()) == pytest.approx(expected, abs=1e-6)


def test_the_gradient_of_the_official_term_is_that_of_weighted_cross_entropy(spectral_run: MakeRun) -> None:
    run, batch = spectral_run(Trades()), batch_of()
    state = CSR().at_epoch({}, run)
    plain = Trades()(run.model, batch)
    loss = CSR().loss(plain, batch, state, run)
    adv = plain.out.adv
    assert adv is not None
    weights = state["weights_pred_true"].tolist()
    expected = [
        [weights[reference.confused_with(z, y)][y] * g / len(batch.y) for g in losses.cross_entropy_gradient(z, y)]
        for z, y in zip(adv.tolist(), batch.y.tolist(), strict=True)
    ]
    (ours,) = torch.autograd.grad(loss.terms["spectral"].mean(), adv)
    torch.testing.assert_close(ours, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-6)


def test_correct_images_contribute_under_official_alone(spectral_run: MakeRun) -> None:
    run, batch = spectral_run(PGDAT()), batch_of(60)
    loss = PGDAT()(run.model.eval(), batch)
    assert loss.out.adv is not None
    right = confused_with(loss.out.adv, batch.y) == batch.y
    assert 5 < int(right.sum()) < 55
    for mode, contribute in (("official", True), ("paper", False)):
        method = CSR(mode=mode)  # type: ignore[arg-type]
        term = method.loss(loss, batch, method.at_epoch({}, run), run).terms["spectral"]
        (slopes,) = torch.autograd.grad(term, loss.out.adv, retain_graph=True)
        moved = slopes.abs().amax(1) > 0
        assert bool(moved[right].any()) == contribute
        assert bool(moved[~right].all())


@pytest.mark.parametrize("settings", MODES, ids=str)
@pytest.mark.parametrize("keep", [None, True, False])
def test_alpha_zero_is_the_base_loss(spectral_run: MakeRun, settings: dict[str, Any], keep: bool | None) -> None:
    run, batch = spectral_run(Trades()), batch_of()
    method = CSR(alpha=0.0, keep_base_weight=keep, **settings)
    plain = Trades()(run.model, batch)
    loss = method.loss(plain, batch, method.at_epoch({}, run), run)
    assert torch.equal(loss.total(), plain.total())


@pytest.mark.parametrize("mode", ["official", "paper"])
def test_without_errors_the_term_is_left_out_and_the_base_is_whole(spectral_run: MakeRun, mode: Any) -> None:
    run, batch, method = spectral_run(PGDAT()), batch_of(), CSR(mode=mode)
    run.predict = lambda x: 5 * torch.eye(3)[torch.arange(len(x)) % 3]
    state = method.at_epoch({}, run)
    plain = PGDAT()(run.model, batch)
    loss = method.loss(plain, batch, state, run)
    assert torch.equal(loss.total(), plain.total())
    assert bool(torch.isfinite(state["weights_pred_true"]).all())
    slopes = torch.autograd.grad(loss.total(), list(run.model.parameters()))
    assert all(bool(torch.isfinite(slope).all()) for slope in slopes)


@pytest.mark.parametrize(
    ("settings", "label"),
    [
        ({}, 0.7),
        ({"keep_base_weight": True}, 1.0),
        ({"mode": "paper"}, 1.0),
        ({"mode": "paper", "keep_base_weight": False}, 0.7),
        ({"alpha": 1.0}, 0.0),
        ({"alpha": 4.0, "mode": "paper"}, 1.0),
    ],
    ids=str,
)
def test_the_label_term_keeps_its_share(spectral_run: MakeRun, settings: dict[str, Any], label: float) -> None:
    run, batch, method = spectral_run(Trades(beta=6)), batch_of(), CSR(**settings)
    loss = method.loss(Trades(beta=6)(run.model, batch), batch, method.at_epoch({}, run), run)
    assert loss.coef["label"].unique().tolist() == pytest.approx([label])
    assert loss.coef["consistency"].unique().tolist() == [6]
    assert loss.coef["spectral"].unique().tolist() == pytest.approx([method.alpha])
    assert ("loss.label" in method.claims) == (label != 1.0)


def test_on_pgd_at_the_official_mode_is_a_weight_of_every_image(spectral_run: MakeRun) -> None:
    """(1 - alpha + alpha g) CE at x': what stands there for the clean cross-entropy of TRADES is the label term."""
    run, batch = spectral_run(PGDAT()), batch_of()
    state = CSR().at_epoch({}, run)
    plain = PGDAT()(run.model, batch)
    loss = CSR().loss(plain, batch, state, run)
    assert plain.out.adv is not None
    g = state["weights_pred_true"][confused_with(plain.out.adv, batch.y), batch.y]
    expected = (0.7 + 0.3 * g) * plain.terms["label"] + 0.3 * g * g.log()
    torch.testing.assert_close(loss.total(), expected.mean(), rtol=0, atol=1e-9)


def test_soft_and_shifted_labels_are_those_of_the_label_term(spectral_run: MakeRun) -> None:
    run, smoothing = spectral_run(PGDAT()), LabelSmoothing(amount=0.3)
    batch = smoothing.examples(batch_of(), smoothing.at_epoch({}, run), run)
    batch = replace(batch, shift=torch.tensor([0.3, -0.2, 0.0], dtype=torch.float64))
    state = CSR(mode="paper").at_epoch({}, run)
    plain = PGDAT()(run.model, batch)
    loss = CSR(mode="paper").loss(plain, batch, state, run)
    assert plain.out.adv is not None
    g = state["weights_pred_true"][confused_with(plain.out.adv, batch.y), batch.y]
    torch.testing.assert_close(loss.terms["spectral"], (g * plain.terms["label"]).mean())


@pytest.mark.parametrize("text", ["wat", "faal", "class-balanced", "fair-ard"])
@pytest.mark.parametrize("settings", MODES[::3], ids=str)
def test_weights_of_classes_are_of_the_loss_and_leave_the_term_as_it_is(
    spectral_run: MakeRun, text: str, settings: dict[str, Any]
) -> None:
    """The two stand beside each other as a sum, and 1 - alpha enters once, in whatever order they are listed."""
    run, batch, csr = spectral_run(PGDAT()), batch_of(), CSR(**settings)
    _, (weighing,) = read_composition(f"pgd-at + {text}")
    assert isinstance(weighing, Method)
    states = {method.name: method.at_epoch({}, run) for method in (csr, weighing)}
    if "weight" in states[text]:  # there are no counts of an epoch, and as many images of every class
        states[text] = {"weight": torch.tensor([0.8, 1.0, 2.0], dtype=torch.float64)}

    def loss(*methods: Method) -> Loss:
        found = PGDAT()(run.model, batch)
        for method in methods:
            found = method.loss(found, batch, states[method.name], run)
        return found

    weights = loss(weighing).weight
    assert float((weights - 1).abs().max()) > 0.05
    label, term = loss().terms["label"], loss(csr).terms["spectral"]
    kept = 1.0 if settings["mode"] == "paper" else 0.7
    expected = kept * (weights * label).mean() + 0.3 * term
    for order in ((csr, weighing), (weighing, csr)):
        torch.testing.assert_close(loss(*order).total(), expected, rtol=1e-9, atol=0)


def test_logits_in_half_precision_are_raised_to_float32(spectral_run: MakeRun) -> None:
    run, batch = spectral_run(PGDAT()), batch_of()
    state = CSR(mode="paper", gamma=0.1).at_epoch({}, run)
    plain = PGDAT()(lambda x: run.model(x).to(torch.bfloat16), batch)
    loss = CSR(mode="paper", gamma=0.1).loss(plain, batch, state, run)
    assert {term.dtype for term in loss.terms.values()} == {torch.float32}


# With others, and in training


def test_beside_awp_the_step_is_taken_at_weights_moved_by_the_plain_loss(tiny_net: Net, tiny_data: Data) -> None:
    """The order of the AWP script: perturb along the gradient of plain TRADES, step with the regularised loss there."""
    seen: list[Batch] = []

    class Watch(Method):
        name = "watch"

        def after_step(self, state: State, batch: Batch, loss: Loss, run: Run) -> State:
            seen.append(batch)
            return state

    schedule = Schedule(epochs=1, lr=0.1, batch_size=36, weight_decay=0.01)
    methods = [CSR(), AWP(gamma=0.05), Watch()]
    settings: dict[str, Any] = {"schedule": schedule, "validation": 0, "select": "last"}
    state = fit(tiny_net(), tiny_data(), Trades(eps=0.1, steps=2), methods=methods, **settings).state
    (batch,), weights = seen, state.methods["csr"]["weights_pred_true"].tolist()

    def plain(network: nn.Module) -> Tensor:
        return awp_reference.loss(network, batch.x, batch.x_adv, batch.y, objective="trades", beta=6.0)

    twin = tiny_net().train()
    v = awp_reference.perturbation(twin, plain, gamma=0.05, rate=0.01)
    with torch.no_grad():
        for name, weight in twin.named_parameters():
            weight += v[name]
    adv = twin(batch.x_adv)
    g = [weights[reference.confused_with(z, y)][y] for z, y in zip(adv.tolist(), batch.y.tolist(), strict=True)]
    spectral = (torch.tensor(g) * nn.functional.cross_entropy(adv, batch.y, reduction="none")).mean()
    label = nn.functional.cross_entropy(twin(batch.x), batch.y)
    slopes = awp_reference.gradients(twin, plain(twin) - 0.3 * label + 0.3 * spectral)
    for name, weight in twin.named_parameters():
        stepped = weight - v[name] - schedule.lr_at(0, 0, 1) * (slopes[name] + 0.01 * weight)
        torch.testing.assert_close(state.weights[name], stepped.detach(), rtol=1e-4, atol=1e-5)
    assert min(g) < 0.5 < 1.5 < max(g)


def test_with_what_it_composes() -> None:
    for text in ("trades + csr + awp + ema", "pgd-at + csr + ccm", "standard + csr", "bat + csr", "n-fgsm + csr + ema"):
        objective, methods = read_composition(text)
        compose(objective, methods)
    with pytest.raises(ConflictError, match=r"csr and ccr both set loss\.label|ccr and csr both set loss\.label"):
        compose(Trades(), [CSR(), CCR()])
    compose(Trades(), [CSR(keep_base_weight=True), CCR()])
    compose(Trades(), [CSR(mode="paper"), CCR()])


@pytest.mark.parametrize("text", ["csr(refresh=2)", "csr(mode=paper, gamma=0.1)", "csr(share=0.5)"])
def test_a_run_of_three_epochs_resumes_anywhere(
    tiny_net: Net, tiny_data: Data, differences: Callable[..., list[str]], text: str
) -> None:
    objective, methods = read_composition(f"bat(eps=0.1, steps=2) + {text}")
    states: list[TrainState] = []
    schedule = Schedule(epochs=3, lr=0.1, batch_size=7)
    settings: dict[str, Any] = {"schedule": schedule, "validation": 0, "select": "last"}
    whole = fit(tiny_net(), tiny_data(), objective, methods=methods, save=states.append, **settings)
    for state in states:
        resumed = fit(tiny_net(), tiny_data(), objective, methods=methods, resume=state, **settings)
        assert differences(whole.state, resumed.state) == []


def test_the_pass_moves_nothing_but_its_state(tiny_net: Net, tiny_data: Data) -> None:
    """alpha 0 counts confusions and trains as if it were not there, bit for bit, batch norm included."""
    schedule = Schedule(epochs=2, lr=0.1, batch_size=7)
    settings: dict[str, Any] = {"schedule": schedule, "validation": 0, "select": "last"}
    objective = Trades(eps=0.1, steps=2)
    alone = fit(tiny_net(), tiny_data(), objective, **settings).state
    beside = fit(tiny_net(), tiny_data(), objective, methods=[CSR(alpha=0.0)], **settings).state
    assert all(torch.equal(tensor, beside.weights[name]) for name, tensor in alone.weights.items())


# Bad input


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mode": "both"}, r"csr: mode must be 'official' or 'paper', got 'both'"),
        ({"alpha": -0.1}, r"csr: alpha must be a finite number >= 0, got -0\.1"),
        (
            {"alpha": 1.1},
            r"csr: alpha must be in \[0, 1\] where the label term keeps .*got 1\.1.*keep_base_weight=true",
        ),
        ({"alpha": 1.1, "mode": "paper", "keep_base_weight": False}, r"csr: alpha must be in \[0, 1\]"),
        ({"gamma": -0.1}, "csr: gamma must be a finite number >= 0"),
        ({"gamma": math.nan}, "csr: gamma must be"),
        ({"gamma_kind": "squared"}, "csr: gamma_kind must be"),
        ({"refresh": 0}, "csr: refresh must be"),
        ({"share": 0.0}, r"csr: share must be in \(0, 1\], got 0"),
        ({"share": 1.5}, "csr: share must be"),
        ({"adversary": "cw"}, "csr: adversary must be"),
        ({"normalise": False, "mode": "paper"}, "csr: normalise must be true in mode paper, .*got False"),
    ],
    ids=str,
)
def test_bad_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        CSR(**settings)


def test_a_weight_of_nothing_is_remarked_upon() -> None:
    assert CSR().remark(2) is None
    assert CSR(alpha=0.0).remark(2) == "csr(alpha=0) does nothing but count confusions: drop csr"
