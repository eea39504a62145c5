// The AVX-512 intrinsics that the CPU kernels use, in plain C++: their 16-lane code then runs on any processor.
// Stands in for <immintrin.h> (tests/test_cpu_attention.py). Named apart, as torch's headers bring the real ones.
#include <cmath>
#include <cstdint>
#pragma GCC optimize("O1")  // optimizing these loops takes longer than running them
namespace emulated {
typedef float f16 __attribute__((vector_size(64)));
typedef long long i8 __attribute__((vector_size(64)));
typedef int32_t i16 __attribute__((vector_size(64)));
typedef int16_t i32 __attribute__((vector_size(64)));
typedef int8_t s64 __attribute__((vector_size(64)));
typedef uint8_t u64 __attribute__((vector_size(64)));
typedef long long half __attribute__((vector_size(32)));
typedef uint16_t u16 __attribute__((vector_size(32)));
typedef long long quarter __attribute__((vector_size(16)));
typedef int8_t s16 __attribute__((vector_size(16)));
typedef uint8_t b16 __attribute__((vector_size(16)));

inline int16_t saturated(int x) { return x > 32767 ? 32767 : x < -32768 ? -32768 : (int16_t)x; }
inline i8 dpbusd(i8 sum, i8 a, i8 b) {
    i16 out = (i16)sum;
    for (int i = 0; i < 64; i++) out[i / 4] += (int)((u64)a)[i] * (int)((s64)b)[i];
    return (i8)out;
}
inline i8 maddubs(i8 a, i8 b) {
    i32 out;
    for (int i = 0; i < 32; i++)
        out[i] = saturated(((u64)a)[2 * i] * ((s64)b)[2 * i] + ((u64)a)[2 * i + 1] * ((s64)b)[2 * i + 1]);
    return (i8)out;
}
// In each quarter first a's numbers, then b's.
inline i8 packed_ints(i8 a, i8 b) {
    i32 out;
    for (int i = 0; i < 32; i++) out[i] = saturated(((i16)(i / 4 % 2 ? b : a))[i / 8 * 4 + i % 4]);
    return (i8)out;
}
inline i8 packed_shorts(i8 a, i8 b) {
    s64 out;
    for (int i = 0; i < 64; i++) {
        const int x = ((i32)(i / 8 % 2 ? b : a))[i / 16 * 8 + i % 8];
        out[i] = (int8_t)(x > 127 ? 127 : x < -128 ? -128 : x);
    }
    return (i8)out;
}
inline i8 permuted(i8 order, i8 x) {
    i16 out;
    for (int i = 0; i < 16; i++) out[i] = ((i16)x)[((i16)order)[i] & 15];
    return (i8)out;
}
// Lanes of a and, from 16 on, of b.
inline f16 permuted_of_both(f16 a, i8 order, f16 b) {
    f16 out;
    for (int i = 0; i < 16; i++) out[i] = (((i16)order)[i] & 16 ? b : a)[((i16)order)[i] & 15];
    return out;
}
// In each quarter the lower, or the upper, two lanes of a between those of b.
inline f16 interleaved(f16 a, f16 b, int upper) {
    f16 out;
    for (int i = 0; i < 16; i++) out[i] = (i % 2 ? b : a)[i / 4 * 4 + i % 4 / 2 + 2 * upper];
    return out;
}
inline f16 interleaved_low(f16 a, f16 b) { return interleaved(a, b, 0); }
inline f16 interleaved_high(f16 a, f16 b) { return interleaved(a, b, 1); }
// Two quarters of a, then two of b.
inline f16 quarters(f16 a, f16 b, int which) {
    f16 out;
    for (int i = 0; i < 16; i++) out[i] = (i < 8 ? a : b)[(which >> i / 4 * 2 & 3) * 4 + i % 4];
    return out;
}
inline i8 madd(i8 a, i8 b) {
    i16 out;
    for (int i = 0; i < 16; i++) out[i] = ((i32)a)[2 * i] * ((i32)b)[2 * i] + ((i32)a)[2 * i + 1] * ((i32)b)[2 * i + 1];
    return (i8)out;
}
inline i8 all(short x) { return (i8)(i32{} + x); }
inline f16 dpbf16(f16 sum, i32 a, i32 b) {
    const auto wide = [](int16_t x) {
        const uint32_t bits = (uint32_t)(uint16_t)x << 16;
        float y;
        __builtin_memcpy(&y, &bits, 4);
        return y;
    };
    for (int i = 0; i < 32; i++) sum[i / 2] += wide(a[i]) * wide(b[i]);
    return sum;
}
inline i32 to_bfloat16(f16 high, f16 low) {  // to the nearest, even ones of two
    i32 out;
    for (int i = 0; i < 32; i++) {
        uint32_t bits;
        const float x = i < 16 ? low[i] : high[i - 16];
        __builtin_memcpy(&bits, &x, 4);
        out[i] = (int16_t)((x != x ? 0x7fc00000u : bits + 0x7fffu + (bits >> 16 & 1)) >> 16);
    }
    return out;
}
inline f16 fmadd(f16 a, f16 b, f16 c) {
    for (int i = 0; i < 16; i++) a[i] = std::fma(a[i], b[i], c[i]);
    return a;
}
inline f16 larger(f16 a, f16 b) { return a > b ? a : b; }  // b where either is NaN
inline float total(f16 x) {
    for (int n = 8; n; n /= 2)
        for (int i = 0; i < n; i++) x[i] += x[i + n];
    return x[0];
}
inline float largest(f16 x) {
    for (int n = 8; n; n /= 2)
        for (int i = 0; i < n; i++) x[i] = x[i] > x[i + n] ? x[i] : x[i + n];
    return x[0];
}
inline unsigned both(i8 a, i8 b) {
    unsigned out = 0;
    for (int i = 0; i < 16; i++) out |= (unsigned)((((i16)a)[i] & ((i16)b)[i]) != 0) << i;
    return out;
}
inline i8 rounded(f16 x) {
    i16 out;
    for (int i = 0; i < 16; i++) out[i] = x[i] == x[i] ? (int32_t)std::nearbyint(x[i]) : INT32_MIN;
    return (i8)out;
}
inline f16 round_to(f16 x, int) {
    for (int i = 0; i < 16; i++) x[i] = std::nearbyint(x[i]);
    return x;
}
inline f16 times_power(f16 x, f16 n) {
    for (int i = 0; i < 16; i++) x[i] = n[i] == n[i] ? std::ldexp(x[i], (int)std::floor(n[i])) : n[i];
    return x;
}
inline i8 widened(quarter x) {
    i16 out;
    for (int i = 0; i < 16; i++) out[i] = ((b16)x)[i];
    return (i8)out;
}
inline i8 widened_shorts(half x) {
    i16 out;
    for (int i = 0; i < 16; i++) out[i] = ((u16)x)[i];
    return (i8)out;
}
inline quarter narrowed(i8 x) {
    s16 out;
    for (int i = 0; i < 16; i++) out[i] = (int8_t)((i16)x)[i];
    return (quarter)out;
}
inline f16 from_half(half x) {
    f16 out;
    for (int i = 0; i < 16; i++) {
        const unsigned bits = ((u16)x)[i], e = bits >> 10 & 31, m = bits & 1023;
        const double size = e == 31 ? (m ? NAN : INFINITY)
                            : e     ? std::ldexp(1024.0 + m, (int)e - 25)
                                    : std::ldexp(m, -24);
        out[i] = bits & 0x8000 ? -(float)size : (float)size;
    }
    return out;
}
}  // namespace emulated
#define __m128i emulated::quarter
#define __m256i emulated::half
#define __m512 emulated::f16
#define __m512bh emulated::i32
#define __m512i emulated::i8
#define _mm512_cvtepi32_epi8 emulated::narrowed
#define _mm512_cvtepu16_epi32 emulated::widened_shorts
#define _mm512_cvtepu8_epi32 emulated::widened
#define _mm512_cvtne2ps_pbh emulated::to_bfloat16
#define _mm512_cvtph_ps emulated::from_half
#define _mm512_cvtps_epi32 emulated::rounded
#define _mm512_dpbf16_ps emulated::dpbf16
#define _mm512_dpbusd_epi32 emulated::dpbusd
#define _mm512_fmadd_ps emulated::fmadd
#define _mm512_madd_epi16 emulated::madd
#define _mm512_maddubs_epi16 emulated::maddubs
#define _mm512_max_ps emulated::larger
#define _mm512_packs_epi16 emulated::packed_shorts
#define _mm512_packs_epi32 emulated::packed_ints
#define _mm512_permutex2var_ps emulated::permuted_of_both
#define _mm512_permutexvar_epi32 emulated::permuted
#define _mm512_reduce_add_ps emulated::total
#define _mm512_reduce_max_ps emulated::largest
#define _mm512_roundscale_ps emulated::round_to
#define _mm512_scalef_ps emulated::times_power
#define _mm512_set1_epi16 emulated::all
#define _mm512_shuffle_f32x4 emulated::quarters
#define _mm512_test_epi32_mask emulated::both
#define _mm512_unpackhi_ps emulated::interleaved_high
#define _mm512_unpacklo_ps emulated::interleaved_low
#ifndef _MM_FROUND_TO_NEAREST_INT
#define _MM_FROUND_TO_NEAREST_INT 0
#define _MM_FROUND_NO_EXC 8
#endif
