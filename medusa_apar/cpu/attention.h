// Attention of one forest row's query heads over its path, read slot by slot from the KV pool.
//
// A row walks its own path in path order, so its bits depend on the path alone: not on which slots it lies in, on the
// other rows, or on what was drafted and rejected. Queries that share a KV head are taken together.
#pragma once

#include <vector>

#include "matrix.h"

namespace mapar {

constexpr int GROUP = 3;  // query heads read K and V once for so many
constexpr int KEYS = 4;   // what `sum4` sums
constexpr int DIMS = 32;  // of a value, summed in registers

struct Heads {
    int32_t heads, kv_heads, head_dim;
    float scale;
};

// Scores of G queries with one key each of KEYS slots. The sum across lanes is `sum`'s, whatever the slot's place.
template <int G>
inline void dots(const float* q, int stride, const float* const* keys, int dim, float (*out)[KEYS]) {
    vf sums[G][KEYS] = {};
    for (int d = 0; d < dim; d += LANES) {
        vf key[KEYS];
        for (int k = 0; k < KEYS; k++) key[k] = load(keys[k] + d);
        for (int g = 0; g < G; g++) {
            const vf query = load(q + g * stride + d);
            for (int k = 0; k < KEYS; k++) sums[g][k] += query * key[k];
        }
    }
    for (int g = 0; g < G; g++) sum4(sums[g], out[g]);
}

template <int G>
inline void attend(const Heads& h, const float* q, const float* keys, const float* values, const int32_t* path,
                   int length, std::vector<float>& scores, float* out) {
    const int dim = h.head_dim;
    const size_t slot = (size_t)h.kv_heads * dim;
    const int padded = (length + LANES - 1) / LANES * LANES;
    if (scores.size() < (size_t)G * padded) scores.resize((size_t)G * padded);
    for (int s = 0; s < length; s += KEYS) {
        const float* key[KEYS];
        float dot[G][KEYS];
        for (int k = 0; k < KEYS; k++) key[k] = keys + path[std::min(s + k, length - 1)] * slot;
        dots<G>(q, dim, key, dim, dot);
        for (int g = 0; g < G; g++)
            for (int k = 0; k < KEYS && s + k < length; k++) scores[g * padded + s + k] = dot[g][k] * h.scale;
    }
    float total[G];
    for (int g = 0; g < G; g++) {
        float* row = scores.data() + g * padded;
        for (int s = length; s < padded; s++) row[s] = -INFINITY;
        vf peak = splat(-INFINITY), weights = {};
        for (int s = 0; s < padded; s += LANES) peak = larger(peak, load(row + s));
        const vf top = splat(largest(peak));
        for (int s = 0; s < padded; s += LANES) {
            const vf weight = exp(load(row + s) - top);
            store(row + s, weight);
            if (s + LANES <= length) weights += weight;
        }
        total[g] = sum(weights);
        for (int s = length / LANES * LANES; s < length; s++) total[g] += row[s];
    }
    constexpr int VECTORS = DIMS / LANES;
    for (int d = 0; d < dim; d += DIMS) {
        vf sums[G][VECTORS] = {};
        for (int s = 0; s < length; s++) {
            const float* value = values + path[s] * slot + d;
            for (int v = 0; v < VECTORS; v++) {
                const vf part = load(value + v * LANES);
                for (int g = 0; g < G; g++) sums[g][v] += part * scores[g * padded + s];
            }
        }
        for (int g = 0; g < G; g++)
            for (int v = 0; v < VECTORS; v++)
                store(out + g * dim + d + v * LANES, sums[g][v] / splat(total[g]));
    }
}

// q and out [group][head_dim] of one KV head; keys and values point at that head of slot 0.
inline void attend_group(const Heads& h, const float* q, const float* keys, const float* values, const int32_t* path,
                         int length, std::vector<float>& scores, float* out) {
    int group = h.heads / h.kv_heads;
    for (; group >= GROUP; group -= GROUP, q += GROUP * h.head_dim, out += GROUP * h.head_dim)
        attend<GROUP>(h, q, keys, values, path, length, scores, out);
    if (group == 2) attend<2>(h, q, keys, values, path, length, scores, out);
    if (group == 1) attend<1>(h, q, keys, values, path, length, scores, out);
}

}  // namespace mapar
