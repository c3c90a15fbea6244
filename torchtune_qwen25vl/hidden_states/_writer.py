"""What a rank writes down while it goes through its batches: states first, then their records."""

from collections.abc import Mapping, Sequence

from torchtune_qwen25vl.hidden_states._columns import Columns
from torchtune_qwen25vl.hidden_states._extract import Extract
from torchtune_qwen25vl.hidden_states._layout import Layout
from torchtune_qwen25vl.hidden_states._records import Record
from torchtune_qwen25vl.hidden_states._run import Plan
from torchtune_qwen25vl.hidden_states._settings import Settings
from torchtune_qwen25vl.jobs import Journal, row_failure


class Writer:
    """The states and the journal of one rank.

    The journal names a row when its states are on disk; a run that is killed in between writes them
    again, to the same places.

    Args:
        settings: settings of the recipe
        plan: plan of the run
        layout: of the states
        rank: of this process
    """

    def __init__(self, settings: Settings, plan: Plan, layout: Layout, rank: int) -> None:
        self._settings, self._plan = settings, plan
        self._names = list(layout.selectors)
        self._columns = Columns(settings.folder, layout, rank, _ends(plan, rank))
        self._journal = Journal[Record](settings.folder, rank, plan.run)

    def add_failed(self) -> None:
        """Write down the rows that failed while the run was planned."""
        failed = [r for r in self._plan.settled.values() if r.state == "failed"]
        self._columns.write_absent([self._plan.rows[record.name].number for record in failed])
        self._journal.add(self._plan.unjournaled)

    def write(self, extracts: Sequence[Extract], problems: Mapping[str, str]) -> list[Record]:
        """Write down a batch; return how its rows ended.

        Args:
            extracts: what the model gave
            problems: why the other rows were not asked, by name
        """
        done = [extract for extract in extracts if not extract.problem]
        failed = dict(problems) | {e.question.row.name: e.problem for e in extracts if e.problem}
        rows = self._plan.rows
        places = self._columns.write(
            [extract.question.row.number for extract in done],
            {name: [extract.states[name] for extract in done] for name in self._names},
        )
        self._columns.write_absent([rows[name].number for name in failed])
        records = [
            self._record(extract, place) for extract, place in zip(done, places, strict=True)
        ]
        records += [
            row_failure(Record, rows[name], why, self._settings) for name, why in failed.items()
        ]
        self._journal.add(records)
        return records

    def _record(self, extract: Extract, places: Mapping[str, Sequence[int]]) -> Record:
        row = extract.question.row
        return Record(
            row.name,
            "done",
            asked=self._settings.asked(row),
            answer=extract.answer,
            finish=extract.finish,
            tokens=len(extract.question.sample["tokens"]),
            places=places,
        )

    def close(self) -> None:
        """Close the files."""
        self._journal.close()
        self._columns.close()


def _ends(plan: Plan, rank: int) -> dict[str, int]:
    """Return how many vectors of this rank the journal knows, for selectors of whole spans."""
    ends: dict[str, int] = {}
    for record in plan.settled.values():
        for name, (writer, first, count) in record.places.items():
            if writer == rank:
                ends[name] = max(ends.get(name, 0), first + count)
    return ends
