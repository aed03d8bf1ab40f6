"""Bundles: names that stand for several methods; those act that fit the objective and what is listed beside."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import yaml
from torch import nn

from reference.runs import TINY, history, tensors
from robustfair.data import ImageDataset
from robustfair.errors import ConfigError, ConflictError, DataError, RecipeError, RobustFairWarning, UnknownNameError
from robustfair.methods import CCM, CCR, CFA, EMA, FAWA, Bundle, FairTAT, FriendlyAT, Method, compose
from robustfair.objectives import FGSMAT, MART, PGDAT, ARoW, Objective, Standard, Trades
from robustfair.registry import BUNDLES, load_plugin
from robustfair.report.explain import explain_plan
from robustfair.report.listing import listing
from robustfair.runs.composition import plan_of, read_composition
from robustfair.runs.recipe import read_recipe
from robustfair.runs.run import prepare, train
from robustfair.training import Fitted, Schedule, fit
from robustfair.training.selection import require_every_class
from robustfair.training.state import TrainState

Net = Callable[..., nn.Module]
Data = Callable[..., ImageDataset]
EPS = frozenset({"attack.eps"})


def names(objective: Objective, *methods: Method | Bundle, **rest: Any) -> list[str]:
    """What acts in the end, in its order."""
    return [method.name for method in compose(objective, methods, **rest).methods]


@pytest.mark.parametrize("objective", [PGDAT(), FGSMAT(), Trades(), MART(), ARoW()], ids=lambda o: o.name)
def test_parts_that_the_objective_has_a_use_for_take_the_place_of_the_bundle(objective: Objective) -> None:
    parts = ["ccm", "ccr", "fawa"] if "consistency" in objective.terms else ["ccm", "fawa"]
    assert names(objective, CFA()) == parts
    assert names(objective, EMA(), CFA(), FriendlyAT()) == ["ema", *parts, "friendly-at"]
    plan = compose(objective, [CFA()])
    (became,) = plan.bundles
    assert (became.bundle, became.parts, became.remark()) == (CFA(), plan.methods, None)
    assert list(became.unfit) == [part for part in ("ccm", "ccr", "fawa") if part not in parts]


def test_its_settings_are_those_of_the_parts() -> None:
    given = CFA(lambda1=0.4, lambda2=0.6, begin=2, decay=0.9, avg_start=7, threshold=0.1)
    expected = (CCM(lam=0.4, begin=2), CCR(lam=0.6, begin=2), FAWA(decay=0.9, begin=7, threshold=0.1))
    assert compose(Trades(), [given]).methods == expected
    assert compose(Trades(), [CFA()]).methods == (CCM(), CCR(), FAWA())


def test_a_part_that_another_method_leaves_nothing_to_set_is_left_out_and_that_is_said() -> None:
    for methods in ([FairTAT(), CFA()], [CFA(), FairTAT()]):
        plan = compose(Trades(), methods)
        assert sorted(method.name for method in plan.methods) == ["ccr", "fair-tat", "fawa"]
        assert plan.bundles[0].remark() == "cfa leaves out ccm, since fair-tat sets attack.eps already"
    assert names(PGDAT(), FairTAT(), CFA()) == ["fair-tat", "fawa"]
    assert names(PGDAT(), FairTAT(), CFA(), allow=EPS) == ["fair-tat", "ccm", "fawa"]
    assert names(PGDAT(), FairTAT(adaptive_eps=False), CFA()) == ["fair-tat", "ccm", "fawa"]


def test_a_part_whose_term_another_method_computes_anew_is_left_out() -> None:
    class Anew(Method):
        name = "anew"
        claims = frozenset({"loss.weight"})
        replaces = frozenset({"label"})

    plan = compose(Trades(), [CFA(), Anew()])
    assert plan.bundles[0].remark() == "cfa leaves out ccr, since anew replaces the term that reads loss.label"


def test_it_is_refused_beside_its_own_parts_twice_and_where_nothing_fits() -> None:
    message = r"cfa stands for ccm, ccr, fawa and fawa is listed too: give cfa the settings \(lambda1, .*threshold\)"
    for methods in ([CFA(), FAWA()], [FAWA(), CFA()]):
        with pytest.raises(ConflictError, match=message):
            compose(PGDAT(), methods)
    with pytest.raises(ConflictError, match="cfa is listed twice: keep one"):
        compose(PGDAT(), [CFA(), CFA(begin=2)])
    with pytest.raises(ConflictError, match=r"no part of cfa acts on standard: ccm sets attack\.eps, .*: drop cfa"):
        compose(Standard(), [CFA()])
    with pytest.raises(ConflictError, match="fawa measures on held out images and this run has none"):
        compose(PGDAT(), [CFA()], validation=False)


@pytest.mark.parametrize(
    ("field", "wrong"),
    [("lambda1", -1), ("lambda2", "x"), ("begin", 0), ("decay", 2), ("avg_start", -1), ("threshold", 1.5)],
)
def test_a_wrong_value_is_refused_with_owner_and_field(field: str, wrong: Any) -> None:
    with pytest.raises(ConfigError, match=f"^cfa: {field} must be"):
        CFA(**{field: wrong})
    with pytest.raises(ConfigError, match=f"^cfa: {field} must be"):
        read_composition(f"pgd-at + cfa({field}={wrong})")
    with pytest.raises(UnknownNameError, match="unknown key of cfa 'lamda1': did you mean lambda1"):
        read_composition("pgd-at + cfa(lamda1=0.5)")


# In words


def test_an_explanation_says_what_it_became() -> None:
    text = explain_plan(plan_of("pgd-at + fair-tat + cfa(decay=0.9)"))
    lines = text.splitlines()
    at = next(number for number, line in enumerate(lines) if line.startswith("cfa: "))
    assert lines[at + 1].startswith("  lambda1=none, lambda2=0.5, begin=10, decay=0.9")
    assert lines[at + 2 : at + 5] == [
        "  stands for: fawa",
        "  without ccr: it needs the loss term 'consistency', and pgd-at has only label",
        "  without ccm: fair-tat sets attack.eps already",
    ]
    assert "  decay=0.9, threshold=0.2, begin=50, buffers=average" in lines
    assert "ccm: " not in "\n".join(line for line in lines if not line.startswith(" "))


def test_it_is_listed_among_the_methods() -> None:
    listed = dict(listing("methods"))
    assert listed["cfa"].startswith("CFA whole")
    assert {"ccm", "ccr", "fawa"} <= set(listed)
    with pytest.raises(UnknownNameError, match="unknown objective or method 'cfaa': did you mean cfa"):
        read_composition("pgd-at + cfaa")


# In runs


def run(net: Net, data: Data, objective: Objective, *methods: Method | Bundle) -> Fitted:
    schedule = Schedule(epochs=2, lr=0.1, batch_size=7)
    return fit(net(), data((10, 8, 8)), objective, methods=methods, schedule=schedule, validation=0.25)


@pytest.mark.parametrize(
    ("objective", "parts"),
    [
        (PGDAT(eps=0.1, steps=1), [CCM(begin=1), FAWA(begin=0, threshold=0.0)]),
        (Trades(eps=0.1, steps=1), [CCM(begin=1), CCR(begin=1), FAWA(begin=0, threshold=0.0)]),
    ],
    ids=["pgd-at", "trades"],
)
def test_a_run_with_it_is_the_run_with_its_parts(
    tiny_net: Net,
    tiny_data: Data,
    differences: Callable[[TrainState, TrainState], list[str]],
    objective: Objective,
    parts: list[Method],
) -> None:
    bundle = CFA(begin=1, avg_start=0, threshold=0.0)
    whole = run(tiny_net, tiny_data, objective, FriendlyAT(variant="cfa"), bundle).state
    assert differences(whole, run(tiny_net, tiny_data, objective, *parts, FriendlyAT(variant="cfa")).state) == []
    assert list(whole.exports) == ["fawa"]


def test_fit_says_what_a_bundle_leaves_out_and_nothing_where_all_acts(tiny_net: Net, tiny_data: Data) -> None:
    bundle = CFA(begin=1, avg_start=0, threshold=0.0)
    with pytest.warns(RobustFairWarning, match="cfa leaves out ccm, since fair-tat sets"):
        run(tiny_net, tiny_data, PGDAT(eps=0.1, steps=1), FairTAT(), bundle)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "cfa", RobustFairWarning)
        run(tiny_net, tiny_data, PGDAT(eps=0.1, steps=1), bundle)


ASKED = "pgd-at + fair-tat + cfa(avg_start=0, threshold=0)"


def test_a_run_keeps_what_was_asked_and_goes_on(tmp_path: Path) -> None:
    recipe, left = read_recipe(ASKED, TINY), "cfa leaves out ccm, since fair-tat sets attack.eps already"
    assert prepare(recipe).remarks == [left]

    def kill(state: TrainState) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(recipe, tmp_path / "cut", on_epoch=kill)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        train(recipe, tmp_path / "whole")
    said = [str(warning.message) for warning in caught]
    assert said.count(left) == 1
    written = yaml.safe_load((tmp_path / "whole" / "recipe.yaml").read_text())
    assert written["train"] == ASKED
    train(read_recipe(str(tmp_path / "cut" / "recipe.yaml"), {}), tmp_path / "cut", resume=True)
    assert tensors(tmp_path / "whole") == tensors(tmp_path / "cut")
    assert history(tmp_path / "whole") == history(tmp_path / "cut")
    other = read_recipe("pgd-at + fair-tat + fawa(begin=0, threshold=0)", TINY)
    with pytest.raises(RecipeError, match="--resume: train is"):
        train(other, tmp_path / "whole", resume=True)


# Of one's own


def test_a_plugin_registers_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(BUNDLES, "_entries", dict(list(BUNDLES) and BUNDLES._entries))
    file = tmp_path / "both.py"
    file.write_text(
        "from dataclasses import dataclass\n"
        "from robustfair.methods import EMA, SWA, Bundle\n"
        "from robustfair.registry import BUNDLES\n\n\n"
        '@BUNDLES.register("both")\n'
        "@dataclass(frozen=True, kw_only=True)\n"
        "class Both(Bundle):\n"
        '    """Both averages of one\'s own."""\n\n'
        '    name = "both"\n'
        "    decay: float = 0.9\n\n"
        "    def parts(self):\n"
        "        return EMA(decay=self.decay), SWA()\n"
    )
    load_plugin(file)
    plan = plan_of("standard + both(decay=0.5)")
    assert [method.name for method in plan.methods] == ["ema", "swa"]
    assert plan.methods[0] == EMA(decay=0.5)
    assert dict(listing("methods"))["both"] == "Both averages of one's own"


def test_two_bundles_with_a_part_in_common_are_refused() -> None:
    @dataclass(frozen=True, kw_only=True)
    class Twin(Bundle):
        name: ClassVar[str] = "twin"

        def parts(self) -> tuple[Method, ...]:
            return (FAWA(),)

    with pytest.raises(ConflictError, match="fawa is listed twice"):
        compose(PGDAT(), [CFA(), Twin()])


def test_a_user_is_told_of_the_settings_that_a_bundle_has(tiny_data: Data) -> None:
    """Listing fawa beside cfa is refused, so that "lower fawa(begin)" or "drop fawa" would lead nowhere."""
    plan = compose(Trades(), [CFA()])
    assert [text.rsplit("; ", 1)[1] for text in plan.remarks(2)] == [
        "lower cfa(begin)",
        "lower cfa(begin)",
        "lower cfa(avg_start)",
    ]
    assert "lower cfa(avg_start)" in explain_plan(plan, epochs=2)
    assert compose(PGDAT(), [FAWA()]).remarks(2)[0].endswith("lower fawa(begin)")
    assert set(CFA.sets.values()) == {field.name for field in dataclasses.fields(CFA)}
    for objective, others in ((Trades(), "ccm and ccr"), (PGDAT(), "ccm")):
        message = f"or list {others} in its place, since fawa comes with cfa"
        with pytest.raises(ConflictError, match=message):
            compose(objective, [CFA()], validation=False)
        with pytest.raises(DataError, match=message):
            require_every_class(tiny_data((3, 0, 3)), compose(objective, [CFA()]))
    with pytest.raises(ConflictError, match="or drop cfa, since fawa comes with cfa"):
        compose(PGDAT(), [CFA(), FairTAT()], validation=False)
