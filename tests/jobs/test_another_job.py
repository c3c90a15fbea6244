"""A whole job that makes no captions: the rooms' parts put together for records of its own."""

import json
import os
import signal
from contextlib import closing
from dataclasses import dataclass

import captions
import pytest
from forked import exit_code, fork

from torchtune_qwen25vl import jobs

KEYS = {"inputs": "photos", "model": "m", "min_pixels": 3136, "batch_size": 2, "workers": 0}


@dataclass(frozen=True, kw_only=True)
class Settings(jobs.JobSettings):
    """A key of its own beside those of every job."""

    command = "brightness"
    results = "brightness"
    decides = (*jobs.JobSettings.decides, "offset")

    offset: int = 0


@dataclass(frozen=True)
class Brightness:
    """The mean of an image, in the place of hidden states."""

    name: str
    state: str
    mean: float = 0.0


def mean(source):
    return float(jobs.read_pixels(source, 3136, 12544).mean())


def measure(settings, stack, *, dies_after=None):
    """The job: plan, go through the batches, write down; killed after so many of them."""
    ranks = stack.enter_context(closing(jobs.Ranks()))
    workers = stack.enter_context(closing(settings.start_workers(ranks.local_size)))
    run = jobs.Run(settings.decisive(), max_pixels=12544, batch_tokens=10**6, format="fp32")
    items = {item.name: item for item in jobs.find_items(settings.sources)}
    stack.enter_context(jobs.claimed(settings.folder))
    past = jobs.take_up(
        settings.folder,
        Brightness,
        run,
        complete=lambda record: record,
        restart=settings.restart,
        dry_run=settings.dry_run,
    )
    counts = jobs.count_tokens(list(items.values()), workers, 3136, run.max_pixels)
    tokens = {name: count.value for name, count in counts.items() if not count.problem}
    batches = jobs.plan_batches(
        tokens, batch_size=settings.batch_size, batch_tokens=settings.batch_tokens, text_tokens=0
    )
    left = [batch for batch in batches if not set(batch) <= set(past.records)]
    journal = stack.enter_context(closing(jobs.Journal(settings.folder, ranks.rank, run)))
    tasks = (jobs.read_task(mean, items[name]) for batch in left for name in batch)
    ahead = jobs.Ahead(workers.map(tasks, ahead=4))
    stack.enter_context(closing(ahead))
    outcomes = iter(ahead)
    with jobs.Progress(len(items), ["done"], unit="image", show=False) as progress:
        for number, batch in enumerate(left):
            if number == dies_after:
                os.kill(os.getpid(), signal.SIGKILL)
            values = [next(outcomes).value + settings.offset for _ in batch]
            records = [Brightness(n, "done", v) for n, v in zip(batch, values, strict=True)]
            journal.add(records)
            progress.add(records)
    found = jobs.read_journals(settings.folder, Brightness).records
    states = {name: found[name].mean for name in items if name in found}
    (settings.folder / "means.json").write_text(json.dumps(states))
    return int(len(states) < len(items))


@pytest.fixture
def photos(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = {**KEYS, "batch_tokens": 9999, "offset": 0}
    (tmp_path / "brightness.yaml").write_text(json.dumps(config))  # JSON is YAML
    return captions.write_pictures(tmp_path / "photos", 7)


def command(tmp_path, *words, **options):
    """`brightness WORD...`; its exit code."""

    def run(cfg):
        settings = jobs.read_settings(cfg, Settings)
        return jobs.run_job(lambda stack: measure(settings, stack, **options))

    config = tmp_path / "brightness.yaml"
    return jobs.run_command(words, run, Settings, usage="brightness INPUT...", config=config)


def test_killed_and_started_again(photos, tmp_path):
    assert command(tmp_path, "photos", "output_dir=whole") == 0
    child = fork(lambda: command(tmp_path, "photos", dies_after=2))
    assert exit_code(child) == -signal.SIGKILL
    folder = photos / "_brightness"
    assert len(jobs.read_journals(folder, Brightness).records) in (3, 4)  # two batches of two
    assert command(tmp_path, "photos") == 0
    whole = json.loads((tmp_path / "whole" / "means.json").read_text())
    assert json.loads((folder / "means.json").read_text()) == whole
    assert len(set(whole.values())) == 7


def test_its_own_keys_decide_and_are_parsed(photos, tmp_path):
    assert command(tmp_path, "photos") == 0
    assert command(tmp_path, "photos", "offset=1") == 0  # another run
    assert (photos / "_brightness" / "earlier-1-journal-0.jsonl").exists()
    means = json.loads((photos / "_brightness" / "means.json").read_text())
    assert all(value > 1 for value in means.values())


def test_damage_ends_in_the_exit_code_and_refusals_in_one_line(photos, tmp_path, caplog, capsys):
    (photos / "bad.png").write_bytes(b"no picture")
    assert command(tmp_path, "photos") == 1
    assert command(tmp_path, "nowhere") == 2
    assert caplog.messages[-1].endswith("nowhere does not")
    assert command(tmp_path) == 2
    assert command(tmp_path, "--help") == 0
    assert "brightness INPUT..." in capsys.readouterr().out
