"""Tiny models of each family with fixed weights for `compare_checkouts.py`: `MODELS[name](seed)`."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

VOCAB, CONTEXT, DIM = 37, 24, 16


@torch.no_grad()
def randomize(model: nn.Module, seed: int) -> nn.Module:
    """Weights so large that every token and position matters."""
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        noise = torch.randn(p.shape, generator=generator)
        p.copy_(p + 0.1 * noise if p.ndim < 2 else 0.3 * noise)
    return model.train()


def make_x_transformer(seed: int, *, tie_embedding: bool = False, **decoder: Any) -> nn.Module:
    from x_transformers import Decoder, TransformerWrapper

    layers = Decoder(dim=DIM, depth=2, heads=2, attn_dim_head=8, verbose=False, **decoder)
    model = TransformerWrapper(
        num_tokens=VOCAB, max_seq_len=CONTEXT, attn_layers=layers, tie_embedding=tie_embedding
    )
    return randomize(model, seed)


def make_llama(seed: int, *, lora: bool = False, **options: Any) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = dict(hidden_size=DIM, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)
    config = LlamaConfig(vocab_size=VOCAB, max_position_embeddings=CONTEXT, **sizes, **options)
    model = randomize(LlamaForCausalLM(config), seed)
    if not lora:
        return model
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)
    return get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))


def make_gpt2(seed: int) -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=VOCAB, n_positions=CONTEXT, n_embd=DIM, n_layer=2, n_head=2, eos_token_id=0
    )
    return randomize(GPT2LMHeadModel(config), seed)


def make_gemma2(seed: int) -> nn.Module:
    from transformers import Gemma2Config, Gemma2ForCausalLM

    sizes = dict(
        hidden_size=DIM, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, head_dim=8
    )
    caps = dict(final_logit_softcapping=3.0, attn_logit_softcapping=5.0, attn_implementation="eager")
    config = Gemma2Config(
        vocab_size=VOCAB, num_key_value_heads=1, query_pre_attn_scalar=8, max_position_embeddings=CONTEXT,
        sliding_window=2 * CONTEXT, **sizes, **caps,
    )  # fmt: skip
    return randomize(Gemma2ForCausalLM(config), seed)


class PlainTransformer(nn.Module):
    """A causal model that hands out nothing but logits."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.position = nn.Embedding(VOCAB, DIM), nn.Embedding(CONTEXT, DIM)
        self.layer = nn.TransformerEncoderLayer(DIM, 2, 32, 0.1, batch_first=True, norm_first=True)
        self.head = nn.Linear(DIM, VOCAB)

    def forward(self, ids: Tensor) -> Tensor:
        n = ids.shape[1]
        causal = torch.ones(n, n, dtype=torch.bool).triu(1)
        return self.head(self.layer(self.embed(ids) + self.position(torch.arange(n)), causal, is_causal=True))


class PlainGRU(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.gru = nn.Embedding(VOCAB, DIM), nn.GRU(DIM, DIM, batch_first=True)
        self.head = nn.Linear(DIM, VOCAB)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.gru(self.embed(ids))[0])


MODELS: dict[str, Callable[[int], nn.Module]] = {
    "xt-absolute": make_x_transformer,
    "xt-rotary": partial(make_x_transformer, rotary_pos_emb=True),
    "xt-flash": partial(make_x_transformer, rotary_pos_emb=True, attn_flash=True),
    "xt-tied": partial(make_x_transformer, tie_embedding=True),
    "xt-gqa": partial(make_x_transformer, rotary_pos_emb=True, attn_kv_heads=1),
    "hf-llama": make_llama,
    "hf-llama-gqa": partial(make_llama, num_key_value_heads=1),
    "hf-gpt2": make_gpt2,
    "hf-gemma2": make_gemma2,
    "hf-llama-lora": partial(make_llama, lora=True),
    "plain-transformer": lambda seed: randomize(PlainTransformer(), seed),
    "plain-gru": lambda seed: randomize(PlainGRU(), seed),
}
