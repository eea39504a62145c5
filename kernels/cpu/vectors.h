// Vector types of XQ_LANES 32-bit lanes, for the header of an ISA, which defines XQ_LANES and includes this.
//
// Arithmetic, comparison and choice are GCC's and Clang's vector extension; only what it lacks is spelt in
// intrinsics, in the header of an ISA.
#pragma once
#include <cstdint>
#include <cstring>

#define ALWAYS_INLINE __attribute__((always_inline)) inline

namespace xq {

constexpr int L = XQ_LANES;
typedef float vf __attribute__((vector_size(4 * L)));
typedef int32_t vi __attribute__((vector_size(4 * L)));
typedef uint32_t vu __attribute__((vector_size(4 * L)));
typedef int16_t vs __attribute__((vector_size(4 * L)));   // shorts, two to a lane
typedef uint16_t vh __attribute__((vector_size(2 * L)));  // halves: one 16-bit number per lane
typedef int8_t vb __attribute__((vector_size(L)));        // one byte per lane
typedef uint8_t vub __attribute__((vector_size(L)));

struct bfloat16 {
    uint16_t bits;
};
struct float16 {
    uint16_t bits;
};

template <class V> inline V load(const void* p) {
    V v;
    std::memcpy(&v, p, sizeof(V));
    return v;
}
template <class V> inline void store(void* p, V v) { std::memcpy(p, &v, sizeof(V)); }
inline vf splat(float x) { return x - vf{}; }  // with a sum -0 would become 0, so compilers would have to add
inline vi splat(int32_t x) { return vi{} + x; }

// Of simd.h, which includes the header of the ISA before it defines them.
inline float to_float(float16 x);
inline vf exp(vf x);                     // 2 ulp; 0 below -87, NaN stays NaN, above 88 it is exp(88)
inline vf exp_of_remainder(vf y, vf k);  // exp(y - k log 2), |y - k log 2| <= log(2) / 2
inline vf exp2_of_remainder(vf r);       // 2**r, |r| <= 1 / 2, off by up to 3e-6
constexpr float LOG2_OF_E = 1.44269504f;

}  // namespace xq
