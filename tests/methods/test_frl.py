from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from reference import frl as reference
from reference.runs import BRIEF
from robustfair.attacks.pgd import pgd
from robustfair.data import ImageDataset, Splits
from robustfair.errors import ConfigError, ConflictError, DataError, RobustFairWarning
from robustfair.losses import MaximiseCE
from robustfair.methods import CCM, CCR, EMA, FRL, WAT, Method, compose
from robustfair.methods.frl import class_weights, projected, radius_factors, violations
from robustfair.metrics import confusion_pred_true
from robustfair.objectives import MART, PGDAT, Trades
from robustfair.runs.checkpoint import read_state
from robustfair.runs.composition import plan_of
from robustfair.runs.recipe import Recipe, read_recipe
from robustfair.runs.run import prepare, train
from robustfair.runs.stages import run_stages
from robustfair.training import Schedule, fit
from robustfair.values import Attack, Batch, ClassTally, Loss, State

Net = Callable[..., nn.Module]
Data = Callable[..., ImageDataset]
Run = Callable[..., Any]
Predictions = tuple[list[int], list[int], list[int]]

VARIANTS: tuple[Any, ...] = ("rw", "rm", "rwrm")
NAMES = ("lam_nat", "lam_bdy", "lam_eps")
LAM = (0.0, 0.02, 0.0, 0.3, 0.1, 0.2, 0.0, 0.0, 0.0, 0.0)


def close(found: Tensor, expected: Any) -> None:
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-12)


def drawn(seed: int, classes: int = 4, images: int = 60) -> Predictions:
    """Clean and attacked predictions of images with their labels, no class without any."""
    rng = torch.Generator().manual_seed(seed)
    y = torch.cat([torch.arange(classes), torch.randint(classes, (images - classes,), generator=rng)])
    shown = [torch.where(torch.rand(images, generator=rng) < part, y, (y + 1) % classes) for part in (0.8, 0.5)]
    return shown[0].tolist(), shown[1].tolist(), y.tolist()


def tally_of(predictions: Predictions) -> ClassTally:
    clean, robust, y = (torch.tensor(each) for each in predictions)
    classes = int(y.max()) + 1
    robust = torch.where(clean == y, robust, clean)
    return ClassTally(confusion_pred_true(clean, y, classes), confusion_pred_true(robust, y, classes))


def batch_of(b: int = 9, *, dtype: torch.dtype = torch.float64) -> Batch:
    rng = torch.Generator().manual_seed(0)
    x = torch.rand(b, 1, 5, 5, generator=rng, dtype=dtype)
    x_adv = (x + 0.1 * torch.randn(x.shape, generator=rng, dtype=dtype)).clamp(0, 1)
    return Batch(x=x, y=torch.arange(b) % 3, index=torch.arange(b), seed=1, x_adv=x_adv)


def state_of(nat: Any = (0.0,) * 3, bdy: Any = (0.0,) * 3, eps: Any = (0.0,) * 3) -> dict[str, Tensor]:
    return {n: torch.tensor(lam, dtype=torch.float64) for n, lam in zip(NAMES, (nat, bdy, eps), strict=True)}


# Multipliers, weights, radii


def test_the_published_vectors() -> None:
    lam = projected(torch.tensor(LAM, dtype=torch.float64), 0.5)
    close(lam, reference.projected(LAM, 0.5))
    assert lam.tolist() == pytest.approx([0, 0.016129, 0, 0.241935, 0.080645, 0.161290, 0, 0, 0, 0], abs=5e-7)
    expected = [0.05, 0.066129, 0.05, 0.291935, 0.130645, 0.211290, 0.05, 0.05, 0.05, 0.05]
    assert class_weights(lam).tolist() == pytest.approx(expected, abs=1e-6)
    lam_eps = torch.tensor([-0.2, -0.005, 0, 0.05, 0.1, 0.3, 0.6, 1], dtype=torch.float64)
    expected = [0.98, 0.990050, 1, 1.105171, 1.221403, 1.822119, 3, 3]
    assert radius_factors(lam_eps, 0.98, 3.0).tolist() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("positive_part", [False, True])
def test_multipliers_are_those_of_the_loop_over_epochs(stand_in_run: Run, variant: Any, positive_part: bool) -> None:
    """On random predictions in six epochs, the rate halved twice; the sum passes `lim` on the way."""
    settings: dict[str, Any] = {"variant": variant, "rate1": 1.2, "rate2": 0.3, "lim": 0.4, "halve_every": 2}
    method = FRL(tau1=0.02, tau2=0.03, positive_part=positive_part, **settings)
    shown = [drawn(seed) for seed in range(6)]
    measured = [reference.violations(*each, 0.02, 0.03) for each in shown]
    expected = reference.multipliers(measured, positive_part=positive_part, **settings)
    assert variant == "rm" or any(sum(bdy) == pytest.approx(0.4) for _, bdy, _ in expected)
    state: State = {}
    for epoch, each in enumerate(shown):
        for found, wanted in zip(violations(tally_of(each), 0.02, 0.03), measured[epoch], strict=True):
            close(found, wanted)
        state = method.at_epoch(state, stand_in_run(epoch=epoch, validation=tally_of(each)))
        assert tuple(state) == method.played
        for name, wanted in zip(NAMES, expected[epoch], strict=True):
            close(state.get(name, torch.zeros(4, dtype=torch.float64)), wanted)
    for name, lam in state.items():
        weights, wanted = class_weights(lam), reference.class_weights(lam.tolist())
        close(weights, wanted)
        close(radius_factors(lam, 0.98, 3.0), reference.radius_factors(lam.tolist()))
        if name != "lam_eps":
            assert float(weights.sum()) == pytest.approx(1, abs=1e-12)
            assert float(weights.min()) >= (1 - 0.4) / 4 - 1e-12
            close(class_weights(lam + 7.0), weights.tolist())


def test_the_rate_is_halved_as_epochs_count_from_one(stand_in_run: Run) -> None:
    """Epoch 40 is the first at half the rate, 80 the first at a quarter; without it the rate stays."""
    for epoch, share in ((0, 1.0), (38, 1.0), (39, 0.5), (78, 0.5), (79, 0.25)):
        run = stand_in_run(epoch=epoch, epochs=100)
        gained = FRL().at_epoch({}, run)
        nat, bdy = (g.clamp(min=0) for g in violations(run.validation, 0.05, 0.05))
        close(gained["lam_nat"], (share * 0.05 * nat).tolist())
        close(gained["lam_bdy"], (share * 0.1 * bdy).tolist())
        close(FRL(halve_every=None).at_epoch({}, run)["lam_nat"], (0.05 * nat).tolist())


def test_errors_add_up() -> None:
    """Natural and boundary error are the robust error; on balanced images the classes' means are the totals."""
    counts = tally_of(drawn(1))
    natural, boundary = violations(counts, 0.0, 0.0)
    assert counts.robust_pred_true is not None
    average = counts.robust_pred_true.diagonal().sum().double() / counts.robust_pred_true.sum()
    close(natural + boundary, (average - counts.robust).tolist())
    balanced = drawn(2)
    even = [0, 1, 2, 3] * 15
    found = violations(tally_of((balanced[0], balanced[1], even)), 0.0, 0.0)
    assert [float(g.mean()) for g in found] == pytest.approx([0, 0], abs=1e-12)


def test_constraints_that_are_met_leave_the_weights_even_and_shrink_radii(stand_in_run: Run) -> None:
    method, run = FRL(tau1=0.9, tau2=0.9), stand_in_run()
    state = method.at_epoch(method.at_epoch({}, run), replace(run, epoch=1))
    assert all(torch.equal(state[name], torch.zeros(3, dtype=torch.float64)) for name in NAMES[:2])
    assert bool((state["lam_eps"] < 0).all())
    still = FRL(tau1=0.9, tau2=0.9, positive_part=True).at_epoch({}, run)
    assert all(torch.equal(still[name], torch.zeros(3, dtype=torch.float64)) for name in NAMES)


def test_a_class_above_the_threshold_gains_weight_and_radius(stand_in_run: Run) -> None:
    """Class 0 of the run's counts has the largest boundary error, class 1 the largest natural one."""
    method, run = FRL(), stand_in_run()
    state: State = {}
    for epoch in range(3):
        state = method.at_epoch(state, replace(run, epoch=epoch))
    assert int(class_weights(state["lam_nat"]).argmax()) == 1
    assert int(class_weights(state["lam_bdy"]).argmax()) == int(state["lam_eps"].argmax()) == 0


def test_the_boundary_that_no_epoch_follows_measures_nothing(stand_in_run: Run) -> None:
    run = stand_in_run(epoch=10, validation=None)
    state = state_of(nat=(0.1, 0.0, 0.2))
    assert FRL().at_epoch(state, run) is state


# The loss and the attack


def test_the_loss_is_the_loop_over_examples(tiny_net: Net, stand_in_run: Run) -> None:
    """Also where a class is missing from the batch: the weights of those that are there count."""
    state = state_of(nat=(0.1, 0.0, 0.3), bdy=(0.0, 0.25, 0.05))
    whole = batch_of()
    for shown in (slice(None), [0, 2, 3, 5, 8], [1]):
        batch = replace(whole, x=whole.x[shown], y=whole.y[shown], x_adv=whole.x_adv[shown])  # type: ignore[index]
        model = tiny_net(dtype=torch.float64).eval()
        found = FRL().loss(Trades(beta=1.5)(model, batch), batch, state, stand_in_run())
        with torch.no_grad():
            clean, adv = model(batch.x).tolist(), model(batch.x_adv).tolist()
        y, lam = batch.y.tolist(), [state[name].tolist() for name in NAMES[:2]]
        assert found.total().item() == pytest.approx(reference.loss(clean, adv, y, *lam, 1.5), rel=1e-6)
        assert [float(found.coef[term].mean()) for term in ("label", "consistency")] == pytest.approx([1.0, 1.5])


def test_without_multipliers_it_is_trades(tiny_net: Net, stand_in_run: Run) -> None:
    """Loss, gradient and attack; and a constant added to a multiplier changes nothing."""
    batch, objective = batch_of(), Trades(beta=1.5)
    for state in (state_of(), state_of(nat=(0.2,) * 3, bdy=(0.1,) * 3)):
        model, twin = tiny_net(dtype=torch.float64), tiny_net(dtype=torch.float64)
        ours = FRL().loss(objective(model, batch), batch, state, stand_in_run()).total()
        plain = objective(twin, batch).total()
        torch.testing.assert_close(ours, plain, rtol=1e-12, atol=0)
        gradients = (torch.autograd.grad(total, list(m.parameters())) for total, m in ((ours, model), (plain, twin)))
        for a, b in zip(*gradients, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
        attack = objective.attack(batch)
        edited = FRL().attack(attack, batch, state, stand_in_run())
        assert torch.equal(edited.eps, attack.eps)
        assert torch.equal(edited.step_size, attack.step_size)


def test_a_batch_of_classes_without_weight_has_no_loss_and_no_nan(tiny_net: Net, stand_in_run: Run) -> None:
    """With lim 1 all weight may go to one class, and that need not be in a batch."""
    state, model = state_of(nat=(0.0, 1.0, 0.0), bdy=(0.0, 1.0, 0.0)), tiny_net(dtype=torch.float64)
    assert class_weights(state["lam_nat"]).tolist() == pytest.approx([0, 1, 0], abs=1e-15)
    batch = replace(batch_of(4), y=torch.tensor([0, 0, 2, 0]))
    loss = FRL(lim=1.0).loss(Trades()(model, batch), batch, state, stand_in_run()).total()
    assert loss.item() == pytest.approx(0, abs=1e-12)
    for slope in torch.autograd.grad(loss, list(model.parameters())):
        assert bool(slope.isfinite().all())


def test_radii_follow_the_class_and_the_step_the_largest_of_the_batch(stand_in_run: Run) -> None:
    state = state_of(eps=(-0.2, 0.05, 0.6))
    for shown, largest in (([0, 1, 2, 0], 3.0), ([0, 1, 1], 1.105171), ([0, 0], 0.98)):
        batch = replace(batch_of(len(shown)), y=torch.tensor(shown))
        for objective in (Trades(), Trades(step_size=0.007), Trades(norm="l2")):
            attack = objective.attack(batch)
            edited = FRL().attack(attack, batch, state, stand_in_run())
            factors = reference.radius_factors(state["lam_eps"].tolist())
            assert edited.eps.tolist() == pytest.approx([objective.radius * factors[y] for y in shown])
            assert edited.step_size.tolist() == pytest.approx([objective.step * largest] * len(shown))
            assert replace(edited, eps=attack.eps, step_size=attack.step_size) == attack
        quarter = FRL().attack(Trades().attack(batch), batch, state, stand_in_run())
        assert quarter.step_size.tolist() == pytest.approx([float(quarter.eps.max()) / 4] * len(shown))
    wide = FRL(smallest_radius=0.5, largest_radius=4.0)
    batch = batch_of(3)
    edited = wide.attack(Trades().attack(batch), batch, state, stand_in_run())
    expected = [8 / 255 * factor for factor in (0.670320, 1.105171, 3.320117)]
    assert edited.eps.tolist() == pytest.approx(expected)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_variant_claims_what_it_edits(stand_in_run: Run, variant: Any) -> None:
    radius, terms = {"attack.eps", "attack.step_size"}, {"loss.label", "role.class_weight"}
    expected = {"rw": terms | {"loss.consistency"}, "rm": radius | terms, "rwrm": radius | terms | {"loss.consistency"}}
    assert FRL(variant=variant).claims == expected[variant]
    frozen = FRL(variant="rm", freeze_natural=True)
    assert frozen.claims == radius
    assert list(frozen.at_epoch({}, stand_in_run())) == ["lam_eps"]


def test_the_sums_of_a_batch_are_over_all_processes(tiny_net: Net, stand_in_run: Run) -> None:
    """Two processes with a part of a batch each: their factors and steps are those of the whole."""
    batch, state = batch_of(9), state_of(nat=(0.3, 0.0, 0.1), bdy=(0.0, 0.2, 0.0), eps=(0.5, 0.0, 0.1))
    one, two = [0, 3, 6, 1], [2, 4, 5, 7, 8]
    weights = [class_weights(state[name])[batch.y] for name in NAMES[:2]]
    whole = FRL().loss(Trades()(tiny_net(), batch), batch, state, stand_in_run())
    for rows, others in ((one, two), (two, one)):
        part = replace(batch, x=batch.x[rows], y=batch.y[rows], x_adv=batch.x_adv[rows])  # type: ignore[index]
        run, sums = stand_in_run(), iter([torch.stack([w[others].sum(), torch.tensor(len(others))]) for w in weights])
        run.total = lambda own, sums=sums: own + next(sums)
        found = FRL().loss(Trades()(tiny_net(), part), part, state, run)
        for term in ("label", "consistency"):
            torch.testing.assert_close(found.coef[term], whole.coef[term][rows])
    alone = replace(batch, x=batch.x[[1]], y=batch.y[[1]])
    run = stand_in_run()
    run.total = lambda own: own + torch.tensor([4.0, 0.0, 0.0], dtype=own.dtype)
    edited = FRL().attack(Trades(eps=0.1).attack(alone), alone, state, run)
    assert edited.eps.tolist() == pytest.approx([0.1])
    assert edited.step_size.tolist() == pytest.approx([0.025 * 2.718282], rel=1e-6)


# In training


class Watch(Method):
    """Keeps what FRL made of every step, and the predictions on validation images at every boundary."""

    name = "watch"

    def __init__(self) -> None:
        self.steps: list[list[Any]] = []
        self.shown: list[Predictions] = []

    def at_epoch(self, state: State, run: Any) -> State:
        clean, robust, labels = [], [], []
        for batch in run.batches("validation"):
            eps = torch.full((len(batch.y),), 0.1, dtype=batch.x.dtype)
            pgd_m = Attack(eps=eps, step_size=eps / 4, steps=20, goal=MaximiseCE(), start="uniform", mode="eval")
            x_adv = pgd(run.engine.eager, batch.x, batch.y, pgd_m, batch.rng("attack"))
            clean += run.predict(batch.x).argmax(1).tolist()
            robust += run.predict(x_adv).argmax(1).tolist()
            labels += batch.y.tolist()
        self.shown.append((clean, robust, labels))
        return state

    def attack(self, attack: Attack, batch: Batch, state: State, run: Any) -> Attack:
        self.steps.append([run.epoch, batch.y.tolist(), attack.eps.tolist(), float(attack.step_size[0])])
        return attack

    def loss(self, loss: Loss, batch: Batch, state: State, run: Any) -> Loss:
        self.steps[-1] += [loss.coef["label"].tolist(), loss.coef["consistency"].tolist()]
        return loss


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_run_is_that_of_the_reference_from_the_first_epoch_on(tiny_net: Net, tiny_data: Data, variant: Any) -> None:
    """Multipliers before each of three epochs from the weights of that moment; factors in every step."""
    watch, settings = Watch(), {"variant": variant, "rate1": 0.7, "rate2": 3.0, "lim": 0.5}
    fit(
        tiny_net(dtype=torch.float64),
        tiny_data((20, 12, 16), noise=110),
        Trades(beta=1.5, eps=0.1, steps=2),
        methods=[FRL(**settings), watch],  # type: ignore[arg-type]
        schedule=Schedule(epochs=3, lr=0.1, batch_size=11),
        validation=0.4,
        select="last",
    )
    measured = [reference.violations(*each, 0.05, 0.05) for each in watch.shown[:3]]
    expected = reference.multipliers(measured, **settings)
    assert len({str(each) for each in expected}) == 3, "each epoch measures other weights"
    assert len(watch.steps) == 9
    for epoch, y, eps, step, label, consistency in watch.steps:
        nat, bdy, lam_eps = expected[epoch]
        factors = reference.radius_factors(lam_eps)
        assert eps == pytest.approx([0.1 * factors[c] for c in y], rel=1e-6)
        assert step == pytest.approx(0.025 * max(factors[c] for c in y), rel=1e-6)
        for lam, coef, beta in ((nat, label, 1.0), (bdy, consistency, 1.5)):
            own = [reference.class_weights(lam)[c] for c in y]
            assert coef == pytest.approx([beta * w * len(y) / sum(own) for w in own], rel=1e-6)


# What it goes on from

STILL = "  lr: 0.0\n  weight_decay: 0.0\n"


def recipe(tmp_path: Path, text: str, **flags: Any) -> Recipe:
    (tmp_path / "recipe.yaml").write_text(BRIEF + text)
    return read_recipe(str(tmp_path / "recipe.yaml"), flags)


def parameters(folder: Path) -> dict[str, Tensor]:
    weights = read_state(folder / "checkpoints", ()).weights
    return {name: tensor for name, tensor in weights.items() if "running" not in name and "tracked" not in name}


@pytest.fixture(scope="module")
def robust(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A run of stages: TRADES, then FRL from it, at a rate of 0."""
    root = tmp_path_factory.mktemp("frl")
    stages = f"stages:\n- train: trades(beta=6)\n- train: trades(beta=1.5) + frl(rate2=2)\n{STILL}"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ROBUSTFAIR_CACHE", str(root / "cache"))
        run_stages(recipe(root, stages), root / "run")
        yield root / "run" / "stages"


def test_a_recipe_trains_trades_and_then_frl_from_it(robust: Path) -> None:
    first, second = robust / "1-train", robust / "2-train"
    before, after = parameters(first), parameters(second)
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    state = read_state(second / "checkpoints", ()).methods["frl"]
    assert set(state) == set(NAMES)
    assert bool(state["lam_eps"].abs().max() > 0), "the first boundary has moved it"
    own = read_recipe(str(second / "recipe.yaml"), {})
    assert (own.train, own.start) == ("trades(beta=1.5) + frl(rate2=2)", str(first))


@pytest.mark.parametrize("start", ["", "/checkpoints/last/weights.safetensors"])
def test_frl_starts_from_a_run_or_a_weight_file(robust: Path, tmp_path: Path, start: str) -> None:
    """It measures the weights that it is given: the multipliers are those of the stage that began with the same."""
    flags = {"start": f"{robust / '1-train'}{start}", "lr": 0.0, "weight_decay": 0.0}
    train(recipe(tmp_path, "train: trades(beta=1.5) + frl(rate2=2)\n", **flags), tmp_path / "run")
    before, after = parameters(robust / "1-train"), parameters(tmp_path / "run")
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    ours, theirs = (
        read_state(folder / "checkpoints", ()).methods["frl"] for folder in (tmp_path / "run", robust / "2-train")
    )
    assert all(torch.equal(ours[name], theirs[name]) for name in NAMES)


def test_from_scratch_it_says_so_in_one_line(robust: Path, tmp_path: Path) -> None:
    (remark,) = prepare(recipe(tmp_path, "train: trades + frl\n")).remarks
    assert remark.startswith("frl goes on from a model that is robust already, and this run starts from scratch")
    assert prepare(recipe(tmp_path, "train: trades + frl\n", start=str(robust / "1-train"))).remarks == []


def test_a_start_that_held_out_other_images_is_warned_of(robust: Path, tmp_path: Path) -> None:
    start = {"start": str(robust / "1-train")}
    with pytest.warns(RobustFairWarning, match="held out other validation images than this run does") as caught:
        train(recipe(tmp_path, "train: trades + frl\n", validation=0.5, **start), tmp_path / "run")
    assert len(caught) == 1
    for other in ({"validation": 0.25}, {"validation": 0.0}):
        flags = {**start, **other}
        train(recipe(tmp_path, "train: trades\n", **flags), tmp_path / f"run-{other['validation']}")


# Misuse


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"tau1": -0.01}, r"frl: tau1 must be in \[0, 1\], got -0.01"),
        ({"tau2": 1.5}, r"frl: tau2 must be in \[0, 1\], got 1.5"),
        ({"tau1": float("nan")}, "frl: tau1"),
        ({"lim": 0.0}, r"frl: lim must be in \(0, 1\], got 0"),
        ({"lim": 1.01}, "frl: lim"),
        ({"rate1": -1.0}, "frl: rate1"),
        ({"rate2": float("inf")}, "frl: rate2"),
        ({"halve_every": 0}, "frl: halve_every"),
        ({"smallest_radius": 1.1}, "frl: smallest_radius"),
        ({"largest_radius": 0.9}, "frl: largest_radius"),
        ({"variant": "rwr"}, "frl: variant must be 'rw' or 'rm' or 'rwrm'"),
        ({"freeze_natural": True}, "frl: freeze_natural must be false unless variant is rm"),
    ],
)
def test_bad_settings_are_refused(args: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        FRL(**args)


def test_what_it_cannot_act_on_or_beside_is_refused() -> None:
    with pytest.raises(ConflictError, match="frl needs the loss term 'consistency', and pgd-at has only label: use"):
        compose(PGDAT(), [FRL()])
    with pytest.raises(ConflictError, match="frl measures on held out images and this run has none: set validation"):
        compose(Trades(), [FRL()], validation=False)
    for other, claim in ((CCM(), "attack.eps"), (CCR(), "loss.consistency"), (WAT(), "role.class_weight")):
        with pytest.raises(ConflictError, match=f"both set {claim}"):
            compose(Trades(), [FRL(), other])
    compose(Trades(), [FRL(), EMA()])
    compose(MART(), [FRL()])
    compose(Trades(), [FRL(variant="rw"), CCM()])
    compose(Trades(), [FRL(variant="rm", freeze_natural=True), WAT()])
    assert plan_of("trades(beta=1.5) + frl(variant=rw, tau1=0.07)").methods == (FRL(variant="rw", tau1=0.07),)


@pytest.mark.filterwarnings("ignore:tiny. no training image")
def test_a_class_without_validation_images_is_refused_before_the_first_step(tiny_net: Net, tiny_data: Data) -> None:
    """A single image of a class is trained on; and a data set of its own may lack one."""
    took: list[int] = []
    options: dict[str, Any] = {"schedule": Schedule(epochs=1, lr=0.1, batch_size=7), "select": "last"}
    options |= {"on_step": lambda epoch, step: took.append(step)}
    lacking = tiny_data((10, 0, 8))
    for method in (FRL(), WAT()):
        message = f"tiny: no validation image of class class 1, and {method.name} would measure every class on them"
        for data, validation in ((tiny_data((10, 1, 8)), 0.25), (tiny_data(), lacking), (lacking, 0.25)):
            with pytest.raises(DataError, match=message):
                fit(tiny_net(), data, Trades(steps=1), methods=[method], validation=validation, **options)
    assert took == []
    fit(tiny_net(), tiny_data((10, 1, 8)), Trades(steps=1), methods=[EMA()], validation=0.25, **options)


def test_a_recipe_of_such_data_is_refused_before_its_folder_is_made(
    tiny_data: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = tiny_data((10, 1, 8))
    monkeypatch.setattr("robustfair.runs.run.load_dataset", lambda *args, **rest: Splits(train=data, test=data))
    with pytest.raises(DataError, match="no validation image of class class 1, and frl would measure"):
        train(recipe(tmp_path, "train: trades + frl\n"), tmp_path / "run")
    assert not (tmp_path / "run").exists()
