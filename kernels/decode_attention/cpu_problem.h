// One problem of decode attention: constants that follow from those in front of this file, arguments, scratch.
#pragma once
#ifndef XQ_LANES  // an editor, which sees no constants
#include "example_problem.h"
#endif

namespace xq {

// Rows of a KV head are its query heads times tokens; ROWS of them are taken at a time. Where Q is 0 the kernel is told
// how many tokens there are, and the last rows of a head may be fewer.
constexpr bool ANY_QUERIES = Q == 0;
// Long spans cost less per token; short ones leave pieces for all threads where heads are few.
constexpr int64_t SPAN = LONG_SPANS ? 1024 : 256;
constexpr int64_t SLACK = SPAN + L;  // a vector may be stored past the span's last token
static_assert(HQ / H * Q % ROWS == 0, "");
// A code of a value is a field of V_HIGH bits and, if V_LOW > 0, one of V_LOW bits below it, in another plane
// (kernels/packing.py).
constexpr int64_t V_BITS = V_HIGH + V_LOW;
constexpr int64_t V_HIGH_PER_WORD = 32 / V_HIGH, V_LOW_PER_WORD = 32 / (V_LOW ? V_LOW : V_HIGH);
constexpr int64_t V_BLOCK = V_LOW_PER_WORD;  // tokens that are whole words in each plane
// The codes of a key are planes of one width each, in this order. Where channels are ranked, the K_ELEMENTS first ranks
// have codes, of mixed widths (kernels/widths.py); else all channels have a field in each plane.
constexpr int64_t K_WORDS = K_WORDS_8 + K_WORDS_4 + K_WORDS_2 + K_WORDS_1;
constexpr int64_t K_ELEMENTS =
    RANKED ? K_RANKS : std::max({4 * K_WORDS_8, 8 * K_WORDS_4, 16 * K_WORDS_2, 32 * K_WORDS_1});
constexpr int K_BITS = 8 * (K_WORDS_8 > 0) + 4 * (K_WORDS_4 > 0) + 2 * (K_WORDS_2 > 0) + (K_WORDS_1 > 0);  // at most
constexpr int64_t DK_PAD = std::max<int64_t>(K_ELEMENTS, (DK + L - 1) / L * L);
constexpr int64_t DK_BYTES = (DK_PAD + 4 * L - 1) / (4 * L) * 4 * L;  // in whole vectors of bytes
constexpr int64_t V_GROUPS = DV / V_GROUP;
constexpr int64_t DV_PAD = (DV + L - 1) / L * L;
// Where the codes of token t are: those of a sliding window start over (kernels/layout.py).
constexpr int64_t key_slot(int64_t t) { return K_WRAP ? t % (K_WRAP ? K_WRAP : 1) : t; }
constexpr int64_t value_slot(int64_t t) { return V_WRAP ? t % (V_WRAP ? V_WRAP : 1) : t; }
// Last token + 1 of a span that begins at t and ends at `end` at the latest.
constexpr int64_t span_end(int64_t t, int64_t end) {
    end = std::min(end, t + SPAN);
    if (K_WRAP) end = std::min(end, t - key_slot(t) + K_WRAP);
    return V_WRAP ? std::min(end, t - value_slot(t) + V_WRAP) : end;
}
// Where values are rotated, what comes from codes is summed apart, behind the rest, and rotated back in the end.
constexpr int64_t CODES_AT = ROTATED ? DV_PAD : 0, ACC = DV_PAD + CODES_AT;
constexpr int64_t LONGEST = (int64_t)1 << 40;  // tokens, where no number is given
constexpr float MINUS_INFINITY = -std::numeric_limits<float>::infinity();
static_assert(SPAN % V_BLOCK == 0, "a word of values lies in one span");

// Tensors holds the op's tensor arguments, and Sizes what differs from cache to cache (cpu_source.py); written by
// kernels/cpu/source.py. `past` is the number in the tensor of that name.
struct Inputs : Tensors, Sizes {
    T* out;
    int64_t past, length, keys_end, values_end;  // of the first tokens that are not in the codes
    int64_t new_tokens() const { return tokens_of(*this); }
    int64_t rows() const { return HQ / H * new_tokens(); }
    int64_t row_blocks() const { return (rows() + ROWS - 1) / ROWS; }
    int64_t rows_from(int64_t row0) const { return ANY_QUERIES ? std::min(ROWS, rows() - row0) : ROWS; }
    int64_t mask_rows() const { return (MASK_HEADS ? HQ : 1) * (MASK_QUERIES ? new_tokens() : 1); }  // of a sequence
    static int64_t tokens_of(const Sizes& sizes) { return ANY_QUERIES ? sizes.queries : Q; }
};

// Running softmax of one KV head's rows over some tokens.
struct RunningSoftmax {
    float* m;  // [ROWS] largest logit
    float* l;  // [ROWS] sum of exponentials
    float* acc;  // [ROWS, ACC] weighted values
    void clear() {
        std::fill(m, m + ROWS, MINUS_INFINITY);
        std::fill(l, l + ROWS, 0.0f);
        std::fill(acc, acc + ROWS * ACC, 0.0f);
    }
    static constexpr int64_t HEADER = (2 * ROWS + 15) / 16 * 16;
    static constexpr int64_t SIZE = HEADER + ROWS * ACC + 16;  // floats; apart by a cache line
    explicit RunningSoftmax(float* data) : m(data), l(data + ROWS), acc(data + HEADER) {}
};

// Queries with the scales and zero points of a token group.
struct FoldedQueries {
    float zero[ROWS];  // queries times zero points
    float unit[ROWS];  // what the last digit stands for
    alignas(64) int8_t digits[ROWS][K_DIGITS][DK_BYTES];
};
// Groups that are folded one after the other, as each has long chains of instructions that wait for each other.
constexpr int64_t GROUPS_AHEAD = ROWS > 8 ? 1 : std::clamp<int64_t>(SPAN / K_GROUP, 1, 4);

// Tokens whose weights are numbers of the same unit: with one digit that is too coarse for many.
constexpr int64_t VALUES_TOGETHER = V_DIGITS == 1 ? 128 : SPAN;

// Tokens whose weights are spread at a time (see digits_of): so few that they stay in the first cache, so many that
// their sums are seldom put aside. And what that takes, in bytes of one number.
constexpr int64_t SPREAD_VALUES = 128, SPREAD_BYTES = SPREAD_DIGITS ? std::max(K_DIGITS, V_DIGITS) * sizeof(vi) / 4 : 0;

// Scratch of one thread.
struct Scratch {
    float score[ROWS][SLACK];
    float weight[ROWS][SLACK];
    float query[ROWS][DK_PAD + L];
    float ranked[ROWS][DK_PAD + L];  // queries in the order that scales are in
    float folded[ROWS][DK_PAD + L];  // the same, times scales: what codes are multiplied with; zeros behind
    float q_center[ROWS];  // queries times what is in no zero point
    FoldedQueries keys[GROUPS_AHEAD];  // of the token groups from `group` on
    alignas(64) int8_t p_digits[ROWS][V_DIGITS][SPAN];
    // Digits in every lane of a vector, and sums of a channel group's values that are put aside.
    alignas(64) int8_t spread[std::max(SPREAD_VALUES, K_ELEMENTS) * SPREAD_BYTES * 4 + 64];
    alignas(64) int32_t sums[4 * V_DIGITS][DV_PAD + 4 * L];
    float p_unit[SPAN / VALUES_TOGETHER][ROWS];
    float p_zero[ROWS];
    const T* q;  // queries of this block of rows, as they are given
    int64_t row0, rows;  // first row of this block, and how many are in use
    int64_t group, groups;  // the first token group in `keys`, and how many there are
    int64_t rows_in_use() const { return ANY_QUERIES ? rows : ROWS; }
};

}  // namespace xq
