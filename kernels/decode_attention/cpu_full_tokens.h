// Tokens in full precision, which are in the window, among the sinks or in the step's own chunk: those that follow each
// other in memory at a time for few rows, a vector of them at a time for many.
#pragma once
#include "cpu_digits.h"

namespace xq {

// A token in full precision, in the step's own chunk or in a ring of RING tokens.
template <int64_t RING>
inline const T* window_token(const Inputs& in, const T* ring, const T* chunk, int64_t head, int64_t t, int64_t dim) {
    if (HAS_NEW && t >= in.past) return chunk + (head * in.new_tokens() + t - in.past) * dim;
    return ring + (head * RING + t % RING) * dim;
}

// Call `use(first, t, n)` for those of tokens [t0, t1) that follow each other in memory, n from t on.
template <int64_t RING, class Use>
inline void window_runs(const Inputs& in, const T* ring, const T* chunk, int64_t head, int64_t t0, int64_t t1,
                        int64_t dim, Use use) {
    while (t0 < t1) {
        int64_t end = t1;
        if (!HAS_NEW || t0 < in.past) end = std::min(end, t0 - t0 % RING + RING);
        if (HAS_NEW && t0 < in.past) end = std::min(end, in.past);
        use(window_token<RING>(in, ring, chunk, head, t0, dim), t0, end - t0);
        t0 = end;
    }
}

// Fetch tokens that are read soon, but not next: too few follow each other for a processor to foresee them.
template <int64_t RING>
ALWAYS_INLINE void prefetch_window(const Inputs& in, const T* ring, const T* chunk, int64_t head, int64_t t0,
                                   int64_t t1, int64_t dim) {
    constexpr int64_t LINE = 64 / sizeof(T);
    window_runs<RING>(in, ring, chunk, head, t0, t1, dim, [&](const T* run, int64_t, int64_t n) {
        for (int64_t i = 0; i < n * dim; i += LINE) __builtin_prefetch(run + i);
    });
}

// Scores of NT tokens whose keys are in full precision and follow each other, with NR rows.
template <int NT, int NR> inline void score_tokens(Scratch& scratch, const T* keys, int64_t row, int64_t offset) {
    vf s[NR][NT] = {};
#ifdef XQ_DOT_BFLOAT16
    if constexpr (!ANY_QUERIES && std::is_same_v<T, bfloat16> && DK % (2 * L) == 0) {  // products are exact
        for (int64_t d = 0; d < DK; d += 2 * L)
#pragma GCC unroll 4
            for (int r = 0; r < NR; r++) {
                const vi q = load<vi>(scratch.q + (row + r) * DK + d);
#pragma GCC unroll 4
                for (int i = 0; i < NT; i++) s[r][i] = dot_bfloat16(s[r][i], load<vi>(keys + i * DK + d), q);
            }
#pragma GCC unroll 4
        for (int r = 0; r < NR; r++) {
            for (int i = 0; i < NT; i++) s[r][i] *= SCALE;
            sums(s[r], scratch.score[row + r] + offset);
        }
        return;
    }
#endif
    for (int64_t d = 0; d < DK; d += L) {
        vf k[NT];
#pragma GCC unroll 4
        for (int i = 0; i < NT; i++) k[i] = load_up_to(keys + i * DK + d, DK - d);
#pragma GCC unroll 4
        for (int r = 0; r < NR; r++) {
            const vf q = load<vf>(scratch.query[row + r] + d);
#pragma GCC unroll 4
            for (int i = 0; i < NT; i++) s[r][i] = fma(q, k[i], s[r][i]);
        }
    }
#pragma GCC unroll 4
    for (int r = 0; r < NR; r++) sums(s[r], scratch.score[row + r] + offset);
}

template <int NT> inline void score_tokens_with_all_rows(Scratch& scratch, const T* keys, int64_t offset) {
    for_rows(scratch, [&](int64_t row, auto rows) { score_tokens<NT, rows()>(scratch, keys, row, offset); });
}

// Scores of n tokens from `offset` of the span on.
inline void score_run(Scratch& scratch, const T* keys, int64_t offset, int64_t n) {
    int64_t i = 0;
    for (; i + 4 <= n; i += 4) score_tokens_with_all_rows<4>(scratch, keys + i * DK, offset + i);
    for (; i < n; i++) score_tokens_with_all_rows<1>(scratch, keys + i * DK, offset + i);
}

// Add n weighted values from `offset` of the span on, NV vectors of channels from d on, to NR rows; one vector
// may be more than there are.
template <int NR, int NV>
inline void add_tokens(const Scratch& scratch, RunningSoftmax& softmax, const T* values, int64_t row, int64_t d,
                       int64_t offset, int64_t n) {
    vf sum[NR][NV];
    float* acc = softmax.acc + row * ACC + d;
#pragma GCC unroll 4
    for (int r = 0; r < NR; r++)
#pragma GCC unroll 4
        for (int v = 0; v < NV; v++) sum[r][v] = load<vf>(acc + r * ACC + v * L);
    for (int64_t i = 0; i < n; i++) {
        vf x[NV];
#pragma GCC unroll 4
        for (int v = 0; v < NV; v++) x[v] = load_up_to(values + i * DV + d + v * L, NV > 1 ? L : DV - d);
#pragma GCC unroll 4
        for (int r = 0; r < NR; r++) {
            const vf weight = splat(scratch.weight[row + r][offset + i]);
#pragma GCC unroll 4
            for (int v = 0; v < NV; v++) sum[r][v] = fma(weight, x[v], sum[r][v]);
        }
    }
#pragma GCC unroll 4
    for (int r = 0; r < NR; r++)
#pragma GCC unroll 4
        for (int v = 0; v < NV; v++) store(acc + r * ACC + v * L, sum[r][v]);
}

template <int NR>
inline void add_run_to_rows(const Scratch& scratch, RunningSoftmax& softmax, const T* values, int64_t row,
                            int64_t offset, int64_t n) {
    constexpr int64_t AT_ONCE = REGISTERS == 32 ? 4 : 2, WHOLE = DV_PAD / (AT_ONCE * L) * (AT_ONCE * L);
    for (int64_t d = 0; d < WHOLE; d += AT_ONCE * L)
        add_tokens<NR, AT_ONCE>(scratch, softmax, values, row, d, offset, n);
    for (int64_t d = WHOLE; d < DV; d += L) add_tokens<NR, 1>(scratch, softmax, values, row, d, offset, n);
}

// Add n weighted values from `offset` of the span on.
inline void add_run(const Scratch& scratch, RunningSoftmax& softmax, const T* values, int64_t offset, int64_t n) {
    for_rows(scratch,
             [&](int64_t row, auto rows) { add_run_to_rows<rows()>(scratch, softmax, values, row, offset, n); });
}

// Many rows (a chunk): full-precision tokens L at a time, so that what is loaded of them serves all rows.
constexpr bool MANY_ROWS = ROWS >= 16;

// Call `use(row, NR)` for eight of the rows in use at a time, then for one.
template <class Use> ALWAYS_INLINE void for_many_rows(const Scratch& scratch, Use use) {
    const int64_t end = scratch.rows_in_use();
    int64_t r = 0;
    for (; r + 8 <= end; r += 8) use(r, std::integral_constant<int, 8>());
    for (; r < end; r++) use(r, std::integral_constant<int, 1>());
}

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
    for_many_rows(scratch, [&](int64_t r, auto rows) { score_rows<rows()>(scratch, keys, r, offset); });
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
        for_many_rows(scratch,
                      [&](int64_t r, auto rows) { add_to_rows<rows()>(scratch, softmax, values, r, d, n, offset); });
    }
}

}  // namespace xq
