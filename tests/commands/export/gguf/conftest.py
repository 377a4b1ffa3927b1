from pathlib import Path

import pytest

from dpo_wrapper.data.tokens.hugging_face_tokenizer import HuggingFaceTokenizer
from helpers.tokenizers import CHATML, save_tokenizer


@pytest.fixture(scope="session")
def chatml_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> HuggingFaceTokenizer:
    """A byte-level BPE of 420 tokens that puts nothing in front of a text, with ChatML."""
    folder: Path = tmp_path_factory.mktemp("tokenizer")
    return HuggingFaceTokenizer.load(save_tokenizer(folder, template=CHATML, puts_bos=False))
