"""Two responses and a column that says which one is better."""

from collections.abc import Sequence
from typing import Any

from dpo_wrapper.data.errors import ExampleError, describe_value
from dpo_wrapper.data.rows.comparison import Comparison, TiedRowError, parse_label, parse_score
from dpo_wrapper.data.rows.messages import json_or_text
from dpo_wrapper.data.rows.row import Row

SIDE_NAMES = [
    ("response_1", "response_2"), ("response1", "response2"), ("response_0", "response_1"),
    ("response_a", "response_b"), ("answer_a", "answer_b"), ("output_1", "output_2"),
    ("completion_a", "completion_b"), ("conversation_a", "conversation_b"), ("answer_0", "answer_1"),
]  # fmt: skip
CHOICE_NAMES = (
    "preference", "overall_preference", "winner", "label", "better_response_id", "choice", "chosen_response",
    "preferred",
)  # fmt: skip


def find_choice(row: Row) -> Comparison | None:
    """Two responses and which one is better, as in arenas and HelpSteer3."""
    names = next(((one, other) for one, other in SIDE_NAMES if one in row and other in row), None)
    if names is None:
        return None
    better = find_better(row, names)
    ordered = names if better == 0 else names[::-1]
    form = "two responses and a choice"
    prompts, *answers = (json_or_text(row.get(name)) for name in ("prompt", *ordered))
    if all(is_texts(texts) and len(texts) == len(prompts) for texts in (prompts, *answers)):
        # Arenas that write the turns of each speaker as a list.
        dialogues = {
            name: join_speakers(row.get_json("prompt"), texts)
            for name, texts in zip(ordered, answers, strict=True)
        }
        row.used.update(ordered)
        return Comparison(form, dialogues, prompt_fields=("",))
    return Comparison(form, {name: row[name] for name in ordered})


def is_texts(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and all(isinstance(text, str) for text in value) and bool(value)


def join_speakers(questions: Sequence[str], answers: Sequence[str]) -> list[dict[str, str]]:
    """The messages of a dialogue from the texts of its two speakers."""
    return [
        {"role": role, "content": text}
        for pair in zip(questions, answers, strict=True)
        for role, text in zip(("user", "assistant"), pair, strict=True)
    ]


def find_better(row: Row, names: tuple[str, str]) -> int:
    """0 or 1: which of the two responses is better."""
    winners = ("winner_model_a", "winner_model_b")
    if all(name in row for name in winners):
        wins = [parse_label(row[name], name) for name in winners]
        if wins[0] == wins[1]:
            raise TiedRowError
        return wins.index(True)
    field = row.first_of(*CHOICE_NAMES)
    if field is None:
        problem = f"a row with '{names[0]}' and '{names[1]}' should say which is better"
        raise ExampleError(
            f"{problem}, but no column does: add 'preference' with the name of the better one."
        )
    value = row[field]
    if field == "overall_preference":  # from -3, the first is much better, to 3
        number = parse_score(value, field)
        if number == 0:
            raise TiedRowError
        return int(number > 0)
    spelled = str(value).strip().lower()
    if spelled.startswith(("tie", "both", "equal", "none")):
        raise TiedRowError
    endings = [name.rpartition("_")[2] if "_" in name else name[-1] for name in names]
    spellings = [
        {name, ending, f"model_{ending}", f"response_{ending}"}
        for name, ending in zip(names, endings, strict=True)
    ]
    matches = [k for k in (0, 1) if spelled in spellings[k]]
    if not matches:
        problem = f"the choice should name one of the two, such as '{names[0]}' or {endings[0]}"
        raise ExampleError(
            f"{problem}, but it is {describe_value(value)}: correct it, or leave the row out.", field
        )
    return matches[0]
