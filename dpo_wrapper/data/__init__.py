"""Data: file -> example -> tokens -> dataset -> batch."""

from dpo_wrapper.data.collate import (
    PreferenceCollator,
    collate_preference,
    collate_ranked,
    collate_unpaired,
    scored_sequences,
)
from dpo_wrapper.data.convert import check_ranking, convert_examples
from dpo_wrapper.data.dataset import PreferenceDataset
from dpo_wrapper.data.errors import ExampleError
from dpo_wrapper.data.examples import Example, Fields, TokenizedExample, TokenizedExamples
from dpo_wrapper.data.prepared import PreparedData
from dpo_wrapper.data.readers import read_examples
from dpo_wrapper.data.rows.messages import Message
from dpo_wrapper.data.rows.normalize import to_example
from dpo_wrapper.data.sampler import StepSampler
from dpo_wrapper.data.split import count_shared_prompts, split_examples
from dpo_wrapper.data.tokens.encode import tokenize_examples
from dpo_wrapper.data.tokens.hugging_face_tokenizer import HuggingFaceTokenizer
from dpo_wrapper.data.tokens.tokenizers import ByteTokenizer, Tokenizer, load_tokenizer

__all__ = [
    "ByteTokenizer", "Example", "ExampleError", "Fields", "HuggingFaceTokenizer", "Message",
    "PreferenceCollator", "PreferenceDataset", "PreparedData", "StepSampler", "TokenizedExample",
    "TokenizedExamples", "Tokenizer", "check_ranking", "collate_preference", "collate_ranked",
    "collate_unpaired", "convert_examples", "count_shared_prompts", "load_tokenizer", "read_examples",
    "scored_sequences", "split_examples", "to_example", "tokenize_examples",
]  # fmt: skip
