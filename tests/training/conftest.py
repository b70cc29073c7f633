"""Each test begins without what Accelerate keeps for the whole process: a Trainer in bf16 would leave its autocast to the next."""

import pytest
from accelerate.state import AcceleratorState, GradientState


@pytest.fixture(autouse=True)
def of_its_own_precision():
    yield
    AcceleratorState._reset_state()  # as in Accelerate's own test cases
    GradientState._reset_state()
