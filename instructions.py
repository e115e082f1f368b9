"""Instructions and answers: the form in which a model is shown them, in training and after."""

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


def format_prompt(instruction: str, input_: str = "") -> str:
    """Return what stands in front of an answer."""
    # By replacing and not by formatting: an instruction may hold braces.
    template = WITH_INPUT.replace("{input}", input_) if input_ else WITHOUT_INPUT

    return template.replace("{instruction}", instruction)
