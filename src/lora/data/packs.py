"""Which rows share a pack: short rows laid end to end, so that little of a batch is padding."""

from bisect import bisect_left, insort
from collections.abc import Sequence

from ..errors import LoraError


def packed(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Packs of row numbers, every row in one pack, none longer than `capacity`.

    Best fit, longest rows first: each row goes where it leaves the least room. At most 11/9 of the fewest packs
    possible, and one more. The same lengths make the same packs, so that each epoch has as many steps.

    Args:
        lengths: tokens of each row, at least 1.
        capacity: most tokens of a pack.

    Raises:
        LoraError: a row that fits no pack, or an empty one, by number.
    """
    packs: list[list[int]] = []
    packs_by_room: dict[int, list[int]] = {}
    rooms: list[int] = []  # the keys above, sorted
    for row in sorted(range(len(lengths)), key=lambda row: -lengths[row]):
        length = lengths[row]
        if not 1 <= length <= capacity:
            raise LoraError(
                f"row {row + 1} has {length} tokens, and a pack takes 1 to {capacity}; leave it out or raise max_length"
            )
        at = bisect_left(rooms, length)
        if at == len(rooms):
            pack, room = len(packs), capacity
            packs.append([])
        else:
            room = rooms[at]
            pack = packs_by_room[room].pop()
            if not packs_by_room[room]:
                del packs_by_room[room], rooms[at]
        packs[pack].append(row)
        if left := room - length:
            if left not in packs_by_room:
                packs_by_room[left] = []
                insort(rooms, left)
            packs_by_room[left].append(pack)
    return [sorted(pack) for pack in packs]


def fill(lengths: Sequence[int], packs: Sequence[Sequence[int]], capacity: int) -> float:
    """The share of the packs' room that holds tokens; 1 - fill is the most that padding can take."""
    return sum(lengths[row] for pack in packs for row in pack) / (len(packs) * capacity) if packs else 1.0
