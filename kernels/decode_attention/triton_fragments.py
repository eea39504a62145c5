"""Words of codes as the left operand of the matrix unit, for loops of one warp a program.

As in ``triton_unpack.py`` a code at bit s of a 16-bit half is the subnormal float16 c * 2**(s - 24). Here places go,
lowest first, half of the word, odd byte, word % 4, plane, word // 4: four neighbours along the sum belong to one
thread, as Triton's mma v2 wants them behind a ``tl.join``, and no code moves between threads after its word was read.

Four threads share a token (a channel of values). Where it has fewer than 4 words, each takes a part of one: of 2 words
16 bits, of 1 word a byte. Then the two halves are two bytes, or two halves of a byte, and there is no odd one. Of
bytes, which are loaded as such, Triton wants eight neighbours in a thread: half, two bits of the plane, then thread.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def field_at(place, BITS: tl.constexpr, WORDS: tl.constexpr):
    """(field, s / BITS): which field of WORDS words, a power of two, is at ``place``, at which bit s of its half."""
    half, pair = place % 2, place // 2 % 2
    thread, rest = place // 4 % 4, place // 16
    if WORDS >= 4:
        planes: tl.constexpr = 8 // BITS
        plane = rest % planes
        word, byte = rest // planes * 4 + thread, 2 * half + pair
        field = word * (32 // BITS) + 4 * plane + byte
    elif WORDS == 2:
        plane = rest * 2 + pair
        field = thread // 2 * (32 // BITS) + 4 * plane + thread % 2 * 2 + half
    else:
        thread, plane = place // 8, place // 4 % 2 * 2 + pair
        field = 4 * (plane + 4 // BITS * half) + thread
    return field, plane


@triton.jit
def masked(x, FIELD: tl.constexpr, BITS: tl.constexpr, PLANES: tl.constexpr):
    """The lowest PLANES fields of each byte of both halves of ``x``, in new last dimensions, lowest bit last."""
    if PLANES == 1:
        return x & FIELD
    elif PLANES == 2:
        return tl.join(x & FIELD, x & (FIELD << BITS))
    elif PLANES == 4:
        low = tl.join(x & FIELD, x & (FIELD << BITS))
        return tl.join(low, tl.join(x & (FIELD << 2 * BITS), x & (FIELD << 3 * BITS)))
    else:
        low = tl.join(tl.join(x & FIELD, x & (FIELD << 1)), tl.join(x & (FIELD << 2), x & (FIELD << 3)))
        high = tl.join(tl.join(x & (FIELD << 4), x & (FIELD << 5)), tl.join(x & (FIELD << 6), x & (FIELD << 7)))
        return tl.join(low, high)


@triton.jit
def spread(words, WORDS: tl.constexpr):
    """int32 of each thread's part of words: fields at the lowest bits of its two halves; odd bytes, a new last axis."""
    if WORDS >= 4:
        return tl.join(words, words >> 8)
    elif WORDS == 2:
        x = words.to(tl.int32)
        return x | (x << 8)
    else:
        x = words.to(tl.int32)
        return x | (x << 12)


@triton.jit
def fragment(words, BITS: tl.constexpr, WORDS: tl.constexpr):
    """Words, or of WORDS < 4 parts of them, [N, 4 or more] to float16 [N, places]: c * 2**(s - 24)."""
    rows: tl.constexpr = words.shape[0]
    count: tl.constexpr = words.shape[1]
    planes: tl.constexpr = 8 // BITS if WORDS > 1 else 4 // BITS
    bits_of_part: tl.constexpr = 32 if WORDS >= 4 else 8 * WORDS
    places: tl.constexpr = count * bits_of_part // BITS
    field: tl.constexpr = 0x00010001 * ((1 << BITS) - 1)
    x = spread(tl.reshape(words, (rows, count // 4, 4)), WORDS)
    x = masked(x, field, BITS, planes)  # rows, word // 4, thread, (odd,) planes, lowest bit last
    x = tl.join(x.to(tl.int16), (x >> 16).to(tl.int16))  # and half
    if WORDS >= 4:
        if planes == 2:
            x = tl.permute(x, (0, 1, 4, 2, 3, 5))
        elif planes == 4:
            x = tl.permute(x, (0, 1, 5, 4, 2, 3, 6))
        elif planes == 8:
            x = tl.permute(x, (0, 1, 6, 5, 4, 2, 3, 7))
    elif WORDS == 1:
        x = tl.permute(x, (0, 1, 2, 4, 3, 5))
    elif planes == 4:
        x = tl.permute(x, (0, 1, 4, 2, 3, 5))
    elif planes == 8:
        x = tl.permute(x, (0, 1, 5, 4, 2, 3, 6))
    return tl.reshape(x, (rows, places)).to(tl.float16, bitcast=True)


@triton.jit
def numbers_to_places(x, BITS: tl.constexpr):
    """``x`` [tokens] in the order of places of values of BITS bits, as a column [tokens, 1].

    That is word // 4, plane, word % 4, odd byte, half, highest first; of two words plane // 2, word, half of it,
    plane % 2, byte of that half.
    """
    return numbers_in_order(x, BITS, False)[:, None]


@triton.jit
def numbers_in_order(x, BITS: tl.constexpr, COLUMNS: tl.constexpr):
    """``x`` [tokens] in the order of places, or of columns of logits: there the odd byte is before word % 4."""
    planes: tl.constexpr = 8 // BITS
    count: tl.constexpr = x.shape[0]
    if count * BITS == 64:
        x = tl.reshape(x, (2, planes // 2, 2, 2, 2))
        x = tl.permute(x, (1, 2, 0, 3, 4)) if COLUMNS else tl.permute(x, (1, 0, 3, 2, 4))
    else:
        x = tl.reshape(x, (count // (16 * planes), 4, planes, 2, 2))
        x = tl.permute(x, (0, 2, 4, 1, 3)) if COLUMNS else tl.permute(x, (0, 2, 1, 4, 3))
    return tl.reshape(x, (count,))


@triton.jit
def plane_at(place, BITS: tl.constexpr, WORDS: tl.constexpr):
    """Which plane of a field of BITS bits is at ``place``, where tokens are in the order of WORDS words, 2 or more."""
    planes: tl.constexpr = 8 // BITS
    return (place // 16 * 2 + place // 2 % 2) % planes if WORDS == 2 else place // 16 % planes


@triton.jit
def words_in_order(x, WORDS: tl.constexpr, BITS: tl.constexpr, COLUMNS: tl.constexpr):
    """``x`` [words, tokens] as [tokens, 4 parts of words or more], tokens ordered as in ``numbers_in_order``."""
    planes: tl.constexpr = 8 // BITS
    parts: tl.constexpr = 4 // WORDS if WORDS < 4 else 1
    words: tl.constexpr = x.shape[0]
    count: tl.constexpr = x.shape[1] // parts
    if count * BITS == 64:
        x = tl.reshape(x, (words, 2, planes // 2, 2, 2, 2, parts))
        x = tl.permute(x, (2, 3, 1, 4, 5, 0, 6)) if COLUMNS else tl.permute(x, (2, 1, 4, 3, 5, 0, 6))
    else:
        x = tl.reshape(x, (words, count // (16 * planes), 4, planes, 2, 2, parts))
        x = tl.permute(x, (1, 3, 5, 2, 4, 0, 6)) if COLUMNS else tl.permute(x, (1, 3, 2, 5, 4, 0, 6))
    return tl.reshape(x, (count, words * parts))


@triton.jit
def halves(pairs):
    """float16 of both halves of int32 ``pairs`` [N, M], [N * M * 2]."""
    x = tl.join(pairs.to(tl.int16), (pairs >> 16).to(tl.int16))
    return tl.reshape(x, (pairs.shape[0] * pairs.shape[1] * 2,)).to(tl.float16, bitcast=True)


@triton.jit
def operand_of_pairs(pairs):
    """float16 [N, 2 * M] of both halves of int32 ``pairs`` [N, M]."""
    x = tl.join(pairs.to(tl.int16), (pairs >> 16).to(tl.int16))
    return tl.reshape(x, (pairs.shape[0], pairs.shape[1] * 2)).to(tl.float16, bitcast=True)


@triton.jit
def pairs_of_halves(x):
    """int32 [N, M] of neighbours of float16 ``x`` [N, 2 * M]."""
    x = x.to(tl.int16, bitcast=True).to(tl.int32)
    first, second = tl.split(tl.reshape(x, (x.shape[0], x.shape[1] // 2, 2)))
    return (first & 0xFFFF) | (second << 16)


@triton.jit
def twice(x):
    """int32 of float16 ``x`` in both halves."""
    bits = x.to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF
    return bits | (bits << 16)


@triton.jit
def twice_power(x):
    """``twice`` of float32 ``x``, a power of two that is a normal float16."""
    return ((x.to(tl.int32, bitcast=True) >> 13) - (112 << 10)) * 0x10001


@triton.jit
def times_pairs(x, y, ASM: tl.constexpr):
    """int32: products of both halves of int32 ``x`` and ``y``, float16 numbers."""
    x, y = tl.broadcast(x, y)
    if ASM:
        return tl.inline_asm_elementwise(
            "mul.rn.f16x2 $0, $1, $2;", "=r,r,r", [x, y], dtype=tl.int32, is_pure=True, pack=1
        )
    else:
        low = x.to(tl.int16).to(tl.float16, bitcast=True) * y.to(tl.int16).to(tl.float16, bitcast=True)
        high = (x >> 16).to(tl.int16).to(tl.float16, bitcast=True) * (y >> 16).to(tl.int16).to(tl.float16, bitcast=True)
        low, high = low.to(tl.int16, bitcast=True).to(tl.int32), high.to(tl.int16, bitcast=True).to(tl.int32)
        return (low & 0xFFFF) | (high << 16)


@triton.jit
def times(x, pairs, ASM: tl.constexpr):
    """float16 ``x`` [N, 2 * M] times both halves of int32 ``pairs`` [M]: left to itself, LLVM pairs what are no
    neighbours, and sorts."""
    y = operand_of_pairs(pairs[None, :])
    if ASM:
        a, b = tl.broadcast(x.to(tl.int16, bitcast=True), y.to(tl.int16, bitcast=True))
        a = tl.inline_asm_elementwise(
            "mul.rn.f16x2 $0, $1, $2;", "=r,r,r", [a, b], dtype=tl.int16, is_pure=True, pack=2
        )
        return a.to(tl.float16, bitcast=True)
    else:
        return x * y


@triton.jit
def exp2(x, ASM: tl.constexpr):
    """2**x by one instruction; what is too small for float32's normal numbers is 0."""
    if ASM:
        return tl.inline_asm_elementwise(
            "ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        return tl.exp2(x)


@triton.jit
def power_above(x):
    """The least power of two above ``x`` >= 0, 2**-126 for 0."""
    bits = (x.to(tl.int32, bitcast=True) & 0x7F800000) + 0x00800000
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def inverse_power(x):
    """1 / x of a power of two."""
    return (0x7F000000 - x.to(tl.int32, bitcast=True)).to(tl.float32, bitcast=True)
