"""A tiny model that says words, and a table for it."""

import captions
import pytest
import tables


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    return captions.write_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture
def table(tmp_path):
    return tables.write_table(tmp_path)


@pytest.fixture
def out(tmp_path):
    return tmp_path / "table_evaluation"


@pytest.fixture
def run(model, table):
    """The recipe on this table: keys and values to exit code."""
    return lambda **changes: tables.run(model, table, **changes)
