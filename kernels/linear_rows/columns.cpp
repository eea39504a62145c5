// A product of few rows with a matrix [in, out] (the CPU kernel of xquant::linear_rows where in_first).
//
//   out[m][n] = sum over k of x[m][k] * weight[k][n] + bias[n]     sums in float, rounded once
//
// Each thread takes a block of rows of weights and reads STREAMS of them at once, from as many parts of its block: a
// sum is read and written once per that many products, and processors fetch several long streams faster than one (30 of
// 42 GB/s, against 22 from rows that follow each other, on a Zen 5 core). Blocks of columns, whose sums no other thread
// has, are short pieces of memory, which took two threads up to 1.4 times as long.
#include "few_rows.h"

namespace xq {

constexpr int STREAMS = 8;

// Sums [ROWS][pitch] of all columns, over a thread's rows of weights. Those of a step are in the order of
// part_of_step or, with PAIRS, of add_pairs.
struct Sums {
    float* at;
    int64_t pitch, size;
};

// Rows k, k + apart, ... of x, as add_products multiplies them.
template <int N> struct Factors {
    float x[ROWS][N];
    Factors(const T* rows, int64_t in_size, int64_t k, int64_t apart) {
        for (int m = 0; m < ROWS; m++)
            for (int i = 0; i < N; i++) x[m][i] = to_float(rows[m * in_size + k + i * apart]);
    }
};

template <int N>
inline void add_products(float* sums, int64_t pitch, const T* const (&weights)[N], const Factors<N>& by) {
#pragma GCC unroll 2
    for (int part = 0; part < VECTORS; part++, sums += L) {
        vf w[N];
#pragma GCC unroll 8
        for (int i = 0; i < N; i++) w[i] = part_of_step(weights[i], part);
#pragma GCC unroll 8
        for (int m = 0; m < ROWS; m++) {
            vf sum = load<vf>(sums + m * pitch);
#pragma GCC unroll 8
            for (int i = 0; i < N; i++) sum = fma(w[i], splat(by.x[m][i]), sum);
            store(sums + m * pitch, sum);
        }
    }
}

#ifdef XQ_DOT_BFLOAT16
// The same for 2 L columns: the first L sums are those of the columns 0-3, 8-11, 16-19, 24-27.
template <int N> inline void add_pairs(float* sums, int64_t pitch, const T* const (&weights)[N], const Factors<N>& by) {
    constexpr int HALF = (N + 1) / 2;
    vi low[HALF], high[HALF];
#pragma GCC unroll 4
    for (int i = 0; i < HALF; i++) {
        const __m512i a = load<__m512i>(weights[2 * i]);
        const __m512i b = 2 * i + 1 < N ? load<__m512i>(weights[(2 * i + 1) % N]) : _mm512_setzero_si512();
        low[i] = (vi)_mm512_unpacklo_epi16(a, b), high[i] = (vi)_mm512_unpackhi_epi16(a, b);
    }
#pragma GCC unroll 8
    for (int m = 0; m < ROWS; m++) {
        vf first = load<vf>(sums + m * pitch), second = load<vf>(sums + m * pitch + L);
#pragma GCC unroll 4
        for (int i = 0; i < HALF; i++) {
            const uint32_t next = 2 * i + 1 < N ? as_bits(by.x[m][(2 * i + 1) % N]) & 0xffff0000u : 0;
            const vi x = splat((int32_t)(as_bits(by.x[m][2 * i]) >> 16 | next));
            first = dot_bfloat16(first, low[i], x);
            second = dot_bfloat16(second, high[i], x);
        }
        store(sums + m * pitch, first), store(sums + m * pitch + L, second);
    }
}
#endif

template <int N> inline void add_step(float* sums, int64_t pitch, const T* const (&weights)[N], const Factors<N>& by) {
#ifdef XQ_DOT_BFLOAT16
    if constexpr (PAIRS) return add_pairs<N>(sums, pitch, weights, by);
    else
#endif
        add_products<N>(sums, pitch, weights, by);
}

// Add N rows of weights, `apart` rows from each other, to all columns' sums.
template <int N> inline void add_rows(const Sums& to, const T* weight, int64_t apart, const Factors<N>& by) {
    const T* at[N];
    for (int i = 0; i < N; i++) at[i] = weight + i * apart * to.size;
    int64_t n = 0;
    for (; n + STEP <= to.size; n += STEP) {
        add_step<N>(to.at + n, to.pitch, at, by);
        for (int i = 0; i < N; i++) at[i] += STEP;
    }
    if (n < to.size) {
        T rest[N][STEP] = {};
        for (int i = 0; i < N; i++) {
            std::memcpy((void*)rest[i], (const void*)at[i], (to.size - n) * sizeof(T));
            at[i] = rest[i];
        }
        add_step<N>(to.at + n, to.pitch, at, by);
    }
}

inline void add_block(const Sums& to, const T* x, const T* weight, int64_t in_size, int64_t begin, int64_t end) {
    std::memset(to.at, 0, ROWS * to.pitch * sizeof(float));
    const int64_t part = (end - begin) / STREAMS;
    for (int64_t k = begin; k < begin + part; k++)
        add_rows<STREAMS>(to, weight + k * to.size, part, Factors<STREAMS>(x, in_size, k, part));
    for (int64_t k = begin + part * STREAMS; k < end; k++)
        add_rows<1>(to, weight + k * to.size, 0, Factors<1>(x, in_size, k, 0));
}

// Where the sum of column n of a step is.
constexpr int64_t place(int64_t n) {
    if (PAIRS) return (n & 4) * 4 + (n & 24) / 2 + (n & 3);
    return n % VECTORS * L + n / VECTORS;
}

// Columns n to n + STEP of row m: `blocks` threads' sums, and the bias.
inline void finish(const Sums& from, int64_t blocks, int64_t m, int64_t n, const T* bias, T* out) {
    float sums[STEP] = {};
    for (int64_t block = 0; block < blocks; block++)
        for (int64_t i = 0; i < STEP; i++) sums[i] += from.at[(block * ROWS + m) * from.pitch + n + i];
    T rounded[STEP];
    const int64_t count = n + STEP <= from.size ? STEP : from.size - n;
    for (int64_t i = 0; i < STEP; i++)
        rounded[i] = from_float<T>(sums[place(i)] + (bias && i < count ? to_float(bias[n + i]) : 0.0f));
    std::memcpy((void*)(out + m * from.size + n), (const void*)rounded, count * sizeof(T));
}

void product(const T* x, const T* weight, const T* bias, T* out, int64_t in_size, int64_t size) {
    const int num_threads = threads_for(in_size, size);
    const int64_t steps = (size + STEP - 1) / STEP, pitch = steps * STEP;
    AlignedFloats buffer(num_threads * ROWS * pitch);
#pragma omp parallel for schedule(static) num_threads(num_threads) if (num_threads > 1)
    for (int p = 0; p < num_threads; p++) {
        const Sums sums{buffer.data + p * ROWS * pitch, pitch, size};
        add_block(sums, x, weight, in_size, in_size * p / num_threads, in_size * (p + 1) / num_threads);
    }
    const Sums sums{buffer.data, pitch, size};
#pragma omp parallel for schedule(static) num_threads(num_threads) if (num_threads > 4)
    for (int64_t step = 0; step < steps; step++)
        for (int64_t m = 0; m < ROWS; m++) finish(sums, num_threads, m, step * STEP, bias, out);
}

}  // namespace xq
