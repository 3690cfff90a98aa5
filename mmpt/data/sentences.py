"""Two texts in a row, for the loss that tells whether the second follows the first (BERT: arXiv 1810.04805, section 3.1).

words of a text --middle--> where its second half begins             its row: <bos> A <eos> B <eos>
rows of a pack, their seeds --exchange--> half of them with the B of another: a function of the pack alone
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Hashable, Sequence
from dataclasses import replace

from mmpt.data.plan import keyed_hash
from mmpt.types import IGNORE, TokenizedDocument

_STOP = re.compile(r"[.!?…][\"'”’»)\]]*\s*\Z")  # ends a sentence where a new word begins behind it
_FULL_STOP = re.compile(r"[。！？][」』”’）]*\s*\Z")  # ends one anywhere
_SEEN = 4  # tokens before a cut that are looked at: a stop may have quotes and brackets behind it


def middle(ids: Sequence[int], decode: Callable[[Sequence[int]], str], ends: Collection[int] = ()) -> int:
    """Where to cut a text of two words or more in two: the number of the second half's first word.

    At the end of a sentence in the middle half of the text, the nearest to its middle; else between two words there; else in
    the middle. `ends`: further places that count as ends of sentences, such as where one text ends and another begins.
    """
    half, reach = len(ids) // 2, len(ids) // 4
    between = None
    for distance in range(reach + 1):
        for cut in {half - distance: None, half + distance: None}:
            seen = ids[max(cut - _SEEN, 0) : cut]
            before, both = decode(seen), decode([*seen, ids[cut]])
            apart = before[-1:].isspace() or both[len(before) :][:1].isspace()
            if cut in ends or _FULL_STOP.search(before) or (apart and _STOP.search(before)):
                return cut
            if apart and between is None:
                between = cut
    return half if between is None else between


def exchange(
    rows: Sequence[TokenizedDocument], seeds: Sequence[int], owners: Sequence[Hashable], longest: int
) -> list[TokenizedDocument]:
    """The rows of a pack, of which the seeds choose half; these pass their second texts on in a ring.

    So the tokens of all rows stay as many, but for those of a text that would make its new row longer than `longest`: its end is
    cut off, as BERT's. No row gets a text of its own one of `owners`; where too few are another's, fewer pass theirs on.
    """
    chosen = _half([i for i, row in enumerate(rows) if row.second is not None], seeds)
    groups: dict[Hashable, list[int]] = {}
    for i in chosen:
        groups.setdefault(owners[i], []).append(i)
    largest = max(groups.values(), key=len, default=[])
    del largest[len(chosen) - len(largest) :]
    ring = [i for group in groups.values() for i in group]
    shift = max(map(len, groups.values()), default=0)  # what lies so far on is of another group
    following = {i: ring[(place + shift) % len(ring)] for place, i in enumerate(ring)}
    return [_with_second_of(row, rows[following[i]], longest) if i in following else row for i, row in enumerate(rows)]


def _half(candidates: Sequence[int], seeds: Sequence[int]) -> list[int]:
    """On average half of them, and never one alone; of one there is none."""
    count, share = len(candidates), keyed_hash("half", *(seeds[i] for i in candidates)) / 2**63
    taken = (0, 0, 2 * (share < 1 / 2), 2 * (share < 3 / 4))[count] if count < 4 else int(count / 2 + share)
    return sorted(sorted(candidates, key=lambda i: keyed_hash("exchange", seeds[i]))[:taken])


def _with_second_of(row: TokenizedDocument, other: TokenizedDocument, longest: int) -> TokenizedDocument:
    follows = _second(row) == _second(other)  # an equal text is no other's
    tokens, labels = other.tokens[other.second :], other.labels[other.second :]
    cut = max(row.second + len(tokens) - longest, 0)  # words before its <eos>
    return replace(
        row,
        tokens=row.tokens[: row.second] + tokens[: len(tokens) - 1 - cut] + tokens[-1:],
        labels=row.labels[: row.second] + labels[: len(labels) - 1 - cut] + labels[-1:],
        next_sentence=0 if follows else 1,
    )


def _second(row: TokenizedDocument) -> list[int]:
    """The second text as it was before words of it were hidden."""
    hidden = zip(row.tokens[row.second :], row.labels[row.second :], strict=True)
    return [token if label == IGNORE else label for token, label in hidden]
