"""What a model answers, slowly: the whole text is read again for each token, and every probability is sorted."""

from __future__ import annotations

import hashlib

import torch


@torch.no_grad()
def answer(model, ids: list[int], ends, longest: int, temperature: float, top_p: float, seed: int) -> list[int]:
    """Return the tokens of the answer to one prompt, without the one of ``ends`` that ends it."""
    digest = hashlib.sha256(f"{seed} {ids}".encode()).digest()
    draws = torch.rand(longest, generator=torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))).tolist()
    written: list[int] = []
    for draw in draws:
        logits = model(input_ids=torch.tensor([ids + written]), use_cache=False).logits[0, -1].double()
        token = int(logits.argmax())
        if temperature:
            likely = (logits / temperature).softmax(0)
            total, nucleus = 0.0, []
            for place in likely.argsort(descending=True).tolist():
                if total < top_p:
                    nucleus.append(place)
                    total += float(likely[place])
            left = draw * total
            for token in sorted(nucleus):
                left -= float(likely[token])
                if left < 0:
                    break
        if token in ends:
            break
        written.append(token)
    return written
