"""A tiny model and a table, for runs of the hidden_states recipe."""

import captions
import pytest
import questions


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    return captions.write_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture
def table(tmp_path):
    return questions.write_table(tmp_path)


@pytest.fixture
def out(tmp_path):
    return tmp_path / "questions_hidden_states"


@pytest.fixture
def run(model, table):
    """The recipe on this table: keys and values to exit code."""
    return lambda **changes: questions.run(model, table, **changes)
