"""Images by URL, from a server on this machine: fetched once, whole, and named when they fail."""

import socket
import threading
import time
from collections import Counter
from io import BytesIO
from types import SimpleNamespace

import pytest
from loopback import Silent, listening

from tests.data_samples import messages_of, picture, seen, transform, write_jsonl
from torchtune_qwen25vl.data import llava_dataset, preference_dataset
from torchtune_qwen25vl.media import Downloads, _downloads, url_of

SHOWN = picture()


@pytest.fixture(autouse=True)
def hasty(monkeypatch):
    monkeypatch.setattr(_downloads, "PAUSE", 0.0)
    monkeypatch.setenv("no_proxy", "*")


@pytest.fixture
def server():
    """A server, its address in `url`, and how often it was asked for each path in `asked`."""
    content = BytesIO()
    SHOWN.save(content, "PNG")
    image = content.getvalue()

    class Handler(Silent):
        def do_GET(self):
            asked[self.path] += 1
            times = asked[self.path]
            name = self.path.partition("?")[0]
            if name == "/moved.png":
                self.send_response(302)
                self.send_header("Location", "/a%20b.png")
                self.end_headers()
                return
            status = 404 if name == "/gone.png" else 200
            if name == "/busy.png" and times < 3:
                status = 503
            body = b"<html>no</html>" if name == "/page.png" else image
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            cut = name == "/cut.png" or (name == "/cut_once.png" and times == 1)
            self.wfile.write(body[: len(body) // 2] if cut else body)

    asked = Counter()
    with listening(Handler) as url:
        yield SimpleNamespace(asked=asked, url=url)


def files(folder):
    return [path for path in folder.rglob("*") if path.is_file()]


def test_a_url_is_fetched_once(server, tmp_path):
    downloads = Downloads(tmp_path / "kept")
    for name in ("/a b.png", "/a%20b.png?size=1", "/moved.png", "/busy.png", "/cut_once.png"):
        path = downloads.fetch(server.url + name)
        assert path == downloads.path_of(server.url + name) == downloads.fetch(server.url + name)
        assert path.suffix == ".png"
    assert len(files(tmp_path)) == 5
    assert server.asked["/busy.png"] == 3
    assert server.asked["/cut_once.png"] == 2


def test_processes_may_fetch_the_same_at_once(server, tmp_path):
    downloads, found = Downloads(tmp_path), []
    url = server.url + "/a.png"
    threads = [threading.Thread(target=lambda: found.append(downloads.fetch(url))) for _ in "1234"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [downloads.path_of(url)] * 4
    assert files(tmp_path) == [downloads.path_of(url)]


@pytest.mark.parametrize(
    ("name", "match", "times"),
    [
        ("/gone.png", "the server says 404 Not Found; mend the row", 1),
        ("/cut.png", r"cannot be downloaded, 3 times: \d+ of \d+ bytes came", 3),
    ],
)
def test_what_cannot_be_fetched_is_named_and_leaves_nothing(server, tmp_path, name, match, times):
    with pytest.raises(ValueError, match=f"{server.url}{name}: .*{match}|{match}") as error:
        Downloads(tmp_path).fetch(server.url + name)
    assert server.url + name in str(error.value)
    assert server.asked[name] == times
    assert not files(tmp_path)


def test_limits_of_size_and_time(server, tmp_path, monkeypatch):
    url = server.url + "/a.png"
    monkeypatch.setattr(_downloads, "WHOLE", -1.0)
    with pytest.raises(ValueError, match=r"a.png: cannot be downloaded, 3 times: it takes more"):
        Downloads(tmp_path).fetch(url)
    monkeypatch.setattr(_downloads, "SIZE_LIMIT", 10)
    with pytest.raises(ValueError, match=r"a.png: more than 10 bytes; download it yourself"):
        Downloads(tmp_path).fetch(url)
    monkeypatch.setattr(_downloads, "SILENCE", 0.05)
    with socket.socket() as silent:  # takes connections, never answers
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        start = time.monotonic()
        with pytest.raises(ValueError, match=r"cannot be downloaded, 3 times: .*timed out"):
            Downloads(tmp_path).fetch(f"http://127.0.0.1:{silent.getsockname()[1]}/a.png")
        assert time.monotonic() - start < 10
    with pytest.raises(ValueError, match=r"cannot be downloaded, 3 times: .*refused"):
        Downloads(tmp_path).fetch(f"http://127.0.0.1:{silent_port()}/a.png")
    assert not files(tmp_path)


def silent_port():
    """A port at which nobody listens."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def test_what_is_a_url():
    for source in ("http://x/a.png", "HTTPS://x", {"path": "http://x"}):
        assert url_of(source)
    for source in ("s3://x/a.png", "a.png", b"http://x", {"path": "http://x", "bytes": b"1"}, 3):
        assert url_of(source) is None


def talk(image):
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "That."}]
    return {"image": image, "conversations": turns}


def test_rows_with_urls(server, tmp_path):
    urls = [server.url + name for name in ("/a.png", "/gone.png", "/page.png")]
    source = write_jsonl(tmp_path / "rows.jsonl", *map(talk, urls))
    with pytest.raises(ValueError, match=r"row 0: http.*a.png: URLs are not fetched .*allow_downl"):
        llava_dataset(transform(), source=source)[0]
    assert not server.asked
    options = {"allow_download": True, "download_dir": str(tmp_path / "kept")}
    dataset = llava_dataset(transform(), source=source, **options)
    for _ in range(2):
        assert messages_of(dataset)[0][1][0] == seen(SHOWN)
    assert server.asked["/a.png"] == 1
    with pytest.raises(ValueError, match=r"rows.jsonl, row 1: http.*/gone.png: .* says 404"):
        dataset[1]
    with pytest.raises(ValueError, match=r"row 2: http.*/page.png: .*not an image.*download again"):
        dataset[2]
    pair = {"image": urls[0], "prompt": "What?", "chosen": "A red apple.", "rejected": "A."}
    source = write_jsonl(tmp_path / "pairs.jsonl", pair)
    assert "rejected" in preference_dataset(transform(), source=source, **options)[0]
    assert server.asked["/a.png"] == 1
    with pytest.raises(ValueError, match="means nothing without allow_download=True"):
        llava_dataset(transform(), source=source, download_dir="x")
