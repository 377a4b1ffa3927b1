"""Modelfiles are written so that Ollama reads them back."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dpo_wrapper.commands.export.ollama.modelfile import Modelfile, can_hold, parse_modelfile


def test_commands() -> None:
    modelfile = Modelfile("/a b/base.gguf", 'x\n"y" ', ("<|end|>", "\n\nHuman:"), "Be kind.\n", "./a.gguf")
    assert modelfile.format() == (
        "FROM /a b/base.gguf\n"
        "ADAPTER ./a.gguf\n"
        'TEMPLATE """x\n"y" """\n'
        'SYSTEM """Be kind.\n"""\n'
        "PARAMETER stop <|end|>\n"
        'PARAMETER stop """\n\nHuman:"""\n'
    )


@pytest.mark.parametrize(
    "text", ['a"""', 'a """ b', '"', 'a"', '"a"', '""" """', "PARAMETER stop x\nFROM y", "#"]
)
def test_quotes(text: str) -> None:
    modelfile = Modelfile("./model.gguf", text, (text,), text)
    assert parse_modelfile(modelfile.format()) == modelfile


@pytest.mark.parametrize("text", ['a"""\nb', 'a""" \nb', "zero\u200bwidth", "bell\x07"])
def test_refuses_what_ollama_reads_otherwise(text: str) -> None:
    with pytest.raises(ValueError, match="write the Modelfile by hand"):
        Modelfile("./model.gguf", "x", ("y",), text).format()
    assert not can_hold(text)


@given(st.text(st.sampled_from('a" \n\t{')), st.text(st.sampled_from('a" \n{'), min_size=1))
def test_what_is_written_is_read_back(text: str, stop: str) -> None:
    modelfile = Modelfile("./model.gguf", text, (stop, "</s>"), text)
    assert can_hold(text) == ('"""\n' not in re.sub("[ \t]+\n", "\n", text))
    if can_hold(text) and can_hold(stop):
        assert parse_modelfile(modelfile.format()) == modelfile


@pytest.mark.parametrize("text", ["FROM a\nLICENSE x\n", "x", "FROM a\nPARAMETER temperature 1\n"])
def test_refuses_other_commands(text: str) -> None:
    with pytest.raises(ValueError, match="commands of an export"):
        parse_modelfile(text)
