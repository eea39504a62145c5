// What both kernels of few rows have in common: how wide a step is, and how many threads are worth it.
#pragma once
#ifndef XQ_LANES  // an editor, which sees no constants
#include "example_problem.h"
#endif

namespace xq {

#ifdef XQ_DOT_BFLOAT16
constexpr bool PAIRS = std::is_same_v<T, bfloat16>;  // multiply two numbers to a lane
#else
constexpr bool PAIRS = false;
#endif
constexpr int64_t STEP = std::is_same_v<T, bfloat16> ? 2 * L : L;  // numbers at once
constexpr int VECTORS = STEP / L;                                   // that these are as floats

// Vector i of the step at p as floats: of bfloat16 numbers the even ones or the odd ones, which need no unpacking.
inline vf part_of_step(const T* p, [[maybe_unused]] int i) {
    if constexpr (VECTORS == 1) return load_floats(p);
    else return i == 0 ? first_of_pairs(load<vi>(p)) : second_of_pairs(load<vi>(p));
}

constexpr int64_t FEW_BYTES = 1 << 16;  // of weights: a second thread starts later than the first is through
inline int threads_for(int64_t in_size, int64_t size) {
    return in_size * size * (int64_t)sizeof(T) < FEW_BYTES ? 1 : max_threads();
}

}  // namespace xq
