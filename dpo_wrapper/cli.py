"""The command line: `dpo-wrapper train --help`. A command's options are the fields of its configuration."""

import argparse
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from importlib.util import find_spec
from typing import NoReturn, TypeVar

from dpo_wrapper.version import __version__

INPUT_ERRORS = (ValueError, TypeError, OSError, ImportError)
"""What commands raise, with one sentence, for input that they cannot use."""

Config = TypeVar("Config")


def main(args: Sequence[str] | None = None) -> None:
    """Run one command.

    The exit status is 0 on success, and 3 if `prepare --strict` finds problems. It is 2 for bad input and 1
    for a run that cannot go on, each with one sentence on standard error, and 128 plus the number of the
    signal that stopped a run: 130 for Ctrl-C.
    """
    try:
        command, arguments = split_command(list(sys.argv[1:] if args is None else args))
        if find_spec("tyro") is None:
            problem = "the command line needs tyro, which is missing"
            exit_with_error(f"{problem}: pip install 'dpo-wrapper[train]'.")
        command.run(arguments)
    except KeyboardInterrupt as interrupt:
        exit_with_error("interrupted before anything was done.", status=status_of(interrupt))
    except ValueError as error:  # options that contradict each other
        exit_with_error(error)


def prepare(args: Sequence[str]) -> None:
    from dpo_wrapper.data.prepare.config import PrepareConfig

    config = parse_options(PrepareConfig, "prepare", args)
    with exit_on_errors("the preparation was interrupted; the same command goes on with it"):
        from dpo_wrapper.data.prepare.run import prepare_and_report, preview_prepared
        from dpo_wrapper.data.prepared import is_prepared
        from dpo_wrapper.data.preview import preview_data

        if config.out is None and is_prepared(config.data[0]):
            preview_prepared(config)
        elif config.out is None:
            preview_data(config)
        elif prepare_and_report(config) and config.strict:
            sys.exit(3)


def make_pairs(args: Sequence[str]) -> None:
    from dpo_wrapper.commands.pairs.config import PairsConfig

    config = parse_options(PairsConfig, "pairs", args)
    with exit_on_errors("the sampling was interrupted; the same command goes on with it"):
        from dpo_wrapper.commands.pairs.run import make_pairs
        from dpo_wrapper.display.terminal import hide_library_bars
        from dpo_wrapper.training.stopping import raise_at_sigterm

        raise_at_sigterm()
        hide_library_bars()
        make_pairs(config)


def train(args: Sequence[str]) -> None:
    from dpo_wrapper.training.command_line import parse_arguments

    config, is_plan = parse_arguments(args)
    from dpo_wrapper.display.terminal import hide_library_bars
    from dpo_wrapper.training.stopping import TrainingError, raise_at_sigterm

    try:
        with exit_on_errors("interrupted before anything was done"):
            from dpo_wrapper.training.run_lock import is_first_process
            from dpo_wrapper.training.setup import set_up_training
            from dpo_wrapper.training.train import run_training

            hide_library_bars()
            if is_plan:
                from dpo_wrapper.training.plan import plan_run

                plan_run(config)
                return
            raise_at_sigterm()
            setup = set_up_training(config)
        run_training(setup)
    except TrainingError as error:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # by torchrun, when another process has ended before
        exit_with_error(error, status=1)
    except KeyboardInterrupt as interrupt:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # as above
        status = setup.run.record.status
        if status == "finished":  # it came at the very end
            return
        is_continued = status == "trained" or any(config.out.glob("checkpoints/*/progress.json"))
        goes_on = "continues it" if is_continued else "begins it again, for it has no checkpoint,"
        sentence = f"the run was interrupted; the same command {goes_on} in {config.out}"
        if is_first_process():
            print(f"\ndpo-wrapper: {sentence}.", file=sys.stderr)
        sys.exit(status_of(interrupt))


def evaluate(args: Sequence[str]) -> None:
    from dpo_wrapper.commands.evaluate.config import EvaluateConfig

    config = parse_options(EvaluateConfig, "evaluate", args)
    sentence = "the evaluation was interrupted; the same command begins it again, and keeps its answers"
    with exit_on_errors(sentence):
        from dpo_wrapper.commands.evaluate.run_evaluation import run_evaluation

        run_evaluation(config)


def compare(args: Sequence[str]) -> None:
    from dpo_wrapper.commands.compare.config import parse_arguments

    comparison = parse_arguments(args)
    with exit_on_errors("the comparison was interrupted; the same command goes on with it"):
        from dpo_wrapper.commands.compare.run import compare
        from dpo_wrapper.display.terminal import hide_library_bars
        from dpo_wrapper.training.stopping import raise_at_sigterm

        raise_at_sigterm()
        hide_library_bars()
        if compare(comparison):
            sys.exit(1)


def chat(args: Sequence[str]) -> None:
    from dpo_wrapper.commands.chat.config import ChatConfig

    config = parse_options(ChatConfig, "chat", args)
    with exit_on_errors("interrupted"):
        from dpo_wrapper.commands.chat.run import run_chat
        from dpo_wrapper.display.terminal import hide_library_bars

        hide_library_bars()
        run_chat(config)


def export(args: Sequence[str]) -> None:
    from dpo_wrapper.commands.export.config import ExportConfig

    config = parse_options(ExportConfig, "export", args)
    with exit_on_errors("the export was interrupted; the same command begins it again"):
        from dpo_wrapper.commands.export.run import run_export
        from dpo_wrapper.display.terminal import hide_library_bars
        from dpo_wrapper.training.stopping import raise_at_sigterm

        raise_at_sigterm()
        hide_library_bars()
        if run_export(config):
            sys.exit(1)


@dataclass(frozen=True)
class Command:
    """What a command does, in words, and the function that does it with the arguments after its name."""

    help: str
    run: Callable[[Sequence[str]], None]


COMMANDS = {
    "prepare": Command("check and tokenize data once, and show what a model will be trained on", prepare),
    "pairs": Command("sample answers from a model, and make preference pairs of logs with them", make_pairs),
    "train": Command("train a model on documents, answers or preferences", train),
    "evaluate": Command(
        "say how well a model tells chosen from rejected answers, and how sure that is", evaluate
    ),
    "compare": Command("train with several losses or recipes, and say what differs beyond chance", compare),
    "chat": Command("talk with a model in the terminal, or print one answer", chat),
    "export": Command("write a model in the form that another program takes, and compare the two", export),
}


def split_command(args: Sequence[str]) -> tuple[Command, list[str]]:
    """The command and its arguments; leaves with help, the version or a sentence if there is no command."""
    listing = "\n".join(f"  {name:10}{command.help}" for name, command in COMMANDS.items())
    parser = argparse.ArgumentParser(
        prog="dpo-wrapper",
        description="Train any autoregressive PyTorch transformer on human preferences.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=f"commands:\n{listing}\n\ndpo-wrapper COMMAND --help lists the options of a command.",
    )
    parser.add_argument("--version", action="version", version=f"dpo-wrapper {__version__}")
    parser.add_argument("command", metavar="COMMAND", nargs="?")
    if args and args[0] in COMMANDS:
        return COMMANDS[args[0]], list(args[1:])
    name = parser.parse_known_args(args)[0].command
    if name is None:
        parser.print_help()
        sys.exit(2)
    close = get_close_matches(name, COMMANDS, n=1)
    remedy = f"did you mean {close[0]}?" if close else "see dpo-wrapper --help."
    exit_with_error(f"the command should be {' or '.join(COMMANDS)}, but it is {name}: {remedy}")


def parse_options(config_class: type[Config], command: str, args: Sequence[str]) -> Config:
    """The configuration that the arguments of a command ask for."""
    import tyro

    from dpo_wrapper.libraries.tyro_cli import parse_command_line

    markers = (tyro.conf.FlagCreatePairsOff,)
    config: Config = parse_command_line(config_class, f"dpo-wrapper {command}", args, config=markers)
    return config


@contextmanager
def exit_on_errors(interrupted: str) -> Iterator[None]:
    """The context in which bad input and signals end the program with a sentence.

    `interrupted` is that of a signal, without its full stop.
    """
    try:
        yield
    except KeyboardInterrupt as interrupt:
        exit_with_error(f"{interrupted}.", status=status_of(interrupt))
    except INPUT_ERRORS as error:
        exit_with_error(error)


def status_of(interrupt: KeyboardInterrupt) -> int:
    """The exit status of a program that a signal has stopped, as shells have it."""
    return 128 + int(getattr(interrupt, "number", signal.SIGINT))


def exit_with_error(error: object, status: int = 2) -> NoReturn:
    print(f"dpo-wrapper: {error}", file=sys.stderr)
    sys.exit(status)
