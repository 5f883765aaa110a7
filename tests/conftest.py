import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # the tests run side by side; a thread each keeps them from fighting
os.environ.setdefault("PRIORHOLE_WORKERS", "1")  # where a test is not about workers, none takes its seconds to start
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")

import pytest
import torch


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)
