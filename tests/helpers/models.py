"""Tiny models of every family: `ZOO[name](seed) -> nn.Module`.

They have a vocabulary of 37, a context of 24, two layers and two heads, are float32, and in train mode as any
new module. Their random weights are large enough that a mistake shows. All are causal, and all but
`plain-gru` have attention. A library is imported when a model that needs it is made.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

VOCAB = 37
CONTEXT = 24
DIM = 16
HEADS = 2
DEPTH = 2


# weights


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed torch inside this context; the random state is as before afterwards."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


@torch.no_grad()
def randomise_(model: nn.Module, *, embed_std: float = 0.5, std: float = 0.3) -> nn.Module:
    """Draw weights large enough that tokens, positions and layers matter; tied parameters stay tied."""
    embeddings = [module.weight for module in model.modules() if isinstance(module, nn.Embedding)]

    for parameter in model.parameters():  # a tied parameter comes once
        if parameter.ndim < 2:  # biases and gains stay near what they were, and are not zero
            parameter.add_(0.1 * torch.randn_like(parameter))
        elif any(parameter is embedding for embedding in embeddings):
            parameter.normal_(std=embed_std)
        else:
            parameter.normal_(std=std)
    return model


# x-transformers


def x_transformer(
    seed: int, *, wrapped: bool = False, decoder: dict | None = None, **kwargs: object
) -> nn.Module:
    from x_transformers import AutoregressiveWrapper, Decoder, TransformerWrapper

    with seeded(seed):
        options = {"attn_dim_head": DIM // HEADS, "verbose": False, **(decoder or {})}
        layers = Decoder(dim=DIM, depth=DEPTH, heads=HEADS, **options)
        model = TransformerWrapper(num_tokens=VOCAB, max_seq_len=CONTEXT, attn_layers=layers, **kwargs)
        randomise_(model, embed_std=1.0)  # it scales its embeddings down
    return AutoregressiveWrapper(model) if wrapped else model


ROTARY = dict(rotary_pos_emb=True)


def xt_absolute(seed: int) -> nn.Module:
    return x_transformer(seed)


def xt_rotary(seed: int) -> nn.Module:
    return x_transformer(seed, decoder=ROTARY)


def xt_rotary_flash(seed: int) -> nn.Module:
    return x_transformer(seed, decoder=ROTARY | dict(attn_flash=True))


def xt_xpos(seed: int) -> nn.Module:
    return x_transformer(seed, decoder=dict(rotary_xpos=True))


def xt_alibi(seed: int) -> nn.Module:
    return x_transformer(seed, decoder=dict(alibi_pos_bias=True), use_abs_pos_emb=False)


def xt_tied(seed: int) -> nn.Module:
    """The head is a closure over the module: a deepcopy still reads the embedding of the original."""
    return x_transformer(seed, tie_embedding=True)


def xt_wrapped(seed: int) -> nn.Module:
    return x_transformer(seed, wrapped=True, decoder=ROTARY)


def xt_dropout(seed: int) -> nn.Module:
    """Layer dropout draws from Python's `random`, the others from torch."""
    decoder = dict(attn_dropout=0.5, ff_dropout=0.5, layer_dropout=0.5)
    return x_transformer(seed, decoder=decoder, emb_dropout=0.5)


def xt_mixture(seed: int) -> nn.Module:
    """Returns log-probabilities, not a linear function of the hidden state."""
    return x_transformer(seed, mixture_of_softmax=True)


# Hugging Face


def hf_llama(seed: int, **kwargs: object) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = dict(
        vocab_size=VOCAB,
        hidden_size=DIM,
        intermediate_size=2 * DIM,
        num_hidden_layers=DEPTH,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=False,
    )
    with seeded(seed):
        return randomise_(LlamaForCausalLM(LlamaConfig(**config | kwargs))).train()


def hf_llama_tied(seed: int) -> nn.Module:
    return hf_llama(seed, tie_word_embeddings=True)


def hf_llama_gqa(seed: int) -> nn.Module:
    return hf_llama(seed, num_key_value_heads=1)


def hf_gpt2(seed: int) -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=VOCAB,
        n_positions=CONTEXT,
        n_embd=DIM,
        n_layer=DEPTH,
        n_head=HEADS,
        attn_pdrop=0.5,
        embd_pdrop=0.5,
        resid_pdrop=0.5,
        bos_token_id=0,
        eos_token_id=0,
    )
    with seeded(seed):
        return randomise_(GPT2LMHeadModel(config)).train()


def hf_gemma2(seed: int) -> nn.Module:
    """Softcaps low enough to bite. Only eager attention applies the one on attention scores."""
    from transformers import Gemma2Config, Gemma2ForCausalLM

    config = Gemma2Config(
        vocab_size=VOCAB,
        hidden_size=DIM,
        intermediate_size=2 * DIM,
        num_hidden_layers=DEPTH,
        num_attention_heads=HEADS,
        num_key_value_heads=1,
        head_dim=8,
        query_pre_attn_scalar=8,
        max_position_embeddings=CONTEXT,
        sliding_window=2 * CONTEXT,
        final_logit_softcapping=3.0,
        attn_logit_softcapping=5.0,
        attn_implementation="eager",
    )
    with seeded(seed):
        return randomise_(Gemma2ForCausalLM(config)).train()


def hf_opt(seed: int) -> nn.Module:
    """Its dropout is `F.dropout` in the forward pass, so that there is no module to switch off."""
    from transformers import OPTConfig, OPTForCausalLM

    config = OPTConfig(
        vocab_size=VOCAB,
        hidden_size=DIM,
        word_embed_proj_dim=DIM,
        ffn_dim=2 * DIM,
        num_hidden_layers=DEPTH,
        num_attention_heads=HEADS,
        max_position_embeddings=CONTEXT,
        dropout=0.5,
        attention_dropout=0.5,
        bos_token_id=2,
        eos_token_id=2,
        pad_token_id=1,
    )
    with seeded(seed):
        return randomise_(OPTForCausalLM(config)).train()


# plain modules


class PlainGRU(nn.Module):
    def __init__(self, vocab: int = VOCAB) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocab, DIM)
        self.rnn = nn.GRU(DIM, DIM, num_layers=DEPTH, batch_first=True)
        self.head = nn.Linear(DIM, vocab)

    def forward(self, ids: Int[Tensor, "b n"]) -> Float[Tensor, "b n v"]:
        hidden, _ = self.rnn(self.embed(ids))
        return self.head(hidden)


class PlainTransformer(nn.Module):
    def __init__(self, *, dropout: float = 0.0, tied: bool = False) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, DIM)
        self.pos_embed = nn.Embedding(CONTEXT, DIM)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(DIM, HEADS, 2 * DIM, dropout, batch_first=True, norm_first=True)
            for _ in range(DEPTH)
        )
        self.norm = nn.LayerNorm(DIM)
        self.head = None if tied else nn.Linear(DIM, VOCAB)

    def forward(self, ids: Int[Tensor, "b n"]) -> Float[Tensor, "b n v"]:
        n = ids.shape[-1]
        later = torch.ones(n, n, dtype=torch.bool, device=ids.device).triu(1)

        x = self.embed(ids) + self.pos_embed(torch.arange(n, device=ids.device))
        for layer in self.layers:
            x = layer(x, src_mask=later, is_causal=True)

        x = self.norm(x)
        return F.linear(x, self.embed.weight) if self.head is None else self.head(x)


@dataclass
class Output:
    logits: Float[Tensor, "b n v"]


class PlainOutput(nn.Module):
    """Returns an object with `.logits`, as Hugging Face models do, and is none of them."""

    def __init__(self) -> None:
        super().__init__()
        self.body = PlainTransformer()

    def forward(self, ids: Int[Tensor, "b n"]) -> Output:
        return Output(logits=self.body(ids))


def plain_gru(seed: int) -> nn.Module:
    with seeded(seed):
        return randomise_(PlainGRU(), embed_std=1.0, std=0.8)


def plain_transformer(seed: int) -> nn.Module:
    with seeded(seed):
        return randomise_(PlainTransformer(dropout=0.5))


def plain_output(seed: int) -> nn.Module:
    with seeded(seed):
        return randomise_(PlainOutput())


def plain_tied(seed: int) -> nn.Module:
    with seeded(seed):
        return randomise_(PlainTransformer(tied=True))


ZOO: dict[str, Callable[[int], nn.Module]] = {
    "xt-absolute": xt_absolute,
    "xt-rotary": xt_rotary,
    "xt-rotary-flash": xt_rotary_flash,
    "xt-xpos": xt_xpos,
    "xt-alibi": xt_alibi,
    "xt-tied": xt_tied,
    "xt-wrapped": xt_wrapped,
    "xt-dropout": xt_dropout,
    "xt-mixture": xt_mixture,
    "hf-llama": hf_llama,
    "hf-llama-tied": hf_llama_tied,
    "hf-llama-gqa": hf_llama_gqa,
    "hf-gpt2": hf_gpt2,
    "hf-gemma2": hf_gemma2,
    "hf-opt": hf_opt,
    "plain-gru": plain_gru,
    "plain-transformer": plain_transformer,
    "plain-output": plain_output,
    "plain-tied": plain_tied,
}
