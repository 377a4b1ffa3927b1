"""The vocabulary of a tokenizer of transformers as keys of a GGUF file."""

import json
from dataclasses import dataclass
from typing import Any

from dpo_wrapper.commands.export.gguf.byte_level import find_pre_tokenizer, format_merges
from dpo_wrapper.commands.export.gguf.sentence_piece import (
    check_sentence_piece,
    compute_scores,
    count_unlisted_merges,
    find_token_type,
)
from dpo_wrapper.data.rows.messages import Message
from dpo_wrapper.data.tokens.hugging_face_tokenizer import HuggingFaceTokenizer
from dpo_wrapper.data.tokens.tokenizers import Tokenizer


@dataclass(frozen=True)
class Vocabulary:
    """Texts and types (gguf.TokenType) of all ids, padded to the rows of the embedding."""

    tokens: list[str]
    types: list[int]


def add_vocabulary(writer: Any, tokenizer: Tokenizer, num_embeddings: int) -> list[str]:
    """Add tokens, merges or scores, special ids and the chat template; returns what a user should know.

    Raises:
        ValueError: llama.cpp has no tokenizer that gives the same ids.
    """
    if not isinstance(tokenizer, HuggingFaceTokenizer) or not tokenizer.tokenizer.is_fast:
        raise ValueError(
            "--to gguf needs a tokenizer that has a tokenizer.json, but the model's "
            f"{type(getattr(tokenizer, 'tokenizer', tokenizer)).__name__} has none: use --to merged."
        )
    parts = json.loads(tokenizer.tokenizer.backend_tokenizer.to_str())
    model, notes = parts["model"], []
    if model["type"] != "BPE":
        raise ValueError(
            f"the tokenizer should be a BPE for --to gguf, but it is a {model['type']}: use --to merged."
        )
    if model.get("byte_fallback"):
        check_sentence_piece(parts)
        vocabulary = list_tokens(parts, num_embeddings, is_sentence_piece=True)
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        writer.add_token_scores(compute_scores(vocabulary.tokens, model["merges"]))
        has_space = puts_space_in_front(tokenizer)
        writer.add_add_space_prefix(has_space)
        notes = note_unlisted_merges(vocabulary, model["merges"]) + note_added_tokens(tokenizer, has_space)
    else:
        pre_tokenizer = find_pre_tokenizer(parts)
        vocabulary = list_tokens(parts, num_embeddings, is_sentence_piece=False)
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(pre_tokenizer)
        writer.add_token_merges(format_merges(model["merges"]))
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.types)
    add_special_tokens(writer, tokenizer)
    return notes


def note_unlisted_merges(vocabulary: Vocabulary, merges: list[Any]) -> list[str]:
    """A sentence where llama.cpp may cut words in other ways than the tokenizer."""
    from gguf import TokenType

    pairs = zip(vocabulary.tokens, vocabulary.types, strict=True)
    tokens = [token for token, kind in pairs if kind == TokenType.NORMAL]
    count = count_unlisted_merges(tokens, merges)
    if not count:
        return []
    return [
        f"llama.cpp may cut some words in other ways than the tokenizer, as it joins {count} of the "
        f"{len(tokens)} tokens from more pairs of parts."
    ]


def list_tokens(parts: dict[str, Any], num_embeddings: int, *, is_sentence_piece: bool) -> Vocabulary:
    """All tokens; ids without one are unused.

    Raises:
        ValueError: there are more tokens than rows of the embedding, or two ids have the same text.
    """
    from gguf import TokenType

    tokens = [f"[PAD{k}]" for k in range(num_embeddings)]
    types = [int(TokenType.UNUSED)] * num_embeddings
    vocab, added = parts["model"]["vocab"], parts["added_tokens"]
    largest = max([*vocab.values(), *(token["id"] for token in added)])
    if largest >= num_embeddings:
        raise ValueError(
            f"the model should have an embedding for each token, but the largest id is {largest} and there "
            f"are {num_embeddings} embeddings: export the tokenizer that it was trained with."
        )
    for text, index in vocab.items():
        tokens[index] = text
        unknown = parts["model"].get("unk_token")
        is_normal = not is_sentence_piece
        types[index] = int(TokenType.NORMAL if is_normal else find_token_type(text, unknown))
    for token in added:
        text, index = token["content"], token["id"]
        is_unknown = is_sentence_piece and types[index] == TokenType.UNKNOWN
        tokens[index] = text if token["special"] else text.replace("▁", " ")
        if not is_unknown:
            types[index] = int(TokenType.CONTROL if token["special"] else TokenType.USER_DEFINED)
    if len(set(tokens)) < num_embeddings:
        raise ValueError(
            "each token should have a text of its own for llama.cpp, but two are the same: use --to merged."
        )
    return Vocabulary(tokens, types)


def add_special_tokens(writer: Any, tokenizer: HuggingFaceTokenizer) -> None:
    """Add the ids of tokens with a meaning, what is put around a text, and the chat template."""
    special = tokenizer.tokenizer
    if tokenizer.bos_id is not None:
        writer.add_bos_token_id(tokenizer.bos_id)
    writer.add_eos_token_id(tokenizer.eos_id)
    if tokenizer.end_of_turn_id != tokenizer.eos_id:
        writer.add_eot_token_id(tokenizer.end_of_turn_id)
    if special.unk_token_id is not None:
        writer.add_unk_token_id(special.unk_token_id)
    if special.pad_token_id is not None:
        writer.add_pad_token_id(special.pad_token_id)
    writer.add_add_bos_token(puts_bos_in_front(tokenizer))
    writer.add_add_eos_token(False)  # a prompt has none, whatever the tokenizer puts behind a text
    template = tokenizer.template.source
    if template:
        source = template if isinstance(template, str) else template["default"]
        writer.add_chat_template(source)


def puts_bos_in_front(tokenizer: HuggingFaceTokenizer) -> bool:
    """Whether llama.cpp should put a BOS in front of a text.

    A dialogue has the one that its template writes, which llama.cpp does not double; where the template
    writes none, the model has seen none.

    Raises:
        ValueError: the tokenizer puts something else in front.
    """
    text = "a"
    prefix = find_prefix(tokenizer, text)
    if prefix not in ([], [tokenizer.bos_id]):
        raise ValueError(
            "the tokenizer should put a BOS or nothing in front of a text for llama.cpp, but it puts "
            f"{tokenizer.decode(prefix, skip_special_tokens=False)}: use --to merged."
        )
    if not tokenizer.has_chat_template:
        return bool(prefix)
    bos = tokenizer.tokenizer.bos_token
    return bool(prefix) and tokenizer.write_prompt((Message("user", text),)).startswith(bos)


def find_prefix(tokenizer: HuggingFaceTokenizer, text: str) -> list[int]:
    """The ids that are put in front of a plain text."""
    ids, own = tokenizer.encode_prompt(text), tokenizer.encode(text)
    return ids[: len(ids) - len(own)]


def puts_space_in_front(tokenizer: HuggingFaceTokenizer) -> bool:
    """Whether a text behind a special token, or behind the BOS that is put in front, begins with a space.

    The first is what matters for dialogues, the second for plain texts.
    """
    text = "a"
    if tokenizer.has_chat_template and tokenizer.tokenizer.bos_token:
        text = tokenizer.tokenizer.bos_token + text
    ids = tokenizer.tokenizer(text, add_special_tokens=False)["input_ids"]
    pieces = tokenizer.tokenizer.convert_ids_to_tokens(ids)
    return any(piece.startswith("▁") for piece in pieces)


def note_added_tokens(tokenizer: HuggingFaceTokenizer, has_space: bool) -> list[str]:
    """A sentence on added tokens that llama.cpp finds where the tokenizer does not, or goes on differently.

    Behind each of them llama.cpp begins a text with a space, or with none, as at the beginning.
    """
    special = tokenizer.tokenizer
    tokens = []
    for token in map(str, special.added_tokens_decoder.values()):
        pieces = special.convert_ids_to_tokens(special(f"a{token}a", add_special_tokens=False)["input_ids"])
        if token not in pieces or pieces[pieces.index(token) + 1 :][0].startswith("▁") != has_space:
            tokens.append(token)
    if not tokens:
        return []
    more = f" and {len(tokens) - 3} more" if len(tokens) > 3 else ""
    return [
        f"llama.cpp reads {', '.join(tokens[:3])}{more}, or a text behind, in another way than the tokenizer."
    ]
