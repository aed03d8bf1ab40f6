"""Is the cause found, named, and never imagined? On a network that was trained, behind preparations that are wrong."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from robustfair.data import ImageDataset, load_dataset
from robustfair.errors import DataError, ModelError
from robustfair.evaluate import (
    diagnose_mode,
    diagnose_model,
    diagnose_normalisation,
    diagnose_outputs,
    diagnose_pixels,
    diagnose_randomness,
)
from robustfair.models import Normalised, create_model

Before = Callable[[Tensor], Tensor]


class Behind(nn.Module):
    """A network behind any function of the images."""

    def __init__(self, network: nn.Module, before: Before, after: Before = lambda logits: logits) -> None:
        super().__init__()
        self.network, self.before, self.after = network, before, after

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.network(self.before(x)))


def train(data: ImageDataset, prepare: Before, lr: float = 0.2) -> nn.Module:
    """A small network without a normalisation of its own, right on nearly all of `prepare(x)`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        channels = data.images.shape[1]
        network = create_model("small-cnn", in_channels=channels, width=8, normalise="none")
        optimizer = torch.optim.SGD(network.parameters(), lr=lr, momentum=0.9)
        x, y = prepare(data.images.float() / 255), data.labels
        for _ in range(60):
            for rows in torch.randperm(len(y)).split(64):
                optimizer.zero_grad()
                F.cross_entropy(network(x[rows]), y[rows]).backward()
                optimizer.step()
    assert (network(x).argmax(1) == y).float().mean() > 0.97, "the network of this test has not learnt"
    return network.eval()


def undo(mean: float, std: float) -> Before:
    return lambda x: x * std + mean


def imagenet_undone(x: Tensor) -> Tensor:
    mean, std = (torch.tensor(part).view(-1, 1, 1) for part in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    return x * std + mean


def standardised(x: Tensor) -> Tensor:
    """Image by image."""
    return torch.stack([(image - image.mean()) / image.std(correction=0) for image in x])


@pytest.fixture(scope="module")
def images() -> ImageDataset:
    """Digits on a light ground in three channels of different strength."""
    data = load_dataset("digits").test
    return replace(data, images=torch.cat([data.images // k + 40 for k in (2, 3, 4)], 1))


@pytest.fixture(scope="module")
def network(images: ImageDataset) -> nn.Module:
    """Right on pixels in [0, 1]."""
    return train(images, lambda x: x)


CASES = {
    "half": (lambda net: Behind(net, undo(0.5, 0.5)), "the statistics 'half'", "Pass --normalise half"),
    "imagenet": (
        lambda net: Behind(net, imagenet_undone),
        "the statistics 'imagenet'",
        "take the one that its authors name",
    ),
    "255": (lambda net: Behind(net, lambda x: x / 255), "pixels run from 0 to 255", "Multiply its input by 255"),
    "own": (
        lambda net: Normalised(net, 3, (0.5,) * 3, (0.2,) * 3),
        "the model's own normalisation is undone in front of it",
        "Pass --normalise none",
    ),
    "inside": (
        lambda net: Behind(net, lambda x: (x - 0.5) / 0.5),
        "a normalisation by the statistics 'half' is undone in front of it",
        "leave one normalisation out",
    ),
    "twice": (
        lambda net: Normalised(
            Normalised(Behind(net, undo(0.5, 0.5)), 3, (0.5,) * 3, (0.5,) * 3), 3, (0.5,) * 3, (0.3,) * 3
        ),
        "the model's own normalisation is undone in front of it",
        "or normalises twice",
    ),
    "another": (
        lambda net: Normalised(Behind(net, undo(0.5, 0.5)), 3, (0.9,) * 3, (0.5,) * 3),
        "the statistics 'half' in place of the model's own normalisation",
        "Pass --normalise half",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_the_missing_preparation_is_found_and_named(images: ImageDataset, network: nn.Module, case: str) -> None:
    build, named, advised = CASES[case]
    (diagnostic,) = diagnose_normalisation(build(network), images)
    assert (diagnostic.code, diagnostic.severity) == ("wrong-normalisation", "warn")
    assert f"100.0 % when {named}" in diagnostic.text.replace("the images are normalised by ", "")
    assert advised in diagnostic.text + diagnostic.advice


def test_the_numbers_are_those_of_the_model_with_and_without(images: ImageDataset, network: nn.Module) -> None:
    model = Behind(network, undo(0.5, 0.5))
    (diagnostic,) = diagnose_normalisation(model, images)
    count, was = (float(part) for part in re.findall(r"On (\d+) .* from ([\d.]+) %", diagnostic.text)[0])
    x = images.images.float() / 255
    given = (model(x).argmax(1) == images.labels).float().mean()
    assert count == len(images) - len(images) // 4
    assert abs(was / 100 - given) < 0.1
    lower, upper = (float(part) for part in re.findall(r"gain ([\d.]+) to ([\d.]+) points", diagnostic.text)[0])
    assert lower < 100 - was < upper


def test_images_standardised_one_by_one(images: ImageDataset) -> None:
    grey = replace(images, images=images.images[:, :1] // 3 + 100)
    model = train(grey, standardised, lr=0.05)
    (diagnostic,) = diagnose_normalisation(model, grey)
    assert "when each image is normalised by its own mean and std" in diagnostic.text


def test_a_model_that_is_fed_as_it_was_trained_has_no_finding(images: ImageDataset, network: nn.Module) -> None:
    assert diagnose_model(network, images) == []
    assert diagnose_model(Normalised(Behind(network, undo(0.5, 0.5)), 3, (0.5,) * 3, (0.5,) * 3), images) == []


@pytest.mark.parametrize("seed", range(12))
def test_an_untrained_network_is_not_explained(images: ImageDataset, seed: int) -> None:
    torch.manual_seed(seed)
    model = create_model("resnet9", width=4, normalise="none" if seed % 2 else "auto")
    assert diagnose_normalisation(model, images) == []


class Chance(nn.Module):
    """Right on every image with the same probability, drawn anew at every look: all that a change does is chance."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        left, right = x.chunk(2, dim=3)
        label = (right.mean((1, 2, 3)) > left.mean((1, 2, 3))).long()
        wrong = (torch.rand(len(x)) > self.rate).long()
        return F.one_hot((label + wrong) % 2, 2).float()


@pytest.mark.parametrize("rate", [0.5, 0.6, 0.8])
def test_chance_is_not_taken_for_a_cause(rate: float) -> None:
    labels = torch.arange(600) % 2
    pixels = torch.full((600, 1, 2, 2), 90, dtype=torch.uint8)
    pixels[torch.arange(600), 0, :, labels] = 160
    sides = ImageDataset(images=pixels, labels=labels, class_names=("left", "right"))
    torch.manual_seed(0)
    assert not diagnose_normalisation(Chance(1.0), sides)
    assert [found for _ in range(40) for found in diagnose_normalisation(Chance(rate), sides)] == []


def test_a_small_gain_is_left_to_the_reader(images: ImageDataset, network: nn.Module) -> None:
    slightly = Behind(network, undo(0.02, 0.9))
    assert diagnose_normalisation(slightly, images) == []


@pytest.mark.parametrize("count", [1, 2, 3, 12])
def test_a_handful_of_images_is_no_ground_for_a_finding(images: ImageDataset, count: int) -> None:
    torch.manual_seed(0)
    few = images.subset(range(count))
    assert diagnose_normalisation(create_model("small-cnn", width=2), few) == []
    assert diagnose_mode(create_model("small-cnn", width=2), few) == []


def test_probabilities_are_found_and_logits_of_any_kind_are_not(images: ImageDataset, network: nn.Module) -> None:
    (diagnostic,) = diagnose_outputs(Behind(network, lambda x: x, lambda z: z.softmax(1)), images)
    assert (diagnostic.code, diagnostic.severity) == ("probabilities", "warn")
    assert "DLR" in diagnostic.text
    for after in (
        lambda z: z,
        lambda z: z.log_softmax(1),
        lambda z: z.sigmoid(),
        lambda z: z - z.mean(1, keepdim=True),
    ):
        assert diagnose_outputs(Behind(network, lambda x: x, after), images) == []


def test_a_model_in_train_mode_is_noted_and_stays_so(images: ImageDataset, tiny_net: Callable[..., nn.Module]) -> None:
    model = tiny_net(channels=3, classes=10, dropout=0.2).train()
    (diagnostic,) = diagnose_mode(model, images)
    assert (diagnostic.code, diagnostic.severity) == ("train-mode", "note")
    assert "2 batch-norm or dropout layers" in diagnostic.text
    assert model.training
    assert model.norm.training
    assert diagnose_mode(model.eval(), images) == []


def test_batch_statistics_and_dropout_in_eval_mode_are_warned_about(
    images: ImageDataset, tiny_net: Callable[..., nn.Module]
) -> None:
    over_batch = copy.deepcopy(tiny_net(channels=3, classes=10)).eval()
    over_batch.norm = nn.BatchNorm2d(4, track_running_stats=False).eval()
    (diagnostic,) = diagnose_mode(over_batch, images)
    assert (diagnostic.code, diagnostic.severity) == ("train-mode", "warn")
    assert "depend on the other images of its batch" in diagnostic.text
    random = Behind(tiny_net(channels=3, classes=10).eval(), lambda x: F.dropout(x, 0.3, training=True))
    (diagnostic,) = diagnose_mode(random, images)
    assert (diagnostic.code, diagnostic.severity) == ("random-output", "warn")


@pytest.mark.parametrize(
    "change",
    [
        lambda x: F.dropout(x, 0.2, training=True),
        lambda x: x + 0.05 * torch.randn_like(x),
        lambda x: x.roll(int(torch.randint(1, 4, ())), 3),
    ],
    ids=["dropout", "noise", "shift"],
)
def test_random_output_is_a_warning(robust_net: nn.Module, digits: ImageDataset, change: Before) -> None:
    torch.manual_seed(0)
    (diagnostic,) = diagnose_randomness(Behind(robust_net, change), digits.images / 255)
    assert (diagnostic.code, diagnostic.severity) == ("random-output", "warn")
    assert "of 60 predictions change" in diagnostic.text
    assert "average over the randomness" in diagnostic.advice


def test_predictions_that_change_are_counted() -> None:
    class Alternating(nn.Module):
        """The second half of the images changes its class at every pass."""

        def __init__(self) -> None:
            super().__init__()
            self.passes = 0

        def forward(self, x: Tensor) -> Tensor:
            self.passes += 1
            logits = torch.tensor([[0.0, 1.0]]).repeat(len(x), 1)
            if self.passes % 2:
                logits[len(x) // 2 :] = torch.tensor([1.0, 0.0])
            return logits

    (diagnostic,) = diagnose_randomness(Alternating(), torch.rand(10, 1, 4, 4))
    assert "up to 1 apart in 5 passes, where logits spread over 1; 5 of 10 predictions change" in diagnostic.text


def test_a_fixed_function_is_none(
    robust_net: nn.Module, tiny_net: Callable[..., nn.Module], digits: ImageDataset
) -> None:
    assert diagnose_randomness(robust_net, digits.images / 255) == []
    assert diagnose_randomness(Behind(robust_net, lambda x: torch.round(7 * x) / 7), digits.images / 255) == []
    dropout = tiny_net(classes=3, dropout=0.5).train()
    assert diagnose_randomness(dropout, torch.rand(8, 1, 6, 6)) == []
    assert dropout.training, "it keeps its modes"
    assert dropout.dropout.training


def test_rounding_between_passes_is_none() -> None:
    class Jitter(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            logits = torch.stack([x.flatten(1).sum(1), 5 - x.flatten(1).sum(1)], 1)
            return logits + 1e-6 * torch.rand_like(logits)

    assert diagnose_randomness(Jitter(), torch.rand(8, 1, 6, 6)) == []


def test_a_model_of_one_constant_answer_is_none() -> None:
    class Constant(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.zeros(len(x), 3)

    assert diagnose_randomness(Constant(), torch.rand(4, 1, 6, 6)) == []


def test_a_model_that_refuses_other_pixels_is_not_asked_again(images: ImageDataset, network: nn.Module) -> None:
    class Strict(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            if not 0 <= float(x.min()) <= float(x.max()) <= 1:
                raise ValueError("pixels must be in [0, 1]")
            return -network(x)

    assert diagnose_model(Strict(), images) == []


def test_images_that_were_scaled_before_they_became_bytes(images: ImageDataset) -> None:
    assert diagnose_pixels(images) == []
    (diagnostic,) = diagnose_pixels(replace(images, images=(images.images > 100).byte()))
    assert diagnostic.code == "dark-images"
    assert "The brightest pixel is 1 of 255" in diagnostic.text


def test_all_findings_come_with_warnings_first_and_leave_no_trace(images: ImageDataset, network: nn.Module) -> None:
    class Dropped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network, self.dropout = copy.deepcopy(network), nn.Dropout(0.1)

        def forward(self, x: Tensor) -> Tensor:
            return self.network(self.dropout(0.5 * x + 0.5)).softmax(1)

    model = Dropped().train()
    model.network.head.weight.requires_grad_(False)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = diagnose_model(model, images)
    assert [diagnostic.code for diagnostic in found] == ["wrong-normalisation", "probabilities", "train-mode"]
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert model.training
    assert model.network.training
    assert [name for name, parameter in model.named_parameters() if not parameter.requires_grad] == [
        "network.head.weight"
    ]


def test_a_network_that_halves_the_images_where_they_lie_is_fed_right(images: ImageDataset, network: nn.Module) -> None:
    assert diagnose_model(Behind(Behind(network, lambda x: 2 * x), lambda x: x.mul_(0.5)), images) == []


def test_the_sample_does_not_depend_on_the_global_generator(images: ImageDataset, network: nn.Module) -> None:
    model = Behind(network, undo(0.5, 0.5))
    torch.manual_seed(1)
    first = diagnose_normalisation(model, images)
    torch.manual_seed(2)
    state = torch.get_rng_state()
    assert diagnose_normalisation(model, images) == first
    assert torch.equal(torch.get_rng_state(), state)


def test_what_cannot_be_looked_at_is_said(images: ImageDataset) -> None:
    with pytest.raises(ModelError, match="takes images of 1 channels"):
        diagnose_model(create_model("small-cnn", in_channels=1, width=2), images)
    with pytest.raises(DataError, match="no images to look at"):
        diagnose_model(create_model("small-cnn", width=2), images.subset([]))
