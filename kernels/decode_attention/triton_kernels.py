"""Triton kernels of decode attention: split-K flash decoding on packed codes.

One program takes one split of the tokens of one KV head, with all its query heads and query tokens
as the ``ROWS`` columns of two matrix products, which are transposed so that the long axes, tokens
and channels, fill the matrix unit and few query rows waste little of it:

    logits^T [tokens, ROWS] = K [tokens, channels]  @  q^T [channels, ROWS]
    out^T  [channels, ROWS] = V^T [channels, tokens] @ p^T [tokens, ROWS]

Codes enter the products as they are. ``unpack`` masks a word once for two codes and takes each
16-bit half for a float16: code c at bit s of a half is the subnormal c * 2**(s - 24), exactly. The
factor 2**s goes into the other operand, 2**-24 into the result. Channels of keys (tokens of values)
come out of ``unpack`` in another order, in which neighbours along the sum are the two halves of a
word, as matrix units want them; the other operand is put in the same order.

Scales and zero points never meet the codes. With one scale a channel and token group, keys give

    sum_d q_d (c_td s_d + z_d) = sum_d (q_d s_d) c_td + sum_d q_d z_d

so a tile needs q * s and one number a row; with one scale a token, values do the same with p * s and
sum_t p_t z_t. What goes to float16 is divided by its largest number first, so that neither range nor
precision of float16 depends on the model's scales. Groups smaller than a tile (FOLD_K, FOLD_V false)
are dequantized element by element.

Tokens are in four zones (``kernels/layout.py``): keys and values in codes, divided over the first SPLITS
programs; keys in codes and values in the ring, in the next program; both in the ring, and the sinks,
in the last program. Behind them, up to ``MAX_LEN``, are tokens not written yet, which read as zero and
count in the softmax as far as the mask lets them: only the mask is read there.

A chunk of more tokens than the ring takes brings its own, which follow the ring's. Its query rows alone
keep a GPU busy, so the last split of its codes goes on to the other zones.
"""

from __future__ import annotations

import triton
import triton.language as tl

# float16 operands are scaled so that their largest number is this.
LARGEST = tl.constexpr(2.0**14)


@triton.jit
def word_order(i, BITS: tl.constexpr, LANES: tl.constexpr):
    """(element, factor) at place ``i`` of the order of ``unpack``: element of the packed axis, 1 / 2**s."""
    planes: tl.constexpr = 8 // BITS
    half = i % 2
    lane = i // 2 % LANES
    odd = i // (2 * LANES) % 2
    plane = i // (4 * LANES) % planes
    word = i // (4 * LANES * planes) * LANES + lane
    element = word * (32 // BITS) + 4 * plane + 2 * half + odd
    return element, tl.exp2((-BITS * plane).to(tl.float32))


@triton.jit
def to_word_order(x, BITS: tl.constexpr, LANES: tl.constexpr):
    """Put the rows of ``x`` [N, ROWS], in natural order, in the order of ``unpack``."""
    planes: tl.constexpr = 8 // BITS
    high: tl.constexpr = x.shape[0] * BITS // 32 // LANES
    x = tl.reshape(x, (high, LANES, planes, 2, 2, x.shape[1]))
    return tl.reshape(tl.permute(x, (0, 2, 4, 1, 3, 5)), (high * LANES * planes * 4, x.shape[5]))


@triton.jit
def unpack(words, BITS: tl.constexpr, LANES: tl.constexpr, BITCAST: tl.constexpr):
    """int32 ``words`` [N, W] to float16 [N, W * 32 / BITS] in word order: code * 2**s, times 2**-24 with BITCAST."""
    rows: tl.constexpr = words.shape[0]
    count: tl.constexpr = words.shape[1] * (32 // BITS)
    x = tl.reshape(words, (rows, words.shape[1] // LANES, LANES))
    x = tl.join(x, x >> 8)
    # Two codes, one of each half, a mask; planes end up in the last dimensions, lowest bit first.
    if BITS == 8:
        x = x & 0x00FF00FF
    elif BITS == 4:
        x = tl.join(x & 0x000F000F, x & 0x00F000F0)
    elif BITS == 2:
        x = tl.join(tl.join(x & 0x00030003, x & 0x000C000C), tl.join(x & 0x00300030, x & 0x00C000C0))
    else:
        low = tl.join(tl.join(x & 0x00010001, x & 0x00020002), tl.join(x & 0x00040004, x & 0x00080008))
        high = tl.join(tl.join(x & 0x00100010, x & 0x00200020), tl.join(x & 0x00400040, x & 0x00800080))
        x = tl.join(low, high)
    x = tl.join(x.to(tl.int16), (x >> 16).to(tl.int16))
    if BITS == 8:
        x = tl.permute(x, (0, 1, 3, 2, 4))
    elif BITS == 4:
        x = tl.permute(x, (0, 1, 4, 3, 2, 5))
    elif BITS == 2:
        x = tl.permute(x, (0, 1, 5, 4, 3, 2, 6))
    else:
        x = tl.permute(x, (0, 1, 6, 5, 4, 3, 2, 7))
    x = tl.reshape(x, (rows, count))
    return x.to(tl.float16, bitcast=True) if BITCAST else x.to(tl.float16)


@triton.jit
def scaled_to(x, largest):
    """``x`` with ``largest`` brought to LARGEST, and the factor that undoes it."""
    largest = tl.where(largest > 0, largest, 1.0)
    return x * (LARGEST / largest), largest * (1.0 / LARGEST)


@triton.jit
def rounded(x, DTYPE: tl.constexpr):
    """``x`` in the dtype that DTYPE names."""
    if DTYPE == "fp16":
        return x.to(tl.float16)
    elif DTYPE == "bf16":
        return x.to(tl.bfloat16)
    else:
        return x.to(tl.float32)


@triton.jit
def product(a, b, DTYPE: tl.constexpr):
    """a @ b in float32, from operands of DTYPE: "fp16", "bf16" or "fp32"."""
    return tl.dot(rounded(a, DTYPE), rounded(b, DTYPE), input_precision="ieee")


@triton.jit
def tanh(x):
    """Accurate to some float32 roundings, relative to the result, from arithmetic that every target has."""
    x2 = x * x
    small = x * (1 + x2 * (-1 / 3 + x2 * (2 / 15 + x2 * (-17 / 315 + x2 * (62 / 2835)))))
    large = 1 - 2 / (tl.exp(2 * tl.abs(x)) + 1)
    return tl.where(tl.abs(x) < 0.3, small, tl.where(x < 0, -large, large))


@triton.jit
def mask_rows(mask, rows, valid, b, h, GROUP: tl.constexpr, QUERY: tl.constexpr, MASK: tl.constexpr,
              MASK_BATCH: tl.constexpr, MASK_HEADS: tl.constexpr, MASK_QUERY: tl.constexpr,
              MAX_LEN: tl.constexpr):  # fmt: skip
    """Where the mask's row of each query row begins: [ROWS], or [1] if all rows share one."""
    batch = b if MASK_BATCH > 1 else 0
    if MASK_HEADS * MASK_QUERY == 1:
        row = tl.zeros((1,), tl.int64) + batch
    else:
        head = h * GROUP + rows // QUERY if MASK_HEADS > 1 else rows * 0
        query = rows % QUERY if MASK_QUERY > 1 else rows * 0
        row = tl.where(valid, (batch * MASK_HEADS + head) * MASK_QUERY + query, 0).to(tl.int64)
    return row if MASK == "none" else mask + row * MAX_LEN


@triton.jit
def load_mask(mask_row, tokens, some, MASK: tl.constexpr):
    """The mask [tokens, ROWS or 1], as it is; nothing of use without one."""
    if MASK == "none":
        bias = tl.zeros((1, 1), tl.int1)
    else:
        bias = tl.load(mask_row[None, :] + tokens[:, None], mask=some[:, None], other=0)
    return bias


@triton.jit
def add_mask(logits, bias, seen, MASK: tl.constexpr):
    """Logits [tokens, ROWS] with the mask on them; -inf where ``seen`` [tokens, ROWS or 1] is false."""
    if MASK == "bool":
        seen = seen & bias.to(tl.int1)
    elif MASK == "float":
        logits += bias.to(tl.float32)
    return tl.where(seen, logits, float("-inf"))


@triton.jit
def finish_logits(logits, bias, tokens, inside, position, SOFTCAP: tl.constexpr, WINDOW: tl.constexpr,
                  MASK: tl.constexpr):  # fmt: skip
    """Softcap, sliding window and mask. ``inside`` [tokens] says which tokens belong to this tile."""
    if SOFTCAP != 0.0:
        logits = SOFTCAP * tanh(logits * (1.0 / SOFTCAP))
    seen = inside[:, None]
    if WINDOW > 0:
        seen = seen & (tokens[:, None] > position[None, :] - WINDOW)
    return add_mask(logits, bias, seen, MASK)


@triton.jit
def soften(logits, top):
    """One step of the online softmax: (p, factor for what was summed so far, new top)."""
    new_top = tl.maximum(top, tl.max(logits, 0))
    base = tl.where(new_top == float("-inf"), 0.0, new_top)
    return tl.exp(logits - base[None, :]), tl.exp(top - base), new_top


@triton.jit
def in_zone(tokens, low, high, first_sink, SINKS: tl.constexpr):
    """Which ``tokens`` belong to the zone [low, high): sinks belong to their own."""
    inside = (tokens >= low) & (tokens < high)
    if SINKS > 0:
        inside = inside & ((tokens < first_sink) | (tokens >= first_sink + SINKS))
    return inside


@triton.jit
def key_words(codes, t0, STRIDE: tl.constexpr, DK: tl.constexpr, K_BITS: tl.constexpr, K_WORDS: tl.constexpr,
              TILE: tl.constexpr):  # fmt: skip
    """Words of a tile of keys [TILE, K_WORDS].

    Masked by the bounds of the storage, which are known here, so that loads stay vectors; what is
    outside the zone is masked in the logits.
    """
    tokens, w = t0 + tl.arange(0, TILE), tl.arange(0, K_WORDS)
    here = (tokens < STRIDE)[:, None] & (w < (DK * K_BITS + 31) // 32)[None, :]
    return tl.load(codes + w[None, :] * STRIDE + tokens[:, None], mask=here, other=0)


@triton.jit
def key_scales(scale, zero, t0, limit, DK: tl.constexpr, K_GROUP: tl.constexpr, CHANNELS: tl.constexpr,
               FOLD_K: tl.constexpr):  # fmt: skip
    """(scales, zeros) [CHANNELS] of a tile that is one group; zeros if ``t0`` is not below ``limit``."""
    if FOLD_K:
        d = tl.arange(0, CHANNELS)
        here = (d < DK) & (t0 + tl.arange(0, 1) < limit)
        s = tl.load(scale + t0 // K_GROUP * DK + d, mask=here, other=0.0)
        z = tl.load(zero + t0 // K_GROUP * DK + d, mask=here, other=0.0)
    else:
        s, z = tl.zeros((1,), tl.float32), tl.zeros((1,), tl.float32)
    return s, z


@triton.jit
def code_logits(words, s, z, scale, zero, q, tokens, inside, SM_SCALE: tl.constexpr, DK: tl.constexpr,
                K_BITS: tl.constexpr, K_GROUP: tl.constexpr, K_LANES: tl.constexpr, FOLD_K: tl.constexpr,
                BITCAST: tl.constexpr, CODE: tl.constexpr, MODEL: tl.constexpr):  # fmt: skip
    """Scaled logits [TILE, ROWS] of keys in codes. ``q`` [channels, ROWS] is float32, in word order,
    with the factors if FOLD_K."""
    c = unpack(words, K_BITS, K_LANES, BITCAST)
    unit: tl.constexpr = 2.0**24 if BITCAST else 1.0
    d, factor = word_order(tl.arange(0, q.shape[0]), K_BITS, K_LANES)
    if FOLD_K:
        s = to_word_order(s.to(tl.float32)[:, None], K_BITS, K_LANES)
        z = to_word_order(z.to(tl.float32)[:, None], K_BITS, K_LANES) / factor[:, None]
        offset = tl.sum(q * z, 0)
        qs = q * s
        qs, back = scaled_to(qs, tl.max(tl.abs(qs), 0)[None, :])
        logits = product(c, qs, CODE) * (back * (unit * SM_SCALE)) + (offset * SM_SCALE)[None, :]
    else:
        at = (tokens // K_GROUP * DK)[:, None] + d[None, :]
        here = inside[:, None] & (d < DK)[None, :]
        s = tl.load(scale + at, mask=here, other=0.0).to(tl.float32)
        z = tl.load(zero + at, mask=here, other=0.0).to(tl.float32)
        k = c.to(tl.float32) * (factor * unit)[None, :] * s + z
        logits = product(k, q, MODEL) * SM_SCALE
    return logits


@triton.jit
def value_words(codes, t0, WORDS: tl.constexpr, DV: tl.constexpr, V_BITS: tl.constexpr, TILE: tl.constexpr,
                CHANNELS: tl.constexpr):  # fmt: skip
    """Words of a tile of values [CHANNELS, TILE * V_BITS / 32], masked as in ``key_words``."""
    w, d = t0 // (32 // V_BITS) + tl.arange(0, TILE * V_BITS // 32), tl.arange(0, CHANNELS)
    return tl.load(codes + w[None, :] * DV + d[:, None], mask=(d < DV)[:, None] & (w < WORDS)[None, :], other=0)


@triton.jit
def value_scales(scale, zero, t0, limit, STRIDE: tl.constexpr, TILE: tl.constexpr, FOLD_V: tl.constexpr):
    """(scales, zeros) [TILE] of a tile with one group a token; zeros if ``t0`` is not below ``limit``."""
    if FOLD_V:
        tokens = t0 + tl.arange(0, TILE)
        here = (tokens < STRIDE) & (t0 + tl.arange(0, 1) < limit)
        s = tl.load(scale + tokens, mask=here, other=0.0)
        z = tl.load(zero + tokens, mask=here, other=0.0)
    else:
        s, z = tl.zeros((1,), tl.float32), tl.zeros((1,), tl.float32)
    return s, z


@triton.jit
def code_values(words, s, z, scale, zero, p, t0, low, high, first_sink, STRIDE: tl.constexpr, DV: tl.constexpr,
                V_BITS: tl.constexpr, V_GROUP: tl.constexpr, V_LANES: tl.constexpr, TILE: tl.constexpr,
                FOLD_V: tl.constexpr, BITCAST: tl.constexpr, SINKS: tl.constexpr, CODE: tl.constexpr,
                MODEL: tl.constexpr):  # fmt: skip
    """sum_t p_t v_t of values in codes [CHANNELS, ROWS], and p_t z_t [TILE, ROWS], whose sum goes to every channel."""
    c = unpack(words, V_BITS, V_LANES, BITCAST)
    unit: tl.constexpr = 2.0**24 if BITCAST else 1.0
    if FOLD_V:
        tokens = t0 + tl.arange(0, TILE)
        inside = in_zone(tokens, low, high, first_sink, SINKS)
        s = tl.where(inside, s.to(tl.float32), 0.0)
        z = tl.where(inside, z.to(tl.float32), 0.0)
        offset = p * z[:, None]
        s, back = scaled_to(s, tl.max(tl.abs(s), 0))
        s = s * tl.exp2((-V_BITS * (tokens % (32 // V_BITS) // 4)).to(tl.float32))  # the factor of ``word_order``
        ps = to_word_order(rounded(p * s[:, None], CODE), V_BITS, V_LANES)
        out = product(c, ps, CODE) * (back * unit)
    else:
        place, factor = word_order(tl.arange(0, TILE), V_BITS, V_LANES)
        tokens, d = t0 + place, tl.arange(0, words.shape[0])
        here = (d < DV)[:, None] & in_zone(tokens, low, high, first_sink, SINKS)[None, :]
        at = (d // V_GROUP * STRIDE)[:, None] + tokens[None, :]
        s = tl.load(scale + at, mask=here, other=0.0).to(tl.float32)
        z = tl.load(zero + at, mask=here, other=0.0).to(tl.float32)
        v = c.to(tl.float32) * (factor * unit)[None, :] * s + z
        ps = to_word_order(rounded(p * LARGEST, MODEL), V_BITS, V_LANES)
        out = product(v, ps, MODEL) * (1.0 / LARGEST)
        offset = tl.zeros((1, 1), tl.float32)
    return out, offset


@triton.jit
def full_values(values, slots, inside, p, DV: tl.constexpr, CHANNELS: tl.constexpr, MODEL: tl.constexpr):
    """sum_t p_t v_t [CHANNELS, ROWS] of full-precision values in rows ``slots``."""
    d = tl.arange(0, CHANNELS)
    v = tl.load(values + slots[None, :] * DV + d[:, None], mask=inside[None, :] & (d < DV)[:, None], other=0.0)
    return product(v, p * LARGEST, MODEL) * (1.0 / LARGEST)


@triton.jit
def attend_full(keys, values, slots, tokens, inside, q, mask_row, position, top, total, acc, SM_SCALE: tl.constexpr,
                SOFTCAP: tl.constexpr, WINDOW: tl.constexpr, MASK: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr,
                K_CHANNELS: tl.constexpr, V_CHANNELS: tl.constexpr, MODEL: tl.constexpr):  # fmt: skip
    """A tile of ``tokens`` whose keys and values are in rows ``slots`` of two tensors: new (top, total, acc)."""
    d = tl.arange(0, K_CHANNELS)
    k = tl.load(keys + slots[:, None] * DK + d[None, :], mask=inside[:, None] & (d < DK)[None, :], other=0.0)
    bias = load_mask(mask_row, tokens, inside, MASK)
    logits = product(k, q, MODEL) * SM_SCALE
    logits = finish_logits(logits, bias, tokens, inside, position, SOFTCAP, WINDOW, MASK)
    p, alpha, top = soften(logits, top)
    acc = acc * alpha[None, :] + full_values(values, slots, inside, p, DV, V_CHANNELS, MODEL)
    return top, total * alpha + tl.sum(p, 0), acc


@triton.jit
def unwritten(mask_row, low, high, MASK: tl.constexpr, TAIL: tl.constexpr):
    """(top, total) of the logits of tokens [low, high), whose keys are zero: that of the mask alone."""
    top = tl.full(mask_row.shape, float("-inf"), tl.float32)
    total = tl.zeros(mask_row.shape, tl.float32)
    for t0 in tl.range(low, high, TAIL):
        tokens = t0 + tl.arange(0, TAIL)
        bias = load_mask(mask_row, tokens, tokens < high, MASK)
        logits = tl.zeros((TAIL, mask_row.shape[0]), tl.float32)
        logits = add_mask(logits, bias, (tokens < high)[:, None], MASK)
        p, alpha, top = soften(logits, top)
        total = total * alpha + tl.sum(p, 0)
    return top, total


@triton.jit
def decode_kernel(
    q_ptr, k_codes, k_scale, k_zero, k_ring, k_sink, v_codes, v_scale, v_zero, v_ring, v_sink, start_ptr, past_ptr,
    mask_ptr, k_new, v_new, part_ptr, stats_ptr,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, QUERY: tl.constexpr, NEW: tl.constexpr, DK: tl.constexpr,
    DV: tl.constexpr, MAX_LEN: tl.constexpr, K_TOKENS: tl.constexpr, V_TOKENS: tl.constexpr, V_STRIDE: tl.constexpr,
    K_GROUPS: tl.constexpr, RING: tl.constexpr, SINKS: tl.constexpr, RESIDUAL: tl.constexpr,
    K_BITS: tl.constexpr, K_GROUP: tl.constexpr, V_BITS: tl.constexpr, V_GROUP: tl.constexpr,
    SM_SCALE: tl.constexpr, SOFTCAP: tl.constexpr, WINDOW: tl.constexpr, MASK: tl.constexpr,
    MASK_BATCH: tl.constexpr, MASK_HEADS: tl.constexpr, MASK_QUERY: tl.constexpr,
    HAS_NEW: tl.constexpr, ROWS: tl.constexpr, ROW_BLOCKS: tl.constexpr, SPLITS: tl.constexpr, MIXED: tl.constexpr,
    PARTS: tl.constexpr, TILE: tl.constexpr, FULL_TILE: tl.constexpr, TAIL: tl.constexpr, STAGES: tl.constexpr,
    FULL_STAGES: tl.constexpr, K_WORDS: tl.constexpr, K_LANES: tl.constexpr, V_LANES: tl.constexpr,
    CODE_CHANNELS: tl.constexpr, K_CHANNELS: tl.constexpr, V_CHANNELS: tl.constexpr,
    FOLD_K: tl.constexpr, FOLD_V: tl.constexpr, BITCAST: tl.constexpr, CODE: tl.constexpr, MODEL: tl.constexpr,
):  # fmt: skip
    """One split of one KV head (times ROWS query rows): unnormalized output, top and total of each row."""
    split = tl.program_id(0)
    h, b = tl.program_id(1) // ROW_BLOCKS, tl.program_id(2)
    bh = (b * KV_HEADS + h).to(tl.int64)
    k_codes += bh * ((DK * K_BITS + 31) // 32 * K_TOKENS)
    v_codes += bh * (V_TOKENS * V_BITS // 32 * DV)
    k_scale += bh * (K_GROUPS * DK)
    k_zero += bh * (K_GROUPS * DK)
    v_scale += bh * (DV // V_GROUP * V_STRIDE)
    v_zero += bh * (DV // V_GROUP * V_STRIDE)
    k_ring += bh * (RING * DK)
    v_ring += bh * (RING * DV)
    last = split == PARTS - 1

    past = tl.load(past_ptr).to(tl.int32)
    first_sink = tl.load(start_ptr + b).to(tl.int32) if SINKS > 0 else 0
    stored = past + NEW
    first = tl.maximum(past - WINDOW + 1, 0) if WINDOW > 0 else 0
    k_limit = past // RESIDUAL * RESIDUAL
    v_limit = tl.maximum(past - RESIDUAL, 0)

    # Row r is query token r % QUERY of query head r // QUERY of this KV head.
    rows = tl.program_id(1) % ROW_BLOCKS * ROWS + tl.arange(0, ROWS)
    valid = rows < GROUP * QUERY
    position = past + rows % QUERY
    out_rows = bh * (GROUP * QUERY) + rows
    mask_row = mask_rows(
        mask_ptr, rows, valid, b, h, GROUP, QUERY, MASK, MASK_BATCH, MASK_HEADS, MASK_QUERY, MAX_LEN
    )

    top = tl.full((ROWS,), float("-inf"), tl.float32)
    acc = tl.zeros((V_CHANNELS, ROWS), tl.float32)

    d, factor = word_order(tl.arange(0, CODE_CHANNELS), K_BITS, K_LANES)
    at = out_rows[None, :] * DK + d[:, None]
    q = tl.load(q_ptr + at, mask=valid[None, :] & (d < DK)[:, None], other=0.0).to(tl.float32)
    if FOLD_K:
        q *= factor[:, None]

    begin = first // TILE * TILE
    tiles = tl.cdiv(tl.maximum(v_limit - begin, 0), TILE)
    low = begin + split * tl.cdiv(tiles, SPLITS) * TILE
    high = tl.where(split < SPLITS, tl.minimum(low + tl.cdiv(tiles, SPLITS) * TILE, v_limit), low)
    # Codes are loaded ahead by the compiler's pipelining, which leaves small loads alone: these are
    # carried from one tile to the next. Sums over tokens are kept a token of the tile until the end.
    ks, kz = key_scales(k_scale, k_zero, low, high, DK, K_GROUP, CODE_CHANNELS, FOLD_K)
    vs, vz = value_scales(v_scale, v_zero, low, high, V_STRIDE, TILE, FOLD_V)
    ahead = low + tl.arange(0, TILE)
    seen = load_mask(mask_row, ahead, ahead < high, MASK)
    totals = tl.zeros((TILE, ROWS), tl.float32)
    offsets = tl.zeros((TILE, ROWS), tl.float32)
    for t0 in tl.range(low, high, TILE, num_stages=STAGES):
        ahead = t0 + TILE + tl.arange(0, TILE)
        ks1, kz1 = key_scales(k_scale, k_zero, t0 + TILE, high, DK, K_GROUP, CODE_CHANNELS, FOLD_K)
        vs1, vz1 = value_scales(v_scale, v_zero, t0 + TILE, high, V_STRIDE, TILE, FOLD_V)
        seen1 = load_mask(mask_row, ahead, ahead < high, MASK)
        tokens = t0 + tl.arange(0, TILE)
        inside = in_zone(tokens, first, v_limit, first_sink, SINKS)
        words = key_words(k_codes, t0, K_TOKENS, DK, K_BITS, K_WORDS, TILE)
        logits = code_logits(
            words, ks, kz, k_scale, k_zero, q, tokens, inside, SM_SCALE, DK, K_BITS, K_GROUP, K_LANES, FOLD_K, BITCAST,
            CODE, MODEL,
        )
        logits = finish_logits(logits, seen, tokens, inside, position, SOFTCAP, WINDOW, MASK)
        p, alpha, top = soften(logits, top)
        words = value_words(v_codes, t0, V_TOKENS * V_BITS // 32, DV, V_BITS, TILE, V_CHANNELS)
        out, offset = code_values(
            words, vs, vz, v_scale, v_zero, p, t0, first, v_limit, first_sink, V_STRIDE, DV, V_BITS, V_GROUP, V_LANES,
            TILE, FOLD_V, BITCAST, SINKS, CODE, MODEL,
        )
        acc = acc * alpha[None, :] + out
        totals = totals * alpha[None, :] + p
        offsets = offsets * alpha[None, :] + offset
        ks, kz, vs, vz, seen = ks1, kz1, vs1, vz1, seen1
    total = tl.sum(totals, 0)
    acc += tl.sum(offsets, 0)[None, :]

    mixed = tl.maximum(v_limit, first)
    begin = mixed // FULL_TILE * FULL_TILE
    for t0 in tl.range(begin, tl.where(split == MIXED, k_limit, begin), FULL_TILE, num_stages=FULL_STAGES):
        tokens = t0 + tl.arange(0, FULL_TILE)
        inside = in_zone(tokens, mixed, k_limit, first_sink, SINKS)
        codes = key_words(k_codes, t0, K_TOKENS, DK, K_BITS, K_WORDS, FULL_TILE)
        s, z = key_scales(k_scale, k_zero, t0, k_limit, DK, K_GROUP, CODE_CHANNELS, FOLD_K)
        logits = code_logits(
            codes, s, z, k_scale, k_zero, q, tokens, inside, SM_SCALE, DK, K_BITS, K_GROUP, K_LANES, FOLD_K, BITCAST,
            CODE, MODEL,
        )
        bias = load_mask(mask_row, tokens, inside, MASK)
        logits = finish_logits(logits, bias, tokens, inside, position, SOFTCAP, WINDOW, MASK)
        p, alpha, top = soften(logits, top)
        total = total * alpha + tl.sum(p, 0)
        acc = acc * alpha[None, :] + full_values(v_ring, tokens % RING, inside, p, DV, V_CHANNELS, MODEL)

    d = tl.arange(0, K_CHANNELS)
    at = out_rows[None, :] * DK + d[:, None]
    q = tl.load(q_ptr + at, mask=valid[None, :] & (d < DK)[:, None], other=0.0)
    begin = tl.maximum(k_limit, first)
    in_ring = past if HAS_NEW else stored
    for t0 in tl.range(begin, tl.where(last, in_ring, begin), FULL_TILE, num_stages=FULL_STAGES):
        tokens = t0 + tl.arange(0, FULL_TILE)
        inside = in_zone(tokens, begin, in_ring, first_sink, SINKS)
        top, total, acc = attend_full(
            k_ring, v_ring, tokens % RING, tokens, inside, q, mask_row, position, top, total, acc, SM_SCALE, SOFTCAP,
            WINDOW, MASK, DK, DV, K_CHANNELS, V_CHANNELS, MODEL,
        )
    if HAS_NEW:
        k_new += bh * (NEW * DK)
        v_new += bh * (NEW * DV)
        for slot in tl.range(0, tl.where(last, NEW, 0), FULL_TILE, num_stages=FULL_STAGES):
            slots = slot + tl.arange(0, FULL_TILE)
            inside = in_zone(past + slots, past, stored, first_sink, SINKS)
            top, total, acc = attend_full(
                k_new, v_new, slots, past + slots, inside, q, mask_row, position, top, total, acc, SM_SCALE, SOFTCAP,
                WINDOW, MASK, DK, DV, K_CHANNELS, V_CHANNELS, MODEL,
            )
    if SINKS > 0:
        k_sink += bh * ((SINKS + 1) * DK)
        v_sink += bh * ((SINKS + 1) * DV)
        for s0 in tl.range(0, tl.where(last, SINKS, 0), FULL_TILE, num_stages=FULL_STAGES):
            slots = s0 + tl.arange(0, FULL_TILE)
            tokens = first_sink + slots
            inside = (slots < SINKS) & (tokens < stored)
            top, total, acc = attend_full(
                k_sink, v_sink, slots, tokens, inside, q, mask_row, position, top, total, acc, SM_SCALE, SOFTCAP,
                WINDOW, MASK, DK, DV, K_CHANNELS, V_CHANNELS, MODEL,
            )

    if MASK == "none":  # each token that is not written yet has logit 0
        rest = tl.where(last, tl.maximum(MAX_LEN - stored, 0), 0).to(tl.float32)
        tail_top = tl.where(rest > 0, tl.zeros((ROWS,), tl.float32), float("-inf"))
        tail_total = tl.zeros((ROWS,), tl.float32) + rest
    else:
        share = tl.cdiv(tl.cdiv(tl.maximum(MAX_LEN - stored, 0), PARTS), TAIL) * TAIL
        low = stored + split * share
        tail_top, tail_total = unwritten(mask_row, low, tl.minimum(low + share, MAX_LEN), MASK, TAIL)
    new_top = tl.maximum(top, tail_top)
    base = tl.where(new_top == float("-inf"), 0.0, new_top)
    alpha = tl.exp(top - base)
    total = total * alpha + tail_total * tl.exp(tail_top - base)
    acc = acc * alpha[None, :]

    d = tl.arange(0, V_CHANNELS)
    part = out_rows * PARTS + split
    # Rows with no token in this split have total 0, and their part is not read either.
    some = (d < DV)[:, None] & (valid & (total != 0))[None, :]
    tl.store(part_ptr + part[None, :] * DV + d[:, None], acc, mask=some)
    tl.store(stats_ptr + part * 2, new_top, mask=valid)
    tl.store(stats_ptr + part * 2 + 1, total, mask=valid)


@triton.jit
def combine_kernel(
    part_ptr, stats_ptr, logits_ptr, out_ptr, HEADS: tl.constexpr, QUERY: tl.constexpr, DV: tl.constexpr,
    PARTS: tl.constexpr, ALL: tl.constexpr, SOME: tl.constexpr, CHANNELS: tl.constexpr, HAS_LOGITS: tl.constexpr,
):  # fmt: skip
    """Merge the PARTS of one query row; the extra logit of its head, if any, counts in the sum alone."""
    row = tl.program_id(0).to(tl.int64)
    every, d = tl.arange(0, ALL), tl.arange(0, CHANNELS)
    stats_ptr += row * PARTS * 2
    part_ptr += row * PARTS * DV
    tops = tl.load(stats_ptr + every * 2, mask=every < PARTS, other=float("-inf"))
    totals = tl.load(stats_ptr + every * 2 + 1, mask=every < PARTS, other=0.0)
    top = tl.max(tops, 0)
    if HAS_LOGITS:
        extra = tl.load(logits_ptr + row // QUERY % HEADS).to(tl.float32)
        top = tl.maximum(top, extra)
    base = tl.where(top == float("-inf"), 0.0, top)
    total = tl.sum(tl.exp(tops - base) * totals, 0)
    if HAS_LOGITS:
        total += tl.exp(extra - base)
    acc = tl.zeros((CHANNELS,), tl.float32)
    for p0 in tl.range(0, PARTS, SOME):
        i = p0 + tl.arange(0, SOME)
        weight = tl.exp(tl.load(stats_ptr + i * 2, mask=i < PARTS, other=float("-inf")) - base)
        some = (tl.load(stats_ptr + i * 2 + 1, mask=i < PARTS, other=0.0) != 0)[:, None] & (d < DV)[None, :]
        part = tl.load(part_ptr + i[:, None] * DV + d[None, :], mask=some, other=0.0)
        acc += tl.sum(weight[:, None] * part, 0)
    out = acc / tl.where(total == 0, 1.0, total)
    tl.store(out_ptr + row * DV + d, out.to(out_ptr.dtype.element_ty), mask=d < DV)
