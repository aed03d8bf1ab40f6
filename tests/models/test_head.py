from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from robustfair.errors import ModelError
from robustfair.models import Normalised, check_outputs, create_model, find_head, head_norms, unwrap
from robustfair.models.head import require_finite


class TokenClassifier(nn.Module):
    """Patches to tokens, a transformer encoder, the head on every token, the first token's logits."""

    def __init__(self) -> None:
        super().__init__()
        self.classify = nn.Linear(16, 5)
        self.patches = nn.Conv2d(3, 16, 8, 8)
        layer = nn.TransformerEncoderLayer(16, 2, dim_feedforward=32, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 1)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.patches(x).flatten(2).transpose(1, 2)
        return self.classify(self.encoder(tokens))[:, 0]


class Auxiliary(nn.Module):
    """Runs a second head of the same width after the one whose logits it returns."""

    def __init__(self) -> None:
        super().__init__()
        self.main, self.auxiliary = nn.Linear(6, 4), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        logits = self.main(x)
        self.auxiliary(x)
        return logits


class Average(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 4), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return (self.first(x) + self.second(x)) / 2


class Then(nn.Module):
    """A linear map and something behind it."""

    def __init__(self, after: object) -> None:
        super().__init__()
        self.linear, self.after = nn.Linear(6, 4), after

    def forward(self, x: Tensor) -> object:
        return self.after(self.linear(x))


class Holder(nn.Module):
    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        return self.module(x)


@pytest.mark.parametrize("name", ["small-cnn", "resnet9", "preact-resnet18", "wrn-10-1"])
def test_our_heads(name):
    model = create_model(name, in_channels=1, width=4)
    assert find_head(model) is model.head


@pytest.mark.parametrize(
    "wrap",
    [
        nn.DataParallel,
        torch.compile,
        Holder,
        lambda model: nn.Sequential(nn.Identity(), model),
        lambda model: nn.DataParallel(nn.Sequential(Holder(model))),
        torch.optim.swa_utils.AveragedModel,
    ],
)
def test_heads_in_wrappers(wrap):
    model = create_model("small-cnn", width=4)
    wrapped = wrap(model)
    head = find_head(wrapped)
    assert torch.equal(head.weight, model.head.weight)
    assert any(module is head for module in wrapped.modules())


def test_foreign_heads():
    mlp = nn.Sequential(nn.Flatten(), nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 3))
    assert find_head(mlp) is mlp[3]
    transformer = TokenClassifier()
    assert find_head(transformer) is transformer.classify
    convolutional = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 6, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    )
    assert find_head(convolutional) is convolutional[2]
    auxiliary = Auxiliary()
    assert find_head(auxiliary) is auxiliary.main


def test_frozen_half_precision_and_sequence_first_models():
    model = create_model("small-cnn", width=4).requires_grad_(False).to(torch.bfloat16)
    assert find_head(model) is model.head
    sequence_first = Then(lambda logits: logits[0])
    assert find_head(sequence_first, torch.rand(3, 3, 6)) is sequence_first.linear


@pytest.mark.parametrize(
    "after",
    [
        lambda z: z.log_softmax(1),
        lambda z: 10 * z,
        torch.relu,
        lambda z: z + 1,
        lambda z: z.flip(1),
        lambda z: z.clamp(max=0),
    ],
)
def test_anything_behind_the_last_linear_map_is_refused(after):
    with pytest.raises(ModelError, match="something acts on the logits after it"):
        find_head(Then(after))


def test_an_average_of_heads_is_refused():
    with pytest.raises(ModelError, match="something acts on the logits after it"):
        find_head(Average())


def test_no_linear_layer():
    with pytest.raises(ModelError, match="has no linear layer"):
        find_head(nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()))


def test_a_computed_weight_is_refused():
    model = nn.Sequential(nn.Linear(6, 4), nn.ReLU(), parametrizations.weight_norm(nn.Linear(4, 3)))
    with pytest.raises(ModelError, match="computes its weight from other tensors"):
        find_head(model)


def test_an_input_that_cannot_be_guessed_must_be_given():
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(2 * 9 * 7, 3))
    with pytest.raises(ModelError, match=r"pass an example"):
        find_head(model)
    assert find_head(model, torch.rand(2, 1, 11, 9)) is model[2]
    with pytest.raises(ModelError, match="does not accept input of shape"):
        find_head(model, torch.rand(2, 1, 8, 8))


@pytest.mark.parametrize("after", [lambda z: (z, z), lambda z: z[:, :, None], lambda z: z.sum()])
def test_an_output_that_is_no_logits_is_refused(after):
    with pytest.raises(ModelError, match=r"must return logits \(B, C\)"):
        find_head(Then(after), torch.rand(2, 6))


def test_the_search_leaves_no_trace():
    model = create_model("resnet9", width=4)
    model.train()
    model.features[0].eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    random_state = torch.get_rng_state()
    find_head(model)
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random_state)
    assert not any(module._forward_hooks for module in model.modules())


def test_head_norms_are_row_norms_of_the_weight():
    model = nn.Sequential(nn.Linear(2, 3))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[3.0, 4.0], [0.0, 0.0], [-1.0, 0.0]]))
    norms = head_norms(model)
    assert norms.tolist() == [5.0, 0.0, 1.0]
    assert not norms.requires_grad


def test_unwrap_is_deep():
    model = nn.Linear(2, 2)
    assert unwrap(nn.DataParallel(torch.compile(model))) is model
    assert unwrap(model) is model


def test_check_outputs():
    model = create_model("small-cnn", num_classes=100, in_channels=1, width=4).train()
    example = torch.rand(2, 1, 8, 8)
    check_outputs(model, 100, example)
    assert model.training
    with pytest.raises(ModelError, match="model has 100 outputs, data has 10 classes"):
        check_outputs(model, 10, example)
    grey = r"does not accept input of shape \(2, 3, 8, 8\): it takes images of 1 channels and these have 3\. Build"
    with pytest.raises(ModelError, match=grey):
        check_outputs(model, 100, torch.rand(2, 3, 8, 8))
    with torch.no_grad():
        model.head.bias[3] = float("nan")
    with pytest.raises(ModelError, match="not finite"):
        check_outputs(model, 100, example)
    with pytest.raises(ModelError, match=r"must return logits \(B, C\), got \(2, 1, 8, 8\)"):
        check_outputs(nn.Identity(), 10, example)


def test_a_model_that_needs_more_channels_than_the_images_have():
    colour = create_model("small-cnn", width=4)
    wrapped = Normalised(nn.Sequential(nn.Conv2d(3, 4, 8), nn.Flatten()), 1, None, None)
    for model, name in ((colour, "SmallCNN"), (wrapped, "Sequential")):
        with pytest.raises(ModelError, match=rf"{name} does not .*: it takes images of 3 channels and these have 1\. "):
            check_outputs(model, 10, torch.rand(2, 1, 8, 8))


def test_a_model_that_spreads_grey_itself_is_left_in_peace():
    class Spread(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = create_model("small-cnn", width=4)

        def forward(self, x: Tensor) -> Tensor:
            return self.network(x.expand(-1, 3, -1, -1))

    check_outputs(Spread(), 10, torch.rand(2, 1, 8, 8))


def test_logits_that_are_not_finite_are_counted_and_the_first_is_named():
    logits = torch.zeros(4, 3)
    require_finite(nn.Identity(), logits)
    logits[2, 1], logits[3, 0] = float("inf"), float("nan")
    with pytest.raises(ModelError, match="not finite for 2 of 4 images, the first is image 2: its weights"):
        require_finite(nn.Identity(), logits)
    with pytest.raises(ModelError, match="the first is image 70:"):
        require_finite(nn.Identity(), logits, torch.tensor([50, 60, 70, 80]))
