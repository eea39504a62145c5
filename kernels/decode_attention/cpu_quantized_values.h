// Tokens in the codes: weighted sums of their values.
#pragma once
#include "../cpu/small_floats.h"
#include "cpu_digits.h"

namespace xq {

// Words of values from a token on, which is the first of a block: its row in each plane.
struct ValueWords {
    const int32_t *high, *low;
    ValueWords(const Inputs& in, int64_t head, int64_t t)
        : high(in.v_codes + (head * rows(in) + value_slot(t) / V_HIGH_PER_WORD) * DV),
          low(in.v_codes + (head * rows(in) + in.v_tokens / V_HIGH_PER_WORD + value_slot(t) / V_LOW_PER_WORD) * DV) {}
    static int64_t rows(const Inputs& in) { return in.v_tokens * V_BITS / 32; }  // of a head, in all planes
};

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
        for_rows(scratch, [&](int64_t row, auto rows) { fold_value_scales<rows()>(scratch, in, head, g, t0, n, row); });
        for_rows<DOT_ROWS>(scratch, [&](int64_t row, auto rows) {
            add_group<rows()>(scratch, softmax, codes, blocks, row, g * V_GROUP, (g + 1) * V_GROUP);
        });
    }
}

}  // namespace xq
