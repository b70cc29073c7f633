"""A Hub of its own for each test, and the client of this process pointed at it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import HfApi

from tests.hub_server import HubServer


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """A running server; code that takes no `endpoint` argument (`ModelCard.push_to_hub`, `from_pretrained`) lands here as well."""
    with HubServer() as server:
        home = tmp_path / "hf_home"
        environment = server.env(home)
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        for name, constant in server.constants(environment).items():
            monkeypatch.setattr(name, constant)
        huggingface_hub.close_session()  # the shared session may have been opened with a proxy, or for offline use
        yield server
    huggingface_hub.close_session()


@pytest.fixture
def api(hub: HubServer) -> HfApi:
    return HfApi(endpoint=hub.url, token=hub.token)
