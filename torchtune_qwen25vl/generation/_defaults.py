"""A checkpoint's own way to choose tokens, generation_config.json."""

import json
from pathlib import Path
from typing import Any

from torchtune_qwen25vl.generation._sampling import Sampling, check_options

DEFAULTS: dict[str, Any] = {
    "temperature": 1.0,
    "top_k": 50,
    "top_p": 1.0,
    "repetition_penalty": 1.0,
}
"""Values that transformers takes where the file has none."""
NEUTRAL: dict[str, Any] = {  # the one value of what else changes tokens
    "num_beams": 1,
    "num_beam_groups": 1,
    "num_return_sequences": 1,
    "diversity_penalty": 0.0,
    "penalty_alpha": 0,
    "no_repeat_ngram_size": 0,
    "encoder_no_repeat_ngram_size": 0,
    "encoder_repetition_penalty": 1.0,
    "min_p": 0,
    "typical_p": 1.0,
    "top_h": None,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
    "min_length": 0,
    "min_new_tokens": 0,
    "bad_words_ids": None,
    "force_words_ids": None,
    "forced_bos_token_id": None,
    "forced_eos_token_id": None,
    "suppress_tokens": None,
    "begin_suppress_tokens": None,
    "sequence_bias": None,
    "guidance_scale": 1,
    "exponential_decay_length_penalty": None,
    "stop_strings": None,
    "max_time": None,
    "dola_layers": None,
    "watermarking_config": None,
    "token_healing": False,
}
ENDS = {151645, 151643}  # <|im_end|> and <|endoftext|>, as published


def read_generation_config(folder: str | Path) -> Sampling:
    """Read how a checkpoint's generation_config.json says that tokens are chosen.

    Without the file, and without `do_sample` in it, tokens are the likeliest ones, as transformers
    has it; its `repetition_penalty` counts in any case.

    Raises:
        ValueError: naming the file, if it is damaged, a value is out of range, or it has a setting
            that changes tokens and is not computed here.

    Source: generation/configuration_utils.py of transformers.
    """
    path = Path(folder) / "generation_config.json"
    if not path.exists():
        return Sampling()
    try:
        settings = json.loads(path.read_text("utf-8"))
        given = {name: value for name, value in settings.items() if value is not None}
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{path} holds no settings ({error}); fetch it again") from error
    for name, neutral in NEUTRAL.items():
        if given.get(name, neutral) not in (neutral, None):
            raise ValueError(
                f"{path} says {name} = {given[name]!r}, but tokens are chosen by temperature, "
                "top_k, top_p and repetition_penalty only; take it out of the file"
            )
    ends = given.get("eos_token_id", [])
    if not ENDS.issuperset(ends if isinstance(ends, list) else [ends]):
        raise ValueError(
            f"{path} says eos_token_id = {ends!r}, but an answer ends with <|im_end|> or "
            "<|endoftext|>; take it out of the file"
        )
    if (sampled := given.get("do_sample", False)) not in (True, False):
        raise ValueError(
            f"{path} says do_sample = {sampled!r}, but it is true or false; correct it"
        )
    values = {name: given.get(name, default) for name, default in DEFAULTS.items()}
    values["top_k"] = values["top_k"] or None  # 0 is none
    try:
        check_options(1, sampling := Sampling(**values))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: {error}") from error
    if not sampled:
        return Sampling(repetition_penalty=sampling.repetition_penalty)
    return sampling
