"""How a run executes where that is left to the clock."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from robustfair.data import ImageDataset
from robustfair.data.loader import evaluation_batches
from robustfair.errors import ConfigError, RobustFairWarning
from robustfair.execution.kernels.compiled import kernels, missing
from robustfair.execution.program import Program
from robustfair.objectives import PGDAT, Standard
from robustfair.runs.recipe import Recipe, read_recipe
from robustfair.runs.run import train
from robustfair.training import Schedule, fit, way
from robustfair.training.engine import Engine
from robustfair.training.way import Way, choose_way
from robustfair.values import Batch

Net = Callable[..., nn.Module]
Data = Callable[..., ImageDataset]
Seconds = dict[tuple[str | bool, ...], float]
"""Of a pass, by (precision, compile), or by these and the mode of its batch norm where that makes a difference."""


@pytest.fixture
def clocked(monkeypatch: pytest.MonkeyPatch) -> Callable[[Seconds, float], list[str]]:
    """A function that gives passes the seconds it is told, compiles included, and returns what passes were made."""

    def set_to(seconds: Seconds, compiling: float = 1.0, *, bf16: bool = True) -> list[str]:
        made: list[str] = []

        def timed(engine: Engine, batch: Batch, mode: str) -> float:
            made.append(f"{'bf16' if engine.eager.bf16 else 'fp32'}{' compiled' * engine.compiled}")
            about = "bf16" if engine.eager.bf16 else "fp32", engine.compiled
            return seconds[(*about, mode) if (*about, mode) in seconds else about]

        clock = iter(range(1000))
        monkeypatch.setattr(way, "_pass", timed)
        monkeypatch.setattr(way, "has_bf16", lambda device: bf16)
        monkeypatch.setattr(way.time, "perf_counter", lambda: compiling * next(clock))
        return made

    return set_to


def chosen(
    tiny_net: Net, data: ImageDataset, *, steps: int = 10, program: Program | None = None, **asked: object
) -> tuple[Way, Engine]:
    model = tiny_net()
    batch = next(evaluation_batches(data, 7))

    def make(precision: str, compile: bool) -> Engine:
        return Engine(model, precision=precision, compile=compile, batch_size=7, program=program)  # type: ignore[arg-type]

    given = {"precision": "fp32", "compile": False, **asked}
    return choose_way(make, batch, PGDAT(steps=8), steps=steps, **given)  # type: ignore[arg-type]


def test_what_is_asked_for_is_taken_untimed(tiny_net: Net, tiny_data: Data, clocked: Callable[..., list[str]]) -> None:
    made = clocked({})
    found, engine = chosen(tiny_net, tiny_data(), precision="bf16")
    assert (found, made) == (Way("bf16", False), [])
    assert (engine.eager.bf16, engine.compiled) == (True, False)


@pytest.mark.parametrize(("half", "wanted"), [(0.05, "bf16"), (0.089, "bf16"), (0.095, "fp32"), (1.0, "fp32")])
def test_precision_auto_is_bf16_where_it_is_clearly_faster(
    tiny_net: Net, tiny_data: Data, clocked: Callable[..., list[str]], half: float, wanted: str
) -> None:
    clocked({("fp32", False): 0.1, ("bf16", False): half})
    found, engine = chosen(tiny_net, tiny_data(), precision="auto")
    why = f"precision auto is {wanted}: a pass over 7 images takes 0.1 s in fp32, {half:.3g} s in bf16"
    assert found == Way(wanted, False, why)  # type: ignore[arg-type]
    assert engine.eager.bf16 == (wanted == "bf16")


def test_precision_auto_times_no_bf16_without_its_instructions(
    tiny_net: Net, tiny_data: Data, clocked: Callable[..., list[str]]
) -> None:
    made = clocked({}, bf16=False)
    found, _ = chosen(tiny_net, tiny_data(), precision="auto")
    assert (found, made) == (Way("fp32", False, "precision auto is fp32: no bf16 instructions here"), [])


def test_compile_auto_tries_nothing_in_a_short_run(
    tiny_net: Net, tiny_data: Data, clocked: Callable[..., list[str]]
) -> None:
    made = clocked({("fp32", False): 0.2})
    found, _ = chosen(tiny_net, tiny_data(), compile="auto", steps=200)  # 9.5 passes of 0.2 s, of which 15 % is 57 s
    why = "compile auto is false: 200 steps take about 380 s uncompiled, too few to pay back compiling"
    assert found == Way("fp32", False, why)
    assert set(made) == {"fp32"}


@pytest.mark.parametrize(("compiling", "wanted"), [(18.0, True), (22.0, False)])
def test_compile_auto_compiles_where_the_steps_ahead_pay_it_back(
    tiny_net: Net, tiny_data: Data, clocked: Callable[..., list[str]], compiling: float, wanted: bool
) -> None:
    made = clocked({("fp32", False): 0.2, ("fp32", True): 0.19}, compiling)
    found, engine = chosen(tiny_net, tiny_data(), compile="auto", steps=215)
    why = f"215 steps take about 408 s uncompiled, a pass 0.2 s and compiled 0.19 s, compiling it {compiling:.0f} s"
    assert found == Way("fp32", wanted, f"compile auto is {str(wanted).lower()}: {why}")
    assert engine.compiled == wanted
    assert "fp32 compiled" in made


def test_compile_auto_takes_the_precision_that_was_chosen_and_says_both(
    tiny_net: Net, tiny_data: Data, clocked: Callable[..., list[str]]
) -> None:
    clocked({("fp32", False): 2.0, ("bf16", False): 1.0, ("bf16", True): 0.5})
    found, engine = chosen(tiny_net, tiny_data(), precision="auto", compile="auto", steps=1000)
    assert (found.precision, found.compile) == ("bf16", True)
    assert found.why.count("; ") == 1
    assert (engine.eager.bf16, engine.compiled) == (True, True)


def test_precision_auto_weighs_attacks_on_kernels_against_training_passes_on_torchs_layers(
    tiny_net: Net, tiny_data: Data, clocked: Callable[..., list[str]]
) -> None:
    clocked({("fp32", False, "eval"): 0.1, ("fp32", False, "train_frozen"): 0.3, ("bf16", False): 0.1})
    found, engine = chosen(tiny_net, tiny_data(), precision="auto", program=Program([], []))
    told = "a pass over 7 images takes 0.132 s in fp32, 0.1 s in bf16"  # 8 of 0.1 and 1.5 of 0.3
    assert found == Way("bf16", False, f"precision auto is bf16: {told}", kernels=False)
    clocked({("fp32", False, "eval"): 0.1, ("fp32", False, "train_frozen"): 0.3, ("bf16", False): 0.125})
    found, engine = chosen(tiny_net, tiny_data(), precision="auto", program=Program([], []))
    assert (found.precision, found.kernels, engine.program is None) == ("fp32", True, False)


def test_compile_auto_counts_what_is_compiled_where_attacks_run_on_kernels(
    tiny_net: Net, tiny_data: Data, clocked: Callable[..., list[str]]
) -> None:
    seconds = {("fp32", False, "eval"): 0.1, ("fp32", False, "train_frozen"): 0.2, ("fp32", True): 0.15}
    clocked(seconds)
    found, _ = chosen(tiny_net, tiny_data(), compile="auto", steps=1000, program=Program([], []))  # 15 % of 300 s
    why = "compile auto is false: 1000 steps take about 1.1e+03 s uncompiled, too few to pay back compiling"
    assert found == Way("fp32", False, why, kernels=True)
    for compiling, wanted in ((149.0, True), (151.0, False)):
        clocked(seconds, compiling)
        found, engine = chosen(tiny_net, tiny_data(), compile="auto", steps=2000, program=Program([], []))
        assert (found.compile, found.kernels, engine.compiled) == (wanted, True, wanted)
        assert "2000 steps take about 2.2e+03 s uncompiled, a pass 0.2 s and compiled 0.15 s" in found.why


def test_compile_auto_says_why_a_model_or_machine_cannot(
    tiny_net: Net, tiny_data: Data, clocked: Callable[..., list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(device_type: str) -> None:
        raise ConfigError("fit", "compile", allowed="false on this machine", got=True, hint="no g++")

    clocked({("fp32", False): 2.0})
    monkeypatch.setattr(way, "require_compiler", refuse)
    found, engine = chosen(tiny_net, tiny_data(), compile="auto", steps=1000)
    assert not found.compile
    assert "it cannot be done here (fit: compile must be false on this machine" in found.why
    assert not engine.compiled


def test_compile_auto_compiles_one_pass_and_compares(
    tiny_net: Net, tiny_data: Data, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(way, "COMPILING", 0.0)
    found, engine = chosen(tiny_net, tiny_data(), compile="auto", steps=1)
    told = r"compile auto is false: 1 steps take about \S+ s uncompiled, a pass \S+ s and compiled \S+ s, compiling it"
    assert re.match(told, found.why)
    assert not engine.compiled, "one step pays back no compiling"
    found, engine = chosen(tiny_net, tiny_data(), compile="auto", steps=10**9)
    assert engine.compiled == found.compile
    pass_, compiled = (float(each) for each in re.findall(r"a pass (\S+) s and compiled (\S+) s", found.why)[0])
    assert compiled <= pass_ if found.compile else compiled >= pass_


# In a run


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize(
    "objective", [PGDAT(eps=0.1, steps=2, attack_mode="train"), Standard()], ids=["at", "standard"]
)
def test_timing_changes_no_bit_of_a_run(tiny_net: Net, tiny_data: Data, objective: PGDAT | Standard) -> None:
    def trained(**asked: object) -> tuple[dict[str, Tensor], Tensor]:
        torch.manual_seed(5)
        schedule = Schedule(epochs=2, batch_size=7, lr=0.05)
        fitted = fit(tiny_net(dropout=0.5), tiny_data(), objective, schedule=schedule, **asked)  # type: ignore[arg-type]
        return weights(fitted.model), torch.rand(3)

    told: list[Way] = []
    plain, draw = trained()
    with pytest.warns(RobustFairWarning, match=r"^compile auto is false: \d+ steps take about .* too few to pay back"):
        timed, next_draw = trained(compile="auto", on_way=told.append)
    assert torch.equal(draw, next_draw)
    assert all(torch.equal(timed[name], tensor) for name, tensor in plain.items())
    assert [(each.precision, each.compile) for each in told] == [("fp32", False)]


def test_timing_leaves_the_model_as_it_was(tiny_net: Net, tiny_data: Data) -> None:
    model = tiny_net().train()
    before, modes = weights(model), [module.training for module in model.modules()]
    batch = next(evaluation_batches(tiny_data(), 7))
    choose_way(
        lambda precision, compile: Engine(model, precision=precision, compile=compile, batch_size=7),
        batch,
        PGDAT(steps=2, attack_mode="train"),
        precision="auto",
        compile="auto",
        steps=3,
    )
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert [module.training for module in model.modules()] == modes
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("field", ["precision", "compile"])
def test_a_run_that_goes_on_cannot_choose_anew(tiny_net: Net, tiny_data: Data, field: str) -> None:
    schedule = Schedule(epochs=1, batch_size=7)
    state = fit(tiny_net(), tiny_data(), PGDAT(steps=1), schedule=schedule).state
    with pytest.raises(ConfigError, match=f"{field} must be a value of its own beside resume, got 'auto'"):
        fit(tiny_net(), tiny_data(), PGDAT(steps=1), schedule=schedule, resume=state, **{field: "auto"})  # type: ignore[arg-type]


@pytest.mark.parametrize("asked", [{"precision": "auto"}, {"compile": "auto"}])
def test_the_reference_path_is_not_left_to_the_clock(tiny_net: Net, tiny_data: Data, asked: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match="beside deterministic, got 'auto'"):
        fit(tiny_net(), tiny_data(), PGDAT(), deterministic=True, **asked)  # type: ignore[arg-type]


class StopError(Exception):
    """What ends a run from inside."""


@pytest.mark.parametrize("position", [(0, 1), (1, 1)], ids=["before a state is kept", "after"])
def test_a_resumed_run_goes_the_way_that_its_manifest_tells(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, position: tuple[int, int]
) -> None:
    def stop(epoch: int, step: int) -> None:
        if (epoch, step) == position:
            raise StopError

    taken: list[bool] = []
    recipe = Recipe(
        train="pgd-at(eps=0.1, steps=1)",
        data="digits",
        limit_per_class=8,
        model="small-cnn",
        width=2,
        epochs=2,
        batch_size=20,
        validation=0.25,
        compile="auto",
        precision="auto",
    )

    def half(make: way.MakeEngine, batch: Batch, attack_steps: int) -> tuple[str, str]:
        return "bf16", "of a test"

    monkeypatch.setattr(way, "_faster_precision", half)
    told_once = pytest.warns(RobustFairWarning, match="precision auto is bf16: of a test; compile auto is false: ")
    with told_once, pytest.raises(StopError):
        train(recipe, tmp_path / "run", on_step=stop)
    told = json.loads((tmp_path / "run" / "manifest.json").read_text())["way"]
    assert (told["precision"], told["compile"]) == ("bf16", False)
    monkeypatch.setattr(way, "_faster_precision", lambda *args: pytest.fail("chose anew"))
    monkeypatch.setattr(way, "_worth_compiling", lambda *args: pytest.fail("chose anew"))
    made = Engine.__init__

    def noted(self: Engine, *args: object, **given: object) -> None:
        taken.append(given["precision"] == "bf16")
        made(self, *args, **given)  # type: ignore[arg-type]

    monkeypatch.setattr(Engine, "__init__", noted)
    train(recipe, tmp_path / "run", resume=True)
    assert taken == [True]
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert (manifest["status"], manifest["way"]) == ("complete", told)


KEYS = {
    "data": "digits",
    "limit_per_class": 8,
    "model": "small-cnn",
    "width": 16,
    "epochs": 2,
    "batch_size": 20,
    "validation": 0.25,
}


def stopped(out: Path, **keys: object) -> dict[str, object]:
    """The way in the manifest of a run that stopped in its second epoch."""

    def stop(epoch: int, step: int) -> None:
        if (epoch, step) == (1, 1):
            raise StopError

    with pytest.raises(StopError):
        train(Recipe(train="pgd-at(eps=0.1, steps=2)", **KEYS | keys), out, on_step=stop)  # type: ignore[arg-type]
    return dict(json.loads((out / "manifest.json").read_text())["way"])


def resumed(out: Path) -> dict[str, Tensor]:
    return dict(train(read_recipe(str(out / "recipe.yaml"), {}), out, resume=True).state.weights)


@pytest.mark.skipif(kernels() is None, reason=f"the kernels cannot be had: {missing()}")
@pytest.mark.parametrize("asked", [True, False])
def test_a_resumed_run_takes_kernels_where_it_took_them(tmp_path: Path, asked: bool) -> None:
    told = stopped(tmp_path / "run", kernels=asked)
    assert told["kernels"] is asked
    whole = train(Recipe(train="pgd-at(eps=0.1, steps=2)", kernels=asked, **KEYS), tmp_path / "whole")  # type: ignore[arg-type]
    found = resumed(tmp_path / "run")
    assert all(torch.equal(found[name], tensor) for name, tensor in whole.state.weights.items())
    assert json.loads((tmp_path / "run" / "manifest.json").read_text())["way"] == told


@pytest.mark.parametrize("way_is_told", [True, False])
def test_a_run_that_an_earlier_version_began_goes_on_without_kernels(tmp_path: Path, way_is_told: bool) -> None:
    told = stopped(tmp_path / "run", kernels=False)
    del told["kernels"]
    manifest, recipe = tmp_path / "run" / "manifest.json", tmp_path / "run" / "recipe.yaml"
    values = json.loads(manifest.read_text())
    del values["way"]
    manifest.write_text(json.dumps(values | ({"way": told} if way_is_told else {})))
    recipe.write_text(recipe.read_text().replace("kernels: false\n", ""))
    assert read_recipe(str(recipe), {}).kernels
    whole = train(Recipe(train="pgd-at(eps=0.1, steps=2)", kernels=False, **KEYS), tmp_path / "whole")  # type: ignore[arg-type]
    found = resumed(tmp_path / "run")
    assert all(torch.equal(found[name], tensor) for name, tensor in whole.state.weights.items())


def test_the_manifest_tells_the_way_of_every_run(tmp_path: Path) -> None:
    keys = {"data": "digits", "limit_per_class": 4, "model": "small-cnn", "width": 2, "epochs": 1, "validation": 0.25}
    train(Recipe(train="standard", **keys), tmp_path)  # type: ignore[arg-type]
    told = json.loads((tmp_path / "manifest.json").read_text())["way"]
    assert told == {"precision": "fp32", "compile": False, "why": "", "kernels": False}
