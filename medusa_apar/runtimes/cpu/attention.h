// Attention of forest rows over their paths, read slot by slot from the KV pool.
//
// A row walks its own path in path order, so its bits depend on the path alone: not on which slots it lies in, on the
// other rows, or on what was drafted and rejected. Rows go over the path in step, TILE places at a time: they share
// their beginnings, and a tile that several rows share is read from the pool once, turned, and multiplied with all of
// them. Where a row shares nothing, slots are fetched some places early: no hardware foresees which slot a path goes on
// in. Queries that share a KV head are taken together.
//
// How the pool keeps one KV head is a cache's affair (float_cache.h, step_cache.h):
//   keep_key, keep_value   put a head's floats into a slot
//   ready_query            turns a query's floats, in place, into what `score` reads
//   score, mix             what G queries make of the keys, and of the values, at some places of a path
//   pack_keys, pack_values turn a tile's keys, or values, for `score` and `mix` of all rows that share it
#pragma once

#include <type_traits>
#include <vector>

#include "vectors.h"

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
    float scale, cap;  // of scores; cap: they become cap * tanh(score / cap), 0: they stay
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
    float* weights;  // [query heads of the KV head][longest]
    int length;      // of the path: what is read early ends there

    Places of_head(int head) const {
        Places places = *this;
        places.weights += (size_t)head * longest;
        return places;
    }

    // Fetches `count` elements a slot, `stride` apart, of `places` places: what will be read once `place` is AHEAD on.
    template <class T>
    void fetch(const T* data, size_t stride, int count, int place, int places) const {
        const int first = place + AHEAD, end = std::min(first + places, length);
        for (int s = first; s < end; s++)
            for (int i = 0; i < count; i += FETCHED / sizeof(T)) __builtin_prefetch(data + path[s] * stride + i);
    }
};

// A block's rows at one KV head. Buffers are [row][...] with `longest` places a row.
struct Block {
    int rows, longest;
    const int32_t* paths;  // [rows][longest] slots
    const int* lengths;
    float* weights;         // [rows][query heads of the KV head][longest]
    const float* query[BLOCK];
    float* out[BLOCK];
};

inline void cap_scores(float* row, int length, float cap) {
    for (int s = 0; s < length; s += LANES) {
        float part[LANES] = {};
        const size_t bytes = sizeof(float) * std::min(LANES, length - s);
        std::memcpy(part, row + s, bytes);
        store(part, capped(load(part), cap));
        std::memcpy(row + s, part, bytes);
    }
}

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

// The rows of a block that read the same places of a tile: `first` to `last` - 1, and the one that reads most.
struct Sharing {
    int first = 0, last = 0, most = 0;
    bool many() const { return last - first > 1; }
};

// Which rows from `row` on share their places from `tile` on with it, as far as they have any.
inline Sharing sharing(const Block& b, int row, int tile) {
    Sharing found{row, row + 1, row};
    for (; found.last < b.rows; found.last++) {
        const int own = std::min(TILE, b.lengths[found.last] - tile), most = std::min(TILE, b.lengths[found.most] - tile);
        if (own <= 0) break;
        const int32_t *path = b.paths + (size_t)found.last * b.longest, *other = b.paths + (size_t)found.most * b.longest;
        if (std::memcmp(path + tile, other + tile, sizeof(int32_t) * std::min(own, most))) break;
        if (own > most) found.most = found.last;
    }
    return found;
}

// Calls use(row, places, packed) for every tile of every row, tile by tile. Where rows share a tile, pack(places of the
// longest) has come before, and `packed` says so.
template <class Pack, class Use>
inline void over_tiles(const Block& b, int group, bool packs, Pack pack, Use use) {
    for (int tile = 0; tile < b.longest; tile += TILE) {
        Sharing shared;
        for (int r = 0; r < b.rows; r++) {
            const int last = std::min(tile + TILE, b.lengths[r]);
            if (tile >= last) continue;
            const auto places = [&](int row) {
                return Places{b.paths + (size_t)row * b.longest, tile, std::min(tile + TILE, b.lengths[row]), b.longest,
                              b.weights + (size_t)row * group * b.longest, b.lengths[row]};
            };
            if (packs && r >= shared.last) {
                shared = sharing(b, r, tile);
                if (shared.many()) pack(places(shared.most));
            }
            use(r, places(r), shared.many());
        }
    }
}

// Calls use(first head, how many, as a constant) for a KV head's query heads.
template <class Use>
inline void over_heads(int group, Use use) {
    int head = 0;
    for (; head + GROUP <= group; head += GROUP) use(head, std::integral_constant<int, GROUP>());
    if (group - head == 2) use(head, std::integral_constant<int, 2>());
    if (group - head == 1) use(head, std::integral_constant<int, 1>());
}

// All query heads of the cache's KV head.
template <class Cache>
inline void attend_block(const Heads& h, const Cache& cache, const Block& b) {
    const int group = h.heads / h.kv_heads;
    const bool packs = Cache::PACKS && b.rows > 1;
    typename Cache::Tile tile(packs ? cache.dim : 0);
    over_tiles(
        b, group, packs, [&](const Places& at) { cache.pack_keys(at, tile); },
        [&](int r, const Places& at, bool packed) {
            over_heads(group, [&](int head, auto count) {
                const float* query = b.query[r] + head * cache.dim;
                if (packed)
                    cache.template score<count>(query, at.of_head(head), tile);
                else
                    cache.template score<count>(query, at.of_head(head));
            });
        });
    for (int r = 0; r < b.rows; r++)
        for (int g = 0; g < group; g++) {
            float* scores = b.weights + ((size_t)r * group + g) * b.longest;
            if (h.cap > 0) cap_scores(scores, b.lengths[r], h.cap);
            softmax(scores, b.lengths[r]);
        }
    over_tiles(
        b, group, packs, [&](const Places& at) { cache.pack_values(at, tile); },
        [&](int r, const Places& at, bool packed) {
            over_heads(group, [&](int head, auto count) {
                float* out = b.out[r] + head * cache.dim;
                if (packed)
                    cache.template mix<count>(at.of_head(head), out, tile);
                else
                    cache.template mix<count>(at.of_head(head), out);
            });
        });
}

// A thread's buffers for blocks.
struct Blocks {
    std::vector<int32_t> paths;
    std::vector<int> lengths;
    std::vector<float> weights;
    Blocks(const Heads& h, int rows, int longest)
        : paths((size_t)std::min(rows, BLOCK) * longest),
          lengths(BLOCK),
          weights((size_t)std::min(rows, BLOCK) * longest * (h.heads / h.kv_heads)) {}
};

}  // namespace mapar
