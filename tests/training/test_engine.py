from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor, nn

from robustfair.attacks import predict
from robustfair.attacks.pgd import FreezeFooled, ascend, eager_step, functional_step, pgd
from robustfair.data import ImageDataset
from robustfair.errors import ConfigError, ModelError, RobustFairWarning
from robustfair.execution.kernels import compiled
from robustfair.execution.kernels.compiled import kernels, missing
from robustfair.execution.live import live_program
from robustfair.execution.program import Program
from robustfair.losses import MaximiseMargin, MinimiseCE
from robustfair.methods import AWP, CCM, CCR, EMA, FriendlyAT, Method
from robustfair.methods.fair_ard import StillRight
from robustfair.models import OnCopies, create_model
from robustfair.objectives import FGSMAT, MART, PGDAT, AdversarialObjective, ARoW, Trades
from robustfair.training import Schedule, engine, fit
from robustfair.training.capture import replayable
from robustfair.training.engine import Engine
from robustfair.training.state import TrainState
from robustfair.training.way import Way
from robustfair.values import Attack, Batch, Goal

Net = Callable[..., nn.Module]
Data = Callable[..., ImageDataset]

OBJECTIVES = {
    "ce, linf, uniform": PGDAT(eps=0.1, steps=4),
    "ce, l2": PGDAT(norm="l2", eps=0.5, steps=4),
    "kl, linf, gauss": Trades(eps=0.1, steps=4),
    "kl, l2, box first": Trades(norm="l2", eps=0.5, steps=4),
    "kl, batch statistics": Trades(eps=0.1, steps=4, attack_mode="train_frozen"),
    "reverse kl": ARoW(eps=0.1, steps=4, perturb_loss="revkl"),
    "js": ARoW(eps=0.1, steps=4, perturb_loss="js", start="gauss001"),
    "ce, gauss": MART(eps=0.1, steps=4),
    "one step, no box": FGSMAT(eps=0.1, clip_to_box=False),
}


def batch_of(count: int = 6, seed: int = 0) -> Batch:
    rng = torch.Generator().manual_seed(seed)
    x = torch.rand(count, 1, 6, 6, generator=rng, dtype=torch.float64)
    y = torch.randint(0, 3, (count,), generator=rng)
    return Batch(x=x, y=y, index=torch.arange(count), seed=seed)


@contextmanager
def counted_passes(model: nn.Module) -> Iterator[list[int]]:
    """The batch sizes of all forward passes inside the scope."""
    seen: list[int] = []
    hook = model.register_forward_hook(lambda module, inputs, output: seen.append(len(inputs[0])))
    try:
        yield seen
    finally:
        hook.remove()


@pytest.mark.parametrize("mode", [True, False])
@pytest.mark.parametrize("wrap", [lambda model: model, OnCopies])
def test_an_attack_in_train_mode_acts_whatever_mode_the_engine_was_made_in(
    tiny_net: Net, wrap: Callable[[nn.Module], nn.Module], mode: bool
) -> None:
    batch = batch_of()
    attack = PGDAT(eps=0.1, steps=3, attack_mode="train").attack(batch)
    wanted = tiny_net(dtype=torch.float64).train()
    x_adv = pgd(wanted, batch.x, batch.y, attack, batch.rng("attack"))
    model = tiny_net(dtype=torch.float64).train(mode)
    for switched in (mode, not mode):
        model.load_state_dict(tiny_net(dtype=torch.float64).state_dict())
        engine = Engine(wrap(model))
        model.train(switched)
        assert torch.equal(engine.attack(batch, attack), x_adv)
        assert torch.equal(model.norm.running_mean, wanted.norm.running_mean)
        assert all(module.training is switched for module in (*engine.eager.modules(), *model.modules()))


def test_a_frozen_batch_norm_stays_frozen_in_an_attack_in_train_mode(tiny_net: Net) -> None:
    batch, model = batch_of(), tiny_net(dtype=torch.float64).eval()
    engine, before = Engine(model), model.norm.running_mean.clone()
    model.train()
    model.norm.eval()
    engine.attack(batch, PGDAT(eps=0.1, steps=3, attack_mode="train").attack(batch))
    assert torch.equal(model.norm.running_mean, before)


# The step as one function


@pytest.mark.parametrize("objective", OBJECTIVES.values(), ids=OBJECTIVES.keys())
def test_the_functional_step_moves_as_the_eager_one(tiny_net: Net, objective: AdversarialObjective) -> None:
    batch = batch_of()
    attack = objective.attack(batch)

    def attacked(step: Callable[..., tuple[Tensor, Tensor, Tensor]]) -> Tensor:
        def ascent(*args: object) -> object:
            return ascend(*args, step=step)  # type: ignore[arg-type]

        model = tiny_net(dtype=torch.float64)
        return pgd(model, batch.x, batch.y, attack, batch.rng("attack"), ascent=ascent)  # type: ignore[arg-type]

    torch.testing.assert_close(attacked(functional_step), attacked(eager_step), rtol=0, atol=1e-12)
    attack = replace(attack, noise=0.01)
    torch.testing.assert_close(attacked(functional_step), attacked(eager_step), rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("goal", "target"),
    [(MaximiseMargin(), None), (MinimiseCE(), torch.tensor([1, 2, 0, 1, 2, 0]))],
    ids=["margin", "target"],
)
def test_a_compiled_attack_takes_any_goal_and_a_compiled_pass_has_the_same_gradient(
    tiny_net: Net, goal: Goal, target: Tensor | None
) -> None:
    batch = batch_of()
    attack = replace(PGDAT(eps=0.1, steps=3).attack(batch), goal=goal, target=target)
    plain, fast = tiny_net(dtype=torch.float64), tiny_net(dtype=torch.float64)
    compiled = Engine(fast, compile=True, batch_size=6)
    x_adv = Engine(plain).attack(batch, attack)
    torch.testing.assert_close(compiled.attack(batch, attack), x_adv, rtol=0, atol=1e-12)
    counted = [
        engine.watched_attack(batch, replace(attack, watch=StillRight())) for engine in (Engine(plain), compiled)
    ]
    assert torch.equal(counted[0][0], x_adv)
    assert torch.equal(counted[0][1], counted[1][1])  # type: ignore[arg-type]
    Engine(plain)(x_adv).logsumexp(1).sum().backward()
    compiled(x_adv).logsumexp(1).sum().backward()
    for (name, one), two in zip(plain.named_parameters(), fast.parameters(), strict=True):
        torch.testing.assert_close(two.grad, one.grad, rtol=1e-9, atol=1e-12, msg=name)
    for one, two in zip(plain.buffers(), fast.buffers(), strict=True):
        torch.testing.assert_close(two, one)


# Whole runs


@pytest.mark.parametrize(
    ("objective", "methods"),
    [
        (Trades(eps=0.08, steps=3), (CCM(lam=0.3, begin=1), CCR(begin=1), EMA(decay=0.9))),
        (MART(eps=0.08, steps=3), (AWP(gamma=0.02), FriendlyAT(tau=1, omega=0.01), EMA(decay=0.9))),
    ],
    ids=["cfa", "awp and friendly"],
)
def test_a_compiled_run_equals_the_eager_one_up_to_rounding(
    tiny_net: Net, tiny_data: Data, objective: AdversarialObjective, methods: tuple[Method, ...]
) -> None:
    schedule = Schedule(epochs=2, lr=0.05, batch_size=7)

    def trained(*, compile: bool) -> dict[str, Tensor]:
        model = tiny_net(dtype=torch.float64)
        fitted = fit(model, tiny_data((10, 8, 6)), objective, methods=methods, schedule=schedule, compile=compile)
        return dict(fitted.state.weights) | dict(fitted.state.exports["ema"])

    eager, compiled = trained(compile=False), trained(compile=True)
    for name, tensor in eager.items():
        torch.testing.assert_close(compiled[name], tensor, rtol=1e-9, atol=1e-9, msg=name)


def test_deterministic_is_the_reference_path_and_restores_the_switches(tiny_net: Net, tiny_data: Data) -> None:
    def switches() -> tuple[object, ...]:
        conv, matmul = torch.backends.cudnn.conv, torch.backends.cuda.matmul
        repeats = torch.are_deterministic_algorithms_enabled()
        return repeats, torch.backends.cudnn.benchmark, conv.fp32_precision, matmul.fp32_precision

    def trained(*, deterministic: bool) -> tuple[dict[str, Tensor], tuple[object, ...]]:
        inside: list[tuple[object, ...]] = []
        fitted = fit(
            tiny_net(),
            tiny_data(),
            PGDAT(steps=2),
            schedule=Schedule(epochs=2, batch_size=7),
            deterministic=deterministic,
            on_step=lambda epoch, step: inside.append(switches()),
        )
        return dict(fitted.state.weights), inside[0]

    before = switches()
    (default, fast), (reference, exact) = trained(deterministic=False), trained(deterministic=True)
    assert all(torch.equal(default[name], reference[name]) for name in default)
    assert fast == (False, True, *before[2:])
    assert exact == (True, False, "ieee", "ieee")
    assert switches() == before


def test_a_deterministic_run_is_not_compiled(tiny_net: Net, tiny_data: Data) -> None:
    with pytest.raises(ConfigError, match="compile must be false beside deterministic"):
        fit(tiny_net(), tiny_data(), PGDAT(), compile=True, deterministic=True)


def test_a_machine_without_a_compiler_says_so(monkeypatch: pytest.MonkeyPatch, tiny_net: Net) -> None:
    def failing(*args: object, **kwargs: object) -> Callable[[Tensor], Tensor]:
        def call(x: Tensor) -> Tensor:
            raise RuntimeError("no working C++ compiler\nand a long story")

        return call

    engine.require_compiler.cache_clear()
    monkeypatch.setattr(torch, "compile", failing)
    try:
        with pytest.raises(ConfigError, match=r"compile must be false on this machine.*no working C\+\+ compiler$"):
            Engine(tiny_net(), compile=True)
    finally:
        engine.require_compiler.cache_clear()


def test_a_model_that_cuts_its_gradient_is_refused_before_a_compiled_step(tiny_data: Data) -> None:
    class Cut(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(36, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(x.detach().flatten(1))

    with pytest.raises(ModelError, match="no gradient to its input"):
        fit(Cut(), tiny_data(), PGDAT(), schedule=Schedule(epochs=1), compile=True)


def test_one_engine_after_another_is_compiled_anew(tiny_net: Net) -> None:
    for count in (4, 5):
        batch, model = batch_of(count), tiny_net(dtype=torch.float64).train()
        with torch._dynamo.config.patch(recompile_limit=1, fail_on_recompile_limit_hit=True):
            assert Engine(model, compile=True, batch_size=count)(batch.x).shape == (count, 3)


class Remembering(nn.Module):
    """Writes a buffer in every pass."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(36, 3)
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.seen += x.mean().detach()
        return self.head(x.flatten(1))


def test_a_model_that_cannot_be_compiled_is_refused_in_a_sentence(tiny_data: Data) -> None:
    fit(Remembering(), tiny_data(), PGDAT(steps=1), schedule=Schedule(epochs=1))
    with pytest.raises(ModelError, match="cannot be compiled, train it without compile: "):
        fit(Remembering(), tiny_data(), PGDAT(steps=1), schedule=Schedule(epochs=1), compile=True)


# Batches of another size


def test_an_attack_that_writes_running_statistics_stays_eager(tiny_net: Net) -> None:
    plain, fast = tiny_net(dtype=torch.float64).train(), tiny_net(dtype=torch.float64).train()
    batch = batch_of()
    attack = PGDAT(eps=0.1, steps=2, attack_mode="train").attack(batch)
    x_adv = Engine(plain).attack(batch, attack)
    assert torch.equal(Engine(fast, compile=True, batch_size=6).attack(batch, attack), x_adv)
    assert torch.equal(fast.norm.running_mean, plain.norm.running_mean)  # type: ignore[union-attr]
    assert fast.norm.num_batches_tracked == 2  # type: ignore[union-attr]


class Counting(nn.Module):
    """Counts the passes that run uncompiled: a compiler sees the branch as false and leaves it out."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.passes = inner, 0

    def forward(self, x: Tensor) -> Tensor:
        if not torch.compiler.is_compiling():
            self.passes += 1
        return self.inner(x)


def test_full_batches_are_compiled_and_others_are_not(tiny_net: Net) -> None:
    model = Counting(tiny_net(dtype=torch.float64)).train()
    compiled = Engine(model, compile=True, batch_size=6)
    full, rest = batch_of(6), batch_of(5)
    compiled(compiled.attack(full, PGDAT(steps=2).attack(full)))
    assert model.passes == 0
    compiled(compiled.attack(rest, PGDAT(steps=2).attack(rest)))
    assert model.passes == 3


# Attacks on kernels

on_kernels = pytest.mark.skipif(kernels() is None, reason=f"the kernels cannot be had: {missing()}")


def colour_batch(count: int = 6, seed: int = 0) -> Batch:
    rng = torch.Generator().manual_seed(seed)
    x = torch.rand(count, 3, 16, 16, generator=rng).contiguous(memory_format=torch.channels_last)
    return Batch(x=x, y=torch.randint(0, 10, (count,), generator=rng), index=torch.arange(count), seed=seed)


def trained_on_kernels(name: str) -> tuple[Engine, Engine]:
    """Two engines of one network that learned after they were made: on torch's layers, and on kernels."""
    torch.manual_seed(0)
    model = create_model(name, width=16).train()
    program, lacks = live_program(model, colour_batch(2).x)
    assert program is not None, lacks
    engines = Engine(model), Engine(model, program=program)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for seed in range(4):
        batch = colour_batch(seed=seed)
        optimizer.zero_grad()
        nn.functional.cross_entropy(engines[0](batch.x), batch.y).backward()
        optimizer.step()
    return engines


@on_kernels
@pytest.mark.parametrize("name", ["preact-resnet18", "resnet18", "small-cnn"])
@pytest.mark.parametrize("objective", OBJECTIVES.values(), ids=OBJECTIVES.keys())
def test_an_attack_on_kernels_ends_where_one_on_torchs_layers_does(name: str, objective: AdversarialObjective) -> None:
    plain, fast = trained_on_kernels(name)
    for count in (6, 5):
        batch = colour_batch(count, seed=9)
        attack = replace(objective.attack(batch), steps=1)
        attack = replace(attack, watch=StillRight())
        (x_adv, counted), (found, seen) = (engine.watched_attack(batch, attack) for engine in (plain, fast))
        assert torch.equal(counted, seen)  # type: ignore[arg-type]
        assert ((x_adv - batch.x).abs() > 0.01).float().mean() > 0.1
        # A gradient near zero may round to the other sign, which further steps would carry to other pixels.
        assert ((found - x_adv).abs() > 1e-4).float().mean() < 0.002


@on_kernels
def test_kernels_take_attacks_in_eval_mode_while_nothing_hooks_in() -> None:
    _, fast = trained_on_kernels("small-cnn")
    batch = colour_batch()
    attack = PGDAT(steps=1).attack(batch)
    called = fast.model.forward
    passes: list[Tensor] = []

    def noted(x: Tensor) -> Tensor:
        passes.append(x)
        return called(x)

    fast.model.forward = noted  # type: ignore[method-assign]
    fast.attack(batch, attack)
    assert len(passes) == 0
    fast.attack(batch, replace(attack, mode="train_frozen"))
    assert len(passes) == 1
    with counted_passes(fast.model) as seen:
        fast.attack(batch, attack)
    assert len(passes) == len(seen) + 1 == 2
    assert all(parameter.requires_grad for parameter in fast.model.parameters())
    assert all(module.training for module in fast.model.modules())


@on_kernels
def test_bf16_leaves_kernels_alone() -> None:
    _, fast = trained_on_kernels("small-cnn")
    assert Engine(fast.model, precision="bf16", program=fast.program).program is None


@on_kernels
def test_a_compiled_engine_attacks_on_kernels() -> None:
    plain, fast = trained_on_kernels("small-cnn")
    batch = colour_batch()
    attack = PGDAT(norm="l2", eps=0.5, steps=3).attack(batch)
    compiled = Engine(fast.model, compile=True, batch_size=6, program=fast.program)
    torch.testing.assert_close(compiled.attack(batch, attack), plain.attack(batch, attack), rtol=0, atol=1e-4)
    assert torch.equal(compiled.attack(batch, attack), fast.attack(batch, attack))


class Inverted(nn.Module):
    """A network whose values nobody can follow, since it asks for one of them."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 16, 3), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.stem(x)
        return self.head((h if h.sum() > 0 else -h).mean((2, 3)))


def fitted_to_colours(tiny_data: Data, **asked: object) -> tuple[dict[str, Tensor], TrainState, Way]:
    """Weights, state and way of a run of a network that has layers for the kernels."""
    torch.manual_seed(0)
    model, told = asked.pop("model", None) or create_model("small-cnn", num_classes=3, width=16), []
    given: dict[str, object] = {"schedule": Schedule(epochs=2, batch_size=7, lr=0.05), "select": "last"}
    given |= {"on_way": told.append, "validation": 0} | asked
    data = tiny_data((10, 8, 6), channels=3, size=8)
    found = fit(model, data, Trades(norm="l2", eps=0.5, steps=2), **given)  # type: ignore[arg-type]
    return dict(found.state.weights), found.state, told[0]


@on_kernels
def test_a_run_on_kernels_equals_the_reference_up_to_rounding(tiny_data: Data) -> None:
    reference, _, way = fitted_to_colours(tiny_data, kernels=False)
    assert (way.kernels, way.why) == (False, "")
    exact, _, way = fitted_to_colours(tiny_data, deterministic=True)
    assert (way.kernels, way.why) == (False, "")
    assert all(torch.equal(exact[name], tensor) for name, tensor in reference.items())
    weights, _, way = fitted_to_colours(tiny_data)
    assert (way.kernels, way.why) == (True, "")
    assert any(not torch.equal(weights[name], tensor) for name, tensor in reference.items())
    for name, tensor in reference.items():
        torch.testing.assert_close(weights[name], tensor, rtol=1e-3, atol=1e-4, msg=name)


@on_kernels
def test_a_run_on_kernels_goes_on_exactly(tiny_data: Data) -> None:
    states: list[TrainState] = []
    whole, _, _ = fitted_to_colours(tiny_data, save=states.append)
    torch.manual_seed(1)
    resumed, _, _ = fitted_to_colours(tiny_data, resume=states[0])
    assert all(torch.equal(resumed[name], tensor) for name, tensor in whole.items())


@on_kernels
def test_validation_is_attacked_on_kernels_with_the_weights_as_they_are(
    tiny_data: Data, monkeypatch: pytest.MonkeyPatch
) -> None:
    searched: list[object] = []
    ours = predict.pgd
    monkeypatch.setattr(predict, "pgd", lambda model, *rest: searched.append(model) or ours(model, *rest))
    rates = [fitted_to_colours(tiny_data, validation=0.3, kernels=on)[1].history for on in (False, True)]
    assert [isinstance(model, Program) for model in searched] == [False, False, True, True]
    plain, fast = ([record["validation"]["model"] for record in history] for history in rates)
    assert plain == fast


@on_kernels
@pytest.mark.parametrize("on", [False, True], ids=["torch's layers", "kernels"])
def test_nothing_is_dropped_while_validation_is_attacked(
    on: bool, tiny_data: Data, monkeypatch: pytest.MonkeyPatch
) -> None:
    dropping: list[bool] = []
    inside: list[bool] = []
    ours, dropout = predict.pgd, nn.functional.dropout

    def noted(*given: object, **named: object) -> Tensor:
        inside.append(True)
        found = ours(*given, **named)  # type: ignore[arg-type]
        inside.pop()
        return found

    def dropped(x: Tensor, p: float, training: bool, inplace: bool) -> Tensor:
        dropping.extend([training] * len(inside))
        return dropout(x, p, training, inplace)

    monkeypatch.setattr(predict, "pgd", noted)
    monkeypatch.setattr(nn.functional, "dropout", dropped)
    model = nn.Sequential(create_model("small-cnn", num_classes=3, width=16), nn.Dropout(0.5))
    _, _, way = fitted_to_colours(tiny_data, model=model, validation=0.3, kernels=on)
    assert way.kernels is on
    assert dropping
    assert not any(dropping)


@on_kernels
def test_a_model_that_kernels_cannot_take_trains_on_torchs_layers_and_that_is_said(tiny_data: Data) -> None:
    with pytest.warns(RobustFairWarning, match="^attacks run without kernels: the order of the model's layers cannot"):
        _, _, way = fitted_to_colours(tiny_data, model=Inverted())
    assert not way.kernels


def test_a_run_without_kernels_on_the_machine_says_why(tiny_data: Data, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "_loaded", lambda: (None, "no C++ compiler such as g++ was found"))
    with pytest.warns(RobustFairWarning, match="^attacks run without kernels: no C"):
        weights, _, way = fitted_to_colours(tiny_data)
    assert (way.kernels, way.why) == (False, "attacks run without kernels: no C++ compiler such as g++ was found")
    reference, _, _ = fitted_to_colours(tiny_data, kernels=False)
    assert all(torch.equal(weights[name], tensor) for name, tensor in reference.items())


# Clean logits that attack and loss share


class Restless(Method):
    """Moves the weights before the loss, as adversarial weight perturbation does."""

    name = "restless"
    claims = frozenset({"gradient"})

    @contextmanager
    def around_gradient(self, run, batch, loss_at, state):  # type: ignore[no-untyped-def]
        with torch.no_grad():
            run.model.head.weight.mul_(2)
        yield
        with torch.no_grad():
            run.model.head.weight.div_(2)


@pytest.mark.parametrize(("mode", "saved"), [("eval", 0), ("train", 0), ("train_frozen", 1)])
def test_one_clean_pass_serves_attack_and_loss_where_it_is_the_same(
    monkeypatch: pytest.MonkeyPatch, tiny_net: Net, tiny_data: Data, mode: str, saved: int
) -> None:
    def passes() -> tuple[int, int]:
        model, schedule = tiny_net(), Schedule(epochs=1, batch_size=7)
        with counted_passes(model) as seen:
            found = fit(model, tiny_data(), Trades(steps=2, attack_mode=mode), schedule=schedule)  # type: ignore[arg-type]
        return len(seen), found.state.step

    together, steps = passes()
    monkeypatch.setattr(Trades, "clean_pass", False)
    apart, _ = passes()
    assert steps > 1
    assert apart - together == saved * steps


@pytest.mark.parametrize("methods", [(), (Restless(),)], ids=["plain", "weights move in between"])
def test_sharing_the_clean_pass_changes_no_bit(
    monkeypatch: pytest.MonkeyPatch, tiny_net: Net, tiny_data: Data, methods: tuple[Method, ...]
) -> None:
    def trained() -> dict[str, Tensor]:
        objective = Trades(eps=0.08, steps=2, attack_mode="train_frozen")
        schedule = Schedule(epochs=2, batch_size=7)
        return dict(fit(tiny_net(), tiny_data(), objective, methods=methods, schedule=schedule).state.weights)

    shared = trained()
    monkeypatch.setattr(Trades, "clean_pass", False)
    apart = trained()
    assert all(torch.equal(shared[name], apart[name]) for name in shared)


# What a CUDA graph may replay


@dataclass
class Weighted:
    """A goal that is no plain value: it can be changed in place."""

    weights: list[float]
    needs_clean = False

    def __call__(self, logits: Tensor, clean: Tensor | None, y: Tensor) -> Tensor:
        return sum(weight * logits[:, label] for label, weight in enumerate(self.weights))  # type: ignore[return-value]


@dataclass(frozen=True, eq=False)
class Holding(StillRight):
    """A watch that holds a tensor, which no recording may."""

    tensor: Tensor


def test_what_is_no_fixed_sequence_of_kernels_is_not_replayed() -> None:
    batch = batch_of()
    attack: Attack = PGDAT().attack(batch)
    assert replayable(attack)
    assert replayable(Trades(attack_mode="train_frozen").attack(batch))
    assert not replayable(replace(attack, noise=0.01))
    assert not replayable(replace(attack, stop=FreezeFooled()))
    assert not replayable(replace(attack, keep="best"))
    assert not replayable(replace(attack, restarts=2))
    assert replayable(replace(attack, goal=MinimiseCE(), target=batch.y))
    assert not replayable(replace(attack, goal=Weighted([0.5, 0.5])))
    assert replayable(replace(attack, watch=StillRight()))
    assert not replayable(replace(attack, watch=Holding(batch.y)))
    assert not replayable(replace(attack, goal=lambda logits, clean, y: logits.sum(1)))  # type: ignore[arg-type]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
@pytest.mark.parametrize("compile", [False, True])
def test_replayed_attacks_equal_the_loop_on_every_batch(tiny_net: Net, compile: bool) -> None:
    from robustfair.training.capture import CapturedAscent

    model = tiny_net().cuda().train()
    for seed in range(4):
        plain = batch_of(seed=seed)
        batch = Batch(x=plain.x.float().cuda(), y=plain.y.cuda(), index=plain.index.cuda(), seed=seed)
        attack = replace(PGDAT(eps=0.1, steps=3).attack(batch), box=seed != 3)
        if seed == 2:
            attack = replace(attack, goal=MinimiseCE(), target=(batch.y + 1) % 3)
        if seed == 0:
            captured = CapturedAscent(ascend, model)
            fast = Engine(model, device="cuda", compile=compile, batch_size=6)
        expected = pgd(model, batch.x, batch.y, attack, batch.rng("attack"))
        replayed = pgd(model, batch.x, batch.y, attack, batch.rng("attack"), ascent=captured)
        counting = replace(attack, watch=StillRight())
        counted = [engine.watched_attack(batch, counting)[1] for engine in (Engine(model, device="cuda"), fast)]
        assert torch.equal(*counted)  # type: ignore[arg-type]
        torch.testing.assert_close(replayed, expected, rtol=0, atol=1e-6)
        torch.testing.assert_close(fast.attack(batch, attack), expected, rtol=0, atol=1e-6)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.01)
