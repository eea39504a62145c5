// Integer dot products of packed codes with floating-point numbers, which are split into digits for that.
#pragma once
#include "cpu_problem.h"

namespace xq {

constexpr int CHAINS = 4;  // vectors of numbers, each of which waits for the one before it in its chain

// The first n lanes of v as digits from element i on. A digit is the low byte, taken as signed; the rest is carried.
template <int64_t PITCH> ALWAYS_INLINE void store_digits(vi v, int8_t (*digits)[PITCH], int64_t i, int64_t n) {
    for (int d = DIGITS - 1; d >= 0; d--, v = (v + 128) >> 8) store_up_to(digits[d] + i, narrow(v), n);
}

// CHAINS vectors likewise.
template <int64_t PITCH> ALWAYS_INLINE void store_digits(const vi (&v)[CHAINS], int8_t (*digits)[PITCH], int64_t i) {
#ifdef XQ_PACK
    if constexpr (DIGITS == 2) {  // which make a short
        const vs a = pack_ints(v[0], v[1]), b = pack_ints(v[2], v[3]);
        store(digits[0] + i, pack_shorts((a + 128) >> 8, (b + 128) >> 8));
        store(digits[1] + i, pack_shorts((a << 8) >> 8, (b << 8) >> 8));
        return;
    }
#endif
#pragma GCC unroll 4
    for (int chain = 0; chain < CHAINS; chain++) store_digits(v[chain], digits, i + chain * L, L);
}

// NR rows x [n], n a multiple of four, as DIGITS digits to the base 256; `unit` gets what the last digit of each stands
// for. `most` is the largest |x|. CARRY: what rounding leaves goes on to a later number of the same lane, as many small
// weights beside a large one must not all be rounded the same way.
template <bool CARRY, int NR, int64_t X_PITCH, int64_t PITCH>
inline void to_digits(const float (*x)[X_PITCH], int64_t n, const float (&most)[NR], int8_t (*digits)[DIGITS][PITCH],
                      float* unit) {
    constexpr float top = DIGITS == 2 ? 32512.0f : 4161536.0f;  // leaves every digit in -128 .. 127
    vf scale[NR], lost[NR][CHAINS] = {};
#pragma GCC unroll 4
    for (int r = 0; r < NR; r++) scale[r] = splat(most[r] > 0.0f ? top / most[r] : 0.0f), unit[r] = most[r] * (1 / top);
    const auto rounded = [&](int r, int chain, int64_t i) __attribute__((always_inline)) {
        if constexpr (!CARRY) return round_to_int(load<vf>(x[r] + i) * scale[r]);
        const vf exact = fma(load<vf>(x[r] + i), scale[r], lost[r][chain]);
        const vi v = round_to_int(exact);
        lost[r][chain] = exact - __builtin_convertvector(v, vf);
        return v;
    };
    int64_t i = 0;
    for (; i + CHAINS * L <= n; i += CHAINS * L)
#pragma GCC unroll 4
        for (int r = 0; r < NR; r++) {
            vi v[CHAINS];
#pragma GCC unroll 4
            for (int chain = 0; chain < CHAINS; chain++) v[chain] = rounded(r, chain, i + chain * L);
            store_digits(v, digits[r], i);
        }
#pragma GCC unroll 4
    for (int chain = 0; chain < CHAINS; chain++, i += L) {
        if (i >= n) break;
#pragma GCC unroll 4
        for (int r = 0; r < NR; r++) store_digits(rounded(r, chain, i), digits[r], i, n - i);
    }
}

// 0, or NaN if there was an infinity or a NaN among the scales, whose sum times 0 is `zero_or_nan`: digits cannot
// say so, and a row that sees such a scale is NaN.
inline float nan_if_not_finite(vf zero_or_nan) {
    return any(zero_or_nan != zero_or_nan) ? std::numeric_limits<float>::quiet_NaN() : 0.0f;
}

// Rows and vectors that `dot_codes` takes at once: their sums fill the registers.
constexpr int ROWS_AT_ONCE = REGISTERS == 32 ? 4 : 2, VECTORS_AT_ONCE = L < 16 && ROWS == 1 ? 4 : 2;

// The sums of each digit as one number.
template <int NR, int NV> ALWAYS_INLINE void join_digits(const vi (&sum)[NR][DIGITS][NV], vf (&out)[NR][NV]) {
#pragma GCC unroll 4
    for (int r = 0; r < NR; r++)
#pragma GCC unroll 4
        for (int v = 0; v < NV; v++) {
            vf total = __builtin_convertvector(sum[r][0][v], vf);
            for (int d = 1; d < DIGITS; d++)
                total = fma(total, splat(256.0f), __builtin_convertvector(sum[r][d][v], vf));
            out[r][v] = total;
        }
}

// Add to `sum` words [first, end) of codes times digits from `element` on; lanes are the other axis. NV vectors, NR
// rows at once.
template <int BITS, class Sum, int NR, int NV, int64_t PITCH>
ALWAYS_INLINE void add_words(const int32_t* codes, int64_t stride, int64_t first, int64_t end,
                             const int8_t (*digits)[DIGITS][PITCH], int64_t element, Sum (&sum)[NR][DIGITS][NV]) {
    constexpr int PLANES = 8 / BITS;
    const vi mask = splat((int32_t)(0x01010101u * ((1u << BITS) - 1)));
    for (int64_t w = first; w < end; w++) {
        vu word[NV];
#pragma GCC unroll 4
        for (int v = 0; v < NV; v++) word[v] = load<vu>(codes + w * stride + v * L);
#pragma GCC unroll 8
        for (int j = 0; j < PLANES; j++) {
            vi code[NV];
#pragma GCC unroll 4
            for (int v = 0; v < NV; v++) code[v] = BITS == 8 ? (vi)word[v] : (vi)(word[v] >> (BITS * j)) & mask;
#pragma GCC unroll 4
            for (int r = 0; r < NR; r++)
#pragma GCC unroll 3
                for (int d = 0; d < DIGITS; d++) {
                    const vi digit = splat(load_word(digits[r][d] + element + (w * PLANES + j) * 4));
#pragma GCC unroll 4
                    for (int v = 0; v < NV; v++) sum[r][d][v] = Dot<BITS>::add(sum[r][d][v], code[v], digit);
                }
        }
    }
}

// Add to `acc` the sums over `words` words.
template <int BITS, int NR, int NV, int64_t PITCH>
ALWAYS_INLINE void add_codes(const int32_t* codes, int64_t stride, int64_t words, const int8_t (*digits)[DIGITS][PITCH],
                             int64_t element, vi (&acc)[NR][DIGITS][NV]) {
    using D = Dot<BITS>;
    if constexpr (std::is_same_v<typename D::Sum, vi>) {  // nothing to empty in between
        add_words<BITS>(codes, stride, 0, words, digits, element, acc);
        return;
    }
    for (int64_t first = 0; first < words; first += D::WORDS) {
        typename D::Sum sum[NR][DIGITS][NV] = {};
        add_words<BITS>(codes, stride, first, std::min(words, first + D::WORDS), digits, element, sum);
#pragma GCC unroll 4
        for (int r = 0; r < NR; r++)
#pragma GCC unroll 3
            for (int d = 0; d < DIGITS; d++)
#pragma GCC unroll 4
                for (int v = 0; v < NV; v++) acc[r][d][v] += D::total(sum[r][d][v]);
    }
}

// The same for the codes of ranked keys, which have up to 7 bits and may be spread over planes. What needs no putting
// together is left to loops: unrolled code is large, and a processor reads only so much of it in time.
template <int NR, int NV, int64_t PITCH>
ALWAYS_INLINE void add_mixed_codes(const int32_t* codes, int64_t stride, const int8_t (*digits)[DIGITS][PITCH],
                                   vi (&acc)[NR][DIGITS][NV]) {
#pragma GCC unroll 16
    for (const Plain& plain : PLAIN) {
        const int32_t* words = codes + plain.word * stride;
        if (plain.width == 4) add_codes<4>(words, stride, plain.words, digits, plain.element, acc);
        if (plain.width == 2) add_codes<2>(words, stride, plain.words, digits, plain.element, acc);
        if (plain.width == 1) add_codes<1>(words, stride, plain.words, digits, plain.element, acc);
    }
    typedef Dot<7> D;
    vu code[NV] = {};
#pragma GCC unroll 128
    for (const Piece& piece : PIECES) {
#pragma GCC unroll 4
        for (int v = 0; v < NV; v++) {
            const vu word = load<vu>(codes + piece.word * stride + v * L);
            code[v] |= (piece.shift < 0 ? word << -piece.shift : word >> piece.shift) & piece.mask;
        }
        if (!piece.last) continue;
#pragma GCC unroll 4
        for (int r = 0; r < NR; r++)
#pragma GCC unroll 3
            for (int d = 0; d < DIGITS; d++) {
                const vi digit = splat(load_word(digits[r][d] + piece.element));
#pragma GCC unroll 4
                for (int v = 0; v < NV; v++)
                    if constexpr (std::is_same_v<D::Sum, vi>) acc[r][d][v] = D::add(acc[r][d][v], (vi)code[v], digit);
                    else acc[r][d][v] += D::total(D::add(D::Sum{}, (vi)code[v], digit));
            }
#pragma GCC unroll 4
        for (int v = 0; v < NV; v++) code[v] = vu{};
    }
}

}  // namespace xq
