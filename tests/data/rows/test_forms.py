"""Rows as real files write them: which completion is better, what comes before it, and what is not used."""

from typing import Any

import pytest

from dpo_wrapper.data import Example, Fields, Message, to_example
from dpo_wrapper.data.rows.forms import TiedRowError
from dpo_wrapper.data.rows.row import Row


def user(text: Any, **extras: Any) -> dict[str, Any]:
    return {"role": "user", "content": text, **extras}


def bot(text: Any, **extras: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **extras}


def read(row: dict[str, Any], **columns: str) -> tuple[Example, list[str]]:
    """The example of a row, and the columns that were not used."""
    fields = Fields(**columns)
    given = Row(row, fields.renamed)
    example = to_example(given, fields)
    return example, given.unused()


def short(value: Any) -> Any:
    """A text, or turns as 's: Be brief. | u: Snow?'."""
    if isinstance(value, str):
        return value
    return " | ".join(f"{turn.role[0]}: {turn.text}" + "*" * turn.needs_template for turn in value)


SNOW, WHITE, BLUE = user("Snow?"), bot("White."), bot("Blue.")
BRIEF = {"role": "system", "content": "Be brief."}
HUMAN, GPT = {"from": "human", "value": "Snow?"}, {"from": "gpt", "value": "White."}
LINK = {"type": "function", "function": {"name": "sky", "arguments": '{"hour": 6}'}}
CALL = bot(None, tool_calls=[LINK])
RESULT = {"role": "tool", "tool_call_id": "1", "content": "red"}
ASKED, TEXT = "u: Snow?", "Snow?"
BOTH = ("White.", "Blue.")
PARTS = [{"type": "text", "text": "Sn"}, {"type": "text", "text": "ow?"}]

# the row, its prompt, its completions (the best first), the columns that were not used
PAIRS: dict[str, tuple[dict[str, Any], str, tuple[str, ...], list[str]]] = {
    "texts": ({"prompt": TEXT, "chosen": "White.", "rejected": "Blue."}, TEXT, BOTH, []),
    "messages": ({"prompt": [SNOW], "chosen": [WHITE], "rejected": [BLUE]}, ASKED, BOTH, []),
    "messages without a prompt": ({"chosen": [BRIEF, SNOW, WHITE], "rejected": [BRIEF, SNOW, BLUE]},
                                  f"s: Be brief. | {ASKED}", BOTH, []),
    "messages hold the chosen dialogue": (
        {"messages": [SNOW, WHITE], "chosen": [SNOW, WHITE], "rejected": [SNOW, BLUE], "score_chosen": 9.0},
        ASKED, BOTH, ["score_chosen"]),
    "messages hold it beside bare answers": (
        {"messages": [SNOW, WHITE], "chosen": [WHITE], "rejected": [BLUE]}, ASKED, BOTH, []),
    "the prompt holds it beside texts": (
        {"prompt": [SNOW, WHITE], "chosen": "White.", "rejected": "Blue."}, ASKED, BOTH, []),
    "the prompt holds the rejected dialogue": (
        {"prompt": [SNOW, BLUE], "chosen": [SNOW, WHITE], "rejected": [SNOW, BLUE]}, ASKED, BOTH, []),
    "UltraFeedback, binarised": (
        {"prompt": TEXT, "prompt_id": "a1", "chosen": [SNOW, WHITE], "rejected": [SNOW, BLUE],
         "messages": [SNOW, WHITE], "score_chosen": 8.5, "score_rejected": 4.0},
        ASKED, BOTH, ["prompt_id", "messages", "score_chosen", "score_rejected"]),
    "OpenAI and Azure": (
        {"input": {"messages": [BRIEF, SNOW], "tools": [], "parallel_tool_calls": True},
         "preferred_output": [WHITE], "non_preferred_output": [BLUE]}, f"s: Be brief. | {ASKED}", BOTH, []),
    "ms-swift, messages": ({"messages": [BRIEF, SNOW, WHITE], "rejected_response": "Blue."},
                           f"s: Be brief. | {ASKED}", BOTH, []),
    "ms-swift, texts that are JSON": (
        {"messages": [user("1+1?"), bot("2")], "rejected_response": "3"},
        "u: 1+1?",
        ("2", "3"),
        [],
    ),
    "ms-swift, two dialogues": ({"messages": [SNOW, WHITE], "rejected_messages": [SNOW, BLUE]}, ASKED, BOTH,
     []),
    "ms-swift, response": (
        {"system": "Be brief.", "history": [["Hello", "Hi"]], "query": TEXT, "response": "White.",
         "rejected_response": "Blue."}, f"s: Be brief. | u: Hello | a: Hi | {ASKED}", BOTH, []),
    "alpaca with an input": (
        {"instruction": "Translate to German.", "input": "snow", "chosen": "Schnee",
         "rejected": "Schneeball"},
        "Translate to German.\nsnow", ("Schnee", "Schneeball"), []),
    "alpaca without": ({"instruction": TEXT, "input": "", "chosen": "White.", "rejected": "Blue."}, TEXT,
     BOTH, []),
    "alpaca with history and system": (
        {"instruction": "And coal?", "history": [["Snow?", "White."]], "system": "Be brief.",
         "chosen": "Black.", "rejected": "Pink."},
        f"s: Be brief. | {ASKED} | a: White. | u: And coal?", ("Black.", "Pink."), []),
    "history as messages": (
        {"instruction": "And coal?", "history": [SNOW, WHITE], "chosen": "Black.", "rejected": "Pink."},
        f"{ASKED} | a: White. | u: And coal?", ("Black.", "Pink."), []),
    "an input beside a prompt": (
        {"prompt": TEXT, "input": "winter", "chosen": "White.", "rejected": "Blue."}, TEXT, BOTH, ["input"]),
    "orca's system and question": (
        {"system": "Be brief.", "question": TEXT, "chosen": "White.", "rejected": "Blue."},
        f"s: Be brief. | {ASKED}", BOTH, []),
    "an empty system": ({"system": " ", "prompt": TEXT, "chosen": "White.", "rejected": "Blue."}, TEXT, BOTH,
     []),
    "the system twice": (
        {"system": "Be brief.", "prompt": [BRIEF, SNOW], "chosen": [WHITE], "rejected": [BLUE]},
        f"s: Be brief. | {ASKED}", BOTH, []),
    "ShareGPT": (
        {"conversations": [HUMAN], "chosen": GPT, "rejected": {"from": "gpt", "value": "Blue."}}, ASKED,
         BOTH, []),
    "ShareGPT with calls": (
        {"conversations": [HUMAN, {"from": "function_call", "value": '{"name": "sky", "arguments": {}}'},
                           {"from": "observation", "value": "red"}],
         "chosen": GPT, "rejected": {"from": "gpt", "value": "Blue."}}, f"{ASKED} | a: * | t: red", BOTH, []),
    "a chosen call": ({"prompt": [SNOW], "chosen": [CALL], "rejected": [BLUE]}, ASKED, ("a: *", "Blue."), []),
    "a rejected call, content empty": (
        {"prompt": [SNOW], "chosen": [WHITE], "rejected": [bot("", tool_calls=[LINK])]}, ASKED, ("White.",
         "a: *"), []),
    "an older function_call": (
        {"prompt": [SNOW], "chosen": [bot(None, function_call=LINK["function"])], "rejected": [BLUE]},
        ASKED, ("a: *", "Blue."), []),
    "nulls of Parquet": (
        {"prompt": [user("Snow?", tool_calls=None, name=None)], "chosen": [bot("White.", tool_calls=[])],
         "rejected": [bot("Blue.", reasoning_content=None)], "tools": None, "system": None, "images": None},
        ASKED, BOTH, []),
    "keys of messages that say nothing": (
        {"prompt": [user("Snow?", id=7)], "chosen": [SNOW, bot("White.", num_tokens=2)],
         "rejected": [user("Snow?", id=8), BLUE]}, "u: Snow?", ("a: White.", "Blue."), []),
    "reasoning": ({"prompt": [SNOW], "chosen": [bot("White.", reasoning_content="Ice.")], "rejected": [BLUE]},
                  ASKED, ("a: White.*", "Blue."), []),
    "parts of text": ({"prompt": [user(PARTS)], "chosen": [bot([{"type": "text", "text": "White."}])],
                       "rejected": [bot([{"type": "output_text", "text": "Blue."}])]}, ASKED, BOTH, []),
    "messages as JSON text": (
        {"prompt": '[{"role": "user", "content": "Snow?"}]',
         "chosen": '[{"role": "assistant", "content": "White."}]',
         "rejected": '[{"role": "assistant", "content": "Blue."}]'}, ASKED, BOTH, []),
    "an answer that is JSON": ({"prompt": TEXT, "chosen": '[{"role": "x"}]', "rejected": "[]"}, TEXT,
                               ('[{"role": "x"}]', "[]"), []),
    "other names of roles": (
        {"prompt": [{"role": "Human", "content": "Snow?"}, {"role": "function", "content": "red"}],
         "chosen": {"role": "model", "content": "White."}, "rejected": {"role": "chatbot",
          "content": "Blue."}},
        f"{ASKED} | t: red", BOTH, []),
    "a developer": ({"prompt": [{"role": "developer", "content": "Be brief."}, SNOW], "chosen": [WHITE],
                     "rejected": [BLUE]}, f"d: Be brief. | {ASKED}", BOTH, []),
    "a prefilled answer": (
        {"prompt": [SNOW, bot("It is")], "chosen": [bot(" white.")], "rejected": [bot(" blue.")]},
        f"{ASKED} | a: It is", (" white.", " blue."), []),
    "a prefilled answer and texts": (
        {"prompt": [SNOW, bot("It is")], "chosen": " white.", "rejected": " blue."},
        f"{ASKED} | a: It is", (" white.", " blue."), []),
    "several turns": (
        {"prompt": [SNOW], "chosen": [CALL, RESULT, WHITE], "rejected": [BLUE]},
        ASKED, ("a: * | t: red | a: White.", "Blue."), []),
    "several turns that differ early": (
        {"chosen": [SNOW, WHITE, user("Sure?"), bot("Yes.")], "rejected": [SNOW, BLUE, user("Sure?"),
         bot("No.")]},
        ASKED, ("a: White. | u: Sure? | a: Yes.", "a: Blue. | u: Sure? | a: No."), []),
    "several turns that differ late": (
        {"chosen": [SNOW, WHITE, user("Sure?"), bot("Yes.")], "rejected": [SNOW, WHITE, user("Sure?"),
         bot("No.")]},
        f"{ASKED} | a: White. | u: Sure?", ("Yes.", "No."), []),
    "columns of no form": (
        {"prompt": TEXT, "chosen": "White.", "rejected": "Blue.", "question": "No.", "model": "m",
         "note": None},
        TEXT, BOTH, ["question", "model"]),
    "no images": ({"prompt": TEXT, "chosen": "White.", "rejected": "Blue.", "images": []}, TEXT, BOTH, []),
    "HH": ({"chosen": f"\n\nHuman: {TEXT}\n\nAssistant: White.",
     "rejected": f"\n\nHuman: {TEXT}\n\nAssistant: Blue."},
           ASKED, BOTH, []),
}  # fmt: skip


@pytest.mark.parametrize("name", PAIRS)
def test_pair(name: str) -> None:
    row, prompt, completions, unused = PAIRS[name]
    example, left = read(row)
    assert (short(example.prompt), tuple(map(short, example.completions))) == (prompt, completions)
    assert left == unused and example.label is None and example.ranks is None


COLUMNS: list[tuple[dict[str, Any], dict[str, str], str, tuple[str, ...], list[str]]] = [
    ({"q": TEXT, "best": "White.", "worst": "Blue."},
     {"prompt": "q", "chosen": "best", "rejected": "worst"}, TEXT, BOTH, []),
    ({"row": {"q": TEXT, "a": {"good": "White."}}, "bad": "Blue."},
     {"prompt": "row.q", "chosen": "row.a.good", "rejected": "bad"}, TEXT, BOTH, []),
    ({"a.b": TEXT, "a": {"b": "No."}, "chosen": "White.", "rejected": "Blue."}, {"prompt": "a.b"}, TEXT,
     BOTH, ["a"]),
    ({"prompt": TEXT, "chosen": "Blue.", "rejected": "White."},
     {"chosen": "rejected", "rejected": "chosen"}, TEXT, BOTH, []),
    ({"prompt": TEXT, "chosen": "White.", "rejected": "Blue.", "margin": "judge: 3", "system": "No."},
     {"margin": "", "system": ""}, TEXT, BOTH, ["margin", "system"]),
    ({"prompt": TEXT, "chosen": "White.", "rejected": "Blue.", "persona": "Be brief."},
     {"system": "persona"}, f"s: Be brief. | {ASKED}", BOTH, []),
    ({"prompt": TEXT, "response_1": "Blue.", "response_2": "White.", "label": 2},
     {"chosen": "response_1", "rejected": "response_2"}, TEXT, BOTH, []),
    ({"prompt": TEXT, "response_1": "White.", "response_2": "Blue.", "label": 2},
     {"chosen": "response_1", "rejected": "response_2", "label": ""}, TEXT, BOTH, ["label"]),
]  # fmt: skip


@pytest.mark.parametrize(("row", "columns", "prompt", "completions", "unused"), COLUMNS)
def test_named_columns(
    row: dict[str, Any], columns: dict[str, str], prompt: str, completions: tuple[str, ...], unused: list[str]
) -> None:
    example, left = read(row, **columns)
    assert (short(example.prompt), tuple(map(short, example.completions))) == (prompt, completions)
    assert left == unused and example.margin is None


def test_tools_in_their_spellings() -> None:
    sky = {"name": "sky", "parameters": {"type": "object"}}
    wrapped = ({"type": "function", "function": sky},)
    dialogue = {"prompt": [SNOW], "chosen": [WHITE], "rejected": [BLUE]}
    for tools in (
        [wrapped[0]],
        '[{"type": "function", "function": ' + str(sky).replace("'", '"') + "}]",
        [sky],
    ):
        example, unused = read({**dialogue, "tools": tools})
        assert example.tools == wrapped and not unused
    assert read({**dialogue, "functions": [sky]}, tools="functions")[0].tools == wrapped
    call = {"type": "function", "function": {"name": "sky", "arguments": {"hour": 6}}}
    for text in ('{"name": "sky", "arguments": {"hour": 6}}', '[{"name": "sky", "arguments": {"hour": 6}}]'):
        for role in ("function_call", "tool_call"):
            example, _ = read({**dialogue, "chosen": [{"role": role, "content": text}]})
            assert example.completions[0] == (Message("assistant", None, {"tool_calls": [call]}),)
    as_text = bot(None, tool_calls='[{"function": {"name": "sky", "arguments": "{}"}}]')
    assert (
        read({**dialogue, "chosen": [as_text]})[0]
        .completions[0][0]
        .extras["tool_calls"][0]["function"]["name"]
    )


def test_a_tie_is_no_pair() -> None:
    for row in (
        {"prompt": TEXT, "completions": ["White.", "Blue."], "scores": [2, 2.0]},
        {"prompt": TEXT, "response1": "White.", "response2": "Blue.", "overall_preference": 0},
        {"prompt": TEXT, "response_a": "White.", "response_b": "Blue.", "winner": "tie (bothbad)"},
        {"prompt": TEXT, "response_a": "A", "response_b": "B", "winner_model_a": 0, "winner_model_b": 0,
         "winner_tie": 1},
        {"context": [SNOW], "completions": [{"rank": 1, "completion": [WHITE]}, {"rank": 1,
         "completion": [BLUE]}]},
    ):  # fmt: skip
        with pytest.raises(TiedRowError):
            read(row)
