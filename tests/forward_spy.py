"""What LLaMA models are really fed: a spy on their forward pass, here or in a server of its own.

``python forward_spy.py FILE serve …`` is ``transformers serve …`` that adds each prompt to FILE, as a JSON list a line.
"""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Callable

from transformers import LlamaForCausalLM


def spied(note: Callable[[list[int]], object]) -> Callable:
    """LlamaForCausalLM.forward that passes each row that it reads to ``note``, from its first token on, unpadded."""
    forward, read = LlamaForCausalLM.forward, []

    @functools.wraps(forward)
    def noting(self, input_ids, attention_mask=None, past_key_values=None, **given):
        past = past_key_values.get_seq_length() if past_key_values is not None else 0
        for place, ids in enumerate(input_ids.tolist()):
            if past:  # of one row: its beginning is what the last pass has read
                ids, place = read[:past] + ids, 0
            elif attention_mask is not None:
                ids = [id_ for id_, real in zip(ids, attention_mask[place].tolist(), strict=True) if real]
            read[:] = ids
            note(ids)
        return forward(self, input_ids, attention_mask=attention_mask, past_key_values=past_key_values, **given)

    return noting


if __name__ == "__main__":
    from transformers.cli.transformers import app

    path = sys.argv.pop(1)

    def write(ids: list[int]) -> None:
        with open(path, "a") as file:
            file.write(json.dumps(ids) + "\n")

    LlamaForCausalLM.forward = spied(write)
    app()
