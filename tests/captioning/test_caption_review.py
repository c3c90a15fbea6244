"""The review page in a browser: what it shows, filters, and saves."""

import json
import shutil
import subprocess

import captions
import pytest
from PIL import Image

from torchtune_qwen25vl.captioning import Record, Thumbnails, _thumbnails
from torchtune_qwen25vl.captioning._review import write_review
from torchtune_qwen25vl.jobs import Item, Workers
from torchtune_qwen25vl.media import load_image

BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
NASTY = '</script><b>"quoted"</b> & <!-- -->\nsecond line é ✓'
STATES = ("done", "cut", "looped", "skipped", "failed")
SCRIPT = """
<script>
  const seen = {}, shown = () => articles.filter(a => !a.hidden).length;
  seen.all = shown();
  seen.captions = articles.map(caption);
  seen.pictures = articles.map(a => a.querySelector("img")?.naturalWidth ?? 0);
  seen.options = [...state.options].map(o => o.text);
  state.value = "failed"; state.dispatchEvent(new Event("change")); seen.failed = shown();
  state.value = ""; state.dispatchEvent(new Event("change"));
  text.value = "SECOND"; text.dispatchEvent(new Event("input")); seen.second = shown();
  text.value = ""; text.dispatchEvent(new Event("input"));
  seen.before = lines();
  area(articles[1]).value = "edited ✓";
  area(articles[1]).dispatchEvent(new Event("input", { bubbles: true }));
  seen.count = count.value;
  seen.after = lines();
  URL.createObjectURL = blob => (seen.size = blob.size, "#");
  save.click();
  document.body.textContent = JSON.stringify(seen);
</script>
"""


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """A page of five images, one in each state."""
    folder = tmp_path_factory.mktemp("review")
    pictures = sorted(captions.write_pictures(folder / "photos", 4).iterdir())
    items = [Item(str(path), path) for path in pictures]
    items.append(Item("/nowhere/<i>.png", folder / "nowhere.png"))
    texts = [NASTY, "Short.", "so so so so", "Old.", ""]
    records = [
        Record(item.name, state, text, "no such file" if state == "failed" else "")
        for item, state, text in zip(items, STATES, texts, strict=True)
    ]
    path = folder / "review.html"
    write_review(path, records, Thumbnails(folder).read(items, Workers(0)))
    return path


def in_browser(page, *arguments):
    if BROWSER is None:
        pytest.skip("no Chromium is installed to open the page in (Debian: apt install chromium)")
    words = ["--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=5000"]
    command = [BROWSER, *words, *arguments, page.as_uri()]
    return subprocess.run(command, capture_output=True, text=True, timeout=120).stdout


@pytest.fixture(scope="module")
def seen(page):
    """What a script on the page saw."""
    probe = page.with_name("probe.html")
    probe.write_text(page.read_text("utf-8").replace("</html>", f"{SCRIPT}</html>"), "utf-8")
    dom = in_browser(probe, "--dump-dom")
    body = dom[dom.index("<body") :]
    text = body[body.index(">") + 1 : body.index("</body>")]
    for mark, sign in (("&lt;", "<"), ("&gt;", ">"), ("&amp;", "&")):
        text = text.replace(mark, sign)
    return json.loads(text)


def test_the_page_needs_nothing_else(page):
    text = page.read_text("utf-8")
    for word in ("http:", "https:", "<link", ' src="/', "@import"):
        assert word not in text
    assert "<script>" in text
    assert NASTY not in text  # it would end the page's own script


def test_it_shows_every_image_and_caption(seen):
    assert seen["all"] == 5
    assert seen["captions"] == [NASTY, "Short.", "so so so so", "Old.", ""]
    assert all(width > 0 for width in seen["pictures"][:4])
    assert seen["pictures"][4] == 0
    assert seen["options"][0] == "all (5)"
    assert set(seen["options"][1:]) == {f"{state} (1)" for state in STATES}


def test_it_filters_by_state_and_text(seen):
    assert (seen["failed"], seen["second"]) == (1, 1)


def test_it_saves_what_was_edited(seen):
    before, after = ([json.loads(x) for x in seen[k].splitlines()] for k in ("before", "after"))
    assert not any(row["edited"] for row in before)
    assert before[0]["caption"] == NASTY
    assert before[4]["image"] == "/nowhere/<i>.png"
    assert after[1]["caption"] == "edited ✓"
    assert after[1]["edited"] is True
    assert after[:1] + after[2:] == before[:1] + before[2:]
    assert seen["count"] == "5 shown, 1 edited"
    assert seen["size"] == len(seen["after"].encode())


def test_the_same_images_make_the_same_page(page, tmp_path):
    text = page.read_bytes()
    pictures = sorted((page.parent / "photos").iterdir())
    items = [Item(str(path), path) for path in pictures]
    for name in ("a", "b"):
        records = [Record(item.name, "done", "x") for item in items]
        write_review(tmp_path / name, records, Thumbnails(tmp_path).read(items, Workers(0)))
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes() != text


@pytest.fixture
def decoded(monkeypatch):
    """Names of the images that are decoded from here on."""
    names = []

    def load(source):
        names.append(source.name)
        return load_image(source)

    monkeypatch.setattr(_thumbnails, "load_image", load)
    return names


def test_no_image_is_decoded_for_the_page_alone(run, photos, decoded):
    """But those that never went through the model, and those whose thumbnail is gone; once."""
    names = [path.name for path in sorted(photos.iterdir())]
    (photos / names[1]).with_suffix(".txt").write_text("It has one.")
    assert run() == 0
    assert sorted(decoded) == names
    page = (photos / "_captions" / "review.html").read_text()
    assert page.count("data:image/jpeg") == 4
    decoded.clear()
    assert run() == 0
    assert decoded == []
    made = sorted((photos / "_captions" / "thumbnails").iterdir())
    made[0].unlink()
    Image.new("RGB", (70, 70)).save(photos / names[2])  # another image in its place
    assert run() == 0
    assert names[2] in decoded
    assert len(decoded) == len(set(decoded)) <= 2
    assert (photos / "_captions" / "review.html").read_text() != page
    assert len(list((photos / "_captions" / "thumbnails").iterdir())) == 4


def test_without_a_page_there_are_no_thumbnails(run, photos, decoded):
    assert run(review=False) == 0
    assert len(decoded) == 4
    assert not (photos / "_captions" / "thumbnails").exists()


def test_thumbnails_are_no_images_to_caption(run, photos):
    assert run() == 0
    assert run() == 0
    assert len(captions.rows(photos / "_captions")) == 4


def test_a_thumbnail_that_cannot_be_written_fails_no_image(run, photos, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(_thumbnails, "_write", full)
    assert run(review=True, workers=0) == 0
    assert "failed" not in captions.states(photos / "_captions").values()
