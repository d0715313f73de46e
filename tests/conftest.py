"What the tests share."
import os
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# What a kernel finds. The package copied for it brings compiled functions; unset, `attach` would choose an empty cache.
KERNEL_ENV = {"PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "NUMBA_CACHE_DIR": ""}


@pytest.fixture(scope="session")
def real_ct() -> Path:
    "A folder of real CT, if this machine has one; RSNAPE_CT names it."
    folder = Path(os.environ.get("RSNAPE_CT", ROOT.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no real CT at {folder}; set RSNAPE_CT to a folder of DICOM series")
    return folder


def pytest_sessionfinish():
    if "warm" in sys.modules:
        sys.modules["warm"].close()
