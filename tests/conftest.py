"""Shared by all tests: quiet libraries, hypothesis without a deadline, real data where it lies beside us."""

import os
import signal
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Tests run side by side: threads that wait for each other on busy cores make a step ten times slower.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("PREFECT_SERVER_ANALYTICS_ENABLED", "false")
os.environ.setdefault("DO_NOT_TRACK", "1")

# A shell that runs the tests in the background has interrupts ignored, and so would all processes started here.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Files are written in most properties: a deadline would measure the disk.
# In CI the examples are the same each time: a new find belongs to whoever runs the tests, not to a submission.
settings.register_profile(
    "sft",
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
    derandomize=bool(os.environ.get("CI")),
)
settings.load_profile("sft")

ROOT = Path(__file__).parent.parent
REAL_DATA = ROOT.parent / "shared" / "data"
SMOLLM = ROOT / ".cache" / "models" / "smollm2-135m-instruct"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip, with the reason, what needs data or a model that is not on this machine."""
    present = {
        "real_data": (REAL_DATA.is_dir(), f"real data is absent: no folder {REAL_DATA}"),
        "real_tokenizers": (REAL_DATA.is_dir(), f"real tokenizers are absent: no folder {REAL_DATA}"),
        "smollm": (SMOLLM.is_dir(), "the demo's model is absent: run `make demo-model`"),
    }
    for item in items:
        for marker, (is_there, reason) in present.items():
            if item.get_closest_marker(marker) is not None and not is_there:
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session")
def real_data() -> Path:
    """Folder of published data beside the checkout; only for tests marked real_data or real_tokenizers."""
    return REAL_DATA


@pytest.fixture(scope="session")
def smollm() -> Path:
    """Folder of the demo's model; only for tests marked smollm."""
    return SMOLLM
