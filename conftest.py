"""What several test workers, and the processes that tests start, find: one thread each, and no terminal's size."""

import os

if "PYTEST_XDIST_WORKER" in os.environ:
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        os.environ[name] = "1"
    for name in ("COLUMNS", "LINES"):  # set for the workers; what a command prints would be laid out for them
        os.environ.pop(name, None)
