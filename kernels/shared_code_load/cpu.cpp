// Dequantized keys or values of one layer (the CPU kernel of xquant::shared_code_load).
//
// The same as plain_torch.py does with whole tensors. Constants come from cpu_source.py; how many tokens of how many
// sequences are given back, and from which on, is told.
#ifndef XQ_LANES  // an editor, which sees no constants
#include "example_problem.h"
#endif
#include "../cpu/hadamard.h"
#include "../cpu/planes.h"
#include "../cpu/ranked.h"
#include "../cpu/small_floats.h"

namespace xq {

constexpr int64_t D_PAD = (D + L - 1) / L * L;
constexpr int64_t AT_ONCE = 32;   // tokens whose codes are read together
constexpr int64_t A_THREADS = 64;  // tokens that are worth a thread's turn

// Tensors holds the op's tensor arguments, and Sizes what differs from cache to cache (cpu_source.py); written by
// kernels/cpu/source.py. Tokens of [oldest, written) are there, those below `limit` in codes.
struct Inputs : Tensors, Sizes {
    int64_t past, oldest, limit, written;
};

// Tokens that are in codes when `past` are stored.
inline int64_t quantized_limit(int64_t past) {
    if constexpr (RANKED) return ranked_limit(past, RESIDUAL, GROUP);
    else if constexpr (KEYS) return past / RESIDUAL * RESIDUAL;
    else return past - RESIDUAL;
}

// A scale or zero point as it is stored.
template <class X> inline float decoded(X x) { return to_float(x); }
inline float decoded(uint8_t x) { return decode_scale(x); }

// Codes of `count` tokens from a slot on, of all ranks or channels: in rows of AT_ONCE.
inline void get_key_codes(const int32_t* words, int64_t tokens, int64_t count, int32_t (*codes)[AT_ONCE]) {
    std::memset(codes, 0, sizeof(codes[0]) * D);
    const auto add = [&](int64_t word, int64_t of, uint32_t bit, uint32_t mask, uint32_t shift) {
        const int32_t* from = words + word * tokens;
        for (int64_t t = 0; t < count; t++) codes[of][t] |= (int32_t)(((uint32_t)from[t] >> bit & mask) << shift);
    };
    if constexpr (RANKED) {
        for (const Field& field : FIELDS) add(field.word, field.rank, field.bit, field.mask, field.shift);
    } else {
        for (const Plane& plane : PLANES)
            for (int64_t d = 0; d < D; d++)
                add(word_of_code(plane, d, D), d, (uint32_t)shift_of_code(plane, d), mask_of(plane),
                    (uint32_t)plane.shift);
    }
}

// Keys of `count` tokens from t on, of one group.
inline void dequantize_keys(const Inputs& in, int64_t head, int64_t t, int64_t count, T* out) {
    alignas(64) int32_t codes[D][AT_ONCE];
    const int64_t slot = slot_of(t), row = (head * (in.tokens / GROUP) + slot / GROUP) * D;
    get_key_codes(in.codes + head * WORDS * in.tokens + slot, in.tokens, count, codes);
    const int32_t* order = in.order + (RANKED ? head * D : 0);
    const bool has_order = RANKED && D > 1 && order[0] != order[1];  // none before the first group that counts
    float norm[AT_ONCE];
    for (int64_t i = 0; NORMS && i < count; i++) norm[i] = decode_scale(in.norm[head / H * in.tokens + slot + i]);
    for (int64_t r = 0; r < D; r++) {
        const float scale = decoded(in.scale[row + r]);
        float zero, center = 0.0f;
        int64_t channel = r;
        if constexpr (RANKED) {
            zero = load_mids(in.zero + row + r, 1)[0] - 0.5f * (float)LARGEST_CODES[r];
            center = in.center[head * D + r];
            channel = has_order ? order[r] : r;
        } else {
            zero = decoded(in.zero[row + r]);
        }
        for (int64_t i = 0; i < count; i++) {
            const float code = (float)codes[r][i];
            float x = RANKED ? scale * (code + zero) + center : code * scale + zero;
            if constexpr (NORMS) x *= norm[i];
            out[i * D + channel] = from_float<T>(x);
        }
    }
}

inline void rotate_back(float* y) {
    constexpr int64_t SIZE = ROTATED ? ROTATED : 1;
    hadamard<D, SIZE>(y);
    for (int64_t d = 0; d < D; d++) y[d] = y[d] * ROTATION_SCALE * ROTATION_SIGNS[ROTATED ? d : 0];
}

// Values of token t.
inline void dequantize_value(const Inputs& in, int64_t head, int64_t t, T* out) {
    float y[D_PAD + L];
    const int64_t slot = slot_of(t);
    get_codes(in.codes + head * (in.tokens * BITS / 32) * D, slot, in.tokens, D, y);
    for (int64_t g = 0; g < D / GROUP; g++) {
        const int64_t at = (head * (D / GROUP) + g) * in.tokens + slot;
        const float scale = decoded(in.scale[at]);
        if constexpr (ABOUT_ZERO) {
            for (int64_t d = g * GROUP; d < (g + 1) * GROUP; d++) y[d] = (y[d] - 0.5f * ((1 << BITS) - 1)) * scale;
        } else {
            const float zero = decoded(in.zero[at]);
            for (int64_t d = g * GROUP; d < (g + 1) * GROUP; d++) y[d] = y[d] * scale + zero;
        }
    }
    if constexpr (ABOUT_ZERO && !FOLDED) rotate_back(y);
    for (int64_t d = 0; d < D; d++) out[d] = from_float<T>(y[d]);
}

// Tokens from t on whose codes can be read together, all of them in codes, of `count`.
inline int64_t run_length(int64_t t, int64_t count) {
    const int64_t slot = slot_of(t);
    count = std::min(count, AT_ONCE);
    if constexpr (KEYS) count = std::min(count, GROUP - slot % GROUP);
    return WRAP ? std::min(count, WRAP - slot) : count;
}

// A token that is in full precision: a sink, one of the step's own, or one of the window.
inline const T* in_full(const Inputs& in, int64_t head, int64_t t, int64_t sink) {
    if (SINKS && sink >= 0 && sink < SINKS) return in.sink + (head * (SINKS + 1) + sink) * D;
    if (in.own && t >= in.past) return in.x + (head * in.new_tokens + t - in.past) * D;
    return in.ring + (head * RING + t % RING) * D;
}

// Tokens [begin, end) of those that are given back.
inline void load_tokens(const Inputs& in, int64_t head, int64_t begin, int64_t end, T* out) {
    for (int64_t i = begin; i < end;) {
        const int64_t t = in.first + i, sink = t - in.start[head / H];
        T* to = out + (head * in.n + i) * D;
        int64_t count = 1;
        if (t < in.oldest || t >= in.written) {
            std::memset((void*)to, 0, D * sizeof(T));
        } else if (t >= in.limit || (sink >= 0 && sink < SINKS)) {
            std::memcpy((void*)to, (const void*)in_full(in, head, t, sink), D * sizeof(T));
        } else if constexpr (KEYS) {
            count = std::min(in.limit - t, end - i);
            count = run_length(t, sink < 0 ? std::min(count, -sink) : count);
            dequantize_keys(in, head, t, count, to);
        } else {
            dequantize_value(in, head, t, to);
        }
        i += count;
    }
    if constexpr (FOLDED)
        for (int64_t i = begin; i < end; i++) {
            T* to = out + (head * in.n + i) * D;
            float y[D_PAD + L];
            for (int64_t d = 0; d < D; d++) y[d] = to_float(to[d]);
            rotate_back(y);
            for (int64_t d = 0; d < D; d++) to[d] = from_float<T>(y[d]);
        }
}

void load_all(const Tensors& tensors, const Sizes& sizes, T* out) {
    const int64_t past = tensors.past[0], stored = past + (sizes.own ? 0 : sizes.new_tokens);
    const int64_t oldest = WRAP ? quantized_limit(stored) - WRAP + (KEYS ? 0 : WORD_TOKENS) : 0;
    const Inputs in = {tensors, sizes, past, oldest, quantized_limit(past), past + sizes.new_tokens};
    const int64_t turns = (in.n + A_THREADS - 1) / A_THREADS, all = in.batch * H * turns;
    [[maybe_unused]] const int num_threads = all > 1 ? max_threads() : 1;
#pragma omp parallel for num_threads(num_threads) if (num_threads > 1)
    for (int64_t i = 0; i < all; i++) {
        const int64_t begin = i % turns * A_THREADS;
        load_tokens(in, i / turns, begin, std::min(in.n, begin + A_THREADS), out);
    }
}

}  // namespace xq
