"""The Hub's protocol, as huggingface_hub speaks it, over a directory: enough to create, push to, list and read model repositories.

It answers as huggingface.co does, headers and status codes included, with plain git-LFS uploads. What it is sent is kept, and it can
be told to fail: to drop an upload in the middle, or to answer a request with a status of one's choice.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import socket
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import yaml

LARGE = 1_000_000  # bytes from which a file goes to LFS; the Hub's own limit is ten times that
BINARY = (".safetensors", ".onnx", ".png", ".wasm")


def git_hash(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class HubServer(ThreadingHTTPServer):
    """Repositories under `directory`: large files by their sha256 in lfs/, and a JSON file of commits for each repository."""

    daemon_threads = True

    def __init__(self, directory: Path, tokens: dict[str, str]) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.directory, self.tokens = directory, tokens  # a token's user; one that ends in _read may not write
        (directory / "lfs").mkdir()
        (directory / "repositories").mkdir()
        self.writing = threading.Lock()
        self.requests: list[tuple[str, str, Any]] = []  # method, path and the JSON that was sent, if it was
        self.uploads: list[str] = []  # the sha256 of every file that arrived
        self.unknown: list[str] = []  # requests that this server cannot answer: a test's own check that it is complete
        self.drop_uploads = 0  # how many of the next uploads to cut off in the middle
        self.dropping = threading.Event()
        self.statuses: dict[str, int] = {}  # what to answer to every path that ends so
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def handle_error(self, request: Any, client_address: Any) -> None:
        error = sys.exc_info()[1]
        if not isinstance(error, ConnectionError):  # a client that was killed
            self.unknown.append(repr(error))

    def repository(self, name: str) -> dict[str, Any] | None:
        path = self._path(name)
        return json.loads(path.read_text()) if path.is_file() else None

    def write(self, name: str, repository: dict[str, Any]) -> None:
        new = self._path(name).with_suffix(".new")
        new.write_text(json.dumps(repository))
        new.replace(self._path(name))  # another request may be reading it

    def _path(self, name: str) -> Path:
        return self.directory / "repositories" / (name.replace("/", "--") + ".json")

    def files(self, name: str) -> dict[str, dict[str, Any]]:
        """The files of a repository's newest commit."""
        repository = self.repository(name)
        assert repository is not None
        return repository["commits"][-1]["files"]

    def content(self, file: dict[str, Any]) -> bytes:
        if "lfs" in file:
            return (self.directory / "lfs" / file["lfs"]).read_bytes()
        return base64.b64decode(file["content"])

    def commit(self, name: str, title: str, changes: dict[str, dict[str, Any] | None]) -> str:
        """Add a commit; `changes` maps a path to its file, or to None where it is deleted."""
        repository = self.repository(name)
        assert repository is not None
        files = dict(repository["commits"][-1]["files"]) if repository["commits"] else {}
        for path, file in changes.items():
            if file is None:
                del files[path]
            else:
                files[path] = file
        identity = json.dumps([repository["commits"], title, files], sort_keys=True)
        oid = hashlib.sha1(identity.encode()).hexdigest()
        repository["commits"].append({"oid": oid, "title": title, "files": files})
        self.write(name, repository)
        return oid


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: HubServer

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        self.route()

    do_HEAD = do_POST = do_PUT = do_GET

    def route(self) -> None:
        path = unquote(urlsplit(self.path).path)
        if self.command == "PUT" and path.startswith("/upload/"):
            return self.upload(path.removeprefix("/upload/"))
        body = b"".join(self.body())
        kind = self.headers.get("Content-Type", "")  # LFS has a JSON of its own
        sent = json.loads(body) if kind.endswith("json") and not kind.endswith("ndjson") else None
        self.server.requests.append((self.command, path, sent))
        for ending, status in self.server.statuses.items():
            if path.endswith(ending):
                return self.refuse(status, "the server was told to fail")
        routes: dict[str, Any] = {
            r"GET /api/whoami-v2": self.whoami,
            r"GET /api/agent-harnesses": lambda: self.refuse(404, "none", "EntryNotFound"),
            r"POST /api/repos/create": self.create,
            r"POST /api/validate-yaml": self.validate,
            r"GET /api/models/([^/]+/[^/]+)(?:/revision/([^/]+))?": self.info,
            r"GET /api/models/([^/]+/[^/]+)/tree/([^/]+)(?:/(.+))?": self.tree,
            r"GET /api/models/([^/]+/[^/]+)/commits/([^/]+)": self.commits,
            r"POST /api/models/([^/]+/[^/]+)/preupload/([^/]+)": self.preupload,
            r"POST /api/models/([^/]+/[^/]+)/commit/([^/]+)": self.commit,
            r"POST /([^/]+/[^/]+)\.git/info/lfs/objects/batch": self.batch,
            r"POST /verify/(\w+)": self.verify,
            r"(?:GET|HEAD) /([^/]+/[^/]+)/resolve/([^/]+)/(.+)": self.resolve,
            r"(?:GET|HEAD) /cdn/(\w+)": self.download,
        }
        for pattern, answer in routes.items():
            if found := re.fullmatch(pattern, f"{self.command} {path}"):
                return answer(*found.groups(), **({"sent": sent} if sent is not None else {}), **self.lines(body, path))
        self.server.unknown.append(f"{self.command} {path}")
        return self.refuse(404, "no such page", "EntryNotFound")

    def lines(self, body: bytes, path: str) -> dict[str, Any]:
        """A commit comes as one JSON object a line."""
        return {"lines": [json.loads(line) for line in body.splitlines()]} if "/commit/" in path else {}

    def body(self) -> Iterator[bytes]:
        """What was sent, in parts.

        Raises:
            ConnectionError: the client was gone before it had sent all of it.
        """
        if self.headers.get("Transfer-Encoding") == "chunked":
            while size := int(self.sent(self.rfile.readline()), 16):
                yield self.sent(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
        else:
            left = int(self.headers.get("Content-Length", 0))
            while left:
                part = self.sent(self.rfile.read(min(left, 65536)))
                left -= len(part)
                yield part

    def sent(self, part: bytes) -> bytes:
        if not part:
            raise ConnectionAbortedError("the client is gone")
        return part

    def answer(self, value: Any, status: int = 200, **headers: str) -> None:
        self.send(json.dumps(value).encode(), status, {"Content-Type": "application/json", **headers})

    def send(self, content: bytes, status: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def refuse(self, status: int, message: str, code: str = "") -> None:
        headers = {"X-Error-Message": message} | ({"X-Error-Code": code} if code else {})
        self.answer({"error": message}, status, **headers)

    # Who asks, and for what

    @property
    def token(self) -> str:
        return self.headers.get("Authorization", "").removeprefix("Bearer ")

    def user(self) -> str | None:
        """Who asks; a token that is not known gets its refusal here."""
        if self.token not in self.server.tokens:
            self.refuse(401, "Invalid username or password.")
            return None
        return self.server.tokens[self.token]

    def readable(self, name: str) -> dict[str, Any] | None:
        repository = self.server.repository(name)
        is_owner = self.server.tokens.get(self.token) == name.split("/")[0]
        if repository is None or (repository["private"] and not is_owner):
            self.refuse(401 if not self.token else 404, "Repository not found", "RepoNotFound")
            return None
        return repository

    def writable(self, name: str) -> dict[str, Any] | None:
        user = self.user()
        if user is None:
            return None
        if user != name.split("/")[0] or self.token.endswith("_read"):
            self.refuse(403, f"You don't have the rights to write to {name}")
            return None
        return self.readable(name)

    # Accounts and repositories

    def whoami(self) -> None:
        if user := self.user():
            self.answer({"type": "user", "name": user, "auth": {"type": "access_token"}})

    def create(self, sent: dict[str, Any]) -> None:
        user = self.user()
        if user is None:
            return None
        owner = sent.get("organization") or user
        if owner != user or self.token.endswith("_read"):
            return self.refuse(403, f"You don't have the rights to create a model under the namespace {owner!r}")
        name = f"{owner}/{sent['name']}"
        with self.server.writing:
            exists = self.server.repository(name) is not None
            if not exists:
                self.server.write(name, {"private": sent.get("visibility") == "private", "commits": []})
                content = base64.b64encode(b"*.safetensors filter=lfs\n").decode()
                self.server.commit(name, "initial commit", {".gitattributes": {"content": content}})
        value = {"url": f"{self.server.address}/{name}", "name": name, "id": name}
        if exists:
            return self.answer({**value, "error": "You already created this model repo"}, 409)
        return self.answer(value)

    def validate(self, sent: dict[str, Any]) -> None:
        try:
            header = yaml.safe_load(sent["content"].split("---\n")[1])
            errors = [] if isinstance(header, dict) else ["no metadata"]
        except (IndexError, yaml.YAMLError) as error:
            errors = [str(error)]
        self.answer({"errors": [{"message": error} for error in errors], "warnings": []}, 400 if errors else 200)

    def info(self, name: str, revision: str | None) -> None:
        repository = self.readable(name)
        if repository is not None and (commit := self.find(repository, revision or "main")):
            siblings = [{"rfilename": path} for path in commit["files"]]
            self.answer(
                {"id": name, "modelId": name, "sha": commit["oid"], "private": repository["private"], "siblings": siblings}
            )  # fmt: skip

    def find(self, repository: dict[str, Any], revision: str) -> dict[str, Any] | None:
        for commit in reversed(repository["commits"]):
            if revision in ("main", commit["oid"]):
                return commit
        self.refuse(404, "Invalid rev id", "RevisionNotFound")
        return None

    def commits(self, name: str, revision: str) -> None:
        repository = self.readable(name)
        if repository is not None:
            listed = [
                {"id": commit["oid"], "title": commit["title"], "message": "", "authors": [], "date": "2026-01-01T00:00:00.000Z"}
                for commit in reversed(repository["commits"])
            ]  # fmt: skip
            self.answer(listed)

    def tree(self, name: str, revision: str, folder: str | None) -> None:
        repository = self.readable(name)
        if repository is None or (commit := self.find(repository, revision)) is None:
            return None
        entries: list[dict[str, Any]] = []
        for path, file in commit["files"].items():
            if folder is None or path.startswith(f"{folder}/"):
                content = self.server.content(file)
                entry = {"type": "file", "path": path, "size": len(content), "oid": git_hash(content)}
                lfs = {"oid": file["lfs"], "size": len(content), "pointerSize": 130} if "lfs" in file else None
                entries.append(entry | ({"lfs": lfs} if lfs else {}))
        if folder is not None and not entries:
            return self.refuse(404, f"{folder} does not exist", "EntryNotFound")
        return self.answer(entries)

    # Writing

    def preupload(self, name: str, revision: str, sent: dict[str, Any]) -> None:
        repository = self.writable(name)
        if repository is None or (commit := self.find(repository, revision)) is None:
            return
        files = []
        for file in sent["files"]:
            large = file["size"] >= LARGE or file["path"].endswith(BINARY)
            known = commit["files"].get(file["path"])
            oid = None if known is None else known.get("lfs") or git_hash(self.server.content(known))
            mode = "lfs" if large else "regular"
            files.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        self.answer({"files": files})

    def batch(self, name: str, sent: dict[str, Any]) -> None:
        if self.writable(name) is None:
            return
        objects = []
        for wanted in sent["objects"]:
            if not (self.server.directory / "lfs" / wanted["oid"]).is_file():
                upload, verify = (f"{self.server.address}/{step}/{wanted['oid']}" for step in ("upload", "verify"))
                wanted = wanted | {"actions": {"upload": {"href": upload}, "verify": {"href": verify}}}
            objects.append(wanted)
        self.answer({"transfer": "basic", "objects": objects})

    def upload(self, oid: str) -> None:
        with self.server.writing:
            drop = self.server.drop_uploads > 0
            self.server.drop_uploads -= drop
        parts = self.body()
        if drop:
            next(parts)
            self.server.dropping.set()
            self.close_connection = True
            return self.connection.shutdown(socket.SHUT_RDWR)
        content = b"".join(parts)
        if hashlib.sha256(content).hexdigest() != oid:
            return self.refuse(400, "the content is not of this sha256")
        (self.server.directory / "lfs" / oid).write_bytes(content)
        self.server.uploads.append(oid)
        return self.send(b"", 200, {"ETag": f'"{oid}"'})

    def verify(self, oid: str, sent: dict[str, Any]) -> None:
        path = self.server.directory / "lfs" / oid
        if path.is_file() and path.stat().st_size == sent["size"]:
            self.answer({})
        else:
            self.refuse(404, "the upload is not whole")

    def commit(self, name: str, revision: str, lines: list[dict[str, Any]]) -> None:
        if self.writable(name) is None:
            return None
        changes: dict[str, dict[str, Any] | None] = {}
        for line in lines[1:]:
            value = line["value"]
            if line["key"] == "file":
                changes[value["path"]] = {"content": value["content"]}
            elif line["key"] == "lfsFile":
                if not (self.server.directory / "lfs" / value["oid"]).is_file():
                    return self.refuse(400, f"{value['path']} was not uploaded")
                changes[value["path"]] = {"lfs": value["oid"]}
            elif line["key"] == "deletedFile":
                changes[value["path"]] = None
        with self.server.writing:
            repository, parent = self.server.repository(name), lines[0]["value"].get("parentCommit")
            assert repository is not None
            if parent not in (None, repository["commits"][-1]["oid"]):
                return self.refuse(412, "A commit has happened since. Please refresh and try again.")
            oid = self.server.commit(name, lines[0]["value"]["summary"], changes)
        return self.answer(
            {"success": True, "commitOid": oid, "commitUrl": f"{self.server.address}/{name}/commit/{oid}"}
        )

    # Reading

    def resolve(self, name: str, revision: str, path: str) -> None:
        repository = self.readable(name)
        if repository is None or (commit := self.find(repository, revision)) is None:
            return None
        headers = {"X-Repo-Commit": commit["oid"]}
        file = commit["files"].get(path)
        if file is None:
            return self.answer({"error": "Entry not found"}, 404, **headers, **{"X-Error-Code": "EntryNotFound"})
        content = self.server.content(file)
        if "lfs" in file:
            large = {"X-Linked-Etag": f'"{file["lfs"]}"', "X-Linked-Size": str(len(content))}
            # Large files lie on another host, where the client neither asks for a file's description nor sends its token.
            host = f"http://localhost:{self.server.server_address[1]}"
            return self.send(b"", 302, {**headers, **large, "Location": f"{host}/cdn/{file['lfs']}"})
        return self.send(content, 200, {**headers, "ETag": f'"{git_hash(content)}"'})

    def download(self, oid: str) -> None:
        if self.token:
            self.server.unknown.append("a token that was sent to another host")
        content = (self.server.directory / "lfs" / oid).read_bytes()
        self.send(content, 200, {"ETag": f'"{oid}"'})
