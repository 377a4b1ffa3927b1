"""The command line, generated from the configurations: `dpo-wrapper train --help`."""

import sys
from collections.abc import Sequence
from typing import NoReturn

from dpo_wrapper.training.config import TrainConfig


def refuse(error: object) -> NoReturn:
    print(f"dpo-wrapper: {error}", file=sys.stderr)
    sys.exit(2)


def main(args: Sequence[str] | None = None) -> None:
    """Exit status 0 on success, 2 (and one sentence on standard error) for bad input, 130 if interrupted."""
    try:
        import tyro
    except ImportError:
        refuse("the command line needs more packages: pip install 'dpo-wrapper[train]'")
    config = tyro.extras.subcommand_cli_from_dict(
        {"train": TrainConfig},
        prog="dpo-wrapper",
        description="Train any autoregressive PyTorch transformer on human preferences.",
        args=args,
        config=(tyro.conf.FlagCreatePairsOff,),
    )
    train(config)


def train(config: TrainConfig) -> None:
    try:
        from dpo_wrapper.training.train import prepare, run_prepared

        prepared = prepare(config)
    except (ValueError, TypeError, OSError, ImportError) as error:
        refuse(error)
    try:
        run_prepared(prepared)
    except KeyboardInterrupt:
        print(
            f"\ndpo-wrapper: interrupted; the same command with --resume goes on in {config.out}",
            file=sys.stderr,
        )
        sys.exit(130)
