"""The bytes of many samples at once, nothing decoded.

Corpus, numbers --read_batch, neighbors in one read--> RawBatch --Workers, shared memory--> the main process
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import numpy as np
import torch
from jaxtyping import Int, Shaped, UInt8
from torch import Tensor

from mmpt.data.corpus import Corpus
from mmpt.data.index import ShardIndex
from mmpt.data.workers import Workers


@dataclass(frozen=True, kw_only=True)
class RawBatch:
    """Samples as they lie in their tars, end to end, the headers of members between them."""

    data: UInt8[Tensor, " bytes"]
    keys: Shaped[np.ndarray, " samples"]  # bytes
    first_member: Int[np.ndarray, " samples_plus_1"]  # sample i owns members first_member[i] : first_member[i + 1]
    suffixes: Shaped[np.ndarray, " members"]  # bytes
    starts: Int[np.ndarray, " members"]  # bytes into `data`
    sizes: Int[np.ndarray, " members"]  # bytes

    def __len__(self) -> int:
        return len(self.keys)

    def __iter__(self) -> Iterator[dict[str, memoryview]]:
        """The members of every sample by suffix: views, not copies."""
        data, suffixes = self.data.numpy().data, self.suffixes.astype(str).tolist()
        views = [data[start:stop] for start, stop in zip(self.starts.tolist(), (self.starts + self.sizes).tolist(), strict=True)]
        for first, stop in pairwise(self.first_member.tolist()):
            yield dict(zip(suffixes[first:stop], views[first:stop], strict=True))


def read_batch(corpus: Corpus, numbers: Sequence[int]) -> RawBatch:
    """One or more samples by number, in this order. Raises IndexError for a number that the corpus has not."""
    wanted = np.asarray(numbers, dtype=np.int64)
    if not 0 <= wanted.min() <= wanted.max() < len(corpus):
        raise IndexError(f"samples {wanted.min()} to {wanted.max()} of {len(corpus)}")
    shard = np.searchsorted(corpus.starts, wanted, side="right") - 1
    local = wanted - corpus.starts[shard]
    take = partial(_take, corpus.shards, np.unique(shard).tolist())
    first, stop = take("first_member", shard, local), take("first_member", shard, local + 1)
    first_member = _edges(stop - first)
    sample = np.repeat(np.arange(len(wanted)), stop - first)  # of each member
    member = np.arange(len(sample)) + (first - first_member[:-1])[sample]  # its number within its shard
    offsets, sizes = take("offsets", shard[sample], member), take("sizes", shard[sample], member)
    # A run: samples that follow one another in their tar. One read brings them all.
    opens = np.ones(len(wanted), dtype=bool)
    opens[1:] = (wanted[1:] != wanted[:-1] + 1) | (shard[1:] != shard[:-1])
    opening, run = np.flatnonzero(opens), (np.cumsum(opens) - 1)[sample]
    begins = offsets[first_member[opening]]
    ends = (offsets + sizes)[first_member[[*opening[1:], len(wanted)]] - 1]
    edges = _edges(ends - begins)
    data = torch.empty(int(edges[-1]), dtype=torch.uint8)
    view = data.numpy().data
    for of, offset, (start, end) in zip(shard[opening].tolist(), begins.tolist(), pairwise(edges.tolist()), strict=True):
        corpus.storage.pread_into(corpus.names[of], view[start:end], offset)
    return RawBatch(
        data=data,
        keys=take("keys", shard, local),
        first_member=first_member,
        suffixes=take("suffixes", shard[sample], member),
        starts=offsets + (edges[:-1] - begins)[run],
        sizes=sizes,
    )


def _take(
    shards: Sequence[ShardIndex], present: list[int], field: str, shard: Int[np.ndarray, " n"], place: Int[np.ndarray, " n"]
) -> Shaped[np.ndarray, " n"]:
    """`field` of shard[i] at place[i], for every i; `present` are the shards that occur."""
    if len(present) == 1:
        return getattr(shards[present[0]], field)[place]
    order = np.argsort(shard, kind="stable")
    joined = np.concatenate([getattr(shards[each], field)[place[shard == each]] for each in present])
    result = np.empty_like(joined)
    result[order] = joined
    return result


def _edges(lengths: Int[np.ndarray, " n"]) -> Int[np.ndarray, " n_plus_1"]:
    edges = np.zeros(len(lengths) + 1, dtype=np.int64)
    np.cumsum(lengths, out=edges[1:])
    return edges


class RawLoader:
    """RawBatches of the samples `order`, `batch` at a time, the last one shorter; every `iter` begins anew.

    `workers` processes read; they stay until `close`. A batch may be kept, see `Workers`.
    """

    def __init__(self, corpus: Corpus, order: Sequence[int], batch: int, workers: int = 0) -> None:
        self._order, self._batch = np.asarray(order, dtype=np.int64), batch
        self._workers = Workers(partial(read_batch, corpus), workers)
        self.close = self._workers.close

    def __len__(self) -> int:
        return -(-len(self._order) // self._batch)

    def __iter__(self) -> Iterator[RawBatch]:
        blocks = (self._order[start : start + self._batch] for start in range(0, len(self._order), self._batch))
        return self._workers.map(blocks)
