"""Numbers to the text of JSON, a whole table at once: the letters are those of Python's `repr`.

A floating-point number is written with the fewest digits that read back as the same number, and among
those with the digits closest to it.  That is Schubfach: scale the number and the two borders of the
interval that rounds to it by a power of ten, so that the interval is 2 to 20 wide and holds at most one
multiple of ten; that multiple is shorter, if it exists, else one of the two integers around the number
is the answer.  Products with 128 bits of the power, of which only "was anything cut off" is kept of the
rest, decide all comparisons as exact arithmetic would.  The time per number is constant, an
eighth of that of `repr`.

R. Giulietti, "The Schubfach way to render doubles", 2020 (section 9 and figure 4).
"""

import json
from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dinocell.compilation import njit

MAX_LETTERS = 25
"""Of one number: -1.7976931348623157e+308 has 24."""

_FIRST_POWER, _LAST_POWER = -292, 324
_LOW = np.uint64(0xFFFFFFFF)
_HALF = np.uint64(32)
_ZERO, _ONE, _FOUR, _TEN = np.uint64(0), np.uint64(1), np.uint64(4), np.uint64(10)
_BLOCK, _SMALL_TEN = np.uint64(10**8), np.uint32(10)
_ZERO_LETTER = np.uint8(48)
_FLOAT, _SIGNED = ord("f"), ord("i")
_MANTISSA = np.uint64((1 << 52) - 1)
_HIDDEN = np.uint64(1 << 52)


@cache
def _powers() -> NDArray[np.uint64]:
    """The upper 128 bits of each power of ten, rounded up: (powers, 2), high and low half."""
    rows = []
    for power in range(_FIRST_POWER, _LAST_POWER + 1):
        shift = 127 - ((power * 1741647) >> 19)  # 127 - floor(log2(10**power))
        top, bottom = (10**power if power > 0 else 1), (10**-power if power < 0 else 1)
        top, bottom = (top << shift, bottom) if shift > 0 else (top, bottom << -shift)
        whole = -(-top // bottom)
        rows.append((whole >> 64, whole & (2**64 - 1)))
    return np.array(rows, np.uint64)


def objects_of_numbers(
    heads: Sequence[str],
    rows: NDArray[np.uint64],
    kinds: NDArray[np.uint8],
    names: Sequence[str],
    tail: str,
) -> NDArray[np.uint8]:
    """Text of JSON with an object of numbers for each row: ``HEAD{"area":12,"solidity":0.5}TAIL``.

    Parameters
    ----------
    heads : N strings of ASCII letters
        What stands before the object.
    rows : (N, C) uint64 ndarray
        The bits of the numbers, which are float64, int64 or uint64 by column.
    kinds : (C,) uint8 ndarray
        `ord` of "f", "i" or "u" for each column.  Infinite and missing values are left out.
    names : C strings
        Of the columns.
    tail : string of ASCII letters
        What stands after each object.

    Returns
    -------
    (L,) uint8 ndarray
        The ASCII letters of all rows, one after the other.
    """
    starts = [json.dumps(name) + ":" for name in names]
    texts = [(_ascii(parts), _stops(parts)) for parts in (heads, starts)]
    return _write_rows(*texts, _ascii([tail]), rows, kinds, _powers())


def _ascii(texts: Sequence[str]) -> NDArray[np.uint8]:
    return np.frombuffer("".join(texts).encode("ascii"), np.uint8)


def _stops(texts: Sequence[str]) -> NDArray[np.int64]:
    return np.cumsum(np.fromiter(map(len, texts), np.int64, len(texts)))


@njit
def _write_rows(
    heads: tuple[NDArray[np.uint8], NDArray[np.int64]],
    starts: tuple[NDArray[np.uint8], NDArray[np.int64]],
    tail: NDArray[np.uint8],
    rows: NDArray[np.uint64],
    kinds: NDArray[np.uint8],
    powers: NDArray[np.uint64],
) -> NDArray[np.uint8]:
    """`objects_of_numbers`; `heads` and `starts` are letters with where each text of them stops."""
    num_rows, num_columns = rows.shape
    per_row = len(starts[0]) + num_columns * (MAX_LETTERS + 1) + len(tail) + 2
    letters = np.empty(len(heads[0]) + num_rows * per_row, np.uint8)
    at = 0
    head = 0
    for row in range(num_rows):
        at = _copy(letters, at, heads[0], head, heads[1][row])
        head = heads[1][row]
        letters[at] = 123  # {
        at += 1
        first = at
        start = 0
        for column in range(num_columns):
            bits = rows[row, column]
            if kinds[column] != _FLOAT or (bits >> np.uint64(52)) & np.uint64(2047) != 2047:
                if at > first:
                    letters[at] = 44  # ,
                    at += 1
                at = _copy(letters, at, starts[0], start, starts[1][column])
                if kinds[column] == _FLOAT:
                    at = _write_float(letters, at, bits, powers)
                else:
                    at = _write_integer(letters, at, bits, kinds[column] == _SIGNED)
            start = starts[1][column]
        letters[at] = 125  # }
        at = _copy(letters, at + 1, tail, 0, len(tail))
    return letters[:at]


@njit
def _copy(
    letters: NDArray[np.uint8], at: int, text: NDArray[np.uint8], begin: int, end: int
) -> int:
    size = end - begin
    source, target = text[begin:end], letters[at : at + size]
    for place in range(size):
        target[place] = source[place]
    return at + size


@njit
def _write_integer(letters: NDArray[np.uint8], at: int, bits: np.uint64, is_signed: bool) -> int:
    """Write an int64 or uint64; returns where its letters end."""
    if is_signed and bits >> np.uint64(63):
        letters[at] = 45  # -
        at += 1
        bits = ~bits + _ONE
    return _write_digits(letters, at, bits, _count_digits(bits))


@njit
def _count_digits(number: np.uint64) -> int:
    count = 1
    while number >= _BLOCK:
        number //= _BLOCK
        count += 8
    rest, power = np.uint32(number), _SMALL_TEN
    while rest >= power:
        power *= _SMALL_TEN
        count += 1
    return count


@njit
def _write_digits(letters: NDArray[np.uint8], at: int, number: np.uint64, count: int) -> int:
    stop = at + count
    while number >= _BLOCK:  # eight digits at a time, because 32 bits divide faster
        rest = np.uint32(number % _BLOCK)
        number //= _BLOCK
        block = letters[stop - 8 : stop]
        for place in range(8):
            block[7 - place] = _ZERO_LETTER + np.uint8(rest % _SMALL_TEN)
            rest //= _SMALL_TEN
        stop -= 8
    rest = np.uint32(number)
    block = letters[at:stop]
    for place in range(stop - at - 1, -1, -1):
        block[place] = _ZERO_LETTER + np.uint8(rest % _SMALL_TEN)
        rest //= _SMALL_TEN
    return at + count


@njit
def _write_float(
    letters: NDArray[np.uint8], at: int, bits: np.uint64, powers: NDArray[np.uint64]
) -> int:
    """Write a finite float64 as `repr` does; returns where its letters end."""
    if bits >> np.uint64(63):
        letters[at] = 45  # -
        at += 1
    digits, exponent = _shortest(bits, powers)
    while digits and digits % _TEN == _ZERO:
        digits //= _TEN
        exponent += 1
    count = _count_digits(digits)
    point = count + exponent if digits else 1  # digits before the decimal point
    if -4 < point <= 0:
        letters[at], letters[at + 1] = 48, 46  # 0.
        at += 2
        for _ in range(-point):
            letters[at] = 48
            at += 1
        return _write_digits(letters, at, digits, count)
    if 0 < point <= 16:
        if count <= point:
            at = _write_digits(letters, at, digits, count)
            for _ in range(point - count):
                letters[at] = 48
                at += 1
            letters[at], letters[at + 1] = 46, 48  # .0
            return at + 2
        end = _write_digits(letters, at + 1, digits, count)
        for place in range(at, at + point):
            letters[place] = letters[place + 1]
        letters[at + point] = 46
        return end
    end = _write_digits(letters, at + 1, digits, count)
    letters[at] = letters[at + 1]
    letters[at + 1] = 46
    at = end if count > 1 else at + 1
    power = point - 1
    letters[at], letters[at + 1] = 101, 43 if power >= 0 else 45  # e, + or -
    size = np.uint64(abs(power))
    return _write_digits(letters, at + 2, size, max(2, _count_digits(size)))


@njit
def _shortest(bits: np.uint64, powers: NDArray[np.uint64]) -> tuple[Any, Any]:
    """Digits and exponent, digits × 10**exponent, of a float64 without its sign; see the module's text."""
    fraction = bits & _MANTISSA
    biased = np.int64((bits >> np.uint64(52)) & np.uint64(2047))
    if biased == 0 and fraction == _ZERO:
        return _ZERO, 0
    value = fraction | _HIDDEN if biased else fraction  # the number is value * 2**power
    power = biased - 1075 if biased else -1074
    if -53 < power <= 0 and value & ((_ONE << np.uint64(-power)) - _ONE) == _ZERO:
        return value >> np.uint64(-power), 0  # a whole number below 2**53
    uneven = fraction == _ZERO and biased > 1  # the lower neighbour is half as far away
    scale = (power * 1262611 - (524031 if uneven else 0)) >> 22  # floor(log10) of the interval
    shift = np.uint64(power + ((-scale * 1741647) >> 19) + 1)
    place = -scale - _FIRST_POWER
    high, low = powers[place, 0], powers[place, 1]
    four = _FOUR * value
    lower = _scaled(high, low, (four - (_ONE if uneven else np.uint64(2))) << shift)
    middle = _scaled(high, low, four << shift)
    upper = _scaled(high, low, (four + np.uint64(2)) << shift)
    if value & _ONE:  # the ends of the interval round to an even neighbour
        lower += _ONE
        upper -= _ONE
    down = middle // _FOUR
    if down >= _TEN:
        tens = np.uint64(40) * (down // _TEN)
        below, above = lower <= tens, tens + np.uint64(40) <= upper
        if below != above:
            return down // _TEN + (_ONE if above else _ZERO), scale + 1
    below, above = lower <= _FOUR * down, _FOUR * down + _FOUR <= upper
    if below != above:
        return down + (_ONE if above else _ZERO), scale
    half = _FOUR * down + np.uint64(2)
    up = middle > half or (middle == half and down & _ONE != _ZERO)
    return down + (_ONE if up else _ZERO), scale


@njit
def _scaled(high: np.uint64, low: np.uint64, factor: np.uint64) -> np.uint64:
    """The upper 64 bits of a product of 128 and 64 bits, its last bit set if anything is cut off."""
    carry, _ = _product(low, factor)
    top, rest = _product(high, factor)
    rest += carry
    if rest < carry:
        top += _ONE
    return top | (_ONE if rest > _ONE else _ZERO)


@njit
def _product(left: np.uint64, right: np.uint64) -> tuple[np.uint64, np.uint64]:
    """The upper and the lower 64 bits of a product."""
    left_low, left_high = left & _LOW, left >> _HALF
    right_low, right_high = right & _LOW, right >> _HALF
    first = left_low * right_low
    cross = left_high * right_low + (first >> _HALF)
    other = left_low * right_high + (cross & _LOW)
    upper = left_high * right_high + (cross >> _HALF) + (other >> _HALF)
    return upper, (other << _HALF) | (first & _LOW)
