"""The command line: `dpo-wrapper train --help`. A command's options are the fields of its configuration."""

import argparse
import signal
import sys
from collections.abc import Sequence
from difflib import get_close_matches
from typing import TYPE_CHECKING, NoReturn

from dpo_wrapper.version import __version__

if TYPE_CHECKING:
    from dpo_wrapper.data.prepare.config import PrepareConfig
    from dpo_wrapper.training.config import TrainConfig

COMMANDS = {
    "prepare": "check and tokenize data once, and show what a model will be trained on",
    "train": "train a model on documents, answers or preferences",
}
"""What each command does."""

INPUT_ERRORS = (ValueError, TypeError, OSError, ImportError)
"""What commands raise, with one sentence, for input that they cannot use."""


def main(args: Sequence[str] | None = None) -> None:
    """Run one command.

    The exit status is 0 on success, and 3 if `prepare --strict` finds problems. It is 2 for bad input and 1
    for a run that cannot go on, each with one sentence on standard error, and 128 plus the number of the
    signal that stopped a run: 130 for Ctrl-C.
    """
    try:
        command, arguments = split_command(list(sys.argv[1:] if args is None else args))
        try:
            import tyro
        except ImportError:
            problem = "the command line needs tyro, which is missing"
            exit_with_error(f"{problem}: pip install 'dpo-wrapper[train]'.")
        if command == "prepare":
            from dpo_wrapper.data.prepare.config import PrepareConfig

            markers = (tyro.conf.FlagCreatePairsOff,)
            prepare(tyro.cli(PrepareConfig, prog="dpo-wrapper prepare", args=arguments, config=markers))
        else:
            from dpo_wrapper.training.command_line import parse_arguments

            config, is_plan = parse_arguments(arguments)
            (plan if is_plan else train)(config)
    except KeyboardInterrupt as interrupt:
        exit_with_error("interrupted before anything was done.", status=status_of(interrupt))
    except ValueError as error:  # options that contradict each other
        exit_with_error(error)


def split_command(args: Sequence[str]) -> tuple[str, list[str]]:
    """The command and its arguments; leaves with help, the version or a sentence if there is no command."""
    listing = "\n".join(f"  {name:10}{what}" for name, what in COMMANDS.items())
    parser = argparse.ArgumentParser(
        prog="dpo-wrapper",
        description="Train any autoregressive PyTorch transformer on human preferences.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=f"commands:\n{listing}\n\ndpo-wrapper COMMAND --help lists the options of a command.",
    )
    parser.add_argument("--version", action="version", version=f"dpo-wrapper {__version__}")
    parser.add_argument("command", metavar="COMMAND", nargs="?")
    if args and args[0] in COMMANDS:
        return args[0], list(args[1:])
    command = parser.parse_known_args(args)[0].command
    if command is None:
        parser.print_help()
        sys.exit(2)
    close = get_close_matches(command, COMMANDS, n=1)
    remedy = f"did you mean {close[0]}?" if close else "see dpo-wrapper --help."
    exit_with_error(f"the command should be {' or '.join(COMMANDS)}, but it is {command}: {remedy}")


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
    except INPUT_ERRORS as error:
        exit_with_error(error)


def plan(config: "TrainConfig") -> None:
    try:
        from dpo_wrapper.training.monitoring.terminal import hide_library_bars
        from dpo_wrapper.training.plan import plan_run
        from dpo_wrapper.training.stopping import TrainingError

        hide_library_bars()
        plan_run(config)
    except INPUT_ERRORS as error:
        exit_with_error(error)
    except TrainingError as error:
        exit_with_error(error, status=1)


def train(config: "TrainConfig") -> None:
    try:
        from dpo_wrapper.training.monitoring.terminal import hide_library_bars
        from dpo_wrapper.training.run_lock import is_first_process
        from dpo_wrapper.training.setup import set_up_training
        from dpo_wrapper.training.stopping import TrainingError, raise_at_sigterm
        from dpo_wrapper.training.train import run_training

        raise_at_sigterm()
        hide_library_bars()
        setup = set_up_training(config)
    except INPUT_ERRORS as error:
        exit_with_error(error)
    except TrainingError as error:
        exit_with_error(error, status=1)
    try:
        run_training(setup)
    except TrainingError as error:
        exit_with_error(error, status=1)
    except KeyboardInterrupt as interrupt:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # by torchrun, when another process has ended before
        status = setup.run.record.status
        if status == "finished":  # it came at the very end
            return
        is_continued = status == "trained" or any(config.out.glob("checkpoints/*/progress.json"))
        goes_on = "continues it" if is_continued else "begins it again, for it has no checkpoint,"
        sentence = f"the run was interrupted; the same command {goes_on} in {config.out}"
        if is_first_process():
            print(f"\ndpo-wrapper: {sentence}.", file=sys.stderr)
        sys.exit(status_of(interrupt))


def status_of(interrupt: KeyboardInterrupt) -> int:
    """The exit status of a program that a signal has stopped, as shells have it."""
    return 128 + int(getattr(interrupt, "number", signal.SIGINT))


def exit_with_error(error: object, status: int = 2) -> NoReturn:
    print(f"dpo-wrapper: {error}", file=sys.stderr)
    sys.exit(status)
