// Decode attention that reads packed codes (the CPU kernel of xquant::decode_attention).
//
// The constants in front of this file (cpu_source.py writes them) fix dtypes, heads and bits, not how many
// sequences there are and how long they may be; the loops below are the algorithm:
//
//   score  q . (c * s + z) = (q * s) . c + q . z     keys: scale and zero of a channel in a token group,
//                                                    so q * s is made once per group
//   output sum p (c * s + z) = (p * s) . c + sum p z values: scale and zero of a token, folded into p
//
// What is left to do per element is an integer dot product of codes with (q * s) or (p * s), which is
// split into signed bytes, the digits of a fixed-point number (one is exact to 2**-8 of the largest, two to
// 2**-15, three to 2**-22; cpu_source.py says how many). Codes are packed along the axis of that sum, four to the four
// bytes of a word.
//
// A span of SPAN tokens is taken at a time: scores, online softmax, weighted values. All query heads
// of a KV head (and all queries of the step) are the rows that share one read of the codes.
#include "../cpu/ranked.h"
#include "cpu_problem.h"
#include "cpu_quantized_keys.h"
#include "cpu_quantized_values.h"
#include "cpu_full_tokens.h"
#include "cpu_softmax.h"

#include "../cpu/hadamard.h"

namespace xq {

// One span: tokens [t0, t1) of one KV head.
inline void attend_span(Scratch& scratch, const Inputs& in, RunningSoftmax& softmax, int64_t head, int64_t t0,
                        int64_t t1) {
    const int64_t keys = std::clamp(in.keys_end, t0, t1), values = std::clamp(in.values_end, t0, t1);
    const int64_t first = in.start[head / H];
    const int64_t sink0 = std::clamp(first, t0, t1), sink1 = std::clamp(first + SINKS, t0, t1);
    prefetch_window<K_RING>(in, in.k_ring, in.k_new, head, keys, t1, DK);
    prefetch_window<V_RING>(in, in.v_ring, in.v_new, head, values, t1, DV);
    if (keys > t0) quantized_scores(scratch, in, head, t0, keys);
    if constexpr (MANY_ROWS)
        for (int64_t t = keys; t < t1; t += L)
            score_tokens_for_many_rows(scratch, in, head, t, std::min<int64_t>(L, t1 - t), t - t0);
    else
        window_runs<K_RING>(in, in.k_ring, in.k_new, head, keys, t1, DK,
                            [&](const T* run, int64_t t, int64_t n) { score_run(scratch, run, t - t0, n); });
    const int64_t sink = head * (SINKS + 1) + sink0 - first;
    if (sink1 > sink0) score_run(scratch, in.k_sink + sink * DK, sink0 - t0, sink1 - sink0);
    online_softmax(scratch, in, softmax, head, t0, t1 - t0);
    if (sink1 > sink0) add_run(scratch, softmax, in.v_sink + sink * DV, sink0 - t0, sink1 - sink0);
    for (int64_t r = 0; r < scratch.rows_in_use(); r++)
        std::fill(scratch.weight[r] + sink0 - t0, scratch.weight[r] + sink1 - t0, 0.0f);
    if constexpr (MANY_ROWS)
        for (int64_t t = values; t < t1; t += L)
            add_tokens_to_many_rows(scratch, softmax, in, head, t, std::min<int64_t>(L, t1 - t), t - t0);
    else {
        const auto add = [&](const T* run, int64_t t, int64_t n) { add_run(scratch, softmax, run, t - t0, n); };
        window_runs<V_RING>(in, in.v_ring, in.v_new, head, values, sink0, DV, add);
        window_runs<V_RING>(in, in.v_ring, in.v_new, head, std::max(values, sink1), t1, DV, add);
    }
    if (values > t0) quantized_values(scratch, in, softmax, head, t0, values - t0);
}

inline void load_queries(Scratch& scratch, const Inputs& in, int64_t head, int64_t row0) {
    scratch.row0 = row0, scratch.rows = in.rows_from(row0);
    scratch.q = in.q + (head * in.rows() + row0) * DK;
    std::memset(scratch.query, 0, sizeof(scratch.query));
    std::memset(scratch.folded, 0, sizeof(scratch.folded));
    std::fill(scratch.q_center, scratch.q_center + ROWS, 0.0f);
    for (int64_t r = 0; r < scratch.rows_in_use(); r++)
        for (int64_t d = 0; d < DK; d += L)
            store(scratch.query[r] + d, load_up_to(scratch.q + r * DK + d, DK - d) * SCALE);
    if constexpr (RANKED) {
        std::memset(scratch.ranked, 0, sizeof(scratch.ranked));
        const int32_t* order = in.k_order + head * DK;
        const float* center = in.k_center + head * DK;
        for (int64_t r = 0; r < scratch.rows_in_use(); r++) {
            double sum = 0.0;
            for (int64_t i = 0; i < DK; i++) {
                scratch.ranked[r][i] = scratch.query[r][order[i]];
                sum += (double)scratch.ranked[r][i] * center[i];
            }
            scratch.q_center[r] = (float)sum;
        }
    }
    scratch.groups = 0;
}

// One row's sums of rotated values, rotated back (kernels/rotation.py) and added to those of values as they are.
inline void rotate_back(float* acc) {
    float* y = acc + CODES_AT;
    hadamard<DV, ROTATED>(y);
    int64_t d = 0;
    for (; d + L <= DV; d += L)
        store(acc + d, fma(load<vf>(y + d), load<vf>(ROTATION_SIGNS + d) * ROTATION_SCALE, load<vf>(acc + d)));
    for (; d < DV; d++) acc[d] += y[d] * ROTATION_SIGNS[d] * ROTATION_SCALE;
}

// What is in no span, and the division by the sum of weights.
inline void finish(const Inputs& in, RunningSoftmax& softmax, const UnwrittenTokens* unwritten, int64_t head,
                   int64_t row0) {
    const int64_t rows = in.rows_from(row0);
    for (int64_t r = 0; r < rows; r++) {
        UnwrittenTokens u;
        if (HAS_MASK) u = unwritten[mask_row(in, head, row0 + r)];
        else if (in.length < in.max_len) u.m = 0.0f, u.l = (float)(in.max_len - in.length);
        if (u.m != MINUS_INFINITY) merge(softmax, r, u.m, u.l, nullptr);
        if (HAS_SINK_LOGITS)
            merge(softmax, r, to_float(in.sink_logits[head % H * (HQ / H) + (row0 + r) / in.new_tokens()]), 1.0f,
                  nullptr);
        const float scale = softmax.m[r] == MINUS_INFINITY && softmax.l[r] == 0.0f ? 0.0f : 1.0f / softmax.l[r];
        if constexpr (ROTATED) rotate_back(softmax.acc + r * ACC);
        T* out = in.out + (head * in.rows() + row0 + r) * DV;
        for (int64_t d = 0; d < DV; d++) out[d] = from_float<T>(softmax.acc[r * ACC + d] * scale);
    }
}

// Tokens [t0, t1) of one block of rows, from its queries on.
inline void attend_tokens(Scratch& scratch, const Inputs& in, RunningSoftmax softmax, int64_t block, int64_t t0,
                          int64_t t1) {
    const int64_t head = block / in.row_blocks();
    softmax.clear();
    load_queries(scratch, in, head, block % in.row_blocks() * ROWS);
    for (int64_t t = t0; t < t1; t = span_end(t, t1)) attend_span(scratch, in, softmax, head, t, span_end(t, t1));
}

void attend(const Tensors& tensors, const Sizes& given, T* out) {
    const int64_t tokens = Inputs::tokens_of(given);
    const int64_t past = std::clamp<int64_t>(*tensors.past, 0, (given.max_len ? given.max_len : LONGEST) - tokens);
    Sizes sizes = given;
    if (!sizes.max_len) sizes.max_len = past + tokens;
    const int64_t keys = RANKED ? ranked_limit(past, K_RESIDUAL, K_GROUP) : past / K_RESIDUAL * K_RESIDUAL;
    const Inputs in = {tensors, sizes, out, past, past + tokens, keys, std::max<int64_t>(past - V_RESIDUAL, 0)};
    // Whole words of codes, from the one on that holds the first token which any query sees.
    const int64_t begin = WINDOW ? std::max<int64_t>(past - WINDOW + 1, 0) / V_BLOCK * V_BLOCK : 0;
    const int64_t spans = (in.length - begin + SPAN - 1) / SPAN, blocks = in.batch * H * in.row_blocks();
    const int num_threads = blocks * ROWS * (in.length - begin) < 8192 ? 1 : max_threads();
    // Tokens are split, too, so that there are pieces enough for threads that are not equally fast.
    const int64_t wanted_splits = num_threads == 1 ? 1 : (16 * num_threads + blocks - 1) / blocks;
    const int64_t splits = std::clamp<int64_t>(wanted_splits, 1, std::max<int64_t>(SPAN > 256 ? spans : spans / 2, 1));
    AlignedFloats parts(blocks * splits * RunningSoftmax::SIZE);
    auto part = [&](int64_t i) { return RunningSoftmax(parts.data + i * RunningSoftmax::SIZE); };
    const int64_t mask_rows = HAS_MASK ? in.mask_batch * in.mask_rows() : 0;
    std::unique_ptr<UnwrittenTokens[]> unwritten(new UnwrittenTokens[mask_rows]);
#pragma omp parallel num_threads(num_threads) if (num_threads > 1)
    {
        std::unique_ptr<Scratch> scratch(new Scratch);
        if (HAS_MASK && in.length < in.max_len) {
#pragma omp for schedule(static) nowait
            for (int64_t i = 0; i < mask_rows; i++)
                unwritten[i] = softmax_of_unwritten(in.mask + i * in.max_len, in.length, in.max_len);
        }
#pragma omp for schedule(dynamic, 1)
        for (int64_t i = 0; i < blocks * splits; i++) {
            const int64_t block = i / splits, split = i % splits;
            const int64_t end = std::min(in.length, begin + spans * (split + 1) / splits * SPAN);
            attend_tokens(*scratch, in, part(i), block, begin + spans * split / splits * SPAN, end);
        }
#pragma omp for schedule(static)
        for (int64_t block = 0; block < blocks; block++) {
            RunningSoftmax softmax = part(block * splits);
            const int64_t row0 = block % in.row_blocks() * ROWS;
            for (int64_t s = 1; s < splits; s++) {
                RunningSoftmax other = part(block * splits + s);
                for (int64_t r = 0; r < in.rows_from(row0); r++)
                    merge(softmax, r, other.m[r], other.l[r], other.acc + r * ACC);
            }
            finish(in, softmax, unwritten.get(), block / in.row_blocks(), row0);
        }
    }
}

}  // namespace xq
