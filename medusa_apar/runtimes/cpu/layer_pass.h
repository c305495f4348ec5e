// One layer of a decoder over the rows of a forest, and what it reads: weights, and where a step's rows lie. The structs
// are mirrored in `library.py`.
#pragma once

#include "attention.h"
#include "float_cache.h"
#include "product.h"
#include "step_cache.h"
#include "team.h"

namespace mapar {

// Norms are null where a family has none.
struct Layer {
    const float *attention_norm, *attention_out_norm, *mlp_norm, *mlp_out_norm;  // before and behind, [hidden]
    const float *query_norm, *key_norm;  // [head_dim], or of all heads at once
    Matrix qkv, output, gate_up, down;   // gate_up: panels of gate and up by turns
    Pool pool;
    int32_t window;                      // last positions of the path that are seen, 0: all
    int32_t aux_layer;                   // place of its output among the auxiliary ones, or -1
    int32_t boundary;                    // the same among those that are kept of all rows
    int32_t rotary;                      // which of the step's tables turns queries and keys, or -1
};

struct Model {
    int32_t layers, hidden, intermediate, vocabulary, table_kind;
    int32_t turned;         // of a head's dimensions, those that rotary embeddings turn
    int32_t whole_norms;    // whether query_norm and key_norm are of all heads at once
    int32_t gelu;           // the MLP's activation: 0 SiLU, 1 GELU
    Heads heads;
    float eps, embedding_scale, residual_scale;  // the second multiplies what attention and MLP add
    float logit_scale, logit_cap;                // of logits, then cap * tanh(logit / cap) unless that is 0
    const float* norm;
    const void* table;  // input embeddings [vocabulary][hidden], FLOAT32 or BFLOAT16
    const Layer* layer;
    Matrix unembedding;
};

constexpr int TABLES = 2;  // of rotary embeddings: local and global layers may have their own

// A row's path is three runs of `slot_lists`: the segment's cached path, its extend tokens, the draft node's ancestors.
struct Run {
    int32_t start, length;
};

struct Step {
    int32_t rows, verified, aux_layers, boundaries, longest;  // longest path
    const int64_t* tokens;                  // [rows]
    const float *cos[TABLES], *sin[TABLES]; // [positions][turned]
    const int64_t *positions, *slots;       // [rows]
    const int32_t* slot_lists;
    const Run* runs;               // [rows][3]
    const int64_t* verified_rows;  // [verified]
    float* hidden;                 // [verified][1 + aux_layers][hidden]: before the unembedding; then at unit scale
    float* states;                 // [rows][boundaries][hidden]: what some layers put out
    float* logits;                 // [verified][outputs]
    float* x;                      // scratch: [rows][hidden], the residual stream
    float *qkv, *wide;             // scratch: [rows][(heads + 2 kv_heads) * head_dim], [rows][max(all widths)]
    Quantised act;                 // scratch: rounded inputs, four bytes for each of [rows][padded widest input]
    double* seconds;               // per phase, added to; or null
};

enum Phase { NORM = 0, QKV, ATTENTION, OUTPUT, GATE_UP, DOWN, UNEMBED, PHASES };

inline void rotate(float* head, const float* cos, const float* sin, int turned) {
    const int half = turned / 2;
    for (int i = 0; i < half; i += LANES) {
        const vf low = load(head + i), high = load(head + half + i);
        store(head + i, low * load(cos + i) - high * load(sin + i));
        store(head + half + i, high * load(cos + half + i) + low * load(sin + half + i));
    }
}

// Writes a row's path and returns its length: its three runs, or the end of them that a window leaves.
inline int path_of(const Step& s, int row, int window, int32_t* path) {
    int length = 0;
    for (int i = 0; i < 3; i++) length += s.runs[3 * row + i].length;
    int skip = window && length > window ? length - window : 0;
    const int seen = length - skip;
    for (int i = 0; i < 3; i++) {
        const Run run = s.runs[3 * row + i];
        const int passed = std::min(skip, run.length);
        std::memcpy(path, s.slot_lists + run.start + passed, sizeof(int32_t) * (run.length - passed));
        path += run.length - passed;
        skip -= passed;
    }
    return seen;
}

// One thread's part of a layer. Buffers: `wide` holds normed rows, then attention's output, then the MLP's inner values;
// `qkv` the projections, then normed rows.
template <class Cache>
struct LayerPass {
    const Model& m;
    const Layer& layer;
    const Step& s;
    Blocks& blocks;
    Barrier& barrier;
    Clock& clock;
    int inputs = m.hidden;  // of queries, keys and values
    const Share rows = share(s.rows);
    const int dim = m.heads.head_dim, q_width = m.heads.heads * dim,
              width = q_width + 2 * m.heads.kv_heads * dim;

    void run() {
        normalise(layer.attention_norm, layer.qkv, s.wide);
        project();
        attend();
        finish();
    }

    // All that comes behind attention.
    void finish() {
        quantise_for(layer.output, s.wide, q_width);
        clock.end(ATTENTION);
        add_to_x(layer.output, layer.attention_out_norm, s.wide, q_width, OUTPUT);
        normalise(layer.mlp_norm, layer.gate_up, s.qkv);
        gate();
        quantise_for(layer.down, s.wide, m.intermediate);
        clock.end(GATE_UP);
        add_to_x(layer.down, layer.mlp_out_norm, s.wide, m.intermediate, DOWN);
    }

    void normalise(const float* weight, const Matrix& next, float* out) {
        for (int r = rows.first; r < rows.last; r++) {
            float* normed = out + (size_t)r * m.hidden;
            if (weight)
                rms_norm(s.x + (size_t)r * m.hidden, weight, m.hidden, m.eps, normed);
            else
                std::memcpy(normed, s.x + (size_t)r * m.hidden, sizeof(float) * m.hidden);
            prepare(next, normed, m.hidden, r, s.act);
        }
        barrier.wait();
        clock.end(NORM);
    }

    // A whole head at a time, so that it can be turned and put into the pool while it is in the cache.
    void project() {
        const Heads& h = m.heads;
        const Rows normed = rows_for(layer.qkv, s.wide, inputs, s.act);
        const Share heads = share(h.heads + 2 * h.kv_heads);
        for (int head = heads.first; head < heads.last; head++) {
            in_pairs(head * dim / PANEL, (head + 1) * dim / PANEL, [&](int index, auto count) {
                tiles<count>(layer.qkv, index, normed, s.rows, [&](int first, int size, auto& tile) {
                    for (int p = 0; p < count; p++)
                        for (int r = 0; r < size; r++)
                            std::memcpy(s.qkv + (size_t)(first + r) * width + (index + p) * PANEL, tile[p][r],
                                        sizeof tile[p][r]);
                });
            });
            if (!all_at_once()) place(head);
        }
        barrier.wait();
        if (all_at_once()) {
            for (int r = rows.first; r < rows.last; r++) {
                float *queries = s.qkv + (size_t)r * width, *keys = queries + q_width;
                rms_norm(queries, layer.query_norm, q_width, m.eps, queries);
                rms_norm(keys, layer.key_norm, h.kv_heads * dim, m.eps, keys);
            }
            barrier.wait();
            for (int head = heads.first; head < heads.last; head++) place(head);
            barrier.wait();
        }
        clock.end(QKV);
    }

    bool all_at_once() const { return layer.query_norm && m.whole_norms; }

    // Normalises and turns a head's rows, and puts keys and values into the pool.
    void place(int head) {
        const Heads& h = m.heads;
        const Cache cache(h, layer.pool, head < h.heads ? 0 : (head - h.heads) % h.kv_heads);
        const bool query = head < h.heads, key = !query && head < h.heads + h.kv_heads;
        const float* norm = m.whole_norms ? nullptr : query ? layer.query_norm : key ? layer.key_norm : nullptr;
        for (int r = 0; r < s.rows; r++) {
            float* here = s.qkv + (size_t)r * width + head * dim;
            if (norm) rms_norm(here, norm, dim, m.eps, here);
            if ((query || key) && layer.rotary >= 0) {
                const int64_t turn = s.positions[r] * m.turned;
                rotate(here, s.cos[layer.rotary] + turn, s.sin[layer.rotary] + turn, m.turned);
            }
            if (query)
                cache.ready_query(here);
            else if (key)
                cache.keep_key(s.slots[r], here);
            else
                cache.keep_value(s.slots[r], here);
        }
    }

    // Tasks are (KV head, row), a head's rows together; a thread's part of them goes in blocks.
    void attend() {
        const Heads& h = m.heads;
        const Share tasks = share(s.rows * h.kv_heads);
        for (int task = tasks.first; task < tasks.last;) {
            const int kv = task / s.rows, first = task % s.rows;
            const int count = std::min({BLOCK, s.rows - first, tasks.last - task});
            const int offset = kv * (h.heads / h.kv_heads) * dim;
            Block block{count, s.longest, blocks.paths.data(), blocks.lengths.data(), blocks.weights.data(), {}, {}};
            for (int i = 0; i < count; i++) {
                blocks.lengths[i] = path_of(s, first + i, layer.window, blocks.paths.data() + (size_t)i * s.longest);
                block.query[i] = s.qkv + (size_t)(first + i) * width + offset;
                block.out[i] = s.wide + (size_t)(first + i) * q_width + offset;
            }
            attend_block(h, Cache(h, layer.pool, kv), block);
            task += count;
        }
        barrier.wait();
    }

    void gate() {
        const Rows normed = rows_for(layer.gate_up, s.qkv, m.hidden, s.act);
        const Share pairs = share(layer.gate_up.outputs / PANEL / 2);
        for (int p = pairs.first; p < pairs.last; p++)
            tiles<2>(layer.gate_up, 2 * p, normed, s.rows, [&](int first, int count, auto& tile) {
                for (int r = 0; r < count; r++)
                    for (int i = 0; i < PANEL; i += LANES) {
                        const vf gate = load(tile[0][r] + i), up = load(tile[1][r] + i);
                        store(s.wide + (size_t)(first + r) * m.intermediate + p * PANEL + i,
                              (m.gelu ? gelu(gate) : silu(gate)) * up);
                    }
            });
        barrier.wait();
    }

    void quantise_for(const Matrix& next, const float* x, int count) {
        if (next.kind == FLOAT32) return;
        for (int r = rows.first; r < rows.last; r++) prepare(next, x + (size_t)r * count, count, r, s.act);
        barrier.wait();
    }

    // Adds a product to the residual stream; where a norm comes between, the product waits in `qkv`.
    void add_to_x(const Matrix& matrix, const float* norm, const float* input, int stride, Phase phase) {
        const Rows prepared = rows_for(matrix, input, stride, s.act);
        const Share panels = share(matrix.outputs / PANEL);
        in_pairs(panels.first, panels.last, [&](int index, auto count) {
            tiles<count>(matrix, index, prepared, s.rows, [&](int first, int size, auto& tile) {
                for (int p = 0; p < count; p++)
                    for (int r = 0; r < size; r++) {
                        const size_t place = (size_t)(first + r) * m.hidden + (index + p) * PANEL;
                        for (int i = 0; i < PANEL; i += LANES) {
                            const vf made = load(tile[p][r] + i);
                            if (norm)
                                store(s.qkv + place + i, made);
                            else
                                store(s.x + place + i, fused(made, splat(m.residual_scale), load(s.x + place + i)));
                        }
                    }
            });
        });
        barrier.wait();
        if (norm) {
            for (int r = rows.first; r < rows.last; r++) {
                float *x = s.x + (size_t)r * m.hidden, *made = s.qkv + (size_t)r * m.hidden;
                rms_norm(made, norm, m.hidden, m.eps, made);
                for (int i = 0; i < m.hidden; i += LANES)
                    store(x + i, fused(load(made + i), splat(m.residual_scale), load(x + i)));
            }
            barrier.wait();
        }
        clock.end(phase);
    }
};

// Scales and caps those logits that this thread has made.
inline void finish_logits(const Model& m, const Step& s, int outputs) {
    const Share panels = share(m.unembedding.outputs / PANEL);
    const int first = panels.first * PANEL, last = std::min(panels.last * PANEL, outputs);
    for (int r = 0; r < s.verified; r++) {
        float* row = s.logits + (size_t)r * outputs;
        for (int i = first; i < last; i += LANES) {
            float part[LANES] = {};
            const size_t bytes = sizeof(float) * std::min(LANES, last - i);
            std::memcpy(part, row + i, bytes);
            const vf scaled = load(part) * m.logit_scale;
            store(part, m.logit_cap > 0 ? capped(scaled, m.logit_cap) : scaled);
            std::memcpy(row + i, part, bytes);
        }
    }
}

}  // namespace mapar
