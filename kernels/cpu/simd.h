// Vectors for the CPU kernels: XQ_LANES 32-bit lanes, chosen by Inductor's ISA detection.
//
// Arithmetic is GCC's and Clang's vector extension; only what it lacks is spelt in intrinsics, with
// a portable twin. XQ_LANES is 16 (AVX-512), 8 (AVX2) or 4 (anything else).
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#ifdef _OPENMP
#include <omp.h>
#endif
#if XQ_LANES > 4
#include <immintrin.h>
#endif

namespace xq {

constexpr int L = XQ_LANES;
typedef float vf __attribute__((vector_size(4 * L)));
typedef int32_t vi __attribute__((vector_size(4 * L)));
typedef uint32_t vu __attribute__((vector_size(4 * L)));
typedef uint16_t vh __attribute__((vector_size(2 * L)));
typedef int8_t vb __attribute__((vector_size(L)));
typedef uint8_t vub __attribute__((vector_size(L)));

struct bfloat16 { uint16_t bits; };
struct float16 { uint16_t bits; };

template <class V> inline V load(const void* p) { V v; std::memcpy(&v, p, sizeof(V)); return v; }
template <class V> inline void store(void* p, V v) { std::memcpy(p, &v, sizeof(V)); }
inline vf splat(float x) { return vf{} + x; }
inline vi splat(int32_t x) { return vi{} + x; }
inline int32_t word_at(const int8_t* p) { int32_t w; std::memcpy(&w, p, 4); return w; }
inline float as_float(uint32_t u) { float f; std::memcpy(&f, &u, 4); return f; }
inline uint32_t as_bits(float f) { uint32_t u; std::memcpy(&u, &f, 4); return u; }

// Sums of codes (unsigned bytes of BITS bits) times digits (signed bytes), the four bytes of a lane together:
// `add` takes up to WORDS words of 8 / BITS vectors each, `total` gives their sum a lane.
#if (XQ_LANES == 16 && defined(__AVX512VNNI__)) || (XQ_LANES == 8 && defined(__AVX512VNNI__) && defined(__AVX512VL__))
template <int BITS> struct Dot {
    static constexpr int64_t WORDS = 1 << 30;
    typedef vi Sum;
    static vi add(vi sum, vi code, vi digit) {
#if XQ_LANES == 16
        return (vi)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)code, (__m512i)digit);
#else
        return (vi)_mm256_dpbusd_epi32((__m256i)sum, (__m256i)code, (__m256i)digit);
#endif
    }
    static vi total(vi sum) { return sum; }
};
#else
typedef int16_t vs __attribute__((vector_size(4 * L)));  // two to a lane
// Products, two neighbours added: at most 32,767 if codes have seven bits or less.
inline vs pairs(vi code, vi digit) {
#if XQ_LANES == 16 && defined(__AVX512BW__)
    return (vs)_mm512_maddubs_epi16((__m512i)code, (__m512i)digit);
#elif XQ_LANES == 8
    return (vs)_mm256_maddubs_epi16((__m256i)code, (__m256i)digit);
#else
    const vs even = (vs)(code & 0x00ff00ff), odd = (vs)((code >> 8) & 0x00ff00ff);
    return even * ((vs)(digit << 8) >> 8) + odd * ((vs)digit >> 8);
#endif
}
inline vi halves(vs x) {  // the two numbers of a lane added
#if XQ_LANES == 16 && defined(__AVX512BW__)
    return (vi)_mm512_madd_epi16((__m512i)x, _mm512_set1_epi16(1));
#elif XQ_LANES == 8
    return (vi)_mm256_madd_epi16((__m256i)x, _mm256_set1_epi16(1));
#else
    return (((vi)x << 16) >> 16) + ((vi)x >> 16);
#endif
}
template <int BITS> struct Dot {  // in 16 bits for as long as nothing can overflow them
    static constexpr int64_t WORDS = 32767 / (8 / BITS * 2 * ((1 << BITS) - 1) * 128);
    typedef vs Sum;
    static vs add(vs sum, vi code, vi digit) {
        sum += pairs(code, digit);
#if XQ_LANES == 8
        asm("" : "+x"(sum));  // or GCC makes all products of a word first and runs out of registers
#endif
        return sum;
    }
    static vi total(vs sum) { return halves(sum); }
};
template <> struct Dot<8> {  // a nibble at a time
    static constexpr int64_t WORDS = 1 << 30;
    typedef vi Sum;
    static vi add(vi sum, vi code, vi digit) {
        const vi low = splat(0x0f0f0f0f);
        return sum + (halves(pairs((code >> 4) & low, digit)) << 4) + halves(pairs(code & low, digit));
    }
    static vi total(vi sum) { return sum; }
};
#endif

inline vf fma(vf a, vf b, vf c) {  // Inductor compiles with -ffp-contract=off
#if XQ_LANES == 16
    return (vf)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif XQ_LANES == 8 && defined(__FMA__)
    return (vf)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
    return a * b + c;
#endif
}

inline float sum(vf x) {
#if XQ_LANES == 16
    return _mm512_reduce_add_ps((__m512)x);
#elif XQ_LANES == 8
    __m128 y = _mm_add_ps(_mm256_castps256_ps128((__m256)x), _mm256_extractf128_ps((__m256)x, 1));
    y = _mm_add_ps(y, _mm_movehl_ps(y, y));
    return _mm_cvtss_f32(_mm_add_ss(y, _mm_movehdup_ps(y)));
#else
    for (int half = L / 2; half; half /= 2)
        for (int i = 0; i < half; i++) x[i] += x[i + half];
    return x[0];
#endif
}
inline float max(vf x) {
#if XQ_LANES == 16
    return _mm512_reduce_max_ps((__m512)x);
#else
    for (int half = L / 2; half; half /= 2)
        for (int i = 0; i < half; i++) x[i] = x[i] > x[i + half] ? x[i] : x[i + half];
    return x[0];
#endif
}
inline vf max(vf a, vf b) {  // b where either is NaN
#if XQ_LANES == 16
    return (vf)_mm512_max_ps((__m512)a, (__m512)b);
#elif XQ_LANES == 8
    return (vf)_mm256_max_ps((__m256)a, (__m256)b);
#else
    return a > b ? a : b;
#endif
}
inline bool any(vi mask) {
#if XQ_LANES == 16
    return _mm512_test_epi32_mask((__m512i)mask, (__m512i)mask) != 0;
#elif XQ_LANES == 8
    return !_mm256_testz_si256((__m256i)mask, (__m256i)mask);
#else
    int32_t all = 0;
    for (int i = 0; i < L; i++) all |= mask[i];
    return all != 0;
#endif
}
inline vf abs(vf x) { return (vf)((vu)x & 0x7fffffffu); }

// Between bytes and lanes: compilers take what __builtin_convertvector says here apart into scalars.
inline vi widen(vub x) {
#if XQ_LANES == 16
    return (vi)_mm512_cvtepu8_epi32((__m128i)x);
#elif XQ_LANES == 8
    return (vi)_mm256_cvtepu8_epi32(_mm_cvtsi64_si128((long long)load<int64_t>(&x)));
#else
    return __builtin_convertvector(x, vi);
#endif
}
inline vb narrow(vi x) {
#if XQ_LANES == 16
    return (vb)_mm512_cvtepi32_epi8((__m512i)x);
#elif XQ_LANES == 8
    const __m256i low = _mm256_setr_epi8(0, 4, 8, 12, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1,
                                         -1, -1, -1, -1, 0, 4, 8, 12, -1, -1, -1, -1, -1, -1, -1, -1);
    const __m256i bytes = _mm256_shuffle_epi8((__m256i)x, low);
    const __m128i both = _mm_or_si128(_mm256_castsi256_si128(bytes), _mm256_extracti128_si256(bytes, 1));
    const int64_t all = _mm_cvtsi128_si64(both);
    return load<vb>(&all);
#else
    return __builtin_convertvector(x, vb);
#endif
}

// Nearest integer, |x| < 2**22; NaN gives some integer.
inline vi round_to_int(vf x) {
#if XQ_LANES == 16
    return (vi)_mm512_cvtps_epi32((__m512)x);
#elif XQ_LANES == 8
    return (vi)_mm256_cvtps_epi32((__m256)x);
#else
    const vf magic = splat(12582912.0f);  // 1.5 * 2**23
    return (vi)(x + magic) - (vi)magic;
#endif
}

inline vf exp_of_remainder(vf y, vf k) {  // exp(y - k log 2), |y - k log 2| <= log(2) / 2
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

inline vf exp(vf x) {  // 2 ulp; 0 below -87, NaN stays NaN, above 88 it is exp(88)
    const vf lowest = splat(-87.0f);
    const vf below = x > 88.0f ? splat(88.0f) : x;
    const vf y = below < lowest ? lowest : below;
    const vi n = round_to_int(y * 1.44269504f);
    const vf scaled = exp_of_remainder(y, __builtin_convertvector(n, vf)) * (vf)((n + 127) << 23);
    return x < lowest ? splat(0.0f) : scaled;
}

inline vf exp2_of_remainder(vf r) {  // 2**r, |r| <= 1 / 2, off by up to 3e-6
    vf p = splat(9.5701e-3f);
    p = fma(p, r, splat(5.591786e-2f));
    p = fma(p, r, splat(2.4024745e-1f));
    p = fma(p, r, splat(6.9312181e-1f));
    return fma(p, r, splat(9.9999926e-1f));
}

// exp where x <= 0; ROUGH is off by up to 3e-6 of the result.
template <bool ROUGH> inline vf exp_negative(vf x) {
#if XQ_LANES == 16
    const vf y = max(splat(-104.0f), x), t = y * 1.44269504f;
    const vf n = (vf)_mm512_roundscale_ps((__m512)t, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    return (vf)_mm512_scalef_ps((__m512)(ROUGH ? exp2_of_remainder(t - n) : exp_of_remainder(y, n)), (__m512)n);
#elif XQ_LANES == 8
    const vf lowest = splat(-87.0f), y = max(lowest, x), t = y * 1.44269504f;
    const vf n = (vf)_mm256_round_ps((__m256)t, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    const vf p = ROUGH ? exp2_of_remainder(t - n) : exp_of_remainder(y, n);
    const vf scaled = p * (vf)((round_to_int(n) + 127) << 23);
    return (vf)_mm256_andnot_ps((__m256)(x < lowest), (__m256)scaled);
#else
    return exp(x);
#endif
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
inline vf load_floats(const bfloat16* p) { return (vf)(__builtin_convertvector(load<vh>(p), vu) << 16); }
inline vf load_floats(const float16* p) {
#if XQ_LANES == 16
    return (vf)_mm512_cvtph_ps((__m256i)load<vh>(p));
#elif XQ_LANES == 8 && defined(__F16C__)
    return (vf)_mm256_cvtph_ps((__m128i)load<vh>(p));
#else
    vf v;
    for (int i = 0; i < L; i++) v[i] = to_float(p[i]);
    return v;
#endif
}
// The first n < L numbers at p, zeros behind.
template <class T> inline vf load_some(const T* p, int64_t n) {
    T part[L] = {};
    std::memcpy((void*)part, (const void*)p, n * sizeof(T));
    return load_floats(part);
}
template <class T> inline vf load_up_to(const T* p, int64_t n) { return n >= L ? load_floats(p) : load_some(p, n); }

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

inline int threads() {
#ifdef _OPENMP
    return omp_in_parallel() ? 1 : omp_get_max_threads();
#else
    return 1;
#endif
}

// Scratch of floats, aligned to a cache line.
struct Scratch {
    std::unique_ptr<char[]> raw;
    float* data;
    explicit Scratch(int64_t floats) : raw(new char[floats * 4 + 64]) {
        data = (float*)(((uintptr_t)raw.get() + 63) & ~(uintptr_t)63);
    }
};

}  // namespace xq
