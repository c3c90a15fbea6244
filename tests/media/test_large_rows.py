"""Rows that are read where they lie: long files of lines, tars; and files that are compressed."""

import gzip
import io
import json
import os
import pickle
import tarfile

import pyarrow as pa
import pytest
from forked import exit_code, fork

from tests.data_samples import messages_of, save_pictures, seen, transform
from torchtune_qwen25vl.data import caption_dataset, llava_dataset, sharegpt_dataset
from torchtune_qwen25vl.media import _compressed, _open, open_rows
from torchtune_qwen25vl.media._lines import LineRows
from torchtune_qwen25vl.media._tables import TableRows


def everything(rows):
    return [rows[index] for index in range(len(rows))]


LINES = [
    *(b'{"a": 1}', b"", b'{"a": "\xc3\xa9"}\r', b" ", b'{"a": ', b"3", b'{"b": 4}'),
]


@pytest.mark.parametrize("start", [b"", b"\xef\xbb\xbf", b"\n\n"])
@pytest.mark.parametrize("end", [b"", b"\n", b"\n\n \n"])
def test_lines_of_a_long_file_are_those_of_a_short_one(tmp_path, start, end, monkeypatch):
    (tmp_path / "r.jsonl").write_bytes(start + b"\n".join(LINES) + end)
    held = open_rows(str(tmp_path / "r.jsonl"))
    monkeypatch.setattr(_open, "HELD", 0)
    rows = open_rows(str(tmp_path / "r.jsonl"))
    assert isinstance(rows, LineRows)
    assert not isinstance(held, LineRows)
    assert len(rows) == len(held) == 5
    for index in range(5):
        assert rows.digest(index) == held.digest(index)
    assert rows.column("a") == held.column("a") == [1, "\u00e9", None, None, None]
    rows = pickle.loads(pickle.dumps(rows))
    assert (rows[0], rows[4]) == ({"a": 1}, {"b": 4})
    with pytest.raises(ValueError, match="the row is not JSON"):
        rows[2]


def test_lines_of_lists_are_held(tmp_path, monkeypatch):
    monkeypatch.setattr(_open, "HELD", 0)
    (tmp_path / "r.jsonl").write_text('{"a": 1}\n[{"a": 2}, {"a": 3}]\n')
    assert everything(open_rows(str(tmp_path / "r.jsonl"))) == [{"a": k} for k in (1, 2, 3)]
    (tmp_path / "empty.jsonl").write_text("\n\n")
    assert len(open_rows(str(tmp_path / "empty.jsonl"))) == 0


def test_a_file_that_changes_is_noticed(tmp_path, monkeypatch):
    monkeypatch.setattr(_open, "HELD", 0)
    path = tmp_path / "r.jsonl"
    path.write_text('{"a": 1}\n')
    rows = open_rows(str(path))
    with path.open("a") as file:
        file.write('{"a": 2}\n')
    with pytest.raises(ValueError, match="has changed since its rows were counted; start again"):
        rows[0]
    path.unlink()
    with pytest.raises(ValueError, match="cannot be read any more"):
        rows[0]


# Tables -------------------------------------------------------------------------------------------

RECORDS = ["a,b", "1,x", "", '2,"two', 'lines, and a ""quote"""', "3", "4,y,z,w", "\u00e9,"]


@pytest.mark.parametrize("start", ["", "\ufeff"])
@pytest.mark.parametrize("line_end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("end", ["", "\n", "\n\n"])
def test_records_of_a_long_table_are_those_of_a_short_one(
    tmp_path, start, line_end, end, monkeypatch
):
    path = tmp_path / "r.csv"
    path.write_bytes((start + line_end.join(RECORDS) + end.replace("\n", line_end)).encode())
    held = open_rows(str(path))
    monkeypatch.setattr(_open, "HELD", 0)
    rows = pickle.loads(pickle.dumps(open_rows(str(path))))
    assert isinstance(rows, TableRows)
    assert not isinstance(held, TableRows)
    assert everything(rows) == everything(held)
    assert rows[1] == {"a": "2", "b": f'two{line_end}lines, and a "quote"'}
    assert [rows.digest(k) for k in range(5)] == [held.digest(k) for k in range(5)]
    assert rows.column("b") == held.column("b")
    assert rows.column("c") == [None] * 5


def test_a_long_table_that_is_damaged_or_empty(tmp_path, monkeypatch):
    monkeypatch.setattr(_open, "HELD", 0)
    (tmp_path / "r.tsv").write_text('a\tb\n1\t2\n"3\t4\n')
    with pytest.raises(ValueError, match=r"r\.tsv, after line 3: unexpected end of data"):
        open_rows(str(tmp_path / "r.tsv"))
    (tmp_path / "r.tsv").write_text("a\tb\n")
    assert len(open_rows(str(tmp_path / "r.tsv"))) == 0


# Compressed ---------------------------------------------------------------------------------------


def zst(data):
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(data)
    return sink.getvalue().to_pybytes()


CONTENTS = {
    ".json": b'[{"a": "1"}, {"a": "2"}]',
    ".jsonl": b'{"a": "1"}\n{"a": "2"}\n',
    ".csv": b"a\n1\n2\n",
    ".tsv": b"a\n1\n2\n",
}


@pytest.mark.parametrize("suffix", CONTENTS)
@pytest.mark.parametrize(("kind", "compress"), [(".gz", gzip.compress), (".ZST", zst)])
def test_compressed_files(tmp_path, suffix, kind, compress):
    path = tmp_path / f"rows{suffix}{kind}"
    path.write_bytes(compress(CONTENTS[suffix]))
    assert everything(open_rows(str(path))) == [{"a": "1"}, {"a": "2"}]
    whole = compress(os.urandom(1 << 20))
    for damaged in (whole[: len(whole) // 2], b"not compressed", CONTENTS[suffix]):
        path.write_bytes(damaged)
        with pytest.raises(
            ValueError, match=f"{path.name}: cannot be decompressed as {kind.lower()}"
        ):
            open_rows(str(path))


def test_files_that_were_compressed_in_pieces(tmp_path):
    for suffix, compress in ((".gz", gzip.compress), (".zst", zst)):
        path = tmp_path / f"rows.jsonl{suffix}"
        path.write_bytes(compress(b'{"a": 1}\n') + compress(b'{"a": 2}\n'))
        assert everything(open_rows(str(path))) == [{"a": 1}, {"a": 2}]


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """Where long files are unpacked, and 20 bytes are a long file."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(_open, "HELD", 20)
    return tmp_path / "cache" / "torchtune_qwen25vl" / "unpacked"


@pytest.mark.parametrize(("suffix", "kind"), [(".jsonl", LineRows), (".csv", TableRows)])
@pytest.mark.parametrize(("compression", "compress"), [(".gz", gzip.compress), (".zst", zst)])
def test_long_compressed_files_are_unpacked_once(
    tmp_path, cache, suffix, kind, compression, compress, caplog
):
    path = tmp_path / f"rows{suffix}{compression}"
    line, head = ('{"a": "%d"}\n', "") if suffix == ".jsonl" else ("%d\n", "a\n")
    text = head + "".join(line % k for k in range(30))
    path.write_bytes(compress(text.encode()))
    rows = open_rows(str(path))
    assert isinstance(rows, kind)
    assert everything(rows) == [{"a": str(k)} for k in range(30)]
    assert f"{path.name} is unpacked, once, into {cache}" in caplog.text
    caplog.clear()
    (kept,) = cache.glob("rows*")
    before = kept.stat()
    assert everything(open_rows(str(path))) == everything(rows)
    assert kept.stat() == before
    assert not caplog.text
    path.write_bytes(compress((text + line % 30).encode()))
    assert len(open_rows(str(path))) == 31
    assert len(list(cache.glob("rows*"))) == 2


def test_long_compressed_files_that_cannot_be(tmp_path, cache):
    path = tmp_path / "rows.jsonl.gz"
    whole = gzip.compress(os.urandom(1 << 22))
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"rows\.jsonl\.gz: cannot be decompressed as \.gz"):
        open_rows(str(path))
    assert not list(cache.iterdir()) or {one.suffix for one in cache.iterdir()} == {".lock"}
    path.write_bytes(gzip.compress(b'{"a": 1}\n[{"a": 2}, {"a": 3}]\n'))
    assert everything(open_rows(str(path))) == [{"a": k} for k in (1, 2, 3)], "lists are held"


def test_processes_that_unpack_one_file(tmp_path, cache, monkeypatch):
    path = tmp_path / "rows.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"a": 1}\n' * 5))
    unpacked = []
    write = _compressed._unpack

    def slowly(*places):
        unpacked.append(places)
        other = fork(lambda: (len(open_rows(str(path))), len(unpacked)) != (5, 1))
        write(*places)
        assert exit_code(other) == 0

    monkeypatch.setattr(_compressed, "_unpack", slowly)
    assert len(open_rows(str(path))) == 5
    assert len(unpacked) == 1


# Tars ---------------------------------------------------------------------------------------------


def write_tar(path, members, **options):
    with tarfile.open(path, "w", **options) as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return str(path)


@pytest.fixture
def pictures(tmp_path):
    """Three pictures as bytes, and as a reader should see them."""
    shown = [seen(image) for image in save_pictures(tmp_path / "x", "a.png", "b.png", "c.png")]
    return [(tmp_path / "x" / f"{name}.png").read_bytes() for name in "abc"], shown


TALK = {
    "conversations": [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A."}]
}


def test_rows_of_tars(tmp_path, pictures):
    (a, b, _), (shown_a, shown_b, _) = pictures
    talk = json.dumps(TALK).encode()
    long = "folder/" + "n" * 150  # names that need a header of their own
    write_tar(tmp_path / "0.tar", [("1.png", a), ("1.json", talk), ("._1.png", b"macOS")])
    options = {"format": tarfile.PAX_FORMAT}
    write_tar(tmp_path / "1.tar", [(f"{long}.json", talk), (f"{long}.png", b)], **options)
    for source, expected in ((tmp_path, [shown_a, shown_b]), (tmp_path / "1.tar", [shown_b])):
        dataset = llava_dataset(transform(), source=str(source))
        assert len(dataset) == len(expected)
        for index, picture in enumerate(expected):
            assert messages_of(dataset, index)[0] == ("user", [picture, "What?"], False)
    rows = pickle.loads(pickle.dumps(dataset.rows))
    assert rows[0]["__key__"] == long
    assert rows.column("conversations") == [TALK["conversations"]]
    assert rows.column("image")[0]["bytes"] == b
    assert len(open_rows(str(tmp_path), split="train[1:]")) == 1


def test_captions_and_names_in_tars(tmp_path, pictures):
    (a, b, _), (shown_a, shown_b, _) = pictures
    write_tar(tmp_path / "t.tar", [("1.png", a), ("1.txt", b"A red apple\n"), ("2.png", b)])
    dataset = caption_dataset(transform(), source=str(tmp_path / "t.tar"), caption_column="txt")
    assert messages_of(dataset)[1] == ("assistant", ["A red apple"], True)
    with pytest.raises(ValueError, match=r"t\.tar, row 1: no 'txt' in the row"):
        dataset[1]
    named = {**TALK, "images": ["k.b.png", "x/k.a.png"]}
    named["conversations"] = [
        {"from": "human", "value": "<image><image>?"},
        TALK["conversations"][1],
    ]
    members = [("x/k.a.png", a), ("x/k.b.png", b), ("x/k.json", json.dumps(named).encode())]
    source = write_tar(tmp_path / "n.tar", members)
    dataset = sharegpt_dataset(transform(), source=source)
    assert messages_of(dataset)[0] == ("user", [shown_b, shown_a, "?"], False)


def test_digests_of_rows_of_tars(tmp_path, pictures):
    (a, *_), _ = pictures
    source = write_tar(tmp_path / "t.tar", [("1.png", a), ("1.txt", b"A."), ("2.png", a)])
    before = open_rows(source)
    digests = [before.digest(k) for k in range(2)]
    os.utime(source, ns=(0, 0))
    with pytest.raises(ValueError, match="has changed since"):
        before[0]
    write_tar(tmp_path / "t.tar", [("1.png", a), ("1.txt", b"B."), ("2.png", a)])
    after = open_rows(source)
    assert after.digest(0) != digests[0]
    assert after.digest(1) == digests[1]


def test_tars_that_cannot_be(tmp_path, pictures):
    (a, b, _), _ = pictures
    path = tmp_path / "t.tar"
    write_tar(path, [("1.png", a), ("2.png", b), ("1.txt", b"A.")])
    with pytest.raises(ValueError, match=r"t.tar: the members of a row lie side by side, .* of 1"):
        open_rows(str(path))
    write_tar(path, [("1.png", a * 50), ("2.png", b * 50)])
    whole = path.read_bytes()
    for damaged in (whole[: len(whole) // 2], b"x" * 2000, gzip.compress(whole)):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"t\.tar: cannot be read as a tar"):
            open_rows(str(path))
    members = [("1.xyz", b"?"), ("2.json", b"{"), ("3.json", b"[]"), ("4.txt", b"\xff")]
    members += [("5.json", b'{"image": "gone.png"}'), ("5.png", a)]
    rows = open_rows(write_tar(path, members))
    matches = ["members of a row are texts", "is not JSON", "got list", "not UTF-8", "names 'gone"]
    for index, match in enumerate(matches):
        with pytest.raises(ValueError, match=match):
            rows[index]
    assert rows.column("image") == [None] * 5
    assert rows.column("txt") == [None] * 5
