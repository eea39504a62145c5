// One problem's constants, so that editors can read cpu.cpp. Written by tests/test_cpu_source.py.
#pragma once
#include "../cpu/simd.h"

namespace xq {
constexpr int64_t H = 1;
constexpr int64_t D = 128;
constexpr int64_t BITS = 2;
constexpr int64_t GROUP = 128;
constexpr int64_t WORDS = 8;
constexpr int64_t WRAP = 0;
constexpr int64_t RESIDUAL = 128;
constexpr int64_t SINKS = 4;
constexpr int64_t ROTATED = 0;
constexpr int64_t RING = 136;
constexpr int64_t WORD_TOKENS = 32;
constexpr bool KEYS = 1;
constexpr bool RANKED = 0;
constexpr bool ABOUT_ZERO = 0;
constexpr bool FOLDED = 0;
constexpr bool NORMS = 0;
using T = xq::bfloat16;
using S = xq::float16;
}  // namespace xq
namespace xq {
// Fields of `width` bits, with `shift` bits of a code below them and `above` above them.
struct Plane {
    int64_t width, shift, above;
};
constexpr Plane PLANES[] = {{2, 0, 0}};
// Bits `shift` and up of the code of a rank, under `mask`, are at `bit` of a word; `first` in it or not.
struct Field {
    int64_t word, rank;
    uint32_t shift, mask, bit;
    bool first;
};
constexpr Field FIELDS[] = {{0, 0, 0, 0, 0, 0}};
constexpr int32_t LARGEST_CODES[] = {0};
constexpr float ROTATION_SIGNS[] = {1.0f};
constexpr float ROTATION_SCALE = 1.0f;
}  // namespace xq

namespace xq {
struct Tensors {
    const int32_t* codes;
    const xq::S* scale;
    const xq::S* zero;
    const xq::T* ring;
    const xq::T* sink;
    const int32_t* order;
    const float* center;
    const uint8_t* norm;
    const int64_t* start;
    const int64_t* past;
    const xq::T* x;
};
struct Sizes {
    int64_t n, batch, new_tokens, tokens, first, own;
};
}  // namespace xq
