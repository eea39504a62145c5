// The transform of kernels/rotation.py without signs and scale: y [DIM] in pieces of SIZE, a power of two.
#pragma once
#include <cstdint>

namespace xq {

template <int64_t DIM, int64_t SIZE> inline void hadamard(float* y) {
    for (int64_t half = 1; half < SIZE; half *= 2)
        for (int64_t i = 0; i < DIM; i += 2 * half)
            for (int64_t j = i; j < i + half; j++) {
                const float a = y[j], b = y[j + half];
                y[j] = a + b;
                y[j + half] = a - b;
            }
}

}  // namespace xq
