// Attention of the queries of a prompt, or of a part of one, in bfloat16 or float32, by flash attention (Dao et al.,
// 2022). Query p sees tokens first[p] to end[p] - 1: to itself and no further, without padding, in a sliding window.
//
//   out[p] = sum over t of softmax(scale * q[p] . k[t]) * v[t]     sums in float, rounded once; 0 if it sees none
//
// Both products are multiply(): rows by a matrix of lanes (pairs of bfloat16 numbers, or floats), which keys and values
// of a KV head are packed as, once. ROWS queries after the other pass KEYS tokens, whose lanes stay in near caches
// meanwhile. Where lanes are pairs, weights are rounded to bfloat16, and their sums are of the rounded ones.
#include "products.h"

namespace xq {

constexpr int64_t BLOCK = 8 * ROWS;  // queries of one task
constexpr int64_t KEYS = 8 * L;  // tokens between two looks at the largest score

// Numbers [batch, heads, tokens, D] and their strides, of which the last is 1.
template <class P> struct Heads {
    P* data;
    int64_t batch, head, token;
    P* at(int64_t b, int64_t h, int64_t t) const { return data + b * batch + h * head + t * token; }
};

struct Prompt {
    Heads<const T> q, k, v;
    Heads<T> out;
    const int32_t *first, *end;  // [batch, queries]
    int64_t batch, heads, kv_heads, queries, tokens;
    float scale;
};

// What the queries of a task have seen so far.
struct alignas(64) Task {
    X q[BLOCK][D];
    float acc[BLOCK][D];
    vf total[BLOCK];  // of weights, by lane
    float largest[BLOCK];
    int64_t first[BLOCK], end[BLOCK];  // tokens that they see
};

// x in the lanes from `from` on, up to `to`; elsewhere nothing that attention sees.
inline vf seen(vf x, int64_t from, int64_t to) {
    if (from <= 0 && to >= L) return x;
    const auto lane = [](int64_t n) { return (int32_t)std::clamp<int64_t>(n, 0, L); };
    return (iota() >= lane(from)) & (iota() < lane(to)) ? x : splat(MINUS_INFINITY);
}

// Scores [ROWS, KEYS] of queries for tokens from t on become weights, zeros where a query does not see them.
// `rescale` is by how much what was summed before counts less.
inline void weights(const float (&score)[ROWS][KEYS], X (&weight)[ROWS][KEYS], Task& task, int64_t row, int64_t t,
                    int64_t vectors, float scale, float* rescale) {
    float m[ROWS];
    vf highest[ROWS];
    for (int64_t r = 0; r < ROWS; r++) {
        highest[r] = splat(MINUS_INFINITY);
        const int64_t from = task.first[row + r] - t, to = task.end[row + r] - t;
        for (int64_t i = 0; i < vectors; i++)
            highest[r] = max(seen(load<vf>(score[r] + i * L) * scale, from - i * L, to - i * L), highest[r]);
    }
    maxima(highest, m);
    for (int64_t r = 0; r < ROWS; r++) {
        const float before = task.largest[row + r], now = std::max(before, m[r]);
        task.largest[row + r] = now;
        rescale[r] = now == before ? 1.0f : std::exp(before - now);
        const vf base = splat(now == MINUS_INFINITY ? 0.0f : -now);
        vf total = task.total[row + r] * rescale[r];
        const int64_t from = task.first[row + r] - t, to = task.end[row + r] - t;
        for (int64_t i = 0; i < vectors; i += 2) {
            vf p[2];
            for (int64_t j = 0; j < 2; j++) {
                const vf x = fma(load<vf>(score[r] + (i + j) * L), splat(scale), base);
                p[j] = exp_negative<!std::is_same_v<T, float>>(seen(x, from - (i + j) * L, to - (i + j) * L));
            }
            total = store_weights(weight[r] + i * L, p[0], p[1], total);
        }
        task.total[row + r] = total;
    }
}

// ROWS queries from `row` on of a task against `count` tokens from t on.
inline void attend_rows(Task& task, int64_t row, const Lane* keys, const Lane* values, int64_t t, int64_t count,
                        float scale) {
    alignas(64) float score[ROWS][KEYS];
    alignas(64) X weight[ROWS][KEYS];
    float rescale[ROWS];
    const int64_t vectors = (count + 2 * L - 1) / (2 * L) * 2;
    for (int64_t i = 0; i < vectors; i += WIDE, keys += D / PER_LANE * WIDE * L)
        multiply_up_to<WIDE>(vectors - i, score[0] + i * L, KEYS, nullptr, task.q[row], D, keys, WIDE * L,
                             D / PER_LANE);
    weights(score, weight, task, row, t, vectors, scale, rescale);
    for (int64_t d = 0; d < D; d += WIDE * L)
        multiply_up_to<WIDE>((D - d) / L, task.acc[row] + d, D, rescale, weight[0], KEYS, values + d, D,
                             vectors * L / PER_LANE);
}

// What ROWS queries from `row` on see, of tokens from..to.
struct Span {
    int64_t from, to;
};

inline Span span(const Task& task, int64_t row, int64_t rows) {
    return {*std::min_element(task.first + row, task.first + row + rows),
            *std::max_element(task.end + row, task.end + row + rows)};
}

// A task with its queries; none of them behind the last query sees anything, nor does one whose tokens are none.
inline int64_t begin(const Prompt& in, Task& task, int64_t b, int64_t head, int64_t query) {
    const int64_t queries = std::min(BLOCK, in.queries - query);
    std::fill(task.largest, task.largest + BLOCK, MINUS_INFINITY);
    std::fill(task.first, task.first + BLOCK, in.tokens);
    for (int64_t r = 0; r < queries; r++) {
        const int64_t at = b * in.queries + query + r;
        load_row(in.q.at(b, head, query + r), task.q[r], D);
        if (in.first[at] < in.end[at]) task.first[r] = in.first[at], task.end[r] = in.end[at];
    }
    return queries;
}

void attend_block(const Prompt& in, const Lane* keys, const Lane* values, int64_t b, int64_t head, int64_t query) {
    Task task = {};
    const int64_t queries = begin(in, task, b, head, query);
    const Span all = span(task, 0, BLOCK);
    for (int64_t t = all.from / KEYS * KEYS; t < all.to; t += KEYS)
        for (int64_t row = 0; row < queries; row += ROWS) {
            const Span rows = span(task, row, ROWS);
            if (rows.from < t + KEYS && rows.to > t)
                attend_rows(task, row, keys + t * (D / PER_LANE), values + t / PER_LANE * D, t,
                            std::min(KEYS, rows.to - t), in.scale);
        }
    for (int64_t r = 0; r < queries; r++) {
        const float total = sum(task.total[r]), share = total == 0 ? 0.0f : 1.0f / total;
        T* out = in.out.at(b, head, query + r);
        for (int64_t d = 0; d < D; d += L) store_rounded(out + d, load<vf>(task.acc[r] + d) * share);
    }
}

void attend(const Prompt& in) {
    const int64_t whole = (in.tokens + KEYS - 1) / KEYS * KEYS, group = in.heads / in.kv_heads;
    const int64_t blocks = (in.queries + BLOCK - 1) / BLOCK;
    [[maybe_unused]] const int num_threads = max_threads();
    AlignedFloats keys(whole * (D / PER_LANE)), values(whole / PER_LANE * D);
    Lane *const k = (Lane*)keys.data, *const v = (Lane*)values.data;
#pragma omp parallel num_threads(num_threads) if (num_threads > 1)
    for (int64_t i = 0; i < in.batch * in.kv_heads; i++) {
        const int64_t b = i / in.kv_heads, h = i % in.kv_heads;
#pragma omp for schedule(static)
        for (int64_t t = 0; t < whole; t += WIDE * L) {
            pack_keys(in.k.at(b, h, t), in.k.token, in.tokens - t, k + t * (D / PER_LANE));
            pack_values(in.v.at(b, h, t), in.v.token, in.tokens - t, v + t / PER_LANE * D);
        }
#pragma omp for schedule(dynamic)
        for (int64_t task = 0; task < blocks * group; task++)  // the longest first
            attend_block(in, k, v, b, h * group + task % group, (blocks - 1 - task / group) * BLOCK);
    }
}

}  // namespace xq
