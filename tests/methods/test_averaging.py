from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from reference import averaging as reference
from robustfair.methods import EMA
from robustfair.methods.averaging import UPDATES, reestimated

Net = Callable[..., nn.Module]
Run = Callable[..., object]


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


def follow(ema: EMA, run: object, steps: int = 5) -> tuple[dict[str, Tensor], list[dict[str, Tensor]]]:
    """States of the model along a walk, and the average's state after it."""
    state, seen = {}, []
    for step in range(steps):
        walk(run.model, step)  # type: ignore[attr-defined]
        seen.append(copied(run.model.state_dict()))  # type: ignore[attr-defined]
        state = ema.after_step(state, None, None, run)  # type: ignore[arg-type]
    return copied(state), seen


@pytest.mark.parametrize("buffers", ["copy", "average"])
@pytest.mark.parametrize("decay", [0.0, 0.5, 0.9, 1.0])
def test_the_average_is_the_closed_form(tiny_net: Net, stand_in_run: Run, decay: float, buffers: str) -> None:
    run = stand_in_run(model=tiny_net(dtype=torch.float64))
    ema = EMA(decay=decay, buffers=buffers)  # type: ignore[arg-type]
    state, seen = follow(ema, run)
    exported = ema.export(state, run)["ema"]
    averaged = set(dict(run.model.named_parameters()))
    if buffers == "average":
        averaged |= {"norm.running_mean", "norm.running_var"}
    for name, tensor in exported.items():
        if name in averaged:
            paths = zip(*[s[name].flatten().tolist() for s in seen], strict=True)
            expected = torch.tensor([reference.ema(path, decay) for path in paths], dtype=tensor.dtype)
            torch.testing.assert_close(tensor.flatten(), expected, rtol=1e-12, atol=1e-12)
        else:
            assert torch.equal(tensor, seen[-1][name]), name


def test_decay_zero_is_the_model_and_decay_one_the_first(stand_in_run: Run) -> None:
    for decay, which in ((0.0, -1), (1.0, 0)):
        run = stand_in_run()
        state, seen = follow(EMA(decay=decay), run)
        assert state.pop(UPDATES) == 5
        assert all(torch.equal(tensor, seen[which][name]) for name, tensor in state.items())


def test_averaging_identical_models_changes_nothing(stand_in_run: Run) -> None:
    run, ema, state = stand_in_run(), EMA(decay=0.7, buffers="average"), {}
    for _ in range(20):
        state = ema.after_step(state, None, None, run)  # type: ignore[arg-type]
    exported = ema.export(state, run)["ema"]
    assert all(torch.equal(tensor, exported[name]) for name, tensor in run.model.state_dict().items())


def test_integer_counters_are_copied_never_averaged(stand_in_run: Run) -> None:
    run = stand_in_run()
    for buffers in ("copy", "average"):
        ema = EMA(decay=0.5, buffers=buffers)  # type: ignore[arg-type]
        state, seen = follow(ema, run)
        counter = ema.export(state, run)["ema"]["norm.num_batches_tracked"]
        assert "norm.num_batches_tracked" not in state
        assert counter.dtype == torch.int64
        assert counter == seen[-1]["norm.num_batches_tracked"]


def test_per_epoch_it_moves_at_boundaries_only(stand_in_run: Run) -> None:
    run, ema = stand_in_run(), EMA(decay=0.5, per="epoch")
    state = ema.at_epoch({}, run)
    assert state == {}, "nothing has been trained yet"
    weights = []
    for epoch in range(1, 4):
        walk(run.model, epoch)
        assert ema.after_step(state, None, None, run) is state  # type: ignore[arg-type]
        run.epoch = epoch
        state = ema.at_epoch(state, run)
        weights.append(run.model.head.bias[0].item())
    assert state["head.bias"][0].item() == pytest.approx(reference.ema(weights, 0.5))


@pytest.mark.parametrize("per", ["step", "epoch"])
def test_the_first_weights_are_those_of_epoch_begin(stand_in_run: Run, per: str) -> None:
    run, ema, state = stand_in_run(), EMA(decay=1.0, per=per, begin=2), {}  # type: ignore[arg-type]
    first = None
    for epoch in range(4):
        run.epoch = epoch
        walk(run.model, epoch)
        state = ema.after_step(state, None, None, run)  # type: ignore[arg-type]
        run.epoch = epoch + 1
        state = ema.at_epoch(state, run)
        assert bool(state) == (epoch >= 2)
        assert bool(ema.export(state, run)) == (epoch >= 2)
        if epoch == 2:
            first = run.model.head.weight.detach().clone()
    assert torch.equal(state["head.weight"], first)


def test_the_average_shares_no_storage_with_the_model(stand_in_run: Run) -> None:
    run, ema = stand_in_run(), EMA(decay=0.5)
    state = ema.after_step({}, None, None, run)  # type: ignore[arg-type]
    exported = ema.export(state, run)["ema"]
    kept = copied(state), copied(exported)
    walk(run.model, 0)
    assert all(torch.equal(tensor, kept[0][name]) for name, tensor in state.items())
    assert all(torch.equal(tensor, kept[1][name]) for name, tensor in exported.items())


def test_reestimation_on_one_batch_is_its_mean_and_unbiased_variance(tiny_net: Net, stand_in_run: Run) -> None:
    model = tiny_net(dtype=torch.float64)
    x = torch.rand(5, 1, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    run = stand_in_run(model=model, images=(x,))
    found = reestimated(model, model.state_dict(), run)
    with torch.no_grad():
        features = model.conv(x)
    for channel in range(4):
        mean, variance = reference.mean_and_unbiased_variance(features[:, channel].flatten().tolist())
        assert found["norm.running_mean"][channel].item() == pytest.approx(mean, abs=1e-12)
        assert found["norm.running_var"][channel].item() == pytest.approx(variance, abs=1e-12)


def test_reestimation_weighs_batches_by_their_size(tiny_net: Net, stand_in_run: Run) -> None:
    model = tiny_net(dtype=torch.float64)
    rng = torch.Generator().manual_seed(0)
    images = tuple(torch.rand(n, 1, 4, 4, generator=rng, dtype=torch.float64) for n in (7, 3, 2))
    ema = EMA(decay=0.5, buffers="reestimate")
    run = stand_in_run(model=model, images=images)
    state, _ = follow(ema, run)
    exported = ema.export(state, run)["ema"]
    averaged = tiny_net(dtype=torch.float64)
    averaged.load_state_dict(exported)
    with torch.no_grad():
        features = [averaged.conv(x) for x in images]
    for channel in range(4):
        values = [f[:, channel].flatten().tolist() for f in features]
        mean, variance = reference.pooled_by_size(values, [7, 3, 2])
        assert exported["norm.running_mean"][channel].item() == pytest.approx(mean, abs=1e-12)
        assert exported["norm.running_var"][channel].item() == pytest.approx(variance, abs=1e-12)


def test_reestimation_leaves_the_model_as_it_is(stand_in_run: Run) -> None:
    run = stand_in_run(images=(torch.rand(4, 1, 5, 5),))
    run.model.norm.eval()
    before, momentum = copied(run.model.state_dict()), run.model.norm.momentum
    reestimated(run.model, run.model.state_dict(), run)
    assert all(torch.equal(tensor, before[name]) for name, tensor in run.model.state_dict().items())
    assert run.model.training
    assert not run.model.norm.training
    assert run.model.norm.momentum == momentum


def test_a_run_too_short_is_remarked_upon() -> None:
    assert EMA(begin=3).remark(4) is None
    assert "average nothing" in str(EMA(begin=3).remark(3))
