"""Graph transforms to put under observation: one file each, offered through the entry points ``graphprobe.transforms``.

They work on graphs as ``graphprobe.capture`` gives them (aten operators, weights as ``get_attr``). Each sets the
metadata of the nodes it makes, replaces with ``replace_all_uses_with`` so that the claim of equality can be observed,
and says what it matched or why nothing did. graphprobe itself never imports this package.
"""
