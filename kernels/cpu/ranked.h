// What both kernels know of keys whose channels are ranked (kernels/schemes/per_channel_ranked.py).
#pragma once
#include <algorithm>
#include <cstdint>

namespace xq {

// Tokens whose keys are in codes when `past` are stored.
inline int64_t ranked_limit(int64_t past, int64_t residual, int64_t group) {
    return std::max<int64_t>((past - residual + group) / group, 0) * group;
}

}  // namespace xq
