// Linear layers of few rows that take the same input (the CPU kernel of xquant::linear_rows).
//
//   out[m][n] = sum over k of x[m][k] * weight[n][k] + bias[n]     sums in float, rounded once
//
// Its time is that of reading the weights once, so all rows of x share what is read, one thread team works on all
// layers, and each thread reads a few long streams, each through a part of its own of the weights. Processors fetch
// such streams by themselves: two faster than when told to (42 of 42 GB/s against 32 on a Zen 5 core); on a Zen 3 core
// four are faster than two.
#include "few_rows.h"

namespace xq {

// What x is held as, with zeros up to a whole number of steps: PAIRS multiplies bfloat16 numbers, two to a lane.
typedef std::conditional_t<PAIRS, T, float> X;
// Rows that are multiplied at once, and streams: their sums fit into the registers.
constexpr int MANY = REGISTERS >= 32 || ROWS <= 6 ? ROWS : (ROWS + 1) / 2;
constexpr int STREAMS = REGISTERS >= 32 ? 2 : std::clamp(9 / MANY, 2, 4);

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

// Add a step of the weights of N outputs times that of M rows of x.
template <int N, int M> ALWAYS_INLINE void add_step(vf (&sums)[N][M], const T* const (&weights)[N], const X* x) {
#ifdef XQ_DOT_BFLOAT16
    if constexpr (PAIRS) {
#pragma GCC unroll 4
        for (int i = 0; i < N; i++)
#pragma GCC unroll 8
            for (int m = 0; m < M; m++)
                sums[i][m] = dot_bfloat16(sums[i][m], load<vi>(weights[i]), load<vi>(x + m * STEP));
        return;
    }
#endif
#pragma GCC unroll 2
    for (int part = 0; part < VECTORS; part++) {
        vf w[N];
#pragma GCC unroll 4
        for (int i = 0; i < N; i++) w[i] = part_of_step(weights[i], part);
#pragma GCC unroll 8
        for (int m = 0; m < M; m++) {
            vf row = load_floats((const float*)x + m * STEP + part * L);
#ifdef XQ_FINISH_NOW  // or GCC loads it once for each stream
            if constexpr (N > 1) XQ_FINISH_NOW(row);
#endif
#pragma GCC unroll 4
            for (int i = 0; i < N; i++) sums[i][m] = fma(w[i], row, sums[i][m]);
        }
    }
}

// Outputs of M rows of x, from row `first` on.
template <int N, int M> inline void outputs(const Output (&at)[N], int64_t first, const X* x, int64_t in_size) {
    vf sums[N][M] = {};
    const T* weights[N];
    for (int i = 0; i < N; i++) weights[i] = at[i].weight;
    int64_t k = 0;
    for (; k + STEP <= in_size; k += STEP, x += M * STEP) {
        add_step(sums, weights, x);
#pragma GCC unroll 4
        for (int i = 0; i < N; i++) weights[i] += STEP;
    }
    if (k < in_size) {
        T rest[N][STEP] = {};
        for (int i = 0; i < N; i++) {
            std::memcpy((void*)rest[i], (const void*)weights[i], (in_size - k) * sizeof(T));
            weights[i] = rest[i];
        }
        add_step(sums, weights, x);
    }
    for (int i = 0; i < N; i++) {
        const float bias = at[i].bias ? to_float(*at[i].bias) : 0.0f;
        for (int m = 0; m < M; m++) at[i].out[(first + m) * at[i].pitch] = from_float<T>(sum(sums[i][m]) + bias);
    }
}

// Of all rows; what the first ones read of the weights is in the nearest cache for the others.
template <int N> inline void all_outputs(const Output (&at)[N], const X* x, int64_t pitch, int64_t in_size) {
    outputs<N, MANY>(at, 0, x, in_size);
    if constexpr (ROWS > MANY) outputs<N, ROWS - MANY>(at, MANY, x + MANY * pitch, in_size);
}

// Rows as X, a step of `count` of them and then the next.
inline void load_rows(const T* rows, int64_t count, X* x, int64_t in_size) {
    for (int64_t k = 0; k < in_size; k += STEP)
        for (int64_t m = 0; m < count; m++, x += STEP) {
            T step[STEP] = {};
            std::memcpy((void*)step, (const void*)(rows + m * in_size + k), std::min(STEP, in_size - k) * sizeof(T));
            if constexpr (PAIRS) std::memcpy((void*)x, (const void*)step, sizeof(step));
            else
                for (int i = 0; i < VECTORS; i++) store(x + i * L, part_of_step(step, i));
        }
}

void linear(const T* rows, const Layer (&layers)[LAYERS], T* out, int64_t in_size) {
    const int64_t pitch = (in_size + STEP - 1) / STEP * STEP;
    AlignedFloats buffer(ROWS * pitch);
    X* x = (X*)buffer.data;
    load_rows(rows, MANY, x, in_size);
    load_rows(rows + MANY * in_size, ROWS - MANY, x + MANY * pitch, in_size);
    int64_t size = 0;
    for (const Layer& layer : layers) size += layer.size;
    const int num_threads = threads_for(in_size, size);
    const auto at = [&](int64_t n) { return output(layers, out, in_size, n); };
#pragma omp parallel for schedule(static) num_threads(num_threads) if (num_threads > 1)
    for (int part = 0; part < num_threads; part++) {
        const int64_t begin = size * part / num_threads, end = size * (part + 1) / num_threads;
        const int64_t apart = (end - begin) / STREAMS;
        for (int64_t n = begin; n < begin + apart; n++) {
            Output streams[STREAMS];
            for (int i = 0; i < STREAMS; i++) streams[i] = at(n + i * apart);
            all_outputs(streams, x, pitch, in_size);
        }
        for (int64_t n = begin + STREAMS * apart; n < end; n++) {
            const Output last[] = {at(n)};
            all_outputs(last, x, pitch, in_size);
        }
    }
}

}  // namespace xq
