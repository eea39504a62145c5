// One problem's constants, so that editors can read cpu.cpp. Written by tests/test_cpu_source.py.
#pragma once
#include "../cpu/simd.h"

namespace xq {
constexpr int64_t H = 2;
constexpr int64_t HQ = 8;
constexpr int64_t Q = 1;
constexpr int64_t DK = 128;
constexpr int64_t DV = 128;
constexpr int64_t K_WORDS_8 = 0;
constexpr int64_t K_WORDS_4 = 0;
constexpr int64_t K_WORDS_2 = 8;
constexpr int64_t K_WORDS_1 = 0;
constexpr int64_t K_RANKS = 0;
constexpr int64_t K_GROUP = 32;
constexpr int64_t K_RESIDUAL = 32;
constexpr int64_t K_RING = 52;
constexpr int64_t ROTATED = 0;
constexpr int64_t V_HIGH = 2;
constexpr int64_t V_LOW = 0;
constexpr int64_t V_GROUP = 128;
constexpr int64_t K_WRAP = 0;
constexpr int64_t V_WRAP = 0;
constexpr int64_t V_RESIDUAL = 32;
constexpr int64_t V_RING = 52;
constexpr int64_t SINKS = 4;
constexpr int64_t WINDOW = 0;
constexpr int64_t ROWS = 4;
constexpr int64_t K_DIGITS = 1;
constexpr int64_t V_DIGITS = 1;
constexpr float SCALE = (float)0.08838834764831845;
constexpr float SOFTCAP = (float)30.0;
constexpr bool RANKED = 0;
constexpr bool NORMS = 0;
constexpr bool ABOUT_ZERO = 0;
constexpr bool HAS_NEW = 0;
constexpr bool LONG_SPANS = 0;
constexpr bool HAS_MASK = 1;
constexpr bool MASK_HEADS = 0;
constexpr bool MASK_QUERIES = 0;
constexpr bool HAS_SINK_LOGITS = 0;
using T = xq::bfloat16;
using S = xq::float16;
using MASK = uint8_t;
using SINK = float;
}  // namespace xq
namespace xq {
// Words of a key whose fields, of `width` bits, are the codes from `element` on.
struct Plain {
    int width;
    int64_t word, words, element;
};
// The four codes from `element` on, a byte each, are the sum of (word >> shift) & mask up to the `last`.
struct Piece {
    int64_t word, element;
    int shift;
    uint32_t mask;
    bool last;
};
constexpr Plain PLAIN[] = {{1, 0, 0, 0}};
constexpr Piece PIECES[] = {{0, 0, 0, 0, 0}};
constexpr float RANK_MIDDLES[] = {0.0f};
constexpr float ROTATION_SIGNS[] = {1.0f};
constexpr float ROTATION_SCALE = 1.0f;
}  // namespace xq

namespace xq {
struct Tensors {
    const xq::T* q;
    const int32_t* k_codes;
    const xq::S* k_scale;
    const xq::S* k_zero;
    const int32_t* k_order;
    const float* k_center;
    const uint8_t* k_norm;
    const xq::T* k_ring;
    const xq::T* k_sink;
    const int32_t* v_codes;
    const xq::S* v_scale;
    const xq::S* v_zero;
    const xq::T* v_ring;
    const xq::T* v_sink;
    const int64_t* start;
    const int64_t* past;
    const xq::MASK* mask;
    const xq::SINK* sink_logits;
    const xq::T* k_new;
    const xq::T* v_new;
};
struct Sizes {
    int64_t batch, max_len, k_tokens, v_tokens, mask_batch, queries;
};
}  // namespace xq
