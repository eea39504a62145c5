// One problem's constants, so that editors can read cpu.cpp. Written by tests/test_cpu_source.py.
#pragma once
#include "../cpu/simd.h"

namespace xq {
constexpr int64_t D = 64;
using T = xq::bfloat16;
}  // namespace xq
