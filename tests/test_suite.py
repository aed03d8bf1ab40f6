"""How the suite itself runs: threads of its workers, and what becomes of a test that hangs."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
THREADS = "import torch; print(torch.get_num_threads())"
HANGS = """
def test_before():
    pass

def test_that_hangs():
    while True:
        pass
"""


@pytest.mark.skipif("PYTEST_XDIST_WORKER" not in os.environ, reason="not in a worker")
def test_a_worker_and_the_processes_it_starts_have_one_thread() -> None:
    child = subprocess.run([sys.executable, "-c", THREADS], capture_output=True, text=True, check=True)
    assert torch.get_num_threads() == int(child.stdout) == 1


def test_a_test_that_hangs_is_stopped_and_named_and_the_rest_goes_on(tmp_path: Path) -> None:
    options = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["pytest"]["ini_options"]
    assert options["faulthandler_exit_on_timeout"]
    assert 60 <= options["faulthandler_timeout"] <= 600
    (tmp_path / "pytest.ini").write_text("[pytest]\nfaulthandler_timeout = 2\nfaulthandler_exit_on_timeout = true\n")
    (tmp_path / "test_it.py").write_text(HANGS)
    (tmp_path / "test_other.py").write_text("def test_after():\n    pass\n")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-n", "1", str(tmp_path)]
    child = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert child.returncode == 1
    assert "crashed while running 'test_it.py::test_that_hangs'" in child.stdout
    assert "1 failed, 2 passed" in child.stdout
    assert "in test_that_hangs" in child.stderr
