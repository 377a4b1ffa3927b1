"""A tiny model, logs, and the command on both."""

import pytest

from dpo_wrapper.commands.pairs.config import PairsConfig
from dpo_wrapper.commands.pairs.run import make_pairs
from helpers.lora_runs import save_llama
from helpers.pairs import LOGS, NEW_TOKENS, read_rows, write_rows

RULES = """
def size(prompt, answer): return len(answer)
def same(prompt, answer): return 0
def fails(prompt, answer): return 1 / (prompt != 'abcd')
"""


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    """The folder of a tiny Llama that reads bytes."""
    return save_llama(tmp_path_factory.mktemp("pairs") / "model")


@pytest.fixture
def logs(tmp_path):
    return write_rows(tmp_path / "logs.jsonl", LOGS)


@pytest.fixture
def rules(tmp_path):
    """A file of functions that judge."""
    file = tmp_path / "rules.py"
    file.write_text(RULES)
    return file


@pytest.fixture
def make(model, logs, tmp_path):
    """Make pairs of the logs with some options, and return the rows."""

    def make(out="pairs.jsonl", **options):
        options = {"data": (logs,), "model": str(model), "max_new_tokens": NEW_TOKENS, **options}
        config = PairsConfig(out=tmp_path / out, batch_size=4, cpu=True, **options)
        make_pairs(config)
        return read_rows(config.out)

    return make
