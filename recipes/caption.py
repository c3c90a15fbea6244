"""Caption folders of images, safe to be left alone and to be killed.

    caption photos
    tune-qwen25vl run caption --config caption inputs=photos preset=detailed
    tune-qwen25vl run --nproc_per_node 8 caption --config caption inputs=photos

Before any image is read the model is checked: its files, its memory, its disk. Then the headers of
the images are read, batches are made of images of near-equal size, and worker processes decode them
ahead of the model. Every image ends in one state: done, skipped (it had a caption), failed (with a
reason), cut (at the length limit) or looped (repeating itself). A journal in the output folder
holds all of it, so that a run that was stopped goes on where it was when it is started again.

Several ranks need one folder for the output that all of them see.

Exit codes: 0 all well, 1 some images failed, 2 it could not start or go on (the reason is the last
line; what is done stays done).
"""

import logging
import sys
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from torchtune_qwen25vl import captioning as ours
from torchtune_qwen25vl import device

logger = logging.getLogger("caption")


class CaptionRecipe:
    """Checks, plans, captions, and writes it all down.

    Args:
        cfg: what the YAML says
        stack: closes what is opened

    Raises:
        ValueError: if that is wrong, before anything is loaded.
    """

    def __init__(self, cfg: DictConfig, stack: ExitStack) -> None:
        self.settings, self.stack = ours.read_settings(cfg), stack
        self.output_dir = self.settings.folder
        self.preset = self.settings.read_preset()
        self.wording = self.settings.wording()
        self.policy = self.settings.policy()

    def setup(self) -> None:
        """Check the model, then find out what is to be done; no image is decoded."""
        settings = self.settings
        self.ranks = ours.Ranks()
        self.stack.callback(self.ranks.close)
        self.check_model()
        cores = ours.count_cores() // self.ranks.local_size
        count = settings.workers if settings.workers is not None else min(8, max(1, cores - 1))
        self.workers = ours.Workers(count, seconds=settings.seconds_per_image)
        self.stack.callback(self.workers.close)
        self.plan, self.run, self.batches = self.ranks.from_first(self.plan_all)

    def check_model(self) -> None:
        """Fetch the model and check it; its tokenizer is read, its weights are not."""
        settings = self.settings
        if settings.dry_run and (away := self.describe_download()):
            logger.info("%s", away)
            self.limits = {
                "max_pixels": settings.max_pixels or device.MOST_PIXELS,
                "batch_tokens": settings.batch_tokens,
                "format": None,  # not known yet
            }
            return
        source = device.fetch(
            settings.model, cache_dir=settings.cache_dir, compare=not settings.dry_run
        )
        question = len(self.preset.prompt) + len(settings.system_prompt or "")  # bounds its tokens
        found = device.check_model(
            source,
            device.look(settings.device, ranks=self.ranks.local_size),
            device.Load(
                question + self.preset.max_new_tokens, settings.min_pixels, settings.max_pixels
            ),
            settings_dir=settings.settings_dir,
            allow_downgrade=settings.allow_downgrade,
            dtype=settings.dtype,
            attention=settings.attention,
            four_bit=settings.four_bit,
        )
        logger.info("%s", found.table)
        self.choice = found.refuse()
        logger.info("%s", self.choice)
        self.limits = {
            "max_pixels": found.max_pixels,
            "batch_tokens": found.batch_tokens,
            "format": self.choice.format,
        }
        self.model = device.LoadedModel(source, self.choice, settings.settings_dir)

    def describe_download(self) -> str:
        """What would have to be fetched first; empty where all is here."""
        away = device.bytes_to_fetch(self.settings.model, self.settings.cache_dir)
        amount = "an unknown part" if away is None else f"{away / 1e9:.2f} GB"
        return "" if away == 0 else f"{amount} of {self.settings.model} would be fetched first"

    def plan_all(self) -> tuple[ours.Plan, dict[str, Any], list[list[str]]]:
        """For all ranks: what is to be done, what the captions depend on, batches of names."""
        settings = self.settings
        items = ours.find_items(
            settings.sources, columns=settings.columns, recursive=settings.recursive
        )
        if not settings.dry_run:
            self.stack.enter_context(ours.claimed(self.output_dir))
        past = self.past()
        run = past.run or {"settings": settings.decisive(), **self.limits}
        table = ours.read_table(self.output_dir)
        plan = ours.make_plan(items, self.policy, past, table, retry_failed=settings.retry_failed)
        if not settings.dry_run:
            self.move_texts(plan)
        batches = ours.plan_batches(
            self.count_tokens(plan, run["max_pixels"]),
            batch_size=settings.batch_size,
            batch_tokens=min(settings.batch_tokens, run["batch_tokens"]),
            text_tokens=self.preset.max_new_tokens,
        )
        left = [[name for name in batch if name not in plan.settled] for batch in batches]
        return plan, run, [batch for batch in left if batch]

    def move_texts(self, plan: ours.Plan) -> None:
        """Write captions that are known into text files where these are asked for now."""
        records, left = ours.moved(plan, self.policy)
        for record in records:
            if (placed := ours.place(record)).state == "failed":
                raise ValueError(f"{record.name}: {placed.reason}; what is done stays as it was")
            plan.settle(placed)
        if left:
            logger.warning(
                "%d text files that are there stay as they are, such as %s; existing=overwrite "
                "replaces them",
                *(len(left), ascii(left[0].file)),
            )

    def past(self) -> ours.Past:
        """What this run has done before, its text files in place; nothing of another run."""
        settings = self.settings
        if settings.restart:
            if not settings.dry_run:
                ours.set_aside(self.output_dir)
            return ours.Past()
        past = ours.read_journals(self.output_dir)
        if past.run is None:
            return past
        is_same = past.run["settings"] == settings.decisive()
        if is_same and self.limits["format"] not in (None, past.run["format"]):
            raise ValueError(
                f"{self.output_dir} holds a run in {past.run['format']} and this one would be in "
                f"{self.limits['format']}: set dtype and four_bit as before, or restart=True"
            )
        if not settings.dry_run:
            for name in past.unplaced:
                past.records[name] = ours.place(past.records[name])
            ours.merge_journals(self.output_dir, past)
            if not is_same:
                ours.set_aside(self.output_dir)
        return past if is_same else ours.Past()

    def count_tokens(self, plan: ours.Plan, max_pixels: int) -> dict[str, int]:
        """Placeholders of all images that batches are made of; what cannot be read has failed."""
        items = plan.to_batch
        counts = ours.count_all_tokens(items, self.workers, self.settings.min_pixels, max_pixels)
        bar = tqdm(counts, "reading headers", len(items), unit="image", leave=False)
        tokens = {}
        for item, count in zip(items, bar, strict=True):
            if not count.problem:
                tokens[item.name] = count.value
            elif item.name not in plan.settled:
                plan.settle(ours.Record(item.name, "failed", reason=count.problem))
        return tokens

    def show_plan(self) -> int:
        """Say what would be done with every image."""
        moves = {record.name for record in ours.moved(self.plan, self.policy)[0]}
        for name in self.plan.items:
            record = self.plan.settled.get(name)
            file = self.plan.texts.get(name, self.output_dir)
            if name in moves:
                word = f"has a caption, to be written to {file}"
            elif record:
                word = f"{record.state}, {record.reason}"
            else:
                word = f"to be captioned, {file}"
            print(ours.printable(f"{name}: {word}"))
        states = Counter(record.state for record in self.plan.settled.values())
        pending, failed = len(self.plan.pending), states["failed"]
        print(f"{pending} to be captioned in {len(self.batches)} batches; {ours.summary(states)}")
        return int(failed > 0)

    def caption(self) -> None:
        """Caption the batches of this rank."""
        settings, plan, ranks = self.settings, self.plan, self.ranks
        journal = ours.Journal(self.output_dir, ranks.rank, self.run)
        self.stack.callback(journal.close)
        if ranks.is_first:
            journal.add(plan.news)
            journal.placed([record.name for record in plan.news])
        batches = self.batches[ranks.rank :: ranks.size]
        if not batches:
            return
        questioner = ours.Questioner(
            self.model.transform,
            self.wording,
            plan.existing,
            min_pixels=settings.min_pixels,
            max_pixels=self.run["max_pixels"],
        )
        items = [[plan.items[name] for name in batch] for batch in batches]
        ahead = ours.Ahead(questioner.batches(items, self.workers, 2 * settings.batch_size))
        self.stack.callback(ahead.close)
        answer = ours.Answerer(
            self.model.model,  # loaded now, while the first images are being read
            self.model.transform,
            self.preset,
            seed=settings.seed,
            shrunk=lambda question, pixels: questioner.again(plan.items[question.name], pixels),
            min_pixels=settings.min_pixels,
        )
        total = sum(map(len, batches))
        with ours.Progress(total, show=ranks.is_first) as progress:
            for batch in ahead:
                with device.attention_kernels(self.choice):
                    answers = answer(batch.questions)
                records = [self.record(answer) for answer in answers]
                records += [
                    ours.Record(name, "failed", reason=problem)
                    for name, problem in batch.problems.items()
                ]
                progress.add(self.write_down(journal, records))
            logger.info("%s", progress.speed(ahead.waited))

    def record(self, answer: ours.Answer) -> ours.Record:
        """What is written down of an answer."""
        question = answer.question
        record = ours.Record(
            question.name,
            answer.state,
            self.wording.around(answer.text) if answer.text else "",
            answer.reason,
            answer.tokens,
            question.max_pixels,
            "; ".join(question.steps),
        )
        return ours.with_file(record, self.plan, self.policy)

    def write_down(self, journal: ours.Journal, records: list[ours.Record]) -> list[ours.Record]:
        """First into the journal, then into text files; the records as they ended."""
        journal.add(records)
        placed = [ours.place(record) for record in records]
        if unwritten := [new for new, old in zip(placed, records, strict=True) if new != old]:
            journal.add(unwritten)
        journal.placed([record.name for record in records])
        return placed

    def finish(self) -> int:
        """Tables and page of what all ranks did; the exit code."""
        self.ranks.wait()
        return self.ranks.from_first(self.write_tables)

    def write_tables(self) -> int:
        """The same, by the first rank."""
        written, settled = ours.read_journals(self.output_dir).records, self.plan.settled
        records = [settled.get(name) or written[name] for name in self.plan.items]
        ours.write_tables(self.output_dir, self.policy.formats, records)
        if self.settings.review:
            page = self.output_dir / "review.html"
            ours.write_review(page, list(self.plan.items.values()), records, self.workers)
            logger.info("look through the captions in %s", page)
        states = Counter(record.state for record in records)
        logger.info("%d images: %s", len(records), ours.summary(states))
        return int(states["failed"] > 0)


def run(cfg: DictConfig) -> int:
    """Everything, from a YAML to the exit code."""
    with logging_redirect_tqdm(), ExitStack() as stack:
        try:
            recipe = CaptionRecipe(cfg, stack)
            recipe.setup()
            if recipe.settings.dry_run:
                return recipe.show_plan() if recipe.ranks.is_first else 0
            recipe.caption()
            return recipe.finish()
        except (ValueError, OSError) as error:
            logger.error("%s", error)
            return 2
        except Exception:  # 1 would say that images failed
            logger.exception("the run cannot go on; what is done stays done")
            return 2


def run_words(words: Sequence[str]) -> int:
    """The same, from the words of a command line."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)  # a line for each request
    try:
        cfg = ours.read_words(words)
    except (ValueError, OmegaConfBaseException) as error:
        logger.error("%s", error)
        return 2
    return run(cfg)


if __name__ == "__main__":
    sys.exit(run_words(sys.argv[1:]))
