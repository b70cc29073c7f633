"""For all tests: a model type that the Transformers at hand does not know, or that can't be built with it, is skipped."""

import pytest
import transformers
from transformers import CONFIG_MAPPING

from tests.reach.zoo import REASONS


def pytest_collection_modifyitems(items):
    for item in items:
        model_type = getattr(item, "callspec", None) and item.callspec.params.get("model_type")
        if model_type and model_type not in CONFIG_MAPPING:
            reason = f"Transformers {transformers.__version__} does not know {model_type}"
            item.add_marker(pytest.mark.skip(reason=reason))
        elif model_type in REASONS:
            item.add_marker(pytest.mark.skip(reason=f"{model_type}: {REASONS[model_type]}"))
