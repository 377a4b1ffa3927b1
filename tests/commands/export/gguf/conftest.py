from pathlib import Path

import pytest

from dpo_wrapper.data.tokens.hugging_face_tokenizer import HuggingFaceTokenizer
from helpers.exported_models import save_base, save_lora
from helpers.gguf_files import export_adapter, write_base
from helpers.tokenizers import CHATML, save_tokenizer


@pytest.fixture(scope="session")
def chatml_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> HuggingFaceTokenizer:
    """A byte-level BPE of 420 tokens that puts nothing in front of a text, with ChatML."""
    folder: Path = tmp_path_factory.mktemp("tokenizer")
    return HuggingFaceTokenizer.load(save_tokenizer(folder, template=CHATML, puts_bos=False))


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama with grouped-query heads and a chat template."""
    return save_base(tmp_path_factory.mktemp("gguf") / "base")


@pytest.fixture(scope="session")
def lora(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """PEFT's adapter of all its linear layers."""
    pytest.importorskip("peft")
    return save_lora(tmp_path_factory.mktemp("gguf") / "lora", base)


@pytest.fixture(scope="session")
def exported(lora: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An export of it, which no test changes."""
    out = tmp_path_factory.mktemp("gguf")
    assert export_adapter(lora, out) == 0
    return out / "gguf"


@pytest.fixture(scope="session")
def base_file(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The GGUF file of the base, which no test changes."""
    return write_base(base, tmp_path_factory.mktemp("gguf") / "base file.gguf")
