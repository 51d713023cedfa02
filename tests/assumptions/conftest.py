"""What the tests of the monitor share."""

import pytest

from assumptions.monitor.prepare import Talk, prepare
from assumptions.monitor.subject import Subject
from shared.models import ModelConfig


@pytest.fixture(scope="session")
def monitored() -> tuple[Subject, Talk]:
    """The embedded model with the probes that the monitor fits at start."""
    return prepare(ModelConfig("tinyworld"), None, None, None)
