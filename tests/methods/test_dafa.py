from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from reference import dafa as reference
from robustfair.data import ImageDataset
from robustfair.errors import ConfigError, ConflictError, RobustFairWarning
from robustfair.methods import CCM, DAFA, FAAL, Method, compose
from robustfair.methods.dafa import distance_weights
from robustfair.objectives import MART, PGDAT, Objective, Standard, Trades
from robustfair.training import Fitted, Schedule, fit
from robustfair.training.state import TrainState
from robustfair.values import Batch, Forward, Loss, State

Net = Callable[..., nn.Module]
Data = Callable[..., ImageDataset]
Run = Callable[..., Any]
Differences = Callable[[TrainState, TrainState], list[str]]

P = ((0.70, 0.20, 0.10), (0.15, 0.80, 0.05), (0.30, 0.10, 0.60))
TIED = ((0.7, 0.2, 0.1), (0.2, 0.7, 0.1), (0.1, 0.3, 0.6))
PGD, TRADES = PGDAT(eps=0.1, steps=2), Trades(eps=0.1, steps=2)


def weigh(p: Any, lam: float, **rest: Any) -> list[float]:
    found: list[float] = distance_weights(torch.tensor(p, dtype=torch.float64), lam, **rest).tolist()
    return found


def batch_of(y: list[int]) -> Batch:
    rng = torch.Generator().manual_seed(0)
    x = torch.rand(len(y), 1, 5, 5, generator=rng, dtype=torch.float64)
    x_adv = (x + 0.1 * torch.randn(x.shape, generator=rng, dtype=torch.float64)).clamp(0, 1)
    return Batch(x=x, y=torch.tensor(y), index=torch.arange(len(y)), seed=1, x_adv=x_adv)


def answering(p: Any, y: list[int]) -> Loss:
    """A loss whose attacked images of class c have the probabilities p[c]."""
    adv = torch.tensor([p[c] for c in y], dtype=torch.float64).log()
    return Loss.of(Forward(adv=adv), label=(torch.ones(len(y), dtype=torch.float64), 1.0))


def warmed_up(method: DAFA, run: Run, p: Any = P, y: list[int] | None = None, **rest: Any) -> State:
    """The state after a warm-up of one epoch of one batch."""
    y = [0, 1, 2] if y is None else y
    state = method.at_epoch({}, run(**rest))
    state = method.after_step(state, batch_of(y), answering(p, y), run(**rest))
    return method.at_epoch(state, run(epoch=1, **rest))


def train(
    net: Net, data: Data, *methods: Method, objective: Objective = TRADES, epochs: int = 3, **rest: Any
) -> Fitted:
    options: dict[str, Any] = {"validation": 0, "select": "last"} | rest
    schedule = Schedule(epochs=epochs, lr=0.1, batch_size=7)
    return fit(net(), data((10, 6, 8)), objective, methods=methods, schedule=schedule, **options)


# The weights


@pytest.mark.parametrize(("lam", "expected"), [(1.0, (0.95, 0.76, 1.29)), (1.5, (0.925, 0.64, 1.435))])
def test_the_published_vectors(lam: float, expected: tuple[float, ...]) -> None:
    assert weigh(P, lam) == pytest.approx(expected, abs=1e-12)
    assert reference.weights(P, lam) == pytest.approx(expected, abs=1e-12)


def test_a_tie_moves_nothing_or_has_both_give_as_in_the_code() -> None:
    assert weigh(TIED, 1.0, ties_give=True) == pytest.approx([0.79, 0.65, 1.28], abs=1e-12)
    assert weigh(TIED, 1.0) == pytest.approx([0.93, 0.79, 1.28], abs=1e-12)
    assert sum(weigh(TIED, 1.0)) == pytest.approx(3)


@st.composite
def similarities(draw: Any) -> list[list[float]]:
    size = draw(st.integers(1, 7))
    number = st.floats(0.001, 1)
    rows = [draw(st.lists(number, min_size=size, max_size=size)) for _ in range(size)]
    return [[value / sum(row) for value in row] for row in rows]


@settings(max_examples=100, deadline=None)
@given(similarities(), st.floats(0, 3))
def test_the_weights_are_the_loop_over_pairs_and_keep_their_sum(p: list[list[float]], lam: float) -> None:
    w = weigh(p, lam)
    assert w == pytest.approx(reference.weights(p, lam), abs=1e-12)
    assert weigh(p, lam, ties_give=True) == pytest.approx(reference.weights(p, lam, ties_give=True), abs=1e-12)
    assert sum(w) == pytest.approx(len(p), abs=1e-9)
    own = [row[c] for c, row in enumerate(p)]
    assert w[own.index(min(own))] >= 1
    assert w[own.index(max(own))] <= 1


def test_lambda_zero_weighs_nothing() -> None:
    assert weigh(P, 0.0) == [1.0] * 3


# What it edits


def test_radius_step_and_label_term_follow_the_class_and_nothing_else(stand_in_run: Run) -> None:
    method, y = DAFA(begin=1, lam=1.0), [2, 0, 1, 2]
    state, batch = warmed_up(method, stand_in_run), batch_of(y)
    w = [(0.95, 0.76, 1.29)[c] for c in y]
    attack = TRADES.attack(batch)
    edited = method.attack(attack, batch, state, stand_in_run(epoch=1))
    assert edited.eps.tolist() == pytest.approx([0.1 * factor for factor in w])
    assert edited.step_size.tolist() == pytest.approx([0.025 * factor for factor in w])
    assert replace(edited, eps=attack.eps, step_size=attack.step_size) == attack
    for objective in (Trades(), MART(), PGDAT()):
        loss = objective(lambda x: x.flatten(1)[:, :3], batch)
        weighed = method.loss(loss, batch, state, stand_in_run(epoch=1))
        label = loss.terms["label"].tolist()
        other = loss.terms["consistency"].tolist() if "consistency" in loss.terms else [0.0] * 4
        beta = getattr(objective, "beta", 0.0)
        expected = reference.loss(label, other, y, (0.95, 0.76, 1.29), beta)
        assert weighed.total().item() == pytest.approx(expected, rel=1e-12)
        assert all(weighed.coef[name] is loss.coef[name] for name in loss.terms if name != "label")
        assert weighed.weight is loss.weight


@pytest.mark.parametrize("objective", [PGD, TRADES], ids=lambda objective: objective.name)
def test_similarity_is_that_of_the_passes_of_the_last_warm_up_epoch(
    tiny_net: Net, tiny_data: Data, objective: Objective
) -> None:
    seen: dict[int, list[tuple[Tensor, Tensor]]] = {}

    class Look(Method):
        name = "look"

        def after_step(self, state: State, batch: Batch, loss: Loss, run: Any) -> State:
            assert loss.out.adv is not None
            seen.setdefault(run.epoch, []).append((loss.out.adv.detach(), batch.y))
            return state

    states: list[TrainState] = []
    train(tiny_net, tiny_data, DAFA(begin=2), Look(), objective=objective, epochs=4, save=states.append)
    logits, y = (torch.cat(part) for part in zip(*seen[1], strict=True))
    p = reference.similarity(logits.tolist(), y.tolist(), 3)
    assert all(sum(row) == pytest.approx(1) for row in p)
    found = [state.methods["dafa"]["weights"].tolist() for state in states]
    assert found[0] == [1.0] * 3
    assert found[1] == pytest.approx(reference.weights(p, 1.5), abs=1e-6)
    assert found[1] == found[2] == found[3]
    assert max(found[1]) > 1.01
    per_class = [record["per_class"] for record in states[-1].history]
    assert per_class[1]["eps"] == pytest.approx([0.1] * 3)
    assert per_class[2]["eps"] == pytest.approx([0.1 * w for w in found[1]], rel=1e-5)
    assert per_class[3]["coef.label"] == pytest.approx(found[1], rel=1e-5)


def test_the_warm_up_is_the_plain_run(tiny_net: Net, tiny_data: Data, differences: Differences) -> None:
    states: list[TrainState] = []
    train(tiny_net, tiny_data, DAFA(begin=2), save=states.append)
    plain: list[TrainState] = []
    train(tiny_net, tiny_data, save=plain.append)
    alike = [not [d for d in differences(*pair) if "dafa" not in d] for pair in zip(states, plain, strict=True)]
    assert alike == [True, True, False]


def test_statistics_are_those_of_all_processes(stand_in_run: Run, monkeypatch: Any) -> None:
    """Two processes with images of other classes each."""
    method, run, last = DAFA(begin=1), stand_in_run(), stand_in_run(epoch=1)
    begun = method.at_epoch({}, run)
    one, two = (method.after_step(begun, batch_of(y), answering(P, y), run) for y in ([0, 0, 1], [2, 1]))
    other = iter([two["sums"], two["counts"]])
    monkeypatch.setattr(last, "total", lambda part: part + next(other), raising=False)
    assert method.at_epoch(one, last)["weights"].tolist() == pytest.approx(weigh(P, 1.5), abs=1e-12)


def test_a_class_without_images_moves_nothing(stand_in_run: Run) -> None:
    weights = warmed_up(DAFA(begin=1, lam=1.0), stand_in_run, y=[0, 1, 1])["weights"].tolist()
    assert weights == pytest.approx(reference.weights([*P[:2], (0, 0, 0)], 1.0), abs=1e-12)
    assert weights[2] == 1
    assert weights[:2] == pytest.approx([1.16, 0.84])


# Settings


def test_lambda_is_the_papers_for_the_number_of_classes(stand_in_run: Run) -> None:
    assert warmed_up(DAFA(begin=1), stand_in_run)["weights"].tolist() == pytest.approx(weigh(P, 1.5))
    rng = torch.Generator().manual_seed(0)
    for classes, lam in ((9, 1.5), (10, 1.0), (100, 1.5)):
        p = torch.softmax(3 * torch.randn(classes, classes, generator=rng, dtype=torch.float64), 1).tolist()

        def run(classes: int = classes, **rest: Any) -> Any:
            made = stand_in_run(**rest)
            made.num_classes = classes
            return made

        found = warmed_up(DAFA(begin=1), run, p, list(range(classes)))["weights"].tolist()
        assert found == pytest.approx(weigh(p, lam), abs=1e-9)


@pytest.mark.parametrize(("epochs", "first"), [(110, 70), (200, 127), (30, 19), (2, 1), (1, 1)])
def test_the_warm_up_is_the_authors_share_of_the_run(epochs: int, first: int) -> None:
    assert DAFA().first(epochs) == first
    assert DAFA(begin=5).first(epochs) == 5


def test_a_run_that_ends_with_the_warm_up_is_remarked_upon() -> None:
    assert DAFA().remark(2) is None
    assert DAFA(begin=70).remark(71) is None
    for method, epochs, first in ((DAFA(), 1, 1), (DAFA(begin=70), 70, 70), (DAFA(begin=70), 40, 70)):
        assert method.remark(epochs) == (
            f"dafa warms up until epoch {first} and this run ends after {epochs}: it will never act; train longer or "
            "lower dafa(begin)"
        )


ONE_FOR_ALL = ((0.98, 0.01, 0.01), (0.97, 0.02, 0.01), (0.97, 0.01, 0.02))
"""All classes are taken for the first: W_0 = 1 - 1.5 x 2 x 0.97 x 0.98."""


def test_a_negative_weight_is_warned_of_and_has_no_radius_or_a_floor(stand_in_run: Run) -> None:
    message = r"dafa: the weight of class 0 is -1\.85: it trains away from its label and without an attack; set dafa\("
    with pytest.warns(RobustFairWarning, match=message):
        state = warmed_up(DAFA(begin=1), stand_in_run, ONE_FOR_ALL)
    batch = batch_of([0, 1])
    attack = DAFA().attack(PGD.attack(batch), batch, state, stand_in_run())
    assert attack.eps[0] == attack.step_size[0] == 0
    assert DAFA().loss(answering(P, [0, 1]), batch, state, stand_in_run()).coef["label"][0] < -1.8
    floored = warmed_up(DAFA(begin=1, min_weight=0.2), stand_in_run, ONE_FOR_ALL)["weights"].tolist()
    assert floored == [0.2, *state["weights"].tolist()[1:]]


def test_the_reading_of_the_code_is_for_trades_and_refused_elsewhere(
    tiny_net: Net, tiny_data: Data, stand_in_run: Run
) -> None:
    official = warmed_up(DAFA(begin=1, lam=1.0, compat="official"), stand_in_run, TIED)
    assert official["weights"].tolist() == pytest.approx([0.79, 0.65, 1.28], abs=1e-12)
    for objective in (PGD, MART(eps=0.1, steps=2)):
        name = objective.name
        with pytest.raises(ConfigError, match=f"dafa: compat must be none on {name}, got 'official'. Their attack on "):
            train(tiny_net, tiny_data, DAFA(compat="official"), objective=objective)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"lam": -1.0}, "dafa: lam must be a finite number >= 0"),
        ({"begin": 0}, "dafa: begin must be >= 1 .P is measured in the epoch before., or none, got 0"),
        ({"min_weight": 0.0}, "dafa: min_weight must be .*, got 0"),
        ({"compat": "paper"}, "dafa: compat must be 'official', or none, got 'paper'"),
    ],
)
def test_bad_settings_are_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        DAFA(**given)


def test_what_it_cannot_act_beside_is_refused() -> None:
    with pytest.raises(ConflictError, match="dafa needs attacked images, and standard trains without an attack"):
        compose(Standard(), [DAFA()])
    with pytest.raises(ConflictError, match=r"ccm and dafa both set attack\.eps \(the class-wise radius\)"):
        compose(Trades(), [CCM(), DAFA()])
    with pytest.raises(ConflictError, match=r"dafa and faal both set role\.class_weight"):
        compose(Trades(), [DAFA(), FAAL()])
