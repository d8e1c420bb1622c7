"""Shapes: any common entry → a record in Alpaca's fields, with messages where these cannot hold everything.

Known shapes: Alpaca's fields (also with LLaMA-Factory's "history" and "system"), Dolly's, prompt and completion (texts,
or TRL's lists of messages), and the conversations of OpenAI and ShareGPT. A conversation of several turns, or with a
system text or answers that must not be learned, also has normalized "messages"; Alpaca's fields then hold its first
exchange.
"""

from __future__ import annotations

from alpaca import UserError
from alpaca.common.text import shorten

FIELDS = ("instruction", "input", "output")
INPUT_HEADING = "\n\n### Input:\n"  # between instruction and input, in Alpaca's prompt and in a user's message
ALPACA, DOLLY, PROMPTS = "Alpaca's format", "Dolly's format", "prompt/completion format"
OTHER = "Alpaca's format with different messages, which are used"
THEIRS = {  # names of our fields
    DOLLY: {"instruction": "instruction", "input": "context", "output": "response"},
    PROMPTS: {"instruction": "prompt", "output": "completion"},
}
CONVERSATIONS = {"messages": "OpenAI's messages", "conversations": "ShareGPT's format"}
TAKEN = (*FIELDS, *CONVERSATIONS, "system", "history")  # the fields that a conversation is made of
NOT_TEXT = "with images or other parts that are not text"
ROLES = {"system": "system", "developer": "system", "user": "user", "human": "user", "assistant": "assistant"}
ROLES |= {"gpt": "assistant"} | dict.fromkeys(("tool", "function", "function_call", "observation"), "tool")


def in_our_fields(entry, names: dict[str, str], answers: bool) -> tuple[str, dict | str]:
    """Return an entry's shape, and the entry in Alpaca's fields, or why it is dropped.

    Args:
        entry: any JSON value.
        names: our field → its name in the entry; {} to recognize the shape.
        answers: see records.read_records.

    Raises:
        UserError: no shape is recognized, or a field is not a text.
    """
    if not isinstance(entry, dict):
        raise UserError(f"a JSON {type(entry).__name__}, not an object")
    shape, theirs = "the given fields", names
    if not names:
        is_dolly = "output" not in entry and ("response" in entry or "context" in entry)
        shape = (DOLLY if is_dolly else ALPACA) if entry.get("instruction") is not None else PROMPTS
        theirs = THEIRS.get(shape, {})
        if conversation := _conversation_in(entry, shape):
            record = _recorded(conversation[1], entry, shape, answers)
            return (OTHER if shape == ALPACA and _differs(record, entry) else conversation[0]), record
    record = _renamed(entry, theirs) if theirs else entry
    if not isinstance(record.get("instruction"), str):
        name, others = names.get("instruction", "instruction"), shorten(", ".join(entry), 200)
        hint = "set fields, as in instruction=question,output=answer"
        raise UserError(f'no text "{name}" in its fields ({others}): {hint}')
    if record.get("messages"):
        record = {name: value for name, value in record.items() if name != "messages"}  # they are not conversations
    return shape, _with_answer(record, shape == ALPACA) if answers else record


def _differs(record: dict | str, entry: dict) -> bool:
    """Return whether an entry's messages differ from its own fields, such as an output that was edited."""
    if isinstance(record, str) or not entry.get("messages"):
        return False
    instruction, input, output = (text_of(entry, field) or "" for field in FIELDS)
    answers = {"", record.get("output"), *(message["content"] for message in record.get("messages") or ())}
    return not (record["instruction"].endswith(instruction) and input in ("", record["input"]) and output in answers)


def _renamed(entry: dict, names: dict[str, str]) -> dict:
    """Return an entry with Alpaca's names for its fields, and "input", then its other fields."""
    ours = {field: entry.get(names.get(field, field), entry.get(field)) for field in FIELDS}
    ours = {field: value for field, value in (ours | {"input": ours["input"] or ""}).items() if value is not None}
    return ours | {name: value for name, value in entry.items() if name not in (*FIELDS, *names.values())}


def _with_answer(record: dict, is_alpaca: bool) -> dict | str:
    """Return a record with a text as input, or why it is dropped."""
    input, output = text_of(record, "input"), text_of(record, "output")
    if is_alpaca and output is None:
        raise UserError('no text "output"')
    if not (is_alpaca or (output or "").strip()):
        return "without an answer"
    return record | {"input": ""} if input is None else record


def _conversation_in(entry: dict, shape: str) -> tuple[str, list] | None:
    """Return the shape and the turns of an entry that is a conversation, its system text first; else None."""
    system = entry.get("system")
    turns: list = [{"role": "system", "content": system}] if isinstance(system, str) and system.strip() else []
    for field in CONVERSATIONS if shape == PROMPTS else ["messages"] if shape == ALPACA else ():
        if isinstance(said := entry.get(field), list) and (said or shape == PROMPTS):
            return (CONVERSATIONS[field] if shape == PROMPTS else shape), turns + said
    said = [entry.get(name) for name in THEIRS[PROMPTS].values()]
    if shape == PROMPTS and _is_of_lists(entry):  # as in TRL, the completion alone is learned
        asked, answer = (
            part if isinstance(part, list) else [{"role": role, "content": part}] * (part is not None)
            for role, part in zip(("user", "assistant"), said, strict=True)
        )
        return shape, turns + [turn | {"weight": 0} if isinstance(turn, dict) else turn for turn in asked] + answer
    history = entry.get("history")
    if shape != ALPACA or not (turns or history) or not isinstance(entry["instruction"], str):
        return None
    task = user_message(entry["instruction"], text_of(entry, "input") or "")["content"]
    for pair in [*(history if isinstance(history, list) else ()), (task, text_of(entry, "output"))]:
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            return shape, [None]  # a malformed turn
        roles = ("user", "assistant") if pair[1] is not None else ("user",)
        turns += [{"role": role, "content": text} for role, text in zip(roles, pair, strict=False)]
    return shape, turns


def _is_of_lists(entry: dict) -> bool:
    """Return whether a prompt or a completion is a list of messages, as TRL has them."""
    return any(isinstance(entry.get(name), list) for name in THEIRS[PROMPTS].values())


def _recorded(turns: list, entry: dict, shape: str, answers: bool) -> dict | str:
    """Return a conversation as a record, or why it is dropped. Single turns without a system text have no messages."""
    messages = _messages(turns)
    if any(entry.get(name) for name in ("images", "videos", "audios")):
        messages = NOT_TEXT
    if any(entry.get(name) not in (None, "", [], "[]") for name in ("tools", "functions")):
        messages = "with tools"
    if isinstance(messages, str):
        return messages
    if answers and messages[-1]["role"] == "user":
        messages.pop()  # a question without an answer
    if answers and not any(_is_learned(message) for message in messages):
        return "without an answer"
    system = [message["content"] for message in messages if message["role"] == "system"]
    question, *answer = (message["content"] for message in messages[len(system) : len(system) + 2])
    first = "\n\n".join([*system, question])
    record = {"instruction": first, "input": ""} | ({"output": answer[0]} if answer else {})
    if shape == ALPACA:
        own = {"instruction": text_of(entry, "instruction"), "input": text_of(entry, "input") or ""}
        asked = user_message(**own)["content"]
        if asked == question:
            record |= own | {"instruction": "\n\n".join([*system, own["instruction"]])}
        elif asked == first:
            record |= own
        elif messages[-2:] == [user_message(**own), {"role": "assistant", "content": entry.get("output")}]:
            record = own | {"output": entry["output"]}  # LLaMA-Factory's: they are the last turn
    taken = (*TAKEN, *THEIRS[PROMPTS].values()) if _is_of_lists(entry) else TAKEN
    record |= {name: value for name, value in entry.items() if name not in taken}
    is_plain = not system and len(messages) <= 2 and not any("weight" in message for message in messages)
    return record if is_plain else record | {"messages": messages}


def _messages(turns: list) -> list[dict] | str:
    """Return turns as {"role", "content"}, with a "weight" of 0 if not to be learned, or why the entry is dropped."""
    messages: list[dict] = []
    for turn in turns:
        if not isinstance(turn, dict):
            return "with a malformed turn"
        said, content = turn.get("role", turn.get("from")), turn.get("content", turn.get("value"))
        if turn.get("tool_calls") or turn.get("function_call") or (role := ROLES.get(str(said))) == "tool":
            return "with tool calls"
        if isinstance(content, list):  # OpenAI's parts
            parts = [part.get("text") if isinstance(part, dict) else None for part in content]
            content = "".join(parts) if all(isinstance(part, str) for part in parts) else content
        if not isinstance(content, str | None):
            return NOT_TEXT
        if role is None:
            return f"with the unknown role {shorten(repr(said), 20)}"
        before = messages[-1]["role"] if messages else "system"
        if role == "assistant" and before == "system":
            return "starting with the assistant"
        if messages and role in (before, "system"):
            return "with turns out of order"
        unlearned = {"weight": 0} if role == "assistant" and turn.get("weight") == 0 else {}
        if role != "system" or (content or "").strip():
            messages.append({"role": role, "content": content or ""} | unlearned)
    questions = [message["content"] for message in messages if message["role"] == "user"]
    return messages if questions and questions[0].strip() else "without a question"


def _is_learned(message: dict) -> bool:
    return message["role"] == "assistant" and message["content"].strip() != "" and message.get("weight") != 0


def has_several_turns(record: dict) -> bool:
    """Return whether a record, as the reader gives it, is a conversation of more than one question."""
    return sum(message["role"] == "user" for message in record.get("messages") or ()) > 1


def whole_text(record: dict, field: str = "instruction") -> str:
    """Return a field's text; of a conversation, all its questions as the instruction, all its answers as the output.

    Records are compared and counted by it: neither a system text that many share nor a greeting that opens many hides
    what they ask. Like an instruction, the questions are without the input.
    """
    role = {"instruction": "user", "output": "assistant"}.get(field)
    turns = [message["content"] for message in record.get("messages") or () if message["role"] == role]
    heading_and_input = user_message("", record.get("input") or "")["content"]
    return "\n\n".join(turns).replace(heading_and_input, "") if turns else record[field]


def without_system(record: dict) -> dict:
    """Return a record whose instruction is without the conversation's system text, which Alpaca's fields begin with."""
    system = [message["content"] for message in record.get("messages") or () if message["role"] == "system"]
    own = record["instruction"].removeprefix("\n\n".join([*system, ""]))
    return record | {"instruction": own} if system else record


def user_message(instruction: str, input: str = "") -> dict[str, str]:
    """Return a task as a user's message: an input follows the instruction under Alpaca's heading."""
    return {"role": "user", "content": instruction + (INPUT_HEADING + input if input else "")}


def text_of(record: dict, field: str) -> str | None:
    """Return a field's text, or None if it is null or missing; UserError if it is not text."""
    value = record.get(field)
    if not isinstance(value, str | None):
        raise UserError(f'"{field}" must be text')
    return value


def task_of(record: dict) -> tuple[str, str]:
    """Return a record's instruction and input ("" for none); Self-Instruct's tasks have theirs in "instances".

    Raises:
        UserError: a field that is not text, a blank instruction, or several instances.
    """
    instruction, input = text_of(record, "instruction"), text_of(record, "input")
    if not (instruction or "").strip():
        raise UserError('no text "instruction"')
    if input is None and record.get("instances") is not None:
        instances = record["instances"]
        if not isinstance(instances, list) or len(instances) != 1 or not isinstance(instances[0], dict):
            raise UserError('"instances" must be a list of one object: split it into records')
        input = text_of(instances[0], "input")
    return instruction, input or ""


def task_key(record: dict, *fields: str) -> tuple[str, ...]:
    """Return a key that is equal for records with the same task, ignoring case and white space.

    A conversation's task is everything before its last answer. With ``fields``, only those are compared.
    """
    texts = [record[field] for field in fields or ("instruction", "input")]
    messages = () if fields else record.get("messages") or ()
    if answers := [i for i, message in enumerate(messages) if message["role"] == "assistant"]:
        texts = [message["content"] for message in messages[: answers[-1]]]
    return tuple(" ".join(text.split()).casefold() for text in texts)
