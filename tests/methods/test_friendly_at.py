from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from reference import attacks
from reference import friendly_at as reference
from robustfair.attacks.pgd import pgd
from robustfair.data import ImageDataset, evaluation_batches
from robustfair.errors import ConfigError, ConflictError
from robustfair.losses import MaximiseCE
from robustfair.methods import CCM, FriendlyAT, compose
from robustfair.methods.friendly_at import CFAStop
from robustfair.objectives import FGSMAT, MART, PGDAT, AdversarialObjective, ARoW, Standard, Trades
from robustfair.runs.composition import read_composition
from robustfair.training import Schedule, fit
from robustfair.training.state import TrainState
from robustfair.values import Attack, Batch, Stop, StopWhenWrong

Net = Callable[..., nn.Module]
Data = Callable[..., ImageDataset]
Run = Callable[..., Any]

EPS, STEPS = 0.2, 4
SETTINGS: dict[str, Any] = {"eps": EPS, "steps": STEPS, "step_size": 0.06}
OBJECTIVES: dict[str, tuple[AdversarialObjective, str]] = {
    "pgd-at": (PGDAT(**SETTINGS), "ce"),
    "trades": (Trades(**SETTINGS), "kl"),
    "mart": (MART(**SETTINGS), "ce"),
}
VARIANTS: tuple[Any, ...] = ("official", "cfa")


@dataclass(eq=False)
class Counted:
    """A stop rule that keeps who took each step."""

    stop: Stop
    took: list[Tensor] = field(default_factory=list)

    def start(self, y: Tensor) -> Tensor:
        return self.stop.start(y)

    def __call__(self, state: Tensor, logits: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        state, active = self.stop(state, logits, y)
        self.took.append(active)
        return state, active

    def steps(self) -> list[int]:
        """Per image."""
        return torch.stack(self.took).sum(0).tolist()


@dataclass
class Scene:
    """A network in eval mode and images near its boundaries, most of which it gets right."""

    model: nn.Module
    batch: Batch

    def attack(self, run: Run, objective: AdversarialObjective, *methods: Any) -> Attack:
        """The objective's attack as the methods leave it."""
        plan = compose(objective, methods)
        attack = plan.attacks(self.batch, plan.at_epoch({}, run(objective=objective)), run())["x_adv"]
        assert attack is not None
        return attack

    def ends(self, attack: Attack, **rest: Any) -> Tensor:
        return pgd(self.model, self.batch.x, self.batch.y, attack, self.batch.rng("attack"), **rest)

    def radii(self) -> Tensor:
        return torch.full_like(self.batch.x[:, 0, 0, 0], EPS)

    def draws(
        self, objective: AdversarialObjective, eps: Tensor | None = None, omega: float = 0.0
    ) -> tuple[Tensor, list[Tensor]]:
        """The start, before any projection, and the noise of every step, both out of the stream of the batch."""
        x, rng = self.batch.x, self.batch.rng("attack")
        eps = self.radii() if eps is None else eps
        if objective.name == "pgd-at":
            start = x + torch.empty_like(x).uniform_(-1, 1, generator=rng) * eps[:, None, None, None]
        else:
            start = x + 0.001 * torch.empty_like(x).normal_(generator=rng)
        return start, [omega * torch.empty_like(x).normal_(generator=rng) for _ in range(STEPS)]

    def paths(self, name: str, variant: str, tau: int, *, eps: Tensor | None = None, omega: float = 0.0) -> Any:
        """Iterates of every image by the loop."""
        objective, goal = OBJECTIVES[name]
        radius = self.radii() if eps is None else eps
        start, noise = self.draws(objective, radius, omega)
        x, y = self.batch.x, self.batch.y
        return reference.attack(
            self.model,
            x,
            y,
            start,
            eps=radius,
            step_size=0.06,
            steps=STEPS,
            goal=goal,
            tau=tau,
            variant=variant,
            noise=noise if omega else None,
        )


@pytest.fixture
def scene(tiny_net: Net, tiny_data: Data) -> Scene:
    model = tiny_net(seed=3, dtype=torch.float64).eval().requires_grad_(False)
    batch = next(evaluation_batches(tiny_data((4, 4, 4)), 12))
    batch = replace(batch, x=batch.x.double())
    model.head.bias -= model(batch.x).mean(0)
    y = model(batch.x).argmax(1)
    return Scene(model, replace(batch, y=torch.where(batch.index % 4 == 0, (y + 1) % 3, y)))


def counted(attack: Attack) -> tuple[Attack, Counted]:
    assert attack.stop is not None
    counter = Counted(attack.stop)
    return replace(attack, stop=counter), counter


# Against the loop over images


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_budget_equals_the_loop_over_images(scene: Scene, stand_in_run: Run, name: str, variant: Any) -> None:
    seen = set()
    for tau in range(STEPS + 2):
        attack = scene.attack(stand_in_run, OBJECTIVES[name][0], FriendlyAT(tau=tau, variant=variant))
        attack, counter = counted(attack)
        ours, paths = scene.ends(attack), scene.paths(name, variant, tau)
        torch.testing.assert_close(ours, attacks.last(paths, scene.batch.x), rtol=0, atol=1e-9)
        assert counter.steps() == [len(path) - 1 for path in paths]
        assert max(counter.steps()) <= STEPS
        seen.update(counter.steps())
    assert len(seen) >= 4, "images stop at many different steps"


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_budget_of_all_steps_is_plain_pgd_bit_for_bit(
    scene: Scene, stand_in_run: Run, name: str, variant: Any
) -> None:
    """Of images inside the box, where a Gaussian start needs no projection."""
    objective = OBJECTIVES[name][0]
    scene.batch = replace(scene.batch, x=0.1 + 0.8 * scene.batch.x)
    plain = scene.ends(scene.attack(stand_in_run, objective))
    for tau in (STEPS, STEPS + 1):
        attack = scene.attack(stand_in_run, objective, FriendlyAT(tau=tau, variant=variant))
        assert torch.equal(scene.ends(attack), plain)


def test_a_gaussian_start_is_projected_before_its_first_gradient(scene: Scene, stand_in_run: Run) -> None:
    """As in the authors' scripts for TRADES and MART; plain TRADES takes its first gradient where the noise leads."""
    objective = OBJECTIVES["trades"][0]
    start = scene.draws(objective)[0]
    assert not torch.equal(start, start.clamp(0, 1))
    plain = scene.ends(scene.attack(stand_in_run, objective), x_init=start.clamp(0, 1))
    for variant in VARIANTS:
        attack = scene.attack(stand_in_run, objective, FriendlyAT(tau=STEPS, variant=variant))
        assert torch.equal(scene.ends(attack), plain)
    stopped = scene.attack(stand_in_run, objective, FriendlyAT(tau=0, variant="cfa"))
    assert torch.equal(scene.ends(stopped), start.clamp(0, 1))


@pytest.mark.parametrize("name", OBJECTIVES)
def test_tau_zero_takes_no_step_where_all_is_wrong_and_under_cfa_anywhere(
    scene: Scene, stand_in_run: Run, name: str
) -> None:
    objective = OBJECTIVES[name][0]
    start = scene.draws(objective)[0].clamp(0, 1)
    official, cfa = (scene.attack(stand_in_run, objective, FriendlyAT(tau=0, variant=variant)) for variant in VARIANTS)
    assert torch.equal(scene.ends(cfa), start)
    assert not torch.equal(scene.ends(official), start)
    scene.model.head.bias += torch.tensor([0.0, 0.0, 1e3])
    scene.batch = replace(scene.batch, y=torch.arange(12) % 2)
    official, counter = counted(official)
    assert torch.equal(scene.ends(official), start)
    assert counter.steps() == [0] * 12


def sawtooth(x: Tensor) -> Tensor:
    """Two logits of one pixel s: z_1 - z_0 rises with s but falls back from 1/2 to -1/2 at every multiple of 0.1."""
    s = x[:, 0, 0, 0] / 0.1
    gap = s - s.floor() - 0.5
    return torch.stack([torch.zeros_like(gap), gap], dim=1)


def test_an_image_that_is_right_again_after_its_budget_goes_on_under_the_official_rule_alone() -> None:
    """Steps of 0.07 from 0.075: wrong, right (0.145), right (0.215), wrong (0.285)."""
    x, y = torch.full((1, 1, 1, 1), 0.075, dtype=torch.float64), torch.zeros(1, dtype=torch.int64)
    ends = {}
    for variant, stop in (("official", StopWhenWrong(torch.tensor(1))), ("cfa", CFAStop(torch.tensor(1)))):
        radius, step = torch.ones(1, dtype=torch.float64), torch.full((1,), 0.07, dtype=torch.float64)
        attack = Attack(eps=radius, step_size=step, steps=6, goal=MaximiseCE(), start="zero", stop=stop)
        attack, counter = counted(attack)
        found = pgd(sawtooth, x, y, attack, torch.Generator())
        (path,) = reference.attack(
            sawtooth, x, y, x, eps=[1.0], step_size=0.07, steps=6, goal="ce", tau=1, variant=variant
        )
        assert found.item() == pytest.approx(path[-1][0], abs=1e-12)
        assert counter.steps() == [len(path) - 1]
        ends[variant] = found.item()
    assert ends == {"official": pytest.approx(0.285), "cfa": pytest.approx(0.145)}


# Noise, radius, claims


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_noise_enters_before_the_projection(scene: Scene, stand_in_run: Run, name: str, variant: Any) -> None:
    method = FriendlyAT(tau=1, variant=variant, omega=0.05)
    attack = scene.attack(stand_in_run, OBJECTIVES[name][0], method)
    ours, paths = scene.ends(attack), scene.paths(name, variant, 1, omega=0.05)
    torch.testing.assert_close(ours, attacks.last(paths, scene.batch.x), rtol=0, atol=1e-9)
    assert float((ours - scene.batch.x).abs().max()) <= EPS + 1e-6
    assert float(ours.min()) >= 0
    assert float(ours.max()) <= 1
    assert float((ours - scene.ends(replace(attack, noise=0.0))).abs().max()) > 0.01


def test_noise_is_keyed_by_the_batch(scene: Scene, stand_in_run: Run) -> None:
    objective = OBJECTIVES["pgd-at"][0]
    attack = scene.attack(stand_in_run, objective, FriendlyAT(tau=1, omega=0.05))
    one = scene.ends(attack, x_init=scene.batch.x)
    torch.manual_seed(5)
    assert torch.equal(one, scene.ends(attack, x_init=scene.batch.x))
    scene.batch = replace(scene.batch, seed=scene.batch.seed + 1)
    assert not torch.equal(one, scene.ends(attack, x_init=scene.batch.x))


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_radius_per_class_bounds_every_image_by_its_own(scene: Scene, stand_in_run: Run, variant: Any) -> None:
    objective = OBJECTIVES["pgd-at"][0]
    methods = [CCM(lam=0.5, begin=1), FriendlyAT(tau=1, variant=variant)]
    run = stand_in_run(objective=objective, epoch=1, hits=(0, 2, 4), count=(4, 4, 4))
    for order in (methods, methods[::-1]):
        plan = compose(objective, order)
        attack = plan.attacks(scene.batch, plan.at_epoch({}, run), run)["x_adv"]
        assert attack is not None
        eps = EPS * torch.tensor([0.5, 1.0, 1.5], dtype=torch.float64)[scene.batch.y]
        ours, paths = scene.ends(attack), scene.paths("pgd-at", variant, 1, eps=eps)
        torch.testing.assert_close(ours, attacks.last(paths, scene.batch.x), rtol=0, atol=1e-9)
        assert bool(((ours - scene.batch.x).abs().amax((1, 2, 3)) <= eps + 1e-6).all())


def test_it_claims_the_stop_and_the_noise_where_it_adds_any() -> None:
    assert FriendlyAT().claims == {"attack.stop"}
    assert FriendlyAT(omega=0.001).claims == {"attack.stop", "attack.noise"}


def test_nothing_but_the_stop_and_the_noise_moves(scene: Scene, stand_in_run: Run) -> None:
    plain = OBJECTIVES["trades"][0].attack(scene.batch)
    for omega in (0.0, 0.1):
        method = FriendlyAT(tau=2, omega=omega)
        edited = method.attack(plain, scene.batch, method.at_epoch({}, stand_in_run()), stand_in_run())
        assert edited.noise == omega
        assert replace(edited, stop=None, noise=0.0) == plain


def test_it_needs_an_attack() -> None:
    for objective in (PGDAT(), Trades(), MART(), ARoW(), FGSMAT()):
        compose(objective, [FriendlyAT()])
    with pytest.raises(ConflictError, match=r"friendly-at sets attack\.stop, but standard trains without an attack"):
        compose(Standard(), [FriendlyAT()])


def test_a_run_with_a_budget_of_all_steps_is_the_plain_run_bit_for_bit(
    tiny_net: Net, tiny_data: Data, differences: Callable[[TrainState, TrainState], list[str]]
) -> None:
    def run(*methods: FriendlyAT) -> list[TrainState]:
        states: list[TrainState] = []
        schedule = Schedule(epochs=2, lr=0.1, batch_size=7)
        options: dict[str, Any] = {"schedule": schedule, "validation": 0, "select": "last", "save": states.append}
        fit(tiny_net(), tiny_data(), PGDAT(**SETTINGS), methods=methods, **options)
        return states

    plain = run()
    for variant in VARIANTS:
        for tau, same in ((STEPS, [True, True]), (f"{STEPS}, 0@1", [True, False]), (0, [False, False])):
            found = [differences(*pair) for pair in zip(plain, run(FriendlyAT(tau=tau, variant=variant)), strict=True)]
            assert [differing == ["method friendly-at/tau"] for differing in found] == same


# Budgets along a run


@pytest.mark.parametrize(
    ("objective", "epochs", "begins"),
    [
        (PGDAT(), 120, [0, 50, 90]),
        (FGSMAT(), 120, [0, 50, 90]),
        (Trades(), 85, [0, 30, 50, 70]),
        (MART(), 90, [0, 20, 40, 60, 80]),
        (PGDAT(), 12, [0, 5, 9]),
        (Trades(), 17, [0, 6, 10, 14]),
        (MART(), 180, [0, 40, 80, 120, 160]),
        (PGDAT(), 200, [0, 84, 150]),
    ],
    ids=lambda value: getattr(value, "name", None),
)
def test_the_official_budget_rises_at_the_same_shares_of_every_run(
    stand_in_run: Run, objective: AdversarialObjective, epochs: int, begins: list[int]
) -> None:
    run, found = stand_in_run(objective=objective, epochs=epochs), []
    for run.epoch in range(epochs):
        found.append(int(FriendlyAT().at_epoch({}, run)["tau"]))
    assert found == [sum(begin <= epoch for begin in begins) - 1 for epoch in range(epochs)]


def test_constant_budgets() -> None:
    for epoch in (0, 60, 119):
        assert FriendlyAT(variant="cfa").budget("pgd-at", epoch, 120) == 3
        assert FriendlyAT(tau=5).budget("trades", epoch, 120) == 5
        assert FriendlyAT(tau=0, variant="cfa").budget("trades", epoch, 120) == 0
        assert FriendlyAT().budget("arow", epoch, 120) == 2


@pytest.mark.parametrize(
    ("text", "begins"),
    [
        ("0, 1@50, 2@90", {0: 0, 50: 1, 90: 2}),
        ("0,1@50,2@90", {0: 0, 50: 1, 90: 2}),
        ("4", {0: 4}),
        (" 3@0 , 0@7 ", {0: 3, 7: 0}),
    ],
)
@pytest.mark.parametrize("variant", VARIANTS)
def test_budgets_as_text_name_their_epochs(text: str, begins: dict[int, int], variant: Any) -> None:
    _, (method,) = read_composition(f"pgd-at + friendly-at(tau='{text}', variant={variant})")
    assert method == FriendlyAT(tau=text, variant=variant)
    for epoch in range(120):
        latest = max(begin for begin in begins if begin <= epoch)
        assert method.budget("pgd-at", epoch, 120) == begins[latest]


def test_no_attack_at_all_is_remarked_upon() -> None:
    assert "no attack step at all" in str(FriendlyAT(variant="cfa", tau=0).remark(10))
    for method in (FriendlyAT(), FriendlyAT(tau=0), FriendlyAT(variant="cfa"), FriendlyAT(variant="cfa", tau=1)):
        assert method.remark(10) is None


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("tau", -1),
        ("tau", 1.5),
        ("tau", 2.0),
        ("tau", "''"),
        ("tau", "'-1'"),
        ("tau", "'1.5'"),
        ("tau", "'0, 1'"),
        ("tau", "'0, @5'"),
        ("tau", "'1@5'"),
        ("tau", "'0, 1@x'"),
        ("tau", "'0, 1@-5'"),
        ("tau", "'0, 1@50, 2@50'"),
        ("tau", "'0, 1@90, 2@50'"),
        ("tau", "'0, 1@50,'"),
        ("tau", "'0; 1@50'"),
        ("omega", -0.001),
        ("omega", float("nan")),
        ("variant", "fat"),
    ],
)
def test_a_wrong_value_is_refused_with_owner_and_field(name: str, wrong: Any) -> None:
    value = wrong.strip("'") if isinstance(wrong, str) else wrong
    with pytest.raises(ConfigError, match=f"^friendly-at: {name} must be"):
        FriendlyAT(**{name: value})
    with pytest.raises(ConfigError, match=f"^friendly-at: {name} must be"):
        read_composition(f"pgd-at + friendly-at({name}={wrong})")


def test_budgets_that_never_hold_are_remarked_upon() -> None:
    assert FriendlyAT(tau="0, 1@50").remark(51) is None
    assert "epoch 50 never holds in a run of 50" in str(FriendlyAT(tau="0, 1@50").remark(50))
    for tau in (0, "0", "0, 0@3"):
        assert "no attack step at all" in str(FriendlyAT(variant="cfa", tau=tau).remark(10))
        assert FriendlyAT(tau=tau).remark(10) is None
