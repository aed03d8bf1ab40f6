from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from reference import averaging as reference
from robustfair.data import ImageDataset
from robustfair.errors import ConfigError
from robustfair.methods import AWP, EMA, SWA
from robustfair.models.averages import UPDATES, reestimated, reinitialised
from robustfair.objectives import PGDAT, Standard
from robustfair.runs.checkpoint import read_state, write_state
from robustfair.runs.composition import read_composition
from robustfair.training import Schedule, fit
from robustfair.training.state import TrainState

Net = Callable[..., nn.Module]
Data = Callable[..., ImageDataset]
Run = Callable[..., object]
Average = EMA | SWA


def walk(model: nn.Module, seed: int) -> None:
    """Move every weight and buffer of the model to another place, as a step of training would."""
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in model.state_dict().values():
            if tensor.is_floating_point():
                tensor.add_(torch.randn(tensor.shape, generator=rng, dtype=tensor.dtype).abs())
            else:
                tensor.add_(1)


def copied(state: object) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in state.items()}  # type: ignore[attr-defined]


def follow(average: Average, run: object, steps: int = 5) -> tuple[dict[str, Tensor], list[dict[str, Tensor]]]:
    """The average's state after a walk, and the states of the model along it."""
    state, seen = {}, []
    for step in range(steps):
        walk(run.model, step)  # type: ignore[attr-defined]
        seen.append(copied(run.model.state_dict()))  # type: ignore[attr-defined]
        state = average.after_step(state, None, None, run)  # type: ignore[arg-type]
    return copied(state), seen


def entry_by_entry(seen: Sequence[dict[str, Tensor]], name: str, average: Callable[[list[float]], float]) -> Tensor:
    """The average of one tensor over the states of a walk, entry by entry."""
    paths = zip(*[state[name].flatten().tolist() for state in seen], strict=True)
    values = [average(list(path)) for path in paths]
    return torch.tensor(values, dtype=seen[0][name].dtype).view_as(seen[0][name])


def averaged(model: nn.Module, buffers: str) -> set[str]:
    """Names of what an average is taken of."""
    statistics = {"norm.running_mean", "norm.running_var"} if buffers == "average" else set()
    return set(dict(model.named_parameters())) | statistics


@pytest.mark.parametrize("buffers", ["copy", "average"])
@pytest.mark.parametrize("decay", [0.0, 0.5, 0.9, 1.0])
def test_the_average_is_the_closed_form(tiny_net: Net, stand_in_run: Run, decay: float, buffers: str) -> None:
    run = stand_in_run(model=tiny_net(dtype=torch.float64))
    ema = EMA(decay=decay, buffers=buffers)  # type: ignore[arg-type]
    state, seen = follow(ema, run)
    exported = ema.export(state, run)["ema"]
    for name, tensor in exported.items():
        if name in averaged(run.model, buffers):
            expected = entry_by_entry(seen, name, lambda path: reference.ema(path, decay))
            torch.testing.assert_close(tensor, expected, rtol=1e-12, atol=1e-12)
        else:
            assert torch.equal(tensor, seen[-1][name]), name


def test_decay_zero_is_the_model_and_decay_one_the_first(stand_in_run: Run) -> None:
    for decay, which in ((0.0, -1), (1.0, 0)):
        run = stand_in_run()
        state, seen = follow(EMA(decay=decay), run)
        assert state.pop(UPDATES) == 5
        assert all(torch.equal(tensor, seen[which][name]) for name, tensor in state.items())


@pytest.mark.parametrize(
    "average",
    [
        EMA(decay=0.7, buffers="average"),
        EMA(decay=0.7, buffers="average", ramp=True),
        SWA(begin=0, per="step", buffers="average"),
    ],
    ids=str,
)
def test_averaging_identical_models_changes_nothing(stand_in_run: Run, average: Average) -> None:
    run, state = stand_in_run(), {}
    for _ in range(20):
        state = average.after_step(state, None, None, run)  # type: ignore[arg-type]
    exported = average.export(state, run)[average.name]
    assert all(torch.equal(tensor, exported[name]) for name, tensor in run.model.state_dict().items())


@pytest.mark.parametrize("average", [EMA(decay=0.5), SWA(begin=0, per="step")], ids=lambda average: average.name)
def test_integer_counters_are_copied_never_averaged(stand_in_run: Run, average: Average) -> None:
    run = stand_in_run()
    for buffers in ("copy", "average"):
        average = replace(average, buffers=buffers)
        state, seen = follow(average, run)
        counter = average.export(state, run)[average.name]["norm.num_batches_tracked"]
        assert "norm.num_batches_tracked" not in state
        assert counter.dtype == torch.int64
        assert counter == seen[-1]["norm.num_batches_tracked"]


@pytest.mark.parametrize(
    ("average", "closed_form"),
    [
        (EMA(decay=0.5, per="epoch"), lambda path: reference.ema(path, 0.5)),
        (SWA(begin=0), reference.mean),
    ],
    ids=["ema", "swa"],
)
def test_per_epoch_it_moves_at_boundaries_only(
    stand_in_run: Run, average: Average, closed_form: Callable[[list[float]], float]
) -> None:
    run = stand_in_run()
    state = average.at_epoch({}, run)
    assert state == {}, "nothing has been trained yet"
    weights = []
    for epoch in range(1, 4):
        walk(run.model, epoch)
        assert average.after_step(state, None, None, run) is state  # type: ignore[arg-type]
        run.epoch = epoch
        state = average.at_epoch(state, run)
        weights.append(run.model.head.bias[0].item())
    assert state["head.bias"][0].item() == pytest.approx(closed_form(weights))


@pytest.mark.parametrize("per", ["step", "epoch"])
@pytest.mark.parametrize("cls", [EMA, SWA])
def test_the_first_weights_are_those_of_epoch_begin(stand_in_run: Run, cls: type[Average], per: Any) -> None:
    average = EMA(decay=1.0, per=per, begin=2) if cls is EMA else SWA(per=per, begin=2)
    run, state, entered = stand_in_run(), {}, []
    for epoch in range(4):
        run.epoch = epoch
        walk(run.model, epoch)
        state = average.after_step(state, None, None, run)  # type: ignore[arg-type]
        run.epoch = epoch + 1
        state = average.at_epoch(state, run)
        assert bool(state) == (epoch >= 2)
        assert bool(average.export(state, run)) == (epoch >= 2)
        if epoch >= 2:
            entered.append(run.model.head.weight.detach().clone())
    expected = entered[0] if cls is EMA else (entered[0] + entered[1]) / 2
    torch.testing.assert_close(state["head.weight"], expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("buffers", ["copy", "average", "reestimate"])
@pytest.mark.parametrize("average", [EMA(decay=0.5), SWA(begin=0, per="step")], ids=lambda average: average.name)
def test_the_average_shares_no_storage_with_the_model(stand_in_run: Run, average: Average, buffers: Any) -> None:
    """Nor does what was exported with the average, which moves in place."""
    run, average = stand_in_run(), replace(average, buffers=buffers)
    state = average.after_step({}, None, None, run)  # type: ignore[arg-type]
    exported = average.export(state, run)[average.name]
    kept = copied(state), copied(exported)
    walk(run.model, 0)
    assert all(torch.equal(tensor, kept[0][name]) for name, tensor in state.items())
    average.after_step(state, None, None, run)  # type: ignore[arg-type]
    assert all(torch.equal(tensor, kept[1][name]) for name, tensor in exported.items())


def test_reestimation_on_one_batch_is_its_mean_and_unbiased_variance(tiny_net: Net, stand_in_run: Run) -> None:
    model = tiny_net(dtype=torch.float64)
    x = torch.rand(5, 1, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    run = stand_in_run(model=model, images=(x,))
    found = reestimated(model, model.state_dict(), run.batches("train"))
    with torch.no_grad():
        features = model.conv(x)
    for channel in range(4):
        mean, variance = reference.mean_and_unbiased_variance(features[:, channel].flatten().tolist())
        assert found["norm.running_mean"][channel].item() == pytest.approx(mean, abs=1e-12)
        assert found["norm.running_var"][channel].item() == pytest.approx(variance, abs=1e-12)


@pytest.mark.parametrize("average", [EMA(decay=0.5), SWA(begin=0, per="step")], ids=lambda average: average.name)
def test_reestimation_weighs_batches_by_their_size(tiny_net: Net, stand_in_run: Run, average: Average) -> None:
    model = tiny_net(dtype=torch.float64)
    rng = torch.Generator().manual_seed(0)
    images = tuple(torch.rand(n, 1, 4, 4, generator=rng, dtype=torch.float64) for n in (7, 3, 2))
    run = stand_in_run(model=model, images=images)
    state, _ = follow(average, run)
    exported = average.export(state, run)[average.name]
    filled = tiny_net(dtype=torch.float64)
    filled.load_state_dict(exported)
    with torch.no_grad():
        features = [filled.conv(x) for x in images]
    for channel in range(4):
        values = [f[:, channel].flatten().tolist() for f in features]
        mean, variance = reference.pooled_by_size(values, [7, 3, 2])
        assert exported["norm.running_mean"][channel].item() == pytest.approx(mean, abs=1e-12)
        assert exported["norm.running_var"][channel].item() == pytest.approx(variance, abs=1e-12)


def test_reestimation_leaves_the_model_as_it_is(stand_in_run: Run) -> None:
    run = stand_in_run(images=(torch.rand(4, 1, 5, 5),))
    run.model.norm.eval()
    before, momentum = copied(run.model.state_dict()), run.model.norm.momentum
    reestimated(run.model, run.model.state_dict(), run.batches("train"))
    assert all(torch.equal(tensor, before[name]) for name, tensor in run.model.state_dict().items())
    assert run.model.training
    assert not run.model.norm.training
    assert run.model.norm.momentum == momentum


def test_a_run_too_short_is_remarked_upon() -> None:
    for average in (EMA(begin=3), SWA(begin=3)):
        assert average.remark(4) is None
        assert str(average.remark(3)).startswith(f"{average.name} begins at epoch 3")
    assert "never act" in str(SWA().remark(50))


# The mean


@pytest.mark.parametrize("buffers", ["copy", "average"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["double", "single"])
@pytest.mark.parametrize("models", [1, 2, 17])
def test_swa_is_the_arithmetic_mean(
    tiny_net: Net, stand_in_run: Run, models: int, dtype: torch.dtype, buffers: Any
) -> None:
    run, swa = stand_in_run(model=tiny_net(dtype=dtype)), SWA(begin=0, per="step", buffers=buffers)
    state, seen = follow(swa, run, steps=models)
    assert state[UPDATES] == models
    exported = swa.export(state, run)["swa"]
    for name, tensor in exported.items():
        if name in averaged(run.model, buffers):
            torch.testing.assert_close(tensor, entry_by_entry(seen, name, reference.mean), rtol=1e-6, atol=1e-6)
        else:
            assert torch.equal(tensor, seen[-1][name]), name


@pytest.mark.parametrize(("per", "begin"), [("step", 0), ("step", 1), ("epoch", 0), ("epoch", 1)])
def test_swa_of_a_run_is_the_mean_of_its_weights(tiny_net: Net, tiny_data: Data, per: Any, begin: int) -> None:
    """Those after every step, or at the end of every epoch, from epoch `begin` on."""
    model, per_step = tiny_net(), []
    schedule = Schedule(epochs=3, lr=0.1, batch_size=12)

    def keep(epoch: int, step: int) -> None:
        per_step.append((epoch, step, copied(model.state_dict())))

    methods = [SWA(per=per, begin=begin, buffers="average")]
    options: dict[str, Any] = {"schedule": schedule, "validation": 0, "select": "last"}
    found = fit(model, tiny_data(), PGDAT(eps=0.1, steps=1), methods=methods, on_step=keep, **options)
    last = max(step for _, step, _ in per_step)
    entered = [w for epoch, step, w in per_step if epoch >= begin and (per == "step" or step == last)]
    assert len(entered) == (3 - begin) * (last + 1 if per == "step" else 1)
    for name in averaged(model, "average"):
        expected = entry_by_entry(entered, name, reference.mean)
        torch.testing.assert_close(found.state.exports["swa"][name], expected, rtol=1e-5, atol=1e-6)
    assert found.chosen.candidate == "swa"


# Beginnings of an average


@pytest.mark.parametrize("buffers", ["copy", "average"])
@pytest.mark.parametrize("decay", [0.0, 0.5, 0.995])
def test_a_random_beginning_weighs_decay_to_the_number_of_updates(
    tiny_net: Net, stand_in_run: Run, decay: float, buffers: Any
) -> None:
    run = stand_in_run(model=tiny_net(dtype=torch.float64))
    ema = EMA(decay=decay, init="random", buffers=buffers)
    first = copied(reinitialised(run.model, run.rng("ema")).state_dict())
    state, seen = follow(ema, run, steps=6)
    assert state[UPDATES] == 6
    plain, _ = follow(EMA(decay=decay, buffers=buffers), stand_in_run(model=tiny_net(dtype=torch.float64)), steps=6)
    for name in averaged(run.model, buffers):
        expected = entry_by_entry([first, *seen], name, lambda path: reference.ema(path, decay))
        torch.testing.assert_close(state[name], expected, rtol=1e-12, atol=1e-12)
        bias = decay**6 * first[name] + (1 - decay) * decay**5 * seen[0][name] - decay**5 * seen[0][name]
        torch.testing.assert_close(state[name] - plain[name], bias, rtol=1e-9, atol=1e-9)


def test_a_random_beginning_depends_on_the_seed_of_the_run_alone(tiny_net: Net, stand_in_run: Run) -> None:
    model, other = tiny_net(seed=1), tiny_net(seed=2)
    before, stream = copied(model.state_dict()), torch.get_rng_state()
    rng = stand_in_run().rng("ema")
    first = reinitialised(model, rng).state_dict()
    torch.manual_seed(7)
    again, others = reinitialised(model, rng).state_dict(), reinitialised(other, rng).state_dict()
    torch.set_rng_state(stream)
    another = reinitialised(model, stand_in_run(seed=1).rng("ema")).state_dict()
    assert not torch.allclose(first["conv.weight"], another["conv.weight"], atol=1e-3)
    assert torch.equal(torch.get_rng_state(), stream)
    assert all(torch.equal(tensor, again[name]) for name, tensor in first.items())
    assert all(torch.equal(tensor, others[name]) for name, tensor in first.items())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not torch.allclose(first["conv.weight"], before["conv.weight"], atol=1e-3)
    assert torch.equal(first["norm.running_var"], torch.ones(4))


@pytest.mark.parametrize("decay", [0.15, 0.4, 0.999])
def test_a_ramp_bounds_the_decay_of_every_update(tiny_net: Net, stand_in_run: Run, decay: float) -> None:
    run = stand_in_run(model=tiny_net(dtype=torch.float64))
    state, seen = follow(EMA(decay=decay, ramp=True), run, steps=12)
    for name in averaged(run.model, "copy"):
        expected = entry_by_entry(seen, name, lambda path: reference.ramped_ema(path, decay))
        torch.testing.assert_close(state[name], expected, rtol=1e-12, atol=1e-12)


def test_a_ramp_from_a_random_beginning_starts_with_a_tenth(tiny_net: Net, stand_in_run: Run) -> None:
    """Update 0 meets the random weights, so that its decay is 1/10; the copied beginning is an update itself."""
    run = stand_in_run(model=tiny_net(dtype=torch.float64))
    first = copied(reinitialised(run.model, run.rng("ema")).state_dict())
    state, seen = follow(EMA(decay=0.9, ramp=True, init="random"), run, steps=2)
    for name in averaged(run.model, "copy"):
        one = 0.1 * first[name] + 0.9 * seen[0][name]
        torch.testing.assert_close(state[name], 2 / 11 * one + 9 / 11 * seen[1][name], rtol=1e-12, atol=1e-12)


# Runs


@pytest.mark.parametrize(
    "average",
    [
        EMA(decay=0.9, init="random", ramp=True),
        EMA(decay=0.9, per="epoch", init="random", buffers="average"),
        EMA(decay=0.9, ramp=True, begin=1, buffers="copy"),
        SWA(begin=0),
        SWA(begin=1, per="step", buffers="average"),
    ],
    ids=str,
)
def test_a_run_goes_on_exactly_from_files(
    tiny_net: Net,
    tiny_data: Data,
    differences: Callable[[TrainState, TrainState], list[str]],
    tmp_path: Path,
    average: Average,
) -> None:
    def run(**rest: Any) -> TrainState:
        schedule = Schedule(epochs=4, lr=0.1, batch_size=7)
        methods = [AWP(), average]
        options: dict[str, Any] = {"schedule": schedule, "validation": 0.25, **rest}
        return fit(tiny_net(dropout=0.2), tiny_data(), PGDAT(eps=0.1, steps=1), methods=methods, **options).state

    states: list[TrainState] = []
    whole = run(save=states.append)
    for state in states:
        write_state(tmp_path, state, {})
        read = read_state(tmp_path, state.history)
        assert differences(state, read) == []
        assert (UPDATES in read.methods[average.name]) == bool(read.methods[average.name])
        assert differences(whole, run(resume=read)) == []
    assert int(whole.methods[average.name][UPDATES]) > 1


@pytest.mark.parametrize(
    ("name", "field", "wrong"),
    [
        ("ema", "decay", -0.1),
        ("ema", "decay", 1.01),
        ("ema", "decay", float("nan")),
        ("ema", "begin", -1),
        ("ema", "per", "batch"),
        ("ema", "buffers", "mean"),
        ("ema", "init", "zero"),
        ("swa", "begin", -1),
        ("swa", "per", "batch"),
        ("swa", "buffers", "mean"),
    ],
)
def test_a_wrong_value_is_refused_with_owner_and_field(name: str, field: str, wrong: Any) -> None:
    with pytest.raises(ConfigError, match=f"^{name}: {field} must be"):
        {"ema": EMA, "swa": SWA}[name](**{field: wrong})
    with pytest.raises(ConfigError, match=f"^{name}: {field} must be"):
        read_composition(f"pgd-at + {name}({field}={wrong})")


def test_a_run_begun_before_updates_were_counted_goes_on(
    tiny_net: Net, tiny_data: Callable[..., Any], differences: Callable[..., list[str]]
) -> None:
    states: list[Any] = []
    ema, schedule = EMA(decay=0.5), Schedule(epochs=3, lr=0.1, batch_size=7)
    options = {"methods": (ema,), "schedule": schedule, "validation": 0, "select": "last"}
    whole = fit(tiny_net(), tiny_data(), Standard(), save=states.append, **options)
    uncounted = {name: tensor for name, tensor in states[0].methods["ema"].items() if name != UPDATES}
    resumed = fit(tiny_net(), tiny_data(), Standard(), resume=replace(states[0], methods={"ema": uncounted}), **options)
    assert differences(whole.state, resumed.state) == [f"method ema/{UPDATES}"]


def test_a_random_start_leaves_every_other_stream_alone(monkeypatch: pytest.MonkeyPatch, stand_in_run: Run) -> None:
    run, before = stand_in_run(), torch.get_rng_state()
    monkeypatch.setattr(torch.cuda, "manual_seed_all", lambda seed: pytest.fail("seeds every GPU"))
    EMA(init="random").after_step({}, None, None, run)  # type: ignore[arg-type]
    assert torch.equal(torch.get_rng_state(), before)
