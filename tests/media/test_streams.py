"""Streams of `datasets`: the rows of files that are kept nowhere, read in order."""

import io
import json
import pickle
import shutil
import tarfile

import datasets
import file_server
import pytest
from PIL import Image

from torchtune_qwen25vl.media import StreamRows, open_rows

SHARDS, ROWS = 3, 10


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Three files of ten rows each, as JSON lines and as Parquet with an image column."""
    path = tmp_path_factory.mktemp("files")
    for k in range(SHARDS):
        rows = [{"id": ROWS * k + i, "text": "t"} for i in range(ROWS)]
        rows[1]["more"] = [k]
        (path / f"{k}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        table = [{"id": row["id"], "image": {"bytes": bytes(20_000), "path": None}} for row in rows]
        features = datasets.Features({"id": datasets.Value("int64"), "image": datasets.Image()})
        datasets.Dataset.from_list(table, features=features).to_parquet(path / f"{k}.parquet")
    return path


def stream(folder, kind="json", **options):
    suffix = {"json": "jsonl"}.get(kind, kind)
    files = [f"{folder}/{k}.{suffix}" for k in range(SHARDS)]
    return open_rows(kind, data_files=files, streaming=True, **options)


def ids(rows):
    return [rows[index]["id"] for index in range(len(rows))]


@pytest.mark.parametrize("kind", ["json", "parquet"])
def test_rows_of_a_stream_are_those_of_its_files(folder, kind, tmp_path):
    files = [f"{folder}/{k}.{'jsonl' if kind == 'json' else kind}" for k in range(SHARDS)]
    held = open_rows(kind, data_files=files, cache_dir=str(tmp_path))
    rows = stream(folder, kind)
    assert isinstance(rows, StreamRows)
    assert len(rows) == len(held) == SHARDS * ROWS
    for index in range(len(rows)):
        assert rows[index] == held[index]
        assert rows.digest(index) == held.digest(index)


def test_rows_that_are_made_one_by_one(tmp_path):
    with tarfile.open(tmp_path / "t.tar", "w") as tar:
        for k in range(3):
            for suffix, text in ((".json", json.dumps({"k": k})), (".txt", f"t{k}")):
                (tmp_path / f"{k}{suffix}").write_text(text)
                tar.add(tmp_path / f"{k}{suffix}", arcname=f"{k}{suffix}")
    rows = open_rows("webdataset", data_files=str(tmp_path / "t.tar"), streaming=True)
    assert [rows[k]["txt"] for k in range(3)] == ["t0", "t1", "t2"]
    assert rows[2]["json"] == {"k": 2}


@pytest.mark.parametrize(
    ("split", "expected"),
    [
        ("train[:4]", range(4)),
        ("train[8:1_2]", range(8, 12)),
        ("train[90%:]", range(27, 30)),
        ("train[-2:]", range(28, 30)),
    ],
)
def test_a_stretch_of_a_stream(folder, split, expected):
    assert ids(stream(folder, split=split)) == list(expected)


def test_what_a_stream_cannot_do(folder):
    for options, match in (
        ({"split": "train[:4]+train[8:]"}, r"a stream is one stretch of a split, got .*mixture"),
        ({"split": "train[40:]"}, "has none of the 30 rows of train"),
        ({"split": "val"}, r"json: Bad split: val. Available splits: \['train'\]"),
        ({"shuffle_buffer_size": 0}, "shuffle_buffer_size is a whole number from 1, got 0"),
    ):
        with pytest.raises(ValueError, match=match):
            stream(folder, **options)
    with pytest.raises(ValueError, match=r"'shuffle_buffer_size'\] mean nothing for rows that are"):
        open_rows("json", data_files=str(folder / "0.jsonl"), shuffle_buffer_size=5)
    with pytest.raises(ValueError, match=r"\['streaming'\] mean nothing for a file"):
        open_rows(str(folder / "0.jsonl"), streaming=True)
    with pytest.raises(ValueError, match="'text' of all rows is needed at once"):
        stream(folder).column("text")


def test_a_stream_is_read_once_and_forward(folder):
    rows = stream(folder, shuffle_buffer_size=5)
    opened = []
    tables = rows._shards.tables
    rows._shards.tables = lambda shard: opened.append(shard) or tables(shard)
    order = [*(3, 0, 4, 1, 2), *(9, 5, 6, 7, 8), *(10, 14, 13)]
    assert [rows.fetch(k, k // 5 * 5)["id"] for k in order] == order
    assert opened == [0]
    assert len(rows._held) == 5, "rows of a window are held, and no others"
    with pytest.raises(ValueError, match="read in order, but row 9 is asked for after row 14; set"):
        rows[9]
    assert rows[2]["id"] == 2, "a pass begins anew"
    assert rows.fetch(27, 25)["id"] == 27
    assert opened == [0, 0]


def test_other_processes_get_rows_and_read_none(folder):
    rows = stream(folder)
    stored = rows.fetch(7, 0)
    sent = pickle.loads(pickle.dumps(rows))
    sent._owner = -1
    with pytest.raises(ValueError, match="the process that opened a stream reads it"):
        sent[7]
    sent.hand(7, stored)
    assert (sent[7], sent.digest(7)) == (rows[7], rows.digest(7))


def test_streams_are_told_apart(folder, tmp_path):
    one = stream(folder).identity()
    assert one == stream(folder).identity()
    assert one != stream(folder, split="train[:20]").identity()
    (tmp_path / "0.jsonl").write_text('{"id": 0, "text": "u"}\n')
    other = open_rows("json", data_files=str(tmp_path / "0.jsonl"), streaming=True)
    assert other.identity() != one


# Over a network ----------------------------------------------------------------------------------


def test_lines_of_a_network_say_how_many_they_are(folder):
    with file_server.serving(folder) as (address, _):
        with pytest.raises(ValueError, match=r"nothing tells how many rows .* train\[:100000\]"):
            stream(address)
        with pytest.raises(ValueError, match="nothing tells how many rows"):
            stream(address, split="train[:95%]")
        rows = stream(address, split="train[12:20]")
        assert ids(rows) == list(range(12, 20))
        rows = stream(address, split="train[:40]")
        with pytest.raises(ValueError, match="ends after 30 rows, but was said to have 40; lower"):
            ids(rows)


def test_what_is_sent_of_parquet(folder):
    size = (folder / "0.parquet").stat().st_size
    with file_server.serving(folder) as (address, sent):
        rows = stream(address, "parquet")
        assert len(rows) == 30
        sent.clear()
        assert rows.fetch(25, 20)["id"] == 25, "a run goes on in the last file"
        assert set(sent) == {"2.parquet"}
        assert sent["2.parquet"] < 3 * size


def test_images_that_are_files_of_a_network(tmp_path):
    names = []
    for k in range(3):
        (tmp_path / f"{k}.png").write_bytes(picture(k))
        names.append(f"{k}.png")
    lines = "".join(json.dumps({"file_name": name, "text": name}) + "\n" for name in names)
    (tmp_path / "metadata.jsonl").write_text(lines)
    with file_server.serving(tmp_path) as (address, sent):
        files = [f"{address}/{name}" for name in (*names, "metadata.jsonl")]
        rows = open_rows("imagefolder", data_files=files, streaming=True, split="train[:3]")
        sent.clear()
        assert rows.fetch(2, 2)["image"]["bytes"] == picture(2)
        assert rows[2]["text"] == "2.png"
        assert not sent["1.png"], "what is passed over is not read"


def picture(number):
    content = io.BytesIO()
    Image.new("RGB", (20, 20), (number, 0, 0)).save(content, "png")
    return content.getvalue()


def test_a_file_that_cannot_be_read_ends_in_one_line(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "files")
    with file_server.serving(tmp_path / "files") as (address, _):
        rows = stream(address, split="train[:30]")
        assert rows[5]["id"] == 5
        (tmp_path / "files" / "2.jsonl").unlink()
        with pytest.raises(ValueError, match=r"json: the stream cannot be read on, .*start again"):
            rows[25]
