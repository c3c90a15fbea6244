"""A page to look through answers, the worst first: one HTML file that holds what it shows."""

import html
from collections.abc import Iterator, Sequence
from pathlib import Path

from torchtune_qwen25vl._files import write_file
from torchtune_qwen25vl.evaluation._results import Results, Scored
from torchtune_qwen25vl.jobs import (
    Outcome,
    Task,
    Workers,
    attempt,
    image_tag,
    sources_of,
    styled,
    thumbnail,
)

PAGE = Path(__file__).with_name("page.html")
SCORES, ROWS = "<!-- scores -->", "<!-- rows -->"
FILE = "page.html"


def write_page(folder: Path, results: Results, about: str, workers: Workers, most: int) -> Path:
    """Write the page, whole or not at all; return its path.

    Args:
        folder: output folder of the run
        results: results of the run
        about: what stands above the rows
        workers: read the images
        most: rows on the page: those with the lowest score of the first metric, then failed ones
    """
    shown = worst_first(results)[:most]
    above, rest = styled(PAGE).split(SCORES)
    before, after = rest.split(ROWS)
    rows = "".join(_articles(shown, workers))
    page = f"{above}<pre>{html.escape(about)}</pre>{before}{rows}{after}"
    write_file(folder / FILE, page.encode("utf-8", "backslashreplace"))
    return folder / FILE


def worst_first(results: Results) -> list[Scored]:
    """Sort rows by their score of the first metric, rising; failed ones stand last."""
    scored = [row for row in results.rows if row.case is not None]
    return sorted(scored, key=lambda row: next(iter(row.scores.values()))) + results.failed


def _articles(rows: Sequence[Scored], workers: Workers) -> Iterator[str]:
    sources = [attempt(Task(sources_of, (row.row,))) for row in rows]
    tasks = (Task(thumbnail, (one,)) for found in sources for one in found.value or ())
    outcomes = workers.map(tasks, ahead=64)
    for row, found in zip(rows, sources, strict=True):
        yield _article(row, [next(outcomes) for _ in found.value or ()])


def _article(scored: Scored, images: Sequence[Outcome]) -> str:
    tags = "".join(image_tag(image.value or b"") for image in images) or image_tag(b"")
    told = ", ".join(f"{name} {score:.4f}" for name, score in scored.scores.items())
    case, state = scored.case, "failed" if scored.problem else "done"
    wanted = " | ".join(map(str, (case.references or case.boxes) if case else ()))
    lines = {
        "question": scored.row.text,
        "choices": " | ".join(case.choices) if case else "",
        "answer": scored.record.answer,
        "reference": wanted,
    }
    said = "".join(
        f"<p><b>{name}</b> {html.escape(text)}</p>" for name, text in lines.items() if text
    )
    return (
        f"<article>{tags}<div><h2>{html.escape(scored.row.name)}: "
        f'{html.escape(scored.row.image_id)}</h2><p class="state {state}">'
        f"{html.escape(told or scored.problem)}</p>{said}</div></article>\n"
    )
