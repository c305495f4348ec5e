// Attention of rows over their paths by itself, for test_attention.py.
#include "float_cache.h"
#include "step_cache.h"

using namespace mapar;

template <class Cache>
static void attend_all(const Heads& h, const Pool& pool, int capacity, const float* keys, const float* values, int rows,
                       int longest, const int32_t* paths, const int* lengths, float* queries, float* out) {
    const int group = h.heads / h.kv_heads;
    Blocks blocks(h, rows, longest);
    for (int kv = 0; kv < h.kv_heads; kv++) {
        const Cache cache(h, pool, kv);
        for (int slot = 0; slot < capacity; slot++) {
            cache.keep_key(slot, keys + ((size_t)slot * h.kv_heads + kv) * h.head_dim);
            cache.keep_value(slot, values + ((size_t)slot * h.kv_heads + kv) * h.head_dim);
        }
        for (int first = 0; first < rows; first += BLOCK) {
            const int count = std::min(BLOCK, rows - first);
            Block block{count, longest, paths + (size_t)first * longest, lengths + first, blocks.weights.data(), {}, {}};
            for (int r = 0; r < count; r++) {
                const size_t offset = ((size_t)(first + r) * h.heads + kv * group) * h.head_dim;
                for (int g = 0; g < group; g++) cache.ready_query(queries + offset + g * h.head_dim);
                block.query[r] = queries + offset;
                block.out[r] = out + offset;
            }
            attend_block(h, cache, block);
        }
    }
}

// keys and values [capacity][kv_heads][head_dim], queries (overwritten) and out [rows][heads][head_dim], paths
// [rows][longest]; `pool` is of int16 steps where it has scales.
extern "C" void attend(const Heads* h, const Pool* pool, int capacity, const float* keys, const float* values, int rows,
                       int longest, const int32_t* paths, const int* lengths, float* queries, float* out) {
    (pool->scales ? attend_all<StepCache> : attend_all<FloatCache>)(*h, *pool, capacity, keys, values, rows, longest,
                                                                    paths, lengths, queries, out);
}
