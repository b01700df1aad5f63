"""Do two regions compute the same function? Rule 1, and where it says no, the rules that know of harmless reasons."""

from __future__ import annotations

import math
from collections.abc import Callable

from graphprobe.judge.constants import ask_constants
from graphprobe.judge.masked import without_masked_rows
from graphprobe.judge.nonfinite import ask_nonfinite
from graphprobe.judge.opaque import ask_opaque
from graphprobe.judge.quantization import ask_quantization
from graphprobe.judge.same import Sameness, ask
from graphprobe.judge.ties import ask_ties
from graphprobe.lanes.regions import Region
from graphprobe.lanes.replay import Replay

#: Asked in this order where rule 1 says no; the first that explains the difference has the last word.
EXCUSES: tuple[Callable[[Replay, Region, Sameness], Sameness | None], ...] = (
    ask_nonfinite,
    ask_ties,
    ask_quantization,
    ask_constants,
)


def _opaque(replay: Replay, region: Region) -> Sameness | None:
    try:
        return ask_opaque(replay, region)
    except Exception as error:  # not even its other operators can be evaluated
        return Sameness(None, math.nan, reason=f"{type(error).__name__}: {error}"[:300])


def same_function(replay: Replay, region: Region, hasty: bool = False) -> Sameness:
    """Answer rule 1, and where it says no, ask whether another rule explains the difference.

    `hasty` is for the many regions in which a rewrite might meet again (see `judge.same.ask`).
    """
    plain = ask(replay, region, hasty=hasty)
    if plain.same is not True and (opaque := _opaque(replay, region)) is not None:
        return opaque
    if plain.same is not False or plain.where == "shape":
        return plain
    plain = without_masked_rows(replay, region, plain)
    if plain.same is not False:
        return plain
    for excuse in EXCUSES:
        try:
            answer = excuse(replay, region, plain)
        except Exception as error:  # arithmetic that some operator here does not know: nothing can be said
            return Sameness(None, plain.spread, reason=f"{excuse.__name__}: {type(error).__name__}: {error}"[:300])
        if answer is not None:
            return answer
    return plain
