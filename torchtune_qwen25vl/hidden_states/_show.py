"""What a folder of states holds, as text."""

from collections import Counter
from collections.abc import Iterator

import numpy as np

from torchtune_qwen25vl.hidden_states._states import States

CHUNK = 1024  # rows that are looked at together
TEXTS = {"image": "images", "question": "questions", "truth": "truths", "answer": "answers"}


def describe(states: States, *, detailed: bool = False) -> str:
    """Say what there is: the run, rows by state, and each selector with its range.

    Args:
        states: of a run
        detailed: whether to name the rows that failed, and the columns of the table
    """
    counts = Counter(states.states)
    lines = [f"{len(states)} rows: {', '.join(f'{n} {s}' for s, n in sorted(counts.items()))}"]
    lines += [f"  {name}: {value}" for name, value in _told(states)]
    if detailed:
        columns = sorted({name for row in states.rows for name in row})
        lines.append(f"  other columns: {', '.join(columns) or 'none'}")
        lines += [
            f"  failed: {one}: {why}"
            for one, state, why in zip(states.ids, states.states, states.reasons, strict=True)
            if state == "failed"
        ]
    width = max(map(len, states.selectors), default=8)
    head = f"{'selector':{width}}  {'shape':>14}  {'dtype':9}"
    lines.append(f"{head}  {'min':>10} {'max':>10} {'mean':>10} {'std':>10}")
    lines += [_line(states, name, width) for name in states.selectors]
    return "\n".join(lines)


def describe_sample(states: States, wanted: str) -> str:
    """Say all there is about one row.

    Raises:
        ValueError: if there is no such row.
    """
    if wanted not in states.ids:
        raise ValueError(f"there is no row {wanted!r}, but {', '.join(states.ids[:5])}, ...")
    number = states.ids.index(wanted)
    lines = [f"{wanted}: {states.states[number]} {states.reasons[number]}".rstrip()]
    lines += [f"  {name}: {getattr(states, texts)[number]}" for name, texts in TEXTS.items()]
    lines += [f"  {name}: {value}" for name, value in states.rows[number].items()]
    for name in states.selectors:
        values = np.asarray(states[name][number], dtype=np.float32)
        shown = np.array2string(values.reshape(-1)[:6], precision=4, separator=", ")
        lines.append(f"  {name} {list(values.shape)}: {shown[:-1]}, ...]")
    return "\n".join(lines)


def _told(states: States) -> Iterator[tuple[str, str]]:
    hidden = ("selectors", "widths", "format", "ids")
    yield from ((name, value) for name, value in states.facts.items() if name not in hidden)


def _line(states: States, name: str, width: int) -> str:
    found = states[name]
    done = [k for k, state in enumerate(states.states) if state == "done"]
    if isinstance(found, np.ndarray):
        shape, dtype = str(list(found.shape)), str(found.dtype)
        pieces = (found[done[k : k + CHUNK]] for k in range(0, len(done), CHUNK))
    else:
        shape, dtype = f"{len(found)} of [t, {found[0].shape[1]}]", str(found[0].dtype)
        pieces = (found[k] for k in done)
    low, high, total, squares, count = np.inf, -np.inf, 0.0, 0.0, 0
    for piece in pieces:
        values = np.asarray(piece, dtype=np.float64)
        values = values[np.isfinite(values)]
        if values.size:
            low, high = min(low, values.min()), max(high, values.max())
            total, squares = total + values.sum(), squares + np.square(values).sum()
            count += values.size
    head = f"{name:{width}}  {shape:>14}  {dtype:9}"
    if not count:
        return f"{head}  no values"
    mean = total / count
    std = np.sqrt(max(squares / count - mean**2, 0))
    return f"{head}  {low:10.4g} {high:10.4g} {mean:10.4g} {std:10.4g}"
