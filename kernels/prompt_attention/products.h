// Products of bfloat16 matrices, two numbers to a lane, and how they are packed for them.
#pragma once
#ifndef XQ_LANES  // an editor, which sees no constants
#include "example_problem.h"
#endif

namespace xq {

constexpr int64_t ROWS = 6, WIDE = 4;  // sums that a product holds: ROWS times WIDE vectors
constexpr float MINUS_INFINITY = -std::numeric_limits<float>::infinity();

// sum + a . b of pairs of bfloat16 numbers.
inline vf add_products(vf sum, vi a, vi b) {
#ifdef XQ_DOT_BFLOAT16
    return dot_bfloat16(sum, a, b);
#else
    const int32_t high = (int32_t)0xffff0000;
    return fma((vf)(a & high), (vf)(b & high), fma((vf)(a << 16), (vf)(b << 16), sum));
#endif
}

// Two vectors rounded to bfloat16, one behind the other.
inline vi round_to_pairs(vf a, vf b) {
#ifdef XQ_DOT_BFLOAT16
    return round_to_bfloat16(a, b);
#else
    bfloat16 x[2 * L];
    for (int i = 0; i < L; i++) x[i] = from_float<bfloat16>(a[i]), x[i + L] = from_float<bfloat16>(b[i]);
    return load<vi>(x);
#endif
}

// x in the first n lanes, behind them nothing that attention sees.
inline vf first_lanes(vf x, int64_t n) {
    return iota() < (int32_t)std::clamp<int64_t>(n, 0, L) ? x : splat(MINUS_INFINITY);
}

// c [ROWS, N vectors] = a [ROWS, 2 * pairs] b [pairs, N vectors] (+ c * factor, a factor for each row).
template <int N>
inline void multiply(float* c, int64_t c_pitch, const float* factor, const bfloat16* a, int64_t a_pitch,
                     const int32_t* b, int64_t b_pitch, int64_t pairs) {
    vf sums[ROWS][N] = {};
    if (factor)
        for (int r = 0; r < ROWS; r++)
            for (int i = 0; i < N; i++) sums[r][i] = load<vf>(c + r * c_pitch + i * L) * factor[r];
    for (int64_t p = 0; p < pairs; p++) {
        vi columns[N];
#pragma GCC unroll 4
        for (int i = 0; i < N; i++) columns[i] = load<vi>(b + p * b_pitch + i * L);
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; r++) {
            const vi row = splat(load<int32_t>(a + r * a_pitch + 2 * p));
#pragma GCC unroll 4
            for (int i = 0; i < N; i++) sums[r][i] = add_products(sums[r][i], row, columns[i]);
        }
    }
    for (int r = 0; r < ROWS; r++)
        for (int i = 0; i < N; i++) store(c + r * c_pitch + i * L, sums[r][i]);
}

// The same of the first `vectors`, an even number, if they are fewer than N.
template <int N, class... Rest> inline void multiply_up_to(int64_t vectors, Rest... rest) {
    if constexpr (N > 2)
        if (vectors < N) return multiply_up_to<N - 2>(vectors, rest...);
    multiply<N>(rest...);
}

// WIDE * L keys of D numbers, `pitch` apart, as [D / 2, WIDE * L] pairs; zeros for those behind the first n.
inline void pack_keys(const bfloat16* keys, int64_t pitch, int64_t n, int32_t* out) {
    if (n < WIDE * L) std::memset(out, 0, D / 2 * WIDE * L * sizeof(int32_t));
    for (int64_t t = 0; t < std::min(n, WIDE * L); t++)
        for (int64_t p = 0; p < D / 2; p++) out[p * WIDE * L + t] = load<int32_t>(keys + t * pitch + 2 * p);
}

// WIDE * L values of D numbers as pairs of neighbours [WIDE * L / 2, D].
inline void pack_values(const bfloat16* values, int64_t pitch, int64_t n, int32_t* out) {
    for (int64_t t = 0; t < WIDE * L; t += 2, out += D)
        for (int64_t d = 0; d < D; d += L) {
            const vi even = t < n ? widen(load<vh>(values + t * pitch + d)) : vi{};
            const vi odd = t + 1 < n ? widen(load<vh>(values + (t + 1) * pitch + d)) : vi{};
            store(out + d, even | odd << 16);
        }
}

}  // namespace xq
