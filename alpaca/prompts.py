"""The Alpaca prompt and its tokens, the same in training, chat and judging."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Sequence

from alpaca.common.text import check_utf8

# Models in the wild were trained on these bytes: they do not change.
PROMPT_DICT = {
    "prompt_input": (
        "Below is an instruction that describes a task, paired with an input that provides further context. "
        "Write a response that appropriately completes the request.\n\n"
        "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:"
    ),
    "prompt_no_input": (
        "Below is an instruction that describes a task. "
        "Write a response that appropriately completes the request.\n\n"
        "### Instruction:\n{instruction}\n\n### Response:"
    ),
}
# Texts to put before an answer while it is tokenized. The first is the prompt's own last line.
BEFORE_ANSWER = (PROMPT_DICT["prompt_no_input"].rpartition("\n")[2], "\n", "a")


def format_prompt(instruction: str, input: str = "") -> str:
    """Return the prompt: training, chat, judge and the recovery's smoke test all call this function.

    An empty ``input`` selects the template without one, as in the original.
    """
    return PROMPT_DICT["prompt_input" if input else "prompt_no_input"].format(instruction=instruction, input=input)


def prompt_ids(tokenizer, prompts: Sequence[str]) -> list[list[int]]:
    """Return the tokens of each prompt, as training, chat, judge and a server send them.

    A special token in the text stays text, and an EOS that the tokenizer appends is removed.

    Raises:
        UserError: a prompt that UTF-8 cannot encode.
    """
    check_utf8("".join(prompts), "the prompt")
    every = tokenizer(list(prompts), split_special_tokens=True, verbose=False)["input_ids"]
    return [ids[:-1] if len(ids) > 1 and ids[-1] == tokenizer.eos_token_id else ids for ids in every]


def answer_ids(tokenizer, answers: Sequence[str]) -> list[list[int]]:
    """Return the tokens of each answer as it continues a prompt: those that the model must generate.

    Tokenizing prompt and answer together can join the prompt's last character and the answer's first (":" and "The" are
    one token, ":The", in today's vocabularies); chat would then send a token that the model never saw in training.
    Tokenizing the answer alone puts a space before it with LLaMA's tokenizers. So it is tokenized after the first of
    BEFORE_ANSWER with which it shares no token. No BOS or EOS is added; special tokens stay text.
    """

    def encode(texts: list[str]) -> Iterator[tuple[list[int], list[tuple[int, int]]]]:
        options = {"add_special_tokens": False, "split_special_tokens": True, "verbose": False}
        encoded = tokenizer(texts, return_offsets_mapping=True, **options)
        return zip(encoded["input_ids"], encoded["offset_mapping"], strict=True)

    return continued(encode, [[before] * len(answers) for before in BEFORE_ANSWER], answers)


def continued(
    encode: Callable[[list[str]], Iterable[tuple[list[int], list[tuple[int, int]]]]],
    befores: Sequence[Sequence[str]],
    texts: Sequence[str],
) -> list[list[int]]:
    """Return the tokens of each text after another one with which it shares no token, or else alone.

    Args:
        encode: texts → the tokens of each, and where each token begins and ends, in characters.
        befores: lists of preceding texts to try in this order, each with one for each text.
        texts: to tokenize.
    """
    found: list = [None] * len(texts)
    for before in befores:
        left = [i for i, ids in enumerate(found) if ids is None]
        if not left:
            break
        for i, (ids, offsets) in zip(left, encode([before[i] + texts[i] for i in left]), strict=True):
            border = len(before[i])
            first = bisect_left(offsets, (border,))
            if all(end <= border for _, end in offsets[:first]):
                found[i] = ids[first:]
    return [next(iter(encode([texts[i]])))[0] if ids is None else ids for i, ids in enumerate(found)]
