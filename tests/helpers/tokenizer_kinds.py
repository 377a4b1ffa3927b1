"""A tiny tokenizer of every kind that models have, trained on a few sentences."""

from functools import cache
from typing import Any

SENTENCES = [
    "It is noon. It is late. Is it so? What is it? It is a tide.",
    "The tide is high at noon in Brest. Hello there, how are you today? I am fine, thank you.",
    "What is the capital of France? The capital of France is Paris. Paris is late.",
    "[INST] What is it? [/INST] It is noon.",
]
SPECIAL = ["<unk>", "<s>", "</s>"]

ZEPHYR = (  # TinyLlama's too; its roles are text, and a line break stands before the answer
    "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + eos_token + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
LLAMA_2 = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ '[INST] ' + m.content + ' [/INST]' }}"
    "{% else %}{{ ' ' + m.content + ' ' + eos_token }}{% endif %}{% endfor %}"
)
CHATML = (
    "{% for m in messages %}{{ '<s>' + m.role + '\n' + m.content + '</s>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<s>assistant\n' }}{% endif %}"
)

KINDS = (
    "byte-level", "byte-level with prefix", "metaspace first", "metaspace always", "metaspace never",
    "llama legacy", "unigram", "wordpiece",
)  # fmt: skip


@cache
def make_tokenizer(kind: str, template: str | None = None) -> Any:
    """A fast tokenizer of transformers; all but WordPiece put a BOS in front of a text."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    alphabet = [chr(code) for code in range(33, 127)] + ["\n", "▁"]
    options: dict[str, Any] = {"vocab_size": 400, "special_tokens": SPECIAL, "show_progress": False}
    if kind.startswith("byte-level"):
        model = Tokenizer(models.BPE())
        model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space="prefix" in kind)
        model.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), **options)
    elif kind.startswith("metaspace"):
        scheme = kind.split()[-1]
        model = Tokenizer(models.BPE(unk_token="<unk>"))
        model.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
        model.decoder = decoders.Metaspace(prepend_scheme=scheme)
        trainer = trainers.BpeTrainer(initial_alphabet=alphabet, **options)
    elif kind == "unigram":  # not trained: the trainer's choices differ from run to run
        words = [(word, -3.0) for word in ("▁It", "▁is", "▁noon", "▁What", "▁it", "is", "on", "It")]
        pieces = [*((token, 0.0) for token in SPECIAL), *words, *((letter, -9.0) for letter in alphabet)]
        model = Tokenizer(models.Unigram(pieces, unk_id=0))
        model.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
        model.decoder = decoders.Metaspace(prepend_scheme="always")
        model.add_special_tokens(SPECIAL)
        trainer = None
    elif kind == "llama legacy":
        model = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
        model.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
        trainer = trainers.BpeTrainer(initial_alphabet=alphabet, **options)
    else:
        words = [
            "[UNK]",
            "[CLS]",
            "[SEP]",
            "<s>",
            "</s>",
            "what",
            "is",
            "it",
            "noon",
            "the",
            "##pi",
            "##tal",
            "ca",
            "cap",
        ]
        letters = [letter for letter in alphabet[:-2] if not letter.isupper()]
        vocab = [*words, *letters, *(f"##{letter}" for letter in letters)]
        model = Tokenizer(models.WordPiece({word: k for k, word in enumerate(vocab)}, unk_token="[UNK]"))
        model.normalizer = normalizers.BertNormalizer(lowercase=True)
        model.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        model.decoder = decoders.WordPiece()
        model.add_special_tokens(words[:5])
        trainer = None
    if trainer is not None:
        model.train_from_iterator(SENTENCES, trainer)
    if kind == "llama legacy":
        model = _with_bytes(model)
    first, last = ("[CLS]", "[SEP]") if kind == "wordpiece" else ("<s>", "</s>")
    single = f"{first} $A {last}" if kind == "wordpiece" else f"{first} $A"
    ids = [(token, model.token_to_id(token)) for token in (first, last)]
    model.post_processor = processors.TemplateProcessing(single=single, special_tokens=ids)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=model,
        bos_token=first,
        eos_token=last,
        unk_token=SPECIAL[0] if kind != "wordpiece" else "[UNK]",
    )
    tokenizer.chat_template = template
    return tokenizer


def _with_bytes(model: Any) -> Any:
    """As transformers converts Llama's: a dummy prefix by the normalizer, and a token for each byte."""
    import json

    from tokenizers import Tokenizer

    parts = json.loads(model.to_str()) | {"pre_tokenizer": None}
    vocab = parts["model"]["vocab"]
    for byte in range(256):
        vocab.setdefault(f"<0x{byte:02X}>", len(vocab))
    prepend = {"type": "Prepend", "prepend": "▁"}
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    parts["normalizer"] = {"type": "Sequence", "normalizers": [prepend, replace]}
    back = {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}
    strip = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
    parts["decoder"] = {
        "type": "Sequence",
        "decoders": [back, {"type": "ByteFallback"}, {"type": "Fuse"}, strip],
    }
    return Tokenizer.from_str(json.dumps(parts))
