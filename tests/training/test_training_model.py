"""The model of a run: made, filled, saved."""

import copy
import json
import shutil

import pytest
import tiny
import torch
from torch._dynamo.utils import counters
from torchtune import training
from training_samples import Transform, sample

from parity import reference
from parity.inputs import make_inputs
from torchtune_qwen25vl.training import (
    StepCollate,
    gather_weights,
    make_model,
    save_adapter,
    save_model,
    summed_loss,
    trained_names,
)

CPU = torch.device("cpu")
LIMITS = {"min_pixels": 6272, "max_pixels": 50176}
ADAPTERS = {
    "lora_attn_modules": ["q_proj", "k_proj", "v_proj", "output_proj"],
    "apply_lora_to_mlp": True,
    "lora_rank": 4,
    "lora_alpha": 3,
}
TUNED = {**ADAPTERS, "decoder_trainable": "lora", "vision_trainable": "lora"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny model as transformers saves it."""
    path = tmp_path_factory.mktemp("tiny")
    reference.random_model("tiny").save_pretrained(path)
    return path


def make(folder, tuning=TUNED, **options):
    options = {"precision": "fp32", "device": CPU, "seed": 0} | options
    return make_model(folder, tuning, **options)


def disturbed(model, names):
    """The model after a training that moved these weights."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, weight in model.state_dict().items():
            if name in names:
                weight.add_(0.02 * torch.randn(weight.shape, generator=generator))
    return model.eval()


def test_adapters_have_no_effect_at_first(folder):
    plain, adapted = make(folder, {}).eval(), make(folder).eval()
    inputs = tiny.inputs("mixed batch").ours
    with torch.no_grad():
        assert torch.equal(plain(**inputs), adapted(**inputs))
    dora = make(folder, {**TUNED, "use_dora": True}).eval()
    with torch.no_grad():
        assert (plain(**inputs) - dora(**inputs)).abs().max() < 1e-5


def test_new_weights_follow_the_seed(folder):
    first, again, other = make(folder), make(folder), make(folder, seed=1)
    names = [name for name in trained_names(first) if "lora_a" in name]
    assert names
    for name in names:
        weight = first.state_dict()[name]
        assert torch.equal(weight, again.state_dict()[name])
        assert not torch.equal(weight, other.state_dict()[name])
        assert weight.abs().max() <= weight.shape[1] ** -0.5  # kaiming_uniform_ with a = sqrt(5)


def test_from_scratch_reads_the_config_only(folder, tmp_path):
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    model = make(tmp_path, {}, from_scratch=True)
    for name, weight in model.named_parameters():
        if name.endswith(".scale"):
            assert (weight == 1).all()
        elif weight.ndim == 1:
            assert not weight.any()
        else:
            assert abs(weight.std() - 0.02) < 0.002, name
    with pytest.raises(ValueError, match="holds no weights"):
        make(tmp_path, {})


def test_new_weights_are_as_wide_as_the_config_says(folder, tmp_path):
    settings = json.loads((folder / "config.json").read_text())
    settings["text_config"]["initializer_range"] = 0.05
    settings["vision_config"]["initializer_range"] = 0.01
    (tmp_path / "config.json").write_text(json.dumps(settings))
    for name, weight in make(tmp_path, {}, from_scratch=True).named_parameters():
        if weight.ndim == 2:
            expected = 0.01 if name.startswith("vision") else 0.05
            assert abs(weight.std() / expected - 1) < 0.1, name


def test_a_saved_model_is_the_trained_one_in_transformers(folder, tmp_path):
    model = make(folder)
    disturbed(model, trained_names(model))
    inputs = tiny.inputs("mixed batch")
    with torch.no_grad():
        expected = model(**inputs.ours)
    save_model(
        tmp_path / "model",
        gather_weights(model, CPU),
        source=folder,
        from_scratch=False,
        tuning=ADAPTERS,
        limits=LIMITS,
    )
    theirs = reference.load(str(tmp_path / "model"), torch.float32)
    with torch.no_grad():
        logits = theirs(**reference.forward_kwargs(inputs)).logits
        before = reference.random_model("tiny")(**reference.forward_kwargs(inputs)).logits
        again = model(**inputs.ours)
    kept = inputs.attention_mask.bool()
    assert (logits - expected)[kept].abs().max() < 2e-5
    assert (before - expected)[kept].abs().max() > 0.1
    assert torch.equal(again, expected)  # merging left the model as it was
    limits = json.loads((tmp_path / "model" / "preprocessor_config.json").read_text())
    assert limits.items() >= LIMITS.items()
    assert (tmp_path / "model" / "config.json").read_bytes() == (
        folder / "config.json"
    ).read_bytes()


def test_a_saved_adapter_is_the_trained_one_in_peft(folder, tmp_path):
    model = make(folder)
    names = trained_names(model)
    assert any(name.startswith("vision.merger") for name in names)
    disturbed(model, names)
    weights = gather_weights(model, CPU)
    saved = {"source": folder, "tuning": ADAPTERS, "limits": LIMITS}
    save_adapter(tmp_path / "adapter", weights, names, **saved)
    assert error_in_peft(tmp_path / "adapter", "tiny", model) < 2e-5
    limits = json.loads((tmp_path / "adapter" / "preprocessor_config.json").read_text())
    assert limits.items() >= LIMITS.items()
    assert not (tmp_path / "adapter" / "config.json").exists()


def error_in_peft(adapter, base, model):
    """Largest difference of logits: peft with this adapter on a reference model, and our model."""
    peft = pytest.importorskip("peft", reason="peft is missing; it is in the dev group")
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(reference.random_model(base)), adapter)
    inputs = tiny.inputs("mixed batch")
    with torch.no_grad():
        expected = model(**inputs.ours)
        logits = theirs.eval()(**reference.forward_kwargs(inputs)).logits
    return (logits - expected)[inputs.attention_mask.bool()].abs().max()


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
def test_a_tied_output_trained_beside_adapters_reaches_peft(tmp_path):
    reference.random_model("tied").save_pretrained(tmp_path / "model")
    model = make(tmp_path / "model", {**ADAPTERS, "vision_trainable": "lora"})
    names = trained_names(model)
    assert "tok_embeddings.weight" in names
    disturbed(model, names)
    weights = gather_weights(model, CPU)
    saved = {"source": tmp_path / "model", "tuning": ADAPTERS, "limits": LIMITS}
    save_adapter(tmp_path / "adapter", weights, names, **saved)
    assert error_in_peft(tmp_path / "adapter", "tied", model) < 2e-5
    untied = {**weights, "output.weight": None}  # so that the output is not exported
    save_adapter(tmp_path / "without", untied, names, **saved)
    assert error_in_peft(tmp_path / "without", "tied", model) > 0.01


def test_a_model_from_scratch_is_saved_as_one_file(folder, tmp_path):
    model = make(folder, {}, from_scratch=True)
    save_model(
        tmp_path / "model",
        gather_weights(model, CPU),
        source=folder,
        from_scratch=True,
        tuning=ADAPTERS,
        limits=LIMITS,
    )
    again = make(tmp_path / "model", {})
    for name, weight in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], weight), name


def test_compiled_layers_compute_the_same(folder, monkeypatch):
    monkeypatch.setenv("TORCH_COMPILE_BACKEND", "aot_eager")
    plain, compiled = make(folder, {}), make(folder, {}, compile_layers=True)
    batches = StepCollate(Transform.pad_id, batch_size=2, pack_to=None)(
        [sample("image", 0), sample("text", 1)]
    ).batches
    inputs = {k: value for k, value in batches[0].items() if k not in ("labels", "label_rows")}
    with torch.no_grad():
        assert (plain(**inputs) - compiled(**inputs)).abs().max() < 1e-5


def test_layers_are_compiled_for_any_length(monkeypatch):
    """Nine batches of other lengths, rows and images: nothing is compiled after the second."""
    monkeypatch.setenv("TORCH_COMPILE_BACKEND", "eager")
    torch._dynamo.reset()
    counters.clear()
    plain, compiled = tiny.model().train(), tiny.model().train()
    training.compile_model(compiled, verbose=False)
    graphs = []
    for n in range(9):
        image = (1, 4 + 2 * (n % 4), 6 + 2 * (n % 3))
        layout = [[5 + n, image, 9 + 2 * n], [7 + 3 * n], *([[4]] if n % 2 else [])]
        inputs = make_inputs(layout, tiny.IDS, seed=n)
        batch = {**inputs.ours, "labels": inputs.labels}
        loss = summed_loss(compiled, batch)
        loss.backward()
        assert torch.equal(loss, summed_loss(plain, batch))
        graphs.append(counters["stats"]["unique_graphs"])
    assert graphs[1:] == [6] * 8
    assert not counters["graph_break"]


@pytest.mark.parametrize("key", ["torch_dtype", "dtype"])
def test_weights_trained_in_fp32_say_so(folder, tmp_path, key):
    """In config.json, by the name that transformers 4 or 5 gave it, in its sections too."""
    source = shutil.copytree(folder, tmp_path / "source")
    settings = json.loads((source / "config.json").read_text())
    sections = ("text_config", "vision_config")
    for section in (settings, *(settings[name] for name in sections)):
        section.pop("torch_dtype", None)
        section.pop("dtype", None)
        section[key] = "bfloat16"
    (source / "config.json").write_text(json.dumps(settings))
    for dtype, name in ((torch.float32, "float32"), (torch.bfloat16, "bfloat16")):
        target = tmp_path / name
        precision = "fp32" if dtype == torch.float32 else "bf16_stochastic"
        weights = gather_weights(make(source, {}, precision=precision), CPU)
        tuning = {"lora_rank": 4, "lora_alpha": 3}
        save_model(target, weights, source=source, from_scratch=False, tuning=tuning, limits=LIMITS)
        saved = json.loads((target / "config.json").read_text())
        assert {s[key] for s in (saved, *(saved[part] for part in sections))} == {name}
        rest = {k: v for k, v in saved.items() if k not in (key, *sections)}
        assert rest == {k: v for k, v in settings.items() if k not in (key, *sections)}
