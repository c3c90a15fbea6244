"""`.ci/matrix`: what it says of the versions it has run."""

import importlib.machinery
import importlib.util
import pathlib
import subprocess

import pytest

ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture
def matrix(tmp_path, monkeypatch):
    """The script as a module, whose log is a file of its own."""
    path = ROOT / ".ci" / "matrix"
    loader = importlib.machinery.SourceFileLoader("matrix", str(path))
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader("matrix", loader))
    loader.exec_module(module)
    (tmp_path / "parity").mkdir()
    (tmp_path / "parity" / "LOG.md").write_text("# Findings\n\n## 2026-01-02\n\nolder\n")
    monkeypatch.setattr(module, "ROOT", tmp_path)
    monkeypatch.setattr(module, "newest", lambda: "9.9.9")
    return module


def reported(version, passed=True):
    """What parity reports of one stage under a version."""
    verdict = "passed, 1 as its deviation says" if passed else "failed: RGBA"
    stage = {
        "name": "pixels",
        "passed": passed,
        "verdict": verdict,
        "deviations": {"RGBA": "drops alpha", "LA": "drops alpha", "1 x 1": "refuses"},
    }
    absent = {"name": "bits", "passed": False, "verdict": "not there", "deviations": {}}
    faults = [{"verdict": "caught"}, {"verdict": "theirs"}]
    versions = {"transformers": version}
    return {"passed": False, "versions": versions, "stages": [stage, absent], "faults": faults}


@pytest.mark.parametrize("verdict", ["missed", "broke"])
def test_a_fault_that_is_not_caught_fails(matrix, verdict):
    report = reported("5.3.0")
    assert matrix.passes(report)
    report["faults"].append({"verdict": verdict})
    assert not matrix.passes(report)


@pytest.mark.parametrize(("bad", "code"), [(None, 0), ("5.3.0", 1)])
def test_versions_stand_side_by_side_and_one_that_fails_is_seen(
    matrix, monkeypatch, capsys, bad, code
):
    monkeypatch.setattr(matrix, "run", lambda version, *_: reported(version, version != bad))
    monkeypatch.setattr("sys.argv", ["matrix", "--log"])
    assert matrix.main() == code
    said = capsys.readouterr().out
    assert "| stage | 4.49.0 | 4.52.4 | 4.57.6 | 5.3.0 | 5.17.0 | 9.9.9 |" in said
    assert said.count("| passed, 1 as its deviation says") == 6 - code
    assert said.count("| FAILED: RGBA") == code
    assert said.count("| not there") == 6
    assert "- 9.9.9: 1 of 1 faults caught; deviates in pixels (drops alpha; refuses)" in said
    log = (matrix.ROOT / "parity" / "LOG.md").read_text()
    assert log.index("matrix") < log.index("## 2026-01-02") < log.index("older")


def test_a_version_that_does_not_start_is_no_pass(matrix, monkeypatch, capsys):
    def run(words, **options):
        return subprocess.CompletedProcess(words, 1, stderr="ImportError: no such module\n")

    monkeypatch.setattr(matrix.subprocess, "run", run)
    monkeypatch.setattr("sys.argv", ["matrix"])
    assert matrix.main() == 1
    assert "- 4.49.0: ImportError: no such module" in capsys.readouterr().out
