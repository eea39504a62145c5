"""Words of packed codes as operands of the matrix unit, and the order in which codes come out of them.

``unpack`` masks a word once for two codes and takes each 16-bit half for a float16: code c at bit s
of a half is the subnormal c * 2**(s - 24), exactly. The factor 2**s goes into the other operand of
the product, 2**-24 into the result. Channels of keys (tokens of values) come out in another order,
in which neighbours along the sum are the two halves of a word, as matrix units want them; the other
operand is put in the same order.
"""

from __future__ import annotations

import triton
import triton.language as tl

# What a kernel knows of its keys (or values) before it runs is one tuple, KEYS (or VALUES), and these are the places
# in it. It is no NamedTuple since Inductor copies functions and constants of a kernel into its code, but no classes.
DIM = tl.constexpr(0)  # channels of a head
CHANNELS = tl.constexpr(1)  # channels of a tile of codes: DIM, filled up to whole words and a power of two
BITS = tl.constexpr(2)  # bits per code, or per field where codes are planes of fields (``kernels/packing.py``)
LANES = tl.constexpr(3)  # words that ``unpack`` takes as neighbours
TOKENS = tl.constexpr(4)  # tokens that the codes have room for
GROUP = tl.constexpr(5)  # tokens (values: channels) that share a scale
STRIDE = tl.constexpr(6)  # numbers from one group's scales to those of the next
FOLD = tl.constexpr(7)  # whether scales go to the other operand
BITCAST = tl.constexpr(8)  # whether codes are taken for float16 numbers, not converted
MODEL = tl.constexpr(9)  # what keys and values in full precision are multiplied in: "fp16", "bf16" or "fp32"
# Of ranked keys (``triton_ranked.py``), whose planes of 4, 2 and 1 bits are such tuples, too, of DIM fields each.
RANKED = tl.constexpr(10)  # whether channels are ranked; CHANNELS are then DIM, filled up to a power of two
PLANES = tl.constexpr(11)  # the three planes, of no CHANNELS where there is none
COUNTS = tl.constexpr(12)  # of ``kernels/triton_widths.py``
NORMS = tl.constexpr(14)  # whether they were divided by the norms of their tokens
# Of both.
WRAP = tl.constexpr(15)  # tokens after which codes start over in the storage of a sliding window; 0: they do not
# Of values.
ROTATION = tl.constexpr(10)  # in pieces of two to this power; -1: with zero points; -2: about zero, not rotated here
# Of both: such a tuple, too, for the fields of the lowest bits, whose plane follows; of 0 BITS where there are none.
LOWER = tl.constexpr(13)


@triton.jit
def code_slot(t0, SIDE: tl.constexpr):
    """Where the codes of the tile at ``t0`` begin: no tile lies across the end of codes that start over."""
    return t0 % SIDE[WRAP] if SIDE[WRAP] > 0 else t0


@triton.jit
def word_order(COUNT: tl.constexpr, SIDE: tl.constexpr):
    """(element, factor) at each of COUNT places in the order of ``unpack``: element of the packed axis, 1 / 2**s."""
    lanes: tl.constexpr = SIDE[LANES]
    planes: tl.constexpr = 8 // SIDE[BITS]
    i = tl.arange(0, COUNT)
    half = i % 2
    lane = i // 2 % lanes
    odd = i // (2 * lanes) % 2
    plane = i // (4 * lanes) % planes
    word = i // (4 * lanes * planes) * lanes + lane
    element = word * (32 // SIDE[BITS]) + 4 * plane + 2 * half + odd
    return element, tl.exp2((-SIDE[BITS] * plane).to(tl.float32))


@triton.jit
def to_word_order(x, SIDE: tl.constexpr):
    """Put the rows of ``x`` [N, ROWS], in natural order, in the order of ``unpack``."""
    lanes: tl.constexpr = SIDE[LANES]
    planes: tl.constexpr = 8 // SIDE[BITS]
    high: tl.constexpr = x.shape[0] * SIDE[BITS] // 32 // lanes
    x = tl.reshape(x, (high, lanes, planes, 2, 2, x.shape[1]))
    return tl.reshape(tl.permute(x, (0, 2, 4, 1, 3, 5)), (high * lanes * planes * 4, x.shape[5]))


@triton.jit
def masked_planes(x, BITS_PER_CODE: tl.constexpr):
    """Two codes per mask, one of each half; planes end up in the last dimensions, lowest bit first."""
    if BITS_PER_CODE == 8:
        x = x & 0x00FF00FF
    elif BITS_PER_CODE == 4:
        x = tl.join(x & 0x000F000F, x & 0x00F000F0)
    elif BITS_PER_CODE == 2:
        x = tl.join(tl.join(x & 0x00030003, x & 0x000C000C), tl.join(x & 0x00300030, x & 0x00C000C0))
    else:
        low = tl.join(tl.join(x & 0x00010001, x & 0x00020002), tl.join(x & 0x00040004, x & 0x00080008))
        high = tl.join(tl.join(x & 0x00100010, x & 0x00200020), tl.join(x & 0x00400040, x & 0x00800080))
        x = tl.join(low, high)
    return x


@triton.jit
def unpack(words, SIDE: tl.constexpr):
    """int32 ``words`` [N, W] to float16 [N, W * 32 / BITS] in word order: code * 2**s, times 2**-24 with BITCAST."""
    rows: tl.constexpr = words.shape[0]
    count: tl.constexpr = words.shape[1] * (32 // SIDE[BITS])
    x = tl.reshape(words, (rows, words.shape[1] // SIDE[LANES], SIDE[LANES]))
    x = masked_planes(tl.join(x, x >> 8), SIDE[BITS])
    x = tl.join(x.to(tl.int16), (x >> 16).to(tl.int16))
    if SIDE[BITS] == 8:
        x = tl.permute(x, (0, 1, 3, 2, 4))
    elif SIDE[BITS] == 4:
        x = tl.permute(x, (0, 1, 4, 3, 2, 5))
    elif SIDE[BITS] == 2:
        x = tl.permute(x, (0, 1, 5, 4, 3, 2, 6))
    else:
        x = tl.permute(x, (0, 1, 6, 5, 4, 3, 2, 7))
    x = tl.reshape(x, (rows, count))
    return x.to(tl.float16, bitcast=True) if SIDE[BITCAST] else x.to(tl.float16)
