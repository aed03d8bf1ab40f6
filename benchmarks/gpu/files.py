"""What a call of the suite leaves for whoever fetches it: few files of limited size, in one folder.

suite.json      all results, as their own files have them
suite.md        the tables, and a line a task
errors.txt      tracebacks of what failed, where anything did
model-K-of-N.safetensors    weights of the row that stood best, in float32
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from robustfair.files import read_json, write_json, write_text

MOST_FILES, MOST_BYTES = 8, 16 * 2**20
SHARD = 15 * 2**20
"""Bytes of weights in a file: the rest of its limit is for the header."""
SCHEMA = "robustfair.suite-results/1"


def bring(results: Path, out: Path, text: str, schema: str) -> list[Path]:
    """Write results and errors of a results folder into `out`; the files."""
    out.mkdir(parents=True, exist_ok=True)
    found = {path.stem: read_json(path, schema) for path in sorted(results.glob("*.json"))}
    write_json(out / "suite.json", {"schema": SCHEMA, "tasks": found})
    write_text(out / "suite.md", text + "\n")
    paths = [out / "suite.json", out / "suite.md"]
    errors = sorted(results.glob("*.error.txt"))
    if errors:
        told = [f"== {path.name}\n{path.read_text(encoding='utf-8')}" for path in errors]
        write_text(out / "errors.txt", "\n".join(told)[-MOST_BYTES // 2 :])
        paths.append(out / "errors.txt")
    return paths


def bring_weights(weights: Mapping[str, Tensor], out: Path, about: Mapping[str, str]) -> list[Path]:
    """Write weights into `out` in as many files as the limit of one asks for, if so many may be; the files.

    Each holds whole tensors; read all of them and put them together.
    """
    shards: list[dict[str, Tensor]] = [{}]
    for name, tensor in weights.items():
        if shards[-1] and sum(t.nbytes for t in shards[-1].values()) + tensor.nbytes > SHARD:
            shards.append({})
        shards[-1][name] = tensor.detach().cpu().contiguous()
    if len(shards) > MOST_FILES - 3 or any(sum(t.nbytes for t in shard.values()) > SHARD for shard in shards):
        return []
    paths = [out / f"model-{number}-of-{len(shards)}.safetensors" for number in range(1, len(shards) + 1)]
    for path, shard in zip(paths, shards, strict=True):
        save_file(shard, path, metadata=dict(about))
    return paths


def left_out(paths: Sequence[Path]) -> list[str]:
    """What of these files is over the limits."""
    large = [f"{path.name}: {path.stat().st_size:,} bytes" for path in paths if path.stat().st_size > MOST_BYTES]
    return large + [f"{len(paths)} files"] * (len(paths) > MOST_FILES)
