"""How good a model is: metrics, rewards, samples, judges."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dpo_wrapper.evaluation.rewards import reward

__all__ = ["reward"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        from dpo_wrapper.evaluation import rewards

        return getattr(rewards, name)
    raise AttributeError(f"module 'dpo_wrapper.evaluation' has no attribute {name!r}")
