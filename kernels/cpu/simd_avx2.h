// AVX2: vectors of 8 lanes; FMA, F16C, and VNNI on 256 bits where the processor has them.
//
// To add an ISA: copy simd_portable.h, which says what each name means.
#pragma once
#include <immintrin.h>
#define XQ_LANES 8
#include "vectors.h"

namespace xq {

constexpr int REGISTERS = 16;

#if defined(__AVX512VNNI__) && defined(__AVX512VL__)
#define XQ_DOT_BYTES
template <int BITS> inline vi dot_bytes(vi sum, vi code, vi digit) {
    return (vi)_mm256_dpbusd_epi32((__m256i)sum, (__m256i)code, (__m256i)digit);
}
#else
inline vs multiply_add_pairs(vi code, vi digit) { return (vs)_mm256_maddubs_epi16((__m256i)code, (__m256i)digit); }
#define XQ_SPREAD_DIGITS
// Or GCC makes all products of a word first, or reads the word once more for each, and runs out of registers.
#define XQ_FINISH_NOW(x) asm("" : "+x"(x))
inline vi add_pairs(vs x, int16_t weight = 1) { return (vi)_mm256_madd_epi16((__m256i)x, _mm256_set1_epi16(weight)); }
#endif

inline vf fma(vf a, vf b, vf c) {  // Inductor compiles with -ffp-contract=off
#ifdef __FMA__
    return (vf)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
    return a * b + c;
#endif
}

inline float sum(vf x) {
    __m128 y = _mm_add_ps(_mm256_castps256_ps128((__m256)x), _mm256_extractf128_ps((__m256)x, 1));
    y = _mm_add_ps(y, _mm_movehl_ps(y, y));
    return _mm_cvtss_f32(_mm_add_ss(y, _mm_movehdup_ps(y)));
}

inline float max(vf x) {
    for (int half = L / 2; half; half /= 2)
        for (int i = 0; i < half; i++) x[i] = x[i] > x[i + half] ? x[i] : x[i + half];
    return x[0];
}

inline vf max(vf a, vf b) { return (vf)_mm256_max_ps((__m256)a, (__m256)b); }
inline bool any(vi mask) { return !_mm256_testz_si256((__m256i)mask, (__m256i)mask); }

// Compilers take what __builtin_convertvector says here apart into scalars.
inline vi widen(vub x) { return (vi)_mm256_cvtepu8_epi32(_mm_cvtsi64_si128((long long)load<int64_t>(&x))); }
inline vi widen(vh x) { return __builtin_convertvector(x, vi); }
inline vb narrow(vi x) {
    const __m256i low = _mm256_setr_epi8(0, 4, 8, 12, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1,  //
                                         -1, -1, -1, -1, 0, 4, 8, 12, -1, -1, -1, -1, -1, -1, -1, -1);
    const __m256i bytes = _mm256_shuffle_epi8((__m256i)x, low);
    const __m128i both = _mm_or_si128(_mm256_castsi256_si128(bytes), _mm256_extracti128_si256(bytes, 1));
    const int64_t all = _mm_cvtsi128_si64(both);
    return load<vb>(&all);
}

// Pairs of vectors as one of half the width: of ints as shorts, in the order of the next, of those as bytes, in order.
#define XQ_PACK
inline vs pack_ints(vi a, vi b) { return (vs)_mm256_packs_epi32((__m256i)a, (__m256i)b); }
inline vi pack_shorts(vs a, vs b) {
    const vi order = {0, 4, 1, 5, 2, 6, 3, 7};
    return (vi)_mm256_permutevar8x32_epi32(_mm256_packs_epi16((__m256i)a, (__m256i)b), (__m256i)order);
}

inline vi round_to_int(vf x) { return (vi)_mm256_cvtps_epi32((__m256)x); }

template <bool APPROXIMATE> inline vf exp_negative(vf x) {
    const vf magic = splat(12582912.0f + 127);  // its last bits count ones; 2**-127 comes out as 0
    const vf y = max(splat(-88.0f), x), t = y * LOG2_OF_E, shifted = t + magic, n = shifted - magic;
    return (APPROXIMATE ? exp2_of_remainder(t - n) : exp_of_remainder(y, n)) * (vf)((vi)shifted << 23);
}

inline vf load_floats(const float16* p) {
#ifdef __F16C__
    return (vf)_mm256_cvtph_ps((__m128i)load<vh>(p));
#else
    vf v;
    for (int i = 0; i < L; i++) v[i] = to_float(p[i]);
    return v;
#endif
}

}  // namespace xq
