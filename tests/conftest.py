"""For all tests: a model type that the Transformers at hand does not know yet is skipped."""

import pytest
import transformers
from transformers import CONFIG_MAPPING


def pytest_collection_modifyitems(items):
    for item in items:
        model_type = getattr(item, "callspec", None) and item.callspec.params.get("model_type")
        if model_type and model_type not in CONFIG_MAPPING:
            reason = f"Transformers {transformers.__version__} does not know {model_type}"
            item.add_marker(pytest.mark.skip(reason=reason))
