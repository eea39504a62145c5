// One problem's constants, so that editors can read cpu.cpp. Written by tests/test_cpu_source.py.
#pragma once
#include "../cpu/simd.h"

namespace xq {
constexpr int64_t ROWS = 1;
constexpr bool HAS_BIAS = 1;
using T = xq::bfloat16;
}  // namespace xq

namespace xq {
struct Tensors {
    const xq::T* x;
    const xq::T* weight;
    const xq::T* bias;
};
}  // namespace xq
