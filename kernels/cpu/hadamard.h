// The transform of kernels/rotation.py without signs and scale: y [DIM] in pieces of SIZE, a power of two.
#pragma once

namespace xq {

// The transform of L channels as a matrix: negative where i & j has an odd bit count.
struct HadamardOfLanes {
    alignas(64) float row[L][L];
    constexpr HadamardOfLanes() : row() {
        for (int i = 0; i < L; i++)
            for (int j = 0; j < L; j++) row[i][j] = __builtin_parity(i & j) ? -1.0f : 1.0f;
    }
};
constexpr HadamardOfLanes HADAMARD_OF_LANES;

// One vector of channels: as a product with the matrix, for which lanes need not change places.
inline void hadamard_of_lanes(float* y) {
    constexpr int SUMS = 4;  // each sum waits for the one before it in its chain
    vf sum[SUMS] = {};
#pragma GCC unroll 16
    for (int i = 0; i < L; i++) sum[i % SUMS] = fma(y[i] - vf{}, load<vf>(HADAMARD_OF_LANES.row[i]), sum[i % SUMS]);
    store(y, (sum[0] + sum[1]) + (sum[2] + sum[3]));
}

// a and b of N channels become a + b and a - b. Compilers do not make vectors of loops here: Inductor asks them not to.
template <int64_t N> ALWAYS_INLINE void add_and_subtract(float* a, float* b) {
    if constexpr (N == L) {
        const vf x = load<vf>(a), y = load<vf>(b);
        store(a, x + y);
        store(b, x - y);
    } else {
        const float x = *a, y = *b;
        *a = x + y;
        *b = x - y;
    }
}

template <int64_t DIM, int64_t SIZE> inline void hadamard(float* y) {
    constexpr int64_t DONE = SIZE % L == 0 ? L : 1;
    if constexpr (DONE == L)
        for (int64_t d = 0; d < DIM; d += L) hadamard_of_lanes(y + d);
    for (int64_t half = DONE; half < SIZE; half *= 2)
        for (int64_t i = 0; i < DIM; i += 2 * half)
            for (int64_t j = i; j < i + half; j += DONE) add_and_subtract<DONE>(y + j, y + j + half);
}

}  // namespace xq
