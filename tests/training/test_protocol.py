"""What the protocol carries beyond single edits: further networks, held out images, more than one attack."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

from robustfair.attacks.pgd import FreezeFooled, pgd
from robustfair.data import ImageDataset
from robustfair.errors import ConfigError, ConflictError
from robustfair.losses import MinimiseCE, cross_entropy, kl_divergence, soft_cross_entropy
from robustfair.methods import CCM, EMA, WAT, LabelSmoothing, Method, Run, compose
from robustfair.models.modes import attacking
from robustfair.objectives import PGDAT, Standard, Trades
from robustfair.runs.checkpoint import checkpoint_names, read_state, write_state
from robustfair.training import Fitted, Schedule, fit
from robustfair.training.state import TrainState
from robustfair.training.way import Way
from robustfair.values import Attack, Batch, Forward, Loss, Model, State

Net = Callable[..., nn.Module]
Data = Callable[..., ImageDataset]
Differences = Callable[[TrainState, TrainState], list[str]]


def train(net: nn.Module, data: ImageDataset, *methods: Method, objective: Any = None, **rest: Any) -> Fitted:
    options: dict[str, Any] = {"schedule": Schedule(epochs=2, lr=0.1, batch_size=7), "validation": 0.25} | rest
    return fit(net, data, PGDAT(eps=0.1, steps=2) if objective is None else objective, methods=methods, **options)


# A method with a teacher, validation images and a second view


class Student(nn.Linear):
    pass


@dataclass(frozen=True, kw_only=True)
class Guided(Method):
    """Agree with a teacher on a view attacked towards its second choice, more where a class validates badly."""

    name: ClassVar[str] = "guided"
    claims: ClassVar[frozenset[str]] = frozenset({"loss.guided"})
    needs: ClassVar[frozenset[str]] = frozenset({"x_adv", "validation"})

    def networks(self, model: nn.Module) -> Mapping[str, nn.Module]:
        torch.manual_seed(1)
        return {"teacher": nn.Sequential(nn.Flatten(), nn.Linear(36, 3)).requires_grad_(False)}

    def at_epoch(self, state: State, run: Run) -> State:
        return state if run.finished else {"weight": 1 - run.validate(steps=3).robust.nan_to_num(0)}

    def prepare(self, batch: Batch, state: State, run: Run) -> Batch:
        return replace(batch, extra={**batch.extra, "guided": run.networks["guided/teacher"](batch.x)})

    def examples(self, batch: Batch, state: State, run: Run) -> Batch:
        second = batch.extra["guided"].topk(2).indices[:, 1]
        attack = replace(run.objective.attacks(batch)["x_adv"], goal=MinimiseCE(), target=second)
        return replace(batch, views={**batch.views, "guided": run.attacked(batch, attack, "guided")})

    def loss(self, loss: Loss, batch: Batch, state: State, run: Run) -> Loss:
        term = kl_divergence(batch.extra["guided"], run.forward(batch.views["guided"]))
        return loss.plus("guided", term, state["weight"].to(term.dtype)[batch.y])


def test_a_method_with_a_teacher_held_out_images_and_a_second_view(
    tiny_net: Net, tiny_data: Data, differences: Differences, tmp_path: Path
) -> None:
    states: list[TrainState] = []
    whole = train(tiny_net(), tiny_data(), Guided(), save=states.append)
    assert differences(whole.state, train(tiny_net(), tiny_data()).state) != []
    write_state(tmp_path, states[0], {})
    resumed = train(tiny_net(), tiny_data(), Guided(), resume=read_state(tmp_path, states[0].history))
    assert differences(whole.state, resumed.state) == []
    assert checkpoint_names(tmp_path) == ["best", "last"]


def test_held_out_images_that_a_method_needs_are_asked_for_before_the_first_step(
    tiny_net: Net, tiny_data: Data
) -> None:
    with pytest.raises(ConflictError, match="guided measures on held out images and this run has none: set validation"):
        train(tiny_net(), tiny_data(), Guided(), validation=0, select="last")


def test_attacked_images_that_a_method_needs_are_asked_for_before_the_first_step() -> None:
    with pytest.raises(ConflictError, match=r"guided needs attacked images, and standard .*use .*pgd-at"):
        compose(Standard(), [Guided()])


# Networks that train


@dataclass(frozen=True, kw_only=True)
class Beside(Method):
    """A linear network that learns the labels from attacked images beside the model."""

    name: ClassVar[str] = "beside"
    claims: ClassVar[frozenset[str]] = frozenset({"loss.beside"})

    def networks(self, model: nn.Module) -> Mapping[str, nn.Module]:
        torch.manual_seed(2)
        return {"net": nn.Sequential(nn.Flatten(), nn.BatchNorm1d(36), nn.Linear(36, 3))}

    def loss(self, loss: Loss, batch: Batch, state: State, run: Run) -> Loss:
        assert batch.x_adv is not None
        term = cross_entropy(run.networks["beside/net"](batch.x_adv), batch.y)
        return loss.plus("beside", term, torch.ones_like(term))


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_a_network_trains_beside_the_model_and_moves_nothing_of_it(
    tiny_net: Net, tiny_data: Data, differences: Differences, tmp_path: Path, optimizer: Any
) -> None:
    states: list[TrainState] = []
    schedule = Schedule(epochs=3, lr=0.1, batch_size=7, optimizer=optimizer)
    whole = train(tiny_net(), tiny_data(), Beside(), schedule=schedule, save=states.append)
    alone = train(tiny_net(), tiny_data(), schedule=schedule)
    assert all(torch.equal(tensor, whole.state.weights[name]) for name, tensor in alone.state.weights.items())
    trained = [state.networks["beside/net"] for state in states]
    assert not torch.equal(trained[0]["2.weight"], trained[1]["2.weight"])
    assert not torch.equal(trained[0]["1.running_mean"], trained[1]["1.running_mean"])
    for state in states[:2]:
        write_state(tmp_path, state, {})
    resumed = train(
        tiny_net(), tiny_data(), Beside(), schedule=schedule, resume=read_state(tmp_path, states[1].history)
    )
    assert differences(whole.state, resumed.state) == []


def test_the_optimizer_moves_a_network_as_it_would_alone(tiny_net: Net, tiny_data: Data) -> None:
    """Against a plain loop over the same batches."""
    seen: list[tuple[Tensor, Tensor]] = []

    class Watch(Method):
        name = "watch"

        def after_step(self, state: State, batch: Batch, loss: Loss, run: Run) -> State:
            assert batch.x_adv is not None
            seen.append((batch.x_adv, batch.y))
            return state

    schedule = Schedule(epochs=2, lr=0.1, batch_size=7, weight_decay=0.01)
    state = train(tiny_net(), tiny_data(), Beside(), Watch(), schedule=schedule).state
    network = Beside().networks(tiny_net())["net"]
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)
    for number, (x, y) in enumerate(seen):
        optimizer.param_groups[0]["lr"] = schedule.lr_at(number // (len(seen) // 2), 0, 1)
        optimizer.zero_grad()
        nn.functional.cross_entropy(network(x), y).backward()
        optimizer.step()
    for name, tensor in network.state_dict().items():
        torch.testing.assert_close(state.networks["beside/net"][name], tensor)


def test_a_teacher_stays_as_it_is_in_eval_mode(tiny_net: Net, tiny_data: Data) -> None:
    teacher = tiny_net(seed=5, dropout=0.5).requires_grad_(False).train()
    modes: list[bool] = []

    class Taught(Method):
        name = "taught"
        claims = frozenset({"batch.soft"})

        def networks(self, model: nn.Module) -> Mapping[str, nn.Module]:
            return {"teacher": teacher}

        def prepare(self, batch: Batch, state: State, run: Run) -> Batch:
            modes.append(teacher.training)
            return replace(batch, soft=torch.softmax(run.networks["taught/teacher"](batch.x), 1))

    before = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
    state = train(tiny_net(), tiny_data(), Taught()).state
    assert set(modes) == {False}
    assert all(torch.equal(before[name], tensor) for name, tensor in teacher.state_dict().items())
    assert list(state.frozen) == ["taught/teacher"]
    assert not any(name.startswith("taught") for name in state.optimizer)


@pytest.mark.parametrize("others", [(), (EMA(init="random"),)])
def test_weights_of_networks_are_drawn_by_the_seed_of_the_run_and_the_method(
    tiny_net: Net, tiny_data: Data, others: tuple[Method, ...]
) -> None:
    drawn: list[Tensor] = []

    class Draws(Method):
        def networks(self, model: nn.Module) -> Mapping[str, nn.Module]:
            drawn.append(torch.randn(4))
            return {}

    class First(Draws):
        name = "first"

    class Second(Draws):
        name = "second"

    def draws(seed: int, *methods: Method) -> list[Tensor]:
        drawn.clear()
        torch.manual_seed(3)
        before = torch.random.get_rng_state()
        train(tiny_net(), tiny_data(), *methods, *others, seed=seed)
        assert torch.equal(before, torch.random.get_rng_state())
        return list(drawn)

    first, second = draws(0, First(), Second())
    second_again, first_again = draws(0, Second(), First())
    assert torch.equal(first, first_again)
    assert torch.equal(second, second_again)
    assert not torch.equal(first, second)
    assert not torch.equal(first, draws(1, First())[0])


def test_images_that_a_method_cannot_act_on_are_refused_before_the_first_step(tiny_net: Net, tiny_data: Data) -> None:
    seen: list[list[int]] = []

    class Picky(Method):
        name = "picky"

        def check_classes(self, counts: Tensor, groups: Sequence[int] | None = None) -> None:
            seen.append(counts.tolist())
            raise ConfigError(self.name, "images", allowed="others", got=counts.tolist())

    model = tiny_net()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ConfigError, match="picky: images must be others"):
        train(model, tiny_data((8, 4, 12)), Picky())
    assert seen == [[6, 3, 9]], "of the images that are left to train on"
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_a_run_is_told_its_way_once_nothing_can_be_refused(tiny_net: Net, tiny_data: Data) -> None:
    told: list[Way] = []

    class Late(Method):
        name = "late"

        def at_epoch(self, state: State, run: Run) -> State:
            raise ConfigError(self.name, "images", allowed="others", got="these")

    with pytest.raises(ConfigError, match="late: images must be others"):
        train(tiny_net(), tiny_data(), Late(), on_way=told.append)
    assert told == []
    train(tiny_net(), tiny_data(), on_way=told.append)
    assert len(told) == 1


def test_an_objective_that_a_method_cannot_act_on_is_refused_when_they_are_composed() -> None:
    class Picky(Method):
        name = "picky"

        def check_objective(self, objective: str) -> None:
            raise ConfigError(self.name, "mode", allowed=f"another on {objective}", got="this")

    with pytest.raises(ConfigError, match="picky: mode must be another on pgd-at, got 'this'"):
        compose(PGDAT(), [Picky()])


# More than one attack


@dataclass(frozen=True, kw_only=True)
class TwoViews(PGDAT):
    """The attacked images, and the last points before they crossed."""

    name: ClassVar[str] = "two-views"
    terms: ClassVar[frozenset[str]] = frozenset({"label", "inside"})
    owns: ClassVar[frozenset[str]] = frozenset({"attack.stop", "attack.keep"})

    def attacks(self, batch: Batch) -> dict[str, Attack]:
        whole = self.attack(batch)
        return {"x_adv": whole, "inside": replace(whole, stop=FreezeFooled(), keep="inside")}

    def __call__(self, model: Model, batch: Batch) -> Loss:
        assert batch.x_adv is not None
        adv, inside = model(batch.x_adv), model(batch.views["inside"])
        return Loss.of(
            Forward(adv=adv), label=(cross_entropy(adv, batch.y), 1.0), inside=(cross_entropy(inside, batch.y), 0.5)
        )


def test_every_attack_of_an_objective_is_edited_and_drawn_apart(tiny_net: Net, tiny_data: Data) -> None:
    seen: list[Batch] = []

    class Watch(Method):
        name = "watch"
        claims = frozenset({"attack.eps"})

        def attack(self, attack: Attack, batch: Batch, state: State, run: Run) -> Attack:
            return replace(attack, eps=attack.eps / 2)

        def after_step(self, state: State, batch: Batch, loss: Loss, run: Run) -> State:
            seen.append(batch)
            return state

    train(tiny_net(), tiny_data(), Watch(), objective=TwoViews(eps=0.2, steps=2, step_size=0.0))
    for batch in seen:
        assert batch.x_adv is not None
        for images in (batch.x_adv, batch.views["inside"]):
            assert 0.05 < float((images - batch.x).abs().max()) <= 0.1 + 1e-6
        assert not torch.equal(batch.x_adv, batch.views["inside"])


def test_what_makes_an_objective_is_not_for_methods_to_set() -> None:
    class Stops(Method):
        name = "stops"
        claims = frozenset({"attack.stop"})

    with pytest.raises(ConflictError, match=r"stops sets attack\.stop, but two-views is defined by its own"):
        compose(TwoViews(), [Stops()])


def test_the_point_inside_is_the_iterate_before_the_first_that_is_wrong(tiny_net: Net) -> None:
    model = tiny_net(dtype=torch.float64).eval()
    x = torch.rand(24, 1, 6, 6, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    with torch.no_grad():
        y = model(x).argmax(1)
    y[:2] = (y[:2] + 1) % 3  # wrong from the start
    attack = replace(PGDAT(eps=0.8, step_size=0.1, steps=8, start="zero").attack(Batch(x, y, y, 0)), stop=None)
    paths = [x]
    for steps in range(1, 9):
        paths.append(pgd(model, x, y, replace(attack, steps=steps), torch.Generator()))
    with torch.no_grad():
        wrong = torch.stack([model(point).argmax(1) != y for point in paths])
    expected = x.clone()
    crossed = 0
    for row in range(len(x)):
        first = next((step for step in range(8) if wrong[step, row]), None)  # the last iterate is not looked at
        expected[row] = paths[8][row] if first is None else paths[max(first - 1, 0)][row]
        crossed += first is not None and first > 0
    inside = pgd(model, x, y, replace(attack, stop=FreezeFooled(), keep="inside"), torch.Generator())
    assert 3 <= crossed < len(x)
    torch.testing.assert_close(inside, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("changes", [{"stop": None}, {"restarts": 2}])
def test_inside_needs_a_stop_rule_and_one_start(tiny_net: Net, changes: dict[str, Any]) -> None:
    x, y = torch.rand(3, 1, 6, 6), torch.arange(3)
    attack = replace(PGDAT().attack(Batch(x, y, y, 0)), stop=FreezeFooled(), keep="inside")
    with pytest.raises(ConfigError, match="inside only under a stop rule"):
        pgd(tiny_net(), x, y, replace(attack, **changes), torch.Generator())


# The run as methods see it


class Probe(Method):
    """Calls a function at every boundary."""

    name = "probe"

    def __init__(self, look: Callable[[Run], None]) -> None:
        self.look = look

    def at_epoch(self, state: State, run: Run) -> State:
        self.look(run)
        return state


def test_batches_are_those_of_the_coming_epoch_and_the_held_out_images_as_they_are(
    tiny_net: Net, tiny_data: Data
) -> None:
    announced: list[list[Tensor]] = []
    trained: list[Tensor] = []
    held: list[int] = []

    def look(run: Run) -> None:
        announced.append([batch.x for batch in run.batches("train")])
        held.append(sum(len(batch.y) for batch in run.batches("validation")))
        assert len(run.labels) == sum(len(x) for x in announced[-1])
        for batch in run.batches("train"):
            assert torch.equal(run.labels[batch.index], batch.y)

    class Watch(Method):
        name = "watch"

        def after_step(self, state: State, batch: Batch, loss: Loss, run: Run) -> State:
            trained.append(batch.x)
            return state

    train(tiny_net(), tiny_data(), Probe(look), Watch())
    assert held == [9, 9, 9]
    for x, y in zip(trained, [x for epoch in announced[:2] for x in epoch], strict=True):
        assert torch.equal(x, y)


def test_batches_are_attacked_in_eval_mode_and_leave_the_model_alone(tiny_net: Net, tiny_data: Data) -> None:
    counted: list[Tensor] = []

    def look(run: Run) -> None:
        before = {name: tensor.clone() for name, tensor in run.model.state_dict().items()}
        for batch in run.batches("validation", lambda b: PGDAT(eps=0.3, steps=3, attack_mode="train").attack(b)):
            assert batch.x_adv is not None
            assert 0.2 < float((batch.x_adv - batch.x).abs().max()) <= 0.3 + 1e-6
            with attacking(run.model, "eval"), torch.no_grad():
                assert torch.equal(run.predict(batch.x_adv), run.model(batch.x_adv))
            counted.append(run.predict(batch.x_adv))
        assert all(torch.equal(before[name], tensor) for name, tensor in run.model.state_dict().items())

    state = train(tiny_net(), tiny_data(), Probe(look)).state
    plain = train(tiny_net(), tiny_data()).state
    assert len(counted) == 3
    assert all(torch.equal(plain.weights[name], tensor) for name, tensor in state.weights.items())


def test_batches_under_all_attacks_of_an_objective_have_its_views(tiny_net: Net, tiny_data: Data) -> None:
    """Drawn apart, so that an objective's loss can be taken on held out images; WAT takes it."""
    seen: list[Batch] = []

    def look(run: Run) -> None:
        for batch in run.batches("validation", run.objective.attacks):
            assert torch.equal(run.objective(run.predict, batch).weight, torch.ones(9))
            seen.append(batch)

    train(tiny_net(), tiny_data(), Probe(look), WAT(), objective=TwoViews(eps=0.2, steps=2, step_size=0.0))
    assert len(seen) == 3
    for batch in seen:
        assert batch.x_adv is not None
        assert list(batch.views) == ["inside"]
        assert not torch.equal(batch.x_adv, batch.views["inside"])


def test_batches_are_attacked_by_the_engine_of_training_in_a_stream_of_their_own(
    tiny_net: Net, tiny_data: Data, monkeypatch: pytest.MonkeyPatch
) -> None:
    from robustfair.training.engine import Engine

    asked: list[tuple[str, str]] = []
    attack_of = Engine.attack

    def watched(self: Engine, batch: Batch, attack: Attack, **rest: Any) -> Tensor:
        asked.append((rest.get("stream", "attack"), attack.mode))
        return attack_of(self, batch, attack, **rest)

    def look(run: Run) -> None:
        goal = PGDAT(eps=0.3, steps=3, attack_mode="train")
        asked.clear()
        for batch in run.batches("train", goal.attack):
            own = replace(goal.attack(batch), mode="eval")
            assert batch.x_adv is not None
            assert torch.equal(batch.x_adv, pgd(run.model, batch.x, batch.y, own, batch.rng("measure")))
        assert set(asked) == {("measure", "eval")}

    monkeypatch.setattr(Engine, "attack", watched)
    train(tiny_net(), tiny_data(), Probe(look), kernels=False)


def test_validation_is_measured_once_a_boundary_for_each_number_of_steps(
    tiny_net: Net, tiny_data: Data, monkeypatch: pytest.MonkeyPatch
) -> None:
    from robustfair.training import run as module

    asked: list[int] = []
    tally_batches = module.tally_batches
    monkeypatch.setattr(module, "tally_batches", lambda *args, **rest: asked.append(1) or tally_batches(*args, **rest))
    reached: list[list[Tensor]] = []

    def look(run: Run) -> None:
        asked.clear()
        reached.append([run.validate(steps=steps).robust for steps in (10, 40, 10, 40)])
        assert len(asked) == 2
        asked.clear()

    train(tiny_net(), tiny_data(), Probe(look), objective=PGDAT(eps=0.15, steps=1))
    assert len(asked) == 0, "fit asked again for what a method had measured"
    for ten, forty, again, _ in reached:
        assert torch.equal(ten, again)
        assert bool((forty <= ten).all())


def test_streams_are_keyed_by_seed_epoch_step_and_name(tiny_net: Net, tiny_data: Data) -> None:
    def draws(seed: int) -> list[float]:
        found: list[float] = []

        def look(run: Run) -> None:
            for name in ("one", "two", "one"):
                found.append(float(torch.rand((), generator=run.rng(name))))

        train(tiny_net(), tiny_data(), Probe(look), seed=seed)
        return found

    first = draws(0)
    assert first == draws(0)
    assert first[0::3] == first[2::3]
    assert len({*first, *draws(1)}) == 12


def test_whether_an_epoch_follows_is_known(tiny_net: Net, tiny_data: Data) -> None:
    seen: list[bool] = []
    train(tiny_net(), tiny_data(), Probe(lambda run: seen.append(run.finished)))
    assert seen == [False, False, True]


def test_the_super_classes_of_the_data_are_known(tiny_net: Net, tiny_data: Data) -> None:
    seen: list[Tensor | None] = []

    class Looks(Method):
        name = "looks"

        def at_epoch(self, state: State, run: Run) -> State:
            seen.append(run.groups)
            return state

    grouped = replace(tiny_data(), groups=(1, 0, 1), group_names=("a", "b"))
    for data, expected in ((grouped, [1, 0, 1]), (tiny_data(), None)):
        train(tiny_net(), data, Looks())
        groups = seen[-1]
        assert (None if groups is None else groups.tolist()) == expected


def test_one_number_of_the_batch_is_learnt_from_and_has_no_mean_per_class(tiny_net: Net, tiny_data: Data) -> None:
    class Adds(Method):
        name = "adds"
        claims = frozenset({"loss.adds"})

        def loss(self, loss: Loss, batch: Batch, state: State, run: Run) -> Loss:
            assert loss.out.adv is not None
            return loss.plus("adds", loss.out.adv.square().mean(), loss.weight.new_ones(()))

    adding = train(tiny_net(), tiny_data(), Adds()).state.history
    assert adding[0]["per_class"].keys() == {"coef.label", "weight", "eps"}
    assert adding[0]["loss"] > train(tiny_net(), tiny_data()).state.history[0]["loss"]


def test_forward_follows_the_loss_to_other_weights(tiny_net: Net, tiny_data: Data) -> None:
    """A scope that takes the loss on a copy takes all passes of it there."""
    twin = tiny_net(seed=9)
    found: list[tuple[Tensor, Tensor]] = []

    class Adds(Method):
        name = "adds"
        claims = frozenset({"loss.adds"})

        def loss(self, loss: Loss, batch: Batch, state: State, run: Run) -> Loss:
            return loss.plus("adds", run.forward(batch.x).logsumexp(1), torch.ones_like(loss.weight))

        def around_gradient(self, run: Run, batch: Batch, loss_at: Any, state: State) -> Any:
            found.append((loss_at(twin).terms["adds"], twin(batch.x).logsumexp(1)))
            return super().around_gradient(run, batch, loss_at, state)

    twin.eval()
    train(tiny_net(), tiny_data(), Adds())
    for ours, expected in found:
        assert torch.equal(ours, expected)


# Edits that would be lost, and claims


def test_soft_labels_under_a_replaced_label_term_are_refused(tiny_net: Net, tiny_data: Data) -> None:
    class Distils(Method):
        name = "distils"
        claims = frozenset({"loss.label"})
        replaces = frozenset({"label"})

        def loss(self, loss: Loss, batch: Batch, state: State, run: Run) -> Loss:
            assert loss.out.adv is not None
            soft = torch.full_like(loss.out.adv, 1 / 3)
            return replace(loss, terms={**loss.terms, "label": soft_cross_entropy(loss.out.adv, soft)})

    for order in ([Distils(), LabelSmoothing()], [LabelSmoothing(), Distils()]):
        with pytest.raises(ConflictError, match=r"label-smoothing sets batch\.soft, and distils replaces the term"):
            compose(PGDAT(), order)
    train(tiny_net(), tiny_data(), Distils(), EMA(decay=0.5))

    class Sly(Distils):
        name = "sly"
        replaces = frozenset()

    with pytest.raises(ConflictError, match="sly replaced the term 'label' of the loss: add it to replaces"):
        train(tiny_net(), tiny_data(), Sly())


@pytest.mark.parametrize(
    "field",
    ["steps", "norm", "start", "start_radius", "mode", "keep", "restarts", "box_first", "box", "ball", "noise"],
)
def test_a_value_written_as_it_was_is_a_write(stand_in_run: Callable[..., Any], field: str) -> None:
    batch = Batch(x=torch.rand(3, 1, 4, 4), y=torch.arange(3), index=torch.arange(3), seed=0)
    before = Trades().attack(batch)

    class Same(Method):
        name = "same"

        def attack(self, attack: Attack, batch: Batch, state: State, run: Run) -> Attack:
            return replace(attack, **{field: getattr(before, field)})

    run = stand_in_run()
    with pytest.raises(ConflictError, match=rf"same changed attack\.{field} without claiming it"):
        compose(Trades(), [Same()]).attacks(batch, {"same": {}}, run)
    (left,) = compose(Trades(), [CCM()]).attacks(batch, {"ccm": CCM().at_epoch({}, run)}, run).values()
    assert type(getattr(left, field)) is type(getattr(before, field)), "the words of the check have leaked"
    assert replace(left, eps=before.eps, step_size=before.step_size) == before


@pytest.mark.parametrize("field", ["extra", "views"])
def test_a_method_keeps_things_under_its_own_name_only(field: str, stand_in_run: Callable[..., Any]) -> None:
    batch = Batch(x=torch.rand(3, 1, 4, 4), y=torch.arange(3), index=torch.arange(3), seed=0, x_adv=torch.rand(3))

    def keeping(key: str) -> Method:
        class Keeps(Method):
            name = "keeps"

            def examples(self, batch: Batch, state: State, run: Run) -> Batch:
                return replace(batch, **{field: {**getattr(batch, field), key: batch.x}})

        return Keeps()

    run = stand_in_run()
    compose(Trades(), [keeping("keeps")]).examples(batch, {"keeps": {}}, run)
    with pytest.raises(ConflictError, match=rf"keeps changed batch\.{field} under another name than its own"):
        compose(Trades(), [keeping("other")]).examples(batch, {"keeps": {}}, run)


def test_attacked_images_are_not_for_the_hook_before_the_attack(tiny_net: Net, tiny_data: Data) -> None:
    class Early(Method):
        name = "early"
        claims = frozenset({"batch.x_adv"})

        def prepare(self, batch: Batch, state: State, run: Run) -> Batch:
            return replace(batch, x_adv=batch.x)

    with pytest.raises(
        ConflictError, match="early sets x_adv before the attack, which sets it anew: do it in examples"
    ):
        train(tiny_net(), tiny_data(), Early())


def test_a_target_comes_with_a_goal() -> None:
    class Aims(Method):
        name = "aims"
        claims = frozenset({"attack.target"})

    with pytest.raises(ConflictError, match=r"aims sets attack\.target and keeps the goal"):
        compose(Trades(), [Aims()])


def test_a_shift_moves_the_logits_that_meet_the_label_and_keeps_soft_labels(tiny_net: Net) -> None:
    x = torch.rand(5, 1, 6, 6, dtype=torch.float64)
    shift = torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64)
    soft = torch.softmax(torch.randn(5, 3, dtype=torch.float64), 1)
    model = tiny_net(dtype=torch.float64).eval()
    batch = Batch(x=x, y=torch.arange(5) % 3, index=torch.arange(5), seed=0, x_adv=x, shift=shift)
    for objective in (PGDAT(), Standard(), Trades()):
        plain = objective(model, batch).terms["label"]
        torch.testing.assert_close(plain, nn.functional.cross_entropy(model(x) + shift, batch.y, reduction="none"))
        smoothed = objective(model, replace(batch, soft=soft)).terms["label"]
        torch.testing.assert_close(smoothed, -(soft * torch.log_softmax(model(x) + shift, 1)).sum(1))


def test_going_on_with_other_methods_is_one_line(tiny_net: Net, tiny_data: Data) -> None:
    states: list[TrainState] = []
    train(tiny_net(), tiny_data(), EMA(decay=0.5), save=states.append)
    for methods in ([], [EMA(decay=0.5), CCM()], [CCM()]):
        message = r"fit: resume must be the state of a run with the same methods, got .*(ema|ccm) only in"
        with pytest.raises(ConfigError, match=message):
            train(tiny_net(), tiny_data(), *methods, resume=states[0])


def test_only_the_head_is_trained_where_only_names_it(tiny_net: Net, tiny_data: Data) -> None:
    for only, moved in ((("head",), {"head.weight", "head.bias"}), (("head.weight",), {"head.weight"})):
        before = tiny_net().state_dict()
        after = train(tiny_net(), tiny_data(), schedule=Schedule(epochs=1, lr=0.1, batch_size=7, only=only)).state
        assert {name for name, tensor in before.items() if not torch.equal(tensor, after.weights[name])} == moved


def test_the_counts_of_an_epoch_and_of_validation_are_totals(
    tiny_net: Net, tiny_data: Data, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With two processes that see the same, each count would be twice as large."""
    seen: list[tuple[int, int]] = []

    def look(run: Run) -> None:
        if run.train is not None:
            seen.append((int(run.train.count.sum()), int(run.validate().count.sum())))

    train(tiny_net(), tiny_data(), Probe(look))
    monkeypatch.setattr("robustfair.training.run.TrainingRun.total", lambda self, part: 2 * part)
    train(tiny_net(), tiny_data(), Probe(look))
    assert seen == [(27, 9), (27, 9), (54, 18), (54, 18)]
