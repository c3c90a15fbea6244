"""Selectors: every form to the blocks it means, everything else refused by name."""

import pytest

from torchtune_qwen25vl.hidden_states._selectors import read_selectors

BLOCKS = {"num_layers": 28, "vision_num_layers": 32}


def names(*texts, **blocks):
    return [str(one) for one in read_selectors(list(texts), **BLOCKS | blocks).values()]


@pytest.mark.parametrize(
    ("text", "blocks"),
    [
        ("layer.7/query_last", ["layer.7/query_last"]),
        ("layer.-1/last", ["layer.27/last"]),
        ("layer.-28/last", ["layer.0/last"]),
        ("layer.0:28:7/all", [f"layer.{k}/all" for k in (0, 7, 14, 21)]),
        ("layer.25:/last", [f"layer.{k}/last" for k in (25, 26, 27)]),
        ("layer.:2/last", ["layer.0/last", "layer.1/last"]),
        ("layer.-2:/last", ["layer.26/last", "layer.27/last"]),
        ("layer.n/2:n:n/4/last", ["layer.14/last", "layer.21/last"]),
        ("layer.::-14/last", ["layer.27/last", "layer.13/last"]),
        ("layer.n/4/last", ["layer.7/last"]),
        ("layer.3n/4/last", ["layer.21/last"]),
        ("layer.n-1/last", ["layer.27/last"]),
        ("layer.n/3/last", ["layer.9/last"]),
        ("attn.3/image_mean", ["attn.3/image_mean"]),
        ("mlp.3/image_first", ["mlp.3/image_first"]),
        ("embed/query_mean", ["embed/query_mean"]),
        ("norm/image_all", ["norm/image_all"]),
        ("vision/mean", ["vision.31/mean"]),
        ("vision.n/2/all", ["vision.16/all"]),
        ("merger/all", ["merger/all"]),
    ],
)
def test_forms(text, blocks):
    assert names(text) == blocks


def test_all_blocks():
    assert len(names("attn.all/last")) == 28
    assert len(names("vision.all/mean")) == 32


def test_names_are_as_written_where_they_mean_one_block():
    asked = ["layer.-1/last", "vision/mean", "layer.n/4/last", "layer.0:3:2/last"]
    named = list(read_selectors(asked, **BLOCKS))
    assert named == [*asked[:3], "layer.0/last", "layer.2/last"]


def test_the_preset_is_what_the_published_scripts_record():
    blocks = [0, 7, 14, 21, 27]
    expected = [f"layer.{k}/{s}" for s in ("image_last", "query_last") for k in blocks]
    assert list(read_selectors(["halp"], **BLOCKS)) == ["vision/mean", *expected]
    assert len(names("halp", num_layers=36)) == 11
    assert names("halp", num_layers=2)[1:3] == ["layer.0/image_last", "layer.1/image_last"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("layer.28/last", "blocks 0 to 27"),
        ("layer.-29/last", "blocks 0 to 27"),
        ("vision.32/mean", "blocks 0 to 31"),
        ("layer/last", "needs a number"),
        ("norm.1/last", "has no number"),
        ("layer.1/mean", "spans of layer are"),
        ("vision.1/last", "spans of vision are mean, all"),
        ("merger/image_last", "spans of merger are"),
        ("layers.1/last", "SITE/SPAN"),
        ("last", "SITE/SPAN"),
        ("halpp", "SITE/SPAN"),
        ("layer.x/last", "a block is a number"),
        ("layer.n/0/last", "a block is a number"),
        ("layer.1.5/last", "a block is a number"),
        ("layer.5:5/last", "holds none"),
        ("layer.0:9:0/last", "step that is not 0"),
        ("layer.0:9:1:1/last", "a slice is"),
    ],
)
def test_refused_by_name(text, said):
    with pytest.raises(ValueError, match=said) as error:
        names(text)
    assert text.split("/")[0] in str(error.value)


@pytest.mark.parametrize("wanted", [[], "layer.1/last"])
def test_a_list_is_wanted(wanted):
    with pytest.raises(ValueError, match="wanted is a list of selectors"):
        read_selectors(wanted, **BLOCKS)
