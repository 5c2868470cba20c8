"""Settings of every test: one thread, no screen, a fixed global seed."""

import os
import sys

# Read when MuJoCo and Matplotlib are first imported, so set before anything imports them.
if sys.platform == "linux" and not os.environ.get("DISPLAY"):
    os.environ.setdefault("MUJOCO_GL", "egl")
os.environ.setdefault("MPLBACKEND", "agg")


import pytest
import torch

# Our networks are too small to gain from threads, and two test processes on two cores would
# fight over them. It also makes sums, and so the figures, the same on every machine size.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """Makes a test's outcome independent of which tests ran before it in its process."""
    torch.manual_seed(0)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)
