"""`python -m torchtune_qwen25vl.data check CONFIG`: what training on a recipe's data would meet."""

import argparse
import json
import os
import sys
from argparse import Namespace
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf
from torchtune import config
from torchtune.config._errors import InstantiationError
from torchtune.config._utils import _merge_yaml_and_cli_args
from yaml import YAMLError

from torchtune_qwen25vl._files import write_file
from torchtune_qwen25vl._rounding import warnings_of
from torchtune_qwen25vl.data._check import Bad, Sound, check_rows
from torchtune_qwen25vl.data._dataset import SampleDataset
from torchtune_qwen25vl.data._mixture import Mixture, parts_in
from torchtune_qwen25vl.data._preview import preview
from torchtune_qwen25vl.data._statistics import summary, write_histogram
from torchtune_qwen25vl.media import StreamRows
from torchtune_qwen25vl.transform import Qwen25VLTransform

SHOWN = 20  # bad rows that are printed
DESCRIPTION = """\
Read every row of the data sets that a recipe's YAML names, dataset and val_dataset, and of every
part of a mixture, exactly as training would: files are opened, images resized, conversations
tokenized. Bad rows are listed with their numbers and reasons; nothing is changed or fixed.

Written to the report's folder (each file whole, or not at all):
  report.json      every bad row; counts and quantiles of tokens, labels and pixels
  histogram-N.png  rows by tokens, by visual tokens, and by labelled share, for data set N; needs
                   matplotlib, the extra plots, and is left out aloud where that is missing

To train without the bad rows, give the data set its report:
  dataset.skip_bad_rows=data-report/report.json
"""
EPILOG = """\
exit code: 0 if every row can be trained on, 1 if some cannot, 2 if the check itself cannot run.

example:
  python -m torchtune_qwen25vl.data check my.yaml dataset.source=train.jsonl --preview 3
"""


def main(argv: list[str] | None = None) -> int:
    """Run the command line and return the exit code."""
    parser = _parser()
    arguments, overrides = parser.parse_known_args(argv)
    if unknown := [argument for argument in overrides if argument.startswith("-")]:
        parser.error(f"there are no options {' '.join(unknown)}; see check --help")
    try:
        cfg = _merge_yaml_and_cli_args(Namespace(**OmegaConf.load(arguments.config)), overrides)
        tokenizer, datasets = _build(arguments.config, cfg)
    except (ValueError, TypeError, OSError, YAMLError, InstantiationError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    for warning in warnings_of(cfg):
        print(warning)
    for key, dataset in datasets:
        _print_preview(key, dataset, tokenizer, arguments.preview)
    entries = []
    for number, (key, dataset) in enumerate(datasets):
        sound, bad = check_rows(dataset, num_workers=arguments.num_workers)
        entries.append(_entry(key, dataset, sound, bad))
        _print_entry(entries[-1])
        title = f"{key} {dataset.source}: {len(sound)} rows can be trained on, {len(bad)} cannot"
        write_histogram(arguments.report / f"histogram-{number}.png", sound, title)
    report = json.dumps({"datasets": entries}, indent=2) + "\n"
    write_file(arguments.report / "report.json", report.encode())
    print(f"written to {arguments.report}")
    return int(any(row["kind"] == "bad" for entry in entries for row in entry["bad"]))


def _parser() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="python -m torchtune_qwen25vl.data")
    commands = parser.add_subparsers(required=True, metavar="command")
    check = commands.add_parser(
        "check",
        help="read a recipe's whole data set and report bad rows and statistics",
        usage="python -m torchtune_qwen25vl.data check CONFIG [key=value ...] [options]",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=raw,
    )
    check.add_argument(
        "config",
        metavar="CONFIG",
        type=Path,
        help="a recipe's YAML; its tokenizer, dataset and val_dataset sections are used, and "
        "key=value (or ~key) after it changes them, as for tune run",
    )
    check.add_argument(
        "--preview",
        metavar="N",
        type=int,
        default=0,
        help="first show the first N rows as they are trained on: each token decoded, those with "
        "a label marked, placeholders counted, and a backslash before the name of a token that is "
        "there as characters",
    )
    check.add_argument(
        "--num-workers",
        metavar="N",
        type=int,
        default=min(os.cpu_count() or 1, 8),
        help="processes that read rows, 0 for none beside this one (default: %(default)s)",
    )
    check.add_argument(
        "--report",
        metavar="DIR",
        type=Path,
        default=Path("data-report"),
        help="folder to write to (default: %(default)s)",
    )
    return parser


def _build(
    path: Path, cfg: DictConfig
) -> tuple[Qwen25VLTransform, list[tuple[str, SampleDataset]]]:
    """Build a recipe's tokenizer, and its data sets with their keys, no row of them left out.

    Those of `dataset` come first, and then what `val_dataset` has, if it is there and not null; of
    a mixture its parts.
    """
    for section in ("tokenizer", "dataset"):
        if section not in cfg:
            raise ValueError(f"{path} has no {section}: section; is it a recipe's config?")
    tokenizer = config.instantiate(cfg.tokenizer)
    datasets = []
    for key, section in [*_sections(cfg, "dataset"), *_sections(cfg, "val_dataset")]:
        for one in (section, *parts_in(section)):
            one.pop("skip_bad_rows", None)
        dataset = config.instantiate(section, tokenizer)
        if isinstance(dataset, Mixture):
            parts = enumerate(dataset.joined.parts)
            datasets += [(f"{key}.datasets[{number}]", part) for number, part in parts]
        elif isinstance(dataset, SampleDataset):
            datasets.append((key, dataset))
        else:
            raise ValueError(
                f"{section._component_} is no dataset builder of torchtune_qwen25vl.data, so its "
                "rows cannot be named"
            )
    return tokenizer, datasets


def _sections(cfg: DictConfig, key: str) -> list[tuple[str, DictConfig]]:
    """Return what is under a key, nothing, one section or a list of them, each with the key."""
    found = cfg.get(key)
    sections = found if isinstance(found, ListConfig) else [found]
    return [(key, section) for section in sections if section is not None]


def _print_preview(
    key: str, dataset: SampleDataset, tokenizer: Qwen25VLTransform, count: int
) -> None:
    for row in range(min(count, len(dataset))):
        print(f"--- {key} {dataset.source}, row {row}")
        try:
            sample = dataset[row]
            print(preview(sample, tokenizer))
            if "rejected" in sample:
                print(f"--- and its rejected answer\n{preview(sample['rejected'], tokenizer)}")
        except ValueError as error:
            print(f"bad: {error}")


def _entry(key: str, dataset: SampleDataset, sound: list[Sound], bad: list[Bad]) -> dict[str, Any]:
    rows = dataset.rows
    return {
        "key": key,
        "source": dataset.source,
        "rows": len(rows),
        **({"stream": rows.identity()} if isinstance(rows, StreamRows) else {}),
        "sound": len(sound),
        "bad": [asdict(row) for row in bad],
        "rows_with_names_in_answers": sum(bool(row.names) for row in sound),
        "names_in_answers": sorted({name for row in sound for name in row.names}),
        "rows_with_weights": sum(row.weighted for row in sound),
        "statistics": summary(sound),
    }


def _print_entry(entry: dict[str, Any]) -> None:
    kinds = Counter(row["kind"] for row in entry["bad"])
    print(
        f"{entry['key']} {entry['source']}: {entry['rows']} rows, {kinds['bad']} bad, "
        f"{kinds['skipped']} skipped"
    )
    for row in entry["bad"][:SHOWN]:
        print(f"  {row['kind']}: {row['error']}")
    if len(entry["bad"]) > SHOWN:
        print(f"  and {len(entry['bad']) - SHOWN} more, all in report.json")
    if names := ", ".join(entry["names_in_answers"]):
        print(
            f"  {entry['rows_with_names_in_answers']} rows write {names} in their answers: "
            "characters, or with tokenizer.markup_in_answers=tokens those tokens"
        )
    if weighted := entry["rows_with_weights"]:
        print(f"  {weighted} rows have labels of a weight other than 1")
    statistics = entry["statistics"]
    for name, spread in statistics.items():
        if isinstance(spread, dict):
            values = "  ".join(f"{key} {value:,.0f}" for key, value in spread.items())
            print(f"  {name:18} {values}")
    print(f"  {'labelled share':18} {statistics['labelled_share']:.1%}")


if __name__ == "__main__":
    sys.exit(main())
