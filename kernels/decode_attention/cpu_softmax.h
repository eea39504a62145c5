// From scores to weights: softcap, masks, the online softmax, and how softmaxes over different tokens are merged.
#pragma once
#include "cpu_digits.h"

namespace xq {

inline vf apply_mask(vf logit, const uint8_t* mask, int64_t n) {
    const vi allowed = widen(load_bytes(mask, n));
    return allowed != 0 ? logit : splat(MINUS_INFINITY);
}
template <class F> inline vf apply_mask(vf logit, const F* mask, int64_t n) { return logit + load_up_to(mask, n); }

// Number of the row of the mask that is for row r of a KV head; what is behind the last one takes that.
inline int64_t mask_row(const Inputs& in, int64_t head, int64_t r) {
    const int64_t tokens = in.new_tokens();
    if (ANY_QUERIES) r = std::min(r, in.rows() - 1);
    const int64_t query_head = MASK_HEADS ? head % H * (HQ / H) + r / tokens : 0;
    return (in.mask_batch > 1 ? head / H * in.mask_rows() : 0) + query_head * (MASK_QUERIES ? tokens : 1) +
           (MASK_QUERIES ? r % tokens : 0);
}

// SOFTCAP * tanh(x / SOFTCAP); by its series where the quotient would cancel.
inline vf softcap(vf x) {
    const vf z = x / SOFTCAP, y = exp(z * -2.0f), s = z * z;
    vf series = fma(s, splat(62.0f / 2835), splat(-17.0f / 315));
    series = fma(series, s, splat(2.0f / 15));
    series = fma(series, s, splat(-1.0f / 3));
    series = fma(series * s, x, x);
    return abs(z) < 0.25f ? series : SOFTCAP * ((1.0f - y) / (1.0f + y));
}

// x in the lanes [from, to), elsewhere nothing that attention sees.
inline vf mask_lanes(vf x, int64_t from, int64_t to) {
    const int32_t a = (int32_t)std::clamp<int64_t>(from, 0, L), b = (int32_t)std::clamp<int64_t>(to, 0, L);
    const vi lane = iota();
    return (lane >= a) & (lane < b) ? x : splat(MINUS_INFINITY);
}

// Scores to logits of NR rows over n tokens from t0: softcap, mask, window. Gives the largest, or the largest so far;
// NaN is left out. Rows go side by side, as they often share a mask.
template <int NR>
inline void logits(Scratch& scratch, const Inputs& in, const float* so_far, int64_t head, int64_t row, int64_t t0,
                   int64_t n, float* m) {
    const MASK* mask[NR] = {};
    int64_t first_visible[NR] = {};
    vf largest[NR];
    for (int r = 0; r < NR; r++) {
        largest[r] = splat(so_far[row + r]);
        if (HAS_MASK) mask[r] = in.mask + mask_row(in, head, scratch.row0 + row + r) * in.max_len + t0;
        if (WINDOW) first_visible[r] = in.past + (scratch.row0 + row + r) % in.new_tokens() - WINDOW + 1 - t0;
    }
    for (int64_t i = 0; i < n; i += L) {
        vf x[NR];
#pragma GCC unroll 4
        for (int r = 0; r < NR; r++) {
            x[r] = load<vf>(scratch.score[row + r] + i);
            if (SOFTCAP > 0) x[r] = softcap(x[r]);
            if (HAS_MASK) x[r] = apply_mask(x[r], mask[MASK_HEADS || MASK_QUERIES ? r : 0] + i, n - i);
            if (n - i < L || first_visible[r] > i) x[r] = mask_lanes(x[r], first_visible[r] - i, n - i);
            largest[r] = max(x[r], largest[r]);
        }
#pragma GCC unroll 4
        for (int r = 0; r < NR; r++) store(scratch.score[row + r] + i, x[r]);
    }
    maxima(largest, m + row);
}

// The online softmax over n tokens from t0, row by row in two passes, so that the sums across lanes that
// end the first do not hold up the second.
inline void online_softmax(Scratch& scratch, const Inputs& in, RunningSoftmax& softmax, int64_t head, int64_t t0,
                           int64_t n) {
    float m[ROWS];
    for_rows(scratch, [&](int64_t r, auto rows) { logits<rows()>(scratch, in, softmax.m, head, r, t0, n, m); });
    for (int64_t r = 0; r < scratch.rows_in_use(); r++) {
        const float rescale = m[r] == softmax.m[r] ? 1.0f : std::exp(softmax.m[r] - m[r]);
        softmax.m[r] = m[r];
        const float base = m[r] == MINUS_INFINITY ? 0.0f : m[r];  // all -inf: weights of 0. A NaN stays one throughout
        vf total = splat(0.0f);
        for (int64_t i = 0; i < n; i += L) {
            const vf p = exp_negative<sizeof(T) == 2>(load<vf>(scratch.score[r] + i) - base);
            total += p;
            store(scratch.weight[r] + i, p);
        }
        softmax.l[r] = softmax.l[r] * rescale + sum(total);
        float* acc = softmax.acc + r * ACC;
        if (rescale != 1.0f)
            for (int64_t d = 0; d < ACC; d += L) store(acc + d, load<vf>(acc + d) * rescale);
    }
}

// Add a softmax over other tokens to row r; `acc` is null where their values are zeros.
inline void merge(RunningSoftmax& into, int64_t r, float m, float l, const float* acc) {
    const float largest = std::max(into.m[r], m);
    if (largest == MINUS_INFINITY) {
        into.l[r] += l;  // 0, or NaN
        return;
    }
    const float a = std::exp(into.m[r] - largest), b = std::exp(m - largest);
    into.m[r] = largest;
    into.l[r] = into.l[r] * a + l * b;
    for (int64_t d = 0; d < ACC; d += L) {
        vf x = load<vf>(into.acc + r * ACC + d) * a;
        store(into.acc + r * ACC + d, acc ? fma(load<vf>(acc + d), splat(b), x) : x);
    }
}

// Tokens past the last one written count as zeros, as the program reads them, where the mask lets them in.
struct UnwrittenTokens {
    float m = MINUS_INFINITY, l = 0.0f;  // largest logit, sum of exponentials
};

inline bool all_zero(const uint8_t* x, int64_t n) {
    vi bits = {};
    int64_t i = 0;
    for (; i + (int64_t)sizeof(vi) <= n; i += sizeof(vi)) bits |= load<vi>(x + i);
    bool nonzero = any(bits);
    for (; i < n; i++) nonzero |= x[i] != 0;
    return !nonzero;
}
template <class F> inline bool all_zero(const F*, int64_t) { return false; }

// `mask` is one row of the mask. Often the same row is for all heads, so this is done once per row.
inline UnwrittenTokens softmax_of_unwritten(const MASK* mask, int64_t length, int64_t max_len) {
    UnwrittenTokens u;
    if (all_zero(mask + length, max_len - length)) return u;
    vf largest = splat(MINUS_INFINITY), total = splat(0.0f);
    for (int pass = 0; pass < 2; pass++) {
        for (int64_t t = length; t < max_len; t += L) {
            vf x = apply_mask(splat(0.0f), mask + t, max_len - t);
            if (max_len - t < L) x = mask_lanes(x, 0, max_len - t);
            if (pass == 0) largest = max(x, largest);
            else total += exp(x - u.m);
        }
        u.m = max(largest);
        if (u.m == MINUS_INFINITY) return u;
    }
    u.l = sum(total);
    return u;
}

}  // namespace xq
