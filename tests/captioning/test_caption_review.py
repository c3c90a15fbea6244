"""The review page in a browser: what it shows, filters, and saves."""

import json
import shutil
import subprocess

import captions
import pytest

from torchtune_qwen25vl.captioning import Record
from torchtune_qwen25vl.captioning._review import write_review
from torchtune_qwen25vl.jobs import Item, Workers

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
    write_review(path, items, records, Workers(0))
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
        write_review(
            tmp_path / name, items, [Record(i.name, "done", "x") for i in items], Workers(0)
        )
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes() != text
