"""`dpo-wrapper prepare --preview`: what will be trained, as a person reads it."""

from pathlib import Path

import pytest

from dpo_wrapper import cli
from dpo_wrapper.data import ByteTokenizer, Message, TokenizedExample
from dpo_wrapper.data.preview import format_example
from helpers import tokenizers as tiny
from helpers.datasets import write_rows

BYTES = ByteTokenizer()
ASK, CALL, ANSWER = {"role": "user", "content": "1+1?"}, {"role": "assistant", "content": "Hm."}, "2"


def preview(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    cli.main(["prepare", *map(str, arguments)])
    return capsys.readouterr().out


def test_pairs_lists_and_labels(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [
        {"prompt": "1+1?", "chosen": "2", "rejected": "3", "source": "me"},
        {"prompt": [ASK], "completions": ["2", "two", "3"]},
        {"prompt": "1+1?", "completion": "3", "label": False},
        {"prompt": "1+1?", "chosen": "2", "rejected": "3"},
        {"prompt": "1+1?", "response_a": "2", "response_b": "3", "winner": "tie"},
    ]
    file = write_rows(tmp_path / "a.jsonl", rows)
    assert preview(capsys, "--data", file, "--preview", 3) == (
        "── 1 of 4: a.jsonl, line 1 ──\n"
        "prompt    <bos>1+1?\nchosen    ⟦2<eos>⟧\nrejected  ⟦3<eos>⟧\n\n"
        "── 2 of 4: a.jsonl, line 2 ──\n"
        "prompt  <bos><user>1+1?<assistant>\nrank 1  ⟦2<eos>⟧\nrank 2  ⟦two<eos>⟧\nrank 3  ⟦3<eos>⟧\n\n"
        "── 3 of 4: a.jsonl, line 3 ──\n"
        "prompt       <bos>1+1?\nundesirable  ⟦3<eos>⟧\n\n"
        "Rows: 5 read (2 pair, 1 ranked list, 1 labelled completion).\n"
        "Duplicates: 1 rows equal an earlier one.\n"
        "1 rows without a better completion are left out.\n"
        "Columns that were not used: source.\n"
    )


def test_turns_that_are_scored(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tiny.save_tokenizer(tmp_path / "tokenizer", eos="<|im_end|>", template=tiny.CHATML)
    again = [{"role": "user", "content": "So?"}, {"role": "assistant", "content": "2"}]
    rows = [{"chosen": [ASK, CALL, *again], "rejected": [ASK, {"role": "assistant", "content": "3"}]}]
    file = write_rows(tmp_path / "a.jsonl", rows)
    printed = preview(capsys, "--data", file, "--tokenizer", folder)
    lines = [line.strip() for line in printed.splitlines()]
    assert "chosen    ⟦Hm.<|im_end|>⟧" in lines and "⟦2<|im_end|>⟧" in lines
    assert "rejected  ⟦3<|im_end|>⟧" in lines
    row = {"prompt": [ASK, CALL, again[0]], "chosen": "2", "rejected": "3"}
    file = write_rows(tmp_path / "b.jsonl", [row])
    last = preview(capsys, "--data", file, "--tokenizer", folder)
    every = preview(capsys, "--data", file, "--tokenizer", folder, "--score", "assistant")
    assert "⟦Hm.<|im_end|>⟧" not in last and "⟦Hm.<|im_end|>⟧" in every
    assert last == every.replace("⟦Hm.<|im_end|>⟧", "Hm.<|im_end|>")


def test_rows_that_are_imitated_and_documents(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    answered = [ASK, CALL, ASK, {"role": "assistant", "content": "2"}]
    files = [
        write_rows(tmp_path / "a.jsonl", [{"messages": answered}]),
        write_rows(tmp_path / "b.jsonl", [{"text": "1+1=2", "loss_masking_spans": [[0, 4]]}]),
        write_rows(tmp_path / "c.jsonl", [{"text": "1+1=2, 1+2=3, 1+3=4"}]),
    ]
    assert preview(capsys, "--data", *files, "--preview", 9, "--max-length", 18) == (
        "── 1 of 4: a.jsonl, line 1 ──\n"
        "prompt      <bos><user>1+1?<assistant>⟦Hm.<user>⟧1+1?<assistant>\ncompletion  ⟦2<eos>⟧\n\n"
        "── 2 of 4: b.jsonl, line 1 ──\n"
        "prompt      <bos>\ncompletion  1+1=⟦2<eos>⟧\n\n"
        "── 3 of 4: c.jsonl, line 1 ──\n"
        "prompt  <bos>\ntext    ⟦1+1=2, 1+2=3, 1+3⟧\n\n"
        "── 4 of 4: c.jsonl, line 1 ──\n"
        "prompt  <bos>\ntext    ⟦=4<eos>⟧\n\n"
        "Rows: 3 read (1 dialogue, 1 text with masked spans, 1 text).\n"
        "1 example became several, for the text is longer than the maximum.\n"
    )


KINDS = [
    ("preference", "prompt    <bos>q\nchosen    ⟦a<eos>⟧\nrejected  ⟦b<eos>⟧"),
    ("unpaired_preference", "prompt     <bos>q\ndesirable  ⟦a<eos>⟧"),
    ("prompt_completion", "prompt      <bos>q\ncompletion  ⟦a<eos>⟧"),
]


@pytest.mark.parametrize(("kind", "first"), KINDS)
def test_preferences_as_another_kind(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str, first: str
) -> None:
    file = write_rows(tmp_path / "a.jsonl", [{"prompt": "q", "chosen": "a", "rejected": "b"}])
    assert preview(capsys, "--data", file, "--kind", kind).partition("──\n")[2].startswith(first + "\n\n")


def test_rows_that_are_too_long_or_bad(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"prompt": "q" * 9, "completion": "a"}, {"prompt": "q", "completion": "b"}, {"prompt": "q"}]
    options = ("--data", write_rows(tmp_path / "a.jsonl", rows), "--on-bad-row", "skip", "--max-length", 8)
    assert "Left out of 2 examples: 1 longer than the maximum." in preview(
        capsys, *options, "--on-long", "drop"
    )
    refused = preview(capsys, *options, "--on-long", "error")
    assert "1 rows could not be tokenized; the first: a.jsonl, line 1: a row should have at most 8" in refused
    assert "prompt      <bos>qqq\n" in preview(capsys, *options, "--max-prompt-length", 4)


def test_characters_and_white_space_at_the_borders_of_scored_parts() -> None:
    text = list("é ".encode())
    example = TokenizedExample(
        (256, *text), ((*text, 257), (257,)), scored=((False,) * 4 + (True,) * 4, (False,) * 4 + (True,))
    )
    assert format_example(example, BYTES) == "prompt    <bos>é \nchosen    ⟦é <eos>⟧\nrejected  ⟦<eos>⟧"
    assert format_example(example, BYTES, is_coloured=True).count("\x1b[32m⟦") == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--data", "no.jsonl"], "the path should be a file, but 'no.jsonl' does not exist: check the path."),
        (["--data", "a.jsonl", "--columns", "chosen"], "--columns should hold pairs like prompt=question"),
        (["--data", "a.jsonl", "--columns", "best=chosen"], "the names are prompt, chosen, rejected"),
        (["--data", "a.jsonl", "--preview", "-1"], "--preview should be 0 or more, but it is -1: see"),
        (
            ["--data", "a.jsonl", "--chat-template", "no.jinja"],
            "--chat-template should be a file with a template",
        ),
        (
            ["--data", "a.jsonl", "--chat-template-kwargs", "[1]"],
            "--chat-template-kwargs should be a JSON object",
        ),
        (
            ["--data", "a.jsonl", "--chat-template-kwargs", "{}"],
            "template_arguments needs a Hugging Face tokenizer",
        ),
        (["--data", "a.jsonl", "--max-length", "3"], "--max-length should be an integer of at least 8"),
        (
            ["--data", "a.jsonl", "--max-prompt-length", "512"],
            "--max-prompt-length should be an integer from 1",
        ),
        (
            ["--data", "a.jsonl", "--kind", "language_modeling"],
            "a row should have 'text' (language_modeling)",
        ),
        (["--data", "a.jsonl", "--tokenizer", "/no/where"], "the tokenizer should be a folder"),
    ],
)
def test_bad_input_ends_in_one_sentence(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    options: list[str],
    message: str,
) -> None:
    write_rows(tmp_path / "a.jsonl", [{"prompt": "Q", "chosen": "A", "rejected": "B"}])
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as exit_:
        cli.main(["prepare", *options])
    printed = capsys.readouterr()
    assert exit_.value.code == 2 and not printed.out
    assert message in " ".join(printed.err.replace("│", " ").split())


def test_messages_say_which_role_is_unknown() -> None:
    with pytest.raises(
        ValueError, match="the role should be one of system, developer, user, assistant, tool"
    ):
        Message("narrator", "Q")
