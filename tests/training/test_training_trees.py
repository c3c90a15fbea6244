"""Answers on a shared prompt against each answer in a row of its own; images encoded once."""

import preference_samples as samples
import pytest
import tiny
import torch
from torch.nn.attention.flex_attention import create_mask
from torchtune.data import CROSS_ENTROPY_IGNORE_IDX

from torchtune_qwen25vl._torchtune import targets
from torchtune_qwen25vl.training._masks import tree_mask
from torchtune_qwen25vl.training._objective import Encoder, answer_lengths, answer_log_probs
from torchtune_qwen25vl.training._step import output_weight
from torchtune_qwen25vl.training._trees import TreeCollate, place_trees

IDS = (tiny.IDS["image_token_id"], tiny.IDS["video_token_id"])
CPU = torch.device("cpu")
PAIRS = [
    samples.pair("image", 1),
    samples.pair("text", 2),
    samples.pair("two images", 3, other_images=True),
    samples.pair("video", 4),
    samples.pair("short", 5),
]


def collate(**options):
    return TreeCollate(1007, IDS, **{"batch_size": 2, "pack_to": None, **options})


def placed(data):
    place_trees(data, CPU)
    return data


def alone(model, sample):
    """Summed log-probability of an answer in a row of its own, plainly."""
    vision = {key: sample[key] for key in ("encoder_input",) if key in sample}
    hidden = model(
        sample["tokens"][None], input_pos=sample["input_pos"][None], output="hidden", **vision
    )
    wanted = targets(sample["labels"][None])[0]
    kept = wanted != CROSS_ENTROPY_IGNORE_IDX
    log_probs = (hidden[0] @ output_weight(model).T).log_softmax(-1)[kept]
    return log_probs.gather(-1, wanted[kept, None]).sum()


def log_probs(model, data, *, frozen=False):
    encoder = Encoder(frozen=frozen)
    found = [answer_log_probs(model, b, encoder(model, b), chunk_rows=3) for b in data.batches]
    return torch.cat(found)


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def assert_same(model, data, expected):
    """Log-probabilities of answers [t, 2], and what they give every weight."""
    generator = torch.Generator().manual_seed(0)
    factors = torch.randn(expected.shape, generator=generator, dtype=torch.float64)
    right = gradients(model, (expected * factors).sum())
    found = log_probs(model, data)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    model.zero_grad()
    start, encoder = 0, Encoder(frozen=False)
    for batch in data.batches:  # one after the other, as a step does
        rows = slice(start, start := start + len(batch["liked"]))
        answers = answer_log_probs(model, batch, encoder(model, batch), chunk_rows=3)
        (answers * factors[rows]).sum().backward()
    ours = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert ours.keys() == right.keys()
    largest = max(gradient.abs().max() for gradient in right.values())
    for name, gradient in right.items():  # rotations are applied in fp32
        assert (ours[name] - gradient).abs().max() <= 1e-8 * largest, name


@pytest.mark.parametrize("pack_to", [None, 400], ids=["padded", "packed"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_answers_are_as_likely_as_each_alone_and_so_are_gradients(pack_to, tied):
    model = tiny.model(tie_word_embeddings=tied).double()
    rows = [torch.stack([alone(model, s), alone(model, s["rejected"])]) for s in PAIRS]
    assert_same(model, placed(collate(pack_to=pack_to)(PAIRS)), torch.stack(rows))


@pytest.mark.parametrize("wrong", ["branches see each other", "positions go on", "one image"])
def test_what_would_be_wrong_shows(wrong):
    """The comparison above sees each of these."""
    model = tiny.model().double()
    made = PAIRS[2]
    right = torch.stack([alone(model, made), alone(model, made["rejected"])])
    data = placed(collate()([made]))
    (batch,) = data.batches
    if wrong == "branches see each other":
        batch["mask"] = batch["mask"] | torch.ones_like(batch["mask"]).tril()
    elif wrong == "positions go on":
        batch["input_pos"] = torch.arange(batch["tokens"].shape[1])[None, :, None].expand(1, -1, 3)
    else:
        batch["image_index"] = batch["image_index"] % 10
    assert (log_probs(model, data)[0] - right).abs().max() > 1e-3


def test_the_prompt_stands_once_and_ends_before_the_token_that_predicts_the_answer():
    made = samples.pair("image", 1)
    _, chosen, rejected = samples.KINDS["image"]
    (batch,) = collate()([made]).batches
    prompt = len(made["tokens"]) - chosen
    assert batch["tokens"].shape == (1, prompt - 1 + (1 + chosen) + (1 + rejected))
    tree, branch = batch["spans"][0].T
    assert tree.unique().tolist() == [0]
    assert [int((branch == k).sum()) for k in range(3)] == [prompt - 1, 1 + chosen, 1 + rejected]
    assert answer_lengths(batch).tolist() == [[chosen, rejected]]


def test_a_first_token_that_is_labelled_is_predicted_by_nothing():
    model = tiny.model().double()
    made = samples.pair("text", 2)
    for answer in (made, made["rejected"]):
        answer["labels"] = samples.from_dataset(answer["tokens"])
    right = torch.stack([alone(model, made), alone(model, made["rejected"])])
    found = log_probs(model, placed(collate()([made])))[0]
    torch.testing.assert_close(found, right, rtol=1e-10, atol=1e-10)


def test_answers_to_other_images_share_what_stands_before_the_first_that_differs():
    made = samples.pair("two images", 3, other_images=True)
    second = made["rejected"]["encoder_input"]["vision"]["pixel_values"]
    first = made["encoder_input"]["vision"]["pixel_values"]
    second[:16] = first[:16]  # the first image, of 4 x 4 patches, is the same
    (batch,) = collate()([made]).batches
    branch = batch["spans"][0, :, 1]
    assert int((branch == 0).sum()) == 3 + 1 + 4 + 1 + 2 + 1  # to the start of the second image
    assert batch["encoder_input"]["vision"]["grid_thw"].tolist() == [[1, 4, 4], *[[1, 6, 4]] * 2]


def test_the_answer_to_other_images_alone_changes_with_them():
    model = tiny.model().double()
    same, other = (samples.pair("image", 1, other_images=flag) for flag in (False, True))
    found = [log_probs(model, placed(collate()([made])))[0] for made in (same, other)]
    torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-10, atol=1e-10)
    assert (found[0][1] - found[1][1]).abs() > 1e-2


@pytest.mark.parametrize(("frozen", "patches"), [(True, [60, 40, 0]), (False, [60, 40, 60])])
def test_every_distinct_image_is_encoded_once(frozen, patches):
    """In a batch; and where the encoder is frozen in a step."""
    first, second = samples.pair("image", 1), samples.pair("two images", 2)
    again = samples.pair("image", 5)
    for answer, shown in ((again, first), (again["rejected"], first["rejected"])):
        answer["encoder_input"] = {"vision": {**shown["encoder_input"]["vision"]}}
    rows = [first, first, second, samples.pair("text", 3), again, samples.pair("text", 4)]
    data = collate(across_batches=frozen)(rows)
    shapes = [
        len(batch["encoder_input"]["vision"]["pixel_values"]) if "encoder_input" in batch else 0
        for batch in data.batches
    ]
    assert shapes == patches
    assert [sum(h * w for _, h, w in grids) for grids in data.grids] == patches
    model = tiny.model().double()
    with torch.no_grad():
        expected = [torch.stack([alone(model, s), alone(model, s["rejected"])]) for s in rows]
        found = log_probs(model, placed(data), frozen=frozen)
    torch.testing.assert_close(found, torch.stack(expected), rtol=1e-10, atol=1e-10)


def test_packing_distributes_rows_and_keeps_their_images():
    model = tiny.model().double()
    data = collate(pack_to=130, across_batches=True)(PAIRS)
    assert len(data.batches) == 2
    assert all(sum(lengths) <= 130 for lengths in data.lengths)
    with torch.no_grad():
        found = sorted(log_probs(model, placed(data), frozen=True).flatten().tolist())
        right = sorted(float(alone(model, s)) for made in PAIRS for s in (made, made["rejected"]))
    assert found == pytest.approx(right, rel=1e-10)
    with pytest.raises(ValueError, match="does not fit into rows of pack_to 20"):
        collate(pack_to=20)(PAIRS)


def test_unpaired_answers_move_on_by_one_row_of_their_batch():
    model = tiny.model().double()
    names = list(samples.KINDS)
    rows = [samples.unpaired(kind, seed) for seed, kind in enumerate(names)]
    expected = []
    for own, before in enumerate([1, 0, 3, 2, 4]):
        row, answer = rows[own], samples.KINDS[names[before]][1]
        prompt = len(row["tokens"]) - samples.KINDS[names[own]][1]
        head = {name: row[name][:prompt] for name in ("tokens", "labels", "input_pos")}
        tail = {name: rows[before][name][-answer:] for name in ("tokens", "labels")}
        tail["input_pos"] = torch.arange(1, answer + 1)[:, None] + head["input_pos"][-1]
        moved = {**row, **{name: torch.cat([head[name], tail[name]]) for name in head}}
        expected.append(torch.stack([alone(model, row), alone(model, moved)]))
    data = placed(collate(paired=False)(rows))
    assert_same(model, data, torch.stack(expected))
    liked = [batch["liked"].tolist() for batch in data.batches]
    assert liked == [[False, True], [True, False], [True]]


def test_rows_of_the_other_kind_are_refused():
    with pytest.raises(ValueError, match=r"a row has one answer alone, .*; set loss.name to kto"):
        collate()([samples.pair("text", 1), samples.unpaired("text", 2)])
    with pytest.raises(ValueError, match=r"but a row is a pair .*; set loss.name to dpo"):
        collate(paired=False)([samples.unpaired("text", 1), samples.pair("text", 2)])


def test_rows_that_only_fill_up_a_step_have_no_labels():
    filling = {**samples.ignored(samples.pair("image", 1))}
    (batch,) = collate()([filling, samples.pair("text", 2)]).batches
    assert answer_lengths(batch).tolist() == [[0, 7], [9, 5]]
    rows = [samples.unpaired("image", 1), samples.ignored(samples.unpaired("text", 2))]
    (batch,) = collate(paired=False)(rows).batches
    assert answer_lengths(batch).tolist() == [[4, 0], [0, 0]]


def test_the_mask_of_flex_attention_is_the_dense_one():
    data = collate(pack_to=400, mask="flex")(PAIRS)
    (batch,) = data.batches
    assert batch["tokens"].shape == (1, 512)
    dense = tree_mask(batch["spans"], flex=False)
    block = tree_mask(batch["spans"], flex=True)
    assert torch.equal(create_mask(block.mask_mod, 1, 1, 512, 512, device="cpu")[0], dense)
    assert dense[0, -1].nonzero().flatten()[0] == sum(data.lengths[0])  # padding sees padding


def test_reference_log_probabilities_of_the_samples_come_along():
    rows = [{**made, "reference": torch.tensor([k, -k])} for k, made in enumerate(PAIRS)]
    first, *_ = collate()(rows).batches
    assert first["reference"].tolist() == [[0, 0], [1, -1]]
