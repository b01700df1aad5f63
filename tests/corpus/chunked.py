"""The decoders of `corpus.sharded` computed in pieces: the MLP for some tokens at a time, attention for some queries,
the head for the last token alone; and experts one by one on their own tokens against all of them at once.

`bug` names one thing that the second piece of the last layer has wrong.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from corpus.sharded import Sizes, Whole

Tensor = torch.Tensor


class Written(Whole):
    """Attention written out, a mask added; `last`: returns logits of the last token."""

    def __init__(self, s: Sizes, last: bool = False) -> None:
        super().__init__(s)
        self.last = last

    def seen(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return self.rows(q, k, v, 0)

    def rows(self, q: Tensor, k: Tensor, v: Tensor, first: int) -> Tensor:
        """Attention of queries that begin at place `first`."""
        places = torch.arange(first, first + q.shape[2])[:, None]
        hidden = torch.arange(k.shape[2])[None] > places
        score = q @ k.transpose(-1, -2) * self.s.size**-0.5
        return torch.softmax(score.masked_fill(hidden, float("-inf")).float(), -1).to(v.dtype) @ v

    def forward(self, ids: Tensor) -> Tensor:
        out = super().forward(ids)
        return out[:, -1:] if self.last else out


class Chunked(Written):
    """`kind` is "mlp", "queries" or "head": what is computed in `count` pieces, the head for the last token alone."""

    def __init__(self, s: Sizes, kind: str, count: int = 3, bug: str = "") -> None:
        super().__init__(s, last=kind == "head")
        self.kind, self.count, self.bug, self.layer = kind, count, bug, 0

    def pieces(self, x: Tensor, dim: int) -> list[Tensor]:
        return list(x.split(-(-x.shape[dim] // self.count), dim))

    def mlp(self, x: Tensor, i: int) -> Tensor:
        if self.kind != "mlp":
            return super().mlp(x, i)
        wrong = self.bug == "activation" and i == self.s.layers - 1
        return torch.cat([
            self.linear(self.fed(part, i, wrong=wrong and place == 1), f"{i}.down")
            for place, part in enumerate(self.pieces(x, 1))
        ], 1)  # fmt: skip

    def seen(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if self.kind != "queries":
            return super().seen(q, k, v)
        out, first = [], 0
        self.layer += 1
        for place, part in enumerate(self.pieces(q, 2)):
            shift = 1 if self.bug == "mask" and place == 1 and self.layer == self.s.layers else 0
            out.append(self.rows(part, k, v, first + shift))
            first += part.shape[2]
        return torch.cat(out, 2)

    def head(self, x: Tensor) -> Tensor:
        at = -2 if self.bug == "token" else -1
        return super().head(x[:, at:][:, :1] if self.kind == "head" else x)

    def forward(self, ids: Tensor) -> Tensor:
        self.layer = 0
        return Whole.forward(self, ids)


class Experts(nn.Module):
    """A residual mixture of experts: all experts for all tokens, stacked."""

    def __init__(self, experts: int = 4, width: int = 32, inner: int = 48, best: int = 2, bug: str = "") -> None:
        super().__init__()
        self.experts, self.best, self.bug = experts, best, bug
        draw = torch.Generator().manual_seed(3)
        sizes = {
            "router": (experts, width), "gate": (experts, inner, width), "up": (experts, inner, width),
            "down": (experts, width, inner),
        }  # fmt: skip
        self.keep({n: torch.randn(s, generator=draw) * s[-1] ** -0.5 for n, s in sizes.items()})

    def keep(self, held: dict[str, Tensor]) -> None:
        for name, value in held.items():
            self.register_parameter(name, nn.Parameter(value))

    def forward(self, x: Tensor) -> Tensor:
        rows = F.layer_norm(x, (x.shape[-1],))
        best, chosen = torch.softmax(rows @ self.router.T, -1).topk(self.best, -1)
        return x + self.routed(rows, best / best.sum(-1, keepdim=True), chosen)

    def routed(self, x: Tensor, best: Tensor, chosen: Tensor) -> Tensor:
        share = torch.zeros(len(x), self.experts, dtype=x.dtype).scatter(-1, chosen, best)
        every = x.expand(self.experts, *x.shape)
        inner = F.silu(torch.bmm(every, self.gate.transpose(1, 2))) * torch.bmm(every, self.up.transpose(1, 2))
        return (torch.bmm(inner, self.down.transpose(1, 2)) * share.T[..., None]).sum(0)


class Looped(Experts):
    """Each expert for its own tokens, added to their places. Bugs: "shifted" (the index of one expert), "scale"."""

    def keep(self, held: dict[str, Tensor]) -> None:
        for name, value in held.items():
            if name == "router":
                self.register_parameter(name, nn.Parameter(value))
            else:
                setattr(self, f"{name}s", nn.ParameterList(v.clone() for v in value))

    def routed(self, x: Tensor, best: Tensor, chosen: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e in range(self.experts):
            wrong = e == 1
            at = (e + 1) % self.experts if wrong and self.bug == "shifted" else e
            rows, which = torch.where(chosen == at)
            mine = x[rows]
            inner = F.silu(mine @ self.gates[e].T) * (mine @ self.ups[e].T)
            if wrong and self.bug == "scale":
                inner = inner * 1.01
            said = (inner @ self.downs[e].T) * best[rows, which, None]
            out = out.index_add(0, rows, said)
        return out
