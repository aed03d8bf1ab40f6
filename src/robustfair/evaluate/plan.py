"""What an audit is to do, as one value: which of two audits are the same, and what the files of one are called."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any, Literal, get_args

from robustfair.attacks.autoattack.named import AutoAttackEngine
from robustfair.attacks.named import AnyAttack, parse_attacks
from robustfair.config import Norm, require
from robustfair.data import ImageDataset
from robustfair.errors import ConfigError
from robustfair.evaluate.result import CLEAN, Audit
from robustfair.grammar import format_eps, parse_eps, parse_norm
from robustfair.values import Threat, default_eps, default_step

SearchPrecision = Literal["auto", "fp32", "bf16"]
BATCH_SIZE = 250
"""Images at a time by default: one number for all hardware, since a random start depends on its batch."""


@dataclass(frozen=True, kw_only=True)
class AuditPlan:
    """Everything that defines an audit but the weights of the model; `plan_audit` reads one from what a user asks for.

    Attributes:
        attacks: names in order, "clean" first.
        threat: norm, radius and step that all attacks share.
        seed: of the random starts.
        precision: in which attacks search.
        engine: of the AutoAttack family.
        batch_size: images at a time; None is the usual, `BATCH_SIZE`.
        points: whether it is kept where the model fails.
        fingerprint, images: of the data set, and how many.
        checkpoint: of the run that the model is from.
        model: what reports call the model, where its files lie beside those of other models; else None.
        until: when a sequential audit stops, in the words of its rule; None for one of all images.
    """

    attacks: tuple[str, ...]
    threat: Threat
    seed: int
    precision: SearchPrecision
    engine: AutoAttackEngine
    batch_size: int | None
    points: bool
    fingerprint: str
    images: int
    checkpoint: str | None = None
    model: str | None = None
    until: str | None = None

    @staticmethod
    def of(audit: Audit, *, checkpoint: str | None = None, model: str | None = None) -> AuditPlan:
        """What an audit was to do, with the batch size that it ran with."""
        about = audit.provenance
        return AuditPlan(
            attacks=(*audit.attacks, *about["not_run"]),
            threat=audit.threat,
            seed=about["seed"],
            precision=about["precision"],
            engine=about["engine"],
            batch_size=about["batch_size"],
            points=bool(audit.points),
            fingerprint=audit.fingerprint,
            images=len(audit.labels),
            checkpoint=checkpoint,
            model=model,
            until=about.get("until", {}).get("asked"),
        )

    @property
    def suite(self) -> tuple[AnyAttack, ...]:
        """The attacks themselves."""
        return parse_attacks(self.attacks)

    @property
    def at_a_time(self) -> int:
        """Images at a time."""
        return BATCH_SIZE if self.batch_size is None else self.batch_size

    @property
    def key(self) -> str:
        """Eight hexadecimal digits that only the same plan has."""
        about = [
            list(self.attacks),
            self.threat,
            self.seed,
            self.precision,
            self.engine,
            self.at_a_time,
            self.fingerprint,
            self.images,
            self.checkpoint,
            self.points,
            self.model,
            *([] if self.until is None else [self.until]),
        ]
        return hashlib.sha256(repr(about).encode()).hexdigest()[:8]

    def identity(self, num_classes: int) -> dict[str, Any]:
        """The plan as JSON values, by which a journal says in what another audit differs.

        Without the names of the checkpoint and the model: a journal knows the weights themselves.
        """
        return {
            "images": [self.fingerprint, self.images],
            "attacks": [(attack.name, attack.settings(self.threat, num_classes)) for attack in self.suite],
            "seed": self.seed,
            "batch_size": self.at_a_time,
            "engine": self.engine,
            "points": self.points,
        }

    @property
    def journal_name(self) -> str:
        """The file that keeps what the audit knows until it is saved."""
        return f"unfinished-{self.key}.safetensors"

    def stem(self, ran: Sequence[str], *, complete: bool) -> str:
        """The name of the saved files, without suffix: attacks, threat, checkpoint, images, seed and key.

        Args:
            ran: the attacks that ran.
            complete: whether all ran to their end.
        """
        attacks = ",".join(ran)
        parts = [
            attacks if len(attacks) <= 80 else f"{attacks[:80]}...",
            f"{self.threat.norm}-{format_eps(self.threat.eps)}",
            self.checkpoint,
            f"{self.images}-images",
            None if self.until is None else f"until-{self.until[:40]}",
            f"seed-{self.seed}" if self.seed else None,
            None if complete else "cut",
            self.key,
        ]
        return re.sub(r"[^\w.,=+-]+", "-", "_".join(part for part in parts if part))


def plan_audit(
    dataset: ImageDataset,
    *,
    attacks: str | Sequence[str] = (CLEAN, "pgd-20"),
    eps: float | str | None = None,
    norm: str = "linf",
    step_size: float | str | None = None,
    batch_size: int | None = None,
    seed: int = 0,
    precision: SearchPrecision = "auto",
    engine: AutoAttackEngine = "native",
    keep_points: bool = False,
) -> AuditPlan:
    """Read the settings of an audit; see `robustfair.evaluate.run.audit` for what they mean.

    Raises:
        UnknownNameError, ConfigError: attacks or radii that cannot be read, or another value that makes no sense.
    """
    if not isinstance(dataset, ImageDataset):
        got = type(dataset).__name__
        raise ConfigError("audit", "dataset", allowed="an ImageDataset", got=got, hint="Of splits, pass data.test")
    names, limits = attack_names(attacks), threat(norm, eps, step_size)
    for field, value, kind in (("precision", precision, SearchPrecision), ("engine", engine, AutoAttackEngine)):
        allowed = get_args(kind)
        require(value in allowed, "audit", field, allowed=f"one of {', '.join(allowed)}", got=value)
    return AuditPlan(
        attacks=names,
        threat=limits,
        seed=whole("audit", "seed", seed),
        precision=precision,
        engine=engine,
        batch_size=None if batch_size is None else whole("audit", "batch_size", batch_size, least=1),
        points=keep_points,
        fingerprint=dataset.fingerprint,
        images=len(dataset),
    )


def attack_names(attacks: str | Sequence[str]) -> tuple[str, ...]:
    """The names of attacks in order, with clean first whether it was named or not.

    >>> attack_names("PGD_20, autoattack")
    ('clean', 'pgd-20', 'autoattack')

    Raises:
        UnknownNameError, ConfigError, RecipeError: see `parse_attacks`.
    """
    names = [attack.name for attack in parse_attacks(attacks)]
    return CLEAN, *(name for name in names if name != CLEAN)


def threat(norm: str = "linf", eps: float | str | None = None, step_size: float | str | None = None) -> Threat:
    """The threat of an audit; radius and step default as for training, see `values.default_eps` and `default_step`.

    >>> threat("Linf", "8/255").step_size == 2 / 255
    True

    Raises:
        ConfigError: an unknown norm, or a length that is none in pixel units (`8` for `8/255`).
    """
    kind: Norm = "linf" if parse_norm(norm) == "linf" else "l2"
    radius = default_eps(kind) if eps is None else parse_eps(eps, norm=kind)
    step = default_step(kind, radius) if step_size is None else parse_eps(step_size, norm=kind, field="step_size")
    return Threat(norm=kind, eps=radius, step_size=step)


def whole(owner: str, field: str, value: int, *, least: int | None = None) -> int:
    """`value` as a plain int.

    Raises:
        ConfigError: it is no whole number, or below `least`.
    """
    allowed = "a whole number" if least is None else f"a whole number >= {least}"
    fits = isinstance(value, Integral) and not isinstance(value, bool) and (least is None or value >= least)
    require(fits, owner, field, allowed=allowed, got=value)
    return int(value)
