// Append a step's tokens to one side of one layer (the CPU kernel of xquant::quantize_store).
//
// The same as plain_torch.py does with whole tensors, but a block of keys is quantized only in the
// step that completes it. Constants come from cpu_source.py.
#ifndef XQ_LANES  // an editor, which sees no constants
#include "example_problem.h"
#endif
#include "../cpu/hadamard.h"
#include "../cpu/small_floats.h"

namespace xq {

constexpr int64_t RING = RESIDUAL + RING_SLACK, CODES_PER_WORD = 32 / BITS;
constexpr int64_t D_PAD = (D + L - 1) / L * L;
constexpr int64_t PITCH = D_PAD + CODES_PER_WORD;  // of unpacked codes
constexpr int32_t MAX_CODE = (1 << BITS) - 1;
constexpr float INF = std::numeric_limits<float>::infinity(), NOT_A_NUMBER = std::numeric_limits<float>::quiet_NaN();
constexpr bool FIT = BORROWED && LEAST_SQUARES;  // scale and zero point fitted to given codes

// Tensors holds the op's tensor arguments; kernels/cpu/source.py writes it.
struct Inputs : Tensors {
    int64_t past;
};

// Borrowed codes are const: nothing is written to them.
using Codes = std::remove_pointer_t<decltype(Tensors::codes)>;
inline void write(int32_t* word, int32_t value) { *word = value; }
inline void write(const int32_t*, int32_t) {}

inline int32_t shift_of_code(int64_t i) { return 8 * (i % 4) + BITS * (i / 4); }
inline vf to_floats(vub codes) { return __builtin_convertvector(widen(codes), vf); }

inline T* ring_token(const Inputs& in, int64_t head, int64_t t) { return in.ring + (head * RING + t % RING) * D; }

// Scale and zero point of one group as they are stored: (0, NaN) where either does not fit its dtype.
inline void store_scale_and_zero(S* scale, S* zero, float s, float z) {
    const S a = from_float<S>(s), b = from_float<S>(z);
    const bool finite = std::abs(to_float(a)) < INF && std::abs(to_float(b)) < INF;
    *scale = finite ? a : from_float<S>(0.0f);
    *zero = finite ? b : from_float<S>(NOT_A_NUMBER);
}

// The same of the lanes of a group whose range is known (Eq. 5: both ends relaxed by eta).
inline void store_relaxed(S* scale, S* zero, vf low, vf step, int64_t n) {
    const vf s = step * RELAXED_SCALE, z = low + step * RELAXED_ZERO;
    for (int64_t i = 0; i < std::min<int64_t>(n, L); i++) store_scale_and_zero(scale + i, zero + i, s[i], z[i]);
}

// From a group's least and largest number to its least and its step, lane by lane: (NaN, 0) where it is not finite.
inline void range_to_step(vf& low, vf high, vi nan, vf largest, vf& step) {
    const vi empty = low > high;
    low = empty ? splat(0.0f) : low;
    high = empty ? splat(0.0f) : high;
    step = (high - low) / largest;
    const vi finite = (abs(step) < INF) & ~nan;
    low = finite ? low : splat(NOT_A_NUMBER);
    step = finite ? step : splat(0.0f);
}

inline vi encode(vf x, vf low, vf step, vi largest = splat(MAX_CODE)) {
    const vi used = step > 0.0f;
    const vi c = round_to_int((x - low) / (used ? step : splat(1.0f)));
    const vi inside = c < 0 ? splat(0) : (c > largest ? largest : c);
    return used ? inside : splat(0);
}

// A block of keys: tokens [t0, t0 + GROUP) of one head. A group runs along tokens, a lane is a channel.
struct KeyGroup {
    const Inputs& in;
    int64_t head, t0;
    int64_t first;  // padding and sinks before this token of the group do not count
    vf at(int64_t t, int64_t d) const { return load_up_to(ring_token(in, head, t0 + t) + d, D - d); }
};

ALWAYS_INLINE void unpack_key_codes(const int32_t* packed, uint8_t* codes) {
    for (int64_t t = 0; t < GROUP; t++)
        for (int64_t d = 0; d < D; d++) {
            const uint32_t word = (uint32_t)packed[d / CODES_PER_WORD * TOKENS + t];
            codes[t * PITCH + d] = (uint8_t)(word >> shift_of_code(d % CODES_PER_WORD) & MAX_CODE);
        }
}

ALWAYS_INLINE void pack_key_codes(const uint8_t* codes, Codes* packed) {
    for (int64_t t = 0; t < GROUP; t++)
        for (int64_t w = 0; w < WORDS; w++) {
            uint32_t word = 0;
            for (int64_t i = 0; i < CODES_PER_WORD; i++)
                if (w * CODES_PER_WORD + i < D)
                    word |= (uint32_t)codes[t * PITCH + w * CODES_PER_WORD + i] << shift_of_code(i);
            write(packed + w * TOKENS + t, (int32_t)word);
        }
}

// Least number and step of the channels from d on.
ALWAYS_INLINE void range_of_channels(const KeyGroup& keys, int64_t d, vf& low, vf& step) {
    vf high = splat(-INF), x;
    vi nan = splat(0);
    low = splat(INF);
    for (int64_t t = keys.first; t < GROUP; t++) {
        x = keys.at(t, d);
        nan |= x != x;
        low = x < low ? x : low;
        high = x > high ? x : high;
    }
    range_to_step(low, high, nan, splat((float)MAX_CODE), step);
}

ALWAYS_INLINE void encode_channels(const KeyGroup& keys, int64_t d, vf low, vf step, uint8_t* codes) {
    for (int64_t t = 0; t < GROUP; t++) {
        const vf x = keys.at(t, d);
        store(codes + t * PITCH + d, narrow(encode(x, low, step)));
    }
}

// Scale and zero point of the channels from d on that fit their codes best: a regression of keys on codes.
ALWAYS_INLINE void fit_channels(const KeyGroup& keys, int64_t d, const uint8_t* codes, S* scale, S* zero) {
    vf mean_x = splat(0.0f), mean_c = mean_x, cov = mean_x, var = mean_x;
    const float count = (float)std::max<int64_t>(GROUP - keys.first, 1);
    for (int64_t t = keys.first; t < GROUP; t++) {
        mean_x += keys.at(t, d);
        mean_c += to_floats(load<vub>(codes + t * PITCH + d));
    }
    mean_x /= count;
    mean_c /= count;
    for (int64_t t = keys.first; t < GROUP; t++) {
        const vf dc = to_floats(load<vub>(codes + t * PITCH + d)) - mean_c;
        cov += dc * (keys.at(t, d) - mean_x);
        var += dc * dc;
    }
    const vf s = var > 0.0f ? cov / var : splat(0.0f), z = mean_x - s * mean_c;
    for (int64_t i = 0; i < std::min<int64_t>(L, D - d); i++)
        store_scale_and_zero(scale + d + i, zero + d + i, s[i], z[i]);
}

inline void store_key_group(const Inputs& in, int64_t head, int64_t t0) {
    const KeyGroup keys = {in, head, t0, std::max<int64_t>(in.start[head / H] + SINKS - t0, 0)};
    S* scale = in.scale + (head * (TOKENS / GROUP) + t0 / GROUP) * D;
    S* zero = in.zero + (head * (TOKENS / GROUP) + t0 / GROUP) * D;
    Codes* packed = in.codes + head * WORDS * TOKENS + t0;
    std::unique_ptr<uint8_t[]> buffer(new uint8_t[GROUP * PITCH]());
    uint8_t* codes = buffer.get();
    if (BORROWED) unpack_key_codes(packed, codes);
    for (int64_t d = 0; d < D; d += L) {
        vf low, step;
        if (!FIT) range_of_channels(keys, d, low, step);
        if (!BORROWED) encode_channels(keys, d, low, step, codes);
        if (FIT) fit_channels(keys, d, codes, scale, zero);
        else store_relaxed(scale + d, zero + d, low, step, D - d);
    }
    if (!BORROWED) pack_key_codes(codes, packed);
}

// Values: a group runs along channels of one token.
inline float sum_of_group(const float* x) {
    vf s = splat(0.0f);
    for (int64_t i = 0; i < GROUP; i += L) s += load_up_to(x + i, GROUP - i);
    return sum(s);
}

// The group in float32; returns its least number in all lanes, and its step.
ALWAYS_INLINE void range_of_values(const T* row, float* x, vf& lows, vf& step) {
    float low = INF, high = -INF;
    bool nan = false;
    for (int64_t i = 0; i < GROUP; i++) {
        x[i] = to_float(row[i]);
        nan |= x[i] != x[i];
        low = x[i] < low ? x[i] : low;
        high = x[i] > high ? x[i] : high;
    }
    lows = splat(low);
    range_to_step(lows, splat(high), splat(nan ? -1 : 0), splat((float)MAX_CODE), step);
}

// Put the group's codes at bit `shift` of its words.
ALWAYS_INLINE void encode_values(const float* x, vf lows, vf step, Codes* words, int32_t shift) {
    const int32_t mask = (int32_t)((uint32_t)MAX_CODE << shift);
    for (int64_t i = 0; i < GROUP; i += L) {
        const int64_t n = std::min<int64_t>(L, GROUP - i);
        const vi code = encode(load_up_to(x + i, n), lows, step);
        Codes* word = words + i;
        for (int64_t j = 0; j < n; j++) write(word + j, (word[j] & ~mask) | (int32_t)((uint32_t)code[j] << shift));
    }
}

// Scale and zero point that fit the codes best: a regression of values on codes.
ALWAYS_INLINE void fit_values(const float* x, const int32_t* words, int32_t shift, S* scale, S* zero) {
    float c[GROUP + L], cov[GROUP + L], var[GROUP + L];
    for (int64_t i = 0; i < GROUP; i++) c[i] = (float)((uint32_t)words[i] >> shift & MAX_CODE);
    const float mean_x = sum_of_group(x) / GROUP, mean_c = sum_of_group(c) / GROUP;
    for (int64_t i = 0; i < GROUP; i++) {
        const float dc = c[i] - mean_c;
        cov[i] = dc * (x[i] - mean_x);
        var[i] = dc * dc;
    }
    const float total = sum_of_group(var), s = total > 0.0f ? sum_of_group(cov) / total : 0.0f;
    store_scale_and_zero(scale, zero, s, mean_x - s * mean_c);
}

// Values of one token.
inline void store_value(const Inputs& in, int64_t head, int64_t t) {
    const T* row = ring_token(in, head, t);
    Codes* codes = in.codes + (head * (TOKENS / CODES_PER_WORD) + t / CODES_PER_WORD) * D;
    const int32_t shift = shift_of_code(t % CODES_PER_WORD);
    for (int64_t g = 0; g < D / GROUP; g++) {
        S* scale = in.scale + (head * (D / GROUP) + g) * TOKENS + t;
        S* zero = in.zero + (head * (D / GROUP) + g) * TOKENS + t;
        Codes* words = codes + g * GROUP;
        float x[GROUP + L];
        vf lows, step;
        range_of_values(row + g * GROUP, x, lows, step);
        if (!BORROWED) encode_values(x, lows, step, words, shift);
        if (FIT) fit_values(x, words, shift, scale, zero);
        else store_relaxed(scale, zero, lows, step, 1);
    }
}

}  // namespace xq

#include "cpu_ranked.h"
#include "cpu_rotated.h"

namespace xq {

inline int64_t limit_of_ranked(int64_t past) { return std::max<int64_t>((past - RESIDUAL + GROUP) / GROUP, 0) * GROUP; }

inline void store_head(const Inputs& in, int64_t head) {
    const int64_t end = in.past + Q;
    for (int64_t i = 0; i < Q; i++) {
        const T* x = in.x + (head * Q + i) * D;
        std::memcpy((void*)ring_token(in, head, in.past + i), (const void*)x, D * sizeof(T));
        const int64_t slot = in.pos[i] - in.start[head / H];
        if (SINKS && slot >= 0 && slot < SINKS)
            std::memcpy((void*)(in.sink + (head * (SINKS + 1) + slot) * D), (const void*)x, D * sizeof(T));
    }
    if constexpr (RANKED) {
        for (int64_t t = limit_of_ranked(in.past); t < limit_of_ranked(end); t += GROUP)
            store_ranked_group(in, head, t);
    } else if constexpr (BLOCKS) {
        for (int64_t t = in.past / RESIDUAL * RESIDUAL; t + RESIDUAL <= end; t += RESIDUAL)
            for (int64_t g = 0; g < RESIDUAL; g += GROUP) store_key_group(in, head, t + g);
    } else {
        for (int64_t t = std::max<int64_t>(in.past - RESIDUAL, 0); t < end - RESIDUAL; t++)
            if constexpr (ROTATED) store_rotated(in, head, t);
            else store_value(in, head, t);
    }
}

// Why these positions cannot follow what is stored (kernels/faults.py), or 0.
inline int32_t fault_code(const Tensors& in) {
    const int64_t past = in.pos[0];
    int64_t code = past > in.length[0] || past < 0 ? NOT_APPENDED : 0;
    if (past + Q > N) code = FULL;
    if (past > 0 && in.length[1] - past > STEP_TOKENS) code = ROLLED_BACK_TOO_FAR;
    if (past == 0 && in.length[0] == N) code = FULL_RESTARTED;
    for (int64_t i = 0; i < Q; i++)
        if (in.pos[i] != past + i) code = NOT_CONSECUTIVE;
    return (int32_t)code;
}

void append(const Tensors& tensors) {
    *tensors.fault = std::max(*tensors.fault, fault_code(tensors));
    // A step past the end is written over the last tokens.
    const Inputs in = {tensors, std::clamp<int64_t>(tensors.pos[0], 0, N - Q)};
    const int64_t heads = B * H;
    const int64_t end = in.past + Q;
    const bool flush = RANKED   ? limit_of_ranked(end) > limit_of_ranked(in.past)
                       : BLOCKS ? end / RESIDUAL > in.past / RESIDUAL
                                : false;
    [[maybe_unused]] const int num_threads = flush ? max_threads() : 1;  // a step's own work is too little to share out
#pragma omp parallel for num_threads(num_threads) if (num_threads > 1)
    for (int64_t head = 0; head < heads; head++) store_head(in, head);
    const int64_t stored = in.past + Q;
    in.length[1] = in.past == 0 ? stored : std::max(in.length[1], stored);
    in.length[0] = stored;
}

}  // namespace xq
