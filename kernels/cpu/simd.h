// Vectors for the CPU kernels: what is the same on all processors. What is not is in one header per ISA.
//
// To add an ISA: copy simd_portable.h, which says what such a header defines; give it a branch below and a row in
// isa.py.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <type_traits>
#ifdef _OPENMP
#include <omp.h>
#endif
#if defined(XQ_ISA_AVX512)
#include "simd_avx512.h"
#elif defined(XQ_ISA_AVX2)
#include "simd_avx2.h"
#elif defined(XQ_ISA_NEON)
#include "simd_neon.h"
#else
#include "simd_portable.h"
#endif

namespace xq {

inline int32_t load_word(const int8_t* p) { return load<int32_t>(p); }
inline float as_float(uint32_t u) {
    float f;
    std::memcpy(&f, &u, 4);
    return f;
}
inline uint32_t as_bits(float f) {
    uint32_t u;
    std::memcpy(&u, &f, 4);
    return u;
}

// Sums of codes (unsigned bytes of BITS bits) times digits (signed bytes), the four bytes of a lane together:
// `add` may be called until the largest codes of one byte add up to ROOM, `total` gives the sum per lane.
#ifdef XQ_DOT_BYTES
template <int BITS> struct Dot {
    static constexpr int64_t ROOM = 1 << 30;
    typedef vi Sum;
    static vi add(vi sum, vi code, vi digit) { return dot_bytes<BITS>(sum, code, digit); }
    static vi total(vi sum) { return sum; }
};
#else
template <int BITS> struct Dot {  // in 16 bits for as long as nothing can overflow them
    static constexpr int64_t ROOM = 32767 / (2 * 128);
    typedef vs Sum;
    static vs add(vs sum, vi code, vi digit) {
        sum += multiply_add_pairs(code, digit);
#ifdef XQ_FINISH_NOW  // a call of a function would change GCC's order elsewhere
        XQ_FINISH_NOW(sum);
#endif
        return sum;
    }
    static vi total(vs sum) { return add_pairs(sum); }
};
template <> struct Dot<8> {  // a nibble at a time
    static constexpr int64_t ROOM = 1 << 30;
    typedef vi Sum;
    static vi add(vi sum, vi code, vi digit) {
        const vi low = splat(0x0f0f0f0f);
        const vi high = add_pairs(multiply_add_pairs((code >> 4) & low, digit));
        return sum + (high << 4) + add_pairs(multiply_add_pairs(code & low, digit));
    }
    static vi total(vi sum) { return sum; }
};
#endif

// Whether digits stand in memory as `add` takes them, in every lane: an instruction that reads them costs nothing then.
#ifdef XQ_SPREAD_DIGITS
constexpr bool SPREAD_DIGITS = true;
#else
constexpr bool SPREAD_DIGITS = false;
#endif

// What `f` makes of vectors, `across` of the lanes of one, of each of N vectors.
template <int N, class F, class Across>
ALWAYS_INLINE void each_across(const vf (&x)[N], float* out, [[maybe_unused]] F f, Across across) {
#ifdef XQ_FOUR_ACROSS
    if constexpr (N > 1) {
#pragma GCC unroll 4
        for (int i = 0; i < N; i += 4) {
            const vf all =
                four_across(f, x[i], x[std::min(i + 1, N - 1)], x[std::min(i + 2, N - 1)], x[std::min(i + 3, N - 1)]);
            std::memcpy(out + i, &all, std::min(4, N - i) * sizeof(float));
        }
        return;
    }
#endif
    for (int i = 0; i < N; i++) out[i] = across(x[i]);
}
template <int N> ALWAYS_INLINE void sums(const vf (&x)[N], float* out) {
    each_across(x, out, [](vf a, vf b) { return a + b; }, [](vf a) { return sum(a); });
}
template <int N> ALWAYS_INLINE void maxima(const vf (&x)[N], float* out) {
    each_across(x, out, [](vf a, vf b) { return max(a, b); }, [](vf a) { return max(a); });
}

inline vf abs(vf x) { return (vf)((vu)x & 0x7fffffffu); }

// The vector 0, 1, 2 ...
inline vi iota() {
    vi lane;
    for (int i = 0; i < L; i++) lane[i] = i;
    return lane;
}

inline vf exp_of_remainder(vf y, vf k) {
    vf r = fma(k, splat(-0.693359375f), y);
    r = fma(k, splat(2.12194440e-4f), r);
    vf p = splat(1.9875691500e-4f);
    p = fma(p, r, splat(1.3981999507e-3f));
    p = fma(p, r, splat(8.3334519073e-3f));
    p = fma(p, r, splat(4.1665795894e-2f));
    p = fma(p, r, splat(1.6666665459e-1f));
    p = fma(p, r, splat(5.0000001201e-1f));
    return fma(p, r * r, r + 1.0f);
}

inline vf exp(vf x) {
    const vf lowest = splat(-87.0f);
    const vf below = x > 88.0f ? splat(88.0f) : x;
    const vf y = below < lowest ? lowest : below;
    const vi n = round_to_int(y * LOG2_OF_E);
    const vf scaled = exp_of_remainder(y, __builtin_convertvector(n, vf)) * (vf)((n + 127) << 23);
    return x < lowest ? splat(0.0f) : scaled;
}

inline vf exp2_of_remainder(vf r) {
    vf p = splat(9.5701e-3f);
    p = fma(p, r, splat(5.591786e-2f));
    p = fma(p, r, splat(2.4024745e-1f));
    p = fma(p, r, splat(6.9312181e-1f));
    return fma(p, r, splat(9.9999926e-1f));
}

inline float to_float(float x) { return x; }
inline float to_float(bfloat16 x) { return as_float((uint32_t)x.bits << 16); }
inline float to_float(float16 x) {
    const uint32_t sign = (x.bits & 0x8000u) << 16, e = (x.bits >> 10) & 31, m = x.bits & 1023;
    if (e == 31) return as_float(sign | 0x7f800000u | (m << 13));
    if (e == 0) return as_float(sign | as_bits((float)m * 5.9604644775390625e-8f));
    return as_float(sign | ((e + 112) << 23) | (m << 13));
}
inline vf load_floats(const float* p) { return load<vf>(p); }
inline vf load_floats(const bfloat16* p) { return (vf)(widen(load<vh>(p)) << 16); }
// The first n < L numbers at p, zeros behind.
template <class T> inline vf load_first(const T* p, int64_t n) {
    T part[L] = {};
    std::memcpy((void*)part, (const void*)p, n * sizeof(T));
    return load_floats(part);
}
template <class T> inline vf load_up_to(const T* p, int64_t n) { return n >= L ? load_floats(p) : load_first(p, n); }

// x in the first n lanes, zeros behind.
inline vf mask_first(vf x, int64_t n) { return n >= L ? x : iota() < (int32_t)n ? x : splat(0.0f); }

inline vub load_bytes(const uint8_t* p, int64_t n) {
    if (n >= L) return load<vub>(p);
    vub part = {};
    std::memcpy(&part, p, n);
    return part;
}
template <class T, class V> inline void store_up_to(T* p, V v, int64_t n) {  // the first n lanes
    if (n >= L) store(p, v);
    else std::memcpy(p, &v, n * sizeof(T));
}

template <class T> T from_float(float x);
template <> inline float from_float<float>(float x) { return x; }
template <> inline bfloat16 from_float<bfloat16>(float x) {
    const uint32_t u = as_bits(x);
    if (x != x) return {0x7fc0};
    return {(uint16_t)((u + 0x7fffu + ((u >> 16) & 1)) >> 16)};
}
template <> inline float16 from_float<float16>(float x) {  // nearest even
    const uint32_t u = as_bits(x), sign = (u >> 16) & 0x8000u, a = u & 0x7fffffffu;
    if (a > 0x7f800000u) return {(uint16_t)(sign | 0x7e00u)};
    if (a >= 0x477ff000u) return {(uint16_t)(sign | 0x7c00u)};
    if (a < 0x38800000u) {  // subnormal: let the addition round
        const uint32_t r = as_bits(as_float(a) + 0.5f) - 0x3f000000u;
        return {(uint16_t)(sign | r)};
    }
    return {(uint16_t)(sign | ((a - 0x38000000u + 0xfffu + ((a >> 13) & 1)) >> 13))};
}

inline int max_threads() {
#ifdef _OPENMP
    return omp_in_parallel() ? 1 : omp_get_max_threads();
#else
    return 1;
#endif
}

// Uninitialised floats, aligned to a cache line.
struct AlignedFloats {
    std::unique_ptr<char[]> raw;
    float* data;
    explicit AlignedFloats(int64_t floats) : raw(new char[floats * 4 + 64]) {
        data = (float*)(((uintptr_t)raw.get() + 63) & ~(uintptr_t)63);
    }
};

// Of L pairs of bfloat16 numbers the first ones, and the second ones.
inline vf first_of_pairs(vi pairs) { return (vf)(pairs << 16); }
inline vf second_of_pairs(vi pairs) { return (vf)(pairs & (int32_t)0xffff0000); }

}  // namespace xq
