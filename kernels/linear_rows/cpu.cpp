// Linear layers of few rows that take the same input (the CPU kernel of xquant::linear_rows).
//
//   out[m][n] = sum over k of x[m][k] * weight[n][k] + bias[n]     sums in float, rounded once
//
// Its time is that of reading the weights once, so all rows of x share what is read, one thread team works on all
// layers, and each thread reads two long streams: from the start and from the middle of its part of the weights.
// Processors fetch such streams by themselves and faster than when told to (42 of 42 GB/s against 32 on a Zen 5 core).
#include "few_rows.h"

namespace xq {

// What x is held as, with zeros up to a whole number of steps: PAIRS multiplies bfloat16 numbers, two to a lane.
typedef std::conditional_t<PAIRS, T, float> X;
constexpr int STREAMS = ROWS <= REGISTERS / 4 ? 2 : 1;  // the sums fit into registers

// One layer: weight [size, in], bias [size] or null.
struct Layer {
    const T *weight, *bias;
    int64_t size;
};

// One output of each row of x: its weights, where the first row's goes, and how far apart those of two rows are.
struct Output {
    const T *weight, *bias;
    T* out;
    int64_t pitch;
};

// Output n of all layers, one after the other.
inline Output output(const Layer (&layers)[LAYERS], T* out, int64_t in_size, int64_t n) {
    int i = 0;
    for (; n >= layers[i].size; i++) {
        n -= layers[i].size;
        out += ROWS * layers[i].size;
    }
    return {layers[i].weight + n * in_size, layers[i].bias ? layers[i].bias + n : nullptr, out + n, layers[i].size};
}

inline vf add_products(vf sum, const T* weight, const X* x) {
#ifdef XQ_DOT_BFLOAT16
    if constexpr (PAIRS) return dot_bfloat16(sum, load<vi>(weight), load<vi>(x));
    else
#endif
        return fma(load_floats(weight), load_floats(x), sum);
}

template <int N> inline void outputs(const Output (&at)[N], const X* x, int64_t pitch, int64_t in_size) {
    vf sums[N][ROWS] = {};
    int64_t k = 0;
    for (; k + STEP <= in_size; k += STEP) {
#pragma GCC unroll 2
        for (int i = 0; i < N; i++)
#pragma GCC unroll 8
            for (int m = 0; m < ROWS; m++) sums[i][m] = add_products(sums[i][m], at[i].weight + k, x + m * pitch + k);
    }
    if (k < in_size)
        for (int i = 0; i < N; i++) {
            T rest[STEP] = {};
            std::memcpy((void*)rest, (const void*)(at[i].weight + k), (in_size - k) * sizeof(T));
            for (int m = 0; m < ROWS; m++) sums[i][m] = add_products(sums[i][m], rest, x + m * pitch + k);
        }
    for (int i = 0; i < N; i++) {
        const float bias = at[i].bias ? to_float(*at[i].bias) : 0.0f;
        for (int m = 0; m < ROWS; m++) at[i].out[m * at[i].pitch] = from_float<T>(sum(sums[i][m]) + bias);
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

void linear(const T* rows, const Layer (&layers)[LAYERS], T* out, int64_t in_size) {
    const int64_t pitch = (in_size + STEP - 1) / STEP * STEP;
    AlignedFloats buffer(ROWS * pitch);
    X* x = (X*)buffer.data;
    load_rows(rows, x, pitch, in_size);
    int64_t size = 0;
    for (const Layer& layer : layers) size += layer.size;
    const int num_threads = threads_for(in_size, size);
    const auto at = [&](int64_t n) { return output(layers, out, in_size, n); };
#pragma omp parallel for schedule(static) num_threads(num_threads) if (num_threads > 1)
    for (int part = 0; part < num_threads; part++) {
        const int64_t begin = size * part / num_threads, end = size * (part + 1) / num_threads;
        const int64_t half = STREAMS == 2 ? (end - begin) / 2 : 0;
        for (int64_t n = begin; n < begin + half; n++) outputs<2>({at(n), at(n + half)}, x, pitch, in_size);
        for (int64_t n = begin + 2 * half; n < end; n++) outputs<1>({at(n)}, x, pitch, in_size);
    }
}

}  // namespace xq
