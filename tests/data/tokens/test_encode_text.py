"""Texts without a prompt: which tokens are scored, and the parts of one that is too long."""

import re
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dpo_wrapper.data import ByteTokenizer, Example, HuggingFaceTokenizer, TokenizedExample, tokenize_examples
from dpo_wrapper.data.tokens.encode import TokenizedRow, tokenize_row
from dpo_wrapper.data.tokens.options import TokenizeOptions
from helpers.tokenizer_kinds import CHATML, KINDS, make_tokenizer
from helpers.tokenizers import NoBos

BYTES = ByteTokenizer()
BOS, EOS = 256, 257
ALL_BYTES = ("byte-level", "byte-level with prefix", "llama legacy")
"""These have a token for each byte, so that no character is unknown."""


def load(kind: str) -> HuggingFaceTokenizer:
    return HuggingFaceTokenizer(make_tokenizer(kind, CHATML))


def as_row(text: str, tokenizer: Any, max_length: int = 512, **columns: Any) -> TokenizedRow:
    return tokenize_row(Example("", (text,), **columns), tokenizer, TokenizeOptions(max_length=max_length))


def find_characters(kind: str, tokens: list[str], text: str) -> list[set[int]]:
    """The characters of the text that each token holds, from how the tokens are written."""
    if kind == "wordpiece":
        found, place = [], 0
        for token in tokens:
            piece = token.removeprefix("##") if token != "##" else token
            place = text.lower().index(piece, place) + len(piece)
            found.append(set(range(place - len(piece), place)))
        return found
    pieces = list(map(byte_level_piece if kind.startswith("byte-level") else metaspace_piece, tokens))
    owners = [k for k, character in enumerate(text) for _ in character.encode()]
    whole = b"".join(pieces)
    if whole != text.encode():
        assert whole == b" " + text.encode()  # a blank that the tokenizer puts in front
        owners = [0, *owners]
    ends = [sum(map(len, pieces[: k + 1])) for k in range(len(pieces))]
    return [set(owners[end - len(piece) : end]) for end, piece in zip(ends, pieces, strict=True)]


def metaspace_piece(token: str) -> bytes:
    byte = re.fullmatch(r"<0x(..)>", token)
    return bytes.fromhex(byte[1]) if byte else token.replace("▁", " ").encode()


def byte_level_piece(token: str) -> bytes:
    """GPT-2's spelling: printable bytes as they are, the others as the characters from 256 on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    spelled = {chr(byte): byte for byte in printable} | {chr(256 + k): b for k, b in enumerate(others)}
    return bytes(spelled[character] for character in token)


ASCII = st.text(st.sampled_from("ItsnoW.<>/ \n~'A0"), max_size=8)
UNICODE = st.text(st.characters(exclude_characters="▁", exclude_categories=["Cs", "Co"]), max_size=8)
WORDS = st.sampled_from([" is", "It is noon.", "</s>", "<s>", " The capital", "\n"])


@st.composite
def masked_texts(draw: st.DrawFn, letters: st.SearchStrategy[str]) -> tuple[str, list[tuple[int, int]]]:
    text = "".join(draw(st.lists(letters | WORDS, min_size=1, max_size=6)))
    place = st.integers(0, len(text))
    spans = draw(st.lists(st.tuples(place, place).map(sorted), min_size=1, max_size=3))
    return text, [(start, end) for start, end in spans]


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=25)
@given(data=st.data())
def test_a_token_is_scored_unless_one_of_its_characters_is_masked(kind: str, data: st.DataObject) -> None:
    text, spans = data.draw(masked_texts(UNICODE if kind in ALL_BYTES else ASCII))
    tokenizer = load(kind)
    encoded = tokenizer.encode_text(text, spans)
    plain = tokenizer.encode_text(text)
    assert (plain.prompt, plain.completions) == (encoded.prompt, encoded.completions) and plain.scored is None
    assert plain.prompt == tokenizer.encode_prompt("") and plain.completions[0][-1] == tokenizer.eos_id
    assert plain.completions[0][:-1] == tokenizer.encode(text)

    masked = {k for start, end in spans for k in range(start, end)}
    tokens = tokenizer.tokenizer.convert_ids_to_tokens(encoded.completions[0][:-1])
    expected = [not held & masked for held in find_characters(kind, tokens, text)]
    assert encoded.scored == [[False] * len(plain.prompt) + expected + [len(text) - 1 not in masked]]


@given(masked_texts(UNICODE))
def test_bytes_are_scored_unless_their_character_is_masked(drawn: tuple[str, list[tuple[int, int]]]) -> None:
    text, spans = drawn
    encoded = BYTES.encode_text(text, spans)
    assert encoded.prompt == [BOS] and encoded.completions == [[*text.encode(), EOS]]
    masked = {k for start, end in spans for k in range(start, end)}
    expected = [k not in masked for k, character in enumerate(text) for _ in character.encode()]
    assert encoded.scored == [[False, *expected, len(text) - 1 not in masked]]


def test_special_tokens_and_templates_are_no_part_of_a_text() -> None:
    """Neither in a document nor in a masked text, which is no turn of a dialogue either."""
    for kind in KINDS:
        tokenizer = load(kind)
        for spans in ((), ((0, 1),)):
            ids = tokenizer.encode_text("a</s> <s>b", spans).completions[0]
            assert not {tokenizer.bos_id, tokenizer.eos_id} & {*ids[:-1]}
            (example,) = as_row("It is noon.", tokenizer, loss_masking_spans=spans).examples
            assert example.prompt == tuple(tokenizer.encode_prompt(""))
    (example,) = as_row("a", BYTES, is_document=True, weight=2.0, source="s").examples
    assert example == TokenizedExample((BOS,), ((97, EOS),), None, 2.0, source="s", is_document=True)
    assert example.dataset_type == "language_modeling" and not example.is_cut
    always = TokenizeOptions(max_length=64, as_chat=True)
    assert tokenize_row(Example("", ("a",)), load("byte-level"), always).counts["num_split"] == 0


def test_a_blank_belongs_to_its_token_where_the_tokenizer_trims_offsets() -> None:
    """As those of GPT-2 and RoBERTa do."""
    from tokenizers import Tokenizer, processors
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer.from_str(make_tokenizer("byte-level").backend_tokenizer.to_str())
    backend.post_processor = processors.ByteLevel(trim_offsets=True)
    tokenizer = HuggingFaceTokenizer(PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>"))
    assert backend.encode("It is").offsets == [(0, 2), (3, 5)]
    assert tokenizer.encode_text("It is", [(2, 3)]).scored == [[True, False, True]]


def test_masked_spans_need_a_fast_tokenizer() -> None:
    class Slow:
        """A tokenizer of transformers that does not say where its tokens stand."""

        def __init__(self, tokenizer: Any) -> None:
            self.tokenizer = tokenizer

        def __getattr__(self, name: str) -> Any:
            if name == "backend_tokenizer":
                raise AttributeError(name)
            return getattr(self.tokenizer, name)

        def __call__(self, *args: Any, **options: Any) -> Any:
            return self.tokenizer(*args, **options)

    fast = load("byte-level")
    slow = HuggingFaceTokenizer(Slow(fast.tokenizer))
    assert slow.encode_text("It is") == fast.encode_text("It is")
    with pytest.raises(ValueError, match="masked spans should have a fast tokenizer"):
        slow.encode_text("It is", [(0, 1)])


TOKENIZERS = [BYTES, NoBos(), *map(load, KINDS)]


@pytest.mark.parametrize("tokenizer", TOKENIZERS, ids=["bytes", "bytes without BOS", *KINDS])
@settings(max_examples=15)
@given(data=st.data())
def test_parts_of_a_long_text(tokenizer: Any, data: st.DataObject) -> None:
    text, spans = data.draw(masked_texts(UNICODE))
    text, max_length = text * 4, data.draw(st.integers(8, 24))
    whole = tokenizer.encode_text(text)
    ids = tuple(whole.completions[0])
    row = as_row(text, tokenizer, max_length, is_document=True, source="s")
    if len(ids) == 1:
        assert row == TokenizedRow((), "nothing to score", {"num_unscored": 1})
        return
    parts = row.examples
    assert tuple(id_ for part in parts for id_ in part.completions[0]) == ids  # nothing is lost
    assert all(len(part.prompt) + len(part.completions[0]) <= max_length for part in parts)
    is_split = len(whole.prompt) + len(ids) > max_length
    assert is_split == (len(parts) > 1) == row.counts["num_split"]
    assert {(part.is_cut, part.is_document, part.source) for part in parts} == {(is_split, True, "s")}
    assert len(parts) == 1 or len(parts[-1].completions[0]) > 1  # no EOS alone
    before = tuple(whole.prompt)
    for part in parts:
        assert part.prompt == before  # what stands in front, or the token that predicts the first
        before = tuple(whole.prompt) or part.completions[0][-1:]
    num_scored = sum(sum(mask) for part in parts for mask in part.scored_masks())
    assert num_scored == len(ids) - (not whole.prompt)  # each once; the first has nothing before it
    if tokenizer.decode(ids).count("\ufffd") == 0:
        assert "".join(tokenizer.decode(part.completions[0]) for part in parts).count("\ufffd") == 0

    masks = tokenizer.encode_text(text, spans).scored[0][len(whole.prompt) :]
    taught = as_row(text, tokenizer, max_length, loss_masking_spans=tuple(spans)).examples
    scored = [mask[-len(part.completions[0]) :] for part in taught for mask in part.scored_masks()]
    sides = [part.completions[0] for part in taught]
    place = 0
    for part in parts:  # the same parts with their masks, but for those of which nothing is scored
        end = place + len(part.completions[0])
        mask = masks[place:end] if place or whole.prompt else [False, *masks[1:end]]
        if any(mask):
            assert (sides.pop(0), scored.pop(0)) == (part.completions[0], mask)
        place = end
    assert not sides and not scored


def test_golden_parts() -> None:
    def parts(text: str, tokenizer: Any, **columns: Any) -> list[str]:
        examples = as_row(text, tokenizer, 8, **columns).examples
        sides = [(example.prompt, example.completions[0]) for example in examples]
        return ["|".join(tokenizer.decode(ids, skip_special_tokens=False) for ids in pair) for pair in sides]

    assert parts("abcdef", BYTES) == ["<bos>|abcdef<eos>"]
    assert parts("abcdefg", BYTES) == ["<bos>|abcdef", "<bos>|g<eos>"]  # no EOS alone
    assert parts("abcdefghi", BYTES) == ["<bos>|abcdefg", "<bos>|hi<eos>"]
    assert parts("abcdefghi", NoBos()) == ["|abcdefgh", "h|i<eos>"]
    assert parts("abcdef\u00e9h", BYTES) == ["<bos>|abcdef", "<bos>|\u00e9h<eos>"]
    assert parts("abcdefghi", BYTES, loss_masking_spans=((0, 8),)) == ["<bos>|hi<eos>"]
    assert as_row("abcdefghi", BYTES, 8, loss_masking_spans=((0, 9),)).refusal == "nothing to score"


def test_long_texts_are_dropped_or_refused_as_others_are() -> None:
    examples = [Example("", (text,), source=text) for text in ("abc", "abcdefg")]
    dropped = tokenize_examples(examples, BYTES, 8, on_long="drop")
    assert [example.source for example in dropped.examples] == ["abc"] and dropped.num_dropped == 1
    with pytest.raises(
        ValueError, match="abcdefg: a row should have at most 8 tokens, but it has 9: raise --max"
    ):
        tokenize_examples(examples, BYTES, 8, on_long="error")
    split = tokenize_examples(examples, BYTES, 8)
    assert (len(split.examples), split.num_split) == (3, 1)
    assert split.summary() == "1 example became several, for the text is longer than the maximum."
