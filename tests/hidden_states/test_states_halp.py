"""HALP's parts in the hands of others: their files, their HDF5, and texts it cannot keep."""

import json
import re

import captions
import h5py
import numpy as np
import questions

from torchtune_qwen25vl.hidden_states import open_states


def test_parts_of_others_stay(model, table, out):
    """A folder may hold what HALP's scripts have written, or what is no HDF5 at all."""
    out.mkdir()
    theirs, damaged = (out / f"qwen25vl_7b_embeddings_part_00{k}.h5" for k in (1, 2))
    with h5py.File(theirs, "w") as file:
        file.create_group("q1")
    damaged.write_bytes(b"cut short")
    before = theirs.read_bytes()
    assert questions.run(model, table, wanted=["halp"], format="halp") == 0
    assert theirs.read_bytes() == before
    assert damaged.read_bytes() == b"cut short"


def test_texts_that_hdf5_cannot_keep_stop_no_row(model, tmp_path):
    odd = ["a\0b", "a\0c", "\udcff", "plain"]
    asked = {"question": "What?", "image": "picture 000.png"}
    rows = [{"question_id": one, "answer": f"yes {one}", **asked} for one in odd]
    captions.write_pictures(tmp_path, 1)
    (tmp_path / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = tmp_path / "o"
    keys = {"images_dir": None, "wanted": ["halp"], "format": "halp", "output_dir": str(out)}
    assert questions.run(model, tmp_path / "t.jsonl", **keys) == 0
    assert open_states(out).truths == [f"yes {one}" for one in odd]  # as they were
    (out / "states.safetensors").unlink()
    theirs = open_states(out)
    assert theirs.ids == odd
    assert theirs.truths == ["yes a\\x00b", "yes a\\x00c", "yes \\udcff", "yes plain"]


def layout_versions(path):
    """Versions of the messages that say how data lies, in all object headers of an HDF5 file."""
    content, versions = path.read_bytes(), set()
    for found in re.finditer(rb"OHDR\x02", content):
        flags, at = content[found.end()], found.end() + 1
        at += 16 * bool(flags & 0x20) + 4 * bool(flags & 0x10)  # times, counts of attributes
        width = 1 << (flags & 3)
        end = at + width + int.from_bytes(content[at : at + width], "little")
        at += width
        while at + 4 <= end:
            kind, size = content[at], int.from_bytes(content[at + 1 : at + 3], "little")
            at += 4 + 2 * bool(flags & 0x04)  # number of creation
            if kind == 0x08:
                versions.add(content[at])
            at += size
    return versions


def test_parts_are_none_that_only_the_newest_hdf5_reads(model, table, out, tmp_path):
    assert questions.run(model, table, wanted=["halp"], format="halp") == 0
    part = next(out.glob("*.h5"))
    assert set(layout_versions(part)) == {3, 4}  # no version 5, of HDF5 2.0
    with h5py.File(tmp_path / "latest.h5", "w", libver="latest") as file:
        file.create_dataset("layer_0", data=np.ones(32, np.float32), compression="gzip")
    if h5py.version.hdf5_version_tuple >= (2, 0, 0):
        assert 5 in layout_versions(tmp_path / "latest.h5")


def test_what_halps_scripts_wrote_without_a_vector_is_nan(tmp_path):
    """They leave out what they could not take; their files know nothing of ours."""
    with h5py.File(tmp_path / "qwen25vl_7b_embeddings_part_001.h5", "w") as file:
        for k, name in enumerate(("q10%2F", "q2")):
            group = file.create_group(name)
            for key in ("image_id", "question", "ground_truth_answer", "answer"):
                group.create_dataset(key, data=f"{key} {k}", dtype=h5py.string_dtype())
            if k:
                group["vision_only_representation"] = np.full(5, 2, np.float32)
            group["query_token_representation/layer_7"] = np.full(6, k, np.float32)
    states = open_states(tmp_path)
    assert states.ids == ["q10%2F", "q2"]
    assert states.answers == ["answer 0", "answer 1"]
    assert states.selectors == ["vision/mean", "layer.7/query_last"]
    assert np.isnan(states["vision/mean"][0]).all()
    assert (states["vision/mean"][1] == 2).all()
    assert states["layer.7/query_last"][:, 3].tolist() == [0, 1]
