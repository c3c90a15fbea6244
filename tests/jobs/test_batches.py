"""What counts in the tokens of a batch."""

from torchtune_qwen25vl.jobs import plan_batches


def sizes(**limits):
    """Rows of each batch of 3 items, of 4 placeholders each but one of 7."""
    batches = plan_batches({"a": 4, "b": 7, "c": 4}, batch_size=9, **limits)
    return [len(batch) for batch in batches]


def test_every_row_counts_with_its_padding_and_its_answer():
    rows = 3 * (7 + 12)
    assert sizes(batch_tokens=rows, text_tokens=12) == [3]
    assert sizes(batch_tokens=rows - 1, text_tokens=12) == [1, 2]
    assert sizes(batch_tokens=rows, text_tokens=13) == [1, 2]
    assert sizes(batch_tokens=2 * (7 + 12) - 1, text_tokens=12) == [2, 1]  # the widest is alone
