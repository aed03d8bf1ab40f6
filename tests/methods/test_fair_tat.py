from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from scipy.stats import chisquare
from torch import Tensor, nn

from reference import attacks
from reference import fair_tat as reference
from reference import friendly_at as friendly
from robustfair.attacks.pgd import pgd
from robustfair.data import ImageDataset
from robustfair.errors import ConfigError, ConflictError
from robustfair.losses import MaximiseCE, MinimiseCE
from robustfair.methods import CCM, CCR, EMA, FAWA, FairTAT, FriendlyAT, Method, Run, compose
from robustfair.methods.fair_tat import drawn, target_laws
from robustfair.objectives import FGSMAT, MART, PGDAT, ARoW, Objective, Standard, Trades
from robustfair.runs.composition import read_composition
from robustfair.training import Schedule, fit
from robustfair.values import Attack, Batch, ClassTally, State

Net = Callable[..., nn.Module]
Data = Callable[..., ImageDataset]
MakeRun = Callable[..., Any]

SCORES = [0.1, 0.2, 0.3, 0.4]
COUNTS = torch.tensor([[5, 1, 0], [3, 4, 2], [0, 3, 6]])
"""Rows predicted, columns true: 9 errors, of which 1, 5, 3 fall to the classes in turn."""
EPS, STEPS = 0.2, 4
SETTINGS: dict[str, Any] = {"eps": EPS, "steps": STEPS, "step_size": 0.06}


def batch_of(b: int = 12, *, classes: int = 3, dtype: torch.dtype = torch.float64, seed: int = 1) -> Batch:
    x = torch.rand(b, 1, 6, 6, generator=torch.Generator().manual_seed(0), dtype=dtype)
    return Batch(x=x, y=torch.arange(b) % classes, index=torch.arange(b), seed=seed)


def one_by_one(counts: Tensor) -> tuple[list[int], list[int]]:
    """Predictions and labels of which these are the counts."""
    cells = [(p, y) for p, row in enumerate(counts.tolist()) for y, n in enumerate(row) for _ in range(n)]
    return [p for p, _ in cells], [y for _, y in cells]


def scores_of(counts: Tensor) -> list[float]:
    found = reference.false_positive_scores(*one_by_one(counts), len(counts))
    assert found is not None
    return found


def trained(stand_in_run: MakeRun, counts: Tensor = COUNTS, epoch: int = 1, **rest: Any) -> Any:
    run = stand_in_run(epoch=epoch, **rest)
    run.train = ClassTally(robust_pred_true=counts)
    return run


def state_of(method: FairTAT, run: Any) -> State:
    return method.at_epoch(method.at_epoch({}, replace(run, epoch=0, train=None)), run)


# Laws


def test_the_published_vectors() -> None:
    laws = target_laws(torch.tensor(SCORES, dtype=torch.float64))
    assert laws[0].tolist() == pytest.approx([0, 0.2222, 0.3333, 0.4444], abs=5e-5)
    assert laws[3].tolist() == pytest.approx([0.1667, 0.3333, 0.5, 0], abs=5e-5)
    softened = target_laws(torch.softmax(2 * torch.tensor(SCORES, dtype=torch.float64), 0))
    assert softened[0].tolist() == pytest.approx([0, 0.2693, 0.3289, 0.4018], abs=5e-5)
    assert softened[3].tolist() == pytest.approx([0.2693, 0.3289, 0.4018, 0], abs=5e-5)
    assert softened.tolist() == [pytest.approx(row) for row in reference.laws(reference.softened(SCORES, 2))]


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("sampling", ["cfps", "softmax", "uniform"])
def test_laws_are_those_of_predictions_counted_one_by_one(
    tiny_net: Net, stand_in_run: MakeRun, sampling: Any, seed: int
) -> None:
    rng = torch.Generator().manual_seed(seed)
    counts = torch.randint(0, 6, (7, 7), generator=rng) * torch.randint(0, 2, (7, 7), generator=rng)
    counts[:, seed] = 0  # a class without images
    run = trained(stand_in_run, counts, model=tiny_net(classes=7))
    run.num_classes = 7
    scores = scores_of(counts)
    assert sum(scores) == pytest.approx(1)
    assert min(scores) >= 0
    by = {"cfps": scores, "softmax": reference.softened(scores, 3), "uniform": [1.0] * 7}
    laws = state_of(FairTAT(sampling=sampling, softmax_scale=3), run)["law"]
    assert laws.tolist() == [pytest.approx(row, abs=1e-6) for row in reference.laws(by[sampling])]


def test_without_an_error_or_with_all_of_them_at_the_label_targets_are_uniform(stand_in_run: MakeRun) -> None:
    even = [pytest.approx(row) for row in reference.laws([1.0] * 3)]
    for sampling in ("cfps", "softmax"):
        run = trained(stand_in_run, torch.diag(torch.tensor([3, 4, 5])))
        assert state_of(FairTAT(sampling=sampling), run)["law"].tolist() == even
    only = state_of(FairTAT(), trained(stand_in_run, torch.tensor([[4, 3, 2], [0, 1, 0], [0, 0, 1]])))["law"]
    assert only.tolist() == [pytest.approx([0, 0.5, 0.5]), [1, 0, 0], [1, 0, 0]]


def test_the_first_epochs_are_uniform_with_equal_radii(stand_in_run: MakeRun) -> None:
    even = [pytest.approx(row) for row in reference.laws([1.0] * 3)]
    for begin in (1, 3):
        for epoch in range(5):
            run = trained(stand_in_run, epoch=epoch) if epoch else stand_in_run(epoch=0)
            state = FairTAT(begin=begin).at_epoch({}, run)
            assert (state["law"].tolist() == even) == (epoch < begin)
            assert (state["scale"].tolist() == [1.0] * 3) == (epoch < begin)


def test_errors_are_counted_in_training_or_on_validation_images(stand_in_run: MakeRun) -> None:
    run = trained(stand_in_run)
    for source, counts in (("training", COUNTS), ("validation", run.validation.robust_pred_true)):
        state = state_of(FairTAT(cfps_source=source), run)  # type: ignore[arg-type]
        assert state["law"].tolist() == [pytest.approx(row) for row in reference.laws(scores_of(counts))]
        assert state["scale"].tolist() == pytest.approx([0.5 + t for t in (5 / 8, 4 / 8, 6 / 8)])


# Draws


@pytest.mark.parametrize("law", [[0.0, 0.2, 0.3, 0.5], [0.97, 0.0, 0.02, 0.01], [0.25] * 4], ids=str)
def test_draws_follow_the_law(law: list[float]) -> None:
    n = 40_000
    found = drawn(torch.tensor(law).expand(n, -1), torch.Generator().manual_seed(0)).bincount(minlength=4)
    assert [bool(count) for count in found.tolist()] == [p > 0 for p in law]
    expected = [(int(count), p * n) for count, p in zip(found, law, strict=True) if p > 0]
    assert chisquare([count for count, _ in expected], [mean for _, mean in expected]).pvalue > 0.001


def test_clocks_that_ring_at_once_draw_no_class_of_probability_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "rand", lambda shape, **rest: torch.zeros(shape))
    assert drawn(torch.tensor([[0.0, 0.4, 0.6]]), torch.Generator()).item() in (1, 2)


@pytest.mark.parametrize("compat", ["intended", "official"])
@pytest.mark.parametrize("sampling", ["cfps", "softmax", "uniform"])
def test_a_target_is_never_the_label_and_never_a_class_without_score(
    stand_in_run: MakeRun, sampling: Any, compat: Any
) -> None:
    counts = torch.tensor([[5, 2, 3], [0, 4, 0], [0, 3, 6]])  # nothing is taken for class 1
    method = FairTAT(sampling=sampling, compat=compat)
    state, batch = state_of(method, trained(stand_in_run, counts)), batch_of(3000)
    target = method.attack(PGDAT().attack(batch), batch, state, stand_in_run()).target
    assert target is not None
    assert not bool((target == batch.y).any())
    assert bool((target == 1).any()) == (sampling != "cfps")
    found = torch.stack([target[batch.y == c].bincount(minlength=3) for c in range(3)]) / 1000
    assert found.tolist() == [pytest.approx(row, abs=0.06) for row in state["law"].tolist()]


def test_draws_are_keyed_by_the_batch_and_its_name(stand_in_run: MakeRun) -> None:
    method, batch, run = FairTAT(), batch_of(64), trained(stand_in_run)
    state = state_of(method, run)

    def targets(batch: Batch) -> list[int]:
        target = method.attack(PGDAT().attack(batch), batch, state, run).target
        assert target is not None
        return target.tolist()

    one = targets(batch)
    torch.manual_seed(7)
    assert targets(batch) == one
    assert targets(replace(batch, seed=2)) != one


def test_with_two_classes_the_target_is_the_other_one(tiny_net: Net, stand_in_run: MakeRun) -> None:
    run = trained(stand_in_run, torch.tensor([[3, 0], [0, 4]]), model=tiny_net(classes=2))
    run.num_classes = 2
    batch = batch_of(classes=2)
    for counts in ([[3, 0], [0, 4]], [[3, 1], [2, 4]], [[3, 2], [0, 4]]):
        run.train = ClassTally(robust_pred_true=torch.tensor(counts))
        attack = FairTAT().attack(PGDAT().attack(batch), batch, state_of(FairTAT(), run), run)
        assert torch.equal(attack.target, 1 - batch.y)


def test_with_two_classes_the_attack_is_the_untargeted_one(tiny_net: Net, stand_in_run: MakeRun) -> None:
    model, batch = tiny_net(classes=2, dtype=torch.float64).eval(), batch_of(classes=2)
    plain = PGDAT(**SETTINGS).attack(batch)
    method = FairTAT(adaptive_eps=False)
    run = stand_in_run(model=model)
    run.num_classes = 2
    targeted = method.attack(plain, batch, method.at_epoch({}, run), run)
    ends = [pgd(model, batch.x, batch.y, attack, batch.rng("attack")) for attack in (plain, targeted)]
    torch.testing.assert_close(*ends, rtol=0, atol=1e-12)
    assert (plain.goal, targeted.goal) == (MaximiseCE(), MinimiseCE())


def test_one_class_has_no_target(stand_in_run: MakeRun) -> None:
    run = stand_in_run()
    run.num_classes = 1
    with pytest.raises(ConfigError, match="fair-tat: classes must be at least 2, to have a target, got 1"):
        FairTAT().at_epoch({}, run)


# The attack


def edited(objective: Any, batch: Batch, run: Any, *methods: Method) -> Attack:
    plan = compose(objective, methods)
    states = {method.name: method.at_epoch({}, run) for method in methods}
    return plan.attacks(batch, states, run)["x_adv"]


@pytest.mark.parametrize(
    ("objective", "geometry"),
    [
        (PGDAT(**SETTINGS), "linf"),
        (PGDAT(**SETTINGS, start="zero"), "linf"),
        (Trades(**SETTINGS), "linf"),
        (MART(**SETTINGS), "linf"),
        (ARoW(**SETTINGS), "linf"),
        (FGSMAT(eps=EPS, step_size=0.06), "linf"),
        (PGDAT(norm="l2", eps=0.5, steps=STEPS, step_size=0.2), "l2-rice"),
        (Trades(norm="l2", eps=0.5, steps=STEPS), "l2-trades"),
    ],
    ids=lambda value: f"{value.name}-{value.norm}" if isinstance(value, Objective) else value,
)
def test_the_attack_descends_to_the_target_from_a_uniform_start_pixel_by_pixel(
    tiny_net: Net, stand_in_run: MakeRun, objective: Any, geometry: str
) -> None:
    model, batch = tiny_net(dtype=torch.float64).eval(), batch_of()
    run = trained(stand_in_run)
    attack = edited(objective, batch, run, FairTAT(lam=0.25))
    radii = reference.radii([5 / 8, 4 / 8, 6 / 8], 0.25, objective.radius)
    eps = [radii[label] for label in batch.y.tolist()]
    rng, x = batch.rng("attack"), batch.x
    if objective.norm == "linf":
        draw = torch.empty_like(x).uniform_(-1, 1, generator=rng)
        start = (x + draw * torch.tensor(eps, dtype=x.dtype)[:, None, None, None]).clamp(0, 1)
    else:
        direction = torch.empty_like(x).normal_(generator=rng)
        share = torch.empty_like(x[:, 0, 0, 0]).uniform_(0, 1, generator=rng)
        start = attacks.radial_start(x, direction, share * torch.tensor(eps, dtype=x.dtype), 1.0)
    steps = {"steps": objective.steps, "step_size": [objective.step] * len(x)}
    paths = attacks.pgd(
        model, x, batch.y, start, eps=eps, goal="target", geometry=geometry, target=attack.target, **steps
    )
    ours = pgd(model, x, batch.y, attack, batch.rng("attack"))
    torch.testing.assert_close(ours, attacks.last(paths, x), rtol=0, atol=1e-6)


@pytest.mark.parametrize("variant", ["official", "cfa"])
@pytest.mark.parametrize("objective", [PGDAT(**SETTINGS), Trades(**SETTINGS)], ids=["pgd-at", "trades"])
def test_friendly_training_counts_wrong_predictions_on_the_way_to_the_target(
    tiny_net: Net, stand_in_run: MakeRun, objective: Any, variant: Any
) -> None:
    model, batch = tiny_net(seed=3, dtype=torch.float64).eval(), batch_of()
    batch = replace(batch, y=torch.where(batch.index % 4 == 0, batch.y, model(batch.x).argmax(1)))
    run = trained(stand_in_run)
    methods = [FairTAT(adaptive_eps=False), FriendlyAT(tau=1, variant=variant)]
    for order in (methods, methods[::-1]):
        attack = edited(objective, batch, run, *order)
        draw = torch.empty_like(batch.x).uniform_(-1, 1, generator=batch.rng("attack"))
        start = batch.x + EPS * draw
        paths = friendly.attack(
            model,
            batch.x,
            batch.y,
            start,
            eps=[EPS] * len(batch.x),
            step_size=0.06,
            steps=STEPS,
            goal="target",
            tau=1,
            variant=variant,
            target=attack.target,
        )
        ours = pgd(model, batch.x, batch.y, attack, batch.rng("attack"))
        torch.testing.assert_close(ours, attacks.last(paths, batch.x), rtol=0, atol=1e-9)
        assert len({len(path) for path in paths}) > 1, "images stop at different steps"


def test_nothing_else_of_the_attack_moves(stand_in_run: MakeRun) -> None:
    batch, run = batch_of(), trained(stand_in_run)
    plain = Trades(norm="l2", eps=0.5).attack(batch)
    for adaptive in (True, False):
        method = FairTAT(adaptive_eps=adaptive)
        attack = method.attack(plain, batch, method.at_epoch({}, run), run)
        assert (attack.goal, attack.start) == (MinimiseCE(), "uniform")
        rest = {"goal": plain.goal, "start": plain.start, "target": None, "eps": plain.eps}
        assert replace(attack, **rest) == plain
        assert (attack.eps is plain.eps) == (not adaptive)


def test_radii_are_those_of_the_calibrated_margin(stand_in_run: MakeRun) -> None:
    batch, run = batch_of(), trained(stand_in_run)
    ours = FairTAT().attack(PGDAT().attack(batch), batch, FairTAT().at_epoch({}, run), run).eps
    ccm = CCM(lam=0.5, begin=1)
    assert torch.equal(ours, ccm.attack(PGDAT().attack(batch), batch, ccm.at_epoch({}, run), run).eps)


# The slips of the authors' code


def test_officially_a_target_alone_in_being_the_label_stays(stand_in_run: MakeRun) -> None:
    seen = set()
    for seed in range(200):
        method, batch, run = FairTAT(compat="official"), batch_of(3, seed=seed), trained(stand_in_run)
        target = method.attack(PGDAT().attack(batch), batch, method.at_epoch({}, run), run).target
        assert target is not None
        seen.add(int((target == batch.y).sum()))
    assert seen == {0, 1}


def test_officially_targets_stay_uniform_without_calibrated_radii(stand_in_run: MakeRun) -> None:
    even = [pytest.approx(row) for row in reference.laws([1.0] * 3)]
    for adaptive in (True, False):
        method = FairTAT(compat="official", adaptive_eps=adaptive)
        assert (state_of(method, trained(stand_in_run))["law"].tolist() == even) == (not adaptive)
        assert ("uniform targets to the end" in (method.remark(10) or "")) == (not adaptive)


# Composition and runs


def test_what_it_composes_with() -> None:
    for objective in (PGDAT(), Trades(), MART(), ARoW(), FGSMAT()):
        compose(objective, [FairTAT(), FriendlyAT(), FAWA(), EMA()])
    compose(Trades(), [FairTAT(), CCR()])
    compose(PGDAT(), [FairTAT(adaptive_eps=False), CCM()])
    with pytest.raises(ConflictError, match=r"fair-tat and ccm both set attack\.eps \(the class-wise radius\)"):
        compose(PGDAT(), [FairTAT(), CCM()])
    with pytest.raises(ConflictError, match=r"fair-tat needs attacked images, and standard trains without an attack"):
        compose(Standard(), [FairTAT()])


def test_validation_images_are_needed_where_errors_are_counted_on_them() -> None:
    compose(PGDAT(), [FairTAT()], validation=False)
    compose(PGDAT(), [FairTAT(cfps_source="validation", sampling="uniform")], validation=False)
    with pytest.raises(ConflictError, match="fair-tat measures on held out images and this run has none"):
        compose(PGDAT(), [FairTAT(cfps_source="validation")], validation=False)


class Watch(Method):
    """What an epoch counted, and the radii and targets of its steps."""

    name = "watch"

    def __init__(self) -> None:
        self.counts: list[ClassTally | None] = []
        self.steps: list[tuple[int, Attack, Batch]] = []

    def at_epoch(self, state: State, run: Run) -> State:
        self.counts.append(run.train)
        return state

    def attack(self, attack: Attack, batch: Batch, state: State, run: Run) -> Attack:
        self.steps.append((run.epoch, attack, batch))
        return attack


@pytest.mark.parametrize("objective", [PGDAT(eps=0.1, steps=2), Trades(beta=2, eps=0.1, steps=2)])
def test_a_run_follows_the_counts_of_its_last_epoch(tiny_net: Net, tiny_data: Data, objective: Any) -> None:
    watch = Watch()
    schedule = Schedule(epochs=3, lr=0.1, batch_size=7)
    methods = [FairTAT(), watch]
    options: dict[str, Any] = {"schedule": schedule, "validation": 0, "select": "last"}
    state = fit(tiny_net(), tiny_data((10, 8, 9)), objective, methods=methods, **options).state
    first, *later = watch.counts
    assert first is None
    for epoch, attack, batch in watch.steps:
        assert attack.target is not None
        assert not bool((attack.target == batch.y).any())
        counts = None if epoch == 0 else later[epoch - 1]
        assert counts is None or counts.robust_pred_true is not None
        robust = [0.5] * 3 if counts is None else counts.robust.tolist()
        expected = [reference.radii(robust, 0.5, 0.1)[label] for label in batch.y.tolist()]
        assert attack.eps.tolist() == pytest.approx(expected)
    last = state.train
    assert last is not None
    assert last.robust_pred_true is not None
    laws = reference.laws(scores_of(last.robust_pred_true))
    assert state.methods["fair-tat"]["law"].tolist() == [pytest.approx(row, abs=1e-6) for row in laws]


def test_what_would_do_nothing_is_remarked_upon() -> None:
    assert FairTAT(begin=5).remark(6) is None
    assert "begins at epoch 5 and this run ends after 5: targets stay uniform" in (FairTAT(begin=5).remark(5) or "")
    assert FairTAT(begin=5, sampling="uniform", adaptive_eps=False).remark(5) is None


@pytest.mark.parametrize(
    ("field", "wrong"),
    [
        ("sampling", "multinomial"),
        ("softmax_scale", -1),
        ("cfps_source", "test"),
        ("adaptive_eps", 1),
        ("lam", -0.5),
        ("begin", 0),
        ("compat", "code"),
    ],
)
def test_a_wrong_value_is_refused_with_owner_and_field(field: str, wrong: Any) -> None:
    with pytest.raises(ConfigError, match=f"^fair-tat: {field} must be"):
        FairTAT(**{field: wrong})
    with pytest.raises(ConfigError, match=f"^fair-tat: {field} must be"):
        read_composition(f"pgd-at + fair-tat({field}={wrong})")
