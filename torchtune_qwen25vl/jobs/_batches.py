"""Which items go through the model together: those of near-equal token count, largest first.

The batches follow from the items and the settings alone, not from what is done already: a run that
was killed makes again what is left of the batches that it had not finished, and no others.
"""

from collections.abc import Mapping


def plan_batches(
    tokens: Mapping[str, int], *, batch_size: int, batch_tokens: int, text_tokens: int
) -> list[list[str]]:
    """Group items, by name, batch by batch.

    The smallest come first, as they are soon read and the model need not wait. The largest come
    next: where memory runs out it does so at once, not in the middle of the night.

    Args:
        tokens: placeholders of each item
        batch_size: most items in a batch
        batch_tokens: most tokens in a batch, padding and answers included; one item always fits
        text_tokens: tokens of each row beside its placeholders: the prompt and the answer
    """
    batches: list[list[str]] = []
    widest = 0
    for name in sorted(tokens, key=lambda name: -tokens[name]):  # stable: else in input order
        rows = len(batches[-1]) + 1 if batches else 0
        if not batches or rows > batch_size or rows * (widest + text_tokens) > batch_tokens:
            batches.append([])
            widest = tokens[name]
        batches[-1].append(name)
    return batches[-1:] + batches[:-1]
