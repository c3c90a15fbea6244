"""What the README says runs."""

import csv
import gzip
import json
import pathlib
import re
import shlex
import shutil
import sys
import tarfile

import pytest
import tiny_folder
from omegaconf import OmegaConf
from PIL import Image
from torchtune import config

from parity import reference, vocabulary
from parity.random_folder import write_random
from parity.stages._stage import Setting
from parity.stages.conditioning import MODEL, Pair
from torchtune_qwen25vl import Qwen25VLTransform, _cli, load_pretrained
from torchtune_qwen25vl.comfyui import __main__ as comfyui_command
from torchtune_qwen25vl.data import __main__ as data_command
from torchtune_qwen25vl.hidden_states import __main__ as states_command
from torchtune_qwen25vl.hidden_states import open_states
from torchtune_qwen25vl.media import StreamRows
from torchtune_qwen25vl.shapes import __main__ as pictures_command
from torchtune_qwen25vl.shapes import draw, random_scene

ROOT = pathlib.Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def blocks(language, text=README):
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


@pytest.fixture
def folder(tmp_path):
    """A checkpoint of the example's shape with random weights, which says words."""
    return write_random(tmp_path / "model", text={})


def test_python_blocks_run(folder, tmp_path, capsys):
    photo = tmp_path / "photo.png"
    draw(random_scene(0)).save(photo)
    assert blocks("python")
    names = {"folder": folder, "photo": photo}
    for block in blocks("python"):  # each goes on from the one before
        exec(compile(block, "README.md", "exec"), names)
    assert capsys.readouterr().out
    assert Image.open(photo)


def commands(text=README):
    found = blocks("bash", text)
    lines = [line.split("#")[0].strip() for block in found for line in block.splitlines()]
    return [shlex.split(line) for line in lines if line]


def test_there_are_exactly_two_commands_to_set_up():
    setup = [command for command in commands() if command[:3] == ["python3", "-m", "pip"]]
    assert [command[-1] for command in setup] == ["parity", "pytest"]


SMALL = {"device": "cpu", "min_pixels": 3136, "max_new_tokens": 2, "workers": 0}
SMALLER = {"device": "cpu", "precision": "fp32", "dataloader.num_workers": 0}
OF_A_LESSON = {
    "max_steps": 2,
    "batch_size": 4,
    "eval_every_n_steps": 2,
    "save_every_n_steps": "null",
    "val_dataset.length": 4,
    "dataloader.num_workers": 0,
    "after_training.images": 8,
    "log_every_n_steps": 1,
    "lr_scheduler.num_warmup_steps": 0,
}


def run(command, monkeypatch):
    """A command of the README in this process; returns its exit code."""
    words = command[2:]  # behind uv run
    if words[:2] == ["python", "-m"]:
        words = words[2:]
        entry = {
            "torchtune_qwen25vl.comfyui": comfyui_command.main,
            "torchtune_qwen25vl.data": data_command.main,
            "torchtune_qwen25vl.hidden_states": states_command.main,
            "torchtune_qwen25vl.shapes": pictures_command.main,
        }[words[0]]
        return entry(words[1:])
    if words[0] in ("caption", "hidden-states"):
        short = _cli.caption if words[0] == "caption" else _cli.hidden_states
        return short([*words[1:], *(f"{key}={value}" for key, value in SMALL.items())])
    if words[0] == "embed-prompts":
        return _cli.embed_prompts(words[1:])
    monkeypatch.setattr(sys, "argv", words)
    monkeypatch.setattr(sys, "path", list(sys.path))
    try:
        return _cli.main()
    except SystemExit as done:
        return done.code


def section(title):
    """The commands under a heading."""
    return commands(README.split(f"## {title}\n")[1].split("\n## ")[0])


def test_the_guide_from_data_to_captions(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").mkdir()
    folder.rename(tmp_path / "models" / "Qwen2.5-VL-3B-Instruct")
    rows = tiny_folder.write_pictures(tmp_path / "rows", rows=4)
    shutil.copytree(rows.parent, tmp_path, dirs_exist_ok=True)
    (tmp_path / rows.name).rename(tmp_path / "train.jsonl")
    (tmp_path / "photos").mkdir()
    draw(random_scene(0)).save(tmp_path / "photos" / "one.png")
    download, copy, *others = section("Fine-tune")
    assert download[3] == "download"  # there is no hub here
    assert not run(copy, monkeypatch)
    cfg = OmegaConf.load("my.yaml")
    for key, value in SMALLER.items():
        OmegaConf.update(cfg, key, value, force_add=True)
    OmegaConf.save(cfg, "my.yaml")
    for command in others:
        assert not run(command, monkeypatch), command
    assert (tmp_path / "photos" / "one.txt").read_text().strip()
    for command in section("Caption a folder"):
        assert not run([*command, "model=models/Qwen2.5-VL-3B-Instruct"], monkeypatch)


def test_the_guide_to_mixtures(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    rows = tiny_folder.write_pictures(tmp_path / "rows", rows=20)
    shutil.copytree(rows.parent, tmp_path, dirs_exist_ok=True)
    lines = [json.dumps(row) + "\n" for row in json.loads(rows.read_text())]
    (tmp_path / "talks.jsonl.gz").write_bytes(gzip.compress("".join(lines).encode()))
    (tmp_path / "0-0.txt").write_text("A red box on white.")
    (tmp_path / "shards").mkdir()
    with tarfile.open(tmp_path / "shards" / "0.tar", "w") as tar:
        for name in ("0-0.png", "0-0.txt"):
            tar.add(tmp_path / name, name)
    block, _ = blocks("yaml")
    path = vocabulary.small(tiny_folder.TEXTS) / "tokenizer.json"
    tokenizer = {"_component_": "torchtune_qwen25vl.Qwen25VLTransform", "path": str(path)}
    OmegaConf.save(OmegaConf.merge(OmegaConf.create(block), {"tokenizer": tokenizer}), "my.yaml")
    assert not data_command.main(["check", "my.yaml", "--num-workers=0"])
    printed = capsys.readouterr().out
    assert "talks.jsonl.gz train[:95%]: 19 rows, 0 bad" in printed
    assert "shards: 1 rows, 0 bad" in printed
    dataset = config.instantiate(OmegaConf.load("my.yaml").dataset, Qwen25VLTransform(path))
    assert len(dataset) == 2 * 19 + 500


def test_the_guide_to_streams(tmp_path):
    _, block = blocks("yaml")
    rows = [
        {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}
    ] * 5
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    cfg = OmegaConf.create(block)
    cfg.dataset.source, cfg.dataset.data_files = "json", str(tmp_path / "rows.jsonl")
    cfg.dataset.split = "train[:4]"
    path = vocabulary.small(tiny_folder.TEXTS) / "tokenizer.json"
    dataset = config.instantiate(cfg.dataset, Qwen25VLTransform(path))
    assert isinstance(dataset.rows, StreamRows)
    assert len(dataset) == 4
    assert len(dataset[3]["tokens"])


def test_the_guide_to_preference(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").mkdir()
    folder.rename(tmp_path / "models" / "Qwen2.5-VL-3B-Instruct")
    pairs = tiny_folder.write_pairs(tmp_path / "rows", rows=4)
    shutil.copytree(pairs.parent, tmp_path, dirs_exist_ok=True)
    copy, check, train = section("Prefer one answer to another")
    assert not run(copy, monkeypatch)
    assert not run(check, monkeypatch)
    assert tiny_folder.QUESTION in capsys.readouterr().out.split("--- and its rejected answer")[1]
    small = [f"{key}={value}" for key, value in SMALLER.items()]
    assert not run([*train, *small], monkeypatch)
    assert (tmp_path / "runs" / "preference" / "model" / "config.json").is_file()
    row = README.split("A row is `")[1].split("`")[0]
    assert json.loads(row).keys() == {"image", "prompt", "chosen", "rejected"}


def test_the_guide_to_distillation(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for size in (3, 7):
        shutil.copytree(folder, tmp_path / "models" / f"Qwen2.5-VL-{size}B-Instruct")
    rows = tiny_folder.write_pictures(tmp_path / "rows", rows=4)
    shutil.copytree(rows.parent, tmp_path, dirs_exist_ok=True)
    (tmp_path / rows.name).rename(tmp_path / "train.jsonl")
    copy, train = section("Teach a small model what a large one says")
    assert not run(copy, monkeypatch)
    small = [f"{key}={value}" for key, value in SMALLER.items()]
    assert not run([*train, *small], monkeypatch)
    assert (tmp_path / "runs" / "distill" / "model" / "config.json").is_file()


def test_the_guide_to_rewards(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(folder, tmp_path / "models" / "Qwen2.5-VL-3B-Instruct")
    rows = tiny_folder.write_pictures(tmp_path / "rows", rows=4)
    shutil.copytree(rows.parent, tmp_path, dirs_exist_ok=True)
    lines = [
        {
            "messages": [
                {"role": "user", "content": line["conversations"][0]["value"]},
                {"role": "assistant", "content": line["conversations"][1]["value"]},
            ],
            "images": line.get("image", []),
        }
        for line in json.loads(rows.read_text())
    ]
    (tmp_path / "questions.jsonl").write_text("\n".join(map(json.dumps, lines)))
    copy, train = section("Train on rewards")
    assert not run(copy, monkeypatch)
    small = [f"{key}={value}" for key, value in SMALLER.items()]
    assert not run([*train, *small, "max_new_tokens=3"], monkeypatch)
    output = tmp_path / "runs" / "policy"
    assert (output / "model" / "config.json").is_file()
    answers = (output / "answers" / "step_1.jsonl").read_text().splitlines()
    assert len(answers) == 16 * 8


def test_the_guide_to_scores(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = tiny_folder.write_pictures(tmp_path / "rows", rows=4)
    shutil.copytree(rows.parent, tmp_path, dirs_exist_ok=True)
    (tmp_path / rows.name).rename(tmp_path / "train.jsonl")
    row = json.loads(README.split("## Evaluate")[1].split("A row is `")[1].split("`")[0])
    (tmp_path / "test.jsonl").write_text(json.dumps(row | {"image": "0-0.png"}))
    evaluate, train = section("Evaluate")
    cfg = OmegaConf.load(ROOT / "recipes" / "configs" / "finetune_lora.yaml")
    for key, value in (SMALLER | {"model_dir": str(folder)}).items():
        OmegaConf.update(cfg, key, value, force_add=True)
    OmegaConf.save(cfg, "my.yaml")
    assert not run(train, monkeypatch)
    assert list((tmp_path / "runs" / "finetune_lora").glob("step_*/best.json"))
    assert not run([*evaluate, "device=cpu", "workers=0", "max_new_tokens=2"], monkeypatch)
    scores = json.loads((tmp_path / "test_evaluation" / "scores.json").read_text())
    assert scores["scores"].keys() == {"anls", "exact_match"}


def test_the_example_that_learns(folder, tmp_path, monkeypatch):
    """But for its first command, which test_shapes runs."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "shapes_tiny").mkdir(parents=True)
    folder.rename(tmp_path / "runs" / "shapes_tiny" / "model")
    train, draw_pictures, describe, draw_more, record, *probes = section("Watch it learn")
    assert train[2:] == ["tune-qwen25vl", "run", "finetune", "--config", "shapes_tiny"]
    assert not run([*draw_pictures, "--count", "3"], monkeypatch)
    assert not run(describe, monkeypatch)
    assert len(list((tmp_path / "pictures").glob("*.txt"))) == 3
    assert not run([*draw_more, "--count", "12"], monkeypatch)
    assert not run(record, monkeypatch)
    for probe in probes:
        assert not run(probe, monkeypatch)
    assert len(list((tmp_path / "probed" / "questions_hidden_states").glob("probe-*.png"))) == 2


def test_the_lessons_on_it(folder, tmp_path, monkeypatch):
    """Each goes on from what those before it left, two steps of each."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "shapes_tiny").mkdir(parents=True)
    folder.rename(tmp_path / "runs" / "shapes_tiny" / "model")
    quick = [f"{key}={value}" for key, value in OF_A_LESSON.items()]
    for command in section("Learn from answers on it"):
        assert not run([*command, *quick], monkeypatch), command
    reports = {path.parent.name for path in tmp_path.glob("runs/*/shapes-report.json")}
    lessons = {"policy", "preference", "distill", "labels"}
    assert reports == {"shapes_half", *(f"shapes_{name}" for name in lessons)}
    layers = {name: len(load_pretrained(f"runs/{name}/model")[0].layers) for name in reports}
    students = {name for name, number in layers.items() if number == 2}
    assert students == {"shapes_distill", "shapes_labels"}


def test_the_guide_from_a_table_to_probes(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").mkdir()
    folder.rename(tmp_path / "models" / "Qwen2.5-VL-3B-Instruct")
    pictures_command.main(["images", "--count", "8", "--questions"])
    (tmp_path / "images" / "questions.csv").rename("questions.csv")
    tried, record, *others = section("Record hidden states")
    assert not run(tried, monkeypatch)
    assert not run(record, monkeypatch)
    answers = open_states("questions_hidden_states").answers
    with open("questions.csv", newline="") as file:
        head, *rows = csv.reader(file)
    with open("questions.csv", "w", newline="") as file:  # half of the answers are right
        right = [[*row[:3], answers[k] if k % 2 else "no", *row[4:]] for k, row in enumerate(rows)]
        csv.writer(file).writerows([head, *right])
    for command in (record, *others):
        assert not run(command, monkeypatch), command


def test_the_guide_to_qwen_image(tmp_path, monkeypatch):
    """On a pipeline of random weights, and a folder that has what a ComfyUI has."""
    monkeypatch.chdir(tmp_path)
    pair = Pair(Setting())
    pipe = reference.whole_pipeline("text_to_image", reference.model(MODEL), pair.processor, 96)
    pipe.save_pretrained("models/Qwen-Image")
    pathlib.Path("prompts.csv").write_text("prompt\nA red apple.\nTwo cats.\n")
    for name in ("main.py", "nodes.py", "folder_paths.py"):
        (tmp_path / "ComfyUI").mkdir(exist_ok=True)
        (tmp_path / "ComfyUI" / name).touch()
    embed, image, install = section("Feed Qwen-Image")
    assert not run([*embed, "device=cpu", "workers=0"], monkeypatch)
    assert len(list((tmp_path / "prompts_prompt_embeds").glob("*.safetensors"))) == 2
    assert not run([*image, "device=cpu", "size=64x64", "steps=1"], monkeypatch)
    assert len(list((tmp_path / "prompts_images").glob("*.png"))) == 2
    assert not run(install, monkeypatch)
    assert (tmp_path / "ComfyUI/custom_nodes/torchtune_qwen25vl/__init__.py").exists()


def test_every_name_in_the_tree_exists():
    tree = blocks("")[-1]
    for name in re.findall(r"^\s*([\w/]+)/ ", tree, re.MULTILINE):
        assert (ROOT / name).is_dir() or (ROOT / "torchtune_qwen25vl" / name).is_dir(), name
