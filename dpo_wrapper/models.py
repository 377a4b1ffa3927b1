"""How to ask a model for logits or, better, for hidden states and its output head.

Nothing here changes a model's weights or modules. Families are told apart by what the model offers, so that neither
transformers nor peft is imported.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from beartype import beartype
from jaxtyping import Float, Int, jaxtyped
from torch import Tensor, nn


@dataclass(frozen=True)
class OutputHead:
    """`logits = softcap_(logit_scale · (hidden @ weightᵀ + bias))`."""

    weight: Float[Tensor, "v d"]
    bias: Float[Tensor, "v"] | None = None
    logit_scale: float = 1.0
    softcap: float | None = None

    @property
    def options(self) -> dict[str, Any]:
        return {"bias": self.bias, "logit_scale": self.logit_scale, "softcap": self.softcap}

    def logits(self, hidden: Float[Tensor, "b n d"]) -> Float[Tensor, "b n v"]:
        logits = nn.functional.linear(hidden, self.weight, self.bias) * self.logit_scale
        return logits if self.softcap is None else (logits / self.softcap).tanh() * self.softcap


def linear_head(module: object, **options: Any) -> OutputHead | None:
    """The head if it is a plain linear layer; one that is adapted, hooked or replaced is left to the model itself."""
    if type(module) is not nn.Linear or module._forward_hooks or module._forward_pre_hooks:
        return None
    return OutputHead(module.weight, module.bias, **options)


class LanguageModel:
    """Any module from `Int[b n]` ids to `Float[b n v]` logits, or to an output that has `.logits`."""

    name = "module"
    vocab_size: int | None = None
    max_positions: int | None = None

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def logits(self, ids: Int[Tensor, "b n"]) -> Any:
        output = self.model(ids)
        return getattr(output, "logits", output)

    def hidden(self, ids: Int[Tensor, "b n"]) -> Float[Tensor, "b n d"]:
        raise NotImplementedError

    def head(self) -> OutputHead | None:
        return None


class XTransformersModel(LanguageModel):
    """x-transformers' `TransformerWrapper`, alone or as the `.net` of `AutoregressiveWrapper` and its siblings."""

    name = "x-transformers"

    def __init__(self, model: nn.Module, net: Any) -> None:
        super().__init__(model)
        self.net = net
        self.vocab_size = net.num_tokens
        self.max_positions = getattr(net.pos_emb, "max_seq_len", None)

    def logits(self, ids: Int[Tensor, "b n"]) -> Any:
        return self.net(ids)

    def hidden(self, ids: Int[Tensor, "b n"]) -> Float[Tensor, "b n d"]:
        return self.net(ids, return_embeddings=True)

    def head(self) -> OutputHead | None:
        if self.net.output_is_log_prob:  # a mixture of softmaxes, which has no single head
            return None
        to_logits = self.net.to_logits
        if hasattr(self.net, "tie_embedding_scale") and not isinstance(to_logits, nn.Module):
            return OutputHead(self.net.token_emb.emb.weight, logit_scale=float(self.net.tie_embedding_scale))
        return linear_head(to_logits)


class HuggingFaceModel(LanguageModel):
    """A transformers causal LM; `inner` is the same without PEFT's wrapping."""

    name = "Hugging Face"

    def __init__(self, model: nn.Module, inner: Any) -> None:
        super().__init__(model)
        self.inner = inner
        config = inner.config
        if getattr(config, "is_encoder_decoder", False):
            raise TypeError(f"a decoder-only model is expected, but {type(inner).__name__} has an encoder.")
        self.text_config = config.get_text_config() if hasattr(config, "get_text_config") else config
        self.options = {"use_cache": False} if hasattr(self.text_config, "use_cache") else {}
        embedding = inner.get_input_embeddings()
        self.vocab_size = embedding.num_embeddings
        longest = getattr(self.text_config, "max_position_embeddings", None)
        # only a learned table of positions bounds the length; some of them (OPT) hold two more rows
        tables = (m for m in inner.modules() if isinstance(m, nn.Embedding) and m is not embedding)
        if longest is not None and any(longest <= table.num_embeddings <= longest + 2 for table in tables):
            self.max_positions = longest

    def logits(self, ids: Int[Tensor, "b n"]) -> Any:
        return self.model(input_ids=ids, **self.options).logits

    def hidden(self, ids: Int[Tensor, "b n"]) -> Float[Tensor, "b n d"]:
        return self.inner.base_model(input_ids=ids, **self.options).last_hidden_state

    def head(self) -> OutputHead | None:
        if self.inner.base_model is self.inner:
            return None
        scale = getattr(self.text_config, "logit_scale", None) or 1.0
        scale /= getattr(self.text_config, "logits_scaling", None) or 1.0
        softcap = getattr(self.text_config, "final_logit_softcapping", None)
        return linear_head(self.inner.get_output_embeddings(), logit_scale=scale, softcap=softcap)


def language_model(model: nn.Module) -> LanguageModel:
    """The family a model belongs to."""
    inner: Any = model
    if hasattr(model, "peft_config") and hasattr(model, "get_base_model"):
        inner = model.get_base_model()
    if (library := sys.modules.get("x_transformers.x_transformers")) is not None:
        net = inner
        while type(net).__module__.startswith("x_transformers.") and not isinstance(
            net, library.TransformerWrapper
        ):
            net = getattr(net, "net", None)
        if isinstance(net, library.TransformerWrapper):
            return XTransformersModel(model, net)
    if hasattr(inner, "config") and hasattr(inner, "get_output_embeddings"):
        return HuggingFaceModel(model, inner)
    return LanguageModel(model)


def turn_off_dropout(model: nn.Module) -> None:
    """Put a model in eval mode: dropout as modules, as function calls and of whole layers, all at once.

    A module that checkpoints its activations does so in training mode only (transformers), so it alone keeps that
    mode, with rates of dropout that it may use in its own forward set to 0.
    """
    for module in model.modules():
        module.training = bool(getattr(module, "gradient_checkpointing", False))
        if module.training:
            for name, value in vars(module).items():
                if "drop" in name and isinstance(value, float):
                    setattr(module, name, 0.0)


@contextmanager
def quiet(model: nn.Module) -> Iterator[None]:
    """Eval mode within, and each module's own mode again after."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


@contextmanager
def one_arithmetic() -> Iterator[None]:
    """Keep torch's transformer layers from a fused path that they take only where no gradients are wanted, so that
    policy and reference round alike."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}


@jaxtyped(typechecker=beartype)
def difference(got: Float[Tensor, "*n"], expected: Float[Tensor, "*n"]) -> tuple[float, bool]:
    """The largest difference relative to the largest expected value, and whether it is more than rounding."""
    tolerance = max(TOLERANCE.get(t.dtype, 0.1) for t in (got, expected))
    got, expected = got.double(), expected.double()
    worst = ((got - expected).abs().max() / expected.abs().max().clamp(min=1.0)).item()
    return worst, not worst <= tolerance  # NaN counts as a difference
