"""Which messages a rank knows to have arrived, from what it has received since.

A posted send keeps what it sends until it has left, and nobody tells the sender when that is. But a
message that comes back from the receiver was sent after all that the receiver had received before,
and in which order a rank receives and sends is its program:

    rank 0    send a0   send a1   ...   recv g0                 here a0 and a1 have arrived
    rank 1    recv a0   recv a1   send g0
"""

from __future__ import annotations

from collections.abc import Callable

from pipeflow.program import Program, Receive, Send


def known_arrivals(
    program: Program, is_sent: Callable[[Send | Receive], bool] = lambda transfer: True
) -> tuple[tuple[int, ...], ...]:
    """For each rank and each of its receives, in order: how many of its messages to that peer have arrived.

    Messages count from the first that the rank sends that peer.

    Args:
        is_sent: whether a transfer takes place at all; both ends must say the same of it.
    """
    # What a rank has received from another when it sends it a message, by channel of the message.
    received_at_send: dict[tuple[int, int], list[int]] = {}
    for rank, actions in enumerate(program.actions_by_rank):
        received: dict[int, int] = {}
        for action in actions:
            if not isinstance(action, Send | Receive) or not is_sent(action):
                continue
            if isinstance(action, Receive):
                received[action.peer] = received.get(action.peer, 0) + 1
            else:
                received_at_send.setdefault((rank, action.peer), []).append(received.get(action.peer, 0))
    result = []
    for rank, actions in enumerate(program.actions_by_rank):
        number: dict[int, int] = {}
        known = []
        for action in actions:
            if isinstance(action, Receive) and is_sent(action):
                index = number.get(action.peer, 0)
                number[action.peer] = index + 1
                known.append(received_at_send[action.peer, rank][index])
        result.append(tuple(known))
    return tuple(result)
