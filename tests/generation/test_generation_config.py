"""A checkpoint's generation_config.json is read, or refused by name."""

import json

import pytest

from torchtune_qwen25vl.generation import Sampling, read_generation_config

HUB = {  # as published with Qwen2.5-VL
    "bos_token_id": 151643,
    "pad_token_id": 151643,
    "do_sample": True,
    "eos_token_id": [151645, 151643],
    "repetition_penalty": 1.05,
    "temperature": 0.000001,
    "transformers_version": "4.49.0",
}


@pytest.mark.parametrize(
    ("settings", "read"),
    [
        (None, Sampling()),
        ({}, Sampling()),
        (HUB, Sampling(0.000001, 50, 1.0, 1.05)),
        (HUB | {"top_k": 1, "top_p": 0.001}, Sampling(0.000001, 1, 0.001, 1.05)),
        (HUB | {"do_sample": False}, Sampling(repetition_penalty=1.05)),
        ({"do_sample": True, "top_k": 0, "temperature": None}, Sampling(1.0, None, 1.0)),
        ({"eos_token_id": 151645, "diversity_penalty": 0.0}, Sampling()),
        ({"num_beams": 1, "min_p": None, "no_repeat_ngram_size": 0}, Sampling()),
    ],
)
def test_settings_are_read(tmp_path, settings, read):
    if settings is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(settings))
    assert read_generation_config(tmp_path) == read


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ('{"num_beams": 4}', "num_beams = 4, but tokens are chosen by .*; take it out"),
        ('{"no_repeat_ngram_size": 3}', "no_repeat_ngram_size = 3"),
        ('{"do_sample": true, "top_p": 2}', r"top_p must be in \(0, 1\], or None, got 2"),
        ('{"do_sample": true, "top_k": 1.5}', "top_k must be a whole number from 1 on, .* got 1.5"),
        ('{"do_sample": "yes"}', "do_sample = 'yes', but it is true or false"),
        ('{"eos_token_id": [151645, 7]}', "eos_token_id = .151645, 7., but an answer ends with"),
        ('{"eos_token_id": 7}', "eos_token_id = 7, but an answer ends with"),
        ('{"stop_strings": ["."]}', "stop_strings = "),
        ('{"watermarking_config": {"bias": 2.0}}', "watermarking_config = "),
        ('{"top_h": 0.4}', "top_h = 0.4"),
        ('{"diversity_penalty": 1.0}', "diversity_penalty = 1.0"),
        ('{"repetition_penalty": "high"}', "generation_config.json: "),
        ("[]", "holds no settings"),
        ("{", "holds no settings"),
    ],
)
def test_what_is_not_computed_is_refused(tmp_path, text, match):
    (tmp_path / "generation_config.json").write_text(text)
    with pytest.raises(ValueError, match=match):
        read_generation_config(tmp_path)
