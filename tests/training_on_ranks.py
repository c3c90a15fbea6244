"""What the tests run on two ranks and on one."""

import importlib.util
import json
from pathlib import Path

import torch
from omegaconf import OmegaConf
from torchtune import utils
from training_samples import sample

from torchtune_qwen25vl import training

RECIPE = Path(__file__).parents[1] / "recipes" / "finetune.py"
LORA = {"lora_attn_modules": ["q_proj", "v_proj"], "apply_lora_to_mlp": True, "lora_rank": 4}
TUNINGS = {
    "full": {},
    "full, tied": {},
    "full, bf16_mixed": {},
    "full, bf16_stochastic": {},
    "adapters": {**LORA, "decoder_trainable": "lora", "vision_trainable": "lora"},
    "frozen vision": {**LORA, "decoder_trainable": "lora", "vision_trainable": "frozen"},
}
# what each of two ranks has in its two batches
MIXTURES = {
    "text beside images": [[["text"], ["short"]], [["image", "text"], ["two images"]]],
    "video beside text": [[["video"], ["text", "text"]], [["short"], ["image"]]],
}


def recipe():
    """The flagship as a module."""
    spec = importlib.util.spec_from_file_location("finetune", RECIPE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def gradients(folder, tuning, mixture, *, checkpointed):
    """Loss and all gradients of one step on this mixture, whole, on the first rank.

    The folder has the models "model" and "tied".
    """
    world_size, rank = utils.get_world_size_and_rank()
    device = torch.device("cpu")
    model = training.make_model(
        folder / ("tied" if tuning.endswith("tied") else "model"),
        TUNINGS[tuning],
        precision=tuning.removeprefix("full, ") if "bf16" in tuning else "fp32",
        device=device,
        seed=0,
        checkpoint_activations=checkpointed,
    )
    with torch.no_grad():  # so that the A of an adapter has gradients too
        for name, parameter in model.named_parameters():
            if "lora_b" in name:
                parameter.fill_(0.01)
    kinds = MIXTURES[mixture]
    ranks = [kinds[rank]] if world_size > 1 else kinds
    batches = [
        training.StepCollate(1007, batch_size=9, pack_to=None)(
            [sample(kind, seed) for seed, kind in enumerate(row)]
        ).batches[0]
        for rows in ranks
        for row in rows
    ]
    seen = {}

    def look(model, *, has_media):
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                grad = parameter.grad
                name = name.replace("_checkpoint_wrapped_module.", "")
                seen[name] = grad.full_tensor() if hasattr(grad, "full_tensor") else grad.clone()

    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.0)
    precision = "bf16_mixed" if "mixed" in tuning else "fp32"
    loss = training.computed_in(precision, device, model, training.summed_loss)
    result = training.train_step(model, optimizer, batches, check=look, loss=loss)
    return {"loss": torch.tensor(result.loss), "norm": torch.tensor(result.grad_norm), **seen}


def constant(optimizer, num_training_steps):
    """A schedule that does not depend on the length of the run."""
    return torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)


def note(folder, seconds):
    """Write down what a recipe's `after_training` is called with."""
    (folder.parent / "note.json").write_text(json.dumps([str(folder), seconds]))


def run(cfg):
    """Run the recipe, and return it."""
    module = recipe()
    cfg = OmegaConf.create(cfg)
    flagship = module.FinetuneRecipe(cfg)
    flagship.setup()
    flagship.train()
    flagship.finish(flagship.save())
    return flagship


def on_each(folder, cfg):
    """All mixtures and tunings, and the recipe; returns an exit code."""
    torch.distributed.init_process_group("gloo")
    rank = torch.distributed.get_rank()
    for tuning in TUNINGS:
        for mixture in MIXTURES:
            found = gradients(folder, tuning, mixture, checkpointed="full" not in tuning)
            if rank == 0:
                torch.save(found, folder / f"{tuning}, {mixture}.pt")
    run(cfg)
    torch.distributed.destroy_process_group()
    return 0
