"""What could not be read: masked, counted by source and reason, written down, and when it is too much, the end of the run."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from mmpt.data.corpus import Corpus
from mmpt.data.spec import OnBad
from mmpt.types import NOTHING, Fault, PackedBatch, UserError

FEW = 10  # documents: fewer than so many faulty ones end no run, whatever their share
IN_A_ROW = 100  # documents
NAMED = 3


class Quarantine:
    """Counts the faults of a rank's batches; `folder` gets a line for each, in rank-N.jsonl.

    Counts start anew when a run goes on: they are about the data as it is read now.
    """

    def __init__(self, limits: Mapping[str, OnBad], folder: Path | None, rank: int) -> None:
        self.limits = limits
        self.path = folder / f"rank-{rank}.jsonl" if folder else None
        self.counts: Counter[tuple[str, str]] = Counter()  # faults by source and reason
        self.seen: Counter[str] = Counter()  # documents by source
        self.bad: Counter[str] = Counter()  # faulty documents by source
        self.first: dict[str, list[Fault]] = {}  # of each source, to be named
        self.row: list[Fault] = []  # of the documents before, one a document, up to the last sound one

    def admit(self, batch: PackedBatch) -> None:
        """Take note of a batch. Raises UserError where a source's policy says that the run ends."""
        faults = {(f.source, f.key, f.epoch, f.piece): f for f in reversed(batch.report.faults)}
        for ref in batch.provenance:  # a document, or a piece of one, counts as one
            self.seen[ref.source] += 1
            fault = faults.get((ref.source, ref.key, ref.epoch, ref.piece))
            if fault is None:
                self.row.clear()
                continue
            self.bad[ref.source] += 1
            self.row.append(fault)
            if len(first := self.first.setdefault(ref.source, [])) < NAMED:
                first.append(fault)
            if len(self.row) >= IN_A_ROW:
                raise UserError(f"{IN_A_ROW} faulty documents in a row: {_named(self.row)}; see `mmpt data validate`")
        self.counts.update((fault.source, fault.reason) for fault in batch.report.faults)
        self._write(batch.report.faults)
        for source, bad in self.bad.items():
            refuse_too_many(source, bad, self.seen[source], self.limits[source], self.first[source])

    @property
    def figures(self) -> dict[str, float]:
        """Faults since the run was started, by source and reason."""
        return {f"faults/{source}/{reason}": count for (source, reason), count in self.counts.items()}

    def _write(self, faults: Iterable[Fault]) -> None:
        lines = "".join(json.dumps(asdict(fault)) + "\n" for fault in faults)
        if self.path and lines:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8") as file:
                file.write(lines)


def refuse_too_many(source: str, bad: int, seen: int, limits: OnBad, first: Sequence[Fault]) -> None:
    """Raises UserError where `bad` of the `seen` documents of a source are more than its `on_bad` allows; names the `first`."""
    mend = "mend or remove them; `mmpt data validate` lists them all"
    if bad and limits.policy == "stop":
        raise UserError(f"source {source}: on_bad.policy is stop, and {_named(first[:1])}; {mend}")
    if bad >= FEW and bad > limits.max_fraction * seen:
        limit = f"more than on_bad.max_fraction = {limits.max_fraction:g}"
        raise UserError(f"source {source}: {bad} of {seen} documents are faulty, {limit}: {_named(first)}; {mend}, or raise it")


def index_faults(corpus: Corpus) -> list[Fault]:
    """The documents that were faulty when the corpus was indexed, and are no part of any plan."""
    return [
        Fault(
            source=corpus.name,
            shard=name,
            key=index.keys[i].decode(),
            epoch=0,
            piece=0,
            part=NOTHING,
            reason=index.reasons[i].decode(),
            detail=index.details[i].decode(errors="replace"),
        )
        for name, index in zip(corpus.names, corpus.shards, strict=True)
        for i in (index.reasons != b"").nonzero()[0]
    ]


def _named(faults: Sequence[Fault]) -> str:
    return "; ".join(f"document {fault.key} of {fault.shard}: {fault.detail}" for fault in faults[:NAMED])
