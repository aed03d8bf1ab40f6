"""Is this model fed as it was trained? A few hundred clean images tell, before hours of attacks on a wrong set-up."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

from robustfair.data import ImageDataset, evaluation_batches
from robustfair.errors import DataError, as_flags
from robustfair.evaluate.diagnostics.base import Diagnostic
from robustfair.models.head import check_outputs, in_float32, prepared
from robustfair.models.modes import attacking
from robustfair.models.pixels import BATCH, expected_preparation, sample_of
from robustfair.values import BATCH_NORM

PASSES = 5
"""Of the same images, to see whether the output is random."""
SAME = 1e-4
"""Share of the spread of the logits by which repeated passes of a fixed model may differ."""
SAME_LOGITS = 0.02
"""Largest change of a logit with the batch it is in, in standard deviations of the logits, that is rounding."""
DARKEST = 32
"""A data set without a pixel as bright as this, of 255, was scaled before its pixels became whole numbers."""


def diagnose_model(
    model: nn.Module, dataset: ImageDataset, device: torch.device | str = "cpu", *, batch_size: int = BATCH
) -> list[Diagnostic]:
    """All diagnostics of this module, warnings first. The model is moved to `device` and keeps its modes.

    Args:
        model: (B, C, H, W) in [0, 1] -> logits (B, K).
        dataset: the images of the audit.
        device: where to run.
        batch_size: images at a time; `BATCH` at most.

    Raises:
        ModelError: outputs that do not fit the classes.
        DataError: no images.
    """
    if len(dataset) == 0:
        raise DataError(f"{dataset.name}: no images to look at")
    first = dataset.subset(range(min(2, len(dataset)))).to(device)
    example = next(evaluation_batches(first, 2)).x
    model = prepared(in_float32(model.to(device), example), example)
    check_outputs(model, dataset.num_classes, example)
    size = min(batch_size, BATCH)
    found = [
        *diagnose_pixels(sample_of(dataset, device)),
        *diagnose_normalisation(model, dataset, device, batch_size=size),
        *diagnose_outputs(model, dataset, device, batch_size=size),
        *diagnose_mode(model, dataset, device, batch_size=size),
    ]
    return sorted(found, key=lambda diagnostic: diagnostic.severity != "warn")


def diagnose_normalisation(
    model: nn.Module, dataset: ImageDataset, device: torch.device | str = "cpu", *, batch_size: int = BATCH
) -> list[Diagnostic]:
    """A usual preparation of the pixels under which the model is right more often, see `expected_preparation`.

    Returns:
        No diagnostic or one, of code "wrong-normalisation".
    """
    found = expected_preparation(model, dataset, device, batch_size=batch_size)
    if found is None:
        return []
    advice = as_flags(found.advice)  # a report names flags, wherever it is read
    return [Diagnostic(code="wrong-normalisation", severity="warn", text=found.text, advice=advice)]


def diagnose_outputs(
    model: nn.Module, dataset: ImageDataset, device: torch.device | str = "cpu", *, batch_size: int = BATCH
) -> list[Diagnostic]:
    """Outputs that look like probabilities: every row within [0, 1] and summing to one; code "probabilities"."""
    logits = _logits(model.to(device), _few(dataset, device, batch_size))
    inside = bool(((logits >= 0) & (logits <= 1)).all())
    if not inside or not torch.allclose(logits.sum(1), torch.ones_like(logits[:, 0]), atol=1e-3):
        return []
    return [
        Diagnostic(
            code="probabilities",
            severity="warn",
            text="The outputs look like probabilities: every row lies in [0, 1] and sums to one. A softmax saturates, "
            "so gradient attacks stall on it, and the DLR loss and margins are made for logits.",
            advice="Return the logits: leave the softmax out of the model.",
        )
    ]


def diagnose_mode(
    model: nn.Module, dataset: ImageDataset, device: torch.device | str = "cpu", *, batch_size: int = BATCH
) -> list[Diagnostic]:
    """A model in train mode, or one that behaves so in eval mode; codes "train-mode" and "random-output".

    Behaving so is: other logits for the same images each time, as under dropout, or logits that depend on the other
    images of the batch, as under batch statistics.
    """
    found = []
    layers = [m for m in model.modules() if m.training and isinstance(m, BATCH_NORM | _DropoutNd)]
    if layers:
        found.append(
            Diagnostic(
                code="train-mode",
                severity="note",
                text=f"The model came in train mode ({len(layers)} batch-norm or dropout layers); the audit sets it to "
                "eval mode.",
                advice="Call model.eval() before measuring it elsewhere.",
            )
        )
    x = _few(dataset, device, batch_size)
    random = diagnose_randomness(model.to(device), x)
    if random or not _differ(_logits(model, x), torch.cat([_logits(model, half) for half in x.chunk(2)])):
        return [*random, *found]
    diagnostic = Diagnostic(
        code="train-mode",
        severity="warn",
        text="The logits of an image depend on the other images of its batch, although the model is in eval mode: its "
        "accuracy is not that of a fixed function.",
        advice="Batch norm without running statistics, or another layer over the batch, acts as in training; make it "
        "follow model.eval().",
    )
    return [diagnostic, *found]


def diagnose_randomness(model: nn.Module, x: Tensor) -> list[Diagnostic]:
    """Whether the same images give other logits at every pass, in eval mode; code "random-output".

    Args:
        model: on the device of `x`; it keeps its modes.
        x: (B, C, H, W) in [0, 1].
    """
    passes = torch.stack([_logits(model, x) for _ in range(PASSES)])
    spread = float((passes[0].amax(1) - passes[0].amin(1)).mean())
    apart = float((passes - passes[0]).abs().amax())
    if apart <= SAME * max(spread, 1e-12):
        return []
    changed = int((passes.argmax(2) != passes[0].argmax(1)).any(0).sum())
    return [
        Diagnostic(
            code="random-output",
            severity="warn",
            text=f"The same images give other logits at every pass: up to {apart:.2g} apart in {PASSES} passes, where "
            f"logits spread over {spread:.2g}; {changed} of {len(x)} predictions change.",
            advice="Attacks must average over the randomness, which none here does: audit the model without it, or "
            "read every figure as an upper bound.",
        )
    ]


def diagnose_pixels(dataset: ImageDataset) -> list[Diagnostic]:
    """Images that are all but black, as pixels of [0, 1] become when stored as whole numbers; code "dark-images"."""
    brightest = int(dataset.images.max())
    if brightest >= DARKEST:
        return []
    return [
        Diagnostic(
            code="dark-images",
            severity="warn",
            text=f"The brightest pixel is {brightest} of 255: the images look scaled before they were stored as bytes.",
            advice="Store the pixels from 0 to 255; the model's own normalisation does the rest.",
        )
    ]


def _few(dataset: ImageDataset, device: torch.device | str, batch_size: int) -> Tensor:
    """(B, C, H, W) in [0, 1], as many of the sample as make one batch."""
    return next(evaluation_batches(sample_of(dataset, device), batch_size)).x


def _logits(model: nn.Module, x: Tensor) -> Tensor:
    with attacking(model, "eval"), torch.no_grad():
        return model(x).float().cpu()


def _differ(a: Tensor, b: Tensor) -> bool:
    return bool((a - b).abs().max() > SAME_LOGITS * a.std().clamp(min=1e-12))
