// Products of matrices, and how they are packed for them: of bfloat16 numbers two to a lane where the processor
// multiplies such pairs, else of floats.
#pragma once
#ifndef XQ_LANES  // an editor, which sees no constants
#include "example_problem.h"
#endif

namespace xq {

#ifdef XQ_DOT_BFLOAT16
constexpr bool PAIRS = std::is_same_v<T, bfloat16>;
#else
constexpr bool PAIRS = false;
#endif
constexpr int64_t PER_LANE = PAIRS ? 2 : 1;  // numbers
typedef std::conditional_t<PAIRS, int32_t, float> Lane;
typedef std::conditional_t<PAIRS, vi, vf> Lanes;
typedef std::conditional_t<PAIRS, T, float> X;  // what rows are held as: as in memory, or as floats

constexpr int64_t ROWS = 6, WIDE = REGISTERS >= 32 ? 4 : 2;  // sums that a product holds: ROWS times WIDE vectors
constexpr float MINUS_INFINITY = -std::numeric_limits<float>::infinity();

// sum + a . b of all numbers in a lane.
inline vf add_products(vf sum, vf a, vf b) { return fma(a, b, sum); }
#ifdef XQ_DOT_BFLOAT16
inline vf add_products(vf sum, vi a, vi b) { return dot_bfloat16(sum, a, b); }
#endif

// n numbers as X.
inline void load_row(const T* from, X* to, int64_t n) {
    if constexpr (PAIRS) std::memcpy((void*)to, (const void*)from, n * sizeof(T));
    else
        for (int64_t i = 0; i < n; i += L) store(to + i, load_floats(from + i));
}

// L floats, each rounded to T.
inline void store_rounded(T* to, vf x) {
#ifdef XQ_DOT_BFLOAT16
    if constexpr (PAIRS) {
        const vi pairs = round_to_bfloat16(x, x);
        std::memcpy((void*)to, &pairs, L * sizeof(T));
        return;
    }
#endif
    T rounded[L];
    for (int i = 0; i < L; i++) rounded[i] = from_float<T>(x[i]);
    std::memcpy((void*)to, (const void*)rounded, sizeof(rounded));
}

// Two vectors of weights, one behind the other, as X; `total` and what they are then.
inline vf store_weights(X* to, vf a, vf b, vf total) {
#ifdef XQ_DOT_BFLOAT16
    if constexpr (PAIRS) {
        const vi pairs = round_to_bfloat16(a, b);
        store(to, pairs);
        return add_products(total, pairs, splat(0x3f803f80));  // times 1
    } else
#endif
    {
        store(to, a), store(to + L, b);
        return total + (a + b);
    }
}

// c [ROWS, N vectors] = a [ROWS, PER_LANE * lanes] b [lanes, N vectors] (+ c * factor, a factor for each row).
template <int N>
inline void multiply(float* c, int64_t c_pitch, const float* factor, const X* a, int64_t a_pitch, const Lane* b,
                     int64_t b_pitch, int64_t lanes) {
    vf sums[ROWS][N] = {};  // c joins them last: sums of sums lose less
    for (int64_t p = 0; p < lanes; p++) {
        Lanes columns[N];
#pragma GCC unroll 4
        for (int i = 0; i < N; i++) columns[i] = load<Lanes>(b + p * b_pitch + i * L);
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; r++) {
            const Lanes row = splat(load<Lane>(a + r * a_pitch + PER_LANE * p));
#pragma GCC unroll 4
            for (int i = 0; i < N; i++) sums[r][i] = add_products(sums[r][i], row, columns[i]);
        }
    }
    for (int r = 0; r < ROWS; r++)
        for (int i = 0; i < N; i++) {
            float* to = c + r * c_pitch + i * L;
            store(to, factor ? fma(load<vf>(to), splat(factor[r]), sums[r][i]) : sums[r][i]);
        }
}

// The same of the first `vectors`, an even number, if they are fewer than N.
template <int N, class... Rest> inline void multiply_up_to(int64_t vectors, Rest... rest) {
    if constexpr (N > 2)
        if (vectors < N) return multiply_up_to<N - 2>(vectors, rest...);
    multiply<N>(rest...);
}

// WIDE * L keys of D numbers, `pitch` apart, as [D / PER_LANE, WIDE * L] lanes; zeros for those behind the first n.
inline void pack_keys(const T* keys, int64_t pitch, int64_t n, Lane* out) {
    if (n < WIDE * L) std::memset(out, 0, D / PER_LANE * WIDE * L * sizeof(Lane));
    for (int64_t t = 0; t < std::min(n, WIDE * L); t++)
        for (int64_t p = 0; p < D / PER_LANE; p++) {
            const T* from = keys + t * pitch + PER_LANE * p;
            if constexpr (PAIRS) out[p * WIDE * L + t] = load<Lane>(from);
            else out[p * WIDE * L + t] = to_float(*from);
        }
}

// WIDE * L values of D numbers as [WIDE * L / PER_LANE, D] lanes, of neighbours where a lane has two.
inline void pack_values(const T* values, int64_t pitch, int64_t n, Lane* out) {
    for (int64_t t = 0; t < WIDE * L; t += PER_LANE, out += D)
        for (int64_t d = 0; d < D; d += L)
            if constexpr (PAIRS) {
                const vi even = t < n ? widen(load<vh>(values + t * pitch + d)) : vi{};
                const vi odd = t + 1 < n ? widen(load<vh>(values + (t + 1) * pitch + d)) : vi{};
                store(out + d, even | odd << 16);
            } else store(out + d, t < n ? load_floats(values + t * pitch + d) : vf{});
}

}  // namespace xq
