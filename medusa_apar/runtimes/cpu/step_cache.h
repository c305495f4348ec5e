// One KV head of a pool that keeps keys and values as int16 steps, with a scale per slot: half the bytes to read, and two
// products a lane.
//
// Whatever is summed up has so few steps that it stays in int32: keys and queries 5792 where a head has 64 dimensions,
// values and softmax weights 5792, TILE places at a time. Sums are exact, so all the error is a rounding to half a step of
// a key, a query, a value or the weights of a tile, each in units of its own largest.
#pragma once

#include "attention.h"
#include "panel16.h"

namespace mapar {

struct StepCache {
    int dim;
    float scale;
    size_t slot, scales_slot;  // elements from one slot to the next
    int16_t *keys, *values;
    float *key_scales, *value_scales;

    StepCache(const Heads& h, const Pool& pool, int kv)
        : dim(h.head_dim),
          scale(h.scale),
          slot((size_t)h.kv_heads * h.head_dim),
          scales_slot((size_t)h.kv_heads * 2),
          keys((int16_t*)pool.keys + kv * h.head_dim),
          values((int16_t*)pool.values + kv * h.head_dim),
          key_scales(pool.scales + 2 * kv),
          value_scales(pool.scales + 2 * kv + 1) {}

    void keep_key(int64_t where, const float* key) const {
        key_scales[where * scales_slot] = quantise(key, dim, dim, keys + where * slot, most_steps(dim));
    }
    void keep_value(int64_t where, const float* value) const {
        value_scales[where * scales_slot] = quantise(value, dim, dim, values + where * slot, most_steps(TILE));
    }
    // The steps take the first half of the floats' place, and their scale comes behind them.
    void ready_query(float* query) const {
        query[dim / 2] = scale * quantise(query, dim, dim, (int16_t*)query, most_steps(dim));
    }

    template <int G>
    void score(const float* query, const Places& at) const {
        for (int s = at.first; s < at.last; s += KEYS) {
            at.fetch(keys, slot, dim, s, KEYS);
            at.fetch(key_scales, scales_slot, 2, s, KEYS);  // and the values'
            const int16_t* key[KEYS];
            vf4 scales;
            for (int k = 0; k < KEYS; k++) {
                const int32_t where = at.path[std::min(s + k, at.last - 1)];
                key[k] = keys + where * slot;
                scales[k] = key_scales[where * scales_slot];
            }
            vi sums[G][KEYS] = {};
            for (int d = 0; d < dim; d += WIDE)
#pragma GCC unroll 4
                for (int k = 0; k < KEYS; k++)
#pragma GCC unroll 3
                    for (int g = 0; g < G; g++) add_dot(sums[g][k], key[k] + d, (const int16_t*)(query + g * dim) + d);
#pragma GCC unroll 3
            for (int g = 0; g < G; g++) {
                const vf4 scores = __builtin_convertvector(sum4(sums[g]), vf4) * scales * query[g * dim + dim / 2];
                float* out = at.weights + g * at.longest + s;
                if (s + KEYS <= at.last)
                    std::memcpy(out, &scores, sizeof scores);
                else
                    for (int k = 0; s + k < at.last; k++) out[k] = scores[k];
            }
        }
    }

    // The weights of one tile, times their values' scales, as steps [G][TILE], and each head's step into `scales`.
    template <int G>
    void ready_weights(const Places& at, const float* own, int16_t (*steps)[TILE], float* scales) const {
        const int count = at.last - at.first;
        for (int g = 0; g < G; g++) {
            float* weights = at.weights + g * at.longest + at.first;
            for (int s = 0; s < count; s++) weights[s] *= own[s];
            scales[g] = quantise(weights, count, (count + 1) / 2 * 2, steps[g], most_steps(TILE));
        }
    }

    // `at` is one tile.
    template <int G>
    void mix(const Places& at, float* out) const {
        const int count = at.last - at.first;
        const int32_t* path = at.path + at.first;
        alignas(64) int16_t steps[G][TILE];
        float scales[G], own[TILE];
        for (int s = 0; s < count; s++) own[s] = value_scales[path[s] * scales_slot];
        ready_weights<G>(at, own, steps, scales);
        constexpr int VECTORS = DIMS / WIDE;
        for (int d = 0; d < dim; d += DIMS) {
            WovenSums sums[G][VECTORS] = {};
            for (int s = 0; s < count; s += 2) {
                if (!d) at.fetch(values, slot, dim, at.first + s, 2);
                const int16_t* one = values + path[s] * slot + d;
                const int16_t* other = values + path[std::min(s + 1, count - 1)] * slot + d;
#pragma GCC unroll 4
                for (int v = 0; v < VECTORS; v++) {
                    const Woven pair = weave(one + v * WIDE, other + v * WIDE);
#pragma GCC unroll 3
                    for (int g = 0; g < G; g++) {
                        int32_t weights;
                        std::memcpy(&weights, steps[g] + s, sizeof weights);
                        add_products(sums[g][v], pair, weights);
                    }
                }
            }
            for (int g = 0; g < G; g++)
                for (int v = 0; v < VECTORS; v++) {
                    const WovenSums whole = in_order(sums[g][v]);
                    const vi halves[2] = {whole.low, whole.high};
                    for (int i = 0; i < 2; i++) {
                        float* place = out + g * dim + d + v * WIDE + i * LANES;
                        const vf before = at.first ? load(place) : vf{};
                        store(place, fused(__builtin_convertvector(halves[i], vf), splat(scales[g]), before));
                    }
                }
        }
    }

    // A tile that several rows share: one panel of its keys, or one of each 64 dimensions of its values.
    static constexpr bool PACKS = true;
    struct Tile {
        std::vector<int16_t> panels;
        float scales[TILE];
        explicit Tile(int dim) : panels((size_t)std::max((dim + WIDTH - 1) / WIDTH * TILE, dim) * WIDTH) {}
    };

    void pack_keys(const Places& at, Tile& tile) const {
        const int16_t* rows[TILE];
        const int count = read(at, keys, key_scales, rows, tile);
        pack_columns(rows, count, dim, tile.panels.data());
    }
    void pack_values(const Places& at, Tile& tile) const {
        const int16_t* rows[TILE];
        const int count = read(at, values, value_scales, rows, tile);
        for (int d = 0; d < dim; d += WIDTH) {
            pack_pairs(rows, count, std::min(WIDTH, dim - d), tile.panels.data() + (size_t)d * TILE);
            for (int s = 0; s < count; s++) rows[s] += WIDTH;
        }
    }

    template <int G>
    void score(const float* query, const Places& at, const Tile& tile) const {
        const int16_t* rows[G];
        for (int g = 0; g < G; g++) rows[g] = (const int16_t*)(query + g * dim);
        const int count = at.last - at.first;
        panel_products<G>(tile.panels.data(), rows, dim, count, [&](int g, int first, const vi& sums) {
            const vf scores = __builtin_convertvector(sums, vf) * load(tile.scales + first) * query[g * dim + dim / 2];
            float* out = at.weights + g * at.longest + at.first + first;
            if (first + LANES <= count)
                store(out, scores);
            else
                std::memcpy(out, &scores, sizeof(float) * (count - first));
        });
    }

    template <int G>
    void mix(const Places& at, float* out, const Tile& tile) const {
        alignas(64) int16_t steps[G][TILE];
        const int16_t* rows[G];
        float scales[G];
        for (int g = 0; g < G; g++) rows[g] = steps[g];
        ready_weights<G>(at, tile.scales, steps, scales);
        const int depth = (at.last - at.first + 1) / 2 * 2;
        for (int d = 0; d < dim; d += WIDTH)
            panel_products<G>(tile.panels.data() + (size_t)d * TILE, rows, depth, std::min(WIDTH, dim - d),
                              [&](int g, int first, const vi& sums) {
                                  float* place = out + g * dim + d + first;
                                  const vf before = at.first ? load(place) : vf{};
                                  store(place, fused(__builtin_convertvector(sums, vf), splat(scales[g]), before));
                              });
    }

   private:
    // Where a tile's slots are, and their scales.
    int read(const Places& at, const int16_t* data, const float* own, const int16_t** rows, Tile& tile) const {
        const int count = at.last - at.first;
        for (int s = 0; s < count; s++) {
            at.fetch(data, slot, dim, at.first + s, 1);
            rows[s] = data + at.path[at.first + s] * slot;
            tile.scales[s] = own[at.path[at.first + s] * scales_slot];
        }
        return count;
    }
};

}  // namespace mapar
