// Tokens one by one as they leave the window (kernels/schemes/per_token.py and its kin), each by store_token.
#pragma once

namespace xq {

constexpr int64_t SLICE = 64;  // a word holds codes of up to 32 tokens
constexpr bool DUE_IS_MUCH = false;

inline int64_t due_end(int64_t stored) { return std::max<int64_t>(stored - RESIDUAL, 0); }

inline void note_tokens(const Inputs&, int64_t, int64_t, int64_t) {}

inline void prepare_due(const Inputs&, int64_t, int64_t, int64_t) {}

inline void quantize_due(const Inputs& in, int64_t head, int64_t from, int64_t to) {
    for (int64_t t = from; t < to; t++) store_token(in, head, t);
}

}  // namespace xq
