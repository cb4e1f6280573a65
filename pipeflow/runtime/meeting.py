"""Where the ranks of a job meet: each says a text, and hears what all have said.

For what is done once in a while: making an engine, saving, loading. A step never meets. Texts travel as
uint8 tensors, so that nothing that arrives is unpickled; every meeting has the same form, so ranks that
meet for different purposes find out by what they hear.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from pipeflow.errors import EngineError, PipeflowError, PlanMismatch
from pipeflow.runtime.transport import Aborted

_T = TypeVar("_T")


class Meeting:
    """All ranks of the process group, over a group of their own. Making one is collective."""

    def __init__(self) -> None:
        self.group: Any = dist.new_group(backend="gloo")
        self.rank = dist.get_rank()
        self.num_ranks = dist.get_world_size()

    def hear(self, text: str) -> list[str]:
        """What every rank says, in rank order. Every rank calls it.

        Raises:
            Aborted: a rank is gone, or has broken the group.
        """
        mine = torch.tensor(list(text.encode()), dtype=torch.uint8)
        try:
            sizes = [torch.empty(1, dtype=torch.int64) for _ in range(self.num_ranks)]
            dist.all_gather(sizes, torch.tensor([mine.numel()]), group=self.group)
            lengths = [int(size) for size in sizes]
            padded = torch.zeros(max(1, *lengths), dtype=torch.uint8)
            padded[: mine.numel()] = mine
            texts = [torch.empty_like(padded) for _ in range(self.num_ranks)]
            dist.all_gather(texts, padded, group=self.group)
        except RuntimeError as error:
            raise Aborted(str(error)) from error
        return [bytes(t[:n].tolist()).decode() for t, n in zip(texts, lengths, strict=True)]

    def close(self) -> None:
        """Lets go of the group."""
        with suppress(RuntimeError, ValueError, AssertionError):
            dist.destroy_process_group(self.group)


def together(
    meeting: Meeting | None, what: str, work: Callable[[], _T], error_type: type[PipeflowError] | None = None
) -> _T:
    """What the work gives, once it is done on every rank: none goes on where another could not.

    Args:
        meeting: of the ranks; None where there is one process.
        what: the work, as "make the engine".
        error_type: of what is raised, here and because of another rank. By default what the work raised,
            and because of another rank EngineError.

    Raises:
        Exception: what the work raised here.
        PipeflowError: it raised on another rank; names the rank and what it raised.
        Aborted: another rank is gone.
    """
    cause: BaseException | None = None
    try:
        result = work()
    except BaseException as error:  # Ctrl-C too: the others wait
        cause = error
        if error_type is not None and isinstance(error, Exception) and not isinstance(error, error_type):
            cause = error_type(f"cannot {what}: {_told(error)}")
            cause.__cause__ = error
    if meeting is None:
        if cause is not None:
            raise cause
        return result
    try:
        said = meeting.hear("" if cause is None else _told(cause))
    except Aborted:
        if cause is not None and error_type is None:
            raise cause from cause.__cause__
        # Not as `error_type`: that says that all ranks know, and go on.
        raise Aborted(f"a rank has ended or is gone, while this one was to {what}") from cause
    if cause is not None:
        raise cause
    if problems := {rank: text for rank, text in enumerate(said) if text}:
        listing = "; ".join(f"{text} (on {ranks})" for text, ranks in by_text(problems))
        raise (error_type or EngineError)(f"cannot {what}: {listing}")
    return result


def check_same(meeting: Meeting, settings: Mapping[str, str]) -> None:
    """Whether all ranks have the same settings.

    Args:
        settings: by name; a rank may lack one that says nothing there.

    Raises:
        PlanMismatch: they have not; names the settings, the ranks and their values. The same on every rank.
    """
    by_rank = [json.loads(text) for text in meeting.hear(json.dumps(settings))]
    names = dict.fromkeys(name for rank in by_rank for name in rank)
    differing = []
    for name in names:
        values = {rank: held[name] for rank, held in enumerate(by_rank) if name in held}
        if len(set(values.values())) > 1:
            differing.append(f"{name} is " + ", ".join(f"{value} on {ranks}" for value, ranks in by_text(values)))
    if differing:
        more = f"; and {len(differing) - 3} more" if len(differing) > 3 else ""
        raise PlanMismatch(
            f"the ranks hold different settings: {'; '.join(differing[:3])}{more}. Make the engine with the same on "
            "every rank; a plan is made on one rank and shared (pipeflow.runtime.distributed.share_plan), or loaded "
            "from one file"
        )


def by_text(text_by_rank: Mapping[int, str]) -> list[tuple[str, str]]:
    """(text, the ranks that have it, in words), in the order of the first rank of each."""
    ranks: dict[str, list[int]] = {}
    for rank, text in sorted(text_by_rank.items()):
        ranks.setdefault(text, []).append(rank)
    return [(text, in_words(held)) for text, held in ranks.items()]


def in_words(ranks: Sequence[int]) -> str:
    """The ranks as a sentence has them; long rows shortened.

    >>> in_words([0]), in_words([1, 2, 3])
    ('rank 0', 'ranks 1, 2, 3')
    """
    shown = ", ".join(map(str, ranks[:8])) + (f" and {len(ranks) - 8} more" if len(ranks) > 8 else "")
    return f"rank{'s' if len(ranks) > 1 else ''} {shown}"


def plain_text(value: Any) -> str:
    """A setting's value in a text that is the same in every process: no addresses, no order of sets."""
    if value is None or isinstance(value, bool | int | float | str):
        return repr(value)
    if isinstance(value, torch.Tensor):
        return f"tensor {value.tolist()}"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{k}: {plain_text(v)}" for k, v in sorted(value.items(), key=str)) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(plain_text, value)) + "]"
    if isinstance(value, set | frozenset):
        return "{" + ", ".join(sorted(map(plain_text, value))) + "}"
    return type(value).__name__


def _told(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"
