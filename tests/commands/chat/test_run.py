"""`dpo-wrapper chat`: one answer, and a conversation."""

import os
import pty
import select
import signal
import sys

import pytest

from dpo_wrapper.cli import main
from dpo_wrapper.commands.chat import run
from dpo_wrapper.commands.chat.config import ChatConfig
from dpo_wrapper.commands.chat.run import Chat, run_chat
from dpo_wrapper.display.terminal import replace_controls
from dpo_wrapper.evaluation.generate import generate, list_end_ids
from dpo_wrapper.evaluation.sampling import Sampling
from dpo_wrapper.pretrained import load_pretrained
from dpo_wrapper.training.train import train
from helpers.lora_runs import make_lora_config
from helpers.runs import QUICK


def make_config(model, **options):
    return ChatConfig(model=str(model), **({"max_new_tokens": 6, "cpu": True} | options))


def complete(folder, prompt, sampling=None):
    pretrained = load_pretrained(str(folder), None, 128)
    tokenizer = pretrained.tokenizer
    ids = tokenizer.encode_prompt(prompt)
    options = {"sampling": sampling, "max_positions": pretrained.max_positions}
    [completion] = generate(pretrained.model, [ids], 6, list_end_ids(tokenizer), **options)
    return replace_controls(tokenizer.decode(completion))


@pytest.fixture
def type_lines(monkeypatch):
    """Lines that are typed; at an exception it is raised, and at the end the input has ended."""

    def typed(*lines):
        rest = iter(lines)

        def read_line(_):
            line = next(rest, EOFError())
            if isinstance(line, BaseException):
                raise line
            return line

        monkeypatch.setattr("builtins.input", read_line)

    return typed


@pytest.mark.parametrize("folder", ["llama", "decoder"])
def test_one_answer_is_that_of_generate_and_nothing_else(folder, request, capsys):
    folder = request.getfixturevalue(folder)
    main(["chat", str(folder), "--prompt", "Hello", "--max-new-tokens", "6", "--cpu"])
    assert capsys.readouterr().out == complete(folder, "Hello") + "\n"
    options = ["--temperature", "0.8", "--top-p", "0.9", "--seed", "3"]
    main(["chat", str(folder), "--prompt", "Hello", "--max-new-tokens", "6", "--cpu", *options])
    expected = complete(folder, "Hello", Sampling(temperature=0.8, top_p=0.9, seed=3))
    assert capsys.readouterr().out == expected + "\n"


def test_a_conversation_goes_on_until_it_is_reset(llama, type_lines, monkeypatch, capsys):
    prompts = []

    def answer(model, prompt, tokenizer, max_new_tokens, show, **options):
        prompts.append(tokenizer.decode(prompt, skip_special_tokens=False))
        show(f"answer {len(prompts)}")
        return f"answer {len(prompts)}", False

    monkeypatch.setattr(run, "stream_answer", answer)
    type_lines(
        "one", "", "two", "/reset", "/frob", "/help", "/etc/passwd?", KeyboardInterrupt(), "/exit", "never"
    )
    run_chat(make_config(llama, as_chat="always", system="s"))
    assert prompts == [
        "<bos><system>s<user>one<assistant>",
        "<bos><system>s<user>one<assistant>answer 1<user>two<assistant>",
        "<bos><system>s<user>/etc/passwd?<assistant>",
    ]
    out = capsys.readouterr().out
    known = "/help lists the commands, /reset forgets the conversation, /exit leaves"
    assert f"{llama}: {known}\n" in out
    help = f"{known}; Ctrl-C stops an answer, Ctrl-D leaves"
    assert f"answer 1\n\nanswer 2\n\n(/frob is no command: {known})\n{help}\nanswer 3" in out
    assert out.endswith("answer 3\n\n\n(Ctrl-D leaves)\n")


def test_a_stopped_answer_is_remembered_as_far_as_it_went(llama, monkeypatch, capsys):
    chat = Chat(make_config(llama, as_chat="always"))
    for text, remembered in (("", 0), ("so far", 2)):
        monkeypatch.setattr(run, "stream_answer", lambda *args, text=text, **options: (text, True))
        assert chat.answer("Hello") and len(chat.conversation.turns) == remembered
    monkeypatch.setattr(run, "stream_answer", lambda *args, **options: ("so far", True))
    with pytest.raises(SystemExit) as stopped:
        main(["chat", str(llama), "--prompt", "Hello", "--cpu"])
    assert stopped.value.code == 130 and capsys.readouterr().err.endswith("dpo-wrapper: interrupted.\n")


def test_ctrl_c_before_the_first_token_leaves_the_conversation(llama, type_lines, monkeypatch, capsys):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(Chat, "answer", interrupt)
    type_lines("Hello")
    run_chat(make_config(llama))
    assert capsys.readouterr().out.endswith("(stopped)\n\n\n")


def test_the_reference_answers_the_same_message(llama, decoder, capsys):
    run_chat(make_config(llama, prompt="Hello", reference_model=str(decoder)))
    policy, reference = complete(llama, "Hello"), complete(decoder, "Hello")
    assert policy != reference
    assert capsys.readouterr().out == f"model      {policy}\nreference  {reference}\n"


@pytest.mark.slow
def test_an_adapter_answers_beside_the_model_without_it(rows, llama, tmp_path, capsys):
    pytest.importorskip("peft")
    train(make_lora_config(rows, tmp_path / "run", llama, **QUICK))
    capsys.readouterr()
    run_chat(make_config(tmp_path / "run", prompt="Hello", reference=True))
    policy, reference = complete(tmp_path / "run", "Hello"), complete(llama, "Hello")
    assert policy != reference
    assert capsys.readouterr().out == f"model      {policy}\nreference  {reference}\n"


@pytest.mark.parametrize(
    "options, problem",
    [
        ({"reference": True}, "^--reference should have a model to show, but there is none, for .* is no tr"),
        ({"system": "s"}, "^--system should stand in a dialogue, but .* has no chat template: leave it out"),
    ],
)
def test_what_a_model_has_not_is_refused(options, problem, llama):
    with pytest.raises(ValueError, match=problem):
        Chat(make_config(llama, **options))


def test_what_does_not_fit_is_said(llama, monkeypatch, capsys):
    chat = Chat(make_config(llama))
    monkeypatch.setattr(type(chat.pair.policy), "max_positions", 16)
    bos = chat.pair.tokenizer.bos_id
    assert chat.encode("123456789") == [bos, *b"123456789"] and capsys.readouterr().err == ""
    assert chat.encode("123456789ab") == [*b"23456789ab"]
    expected = "(the earliest 2 of 12 tokens are left out, for the model has 16 positions)\n"
    assert capsys.readouterr().err == expected


def test_the_earliest_turns_of_a_conversation_are_left_out(llama, monkeypatch, capsys):
    chat = Chat(make_config(llama, as_chat="always", system="s"))
    monkeypatch.setattr(type(chat.pair.policy), "max_positions", 20)
    chat.conversation.add("one", "two")
    chat.conversation.add("3", "4")
    text = chat.pair.tokenizer.decode(chat.encode("five"), skip_special_tokens=False)
    assert text == "<bos><system>s<user>3<assistant>4<user>five<assistant>"
    expected = "(the earliest 8 of 21 tokens are left out, for the model has 20 positions)\n"
    assert capsys.readouterr().err == expected


def test_what_a_terminal_would_obey_is_not_printed(capsys):
    run.print_piece("\x1b[2Ja\rb\x07\u202e\u2028 c\n\té 👩\u200d🚀\u3000")
    expected = "\ufffd[2Ja\ufffdb\ufffd\ufffd\ufffd c\n\té 👩\u200d🚀\u3000"
    assert capsys.readouterr().out == expected


def test_bytes_that_are_no_text_are_replaced(llama, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda _: " h\udcff\u00e9 ")
    assert run.read_message() == "h\ufffd\u00e9"


class Terminal:
    """A command in a pseudo-terminal."""

    def __init__(self, *command):
        self.pid, self.descriptor = pty.fork()
        if not self.pid:
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # a background job of a shell ignores it
            os.execv(sys.executable, [sys.executable, "-m", "dpo_wrapper", *command])
        self.text = ""

    def wait_for(self, expected):
        """Read until a text comes; what was before it is not read again."""
        while expected not in self.text:
            self.read()
        before, _, self.text = self.text.partition(expected)
        return before

    def wait_for_answer(self):
        while not self.text:
            self.read()

    def read(self):
        assert select.select([self.descriptor], [], [], 120)[0], self.text
        try:
            self.text += os.read(self.descriptor, 4096).decode(errors="replace")
        except OSError:
            raise AssertionError(f"it has ended: {self.text}") from None

    def type(self, text):
        os.write(self.descriptor, text.encode())

    def type_until(self, text, expected):
        """Type a text again and again: a signal between a prompt and the wait for a line is not seen."""
        while expected not in self.text:
            self.type(text)
            while expected not in self.text and select.select([self.descriptor], [], [], 2)[0]:
                self.read()
        self.wait_for(expected)

    def exit_status(self):
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


@pytest.mark.slow
def test_a_conversation_in_a_terminal(llama):
    terminal = Terminal("chat", str(llama), "--as-chat", "always", "--max-new-tokens", "20000", "--cpu")
    assert "/reset forgets the conversation, /exit leaves" in terminal.wait_for("> ")
    terminal.type("Hello\n")
    terminal.wait_for("Hello\r\n")
    terminal.wait_for_answer()
    terminal.type("\x03")
    assert "^C" in terminal.wait_for("(stopped)\r\n\r\n> ")
    terminal.type("/reset\n")
    terminal.wait_for("> ")
    terminal.type_until("\x03", "(Ctrl-D leaves)\r\n> ")
    terminal.type("\x04")
    assert terminal.exit_status() == 0
