"""A Hub on loopback that the real `huggingface_hub` client can read from and write to.

Model repositories only, LFS and no xet: the client has no fall-back from xet to LFS, so both ways to use this server
switch xet off. The endpoint is read when `huggingface_hub` is imported, hence two ways:

    with HubServer() as hub:
        HfApi(endpoint=hub.url, token=hub.token).create_repo("ada/model")      # this process: pass the endpoint
        subprocess.run([...], env={**os.environ, **hub.env(tmp_path)})         # another process: its environment

The fixture `hub` of `tests/hub/conftest.py` does the first and also points the client's constants here, as
`tests.processes.python` does in processes that it forks.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Mapping
from http.server import ThreadingHTTPServer
from pathlib import Path

from tests.hub_routes import HubHandler
from tests.hub_store import HubError, HubStore, User


class HubServer:
    """Starts on a free port on entering, stops on leaving.

    Args:
        tokens: who may sign in. The first one is `token`.

    Attributes:
        requests: the `(method, path)` of each request so far.
    """

    def __init__(self, tokens: dict[str, User] | None = None) -> None:
        self.tokens = tokens or {
            "hf_loopback_write": User("ada", orgs=("lab",)),
            "hf_loopback_read": User("reader", role="read"),
            "hf_loopback_other": User("eve"),
        }
        self.store = HubStore(self.tokens)
        self.requests: list[tuple[str, str]] = []
        self.faults: list[tuple[str, re.Pattern[str], HubError]] = []
        self.deadly: list[tuple[str, re.Pattern[str]]] = []
        self.is_dead = False
        self.lock = threading.Lock()
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), HubHandler)
        self._http.daemon_threads = True
        self._http.hub = self  # type: ignore[attr-defined]
        self._thread = threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)

    def __enter__(self) -> HubServer:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._http.shutdown()
        self._http.server_close()
        self._thread.join()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._http.server_port}"

    @property
    def storage_url(self) -> str:
        """Where LFS redirects go: another origin on purpose, for the client takes the headers of a redirect
        within one origin from its target, which has no `X-Repo-Commit`."""
        return f"http://localhost:{self._http.server_port}"

    @property
    def token(self) -> str:
        return next(iter(self.tokens))

    def env(self, home: Path, token: str | None = None) -> dict[str, str]:
        """Variables that make another process use this server, with `home` for its caches."""
        return {
            "HF_ENDPOINT": self.url,
            "HF_TOKEN": token or self.token,
            "HF_HOME": str(home),
            "HF_HUB_CACHE": str(home / "hub"),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_OFFLINE": "0",
            "TRANSFORMERS_OFFLINE": "0",
            "NO_PROXY": "127.0.0.1,localhost",
            "no_proxy": "127.0.0.1,localhost",
        }

    @staticmethod
    def constants(environment: Mapping[str, str]) -> dict[str, object]:
        """By name, what libraries made of these variables when they were imported: for a process in which they are already."""
        url = environment["HF_ENDPOINT"]
        return {
            "huggingface_hub.constants.ENDPOINT": url,
            "huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE": url + "/{repo_id}/resolve/{revision}/{filename}",
            "huggingface_hub.constants.HF_HUB_CACHE": environment["HF_HUB_CACHE"],
            "huggingface_hub.constants.HF_TOKEN_PATH": environment["HF_HOME"] + "/token",
            "huggingface_hub.constants.HF_HUB_DISABLE_XET": True,
            "huggingface_hub.constants.HF_HUB_OFFLINE": False,
            # the module-level functions are methods of this one instance
            "huggingface_hub.hf_api.api.endpoint": url,
            # Transformers keeps a client of its own from its first call on
            "transformers.utils.hub._hf_api": None,
            "transformers.dynamic_module_utils.HF_MODULES_CACHE": environment["HF_HOME"] + "/modules",
        }

    def fail(self, method: str, pattern: str, status: int = 500, message: str = "injected", times: int = 1) -> None:
        """Makes the next `times` requests whose path matches `pattern` fail."""
        self.faults += [(method, re.compile(pattern), HubError(status, message))] * times

    def die(self, method: str, pattern: str) -> None:
        """Makes the server die in the middle of the next request whose path matches `pattern`: half of its body is read, and
        there is no answer to it nor to any later one."""
        self.deadly.append((method, re.compile(pattern)))

    def revive(self) -> None:
        """Back to life, with all that had arrived whole."""
        self.deadly.clear()
        self.is_dead = False
