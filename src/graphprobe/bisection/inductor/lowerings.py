"""Wrong code: the lowering of which operation, or which pattern that is lowered as one, makes it wrong?"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from graphprobe.bisection import search
from graphprobe.bisection.choice import CODE, Choice
from graphprobe.bisection.inductor import code
from graphprobe.bisection.inductor.recording import Recording
from graphprobe.bisection.inductor.segments import labels_of
from graphprobe.bisection.inductor.snapshots import Piece
from graphprobe.bisection.oracle import Answer
from graphprobe.bisection.search import GOOD


@dataclass(frozen=True)
class LoweringHunt:
    """Compiles one piece again with part of its lowerings; `ask` makes a trial and tells of it."""

    ask: Callable[[str, Choice], Answer]
    recorded: Recording
    piece: Piece
    prefix: str  # of what is told

    def pattern(self) -> str | None:
        """Return the first match of a lowering pattern that makes the code wrong, None where it is none of them."""
        labels = labels_of(self.piece.snapshots)
        for label, snapshot in zip(labels, self.piece.snapshots, strict=True):
            hits = snapshot.hits
            if not any(hit.kind == "lowering_pattern" for hit in hits):
                continue

            def limited(count: int, label: str = label, total: int = len(hits)) -> str:
                what = f"{self.prefix}the generated code with the first {count} of {total} matches of {label}"
                return self.ask(what, Choice(label, CODE, self.piece.number, first=count)).verdict

            if limited(0) == GOOD:
                return str(hits[search.first_bad(0, len(hits), limited)[1] - 1])
        return None

    def operation(self) -> str | None:
        """Return the first node whose lowering makes the code wrong, None where code is wrong without any."""
        names = self.recorded.recorder.lowerings.get(self.piece.number, [])

        def lowered(count: int) -> str:
            what = f"{self.prefix}the generated code with the first {count} of {len(names)} operations lowered"
            return self.ask(what, Choice("", CODE, self.piece.number, lowered=count)).verdict

        if not names or lowered(0) != GOOD:
            return None
        return names[search.first_bad(0, len(names), lowered)[1] - 1]

    def switches(self) -> Iterator[str]:
        """Say which of Inductor's switches mend the code."""
        for words, patch in code.SWITCHES:
            choice = Choice("", CODE, self.piece.number, config=patch)
            if self.ask(f"{self.prefix}the generated code {words}", choice).verdict == GOOD:
                yield f"the generated code is right {words} (torch._inductor.config: {patch})"
