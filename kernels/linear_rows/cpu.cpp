// A linear layer of few rows (the CPU kernel of xquant::linear_rows).
//
//   out[m][n] = sum over k of x[m][k] * weight[n][k] + bias[n]     sums in float, rounded once
//
// Its time is that of reading the weights once, so all rows of x share what is read, and a few neighbouring rows of
// the weights are read at a time, whose sums wait for each other less.
#ifndef XQ_LANES  // an editor, which sees no constants
#include "example_problem.h"
#endif

namespace xq {

#if defined(XQ_ISA_AVX512) && defined(__AVX512BF16__)
constexpr bool PAIRS = std::is_same_v<T, bfloat16>;
#else
constexpr bool PAIRS = false;
#endif

// What x is held as, with zeros up to a whole number of steps: PAIRS multiplies bfloat16 numbers, two to a lane.
typedef std::conditional_t<PAIRS, T, float> X;
constexpr int64_t STEP = PAIRS ? 2 * L : L;
// Rows of the weights at a time: the sums of all products fill the registers.
constexpr int AT_ONCE = ROWS <= 2 ? 4 : ROWS <= REGISTERS / 8 ? 2 + 2 * (REGISTERS == 32) : REGISTERS == 32 ? 2 : 1;
constexpr int64_t FEW_BYTES = 1 << 16;  // of weights: a second thread starts later than the first is through

inline vf add_products(vf sum, const T* weight, const X* x) {
#if defined(XQ_ISA_AVX512) && defined(__AVX512BF16__)
    if constexpr (PAIRS) return (vf)_mm512_dpbf16_ps((__m512)sum, load<__m512bh>(weight), load<__m512bh>(x));
    else
#endif
        return fma(load_floats(weight), load_floats(x), sum);
}

// Outputs of N rows of the weights from `weight` on, in columns `n` and up of `out`.
template <int N>
inline void outputs(const Tensors& tensors, const X* x, int64_t pitch, T* out, int64_t n, int64_t in_size,
                    int64_t out_size) {
    const T* weight = tensors.weight + n * in_size;
    vf sums[N][ROWS] = {};
    int64_t k = 0;
    for (; k + STEP <= in_size; k += STEP) {
#pragma GCC unroll 4
        for (int i = 0; i < N; i++) {
            __builtin_prefetch(weight + (N + i) * in_size + k);  // rows are short: each new one is a surprise
#pragma GCC unroll 8
            for (int m = 0; m < ROWS; m++)
                sums[i][m] = add_products(sums[i][m], weight + i * in_size + k, x + m * pitch + k);
        }
    }
    if (k < in_size)
        for (int i = 0; i < N; i++) {
            T rest[STEP] = {};
            std::memcpy((void*)rest, (const void*)(weight + i * in_size + k), (in_size - k) * sizeof(T));
            for (int m = 0; m < ROWS; m++) sums[i][m] = add_products(sums[i][m], rest, x + m * pitch + k);
        }
    for (int i = 0; i < N; i++)
        for (int m = 0; m < ROWS; m++) {
            const float bias = HAS_BIAS ? to_float(tensors.bias[n + i]) : 0.0f;
            out[m * out_size + n + i] = from_float<T>(sum(sums[i][m]) + bias);
        }
}

inline void load_rows(const T* rows, X* x, int64_t pitch, int64_t in_size) {
    for (int64_t m = 0; m < ROWS; m++, rows += in_size, x += pitch) {
        if constexpr (std::is_same_v<X, T>) std::memcpy((void*)x, (const void*)rows, in_size * sizeof(T));
        else
            for (int64_t k = 0; k < in_size; k += L) store_up_to(x + k, load_up_to(rows + k, in_size - k), in_size - k);
        std::memset((void*)(x + in_size), 0, (pitch - in_size) * sizeof(X));
    }
}

void linear(const Tensors& tensors, T* out, int64_t in_size, int64_t out_size) {
    const int64_t pitch = (in_size + STEP - 1) / STEP * STEP;
    AlignedFloats buffer(ROWS * pitch);
    X* x = (X*)buffer.data;
    load_rows(tensors.x, x, pitch, in_size);
    const int64_t whole = out_size / AT_ONCE, left = out_size % AT_ONCE;
    [[maybe_unused]] const int num_threads = in_size * out_size * (int64_t)sizeof(T) < FEW_BYTES ? 1 : max_threads();
#pragma omp parallel for schedule(static) num_threads(num_threads) if (num_threads > 1)
    for (int64_t block = 0; block < whole + left; block++) {
        if (block < whole) outputs<AT_ONCE>(tensors, x, pitch, out, block * AT_ONCE, in_size, out_size);
        else outputs<1>(tensors, x, pitch, out, whole * AT_ONCE + block - whole, in_size, out_size);
    }
}

}  // namespace xq
