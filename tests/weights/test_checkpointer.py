"""What recipes save loads in transformers and peft, resumes, and survives an interruption."""

import copy
import json
import shutil

import pytest
import torch
from omegaconf import OmegaConf
from peft import PeftModel
from safetensors import safe_open
from torchtune import config, training
from torchtune.modules.peft import (
    get_adapter_params,
    get_adapter_state_dict,
    get_merged_lora_ckpt,
    set_trainable_params,
)

from parity import reference
from parity.inputs import LAYOUTS, make_inputs
from torchtune_qwen25vl import qwen2_5_vl_from_config
from torchtune_qwen25vl.weights import _safetensors
from torchtune_qwen25vl.weights._checkpointer import Qwen25VLCheckpointer

RANK, ALPHA = 4, 12.0
LORA = {"r": RANK, "lora_alpha": ALPHA, "target_modules": ["q_proj"], "peft_type": "LORA"}
RECIPE = {
    "optimizer": {"state": {0: {"exp_avg": torch.ones(2)}}, "param_groups": [{"lr": 1e-3}]},
    "seed": 7,
    "epochs_run": 1,
    "total_epochs": 3,
    "max_steps_per_epoch": 5,
    "dataloader": {"position": 4},
}


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    """Folders as transformers saves them, in shards, with files of a processor beside them."""
    folders = {}
    for name in ("tiny", "tied"):
        folders[name] = folder = tmp_path_factory.mktemp(name)
        reference.random_model(name).save_pretrained(folder, max_shard_size="300KB")
        (folder / "preprocessor_config.json").write_text('{"max_pixels": 50176}')
        (folder / "merges.txt").write_text("#version: 0.2\n")
        assert len(list(folder.glob("*.safetensors"))) > 2
    return folders


@pytest.fixture
def original(originals):
    return originals["tiny"]


@pytest.fixture
def output(tmp_path):
    return tmp_path / "output"


@pytest.fixture(scope="module")
def inputs():
    return make_inputs(LAYOUTS["image"], reference.IDS)


def logits_of_theirs(model, inputs):
    with torch.no_grad():
        return model(**reference.forward_kwargs(inputs)).logits


def logits_of_ours(model, inputs):
    with torch.no_grad():
        return model.eval()(**inputs.ours)


def checkpointer(original, output, **kwargs):
    return Qwen25VLCheckpointer(str(original), str(output), **kwargs)


def trained(original, output, **tuning):
    """A model loaded by the checkpointer and changed as training would."""
    model = qwen2_5_vl_from_config(original / "config.json", **tuning)
    state = checkpointer(original, output).load_checkpoint()
    model.load_state_dict(state["model"], strict=not tuning)
    for module in model.modules():
        if hasattr(module, "initialize_dora_magnitude"):
            module.initialize_dora_magnitude()
    generator = torch.Generator().manual_seed(3)
    adapters = get_adapter_params(model)
    if tuning:
        set_trainable_params(model, adapters)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not tuning or name in adapters:
                parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    return model


def lora_state(model):
    """What torchtune's LoRA recipes hand over: adapters, and the weights they are merged into."""
    state = {name: weight.clone() for name, weight in model.state_dict().items()}
    adapter = get_adapter_state_dict(state)
    merged = get_merged_lora_ckpt(state, RANK, ALPHA)
    return {"model": merged, "adapter": adapter, "adapter_config": dict(LORA)}


TUNING = {
    "lora_attn_modules": ["q_proj", "k_proj", "v_proj", "output_proj"],
    "apply_lora_to_mlp": True,
    "apply_lora_to_output": True,
    "decoder_trainable": "lora",
    "vision_trainable": "lora",
    "merger_trainable": "lora",
    "lora_rank": RANK,
    "lora_alpha": ALPHA,
}


def weight_map(folder):
    return json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]


def assert_equal_tensors(ours, theirs):
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize("name", ["tiny", "tied"])
def test_a_saved_model_has_its_logits_in_transformers(originals, output, inputs, name):
    original = originals[name]
    model = trained(original, output)
    checkpointer(original, output).save_checkpoint({"model": model.state_dict()}, epoch=2)
    theirs = logits_of_theirs(reference.load(str(output / "epoch_2"), torch.float32), inputs)
    torch.testing.assert_close(logits_of_ours(model, inputs), theirs, atol=2e-5, rtol=0)
    before = logits_of_theirs(reference.random_model(name), inputs)
    assert (before - theirs).abs().max() > 1e-2


def test_files_are_named_and_divided_as_the_original(original, output):
    model = trained(original, output)
    checkpointer(original, output).save_checkpoint({"model": model.state_dict()}, epoch=0)
    folder = output / "epoch_0"
    assert weight_map(folder) == weight_map(original)
    for file in set(weight_map(original).values()):
        with safe_open(folder / file, "pt") as ours, safe_open(original / file, "pt") as theirs:
            assert set(ours.keys()) == set(theirs.keys())
    assert {path.name for path in folder.iterdir()} == {path.name for path in original.iterdir()}
    for name in ("config.json", "preprocessor_config.json", "merges.txt"):
        assert (folder / name).read_bytes() == (original / name).read_bytes()


def test_a_recipe_makes_it_from_yaml(original, output):
    count = len(list(original.glob("*.safetensors")))
    yaml = f"""
        _component_: torchtune_qwen25vl.weights._checkpointer.Qwen25VLCheckpointer
        checkpoint_dir: {original}
        checkpoint_files:
            filename_format: "model-{{}}-of-{{}}.safetensors"
            max_filename: "{count:05}"
        recipe_checkpoint: null
        output_dir: {output}
        model_type: QWEN2_5_VL
    """
    made = config.instantiate(OmegaConf.create(yaml), should_load_recipe_state=False)
    assert made._checkpoint_dir == original
    assert made._output_dir == output
    state = made.load_checkpoint()
    assert state.keys() == {training.MODEL_KEY}
    model = qwen2_5_vl_from_config(original / "config.json")
    assert state["model"].keys() == model.state_dict().keys()


def test_named_files_only_are_read(original, output):
    names = sorted(path.name for path in original.glob("*.safetensors"))
    checkpointer(original, output, checkpoint_files=names)
    with pytest.raises(ValueError, match="missing"):
        checkpointer(original, output, checkpoint_files=names[:-1])
    with pytest.raises(ValueError, match=r"model-9\.safetensors is missing"):
        checkpointer(original, output, checkpoint_files=[*names, "model-9.safetensors"])


@pytest.mark.parametrize("argument", ["should_load_recipe_state", "resume_from_checkpoint"])
def test_full_training_resumes_from_the_latest_folder(original, output, argument):
    first = checkpointer(original, output)
    model = trained(original, output)
    for epoch in (9, 10):
        state = {"model": model.state_dict(), **RECIPE, "epochs_run": epoch}
        first.save_checkpoint(state, epoch=epoch, intermediate_checkpoint=True)
        assert state.keys() == {"model", *RECIPE}
    resumed = checkpointer(original, output, **{argument: True}).load_checkpoint()
    assert_equal_tensors(resumed.pop("model"), model.state_dict())
    assert resumed.keys() == RECIPE.keys()
    assert resumed["epochs_run"] == 10
    assert resumed["dataloader"] == RECIPE["dataloader"]
    assert torch.equal(resumed["optimizer"]["state"][0]["exp_avg"], torch.ones(2))
    earlier = {"recipe_checkpoint": "epoch_9/recipe_state.pt", argument: True}
    assert checkpointer(original, output, **earlier).load_checkpoint()["epochs_run"] == 9


def test_lora_training_resumes_from_the_original_weights_and_the_adapters(original, output):
    model = trained(original, output, **TUNING)
    state = lora_state(model)
    first = checkpointer(original, output)
    first.save_checkpoint(state | RECIPE, epoch=0, intermediate_checkpoint=True)
    resumed = checkpointer(original, output, should_load_recipe_state=True).load_checkpoint()
    assert resumed.keys() == {"model", "adapter", *RECIPE}
    assert_equal_tensors(resumed["adapter"], state["adapter"])
    assert_equal_tensors(resumed["model"], first.load_checkpoint()["model"])
    same = qwen2_5_vl_from_config(original / "config.json", **TUNING)
    same.load_state_dict(resumed["model"], strict=False)
    same.load_state_dict(resumed["adapter"], strict=False)
    assert_equal_tensors(same.state_dict(), model.state_dict())


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_merged_weights_and_peft_form_have_the_logits_of_the_model(original, output, inputs, dora):
    model = trained(original, output, **TUNING, use_dora=dora)
    ours = logits_of_ours(model, inputs)
    checkpointer(original, output).save_checkpoint(lora_state(model), epoch=0)
    merged = reference.load(str(output / "epoch_0"), torch.float32)
    torch.testing.assert_close(logits_of_theirs(merged, inputs), ours, atol=2e-5, rtol=0)
    base = reference.load(str(original), torch.float32)
    assert (logits_of_theirs(base, inputs) - ours).abs().max() > 1e-2
    adapted = PeftModel.from_pretrained(base, output / "epoch_0" / "adapter")
    torch.testing.assert_close(logits_of_theirs(adapted, inputs), ours, atol=2e-5, rtol=0)
    settings = json.loads((output / "epoch_0" / "adapter" / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == str(original)


def test_the_adapter_names_its_base_by_hub_id(original, output, monkeypatch):
    monkeypatch.setattr(_safetensors, "fetch", lambda source: original)
    first = checkpointer("owner/name", output)
    first.save_checkpoint(lora_state(trained(original, output, **TUNING)), epoch=0)
    settings = json.loads((output / "epoch_0" / "adapter" / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == "owner/name"
    assert (output / "epoch_0" / "config.json").is_file()


def test_adapters_alone(original, output):
    state = lora_state(trained(original, output, **TUNING))
    del state["model"]
    first = checkpointer(original, output)
    first.save_checkpoint(state | RECIPE, 0, intermediate_checkpoint=True, adapter_only=True)
    folder = output / "epoch_0"
    assert list(folder.glob("*.safetensors*")) == []
    assert (folder / "adapter" / "adapter_model.safetensors").is_file()
    resumed = checkpointer(original, output, should_load_recipe_state=True).load_checkpoint()
    assert_equal_tensors(resumed["adapter"], state["adapter"])
    with pytest.raises(ValueError, match="has none under 'adapter'"):
        first.save_checkpoint({"model": {}}, 1, adapter_only=True)


def test_an_adapter_peft_cannot_hold_does_not_cost_the_epoch(original, output):
    state = lora_state(trained(original, output, **TUNING))
    state["adapter"]["layers.0.attn.rope.lora_a.weight"] = torch.ones(1)
    with pytest.raises(ValueError, match=r"layers\.0\.attn\.rope\.lora_a"):
        checkpointer(original, output).save_checkpoint(state, epoch=0)
    reference.load(str(output / "epoch_0"), torch.float32)
    assert (output / "epoch_0" / "adapter_model.pt").is_file()


def test_folders_by_step_as_in_later_torchtune(original, output):
    first = checkpointer(original, output)
    state = {"model": trained(original, output).state_dict(), **RECIPE}
    for step in (50, 100):
        first.save_checkpoint(
            state, 0, intermediate_checkpoint=True, adapter_only=False, step=step, dir_prefix="step"
        )
    assert {path.name for path in output.iterdir()} == {"step_50", "step_100"}
    resuming = checkpointer(original, output, should_load_recipe_state=True)
    assert resuming._recipe_state == output / "step_100" / "recipe_state.pt"
    with pytest.raises(ValueError, match="pass step"):
        first.save_checkpoint(state, 0, dir_prefix="step")
    first.save_checkpoint(state, 0, intermediate_checkpoint=True)
    with pytest.raises(ValueError, match="holds both of epoch_N and step_N"):
        checkpointer(original, output, should_load_recipe_state=True)


def test_what_is_missing_to_resume_is_named(original, output):
    with pytest.raises(ValueError, match="output holds none of epoch_N and step_N"):
        checkpointer(original, output, should_load_recipe_state=True)
    first = checkpointer(original, output)
    state = {"model": first.load_checkpoint()["model"], **RECIPE}
    first.save_checkpoint(state, 0, intermediate_checkpoint=True)
    first.save_checkpoint(state, 1)
    with pytest.raises(ValueError, match=r"epoch_1/recipe_state\.pt is missing.*that ended"):
        checkpointer(original, output, should_load_recipe_state=True)
    with pytest.raises(ValueError, match=r"epoch_0/adapter_7\.pt is missing"):
        checkpointer(
            original,
            output,
            should_load_recipe_state=True,
            recipe_checkpoint="epoch_0/recipe_state.pt",
            adapter_checkpoint="epoch_0/adapter_7.pt",
        )


@pytest.mark.parametrize("shard", [1, 2])
def test_an_interrupted_save_leaves_the_earlier_one(original, output, monkeypatch, shard):
    first = checkpointer(original, output)
    model = trained(original, output)
    first.save_checkpoint({"model": model.state_dict(), **RECIPE}, 0, intermediate_checkpoint=True)
    written, save_file = [], _safetensors.save_file

    def fail_later(*args, **kwargs):
        written.append(args)
        if len(written) > shard:
            raise OSError("no space left on device")
        save_file(*args, **kwargs)

    monkeypatch.setattr(_safetensors, "save_file", fail_later)
    other = {name: weight + 1 for name, weight in model.state_dict().items()}
    for epoch in (0, 1):
        written.clear()
        with pytest.raises(OSError, match="no space left"):
            first.save_checkpoint({"model": other}, epoch)
    assert [path.name for path in output.iterdir()] == ["epoch_0"]
    resumed = checkpointer(original, output, should_load_recipe_state=True).load_checkpoint()
    assert_equal_tensors(resumed["model"], model.state_dict())


def test_weights_that_do_not_fit_are_not_written(original, output):
    first = checkpointer(original, output)
    state = first.load_checkpoint()["model"]
    lora = qwen2_5_vl_from_config(original / "config.json", **TUNING).state_dict()
    wrong = {
        r"1 of another shape \(model\.norm\.weight \[3\]": state | {"norm.scale": torch.ones(3)},
        "1 missing": {name: w for name, w in state.items() if name != "norm.scale"},
        r"an adapter not merged": dict(lora),
    }
    for message, weights in wrong.items():
        with pytest.raises(ValueError, match=message):
            first.save_checkpoint({"model": weights}, 0)
    assert list(output.iterdir()) == []


def test_pixel_limits_of_the_training_are_saved(original, output):
    first = checkpointer(original, output, min_pixels=3136, max_pixels=9408)
    first.save_checkpoint(first.load_checkpoint(), 0)
    size = reference.Qwen2VLImageProcessor.from_pretrained(output / "epoch_0").size
    assert (size["shortest_edge"], size["longest_edge"]) == (3136, 9408)
    assert (original / "preprocessor_config.json").read_text() == '{"max_pixels": 50176}'


def test_only_the_last_folders_are_kept(original, output):
    first = checkpointer(original, output, keep_last_n_checkpoints=2)
    state = first.load_checkpoint()
    for epoch in (8, 9, 10, 11):
        first.save_checkpoint(state, epoch)
    assert {path.name for path in output.iterdir()} == {"epoch_10", "epoch_11"}
    first.save_checkpoint(state, 0)  # a new run beside an old one
    assert {path.name for path in output.iterdir()} == {"epoch_0", "epoch_10", "epoch_11"}


def test_a_damaged_checkpoint_is_refused_when_it_is_named(original, output, tmp_path):
    damaged = shutil.copytree(original, tmp_path / "damaged")
    shard = sorted(damaged.glob("*.safetensors"))[0]
    shard.write_bytes(shard.read_bytes()[:-8])
    with pytest.raises(ValueError, match=f"{shard.name} is no whole safetensors file"):
        checkpointer(damaged, output)


def test_state_handed_over_stays_as_it_was(original, output):
    state = lora_state(trained(original, output, **TUNING)) | copy.deepcopy(RECIPE)
    names = {key: list(state[key]) for key in ("model", "adapter", "adapter_config", "optimizer")}
    checkpointer(original, output).save_checkpoint(state, 0, intermediate_checkpoint=True)
    assert state.keys() == {*names, *RECIPE}
    assert {key: list(state[key]) for key in names} == names
