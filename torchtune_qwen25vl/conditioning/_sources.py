"""Prompts from what people have: tables, folders of text files, lists with a prompt a line."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from torchtune_qwen25vl.jobs import Row, as_path, read_rows
from torchtune_qwen25vl.media import SUFFIXES

NAMES = {  # of columns
    "id": ("prompt_id", "id", "name"),
    "image": ("image", "images", "image_name", "file_name"),
    "text": ("prompt", "caption", "text"),
    "answer": (),
}
TEXT = ".txt"


def find_prompts(
    inputs: Sequence[str],
    *,
    images_dir: str | None,
    columns: Mapping[str, str | None],
    takes_images: bool,
) -> list[Row]:
    """Read the prompts of all inputs; one that cannot be worked on is there, with its problem.

    Args:
        inputs: each a table (.csv, .tsv, .json, .jsonl, .parquet, or a folder that `datasets`
            saved), a folder whose .txt files hold a prompt each, or a .txt file with a prompt in
            each line
        images_dir: folder that relative paths of images start from; None for the table's own
        columns: name of the column of each of `NAMES`; None for those in use
        takes_images: whether a prompt of a folder is about the image beside it (a.txt, a.png)

    Raises:
        ValueError: if an input is none of these, or there are no prompts.
    """
    rows: list[Row] = []
    for one in inputs:
        rows += _of_input(one, images_dir, columns, takes_images)
    if not rows:
        raise ValueError(f"there are no prompts in {', '.join(inputs)}")
    return list(_named(replace(row, number=number) for number, row in enumerate(rows)))


def _of_input(
    one: str, images_dir: str | None, columns: Mapping[str, str | None], takes_images: bool
) -> list[Row]:
    path = as_path(one)
    if path.is_file() and path.suffix.lower() == TEXT:
        lines = path.read_text("utf-8-sig").splitlines()
        return [Row(f"{path.stem}-{k}", 0, line) for k, line in enumerate(lines) if line.strip()]
    is_saved = (path / "state.json").exists() or (path / "dataset_dict.json").exists()
    if path.is_dir() and not is_saved:
        return list(_of_folder(path, takes_images))
    return read_rows([one], names=NAMES, images_dir=images_dir, columns=columns, needs_text=False)


def _of_folder(folder: Path, takes_images: bool) -> Iterator[Row]:
    """Read a folder's text files by name, each under the name of its file."""
    folder = folder.absolute()
    for path in sorted(folder.rglob(f"*{TEXT}")):
        inner = path.relative_to(folder)
        if any(part.startswith((".", "_")) for part in inner.parts):
            continue
        try:
            row = Row(inner.with_suffix("").as_posix(), 0, path.read_text("utf-8-sig").strip())
        except ValueError as error:
            row = Row(inner.with_suffix("").as_posix(), 0, problem=f"it is not UTF-8: {error}")
        beside = [path.with_suffix(suffix) for suffix in SUFFIXES] if takes_images else []
        yield replace(row, sources=tuple(image for image in beside if image.is_file())[:1])


def _named(rows: Iterator[Row]) -> Iterator[Row]:
    """Give each row a name that can be a file's; of two with one name the second is refused."""
    seen = set()
    for row in rows:
        name = "".join(c if c.isalnum() or c in "-_. " else "_" for c in row.name).strip(". ")
        named = replace(row, name=name[:150] or f"_{row.number}")
        if named.name.lower() in seen:  # some file systems tell no case apart
            problem = f"an earlier prompt is called {named.name!r} too; each needs its own name"
            named = replace(named, name=f"{named.name}#{row.number}", problem=problem)
        seen.add(named.name.lower())
        yield named
