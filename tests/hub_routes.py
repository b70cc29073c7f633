"""The Hub's HTTP interface, as far as `huggingface_hub` uses it for models: each route and its answer."""

from __future__ import annotations

import json
import re
import traceback
from http.server import BaseHTTPRequestHandler
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

from tests.hub_metadata import check_card
from tests.hub_store import Blob, Discussion, HubError, Repo, signed_in


if TYPE_CHECKING:
    from tests.hub_server import HubServer

REGULAR_LIMIT = 10 * 1024 * 1024  # larger files go through LFS, as on the Hub
LFS_SUFFIXES = (".safetensors", ".bin", ".pt", ".onnx", ".gguf", ".npz")


class HubHandler(BaseHTTPRequestHandler):
    """One request: read the body, find the route, answer. Groups of a route are matched on the raw path and then
    unquoted one by one, since a revision such as `refs%2Fpr%2F1` is one segment."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, *_: object) -> None:
        pass

    def _dispatch(self) -> None:
        hub: HubServer = self.server.hub  # type: ignore[attr-defined]
        self.hub, self.store = hub, hub.store
        url = urlsplit(self.path)
        self.query = {key: values[-1] for key, values in parse_qs(url.query).items()}
        hub.requests.append((self.command, url.path))
        if hub.is_dead or any(method == self.command and path.search(url.path) for method, path in hub.deadly):
            hub.is_dead = self.close_connection = True
            self.rfile.read(int(self.headers.get("Content-Length") or 0) // 2)
            self.connection.close()
            return
        self.body = self._read_body()  # always, else the next request on this connection starts inside it
        try:
            with hub.lock:
                for fault in hub.faults:
                    if fault[0] == self.command and fault[1].search(url.path):
                        hub.faults.remove(fault)
                        raise fault[2]
                for methods, pattern, handle in ROUTES:
                    match = pattern.fullmatch(url.path)
                    if match and self.command in methods:
                        # A signed storage address carries no token; everything else is checked first.
                        stored = url.path.startswith("/storage/")
                        self.user = None if stored else self.store.user(self.headers.get("Authorization"))
                        groups = {k: unquote(v) if v is not None else None for k, v in match.groupdict().items()}
                        handle(self, **groups)
                        return
            raise HubError(404, f"Sorry, {self.command} {url.path} is not something this server knows")
        except HubError as error:
            self.send_error_answer(error)
        except Exception:
            # Said in the answer: a connection that merely closes tells the test nothing.
            self.send_error_answer(HubError(500, traceback.format_exc().replace("\n", " | ")))

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = _dispatch  # noqa: N815 - the names that http.server looks for

    def _read_body(self) -> bytes:
        if "chunked" in self.headers.get("Transfer-Encoding", "").lower():
            parts = []
            while size := int(self.rfile.readline().split(b";")[0], 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def json(self) -> dict[str, Any]:
        return json.loads(self.body or b"{}")

    # Answers.

    def send(self, status: int, data: bytes = b"", headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for key, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def send_json(self, value: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self.send(status, json.dumps(value).encode(), {"Content-Type": "application/json", **(headers or {})})

    def send_error_answer(self, error: HubError) -> None:
        headers = {"X-Error-Message": error.message}
        if error.code:
            headers["X-Error-Code"] = error.code
        self.send_json({"error": error.message}, error.status, headers)

    # Account and repositories.

    def whoami(self) -> None:
        user = signed_in(self.user)
        token = {"type": "access_token", "accessToken": {"displayName": "loopback", "role": user.role}}
        orgs = [{"type": "org", "name": name} for name in user.orgs]
        self.send_json({"type": "user", "id": user.name, "name": user.name, "orgs": orgs, "auth": token})

    def create_repo(self) -> None:
        body = self.json()
        if body.get("type", "model") != "model":
            raise HubError(400, "This server holds models only")
        private = body.get("visibility") == "private" or bool(body.get("private"))
        try:
            repo = self.store.create(self.user, body["name"], body.get("organization"), private)
        except HubError as error:
            if error.status != 409:
                raise
            # The client reads the address out of the refusal when it was told that existing is fine.
            repo_id = f"{body.get('organization') or signed_in(self.user).name}/{body['name']}"
            self.send_json({"error": error.message, "url": f"{self.hub.url}/{repo_id}"}, 409)
            return
        self.send_json({"url": f"{self.hub.url}/{repo.id}", "name": repo.id, "id": repo.id})

    def delete_repo(self) -> None:
        body = self.json()
        owner = body.get("organization") or signed_in(self.user).name
        self.store.delete(self.user, f"{owner}/{body['name']}")
        self.send_json({})

    def validate_yaml(self) -> None:
        errors, warnings = check_card(self.json()["content"])
        answer = {"errors": [{"message": e} for e in errors], "warnings": [{"message": w} for w in warnings]}
        self.send_json(answer, 400 if errors else 200)

    def model_info(self, repo: str, rev: str | None = None) -> None:
        found = self.store.readable(self.user, repo)
        commit = found.commit_at(rev or "main")
        card = _card_data(commit.files.get("README.md"))
        siblings = []
        for path, blob in sorted(commit.files.items()):
            detail = {"size": len(blob.data), "blobId": blob.git_oid, **_lfs(blob)} if "blobs" in self.query else {}
            siblings.append({"rfilename": path, **detail})
        answer = {"id": found.id, "modelId": found.id, "author": found.id.split("/")[0], "sha": commit.oid}
        answer |= {"private": found.private, "gated": False, "disabled": False, "downloads": 0, "likes": 0}
        answer |= {"createdAt": found.created, "lastModified": commit.date, "siblings": siblings}
        answer |= {"cardData": card, "tags": card.get("tags", [])}
        self.send_json(answer | {key: card[key] for key in ("library_name", "pipeline_tag") if key in card})

    # Writing.

    def preupload(self, repo: str, rev: str) -> None:
        files = self.store.readable(self.user, repo).commit_at(rev).files
        answer = []
        for item in self.json()["files"]:
            large = item["size"] > REGULAR_LIMIT or item["path"].endswith(LFS_SUFFIXES)
            blob = files.get(item["path"])
            entry = {"path": item["path"], "uploadMode": "lfs" if large else "regular", "shouldIgnore": False}
            answer.append(entry | {"oid": blob.etag if blob else None})
        self.send_json({"files": answer, "commitOid": self.store.readable(self.user, repo).commit_at(rev).oid})

    def lfs_batch(self, repo: str) -> None:
        self.store.readable(self.user, repo)
        signed_in(self.user)
        objects = []
        for item in self.json()["objects"]:
            entry: dict[str, Any] = {"oid": item["oid"], "size": item["size"], "authenticated": True}
            if item["oid"] not in self.store.large_objects:
                entry["actions"] = {
                    "upload": {"href": f"{self.hub.storage_url}/storage/{item['oid']}", "header": {}},
                    "verify": {"href": f"{self.hub.url}/{repo}.git/info/lfs/objects/verify", "header": {}},
                }
            objects.append(entry)
        self.send_json({"transfer": "basic", "objects": objects})

    def storage_put(self, oid: str) -> None:
        if Blob(self.body).sha256 != oid:
            raise HubError(400, f"The bytes received don't hash to {oid}")
        self.store.large_objects[oid] = self.body
        self.send(200)

    def lfs_verify(self, repo: str) -> None:
        item = self.json()
        data = self.store.large_objects.get(item["oid"])
        if data is None or len(data) != item["size"]:
            raise HubError(404, f"LFS object {item['oid']} of {item['size']} bytes was not received")
        self.send_json({})

    def commit(self, repo: str, rev: str) -> None:
        lines = [json.loads(line) for line in self.body.splitlines() if line.strip()]
        commit, discussion = self.store.commit(self.user, repo, rev, lines, self.query.get("create_pr") == "1")
        answer = {"success": True, "commitOid": commit.oid, "commitUrl": f"{self.hub.url}/{repo}/commit/{commit.oid}"}
        if discussion:
            answer["pullRequestUrl"] = f"{self.hub.url}/{repo}/discussions/{discussion.num}"
        self.send_json(answer)

    # Reading.

    def tree(self, repo: str, rev: str, path: str | None = None) -> None:
        files = self.store.readable(self.user, repo).commit_at(rev).files
        prefix = f"{path.rstrip('/')}/" if path else ""
        recursive = self.query.get("recursive", "").lower() in ("1", "true")
        entries: dict[str, dict[str, Any]] = {}
        for name, blob in sorted(files.items()):
            if not name.startswith(prefix):
                continue
            parts = name[len(prefix) :].split("/")
            for depth in range(1, len(parts) if recursive else min(2, len(parts))):
                folder = prefix + "/".join(parts[:depth])
                entries[folder] = {"type": "directory", "path": folder, "oid": "0" * 40, "size": 0}
            if recursive or len(parts) == 1:
                entries[name] = _file_entry(name, blob)
        if path and not entries:
            raise HubError(404, f"{path} does not exist on {rev!r}", "EntryNotFound")
        self.send_json(list(entries.values()))

    def paths_info(self, repo: str, rev: str) -> None:
        files = self.store.readable(self.user, repo).commit_at(rev).files
        # The one request whose body is a form, with `paths` repeated.
        paths = parse_qs(self.body.decode())["paths"]
        self.send_json([_file_entry(path, files[path]) for path in paths if path in files])

    def commits(self, repo: str, rev: str) -> None:
        history = self.store.readable(self.user, repo).history(rev)
        answer = [
            {
                "id": c.oid,
                "title": c.message,
                "message": c.description,
                "date": c.date,
                "authors": [{"user": c.author}],
            }
            for c in history
        ]
        self.send_json(answer if self.query.get("p", "0") == "0" else [], headers={"X-Total-Count": str(len(answer))})

    def resolve(self, repo: str, rev: str, path: str) -> None:
        commit = self.store.readable(self.user, repo).commit_at(rev)
        blob = commit.files.get(path)
        headers = {"X-Repo-Commit": commit.oid, "Accept-Ranges": "bytes"}
        if blob is None:
            error = {"X-Error-Code": "EntryNotFound", "X-Error-Message": "Entry not found"}
            self.send_json({"error": "Entry not found"}, 404, headers | error)
        elif blob.lfs:
            location = f"{self.hub.storage_url}/storage/{blob.sha256}"
            linked = {"X-Linked-ETag": f'"{blob.etag}"', "X-Linked-Size": str(len(blob.data)), "Location": location}
            self.send(302, b"", headers | linked | {"ETag": f'"{blob.git_oid}"'})
        else:
            self._send_range(blob.data, headers | {"ETag": f'"{blob.etag}"'})

    def storage_get(self, oid: str) -> None:
        if oid not in self.store.large_objects:
            raise HubError(404, "No such object")
        self._send_range(self.store.large_objects[oid], {"ETag": f'"{oid}"'})

    def _send_range(self, data: bytes, headers: dict[str, str]) -> None:
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if asked is None:
            # A HEAD says how long the file is, which `send` does by itself.
            self.send(200, data, headers)
            return
        start, end = int(asked[1]), min(int(asked[2] or len(data) - 1), len(data) - 1)
        if start >= len(data):
            raise HubError(416, "Range not satisfiable")
        headers["Content-Range"] = f"bytes {start}-{end}/{len(data)}"
        self.send(206, data[start : end + 1], headers)

    # References, and discussions in as much detail as pull requests need.

    def refs(self, repo: str) -> None:
        found = self.store.readable(self.user, repo)
        kinds = {"branches": "refs/heads/", "tags": "refs/tags/", "pullRequests": "refs/pr/"}
        answer: dict[str, list[dict[str, str]]] = {"converts": []}
        for kind, prefix in kinds.items():
            named = [(ref, oid) for ref, oid in found.refs.items() if ref.startswith(prefix)]
            answer[kind] = [{"name": ref.removeprefix(prefix), "ref": ref, "targetCommit": oid} for ref, oid in named]
        self.send_json(answer)

    def create_ref(self, repo: str, kind: str, rev: str) -> None:
        found = self.store.writable(self.user, repo)
        body = self.json()
        # A branch is named in the path and starts at `startingPoint`; a tag is named in the body, of the path's commit.
        heads = kind == "branch"
        ref = f"refs/heads/{rev}" if heads else f"refs/tags/{body['tag']}"
        if ref in found.refs:
            raise HubError(409, f"Reference {ref} already exists")
        found.refs[ref] = found.commit_at(body.get("startingPoint", "main") if heads else rev).oid
        self.send_json({})

    def delete_ref(self, repo: str, kind: str, rev: str) -> None:
        found = self.store.writable(self.user, repo)
        ref = f"refs/{'heads' if kind == 'branch' else 'tags'}/{rev}"
        if found.refs.pop(ref, None) is None:
            raise HubError(404, f"Reference {ref} doesn't exist", "RevisionNotFound")
        self.send_json({})

    def discussions(self, repo: str) -> None:
        found = self.store.readable(self.user, repo)
        if self.command == "POST":
            body = self.json()
            opened = found.open_discussion(body["title"], signed_in(self.user).name, bool(body.get("pullRequest")))
            self.send_json(_discussion(found, opened))
            return
        listed = [_discussion(found, item) for item in found.discussions]
        self.send_json({"discussions": listed, "count": len(listed), "start": 0})

    def discussion(self, repo: str, num: str) -> None:
        found = self.store.readable(self.user, repo)
        changes = {"changes": {"base": "refs/heads/main"}, "filesWithConflicts": [], "events": []}
        self.send_json(_discussion(found, found.discussion(int(num))) | changes)

    def merge(self, repo: str, num: str) -> None:
        self.store.merge(self.user, repo, int(num))
        self.send_json({})


def _lfs(blob: Blob) -> dict[str, Any]:
    if not blob.lfs:
        return {}
    pointer = {"size": len(blob.data), "pointerSize": len(blob.pointer)}
    return {"lfs": {"oid": blob.sha256, "sha256": blob.sha256, **pointer}}


def _file_entry(path: str, blob: Blob) -> dict[str, Any]:
    return {"type": "file", "path": path, "size": len(blob.data), "oid": blob.git_oid, **_lfs(blob)}


def _card_data(readme: Blob | None) -> dict[str, Any]:
    header = re.match(rb"---\n(.*?)\n---", readme.data, flags=re.DOTALL) if readme else None
    return (yaml.safe_load(header[1]) or {}) if header else {}


def _discussion(repo: Repo, item: Discussion) -> dict[str, Any]:
    about = {"num": item.num, "title": item.title, "status": item.status, "createdAt": item.date}
    about |= {"author": {"name": item.author}, "isPullRequest": item.is_pull_request}
    return about | {"repo": {"name": repo.id, "type": "model"}}


_REPO = r"(?P<repo>[^/]+/[^/]+?)"
# reading a data set is reading a model under another name
_API = rf"/api/(?:models|datasets)/{_REPO}"
_REV = r"(?P<rev>[^/]+)"
ROUTES = [
    (methods.split(), re.compile(pattern), handle)
    for methods, pattern, handle in (
        ("GET", r"/api/whoami-v2", HubHandler.whoami),
        ("POST", r"/api/repos/create", HubHandler.create_repo),
        ("DELETE", r"/api/repos/delete", HubHandler.delete_repo),
        ("POST", r"/api/validate-yaml", HubHandler.validate_yaml),
        ("GET", rf"{_API}(?:/revision/{_REV})?", HubHandler.model_info),
        ("POST", rf"{_API}/preupload/{_REV}", HubHandler.preupload),
        ("POST", rf"{_API}/commit/{_REV}", HubHandler.commit),
        ("GET", rf"{_API}/commits/{_REV}", HubHandler.commits),
        ("GET", rf"{_API}/tree/{_REV}(?:/(?P<path>.+))?", HubHandler.tree),
        ("POST", rf"{_API}/paths-info/{_REV}", HubHandler.paths_info),
        ("GET", rf"{_API}/refs", HubHandler.refs),
        ("POST", rf"{_API}/(?P<kind>branch|tag)/{_REV}", HubHandler.create_ref),
        ("DELETE", rf"{_API}/(?P<kind>branch|tag)/{_REV}", HubHandler.delete_ref),
        ("GET POST", rf"{_API}/discussions", HubHandler.discussions),
        ("GET", rf"{_API}/discussions/(?P<num>\d+)", HubHandler.discussion),
        ("POST", rf"{_API}/discussions/(?P<num>\d+)/merge", HubHandler.merge),
        ("POST", rf"/{_REPO}\.git/info/lfs/objects/batch", HubHandler.lfs_batch),
        ("POST", rf"/{_REPO}\.git/info/lfs/objects/verify", HubHandler.lfs_verify),
        ("PUT", r"/storage/(?P<oid>[0-9a-f]{64})", HubHandler.storage_put),
        ("GET HEAD", r"/storage/(?P<oid>[0-9a-f]{64})", HubHandler.storage_get),
        ("GET HEAD", rf"(?:/datasets)?/{_REPO}/resolve/{_REV}/(?P<path>.+)", HubHandler.resolve),
    )
]
