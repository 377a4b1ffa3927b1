"""How to ask a model for logits or, better, for hidden states and its output head.

Nothing here changes a model's weights or modules. Families are told apart by what the model offers, so that
neither transformers nor peft is imported.
"""

import sys
import warnings
from dataclasses import dataclass
from typing import Any

from jaxtyping import Float, Int
from torch import Tensor, nn

from dpo_wrapper.prefix_tree.attention import LAYOUT, hugging_face_over, x_transformers_over
from dpo_wrapper.prefix_tree.tree import TreeLayout


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
    """The head if it is a plain linear layer; an adapted, hooked or replaced one is left to the model."""
    if type(module) is not nn.Linear or module._forward_hooks or module._forward_pre_hooks:
        return None
    return OutputHead(module.weight, module.bias, **options)


class LanguageModel:
    """Any module from `Int[b n]` ids to `Float[b n v]` logits, or to an output that has `.logits`."""

    name = "module"
    vocab_size: int | None = None
    max_positions: int | None = None
    reaches_attention = False

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def logits(self, ids: Int[Tensor, "b n"]) -> Any:
        output = self.model(ids)
        return getattr(output, "logits", output)

    def hidden(self, ids: Int[Tensor, "b n"]) -> Float[Tensor, "b n d"]:
        raise NotImplementedError

    def head(self) -> OutputHead | None:
        return None

    def over_tree(self, layout: TreeLayout, hidden: bool) -> Float[Tensor, "r w _"]:
        """Hidden states, or logits, of the tokens of a tree. Raises NotShareable where that cannot be."""
        raise NotImplementedError


class XTransformersModel(LanguageModel):
    """x-transformers' `TransformerWrapper`, alone or as the `.net` of an `AutoregressiveWrapper` or such."""

    name = "x-transformers"
    reaches_attention = True

    def __init__(self, model: nn.Module, net: Any) -> None:
        super().__init__(model)
        if net.to_logits is None:
            raise TypeError("a model with an output head is expected: leave return_only_embed at False.")
        self.net = net
        self.vocab_size = net.num_tokens
        self.max_positions = getattr(net.pos_emb, "max_seq_len", None)

    def logits(self, ids: Int[Tensor, "b n"]) -> Any:
        return self.net(ids)

    def hidden(self, ids: Int[Tensor, "b n"]) -> Float[Tensor, "b n d"]:
        return self.net(ids, return_embeddings=True)

    def over_tree(self, layout: TreeLayout, hidden: bool) -> Float[Tensor, "r w _"]:
        layers = self.net.attn_layers
        rotates = layers.rotary_pos_emb is not None or layers.polar_pos_emb is not None
        placed = isinstance(self.net.pos_emb, nn.Module) or rotates
        # where rows are one, positions have one axis: not every embedding of positions takes two
        position = layout.position if layout.shape[0] > 1 else layout.position[0]
        with x_transformers_over(self.net, layout):
            return self.net(layout.ids, return_embeddings=hidden, pos=position if placed else None)

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
    reaches_attention = True

    def __init__(self, model: nn.Module, inner: Any) -> None:
        super().__init__(model)
        self.inner = inner
        config = inner.config
        if getattr(config, "is_encoder_decoder", False):
            raise TypeError(
                f"a decoder-only model is expected, but {type(inner).__name__} has an encoder: "
                "load one of transformers' AutoModelForCausalLM."
            )
        self.text_config = config.get_text_config() if hasattr(config, "get_text_config") else config
        self.options = {"use_cache": False} if hasattr(self.text_config, "use_cache") else {}
        embedding = inner.get_input_embeddings()
        # one that PEFT has wrapped may hide its size
        self.vocab_size = getattr(embedding, "num_embeddings", getattr(self.text_config, "vocab_size", None))
        longest = getattr(self.text_config, "max_position_embeddings", None)
        # only a table of positions bounds the length; some of them (OPT) hold two more rows
        tables = [
            m.num_embeddings for m in inner.modules() if isinstance(m, nn.Embedding) and m is not embedding
        ]
        tables += [len(buffer) for name, buffer in inner.named_buffers() if name.endswith("embed_positions")]
        if longest is not None and any(longest <= length <= longest + 2 for length in tables):
            self.max_positions = longest
        if hasattr(model, "_orig_mod"):
            warnings.warn(
                "of a compiled Hugging Face model only the whole is compiled, and scoring calls its parts: "
                f"compile model.{inner.base_model_prefix} instead.",
                stacklevel=2,
            )

    def logits(self, ids: Int[Tensor, "b n"]) -> Any:
        output = self.model(input_ids=ids, **self.options)
        return getattr(output, "logits", output)

    def hidden(self, ids: Int[Tensor, "b n"]) -> Float[Tensor, "b n d"]:
        return self.inner.base_model(input_ids=ids, **self.options).last_hidden_state

    def over_tree(self, layout: TreeLayout, hidden: bool) -> Float[Tensor, "r w _"]:
        model = self.inner.base_model if hidden else self.model
        arguments = {"input_ids": layout.ids, "position_ids": layout.position, LAYOUT: layout, **self.options}
        with hugging_face_over(self.inner):
            output = model(**arguments)
        return output.last_hidden_state if hidden else output.logits

    def head(self) -> OutputHead | None:
        peft_config = getattr(self.model, "active_peft_config", None)
        if self.inner.base_model is self.inner or getattr(peft_config, "is_prompt_learning", False):
            return None  # what a learned prompt adds, it adds outside the base model

        def option(*names: str) -> float | None:
            return next((value for name in names if (value := getattr(self.text_config, name, None))), None)

        scale = (option("logit_scale", "lm_head_multiplier") or 1.0) / (option("logits_scaling") or 1.0)
        softcap = option("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
        return linear_head(self.inner.get_output_embeddings(), logit_scale=scale, softcap=softcap)


def language_model(model: nn.Module) -> LanguageModel:
    """The family a model belongs to."""
    inner: Any = model
    if hasattr(inner, "peft_config") and hasattr(inner, "get_base_model"):
        inner = inner.get_base_model()
    whole = getattr(inner, "_orig_mod", inner)  # what torch.compile has wrapped
    if (library := sys.modules.get("x_transformers.x_transformers")) is not None:
        net = whole
        while is_of_x_transformers(net) and not isinstance(net, library.TransformerWrapper):
            net = getattr(net, "net", None)
        if isinstance(net, library.TransformerWrapper):
            return XTransformersModel(model, inner if net is whole else net)
    if hasattr(whole, "config") and hasattr(whole, "get_output_embeddings"):
        return HuggingFaceModel(model, whole)
    if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        warnings.warn(
            f"inside {type(model).__name__} all logits of a model are computed: wrap DPO, not the model.",
            stacklevel=2,
        )
    return LanguageModel(model)


def is_of_x_transformers(module: object) -> bool:
    return any(kind.__module__.startswith("x_transformers.") for kind in type(module).__mro__)
