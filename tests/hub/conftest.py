"""A Hub of its own for each test, and the client of this process pointed at it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import HfApi, constants

from tests.hub_server import HubServer


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """A running server. `huggingface_hub` read its endpoint when it was imported, so its constants are patched too:
    code that takes no `endpoint` argument (`ModelCard.push_to_hub`, `from_pretrained`) then lands here as well."""
    with HubServer() as server:
        home = tmp_path / "hf_home"
        for name, value in server.env(home).items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(home / "hub"))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(home / "token"))
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        # The module-level functions are methods of this one instance.
        monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", server.url)
        # Transformers keeps a client of its own from its first call on.
        monkeypatch.setattr("transformers.utils.hub._hf_api", None, raising=False)
        huggingface_hub.close_session()  # the shared session may have been opened with a proxy, or for offline use
        yield server
    huggingface_hub.close_session()


@pytest.fixture
def api(hub: HubServer) -> HfApi:
    return HfApi(endpoint=hub.url, token=hub.token)
