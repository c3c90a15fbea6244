"""Folders of .safetensors files: described by their headers, read one tensor at a time, written.

Pickled weights (.bin, .pt, .pth, .ckpt) are never opened: reading them can run code.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from torchtune_qwen25vl.weights._hub import fetch

INDEX = "model.safetensors.index.json"
PICKLES = {".bin", ".pt", ".pth", ".ckpt"}
LOOKED_AT, PIECE = 256, 4096  # places of a file that name its content, and bytes of each
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}


@dataclass(frozen=True)
class WeightFiles:
    """What the headers of a checkpoint's files say.

    Attributes:
        folder: where the files lie
        file_of: name of the file that holds each weight
        shape_of: shape of each weight
        dtypes: dtypes that occur
    """

    folder: Path
    file_of: dict[str, str]
    shape_of: dict[str, tuple[int, ...]]
    dtypes: set[torch.dtype]

    def read(self, *, lazily: bool) -> Iterator[tuple[str, Tensor]]:
        """Yield every weight, one at a time, on the CPU.

        Args:
            lazily: map the files into memory instead of reading them: a tensor costs nothing until
                it is used, and is valid as long as its file is
        """
        for file in sorted(set(self.file_of.values())):
            backend = "mmap" if lazily else "pread"
            with safe_open(self.folder / file, framework="pt", backend=backend) as opened:
                for name in opened.keys():  # noqa: SIM118
                    yield name, opened.get_tensor(name)


def find_weights(source: str | os.PathLike[str]) -> tuple[Path, list[str] | None]:
    """Return the folder of a checkpoint and, if it is a single file, the name of that file.

    Args:
        source: folder, .safetensors file, or hub id (`owner/name`), which `fetch` downloads if
            there is no such path

    Raises:
        ValueError: if `source` is none of the three, or cannot be downloaded.
    """
    path = fetch(source)
    if path.is_dir():
        return path, None
    if path.is_file():
        return path.parent, [path.name]
    raise ValueError(
        f"weights are a folder, a .safetensors file or a hub id (owner/name); "
        f"{source} is neither here nor such an id"
    )


def open_weights(folder: Path, files: Sequence[str] | None = None) -> WeightFiles:
    """Read and check the headers of a checkpoint's files, and nothing else.

    Args:
        folder: where the files lie
        files: names of the files; by default those of the index, else every .safetensors file

    Raises:
        ValueError: if a file is absent, pickled, cut short or damaged, or if a weight stands in two
            files or elsewhere than the index says, or is quantised.
    """
    index = _read_index(folder) if files is None else None
    if files is None:
        files = sorted(
            set(index.values() if index else (p.name for p in folder.glob("*.safetensors")))
        )
    _refuse_unreadable(folder, files)
    file_of: dict[str, str] = {}
    shape_of: dict[str, tuple[int, ...]] = {}
    dtypes: set[torch.dtype] = set()
    for file in files:
        for name, shape, dtype in _read_header(folder / file):
            if name in file_of:
                raise ValueError(
                    f"a weight stands in one file; {folder} holds {name} in both "
                    f"{file_of[name]} and {file}: name the files to read"
                )
            file_of[name], shape_of[name] = file, shape
            dtypes.add(dtype)
    if index is not None and index != file_of:
        moved = sorted(name for name, file in index.items() ^ file_of.items())
        raise ValueError(
            f"{folder / INDEX} must name the weights of each file; it differs for "
            f"{len(set(moved))} ({', '.join(dict.fromkeys(moved[:6]))}): is a shard another "
            f"checkpoint's?"
        )
    return WeightFiles(folder, file_of, shape_of, dtypes)


def write_weights(folder: Path, weights: Mapping[str, Tensor], file_of: Mapping[str, str]) -> None:
    """Write weights to the files named for them, and an index unless one file holds them all."""
    files = sorted(set(file_of.values()))
    for file in files:
        shard = {
            name: weight.detach().cpu().contiguous()
            for name, weight in weights.items()
            if file_of[name] == file
        }
        save_file(shard, folder / file, metadata={"format": "pt"})
    if files != ["model.safetensors"]:
        size = sum(weight.numel() * weight.element_size() for weight in weights.values())
        weight_map = {name: file_of[name] for name in weights}
        index = {"metadata": {"total_size": size}, "weight_map": weight_map}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def fingerprint(folder: Path) -> str:
    """Return a short name of a checkpoint's content, the same wherever its folder lies.

    Of the weights it reads the headers and `LOOKED_AT` places of each file, so that 72B take no
    longer than 3B.

    Args:
        folder: folder of a checkpoint, or of its settings alone
    """
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    for path in sorted(folder.glob("*.safetensors")):
        size = path.stat().st_size
        digest.update(f"{path.name} {size}".encode())
        with path.open("rb") as file:
            header = int.from_bytes(file.read(8), "little")
            digest.update(file.read(header))
            for place in range(LOOKED_AT):
                file.seek(8 + header + (size - 8 - header) * place // LOOKED_AT)
                digest.update(file.read(PIECE))
    return digest.hexdigest()[:16]


def write_dtype(folder: Path, weights: Mapping[str, Tensor]) -> None:
    """Let the config.json of a folder name the dtype of the weights written there.

    Transformers 4 calls it torch_dtype, and 5 dtype; either is mended where it stands, to null if
    the weights are of several.
    """
    path = folder / "config.json"
    config = json.loads(path.read_text())
    dtypes = {str(weight.dtype).removeprefix("torch.") for weight in weights.values()}
    dtype = dtypes.pop() if len(dtypes) == 1 else None
    sections = [config, *(value for value in config.values() if isinstance(value, dict))]
    wrong = [
        (section, key)
        for section in sections
        for key in ("torch_dtype", "dtype")
        if section.get(key) not in (None, dtype)
    ]
    for section, key in wrong:
        section[key] = dtype
    if wrong:
        path.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n")


def copy_settings(source: Path, target: Path, *, but: Sequence[str] = ()) -> None:
    """Copy the files beside the weights: config, tokenizer, processor, licence.

    Args:
        source: folder of a checkpoint; its subfolders are left out
        target: folder that the copies go to
        but: names of files to leave out
    """
    for path in source.iterdir():
        weights = path.suffix in PICKLES | {".safetensors"} or path.name.endswith(".index.json")
        left_out = path.name in ("adapter_config.json", *but)
        if path.is_file() and not (weights or left_out or path.name.startswith(".")):
            shutil.copyfile(path, target / path.name)


def _read_index(folder: Path) -> dict[str, str] | None:
    """Read which file each weight lies in from the folder's index; None if there is none."""
    path = folder / INDEX
    if not path.exists():
        return None
    if (folder / "model.safetensors").exists():
        raise ValueError(
            f"{folder} holds both model.safetensors and {INDEX}: name the files to read"
        )
    try:
        return dict(json.loads(path.read_text())["weight_map"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is no index of weights ({error!r}); fetch it again") from error


def _refuse_unreadable(folder: Path, files: Sequence[str]) -> None:
    pickled = [file for file in files if Path(file).suffix in PICKLES]
    if not files:
        pickled = sorted(path.name for path in folder.iterdir() if path.suffix in PICKLES)
    if pickled or not files:
        held = f"it holds {', '.join(pickled)}" if pickled else "it holds no weights"
        raise ValueError(
            f"weights are read from .safetensors files only; {folder}: {held}. Pickled weights can "
            f"run code when opened: convert them to safetensors first"
        )
    for file in files:
        if Path(file).suffix != ".safetensors" or Path(file).name != file:
            raise ValueError(
                f"weights are read from .safetensors files in {folder}; {file} is none: give the "
                f"names of such files, without folders"
            )
        if not (folder / file).is_file():
            raise ValueError(f"{folder / file} is missing: fetch it, or name the files to read")


def _read_header(path: Path) -> Iterator[tuple[str, tuple[int, ...], torch.dtype]]:
    """Yield the name, shape and dtype of every weight in a file."""
    try:
        opened = safe_open(path, framework="pt")
    except SafetensorError as error:
        raise ValueError(
            f"{path} is no whole safetensors file ({error}): was the download cut short, or is it "
            f"another format by that name?"
        ) from error
    with opened:
        for name in opened.keys():  # noqa: SIM118
            view = opened.get_slice(name)
            if view.get_dtype() not in DTYPES:
                raise ValueError(
                    f"weights are stored as {', '.join(DTYPES)}; {path} holds {name} as "
                    f"{view.get_dtype()}: quantised files (fp8, int8, 4 bit) are not read, use the "
                    f"original one"
                )
            yield name, tuple(view.get_shape()), DTYPES[view.get_dtype()]
