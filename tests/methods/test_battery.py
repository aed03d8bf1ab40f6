"""One battery over all methods and objectives that are registered: what each must do, whatever it is.

The short form, `make test`, trains every method on one objective, a pair wherever two claims meet on one, and a fixed
sample of all other cases; `make test-long` trains all of them.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import random
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import nn

from robustfair.data import ImageDataset
from robustfair.errors import ConfigError, ConflictError, DataError
from robustfair.methods import EMA, SWA, Method, Run, compose
from robustfair.methods.compose import _fresh
from robustfair.objectives import AdversarialObjective, Objective
from robustfair.registry import METHODS, OBJECTIVES
from robustfair.training import Fitted, Schedule, fit
from robustfair.training.state import TrainState
from robustfair.values import Batch, Loss, State

Net = Callable[..., nn.Module]
Data = Callable[..., ImageDataset]
Differences = Callable[[TrainState, TrainState], list[str]]

UNSEEN_FROM_EDITS = ("role.", "gradient", "model")


def teacher(channels: int = 1, classes: int = 3) -> nn.Module:
    """A linear network on images of any size."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        return nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4 * channels, classes))


def objective(name: str, **given: Any) -> Objective:
    cls = OBJECTIVES.get(name)
    if not issubclass(cls, AdversarialObjective):
        return cls()
    taught = any(field.name == "teacher" for field in dataclasses.fields(cls))
    own = {"eps": 0.1, "steps": min(cls().steps, 2)} | ({"teacher": teacher()} if taught else {})
    return cls(**own | given)


def acting(name: str) -> Method:
    """The method with its defaults, but for the epoch it begins at and its gate, so that two epochs see it act."""
    cls = METHODS.get(name)
    begins = any(field.name == "begin" and field.default for field in dataclasses.fields(cls))
    return cls(**({"begin": 1} if begins else {}) | ({"threshold": 0.0} if name == "fawa" else {}))


usual_objective, usual_method = functools.cache(objective), functools.cache(acting)
"""One of each for all questions of what composes, which train nothing."""


def refusal(base: str, *names: str) -> str:
    """The reason why these do not act together; empty where they do."""
    try:
        compose(usual_objective(base), [usual_method(name) for name in names])
    except ConflictError as error:
        return str(error)
    return ""


def composes(base: str, *names: str) -> bool:
    return not refusal(base, *names)


def train(net: Net, data: Data, base: str, methods: list[Method], **rest: Any) -> Fitted:
    return fit(
        net(dropout=0.2),
        data((10, 6, 8)),
        objective(base),
        methods=methods,
        schedule=Schedule(epochs=2, lr=0.1, batch_size=7),
        validation=0.25,
        **rest,
    )


def meetings(first: str, second: str) -> set[frozenset[str]]:
    """Where two methods could interact: claims on fields of one value, or on anything beside weights that one moves."""
    claims = [
        [claim for claim in usual_method(name).claims if not claim.startswith("role.")] for name in (first, second)
    ]

    def meet(one: str, other: str) -> bool:
        return one.split(".")[0] == other.split(".")[0] or bool({one, other} & {"gradient", "model"})

    return {frozenset(pair) for pair in itertools.product(*claims) if meet(*pair)}


def shortened(cases: list[tuple[str, ...]], sample: int = 12) -> list[Any]:
    """Cases (objective, *methods), those that the short form leaves out marked as `long`.

    It keeps an objective, another one each time, for every method alone and for one pair or more wherever two
    claims meet, and `sample` of all that is left: its length goes with the claims that there are, not with the pairs.
    """
    bases: dict[tuple[str, ...], list[str]] = {}
    for base, *names in cases:
        bases.setdefault(tuple(names), []).append(base)
    near, met = [], set[frozenset[str]]()
    for names in bases:
        new = set() if len(names) == 1 else meetings(*names) - met
        if len(names) == 1 or new:
            near.append(names)
            met |= new
    kept = {(bases[names][turn % len(bases[names])], *names) for turn, names in enumerate(near)}
    others = [case for case in cases if case not in kept]
    kept |= set(random.Random(0).sample(others, min(sample, len(others))))
    return [case if case in kept else pytest.param(*case, marks=pytest.mark.long) for case in cases]


ALONE = [(base, name) for base in OBJECTIVES for name in METHODS if composes(base, name)]
PAIRS = [(base, *pair) for base in OBJECTIVES for pair in itertools.combinations(METHODS, 2) if composes(base, *pair)]


def test_something_composes() -> None:
    assert {("trades", "ccm"), ("trades", "ccr"), ("pgd-at", "ccm"), ("standard", "ema")} <= set(ALONE)
    assert ("trades", "ccm", "ccr") in PAIRS
    assert not {("standard", "ccm"), ("pgd-at", "ccr")} & set(ALONE)


def test_the_short_form_keeps_every_method_and_a_pair_wherever_two_claims_meet() -> None:
    def kept(cases: list[tuple[str, ...]]) -> list[tuple[str, ...]]:
        return [case for case in shortened(cases) if isinstance(case, tuple) and case in cases]

    assert {name for _, name in kept(ALONE)} == set(METHODS)
    assert len(kept(ALONE)) == len(list(METHODS)) + 12
    every = set[frozenset[str]]().union(*(meetings(*pair) for _, *pair in PAIRS))
    assert set[frozenset[str]]().union(*(meetings(*pair) for _, *pair in kept(PAIRS))) == every
    assert len(kept(PAIRS)) <= len(every) + 12
    assert len(shortened(PAIRS)) == len(PAIRS)
    assert meetings("ccm", "friendly-at") == {frozenset({"attack.eps", "attack.stop"})}
    assert frozenset({"gradient", "loss.label"}) in meetings("awp", "ccr")
    assert meetings("ccm", "ccr") == set()


@pytest.mark.parametrize("name", list(METHODS))
def test_defaults_build_and_the_class_is_what_the_protocol_wants(name: str) -> None:
    method = METHODS.get(name)()
    assert method.name == name
    assert type(method).__mro__[1] is Method, "a method derives from Method and from nothing else"
    assert dataclasses.is_dataclass(method)
    assert type(method).__dataclass_params__.frozen
    assert all(field.kw_only for field in dataclasses.fields(method))
    assert 1 <= len(method.hooks()) <= 5
    assert hash(method) == hash(METHODS.get(name)())


@pytest.mark.parametrize(("first", "second"), list(itertools.combinations_with_replacement(METHODS, 2)))
def test_a_refusal_does_not_depend_on_the_order(first: str, second: str) -> None:
    for base in OBJECTIVES:
        reason = refusal(base, first, second)
        assert bool(reason) == bool(refusal(base, second, first))
        assert not reason or first in reason or second in reason
    assert first != second or not composes("trades", first, second)


@pytest.mark.parametrize(("base", "name"), ALONE)
def test_claims_are_exactly_what_is_edited(
    tiny_net: Net, stand_in_run: Callable[..., Any], base: str, name: str
) -> None:
    method, goal = acting(name), objective(base)
    x = torch.rand(6, 1, 5, 5, generator=torch.Generator().manual_seed(0))
    y = torch.arange(6) % 3
    batch = Batch(x=x, y=y, index=torch.arange(6), seed=0, x_adv=x.flip(0), watched=torch.arange(6))
    networks = compose(goal, [method]).networks(tiny_net(), seed=0)
    batch = goal.prepare(batch, networks)
    batch = dataclasses.replace(batch, views={view: x.flip(0) for view in goal.attacks(batch) if view != "x_adv"})
    run = stand_in_run(objective=goal, images=(x,), networks=networks)
    state = method.at_epoch({}, run)
    run = stand_in_run(objective=goal, images=(x,), networks=networks, epoch=2, hits=(1, 2, 3), count=(4, 4, 4))
    state = method.at_epoch(state, run)
    edited = set()
    for attack in map(_fresh, goal.attacks(batch).values()):
        after = method.attack(attack, batch, state, run)
        names = [field.name for field in dataclasses.fields(attack)]
        edited |= {f"attack.{n}" for n in names if getattr(after, n) is not getattr(attack, n)}
    changed = method.examples(method.prepare(batch, state, run), state, run)
    names = [field.name for field in dataclasses.fields(batch) if field.name not in ("extra", "views")]
    edited |= {f"batch.{n}" for n in names if getattr(changed, n) is not getattr(batch, n)}
    loss = goal(tiny_net(), changed)
    weighed = method.loss(loss, changed, state, run)
    edited |= {"loss.weight"} if weighed.weight is not loss.weight else set()
    edited |= {
        f"loss.{n}"
        for n in weighed.terms
        if weighed.terms[n] is not loss.terms.get(n) or weighed.coef[n] is not loss.coef.get(n)
    }
    state = method.after_step(state, changed, loss, run)
    edited |= {f"export.{n}" for n in method.export(state, run)}
    assert edited == {claim for claim in method.claims if not claim.startswith(UNSEEN_FROM_EDITS)}
    assert all(isinstance(value, torch.Tensor) for value in state.values())
    assert not any(value.requires_grad for value in state.values())


@pytest.mark.parametrize(("base", "first", "second"), shortened(PAIRS))
def test_order_does_not_matter(
    tiny_net: Net, tiny_data: Data, differences: Differences, base: str, first: str, second: str
) -> None:
    one = train(tiny_net, tiny_data, base, [acting(first), acting(second)])
    two = train(tiny_net, tiny_data, base, [acting(second), acting(first)])
    assert differences(one.state, two.state) == []
    assert same_choice(one, two)


@pytest.mark.parametrize("select", ["last", "average", "worst"])
def test_the_order_of_averages_does_not_choose_between_them(tiny_net: Net, tiny_data: Data, select: Any) -> None:
    """Also where they tie: a rate of 0 leaves every candidate the same."""
    averages = [EMA(decay=0.5, buffers="copy"), SWA(begin=0, buffers="copy")]
    for lr in (0.1, 0.0):
        schedule = Schedule(epochs=2, lr=lr, batch_size=7)
        options = {"schedule": schedule, "validation": 0.25, "select": select}
        one, two = (
            fit(tiny_net(), tiny_data((10, 6, 8)), objective("pgd-at"), methods=methods, **options)  # type: ignore[arg-type]
            for methods in (averages, averages[::-1])
        )
        assert list(one.state.exports) == list(two.state.exports) == ["ema", "swa"]
        assert same_choice(one, two)


def same_choice(one: Fitted, two: Fitted) -> bool:
    """Whether two runs chose the same candidate of the same epoch, with the same weights."""
    there = two.model.state_dict()
    weights = all(torch.equal(tensor, there[name]) for name, tensor in one.model.state_dict().items())
    return weights and (one.chosen.candidate, one.chosen.epoch) == (two.chosen.candidate, two.chosen.epoch)


@pytest.mark.parametrize(("base", "name"), shortened(ALONE))
def test_it_acts_repeats_and_resumes(
    tiny_net: Net, tiny_data: Data, differences: Differences, base: str, name: str
) -> None:
    states: list[TrainState] = []
    whole = train(tiny_net, tiny_data, base, [acting(name)], save=states.append)
    assert differences(whole.state, train(tiny_net, tiny_data, base, [acting(name)]).state) == []
    assert differences(whole.state, train(tiny_net, tiny_data, base, []).state) != [], f"{name} did nothing"
    assert [state.epoch for state in states] == [1, 2]
    for state in states:
        resumed = train(tiny_net, tiny_data, base, [acting(name)], resume=state)
        assert differences(whole.state, resumed.state) == []
        assert all(torch.equal(v, resumed.model.state_dict()[k]) for k, v in whole.model.state_dict().items())


def crowd(base: str) -> list[Method]:
    """As many methods as act together on an objective, taken in the order of their names while they fit."""
    names: list[str] = []
    for name in sorted(METHODS):
        if composes(base, *names, name):
            names.append(name)
    return [acting(name) for name in names]


@pytest.mark.parametrize(("base", "least"), [("trades", 8), ("pgd-at", 8), ("rslad", 8)])
def test_a_crowd_of_methods_resumes_from_every_epoch_in_either_order(
    tiny_net: Net, tiny_data: Data, differences: Differences, base: str, least: int
) -> None:
    states: list[TrainState] = []
    assert len(crowd(base)) >= least
    whole = train(tiny_net, tiny_data, base, crowd(base), save=states.append)
    assert differences(whole.state, train(tiny_net, tiny_data, base, crowd(base)[::-1]).state) == []
    for state in states:
        resumed = train(tiny_net, tiny_data, base, crowd(base), resume=state)
        assert differences(whole.state, resumed.state) == []


UNUSUAL: dict[str, tuple[tuple[int, ...], Any, set[str]]] = {
    "two classes": ((13, 5), "bf16", set()),
    "a class without images": ((9, 0, 7), "fp32", {"class-balanced", "fawa", "frl", "logit-adjustment", "wat"}),
}
"""Class counts, precision, and who cannot act there. Batches of four images lack a class now and then."""


@pytest.mark.filterwarnings("ignore::robustfair.errors.RobustFairWarning")
@pytest.mark.parametrize("kind", UNUSUAL)
@pytest.mark.parametrize(("base", "name"), shortened(ALONE, sample=0))
def test_it_trains_on_unusual_images_or_says_before_the_first_step_why_not(
    tiny_net: Net, tiny_data: Data, base: str, name: str, kind: str
) -> None:
    """Of three channels, so that they lie in memory channels last."""
    counts, precision, refusing = UNUSUAL[kind]
    taught = {"teacher": teacher(channels=3, classes=len(counts))} if "teacher" in OBJECTIVES.get(base).reads else {}
    model, goal, steps = tiny_net(channels=3, classes=len(counts)), objective(base, **taught), []
    options: dict[str, Any] = {"schedule": Schedule(epochs=2, lr=0.05, batch_size=4), "precision": precision}
    options |= {"validation": 0.25, "on_step": lambda *step: steps.append(step)}
    told = pytest.raises((ConfigError, DataError), match=name) if name in refusing else nullcontext()
    with told:
        state = fit(model, tiny_data(counts, channels=3), goal, methods=[acting(name)], **options).state
    assert bool(steps) == (name not in refusing)
    if steps:
        present = torch.tensor(counts) > 0
        assert all(bool(tensor.isfinite().all()) for tensor in state.weights.values())
        for key, tensor in state.methods[name].items():
            kept = tensor[present] if tensor.shape == present.shape else tensor
            assert bool(kept.isfinite().all()), key


@pytest.mark.parametrize(("base", "name"), shortened([pair for pair in ALONE if pair[0] != "standard"]))
def test_it_trains_within_an_l2_ball_too(tiny_net: Net, tiny_data: Data, base: str, name: str) -> None:
    goal = objective(base, norm="l2", eps=0.5)
    schedule = Schedule(epochs=2, lr=0.1, batch_size=7)
    seen: list[tuple[float, float]] = []

    class Watch(Method):
        name = "watch"

        def after_step(self, state: State, batch: Batch, loss: Loss, run: Run) -> State:
            assert batch.x_adv is not None
            away = (batch.x_adv - batch.x).flatten(1).norm(dim=1)
            seen.append((float(away.max()), float(loss.total().detach())))
            return state

    methods = [acting(name), Watch()]
    fit(tiny_net(), tiny_data((10, 6, 8)), goal, methods=methods, schedule=schedule, validation=0.25, select="last")
    reach = 1.0 if name == "avmixup" else 0.5  # its vertex lies twice as far
    reach *= 3 if base == "n-fgsm" else 1  # noise of two radii, and the step
    reach *= {"ccm": 1.5, "dafa": 2.5, "fair-tat": 1.5, "frl": 3.0}.get(name, 1.0)  # the largest radius of a class
    assert 0.1 < max(away for away, _ in seen) <= reach * (1 + 1e-5)
    assert all(math.isfinite(loss) for _, loss in seen)


@pytest.mark.parametrize(("base", "name"), shortened([pair for pair in ALONE if composes(*pair, "ema")]))
def test_an_average_beside_it_moves_no_weight(tiny_net: Net, tiny_data: Data, base: str, name: str) -> None:
    kinds = (EMA(decay=0.5), EMA(per="epoch", buffers="average"), EMA(buffers="reestimate"))
    ema = kinds[list(METHODS).index(name) % len(kinds)]
    alone = train(tiny_net, tiny_data, base, [acting(name)], select="last").state
    beside = train(tiny_net, tiny_data, base, [acting(name), ema], select="last").state
    assert all(torch.equal(tensor, beside.weights[key]) for key, tensor in alone.weights.items())
    assert all(torch.equal(v, beside.methods[name][key]) for key, v in alone.methods[name].items())
