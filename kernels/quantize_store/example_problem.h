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
constexpr float RELAXED_SCALE = (float)1.0;
constexpr float RELAXED_ZERO = (float)0.0;
constexpr bool IS_KEY = 1;
constexpr bool BORROWED = 0;
constexpr bool LEAST_SQUARES = 0;
using T = xq::bfloat16;
using S = xq::float16;
}  // namespace xq
