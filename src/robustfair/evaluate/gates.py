"""Gates: what an audit must show before a model ships, as short texts that are read strictly.

    worst.robust=0.30                      the worst class keeps at least 30 % under all attacks of the audit
    average.clean=80%                      = and >= both mean at least; a value is a fraction or bears a per cent sign
    worst-10pct.pgd-20=0.25                mean of the worst tenth of the classes
    class.cat.robust=0.20                  one class by its name
    group.animals.robust=0.35              one group, and worst-group for the lowest of them
    interval.worst.robust.lower=0.25       an end of the 95 % interval of any of these
    range.robust<=0.5                      at most: for the range, where more is worse

A gate passes only on what is known; another is undecided, which counts as failed. Where a time budget cut an attack
short, the accuracy is an upper bound: it can fail a lower gate and never pass one. So is the worst class where another
class has no images, and what else is taken over classes is then unknown. Nothing is known under an attack that did not
run or whose radius or step is 0, nor under robust where there is no other attack.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from robustfair import metrics
from robustfair.config import require
from robustfair.errors import ConfigError, UnknownNameError
from robustfair.evaluate.groups import GroupRates
from robustfair.evaluate.result import CLEAN, ROBUST, Audit, find_attack, shortfall

Status = Literal["passed", "failed", "undecided"]

EXAMPLE = "worst.robust=0.30"
ONE = ("class", "group")
"""Measures of one class or group, which is named after them."""
WORST_GROUP = "worst-group"
MEASURES = ("average", "class-mean", "worst", "worst-10pct", "best", "range", *ONE, WORST_GROUP)

_GATE = re.compile(r"(?P<name>.+?)\s*(?P<sign>>=|<=|=)\s*(?P<value>[^=<>()]+)")
_NAME = re.compile(r"(?P<what>.+)\.(?P<attack>[^.()]+(?:\([^()]*\))?)")
_SHARE = re.compile(r"worst-(\d+(?:\.\d+)?)pct")
_ROUNDING = 1e-12


@dataclass(frozen=True, kw_only=True)
class Quantity:
    """A number of an audit, as its name says: worst.robust; `read_quantity` reads one.

    Attributes:
        text: the words it is from, without spaces around.
        measure: what is measured, see `MEASURES`; any "worst-Qpct".
        subject: the class or group, "" unless the measure is of one.
        attack: an attack of the audit, or "robust".
    """

    text: str
    measure: str
    subject: str
    attack: str
    kind: ClassVar[str] = "gate"

    @property
    def name(self) -> str:
        """What is measured."""
        what = f"{self.measure}.{self.subject}" if self.subject else self.measure
        return f"{what}.{self.attack}"

    @property
    def of_groups(self) -> bool:
        """Whether it takes groups to measure it."""
        return self.measure in ("group", WORST_GROUP)


@dataclass(frozen=True, kw_only=True)
class Gate(Quantity):
    """One demand on an audit; `parse_gate` builds it from its text.

    Attributes:
        end: "lower" or "upper" end of the 95 % interval, "" for the value itself.
        at_least: whether the bound is a lower one.
        bound: as a fraction.
    """

    end: Literal["", "lower", "upper"]
    at_least: bool
    bound: float

    @property
    def name(self) -> str:
        """What is bounded."""
        return f"interval.{super().name}.{self.end}" if self.end else super().name


@dataclass(frozen=True, kw_only=True)
class GateResult:
    """Whether an audit meets a gate.

    Attributes:
        gate: the demand.
        value: what was measured, nan where nothing was.
        status: "undecided" where the audit does not know enough; counts as failed.
        line: one line for the user.
    """

    gate: Gate
    value: float
    status: Status
    line: str

    @property
    def passed(self) -> bool:
        """Whether the demand is met for certain."""
        return self.status == "passed"

    def to_dict(self) -> dict[str, Any]:
        """As JSON values: nan is null."""
        value = None if math.isnan(self.value) else self.value
        return {"gate": self.gate.text, "value": value, "status": self.status, "line": self.line}


def parse_gate(text: str) -> Gate:
    """Read one gate, see the head of this module.

    >>> gate = parse_gate("interval.worst.cw-50(restarts=5).lower=25%")
    >>> gate.measure, gate.attack, gate.end, gate.at_least, gate.bound
    ('worst', 'cw-50(restarts=5)', 'lower', True, 0.25)

    Raises:
        ConfigError: the text does not follow the grammar, or the value is no fraction.
        UnknownNameError: another measure.
    """
    text = text.strip()
    found = _GATE.fullmatch(text)
    if not found:
        hint = "In a shell, put quotes around a gate that holds < or >"
        raise ConfigError("gate", "text", allowed=f"name=value, like {EXAMPLE}", got=text, hint=hint)
    name, end = found["name"], ""
    if name.startswith("interval."):
        name, _, end = name.removeprefix("interval.").rpartition(".")
        require(end in ("lower", "upper"), text, "end", allowed="lower or upper, as the last word of the name", got=end)
    of = read_quantity(name, text, like=EXAMPLE)
    if of.measure == "range" and found["sign"] == "=":
        raise ConfigError(
            "gate", "sign", allowed="<= or >= for the range, where more is worse", got=text, hint="Put it in quotes"
        )
    return Gate(
        **vars(of),
        end=end,  # type: ignore[arg-type]
        at_least=found["sign"] != "<=",
        bound=_fraction(found["value"].strip(), text),
    )


def read_quantity(name: str, text: str, *, kind: str = Quantity.kind, like: str) -> Quantity:
    """The quantity that `name` names, in the words `text` of a gate or another kind of demand, such as `like`.

    >>> read_quantity("Class.cat.pgd-20", "class.cat.pgd-20=0.2", like=EXAMPLE).name
    'class.cat.pgd-20'

    Raises:
        ConfigError: the name does not follow the grammar.
        UnknownNameError: another measure.
    """
    parts = _NAME.fullmatch(name)
    if not parts:
        raise ConfigError(kind, "name", allowed=f"a measure and an attack, like {like}", got=name)
    measure, _, subject = parts["what"].partition(".")
    share = _SHARE.fullmatch(parts["what"].lower().replace("_", "-"))
    if share:
        measure, subject = share[0], ""
        require(0 < float(share[1]) <= 100, text, "measure", allowed="worst-Qpct with Q up to 100", got=share[0])
    else:
        measure = measure.lower().replace("_", "-")
        if measure not in MEASURES:
            raise UnknownNameError(f"measure of a {kind}", measure, MEASURES)
    if bool(subject) != (measure in ONE):
        allowed = f"{measure}.NAME.ATTACK" if measure in ONE else f"{measure}.ATTACK"
        raise ConfigError(kind, "name", allowed=allowed, got=name)
    return Quantity(text=text, measure=measure, subject=subject, attack=parts["attack"])


def require_known(
    gates: Iterable[Quantity], *, attacks: Sequence[str], classes: Sequence[str], groups: Sequence[str] | None = None
) -> None:
    """Refuse gates on what an audit will not hold, before it runs.

    Args:
        attacks: names of its attacks.
        classes: names of its classes.
        groups: names of its groups, None if it has none.

    Raises:
        UnknownNameError: an attack, class or group of another name; shows what there is.
        ConfigError: a gate on groups where there are none.
    """
    for gate in gates:
        _attack(gate, attacks)
        if gate.of_groups and groups is None:
            raise ConfigError(gate.kind, gate.text, allowed="used with --group-by", got="no groups")
        for measure, names in (("class", classes), ("group", groups or ())):
            if gate.measure == measure and gate.subject not in names:
                raise UnknownNameError(f"{measure} in the {gate.kind} {gate.text}", gate.subject, names)


def check(gates: Iterable[Gate], audit: Audit, groups: GroupRates | None = None) -> list[GateResult]:
    """Hold an audit, and its rates by group, against gates; one result a gate, in their order.

    Raises:
        UnknownNameError, ConfigError: see `require_known`.
    """
    gates = list(gates)
    names = None if groups is None else groups.class_names
    require_known(gates, attacks=_asked(audit), classes=audit.class_names, groups=names)
    return [_check(gate, audit, groups if gate.of_groups and groups else audit) for gate in gates]


def _check(gate: Gate, audit: Audit, rates: Audit | GroupRates) -> GateResult:
    attack = _attack(gate, _asked(audit))
    unknown = _unattacked(audit, attack)
    if unknown:
        line = f"undecided: {gate.name} is not known, {unknown}"
        return GateResult(gate=gate, value=math.nan, status="undecided", line=line)
    value, where = _measure(gate, attack, rates)
    if math.isnan(value):
        return GateResult(gate=gate, value=value, status="undecided", line=f"undecided: {gate.name} has no images")
    beyond = value - gate.bound if gate.at_least else gate.bound - value
    status: Status = "passed" if beyond >= -_ROUNDING else "failed"
    cut, absent = _unsure(audit, rates, attack), _absent(gate, rates)
    reason = absent or cut
    if cut and (gate.measure == "range" or (status == "passed") == gate.at_least):
        status = "undecided"
    if absent and not (status == "failed" and gate.measure in ("worst", WORST_GROUP) and gate.at_least):
        status = "undecided"
    asked = "at least" if gate.at_least else "at most"
    if status == "failed":
        asked = "below" if gate.at_least else "above"
    found, bound = _apart(value, gate.bound)
    line = f"{status}: {gate.name} is {found}{f' ({where})' if where else ''}, {asked} {bound}"
    if status == "undecided":
        line += f" is asked, but {reason}"
    return GateResult(gate=gate, value=value, status=status, line=line)


def _measure(gate: Gate, attack: str, rates: Audit | GroupRates) -> tuple[float, str]:
    """The value that a gate bounds, and the class or group that it belongs to where the gate does not name one."""
    value, lower, upper = measured(gate, attack, rates)
    if gate.measure in ("worst", WORST_GROUP) and not gate.end:
        return value, rates.worst(attack).words
    return {"": value, "lower": lower, "upper": upper}[gate.end], ""


def measured(quantity: Quantity, attack: str, rates: Audit | GroupRates) -> tuple[float, float, float]:
    """A quantity under an attack, by its name in the audit, and its 95 % interval: (value, lower, upper)."""
    if quantity.measure in ONE:
        index = rates.class_names.index(quantity.subject)
        lowest, highest = rates.interval(attack)
        return float(rates.rate(attack)[index]), float(lowest[index]), float(highest[index])
    if quantity.measure == "average":
        return rates.average(attack), *rates.average_interval(attack)
    measure = "worst" if quantity.measure == WORST_GROUP else quantity.measure
    found = metrics.bootstrap_statistic(rates.correct(attack), rates.count(), measure.replace("-", "_"))
    return found.estimate, found.lower, found.upper


def _unattacked(audit: Audit, attack: str) -> str:
    """Why nothing is known under this attack, "" where something is."""
    if attack == CLEAN:
        return ""
    ran = [name for name in audit.attacks if name != CLEAN and attack in (name, ROBUST)]
    if not ran:
        parts = audit.unfinished(attack)
        return shortfall(parts) if parts else "nothing attacked the model, the audit is of clean images alone"
    idle = all(0 in (audit.threat.eps, audit.settings.get(name, {}).get("step_size")) for name in ran)
    return "the radius or the step of the attack is 0, so that it searched nothing" if idle else ""


def _absent(gate: Gate, rates: Audit | GroupRates) -> str:
    """Which classes or groups, of those that a gate is over, have no images; "" where all have."""
    if gate.measure in ("average", *ONE):
        return ""
    names = [name for name, n in zip(rates.class_names, rates.count().tolist(), strict=True) if n == 0]
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"{', '.join(names[:3])}{more} {'has' if len(names) == 1 else 'have'} no images" if names else ""


def _unsure(audit: Audit, rates: Audit | GroupRates, attack: str) -> str:
    """Why an accuracy under this attack is only an upper bound, "" if it is more."""
    parts = audit.unfinished(attack)
    if parts:
        return f"{shortfall(parts)}: the accuracy is an upper bound"
    if isinstance(rates, GroupRates) and rates.is_upper_bound(attack):
        return "the attacks aimed at another class, not at another group: the accuracy is an upper bound"
    return ""


def _asked(audit: Audit) -> tuple[str, ...]:
    """The attacks that an audit was asked for, also those that a time budget left no time for."""
    return (*audit.attacks, *audit.provenance.get("not_run", ()))


def _attack(gate: Quantity, attacks: Sequence[str]) -> str:
    """The attack of a gate as the audit spells it. Clean and robust are part of every audit."""
    return find_attack(gate.attack, dict.fromkeys((CLEAN, *attacks, ROBUST)), f"attack in the {gate.kind} {gate.text}")


def _fraction(word: str, text: str) -> float:
    """A value from `0.3` or `30%`."""
    number = word.removesuffix("%").strip()
    try:
        value = float(number)
    except ValueError:
        value = math.nan
    if word == number and value > 1:
        hint = f"Did you mean {number}%?" if value <= 100 else ""
        raise ConfigError(text, "value", allowed="a fraction of 1, or a number with %", got=word, hint=hint)
    value = value / 100 if word != number else value
    require(
        0 <= value <= 1, text, "value", allowed="a fraction of 1 like 0.30, or a number with % up to 100%", got=word
    )
    return value


def _apart(value: float, bound: float) -> tuple[str, str]:
    """Both numbers with as many decimals as it takes to tell them apart, three and two at least.

    >>> _apart(0.1428, 0.3), _apart(0.29996, 0.3), _apart(0.3, 0.3)
    (('0.143', '0.30'), ('0.29996', '0.30'), ('0.300', '0.30'))
    """
    places = next((n for n in range(3, 13) if round(value, n) != round(bound, n)), 3)
    short = next((n for n in range(2, 13) if round(bound, n) == bound), 12)
    return f"{value:.{places}f}", f"{bound:.{short}f}"
