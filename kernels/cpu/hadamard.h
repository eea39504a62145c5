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
    for (int i = 0; i < L; i++) sum[i % SUMS] = fma(splat(y[i]), load<vf>(HADAMARD_OF_LANES.row[i]), sum[i % SUMS]);
    store(y, (sum[0] + sum[1]) + (sum[2] + sum[3]));
}

template <int64_t DIM, int64_t SIZE> inline void hadamard(float* y) {
    constexpr int64_t DONE = SIZE % L == 0 ? L : 1;
    typedef std::conditional_t<DONE == L, vf, float> Lanes;
    if constexpr (DONE == L)
        for (int64_t d = 0; d < DIM; d += L) hadamard_of_lanes(y + d);
    for (int64_t half = DONE; half < SIZE; half *= 2)
        for (int64_t i = 0; i < DIM; i += 2 * half)
            for (int64_t j = i; j < i + half; j += DONE) {
                const Lanes a = load<Lanes>(y + j), b = load<Lanes>(y + j + half);
                store(y + j, a + b);
                store(y + j + half, a - b);
            }
}

}  // namespace xq
