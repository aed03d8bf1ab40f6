from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from reference import xcit as reference
from reference.zoo import import_timm
from robustfair.attacks.pgd import pgd
from robustfair.errors import ConfigError, ModelError
from robustfair.models import create_model, describe_model, find_head, load_weights
from robustfair.models.networks.xcit import XCiT, fourier_positions
from robustfair.objectives import PGDAT
from robustfair.values import Batch


def drawn(patch: int, width: int = 16, *, seed: int = 0) -> XCiT:
    """A small one in float64 with weights and statistics that training could leave."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = create_model(f"xcit-s12-p{patch}", num_classes=5, width=width, normalise="none")
        for weight in net.parameters():
            nn.init.normal_(weight, std=0.3)
        for module in net.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.normal_(module.running_mean, std=0.3)
                nn.init.uniform_(module.running_var, 0.5, 1.5)
    assert isinstance(net, XCiT)
    return net.double().eval()


@pytest.mark.parametrize(("patch", "size"), [(2, (8, 6)), (4, (9, 8)), (8, (16, 8)), (16, (16, 32)), (1, (3, 2))])
def test_logits_are_those_of_the_formulas(patch: int, size: tuple[int, int]) -> None:
    net = drawn(patch)
    weights = {name: value.numpy() for name, value in net.state_dict().items()}
    x = torch.rand(2, 3, *size, dtype=torch.float64)
    with torch.no_grad():
        found = net(x)
    for logits, image in zip(found, x, strict=True):
        np.testing.assert_allclose(logits, reference.logits(weights, image.numpy(), patch), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("patch", [2, 4, 16])
def test_parameters_are_the_published_ones_for_any_stride(patch: int) -> None:
    w, k = 384, 1000
    embedding = 9 * (3 * w // 8 + w * w // 32 + w * w // 8 + w * w // 2) + 2 * (w // 8 + w // 4 + w // 2 + w)
    attention = 8 + 3 * w * w + 3 * w + w * w + w
    local = 2 * (9 * w + w) + 2 * w
    mlp = 8 * w * w + 5 * w
    block = attention + local + mlp + 9 * w
    class_block = 4 * (w * w + w) + mlp + 6 * w
    expected = embedding + 65 * w + w + 12 * block + 2 * class_block + 2 * w + k * w + k
    with torch.device("meta"):
        net = create_model(f"xcit-s12-p{patch}", num_classes=k)
    assert sum(p.numel() for p in net.parameters()) == expected == 26_253_304


def test_tokens_at_32_pixels() -> None:
    seen = []
    for patch in (2, 4, 16):
        net = create_model(f"xcit-s12-p{patch}", width=8).eval()
        net.blocks[0].register_forward_hook(lambda module, inputs, output: seen.append(output.shape[1]))
        net(torch.rand(1, 3, 32, 32))
    assert seen == [16 * 16, 8 * 8, 2 * 2]


def test_positions_are_counted_from_one_and_scaled_to_a_turn() -> None:
    found = fourier_positions(3, 4)
    assert found.shape == (1, 64, 3, 4)
    turns = torch.tensor([1, 2, 3]) / 3 * 2 * torch.pi
    torch.testing.assert_close(found[0, 0, :, 1], turns.sin(), atol=1e-5, rtol=0)
    torch.testing.assert_close(found[0, 3, :, 2], (turns / 10_000 ** (2 / 32)).cos(), atol=1e-5, rtol=0)
    assert torch.equal(found[0, :32, :, 0], found[0, :32, :, 3])
    assert torch.equal(found[0, 32:, 0], found[0, 32:, 2])


def test_one_name_without_a_stride_means_two() -> None:
    about = describe_model(create_model("XCiT_S12", width=8))
    assert (about["name"], about["width"], XCiT.default_width) == ("xcit-s12-p2", 8, 384)


@pytest.mark.parametrize(
    ("name", "width", "message"),
    [("xcit-s12-p3", None, "patch must be one of 1, 2, 4, 8, 16, got 3"), ("xcit-s12", 20, "width must be a multiple")],
)
def test_other_sizes_are_refused(name: str, width: int | None, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        create_model(name, width=width)


def test_starting_weights() -> None:
    torch.manual_seed(0)
    net = create_model("xcit-s12", width=64)
    linear = [module for module in net.modules() if isinstance(module, nn.Linear)]
    assert all(module.bias.abs().max() == 0 for module in linear)
    spread = torch.cat([module.weight.flatten() for module in linear]).std().item()
    assert spread == pytest.approx(0.02, rel=0.05)
    assert net.cls_token.std().item() == pytest.approx(0.02, rel=0.5)
    depth_wise = net.blocks[0].local_mp.conv1.weight
    assert depth_wise.abs().max().item() == pytest.approx(1 / 3, rel=0.05)
    assert all(block.gamma1.eq(1).all() for block in net.blocks)


def test_the_head_is_found_and_an_attack_stays_inside_its_ball() -> None:
    torch.manual_seed(0)
    net = create_model("xcit-s12", num_classes=4, width=8).eval()
    x, y = torch.rand(3, 3, 16, 16).contiguous(memory_format=torch.channels_last), torch.tensor([0, 1, 2])
    assert find_head(net, x) is net.head
    batch = Batch(x=x, y=y, index=torch.arange(3), seed=0)
    x_adv = pgd(net, x, y, PGDAT(eps=8 / 255).evaluation_attack(batch), torch.Generator().manual_seed(0))
    assert (x_adv - x).abs().max() <= 8 / 255 + 1e-6
    assert not torch.equal(x_adv, x)


def test_weights_of_another_stride_fit_and_of_another_network_do_not() -> None:
    source = drawn(4)
    net = create_model("xcit-s12-p2", num_classes=5, width=16)
    report = load_weights(net, {"state_dict": {f"module.{name}": value for name, value in source.state_dict().items()}})
    assert (report.prefix, report.unused, report.missing) == ("module.", (), ())
    with pytest.raises(ModelError):
        load_weights(net, create_model("small-cnn", num_classes=5, width=16).state_dict())


def test_files_of_timm_load() -> None:
    timm = import_timm()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        source = timm.create_model("xcit_small_12_p16_224", num_classes=7).eval()
    net = create_model("xcit-s12-p16", num_classes=7, normalise="none").eval()
    report = load_weights(net, source.state_dict())
    assert report.unused == ()
    x = torch.rand(2, 3, 48, 64)
    with torch.no_grad():
        torch.testing.assert_close(net(x), source(x), rtol=1e-4, atol=1e-5)
