"""The command line: `dpo-wrapper train --help`. A command's options are the fields of its configuration."""

import signal
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    from dpo_wrapper.data.prepare.config import PrepareConfig
    from dpo_wrapper.training.config import TrainConfig


def main(args: Sequence[str] | None = None) -> None:
    """Run one command.

    The exit status is 0 on success, and 3 if `prepare --strict` finds problems. It is 2 for bad input and 1
    for a run that cannot go on, each with one sentence on standard error, and 128 plus the number of the
    signal that stopped a run: 130 for Ctrl-C.
    """
    try:
        import tyro
    except ImportError:
        exit_with_error("the command line needs tyro, which is missing: pip install 'dpo-wrapper[train]'.")
    from dpo_wrapper.data.prepare.config import PrepareConfig
    from dpo_wrapper.training.config import TrainConfig

    try:
        config = tyro.extras.subcommand_cli_from_dict(
            {"prepare": PrepareConfig, "train": TrainConfig},
            prog="dpo-wrapper",
            description="Train any autoregressive PyTorch transformer on human preferences.",
            args=args,
            config=(tyro.conf.FlagCreatePairsOff,),
        )
    except ValueError as error:  # an old tyro passes on what TrainConfig refuses
        exit_with_error(error)
    if isinstance(config, PrepareConfig):
        prepare(config)
    else:
        train(config)


def prepare(config: "PrepareConfig") -> None:
    from dpo_wrapper.data.prepare.run import prepare_and_report, preview_prepared
    from dpo_wrapper.data.prepared import is_prepared
    from dpo_wrapper.data.preview import preview_data

    try:
        if config.out is None and is_prepared(config.data[0]):
            preview_prepared(config)
        elif config.out is None:
            preview_data(config)
        elif prepare_and_report(config) and config.strict:
            sys.exit(3)
    except KeyboardInterrupt:
        sentence = "the preparation was interrupted; the same command goes on with it"
        exit_with_error(f"{sentence}.", status=128 + signal.SIGINT)
    except (ValueError, TypeError, OSError, ImportError) as error:
        exit_with_error(error)


def train(config: "TrainConfig") -> None:
    try:
        from dpo_wrapper.training.setup import set_up_training
        from dpo_wrapper.training.stopping import TrainingError
        from dpo_wrapper.training.train import run_training

        setup = set_up_training(config)
    except (ValueError, TypeError, OSError, ImportError) as error:
        exit_with_error(error)
    try:
        run_training(setup)
    except TrainingError as error:
        exit_with_error(error, status=1)
    except KeyboardInterrupt as interrupt:
        sentence = "the run was interrupted; the same command with --resume continues it in"
        print(f"\ndpo-wrapper: {sentence} {config.out}.", file=sys.stderr)
        sys.exit(128 + getattr(interrupt, "number", signal.SIGINT))


def exit_with_error(error: object, status: int = 2) -> NoReturn:
    print(f"dpo-wrapper: {error}", file=sys.stderr)
    sys.exit(status)
