"""Where ranks that wait in vain find out why: the job's store.

Nothing is written in a regular call. A rank whose call takes long posts what it was asked for; one that
refuses a call, fails or closes its engine posts that at once, and goes on without waiting for anybody.
Ranks compare themselves with rank 0 and look whether any has refused, so each asks little, however many
there are; only once they differ does one read what all were asked for.
"""

from __future__ import annotations

import json
import time
from contextlib import suppress
from typing import Any

from pipeflow.errors import LayerFailure
from pipeflow.runtime.call import Call
from pipeflow.runtime.meeting import by_text, in_words

_LISTING = 1.0  # seconds in which others post what they were asked for, once it is known that ranks differ


class Board:
    """One rank's view of it.

    Args:
        store: of this engine alone.
        rank: this one.
        num_ranks: of the job.
    """

    def __init__(self, store: Any, rank: int, num_ranks: int) -> None:
        self._store = store
        self._rank = rank
        self._num_ranks = num_ranks
        self._posted: int | None = None

    def post(self, call: Call) -> None:
        """Says what this rank is asked for, once a call."""
        if self._posted == call.number:
            return
        # Over the call before, not beside it, nor is anything deleted: who reads what was just deleted waits.
        entry = {"number": call.number, "asked": call.asked, "batch": call.batch}
        self._store.set(_post(self._rank), json.dumps(entry))
        self._posted = call.number

    def refuse(self, number: int, name: str, text: str) -> None:
        """Says that this rank does not make the call of this number, and why; for as long as the engine is there."""
        with suppress(RuntimeError):
            self._store.set(_refusal(number, self._rank), json.dumps({"asked": name, "refused": text}))
            self._store.add(f"refused {number}", 1)

    def disagreement(self, call: Call) -> LayerFailure | None:
        """What is wrong between the ranks in this call, as far as anybody knows; None if nothing."""
        refused = self._store.check([f"refused {call.number}"])
        if not refused and _same(call, self._posted_by(0, call.number)):
            return None
        return self._describe(call)

    def _read(self, number: int, rank: int) -> dict[str, str] | None:
        if not self._store.check([key := _refusal(number, rank)]):
            return self._posted_by(rank, number)
        refusal: dict[str, str] = json.loads(self._store.get(key))
        return refusal

    def _posted_by(self, rank: int, number: int) -> dict[str, str] | None:
        if not self._store.check([key := _post(rank)]):
            return None
        entry = json.loads(self._store.get(key))
        return {"asked": entry["asked"], "batch": entry["batch"]} if entry["number"] == number else None

    def _describe(self, call: Call) -> LayerFailure | None:
        deadline = time.monotonic() + _LISTING
        known: dict[int, dict[str, str]] = {self._rank: {"asked": call.asked, "batch": call.batch}}
        while len(known) < self._num_ranks:
            for rank in range(self._num_ranks):
                if rank not in known and (entry := self._read(call.number, rank)) is not None:
                    known[rank] = entry
            if time.monotonic() > deadline:
                break
            time.sleep(0.02)
        return disagreement(call, known) if any(entry != known[self._rank] for entry in known.values()) else None

    # --- failures -------------------------------------------------------------------------

    def report(self, failure: LayerFailure) -> None:
        """Writes what ends the engine. The first wins."""
        with suppress(RuntimeError):
            self._store.compare_set("failure", "", json.dumps(failure.record()))

    def failure(self) -> LayerFailure | None:
        """What a rank has reported."""
        if not self._store.check(["failure"]):
            return None
        return LayerFailure(**json.loads(self._store.get("failure")))


def _post(rank: int) -> str:
    return f"long call of rank {rank}"


def _refusal(number: int, rank: int) -> str:
    return f"refusal of call {number} by rank {rank}"


def _same(call: Call, entry: dict[str, str] | None) -> bool:
    """Whether the entry, if there is one, is of such a call."""
    return entry is None or (entry["asked"], entry.get("batch")) == (call.asked, call.batch)


def disagreement(call: Call, entry_by_rank: dict[int, dict[str, str]]) -> LayerFailure:
    """The failure of ranks that differ in what they are asked for, in words.

    Args:
        entry_by_rank: what each was asked for, and its batch or why it refused; a rank may not have said.
    """
    entries = dict(sorted(entry_by_rank.items()))
    refused = {rank: entry["refused"] for rank, entry in entries.items() if "refused" in entry}
    asked = by_text({rank: entry["asked"] for rank, entry in entries.items() if rank not in refused})
    first = entries[min(entries)]
    rank = next((r for r, entry in entries.items() if entry != first), min(entries))
    phase = "call"
    if refused:
        rank, text = next(iter(refused.items()))
        phase = "batch" if text.startswith("BatchError") else "call"
        waiting = "; ".join(f"{words} on {ranks}" for words, ranks in asked)
        original = f"{text}; so {in_words(list(refused))} refused {entries[rank]['asked']}, and {waiting} waited"
    elif len(asked) == 1:
        phase = "batch"
        batches = by_text({rank: entry["batch"] for rank, entry in entries.items()})
        listing = ", and ".join(f"{words} on {ranks}" for words, ranks in batches)
        original = f"BatchError: the batch has {listing}; every rank must be given the same batch"
    else:
        listing = ", and ".join(f"{words} on {ranks}" for words, ranks in asked)
        original = (
            f"EngineError: the ranks were asked for different things: {listing}; every rank must make the same calls "
            "of its engine, in the same order and with the same arguments"
        )
    return LayerFailure(rank=rank, step=call.step, phase=phase, original=original)
