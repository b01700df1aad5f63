"""Bisection: which transform of a pipeline made a model wrong, and which match of it.

``graphprobe.bisect`` lives in ``entry``; a pipeline of transforms is searched by ``hunt``, PyTorch's own compiler by
``inductor``.
"""
