"""Where the installed transformers leaves Qwen's own rule for positions."""

from parity import reference, report
from parity.inputs import make_inputs

# name -> layout; the seconds are those between two frame groups: 2 / frames per second
CASES: dict[str, list[list[int | tuple]]] = {
    "image": [[5, (1, 10, 14), 9]],
    "two images": [[3, (1, 8, 8), 2, (1, 6, 18), 8]],
    "padded batch": [[4, (1, 6, 10), 7], [21]],
    "video 2 fps, short (T=3, 6 x 14)": [[4, (3, 6, 14, 1.0), 9]],
    "video 2 fps, long (T=20, 4 x 6)": [[4, (20, 4, 6, 1.0), 9]],
    "video 4 fps": [[4, (4, 8, 10, 0.5), 9]],
    "video 1.33 fps": [[4, (3, 8, 14, 1.5), 9]],
    "image and video": [[3, (1, 8, 6), 2, (8, 6, 4, 1.0), 6]],
}


def positions_table() -> str:
    """One line a layout: whether theirs equals the rule, else the largest difference."""
    model = reference.random_model("tiny")
    rows: list[tuple[str, ...]] = []
    for name, layout in CASES.items():
        inputs = make_inputs(layout, reference.IDS)
        try:
            theirs = reference.positions(model, inputs)
        except Exception as error:
            rows.append((name, f"{type(error).__name__}: {error}"[:60], ""))
            continue
        kept = inputs.attention_mask.bool()
        off = (theirs - inputs.positions).abs().amax(-1)[kept]  # [tokens]
        share = f"{int((off > 0).sum())} of {len(off)}"
        rows.append((name, "yes", "") if not off.any() else (name, f"off by {off.max()}", share))
    columns = (f"transformers {reference.VERSION}", "follows Qwen's rule", "tokens off")
    return report.table(rows, columns)
