"""Embed the prompts of a run: what `embed_prompts` does, and what `image` does first."""

import logging
from contextlib import ExitStack, closing

from torchtune_qwen25vl.conditioning._batches import Embedder, Prompter
from torchtune_qwen25vl.conditioning._checked import CheckedEncoder
from torchtune_qwen25vl.conditioning._run import STATES, Plan, Record, write_down
from torchtune_qwen25vl.conditioning._settings import Settings
from torchtune_qwen25vl.device import attention_kernels
from torchtune_qwen25vl.jobs import Ahead, Journal, Progress, Ranks, refuse_nan

logger = logging.getLogger(__name__)


def embed_batches(settings: Settings, plan: Plan, ranks: Ranks, encoder: CheckedEncoder) -> None:
    """Embed the batches of this rank, their images being read ahead of the model.

    The memory of the encoder is given back at the end.
    """
    with ExitStack() as stack:
        journal = Journal[Record](settings.folder, ranks.rank, plan.run)
        stack.enter_context(closing(journal))
        batches = [[plan.rows[name] for name in batch] for batch in ranks.share(plan.batches)]
        if not batches:
            return
        workers = stack.enter_context(closing(settings.start_workers(ranks.local_size)))
        prompter = Prompter(encoder.transform, settings)
        ahead = Ahead(prompter.batches(batches, workers, ahead=2 * settings.batch_size))
        stack.enter_context(closing(ahead))
        loaded = encoder.load()
        stack.callback(loaded.release)
        embedder = Embedder(loaded, settings.tokens_together(plan.run.batch_tokens))
        total = sum(map(len, batches))
        with Progress(total, STATES, unit="prompt", show=ranks.is_first) as progress:
            for batch in ahead:
                with attention_kernels(encoder.choice):
                    embedded = embedder(batch.prompts)
                progress.add(write_down(settings, plan, journal, embedded, batch.problems))
                refuse_nan(["" if one.is_finite else one.problem for one in embedded])
            logger.info("%s", progress.speed(ahead.waited))
