from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from math import inf, nan

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robustfair.attacks.pgd import pgd
from robustfair.errors import ConfigError
from robustfair.losses import MaximiseCE
from robustfair.objectives import PGDAT, AdversarialObjective, Objective, Trades
from robustfair.registry import OBJECTIVES
from robustfair.runs.composition import read_composition
from robustfair.values import Batch

Net = Callable[..., nn.Module]
BatchOf = Callable[..., Batch]
Attacked = Callable[..., Batch]
Gradients = Callable[..., list[Tensor]]
ADVERSARIAL = [name for name in OBJECTIVES if name != "standard"]
VARIANTS = [
    *ADVERSARIAL,
    "pgd-at(start=zero)",
    "pgd-at(start=input-gradient)",
    "fgsm-at(clip_to_box=false)",
    "n-fgsm(clip_to_box=false)",
    "bat(tau=0)",
    "trades(regularizer=ce)",
    "mart(start=uniform)",
    "arow(perturb_loss=ce)",
    "arow(perturb_loss=revkl, weighting=confidence)",
    "arow(perturb_loss=js, weighting=constant)",
    "ard(alpha=0.5, temperature=2)",
    "rslad(kl_over=sum, eps_log=0)",
]
LABELS = dict.fromkeys(("distil", "distil_clean"), torch.zeros(3, 2))
BATCH = Batch(x=torch.zeros(3, 2, 4, 4), y=torch.tensor([0, 1, 0]), index=torch.arange(3), seed=0, teacher=LABELS)


@pytest.mark.parametrize("name", list(OBJECTIVES))
def test_every_objective_builds_and_says_what_it_reads(name: str) -> None:
    objective = OBJECTIVES.get(name)()
    assert isinstance(objective, Objective)
    assert objective.name == name
    assert {"label", "distil"} & objective.terms
    trains_on_an_attack = objective.attack(BATCH) is not None
    assert trains_on_an_attack == ("x_adv" in objective.reads) == isinstance(objective, AdversarialObjective)


LONG = {"trades": {"steps": 2}}
"""What makes the training attack unlike the one of validation: a long step, where the step is not given by the norm."""


@pytest.mark.parametrize("name", ADVERSARIAL)
def test_validation_is_pgd_10_on_cross_entropy_in_eval_mode(name: str) -> None:
    for norm, eps in (("linf", 0.1), ("l2", 0.5)):
        objective = OBJECTIVES.get(name)(norm=norm, eps=eps, attack_mode="train", **LONG.get(name, {"step_size": eps}))
        attack = objective.evaluation_attack(BATCH)
        assert attack.steps == 10
        assert (attack.goal, attack.norm, attack.mode, attack.start) == (MaximiseCE(), norm, "eval", "uniform")
        assert attack.eps.tolist() == pytest.approx([eps] * 3)
        assert float(attack.step_size.max()) * 10 > eps, "too short to cross the ball"


@pytest.mark.parametrize("spelling", ["Linf", "L_INF", "l-inf"])
def test_norms_are_read_in_any_spelling(spelling: str) -> None:
    assert PGDAT(norm=spelling).norm == "linf"  # type: ignore[arg-type]


def test_a_radius_beyond_the_image_is_refused_under_linf_only() -> None:
    for cls in (PGDAT, Trades):
        with pytest.raises(ConfigError, match="Did you mean 8/255"):
            cls(eps=8.0)
        assert cls(norm="l2", eps=2.0).eps == 2.0


def test_the_step_follows_the_radius_unless_it_is_given() -> None:
    assert PGDAT(eps=0.4).step == 0.1
    assert PGDAT(eps=0.4, step_size=0.3).step == 0.3
    assert PGDAT(eps=0.4, step_size=0.0).step == 0.0


def test_radii_have_the_type_and_device_of_the_images() -> None:
    for dtype in (torch.float32, torch.float64):
        batch = Batch(x=BATCH.x.to(dtype), y=BATCH.y, index=BATCH.index, seed=0)
        assert PGDAT().attack(batch).eps.dtype == dtype
        assert Trades().attack(batch).step_size.shape == (3,)


def objective_of(text: str, **changes: object) -> AdversarialObjective:
    objective = read_composition(text)[0]
    assert isinstance(objective, AdversarialObjective)
    return replace(objective, **changes)  # type: ignore[arg-type]


def with_points(objective: Objective, batch: Batch, points: Tensor) -> Batch:
    """The batch with `points` in place of what every attack of the objective makes."""
    views = {name: points for name in objective.attacks(batch) if name != "x_adv"}
    return replace(batch, x_adv=points, views=views)


@pytest.mark.parametrize("text", ["standard", *VARIANTS])
def test_terms_and_passes_are_what_the_class_says(tiny_net: Net, batch_of: BatchOf, text: str) -> None:
    objective, batch = read_composition(text)[0], batch_of()
    loss = objective(tiny_net(dtype=torch.float64), with_points(objective, batch, (batch.x + 0.1).clamp(0, 1)))
    assert set(loss.terms) == set(loss.coef) == objective.terms
    assert (loss.out.clean is not None) == objective.clean_pass
    assert (loss.out.adv is not None) == ("x_adv" in objective.reads)
    assert all(term.shape == (6,) for term in loss.terms.values())


@pytest.mark.parametrize("name", list(OBJECTIVES))
def test_soft_labels_act_where_they_are_read_and_nowhere_else(tiny_net: Net, batch_of: BatchOf, name: str) -> None:
    objective, batch = OBJECTIVES.get(name)(), batch_of()
    batch = with_points(objective, batch, (batch.x + 0.1).clamp(0, 1))
    one_hot = F.one_hot(batch.y, 3).double()
    hard, same, other = (
        objective(tiny_net(dtype=torch.float64), replace(batch, soft=soft)).total().item()
        for soft in (None, one_hot, one_hot.roll(1, 1))
    )
    assert same == pytest.approx(hard, rel=1e-14)
    assert (abs(other - hard) > 1e-2) == ("soft" in objective.reads)


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("text", VARIANTS)
def test_radius_zero_returns_the_images_bit_for_bit(
    tiny_net: Net, batch_of: BatchOf, attacked: Attacked, text: str, norm: str
) -> None:
    for dtype in (torch.float32, torch.float64):
        batch = attacked(tiny_net(), objective_of(text, norm=norm, eps=0.0), batch_of(dtype=dtype))
        assert batch.x_adv is not None
        assert torch.equal(batch.x_adv, batch.x)


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("text", VARIANTS)
def test_the_attack_stays_in_the_ball_and_in_the_box_unless_told_otherwise(
    tiny_net: Net, batch_of: BatchOf, attacked: Attacked, text: str, norm: str
) -> None:
    batch = attacked(tiny_net(), objective_of(text, norm=norm, eps=0.3), batch_of(dtype=torch.float32))
    assert batch.x_adv is not None
    delta = (batch.x_adv - batch.x).flatten(1)
    length = delta.abs().amax(1) if norm == "linf" else delta.norm(dim=1)
    reach = 3 if text.startswith("n-fgsm") else 1  # noise of two radii and a step of one, and no ball
    assert 0.1 < float(length.max()) / reach <= 0.3 + 1e-6
    inside = bool(((batch.x_adv >= 0) & (batch.x_adv <= 1)).all())
    assert inside == ("clip_to_box=false" not in text)


@pytest.mark.parametrize("text", ["standard", *VARIANTS])
def test_a_batch_of_one_is_a_row_of_a_larger_one(tiny_net: Net, batch_of: BatchOf, text: str) -> None:
    objective, batch = read_composition(text)[0], batch_of()
    model = tiny_net(dtype=torch.float64).eval()
    batch = with_points(objective, batch, (batch.x + 0.1).clamp(0, 1))
    rows = objective(model, batch).per_example()
    for i in range(3):
        row = {name: getattr(batch, name)[i : i + 1] for name in ("x", "y", "index")}
        one = Batch(**row, seed=1, teacher={term: logits[i : i + 1] for term, logits in batch.teacher.items()})
        attack = objective.attack(one)
        if attack is not None:
            x_adv = pgd(model, one.x, one.y, attack, one.rng("attack"))
            assert x_adv.shape == one.x.shape
        assert batch.x_adv is not None
        one = with_points(objective, one, batch.x_adv[i : i + 1])
        torch.testing.assert_close(objective(model, one).total(), rows[i], rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("text", ["standard", *VARIANTS])
def test_logits_in_half_precision_are_raised_to_float32(
    tiny_net: Net, batch_of: BatchOf, gradients: Gradients, text: str, dtype: torch.dtype
) -> None:
    objective, batch, model = read_composition(text)[0], batch_of(dtype=torch.float32), tiny_net()
    batch = with_points(objective, batch, (batch.x + 0.1).clamp(0, 1))
    half = objective(lambda x: model(x).to(dtype), batch)
    raised = objective(lambda x: model(x).to(dtype).float(), batch)
    assert {term.dtype for term in half.terms.values()} == {torch.float32}
    assert half.total().dtype == torch.float32
    assert torch.equal(half.total(), raised.total())
    assert all(bool(torch.isfinite(g).all()) for g in gradients(model, half.total()))


@pytest.mark.parametrize("text", ["standard", *VARIANTS])
def test_two_classes_are_enough(tiny_net: Net, batch_of: BatchOf, gradients: Gradients, text: str) -> None:
    objective, model, batch = read_composition(text)[0], tiny_net(classes=2), batch_of(classes=2, dtype=torch.float32)
    attack = objective.attack(batch)
    x_adv = batch.x if attack is None else pgd(model, batch.x, batch.y, attack, batch.rng("attack"))
    loss = objective(model, with_points(objective, batch, x_adv))
    slopes = gradients(model, loss.total())
    assert all(bool(torch.isfinite(g).all()) for g in slopes)
    assert max(float(g.abs().max()) for g in slopes) > 1e-3


@pytest.mark.parametrize(
    ("text", "forwards", "in_attack"),
    [
        ("pgd-at", 1, 10),
        ("pgd-at(start=input-gradient)", 1, 11),
        ("fgsm-at", 1, 1),
        ("n-fgsm", 1, 1),
        ("trades", 2, 11),
        ("mart", 2, 10),
        ("arow", 2, 11),
        ("arow(perturb_loss=ce)", 2, 10),
        ("ard", 2, 10),
        ("rslad", 2, 10),
    ],
)
@pytest.mark.parametrize("mode", ["eval", "train_frozen", "train"])
def test_the_batch_norm_ledger_of_a_step(
    tiny_net: Net, batch_of: BatchOf, attacked: Attacked, text: str, forwards: int, in_attack: int, mode: str
) -> None:
    model, objective = tiny_net(), objective_of(text, attack_mode=mode)
    objective(model, attacked(model, objective, batch_of(dtype=torch.float32)))
    assert int(model.norm.num_batches_tracked) == forwards + (in_attack if mode == "train" else 0)
    assert model.training


@pytest.mark.parametrize(
    ("text", "draw"),
    [
        ("pgd-at", "uniform"),
        ("pgd-at(start=zero)", "nothing"),
        ("pgd-at(start=input-gradient)", "nothing"),
        ("fgsm-at", "uniform"),
        ("fgsm-at(clip_to_box=false)", "uniform"),
        ("n-fgsm", "uniform"),
        ("bat", "gauss"),
        ("trades", "gauss"),
        ("trades(norm=l2)", "gauss"),
        ("mart", "gauss"),
        ("mart(start=uniform)", "uniform"),
        ("arow", "uniform"),
        ("arow(start=gauss001)", "gauss"),
        ("ard", "uniform"),
        ("rslad", "gauss"),
    ],
)
def test_an_attack_draws_its_start_once_and_nothing_from_the_global_stream(
    tiny_net: Net, batch_of: BatchOf, text: str, draw: str
) -> None:
    model, batch, before = tiny_net(dtype=torch.float64), batch_of(), torch.get_rng_state()
    rng, twin = batch.rng("attack"), batch.rng("attack")
    pgd(model, batch.x, batch.y, objective_of(text).attack(batch), rng)  # type: ignore[arg-type]
    if draw == "gauss":
        torch.empty_like(batch.x).normal_(generator=twin)
    elif draw == "uniform":
        torch.empty_like(batch.x).uniform_(-1, 1, generator=twin)
    assert torch.equal(rng.get_state(), twin.get_state())
    assert torch.equal(torch.get_rng_state(), before)


BAD = [
    *((name, "eps", value) for name in ADVERSARIAL for value in (-0.1, 1.5, nan, inf)),
    *((name, "step_size", value) for name in ADVERSARIAL for value in (-0.01, nan)),
    *((name, "steps", -1) for name in ADVERSARIAL),
    *((name, "attack_mode", "test") for name in ADVERSARIAL),
    *((name, "beta", value) for name in ("trades", "mart", "bat") for value in (-1, nan, inf)),
    *(("bat", "uniform_weight", value) for value in (-1, nan, inf)),
    ("bat", "tau", -1),
    ("bat", "tau", 0.5),
    *(("n-fgsm", "k", value) for value in (-1, nan, inf)),
    *(("arow", "lam", value) for value in (-1, nan, inf)),
    *(("arow", "label_smoothing", value) for value in (-0.1, 1.1, nan)),
    *((name, "eps_log", value) for name in ("mart", "arow") for value in (-1e-12, 1.0, nan)),
    *(("mart", field, value) for field in ("bce_margin", "weight_margin") for value in (0.9999, nan, inf)),
    *(("fgsm-at", "alpha_ratio", value) for value in (-0.5, nan, inf)),
    *((name, "steps", value) for name in ("fgsm-at", "n-fgsm") for value in (0, 2)),
    ("pgd-at", "start", "gauss01"),
    ("mart", "start", "zero"),
    ("arow", "start", "input-gradient"),
    ("trades", "regularizer", "mse"),
    ("trades", "l2_step", "eps"),
    ("arow", "perturb_loss", "margin"),
    ("arow", "weighting", "robust"),
    *(("ard", "alpha", value) for value in (-0.1, 1.1, nan)),
    *(("ard", "temperature", value) for value in (0, -1, nan, inf)),
    *(("rslad", "clean_share", value) for value in (-0.1, 1.1, nan)),
    *(("rslad", "eps_log", value) for value in (-1e-5, nan)),
    *((name, "kl_over", "batch") for name in ("ard", "rslad")),
    *((name, "teacher", 8) for name in ("ard", "rslad")),
]


@pytest.mark.parametrize(("name", "field", "value"), BAD)
def test_a_bad_value_is_an_error_with_owner_and_field(name: str, field: str, value: object) -> None:
    for build in (
        lambda: OBJECTIVES.get(name)(**{field: value}),
        lambda: read_composition(f"{name}({field}={value})"),
    ):
        with pytest.raises(ConfigError, match=f"^{name}: {field} must be .*got") as error:
            build()
        assert (error.value.owner, error.value.field) == (name, field)


@pytest.mark.parametrize("name", ADVERSARIAL)
def test_a_norm_that_does_not_exist_is_refused(name: str) -> None:
    for build in (lambda: OBJECTIVES.get(name)(norm="l1"), lambda: read_composition(f"{name}(norm=l1)")):
        with pytest.raises(ConfigError, match="norm must be linf or l2, got 'l1'"):
            build()


@pytest.mark.parametrize("name", list(OBJECTIVES))
def test_equal_weights_of_classes_are_no_weights(
    tiny_net: Net, batch_of: BatchOf, gradients: Gradients, name: str
) -> None:
    model, batch, objective = tiny_net(dtype=torch.float64), batch_of(), OBJECTIVES.get(name)()
    batch = with_points(objective, batch, batch.x.flip(0))
    loss = objective(model, batch)
    plain = gradients(model, loss.total())
    for weight in (1.0, 3.0):
        per_class = torch.full((3,), weight, dtype=torch.float64)
        by_weight = loss.weighted(per_class[batch.y])
        by_term = loss
        for term in loss.terms:
            by_term = by_term.scaled(term, per_class[batch.y])
        for weighted in (by_weight, by_term):
            assert weighted.total().item() == pytest.approx(weight * loss.total().item(), rel=1e-12)
            for ours, unweighted in zip(gradients(model, weighted.total()), plain, strict=True):
                torch.testing.assert_close(ours, weight * unweighted, rtol=1e-12, atol=1e-13)
