"""PGD adversarial training as it is usually written for a paper: what the library is measured against.

float32 in NCHW; every backward pass of the attack runs through all parameters and fills their gradients; the
perturbation is projected by one clamp after another; loss and accuracy are fetched from the device at every batch;
images are padded, cropped and mirrored one by one in a `DataLoader`. The mathematics is that of `robustfair.PGDAT` with
its defaults: cross-entropy, a uniform start clipped to [0, 1], batch norm in eval mode during the attack and in train
mode for the update. Given the same start, the first loss of both is the same.
"""

from __future__ import annotations

from collections.abc import Iterable
from copy import deepcopy

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from benchmarks.workload import LR
from robustfair.data import ImageDataset

EPS, STEP_SIZE, STEPS = 8 / 255, 2 / 255, 10


def naive_attack(model: nn.Module, x: Tensor, y: Tensor, noise: Tensor, steps: int = STEPS) -> Tensor:
    """Attacked images (B, C, H, W) from `x + noise` clipped to [0, 1]; leaves gradients in every parameter."""
    delta = torch.clamp(x + noise, 0, 1) - x
    for _ in range(steps):
        delta.requires_grad_(True)
        loss = F.cross_entropy(model(x + delta), y)
        loss.backward()
        assert delta.grad is not None, "the model's output depends on its input"
        delta = delta.detach() + STEP_SIZE * torch.sign(delta.grad)
        delta = torch.clamp(delta, min=-EPS, max=EPS)
        delta = torch.clamp(x + delta, min=0, max=1) - x
    return (x + delta).detach()


class NaiveTraining:
    """A network in training the usual way.

    Args:
        model: copied; the copy is trained.
    """

    def __init__(self, model: nn.Module, steps: int = STEPS) -> None:
        self.model = deepcopy(model)
        self.steps = steps
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=LR, momentum=0.9, weight_decay=5e-4)

    def attack(self, x: Tensor, y: Tensor, noise: Tensor) -> Tensor:
        """Attacked images; leaves the model in eval mode."""
        self.model.eval()
        return naive_attack(self.model, x, y, noise, self.steps)

    def step(self, x: Tensor, y: Tensor, noise: Tensor) -> tuple[float, float]:
        """Attack and update on one batch; its loss and accuracy on the attacked images."""
        x_adv = self.attack(x, y, noise)
        self.model.train()
        self.optimizer.zero_grad()
        logits = self.model(x_adv)
        loss = F.cross_entropy(logits, y)
        loss.backward()
        self.optimizer.step()
        return loss.item(), (logits.argmax(1) == y).float().mean().item()

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        """Mean cross-entropy of a batch in the mode that the model is in."""
        return F.cross_entropy(self.model(x), y)

    def epoch(self, batches: Iterable[tuple[Tensor, Tensor]], device: torch.device | str) -> tuple[float, float]:
        """One pass over a loader; mean loss and accuracy."""
        loss, correct, seen = 0.0, 0.0, 0
        for images, labels in batches:
            x, y = images.to(device), labels.to(device)
            batch_loss, batch_accuracy = self.step(x, y, torch.empty_like(x).uniform_(-EPS, EPS))
            loss += batch_loss * len(y)
            correct += batch_accuracy * len(y)
            seen += len(y)
        return loss / seen, correct / seen


class PerImage(Dataset[tuple[Tensor, int]]):
    """Images prepared one at a time: scaled, padded by reflection, cropped and mirrored."""

    def __init__(self, data: ImageDataset, padding: int = 4) -> None:
        self.images, self.labels, self.padding = data.images, data.labels.tolist(), padding

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image = self.images[index].float() / 255
        height, width = image.shape[1:]
        padded = F.pad(image, (self.padding,) * 4, mode="reflect")
        top, left = torch.randint(2 * self.padding + 1, (2,)).tolist()
        crop = padded[:, top : top + height, left : left + width]
        if torch.rand(()) < 0.5:
            crop = crop.flip(2)
        return crop, self.labels[index]


def naive_loader(
    data: ImageDataset, batch_size: int, *, workers: int, pin_memory: bool = False
) -> DataLoader[tuple[Tensor, int]]:
    """Shuffled batches of single images, prepared by `workers` processes (0: by this one)."""
    return DataLoader(PerImage(data), batch_size, shuffle=True, num_workers=workers, pin_memory=pin_memory)
