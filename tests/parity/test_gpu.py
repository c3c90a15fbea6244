"""The script for a GPU, tried on the CPU with small models."""

import json
import math

from parity.gpu import __main__ as gpu
from parity.gpu import _equal, _speed
from parity.gpu._figures import Figure


def test_the_script_runs_and_measures_every_part(monkeypatch, capsys):
    # What a token takes is the difference of two times: of a busy machine any number is right.
    monkeypatch.setattr(gpu, "PARTS", (_equal.tokens, _equal.packed, *gpu.PARTS[3:6]))
    assert gpu.PARTS[2:] == (_speed.inference, _speed.four_bits, _speed.steps)
    assert gpu.main(["--tiny"]) == 0
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert report["problems"] == []
    of = {figure["work"]: figure for figure in report["figures"]}
    assert of["tokens of 120 that differ from the CPU's"]["ours"] == 0
    alone = of["packed row, each sample alone, bf16"]
    assert alone["ours"] < 0.05 < float(alone["note"].removeprefix("control "))
    for work in (
        *("a token of 1", "a token of 3", "captions", "1 prompts of 38 tokens with it"),
        *("a LoRA step, padded", "a LoRA step, packed", "a full step, theirs, padded"),
    ):
        assert math.isfinite(of[f"tied, {work}"]["ours"])
    for four_bit in ("nf4", "int4"):
        held = f"tiny, whole blocks in {four_bit}"
        assert math.isfinite(of[f"{held}, a token of 3"]["ours"])
        assert 0 < of[f"{held}, divergence from bf16"]["ours"] < 0.1


def test_a_part_that_breaks_or_takes_too_long_is_told(monkeypatch, capsys):
    def breaks(device, sizes):
        yield Figure("first", 1.0)
        raise ValueError("no such kernel")

    def endless(device, sizes):
        while True:
            yield Figure("again", 2.0)

    monkeypatch.setattr(gpu, "PARTS", (breaks, endless))
    assert gpu.main(["--tiny", "--seconds", "0.1"]) == 1
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert report["problems"] == [
        "breaks: ValueError: no such kernel",
        "endless: not finished, the time is up",
    ]
    assert report["figures"][0]["work"] == "first"


def test_gains_are_of_time_and_of_rates():
    assert Figure("a", 2.0, theirs=6.0).gain == 3.0
    assert Figure("a", 6.0, "captions/s", theirs=2.0).gain == 3.0
    assert Figure("a", 2.0, "GiB", theirs=5.0).gain == 2.5
