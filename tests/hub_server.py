"""A hub of one repository on this machine, which can be told to fail."""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from urllib.parse import urlsplit

from loopback import Kept, listening

REPOSITORY, COMMIT = "someone/tiny", "a" * 40


class Hub:
    """What the server holds, and how it behaves.

    Attributes:
        files: content by name
        fails: asked before a file is sent, with its name and how often it was asked for; the status
            to answer with instead, or "cut" to drop the connection in the middle
        asked: how often each file was asked for
    """

    def __init__(self, files: dict[str, bytes]) -> None:
        self.files = files
        self.fails: Callable[[str, int], int | str | None] = lambda name, times: None
        self.asked: Counter[str] = Counter()
        self.sha256 = {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}
        self.endpoint = ""


@contextmanager
def serving(hub: Hub) -> Iterator[Hub]:
    """The hub on a free port of this machine."""

    class Handler(Kept):
        def do_GET(self):
            path = urlsplit(self.path).path
            if path.startswith(f"/api/models/{REPOSITORY}/tree/"):
                self.send_json([self.entry(name) for name in hub.files])
            elif path.startswith(f"/api/models/{REPOSITORY}"):
                siblings = [{"rfilename": name} for name in hub.files]
                self.send_json({"id": REPOSITORY, "sha": COMMIT, "siblings": siblings})
            elif path.startswith(f"/{REPOSITORY}/resolve/{COMMIT}/"):
                self.send_content(path.removeprefix(f"/{REPOSITORY}/resolve/{COMMIT}/"))
            else:
                code = "RepoNotFound"
                self.send_response(404)
                self.send_header("X-Error-Code", code)
                self.send_header("Content-Length", "0")
                self.end_headers()

        def entry(self, name):
            size, sha = len(hub.files[name]), hub.sha256[name]
            lfs = {"oid": sha, "size": size, "pointerSize": 100}
            return {"type": "file", "path": name, "size": size, "oid": "b" * 40, "lfs": lfs}

        def send_json(self, value):
            data = json.dumps(value).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def send_content(self, name):
            data, failure = hub.files[name], None
            if self.command == "GET":
                hub.asked[name] += 1
                failure = hub.fails(name, hub.asked[name])
            if isinstance(failure, int):
                self.send_response(failure)
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            self.send_header("ETag", f'"{hub.sha256[name]}"')
            self.send_header("X-Linked-Etag", f'"{hub.sha256[name]}"')
            self.send_header("X-Linked-Size", str(len(data)))
            self.send_header("X-Repo-Commit", COMMIT)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(data[: len(data) // 2] if failure == "cut" else data)
            if failure == "cut":
                self.close_connection = True
                self.connection.close()

    with listening(Handler) as hub.endpoint:
        yield hub
