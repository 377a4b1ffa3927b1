"""Vocabularies in GGUF files: the same ids as the tokenizer's, or a refusal."""

import json
from importlib.util import find_spec

import pytest
from tokenizers import Tokenizer

from dpo_wrapper.commands.export.gguf.byte_level import LLAMA_3, PRE_TOKENIZERS, QWEN_2, find_pre_tokenizer
from dpo_wrapper.commands.export.gguf.file_tokenizer import FileTokenizer
from dpo_wrapper.commands.export.gguf.keys import make_name
from dpo_wrapper.commands.export.gguf.llama_cpp_reader import LlamaCppReader
from dpo_wrapper.commands.export.gguf.model_file import write_base_gguf
from dpo_wrapper.commands.export.gguf.vocabulary import add_vocabulary
from dpo_wrapper.data import ByteTokenizer
from dpo_wrapper.data.tokens.hugging_face_tokenizer import HuggingFaceTokenizer
from helpers.gguf_models import make_model, make_piece_tokenizer
from helpers.tokenizer_kinds import make_tokenizer
from helpers.tokenizers import CHATML, WITH_BOS, save_tokenizer, trained_bytes

TEXTS = ("How are you today?", "a  b   xxxxx\n\n1234", "you are You", "naïve 日本 ☃", "x")
LLAMA_2 = "{{ bos_token }}{% for m in messages %}[INST] {{ m.content }} [/INST]{% endfor %}"


def write_vocabulary(tokenizer, file, size=448):
    """The keys of a file with this vocabulary alone, and what a user should know."""
    from gguf import GGUFWriter

    writer = GGUFWriter(file, "llama")
    notes = add_vocabulary(writer, tokenizer, size)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return read_keys(file), notes


def read_keys(file):
    from gguf import GGUFReader

    return {name: field.contents() for name, field in GGUFReader(file).fields.items()}


def load_bytes(folder, change=None, **options):
    """A byte-level BPE; `change` edits its tokenizer.json."""
    save_tokenizer(folder, **options)
    if change is not None:
        file = folder / "tokenizer.json"
        parts = json.loads(file.read_text(encoding="utf-8"))
        change(parts)
        file.write_text(json.dumps(parts), encoding="utf-8")
    return HuggingFaceTokenizer.load(folder)


# byte-level BPE


def cut_as(name):
    """What lets a tokenizer.json cut words in one of the known ways."""

    def change(parts):
        steps, ignores_merges = PRE_TOKENIZERS[name]
        parts["model"]["ignore_merges"] = ignores_merges
        trim = {"trim_offsets": True}
        steps = [step | (trim if step["type"] == "ByteLevel" else {}) for step in steps]
        parts["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": steps}

    return change


@pytest.mark.parametrize("name", PRE_TOKENIZERS)
def test_known_ways_to_cut_words_are_told_apart(name):
    parts = json.loads(trained_bytes())
    cut_as(name)(parts)
    parts = json.loads(Tokenizer.from_str(json.dumps(parts)).to_str())  # as the library writes it
    assert find_pre_tokenizer(parts) == name


@pytest.mark.parametrize("name", [*PRE_TOKENIZERS, "pieces", "pieces without prefix"])
def test_llama_cpp_reads_the_same_tokens(name, tmp_path):
    pytest.importorskip("llama_cpp")
    if name in PRE_TOKENIZERS:
        tokenizer = load_bytes(tmp_path / "tokenizer", cut_as(name), puts_bos=False)
    else:
        tokenizer = make_piece_tokenizer(prefix=name == "pieces")
    model = make_model("LlamaConfig", num_hidden_layers=1)
    write_base_gguf(model, tokenizer, tmp_path / "model.gguf", "float32")
    reader = LlamaCppReader(tmp_path / "model.gguf", 8)
    own_reader = FileTokenizer(read_keys(tmp_path / "model.gguf"))
    special = f"a{tokenizer.tokenizer.eos_token}How  are"
    for text in (*TEXTS, special, "I'll, WE'VE 12345.6 = x_y/z  \n \n\tdone/\n", "Ünïcödé aBcD ÉtÉ 漢字かな"):
        ids = tokenizer.tokenizer(text)["input_ids"]
        assert reader.tokenize(text) == own_reader.tokenize(text) == ids, text
    reader.close()


def test_patterns_are_those_of_the_published_tokenizers():
    words = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
    rest = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    assert words + r"\p{N}{1,3}" + rest == LLAMA_3
    assert words + r"\p{N}" + rest == QWEN_2


def test_byte_level_tokens_are_those_of_the_tokenizer(tmp_path):
    tokenizer = load_bytes(tmp_path / "tokenizer", puts_bos=False)
    fields, notes = write_vocabulary(tokenizer, tmp_path / "model.gguf")
    assert fields["tokenizer.ggml.model"] == "gpt2" and fields["tokenizer.ggml.pre"] == "gpt-2" and not notes
    reader = FileTokenizer(fields)
    for text in (*TEXTS, "<|im_start|>user\nHow<|im_end|>\n"):
        ids = tokenizer.tokenizer(text, add_special_tokens=False)["input_ids"]
        assert reader.tokenize(text) == ids


def test_added_tokens_and_padding_have_types_of_their_own(tmp_path):
    from gguf import TokenType

    tokenizer = load_bytes(tmp_path / "tokenizer", puts_bos=False)
    tokenizer.tokenizer.add_tokens(["<tool>", "two words"])
    tokenizer = HuggingFaceTokenizer(tokenizer.tokenizer)
    fields, _ = write_vocabulary(tokenizer, tmp_path / "model.gguf", tokenizer.vocab_size + 3)
    types = dict(zip(fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"], strict=True))
    assert types["<tool>"] == types["two words"] == TokenType.USER_DEFINED
    assert types["<|im_end|>"] == TokenType.CONTROL and types["Ġ"] == TokenType.NORMAL
    assert [token for token, kind in types.items() if kind == TokenType.UNUSED] == [
        f"[PAD{tokenizer.vocab_size + k}]" for k in range(3)
    ]
    text = "use <tool> for two words"
    assert FileTokenizer(fields).tokenize(text) == tokenizer.tokenizer(text)["input_ids"]


@pytest.mark.parametrize(
    ("options", "adds_bos"),
    [
        ({"puts_bos": False}, False),
        ({"puts_bos": True}, True),
        ({"puts_bos": True, "template": WITH_BOS}, True),  # the one that the template writes is not doubled
        ({"puts_bos": True, "template": CHATML}, False),  # dialogues were trained without one
        ({"puts_bos": False, "template": WITH_BOS}, False),  # the template's own is enough
    ],
)
def test_a_bos_is_put_in_front_where_the_model_has_seen_one(options, adds_bos, tmp_path):
    fields, _ = write_vocabulary(load_bytes(tmp_path / "tokenizer", **options), tmp_path / "model.gguf")
    assert fields["tokenizer.ggml.add_bos_token"] is adds_bos
    assert fields["tokenizer.ggml.add_eos_token"] is False  # though this tokenizer puts one behind a text
    assert fields.get("tokenizer.chat_template") == options.get("template")


def test_the_end_of_a_turn_is_named_beside_the_end_of_a_text(tmp_path):
    tokenizer = load_bytes(tmp_path / "tokenizer", puts_bos=False, template=CHATML)
    fields, _ = write_vocabulary(tokenizer, tmp_path / "model.gguf")
    tokens = fields["tokenizer.ggml.tokens"]
    assert tokens[fields["tokenizer.ggml.eos_token_id"]] == "</s>"
    assert tokens[fields["tokenizer.ggml.eot_token_id"]] == "<|im_end|>"


# as SentencePiece has it


@pytest.mark.parametrize("prefix", [True, False])
def test_scores_merge_as_the_merges_do(prefix, tmp_path):
    tokenizer = make_piece_tokenizer(prefix=prefix)
    fields, notes = write_vocabulary(tokenizer, tmp_path / "model.gguf")
    assert fields["tokenizer.ggml.model"] == "llama" and not notes
    assert fields["tokenizer.ggml.add_space_prefix"] is prefix and fields["tokenizer.ggml.add_bos_token"]
    reader = FileTokenizer(fields)
    for text in TEXTS:
        assert reader.tokenize(text) == tokenizer.tokenizer(text)["input_ids"]


@pytest.mark.parametrize("scheme", ["always", "first"])
def test_a_dialogue_begins_as_the_template_has_it(scheme, tmp_path):
    from tokenizers import pre_tokenizers

    tokenizer = make_piece_tokenizer(template=LLAMA_2).tokenizer
    tokenizer.backend_tokenizer.normalizer = None
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    tokenizer = HuggingFaceTokenizer(tokenizer)
    fields, _ = write_vocabulary(tokenizer, tmp_path / "model.gguf")
    text = "<s>[INST] How are you today? [/INST]"
    ids = tokenizer.tokenizer(text, add_special_tokens=False)["input_ids"]
    assert FileTokenizer(fields).tokenize(text) == ids
    assert fields["tokenizer.ggml.add_space_prefix"] is (scheme == "always")


def test_bytes_and_the_unknown_token_have_types_of_their_own(tmp_path):
    from gguf import TokenType

    fields, _ = write_vocabulary(make_piece_tokenizer(), tmp_path / "model.gguf")
    types = dict(zip(fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"], strict=True))
    assert types["<unk>"] == TokenType.UNKNOWN and types["<s>"] == TokenType.CONTROL
    assert types["<0x0A>"] == TokenType.BYTE and types["▁are"] == TokenType.NORMAL


def make_phi_3_tokenizer():
    """Its special tokens take the white space behind them."""
    from tokenizers import AddedToken

    tokenizer = make_piece_tokenizer(puts_bos=False).tokenizer
    tokens = [AddedToken(f"<|{name}|>", rstrip=True, special=True) for name in ("user", "assistant", "end")]
    tokenizer.add_tokens([*tokens, AddedToken("<|endoftext|>", special=True)], special_tokens=True)
    return HuggingFaceTokenizer(tokenizer)


def test_special_tokens_take_the_space_behind_them_as_in_phi_3(tmp_path):
    tokenizer, file = make_phi_3_tokenizer(), tmp_path / "model.gguf"
    model = make_model("LlamaConfig", num_hidden_layers=1)
    write_base_gguf(model, tokenizer, file, "float32")
    fields = read_keys(file)
    text = "<|user|>\n  How are you<|end|>\n<|assistant|>\n<|endoftext|> you"
    ids = tokenizer.tokenizer(text)["input_ids"]
    assert FileTokenizer(fields).tokenize(text) == ids
    assert FileTokenizer(fields | {"general.name": "other"}).tokenize(text) != ids
    if find_spec("llama_cpp"):
        reader = LlamaCppReader(file, 8)
        assert reader.tokenize(text) == ids
        reader.close()


@pytest.mark.parametrize("make", [make_phi_3_tokenizer, make_piece_tokenizer])
def test_only_such_a_model_is_named_phi_3(make):
    model = make_model("LlamaConfig", num_hidden_layers=1)
    model.config.name_or_path = "runs/My-Phi3-sft"
    expected = "phi-3 my-phi 3-sft" if make is make_phi_3_tokenizer else "my-phi 3-sft"
    assert make_name(model, make()) == expected


def test_merges_that_are_no_sentence_piece_s_are_noted(tmp_path):
    tokenizer = make_piece_tokenizer()
    parts = json.loads(tokenizer.tokenizer.backend_tokenizer.to_str())
    parts["model"]["merges"].remove(["us", "er"])
    tokenizer.tokenizer._tokenizer = Tokenizer.from_str(json.dumps(parts))
    _, (note,) = write_vocabulary(tokenizer, tmp_path / "model.gguf")
    assert "joins 1 of the" in note


def test_added_tokens_that_are_read_otherwise_are_noted(tmp_path):
    tokenizer = make_piece_tokenizer().tokenizer
    tokenizer.add_tokens(["<tool>"])  # it is found with the prefix in front
    ids = tokenizer("a<tool>a")["input_ids"]
    assert "<tool>" not in tokenizer.convert_ids_to_tokens(ids)
    _, (note,) = write_vocabulary(HuggingFaceTokenizer(tokenizer), tmp_path / "model.gguf")
    assert note == "llama.cpp reads <tool>, or a text behind, in another way than the tokenizer."


# what llama.cpp has not


def normalize(parts):
    parts["normalizer"] = {"type": "Lowercase"}


def cut_otherwise(parts):
    parts["pre_tokenizer"] = {"type": "Whitespace"}


def put_space(parts):
    parts["pre_tokenizer"]["add_prefix_space"] = True


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (normalize, "plain byte-level BPE"),
        (cut_otherwise, "should cut texts"),
        (put_space, "should cut texts"),
    ],
)
def test_other_byte_level_tokenizers_are_refused(change, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        write_vocabulary(load_bytes(tmp_path / "tokenizer", change), tmp_path / "model.gguf")


@pytest.mark.parametrize(
    ("kind", "message"), [("unigram", "it is a Unigram"), ("wordpiece", "it is a WordPiece")]
)
def test_other_algorithms_are_refused(kind, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        write_vocabulary(HuggingFaceTokenizer(make_tokenizer(kind)), tmp_path / "model.gguf")


def test_other_normalizers_of_pieces_are_refused(tmp_path):
    from tokenizers import normalizers

    tokenizer = make_piece_tokenizer()
    tokenizer.tokenizer.backend_tokenizer.normalizer = normalizers.NFKC()
    with pytest.raises(ValueError, match="should write spaces as ▁"):
        write_vocabulary(tokenizer, tmp_path / "model.gguf")


def test_missing_bytes_are_refused(tmp_path):
    tokenizer = make_piece_tokenizer()
    parts = json.loads(tokenizer.tokenizer.backend_tokenizer.to_str())
    parts["model"]["vocab"]["<0x0a>"] = parts["model"]["vocab"].pop("<0x0A>")
    tokenizer.tokenizer._tokenizer = Tokenizer.from_str(json.dumps(parts))
    with pytest.raises(ValueError, match="<0x0A> is missing"):
        write_vocabulary(tokenizer, tmp_path / "model.gguf")


def test_bytes_without_a_tokenizer_json_are_refused(tmp_path):
    with pytest.raises(ValueError, match="ByteTokenizer has none"):
        write_vocabulary(ByteTokenizer(), tmp_path / "model.gguf")


def test_more_tokens_than_embeddings_are_refused(tmp_path):
    tokenizer = load_bytes(tmp_path / "tokenizer")
    with pytest.raises(ValueError, match="there are 300 embeddings"):
        write_vocabulary(tokenizer, tmp_path / "model.gguf", 300)


def test_another_token_in_front_is_refused(tmp_path):
    from tokenizers import processors

    tokenizer = load_bytes(tmp_path / "tokenizer").tokenizer
    special = [("<|im_start|>", tokenizer.convert_tokens_to_ids("<|im_start|>"))]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|im_start|> $A", special_tokens=special
    )
    with pytest.raises(ValueError, match=r"puts <\|im_start\|>"):
        write_vocabulary(HuggingFaceTokenizer(tokenizer), tmp_path / "model.gguf")
