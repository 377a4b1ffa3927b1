"""Rows that cannot be used: the field that is named, what should be and is, and the remedy."""

from typing import Any

USER, ANSWER, OTHER = ({"role": role, "content": role} for role in ("user", "assistant", "assistant"))
SYSTEM = {"role": "system", "content": "S"}
LEAVE = "leave the row out"


def pair(**changes: Any) -> dict[str, Any]:
    """A pair of texts with some columns changed; those that are given as ... are left out."""
    row = {"prompt": "Q", "chosen": "A", "rejected": "B", **changes}
    return {name: value for name, value in row.items() if value is not ...}


def chat(**changes: Any) -> dict[str, Any]:
    return pair(**{"prompt": [USER], "chosen": [ANSWER], "rejected": [OTHER], **changes})


def listed(*completions: Any, **columns: Any) -> dict[str, Any]:
    return {"prompt": "Q", "completions": list(completions), **columns}


def two(**columns: Any) -> dict[str, Any]:
    return {"prompt": "Q", "response_1": "A", "response_2": "B", **columns}


def said(message: Any) -> dict[str, Any]:
    """A dialogue whose chosen answer is this message."""
    return chat(chosen=[message])


def part(kind: str, **content: Any) -> dict[str, Any]:
    return said({"role": "assistant", "content": [{"type": kind, **content}]})


def call(call: Any) -> dict[str, Any]:
    return said({"role": "assistant", "content": None, "tool_calls": call})


Bad = tuple[dict[str, Any], str, str, str]
MESSAGE = "a message should be an object with 'role' and 'content' (or 'from' and 'value')"
VALUE = "the value should be text or a list of messages"
NUMBER = "the value should be a finite number"
SCORE = "a score should be a finite number"
HOLDS = "a message should hold text"
CALL = "a tool call should be an object with a function's name and arguments"
TOOLS = "the tools should be a list of objects"
SPLIT = "the split should be 'train' or 'test'"
CHOICE = "the choice should name one of the two, such as 'response_1' or 1"
ONE = "a row should compare answers or label one"
ALONE = "or use the row for supervised training"
HISTORY = "the history should be a list of pairs of question and answer"
LABEL = "the label should be true or false"
MEDIA = "which a language model cannot read"

PAIRS: list[Bad] = [
    (pair(chosen=1.5), "chosen", f"{VALUE}, but it is the number 1.5", LEAVE),
    (pair(chosen=float("nan")), "chosen", f"{VALUE}, but it is the number nan", LEAVE),
    (pair(chosen=10**40), "chosen", f"{VALUE}, but it is a number", LEAVE),
    (pair(chosen=False), "chosen", f"{VALUE}, but it is false", LEAVE),
    (pair(rejected=None), "rejected", f"{VALUE}, but it is null", LEAVE),
    (pair(rejected=...), "rejected", "a row should have this field, but it has 'prompt', 'chosen'", "add it"),
    (pair(chosen=...), "chosen", "a row should have this field, but it has 'prompt', 'rejected'", "add it"),
    (pair(rejected=["B", "C"]), "rejected", "but it is a list of texts", "write one text, or rank several"),
    (pair(chosen={"role": "assistant", "content": "A"}), "rejected", "but it is a string", "in one form"),
    (pair(chosen={}), "rejected", "should be messages as in", "in one form"),
    (chat(chosen=[]), "chosen", "there should be at least one message, but the list is empty", "add some"),
    (chat(chosen=[USER]), "chosen", "should end in an assistant turn, but it ends in a user turn",
     "add the answer"),
    (chat(rejected=[OTHER, USER]), "rejected", "but it ends in a user turn", "add the answer"),
    (chat(chosen=[SYSTEM]), "chosen", "but it ends in a system turn", "add the answer"),
    (pair(prompt=...), "prompt", "a row should have this field", "there is none by --columns prompt="),
    (pair(prompt=" \n"), "prompt", "the prompt should not be empty, but it is ' \\n'", "fill it in"),
    (pair(prompt=3), "prompt", f"{VALUE}, but it is the number 3", LEAVE),
    (pair(prompt=[["user", "Q"]]), "prompt', message 1", f"{MESSAGE}, but it is a list of 2", "write every"),
    (pair(prompt="\ud800"), "prompt", "Unicode, but character 1 is \\ud800, half of a surrogate",
     "replace it"),
    (pair(rejected="B\udfff"), "rejected", "character 2 is \\udfff", "replace it"),
    (pair(weight=-2), "weight", "should not be negative, but it is the number -2.0",
     "the better completion first"),
    (pair(weight="much"), "weight", f"{NUMBER}, but it is 'much'", "ignore it with --columns weight="),
    (pair(weight=True), "weight", f"{NUMBER}, but it is true", "correct it"),
    (pair(weight=float("inf")), "weight", f"{NUMBER}, but it is the number inf", "correct it"),
    (pair(margin=float("nan")), "margin", f"{NUMBER}, but it is the number nan", "--columns margin="),
    (pair(margin=[0.5]), "margin", f"{NUMBER}, but it is a list of 1", "--columns margin="),
    (pair(margin="judge"), "margin", f"{NUMBER}, but it is 'judge'", "--columns margin="),
    (pair(split="fold"), "split", f"{SPLIT}, but it is 'fold'", "with --columns split=NAME"),
    (pair(split=2), "split", f"{SPLIT}, but it is the number 2", "rename it"),
    (pair(split=["train"]), "split", f"{SPLIT}, but it is a list of 1", "rename it"),
    (pair(images=["a.png"]), "images", f"but it has a list of 1 in 'images', {MEDIA}", LEAVE),
    (pair(image={"bytes": "x"}), "image", f"an object with 'bytes' in 'image', {MEDIA}", LEAVE),
    (pair(videos=["a.mp4"]), "videos", MEDIA, LEAVE),
    (pair(audio="a.wav"), "audio", f"'a.wav' in 'audio', {MEDIA}", LEAVE),
    (pair(system=["S"]), "system", "the system text should be text, but it is a list of 1",
     "write it as text"),
    (pair(system=7), "system", "but it is the number 7", "write it as text"),
    (pair(system="\ud801"), "system", "character 1 is \\ud801", "replace it"),
    (chat(system="T", prompt=[SYSTEM, USER]), "system", "stand once, but the prompt has another",
     "one of the two"),
    (chat(history="S"), "history", f"{HISTORY}, but it holds 'S'", "put the turns into the prompt"),
    (pair(history=[["a"]]), "history", f"{HISTORY}, but it holds a list of 1", "write it so"),
    (pair(history=[["a", None]]), "history", f"{HISTORY}, but it holds a list of 2", "write it so"),
    (pair(history=[["a", "\ud800"]]), "history", "character 1 is \\ud800", "replace it"),
    (pair(history=[{"role": "user"}]), "history', message 1", f"{MESSAGE}, but it has no content",
     "add the text"),
    ({"instruction": "I", "input": 3, "chosen": "A", "rejected": "B"}, "input", "but it is the number 3",
     "as text"),
    ({"instruction": "I", "input": ["x"], "chosen": "A", "rejected": "B"}, "input", "a list of 1", "as text"),
    ({"preferred_output": [ANSWER]}, "non_preferred_output", "but it has 'preferred_output'", "give both"),
    ({"non_preferred_output": [OTHER]}, "preferred_output", "this field, but it has 'non_", "give both"),
    ({"messages": [USER], "rejected_response": "B"}, "messages", "it ends in a user turn", "add the answer"),
    ({"messages": [USER, ANSWER], "rejected_response": 3}, "rejected_response", "the number 3", LEAVE),
    ({"messages": [USER, ANSWER], "rejected_messages": [SYSTEM, OTHER]}, "rejected_messages",
     "should be those of field 'messages', but they differ from turn 1 on", LEAVE),
]  # fmt: skip

MESSAGES: list[Bad] = [
    (said("A"), "chosen", "or a list of messages, but it is a list of texts", "under 'completions'"),
    (said(None), "chosen', message 1", f"{MESSAGE}, but it is null", "write every message"),
    (said({"content": "A"}), "chosen', message 1", "an object with 'content' without a role", "add the role"),
    (said({}), "chosen', message 1", "but it is an empty object without a role", "add the role"),
    (said({"role": "assistant"}), "chosen', message 1", "but it has no content", "add the text"),
    (said({"role": "assistant", "content": None}), "chosen', message 1", "but it has no content",
     "add the text"),
    (said({"role": "assistant", "content": 3}), "chosen', message 1", "has the number 3 as its content",
     "plain text"),
    (said({"role": "assistant", "content": {"a": 1}}), "chosen', message 1", "an object with 'a' as its",
     "plain text"),
    (said({"role": "narrator", "content": "A"}), "chosen', message 1", "but it is 'narrator'",
     "rename the role"),
    (said({"role": ["x"], "content": "A"}), "chosen', message 1", "but it is a list of 1", "rename the role"),
    (said({"role": "", "content": "A"}), "chosen', message 1", "but it is an empty string",
     "rename the role"),
    (said({"from": "Bing", "value": "A"}), "chosen', message 1", "but it is 'Bing'", "rename the role"),
    (said({"role": "assistant", "content": "\udc00"}), "chosen', message 1", "character 1 is", "replace it"),
    (part("image", image="a.png"), "chosen', message 1", f"{HOLDS}, but it holds a part of type 'image'",
     LEAVE),
    (part("image_url", image_url={}), "chosen', message 1", "a part of type 'image_url'", LEAVE),
    (part("input_audio"), "chosen', message 1", "a part of type 'input_audio'", LEAVE),
    (part("text", text=None), "chosen', message 1", "a part of type 'text', which is not read",
     "as plain text"),
    (part("text", text=[1]), "chosen', message 1", "a part of type 'text', which is not read",
     "as plain text"),
    (said({"role": "assistant", "content": [3]}), "chosen', message 1", "it holds the number 3",
     "as plain text"),
    (call("sky"), "chosen', message 1", f"{CALL}, but it is 'sky'", "write it so"),
    (call(["sky"]), "chosen', message 1", f"{CALL}, but it is 'sky'", "write it so"),
    (call([{"id": 1}]), "chosen', message 1", f"{CALL}, but it is an object with 'id'", "write it so"),
    (call([{"function": "sky"}]), "chosen', message 1", "an object with 'function'", "write it so"),
    (call([{"function": {"name": 3}}]), "chosen', message 1", "an object with 'function'", "write it so"),
    (call([{"name": "f", "arguments": "\ud800"}]), "chosen', message 1", "character 1 is", "replace it"),
    (chat(prompt=[{"role": "user", "content": "Q", "tool_calls": [{"name": "f"}]}]), "prompt', message 1",
     "tool calls should be the assistant's, but they are in a user turn", "move or remove them"),
    (said({"role": "function_call", "content": "f()"}), "chosen', message 1", "but it is 'f()'",
     "to assistant"),
    (said({"role": "tool_call", "content": '{"name": "f"}'}), "chosen', message 1", "JSON with 'name' and",
     "to assistant"),
    (said({"role": "tool_call", "content": "[1]"}), "chosen', message 1", "JSON with 'name' and 'arguments'",
     "to assistant"),
    (said({"role": "assistant", "content": "A", "reasoning_content": 3}), "chosen', message 1",
     "the reasoning_content should be text, but it is the number 3", "leave it out"),
    (said({"role": "assistant", "content": "A", "thinking": ["x"]}), "chosen', message 1",
     "the thinking should", "leave"),
    (chat(tools="sky()"), "tools", f"{TOOLS}, but they are 'sky()'", "write them as JSON schemas"),
    (chat(tools=["sky"]), "tools", f"{TOOLS}, but they are a list of 1", "write them as JSON schemas"),
    (chat(tools={"name": "sky"}), "tools", f"{TOOLS}, but they are an object with 'name'", "JSON schemas"),
    (chat(tools=[{"name": "\ud800"}]), "tools", "character 1 is \\ud800", "replace it"),
    (chat(tools=3), "tools", f"{TOOLS}, but they are the number 3", "JSON schemas"),
]  # fmt: skip

LISTS: list[Bad] = [
    (listed("A"), "completions", "the completions should be a ranked list, but they are a list of 1",
     "at least two"),
    (listed(), "completions", "but they are an empty list", "at least two"),
    ({"prompt": "Q", "completions": {"a": 1}}, "completions", "but they are an object with 'a'",
     "at least two"),
    ({"prompt": "Q", "completions": "A"}, "completions", "but they are 'A'", "at least two"),
    ({"prompt": "Q", "responses": [3]}, "responses", "but they are a list of 1", "at least two"),
    (listed("A", 3), "completions[1]", f"{VALUE}, but it is the number 3", LEAVE),
    (listed("A", None), "completions[1]", f"{VALUE}, but it is null", LEAVE),
    (listed("A", [OTHER]), "completions[1]", "should be a string as in field 'completions[0]'",
     "in one form"),
    (listed({"foo": "A"}, {"foo": "B"}), "completions[0]', message 1", "without a role", "add the role"),
    (listed("A", "B", scores=[1]), "scores", "one number for each of 2 completions, but there are 1",
     "add or remove"),
    (listed("A", "B", scores=[1, 2, 3]), "scores", "but there are 3", "add or remove some"),
    (listed("A", "B", scores=[1, None]), "scores", f"{SCORE}, but it is null", LEAVE),
    (listed("A", "B", scores=[1, "good"]), "scores", f"{SCORE}, but it is 'good'", LEAVE),
    (listed("A", "B", ratings=[1, "N/A"]), "ratings", f"{SCORE}, but it is 'N/A'", LEAVE),
    (listed("A", "B", ranks=[True, False]), "ranks", f"{SCORE}, but it is true", LEAVE),
    (listed("A", "B", scores=[1, float("nan")]), "scores", f"{SCORE}, but it is the number nan", LEAVE),
    (listed("A", "B", scores=[1, [2]]), "scores", f"{SCORE}, but it is a list of 1", LEAVE),
    (listed({"text": "A", "score": 1}, {"text": "B"}), "completions",
     "every completion should have a score, but 1 have none", "add it"),
    (listed({"text": "A", "rank": 1}, {"text": "B", "rank": None}), "completions", "but 1 have none",
     "add it"),
    (listed({"text": "A", "upvotes": 1}, {"text": "B", "upvotes": 9}), "completions",
     "called 'score' or 'rank', but they have 'upvotes'", "rename the one by which they are ranked"),
    (listed("A", "B", labels=[True, False]), "labels", "says of each step whether it is right",
     "leave it out"),
    (two(), "", "should say which is better, but no column does", "add 'preference'"),
    (two(label=0), "label", f"{CHOICE}, but it is the number 0", LEAVE),
    (two(preference="A>B"), "preference", f"{CHOICE}, but it is 'A>B'", LEAVE),
    (two(winner="gpt-4"), "winner", f"{CHOICE}, but it is 'gpt-4'", LEAVE),
    (two(overall_preference="much"), "overall_preference", f"{SCORE}, but it is 'much'", LEAVE),
    (two(overall_preference=float("nan")), "overall_preference", "but it is the number nan", LEAVE),
    (two(label=1, response_1=3), "response_1", f"{VALUE}, but it is the number 3", LEAVE),
    (two(label=1, prompt=""), "prompt", "should not be empty", "fill it in"),
    ({"prompt": "Q", "response_a": "A", "response_b": "B", "winner_model_a": 2, "winner_model_b": 0},
     "winner_model_a", f"{LABEL}, but it is the number 2", "say whether"),
    ({"prompt": "Q", "completion": "A", "label": "good"}, "label", f"{LABEL}, but it is 'good'",
     "say whether"),
    ({"prompt": "Q", "completion": "A", "label": -1}, "label", f"{LABEL}, but it is the number -1",
     "say whether"),
    ({"prompt": "Q", "completion": "A", "label": 0.5}, "label", f"{LABEL}, but it is the number 0.5",
     "say whether"),
    ({"prompt": "Q", "completion": "A", "label": [True]}, "label", f"{LABEL}, but it is a list of 1",
     "say whether"),
    ({"messages": [USER, ANSWER], "label": float("nan")}, "label", "but it is the number nan", "say whether"),
    ({"messages": [USER], "label": True}, "messages", "but it ends in a user turn", "add the answer"),
    ({"messages": [ANSWER], "label": True}, "messages", "a prompt should come first, but none does",
     "add it"),
    ({"messages": [], "label": True}, "messages", "but the list is empty", "add some"),
    ({"conversations": "Q", "kto_tag": True}, "prompt", "but it has 'conversations'", "--columns prompt="),
    ({"prompt": "Q", "completion": None, "label": True}, "completion", f"{VALUE}, but it is null", LEAVE),
    ({"messages": [USER, ANSWER]}, "", f"{ONE}, but it has 'messages', one answer alone", ALONE),
    ({"conversations": [USER, ANSWER]}, "", f"{ONE}, but it has 'conversations', one answer alone", ALONE),
    ({"text": "Once upon a time."}, "", f"{ONE}, but it has 'text', one answer alone", ALONE),
    ({"prompt": "Q", "completion": "A"}, "", f"{ONE}, but it has 'prompt', 'completion', one answer", ALONE),
    ({"instruction": "Q", "input": "", "output": "A"}, "", f"{ONE}, but it has 'instruction'", ALONE),
    ({"question": "Q", "answers": {"text": ["A"]}}, "answers", "but they are an object with 'text'",
     "at least two"),
]  # fmt: skip

ROWS: list[Bad] = [*PAIRS, *MESSAGES, *LISTS]
