"""What a Hub remembers: users, repositories, commits, references and large objects, all in memory.

`hub_server.py` speaks HTTP and knows nothing of git; this file knows nothing of HTTP. A problem is a [`HubError`]
with the status and the `X-Error-Code` that the real Hub answers, so the client raises what it raises there.
"""

from __future__ import annotations

import base64
import hashlib
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any


class HubError(Exception):
    """An answer other than success: `status`, the Hub's `code` (`X-Error-Code`) and a message for people."""

    def __init__(self, status: int, message: str, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.code = status, message, code


@dataclass(frozen=True)
class User:
    """The owner of a token; `role` is `write` or `read`, `orgs` are the organisations it may write to."""

    name: str
    role: str = "write"
    orgs: tuple[str, ...] = ()


@dataclass(frozen=True)
class Blob:
    """One version of one file."""

    data: bytes
    lfs: bool = False

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.data).hexdigest()

    @property
    def pointer(self) -> bytes:
        """The text that git itself stores for a large file."""
        return b"version https://git-lfs.github.com/spec/v1\noid sha256:%s\nsize %d\n" % (
            self.sha256.encode(),
            len(self.data),
        )

    @property
    def git_oid(self) -> str:
        stored = self.pointer if self.lfs else self.data
        return hashlib.sha1(b"blob %d\0" % len(stored) + stored).hexdigest()

    @property
    def etag(self) -> str:
        return self.sha256 if self.lfs else self.git_oid


@dataclass(frozen=True)
class Commit:
    oid: str
    parent: str | None
    message: str
    description: str
    author: str
    date: str
    files: dict[str, Blob]


@dataclass
class Discussion:
    num: int
    title: str
    author: str
    is_pull_request: bool
    status: str = "open"
    date: str = ""


@dataclass
class Repo:
    """A model repository; a branch is `refs/heads/NAME`, a tag `refs/tags/NAME`, a pull request `refs/pr/N`."""

    id: str
    private: bool
    created: str
    commits: dict[str, Commit] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    discussions: list[Discussion] = field(default_factory=list)

    def ref_name(self, revision: str) -> str | None:
        names = (revision, f"refs/heads/{revision}", f"refs/tags/{revision}")
        return next((name for name in names if name in self.refs), None)

    def commit_at(self, revision: str) -> Commit:
        """The commit that a branch, tag, reference or commit hash names; `RevisionNotFound` otherwise."""
        name = self.ref_name(revision)
        oid = self.refs[name] if name else revision
        if oid not in self.commits:
            raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return self.commits[oid]

    def history(self, revision: str) -> list[Commit]:
        """Newest first."""
        commit: Commit | None = self.commit_at(revision)
        out = []
        while commit is not None:
            out.append(commit)
            commit = self.commits[commit.parent] if commit.parent else None
        return out

    def add_commit(
        self, ref: str, parent: str | None, message: str, description: str, author: str, files: dict[str, Blob]
    ) -> Commit:
        date = now()
        identity = repr((parent, message, date, len(self.commits), sorted((p, b.git_oid) for p, b in files.items())))
        oid = hashlib.sha1(identity.encode()).hexdigest()
        self.commits[oid] = Commit(oid, parent, message, description, author, date, files)
        self.refs[ref] = oid
        return self.commits[oid]

    def discussion(self, num: int) -> Discussion:
        if not 1 <= num <= len(self.discussions):
            raise HubError(404, f"Discussion {num} doesn't exist")
        return self.discussions[num - 1]

    def open_discussion(self, title: str, author: str, is_pull_request: bool) -> Discussion:
        discussion = Discussion(len(self.discussions) + 1, title, author, is_pull_request, date=now())
        self.discussions.append(discussion)
        if is_pull_request:
            self.refs[f"refs/pr/{discussion.num}"] = self.refs["refs/heads/main"]
        return discussion


class HubStore:
    """All repositories, and who may do what with them."""

    def __init__(self, tokens: dict[str, User]) -> None:
        self.tokens = tokens
        self.repos: dict[str, Repo] = {}
        self.large_objects: dict[str, bytes] = {}  # uploaded, by sha256; a commit may then refer to them

    def user(self, authorization: str | None) -> User | None:
        """The token's owner; `None` without a token.

        Raises:
            HubError: 401 for a token that nobody owns. The client tells it from a missing repository by the message.
        """
        if not authorization:
            return None
        user = self.tokens.get(authorization.removeprefix("Bearer ").strip())
        if user is None:
            raise HubError(401, "Invalid credentials in Authorization header")
        return user

    def create(self, user: User | None, name: str, organization: str | None, private: bool) -> Repo:
        user = signed_in(user)
        owner = organization or user.name
        may_write(user, owner)
        repo_id = f"{owner}/{name}"
        if repo_id in self.repos:
            raise HubError(409, f"You already created this model repo: {repo_id}")
        repo = self.repos[repo_id] = Repo(repo_id, private, now())
        attributes = {".gitattributes": Blob(b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n")}
        repo.add_commit("refs/heads/main", None, "initial commit", "", user.name, attributes)
        return repo

    def delete(self, user: User | None, repo_id: str) -> None:
        del self.repos[self.writable(user, repo_id).id]

    def readable(self, user: User | None, repo_id: str) -> Repo:
        repo = self.repos.get(repo_id)
        if repo is None or (repo.private and (user is None or not owns(user, repo_id.split("/")[0]))):
            # To a stranger a private repository looks missing; without a token both are 401, as on the Hub.
            raise HubError(401 if user is None else 404, "Repository not found", "RepoNotFound")
        return repo

    def writable(self, user: User | None, repo_id: str) -> Repo:
        repo = self.readable(user, repo_id)
        may_write(signed_in(user), repo_id.split("/")[0])
        return repo

    def commit(
        self, user: User | None, repo_id: str, revision: str, lines: list[dict[str, Any]], create_pr: bool
    ) -> tuple[Commit, Discussion | None]:
        """Applies one NDJSON commit (`header`, `file`, `lfsFile`, `deletedFile`, `deletedFolder`)."""
        repo = self.readable(user, repo_id) if create_pr else self.writable(user, repo_id)
        author = signed_in(user).name
        parent = repo.commit_at(revision)
        header: dict[str, Any] = {}
        files = dict(parent.files)
        for line in lines:
            value = line["value"]
            match line["key"]:
                case "header":
                    header = value
                case "file":
                    if value.get("encoding") != "base64":
                        raise HubError(400, f"{value['path']}: unknown encoding {value.get('encoding')!r}")
                    files[value["path"]] = Blob(base64.b64decode(value["content"], validate=True))
                case "lfsFile":
                    if value["oid"] not in self.large_objects:
                        raise HubError(400, f"{value['path']}: LFS object {value['oid']} was never uploaded")
                    files[value["path"]] = Blob(self.large_objects[value["oid"]], lfs=True)
                case "deletedFile":
                    if files.pop(value["path"], None) is None:
                        raise HubError(404, f"A file with this name doesn't exist: {value['path']}", "EntryNotFound")
                case "deletedFolder":
                    prefix = value["path"].rstrip("/") + "/"
                    files = {path: blob for path, blob in files.items() if not path.startswith(prefix)}
                case key:
                    raise HubError(400, f"Unknown operation {key!r} in commit")
        if not header.get("summary"):
            raise HubError(400, "A commit needs a summary")
        if header.get("parentCommit") not in (None, parent.oid):
            raise HubError(412, "A commit has happened since. Please refresh and try again.")
        discussion = repo.open_discussion(header["summary"], author, True) if create_pr else None
        ref = f"refs/pr/{discussion.num}" if discussion else repo.ref_name(revision)
        if ref is None or ref.startswith("refs/tags/"):
            raise HubError(400, f"{revision!r} is not a branch: commits go to branches and pull requests")
        description = header.get("description", "")
        return repo.add_commit(ref, parent.oid, header["summary"], description, author, files), discussion

    def merge(self, user: User | None, repo_id: str, num: int) -> None:
        repo = self.writable(user, repo_id)
        discussion = repo.discussion(num)
        if not discussion.is_pull_request or discussion.status == "merged":
            raise HubError(400, f"Discussion {num} is not an open pull request")
        proposed, main = repo.commit_at(f"refs/pr/{num}"), repo.commit_at("main")
        author = signed_in(user).name
        repo.add_commit("refs/heads/main", main.oid, f"{discussion.title} (#{num})", "", author, dict(proposed.files))
        discussion.status = "merged"


def owns(user: User, owner: str) -> bool:
    return owner == user.name or owner in user.orgs


def signed_in(user: User | None) -> User:
    if user is None:
        raise HubError(401, "Invalid username or password.")
    return user


def may_write(user: User, owner: str) -> None:
    if user.role != "write" or not owns(user, owner):
        raise HubError(403, f"Forbidden: you don't have the rights to write under the namespace {owner!r}")


def now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%f")[:-3] + "Z"
