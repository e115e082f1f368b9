"""Turns rows of instructions into what a model reads: forms of rows, templates, tokens."""

import json
import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from text.tokenizer import TOKEN_TYPE, Tokenizer

# The introduction of Stanford Alpaca's template (Taori et al. 2023), and what a turn adds to it.
INTRODUCTION = (
    "Below is an instruction that describes a task. Write a response that appropriately completes"
    " the request."
)
TURN = "\n\n### Instruction:\n{instruction}\n\n### Response:\n"
# In front of a conversation that begins with an answer.
GREETING = "\n\n### Response:\n{greeting}"
WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further"
    " context. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)

# The names that columns have in public datasets.
CONVERSATIONS = ("messages", "conversations", "conversation")
QUESTIONS = ("instruction", "prompt", "question")
INPUTS = ("input", "context")
ANSWERS = ("output", "completion", "response", "answer")
COLUMNS = CONVERSATIONS + QUESTIONS + INPUTS + ANSWERS
FORMS = "`instruction` and `output`, `prompt` and `completion`, nor `messages`"
ROLES = {
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("user", "human"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "model"), "assistant"),
}


class Turn(NamedTuple):
    """What stands in front of an answer, and the answer.

    Args:
        introduction: what a system message said, which the first prompt of the row begins with.
    """

    prompt: str
    answer: str
    introduction: str = ""


class Example(NamedTuple):
    """A row as the model sees it: token ids (T + 1), which of them are targets, if it was cut."""

    tokens: np.ndarray
    is_target: np.ndarray
    is_cut: bool = False


def format_prompt(instruction: str, input_: str = "", introduction: str = "") -> str:
    """Return what stands in front of an answer."""
    if input_:
        return fill(WITH_INPUT, instruction=instruction, input=input_)

    return (introduction or INTRODUCTION) + fill(TURN, instruction=instruction)


def fill(template: str, **texts: str) -> str:
    """Put texts into a template; braces in them are text like any other."""
    return re.sub(r"{(\w+)}", lambda match: texts[match[1]], template)


def turns_of(row: object) -> list[Turn]:
    """Read a row of any form.

    Raises:
        ValueError: when it has none of them, or something else where text should be.
    """
    if not isinstance(row, dict):
        raise ValueError("this is no row with names")

    for name in CONVERSATIONS:
        if row.get(name) is not None:
            return turns_of_messages(messages_of(row, name))

    question, input_, answer = (
        next((name for name in names if name in row), None)
        for names in (QUESTIONS, INPUTS, ANSWERS)
    )
    if question is None or answer is None:
        raise ValueError(f"there is neither {FORMS}")

    # Both may be conversations: trl calls the last message the completion.
    if isinstance(row[question], list) or isinstance(row[answer], list):
        return turns_of_messages(
            [
                *messages_of(row, question, role="user"),
                *messages_of(row, answer, role="assistant"),
            ]
        )

    input_text = text_of(row, input_) if input_ else ""
    return [Turn(format_prompt(text_of(row, question), input_text), text_of(row, answer))]


def messages_of(row: dict, name: str, role: str = "") -> list:
    """Return the messages of a column: a list, also as JSON, or the text of one role."""
    messages = row[name]
    if isinstance(messages, list):
        return messages

    if role:
        return [{"role": role, "content": messages}]

    # A table of text alone can hold a conversation as JSON.
    try:
        messages = json.loads(messages)
    except (TypeError, ValueError, RecursionError):
        raise ValueError(f"`{name}` is no JSON") from None

    return messages if isinstance(messages, list) else []


def turns_of_messages(messages: list) -> list[Turn]:
    """Turn a conversation into turns.

    What system messages say takes the introduction's place, and later on is part of the next
    question. Messages in a row of one role are joined. An answer in front of all questions is
    context.
    """
    introduction, greeting = None, None
    pairs: list[tuple] = []
    for message in messages:
        role, content = read_message(message)
        question, answer = pairs[-1] if pairs else (None, None)
        if role == "system" and len(pairs) <= 1 and answer is None:
            introduction = join(introduction, content)
        elif role == "assistant" and question is None:
            greeting = join(greeting, content)
        elif role == "assistant":
            pairs[-1] = question, join(answer, content)
        elif question is None or answer is not None:
            pairs.append((content, None))
        else:
            pairs[-1] = join(question, content), None

    introduction, turns = introduction or "", []
    opening = introduction or INTRODUCTION
    opening += fill(GREETING, greeting=greeting) if greeting else ""
    for question, answer in pairs:
        if answer is not None:
            turns.append(Turn(opening + fill(TURN, instruction=question), answer, introduction))
            opening = ""

    if not turns:
        raise ValueError("no message answers another")

    return turns


def read_message(message: object) -> tuple[str, str]:
    """Return the role and the text of a message, as OpenAI or ShareGPT names them."""
    if not isinstance(message, dict):
        raise ValueError("a message has no role")

    is_open_ai = message.get("role") is not None
    role, content = ("role", "content") if is_open_ai else ("from", "value")
    name = message.get(role)
    if not isinstance(name, str) or name.lower() not in ROLES:
        raise ValueError(f"a message has the role {name}")

    return ROLES[name.lower()], text_of(message, content)


def join(text: str | None, more: str) -> str:
    return f"{text}\n\n{more}" if text and more else text or more


def text_of(row: dict, name: str) -> str:
    """Return the text of a column; it may be in parts, as OpenAI has it."""
    text = row.get(name)
    if text is None:
        return ""

    parts = text if isinstance(text, list) else [{"type": "text", "text": text}]
    if not all(
        isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)
        for part in parts
    ):
        raise ValueError(f"`{name}` is no text")

    return "".join(part["text"] for part in parts)


def encode_turns(
    turns: Sequence[Turn], tokenizer: Tokenizer, block_size: int, mask_input: bool
) -> Example:
    """Turn a row into tokens; each answer ends with end-of-text.

    Args:
        block_size: what is longer is cut at the end.
        mask_input: whether the answers alone are to be predicted.
    """
    # An example of T + 1 tokens has T inputs, and T targets one place further.
    size = block_size + 1
    # No more can have a place.
    max_characters = size * int(tokenizer.token_sizes.max())
    pieces, are_targets = [], []
    for prompt, answer, _ in turns:
        for text, is_answer in ((prompt, False), (answer, True)):
            tokens = tokenizer.encode(text[:max_characters])
            pieces.append(np.append(tokens, tokenizer.end_of_text) if is_answer else tokens)
            are_targets.append(np.full(len(pieces[-1]), is_answer or not mask_input))

    tokens = np.concatenate(pieces).astype(TOKEN_TYPE)
    return Example(tokens[:size], np.concatenate(are_targets)[:size], len(tokens) > size)
