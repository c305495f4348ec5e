// One KV head of a pool that keeps keys and values as they are, in float32.
#pragma once

#include "attention.h"

namespace mapar {

struct FloatCache {
    static constexpr bool PACKS = false;
    struct Tile {
        explicit Tile(int) {}
    };
    int dim;
    float scale;
    size_t slot;  // floats from one slot to the next
    float *keys, *values;

    FloatCache(const Heads& h, const Pool& pool, int kv)
        : dim(h.head_dim),
          scale(h.scale),
          slot((size_t)h.kv_heads * h.head_dim),
          keys((float*)pool.keys + kv * h.head_dim),
          values((float*)pool.values + kv * h.head_dim) {}

    void keep_key(int64_t where, const float* key) const { std::memcpy(keys + where * slot, key, sizeof(float) * dim); }
    void keep_value(int64_t where, const float* value) const {
        std::memcpy(values + where * slot, value, sizeof(float) * dim);
    }
    void ready_query(float*) const {}
    void pack_keys(const Places&, Tile&) const {}
    void pack_values(const Places&, Tile&) const {}
    template <int G>
    void score(const float*, const Places&, const Tile&) const {}
    template <int G>
    void mix(const Places&, float*, const Tile&) const {}

    template <int G>
    void score(const float* query, const Places& at) const {
        for (int s = at.first; s < at.last; s += KEYS) {
            at.fetch(keys, slot, dim, s, KEYS);
            const float* key[KEYS];
            float dot[G][KEYS];
            for (int k = 0; k < KEYS; k++) key[k] = keys + at.path[std::min(s + k, at.last - 1)] * slot;
            dots<G>(query, key, dot);
            for (int g = 0; g < G; g++)
                for (int k = 0; k < KEYS && s + k < at.last; k++)
                    at.weights[g * at.longest + s + k] = dot[g][k] * scale;
        }
    }

    template <int G>
    void mix(const Places& at, float* out) const {
        constexpr int VECTORS = DIMS / LANES;
        for (int d = 0; d < dim; d += DIMS) {
            vf sums[G][VECTORS];
            for (int g = 0; g < G; g++)
                for (int v = 0; v < VECTORS; v++) sums[g][v] = at.first ? load(out + g * dim + d + v * LANES) : vf{};
            for (int s = at.first; s < at.last; s++) {
                if (!d) at.fetch(values, slot, dim, s, 1);
                const float* value = values + at.path[s] * slot + d;
                vf part[VECTORS];
                for (int v = 0; v < VECTORS; v++) part[v] = load(value + v * LANES);
                for (int g = 0; g < G; g++)
                    for (int v = 0; v < VECTORS; v++) sums[g][v] += part[v] * at.weights[g * at.longest + s];
            }
            for (int g = 0; g < G; g++)
                for (int v = 0; v < VECTORS; v++) store(out + g * dim + d + v * LANES, sums[g][v]);
        }
    }

   private:
    template <int G>
    void dots(const float* query, const float* const* key, float (*out)[KEYS]) const {
        vf sums[G][KEYS] = {};
        for (int d = 0; d < dim; d += LANES) {
            vf part[KEYS];
            for (int k = 0; k < KEYS; k++) part[k] = load(key[k] + d);
            for (int g = 0; g < G; g++) {
                const vf q = load(query + g * dim + d);
                for (int k = 0; k < KEYS; k++) sums[g][k] += q * part[k];
            }
        }
        for (int g = 0; g < G; g++) sum4(sums[g], out[g]);
    }
};

}  // namespace mapar
