"""A tiny model and four photos, for runs of the caption recipe."""

import captions
import pytest


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return captions.write_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture
def photos(tmp_path):
    return captions.write_pictures(tmp_path / "photos", 4)


@pytest.fixture
def run(model, photos):
    """The recipe on these photos: keys and values to exit code."""
    return lambda *inputs, **changes: captions.caption(model, inputs or photos, **changes)


@pytest.fixture
def no_model(monkeypatch):
    """From here on the weights are not to be loaded."""

    def refuse():
        monkeypatch.setattr(
            "torchtune_qwen25vl.device._loading.load", lambda *_: pytest.fail("loaded")
        )

    return refuse
