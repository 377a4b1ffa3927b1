"""Settings of `dpo-wrapper chat`. The command line is generated from them."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from dpo_wrapper.commands.loading_options import LoadingOptions
from dpo_wrapper.data.config import flag

if TYPE_CHECKING:
    from dpo_wrapper.evaluation.sampling import Sampling


@dataclass(frozen=True, kw_only=True)
class ChatConfig(LoadingOptions):
    """Talk with a model in the terminal.

    /reset forgets the conversation, /exit or Ctrl-D leaves, Ctrl-C stops an answer.

    Raises:
        ValueError: an option has a value that cannot be, or options contradict each other.
    """

    model: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="MODEL")]
    """Run folder, folder of an adapter, or Hugging Face model by folder or name."""
    prompt: str | None = None
    """Print the answer to this alone, and nothing else, and end."""
    system: str | None = None
    """Message of the system, in front of the conversation."""
    as_chat: Literal["auto", "always", "never"] = "auto"
    """Whether messages are turns of a dialogue. auto: as the run was trained, or where the tokenizer has a
    chat template; never: each message is a prompt of its own, which the model continues."""
    reference: bool = False
    """Show the reference's answer to each message as well. The conversation goes on with the model's own."""
    reference_model: str | None = None
    """The reference, named as the model is; by default what the run began from."""
    max_new_tokens: int = 512
    """Maximum length of an answer in tokens."""
    temperature: float = 0.0
    """Answers are sampled from logits that are divided by it; with 0 each token is the most probable one."""
    top_p: float = 1.0
    """Sample from the fewest tokens whose probabilities add up to it."""
    seed: int = 0
    """Of the samples: the same conversation with the same seed has the same answers."""

    def __post_init__(self) -> None:
        if self.prompt is not None and not self.prompt.strip():
            raise ValueError("--prompt should hold a text, but it is empty: leave it out to talk.")
        if self.max_new_tokens < 1:
            raise ValueError(f"--max-new-tokens should be at least 1, but it is {self.max_new_tokens}.")
        if self.system is not None and self.as_chat == "never":
            raise ValueError("--system should stand in a dialogue, but --as-chat is never: leave one out.")
        if self.temperature == 0:
            for name in ("top_p", "seed"):
                if getattr(self, name) != getattr(type(self), name):
                    problem = f"{flag(name)} should be given with a --temperature above 0, but that is 0"
                    raise ValueError(f"{problem}: give one, or leave {flag(name)} out.")
        try:
            self.sampling  # noqa: B018  raises for what cannot be
        except ValueError as error:
            raise ValueError(f"--{str(error).replace('top_p', 'top-p', 1)}") from error

    @property
    def sampling(self) -> "Sampling | None":
        """How tokens are drawn; None for the most probable ones."""
        if self.temperature == 0:
            return None
        from dpo_wrapper.evaluation.sampling import Sampling

        return Sampling(temperature=self.temperature, top_p=self.top_p, seed=self.seed)

    @property
    def shows_reference(self) -> bool:
        return self.reference or self.reference_model is not None
