"""Ten steps of TRL's DPOTrainer on batches made here; the only importer of trl."""

import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor
from transformers import PreTrainedTokenizerFast, Qwen2_5_VLForConditionalGeneration
from transformers.trainer_callback import PrinterCallback

from parity.reference.outputs import since_4_52
from parity.reference.refusals import NotThereError

PAD = 1007


class TrainedPreference(NamedTuple):
    """What a run of theirs was.

    Attributes:
        first: first values of the adapters
        last: their values after the last step
        logged: figures of each step, by their names
    """

    first: dict[str, Tensor]
    last: dict[str, Tensor]
    logged: list[dict[str, float]]


def train_preference(
    model: Qwen2_5_VLForConditionalGeneration,
    batches: Sequence[Mapping[str, Tensor]],
    *,
    beta: float,
    rate: float,
    rank: int,
    alpha: int,
    targets: str,
) -> TrainedPreference:
    """Train adapters of peft by their DPOTrainer, a step on each batch, at one rate.

    A batch holds the chosen answers and then the rejected ones, with positions: theirs would be
    those of this version. Their own collate, their cutting at `max_length` and their bf16, which
    moves the second loss by 4e-3, are out of the way.

    Args:
        model: model that gets the adapters
        batches: arguments of its forward, and "completion_mask"
        beta: weight of the rewards
        rate: learning rate
        rank: rank of the adapters
        alpha: their scale, times the rank
        targets: pattern of the layers that get one

    Raises:
        NotThereError: if no trl goes with this transformers.
    """
    try:
        from datasets import Dataset
        from peft import LoraConfig
        from trl import DPOConfig, DPOTrainer
    except (ImportError, RuntimeError) as error:  # trl turns the one into the other
        raise NotThereError("no trl that goes with this transformers") from error

    losses: list[float] = []

    class Trainer(DPOTrainer):
        def _prepare_dataset(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
            return dataset

        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            loss = super().compute_loss(*args, **kwargs)
            losses.append(float(loss.detach()))  # some versions round what they log
            return loss

    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of transformers, at names that trl uses
        trainer = Trainer(
            model=model,
            args=DPOConfig(
                folder,
                max_steps=len(batches),
                beta=beta,
                per_device_train_batch_size=1,
                learning_rate=rate,
                lr_scheduler_type="constant",
                optim="adamw_torch",
                weight_decay=0.0,
                max_grad_norm=0.0,
                bf16=False,
                gradient_checkpointing=False,
                max_length=None,
                logging_steps=1,
                report_to="none",
                save_strategy="no",
                remove_unused_columns=False,
                disable_tqdm=True,
                use_cpu=True,
                seed=0,
            ),
            train_dataset=Dataset.from_list([{"number": k} for k in range(len(batches))]),
            processing_class=_tokenizer(),
            data_collator=_one_after_the_other(batches),
            peft_config=LoraConfig(r=rank, lora_alpha=alpha, target_modules=targets),
        )
        trainer.remove_callback(PrinterCallback)
        first = _adapters(trainer.model)
        trainer.train()
    steps = [entry for entry in trainer.state.log_history if "loss" in entry]
    logged = [entry | {"loss": loss} for entry, loss in zip(steps, losses, strict=True)]
    return TrainedPreference(first, _adapters(trainer.model), logged)


def _one_after_the_other(batches: Sequence[Mapping[str, Tensor]]) -> Callable[[Any], Any]:
    """A collate that hands out batches in their order, whichever row was drawn."""
    in_order = iter(batches)
    return lambda rows: dict(next(in_order))


def _tokenizer() -> PreTrainedTokenizerFast:
    from tokenizers import Tokenizer, models

    words = models.WordLevel({"<pad>": PAD, "<eos>": 1006}, unk_token="<eos>")
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(words), pad_token="<pad>", eos_token="<eos>"
    )


def _adapters(model: Any) -> dict[str, Tensor]:
    """The trained weights by the names that ours has for them."""
    trained = ((name, p) for name, p in model.named_parameters() if p.requires_grad)
    return {
        since_4_52(
            name.removeprefix("base_model.model.").replace(".default.", ".")
        ): p.detach().clone()
        for name, p in trained
    }
