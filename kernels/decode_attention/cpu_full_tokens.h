// Tokens in full precision, which are in the window, among the sinks or in the step's own chunk: a few at a time for
// few rows, a vector of them at a time for many.
#pragma once
#include "cpu_problem.h"

namespace xq {

// A token in full precision, in the step's own chunk or in a ring of RING tokens.
template <int64_t RING>
inline const T* window_token(const Inputs& in, const T* ring, const T* chunk, int64_t head, int64_t t, int64_t dim) {
    if (HAS_NEW && t >= in.past) return chunk + (head * Q + t - in.past) * dim;
    return ring + (head * RING + t % RING) * dim;
}

// Scores of NT tokens whose keys are in full precision.
template <int NT> inline void score_tokens(Scratch& scratch, const T* const (&key)[NT], int64_t offset) {
    alignas(64) float k[NT][DK_PAD + L];
    for (int i = 0; i < NT; i++)
        for (int64_t d = 0; d < DK; d += L) store(k[i] + d, load_up_to(key[i] + d, DK - d));
    for (int64_t r = 0; r < ROWS; r++) {
        vf s[NT] = {};
        for (int64_t d = 0; d < DK; d += L) {
            const vf q = load<vf>(scratch.query[r] + d);
#pragma GCC unroll 4
            for (int i = 0; i < NT; i++) s[i] = fma(q, load<vf>(k[i] + d), s[i]);
        }
        for (int i = 0; i < NT; i++) scratch.score[r][offset + i] = sum(s[i]);
    }
}

// Weighted values of NT tokens from `offset` of the span on, in full precision.
template <int NT>
inline void add_tokens(Scratch& scratch, RunningSoftmax& softmax, const T* const (&value)[NT], int64_t offset) {
    for (int64_t d = 0; d < DV; d += L) {
        vf x[NT];
        for (int i = 0; i < NT; i++) x[i] = load_up_to(value[i] + d, DV - d);
        for (int64_t r = 0; r < ROWS; r++) {
            float* acc = softmax.acc + r * ACC + d;
            vf sum = load<vf>(acc);
#pragma GCC unroll 4
            for (int i = 0; i < NT; i++) sum = fma(splat(scratch.weight[r][offset + i]), x[i], sum);
            store(acc, sum);
        }
    }
}

// Call `use(pointers, t)` for tokens [t0, t1), four at a time and then one by one; `token` says where one is.
template <class Token, class Use> inline void four_tokens_at_a_time(int64_t t0, int64_t t1, Token token, Use use) {
    int64_t t = t0;
    for (; t + 4 <= t1; t += 4) {
        const T* const four[] = {token(t), token(t + 1), token(t + 2), token(t + 3)};
        use(four, t);
    }
    for (; t < t1; t++) {
        const T* const one[] = {token(t)};
        use(one, t);
    }
}

// Many rows (a chunk): full-precision tokens L at a time, so that what is loaded of them serves all rows.
constexpr bool MANY_ROWS = ROWS >= 16;

template <int NR> inline void score_rows(Scratch& scratch, const float (*keys)[L], int64_t row, int64_t offset) {
    vf s[NR] = {};
    for (int64_t d = 0; d < DK; d++) {
        const vf k = load<vf>(keys[d]);
#pragma GCC unroll 8
        for (int r = 0; r < NR; r++) s[r] = fma(splat(scratch.query[row + r][d]), k, s[r]);
    }
    for (int r = 0; r < NR; r++) store(scratch.score[row + r] + offset, s[r]);
}

inline void score_tokens_for_many_rows(Scratch& scratch, const Inputs& in, int64_t head, int64_t t, int64_t n,
                                       int64_t offset) {
    alignas(64) float keys[DK][L] = {};  // channels by tokens
    for (int64_t i = 0; i < n; i++) {
        const T* key = window_token<K_RING>(in, in.k_ring, in.k_new, head, t + i, DK);
        for (int64_t d = 0; d < DK; d += L) {
            const vf k = load_up_to(key + d, DK - d);
            for (int64_t j = 0; j < std::min<int64_t>(L, DK - d); j++) keys[d + j][i] = k[j];
        }
    }
    for (int64_t r = 0; r + 8 <= ROWS; r += 8) score_rows<8>(scratch, keys, r, offset);
    for (int64_t r = ROWS / 8 * 8; r < ROWS; r++) score_rows<1>(scratch, keys, r, offset);
}

template <int NR>
inline void add_to_rows(Scratch& scratch, RunningSoftmax& softmax, const float (*values)[DV_PAD], int64_t row,
                        int64_t d, int64_t n, int64_t offset) {
    vf sum[NR];
    for (int r = 0; r < NR; r++) sum[r] = load<vf>(softmax.acc + (row + r) * ACC + d);
    for (int64_t i = 0; i < n; i++) {
        const vf v = load<vf>(values[i] + d);
#pragma GCC unroll 8
        for (int r = 0; r < NR; r++) sum[r] = fma(splat(scratch.weight[row + r][offset + i]), v, sum[r]);
    }
    for (int r = 0; r < NR; r++) store(softmax.acc + (row + r) * ACC + d, sum[r]);
}

inline void add_tokens_to_many_rows(Scratch& scratch, RunningSoftmax& softmax, const Inputs& in, int64_t head,
                                    int64_t t, int64_t n, int64_t offset) {
    alignas(64) float values[L][DV_PAD];
    for (int64_t i = 0; i < n; i++) {
        const T* value = window_token<V_RING>(in, in.v_ring, in.v_new, head, t + i, DV);
        for (int64_t d = 0; d < DV; d += L) store(values[i] + d, load_up_to(value + d, DV - d));
    }
    for (int64_t d = 0; d < DV; d += L) {
        for (int64_t r = 0; r + 8 <= ROWS; r += 8) add_to_rows<8>(scratch, softmax, values, r, d, n, offset);
        for (int64_t r = ROWS / 8 * 8; r < ROWS; r++) add_to_rows<1>(scratch, softmax, values, r, d, n, offset);
    }
}

}  // namespace xq
