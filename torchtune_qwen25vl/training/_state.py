"""Checkpoints of a run: the trained weights and the moments of the optimiser, after a step.

They hold no frozen weights, which come from where the run began. torch.distributed.checkpoint
writes every rank's shard and reads them back for any number of ranks.
"""

import contextlib
import itertools
import re
import shutil
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_state_dict,
)
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from torchtune_qwen25vl import _ranks
from torchtune_qwen25vl._files import naming_full_disk, recover_folders, replacing_folder
from torchtune_qwen25vl.training._best import Best
from torchtune_qwen25vl.training._parts import plain_name

RUN = "run.pt"
TRAINED_ONLY = StateDictOptions(ignore_frozen_params=True, strict=False)


def save_step(
    folder: Path,
    step: int,
    model: nn.Module,
    optimizer: Optimizer,
    *,
    identity: Mapping[str, Any],
    keep_last: int,
    best: Best = Best(),  # noqa: B008
) -> Path:
    """Write `folder/step_N`, whole or not at all, then remove all but the last and the best.

    Args:
        folder: folder of all checkpoints of the run
        step: number of steps taken so far
        model: its trained weights are saved
        optimizer: its moments are saved
        identity: what must be the same for a run to go on exactly, see `load_step`
        keep_last: number of checkpoints to keep
        best: evaluation whose checkpoint is kept and marked
    """
    target = folder / f"step_{step}"
    weights, moments = get_state_dict(model, optimizer, options=TRAINED_ONLY)
    with _shared(target) as building:
        with _quietly(), naming_full_disk(target):
            dcp.save({"model": weights, "optimizer": moments}, checkpoint_id=building)
        if _ranks.is_first():
            run = {"step": step, "identity": dict(identity), "best": best.state()}
            torch.save(run, building / RUN)
    if _ranks.is_first():
        best.mark(checkpoints(folder))
        for old in checkpoints(folder)[:-keep_last]:
            if old.name != best.name:
                shutil.rmtree(old)
    return target


def checkpoints(folder: Path) -> list[Path]:
    """List the whole checkpoints in a folder, the oldest first."""
    found = [path for path in folder.glob("step_*") if re.fullmatch(r"step_\d+", path.name)]
    return sorted(found, key=lambda path: int(path.name.removeprefix("step_")))


def last_checkpoint(folder: Path) -> Path | None:
    """Return the checkpoint to go on from, None if there is none."""
    if _ranks.is_first():
        recover_folders(folder)
    _ranks.wait()
    return next(reversed(checkpoints(folder)), None)


def named_checkpoint(folder: Path, name: str) -> Path:
    """Return a checkpoint by its name.

    Raises:
        ValueError: if there is none of that name.
    """
    path = folder / name
    if Path(name).name != name or not (path / RUN).is_file():
        found = [checkpoint.name for checkpoint in checkpoints(folder)]
        raise ValueError(
            f"export names a checkpoint in output_dir, but {folder} holds {found or 'none'} and "
            f"not {name!r}; name one of those"
        )
    return path


def read_identity(path: Path) -> dict[str, Any]:
    """Return what the run of a checkpoint depends on."""
    return torch.load(path / RUN, weights_only=True)["identity"]


def read_best(path: Path | None) -> Best:
    """Return the best evaluation that the run of a checkpoint knows; without one, none."""
    return Best.read(path and path / RUN)


def set_aside(folder: Path) -> None:
    """Rename all checkpoints, `step_6` to `earlier-1-step_6`, so that a run starts anew.

    If they stayed, the new run would remove its own checkpoints, whose numbers are lower, and the
    next run would go on from the old ones. Nothing is deleted; each call has its own number.
    """
    if _ranks.is_first():
        recover_folders(folder)
        unused = (n for n in itertools.count(1) if not any(folder.glob(f"earlier-{n}-step_*")))
        number = next(unused)
        for path in checkpoints(folder):
            path.rename(folder / f"earlier-{number}-{path.name}")
    _ranks.wait()


def load_step(
    path: Path,
    model: nn.Module,
    optimizer: Optimizer,
    scheduler: LRScheduler,
    *,
    identity: Mapping[str, Any],
    total_steps: int,
) -> int:
    """Restore a run, and return how many steps it had taken.

    Args:
        path: folder of the checkpoint
        model: its trained weights are replaced
        optimizer: its moments are replaced
        scheduler: at its first step; it is taken to the step of the checkpoint, so that a run which
            is lengthened has the rates of the longer one from there on
        identity: what must be as it was in the run that wrote the checkpoint
        total_steps: number of steps of the run that is to go on

    Raises:
        ValueError: if the run that wrote the checkpoint had another identity, so that this one
            would not go on as that one would have, or if it took more steps than this one takes.
    """
    refuse_changes(path, identity)
    run = torch.load(path / RUN, weights_only=True)
    if run["step"] > total_steps:
        raise ValueError(
            f"a run ends after its last step, but {path} is beyond the {total_steps} steps of this "
            "one; raise max_steps or epochs, or begin anew with resume False"
        )
    first_rates = [group["lr"] for group in optimizer.param_groups]
    weights, moments = get_state_dict(model, optimizer, options=TRAINED_ONLY)
    held = dcp.FileSystemReader(path).read_metadata().state_dict_metadata
    every: Any = moments["state"]  # of each parameter, by its name
    known = {n: own for n, own in every.items() if f"optimizer.state.{n}.{next(iter(own))}" in held}
    state: dict[str, Any] = {"model": weights, "optimizer": {**moments, "state": known}}
    with _quietly():
        dcp.load(state, checkpoint_id=path)
    set_state_dict(
        model,
        optimizer,
        model_state_dict=state["model"],
        optim_state_dict={**state["optimizer"], "state": every | state["optimizer"]["state"]},
        options=TRAINED_ONLY,
    )
    for name, parameter in model.named_parameters():  # an encoder that has seen no image yet
        if parameter.requires_grad and plain_name(name) not in known:
            optimizer.state.pop(parameter, None)
    for group, rate in zip(optimizer.param_groups, first_rates, strict=True):
        group["lr"] = rate
    for _ in range(run["step"]):
        scheduler.step()
    return run["step"]


def load_weights(path: Path, model: nn.Module, *, identity: Mapping[str, Any]) -> None:
    """Restore the trained weights of a checkpoint alone.

    Args:
        path: folder of the checkpoint
        model: its trained weights are replaced
        identity: what must be as it was in the run that wrote the checkpoint

    Raises:
        ValueError: if the run that wrote the checkpoint had another identity.
    """
    refuse_changes(path, identity)
    state: dict[str, Any] = {"model": get_model_state_dict(model, options=TRAINED_ONLY)}
    with _quietly():
        dcp.load(state, checkpoint_id=path)
    set_model_state_dict(model, state["model"], options=TRAINED_ONLY)


def refuse_changes(path: Path, identity: Mapping[str, Any]) -> None:
    """Refuse a checkpoint whose run depends on something else.

    Raises:
        ValueError: naming what differs.
    """
    then = read_identity(path)
    changed = {k: (then.get(k), now) for k, now in identity.items() if then.get(k) != now}
    if changed:
        raise ValueError(
            f"a run resumes with the options it began with, but {path} differs in (then, now) "
            f"{changed}; restore them, or begin anew in another output_dir"
        )


@contextlib.contextmanager
def _shared(target: Path) -> Iterator[Path]:
    """Let the first rank make the folder by `replacing_folder`, and all ranks write into it."""
    with replacing_folder(target) if _ranks.is_first() else contextlib.nullcontext() as building:
        folder = _ranks.from_first(building)
        assert folder is not None
        yield folder
        _ranks.wait()


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Silence torch's warnings that there is only one rank, and of a type that it uses itself."""
    with warnings.catch_warnings():
        for message in ("torch.distributed is disabled", "TypedStorage is deprecated"):
            warnings.filterwarnings("ignore", message)
        yield
