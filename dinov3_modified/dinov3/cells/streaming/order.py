"""Which field a sample is cut from: a pure function of seed, position and process (ours).

A fetched field is visited K times.  Time steps of K samples follow one another; step t of a process
takes the fields t, t - S, t - 2S, ... of this pass's permutation, so that every step brings one new
field and ends the use of one, and a field's visits lie S steps, K * S samples, apart.  Of fewer than
K * S fields another S is taken, with which a step and its neighbours hold the most fields.  The fields in
use at any time are (K - 1) * S + 1.  For a fixed visit number the field's place is the step shifted by
a constant (modulo the fields of a pass), so each visit number meets every field exactly once a pass: a
pass is K samples of each field.  A position costs O(K) time at most, so resumption is exact and fast.
"""

import hashlib
import struct
from dataclasses import dataclass

_ROUNDS = 6
_MIX = 0x9E3779B97F4A7C15
_MASK64 = 2**64 - 1


class Permutation:
    """A keyed permutation of range(count) with random access and without memory.

    A Feistel network on the smallest even number of bits (Luby and Rackoff 1988), walked along its
    cycles until it falls below `count` (Black and Rogaway 2002, section 3).  Every round can be undone,
    so the network is a permutation of 2 ** bits; following its cycle from a number below `count`
    returns to a number below `count`, and no two starts share an end.  There are at most four times
    as many codes as elements, so a walk takes at most four steps on average, and no memory.

    `count`: at least 1; `key`: equal keys give equal permutations.
    """

    def __init__(self, count: int, *key: object) -> None:
        if count < 1:
            raise ValueError(f"A permutation must have an element, got {count}: give at least 1")
        self.count = count
        self._half = max(1, ((count - 1).bit_length() + 1) // 2)
        self._mask = (1 << self._half) - 1
        text = "/".join(str(part) for part in key)
        digest = hashlib.blake2b(text.encode(), digest_size=8 * _ROUNDS).digest()
        self._keys = struct.unpack(f">{_ROUNDS}Q", digest)

    def __call__(self, index: int) -> int:
        """The element at a place; IndexError outside range(count)."""
        if not 0 <= index < self.count:
            raise IndexError(f"A place must lie below {self.count}, got {index}: count from 0")
        value = index
        while True:
            left, right = value >> self._half, value & self._mask
            for key in self._keys:
                mixed = ((right ^ key) * _MIX) & _MASK64
                mixed = ((mixed ^ (mixed >> 29)) * _MIX) & _MASK64
                left, right = right, left ^ ((mixed >> 32) & self._mask)
            value = left << self._half | right
            if value < self.count:
                return value


@dataclass(frozen=True)
class Visit:
    """What a position stands for."""

    field: int  # number of the field in the data set
    epoch: int  # pass over all fields
    number: int  # 0 for the first visit of the field in this pass
    place: int  # of the field in the pass's permutation


@dataclass(eq=False)
class FieldOrder:
    """Positions of all processes → fields; ValueError for a number below 1, or too few fields.

    The process of rank w owns the places w, w + world, ... of each permutation, so that no field is
    fetched by two of them.
    """

    count: int  # fields of the data set
    visits: int = 16  # samples of each fetched field (K)
    spread: int = 8  # time steps between two visits of a field (S)
    seed: int = 0  # of the permutations
    world: int = 1  # processes

    def __post_init__(self) -> None:
        for name in ("visits", "spread", "world"):
            if getattr(self, name) < 1:
                raise ValueError(
                    f"`{name}` must be at least 1, got {getattr(self, name)}: give a larger number"
                )
        if self.count < self.world:
            raise ValueError(
                f"There must be a field for each of {self.world} processes, got {self.count}: use fewer "
                "processes, or more plates"
            )
        self._permutations: dict[int, Permutation] = {}
        self._strides: dict[int, int] = {}

    @property
    def fields_in_use(self) -> int:
        """Fields of a process that are between their first and their last visit."""
        return (self.visits - 1) * self.spread + 1

    def pool_fields(self, ahead: int) -> int:
        """Most fields that a process needs at once: between two passes those of both, and the coming."""
        return 2 * self.fields_in_use + ahead + 8

    def is_last(self, visit: Visit, rank: int = 0) -> bool:
        """Whether a field is not visited again in this pass.

        That is not always its visit K - 1: a pass begins with later visits of its last fields.
        """
        owned = self.owned(rank)
        stride = self.stride(rank)
        steps = [(visit.place + number * stride) % owned for number in range(self.visits)]
        return steps[visit.number] == max(steps)

    def owned(self, rank: int) -> int:
        """Fields of a pass that belong to a process."""
        return (self.count - rank + self.world - 1) // self.world

    def stride(self, rank: int = 0) -> int:
        """Time steps between two visits of a field of a process: `spread` where it has fields enough."""
        owned = self.owned(rank)
        if owned >= self.visits * self.spread:
            return self.spread
        if owned not in self._strides:
            self._strides[owned] = _widest_stride(owned, self.visits, self.spread)
        return self._strides[owned]

    def visit(self, position: int) -> Visit:
        """The field of a position of the order of all processes."""
        local, rank = divmod(position, self.world)
        owned = self.owned(rank)
        epoch, place = divmod(local, owned * self.visits)
        step, number = divmod(place, self.visits)
        place = (step - number * self.stride(rank)) % owned
        return Visit(self._field(epoch, place, rank), epoch, number, place)

    def step_of(self, position: int) -> tuple[int, int]:
        """(time step since the run began, rank) of a position."""
        local, rank = divmod(position, self.world)
        return local // self.visits, rank

    def of_step(self, step: int, rank: int) -> list[Visit]:
        """The K visits of a time step of a process."""
        first = (step * self.visits) * self.world + rank
        return [self.visit(first + number * self.world) for number in range(self.visits)]

    def replacement(self, visit: Visit, attempt: int, rank: int = 0) -> int:
        """The field that stands in for one that cannot be read: the same for each of its visits.

        `attempt`: 1 for the first stand-in, 2 for that of a stand-in that is unreadable too.
        """
        shift = Permutation(self.count, self.seed, visit.epoch, "stand-in", attempt)
        return shift(self._field(visit.epoch, visit.place, rank))

    def _field(self, epoch: int, place: int, rank: int) -> int:
        """The field at a process's place of a pass."""
        if epoch not in self._permutations:
            if len(self._permutations) > 3:
                self._permutations.pop(next(iter(self._permutations)))
            self._permutations[epoch] = Permutation(self.count, self.seed, epoch, "fields")
        return self._permutations[epoch](place * self.world + rank)


def _widest_stride(count: int, visits: int, wanted: int) -> int:
    """The stride with the most fields in a time step, then in its neighbours, then nearest to `wanted`.

    A stride that shares a factor with the number of fields meets few of them again and again.
    """

    def quality(stride: int) -> tuple[int, int, int]:
        places = {stride * number % count for number in range(visits)}
        apart = min((min(place, count - place) for place in places if place), default=0)
        return len(places), apart, -abs(stride - wanted)

    return max(range(1, max(count, 2)), key=quality)
