"""`tune-qwen25vl`: our names in torchtune's registry, from a checkout and from a wheel."""

import copy
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from omegaconf import OmegaConf
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torchtune import _recipe_registry
from torchtune._cli.tune import TuneCLIParser
from training_on_ranks import recipe

from torchtune_qwen25vl import _cli

ROOT = Path(__file__).parents[1]
CONFIGS = sorted((ROOT / "recipes" / "configs").rglob("*.yaml"))
TAKEN_BY_TORCHRUN = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)
PROBE = """
import os, pathlib, sys
from omegaconf import OmegaConf
config, *overrides = sys.argv[sys.argv.index("--config") + 1:]
cfg = OmegaConf.merge(OmegaConf.load(config), OmegaConf.from_dotlist(overrides))
rank = os.environ.get("RANK", "alone")
pathlib.Path(cfg.seen, f"{cfg.word}-{rank}").write_text(os.path.abspath(__file__))
"""
ROW_OF_STOCK = (
    "qwen2_5_vl/full_single_device",
    "Train all of the model on one device, by torchtune's recipe",
)
PROBE_CONFIG = "# Launch:\n#   tune-qwen25vl run probe --config sizes/small\nword: small\n"


@pytest.fixture
def tune(monkeypatch):
    """The command line as a function of its words, on a registry of its own."""
    recipes = copy.deepcopy(_recipe_registry._ALL_RECIPES)
    monkeypatch.setattr(_recipe_registry, "_ALL_RECIPES", recipes)
    monkeypatch.setattr(sys, "path", list(sys.path))  # `run` appends the working directory

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["tune-qwen25vl", *map(str, words)])
        _cli.main()

    handlers = {number: signal.getsignal(number) for number in TAKEN_BY_TORCHRUN}
    yield run
    for number, handler in handlers.items():
        signal.signal(number, handler)


def test_the_exit_code_is_that_of_the_processes(tune, monkeypatch):
    def fail(*_):
        failure = ProcessFailure(local_rank=0, pid=1, exitcode=2, error_file="none")
        raise ChildFailedError("caption", {0: failure})

    monkeypatch.setattr(TuneCLIParser, "run", fail)
    with pytest.raises(SystemExit) as done:
        tune("ls")
    assert done.value.code == 2


@pytest.fixture
def left(tmp_path):
    """An empty folder for the probe to write to."""
    (tmp_path / "left").mkdir()
    return tmp_path / "left"


@pytest.fixture
def probe(tmp_path, monkeypatch):
    """A recipes folder with a recipe that leaves a file named after its config and its rank."""
    folder = add_probe(tmp_path / "recipes")
    monkeypatch.setattr(_cli, "RECIPES", folder)
    return folder


def add_probe(folder):
    (folder / "configs" / "sizes").mkdir(parents=True)
    (folder / "probe.py").write_text(PROBE)
    (folder / "configs" / "sizes" / "small.yaml").write_text(PROBE_CONFIG)
    return folder


def seen(folder):
    """What the probe left there: for each of its processes, the file it ran."""
    return {path.name: path.read_text() for path in folder.iterdir()}


def test_ls_lists_ours_beside_torchtunes(tune, capsys):
    tune("ls")
    rows = [re.split(r" {2,}", line) for line in capsys.readouterr().out.splitlines()]
    assert ["full_finetune_single_device", "llama2/7B_full_low_memory"] in rows
    assert ["full_finetune_single_device", *ROW_OF_STOCK] in rows
    assert {row[0] for row in rows} >= {path.stem for path in (ROOT / "recipes").glob("*.py")}
    described = {row[1]: row[2] for row in rows if len(row) == 3}
    assert set(described) == set(_cli._configs())
    assert all(len(what) > 15 and len(what.splitlines()) == 1 for what in described.values())


def test_adding_twice_changes_nothing(tune):
    _cli.add_to_registry()
    once = copy.deepcopy(_recipe_registry._ALL_RECIPES)
    _cli.add_to_registry()
    assert once == _recipe_registry._ALL_RECIPES


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_headers_launch_the_config_they_are_in(path, tune):
    _cli.add_to_registry()
    recipes = {recipe.name for recipe in _recipe_registry.get_all_recipes()}
    name = path.relative_to(ROOT / "recipes" / "configs").with_suffix("").as_posix()
    launches = re.findall(r"tune-qwen25vl run .*?(\w+) --config (\S+)", path.read_text())
    assert launches
    assert {config for _, config in launches} == {name}
    assert {recipe for recipe, _ in launches} <= recipes


def test_a_config_without_a_launch_command_is_noticed(probe, tune):
    (probe / "configs" / "bare.yaml").write_text("word: bare\n")
    with pytest.raises(AssertionError, match=r"bare\.yaml has no launch command"):
        tune("ls")


def test_cp_copies_recipes_and_configs(probe, tune, tmp_path, capsys):
    tune("cp", "probe", tmp_path / "mine.py")
    tune("cp", "sizes/small", tmp_path / "mine.yaml")
    assert (tmp_path / "mine.py").read_text() == PROBE
    assert (tmp_path / "mine.yaml").read_text() == PROBE_CONFIG
    with pytest.raises(SystemExit):
        tune("cp", "sizes/large", tmp_path / "none.yaml")


def test_cp_takes_the_config_of_a_name_that_a_recipe_has_too(tune, tmp_path, capsys):
    configs = ROOT / "recipes" / "configs"
    tune("cp", "preference", tmp_path / "mine.yaml")
    assert (tmp_path / "mine.yaml").read_text() == (configs / "preference.yaml").read_text()
    tune("cp", "preference", tmp_path / "mine.py")
    assert (tmp_path / "mine.py").read_text() == (ROOT / "recipes" / "preference.py").read_text()
    (tmp_path / "mine.py").unlink()
    tune("cp", "caption", tmp_path / "mine.yaml", "--no-clobber")
    assert not (tmp_path / "mine.py").exists()
    assert "loss:" in (tmp_path / "mine.yaml").read_text()
    tune("cp", "caption", tmp_path / "new" / "mine.yaml", "--make-parents")
    assert (tmp_path / "new" / "mine.yaml").read_text() == (configs / "caption.yaml").read_text()
    with pytest.raises(SystemExit) as refused:
        tune("cp", "caption", tmp_path / "none" / "mine.yaml")
    assert refused.value.code == 2


def test_cat_prints_ours(probe, tune, capsys):
    tune("cat", "sizes/small")
    assert capsys.readouterr().out == "word: small\n"


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_validate_takes_names(path, tune, capsys):
    tune("validate", path.relative_to(ROOT / "recipes" / "configs").with_suffix(""))
    assert "well-formed" in capsys.readouterr().out


def test_validate_takes_paths_and_refuses_an_unknown_argument(tune, tmp_path, capsys):
    broken = tmp_path / "broken.yaml"
    transform = {"_component_": "torchtune_qwen25vl.Qwen25VLTransform", "path": "", "tiles": 4}
    broken.write_text(json.dumps({"tokenizer": transform}))
    with pytest.raises(SystemExit):
        tune("validate", broken)
    assert "tiles" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "change", "match"),
    [
        ("finetune_lora", {"batchsize": 4}, r"unknown keys \['batchsize'\]"),
        ("finetune_lora", {"batch_size": 0}, "batch_size is a whole number from 1"),
        ("finetune_lora", {"adapters": {"rank": 4}}, r"adapters has no keys \['rank'\]"),
        ("finetune_lora", {"parts": {"merger": {"decay": 0}}}, r"parts.merger has no keys"),
        ("finetune_lora", {"parts": {"decoder": {"train": "frozen"}}}, "a frozen part takes no lr"),
        ("finetune_lora", {"seed": "${nothing}"}, "Interpolation key 'nothing' not found"),
        (
            "finetune_lora",
            {"eval_every_n_steps": 9, "eval_by_generation": {"sorce": "a.csv"}},
            r"eval_by_generation has no keys \['sorce'\]",
        ),
        ("evaluate", {"metrics": "bleu"}, "metrics are of exact_match"),
        ("caption", {"workerz": 4}, "workerz"),
    ],
)
def test_validate_checks_the_keys_of_our_recipes(tune, tmp_path, capsys, name, change, match):
    path = _cli._configs()[name]
    header = "".join(line for line in path.open() if line.startswith("#"))
    cfg = OmegaConf.merge(OmegaConf.load(path), change)
    (mine := tmp_path / "mine.yaml").write_text(header + OmegaConf.to_yaml(cfg))
    with pytest.raises(SystemExit) as done:
        tune("validate", mine)
    assert done.value.code == 2
    assert re.match(rf".*mine\.yaml: .*{match}.*\n$", capsys.readouterr().err)


BROKEN = {
    "seed: [0\n": "cannot be read as YAML: .*line 1",
    "seed: 0\nseed: 1\n": "cannot be read as YAML: .*duplicate key seed",
    "seed: 0\n\tx: 1\n": "cannot be read as YAML: .*tab",
    "- 1\n": "holds no keys",
    "\xff": "cannot be read as YAML: .*can't decode",
}


@pytest.mark.parametrize("text", BROKEN)
@pytest.mark.parametrize("words", [["validate"], ["run", "finetune", "--config"]])
def test_a_config_that_cannot_be_read_is_one_line(tune, tmp_path, capsys, words, text):
    (tmp_path / "my.yaml").write_text(text, "latin-1")
    with pytest.raises(SystemExit) as done:
        tune(*words, tmp_path / "my.yaml")
    assert done.value.code == 2
    assert re.match(rf".*my\.yaml {BROKEN[text]}.*\n$", capsys.readouterr().err)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["validate", "finetune_lorra"], "finetune_lorra cannot be read as YAML: .*No such file"),
        (["run", "finetune", "--config"], "--config needs a name or a file"),
        (["run", "finetone", "--config", "finetune_lora"], "there is no recipe finetone; see"),
    ],
)
def test_names_that_mean_nothing_are_one_line(tune, capsys, words, said):
    with pytest.raises(SystemExit) as done:
        tune(*words)
    assert done.value.code == 2
    assert re.match(rf"{said}.*\n$", capsys.readouterr().err)


def test_validate_says_where_keys_are_not_checked(tune, tmp_path, capsys):
    tune("validate", "qwen2_5_vl/full_single_device")
    assert "belongs to full_finetune_single_device, so" in capsys.readouterr().out
    (tmp_path / "mine.yaml").write_text("batchsize: 4\n")
    tune("validate", tmp_path / "mine.yaml")
    assert "names no recipe in its header, so" in capsys.readouterr().out


def test_help_speaks_of_this_program(tune, capsys):
    with pytest.raises(SystemExit):
        tune("--help")
    text = capsys.readouterr().out
    assert "usage: tune-qwen25vl" in text
    assert "Qwen2.5-VL" in text
    with pytest.raises(SystemExit):
        tune("run", "--help")
    text += capsys.readouterr().out
    assert "$ tune-qwen25vl run --nproc_per_node 4" in text
    assert not re.search(r"\btune (run|ls|cp|validate|cat|download)\b", text)


def test_download_is_torchtunes(tune, monkeypatch, tmp_path, capsys):
    def snapshot_download(repo_id, *, local_dir, **_):
        (local_dir / "config.json").write_text(repo_id)
        return local_dir

    monkeypatch.setattr("torchtune._cli.download.snapshot_download", snapshot_download)
    tune("download", "Qwen/Qwen2.5-VL-3B-Instruct", "--output-dir", tmp_path)
    assert (tmp_path / "config.json").read_text() == "Qwen/Qwen2.5-VL-3B-Instruct"


@pytest.mark.parametrize("words", [["--help"], ["--config", "finetune_lora", "-h"]])
def test_help_of_a_recipe_says_what_it_does_and_reads(tune, capsys, words):
    tune("run", "finetune", *words)
    text = capsys.readouterr().out
    assert text.startswith("Fine-tune Qwen2.5-VL, each of its parts in its own way")
    configs = {line.split()[0]: line for line in text.splitlines() if line.startswith("  finetune")}
    assert configs.keys() >= {"finetune_full", "finetune_lora"}
    assert "adapters in the decoder" in configs["finetune_lora"]
    keys = OmegaConf.create(text.partition(" has them:\n")[2])
    assert keys.parts.vision.train == "full"


def test_help_of_a_recipe_of_torchtunes_and_of_none(tune, capsys):
    tune("run", "lora_finetune_single_device", "--help")
    text = capsys.readouterr().out
    assert "LoRA finetuning recipe" in text
    assert "llama2/7B_lora_single_device" in text
    assert "decoder_trainable: lora" in text  # keys of ours
    with pytest.raises(SystemExit, match="there is no recipe finetone"):
        tune("run", "finetone", "--help")


def test_finetune_full_has_every_key():
    """It is what the help of the recipe shows."""
    with pytest.raises(ValueError, match="unknown keys") as error:
        recipe().FinetuneRecipe(OmegaConf.create({"no_key": 1}))
    known = set(re.findall(r"'(\w+)'", str(error.value).partition("reads")[2]))
    cfg = OmegaConf.load(ROOT / "recipes" / "configs" / "finetune_full.yaml")
    assert set(cfg) == known


def test_run_on_one_device(probe, tune, left):
    tune("run", "probe", "--config", "sizes/small", f"seen={left}")
    tune("run", "probe", "--config", "sizes/small", f"seen={left}", "word=other")
    assert seen(left) == dict.fromkeys(["small-alone", "other-alone"], str(probe / "probe.py"))


def test_an_unknown_recipe_stops(probe, tune, left):
    with pytest.raises(SystemExit):
        tune("run", "prbe", "--config", "sizes/small", f"seen={left}")


def test_run_under_torchrun(probe, tune, left):
    tune("run", "--nproc_per_node", 2, "probe", "--config", "sizes/small", f"seen={left}")
    assert seen(left) == dict.fromkeys(["small-0", "small-1"], str(probe / "probe.py"))


@pytest.fixture
def tiny_config(tmp_path):
    """A config of the recipe finetune: two steps of a tiny model that needs no files."""
    cfg = OmegaConf.load(ROOT / "recipes" / "configs" / "shapes_tiny.yaml")
    cfg.max_steps, cfg.batch_size, cfg.lr_scheduler.num_warmup_steps = 2, 2, 0
    for key in ("val_dataset", "eval_every_n_steps", "after_training"):
        del cfg[key]
    OmegaConf.save(cfg, tmp_path / "my.yaml")
    return tmp_path / "my.yaml"


def plain_tune(*words, cwd, site=ROOT):
    """Run torchtune's own command line where `site` holds our package."""
    program = shutil.which("tune", path=str(Path(sys.executable).parent))
    run_outside(program, *map(str, words), cwd=cwd, site=site)


def run_outside(*command, cwd, site):
    """Run a command to its good end, in a process of its own."""
    subprocess.run(
        command,
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(site), "OMP_NUM_THREADS": "1"},
        check=True,
        capture_output=True,
        timeout=300,
    )


@pytest.mark.parametrize("torchrun", [[], ["--nproc_per_node", "2"]], ids=["one", "two"])
def test_plain_tune_runs_our_recipe(tiny_config, tmp_path, torchrun):
    recipe = "torchtune_qwen25vl/recipes/finetune.py"
    plain_tune("run", *torchrun, recipe, "--config", tiny_config, "output_dir=out", cwd=tmp_path)
    assert (tmp_path / "out" / "model" / "model.safetensors").exists()
    log = "".join(path.read_text() for path in (tmp_path / "out" / "logs").iterdir())
    assert re.findall(r"Step (\d+) ", log) == ["2"]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The files of a wheel, as an installer lays them out."""
    if importlib.util.find_spec("hatchling") is None:
        pytest.skip("hatchling, the build backend, is not installed")
    folder = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True)
    (path,) = folder.glob("*.whl")
    with zipfile.ZipFile(path) as archive:
        archive.extractall(folder / "site")
        carried = [name for name in archive.namelist() if "recipes/" in name]
    ours = [path for path in (ROOT / "recipes").rglob("*.*") if path.suffix in (".py", ".yaml")]
    expected = {f"torchtune_qwen25vl/{path.relative_to(ROOT).as_posix()}" for path in ours}
    assert sorted(carried) == sorted(expected), "each recipe and config once, as a file"
    return folder / "site"


def test_from_an_installed_wheel(wheel, left, tmp_path):
    """The wheel carries the recipes, and there they are found before torchtune's `recipes`."""
    site = shutil.copytree(wheel, tmp_path / "site")
    folder = add_probe(site / "torchtune_qwen25vl" / "recipes")
    launch = f"--nproc_per_node 2 probe --config sizes/small seen={left}".split()
    program = "from tune_qwen25vl import tune; tune()"
    run_outside(sys.executable, "-c", program, "run", *launch, cwd=tmp_path, site=site)
    assert seen(left) == dict.fromkeys(["small-0", "small-1"], str(folder / "probe.py"))


def test_parity_of_a_wheel_without_its_extra_names_it(wheel):
    program = "import sys; sys.modules['transformers'] = None; from parity.__main__ import main"
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=wheel,
        env={**os.environ, "PYTHONPATH": str(wheel)},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert re.fullmatch(r"parity .*needs transformers; install .*\[parity\]\n", done.stderr)


def test_plain_tune_runs_a_recipe_of_an_installed_wheel(wheel, left, tmp_path):
    site = shutil.copytree(wheel, tmp_path / "site")
    folder = add_probe(site / "torchtune_qwen25vl" / "recipes")
    (tmp_path / "my.yaml").write_text(PROBE_CONFIG)
    launch = ["--nproc_per_node", "2", "torchtune_qwen25vl/recipes/probe.py", "--config", "my.yaml"]
    plain_tune("run", *launch, f"seen={left}", cwd=tmp_path, site=site)
    assert seen(left) == dict.fromkeys(["small-0", "small-1"], str(folder / "probe.py"))
