"""Which images go through the model together: those of near-equal token count, largest first.

The batches follow from the images and the settings alone, not from what is done already: a run that
was killed makes the batches again that it had not finished, and no others.
"""

from collections.abc import Mapping


def plan_batches(
    tokens: Mapping[str, int], *, batch_size: int, batch_tokens: int, text_tokens: int
) -> list[list[str]]:
    """Names of images, batch by batch.

    First the smallest, soon read, so that the model need not wait; then the largest: where memory
    runs out it does so at once, not in the middle of the night.

    Args:
        tokens: placeholders of each image
        batch_size: most images in a batch
        batch_tokens: most tokens in a batch, padding and answers included; one image always fits
        text_tokens: of each row beside its placeholders: the prompt and the answer
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
