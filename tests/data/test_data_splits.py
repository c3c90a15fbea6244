"""Parts of data sets: named apart, and none has an image of another."""

import json

from tests.data_samples import save_pictures, transform, write_jsonl
from torchtune_qwen25vl.data import caption_dataset, caption_folder_dataset, coco_caption_dataset


def test_parts_of_captions_share_no_image(tmp_path):
    names = [f"{k}.png" for k in range(4)]
    save_pictures(tmp_path, *names)
    for name in names:
        (tmp_path / name).with_suffix(".txt").write_text(f"A {name}")
    several = [{"image": name, "caption": [f"One {name}", f"Two {name}"]} for name in names]
    source = write_jsonl(tmp_path / "rows.jsonl", *several)
    notes = [{"id": k, "image_id": k % 4, "caption": f"A {k}"} for k in range(8)]
    images = [{"id": k, "file_name": name} for k, name in enumerate(names)]
    content = {"images": images, "annotations": notes}
    (tmp_path / "captions.json").write_text(json.dumps(content))
    made = [
        (caption_dataset, source, 8),
        (coco_caption_dataset, str(tmp_path / "captions.json"), 8),
        (caption_folder_dataset, str(tmp_path), 4),
    ]
    for build, where, count in made:
        parts = [
            build(transform(), source=where, split=split)
            for split in ("train[:75%]", "train[75%:]")
        ]
        seen = [
            {row["image"] for row in map(part.rows.__getitem__, range(len(part)))} for part in parts
        ]
        assert sum(map(len, parts)) == count
        assert (len(seen[0]), len(seen[1])) == (3, 1)
        assert not seen[0] & seen[1]
        assert [part.source for part in parts] == [f"{where} train[:75%]", f"{where} train[75%:]"]
