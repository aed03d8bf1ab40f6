"""What objectives with a teacher share: it is frozen, and its logits at x are in the batch before attack and loss."""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import replace
from typing import ClassVar, Literal

import torch
from torch import nn

from robustfair.config import config
from robustfair.errors import ConfigError, ModelError
from robustfair.objectives.base import AdversarialObjective
from robustfair.values import Batch, Model, Network

KLOver = Literal["mean", "sum"]
"""Over the C entries of a KL: the mean, as the codes of RSLAD, ARD and ABSLD have it, or the sum, which is the KL."""


@config
class TaughtObjective(AdversarialObjective):
    """An adversarial objective whose labels a frozen teacher gives.

    Class attributes:
        taught: the terms that ask for the teacher's labels.

    Attributes:
        teacher: a module, of which a frozen copy is taken, or text that names one as `robustfair audit` does: a run
            folder, "weights.pt(arch=wrn-34-10)", "robustbench:NAME"; "previous" in a stage. A run needs one.
    """

    taught: ClassVar[tuple[str, ...]]
    reads: ClassVar[frozenset[str]] = frozenset({"x_adv", "teacher"})
    clean_pass: ClassVar[bool] = True
    teacher: Network = None

    def networks(self, model: nn.Module) -> Mapping[str, nn.Module]:
        teacher = self.teacher
        if not isinstance(teacher, nn.Module):
            hint = "" if teacher is None else "rf.load_model reads a model by name"
            allowed = f"given, such as {self.name}(teacher=runs/wrn)" if teacher is None else "a module here"
            raise ConfigError(self.name, "teacher", allowed=allowed, got=teacher, hint=hint)
        try:
            copy = deepcopy(teacher)
        except Exception as error:  # a foreign module may hold what cannot be copied
            raise ModelError(f"{self.name}: teacher cannot be copied: {error}") from error
        return {"teacher": copy.requires_grad_(False).eval()}

    def prepare(self, batch: Batch, networks: Mapping[str, Model]) -> Batch:
        with torch.no_grad():
            logits = networks[f"{self.name}/teacher"](batch.x)
        return replace(batch, teacher=dict.fromkeys(self.taught, logits))
