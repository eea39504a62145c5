// Tokens in the codes: scores of their keys, weighted sums of their values.
#pragma once
#include "../cpu/small_floats.h"
#include "cpu_digits.h"

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

// Take the middles of codes times n numbers of one digit from z, where the zero points are those of codes about zero.
// So what a digit leaves is lost for what codes are apart from their middles, which is small and as often less as more.
template <class Largest>
ALWAYS_INLINE vf without_middles(vf z, const int8_t* digits, int64_t n, float unit, Largest largest) {
    vi sum = {};
    for (int64_t i = 0; i < n; i += sizeof(vi))
        sum += Dot<7>::total(Dot<7>::add(typename Dot<7>::Sum{}, largest(i), load<vi>(digits + i)));
    return fma(__builtin_convertvector(sum, vf), splat(-0.5f * unit), z);
}

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
        for_rows([&](int64_t row, auto rows) { fold_key_scales<rows()>(scratch, scratch.keys[i], scale, zero, row); });
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

// Words of values from a token on, which is the first of a block: its row in each plane.
struct ValueWords {
    const int32_t *high, *low;
    ValueWords(const Inputs& in, int64_t head, int64_t t)
        : high(in.v_codes + (head * rows(in) + value_slot(t) / V_HIGH_PER_WORD) * DV),
          low(in.v_codes + (head * rows(in) + in.v_tokens / V_HIGH_PER_WORD + value_slot(t) / V_LOW_PER_WORD) * DV) {}
    static int64_t rows(const Inputs& in) { return in.v_tokens * V_BITS / 32; }  // of a head, in all planes
};

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
        for_rows<DOT_ROWS>(
            [&](int64_t row, auto rows) { dot_group<rows()>(scratch, in, keys, head, row, t, end, t - t0, shift); });
        t = end;
    }
}

// Fold the scales of channel group g into the weights of n tokens, of NR rows.
template <int NR>
inline void fold_value_scales(Scratch& scratch, const Inputs& in, int64_t head, int64_t g, int64_t t0, int64_t n,
                              int64_t row) {
    const int64_t token = (head * V_GROUPS + g) * in.v_tokens + value_slot(t0);
    constexpr bool CENTRED = V_DIGITS == 1;
    constexpr int LARGEST = (1 << V_BITS) - 1;
    vf z[NR] = {}, zero_or_nan = {};
    for (int64_t first = 0; first < n; first += VALUES_TOGETHER) {
        const int64_t end = std::min(n, first + VALUES_TOGETHER),
                      padded = first + (end - first + V_BLOCK - 1) / V_BLOCK * V_BLOCK;
        vf largest[NR] = {};
        for (int64_t i = first; i < end; i += L) {
            const vf s = load_scales(in.v_scale + token + i, end - i);
            [[maybe_unused]] vf zeros = {};
            if constexpr (!ABOUT_ZERO) zeros = load_up_to(in.v_zero + token + i, end - i);
            if constexpr (!ABOUT_ZERO && CENTRED) zeros = fma(s, splat(0.5f * LARGEST), zeros);
            zero_or_nan = fma(s, splat(0.0f), zero_or_nan);
#pragma GCC unroll 4
            for (int r = 0; r < NR; r++) {
                const vf p = mask_first(load<vf>(scratch.weight[row + r] + i), end - i), x = p * s;
                store(scratch.score[row + r] + i, x);  // the scores have become weights
                largest[r] = max(abs(x), largest[r]);
                if constexpr (!ABOUT_ZERO) z[r] += p != 0.0f ? p * zeros : p;
                else if constexpr (!CENTRED) z[r] += x;  // zero points are the same number of scales
            }
        }
        float most[NR], *unit = scratch.p_unit[first / VALUES_TOGETHER] + row;
        maxima(largest, most);
#pragma GCC unroll 4
        for (int r = 0; r < NR; r++)
            for (int64_t i = first + (end - first + L - 1) / L * L; i < padded; i += L)
                store(scratch.score[row + r] + i, splat(0.0f));
        to_digits<true, V_DIGITS>(scratch.score + row, first, padded, most, scratch.p_digits + row, unit);
        if constexpr (CENTRED)
            for (int r = 0; r < NR; r++) {
                int8_t* digits = scratch.p_digits[row + r][0];
                for (int64_t i = padded; i % sizeof(vi); i++) digits[i] = 0;
                z[r] = without_middles(z[r], digits + first, padded - first, unit[r],
                                       [](int64_t) { return splat(LARGEST * 0x01010101); });
            }
    }
    const float nan = nan_if_not_finite(zero_or_nan);
    float zero[NR];
    sums(z, zero);
#pragma GCC unroll 4
    for (int r = 0; r < NR; r++)
        scratch.p_zero[row + r] = zero[r] * (ABOUT_ZERO && !CENTRED ? -0.5f * LARGEST : 1.0f) + nan;
}

// Tokens of values whose digits are spread at a time.
constexpr int64_t VALUES_AT_ONCE = SPREAD_DIGITS ? SPREAD_VALUES : VALUES_TOGETHER;

template <int NR, int NV> using ValueSums = Sums<NR, NV, V_DIGITS, V_BITS, VALUES_TOGETHER>;

// Add NV vectors of channels from d on, of which `left` are left, to NR rows; `unit` is what their sums are in.
template <int NR, int NV>
ALWAYS_INLINE void add_value_sums(RunningSoftmax& softmax, const ValueSums<NR, NV>& sums, const float* unit,
                                  int64_t row, int64_t d, int64_t left) {
    vf out[NR][NV];
    sums.join(out);
    for (int r = 0; r < NR; r++)
        for (int v = 0; v < NV; v++) {
            float* acc = softmax.acc + (row + r) * ACC + CODES_AT + d + v * L;
            store_up_to(acc, fma(out[r][v], splat(unit[row + r]), load<vf>(acc)), left - v * L);
        }
}

// The same, or to what is put aside; `blocks` is of tokens, those from `block` on.
template <int NR, int NV, int64_t PITCH>
inline void add_values(Scratch& scratch, RunningSoftmax& softmax, const ValueWords& codes,
                       Digits<NR, V_DIGITS, PITCH> digits, int64_t block, int64_t blocks, const float* unit,
                       int64_t row, int64_t d, int64_t left) {
    constexpr int64_t HIGH_WORDS = V_BLOCK / V_HIGH_PER_WORD;
    ValueSums<NR, NV> sums;
    sums.template add_words<V_HIGH>(codes.high + block * HIGH_WORDS * DV + d, DV, blocks * HIGH_WORDS, digits, 0);
    if constexpr (V_LOW > 0) {
        sums.template shift<V_LOW>();
        sums.template add_words<V_LOW>(codes.low + block * DV + d, DV, blocks, digits, 0);
    }
    sums.finish();
    if constexpr (VALUES_AT_ONCE == VALUES_TOGETHER) add_value_sums<NR, NV>(softmax, sums, unit, row, d, left);
    else
        sums.each_total([&](int r, int i, int v) __attribute__((always_inline)) {
            int32_t* sum = scratch.sums[r * sums.TOTALS + i] + d + v * L;
            store(sum, load<vi>(sum) + sums.total[r][i][v]);
        });
}

// Add the values of a channel group, of channels [begin, end), to NR rows.
template <int NR>
inline void add_group(Scratch& scratch, RunningSoftmax& softmax, const ValueWords& codes, int64_t blocks, int64_t row,
                      int64_t begin, int64_t end) {
    constexpr int64_t AT_ONCE = VALUES_AT_ONCE / V_BLOCK;
    if constexpr (VALUES_AT_ONCE < VALUES_TOGETHER)
        for (int i = 0; i < NR * ValueSums<NR, 1>::TOTALS; i++)
            std::fill(scratch.sums[i] + begin, scratch.sums[i] + end, 0);
    for (int r = 0; r < NR; r++) {
        float* acc = softmax.acc + (row + r) * ACC + CODES_AT;
        for (int64_t d = begin; d < end; d += L)
            store_up_to(acc + d, load<vf>(acc + d) + splat(scratch.p_zero[row + r]), end - d);
    }
    for (int64_t block = 0; block < blocks; block += AT_ONCE) {
        const int64_t n = std::min(AT_ONCE, blocks - block);
        const auto digits = digits_of<NR>(scratch.p_digits + row, block * V_BLOCK, n * V_BLOCK, scratch.spread);
        const float* unit = scratch.p_unit[block * V_BLOCK / VALUES_TOGETHER];
        int64_t d = begin;
        for (; d + V_VECTORS * L <= end; d += V_VECTORS * L)
            add_values<NR, V_VECTORS>(scratch, softmax, codes, digits, block, n, unit, row, d, V_VECTORS * L);
        for (; d < end; d += L) add_values<NR, 1>(scratch, softmax, codes, digits, block, n, unit, row, d, end - d);
    }
    if constexpr (VALUES_AT_ONCE < VALUES_TOGETHER)
        for (int64_t d = begin; d < end; d += L) {
            ValueSums<NR, 1> sums;
            sums.each_total([&](int r, int i, int v) __attribute__((always_inline)) {
                sums.total[r][i][v] = load<vi>(scratch.sums[r * sums.TOTALS + i] + d);
            });
            add_value_sums<NR, 1>(softmax, sums, scratch.p_unit[0], row, d, end - d);
        }
}

// Weighted values of n tokens from t0, all in the codes.
inline void quantized_values(Scratch& scratch, const Inputs& in, RunningSoftmax& softmax, int64_t head, int64_t t0,
                             int64_t n) {
    const ValueWords codes(in, head, t0);
    const int64_t blocks = (n + V_BLOCK - 1) / V_BLOCK;
    for (int64_t g = 0; g < V_GROUPS; g++) {
        for_rows([&](int64_t row, auto rows) { fold_value_scales<rows()>(scratch, in, head, g, t0, n, row); });
        for_rows<DOT_ROWS>([&](int64_t row, auto rows) {
            add_group<rows()>(scratch, softmax, codes, blocks, row, g * V_GROUP, (g + 1) * V_GROUP);
        });
    }
}

}  // namespace xq
