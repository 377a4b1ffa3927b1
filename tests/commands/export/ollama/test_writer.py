"""The folder for Ollama: its files, what is refused, and what the check finds out."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from dpo_wrapper.commands.export.agreement import ExportError, compute_outputs
from dpo_wrapper.commands.export.config import ExportConfig
from dpo_wrapper.commands.export.exported import Exported
from dpo_wrapper.commands.export.gguf.model_file import write_base_gguf
from dpo_wrapper.commands.export.ollama.bos import adds_bos_token
from dpo_wrapper.commands.export.ollama.modelfile import parse_modelfile
from dpo_wrapper.commands.export.ollama.writer import name_model, write_ollama
from dpo_wrapper.commands.export.source import ExportSource
from dpo_wrapper.data import ByteTokenizer, HuggingFaceTokenizer
from dpo_wrapper.pretrained import PretrainedModel, load_pretrained
from helpers.exported_models import save_base, save_lora
from helpers.exports import export_to
from helpers.models import seeded
from helpers.ollama_templates import DEFAULT_SYSTEM, OWN, build_tokenizer
from helpers.tokenizers import CHATML, TRIMS

pytest.importorskip("gguf")

KINDS = {**OWN, "none": (None, "<s>", "</s>"), "trims": (TRIMS, None, "<|im_end|>")}


def put_bos_in_front(tokenizer: Any) -> Any:
    """The same tokenizer, which puts its BOS in front of every text."""
    from tokenizers import processors

    bos = tokenizer.bos_token
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, tokenizer.bos_token_id)]
    )
    return tokenizer


def make_source(
    name: str = "chatml_default",
    *,
    puts_bos: bool = False,
    as_chat: str = "auto",
) -> ExportSource:
    """A tiny Llama with a tokenizer of a kind, as a trained run of it is loaded."""
    from transformers import LlamaConfig, LlamaForCausalLM

    template, bos, eos = KINDS[name]
    built = build_tokenizer(template, bos, eos)
    tokenizer = HuggingFaceTokenizer(put_bos_in_front(built) if puts_bos else built)
    with seeded(0):
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=tokenizer.vocab_size,
                hidden_size=32,
                intermediate_size=48,
                num_hidden_layers=1,
                num_attention_heads=4,
                num_key_value_heads=2,
                eos_token_id=tokenizer.eos_id,
            )
        ).eval()
    source = ExportSource(
        "runs/My Run!", PretrainedModel(model, tokenizer, "", None), {"settings": {"as_chat": as_chat}}, ()
    )
    prompts = (" Hello there, who?\n", 'Say {{ "x" }}.', "What is <|im_end|>?")
    return replace(
        source, outputs=tuple(compute_outputs(model, tokenizer, prompts, 2, as_chat=source.is_chat))
    )


def make_config(folder: Path, **options: Any) -> ExportConfig:
    dtype = {} if options.get("adapter") else {"dtype": "float32"}
    options = {"model": "run", "to": ("ollama",), "out": folder, **dtype, **options}
    return ExportConfig(**options)


def export(source: ExportSource, folder: Path, **options: Any) -> Exported:
    return write_ollama(source, folder, make_config(folder, **options))


def test_folder_is_read_back(tmp_path: Path) -> None:
    source = make_source()
    exported = export(source, tmp_path)
    modelfile = parse_modelfile((tmp_path / "Modelfile").read_text())
    assert (tmp_path / modelfile.base).is_file() and not modelfile.adapter
    assert modelfile.system == "You are a tiny helper."
    assert modelfile.stops == ("<|im_end|>",)
    agreements, _ = exported.read_back(source.outputs)
    assert agreements[0].num_equal == 6
    assert list(exported.usage) == [
        f"ollama create my-run -f {tmp_path / 'Modelfile'}",
        "ollama run my-run",
    ]


def test_end_tokens_of_the_generation_settings_are_stops(tmp_path: Path) -> None:
    source = make_source("zephyr")
    model: Any = source.pretrained.model
    ids = source.tokenizer.tokenizer.convert_tokens_to_ids(["<|im_end|>", "<pad>"])  # type: ignore[attr-defined]
    model.generation_config.eos_token_id = ids
    export(source, tmp_path)
    assert parse_modelfile((tmp_path / "Modelfile").read_text()).stops == ("</s>", "<|im_end|>", "<pad>")


@pytest.mark.parametrize("puts_bos", [False, True])
def test_bos_is_written_once(tmp_path: Path, puts_bos: bool) -> None:
    source = make_source("mistral", puts_bos=puts_bos)
    exported = export(source, tmp_path)
    assert adds_bos_token(tmp_path / "model.gguf") == puts_bos
    template = parse_modelfile((tmp_path / "Modelfile").read_text()).template
    assert template.startswith("<s>") == (not puts_bos)
    exported.read_back(source.outputs)


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        ("FROM ./model.gguf", "FROM ./other.gguf", "as its base, but"),
        ("PARAMETER stop <|im_end|>\n", "", "as its stops, but"),
        ("{{ .Content }}<|im_end|>", "{{ .Content }}", "as its template, but"),
        ("SYSTEM", "LICENSE", "commands of an export"),
        ('SYSTEM """You', 'SYSTEM """Are you', "as its system, but"),
    ],
)
def test_changed_modelfile_is_found_out(tmp_path: Path, old: str, new: str, problem: str) -> None:
    source = make_source()
    exported = export(source, tmp_path)
    file = tmp_path / "Modelfile"
    assert old in file.read_text()
    file.write_text(file.read_text().replace(old, new))
    with pytest.raises(ExportError, match=problem):
        exported.read_back(source.outputs)


@pytest.mark.parametrize("puts_bos", [False, True])
def test_wrong_flag_in_the_file_is_found_out(tmp_path: Path, puts_bos: bool) -> None:
    """A file that adds a BOS where TEMPLATE has one, or none where there is none."""
    from gguf import GGUFReader

    source = make_source("mistral", puts_bos=puts_bos)
    exported = export(source, tmp_path)
    field = GGUFReader(tmp_path / "model.gguf", "r+").fields["tokenizer.ggml.add_bos_token"]
    field.parts[field.data[0]][0] = not puts_bos
    with pytest.raises(
        ExportError, match=r"begins with it: do not use it|tokens that the model was trained on"
    ):
        exported.read_back(source.outputs)


def test_white_space_that_a_chat_template_removes_is_no_difference(tmp_path: Path) -> None:
    source = make_source("trims")
    exported = export(source, tmp_path)
    exported.read_back(source.outputs)
    assert "white space" in exported.notes[-1]


def test_model_of_plain_texts_gets_them_as_they_are(tmp_path: Path) -> None:
    source = make_source(as_chat="never")
    exported = export(source, tmp_path)
    modelfile = parse_modelfile((tmp_path / "Modelfile").read_text())
    assert (modelfile.template, modelfile.system) == ("{{ .Prompt }}", "")
    assert modelfile.stops == ("<|im_end|>",)
    assert "not trained on dialogues" in exported.notes[-1]
    exported.read_back(source.outputs)


def test_turns_without_a_chat_template(tmp_path: Path) -> None:
    source = make_source("none", as_chat="always", puts_bos=True)
    exported = export(source, tmp_path)
    template = parse_modelfile((tmp_path / "Modelfile").read_text()).template
    assert "\n\nHuman: {{ .Content }}" in template
    exported.read_back(source.outputs)


def refuse_to_write(*_: Any) -> Exported:
    raise AssertionError("nothing should be written")


def test_refuses_before_anything_is_written(tmp_path: Path) -> None:
    config = make_config(tmp_path)
    with pytest.raises(ValueError, match="write the TEMPLATE by hand"):
        write_ollama(make_source("counted"), tmp_path, config, refuse_to_write)
    source = make_source()
    bytes_source = replace(source, pretrained=replace(source.pretrained, tokenizer=ByteTokenizer()))
    with pytest.raises(ValueError, match="reads bytes: use --to merged"):
        write_ollama(bytes_source, tmp_path, config, refuse_to_write)
    with pytest.raises(ValueError, match="--base is missing"):
        write_ollama(source, tmp_path, make_config(tmp_path, adapter=True), refuse_to_write)
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A LoRA adapter, and the GGUF file of its base."""
    pytest.importorskip("peft")
    folder = tmp_path_factory.mktemp("ollama")
    base = save_base(folder / "base", template=DEFAULT_SYSTEM + CHATML)
    pretrained = load_pretrained(str(base), None, 1)
    write_base_gguf(pretrained.model, pretrained.tokenizer, folder / "base file.gguf", "float32")
    return save_lora(folder / "lora", base), folder / "base file.gguf"


def test_adapter_stands_on_a_file_of_its_base(
    adapter: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lora, base = adapter
    assert export_to(tmp_path, lora, "ollama", adapter=True, base=base) == 0
    folder = tmp_path / "ollama"
    assert f"ollama create lora -f {folder / 'Modelfile'}" in capsys.readouterr().out
    modelfile = parse_modelfile((folder / "Modelfile").read_text())
    assert (modelfile.base, modelfile.adapter) == (str(base), "./adapter.gguf")
    assert (folder / modelfile.adapter).is_file()
    assert modelfile.system == "You are a tiny helper."


def test_lost_adapter_is_found_out(adapter: tuple[Path, Path], tmp_path: Path) -> None:
    lora, base = adapter
    config = make_config(tmp_path, model=str(lora), adapter=True, base=base, num_tokens=2)
    source = ExportSource.load(config).answer(config)
    exported = write_ollama(source, tmp_path, config)
    exported.read_back(source.outputs)
    file = tmp_path / "Modelfile"
    file.write_text(file.read_text().replace("ADAPTER ./adapter.gguf\n", ""))
    with pytest.raises(ExportError, match=r"'./adapter\.gguf' as its adapter, but"):
        exported.read_back(source.outputs)


def test_whole_model_with_an_adapter_is_merged(adapter: tuple[Path, Path], tmp_path: Path) -> None:
    assert export_to(tmp_path, adapter[0], "merged", "gguf", "ollama", dtype="float32") == 0
    folder = tmp_path / "ollama"
    assert parse_modelfile((folder / "Modelfile").read_text()).base == "./model.gguf"
    assert (folder / "model.gguf").read_bytes() == (tmp_path / "gguf" / "model.gguf").read_bytes()


@pytest.mark.parametrize("is_adapter", [False, True])
def test_folder_is_loaded_again(adapter: tuple[Path, Path], tmp_path: Path, is_adapter: bool) -> None:
    lora, base = adapter
    options: dict[str, Any] = {"adapter": True, "base": base} if is_adapter else {}
    assert export_to(tmp_path, lora, "ollama", "merged", dtype="float32", **options) == 0
    models = [load_pretrained(str(folder), None, 1) for folder in (tmp_path / "ollama", tmp_path / "merged")]
    ids = torch.tensor([models[0].tokenizer.encode("Hello there")])
    logits, expected = (one.model.eval()(ids).logits for one in models)
    assert torch.allclose(logits, expected, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("runs/DPO of Llama-3.2", "dpo-of-llama-3.2"),
        ("org/Model_1", "model_1"),
        ("/", "model"),
        ("ü", "model"),
    ],
)
def test_name_is_one_that_ollama_takes(name: str, expected: str) -> None:
    assert name_model(name) == expected
    assert re.fullmatch(r"[a-z0-9][a-z0-9._-]*", expected)
