"""Sets of options that between them hold any two together, each without the other, and neither."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Sequence

__all__ = ["covering_rows"]


def covering_rows(names: Sequence[str], clash: Callable[[str, str], bool]) -> list[list[str]]:
    """Few rows of names; two that clash are never together.

    Greedy, after Cohen et al., "The AETG system" (1997): a row is the best of 30, each made option by option in random
    order, on or off as meets the most pairs that no row has yet.
    """
    states = itertools.product(itertools.combinations(names, 2), (True, False), (True, False))
    pairs = [frozenset({(a, x), (b, y)}) for (a, b), x, y in states if not (x and y and clash(a, b))]
    rng, rows = random.Random(0), []
    while pairs:
        missing, best = set(pairs), ({}, set())
        for _ in range(30):
            row = dict(sorted(pairs[0]))
            for name in rng.sample(list(names), len(names)):
                if name not in row:
                    free = not any(on and clash(n, name) for n, on in row.items())
                    met = [len(missing & {frozenset({(name, on), p}) for p in row.items()}) for on in (False, True)]
                    row[name] = free and met[True] > met[False]
            new = missing & set(map(frozenset, itertools.combinations(row.items(), 2)))
            best = max(best, (row, new), key=lambda b: len(b[1]))
        rows.append([name for name in names if best[0][name]])
        pairs = [p for p in pairs if p not in best[1]]
    return rows
