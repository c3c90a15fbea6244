"""Files of states: columns that are written in place, HALP's parts, and what is told of them."""

import h5py
import numpy as np
import pytest
import questions
import torch

from torchtune_qwen25vl.hidden_states import open_states
from torchtune_qwen25vl.hidden_states.__main__ import main
from torchtune_qwen25vl.hidden_states._columns import Columns, make_file
from torchtune_qwen25vl.hidden_states._layout import Layout
from torchtune_qwen25vl.hidden_states._selectors import read_selectors

SELECTORS = read_selectors(
    ["layer.0/last", "vision/mean", "layer.1/all"], num_layers=2, vision_num_layers=4
)
WIDTHS = {"layer.0/last": 6, "vision/mean": 5, "layer.1/all": 6}


def layout(rows=7, dtype=torch.float32):
    return Layout([str(k) for k in range(rows)], SELECTORS, WIDTHS, dtype)


def states(numbers, dtype=torch.float32):
    """Other values for each row and selector."""
    made = {}
    for shift, (name, width) in enumerate(WIDTHS.items()):
        vectors = [(torch.arange(width) + 10 * n + 100 * shift).to(dtype) / 3 for n in numbers]
        if name == "layer.1/all":
            vectors = [v.expand(n % 3, -1) for v, n in zip(vectors, numbers, strict=True)]
        made[name] = vectors
    return made


def column(folder, name, plan):
    from safetensors.torch import load_file

    return load_file(folder / "states.safetensors")[name]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rows_lie_where_they_belong_whoever_writes_them(tmp_path, dtype):
    plan = layout(dtype=dtype)
    make_file(tmp_path, plan, ())
    first, second = Columns(tmp_path, plan, 0), Columns(tmp_path, plan, 1)
    assert second.write([6, 0, 2], states([6, 0, 2], dtype)) == [
        {"layer.1/all": [1, 0, 0]},
        {"layer.1/all": [1, 0, 0]},
        {"layer.1/all": [1, 0, 2]},
    ]
    assert first.write([5], states([5], dtype)) == [{"layer.1/all": [0, 0, 2]}]
    assert second.write([4], states([4], dtype)) == [{"layer.1/all": [1, 2, 1]}]
    first.write_absent([1, 3])
    for name in ("layer.0/last", "vision/mean"):
        found = column(tmp_path, name, plan)
        assert found.dtype == dtype
        for k in (0, 2, 4, 5, 6):
            assert torch.equal(found[k], states([k], dtype)[name][0])
        assert found[[1, 3]].isnan().all()
    first.close()
    second.close()


def test_what_the_journal_does_not_know_is_cut_off(tmp_path):
    plan = layout()
    make_file(tmp_path, plan, ())
    columns = Columns(tmp_path, plan, 0)
    columns.write([2, 5], states([2, 5]))
    columns.close()
    again = Columns(tmp_path, plan, 0, {"layer.1/all": 2})
    assert again.write([4], states([4])) == [{"layer.1/all": [0, 2, 1]}]
    again.close()
    with pytest.raises(ValueError, match="is cut short"):
        Columns(tmp_path, plan, 0, {"layer.1/all": 9})


def test_a_file_of_another_kind_is_set_aside_or_refused(tmp_path):
    make_file(tmp_path, layout(), ())
    make_file(tmp_path, layout(), ["3"])
    with pytest.raises(ValueError, match="is not what this run began"):
        make_file(tmp_path, layout(dtype=torch.bfloat16), ["3"])
    make_file(tmp_path, layout(dtype=torch.bfloat16), ())
    assert (tmp_path / "earlier-1-states.safetensors").exists()


def test_states_go_where_their_rows_are_now(tmp_path):
    before = layout()
    make_file(tmp_path, before, ())
    columns = Columns(tmp_path, before, 0)
    columns.write([1, 4, 6], states([1, 4, 6]))
    columns.close()
    after = Layout(["new", "6", "0", "1", "other", "4"], SELECTORS, WIDTHS, torch.float32)
    make_file(tmp_path, after, ["1", "6"])
    for name in ("layer.0/last", "vision/mean"):
        found = column(tmp_path, name, after)
        assert torch.equal(found[1], states([6])[name][0])
        assert torch.equal(found[3], states([1])[name][0])
        assert not found[[0, 2, 4, 5]].any()


def read_as_halps_probes_do(path, layer, kind):
    """Ids, features and answers, by the access pattern of its probe scripts."""
    with h5py.File(path, "r") as file:
        ids = list(file.keys())
        features = [file[one][f"{kind}_token_representation"][f"layer_{layer}"][:] for one in ids]
        alone = [file[one]["vision_only_representation"][:] for one in ids]
        answers = [file[one]["answer"][()].decode("utf-8") for one in ids]
    return ids, np.stack(features), np.stack(alone), answers


@pytest.fixture
def odd_table(tmp_path):
    odd = ["a/b", "100%", "a%2Fb", ".", "ünï", "q 5", "6", "q7"]
    path = questions.write_table(tmp_path)
    text = path.read_text()
    for k, name in enumerate(odd):
        text = text.replace(f"\nq{k},", f"\n{name},")
    path.write_text(text)
    (tmp_path / "images" / "picture 006.png").unlink()
    return path, odd


def test_halps_form(model, odd_table, out, monkeypatch):
    table, odd = odd_table
    monkeypatch.setattr("torchtune_qwen25vl.hidden_states._halp.PART", 3)
    assert questions.run(model, table, wanted=["halp"], format="halp", vision_boundary="halp") == 1
    parts = sorted(path.name for path in out.glob("*.h5"))
    assert parts == [f"tiny_embeddings_part_00{k}.h5" for k in (1, 2, 3)]
    columns, arrays = open_states(out), questions.arrays(out)
    ids, features, alone, answers = read_as_halps_probes_do(out / parts[0], 1, "query")
    assert set(ids) == {"a%2Fb", "100%25", "a%252Fb"}
    numbers = [odd.index({"a%2Fb": "a/b", "100%25": "100%", "a%252Fb": "a%2Fb"}[k]) for k in ids]
    assert features.dtype == np.float32
    assert np.array_equal(features, arrays["layer.1/query_last"][numbers])
    assert np.array_equal(alone, arrays["vision/mean"][numbers])
    assert answers == [columns.answers[k] for k in numbers]
    vision = read_as_halps_probes_do(out / parts[0], 0, "vision")[1]
    assert np.array_equal(vision, arrays["layer.0/image_last"][numbers])
    with h5py.File(out / parts[2], "r") as file:
        attributes = dict(file.attrs)
        assert file["q7"]["ground_truth_answer"][()].decode() == "3.0"
        assert file["q7"]["image_id"][()].decode() == "picture 007.png"
        assert file["q7"]["vision_only_representation"].compression == "gzip"
    assert attributes["num_samples"] == 1
    assert attributes["vision_boundary"] == "halp"
    assert {"model_name", "model_type", "device", "dtype", "created_at"} <= set(attributes)
    assert (attributes["device"], attributes["dtype"]) == ("cpu", "float32")

    (out / "states.safetensors").unlink()  # as in a folder that their scripts have written
    theirs = open_states(out)
    kept = [k for k, name in enumerate(odd) if name != "6"]
    assert theirs.ids == [odd[k] for k in kept]
    assert theirs.selectors == columns.selectors
    for name in theirs.selectors:
        assert np.array_equal(theirs[name], arrays[name][kept])
    assert theirs.questions == [columns.questions[k] for k in kept]


def test_parts_that_are_no_longer_there_go(model, table, out, monkeypatch):
    monkeypatch.setattr("torchtune_qwen25vl.hidden_states._halp.PART", 2)
    assert questions.run(model, table, wanted=["halp"], format="halp") == 0
    assert len(list(out.glob("*.h5"))) == 4
    monkeypatch.setattr("torchtune_qwen25vl.hidden_states._halp.PART", 5)
    assert questions.run(model, table, wanted=["halp"], format="halp") == 0
    assert len(list(out.glob("*.h5"))) == 2


def test_selectors_in_any_form(run, out):
    assert run(wanted=["layer.0:2/last", "vision/mean"]) == 0
    opened = open_states(out)
    assert opened.selectors == ["layer.0/last", "layer.1/last", "vision/mean"]
    for text, name in (
        ("layer.-1/last", "layer.1/last"),
        ("layer.n/2/last", "layer.1/last"),
        ("vision.-1/mean", "vision/mean"),
    ):
        assert np.array_equal(opened[text], opened[name])
    for text, said in (
        ("layer.0/query_last", "was not recorded"),
        ("layer.all/last", "asks for 2 arrays"),
        ("layers.0/last", "SITE/SPAN"),
    ):
        with pytest.raises(ValueError, match=said):
            opened[text]


def test_what_is_no_folder_of_states_is_refused(tmp_path, run, out):
    with pytest.raises(ValueError, match="holds no states"):
        open_states(tmp_path)
    assert run() == 0
    content = (out / "states.safetensors").read_bytes()
    for damaged in (b"", b"\xff" * 64, content[:100]):
        (out / "states.safetensors").write_bytes(damaged)
        with pytest.raises(ValueError, match="put back a whole one"):
            open_states(out)
    (out / "states.safetensors").write_bytes(content)
    (out / "rows.jsonl").write_text("{")
    with pytest.raises(ValueError, match=r"rows.jsonl is damaged"):
        open_states(out).ids  # noqa: B018


def test_files_of_whole_spans_that_are_cut_short_are_named(run, out):
    assert run(wanted=["layer.1/image_all"]) == 0
    path = out / "spans-layer.1-image_all-0.bin"
    path.write_bytes(path.read_bytes()[:-4])
    assert np.isfinite(open_states(out)["layer.1/image_all"][0]).all()
    for _ in range(2):
        with pytest.raises(ValueError, match=r"spans-layer.1-image_all-0.bin is gone or cut short"):
            list(open_states(out)["layer.1/image_all"])
        path.unlink(missing_ok=True)


def test_show(model, table, out, capsys):
    (table.parent / "images" / "picture 002.png").unlink()
    wanted = ["layer.0/last", "layer.1/image_all"]
    assert questions.run(model, table, wanted=wanted) == 1
    assert main(["show", str(out), "--detailed"]) == 0
    told = capsys.readouterr().out
    values = np.array([row for row in open_states(out)["layer.0/last"] if np.isfinite(row).all()])
    assert "8 rows: 7 done, 1 failed" in told
    assert "failed: q2:" in told
    for figure in (values.min(), values.max(), values.mean(), values.std()):
        assert f"{figure:10.4g}" in told
    assert "8 of [t, 32]" in told
    assert main(["show", str(out), "--sample", "q3"]) == 0
    assert "question: What is on it?" in capsys.readouterr().out
    assert main(["show", str(out), "--sample", "q99"]) == 2
    assert main(["show", str(table.parent)]) == 2
    assert "error:" in capsys.readouterr().err
