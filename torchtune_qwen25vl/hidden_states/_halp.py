"""States in HALP's form: HDF5 parts of 1,000 samples, as its published probes read them.

    attributes                              model_name, model_type, device, dtype, created_at,
                                            num_samples
    QUESTION_ID/image_id                    text, as are question, ground_truth_answer, answer
    QUESTION_ID/vision_only_representation  float32 [width]: vision/mean
    QUESTION_ID/vision_token_representation/layer_K   float32 [width]: layer.K/image_last
    QUESTION_ID/query_token_representation/layer_K    float32 [width]: layer.K/query_last

layer_K is the output of block K, before the final norm. An id with a "/", which HDF5 takes for a
path, has "%2F" in its place, and "%25" for a "%" of its own; so have characters that HDF5 cannot
keep. In other texts these are written out, with a backslash.

Source: github.com/alliedbrother/HALP_EACL, Extraction_Script; arXiv 2603.05465.
"""

import os
import re
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, unquote

import numpy as np

from torchtune_qwen25vl.hidden_states._extra import needed
from torchtune_qwen25vl.hidden_states._selectors import Selector, read_selectors

if TYPE_CHECKING:
    from torchtune_qwen25vl.hidden_states._states import States

PART = 1000  # samples
NAMES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
PATTERN = "*_embeddings_part_*.h5"
TEXTS = {
    "image_id": "images",
    "question": "questions",
    "ground_truth_answer": "truths",
    "answer": "answers",
}
GROUPS = {
    "vision_token_representation": "image_last",
    "query_token_representation": "query_last",
}
VISION = "vision_only_representation"
OURS = "layer_K"  # an attribute of a file that only ours have: what a block's state is


def refuse_others(selectors: Sequence[Selector], vision_num_layers: int) -> None:
    """Refuse selectors that HALP's form has no place for.

    Raises:
        ValueError: naming them.
    """
    last = Selector("vision", vision_num_layers - 1, "mean")
    others = [
        str(one)
        for one in selectors
        if one != last and not (one.site == "layer" and one.span in GROUPS.values())
    ]
    if others:
        raise ValueError(
            f"format=halp holds vision/mean, layer.K/image_last and layer.K/query_last, and not "
            f"{', '.join(others)}: take these out of wanted, or set format=columns"
        )


def parts_of(folder: Path) -> list[Path]:
    """Return the parts in a folder, in order."""
    return sorted(folder.glob(PATTERN))


def write_parts(folder: Path, states: "States", device: str) -> list[Path]:
    """Write the rows that are done as parts, each whole or not at all, in place of those there.

    Parts that others have written, HALP's scripts among them, stay.

    Args:
        folder: of the run
        states: of the run
        device: that it ran on

    Raises:
        ValueError: if h5py is not installed.
    """
    done = [k for k, state in enumerate(states.states) if state == "done"]
    named = re.sub(r"[^a-z0-9]+", "", Path(states.facts["model"]).name.lower()) or "model"
    written = []
    for number, start in enumerate(range(0, len(done), PART), start=1):
        path = folder / f"{named}_embeddings_part_{number:03d}.h5"
        hidden = path.with_name(f".{path.name}.part")
        _write_part(hidden, states, done[start : start + PART], device)
        os.replace(hidden, path)
        written.append(path)
    for path in set(parts_of(folder)) - set(written):
        if _is_ours(path):
            path.unlink()
    return written


def _is_ours(path: Path) -> bool:
    try:
        with _h5py().File(path, "r") as file:
            return OURS in file.attrs
    except OSError:  # no HDF5 at all
        return False


def _write_part(path: Path, states: "States", numbers: Sequence[int], device: str) -> None:
    h5py, facts = _h5py(), states.facts
    # what HDF5 1.10 and all later ones read: those of "latest" are no use to an older h5py
    with h5py.File(path, "w", libver=("v110", "v110"), track_order=True) as file:
        file.attrs.update(
            {
                "model_name": facts["model"],
                "model_type": "qwen2_5_vl",
                "device": device,
                "dtype": NAMES[facts["dtype"]],
                "created_at": datetime.now(UTC).isoformat(),
                "num_samples": len(numbers),
                "vision_boundary": facts["vision_boundary"],
                OURS: facts[OURS],
            }
        )
        columns = {place: states[name] for place, name in _places(states)}
        for number in numbers:
            group = file.create_group(as_key(states.ids[number]))
            for key, texts in TEXTS.items():
                text = as_text(getattr(states, texts)[number])
                group.create_dataset(key, data=text, dtype=h5py.string_dtype())
            for place, column in columns.items():
                vector = np.asarray(column[number], dtype=np.float32)
                group.create_dataset(place, data=vector, compression="gzip")
        file.flush()
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def _places(states: "States") -> Iterator[tuple[str, str]]:
    """Yield the dataset of each selector, within a group, and its name."""
    groups = {span: group for group, span in GROUPS.items()}
    blocks = {k: int(states.facts[k]) for k in ("num_layers", "vision_num_layers")}
    for name, one in read_selectors(states.selectors, **blocks).items():
        yield (VISION if one.site == "vision" else f"{groups[one.span]}/layer_{one.index}"), name


def as_key(text: str) -> str:
    """Write an id as the name of a group."""
    if text == ".":
        return "%2E"
    odd = "[%/\0\ud800-\udfff]"
    return re.sub(odd, lambda one: quote(one[0], safe="", errors="surrogatepass"), text)


def as_id(key: str) -> str:
    """Return the id that `as_key` has written."""
    return unquote(key, errors="surrogatepass")


def as_text(text: str) -> str:
    """Write out the characters that HDF5 cannot keep: nulls, and halves of surrogate pairs."""
    return text.replace("\0", "\\x00").encode("utf-8", "backslashreplace").decode("utf-8")


def _h5py() -> Any:
    with needed("files of HALP's form"):
        import h5py
    return h5py


class HalpStates:
    """States in HALP's form; see `States`. All rows are done ones; of what one lacks it has nan."""

    def __init__(self, folder: Path) -> None:
        h5py = _h5py()
        self._files = []
        for path in parts_of(folder):
            try:
                self._files.append(h5py.File(path, "r"))
            except OSError as error:
                raise ValueError(f"{path} is damaged ({error}): put back a whole one") from error
        self._groups = [file[key] for file in self._files for key in file]
        keys = [group.name.removeprefix("/") for group in self._groups]
        is_ours = any(OURS in file.attrs for file in self._files)
        self.ids = list(map(as_id, keys)) if is_ours else keys
        self.states = ["done"] * len(self.ids)
        self.reasons = [""] * len(self.ids)
        self.images, self.questions, self.truths, self.answers = map(self._texts, TEXTS)
        self.rows: list[dict[str, Any]] = [{} for _ in self.ids]
        self.facts = {k: str(v) for k, v in self._files[0].attrs.items()}
        self._places = dict(self._found())
        self.selectors = list(self._places)

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, selector: str) -> np.ndarray:
        if (place := self._places.get(selector)) is None:
            raise ValueError(f"{selector!r} is not there, but {', '.join(self.selectors)}")
        vectors = [group[place][:] if place in group else None for group in self._groups]
        absent = np.full_like(next(one for one in vectors if one is not None), np.nan)
        return np.stack([absent if one is None else one for one in vectors])  # [n, width]

    def _texts(self, key: str) -> list[str]:
        return [group[key].asstr()[()] if key in group else "" for group in self._groups]

    def _found(self) -> Iterator[tuple[str, str]]:
        """Yield the selectors that any sample has, and where each lies in a group."""
        if any(VISION in group for group in self._groups):
            yield "vision/mean", VISION
        for kind, span in GROUPS.items():
            names = {name for group in self._groups for name in group.get(kind, ())}
            for name in sorted(names, key=lambda name: int(name.split("_")[1])):
                yield f"layer.{name.split('_')[1]}/{span}", f"{kind}/{name}"
