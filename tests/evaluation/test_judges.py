"""What a judge is by its name, and what its scores are."""

import pytest
import torch

from dpo_wrapper.data import Message
from dpo_wrapper.evaluation import reward
from dpo_wrapper.evaluation.judges import load_judge
from dpo_wrapper.evaluation.prompts import Prompt, format_prompt
from helpers.tokenizers import save_tokenizer

DIALOGUE = (
    Message("system", "Be kind."),
    Message("user", "Hi"),
    Message("assistant", "Hello"),
    Message("user", "So?"),
)
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture
def rules(tmp_path):
    path = tmp_path / "rules.py"
    path.write_text(
        "LIMIT = 3\n"
        "def brevity(prompt, completion): return -len(completion)\n"
        "def word(prompt, completion): return 'good'\n"
        "def fails(prompt, completion): return 1 / (len(completion) - LIMIT)\n"
        "def nan(prompt, completion): return float('nan')\n"
    )
    return path


def test_a_function_of_a_file_or_a_module_is_a_judge(rules, monkeypatch):
    judge, seen = load_judge(f"{rules}:brevity"), []
    assert judge.score(["a", DIALOGUE], ["xy", ""], seen.append) == [-2.0, 0.0] and seen == [1, 1]
    assert judge.name == f"{rules}:brevity"
    monkeypatch.syspath_prepend(str(rules.parent))
    assert load_judge("rules:brevity").score(["a"], ["xyz"]) == [-3.0]


def test_a_dialogue_is_given_as_text():
    assert format_prompt("plain") == "plain" and format_prompt((Message("user", "Hi"),)) == "Hi"
    assert format_prompt(DIALOGUE) == "System: Be kind.\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: So?"


def test_functions_that_give_no_number_or_are_not_there_are_refused(rules, tmp_path):
    with pytest.raises(ValueError, match="finite number for each completion, but it gave 'good': correct it"):
        load_judge(f"{rules}:word").score(["a"], ["b"])
    with pytest.raises(ValueError, match="but it gave nan"):
        load_judge(f"{rules}:nan").score(["a"], ["b"])
    with pytest.raises(ValueError, match="but it raised ZeroDivisionError"):
        load_judge(f"{rules}:fails").score(["a"], ["abc"])
    with pytest.raises(ValueError, match="names no function of that file or module"):
        load_judge(f"{rules}:LIMIT")
    with pytest.raises(ValueError, match="names no file that is there"):
        load_judge(f"{tmp_path}/none.py:brevity")
    with pytest.raises(ValueError, match="names no module that is there"):
        load_judge("no_such_rules:brevity")


def save_reward_model(folder, template=None, num_labels=1, **options):
    from transformers import LlamaConfig, LlamaForSequenceClassification

    torch.manual_seed(0)
    sizes = dict(vocab_size=450, hidden_size=16, intermediate_size=32, num_hidden_layers=1)
    config = LlamaConfig(
        **sizes,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_labels=num_labels,
        initializer_range=0.5,
        max_position_embeddings=64,
        **options,
    )
    LlamaForSequenceClassification(config).save_pretrained(folder)
    save_tokenizer(folder, template=template)
    return folder


@pytest.mark.parametrize("pad", [None, 2])
def test_a_reward_model_reads_dialogues_by_its_own_template(tmp_path, pad):
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    folder = save_reward_model(tmp_path / "rm", CHATML, pad_token_id=pad)
    judge = load_judge(str(folder))
    prompts: list[Prompt] = ["Where?", DIALOGUE, "Where?"]
    answers = ["Here.", "So it is.", "Hear."]
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    expected = []
    for prompt, answer in zip(prompts, answers, strict=True):
        turns = (Message("user", prompt),) if isinstance(prompt, str) else prompt
        messages: list[dict] = [{"role": turn.role, "content": turn.content} for turn in turns]
        text = tokenizer.apply_chat_template(
            [*messages, {"role": "assistant", "content": answer}], tokenize=False
        )
        inputs = tokenizer(text, return_tensors="pt", add_special_tokens=False)
        expected.append(model(**inputs).logits.item())
    assert judge.score(prompts, answers) == pytest.approx(expected, abs=1e-5)
    assert len(set(expected)) == 3 and judge.num_cut == 0
    judge.score(["Where? " * 60], ["Here."])
    assert judge.num_cut == 1


def test_a_reward_model_without_a_template_reads_a_pair_of_texts(tmp_path):
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    folder = save_reward_model(tmp_path / "rm")
    model, tokenizer = (
        auto.from_pretrained(folder) for auto in (AutoModelForSequenceClassification, AutoTokenizer)
    )
    expected = model(**tokenizer("Where?", "Here.", return_tensors="pt")).logits.item()
    judge = load_judge(str(folder))
    assert judge.score(["Where?"], ["Here."]) == pytest.approx([expected], abs=1e-5)
    one, other = (judge.score(["Where? " * count], ["Here."]) for count in (60, 90))
    assert one == pytest.approx(other) and judge.num_cut == 2


def test_models_that_are_no_reward_models_are_refused(tmp_path, llama):
    with pytest.raises(ValueError, match=r"has no weights for .*score.* it is a language model"):
        load_judge(str(llama))
    with pytest.raises(ValueError, match=r"with one output, but .* has 2"):
        load_judge(str(save_reward_model(tmp_path / "two", num_labels=2)))
    with pytest.raises(ValueError, match=r"--judge should be .* could not be loaded"):
        load_judge(str(tmp_path / "none"))


def test_an_implicit_judge_has_the_rewards_of_a_run(lora_run, llama):
    judge = load_judge(f"implicit:{lora_run}")
    prompts, answers = ["a", (Message("user", "a"),), "b"], ["x", "x", ""]
    expected = [
        reward(str(lora_run), None, prompt, answer) for prompt, answer in zip(prompts, answers, strict=True)
    ]
    assert judge.score(prompts, answers) == pytest.approx(expected, abs=1e-5)
    assert judge.score([], []) == []
    with pytest.raises(ValueError, match="should be a run with a reference, but it has none"):
        load_judge(f"implicit:{llama}")
