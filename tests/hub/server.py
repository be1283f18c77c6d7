"""A Hub on loopback that speaks enough of the wire protocol to create, push, list and load.

It keeps everything in memory, and does to requests what `faults` says: a function from (method,
path) to the name of a fault in `FAULTS`, or None.
"""

import base64
import hashlib
import json
import re
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

FAULTS = (
    "500",
    "503",
    "429",  # with Retry-After
    "429 for long",
    "400",
    "401",
    "403",
    "405",
    "413",
    "drop",  # the connection, before anything is done
    "drop after",  # what was asked is done, the answer is lost
    "stall",  # silence
    "slow",  # byte by byte
    "corrupt",  # other bytes of the same number
    "truncate",
    "garbage",  # an answer that is no JSON
)
LFS = re.compile(r"\.(safetensors|png|npz|parquet)$")


def git_oid(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def is_lfs(path: str) -> bool:
    return bool(LFS.search(path))


def etag(path: str, content: bytes) -> str:
    return hashlib.sha256(content).hexdigest() if is_lfs(path) else git_oid(content)


@dataclass
class Commit:
    oid: str
    files: dict[str, bytes]
    message: str


@dataclass
class Repo:
    id: str
    private: bool = False
    branches: dict[str, list[Commit]] = field(default_factory=dict)

    def __post_init__(self):
        self.commit("main", {}, "initial commit")

    def commit(
        self, branch: str, files: dict[str, bytes], message: str, gone: Sequence[str] = ()
    ) -> Commit:
        history = self.branches.setdefault(branch, [])
        merged = {**(history[-1].files if history else {}), **files}
        merged = {name: content for name, content in merged.items() if name not in gone}
        listing = json.dumps({k: git_oid(v) for k, v in sorted(merged.items())})
        seed = f"{self.id} {branch} {len(history)} {message} {listing}"
        history.append(Commit(hashlib.sha1(seed.encode()).hexdigest(), merged, message))
        return history[-1]

    def find(self, revision: str) -> Commit | None:
        if revision in self.branches:
            return self.branches[revision][-1]
        commits = (c for history in self.branches.values() for c in history)
        return next((c for c in commits if c.oid == revision), None)


class Hub:
    """The server and its state.

    Attributes:
        repos: by id.
        collections: by slug.
        tokens: from a token to "write", "read" or "expired".
        faults: see the head of this file.
        injected: how many faults of each kind there were.
        requests: (method, path) of all that came.
    """

    def __init__(self, port: int):
        self.repos: dict[str, Repo] = {}
        self.collections: dict[str, dict] = {}
        self.objects: dict[str, bytes] = {}
        self.tokens = {"hf_writer": "write", "hf_reader": "read", "hf_old": "expired"}
        self.faults: Callable[[str, str], str | None] = lambda method, path: None
        self.injected: Counter[str] = Counter()
        self.requests: list[tuple[str, str]] = []
        self.moved: dict[str, str] = {}
        self.resource_group: set[str] = set()  # of readers', where its members may write
        self.land_twice = False  # a commit lands, and the same request comes once more
        self.before_commit: Callable[[], None] = lambda: None
        self.lock = threading.RLock()
        self.closing = threading.Event()
        hub = self

        class Handler(_Handler):
            state = hub

        self.server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{port}"
        serve = partial(self.server.serve_forever, poll_interval=0.02)
        threading.Thread(target=serve, daemon=True).start()

    @staticmethod
    def new_repo(id: str) -> Repo:
        return Repo(id)

    def close(self) -> None:
        self.closing.set()
        self.server.shutdown()
        self.server.server_close()

    def count(self, method: str, part: str) -> int:
        return sum(m == method and part in path for m, path in self.requests)


class _Handler(BaseHTTPRequestHandler):
    state: Hub
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, *arguments):
        pass

    def do_GET(self):
        self.handle_one()

    do_POST = do_PUT = do_HEAD = do_GET

    def handle_one(self):
        url = urlsplit(self.path)
        self.query = {k: v[0] for k, v in parse_qs(url.query).items()}
        path = unquote(url.path)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        hub = self.state
        hub.requests.append((self.command, path))
        fault = hub.faults(self.command, path)
        if fault:
            hub.injected[fault] += 1
        self.fault = fault
        if fault in ("500", "503", "400", "401", "403", "405", "413"):
            return self.reply({"error": f"injected {fault}"}, status=int(fault))
        if fault in ("429", "429 for long"):
            wait = "1" if fault == "429" else "86400"
            return self.reply({"error": "slow down"}, status=429, headers={"Retry-After": wait})
        if fault == "drop":
            return self.hang_up()
        if fault == "stall":
            hub.closing.wait(30)
            return self.hang_up()
        for method, pattern, name in ROUTES:
            found = re.fullmatch(pattern, path)
            if found and self.command in method:
                with hub.lock:
                    answer = getattr(self, name)(body, **found.groupdict())
                if fault == "drop after":
                    return self.hang_up()
                return self.reply(*answer[:1], **(answer[1] if len(answer) > 1 else {}))
        return self.reply({"error": f"no route {self.command} {path}"}, status=404)

    def hang_up(self):
        self.close_connection = True
        self.connection.close()

    def reply(self, content, *, status=200, headers=None):
        payload = content if isinstance(content, bytes) else json.dumps(content).encode()
        if self.fault == "garbage" and not isinstance(content, bytes):
            payload = b"<html>a proxy was here</html>"
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        if "Content-Length" not in (headers or {}):
            self.send_header("Content-Length", str(len(payload)))
        self.end_headers()
        if self.command == "HEAD":
            return
        if self.fault == "corrupt":
            payload = bytes(b ^ 1 for b in payload)
        if self.fault == "truncate":
            self.wfile.write(payload[: len(payload) // 2])
            return self.hang_up()
        if self.fault == "slow":
            step = max(1, len(payload) // 20)
            for start in range(0, len(payload), step):
                self.wfile.write(payload[start : start + step])
                self.wfile.flush()
                time.sleep(0.005)
            return None
        self.wfile.write(payload)

    def refusal(self, status, message, code=None):
        headers = {"X-Error-Message": message, **({"X-Error-Code": code} if code else {})}
        return {"error": message}, {"status": status, "headers": headers}

    @property
    def role(self):
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        return self.state.tokens.get(token)

    def may_write(self, id):
        closed = id.startswith("readers/") and id not in self.state.resource_group
        return self.role == "write" and not closed

    def readable(self, id):
        repo = self.state.repos.get(id)
        if repo is None or (repo.private and self.role not in ("read", "write")):
            return None
        return repo

    def missing(self):
        return self.refusal(404, "Repository not found", "RepoNotFound")

    def exchange(self, body):
        """A CI's identity for a token that is nobody's."""
        asked = json.loads(body)
        if asked["subject_token"] != "identity" or asked["resource"] not in self.state.repos:
            return self.refusal(403, "no trusted publisher")
        self.state.tokens["hf_jwt"] = "write"
        return ({"access_token": "hf_jwt", "token_type": "bearer", "expires_in": 3600},)

    def whoami(self, body):
        if self.role in (None, "expired"):
            return self.refusal(401, "Invalid credentials in Authorization header")
        return (
            {
                "type": "user",
                "name": "me",
                "orgs": [
                    {"name": "org", "roleInOrg": "write"},
                    {"name": "readers", "roleInOrg": "read"},
                ],
                "auth": {"type": "access_token", "accessToken": {"role": self.role}},
            },
        )

    def create(self, body):
        asked = json.loads(body)
        id = f"{asked.get('organization') or 'me'}/{asked['name']}"
        if not self.may_write(id):
            return self.refusal(403, "this token cannot write")
        if id in self.state.repos:
            return {"url": f"{self.state.url}/{id}"}, {"status": 409}
        private = asked.get("visibility") == "private" or bool(asked.get("private"))
        self.state.repos[id] = Repo(id, private)
        return ({"url": f"{self.state.url}/{id}"},)

    def branch(self, body, id, revision):
        repo = self.readable(id)
        if repo is None:
            return self.missing()
        if revision in repo.branches:
            return self.refusal(409, "Reference already exists")
        repo.branches[revision] = list(repo.branches["main"])
        return ({},)

    def validate(self, body):
        text = json.loads(body)["content"]
        try:
            yaml.safe_load(re.match(r"---\n(.*?)\n---", text, re.DOTALL).group(1))
        except (yaml.YAMLError, AttributeError) as error:
            return {"errors": [{"message": str(error)}], "warnings": []}, {"status": 400}
        return ({"errors": [], "warnings": []},)

    def preupload(self, body, id, revision):
        repo = self.readable(id)
        if repo is None:
            return self.missing()
        known = repo.find(revision).files
        return (
            {
                "files": [
                    {
                        "path": (path := file["path"]),
                        "uploadMode": "lfs" if is_lfs(path) else "regular",
                        "shouldIgnore": False,
                        "oid": etag(path, known[path]) if path in known else None,
                    }
                    for file in json.loads(body)["files"]
                ]
            },
        )

    def batch(self, body, id):
        if not self.may_write(id):
            return self.refusal(403, "this token cannot write")
        objects = []
        for asked in json.loads(body)["objects"]:
            href = {"upload": {"href": f"{self.state.url}/lfs/{asked['oid']}"}}
            new = {} if asked["oid"] in self.state.objects else {"actions": href}
            objects.append({**asked, **new})
        return ({"transfer": "basic", "objects": objects},)

    def put(self, body, oid):
        if hashlib.sha256(body).hexdigest() != oid:
            return self.refusal(400, "these bytes have another hash")
        self.state.objects[oid] = body
        return (b"",)

    def commit(self, body, id, revision):
        repo = self.readable(id)
        if repo is None:
            return self.missing()
        if not self.may_write(id):
            return self.refusal(403, "this token cannot write")
        lines = [json.loads(line) for line in body.splitlines()]
        header = lines[0]["value"]
        self.state.before_commit()
        if header.get("parentCommit", repo.find(revision).oid) != repo.find(revision).oid:
            return self.refusal(412, "A commit has happened since. Please refresh and try again.")
        files, gone = {}, []
        for line in lines[1:]:
            value = line["value"]
            if line["key"] == "deletedFile":
                gone.append(value["path"])
            elif line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            else:
                files[value["path"]] = self.state.objects[value["oid"]]
        pull = "create_pr" in self.query
        branch = f"refs/pr/{1 + sum(b.startswith('refs/pr') for b in repo.branches)}"
        if pull:
            repo.branches[branch] = list(repo.branches[revision])
        done = repo.commit(branch if pull else revision, files, header["summary"], gone)
        if self.state.land_twice:
            self.state.land_twice = False
            return self.commit(body, id, revision)
        address = {"pullRequestUrl": f"{self.state.url}/{id}/discussions/1"} if pull else {}
        return (
            {
                "commitUrl": f"{self.state.url}/{id}/commit/{done.oid}",
                "commitOid": done.oid,
                **address,
            },
        )

    def info(self, body, id, revision="main"):
        repo = self.readable(id)
        if repo is None:
            return self.missing()
        commit = repo.find(revision)
        if commit is None:
            return self.refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        siblings = [{"rfilename": path} for path in commit.files]
        id = self.state.moved.get(id, id)
        described = {"id": id, "sha": commit.oid, "private": repo.private, "tags": []}
        described["cardData"] = self.card(commit)
        return ({**described, "siblings": siblings},)

    @staticmethod
    def card(commit):
        text = commit.files.get("README.md", b"").decode()
        front = re.match(r"---\n(.*?)\n---", text, re.DOTALL)
        return yaml.safe_load(front.group(1)) if front else {}

    def models(self, body):
        found = []
        for id, repo in self.state.repos.items():
            data = self.card(repo.branches["main"][-1])
            mine = id.startswith(f"{self.query.get('author', '')}/") and self.readable(id)
            if mine and self.query.get("filter") in (None, *data.get("tags", ())):
                found.append({"id": id, "private": repo.private, "cardData": data, "tags": []})
        return (found,)

    def new_collection(self, body):
        asked = json.loads(body)
        if not self.may_write(f"{asked['namespace']}/"):
            return self.refusal(403, "this token cannot write")
        title = re.sub(r"[^a-z0-9]+", "-", asked["title"].lower()).strip("-")
        name = f"{asked['namespace']}/{title}"
        slug = f"{name}-{hashlib.sha1(name.encode()).hexdigest()[:24]}"
        if slug in self.state.collections:
            return {"error": "it is there", "slug": slug}, {"status": 409}
        self.state.collections[slug] = {
            **{"slug": slug, "title": asked["title"], "owner": {"name": asked["namespace"]}},
            **{"description": asked.get("description"), "private": asked["private"], "items": []},
            **{"theme": "orange", "upvotes": 0, "position": 0},
            "lastUpdated": "2026-01-01T00:00:00.000Z",
        }
        return (self.state.collections[slug],)

    def collection(self, body, slug):
        if slug not in self.state.collections:
            return self.refusal(404, "Collection not found")
        return (self.state.collections[slug],)

    def add_item(self, body, slug):
        if slug not in self.state.collections:
            return self.refusal(404, "Collection not found")
        asked, items = json.loads(body)["item"], self.state.collections[slug]["items"]
        if not self.may_write(slug):
            return self.refusal(403, "this token cannot write")
        if self.readable(asked["id"]) is None:
            return self.missing()
        if any(item["id"] == asked["id"] for item in items):
            return self.refusal(409, "it is in the collection")
        items.append({**asked, "_id": f"{len(items):024x}", "position": len(items)})
        return (self.state.collections[slug],)

    def tree(self, body, id, revision):
        repo = self.readable(id)
        if repo is None:
            return self.missing()
        commit = repo.find(revision)
        if commit is None:
            return self.refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return ([self.described(path, content) for path, content in commit.files.items()],)

    def paths_info(self, body, id, revision):
        answer = self.tree(body, id, revision)
        if len(answer) > 1:
            return answer
        form = self.headers.get("Content-Type", "").startswith("application/x-www-form-urlencoded")
        asked = parse_qs(body.decode())["paths"] if form else json.loads(body)["paths"]
        return ([file for file in answer[0] if file["path"] in asked],)

    def described(self, path, content):
        lfs = {"oid": etag(path, content), "size": len(content), "pointerSize": 130}
        file = {"type": "file", "path": path, "size": len(content), "oid": git_oid(content)}
        return {**file, "lfs": lfs} if is_lfs(path) else file

    def resolve(self, body, id, revision, path):
        repo = self.readable(id)
        if repo is None:
            return self.missing()
        commit = repo.find(revision)
        if commit is None:
            return self.refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        if path not in commit.files:
            return self.refusal(404, "Entry not found", "EntryNotFound")
        content = commit.files[path]
        headers = {"X-Repo-Commit": commit.oid, "ETag": f'"{etag(path, content)}"'}
        headers |= {"Accept-Ranges": "bytes"}
        if is_lfs(path):
            headers |= {"X-Linked-Etag": headers["ETag"], "X-Linked-Size": str(len(content))}
        asked = re.match(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if asked:
            start, end = int(asked[1]), int(asked[2] or len(content) - 1)
            headers["Content-Range"] = f"bytes {start}-{end}/{len(content)}"
            return content[start : end + 1], {"status": 206, "headers": headers}
        return content, {"headers": headers}


_ID = r"(?P<id>[^/]+/[^/]+)"
ROUTES = [
    (("GET",), "/api/whoami-v2", "whoami"),
    (("POST",), "/oauth/token", "exchange"),
    (("POST",), "/api/repos/create", "create"),
    (("POST",), "/api/validate-yaml", "validate"),
    (("GET",), "/api/models", "models"),
    (("POST",), "/api/collections", "new_collection"),
    (("GET",), r"/api/collections/(?P<slug>[^/]+/[^/]+)", "collection"),
    (("POST",), r"/api/collections/(?P<slug>[^/]+/[^/]+)/items", "add_item"),
    (("POST",), rf"/api/models/{_ID}/branch/(?P<revision>.+)", "branch"),
    (("POST",), rf"/api/models/{_ID}/preupload/(?P<revision>.+)", "preupload"),
    (("POST",), rf"/api/models/{_ID}/commit/(?P<revision>.+)", "commit"),
    (("POST",), rf"/api/models/{_ID}/paths-info/(?P<revision>.+)", "paths_info"),
    (("GET", "HEAD"), rf"/api/models/{_ID}/tree/(?P<revision>.+?)/?", "tree"),
    (("GET", "HEAD"), rf"/api/models/{_ID}/revision/(?P<revision>.+)", "info"),
    (("GET", "HEAD"), rf"/api/models/{_ID}", "info"),
    (("POST",), rf"/{_ID}\.git/info/lfs/objects/batch", "batch"),
    (("PUT",), r"/lfs/(?P<oid>[0-9a-f]{64})", "put"),
    (("GET", "HEAD"), rf"/{_ID}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", "resolve"),
]
