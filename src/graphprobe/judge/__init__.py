"""The judge: measurements become kinds, kinds become a report. One file per rule of docs/how-it-works.md."""

from graphprobe.judge.findings import parse_accept
from graphprobe.judge.joining import join
from graphprobe.judge.judging import Judgement, judge
from graphprobe.judge.reporting import report

__all__ = ["Judgement", "join", "judge", "parse_accept", "report"]
