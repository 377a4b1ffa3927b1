"""Options of the model that is trained."""

import re
from dataclasses import dataclass
from typing import Literal

from dpo_wrapper.pretrained import PRESETS, is_decoder_file
from dpo_wrapper.scoring import SharePrefix
from dpo_wrapper.training.options.base import Options

SHARE_PREFIX: dict[str, SharePrefix] = {"auto": "auto", "always": True, "never": False}


@dataclass(frozen=True, kw_only=True)
class ModelOptions(Options):
    """Which model is trained, and how it is loaded and run."""

    model: str = "tiny"
    """tiny, small or medium (a new x-transformers decoder), a .json file of the arguments of another new one
    (of TransformerWrapper, with attn_layers for Decoder), a run folder, the folder of an adapter, or a
    Hugging Face model by folder or name."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Dtype of the weights. auto: float32 for weights that train and on the CPU; on an accelerator, frozen
    weights below an adapter keep the dtype that they are stored in. Those of an adapter are in float32."""
    attn_implementation: str | None = None
    """Attention of a Hugging Face model, by transformers' names: eager, sdpa, flex_attention,
    flash_attention_2 and others. By default transformers chooses."""
    share_prefix: Literal["auto", "always", "never"] = "auto"
    """Whether prefixes that sequences share are computed once, and no padding. auto does so where a trial
    gives the log-probs of padded rows, and always refuses other models; never pads."""
    gradient_checkpointing: bool = False
    """Compute the layers of a Hugging Face model again in the backward pass: less memory, more time."""
    torch_compile: bool = False
    """Compile the feed-forward layers and norms, which takes a minute or two when the run starts."""
    freeze: tuple[str, ...] = ()
    """Regular expressions of names of parameters that do not train, such as embed or layers[.][0-5][.]."""

    def __post_init__(self) -> None:
        if isinstance(self.freeze, str):
            object.__setattr__(self, "freeze", (self.freeze,))
        for pattern in self.freeze:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(
                    f"--freeze should be regular expressions, but {pattern} is none ({error}): correct it."
                ) from error

    @property
    def is_new_model(self) -> bool:
        return self.model in PRESETS or is_decoder_file(self.model)

    @property
    def prefix_sharing(self) -> SharePrefix:
        """`share_prefix` as `DPO` takes it."""
        return SHARE_PREFIX[self.share_prefix]
