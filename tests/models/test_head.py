from __future__ import annotations

import random
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from reference.public_networks import Plain, Reentrant, Viewing, WritingOnImages
from robustfair.errors import ModelError
from robustfair.models import (
    Normalised,
    OnCopies,
    check_outputs,
    create_model,
    find_head,
    head_norms,
    prepared,
    unwrap,
)
from robustfair.models.head import check_gradient, check_training_outputs, require_finite
from robustfair.repairs import repair


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


# Networks that do with their images what they like


def channels_last(*shape: int) -> Tensor:
    return torch.rand(*shape).contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("wrap", [lambda model: model, nn.DataParallel, nn.Sequential])
@pytest.mark.parametrize("channels", [2, 3])
@pytest.mark.parametrize("network", [Viewing, WritingOnImages])
def test_a_network_that_fails_on_images_or_writes_on_them_gets_copies(network, channels, wrap):
    """Images of two channels come in the default layout at first and channels last to the strong attacks."""
    model, x = wrap(network(channels)).eval(), torch.rand(2, channels, 8, 8)
    found, last = prepared(model, x), x.contiguous(memory_format=torch.channels_last)
    before, wanted = x.clone(), Plain(channels).eval()(x)
    assert isinstance(found, OnCopies)
    assert unwrap(found) is unwrap(model)
    assert not any(module.training for module in found.modules())
    for given in (x, last, last[:1]):
        torch.testing.assert_close(found(given), wanted[: len(given)])
    assert torch.equal(x, before)
    z = last.requires_grad_(True)
    gradient = torch.autograd.grad(found(z).sum(), z)[0]
    y = before.requires_grad_(True)
    torch.testing.assert_close(gradient, torch.autograd.grad(Plain(channels).eval()(y).sum(), y)[0])
    assert prepared(found, x) is found


@pytest.mark.parametrize("mode", [True, False])
def test_any_other_network_stays_as_it_is(mode):
    for model in (Plain().train(mode), Reentrant().train(mode), create_model("resnet9", width=4).train(mode)):
        assert prepared(model, torch.rand(2, 3, 8, 8)) is model
        assert all(module.training is mode for module in model.modules())
    assert OnCopies(model).training is mode


def test_a_first_layer_that_acts_in_place_without_changing_a_pixel_counts_as_writing():
    model = nn.Sequential(nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(12, 2))
    assert isinstance(prepared(model, torch.rand(2, 3, 2, 2)), OnCopies)


def test_pixels_written_behind_the_back_of_autograd_count_too():
    class Behind(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            x.data.sub_(0.5)
            return x.flatten(1)

    assert isinstance(prepared(Behind(), torch.rand(2, 3, 2, 2)), OnCopies)


class WritingInTraining(Plain):
    """Adds its noise to the images where they lie, as long as it trains."""

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            x += 0.1 * torch.rand_like(x)
        return super().forward(x)


@pytest.mark.parametrize("mode", [True, False])
def test_where_it_trains_a_network_is_looked_at_in_train_mode_too_and_left_as_it_is(mode):
    model, x, state = WritingInTraining().train(mode), torch.rand(2, 3, 8, 8), torch.get_rng_state()
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert prepared(model, x) is model
    assert isinstance(prepared(model, x, trains=True), OnCopies)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)
    assert all(module.training is mode for module in model.modules())
    for other in (Plain(), Reentrant(), nn.Sequential(nn.Dropout(0.5), Plain())):
        assert prepared(other, x, trains=True) is other


def test_a_network_without_a_copy_is_looked_at_in_eval_mode_alone():
    class Single(Plain):
        def __deepcopy__(self, memo: object) -> Single:
            raise RuntimeError("there is only one")

    model = Single()
    assert prepared(model, torch.rand(2, 3, 8, 8), trains=True) is model


def test_images_can_be_looked_at_in_inference_mode():
    with torch.inference_mode():
        model, x = Plain(), torch.rand(2, 3, 8, 8)
        assert prepared(model, x) is model


def test_a_network_that_fails_on_copies_too_is_refused_with_its_own_reason():
    model, x = Viewing(), channels_last(2, 3, 12, 12)
    with pytest.raises(ModelError, match=r"Viewing does not accept input of shape .*: mat1 and mat2"):
        check_outputs(prepared(model, x), 4, x)


def test_the_head_of_such_a_network_is_read_and_repaired():
    x = channels_last(2, 3, 8, 8)
    before = x.clone()
    for model in (Viewing(), WritingOnImages()):
        assert find_head(model, x) is find_head(OnCopies(model), x) is model.head
        check_outputs(model, 4, x)
        assert torch.equal(x, before)
        assert head_norms(repair(model, example=x)).tolist() == pytest.approx([1] * 4)


def test_a_gradient_that_cannot_be_taken_is_refused_with_the_networks_own_words():
    class Detached(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.detach())

    x = torch.rand(2, 3, 8, 8)
    for model in (Plain(), Viewing(), prepared(WritingOnImages(), x)):
        check_gradient(model, x)
        assert model.training
    check_gradient(Detached(4, 2), torch.rand(2, 4))
    with pytest.raises(ModelError, match=r"through WritingOnImages: a leaf .* in-place operation\. .*x = x - 0\.5"):
        check_gradient(WritingOnImages(), x)
    with pytest.raises(ModelError, match=r"through Reentrant: .*incompatible with \.grad\(\).*use_reentrant=False"):
        check_gradient(Reentrant(), x)


class OtherInTraining(nn.Module):
    """Gives something else than logits in train mode, as networks with auxiliary heads do."""

    def __init__(self, given):
        super().__init__()
        self.body, self.norm, self.drop, self.head = nn.Linear(64, 8), nn.BatchNorm1d(8), nn.Dropout(), nn.Linear(8, 10)
        self.given = given

    def forward(self, x):
        logits = self.head(self.drop(self.norm(self.body(x.flatten(1)).relu())))
        return self.given(logits) if self.training else logits


@dataclass
class Output:
    logits: torch.Tensor


OTHERS = {
    "tuple": (
        lambda logits: (logits, logits),
        r"got a tuple of 2 in train mode\. Wrap it in a module",
    ),
    "list": (lambda logits: [logits], "got a list of 1 in train mode"),
    "dict": (lambda logits: {"out": logits, "aux": logits}, "got a dict of out, aux in train mode"),
    "dataclass": (Output, "got an Output in train mode"),
    "features": (lambda logits: logits[:, :4], "model has 4 outputs in train mode, data has 10 classes"),
    "views": (lambda logits: torch.cat([logits, logits]), r"got \(4, 10\) for 2 inputs in train mode"),
    "error": (
        lambda logits: logits.no_such_thing,
        r"accept input of shape \(2, 1, 8, 8\) in train mode: .*no_s",
    ),
}


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("copied", [True, False])
def test_outputs_in_train_mode_are_checked_and_the_model_is_left_as_it_was(name, copied, monkeypatch):
    given, message = OTHERS[name]
    model = OtherInTraining(given)
    model.norm.eval()
    if not copied:
        monkeypatch.setattr(model, "__deepcopy__", lambda memo: 1 / 0, raising=False)
    x = torch.rand(2, 1, 8, 8)
    for tried in (model, OtherInTraining(nn.Identity())):
        before = {key: value.clone() for key, value in tried.state_dict().items()}
        modes = [module.training for module in tried.modules()]
        streams = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
        if tried is model:
            check_outputs(model, 10, x)
            with pytest.raises(ModelError, match=message):
                check_training_outputs(model, 10, [x], nn.Module.train)
        else:
            check_training_outputs(tried, 10, [x], nn.Module.train)
        assert all(torch.equal(value, before[key]) for key, value in tried.state_dict().items())
        assert modes == [module.training for module in tried.modules()]
        assert torch.equal(streams[0], torch.get_rng_state())
        assert streams[1:] == (random.getstate(), np.random.get_state()[1].tolist())


def test_a_model_that_measures_its_batch_is_tried_with_a_whole_one():
    class Ghost(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.head = nn.BatchNorm1d(64), nn.Linear(64, 10)

        def forward(self, x):
            parts = x.flatten(1).chunk(4) if self.training else [x.flatten(1)]
            return self.head(torch.cat([self.norm(part) for part in parts]))

    one, few, whole = torch.rand(1, 1, 8, 8), torch.rand(4, 1, 8, 8), torch.rand(32, 1, 8, 8)
    check_training_outputs(Ghost(), 10, iter([one, few, whole]), nn.Module.train)
    with pytest.raises(ModelError, match="in train mode: Expected more than 1 value per channel"):
        check_training_outputs(Ghost(), 10, [one, few], nn.Module.train)


def test_other_outputs_are_named_in_eval_mode_too():
    model = nn.Sequential(nn.Flatten(), OtherInTraining(lambda logits: (logits,)))
    model[1].forward = lambda x: (x, x)
    for refuse in (lambda: check_outputs(model, 10, torch.rand(2, 1, 8, 8)), lambda: find_head(model)):
        with pytest.raises(ModelError, match=r"^Sequential must return logits \(B, C\), got a tuple of 2\. Wrap it"):
            refuse()
