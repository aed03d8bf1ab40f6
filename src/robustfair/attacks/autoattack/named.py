"""The AutoAttack family as users name it: `autoattack`, its versions, and its attacks one by one, with their options.

Settings are those of the published ensemble (Croce and Hein 2020, `autoattack.py` after August 2020): 100 iterations,
9 target classes, 5000 queries. With fewer than ten classes the targeted attacks go for all others. DLR needs three
classes and its targeted form four; with fewer the cross-entropy takes its place, and the audit says so.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

from robustfair.attacks.autoattack.apgd import CLASSES, Apgd, ApgdLoss
from robustfair.attacks.autoattack.base import Search
from robustfair.attacks.autoattack.fab import Fab
from robustfair.attacks.autoattack.square import Square
from robustfair.config import build, require
from robustfair.errors import UnknownNameError
from robustfair.grammar import Term, canonical_key, format_eps, format_value
from robustfair.registry import canonical
from robustfair.values import Threat

Kind = Literal["apgd-ce", "apgd-dlr", "apgd-t", "fab", "fab-t", "square"]
AutoAttackEngine = Literal["native", "reference"]

AUTOATTACK = "autoattack"
_APGD: tuple[str, ...] = ("steps", "restarts")
_TARGETED: tuple[str, ...] = ("steps", "targets")
OPTIONS: Mapping[str, tuple[str, ...]] = {
    "apgd-ce": _APGD,
    "apgd-dlr": _APGD,
    "apgd-t": _TARGETED,
    "fab": _APGD,
    "fab-t": _TARGETED,
    "square": ("queries", "restarts", "p_init", "per_image_windows", "rescale_schedule"),
}
"""Attack -> what may be set."""
GOALS: Mapping[str, str] = {
    "apgd-ce": "cross-entropy",
    "apgd-dlr": "dlr",
    "apgd-t": "targeted dlr",
    "fab": "smallest norm",
    "fab-t": "smallest norm, targeted",
    "square": "margin, by queries",
}
LOSSES: Mapping[str, ApgdLoss] = {"apgd-ce": "ce", "apgd-dlr": "dlr", "apgd-t": "dlr-targeted"}
CROSS_ENTROPY_INSTEAD: Mapping[ApgdLoss, ApgdLoss] = {"dlr": "ce", "dlr-targeted": "ce-targeted"}


@dataclass(frozen=True, kw_only=True)
class Member:
    """One attack of the family.

    Attributes:
        kind: which.
        steps: iterations of apgd and fab.
        restarts: of the untargeted ones.
        targets: classes that a targeted attack goes for, the most likely first; at most all others.
        queries, p_init, per_image_windows, rescale_schedule: see `robustfair.attacks.autoattack.square.Square`.

    Raises:
        ConfigError: a number out of range.
    """

    kind: Kind
    steps: int = 100
    restarts: int = 1
    targets: int = 9
    queries: int = 5000
    p_init: float = 0.8
    per_image_windows: bool = False
    rescale_schedule: bool = False

    def __post_init__(self) -> None:
        for field in ("steps", "restarts", "targets", "queries"):
            value = getattr(self, field)
            require(value >= 1, self.kind, field, allowed=">= 1", got=value)
        require(0 < self.p_init <= 1, self.kind, "p_init", allowed="in (0, 1]", got=self.p_init)

    @property
    def name(self) -> str:
        """The canonical text, with the options that differ from the default.

        >>> Member(kind="apgd-ce", restarts=5).name
        'apgd-ce(restarts=5)'
        """
        usual = {field.name: field.default for field in fields(self)}
        given = {key: getattr(self, key) for key in OPTIONS[self.kind] if getattr(self, key) != usual[key]}
        spelt = {key: repr(value) if isinstance(value, float) else format_value(value) for key, value in given.items()}
        inside = ", ".join(f"{key}={text}" for key, text in spelt.items())
        return f"{self.kind}({inside})" if inside else self.kind

    def settings(self, classes: int | None = None) -> dict[str, Any]:
        """Everything that defines the attack beside its threat, as JSON values; as it runs on so many classes."""
        found = {"attack": self.kind, "goal": GOALS[self.kind]} | {
            key: getattr(self, key) for key in OPTIONS[self.kind]
        }
        if classes is None:
            return found
        if "targets" in found:
            found["targets"] = min(self.targets, classes - 1)
        return found | ({"goal": GOALS["apgd-ce"]} if self.warning(classes) else {})

    def search(self, threat: Threat, classes: int, seed: int) -> Search:
        """The attack on a model of so many classes."""
        eps, norm = threat.eps, threat.norm
        if self.kind == "square":
            return Square(
                name=self.name,
                eps=eps,
                norm=norm,
                queries=self.queries,
                restarts=self.restarts,
                p_init=self.p_init,
                per_image_windows=self.per_image_windows,
                rescale_schedule=self.rescale_schedule,
                seed=seed,
            )
        targeted = self.kind in ("apgd-t", "fab-t")
        restarts = min(self.targets, classes - 1) if targeted else self.restarts
        if self.kind in LOSSES:
            loss = self._loss(classes)
            return Apgd(name=self.name, loss=loss, eps=eps, norm=norm, steps=self.steps, restarts=restarts)
        return Fab(name=self.name, targeted=targeted, eps=eps, norm=norm, steps=self.steps, restarts=restarts)

    def warning(self, classes: int) -> str | None:
        """What a model of so few classes changes, for the user."""
        if self.kind not in LOSSES or self._loss(classes) == LOSSES[self.kind]:
            return None
        needs = CLASSES[LOSSES[self.kind]]
        form = "targeted DLR" if self.kind == "apgd-t" else "DLR"
        return f"{self.kind}: {form} needs {needs} classes and there are {classes}: the cross-entropy takes its place"

    def _loss(self, classes: int) -> ApgdLoss:
        loss = LOSSES[self.kind]
        return loss if classes >= CLASSES[loss] else CROSS_ENTROPY_INSTEAD[loss]


VERSIONS: Mapping[str, tuple[Member, ...]] = {
    "standard": (Member(kind="apgd-ce"), Member(kind="apgd-t"), Member(kind="fab-t"), Member(kind="square")),
    "plus": (
        Member(kind="apgd-ce", restarts=5),
        Member(kind="apgd-dlr", restarts=5),
        Member(kind="fab", restarts=5),
        Member(kind="square"),
        Member(kind="apgd-t"),
        Member(kind="fab-t"),
    ),
}


@dataclass(frozen=True, kw_only=True)
class AutoAttack:
    """AutoAttack, or one of its members by itself, as an attack of an audit; `parse_attacks` builds it from its name.

    Attributes:
        name: the canonical text, the key of this attack everywhere.
        members: in the order they run, each on the images that those before it left robust.
    """

    name: str
    members: tuple[Member, ...]

    is_clean = False

    @property
    def needs_gradient(self) -> bool:
        """Whether running it takes gradients of the model: Square by itself does not."""
        return any(member.kind != "square" for member in self.members)

    def settings(self, threat: Threat, classes: int | None = None) -> dict[str, Any]:
        """Everything that defines the attack, as JSON values; as it runs on so many classes."""
        about = {"norm": threat.norm, "eps": threat.eps}
        if self.name == self.members[0].name:
            return about | self.members[0].settings(classes)
        return about | {"goal": "ensemble", "members": [member.settings(classes) for member in self.members]}

    def describe(self, threat: Threat) -> str:
        """One line for reports.

        >>> parse_autoattack(Term("autoattack", {})).describe(Threat())
        'autoattack: apgd-ce, apgd-t, fab-t and square in turn, linf radius 8/255'
        """
        names = [member.name for member in self.members]
        listed = names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]} in turn"
        what = GOALS[self.members[0].kind] if self.name == names[0] else listed
        return f"{self.name}: {what}, {threat.norm} radius {format_eps(threat.eps)}"


def parse_autoattack(term: Term) -> AutoAttack:
    """Read `autoattack`, `autoattack(version=plus)` or one of the family.

    Raises:
        UnknownNameError: no such version or option.
        ConfigError: a value of the wrong type or out of range.
    """
    args = {canonical_key(key): value for key, value in term.args.items()}
    allowed = ("version",) if term.name == AUTOATTACK else OPTIONS[term.name]
    for key in args:
        if key not in allowed:
            raise UnknownNameError(f"option of {term.name}", key, allowed)
    if term.name != AUTOATTACK:
        member = build(Member, {"kind": term.name, **args}, owner=term.name)
        return AutoAttack(name=member.name, members=(member,))
    version = canonical(str(args.get("version", "standard")))
    if version not in VERSIONS:
        raise UnknownNameError("version of autoattack", version, tuple(VERSIONS))
    name = AUTOATTACK if version == "standard" else f"{AUTOATTACK}(version={version})"
    return AutoAttack(name=name, members=VERSIONS[version])


def cheaper(attack: AutoAttack, **settings: Any) -> AutoAttack:
    """The attack with other settings in every member that has them, for tests and checks of how the engine works."""
    members = tuple(
        replace(member, **{key: value for key, value in settings.items() if key in OPTIONS[member.kind]})
        for member in attack.members
    )
    return AutoAttack(name=attack.name, members=members)
