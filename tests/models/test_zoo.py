"""Networks of other packages: timm for real where it is installed, and stand-ins for what users are told elsewhere."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from reference.zoo import import_timm
from robustfair.errors import ConfigError, ModelError, RobustFairError
from robustfair.models import check_outputs, find_head, load_weights
from robustfair.models.zoo import robustbench_model, timm_model
from robustfair.runs.load import load_target

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def stand_in(monkeypatch: pytest.MonkeyPatch, name: str, **attributes: object) -> None:
    module = ModuleType(name)
    vars(module).update(attributes)
    monkeypatch.setitem(sys.modules, name, module)


class StandIn(nn.Module):
    """A network with what timm says of it."""

    def __init__(self, num_classes: int = 1000, in_chans: int = 3) -> None:
        super().__init__()
        self.pretrained_cfg = {"mean": (0.1, 0.2, 0.3), "std": (0.4, 0.5, 0.6), "input_size": (3, 16, 16)}
        self.conv = nn.Conv2d(in_chans, 4, 3)
        self.fc = nn.Linear(4, num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        assert x.shape[2] >= 8, "too small"
        return self.fc(self.conv(x).mean((2, 3)))


@pytest.fixture
def timm_stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    def create(name: str, *, pretrained: bool, **sizes: int) -> nn.Module:
        assert not pretrained
        if name == "fragile":
            raise TypeError("no such size\nand more")
        return StandIn(**sizes)

    names = ["net18", "net50", "fragile"]
    stand_in(monkeypatch, "timm", create_model=create, list_models=lambda: names, is_model=lambda name: name in names)


@pytest.mark.usefixtures("timm_stand_in")
def test_it_is_built_for_the_data_behind_its_published_statistics() -> None:
    model, notes = timm_model("net18", num_classes=7, in_channels=3, image_size=(16, 16))
    assert model.normalise.statistics() == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    assert (notes, model.training) == ((), False)
    check_outputs(model, 7, torch.rand(2, 3, 16, 16))
    assert find_head(model, torch.rand(2, 3, 16, 16)) is model.network.fc
    assert timm_model("net18").model.network.fc.out_features == 1000


@pytest.mark.usefixtures("timm_stand_in")
def test_statistics_of_the_users_choice_and_of_other_channels() -> None:
    assert timm_model("net18", normalise="imagenet").model.normalise.statistics() == IMAGENET
    assert timm_model("net18", normalise="none").model.normalise.statistics() == ((0.0,) * 3, (1.0,) * 3)
    grey = timm_model("net18", in_channels=1).model
    torch.testing.assert_close(grey.normalise.mean, torch.tensor([0.2]))
    torch.testing.assert_close(grey.normalise.std, torch.tensor([0.5]))
    with pytest.raises(ConfigError, match="normalise must be"):
        timm_model("net18", normalise="imagenets")


@pytest.mark.usefixtures("timm_stand_in")
def test_another_image_size_is_a_note_and_one_that_it_refuses_an_error() -> None:
    (note,) = timm_model("net18", image_size=(12, 8)).notes
    assert "is made for images of 16x16, these are 12x8 and used as they are; `image_size=16` resizes them" in note
    with pytest.raises(ModelError, match=r"timm:net18 takes images of 16x16, these are 4x4 pixels: `image_size=16`"):
        timm_model("net18", image_size=(4, 4))


@pytest.mark.usefixtures("timm_stand_in")
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("net81", r"timm has no model 'net81': did you mean net18"),
        ("hf-hub:timm/resnet50", r"timm has no model .*: timm.list_models\(\) has them all"),
        ("fragile", r"timm:fragile cannot be built with num_classes=10, in_chans=3 \(no such size\)$"),
    ],
)
def test_a_network_that_timm_cannot_build_is_said_in_one_line(name: str, message: str) -> None:
    with pytest.raises(ModelError, match=message) as caught:
        timm_model(name, num_classes=10)
    assert "\n" not in str(caught.value)


@pytest.mark.usefixtures("timm_stand_in")
def test_the_target_needs_its_weights_and_reads_them(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"^timm:net18: nothing is downloaded here, add `weights` with its"):
        load_target("timm:net18", num_classes=5)
    torch.manual_seed(0)
    source = StandIn(5)
    save_file(source.state_dict(), tmp_path / "w.safetensors")
    weights = str(tmp_path / "w.safetensors")
    target = load_target("timm:net18", weights=weights, num_classes=5, image_size=(12, 12))
    assert torch.equal(target.model.network.fc.weight, source.fc.weight)
    assert (target.label, target.model.training) == (f"timm:net18 ({weights})", False)
    size, report, statistics = target.notes
    assert "made for images of 16x16" in size
    assert "prefix 'network.' added" in report
    assert "mean 0.1, 0.2, 0.3 and std 0.4, 0.5, 0.6 (`normalise` sets another)" in statistics
    same = load_target(weights, arch="timm:net18", num_classes=5)
    assert torch.equal(same.model.network.fc.weight, source.fc.weight)
    with pytest.raises(ModelError, match="weights have 5 outputs, the model has 10"):
        load_target("timm:net18", weights=weights, num_classes=10)
    with pytest.raises(ModelError, match="`width` is for architectures of ours"):
        load_target(weights, arch="timm:net18", width=4)


@pytest.mark.parametrize("name", ["timm", "robustbench"])
def test_without_the_package_one_line_says_which(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str) -> None:
    for module in (name, f"{name}.utils"):
        monkeypatch.delitem(sys.modules, module, raising=False)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if not (Path(path) / name).is_dir()])
    (tmp_path / "w.safetensors").touch()
    save_file({"w": torch.zeros(1)}, tmp_path / "w.safetensors")
    weights = str(tmp_path / "w.safetensors") if name == "timm" else None
    install = 'pip install "robustfair[zoo]"' if name == "timm" else "pip install robustbench"
    with pytest.raises(RobustFairError) as caught:
        load_target(f"{name}:Net18", weights=weights)
    assert f"there is no module {name}" in str(caught.value)
    assert str(caught.value).endswith(install)
    assert "\n" not in str(caught.value)


def test_a_timm_that_does_not_import_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "timm.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')")
    monkeypatch.delitem(sys.modules, "timm", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModelError, match=r"cannot be imported \(operator torchvision::nms does not exist\)"):
        timm_model("resnet50")


def test_robustbench_names_its_data_by_the_classes_and_reads_tensors_only(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def load_model(name: str, *, dataset: str, threat_model: str) -> nn.Module:
        calls.append((name, dataset, threat_model, os.environ.get("TORCH_FORCE_WEIGHTS_ONLY_LOAD")))
        return nn.Linear(2, 2)

    stand_in(monkeypatch, "robustbench")
    stand_in(monkeypatch, "robustbench.utils", load_model=load_model)
    monkeypatch.delenv("TORCH_FORCE_WEIGHTS_ONLY_LOAD", raising=False)
    load_target("robustbench:Carmon2019Unlabeled", num_classes=10)
    robustbench_model("Net", num_classes=100)
    robustbench_model("imagenet/l2/Net")
    assert calls == [
        ("Carmon2019Unlabeled", "cifar10", "Linf", "1"),
        ("Net", "cifar100", "Linf", "1"),
        ("Net", "imagenet", "L2", "1"),
    ]
    assert "TORCH_FORCE_WEIGHTS_ONLY_LOAD" not in os.environ
    for name in ("", "cifar10/Net", "cifar10/L7/Net", "a/b/c/d"):
        with pytest.raises(ModelError, match="the form is robustbench:NAME or robustbench:cifar10/Linf/NAME"):
            robustbench_model(name)
    with pytest.raises(ModelError, match="comes with its own weights"):
        load_target("robustbench:Net", weights="w.pt")


def test_a_loader_that_fails_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_model(name: str, **rest: str) -> nn.Module:
        raise KeyError("no such model")

    stand_in(monkeypatch, "robustbench")
    stand_in(monkeypatch, "robustbench.utils", load_model=load_model)
    with pytest.raises(ModelError, match=r"robustbench:Net: its loader failed \('no such model'\)"):
        robustbench_model("Net")


@pytest.mark.parametrize(
    ("name", "size", "channels"),
    [("resnet50", 32, 3), ("resnext50_32x4d", 32, 1), ("xcit_small_12_p16_224", 48, 3), ("resnet50.a1_in1k", 32, 3)],
)
def test_networks_of_timm_itself(name: str, size: int, channels: int, tmp_path: Path) -> None:
    timm = import_timm()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        source = timm.create_model(name, pretrained=False, num_classes=7, in_chans=channels).eval()
    save_file(source.state_dict(), tmp_path / "w.safetensors")
    target = load_target(
        f"timm:{name}",
        weights=str(tmp_path / "w.safetensors"),
        num_classes=7,
        in_channels=channels,
        image_size=(size, size),
    )
    x = torch.rand(2, channels, size, size)
    mean, std = (torch.tensor(part) if channels == 3 else torch.tensor(part).mean().view(1) for part in IMAGENET)
    with torch.no_grad():
        expected = source((x - mean.view(-1, 1, 1)) / std.view(-1, 1, 1))
        torch.testing.assert_close(target.model(x), expected, rtol=1e-5, atol=1e-6)
    assert f"is made for images of 224x224, these are {size}x{size}" in target.notes[0]
    check_outputs(target.model, 7, x)
    assert find_head(target.model, x) is target.model.network.get_classifier()


def test_imagenet_checkpoints_in_robustbench_form_load_into_timms_resnet() -> None:
    timm = import_timm()
    source = timm.create_model("resnet50", num_classes=10)
    state = {f"module.model.{name}": value for name, value in source.state_dict().items()}
    state |= {
        "module.normalizer.new_mean": torch.full((3, 1, 1), 0.5),
        "module.normalizer.new_std": torch.ones(3, 1, 1),
    }
    model = timm_model("resnet50", num_classes=10).model
    report = load_weights(model, {"state_dict": state})
    assert torch.equal(model.network.fc.weight, source.fc.weight)
    assert model.normalise.statistics() == ((0.5,) * 3, (1.0,) * 3)
    assert (report.unused, report.missing) == ((), ())


def test_timm_networks_of_one_size_refuse_others_in_one_line() -> None:
    import_timm()
    with pytest.raises(ModelError, match=r"takes images of 224x224, these are 32x32 pixels: `image_size=224`"):
        timm_model("vit_tiny_patch16_224", image_size=(32, 32))
    with pytest.raises(ModelError, match=r"timm has no model 'resnet500': did you mean resnet50"):
        timm_model("resnet500")
    with pytest.raises(ModelError, match=r"Invalid pretrained tag \(nonsense\)"):
        timm_model("resnet50.nonsense")
