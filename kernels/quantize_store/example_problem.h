// One problem's constants, so that editors can read cpu.cpp. Written by tests/test_cpu_source.py.
#pragma once
#include "../cpu/simd.h"

#define XQ_APPEND_BLOCKS
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
constexpr int64_t RING_SLACK = 8;
constexpr int64_t STEP_TOKENS = 8;
constexpr int64_t NOT_APPENDED = 1;
constexpr int64_t FULL = 2;
constexpr int64_t ROLLED_BACK_TOO_FAR = 3;
constexpr int64_t NOT_CONSECUTIVE = 4;
constexpr int64_t RESTARTED = 5;
constexpr float RELAXED_SCALE = (float)1.0;
constexpr float RELAXED_ZERO = (float)0.0;
constexpr float GAUSSIAN_STEP = (float)0.9957;
constexpr bool BORROWED = 0;
constexpr bool LEAST_SQUARES = 0;
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
    const xq::T* x;
    const int64_t* pos;
    int32_t* codes;
    xq::S* scale;
    xq::S* zero;
    xq::T* ring;
    xq::T* sink;
    int32_t* order;
    float* center;
    const float* energy;
    uint8_t* norm;
    const int64_t* start;
    int64_t* length;
    int32_t* fault;
};
struct Sizes {
    int64_t count, batch, max_len, tokens;
};
}  // namespace xq
