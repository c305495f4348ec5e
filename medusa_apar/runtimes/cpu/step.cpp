// One forward pass of a decoder over a forest, in one parallel region: what eager transformers does in some
// thousand operators. Called through ctypes by `runtime.py`, which owns all memory; the structs are mirrored there.
#include "choose.h"
#include "crowd.h"
#include "weight_fingerprint.h"
#include "float_cache.h"
#include "hydra.h"
#include "pack.h"
#include "product.h"
#include "step_cache.h"
#include "team.h"
#include "top.h"

#include <cfloat>

using namespace mapar;

#define EXPORTED __attribute__((visibility("default")))

extern "C" {

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

// How many doubles `Step.seconds` has.
EXPORTED int mapar_phases() { return PHASES; }
// Bytes of a struct, so that its mirror can be compared.
EXPORTED int mapar_sizes(int which) {
    const int sizes[] = {sizeof(Matrix), sizeof(Layer), sizeof(Model), sizeof(Step),
                         sizeof(Hydra),  sizeof(Tree),  sizeof(Span),
                         sizeof(Operation), sizeof(Recipe), sizeof(Choice), sizeof(Choices)};
    return sizes[which];
}
}

namespace {

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
    const Share rows = share(s.rows);
    const int dim = m.heads.head_dim, q_width = m.heads.heads * dim,
              width = q_width + 2 * m.heads.kv_heads * dim;

    void run() {
        normalise(layer.attention_norm, layer.qkv, s.wide);
        project();
        attend();
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
        const Rows normed = rows_for(layer.qkv, s.wide, m.hidden, s.act);
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

}  // namespace

extern "C" {

// Returns 0, or 1 where a token is none of the vocabulary and nothing was done.
EXPORTED int mapar_step(const Model* model, const Step* step, int threads, int outputs) {
    const Model& m = *model;
    const Step& s = *step;
    for (int r = 0; r < s.rows; r++)
        if (s.tokens[r] < 0 || s.tokens[r] >= m.vocabulary) return 1;
    Barrier barrier;
    Watch watch(threads);
#pragma omp parallel num_threads(watch.team)
    {
        watch.began();
        Clock clock{s.seconds};
        Blocks blocks(m.heads, s.rows, s.longest);
        const Share rows = share(s.rows), verified = share(s.verified);
        for (int r = rows.first; r < rows.last; r++)  // each thread those that it normalises first
            for (int i = 0; i < m.hidden; i += LANES)
                store(s.x + (size_t)r * m.hidden + i,
                      embedded(m.table, m.table_kind, s.tokens[r] * m.hidden + i) * m.embedding_scale);
        const int width = (1 + s.aux_layers) * m.hidden;
        for (int l = 0; l < m.layers; l++) {
            if (m.layer[l].pool.scales)
                LayerPass<StepCache>{m, m.layer[l], s, blocks, barrier, clock}.run();
            else
                LayerPass<FloatCache>{m, m.layer[l], s, blocks, barrier, clock}.run();
            if (m.layer[l].aux_layer >= 0)
                for (int r = verified.first; r < verified.last; r++)
                    unit_norm(s.x + s.verified_rows[r] * m.hidden, m.hidden, FLT_EPSILON,
                              s.hidden + (size_t)r * width + (1 + m.layer[l].aux_layer) * m.hidden);
            if (m.layer[l].boundary >= 0)
                for (int r = rows.first; r < rows.last; r++)
                    std::memcpy(s.states + ((size_t)r * s.boundaries + m.layer[l].boundary) * m.hidden,
                                s.x + (size_t)r * m.hidden, m.hidden * sizeof(float));
        }
        for (int r = verified.first; r < verified.last; r++) {
            float* out = s.hidden + (size_t)r * width;
            rms_norm(s.x + s.verified_rows[r] * m.hidden, m.norm, m.hidden, m.eps, out);
            prepare(m.unembedding, out, m.hidden, r, s.act);
        }
        barrier.wait();
        clock.end(NORM);
        multiply(m.unembedding, rows_for(m.unembedding, s.hidden, width, s.act), s.verified, s.logits,
                 outputs, outputs);
        if (m.logit_scale != 1 || m.logit_cap > 0) finish_logits(m, s, outputs);
        barrier.wait();
        clock.end(UNEMBED);
        watch.ended();
    }
    return 0;
}

// y = x W^T + b for one matrix: x [rows][width], y [rows][outputs]; steps and groups are scratch as in Step.
EXPORTED void mapar_linear(const Matrix* matrix, const float* x, int rows, int width, float* y, int outputs,
                           int8_t* steps, Group* groups, int threads) {
    const Matrix& m = *matrix;
    const Quantised act{steps, groups};
    Barrier barrier;
#pragma omp parallel num_threads(crowd().team_of(threads))
    {
        const Share mine = share(rows);
        for (int r = mine.first; r < mine.last; r++) prepare(m, x + (size_t)r * width, width, r, act);
        barrier.wait();
        multiply(m, rows_for(m, x, width, act), rows, y, outputs, outputs);
    }
}

// The `count` largest of each row, as of `top`: indices and values [rows][count]; and the logarithm of the sum of all
// exponentials, [rows], unless that is null. places: of the rows among x, null for the first ones.
EXPORTED void mapar_top(const float* x, const int64_t* places, int rows, int width, int count, int64_t* indices,
                        float* values, double* sums, int threads) {
// Never fewer than before but one: OpenMP would end the surplus threads and make them anew at the next step.
#pragma omp parallel num_threads(rows > 1 ? crowd().team_of(threads) : 1)
    {
        const Share mine = share(rows);
        for (int r = mine.first; r < mine.last; r++) {
            const float* row = x + (size_t)(places ? places[r] : r) * width;
            top(row, width, count, indices + (size_t)r * count, values + (size_t)r * count);
            if (sums) sums[r] = log_sum(row, width, values[(size_t)r * count]);
        }
    }
}

// Writes the token that each row of `choices` chooses.
EXPORTED void mapar_choose(const Choices* choices, int threads) {
#pragma omp parallel num_threads(choices->count > 1 ? crowd().team_of(threads) : 1)
    choose(*choices);
}

// Tokens and their log-probabilities for the nodes of `tree` below each of `roots`: ids and log_probs [roots][nodes].
// Returns 0, or 1 where a root is none of the base's tokens and nothing was done.
EXPORTED int mapar_hydra(const Hydra* heads, const Tree* tree, const float* states, const int64_t* roots, int count,
                         float least, int64_t* ids, float* log_probs, int threads) {
    for (int t = 0; t < count; t++)
        if (roots[t] < 0 || roots[t] >= heads->tokens) return 1;
    propose(*heads, *tree, states, roots, count, least, ids, log_probs, crowd().team_of(threads));
    return 0;
}

// Lays weights [outputs][inputs] out as int8 steps and their scales; kind: FLOAT32 or BFLOAT16.
EXPORTED void mapar_pack_int8(const void* weights, int kind, int outputs, int inputs, int8_t* panels, float* scales,
                              int threads) {
#pragma omp parallel num_threads(crowd().team_of(threads))
    if (kind == BFLOAT16)
        pack_int8_panels((const uint16_t*)weights, outputs, inputs, panels, scales);
    else
        pack_int8_panels((const float*)weights, outputs, inputs, panels, scales);
}

// Adds to sums[count][TURNS] those of `weight_fingerprint.h`, of one turn or, with -1, of all.
EXPORTED void mapar_sums(const Span* spans, int count, int turn, uint64_t* sums, int threads) {
#pragma omp parallel num_threads(crowd().team_of(threads))
    for (int i = 0; i < count; i++) add_sums(spans[i], turn, sums + (size_t)i * TURNS);
}
}
