"""Turns rows of instructions into what a model reads: forms of rows, templates, tokens."""

import json
import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from text.tokenizer import END_OF_TEXT, TOKEN_TYPE, encode

# The two templates of Stanford Alpaca (Taori et al. 2023), with and without an input.
WITHOUT_INPUT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes"
    " the request.\n\n### Instruction:\n{instruction}\n\n### Response:\n"
)
WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further"
    " context. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)
# Further turns of a conversation leave the introduction out.
LATER_TURN = "\n\n### Instruction:\n{instruction}\n\n### Response:\n"

# No token of the encoding stands for more characters.
MAX_TOKEN_SIZE = 128

COLUMNS = ("instruction", "input", "output", "prompt", "completion", "messages")
FORMS = "`instruction` and `output`, `prompt` and `completion`, or `messages`"


class Turn(NamedTuple):
    """What stands in front of an answer, and the answer."""

    prompt: str
    answer: str


class Example(NamedTuple):
    """A row as the model sees it: token ids (T + 1), which of them are targets, if it was cut."""

    tokens: np.ndarray
    is_target: np.ndarray
    is_cut: bool = False


def format_prompt(instruction: str, input_: str = "") -> str:
    """Return what stands in front of an answer."""
    return fill(WITH_INPUT if input_ else WITHOUT_INPUT, instruction, input_)


def fill(template: str, instruction: str, input_: str = "") -> str:
    """Put texts into a template; braces in them are text like any other."""
    values = {"{instruction}": instruction, "{input}": input_}
    return re.sub(r"{instruction}|{input}", lambda match: values[match[0]], template)


def turns_of(row: object) -> list[Turn]:
    """Read a row of any of the three forms.

    Raises:
        ValueError: when it has none of them, or something else where text should be.
    """
    if not isinstance(row, dict):
        raise ValueError("this is no row with names")

    if row.get("messages") is not None:
        return turns_of_messages(row["messages"])

    if "instruction" in row and "output" in row:
        prompt = format_prompt(text_of(row, "instruction"), text_of(row, "input"))
        return [Turn(prompt, text_of(row, "output"))]

    if "prompt" in row and "completion" in row:
        return [Turn(format_prompt(text_of(row, "prompt")), text_of(row, "completion"))]

    raise ValueError(f"there is neither {FORMS}")


def turns_of_messages(messages: object) -> list[Turn]:
    """Turn a conversation into turns; what a system message says takes the introduction's place."""
    # A table of text alone can hold it as JSON.
    if isinstance(messages, str):
        try:
            messages = json.loads(messages)
        except (ValueError, RecursionError):
            raise ValueError("`messages` is no JSON") from None

    turns: list[Turn] = []
    introduction, question = "", None
    for message in messages if isinstance(messages, list) else []:
        if not isinstance(message, dict):
            raise ValueError("a message has no role")

        role, content = message.get("role"), text_of(message, "content")
        if role == "system":
            introduction = content
        elif role == "user":
            question = content if question is None else f"{question}\n\n{content}"
        elif role == "assistant" and question is not None:
            turns.append(Turn(format_turn(question, introduction, len(turns)), content))
            question = None
        else:
            raise ValueError(f"a message has the role {role}")

    if not turns:
        raise ValueError("no message answers another")

    return turns


def format_turn(instruction: str, introduction: str, number: int) -> str:
    if number:
        return fill(LATER_TURN, instruction)

    if introduction:
        return introduction + fill(LATER_TURN, instruction)

    return format_prompt(instruction)


def text_of(row: dict, name: str) -> str:
    text = row.get(name)
    if text is None:
        return ""

    if not isinstance(text, str):
        raise ValueError(f"`{name}` is no text")

    return text


def encode_turns(turns: Sequence[Turn], block_size: int, mask_input: bool) -> Example:
    """Turn a row into tokens; each answer ends with end-of-text.

    Args:
        block_size: what is longer is cut at the end.
        mask_input: whether the answers alone are to be predicted.
    """
    # An example of T + 1 tokens has T inputs, and T targets one place further.
    size = block_size + 1
    pieces, are_targets = [], []
    for prompt, answer in turns:
        for text, is_answer in ((prompt, False), (answer, True)):
            # No more than can have a place.
            tokens = encode(text[: size * MAX_TOKEN_SIZE])
            pieces.append(np.append(tokens, END_OF_TEXT) if is_answer else tokens)
            are_targets.append(np.full(len(pieces[-1]), is_answer or not mask_input))

    tokens = np.concatenate(pieces).astype(TOKEN_TYPE)
    return Example(tokens[:size], np.concatenate(are_targets)[:size], len(tokens) > size)
