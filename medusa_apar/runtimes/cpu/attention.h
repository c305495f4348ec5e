// Attention of forest rows over their paths, read slot by slot from the KV pool.
//
// A row walks its own path in path order, so its bits depend on the path alone: not on which slots it lies in, on the
// other rows, or on what was drafted and rejected. Rows go over the path in step, TILE places at a time: they share
// their beginnings, so what one row has read is in the first-level cache for the others. Where a row shares nothing
// with the row before, slots are fetched some places early: no hardware foresees which slot a path goes on in. Queries
// that share a KV head are taken together.
//
// How the pool keeps one KV head is a cache's affair (float_cache.h, step_cache.h):
//   keep_key, keep_value   put a head's floats into a slot
//   ready_query            turns a query's floats, in place, into what `score` reads
//   score, mix             what G queries make of the keys, and of the values, at some places of a path
#pragma once

#include <vector>

#include "matrix.h"

namespace mapar {

constexpr int GROUP = 3;   // query heads taken together: with more, the sums would leave the registers
constexpr int KEYS = 4;    // what `sum4` sums
constexpr int DIMS = 32;   // of a value, summed in registers
constexpr int TILE = 64;   // places of a path: 16 KB of keys
constexpr int BLOCK = 32;  // rows that go in step
constexpr int AHEAD = 16;  // places between the one that is fetched and the one that is read
constexpr int FETCHED = 64;  // bytes that one fetch brings

struct Heads {
    int32_t heads, kv_heads, head_dim;
    float scale;
};

// A layer's share of the KV pool, [capacity][kv_heads][head_dim]; scales, of steps: [capacity][kv_heads][2], or null.
struct Pool {
    void *keys, *values;
    float* scales;
};

// Places first to last of a row's path, and the row's buffer for their scores and weights.
struct Places {
    const int32_t* path;  // slots
    int first, last, longest;
    float* weights;  // [G][longest]
    int unread;      // places before this one are fetched early; 0 where the row before has just read them

    // Fetches `count` elements a slot, `stride` apart, of `places` places: what will be read once `place` is AHEAD on.
    template <class T>
    void fetch(const T* data, size_t stride, int count, int place, int places) const {
        const int first = place + AHEAD, end = std::min(first + places, unread);
        for (int s = first; s < end; s++)
            for (int i = 0; i < count; i += FETCHED / sizeof(T)) __builtin_prefetch(data + path[s] * stride + i);
    }
};

// A block's rows at one KV head. Buffers are [row][...] with `longest` places a row.
struct Block {
    int rows, longest;
    const int32_t* paths;  // [rows][longest] slots
    const int* lengths;
    float* weights;         // [rows][GROUP][longest]
    const float* query[BLOCK];
    float* out[BLOCK];
};

// Scores become weights that sum to 1.
inline void softmax(float* row, int length) {
    const int whole = length / LANES * LANES;
    vf peak = splat(-INFINITY), sums = {};
    for (int s = 0; s < whole; s += LANES) peak = larger(peak, load(row + s));
    float top = largest(peak);
    for (int s = whole; s < length; s++) top = std::max(top, row[s]);
    for (int s = 0; s < whole; s += LANES) {
        const vf weight = exp(load(row + s) - top);
        store(row + s, weight);
        sums += weight;
    }
    float total = sum(sums);
    if (whole < length) {
        float rest[LANES] = {};
        std::memcpy(rest, row + whole, sizeof(float) * (length - whole));
        store(rest, exp(load(rest) - top));
        for (int s = whole; s < length; s++) total += row[s] = rest[s - whole];
    }
    const vf scale = splat(1.f / total);
    for (int s = 0; s < whole; s += LANES) store(row + s, load(row + s) * scale);
    for (int s = whole; s < length; s++) row[s] *= scale[0];
}

template <int G, class Cache>
inline void attend(const Cache& cache, const Block& b, int head) {
    const int offset = head * cache.dim, places = b.longest;
    auto tiles_of_rows = [&](auto use) {
        for (int tile = 0; tile < places; tile += TILE)
            for (int r = 0; r < b.rows; r++)
                if (const int last = std::min(tile + TILE, b.lengths[r]); tile < last) {
                    const int32_t *path = b.paths + (size_t)r * places, *before = path - places;
                    const bool shared = r && tile < b.lengths[r - 1] && path[tile] == before[tile];
                    use(r, Places{path, tile, last, places, b.weights + (size_t)r * GROUP * places,
                                  shared ? 0 : b.lengths[r]});
                }
    };
    tiles_of_rows([&](int r, const Places& at) { cache.template score<G>(b.query[r] + offset, at); });
    for (int r = 0; r < b.rows; r++)
        for (int g = 0; g < G; g++) softmax(b.weights + ((size_t)r * GROUP + g) * places, b.lengths[r]);
    tiles_of_rows([&](int r, const Places& at) { cache.template mix<G>(at, b.out[r] + offset); });
}

// All query heads of the cache's KV head.
template <class Cache>
inline void attend_block(const Heads& h, const Cache& cache, const Block& b) {
    const int group = h.heads / h.kv_heads, rest = group % GROUP;
    int head = 0;
    for (; head + GROUP <= group; head += GROUP) attend<GROUP>(cache, b, head);
    if (rest == 2) attend<2>(cache, b, head);
    if (rest == 1) attend<1>(cache, b, head);
}

// A thread's buffers for blocks.
struct Blocks {
    std::vector<int32_t> paths;
    std::vector<int> lengths;
    std::vector<float> weights;
    explicit Blocks(int rows, int longest)
        : paths((size_t)std::min(rows, BLOCK) * longest),
          lengths(BLOCK),
          weights((size_t)std::min(rows, BLOCK) * longest * GROUP) {}
};

}  // namespace mapar
