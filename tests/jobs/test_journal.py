"""The journal of a job with records of its own: what is read back, taken up, refused."""

import json
from dataclasses import dataclass, replace

import pytest

from torchtune_qwen25vl.jobs import Journal, Past, Run, read_journals, take_up


@dataclass(frozen=True)
class Row:
    """A record that has nothing to do with captions."""

    name: str
    state: str
    slot: int = -1
    complete: bool = False


RUN = Run({"model": "m", "seed": 0}, max_pixels=784, batch_tokens=10, format="fp32")
A, B, C = Row("a", "done", 0), Row("b", "failed"), Row("c", "done", 2)


def write(folder, rank, *batches, run=RUN):
    journal = Journal(folder, rank, run)
    for batch in batches:
        journal.add(batch)
    journal.close()


def begun(folder, run=RUN, *, restart=False, dry_run=False):
    """What this run has done before."""

    def complete(row):
        return replace(row, complete=True)

    return take_up(folder, Row, run, complete=complete, restart=restart, dry_run=dry_run)


def lines(folder, rank=0):
    return list(map(json.loads, (folder / f"journal-{rank}.jsonl").read_text().splitlines()))


def test_the_last_record_of_a_name_counts(tmp_path):
    write(tmp_path, 0, [A, B], [replace(B, state="done")])
    write(tmp_path, 1, [C], [])
    assert read_journals(tmp_path, Row) == Past(
        RUN, {"a": A, "b": replace(B, state="done"), "c": C}
    )
    assert len(lines(tmp_path, 1)) == 2  # a batch of nothing is not written


@pytest.mark.parametrize("kept", [1, 40, -1])
def test_a_line_that_was_cut_short_never_was(tmp_path, kept):
    write(tmp_path, 0, [A], [B])
    path = tmp_path / "journal-0.jsonl"
    *whole, last = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(whole) + last[:kept])
    assert set(read_journals(tmp_path, Row).records) == {"a"}
    write(tmp_path, 0, [C])
    assert set(read_journals(tmp_path, Row).records) == {"a", "c"}


def test_a_header_that_was_cut_short_is_written_again(tmp_path):
    (tmp_path / "journal-0.jsonl").write_bytes(b'{"format": 2, "ru')
    assert begun(tmp_path) == Past(RUN)
    write(tmp_path, 0, [A])
    assert read_journals(tmp_path, Row) == Past(RUN, {"a": A})


def test_the_journals_of_all_ranks_become_one(tmp_path):
    write(tmp_path, 0, [A])
    write(tmp_path, 1, [C])
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert set(begun(tmp_path, dry_run=True).records) == {"a", "c"}
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    past = begun(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["journal-0.jsonl"]
    assert all(row.complete for row in past.records.values())
    assert read_journals(tmp_path, Row) == past


def test_another_run_starts_anew_and_the_old_journal_stays(tmp_path):
    write(tmp_path, 0, [A])
    other = replace(RUN, settings={"model": "m", "seed": 1})
    assert begun(tmp_path, other, dry_run=True) == Past(other)
    assert begun(tmp_path, other) == Past(other)
    kept = (tmp_path / "earlier-1-journal-0.jsonl").read_text()
    assert '"complete": true' in kept
    write(tmp_path, 0, [A], run=other)
    assert begun(tmp_path, other, restart=True) == Past(other)
    assert (tmp_path / "earlier-2-journal-0.jsonl").exists()


def test_a_run_keeps_the_limits_that_it_began_with(tmp_path):
    write(tmp_path, 0, [A])
    more = replace(RUN, max_pixels=9999, batch_tokens=9999)
    assert begun(tmp_path, more).run == RUN
    assert begun(tmp_path, replace(more, format=None), dry_run=True).run == RUN
    with pytest.raises(ValueError, match="in fp32 and this one would be in bf16: set dtype"):
        begun(tmp_path, replace(RUN, format="bf16"))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"run": {"settings": {}}}, "its format is 1, not 2: another version's"),
        ({"format": 3, "run": {}}, "its format is 3, not 2: another version's"),
        ({"format": 2}, "line 1, cannot be read"),
        ({"batch": []}, "line 1, cannot be read"),
        ([], "line 1, cannot be read"),
    ],
)
def test_other_first_lines_are_refused(tmp_path, line, message):
    (tmp_path / "journal-0.jsonl").write_text(json.dumps(line) + "\n")
    with pytest.raises(ValueError, match=message) as refused:
        begun(tmp_path)
    assert "restart=True" in str(refused.value)
    assert begun(tmp_path, restart=True) == Past(RUN)


def test_records_of_another_job_are_refused(tmp_path):
    write(tmp_path, 0, [A])
    with (tmp_path / "journal-0.jsonl").open("a") as file:
        file.write('{"batch": [{"name": "x", "state": "done", "caption": "A dog."}]}\n')
    with pytest.raises(ValueError, match=r"line 3, cannot be read .*'caption'"):
        read_journals(tmp_path, Row)
