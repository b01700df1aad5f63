"""Let a captured graph of fixed shape speak: greedy, one token at a time."""

from __future__ import annotations

import torch
from torch.fx import GraphModule

from graphprobe.demo.subjects import Subject


def padded(subject: Subject, tokens: list[int]) -> torch.Tensor:
    """Return [1, tokens + room for the answer] int64.

    The graph has one length only. What stands in the room does not matter: attention is causal, so a position never
    sees those after it.
    """
    room = [subject.stop] * subject.words
    return torch.tensor([tokens + room])


def answer(gm: GraphModule, subject: Subject, tokens: list[int]) -> list[int]:
    """Return the tokens that the graph adds to `tokens`, up to and with the one that ends an answer."""
    ids = padded(subject, tokens)
    said: list[int] = []
    with torch.no_grad():
        for position in range(len(tokens), ids.shape[1]):
            logits = gm(input_ids=ids, **subject.options)["logits"]  # [1, length, vocabulary]
            token = int(logits[0, position - 1].argmax())
            said.append(token)
            if token == subject.stop:
                break
            ids[0, position] = token
    return said
