from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from robustfair.errors import ConflictError
from robustfair.losses import MaximiseMargin
from robustfair.methods import CCM, CCR, EMA, Method, compose
from robustfair.methods.base import HOOKS
from robustfair.objectives import MART, PGDAT, Objective, Standard, Trades
from robustfair.values import Attack, Batch, Forward, Loss, State

Net = Callable[..., nn.Module]
Run = Callable[..., object]

NO_RUN: Any = None
BATCH = Batch(x=torch.zeros(3, 1, 5, 5), y=torch.arange(3), index=torch.arange(3), seed=0, x_adv=torch.ones(3, 1, 5, 5))


def method(name: str, claims: tuple[str, ...] = (), needs: tuple[str, ...] = (), **hooks: Callable[..., Any]) -> Method:
    """A method of a class of its own, with the hooks given as functions."""
    body = {"name": name, "claims": frozenset(claims), "needs": frozenset(needs), **hooks}
    return type(name, (Method,), body)()


def refused(methods: list[Method], objective: Objective | None = None, **rest: Any) -> str:
    with pytest.raises(ConflictError) as caught:
        compose(objective or Trades(), methods, **rest)
    return str(caught.value)


def test_a_method_twice_is_refused_whatever_its_config() -> None:
    assert refused([EMA(), CCM(), EMA(decay=0.5)]) == "ema is listed twice: keep one"
    assert "listed twice" in refused([EMA(), EMA()], allow=frozenset({"export.ema"}))


def test_two_owners_of_a_claim_are_named_with_the_claim_and_the_way_out() -> None:
    first, second = method("first", ("attack.eps",)), method("second", ("attack.eps",))
    message = refused([first, second])
    assert "first and second both set attack.eps (the class-wise radius)" in message
    assert "allow={'attack.eps'}" in message
    assert "second and first" in refused([second, first])
    assert "ccm and second" in refused([CCM(), EMA(), second])


def test_a_role_has_one_player() -> None:
    assert "role.class_weight" in refused([CCR(), method("other", ("role.class_weight",))])


def test_allow_lets_both_act_in_list_order(tiny_net: Net) -> None:
    def times(factor: float) -> Callable[..., Attack]:
        return lambda self, attack, batch, state, run: replace(attack, eps=attack.eps * factor)

    def plus(term: float) -> Callable[..., Attack]:
        return lambda self, attack, batch, state, run: replace(attack, eps=attack.eps + term)

    doubled, raised = (method(n, ("attack.eps",), attack=f) for n, f in (("doubled", times(2)), ("raised", plus(1))))
    states: dict[str, State] = {"doubled": {}, "raised": {}}
    for order, eps in (((doubled, raised), 1.2), ((raised, doubled), 2.2)):
        plan = compose(PGDAT(eps=0.1), order, allow=frozenset({"attack.eps"}))
        assert plan.attacks(BATCH, states, NO_RUN)["x_adv"].eps.tolist() == pytest.approx([eps] * 3)
        assert plan.allow == {"attack.eps"}
    refused([doubled, raised], allow=frozenset({"loss.label"}))


def test_a_missing_term_is_named_with_those_there_are() -> None:
    message = refused([CCR()], PGDAT())
    assert message.startswith("ccr needs the loss term 'consistency'")
    assert "pgd-at" in message
    assert "label" in message
    assert "trades" in message


def test_a_write_that_nobody_reads_is_refused() -> None:
    assert refused([CCM()], Standard()) == "ccm sets attack.eps, but standard trains without an attack: drop ccm"
    soft = refused([method("smooth", ("batch.soft",))], MART())
    assert soft == "smooth sets batch.soft, but mart does not read soft: drop smooth"
    assert "does not read x_adv" in refused([method("vertex", ("batch.x_adv",))], Standard())
    compose(Trades(), [method("vertex", ("batch.x_adv",))])


def edit_attack(**fields: object) -> Callable[..., Attack]:
    return lambda self, attack, batch, state, run: replace(attack, **fields)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "fields",
    [
        {"eps": torch.ones(3)},
        {"step_size": torch.ones(3)},
        {"steps": 3},
        {"goal": MaximiseMargin()},
        {"norm": "l2"},
        {"start": "zero"},
        {"mode": "train"},
        {"keep": "best"},
        {"restarts": 2},
    ],
    ids=lambda fields: next(iter(fields)),
)
def test_an_unclaimed_edit_of_the_attack_raises(fields: dict[str, object]) -> None:
    (field,) = fields
    plan = compose(Trades(), [method("sly", attack=edit_attack(**fields))])
    with pytest.raises(ConflictError, match=rf"sly changed attack\.{field} without claiming it"):
        plan.attacks(BATCH, {"sly": {}}, NO_RUN)
    claimed = compose(Trades(), [method("honest", (f"attack.{field}",), attack=edit_attack(**fields))])
    assert getattr(claimed.attacks(BATCH, {"honest": {}}, NO_RUN)["x_adv"], field) is fields[field]


@pytest.mark.parametrize("field", ["x", "y", "index", "seed", "x_adv", "soft"])
def test_an_unclaimed_edit_of_the_batch_raises(field: str) -> None:
    value = 5 if field == "seed" else torch.ones(3)

    def edit(self: Method, batch: Batch, state: State, run: Any) -> Batch:
        return replace(batch, **{field: value})

    plan = compose(Trades(), [method("sly", examples=edit)])
    with pytest.raises(ConflictError, match=rf"sly changed batch\.{field} without claiming it"):
        plan.examples(BATCH, {"sly": {}}, NO_RUN)


LOSS_EDITS: dict[str, tuple[str, Callable[[Loss], Loss]]] = {
    "weight": ("loss.weight", lambda loss: loss.weighted(torch.ones(3))),
    "coefficient": ("loss.label", lambda loss: loss.scaled("label", torch.ones(3))),
    "other coefficient": ("loss.consistency", lambda loss: loss.scaled("consistency", torch.ones(3))),
    "term": (
        "loss.label",
        lambda loss: replace(loss, terms={**loss.terms, "label": loss.terms["label"] * 1}),
    ),
    "new term": ("loss.extra", lambda loss: loss.plus("extra", torch.ones(3), torch.ones(3))),
}


@pytest.mark.parametrize("what", LOSS_EDITS)
def test_an_unclaimed_edit_of_the_loss_raises(tiny_net: Net, what: str) -> None:
    claim, edit = LOSS_EDITS[what]

    def hook(self: Method, loss: Loss, batch: Batch, state: State, run: Any) -> Loss:
        return edit(loss)

    with pytest.raises(ConflictError, match=f"sly changed {claim} without claiming it"):
        compose(Trades(), [method("sly", loss=hook)]).loss(tiny_net(), BATCH, {"sly": {}}, NO_RUN)
    honest = method("honest", (claim,), loss=hook, replaces=frozenset({"label"} if what == "term" else ()))
    compose(Trades(), [honest]).loss(tiny_net(), BATCH, {"honest": {}}, NO_RUN)


@pytest.mark.parametrize(
    "edit",
    [
        lambda loss: replace(loss, out=Forward(clean=loss.out.clean, adv=loss.out.adv)),
        lambda loss: replace(loss, terms={"label": loss.terms["label"]}),
    ],
    ids=["logits", "a term less"],
)
def test_logits_and_terms_may_not_go_whatever_is_claimed(tiny_net: Net, edit: Callable[[Loss], Loss]) -> None:
    def hook(self: Method, loss: Loss, batch: Batch, state: State, run: Any) -> Loss:
        return edit(loss)

    sly = method("sly", ("loss.label", "loss.consistency", "loss.weight"), loss=hook)
    with pytest.raises(ConflictError, match="sly changed the logits or the set of terms"):
        compose(Trades(), [sly]).loss(tiny_net(), BATCH, {"sly": {}}, NO_RUN)


def change_weights(self: Method, state: State, run: Any) -> State:
    with torch.no_grad():
        run.model.head.weight.mul_(2)
    return state


def change_weights_through_data(self: Method, state: State, run: Any) -> State:
    run.model.head.weight.data.mul_(2)
    return state


def change_buffers(self: Method, state: State, run: Any) -> State:
    run.model.train()
    run.model(torch.rand(4, 1, 5, 5))
    return state


def replace_parameter(self: Method, state: State, run: Any) -> State:
    run.model.head.weight = nn.Parameter(run.model.head.weight.detach() * 2)
    return state


@pytest.mark.parametrize(
    "hook", [change_weights, change_weights_through_data, change_buffers, replace_parameter], ids=lambda f: f.__name__
)
def test_weights_change_at_a_boundary_under_the_claim_model_only(stand_in_run: Run, hook: Callable[..., State]) -> None:
    with pytest.raises(ConflictError, match="sly changed the weights at an epoch boundary without claiming 'model'"):
        compose(Trades(), [method("sly", at_epoch=hook)]).at_epoch({}, stand_in_run())  # type: ignore[arg-type]
    compose(Trades(), [method("honest", ("model",), at_epoch=hook)]).at_epoch({}, stand_in_run())  # type: ignore[arg-type]


def test_the_one_who_changed_the_weights_is_named(stand_in_run: Run) -> None:
    methods = [method("before"), method("sly", at_epoch=change_weights), method("after")]
    with pytest.raises(ConflictError, match=r"^sly "):
        compose(Trades(), methods).at_epoch({}, stand_in_run())  # type: ignore[arg-type]


def test_an_unclaimed_export_raises(stand_in_run: Run) -> None:
    def hook(self: Method, state: State, run: Any) -> dict[str, Any]:
        return {"swa": run.model.state_dict()}

    with pytest.raises(ConflictError, match=r"sly exports export\.swa without claiming it"):
        compose(Trades(), [method("sly", export=hook)]).export({"sly": {}}, stand_in_run())  # type: ignore[arg-type]
    plan = compose(Trades(), [method("honest", ("export.swa",), export=hook), EMA()])
    assert set(plan.export({"honest": {}, "ema": {}}, stand_in_run())) == {"swa"}  # type: ignore[arg-type]


def test_scopes_are_left_in_reverse_even_after_an_error() -> None:
    trace: list[str] = []

    def scope_of(name: str) -> Method:
        @contextmanager
        def scope(self: Method, run: Any, batch: Batch, loss_at: Any, state: State) -> Iterator[None]:
            trace.append(f"into {name}")
            try:
                yield
            finally:
                trace.append(f"out of {name}")

        return method(name, around_gradient=scope)

    plan = compose(Trades(), [scope_of(name) for name in "abc"])
    states: dict[str, State] = {name: {} for name in "abc"}
    expected = ["into a", "into b", "into c", "out of c", "out of b", "out of a"]
    with plan.around_gradient(None, BATCH, None, states):  # type: ignore[arg-type]
        assert trace == expected[:3]
    assert trace == expected
    trace.clear()
    with pytest.raises(RuntimeError), plan.around_gradient(None, BATCH, None, states):  # type: ignore[arg-type]
        raise RuntimeError
    assert trace == expected


def test_do_nothing_hooks_hand_back_what_they_get(tiny_net: Net, stand_in_run: Run) -> None:
    plan = compose(Trades(), [method("idle")])
    attack = Trades().attack(BATCH)
    assert Method().attack(attack, BATCH, {}, NO_RUN) is attack
    assert plan.examples(BATCH, {"idle": {}}, NO_RUN) is BATCH
    assert plan.export({"idle": {}}, stand_in_run()) == {}  # type: ignore[arg-type]
    assert plan.at_epoch({}, stand_in_run()) == {"idle": {}}  # type: ignore[arg-type]
    assert method("idle").hooks() == []
    assert method("idle").remark(1) is None


def test_each_method_sees_its_own_state_only() -> None:
    seen: dict[str, State] = {}

    def hook(self: Method, batch: Batch, state: State, run: Any) -> Batch:
        seen[self.name] = state
        return batch

    states: dict[str, State] = {"a": {"v": torch.zeros(1)}, "b": {"v": torch.ones(1)}}
    compose(Trades(), [method("a", examples=hook), method("b", examples=hook)]).examples(BATCH, states, NO_RUN)
    assert seen["a"] is states["a"]
    assert seen["b"] is states["b"]


def test_without_an_attack_no_method_is_asked_to_edit_one() -> None:
    def hook(self: Method, attack: Attack, batch: Batch, state: State, run: Any) -> Attack:
        raise AssertionError("there is no attack to edit")

    assert compose(Standard(), [method("idle", attack=hook)]).attacks(BATCH, {"idle": {}}, NO_RUN) == {}


def test_hooks_are_listed_in_protocol_order() -> None:
    assert CCM().hooks() == ["attack", "at_epoch"]
    assert CCR().hooks() == ["loss", "at_epoch"]
    assert EMA().hooks() == ["after_step", "at_epoch", "export"]
    assert all(hasattr(Method, hook) for hook in HOOKS)


@dataclass(frozen=True, kw_only=True)
class ClaimsByConfig(Method):
    name = "by-config"
    radius: bool = False

    @property
    def claims(self) -> frozenset[str]:  # type: ignore[override]
        return frozenset({"attack.eps"} if self.radius else ())


def test_claims_may_depend_on_the_config() -> None:
    compose(Trades(), [CCM(), ClaimsByConfig()])
    assert "attack.eps" in refused([CCM(), ClaimsByConfig(radius=True)])


def test_loss_weights_reach_the_total(tiny_net: Net) -> None:
    weight = torch.tensor([1.0, 0.0, 2.0])

    def hook(self: Method, loss: Loss, batch: Batch, state: State, run: Any) -> Loss:
        return loss.weighted(weight)

    plan = compose(Trades(), [method("weighs", ("loss.weight",), loss=hook)])
    rows: Tensor = Trades()(tiny_net(), BATCH).per_example()
    total = plan.loss(tiny_net(), BATCH, {"weighs": {}}, NO_RUN).total()
    torch.testing.assert_close(total, (rows[0] + 2 * rows[2]) / 3)
