from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from reference import cfa as reference
from robustfair.attacks.pgd import pgd
from robustfair.data import ImageDataset
from robustfair.errors import ConfigError, ConflictError, RobustFairWarning
from robustfair.methods import CCM, CCR, EMA, FAWA, FriendlyAT, Method, compose
from robustfair.methods.cfa import calibration, passes
from robustfair.models.averages import UPDATES
from robustfair.objectives import PGDAT, Standard, Trades
from robustfair.runs.checkpoint import read_state, write_state
from robustfair.runs.composition import read_composition
from robustfair.training import Fitted, Schedule, fit
from robustfair.training.state import TrainState
from robustfair.values import Batch, ClassTally, Forward, Loss, StateDict

Net = Callable[..., nn.Module]
Data = Callable[..., ImageDataset]
Run = Callable[..., Any]

NO_RUN: Any = None
T = (0.2, 0.5, 0.8)
VECTOR = {"hits": (2, 5, 8), "count": (10, 10, 10)}


def batch_of(b: int = 9, *, dtype: torch.dtype = torch.float64) -> Batch:
    rng = torch.Generator().manual_seed(0)
    x = torch.rand(b, 1, 5, 5, generator=rng, dtype=dtype)
    x_adv = (x + 0.1 * torch.randn(x.shape, generator=rng, dtype=dtype)).clamp(0, 1)
    return Batch(x=x, y=torch.arange(b) % 3, index=torch.arange(b), seed=1, x_adv=x_adv)


def test_the_published_vector_of_radii(stand_in_run: Run) -> None:
    state = CCM(lam=0.5, begin=1).at_epoch({}, stand_in_run(epoch=1, **VECTOR))
    batch = batch_of(3)
    attack = PGDAT(norm="l2", eps=8.0).attack(batch)
    edited = CCM(lam=0.5, begin=1).attack(attack, batch, state, NO_RUN)
    assert edited.eps.tolist() == pytest.approx([5.6, 8.0, 10.4])
    assert edited.eps.tolist() == pytest.approx(reference.radii(T, 0.5, 8.0))
    assert replace(edited, eps=attack.eps) == attack, "nothing but the radius moves"


def test_the_published_vector_of_shares(stand_in_run: Run) -> None:
    method, batch = CCR(begin=1), batch_of(3)
    state = method.at_epoch({}, stand_in_run(epoch=1, **VECTOR))
    six = torch.full((3,), 6.0)
    loss = Loss(out=None, terms={}, coef={"label": torch.ones(3), "consistency": six}, weight=torch.ones(3))  # type: ignore[arg-type]
    coef = method.loss(loss, batch, state, NO_RUN).coef
    assert (coef["consistency"] / coef["label"]).tolist() == pytest.approx([4.2, 6.0, 7.8])
    assert coef["consistency"].tolist() == pytest.approx([0.807692, 0.857143, 0.886364], abs=1e-6)
    assert coef["consistency"].tolist() == pytest.approx(reference.shares(T, 0.5, 6.0))
    assert (coef["label"] + coef["consistency"]).tolist() == pytest.approx([1.0] * 3)


def test_the_loss_is_the_loop_over_examples(tiny_net: Net, stand_in_run: Run) -> None:
    model, batch = tiny_net(dtype=torch.float64).eval(), batch_of()
    state = CCR(begin=1).at_epoch({}, stand_in_run(epoch=1, **VECTOR))
    loss = CCR(begin=1).loss(Trades(beta=6)(model, batch), batch, state, NO_RUN)
    with torch.no_grad():
        clean, adv = model(batch.x).tolist(), model(batch.x_adv).tolist()
    expected = reference.loss(clean, adv, batch.y.tolist(), reference.shares(T, 0.5, 6.0))
    assert loss.total().item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("beta", [0.0, 1.0, 6.0])
def test_equal_accuracies_are_trades_over_one_plus_beta(tiny_net: Net, stand_in_run: Run, beta: float) -> None:
    """Value and gradient, for t = 0.75 and so beta' = 1.25 beta; and for the code path before `begin`, beta' = beta."""
    batch, method = batch_of(), CCR(begin=1)
    for run, factor in (
        (stand_in_run(epoch=1, hits=(3, 3, 3), count=(4, 4, 4)), 1.25),
        (stand_in_run(epoch=0), 1.0),
    ):
        model, twin = tiny_net(dtype=torch.float64), tiny_net(dtype=torch.float64)
        state = method.at_epoch({}, run)
        ours = method.loss(Trades(beta=beta)(model, batch), batch, state, NO_RUN).total()
        plain = Trades(beta=factor * beta)(twin, batch).total() / (1 + factor * beta)
        torch.testing.assert_close(ours, plain, rtol=1e-6, atol=0)
        pairs = zip(
            torch.autograd.grad(ours, list(model.parameters())),
            torch.autograd.grad(plain, list(twin.parameters())),
            strict=True,
        )
        for a, b in pairs:
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("seed", range(3))
def test_radii_and_shares_of_random_counts_are_the_formulas(stand_in_run: Run, seed: int) -> None:
    rng, batch = torch.Generator().manual_seed(seed), batch_of()
    count = torch.randint(1, 10_000, (3,), generator=rng).tolist()
    hits = [int(torch.randint(n + 1, (), generator=rng)) for n in count]
    t, run = [h / n for h, n in zip(hits, count, strict=True)], stand_in_run(epoch=1, hits=hits, count=count)
    ccm, ccr = CCM(lam=0.3, begin=1), CCR(lam=0.7, begin=1)
    states = [method.at_epoch({}, run)["scale"] for method in (ccm, ccr)]
    eps = ccm.attack(PGDAT(eps=0.1).attack(batch), batch, {"scale": states[0]}, run).eps.tolist()
    loss = Loss.of(Forward(), label=(torch.ones_like(batch.x[:, 0, 0, 0]), 1.0), consistency=(batch.x[:, 0, 0, 0], 6.0))
    coef = ccr.loss(loss, batch, {"scale": states[1]}, run).coef["consistency"].tolist()
    radii, shares = reference.radii(t, 0.3, 0.1), reference.shares(t, 0.7, 6.0)
    assert eps == pytest.approx([radii[y] for y in batch.y.tolist()], rel=1e-6)
    assert coef == pytest.approx([shares[y] for y in batch.y.tolist()], rel=1e-6)


def test_a_loss_that_is_divided_already_is_not_divided_again(tiny_net: Net, stand_in_run: Run) -> None:
    model, batch = tiny_net(dtype=torch.float64).eval(), batch_of()
    state = CCR(begin=1).at_epoch({}, stand_in_run(epoch=1, **VECTOR))
    plain, divided = (
        CCR(begin=1).loss(Trades(beta=6, normalise_beta=n)(model, batch), batch, state, NO_RUN).per_example()
        for n in (False, True)
    )
    torch.testing.assert_close(plain, divided, rtol=1e-6, atol=0)


def test_accuracies_are_over_the_true_class_counts(stand_in_run: Run) -> None:
    run = stand_in_run(epoch=3, hits=(1, 30, 7), count=(2, 120, 7))
    for method in (CCM(lam=0.5, begin=1), CCR(lam=0.5, begin=1)):
        assert method.at_epoch({}, run)["scale"].tolist() == pytest.approx([1.0, 0.75, 1.5])


@pytest.mark.parametrize("method", [CCM(begin=2), CCR(begin=2)])
def test_nothing_is_calibrated_before_begin(stand_in_run: Run, method: CCM | CCR) -> None:
    for epoch, calibrated in ((0, False), (1, False), (2, True), (3, True)):
        run = stand_in_run(epoch=epoch, **({} if epoch == 0 else VECTOR))
        assert (method.at_epoch({}, run)["scale"].tolist() != [1.0] * 3) == calibrated


def test_before_begin_the_attack_is_the_scalar_one(tiny_net: Net, stand_in_run: Run) -> None:
    model, batch = tiny_net(), batch_of(dtype=torch.float32)
    for objective in (PGDAT(), Trades()):
        scalar = objective.attack(batch)
        per_class = CCM().attack(scalar, batch, CCM().at_epoch({}, stand_in_run(epoch=9, **VECTOR)), NO_RUN)
        ends = [pgd(model, batch.x, batch.y, attack, batch.rng("attack")) for attack in (scalar, per_class)]
        assert torch.equal(*ends)


@pytest.mark.parametrize(("objective", "lam"), [(PGDAT(), 0.5), (Trades(), 0.3), (Standard(), 0.5)])
def test_lambda_is_the_papers_for_the_base_loss(stand_in_run: Run, objective: object, lam: float) -> None:
    run = stand_in_run(epoch=1, objective=objective, **VECTOR)
    assert CCM(begin=1).at_epoch({}, run)["scale"].tolist() == pytest.approx([lam + t for t in T])
    assert CCM(begin=1, lam=0.0).at_epoch({}, run)["scale"].tolist() == pytest.approx(T)


@pytest.mark.parametrize("objective", [PGDAT(), Trades()])
def test_lambda_is_the_papers_for_friendly_training_beside_friendly_at(stand_in_run: Run, objective: object) -> None:
    run = stand_in_run(epoch=1, objective=objective, methods=("friendly-at", "ccm"), **VECTOR)
    assert CCM(begin=1).at_epoch({}, run)["scale"].tolist() == pytest.approx([0.7 + t for t in T])
    assert CCM(begin=1, lam=0.25).at_epoch({}, run)["scale"].tolist() == pytest.approx([0.25 + t for t in T])


def test_a_run_tells_its_methods_to_one_another(tiny_net: Net, tiny_data: Data) -> None:
    for friendly, lam in (([FriendlyAT()], 0.7), ([], 0.5)):
        state = train(tiny_net(), tiny_data(), [*friendly, CCM(begin=1)]).state
        assert state.train is not None
        assert state.methods["ccm"]["scale"].tolist() == pytest.approx((lam + state.train.robust).tolist())


def test_the_factor_is_bounded_and_monotone() -> None:
    t = torch.linspace(0, 1, 11)
    factor = calibration(0.3, t)
    assert float(factor.min()) == pytest.approx(0.3)
    assert float(factor.max()) == pytest.approx(1.3)
    assert bool((factor.diff() > 0).all())
    assert calibration(0.5, torch.tensor([0.5])).item() == 1.0


def test_a_class_without_images_does_not_disturb_the_others(stand_in_run: Run) -> None:
    state = CCM(lam=0.5, begin=1).at_epoch({}, stand_in_run(epoch=1, hits=(2, 0, 8), count=(10, 0, 10)))
    batch = replace(batch_of(4), y=torch.tensor([0, 2, 2, 0]))
    edited = CCM(lam=0.5).attack(PGDAT(eps=0.1).attack(batch), batch, state, NO_RUN)
    assert edited.eps.tolist() == pytest.approx([0.07, 0.13, 0.13, 0.07])


def test_a_run_too_short_is_remarked_upon() -> None:
    for method in (CCM(), CCR()):
        assert method.remark(11) is None
        remark = method.remark(10)
        assert remark is not None
        assert f"lower {method.name}(begin)" in remark


# The average of epochs that pass


def walk(model: nn.Module, seed: int) -> dict[str, Tensor]:
    """Move every tensor of the model, as an epoch would; where it is then."""
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in model.state_dict().values():
            moved = torch.randn(tensor.shape, generator=rng, dtype=torch.float64).abs()
            tensor.add_(moved.to(tensor.dtype) if tensor.is_floating_point() else 1)
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def validated(*hits: int, of: int = 10) -> ClassTally:
    """A tally of three classes with so many right of each; the wrong ones are taken for the next class."""
    right = torch.diag(torch.tensor(hits))
    wrong = torch.diag(of - torch.tensor(hits)).roll(1, 0)
    return ClassTally(robust_pred_true=right + wrong)


def follow(method: FAWA, run: Any, worst: Sequence[int]) -> tuple[list[dict], list[dict]]:
    """What is exported after each epoch with so many right of the worst class, and the model then."""
    state, exports, seen = method.at_epoch({}, run), [], []
    assert state == {}
    for epoch, hits in enumerate(worst, 1):
        seen.append(walk(run.model, epoch))
        run.epoch, run.validation = epoch, validated(9, hits, 5)
        state = method.at_epoch(state, run)
        exports.append(dict(method.export(state, run).get("fawa", {})))
    return exports, seen


WORST = (1, 3, 2, 0, 4, 1, 5)


@pytest.mark.parametrize("buffers", ["average", "copy"])
@pytest.mark.parametrize(("decay", "threshold"), [(0.85, 0.2), (0.5, 0.3), (0.9, 0.0), (0.0, 0.2), (1.0, 0.2)])
def test_the_average_is_the_loop_over_epochs(
    tiny_net: Net, stand_in_run: Run, decay: float, threshold: float, buffers: Any
) -> None:
    run = stand_in_run(model=tiny_net(dtype=torch.float64))
    exports, seen = follow(FAWA(decay=decay, threshold=threshold, begin=0, buffers=buffers), run, WORST)
    statistics = ("norm.running_mean", "norm.running_var") if buffers == "average" else ()
    averaged = {*dict(run.model.named_parameters()), *statistics}
    for name in seen[0]:
        paths = zip(*[weights[name].flatten().tolist() for weights in seen], strict=True)
        for at, values in enumerate(paths):
            slow = decay if name in averaged else 0.0
            expected = reference.fawa(values, [hits / 10 for hits in WORST], slow, threshold)
            ours = [exported[name].flatten()[at].item() if exported else None for exported in exports]
            for one, other in zip(ours, expected, strict=True):
                assert one == (other if other is None else pytest.approx(other, rel=1e-12, abs=1e-12))


@pytest.mark.parametrize("buffers", ["average", "copy", "reestimate"])
def test_a_rejected_epoch_leaves_every_tensor_as_it_is(stand_in_run: Run, buffers: Any) -> None:
    images = (torch.rand(4, 1, 5, 5), torch.rand(3, 1, 5, 5))
    run, method = stand_in_run(images=images), FAWA(begin=0, buffers=buffers)
    exports, seen = follow(method, run, (3, 1, 1, 4, 0))
    for before, after in ((0, 1), (1, 2), (3, 4)):
        assert exports[before].keys() == exports[after].keys() == seen[0].keys()
        assert all(torch.equal(tensor, exports[after][name]) for name, tensor in exports[before].items())
    assert not torch.equal(exports[2]["conv.weight"], exports[3]["conv.weight"])
    state = method.at_epoch({}, run)
    run.validation = validated(10, 10, 10)
    state = method.at_epoch(state, run)
    run.validation = validated(1, 1, 1)
    assert method.at_epoch(state, run) is state
    assert state[UPDATES] == 1


@pytest.mark.parametrize("buffers", ["average", "copy"])
def test_the_first_epoch_that_passes_is_copied_and_decay_zero_keeps_the_last(stand_in_run: Run, buffers: Any) -> None:
    for decay, which in ((0.85, [1, 1]), (0.0, [1, 1, 1, 4, 4, 6])):
        exports, seen = follow(FAWA(decay=decay, begin=0, buffers=buffers), stand_in_run(), (0, 5, 1, 1, 2, 0, 9))
        assert exports[0] == {}
        for exported, epoch in zip(exports[1:], which, strict=False):
            assert all(torch.equal(tensor, exported[name]) for name, tensor in seen[epoch].items())


def test_the_average_shares_no_storage_with_the_model_or_with_what_was_exported(stand_in_run: Run) -> None:
    run, method = stand_in_run(), FAWA(begin=0)
    (exported,), (seen,) = follow(method, run, (9,))
    walk(run.model, 5)
    assert all(torch.equal(tensor, exported[name]) for name, tensor in seen.items())


@pytest.mark.parametrize("begin", [0, 2, 4])
def test_no_epoch_before_begin_enters(stand_in_run: Run, begin: int) -> None:
    exports, seen = follow(FAWA(begin=begin, decay=1.0), stand_in_run(), (9, 9, 9, 9))
    assert [bool(exported) for exported in exports] == [epoch >= begin for epoch in range(4)]
    for exported in exports[begin:]:
        assert torch.equal(exported["head.weight"], seen[begin]["head.weight"])


def test_the_gate_is_the_worst_class_and_includes_the_threshold() -> None:
    assert passes(validated(2, 9, 9), 0.2)
    assert not passes(validated(1, 9, 9), 0.2)
    assert passes(validated(0, 9, 9), 0.0)
    assert passes(validated(10, 10, 10), 1.0)
    assert not passes(validated(10, 9, 10), 1.0)
    counts = torch.tensor([[3, 0, 1], [1, 0, 0], [0, 0, 3]])
    assert passes(ClassTally(robust_pred_true=counts), 0.75), "a class without images is none to judge by"


# Its runs


def train(model: nn.Module, data: ImageDataset, methods: Sequence[Method], *, eps: float = 0.1, **rest: Any) -> Fitted:
    options: dict[str, Any] = {"schedule": Schedule(epochs=3, lr=0.1, batch_size=7), "validation": 0.25} | rest
    return fit(model, data, PGDAT(eps=eps, steps=1), methods=methods, **options)


@pytest.mark.parametrize("buffers", ["average", "copy", "reestimate"])
def test_threshold_zero_is_ema_per_epoch_bit_for_bit(tiny_net: Net, tiny_data: Data, buffers: Any) -> None:
    common: dict[str, Any] = {"decay": 0.7, "begin": 1, "buffers": buffers}
    methods = [FAWA(threshold=0.0, **common), EMA(per="epoch", **common)]
    states: list[TrainState] = []
    train(tiny_net(), tiny_data(), methods, save=states.append)
    assert [sorted(state.exports) for state in states] == [[], ["ema", "fawa"], ["ema", "fawa"]]
    for state in states[1:]:
        assert state.exports["fawa"].keys() == state.exports["ema"].keys() == state.weights.keys()
        assert all(torch.equal(t, state.exports["ema"][name]) for name, t in state.exports["fawa"].items())
        assert torch.equal(state.methods["fawa"][UPDATES], state.methods["ema"][UPDATES])


def test_the_gate_reads_the_trained_weights_on_the_validation_images(tiny_net: Net, tiny_data: Data) -> None:
    """With the largest worst class of a run as threshold exactly those epochs enter that reach it."""
    states: list[TrainState] = []
    options: dict[str, Any] = {"schedule": Schedule(epochs=7, lr=0.3, kind="constant", batch_size=7), "eps": 0.05}
    train(tiny_net(), tiny_data((16, 16, 16)), [], save=states.append, **options)
    found = [record["validation"]["model"] for record in states[-1].history]
    worst = [min(h / n for h, n in zip(record["robust"], record["count"], strict=True)) for record in found]
    passing = [lowest == max(worst) for lowest in worst]
    assert not all(passing)
    method = FAWA(threshold=max(worst), decay=0.0, begin=0)
    exports: list[Mapping[str, StateDict]] = []
    train(tiny_net(), tiny_data((16, 16, 16)), [method], save=lambda state: exports.append(state.exports), **options)
    kept = None
    for epoch, (exported, passed) in enumerate(zip(exports, passing, strict=True)):
        kept = states[epoch].weights if passed else kept
        assert bool(exported) == (kept is not None)
        assert kept is None or all(torch.equal(t, exported["fawa"][name]) for name, t in kept.items())


def test_a_run_in_which_no_epoch_passes_says_so_and_exports_nothing(tiny_net: Net, tiny_data: Data) -> None:
    with pytest.warns(RobustFairWarning, match=r"fawa has no average: .* accuracy of 1; lower fawa\(threshold\)"):
        found = train(tiny_net(), tiny_data(), [FAWA(threshold=1.0, begin=0)], select="last")
    assert found.state.exports == {}
    assert found.chosen.candidate == "model"
    with warnings.catch_warnings():
        warnings.simplefilter("error", RobustFairWarning)
        train(tiny_net(), tiny_data((20, 20, 20)), [FAWA(threshold=0.0, begin=2)], select="last")


def test_a_run_goes_on_exactly_from_files(
    tiny_net: Net, tiny_data: Data, differences: Callable[[TrainState, TrainState], list[str]], tmp_path: Path
) -> None:
    def run(**rest: Any) -> TrainState:
        return train(tiny_net(dropout=0.2), tiny_data(), [CCM(begin=1), FAWA(threshold=0.0, begin=0)], **rest).state

    states: list[TrainState] = []
    whole = run(save=states.append)
    for state in states:
        write_state(tmp_path, state, {})
        assert differences(whole, run(resume=read_state(tmp_path, state.history))) == []


def test_held_out_images_and_an_attack_are_asked_for() -> None:
    compose(PGDAT(), [FAWA()])
    with pytest.raises(ConflictError, match="fawa measures on held out images and this run has none: set validation"):
        compose(PGDAT(), [FAWA()], validation=False)
    with pytest.raises(ConflictError, match="fawa needs attacked images, and standard trains without"):
        compose(Standard(), [FAWA()])


@pytest.mark.parametrize(
    ("field", "wrong"),
    [
        ("threshold", -0.1),
        ("threshold", 1.1),
        ("threshold", 20),
        ("threshold", float("nan")),
        ("decay", 1.5),
        ("begin", -1),
        ("buffers", "mean"),
    ],
)
def test_a_wrong_value_is_refused_with_owner_and_field(field: str, wrong: Any) -> None:
    with pytest.raises(ConfigError, match=f"^fawa: {field} must be"):
        FAWA(**{field: wrong})
    with pytest.raises(ConfigError, match=f"^fawa: {field} must be"):
        read_composition(f"pgd-at + fawa({field}={wrong})")
