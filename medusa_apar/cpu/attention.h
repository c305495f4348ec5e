// Attention of forest rows over their paths, read slot by slot from the KV pool.
//
// A row walks its own path in path order, so its bits depend on the path alone: not on which slots it lies in, on the
// other rows, or on what was drafted and rejected. Rows go over the path in step, TILE places at a time: they share
// their beginnings, so what one row has read is in the first-level cache for the others. Queries that share a KV head
// are taken together.
#pragma once

#include <vector>

#include "matrix.h"

namespace mapar {

constexpr int GROUP = 3;   // query heads taken together: with more, the sums would leave the registers
constexpr int KEYS = 4;    // what `sum4` sums
constexpr int DIMS = 32;   // of a value, summed in registers
constexpr int TILE = 64;   // places of a path: 16 KB of keys
constexpr int BLOCK = 32;  // rows that go in step

struct Heads {
    int32_t heads, kv_heads, head_dim;
    float scale;
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

// Scores of G queries with KEYS keys.
template <int G>
inline void dots(const float* q, const float* const* keys, int dim, float (*out)[KEYS]) {
    vf sums[G][KEYS] = {};
    for (int d = 0; d < dim; d += LANES) {
        vf key[KEYS];
        for (int k = 0; k < KEYS; k++) key[k] = load(keys[k] + d);
        for (int g = 0; g < G; g++) {
            const vf query = load(q + g * dim + d);
            for (int k = 0; k < KEYS; k++) sums[g][k] += query * key[k];
        }
    }
    for (int g = 0; g < G; g++) sum4(sums[g], out[g]);
}

template <int G>
void score(const Heads& h, const float* q, const float* keys, const int32_t* path, int first, int last, int longest,
           float* weights) {
    const size_t slot = (size_t)h.kv_heads * h.head_dim;
    for (int s = first; s < last; s += KEYS) {
        const float* key[KEYS];
        float dot[G][KEYS];
        for (int k = 0; k < KEYS; k++) key[k] = keys + path[std::min(s + k, last - 1)] * slot;
        dots<G>(q, key, h.head_dim, dot);
        for (int g = 0; g < G; g++)
            for (int k = 0; k < KEYS && s + k < last; k++) weights[g * longest + s + k] = dot[g][k] * h.scale;
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

template <int G>
void mix(const Heads& h, const float* values, const int32_t* path, int first, int last, int longest,
         const float* weights, float* out) {
    constexpr int VECTORS = DIMS / LANES;
    const size_t slot = (size_t)h.kv_heads * h.head_dim;
    for (int d = 0; d < h.head_dim; d += DIMS) {
        vf sums[G][VECTORS];
        for (int g = 0; g < G; g++)
            for (int v = 0; v < VECTORS; v++)
                sums[g][v] = first ? load(out + g * h.head_dim + d + v * LANES) : vf{};
        for (int s = first; s < last; s++) {
            const float* value = values + path[s] * slot + d;
            vf part[VECTORS];
            for (int v = 0; v < VECTORS; v++) part[v] = load(value + v * LANES);
            for (int g = 0; g < G; g++)
                for (int v = 0; v < VECTORS; v++) sums[g][v] += part[v] * weights[g * longest + s];
        }
        for (int g = 0; g < G; g++)
            for (int v = 0; v < VECTORS; v++) store(out + g * h.head_dim + d + v * LANES, sums[g][v]);
    }
}

template <int G>
inline void attend(const Heads& h, const Block& b, const float* keys, const float* values, int head) {
    const int offset = head * h.head_dim, places = b.longest;
    auto tiles_of_rows = [&](auto use) {
        for (int tile = 0; tile < places; tile += TILE)
            for (int r = 0; r < b.rows; r++)
                if (const int last = std::min(tile + TILE, b.lengths[r]); tile < last)
                    use(r, tile, last, b.paths + (size_t)r * places, b.weights + (size_t)r * GROUP * places);
    };
    tiles_of_rows([&](int r, int first, int last, const int32_t* path, float* weights) {
        score<G>(h, b.query[r] + offset, keys, path, first, last, places, weights);
    });
    for (int r = 0; r < b.rows; r++)
        for (int g = 0; g < G; g++) softmax(b.weights + ((size_t)r * GROUP + g) * places, b.lengths[r]);
    tiles_of_rows([&](int r, int first, int last, const int32_t* path, const float* weights) {
        mix<G>(h, values, path, first, last, places, weights, b.out[r] + offset);
    });
}

// All query heads of one KV head; keys and values point at that head of slot 0.
inline void attend_block(const Heads& h, const Block& b, const float* keys, const float* values) {
    const int group = h.heads / h.kv_heads, rest = group % GROUP;
    int head = 0;
    for (; head + GROUP <= group; head += GROUP) attend<GROUP>(h, b, keys, values, head);
    if (rest == 2) attend<2>(h, b, keys, values, head);
    if (rest == 1) attend<1>(h, b, keys, values, head);
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
