"""What may be named as a model: a run, a weight file, a factory."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from reference.runs import CFA, TINY, cut_in_half
from robustfair.errors import CheckpointError, ConfigError, ModelError, RobustFairError, UnknownNameError
from robustfair.models import create_model
from robustfair.runs.load import load_target
from robustfair.runs.recipe import read_recipe
from robustfair.runs.run import train

FACTORIES = """
from torch import nn
from robustfair import create_model
from robustfair.errors import DataError

class Small:
    @staticmethod
    def build():
        return create_model("small-cnn", in_channels=1, width=2, num_classes=3).train()

build = Small.build
number = 5

def fails():
    raise ValueError("first line\\nsecond line")

def refuses():
    raise DataError("images first")

def returns_class():
    return nn.Linear

def needs(num_classes, *, width):
    return build()

def half():
    return build().half()

def mixed():
    model = build()
    model.head.double()
    model.conv1.bfloat16()
    return model

def on_meta():
    import torch
    with torch.device("meta"):
        return build()

def wrapped():
    return nn.Sequential(nn.Identity(), build())

instance = build()
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("loading") / "run"
    train(read_recipe(CFA, TINY), out)
    return out


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with a package of factories, found from there alone."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path])
    for name in ("zoo_to_load", "zoo_to_load.models", "zoo_to_load.broken"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    (tmp_path / "zoo_to_load").mkdir()
    (tmp_path / "zoo_to_load" / "__init__.py").touch()
    (tmp_path / "zoo_to_load" / "models.py").write_text(FACTORIES)
    (tmp_path / "zoo_to_load" / "broken.py").write_text("import a_package_that_is_not_there\n")
    (tmp_path / "zoo_to_load" / "syntax.py").write_text("def :\n")
    return tmp_path


def test_a_run_is_its_selected_weights(run: Path) -> None:
    target = load_target(str(run))
    assert target.folder is not None
    assert target.folder.path == run
    assert target.checkpoint == "best"
    assert target.label == f"{run} (best: {target.meta['candidate']}, epoch {target.meta['epoch']})"
    assert target.meta["data"]["name"] == "digits"
    assert target.meta["class_names"] == list("0123456789")
    assert not target.model.training
    assert load_target(f"{run}/").checkpoint == "best"


@pytest.mark.parametrize("name", ["best", "last", "ema"])
def test_a_checkpoint_of_a_run_by_name(run: Path, name: str) -> None:
    target = load_target(str(run), checkpoint=name)
    expected = load_target(
        str(run / "checkpoints" / name / "weights.safetensors"), arch="small-cnn", width=4, in_channels=1
    )
    assert target.checkpoint == name
    state = expected.model.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in target.model.state_dict().items())
    assert (expected.folder, expected.checkpoint, expected.meta) == (None, None, {})
    assert expected.notes == ("weights from the top level",)


def test_an_unknown_checkpoint_shows_the_nearest(run: Path) -> None:
    with pytest.raises(UnknownNameError, match="did you mean last"):
        load_target(str(run), checkpoint="lats")


@pytest.mark.parametrize("suffix", [".safetensors", ".pt", ".pth"])
def test_a_weight_file_takes_sizes_from_the_data(place: Path, suffix: str) -> None:
    model = create_model("small-cnn", in_channels=1, width=2, num_classes=3)
    path = place / f"weights{suffix}"
    save_file(model.state_dict(), path) if suffix == ".safetensors" else torch.save(model.state_dict(), path)
    target = load_target(str(path), arch="Small_CNN", width=2, num_classes=3, in_channels=1)
    assert torch.equal(target.model.head.weight, model.head.weight)
    assert (target.label, target.model.training) == (str(path), False)


def test_the_branch_of_a_nested_file_is_noted(place: Path) -> None:
    weights = create_model("small-cnn", in_channels=1, width=2, num_classes=3).state_dict()
    nested = {"net": {f"module.{name}": value for name, value in weights.items()}, "epoch": 3}
    torch.save(nested, place / "nested.pt")
    target = load_target("nested.pt", arch="small-cnn", width=2, num_classes=3, in_channels=1)
    assert target.notes == ("weights from 'net'; prefix 'module.' removed",)


def test_a_factory_is_found_from_the_working_folder(place: Path) -> None:
    target = load_target("zoo_to_load.models:build")
    assert (target.label, target.model.training, target.meta, target.notes) == (
        "zoo_to_load.models:build",
        False,
        {},
        (),
    )
    weights = create_model("small-cnn", in_channels=1, width=2, num_classes=3).state_dict()
    save_file(weights, place / "w.safetensors")
    filled = load_target("zoo_to_load.models:build", weights="w.safetensors")
    assert torch.equal(filled.model.head.weight, weights["head.weight"])
    assert filled.notes == ("weights from the top level",)


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("zoo_to_load.models:absent", "cannot import it .*package.module:factory"),
        ("zoo_to_load.absent:build", "cannot import it"),
        ("zoo_to_load.broken:build", "cannot import it .*a_package_that_is_not_there"),
        ("zoo_to_load.syntax:build", "zoo_to_load.syntax"),
        (":build", "cannot import it"),
        ("zoo_to_load.models:", "cannot import it"),
        ("zoo_to_load.models:number", "TypeError"),
        ("zoo_to_load.models:fails", "the factory failed with ValueError: first line"),
        ("zoo_to_load.models:returns_class", "must return a torch.nn.Module, got type"),
        (
            "zoo_to_load.models:needs",
            r"called without arguments \(TypeError: .*argument.*num_classes.*Give all of them def",
        ),
        ("zoo_to_load.models:on_meta", "its tensors are on the meta device"),
        ("zoo_to_load/models.py", "models.py: cut, corrupt or not a weight file"),
        ("absent", "absent: no such file or folder"),
        ("absent.pt", "absent.pt: no such file or folder"),
    ],
)
def test_what_is_no_model_is_said(place: Path, what: str, message: str) -> None:
    with pytest.raises(RobustFairError, match=message):
        load_target(what)


def test_an_instance_is_a_model_too(place: Path) -> None:
    assert load_target("zoo_to_load.models:instance").model.head.out_features == 3


@pytest.mark.parametrize(("name", "types"), [("half", "float16"), ("mixed", "bfloat16 and float64")])
def test_models_of_other_types_are_brought_to_float32(place: Path, name: str, types: str) -> None:
    target = load_target(f"zoo_to_load.models:{name}")
    assert {tensor.dtype for tensor in target.model.state_dict().values()} == {torch.float32}
    assert target.notes == (f"its {types} weights are computed in float32, as attacks need",)
    assert target.model(torch.rand(2, 1, 8, 8)).isfinite().all()


def test_a_factory_model_can_be_put_behind_a_normalisation(place: Path) -> None:
    plain = load_target("zoo_to_load.models:instance", normalise="none").model
    target = load_target("zoo_to_load.models:instance", normalise="half", in_channels=1)
    x = torch.rand(2, 1, 8, 8)
    torch.testing.assert_close(target.model(x), plain((x - 0.5) / 0.5))
    assert target.notes == ("`normalise=half` puts it behind an input normalisation of mean 0.5 and std 0.5",)
    with pytest.raises(ConfigError, match="normalise must be auto, none, half"):
        load_target("zoo_to_load.models:build", normalise="hlaf")


def test_weights_of_the_bare_network_fill_a_factorys_wrapper(place: Path) -> None:
    weights = create_model("small-cnn", in_channels=1, width=2, num_classes=3).state_dict()
    save_file(weights, place / "w.safetensors")
    target = load_target("zoo_to_load.models:wrapped", weights="w.safetensors")
    assert torch.equal(target.model[1].head.weight, weights["head.weight"])
    assert target.notes == ("weights from the top level; prefix '1.' added",)
    assert target.label == "zoo_to_load.models:wrapped (w.safetensors)"


def test_statistics_that_a_file_lacks_are_said(place: Path) -> None:
    weights = create_model("small-cnn", width=2).state_dict()
    torch.save({key: value for key, value in weights.items() if not key.startswith("normalise")}, place / "w.pt")
    _, note = load_target("w.pt", arch="small-cnn", width=2, normalise="half").notes
    assert note == (
        "the file has no input statistics: an input normalisation of mean 0.5, 0.5, 0.5 and std 0.5, 0.5, 0.5 "
        "(`normalise` sets another)"
    )


@pytest.mark.parametrize(
    ("what", "flags", "message"),
    [
        ("w.safetensors", {"arch": "small-cnn", "weights": "w.pt"}, "is itself a weight file: leave `weights` out"),
        ("zoo_to_load.models:build", {"arch": "small-cnn"}, "`arch` and `width` are for a bare weight file"),
        ("zoo_to_load.models:build", {"width": 2}, "`arch` and `width` are for a bare weight file"),
        ("timm:resnet50", {"arch": "resnet18"}, "`arch` and `width` are for a bare weight file"),
        ("zoo_to_load.models:build", {"select_weights": "ema"}, "`select_weights` chooses in a weight file"),
        ("zoo_to_load", {"select_weights": "ema"}, "which knows its own network: leave .*`select_weights`"),
        ("timm:resnet50.pt", {}, "add `weights`"),
    ],
)
def test_flags_that_do_nothing_are_refused(place: Path, what: str, flags: dict[str, object], message: str) -> None:
    save_file({"w": torch.zeros(1)}, place / "w.safetensors")
    with pytest.raises(ModelError, match=message):
        load_target(what, **flags)


def test_an_error_of_ours_inside_a_factory_keeps_its_words(place: Path) -> None:
    with pytest.raises(RobustFairError, match=r"^images first$"):
        load_target("zoo_to_load.models:refuses")


def test_a_weight_file_needs_its_architecture(place: Path) -> None:
    save_file({"w": torch.zeros(1)}, place / "w.safetensors")
    with pytest.raises(ModelError, match="holds weights only: add `arch`"):
        load_target("w.safetensors")
    with pytest.raises(UnknownNameError, match="did you mean small-cnn"):
        load_target("w.safetensors", arch="smal-cnn")
    with pytest.raises(ConfigError, match="width"):
        load_target("w.safetensors", arch="small-cnn", width=0)


def test_a_cut_weight_file_is_named(place: Path) -> None:
    save_file(create_model("small-cnn", in_channels=1, width=2).state_dict(), place / "w.safetensors")
    cut_in_half(place / "w.safetensors")
    with pytest.raises(CheckpointError, match=r"w\.safetensors: cut, corrupt or not a weight file"):
        load_target("w.safetensors", arch="small-cnn", width=2, in_channels=1)


@pytest.mark.parametrize("what", ["w.pt", "zoo_to_load.models:build", "absent"])
def test_only_a_run_has_checkpoints(place: Path, what: str) -> None:
    with pytest.raises(ModelError, match=r"`checkpoint` picks a checkpoint of a run folder, and .* is none"):
        load_target(what, checkpoint="best")


def test_a_folder_that_is_no_run_is_said(place: Path) -> None:
    with pytest.raises(CheckpointError, match="zoo_to_load holds no run"):
        load_target("zoo_to_load")


@pytest.mark.parametrize("name", ["model_best.pth.tar", "epoch76", "weights.pkl", "net.safetensors", "a:b"])
def test_a_weight_file_may_bear_any_name(place: Path, name: str) -> None:
    model = create_model("small-cnn", in_channels=1, width=2, num_classes=3)
    torch.save({"state_dict": model.state_dict()}, place / name)
    target = load_target(name, arch="small-cnn", width=2, num_classes=3, in_channels=1)
    assert torch.equal(target.model.head.weight, model.head.weight)
    filled = load_target("zoo_to_load.models:build", weights=name)
    assert torch.equal(filled.model.head.weight, model.head.weight)


def test_a_chosen_set_of_weights_is_in_the_label(place: Path) -> None:
    first, second = (create_model("small-cnn", in_channels=1, width=2, num_classes=3).state_dict() for _ in range(2))
    torch.save({"best": first, "last": second}, place / "two")
    sizes = {"width": 2, "num_classes": 3, "in_channels": 1}
    with pytest.raises(ModelError, match=r"several sets of weights, best, last"):
        load_target("two", arch="small-cnn", **sizes)
    for name, state in (("best", first), ("last", second)):
        target = load_target("two", arch="small-cnn", select_weights=name, **sizes)
        assert torch.equal(target.model.head.weight, state["head.weight"])
        assert target.label == f"two ({name})"
        filled = load_target("zoo_to_load.models:build", weights="two", select_weights=name)
        assert torch.equal(filled.model.head.weight, state["head.weight"])
        assert filled.label == f"zoo_to_load.models:build (two, {name})"
