"""Checkpoints from a hub on this machine that fails in all the ways a hub fails."""

import os

import pytest
from hub_server import COMMIT, REPOSITORY, Hub, serving
from huggingface_hub import constants, file_download
from huggingface_hub.utils import _http

from torchtune_qwen25vl import weights
from torchtune_qwen25vl.weights import _hub, find_weights


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A hub; what huggingface_hub waits between its own attempts is left out."""
    monkeypatch.setattr(file_download.time, "sleep", lambda _: None)
    monkeypatch.setattr(_http.time, "sleep", lambda _: None)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)  # whatever the environment says
    monkeypatch.setenv("QWEN_HOME", str(tmp_path / "home"))
    files = {
        "config.json": b"{}",
        "model.safetensors": bytes(range(256)) * 4000,
        "tokenizer.json": b"{}" * 100,
        "pytorch_model.bin": b"pickled",
    }
    with serving(Hub(files)) as server:
        yield server


@pytest.fixture
def fetch(hub):
    return lambda: weights.fetch(REPOSITORY, endpoint=hub.endpoint, waits=(0.0,) * 3)


def test_a_checkpoint_goes_to_qwen_home_without_pickles(hub, fetch, tmp_path):
    home = tmp_path / "home"
    missing = _hub.missing_bytes(REPOSITORY, home, hub.endpoint)
    assert missing == sum(len(data) for name, data in hub.files.items() if "bin" not in name)
    folder = fetch()
    assert folder.is_relative_to(home)
    assert folder.name == COMMIT
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == {
        name: data for name, data in hub.files.items() if "bin" not in name
    }
    assert _hub.missing_bytes(REPOSITORY, home, hub.endpoint) == 0
    asked = hub.asked.copy()
    assert fetch() == folder
    assert hub.asked == asked


@pytest.mark.parametrize(("failure", "count"), [(503, 3), (500, 2), (429, 7), ("cut", 7)])
def test_what_may_pass_is_tried_again(hub, fetch, failure, count, caplog):
    """huggingface_hub itself tries 429 and cut connections 6 times, and 5xx once."""
    big = "model.safetensors"
    hub.fails = lambda name, times: failure if name == big and times <= count else None
    assert (fetch() / big).read_bytes() == hub.files[big]
    assert hub.asked[big] == count + 1
    assert hub.asked["config.json"] == 1  # what is complete stays
    assert "again in 0 s" in caplog.text


@pytest.mark.parametrize("failure", [401, 403, 404])
def test_what_will_not_pass_is_not(hub, fetch, failure):
    hub.fails = lambda name, times: failure if name == "model.safetensors" else None
    with pytest.raises(ValueError, match=f"{REPOSITORY} cannot be fetched"):
        fetch()
    assert hub.asked["model.safetensors"] == 1


def test_an_unknown_repository_is_named(hub):
    with pytest.raises(ValueError, match="someone/else cannot be fetched"):
        weights.fetch("someone/else", endpoint=hub.endpoint, waits=(0.0,) * 3)


def test_patience_ends(hub, fetch):
    hub.fails = lambda name, times: 503
    with pytest.raises(ValueError, match="503"):
        fetch()
    assert hub.asked["config.json"] == 4


def test_a_file_that_is_not_what_the_hub_says_is_refused(hub, fetch):
    data = hub.files["tokenizer.json"]
    hub.files["tokenizer.json"] = b"x" * len(data)
    with pytest.raises(ValueError, match=r"tokenizer.json of someone/tiny differed .* are deleted"):
        fetch()
    hub.files["tokenizer.json"] = data
    assert (fetch() / "tokenizer.json").read_bytes() == data


def test_what_was_not_compared_is_compared_the_next_time(hub, fetch, monkeypatch):
    data = hub.files["tokenizer.json"]
    hub.files["tokenizer.json"] = b"x" * len(data)
    with monkeypatch.context() as patch:
        patch.setattr(_hub, "_verify", lambda *_: os._exit)  # killed before it
        patch.setattr(_hub.Path, "touch", lambda _: None)
        fetch()
    with pytest.raises(ValueError, match="differed"):
        fetch()


def test_a_cache_that_may_only_be_read_will_do(hub, fetch, monkeypatch):
    def refuse_in(place, call):
        def refusing(path, *args, **options):
            if place in str(path):
                raise PermissionError(13, "read-only")
            return call(path, *args, **options)

        return refusing

    path = _hub.Path
    monkeypatch.setattr(path, "touch", refuse_in("verified-", path.touch))
    (fetch() / "tokenizer.json").resolve().write_bytes(b"x")
    monkeypatch.setattr(path, "unlink", refuse_in("blobs", path.unlink))
    with pytest.raises(ValueError, match=r"tokenizer.json .*: delete them from .*read-only"):
        fetch()


def test_a_file_of_somebody_behind_a_link_is_not_deleted(hub, fetch, tmp_path):
    mine, link = tmp_path / "mine.json", fetch() / "tokenizer.json"
    mine.write_bytes(b"mine")
    link.unlink()
    link.symlink_to(mine)
    next(link.parents[2].glob("verified-*")).unlink()
    with pytest.raises(ValueError, match="differed"):
        fetch()
    assert mine.read_bytes() == b"mine"


def test_a_hub_that_is_gone_leaves_the_cache(hub, fetch, monkeypatch):
    folder = fetch()
    hub.endpoint = "http://127.0.0.1:9"
    assert fetch() == folder


def test_an_id_that_is_in_no_cache_is_refused_at_once_offline(hub, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(_hub.time, "sleep", lambda _: pytest.fail("waited"))
    with pytest.raises(ValueError, match="someone/tiny cannot be fetched"):
        find_weights(REPOSITORY)


def test_an_id_that_is_in_no_cache_is_refused_at_once_without_a_network(hub, monkeypatch):
    monkeypatch.setattr(_hub.time, "sleep", lambda _: pytest.fail("waited"))
    with pytest.raises(ValueError, match="someone/tiny cannot be fetched: ") as refused:
        weights.fetch(REPOSITORY, endpoint="http://127.0.0.1:9")
    assert "\n" not in str(refused.value)


def test_a_download_that_was_begun_is_waited_for(hub, fetch, monkeypatch):
    hub.fails = lambda name, times: 404 if name == "model.safetensors" else None
    with pytest.raises(ValueError):
        fetch()
    waited = []
    monkeypatch.setattr(_hub.time, "sleep", waited.append)
    with pytest.raises(ValueError, match="cannot be fetched"):
        weights.fetch(REPOSITORY, endpoint="http://127.0.0.1:9", waits=(1.0, 2.0))
    assert waited == [1.0, 2.0]


def test_weights_by_a_hub_id_come_from_the_same_cache(hub, fetch, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match="cannot be fetched"):
        find_weights(REPOSITORY)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    folder = fetch()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert find_weights(REPOSITORY) == (folder, None)


def test_a_full_disk_is_seen_beforehand(hub, monkeypatch):
    monkeypatch.setattr(_hub, "free_bytes", lambda _: 10**6)
    with pytest.raises(ValueError, match="set QWEN_HOME to a folder on a larger disk"):
        weights.fetch(REPOSITORY, endpoint=hub.endpoint)
    assert not hub.asked


def test_paths_are_not_fetched(tmp_path):
    assert weights.fetch(tmp_path) == tmp_path
    assert weights.fetch("/no/such/model").name == "model"


@pytest.mark.parametrize(("first", "second", "expected"), [("a", "b", "a"), (None, "b", "b")])
def test_where_downloads_go(monkeypatch, first, second, expected):
    monkeypatch.setenv("QWEN_HOME", second)
    assert str(_hub.cache_folder(first)) == expected
    monkeypatch.delenv("QWEN_HOME")
    assert _hub.cache_folder(None).name == "hub"
