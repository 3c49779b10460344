"""What the tests share. pytest reads this before any test file, so before torch is imported."""

import os

# xdist runs one worker for each core; more threads would only wait for one another.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest

import data
import models
from lab import plane


@pytest.fixture(scope="session")
def emoji():
    """The embedded teacher. It belongs to all tests: leave it as it is."""
    return models.load_model(data.model_path(None))


@pytest.fixture(scope="session")
def plane_model():
    """The plane's teacher, the same way."""
    return plane.PlaneModel("gmm")
