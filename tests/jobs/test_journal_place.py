"""The journal in its place: what a dry run leaves alone, and a file that is not the one opened."""

import pytest
from test_journal import RUN, A, B, Row, begun, write

from torchtune_qwen25vl.jobs import Journal, Past, read_journals


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("restart", [False, True])
def test_a_dry_run_leaves_everything_as_it_is(tmp_path, restart):
    write(tmp_path, 0, [A])
    write(tmp_path, 1, [B])
    before = contents(tmp_path)
    past = begun(tmp_path, restart=restart, dry_run=True)
    assert contents(tmp_path) == before
    assert set(past.records) == (set() if restart else {"a", "b"})
    assert begun(tmp_path, restart=restart).records.keys() == past.records.keys()  # the control
    assert contents(tmp_path) != before


@pytest.mark.parametrize("copied", [False, True])
def test_a_journal_in_whose_place_another_lies_takes_nothing(tmp_path, copied):
    """As after a drive was exchanged: what is written to the open file would be lost."""
    path = tmp_path / "journal-0.jsonl"
    journal = Journal(tmp_path, 0, RUN)
    journal.add([A])
    before = path.read_bytes()
    path.rename(tmp_path / "away.jsonl")
    if copied:
        path.write_bytes(before)
    with pytest.raises(ValueError, match=r"journal-0.jsonl is gone: put its folder back"):
        journal.add([B])
    path.unlink(missing_ok=True)
    (tmp_path / "away.jsonl").rename(path)
    assert path.read_bytes() == before
    journal.add([B])  # it has come back
    journal.close()
    assert read_journals(tmp_path, Row) == Past(RUN, {"a": A, "b": B})
