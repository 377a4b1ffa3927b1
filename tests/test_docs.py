"""Every Python block of README.md and docs/ runs, and what they say of files, options and losses is so."""

import dataclasses
import inspect
import re
from pathlib import Path

import pytest
import torch

import dpo_wrapper
from dpo_wrapper.commands.chat.config import ChatConfig
from dpo_wrapper.commands.compare.config import CompareArguments
from dpo_wrapper.commands.evaluate.config import EvaluateConfig
from dpo_wrapper.commands.export.config import ExportConfig
from dpo_wrapper.commands.pairs.config import PairsConfig
from dpo_wrapper.data.prepare.config import PrepareConfig
from dpo_wrapper.losses import PairLogProbs
from dpo_wrapper.losses.registry import builtin_losses, losses_table
from dpo_wrapper.pretrained import PRESETS
from dpo_wrapper.training.command_line import TrainArguments
from dpo_wrapper.training.config import GROUPS, TrainConfig, flag
from dpo_wrapper.training.recipe import ALIASES
from helpers.marks import mark_slow_except
from helpers.runs import BUNDLED, SMALL_DECODER

ROOT = Path(__file__).parents[1]
PAGES = {
    str(path.relative_to(ROOT)): path.read_text(encoding="utf-8")
    for path in [*ROOT.glob("*.md"), *sorted((ROOT / "docs").glob("*.md"))]
}
README = PAGES["README.md"]


def find_blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", PAGES[page], flags=re.DOTALL | re.MULTILINE)


BLOCKS = [(page, k) for page in PAGES for k in range(len(find_blocks(page, "python")))]


@pytest.fixture(scope="module")
def folder_with_a_run(tmp_path_factory):
    """A working folder as that of the README: the bundled data, and a run in runs/first."""
    from dpo_wrapper.training.train import train

    folder = tmp_path_factory.mktemp("docs")
    (folder / "examples").symlink_to(ROOT / "examples")
    rows = folder / "rows.jsonl"
    rows.write_text("".join(BUNDLED.read_text(encoding="utf-8").splitlines(keepends=True)[:26]))
    out = folder / "runs" / "first"
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(PRESETS, "tiny", SMALL_DECODER)
        train(TrainConfig(data=rows, out=out, sft_epochs=0, epochs=1, cpu=True, max_length=64, save_steps=0))
    return folder


TRAINS = ("docs/training.md", 0)


@pytest.mark.parametrize(("page", "number"), mark_slow_except(set(BLOCKS) - {TRAINS}, BLOCKS))
def test_python_blocks_run(page, number, folder_with_a_run, monkeypatch):
    block = find_blocks(page, "python")[number]
    monkeypatch.chdir(folder_with_a_run)
    torch.manual_seed(0)
    names: dict = {}
    exec(compile(block, page, "exec"), names)
    if "loss" in names:
        assert names["loss"].isfinite()
    if "runs/first" in block:
        assert names["model"](torch.arange(5)[None]).shape == (1, 5, 263)
    assert "loss" in names or "runs/first" in block or "assert" in block


def test_the_first_two_shell_blocks_are_the_two_commands():
    train, test = find_blocks("README.md", "sh")[:2]
    assert "pip install" in train and "dpo-wrapper train --data examples/data --out runs/first" in train
    assert "pip install" in test and "pytest" in test
    assert all("-c constraints.txt" in block for block in (train, test))


def test_the_table_of_losses_is_what_the_classes_say():
    assert f"\n\n{losses_table()}\n\n" in PAGES["docs/losses.md"], "paste losses_table() into docs/losses.md"


def test_every_loss_is_named_in_the_readme():
    section = README.split("## Losses")[1].split("\n## ")[0]
    assert {loss.__name__ for loss in builtin_losses()} <= set(re.findall(r"\w+", section))


def test_losses_that_take_margins_are_named():
    named = PAGES["docs/losses.md"].split("Margins work with ")[1].split(".")[0]
    assert set(re.findall(r"\w+", named)) - {"and"} == {
        loss.__name__ for loss in builtin_losses() if loss.has_margin
    }


def test_the_fields_of_pair_log_probs_are_in_the_docs():
    table = PAGES["docs/losses.md"].split("`PairLogProbs` holds")[1].split("\n\n")[1]
    named = set(re.findall(r"`(\w+)`", "".join(row.split("|")[1] for row in table.splitlines())))
    properties = {name for name, value in vars(PairLogProbs).items() if isinstance(value, property)}
    assert named == {field.name for field in dataclasses.fields(PairLogProbs)} | properties


@pytest.mark.parametrize("page", PAGES)
def test_files_that_are_named_exist(page):
    for name in re.findall(r"(?:dpo_wrapper|examples|tests)/[\w/]+\.(?:py|jsonl|md)", PAGES[page]):
        assert (ROOT / name).exists(), name
    for target in re.findall(r"\]\((?!https?:)([^)#]+)[^)]*\)", PAGES[page]):
        assert (ROOT / page).parent.joinpath(target).exists(), target


OPTIONS = {
    flag(name)
    for options in (TrainConfig, PrepareConfig, EvaluateConfig, PairsConfig, TrainArguments, CompareArguments)
    for name, field in options.__dataclass_fields__.items()
    if field.init
    if options not in (TrainArguments, CompareArguments) or name not in GROUPS
}
CHAT_OPTIONS = {flag(name) for name in ChatConfig.__dataclass_fields__ if name != "model"}
EXPORT_OPTIONS = {flag(name) for name in ExportConfig.__dataclass_fields__ if name != "model"}


def find_flags(page: str) -> set[str]:
    return set(re.findall(r"(?<![\w-])--[a-z][a-z0-9-]*[a-z0-9](?![\w-])", PAGES[page]))


@pytest.mark.parametrize("page", ["README.md", *(page for page in PAGES if page.startswith("docs/"))])
def test_options_that_are_named_exist(page):
    aliases = {f"--{alias}" for alias in ALIASES}
    assert find_flags(page) <= OPTIONS | CHAT_OPTIONS | EXPORT_OPTIONS | aliases | {"--help", "--version"}


def test_options_that_exist_are_named():
    pages = ("training", "data", "evaluation", "pairs", "compare")
    named = set().union(*(find_flags(f"docs/{page}.md") for page in pages))
    assert named >= OPTIONS
    assert find_flags("docs/chat.md") == CHAT_OPTIONS
    assert find_flags("docs/export.md") >= EXPORT_OPTIONS


@pytest.mark.parametrize("name", sorted(dpo_wrapper.__all__))
def test_what_is_exported_has_docstrings(name):
    exported = getattr(dpo_wrapper, name)
    if name == "__version__":
        assert re.fullmatch(r"\d+\.\d+\.\d+", exported)
        return
    assert inspect.getdoc(exported), name
    if inspect.isclass(exported) and issubclass(exported, torch.nn.Module):
        assert inspect.getdoc(exported.__init__) != inspect.getdoc(torch.nn.Module.__init__), name
    members = vars(exported).items() if inspect.isclass(exported) else ()
    for member, value in members:
        is_public = not member.startswith("_") and (inspect.isfunction(value) or isinstance(value, property))
        assert not is_public or inspect.getdoc(getattr(exported, member)), f"{name}.{member}"
