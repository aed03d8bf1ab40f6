"""Every row of the papers' tables: it resolves to the settings of its paper, and what cannot be had is said."""

from __future__ import annotations

import functools
import re
import warnings
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
import yaml

from robustfair.data import CATALOG
from robustfair.errors import ModelError, RecipeError, UnknownNameError
from robustfair.grammar import parse_composition
from robustfair.models.build import create_model
from robustfair.registry import EDITS, METHODS, OBJECTIVES, REPAIRS
from robustfair.runs import run
from robustfair.runs.composition import plans_of
from robustfair.runs.recipe import Recipe, read_recipe, recipe_of
from robustfair.runs.run import train
from robustfair.runs.shipped import read_table, tables
from robustfair.runs.stages import read_edit, require_runnable, run_stages
from robustfair.training.schedule import Schedule

ROWS = {name: read_table(table).row(name) for table in tables() for name in read_table(table).names()}
PAPERS = ("cfa", "confusional-spectral", "faal-logs", "fair-tat", "hwnwb-decosam", "training-dynamics")
UNREGISTERED: set[str] = set()
"""Words of compositions that rows name and the library does not have."""
UNKNOWN_DATA: set[str] = set()
UNTRAINED_MODELS = {"timm:resnet50", "timm:resnext50_32x4d"}
"""What rows name and `create_model` does not build."""


def trained(recipe: Recipe) -> Iterator[Recipe]:
    """The recipes of all that trains in one."""
    if not recipe.stages:
        yield recipe
    for number, stage in enumerate(recipe.stages):
        if stage.does == "train":
            yield recipe.of_stage(number)


@functools.cache
def resolved(name: str) -> Recipe:
    """The recipe of a row, up to a stage that is not there yet."""
    return recipe_of(ROWS[name].values, {}, name) if ROWS[name].stops else read_recipe(name, {})


@functools.cache
def words(name: str) -> frozenset[str]:
    """Objectives and methods that a row names."""
    if not ROWS[name].values:
        return frozenset()
    compositions = [recipe.train for recipe in trained(resolved(name))]
    return frozenset(term.name for text in compositions for term in parse_composition(text))


# All rows


def test_every_row_of_the_papers_is_there() -> None:
    assert {name.split("/")[0] for name in tables()} == set(PAPERS)
    assert len(ROWS) == 381
    assert len(set(ROWS)) == len(ROWS)


def test_every_row_is_explained_but_those_of_methods_that_are_not_there() -> None:
    missing: set[str] = set()
    for name, row in ROWS.items():
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            try:
                found = plans_of(name)
            except UnknownNameError as error:
                missing.add(str(error).split("'")[1])
                continue
        assert found
        assert [said for said, _ in found if "cannot run" in said or "nothing to train" in said] == (
            [row.stops] if row.stops else []
        )
        remarks = (
            [
                method.remark(recipe.epochs)
                for recipe, plan in zip(trained(resolved(name)), filter(None, (plan for _, plan in found)), strict=True)
                for method in plan.methods
            ]
            if row.values
            else []
        )
        assert remarks == [None] * len(remarks), name
    assert missing == UNREGISTERED


def test_every_row_names_data_models_edits_and_repairs_that_are_there_but_these() -> None:
    data, models = set(), set()
    for name, row in ROWS.items():
        if not row.values:
            continue
        recipe = resolved(name)
        data.add(recipe.data)
        for stage in recipe.stages:
            if stage.does == "edit":
                read_edit(stage.what)
                [edit] = parse_composition(stage.what)
                assert edit.name in EDITS
                data |= {str(value) for key, value in edit.args.items() if key == "data"}
            if stage.does == "repair":
                assert parse_composition(stage.what)[0].name in REPAIRS
        for own in trained(recipe):
            models.add(own.model)
            Schedule(kind=own.curve, epochs=own.epochs, lr=own.lr, milestones=own.milestones, batch_size=own.batch_size)
            drops = [milestone * own.epochs for milestone in own.milestones] if own.curve == "multistep" else []
            assert drops == pytest.approx([round(drop) for drop in drops], abs=1e-4), name
            assert own.validation > 0 or own.select == "last", name
    files = {name for name in data if name.endswith(".npz")}
    assert data - files - CATALOG.keys() == UNKNOWN_DATA
    for model in models - UNTRAINED_MODELS:
        create_model(model, width=1)
    for model in UNTRAINED_MODELS & models:
        with pytest.raises(ModelError, match=f"{model} can be audited and not be trained"):
            create_model(model)
    assert models >= UNTRAINED_MODELS


@pytest.mark.parametrize("table", tables())
def test_a_table_says_first_where_it_is_from_what_was_measured_and_where_it_departs(table: str) -> None:
    file = resources.files("robustfair") / "recipes" / f"{table}.yaml"
    head = re.findall(r"^(\w+):", file.read_text(encoding="utf-8"), re.MULTILINE)
    own = [key for key in ("schema", "source", "like", "protocol", "departures", "guesses", "doubts") if key in head]
    assert head[: len(own)] == own
    read = read_table(table)
    assert read.source
    assert read.departures
    assert read.guesses
    assert "#" not in file.read_text(encoding="utf-8"), "what a comment says, `explain` does not"
    assert "protocol" in head or read.like
    assert not set(read.awaits) & {*METHODS, *OBJECTIVES, *REPAIRS}, "it is there now: write its stage and wait no more"


@pytest.mark.parametrize("table", tables())
def test_a_row_reads_back_from_the_yaml_that_its_run_keeps(table: str, tmp_path: Path) -> None:
    name = next((name for name in read_table(table).names() if len(ROWS[name].values.get("stages", ())) > 1), "")
    name = name or next(name for name in read_table(table).names() if ROWS[name].values)
    path = tmp_path / "recipe.yaml"
    path.write_text(resolved(name).to_yaml())
    assert read_recipe(str(path), {}) == resolved(name)


# Rows against the papers, by hand

CFA: dict[str, Any] = {
    "data": "cifar10",
    "model": "preact-resnet18",
    "eps": 8 / 255,
    "step_size": 2 / 255,
    "steps": 10,
    "epochs": 200,
    "batch_size": 128,
    "lr": 0.1,
    "milestones": (0.5, 0.75),
    "weight_decay": 5e-4,
    "augment": "crop-flip",
    "validation": 0.02,
    "select": "average+worst",
}
HWNWB = CFA | {"epochs": 100, "milestones": (0.9, 0.95), "validation": 0.0, "select": "last"}
EMA = "ema(decay=0.85, per=epoch, begin=50, buffers=average)"
FRL = "frl(variant=rwrm, tau1=0.05, tau2=0.05)"
CFA_TRADES = "trades(beta=6, normalise_beta=true)"
FRL_KEYS = {"epochs": 80, "lr": 0.001, "milestones": (0.5,), "start": "previous"}
TRADES = {"eps": 0.031, "step_size": 0.007, "epochs": 76, "weight_decay": 2e-4, "augment": "crop-flip-zero"}
EXPECTED: dict[str, list[tuple[str, dict[str, Any]]]] = {
    "cfa/table-1/trades": [(CFA_TRADES, CFA)],
    "cfa/table-1/trades+cfa": [(f"{CFA_TRADES} + cfa", CFA)],
    "cfa/table-2/trades+ccm": [(f"{CFA_TRADES} + ccm(lam=0.3)", CFA)],
    "cfa/table-1/fat+ema": [(f"pgd-at(attack_mode=train) + friendly-at(variant=cfa) + {EMA}", CFA)],
    "cfa/table-2/fat+ccm": [("pgd-at(attack_mode=train) + friendly-at(variant=cfa) + ccm(lam=0.7)", CFA)],
    "cfa/table-2/at": [("pgd-at(attack_mode=train)", CFA)],
    "cfa/table-1/frl+ema": [
        (CFA_TRADES, CFA | {"validation": 0.06, "start": "scratch"}),
        (f"trades(beta=1.5, normalise_beta=false) + {FRL} + {EMA}", CFA | {"validation": 0.06} | FRL_KEYS),
    ],
    "fair-tat/table-2/cifar100/fair-tat+trades+cfa": [
        (
            "trades(beta=2) + fair-tat(sampling=cfps, adaptive_eps=true) + ccr + fawa",
            CFA | {"data": "cifar100", "select": "last"},
        )
    ],
    "fair-tat/table-1/cifar10/clean": [
        ("standard", CFA | {"eps": None, "step_size": None, "steps": None, "select": "last"})
    ],
    "fair-tat/table-1/cifar10/wat+trades": [
        (
            "trades(beta=6) + wat",
            {"eps": 0.031, "epochs": 100, "milestones": (0.74, 0.89, 0.99), "weight_decay": 2e-4, "validation": 0.06},
        )
    ],
    "training-dynamics/table-1/trades+idbh": [
        ("trades(beta=6)", {"data": "cifar100", "model": "resnet9", "augment": "idbh-strong", "epochs": 200})
    ],
    "hwnwb-decosam/table-2/wrn-28-10/arow": [("arow(lam=7)", HWNWB | {"model": "wrn-28-10"})],
    "hwnwb-decosam/table-6/wrn-28-2/mart+hwnwb": [
        ("mart(beta=3)", HWNWB | {"model": "wrn-28-2", "data": "cifar100"}),
        ("repair: hwnwb", {}),
    ],
    "hwnwb-decosam/table-5/pgd-at+hwn-without-bias": [
        ("pgd-at", HWNWB | {"model": "wrn-28-5"}),
        ("repair: hwnwb(keep_bias=false)", {}),
    ],
    "hwnwb-decosam/table-3/trades+hwnwb": [
        ("standard", {"data": "stl10", "eps": None, "epochs": 100}),
        ("edit: pseudo-label(data=stl10/unlabelled)", {}),
        ("trades(beta=6)", HWNWB | {"data": "stl10", "model": "wrn-28-5", "start": "scratch"}),
        ("repair: hwnwb", {}),
    ],
    "hwnwb-decosam/table-4/wat+hwnwb": [
        ("trades(beta=6) + wat", {"validation": 0.06, "weight_decay": 2e-4, "milestones": (0.74, 0.89, 0.99)}),
        ("repair: hwnwb", {}),
    ],
    "hwnwb-decosam/table-8/stl10/faal": [
        ("standard", {"data": "stl10", "model": "wrn-28-5"}),
        ("edit: pseudo-label(data=stl10/unlabelled)", {}),
        ("trades(beta=6)", {"epochs": 100, "start": "scratch", "eps": 8 / 255}),
        ("pgd-at + faal(radius=0.5)", {"epochs": 2, "lr": 0.01, "milestones": (0.5,), "start": "previous"}),
    ],
    "hwnwb-decosam/table-9/trades-lambda-0.5": [("trades(beta=0.5)", HWNWB | {"model": "wrn-28-5"})],
    "confusional-spectral/table-1/trades": [("trades(beta=6)", TRADES | {"model": "wrn-34-10", "validation": 0.0})],
    "confusional-spectral/table-4/trades-awp+csr-gamma-0.1": [
        ("trades(beta=6) + awp(gamma=0.005, begin=9, proxy_lr=0.1)", {"epochs": 200, "augment": "crop-flip-zero"}),
        (
            "trades(beta=6) + csr(alpha=0.3, gamma=0.1) + awp(gamma=0.005)",
            {"epochs": 2, "lr": 0.01, "schedule": "constant", "model": "wrn-34-10", "augment": "crop-flip"},
        ),
    ],
    "confusional-spectral/table-1/trades+frl-rwrm-0.07": [
        ("trades(beta=6)", TRADES | {"validation": 0.06}),
        (
            "trades(beta=1.5) + frl(variant=rwrm, tau1=0.07, tau2=0.07)",
            FRL_KEYS | {"validation": 0.06, "select": "average+worst", "eps": 8 / 255, "weight_decay": 5e-4},
        ),
    ],
    "confusional-spectral/table-5/csr-gamma-0": [
        ("pgd-at + csr(alpha=0.3, gamma=0)", CFA | {"norm": "l2", "eps": 128 / 255, "step_size": 15 / 255})
    ],
    "confusional-spectral/table-2/cifar10-l2-wrn-70-16/wang-2023+csr-gamma-0.1": [
        ("edit: add(data=cifar10-edm-50m.npz)", {}),
        (
            "trades(beta=6) + csr(alpha=0.3, gamma=0.1)",
            {"epochs": 2, "model": "dm-wrn-70-16", "norm": "l2", "eps": 128 / 255},
        ),
    ],
    "confusional-spectral/table-7/cifar100/jtt": [
        ("standard", {"epochs": 40}),
        ("edit: upweight(times=20)", {}),
        ("standard", {"epochs": 200, "start": "scratch", "model": "wrn-34-10"}),
    ],
    "confusional-spectral/table-9/csr": [
        ("standard + csr(alpha=0.3, gamma=0)", {"epochs": 90, "batch_size": 512, "lr": 0.2, "schedule": "cosine"})
    ],
    "faal-logs/wrn/mart+faal-awp": [
        ("mart(beta=6)", {"epochs": 90, "weight_decay": 7e-4, "model": "wrn-34-10", "validation": 0.05}),
        (
            "pgd-at + faal(radius=0.5) + awp(gamma=0.005, proxy_lr=0.1)",
            {"epochs": 2, "lr": 0.01, "select": "worst", "validation": 0.05},
        ),
    ],
    "faal-logs/prn/pgd-at+faal-at-radius-1": [("pgd-at", CFA | {"validation": 0.05}), ("pgd-at + faal(radius=1)", {})],
}


@pytest.mark.parametrize("name", list(EXPECTED))
def test_a_row_has_the_settings_of_its_paper(name: str) -> None:
    recipe = resolved(name)
    did = [stage.what if stage.does == "train" else f"{stage.does}: {stage.what}" for stage in recipe.stages]
    assert (did or [recipe.train]) == [what for what, _ in EXPECTED[name]]
    for number, (_, keys) in enumerate(EXPECTED[name]):
        if recipe.stages and recipe.stages[number].does != "train":
            continue
        own = vars(recipe)
        if recipe.stages:
            start = recipe.stages[number].keys.get("start", "previous" if number else "scratch")
            own = vars(recipe.of_stage(number, start="scratch")) | {"start": start}
        assert {key: own[key] for key in keys} == keys


def test_rows_of_one_model_in_several_tables_are_one_recipe() -> None:
    for one, other in [
        ("cfa/table-1/trades+ema", "cfa/table-3/trades+ema"),
        ("fair-tat/table-1/cifar10/fat+cfa", "fair-tat/table-4/fat+cfa"),
        ("hwnwb-decosam/table-2/wrn-28-5/pgd-at", "hwnwb-decosam/figure-1/pgd-at"),
        ("hwnwb-decosam/table-2/wrn-28-5/pgd-at", "hwnwb-decosam/text-4.2/pgd-at"),
        ("hwnwb-decosam/table-4/faal", "hwnwb-decosam/table-8/cifar10/faal"),
        ("confusional-spectral/table-3/cifar10/trades", "confusional-spectral/table-8/trades"),
    ]:
        assert resolved(one) == resolved(other)


# What cannot be had


@pytest.mark.parametrize(
    ("name", "what", "before"),
    [
        (
            "table-2/wrn-28-5/trades+deco-sam",
            "2, train: trades(beta=6) + deco-sam(rho=5e-05",
            "table-2/wrn-28-5/trades",
        ),
        ("table-3/arow+deco-sam", "4, train: arow(lam=7) + deco-sam(rho=5e-05", "table-3/arow"),
        ("table-4/wat+deco-sam", "2, train: trades(beta=6) + deco-sam(rho=5e-05", "table-4/wat"),
        ("table-4/faal+deco-sam", "3, train: pgd-at + deco-sam(rho=5e-05", "table-4/faal"),
        ("table-8/cifar10/arow+deco-sam", "2, train: arow(lam=7) + deco-sam(rho=5e-05", "table-2/wrn-28-5/arow"),
        ("table-10/pgd-at+deco-sam-rho-9e-5", "2, train: pgd-at + deco-sam(rho=9e-05", None),
    ],
)
def test_a_row_that_awaits_a_stage_is_refused_and_not_run_in_part(name: str, what: str, before: str | None) -> None:
    name = f"hwnwb-decosam/{name}"
    with pytest.raises(RecipeError, match=rf"^{re.escape(name)} cannot run yet: its stage {re.escape(what)}") as raised:
        read_recipe(name, {})
    text = str(raised.value)
    assert "needs deco-sam, which is not there yet" in text
    assert text.endswith(f"; what comes before that is hwnwb-decosam/{before}") == (before is not None)
    assert [said for said, _ in plans_of(name)][-1] == text
    assert resolved(name).stages[-1].does == "train"


@pytest.mark.parametrize("name", ["confusional-spectral/table-9/csr", "hwnwb-decosam/table-7/trades+hwnwb"])
def test_a_network_that_does_not_train_is_refused_before_an_image_is_read(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "load_dataset", lambda *_, **__: pytest.fail("images were read"))
    recipe = read_recipe(name, {})
    with pytest.raises(ModelError, match=r"model timm:res.* can be audited and not be trained: `model` names"):
        run_stages(recipe, tmp_path / "run") if recipe.stages else train(recipe, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_published_weights_have_nothing_to_train() -> None:
    name = "confusional-spectral/table-2/cifar10-linf-wrn-28-10/pang-2022"
    with pytest.raises(
        RecipeError, match="published weights, with nothing to train: robustfair audit robustbench:Pang"
    ):
        read_recipe(name, {})
    assert plans_of(name) == [(ROWS[name].stops, None)]


# Rows on small images

SMALL: dict[str, Any] = {
    "data": "digits",
    "limit_per_class": 12,
    "model": "small-cnn",
    "width": 4,
    "epochs": 2,
    "batch_size": 32,
    "steps": 1,
    "norm": None,
    "eps": 0.1,
    "step_size": None,
    "augment": "none",
    "validation": 0.25,
    "device": "cpu",
    "kernels": False,
}
PER_STAGE = SMALL.keys() - {"data", "limit_per_class", "validation", "device"}


def small(values: dict[str, Any]) -> dict[str, Any]:
    """Keys of a recipe as they are for small images; epochs at which something begins are the first."""
    text = {key: re.sub(r"(begin|avg_start)=\d+", r"\1=0", str(values[key])) for key in values.keys() & {"train"}}
    return {key: value for key, value in values.items() if key not in PER_STAGE} | text


def first_row_of(word: str) -> str:
    """The first row that names an objective, a method, an edit or a repair and nothing that is not there."""
    for name, row in ROWS.items():
        if not row.values or row.stops or words(name) & UNREGISTERED or resolved(name).start != "scratch":
            continue
        stages = {parse_composition(stage.what)[0].name for stage in resolved(name).stages if stage.does == "repair"}
        if word in words(name) | stages:
            return name
    raise AssertionError(f"no row names {word}")


NAMED = sorted(frozenset[str]().union(*map(words, ROWS)) - UNREGISTERED | {"hwnwb"})


@pytest.mark.filterwarnings("ignore::robustfair.errors.RobustFairWarning")
@pytest.mark.parametrize("word", NAMED)
def test_a_row_of_every_method_trains_on_small_images(word: str, tmp_path: Path) -> None:
    values = dict(ROWS[first_row_of(word)].values)
    attacked = {key: value for key, value in SMALL.items() if key not in ("eps", "steps") or word != "standard"}
    path = tmp_path / "recipe.yaml"
    if "stages" in values:
        stages = [small(dict(stage)) for stage in values.pop("stages") if "edit" not in stage]
        path.write_text(yaml.safe_dump({**small(values), **attacked, "stages": stages}))
        recipe = read_recipe(str(path), {})
        require_runnable(recipe)
        run_stages(recipe, tmp_path / "run")
    else:
        path.write_text(yaml.safe_dump({**small(values), **attacked}))
        train(read_recipe(str(path), {}), tmp_path / "run")
    assert (tmp_path / "run" / "manifest.json").is_file()
