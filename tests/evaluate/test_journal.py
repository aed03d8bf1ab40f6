"""What an unfinished audit keeps on disk: read back whole, never taken for another's, and gone at the end."""

from __future__ import annotations

import os
from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from robustfair import files
from robustfair.data import ImageDataset
from robustfair.errors import CheckpointError
from robustfair.evaluate.journal import Journal, weights_fingerprint
from robustfair.evaluate.result import Audit
from robustfair.evaluate.run import audit

Net = Callable[..., nn.Module]
Small = tuple[nn.Module, ImageDataset]

ABOUT = {"attacks": [["pgd-2", {"steps": 2}], ["fgsm", {}]], "seed": 0, "engine": "native"}
STATE = {
    "column/clean": torch.arange(5),
    "now/lanes/point": torch.rand(2, 1, 3, 3),
    "now/channels_last/x": torch.rand(2, 3, 3, 1).movedim(-1, 1),
    "now/halved": torch.tensor([True, False]),
    "now/member": torch.tensor(3),
    "points/none": torch.empty(0),
}


def journal_in(folder: Path, **changes: Any) -> Journal:
    return Journal(folder / "new" / "deeper" / "unfinished.safetensors", ABOUT | changes)


def equal(one: dict[str, Tensor], two: dict[str, Tensor]) -> bool:
    return one.keys() == two.keys() and all(
        one[name].dtype == two[name].dtype and torch.equal(one[name], two[name]) for name in one
    )


# The file


def test_nothing_is_known_before_the_first_writing(tmp_path: Path) -> None:
    assert journal_in(tmp_path).read() == {}
    assert list(tmp_path.iterdir()) == []


def test_what_was_written_last_is_read(tmp_path: Path) -> None:
    journal_in(tmp_path).write({"column/clean": torch.zeros(2)})
    journal_in(tmp_path).write(STATE)
    assert equal(journal_in(tmp_path).read(), STATE)
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["unfinished.safetensors"]


def test_it_goes_with_the_folders_that_were_made_for_it(tmp_path: Path) -> None:
    (tmp_path / "new").mkdir()
    journal = journal_in(tmp_path)
    journal.write(STATE)
    journal.write(STATE)
    journal.remove()
    assert list(tmp_path.rglob("*")) == [tmp_path / "new"]


@pytest.mark.parametrize("beside", ["new/audit.json", "new/deeper/audit.json", "new/deeper/.hidden"])
def test_folders_with_other_files_stay(tmp_path: Path, beside: str) -> None:
    journal = journal_in(tmp_path)
    journal.write(STATE)
    (tmp_path / beside).write_text("keep")
    journal.remove()
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [tmp_path / beside]


def test_removing_what_was_never_written_is_nothing(tmp_path: Path) -> None:
    journal_in(tmp_path).remove()
    assert list(tmp_path.iterdir()) == []


def test_a_writing_that_fails_leaves_the_last_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    journal = journal_in(tmp_path)
    journal.write(STATE)

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        journal.write({"column/clean": torch.zeros(1)})
    monkeypatch.undo()
    assert equal(journal.read(), STATE)
    assert len(list(journal.path.parent.iterdir())) == 1


def test_what_killed_writings_left_goes_too(tmp_path: Path) -> None:
    journal = journal_in(tmp_path)
    journal.write(STATE)
    folder = journal.path.parent
    (folder / f".{journal.path.name}.123.tmp").write_bytes(b"half")
    (folder / ".other.safetensors.123.tmp").write_bytes(b"of another")
    assert files.left_beside(journal.path) == [folder / f".{journal.path.name}.123.tmp"]
    journal.remove()
    assert [path.name for path in folder.iterdir()] == [".other.safetensors.123.tmp"]


# Files that are not its own


def refused(journal: Journal, *fragments: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        journal.read()
    text = str(caught.value)
    assert "\n" not in text
    assert text.startswith(str(journal.path))
    assert "delete it to begin" in text
    for fragment in fragments:
        assert fragment in text


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"seed": 1}, "differs in seed)"),
        ({"seed": 1, "engine": "reference"}, "differs in engine, seed)"),
        ({"attacks": [["pgd-2", {"steps": 3}], ["fgsm", {}]]}, "differs in attacks)"),
        ({"attacks": [["fgsm", {}], ["pgd-2", {"steps": 2}]]}, "differs in attacks)"),
        ({"schema": "robustfair.audit-journal/1"}, "differs in schema)"),
        ({"precisions": {"pgd": "fp32"}}, "differs in precisions)"),
    ],
)
def test_the_journal_of_another_audit_is_refused(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    journal_in(tmp_path).write(STATE)
    refused(journal_in(tmp_path, **changes), "belongs to another audit", said)
    assert equal(journal_in(tmp_path).read(), STATE)


@pytest.mark.parametrize("share", [0, 0.001, 0.3, 0.6, 0.9, 0.999])
def test_a_truncated_journal_is_refused(tmp_path: Path, share: float) -> None:
    journal = journal_in(tmp_path)
    journal.write(STATE)
    content = journal.path.read_bytes()
    journal.path.write_bytes(content[: int(share * len(content))])
    refused(journal, "is damaged")


@pytest.mark.parametrize("content", [b"", b"\0" * 64, b"{}", b"\xff" * 200, b"PK\x03\x04 no tensors"])
def test_a_file_of_something_else_is_refused(tmp_path: Path, content: bytes) -> None:
    journal = journal_in(tmp_path)
    journal.path.parent.mkdir(parents=True)
    journal.path.write_bytes(content)
    refused(journal, "is damaged")


@pytest.mark.parametrize(
    "header", [None, {}, {"format": "pt"}, {"identity": "no json"}, {"identity": "[1]"}, {"identity": "7"}]
)
def test_tensors_of_something_else_are_refused(tmp_path: Path, header: dict[str, str] | None) -> None:
    journal = journal_in(tmp_path)
    journal.path.parent.mkdir(parents=True)
    save_file({"weights": torch.zeros(3)}, journal.path, header)
    refused(journal, "belongs to another audit", "attacks")


def test_a_folder_in_its_place_is_refused(tmp_path: Path) -> None:
    journal = journal_in(tmp_path)
    journal.path.mkdir(parents=True)
    refused(journal, "is damaged")


# Which model


def test_the_fingerprint_is_that_of_the_weights(tiny_net: Net) -> None:
    model, other = tiny_net(), tiny_net(seed=1)
    first = weights_fingerprint(model)
    assert (
        weights_fingerprint(deepcopy(model)) == weights_fingerprint(model.train()) == weights_fingerprint(model.eval())
    )
    assert weights_fingerprint(model.to(memory_format=torch.channels_last)) == first
    assert weights_fingerprint(other) != first
    with torch.no_grad():
        model.head.bias[0] += 1e-6
    assert weights_fingerprint(model) != first


def test_the_fingerprint_counts_buffers_types_and_shapes(tiny_net: Net) -> None:
    model = tiny_net()
    seen = {weights_fingerprint(model)}
    model.norm.running_mean[0] += 1
    seen.add(weights_fingerprint(model))
    seen.add(weights_fingerprint(deepcopy(model).double()))
    seen |= {weights_fingerprint(nn.Linear(*size, bias=False)) for size in ((1, 4), (4, 1), (2, 2))}
    zeros = [nn.Linear(*size, bias=False) for size in ((1, 4), (4, 1), (2, 2))]
    for layer in zeros:
        nn.init.zeros_(layer.weight)
    seen |= {weights_fingerprint(layer) for layer in zeros}
    assert len(seen) == 9
    assert weights_fingerprint(nn.Identity()) == weights_fingerprint(nn.Flatten())


# In an audit

USUAL: dict[str, Any] = {
    "attacks": ["apgd-ce(steps=3)", "pgd-2", "square(queries=8)"],
    "eps": 0.03,
    "precision": "fp32",
}


@pytest.fixture
def begun(small: Small, tmp_path: Path) -> Path:
    """The journal of an audit that was interrupted in its first attack."""
    told: list[str] = []
    passes: list[int] = []

    def interrupt(*_: object) -> None:
        passes.append(len(told))
        if sum(map(bool, passes)) == 5:
            raise KeyboardInterrupt

    journal = tmp_path / "journal.safetensors"
    hook = small[0].register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        audit(*small, journal=journal, on_progress=lambda attack, *_: told.append(attack), **USUAL)
    hook.remove()
    with safe_open(journal, "pt") as file:
        assert "now/member" in file.keys()  # noqa: SIM118 - no mapping
    return journal


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"seed": 1}, "differs in seed"),
        ({"eps": 0.04}, "differs in attacks"),
        ({"norm": "l2"}, "differs in attacks"),
        ({"step_size": 0.001}, "differs in attacks"),
        ({"attacks": ["apgd-ce(steps=3)", "pgd-2"]}, "differs in attacks"),
        ({"attacks": ["apgd-ce(steps=4)", "pgd-2", "square(queries=8)"]}, "differs in attacks"),
        ({"attacks": ["pgd-2", "apgd-ce(steps=3)", "square(queries=8)"]}, "differs in attacks"),
        ({"batch_size": 7}, "differs in batch_size"),
        ({"precision": "bf16"}, "differs in precisions"),
        ({"engine": "reference"}, "differs in engine"),
        ({"keep_points": True}, "differs in points"),
    ],
    ids=str,
)
def test_another_audit_does_not_go_on_from_it(small: Small, begun: Path, changes: dict[str, Any], said: str) -> None:
    before = begun.read_bytes()
    with pytest.raises(CheckpointError, match=said) as caught:
        audit(*small, journal=begun, **USUAL | changes)
    assert "\n" not in str(caught.value)
    assert begun.read_bytes() == before


def test_another_model_or_other_images_do_not_go_on_from_it(small: Small, begun: Path) -> None:
    model, data = small
    before = begun.read_bytes()
    with pytest.raises(CheckpointError, match="differs in images"):
        audit(model, data.subset(range(15)), journal=begun, **USUAL)
    with pytest.raises(CheckpointError, match="differs in images"):
        audit(model, replace(data, images=255 - data.images), journal=begun, **USUAL)
    other = deepcopy(model)
    with torch.no_grad():
        other.model.head.weight[0] += 1e-3
    with pytest.raises(CheckpointError, match="differs in model"):
        audit(other, data, journal=begun, **USUAL)
    assert begun.read_bytes() == before


def test_a_half_run_attack_is_not_handed_to_another(
    tiny_net: Net, tiny_data: Callable[..., ImageDataset], tmp_path: Path, at_pass: Any
) -> None:
    model, data, journal = tiny_net(), tiny_data(), tmp_path / "journal"

    def interrupt() -> None:
        raise KeyboardInterrupt

    usual: dict[str, Any] = {"journal": journal, "batch_size": 4, "checks": False}
    with at_pass(model, 30, interrupt), pytest.raises(KeyboardInterrupt):
        audit(model, data, attacks=["pgd-3(restarts=9, freeze=true)", "fgsm"], **usual)
    with pytest.raises(CheckpointError, match="differs in attacks"):
        audit(model, data, attacks=["fgsm", "pgd-3(restarts=9, freeze=true)"], **usual)


def test_another_version_does_not_go_on_from_it(small: Small, begun: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("robustfair.runs.folder._version", lambda package: "0.0.1")
    with pytest.raises(CheckpointError, match=r"differs in version\): delete it to begin"):
        audit(*small, journal=begun, **USUAL)


def test_a_damaged_journal_is_one_clear_error(small: Small, begun: Path) -> None:
    begun.write_bytes(begun.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="delete it to begin the audit anew"):
        audit(*small, journal=begun, **USUAL)


def test_the_same_audit_goes_on_from_it(small: Small, begun: Path, same: Callable[[Audit, Audit], bool]) -> None:
    calls: list[str] = []
    found = audit(*small, journal=begun, on_progress=lambda *call: calls.append(call[0]), **USUAL)
    assert same(found, audit(*small, **USUAL))
    assert not begun.exists()
    assert "clean" not in calls
    assert found.provenance["input_gradients"] == {"images": 16, "zero": 0, "not_finite": 0}
    assert set(found.provenance["seconds"]) == set(found.attacks)


@pytest.mark.parametrize("attacks", ["clean", "pgd-2", "square(queries=3)"])
def test_an_audit_that_is_through_leaves_none(small: Small, tmp_path: Path, attacks: str) -> None:
    audit(*small, attacks=attacks, journal=tmp_path / "a" / "b" / "journal.safetensors")
    assert list(tmp_path.iterdir()) == []


def test_a_finished_audit_can_leave_its_journal(small: Small, tmp_path: Path, same: Callable[..., bool]) -> None:
    keys: dict[str, Any] = {"attacks": "pgd-2,square(queries=3)", "journal": tmp_path / "journal"}
    calls: list[str] = []
    first = audit(*small, keep_journal=True, **keys)
    written = keys["journal"].read_bytes()
    again = audit(*small, keep_journal=True, on_progress=lambda *call: calls.append(call[0]), **keys)
    assert same(first, again)
    assert calls == []
    assert keys["journal"].read_bytes() == written
    audit(*small, **keys)
    assert not keys["journal"].exists()


def test_going_on_never_forgets_what_is_finished(small: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keys: dict[str, Any] = {"attacks": "pgd-2,square(queries=3)", "journal": tmp_path / "journal"}
    audit(*small, keep_journal=True, **keys)

    def refused(*_: object) -> None:
        raise AssertionError("the journal was written")

    monkeypatch.setattr(Journal, "write", refused)
    audit(*small, keep_journal=True, **keys)


def test_a_model_that_is_refused_leaves_none(small: Small, tmp_path: Path) -> None:
    model, data = small
    with pytest.raises(Exception, match="images"):
        audit(model, replace(data, images=data.images[:0], labels=data.labels[:0]), journal=tmp_path / "a" / "journal")
    assert list(tmp_path.iterdir()) == []
