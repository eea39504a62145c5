// Append a step's tokens to one side of one layer (the CPU kernel of xquant::quantize_store).
//
// The same as plain_torch.py does with whole tensors, but a block of keys is quantized only in the
// step that completes it. Constants come from cpu_source.py; how many tokens are appended, to how many sequences
// of which length, is told.
#ifndef XQ_LANES  // an editor, which sees no constants
#include "example_problem.h"
#endif
#include "../cpu/hadamard.h"
#include "../cpu/planes.h"
#include "../cpu/ranked.h"
#include "../cpu/small_floats.h"

namespace xq {

constexpr int64_t RING = RESIDUAL + RING_SLACK;
constexpr int64_t D_PAD = (D + L - 1) / L * L;
constexpr int64_t PITCH = D_PAD + 32 / BITS;                  // of unpacked codes
constexpr int PLANE_COUNT = sizeof(PLANES) / sizeof(Plane);  // 1 or 2
constexpr int32_t MAX_CODE = (1 << BITS) - 1;
constexpr float INF = std::numeric_limits<float>::infinity(), NOT_A_NUMBER = std::numeric_limits<float>::quiet_NaN();
constexpr bool FIT = BORROWED && LEAST_SQUARES;  // scale and zero point fitted to given codes

// Tensors holds the op's tensor arguments, and Sizes what differs from cache to cache (cpu_source.py), with `count` of
// new tokens; written by kernels/cpu/source.py.
struct Inputs : Tensors, Sizes {
    int64_t past;
};

// Borrowed codes are const: nothing is written to them.
using Codes = std::remove_pointer_t<decltype(Tensors::codes)>;
inline void write(int32_t* word, int32_t value) { *word = value; }
inline void write(const int32_t*, int32_t) {}

inline T* ring_token(const Inputs& in, int64_t head, int64_t t) { return in.ring + (head * RING + t % RING) * D; }

// Token t in full precision, a new one or one that the window still holds: it takes the new ones last.
inline const T* token(const Inputs& in, int64_t head, int64_t t) {
    return t < in.past ? ring_token(in, head, t) : in.x + (head * in.count + t - in.past) * D;
}

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

}  // namespace xq

#include "token_codes.h"

// Of each way to quantize what is due: from which token to which (due_end), in slices of how many (SLICE) that do not
// share a word, whether that of a single step is worth sharing out (DUE_IS_MUCH), and how: note_tokens for all heads of
// a batch row, prepare_due once per head, then quantize_due.
#if defined(XQ_APPEND_BLOCKS)
#include "due_blocks.h"
#elif defined(XQ_APPEND_TOKENS)
#include "due_tokens.h"
#elif defined(XQ_APPEND_RANKED)
#include "due_ranked.h"
#elif defined(XQ_APPEND_ROTATED)
#include "due_rotated.h"
#endif
#if defined(XQ_APPEND_TOKENS) || defined(XQ_APPEND_ROTATED)
#include "leaving_tokens.h"
#endif

namespace xq {

// New tokens into the window, and those that are sinks.
inline void store_full_precision(const Inputs& in, int64_t head) {
    for (int64_t i = 0; i < in.count; i++) {
        const T* x = in.x + (head * in.count + i) * D;
        if (i >= in.count - RING) std::memcpy((void*)ring_token(in, head, in.past + i), (const void*)x, D * sizeof(T));
        const int64_t slot = in.pos[i] - in.start[head / H];
        if (SINKS && slot >= 0 && slot < SINKS)
            std::memcpy((void*)(in.sink + (head * (SINKS + 1) + slot) * D), (const void*)x, D * sizeof(T));
    }
}

// Why these positions cannot follow what is stored (kernels/faults.py), or 0.
inline int32_t fault_code(const Tensors& in, int64_t count, int64_t max_len) {
    const int64_t past = in.pos[0];
    int64_t code = past > in.length[0] || past < 0 ? NOT_APPENDED : 0;
    if (past + count > max_len) code = FULL;
    if (past > 0 && in.length[1] - past > RING_SLACK) code = ROLLED_BACK_TOO_FAR;
    const bool full = in.length[0] == max_len;
    const bool may_wrap = count > STEP_TOKENS ? full && count < max_len : full || in.length[0] > STEP_TOKENS;
    if (past == 0 && may_wrap) code = RESTARTED;
    for (int64_t i = 0; i < count; i++)
        if (in.pos[i] != past + i) code = NOT_CONSECUTIVE;
    return (int32_t)code;
}

inline void append(const Tensors& tensors, const Sizes& sizes) {
    const int64_t count = sizes.count;
    *tensors.fault = std::max(*tensors.fault, fault_code(tensors, count, sizes.max_len));
    // A step past the end is written over the last tokens.
    const Inputs in = {tensors, sizes, std::clamp<int64_t>(tensors.pos[0], 0, sizes.max_len - count)};
    const int64_t heads = in.batch * H, from = due_end(in.past), to = due_end(in.past + count);
    // A slice is the least that threads can write to at once. A step's own work is too little to share out.
    const int64_t first = from / SLICE, slices = to > from ? (to + SLICE - 1) / SLICE - first : 0;
    [[maybe_unused]] const int num_threads = slices && (count > STEP_TOKENS || DUE_IS_MUCH) ? max_threads() : 1;
#pragma omp parallel num_threads(num_threads) if (num_threads > 1)
    {
        const auto each_slice = [&](int64_t i, auto work) {
            const int64_t begin = (first + i % slices) * SLICE;
            work(in, i / slices, std::max(from, begin), std::min(to, begin + SLICE));
        };
#pragma omp for
        for (int64_t i = 0; i < in.batch * slices; i++) each_slice(i, note_tokens);
#pragma omp for
        for (int64_t head = 0; head < heads; head++) prepare_due(in, head, from, to);
#pragma omp for
        for (int64_t i = 0; i < heads * slices; i++) each_slice(i, quantize_due);
#pragma omp for
        for (int64_t head = 0; head < heads; head++) store_full_precision(in, head);
    }
    const int64_t stored = in.past + count;
    in.length[1] = in.past == 0 ? stored : std::max(in.length[1], stored);
    in.length[0] = stored;
}

// One of the rows of a batch that have lengths of their own (kernels/rows.py): it may begin a sequence anew by itself.
void append_row(const Tensors& row, const Sizes& sizes) {
    if (row.pos[0] == 0 && row.length[0] < sizes.max_len) row.length[0] = row.length[1] = 0;
    append(row, sizes);
}

}  // namespace xq
