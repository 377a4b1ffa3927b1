"""Causal language models of Hugging Face's transformers."""

import sys
import warnings
from copy import copy
from functools import cached_property
from typing import Any

from jaxtyping import Float, Int
from torch import Tensor, nn

from dpo_wrapper.models.balance_loss import BalanceLoss
from dpo_wrapper.models.base import LanguageModel, OutputHead, as_output_head, has_hooks, install_lock
from dpo_wrapper.models.hugging_face_attention import install_hooks
from dpo_wrapper.models.hugging_face_recurrence import functions_over_tree, install_recurrence_hooks
from dpo_wrapper.models.lower_layers import DecoderLayer
from dpo_wrapper.models.recurrent import RecurrentTree, find_recurrent_layers, install_layer_hook
from dpo_wrapper.models.rerun import run_pass
from dpo_wrapper.prefix_tree import PrefixSharingError, StateKernel, TreeLayout


class HuggingFaceModel(LanguageModel):
    """A causal LM of transformers; `inner` is the model inside the wrappers of PEFT and `torch.compile`."""

    name = "Hugging Face"
    can_share_prefix = True
    has_own_positions = True

    def __init__(self, model: nn.Module, inner: Any) -> None:
        super().__init__(model)
        self.inner = self.called_module = inner
        if "transformers" in sys.modules:
            with install_lock:
                install_hooks()
        self.find_recurrent_layers()
        config = inner.config
        if getattr(config, "is_encoder_decoder", False):
            problem = f"the model should be decoder-only, but {type(inner).__name__} has an encoder"
            raise TypeError(f"{problem}: load one of transformers' AutoModelForCausalLM.")
        # of a multimodal model that of the text part
        self.text_config = config.get_text_config() if hasattr(config, "get_text_config") else config
        self.options = {"use_cache": False} if hasattr(self.text_config, "use_cache") else {}
        embedding = inner.get_input_embeddings()
        # an embedding that PEFT has wrapped may hide its size
        self.vocab_size = getattr(embedding, "num_embeddings", getattr(self.text_config, "vocab_size", None))
        self.max_positions = self.find_max_positions()
        if hasattr(model, "_orig_mod"):
            warnings.warn(
                "a Hugging Face model should be compiled in parts, which scoring calls, but it is compiled "
                f"as a whole: compile model.{inner.base_model_prefix} instead.",
                stacklevel=2,
            )

    def find_max_positions(self) -> int | None:
        """The length of the model's table of positions; None where positions are computed (RoPE)."""
        max_positions = getattr(self.text_config, "max_position_embeddings", None)
        if max_positions is None:
            return None
        tokens = self.inner.get_input_embeddings()
        embeddings = (m for m in self.inner.modules() if isinstance(m, nn.Embedding) and m is not tokens)
        lengths = [m.num_embeddings for m in embeddings]
        lengths += [len(b) for name, b in self.inner.named_buffers() if name.endswith("embed_positions")]
        # some tables (OPT) have two rows more
        has_table = any(max_positions <= length <= max_positions + 2 for length in lengths)
        return max_positions if has_table else None

    def call(self, model: Any, **inputs: Tensor) -> Any:
        """The output of the model or of its inner one, whose router logits are kept where they are needed."""
        if self.balance_loss is None:
            return model(**inputs, **self.options)
        output = model(**inputs, **self.options, output_router_logits=True)
        self.balance_loss.router_logits = getattr(output, "router_logits", None) or ()
        return output

    def forward_logits(self, ids: Int[Tensor, "b n"]) -> Any:
        output = self.call(self.model, input_ids=ids)
        logits = getattr(output, "logits", output)
        if getattr(self.peft_config, "is_prompt_learning", False) and isinstance(logits, Tensor):
            return logits[:, -ids.shape[1] :]  # a learned prompt stands before
        return logits

    @property
    def peft_config(self) -> Any:
        """The configuration of PEFT's active adapter; None where there is none."""
        return getattr(self.model, "active_peft_config", None)

    def why_peft_forward(self) -> str | None:
        """What PEFT computes in its own forward, as a part of a sentence; else None."""
        if getattr(self.peft_config, "is_prompt_learning", False):
            return "PEFT adds a learned prompt in its own forward"
        if getattr(self.peft_config, "alora_invocation_tokens", None) is not None:
            return "PEFT looks for the invocation tokens of aLoRA in its own forward"
        kind = getattr(getattr(self.peft_config, "peft_type", None), "value", None)
        return f"PEFT computes a part of {kind} in its own forward" if kind in ("POLY", "XLORA") else None

    def why_own_forward(self) -> str | None:
        if has_hooks(self.model) or has_hooks(self.inner):
            return "hooks are called with the model as a whole"
        return self.why_peft_forward()

    @property
    def own_aux_loss_coef(self) -> float:
        if not getattr(self.text_config, "output_router_logits", False):
            return 0.0
        names = ("router_aux_loss_coef", "aux_loss_coef")  # the latter in JetMoe
        values = (getattr(holder, name, None) for holder in (self.inner, self.text_config) for name in names)
        return next(filter(None, values), 0.0)

    def why_no_aux_loss(self) -> str | None:
        if getattr(self.peft_config, "is_prompt_learning", False):
            return "PEFT adds a learned prompt in its own forward"
        return BalanceLoss.why_no_loss(self.inner)

    def with_balance_loss(self) -> "HuggingFaceModel":
        model = copy(self)
        model.balance_loss = BalanceLoss(self.inner, self.text_config)
        return model

    def why_no_tree(self) -> str | None:
        return self.why_peft_forward()

    def forward_hidden(self, ids: Int[Tensor, "b n"]) -> Float[Tensor, "b n d"]:
        return self.call(self.inner.base_model, input_ids=ids).last_hidden_state

    def forward_tree(self, layout: TreeLayout, return_hidden: bool) -> Float[Tensor, "r w _"]:
        model = self.inner.base_model if return_hidden else self.model
        if self.recurrent_layers:
            self.find_recurrent_layers()
        along_paths = self.layers_along_paths(layout.options.state)
        functions = {id(layer): functions_over_tree(type(layer)) for layer in self.recurrent_layers}
        tree = RecurrentTree(layout, frozenset(map(id, along_paths)), functions)

        def forward() -> Tensor:
            output = self.call(model, input_ids=layout.ids, position_ids=layout.position)
            return output.last_hidden_state if return_hidden else output.logits

        try:
            output = run_pass(self.model, forward, tree)
        except (AttributeError, TypeError) as error:
            if "NoneType" not in str(error):
                raise
            missing = "the attention mask"
            if "paths" in layout.kernels:
                missing += " or a second output of layers with a state"
            reason = f"its layers use {missing}, which a tree does not have, outside of attention"
            raise PrefixSharingError(reason) from error
        if not layout.kernels:
            raise PrefixSharingError("its tokens meet elsewhere than in transformers' attention interface")
        return output

    def find_recurrent_layers(self) -> None:
        """Find the layers that carry a state, which may be new ones, and wrap what trees need."""
        self.recurrent_layers = find_recurrent_layers(self.inner)
        with install_lock:
            for layer_class in self.recurrent_classes():
                install_layer_hook(layer_class)
                install_recurrence_hooks(layer_class)

    def recurrent_classes(self) -> set[Any]:
        """The classes of layers that carry a state."""
        return {type(layer) for layer in self.recurrent_layers}

    def state_kernels(self) -> list[StateKernel | None]:
        self.find_recurrent_layers()
        if not self.recurrent_layers:
            return [None]
        return ["fork", "paths"] if any(map(functions_over_tree, self.recurrent_classes())) else ["paths"]

    def layers_along_paths(self, state: StateKernel | None) -> list[nn.Module]:
        layers = self.recurrent_layers
        return [m for m in layers if state == "paths" or not functions_over_tree(type(m))]

    @cached_property
    def layer_list(self) -> nn.ModuleList:
        """The list of decoder layers; an empty one where no list, or more than one, is as long as it."""
        count = getattr(self.text_config, "num_hidden_layers", None)
        named = self.inner.named_modules()
        lists = {name: m for name, m in named if isinstance(m, nn.ModuleList) and len(m) == count}
        outermost = [m for name, m in lists.items() if not any(name.startswith(f"{n}.") for n in lists)]
        return outermost[0] if len(outermost) == 1 else nn.ModuleList()

    def decoder_layers(self) -> list[DecoderLayer]:
        return [DecoderLayer(layer, layer) for layer in self.layer_list]

    def layers_to_shard(self) -> list[nn.Module]:
        names = set(getattr(self.inner, "_no_split_modules", None) or ())
        named = [module for module in self.inner.modules() if type(module).__name__ in names]
        return named or list(self.layer_list)

    def output_head(self) -> OutputHead | None:
        if self.inner.base_model is self.inner:
            return None
        if hasattr(self.model, "_fsdp_wrapped_module"):
            return None  # FSDP's older wrapper gathers parameters in its own forward alone

        def find_option(*names: str) -> float | None:
            return next((value for name in names if (value := getattr(self.text_config, name, None))), None)

        multiplier = find_option("logit_scale", "lm_head_multiplier") or 1.0
        logit_scale = multiplier / (find_option("logits_scaling") or 1.0)
        softcap = find_option("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
        return as_output_head(self.inner.get_output_embeddings(), logit_scale=logit_scale, softcap=softcap)
