// One problem's constants, so that editors can read cpu.cpp. Written by tests/test_cpu_source.py.
#pragma once
#include "../cpu/simd.h"

namespace xq {
constexpr int64_t B = 2;
constexpr int64_t H = 1;
constexpr int64_t Q = 1;
constexpr int64_t D = 128;
constexpr int64_t N = 1024;
constexpr int64_t BITS = 2;
constexpr int64_t GROUP = 128;
constexpr int64_t TOKENS = 1152;
constexpr int64_t RESIDUAL = 128;
constexpr int64_t RING_SLACK = 8;
constexpr int64_t SINKS = 4;
constexpr int64_t STEP_TOKENS = 8;
constexpr int64_t NOT_APPENDED = 1;
constexpr int64_t FULL = 2;
constexpr int64_t ROLLED_BACK_TOO_FAR = 3;
constexpr int64_t NOT_CONSECUTIVE = 4;
constexpr int64_t FULL_RESTARTED = 5;
constexpr float RELAXED_SCALE = (float)1.0;
constexpr float RELAXED_ZERO = (float)0.0;
constexpr bool BLOCKS = 1;
constexpr bool BORROWED = 0;
constexpr bool LEAST_SQUARES = 0;
using T = xq::bfloat16;
using S = xq::float16;
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
    const int64_t* start;
    int64_t* length;
    int32_t* fault;
};
}  // namespace xq
