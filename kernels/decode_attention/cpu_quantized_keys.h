// Tokens in the codes: scores of their keys.
#pragma once
#include "../cpu/small_floats.h"
#include "cpu_digits.h"
#include "cpu_quantized_values.h"

namespace xq {

// Zero points of up to n channels from d on, whose scales are s; with one digit those of codes about zero.
template <class Z> inline vf zero_points(const Z* zero, [[maybe_unused]] vf s, [[maybe_unused]] int64_t d, int64_t n) {
    if constexpr (RANKED && K_DIGITS == 1) return s * load_mids(zero, n);
    else if constexpr (RANKED) return s * (load_mids(zero, n) - load_up_to(RANK_MIDDLES + d, n));
    else if constexpr (K_DIGITS == 1) return fma(s, splat(0.5f * ((1 << K_BITS) - 1)), load_up_to(zero, n));
    else return load_up_to(zero, n);
}

// The largest code of each element of a key, and zeros up to whole vectors of bytes.
constexpr struct LargestCodes {
    alignas(64) uint8_t of[DK_BYTES];
    constexpr LargestCodes() : of{} {
        for (int64_t i = 0; i < std::min(DK, K_ELEMENTS); i++)
            of[i] = RANKED ? (uint8_t)(2 * RANK_MIDDLES[RANKED ? i : 0]) : (1 << K_BITS) - 1;
    }
} LARGEST_CODES;

// Fold scales and zero points of a token group into the queries of NR rows.
template <int NR>
inline void fold_key_scales(Scratch& scratch, FoldedQueries& keys, const S* scale, const S* zero, int64_t row) {
    vf largest[NR] = {}, z[NR] = {}, zero_or_nan = {};
    const auto fold = [&](int64_t d, auto n,
                          auto coded) __attribute__((always_inline)) {  // n channels, the first with codes
        const vf s = load_scales(scale + d, n), zeros = zero_points(zero + d, s, d, n);
        zero_or_nan = fma(s, splat(0.0f), zero_or_nan);
#pragma GCC unroll 4
        for (int r = 0; r < NR; r++) {
            const vf q = load<vf>((RANKED ? scratch.ranked : scratch.query)[row + r] + d), x = q * s;
            store(scratch.folded[row + r] + d, x);
            largest[r] = max(abs(mask_first(x, coded)), largest[r]);
            z[r] = fma(q, zeros, z[r]);
        }
    };
    constexpr int64_t CODED = RANKED ? K_ELEMENTS : DK, WHOLE = std::min(DK, CODED) / L * L;
    constexpr std::integral_constant<int64_t, L> ALL;
    for (int64_t d = 0; d < WHOLE; d += L) fold(d, ALL, ALL);
    for (int64_t d = WHOLE; d < DK; d += L) fold(d, DK - d, CODED - d);
    const float nan = nan_if_not_finite(zero_or_nan);
    float most[NR];
    maxima(largest, most);
    to_digits<(K_DIGITS > 2), K_DIGITS>(scratch.folded + row, 0, K_ELEMENTS, most, keys.digits + row, keys.unit + row);
    if constexpr (K_DIGITS == 1)
        for (int r = 0; r < NR; r++)
            z[r] = without_middles(z[r], keys.digits[row + r][0], K_ELEMENTS, keys.unit[row + r],
                                   [](int64_t i) { return load<vi>(LARGEST_CODES.of + i); });
    sums(z, keys.zero + row);
#pragma GCC unroll 4
    for (int r = 0; r < NR; r++) keys.zero[row + r] += scratch.q_center[row + r] + nan;
}

// The same for all rows and `groups` token groups from g on.
inline void fold_keys(Scratch& scratch, const Inputs& in, int64_t head, int64_t g, int64_t groups) {
    scratch.group = g, scratch.groups = groups;
    const int64_t first = (head * in.k_tokens / K_GROUP + g) * DK;
    for (int64_t i = 0; i < groups; i++) {
        const S* scale = in.k_scale + first + i * DK;
        const S* zero = in.k_zero + first + i * DK;
        for (int64_t d = 0; d < DK;
             d += 64 / (int64_t)sizeof(S)) {  // too few bytes a group for a processor to foresee them
            __builtin_prefetch(scale + (GROUPS_AHEAD + 1) * DK + d);
            __builtin_prefetch(zero + (GROUPS_AHEAD + 1) * DK + d);
        }
        for_rows(scratch,
                 [&](int64_t row, auto rows) { fold_key_scales<rows()>(scratch, scratch.keys[i], scale, zero, row); });
    }
}

// Scores of NV vectors of tokens with NR rows, from `offset` of the span on; `norm` is of up to n of the tokens, the
// others are read by nobody.
template <int NR, int NV>
inline void dot_keys(Scratch& scratch, const FoldedQueries& keys, Digits<NR, K_DIGITS, DK_BYTES> digits,
                     const int32_t* codes, int64_t stride, [[maybe_unused]] const uint8_t* norm,
                     [[maybe_unused]] int64_t n, int64_t row, int64_t offset) {
    constexpr int64_t TO_4 = K_WORDS_8, TO_2 = TO_4 + K_WORDS_4, TO_1 = TO_2 + K_WORDS_2;
    Sums<NR, NV, K_DIGITS, RANKED ? 8 : K_BITS, K_ELEMENTS> sums;  // joined, sums of mixed widths are no faster
    if constexpr (RANKED) {
        sums.add_mixed(codes, stride, digits);
    } else {
        if constexpr (K_WORDS_8 > 0) sums.template add_words<8>(codes, stride, K_WORDS_8, digits, 0);
        if constexpr (K_WORDS_4 > 0) sums.template add_words<4>(codes + TO_4 * stride, stride, K_WORDS_4, digits, 0);
        if constexpr (TO_2 > 0 && K_WORDS_2 > 0) sums.template shift<2>();
        if constexpr (K_WORDS_2 > 0) sums.template add_words<2>(codes + TO_2 * stride, stride, K_WORDS_2, digits, 0);
        if constexpr (TO_1 > 0 && K_WORDS_1 > 0) sums.template shift<1>();
        if constexpr (K_WORDS_1 > 0) sums.template add_words<1>(codes + TO_1 * stride, stride, K_WORDS_1, digits, 0);
    }
    sums.finish();
    vf out[NR][NV];
    sums.join(out);
    for (int v = 0; v < NV; v++) {
        vf norms = {};
        if constexpr (NORMS) norms = load_norms(norm + v * L, n);
        for (int r = 0; r < NR; r++) {
            const vf score = fma(out[r][v], splat(keys.unit[row + r]), splat(keys.zero[row + r]));
            store(scratch.score[row + r] + offset + v * L, NORMS ? score * norms : score);
        }
    }
}

constexpr int64_t TOKENS_AT_ONCE = K_VECTORS * L, PREFETCHED = std::max<int64_t>(TOKENS_AT_ONCE, 16);

// Keys of PREFETCHED tokens are about to be read: fetch keys some way on, and the values of the same tokens,
// whose turn comes after the span's keys. Spread over the span, as only so many lines can be under way.
// GCC drops calls of a function that does nothing else, so it must be inlined before GCC looks.
ALWAYS_INLINE void prefetch(const Inputs& in, int64_t head, int64_t t, const int32_t* keys) {
    constexpr int64_t AHEAD = 256, LINE = 16;
    const ValueWords values(in, head, t);
    for (int64_t w = 0; w < K_WORDS; w++)
        for (int64_t i = 0; i < PREFETCHED; i += LINE) __builtin_prefetch(keys + w * in.k_tokens + AHEAD + i);
    for (int64_t i = 0; i < PREFETCHED * DV / V_HIGH_PER_WORD; i += LINE) __builtin_prefetch(values.high + i);
    if constexpr (V_LOW > 0)
        for (int64_t i = 0; i < PREFETCHED * DV / V_LOW_PER_WORD; i += LINE) __builtin_prefetch(values.low + i);
    for (int64_t g = 0; g < V_GROUPS; g++) {
        const int64_t token = (head * V_GROUPS + g) * in.v_tokens + value_slot(t);
        __builtin_prefetch(in.v_scale + token);
        if constexpr (!ABOUT_ZERO) __builtin_prefetch(in.v_zero + token);
    }
}

// Scores of tokens [t, end) of one token group with NR rows, from `offset` of the span on; their codes are in the slots
// `shift` further on.
template <int NR>
inline void dot_group(Scratch& scratch, const Inputs& in, const FoldedQueries& keys, int64_t head, int64_t row,
                      int64_t t, int64_t end, int64_t offset, int64_t shift) {
    const int32_t* codes = in.k_codes + head * K_WORDS * in.k_tokens + shift;
    const uint8_t* norm = NORMS ? in.k_norm + head / H * in.k_tokens + shift : nullptr;
    const auto digits = digits_of<NR>(keys.digits + row, 0, K_ELEMENTS, scratch.spread);
    offset -= t;
    for (; t + TOKENS_AT_ONCE <= end; t += TOKENS_AT_ONCE) {
        dot_keys<NR, K_VECTORS>(scratch, keys, digits, codes + t, in.k_tokens, norm + t, L, row, offset + t);
        if (row == 0 && t % PREFETCHED < TOKENS_AT_ONCE) prefetch(in, head, t, codes + t);
    }
    for (; t < end; t += L) {
        const int64_t left = in.k_tokens - t - shift;
        if (L <= left) {
            dot_keys<NR, 1>(scratch, keys, digits, codes + t, in.k_tokens, norm + t, L, row, offset + t);
            continue;
        }
        int32_t part[K_WORDS][L] = {};  // the buffer ends inside this vector
        for (int64_t i = 0; i < K_WORDS; i++) std::memcpy(part[i], codes + i * in.k_tokens + t, left * 4);
        dot_keys<NR, 1>(scratch, keys, digits, part[0], L, norm + t, left, row, offset + t);
    }
}

// Scores of tokens [t0, t1), all in the codes.
inline void quantized_scores(Scratch& scratch, const Inputs& in, int64_t head, int64_t t0, int64_t t1) {
    const int64_t shift = key_slot(t0) - t0;
    for (int64_t t = t0; t < t1;) {
        const int64_t g = (t + shift) / K_GROUP, end = std::min(t1, (g + 1) * K_GROUP - shift);
        if (g < scratch.group || g >= scratch.group + scratch.groups)
            fold_keys(scratch, in, head, g, std::min(GROUPS_AHEAD, (t1 + shift - 1) / K_GROUP + 1 - g));
        const FoldedQueries& keys = scratch.keys[g - scratch.group];
        for_rows<DOT_ROWS>(scratch, [&](int64_t row, auto rows) {
            dot_group<rows()>(scratch, in, keys, head, row, t, end, t - t0, shift);
        });
        t = end;
    }
}

}  // namespace xq
