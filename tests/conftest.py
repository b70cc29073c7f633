"""For all tests: a model type that the Transformers at hand does not know, or that can't be built with it, is skipped."""

import pytest
import transformers
from transformers import CONFIG_MAPPING


def pytest_collection_modifyitems(items):
    typed = [item for item in items if "model_type" in getattr(getattr(item, "callspec", None), "params", ())]
    if not typed:
        return
    from tests.reach.zoo import REASONS  # seconds that other tests need not wait

    for item in typed:
        model_type = item.callspec.params["model_type"]
        why = REASONS.get(model_type)
        if model_type not in CONFIG_MAPPING:
            why = f"Transformers {transformers.__version__} does not know it"
        if why:
            item.add_marker(pytest.mark.skip(reason=f"{model_type}: {why}"))
