// Drafting with an EAGLE-3 drafter (arXiv 2503.01840), level by level down a tree.
//
// A level is a small forest of the drafter's layers. Its rows attend to what their thread has written, whose keys and
// values the engine's steps have left in the KV pool, and to the drafted rows above them, whose own lie in a pool of this
// draft alone, so that nothing of a draft is left behind. `heads/eagle3/drafter.py` says the same in torch.
#pragma once

#include "descent.h"
#include "layer_pass.h"

namespace mapar {

struct Eagle3 {
    Model model;               // its layers and sizes, all of them multiples of a vector; the table is the embedding
    const float* hidden_norm;  // of features, [hidden]
    const int64_t* token_map;  // draft vocabulary -> vocabulary, or null
    int32_t vocabulary;        // of the draft
    int32_t norm_before_residual, norm_output;
    int32_t states, target;                 // how many of the base's states are fused, and how wide each is
    Matrix fc;                              // [hidden][states * target]; without panels the one state is the feature
    const float *input_norm, *state_norms;  // of all of them at once, or of each; or null
};

// Rows that a step has run, which are to be drafted behind.
struct NewRows {
    int32_t rows;
    const float* states;                                   // [rows][states * target], the base's
    const int64_t *tokens, *positions, *slots, *parents;   // [rows]; parents: slots of the tokens before, or -1
    float* features;                                       // the KV pool's, [capacity][hidden]
    Pool pool;                                             // of the only layer
    const float *cos, *sin;                                // [positions][turned]
};

// What the threads of a draft have written.
struct Written {
    const int32_t *slots, *starts;  // of their paths without the first tokens, one path after the other; [roots + 1]
    const Pool* pools;              // [layers], float32
    const float* features;          // [roots][hidden], of the last token of each
    const float *cos, *sin;         // [positions][turned]
};

// What the threads of the region share.
struct Eagle3Draft {
    const Eagle3& e;
    const Written& written;
    Descent& down;
    int longest, row_width;               // of paths, drafted rows included; of a row's keys, and of its values
    std::vector<float> features, next, hidden, logits, x, qkv, wide, keys, values;
    std::vector<int8_t> steps;
    std::vector<Group> groups;
    std::vector<int64_t> positions, places;  // of a level's rows; place: among all drafted rows
    std::vector<int32_t> above, root;        // of each drafted row: the one above it or -1, and its root
    std::vector<Pool> pools;                 // [layers], of drafted rows
    int first = 0;                           // drafted row with which the level begins

    Eagle3Draft(const Eagle3& e, const Written& written, Descent& down) : e(e), written(written), down(down) {
        const Model& m = e.model;
        const Tree& tree = down.tree;
        const size_t most = down.most, H = m.hidden;
        size_t all = down.roots;
        for (int l = 0; l < tree.levels; l++) all += (size_t)down.roots * tree.inner_sizes[l];
        longest = tree.levels;
        for (int t = 0; t < down.roots; t++) longest = std::max(longest, path_length(t) + tree.levels);
        const size_t q_width = (size_t)m.heads.heads * m.heads.head_dim;
        row_width = m.heads.kv_heads * m.heads.head_dim;
        const size_t widest = std::max({2 * H, q_width, (size_t)m.intermediate});
        features.resize(most * H), next.resize(most * H), hidden.resize(most * H), x.resize(most * H);
        logits.resize(most * e.vocabulary);
        qkv.resize(most * std::max(q_width + 2 * row_width, H)), wide.resize(most * widest);
        const size_t padded = widest / GROUP_INPUTS + 1;
        steps.resize(most * padded * GROUP_INPUTS * sizeof(float)), groups.resize(most * padded);
        keys.resize(m.layers * all * row_width), values.resize(m.layers * all * row_width);
        positions.resize(most), places.resize(most), above.resize(all), root.resize(all);
        for (int l = 0; l < m.layers; l++)
            pools.push_back({keys.data() + l * all * row_width, values.data() + l * all * row_width, nullptr});
        std::copy(written.features, written.features + down.roots * H, features.begin());
        for (int t = 0; t < down.roots; t++) above[t] = -1, root[t] = t;
    }

    int path_length(int t) const { return written.starts[t + 1] - written.starts[t]; }

    // Before the rows of a level: where they stand. A path's first token is none of those that are attended to.
    void place_rows() {
        for (int r = 0; r < down.rows; r++) {
            places[r] = first + r;
            positions[r] = path_length(root[first + r]) + 1 + down.level;
        }
    }

    // Before the rows of the next level.
    void go_down() {
        const int behind = first + down.rows;
        for (int r = 0; r < down.next_rows; r++) {
            above[behind + r] = first + down.from[r];
            root[behind + r] = root[first + down.from[r]];
        }
        first = behind;
        features.swap(next);
        down.go_down();
    }

    Step step() {
        Step s = {};
        s.rows = s.verified = down.rows, s.longest = longest;
        s.tokens = down.tokens.data(), s.positions = positions.data(), s.slots = places.data();
        s.cos[0] = written.cos, s.sin[0] = written.sin;
        s.hidden = hidden.data(), s.logits = logits.data(), s.x = x.data(), s.qkv = qkv.data(), s.wide = wide.data();
        s.act = {steps.data(), groups.data()};
        return s;
    }
};

// What the first layer reads: a token's embedding and its feature side by side, each at its norm's scale.
inline void read_row(const Eagle3& e, const Layer& layer, int64_t token, const float* feature, float* wide) {
    const Model& m = e.model;
    for (int i = 0; i < m.hidden; i += LANES)
        store(wide + i, embedded(m.table, m.table_kind, token * m.hidden + i) * m.embedding_scale);
    rms_norm(wide, layer.attention_norm, m.hidden, m.eps, wide);
    rms_norm(feature, e.hidden_norm, m.hidden, m.eps, wide + m.hidden);
}

struct Eagle3Pass : LayerPass<FloatCache> {
    const Eagle3Draft& d;
    const Pool& written;  // the layer's

    void run_first() {
        read();
        project();
        attend_down();
        finish();
    }
    void run_next() {
        normalise(layer.attention_norm, layer.qkv, s.wide);
        project();
        attend_down();
        finish();
    }

    void read() {
        const int H = m.hidden;
        for (int r = rows.first; r < rows.last; r++) {
            float *wide = s.wide + (size_t)r * inputs, *x = s.x + (size_t)r * H;
            const float* feature = d.features.data() + (size_t)r * H;
            read_row(d.e, layer, s.tokens[r], feature, wide);
            std::memcpy(x, d.e.norm_before_residual ? wide + H : feature, sizeof(float) * H);
            prepare(layer.qkv, wide, inputs, r, s.act);
        }
        barrier.wait();
    }

    // A row's path through the KV pool, then through the draft's own: both in `path`. Returns the length of the first.
    int path(int row, int32_t* path, int* whole) const {
        const int t = d.root[d.first + row], length = d.path_length(t), depth = d.down.level + 1;
        std::memcpy(path, d.written.slots + d.written.starts[t], sizeof(int32_t) * length);
        *whole = length + depth;
        for (int place = d.first + row, i = *whole - 1; i >= length; i--, place = d.above[place]) path[i] = place;
        return length;
    }

    void attend_down() {
        const Heads& h = m.heads;
        const int group = h.heads / h.kv_heads;
        const Share tasks = share(s.rows * h.kv_heads);
        int32_t* slots = blocks.paths.data();
        float* weights = blocks.weights.data();
        for (int task = tasks.first; task < tasks.last; task++) {
            const int kv = task / s.rows, row = task % s.rows;
            int whole;
            const int length = path(row, slots, &whole);
            const Places above{slots, 0, length, s.longest, weights, length};
            const Places drafted{slots, length, whole, s.longest, weights, whole};
            const FloatCache kept(h, written, kv), own(h, layer.pool, kv);
            const float* queries = s.qkv + (size_t)row * width + kv * group * dim;
            float* out = s.wide + (size_t)row * q_width + kv * group * dim;
            over_heads(group, [&](int head, auto count) {
                kept.template score<count>(queries + head * dim, above.of_head(head));
                own.template score<count>(queries + head * dim, drafted.of_head(head));
            });
            for (int g = 0; g < group; g++) softmax(weights + (size_t)g * s.longest, whole);
            over_heads(group, [&](int head, auto count) {
                if (length) kept.template mix<count>(above.of_head(head), out + head * dim);
                own.template mix<count>(drafted.of_head(head), out + head * dim);
            });
        }
        barrier.wait();
    }
};

inline void propose_level(Eagle3Draft& d, Blocks& blocks, Barrier& barrier, Clock& clock) {
    const Eagle3& e = d.e;
    const Model& m = e.model;
    const Step s = d.step();
    for (int l = 0; l < m.layers; l++) {
        Layer layer = m.layer[l];
        layer.pool = d.pools[l];
        Eagle3Pass pass{{m, layer, s, blocks, barrier, clock, l ? m.hidden : 2 * m.hidden}, d, d.written.pools[l]};
        if (l)
            pass.run_next();
        else
            pass.run_first();
    }
    const Share rows = share(s.rows);
    for (int r = rows.first; r < rows.last; r++) {
        float* out = s.hidden + (size_t)r * m.hidden;
        rms_norm(s.x + (size_t)r * m.hidden, m.norm, m.hidden, m.eps, out);
        prepare(m.unembedding, out, m.hidden, r, s.act);
    }
    barrier.wait();
    const int width = e.vocabulary;
    multiply(m.unembedding, rows_for(m.unembedding, s.hidden, m.hidden, s.act), s.rows, s.logits, width, width);
    barrier.wait();
    if (m.logit_scale == 1) return;
    for (int i = rows.first * width; i < rows.last * width; i++) s.logits[i] *= m.logit_scale;
}

inline void propose(const Eagle3& e, const Tree& tree, const Written& written, const int64_t* roots, int count,
                    float least, const Drafted& out, int threads) {
    Descent down(tree, roots, count);
    Eagle3Draft d(e, written, down);
    Barrier barrier;
#pragma omp parallel num_threads(threads)
    {
        const int H = e.model.hidden;
        Clock clock{nullptr};
        Blocks blocks(e.model.heads, 1, d.longest);
        for (int level = 0; level < tree.levels; level++) {
            if (!omp_get_thread_num()) d.place_rows();
            barrier.wait();
            if (down.rows) {
                propose_level(d, blocks, barrier, clock);
                down.look(d.logits.data(), e.vocabulary);
                barrier.wait();
            }
            down.choose(least, e.token_map, out, barrier);
            const Share rows = share(down.next_rows);
            const std::vector<float>& made = e.norm_output ? d.hidden : d.x;
            for (int r = rows.first; r < rows.last; r++)
                std::memcpy(d.next.data() + (size_t)r * H, made.data() + (size_t)down.from[r] * H, sizeof(float) * H);
            barrier.wait();
            if (!omp_get_thread_num()) d.go_down();
            barrier.wait();
        }
    }
}

// Keeps what drafts read of new rows, features, keys and values, for a drafter of one layer: nobody reads more of it.
inline void keep_rows(const Eagle3& e, const NewRows& n, int threads) {
    const Model& m = e.model;
    const size_t rows = n.rows, H = m.hidden, all = (size_t)e.states * e.target, widest = std::max(all, 2 * H);
    const size_t width = (size_t)(m.heads.heads + 2 * m.heads.kv_heads) * m.heads.head_dim;
    std::vector<float> wide(rows * widest), fused(rows * H), qkv(rows * width);
    const size_t padded = widest / GROUP_INPUTS + 1;
    std::vector<int8_t> steps(rows * padded * GROUP_INPUTS * sizeof(float));
    std::vector<Group> groups(rows * padded);
    Layer layer = m.layer[0];
    layer.pool = n.pool;
    Step s = {};
    s.rows = n.rows, s.positions = n.positions, s.slots = n.slots, s.cos[0] = n.cos, s.sin[0] = n.sin;
    s.qkv = qkv.data(), s.wide = wide.data(), s.act = {steps.data(), groups.data()};
    Barrier barrier;
#pragma omp parallel num_threads(threads)
    {
        const Share mine = share(n.rows);
        for (int r = mine.first; r < mine.last; r++) {
            const float* states = n.states + r * all;
            float* x = wide.data() + r * all;
            if (e.input_norm)
                rms_norm(states, e.input_norm, all, m.eps, x);
            else
                std::memcpy(x, states, sizeof(float) * all);
            for (int i = 0; e.state_norms && i < e.states; i++)
                rms_norm(x + i * e.target, e.state_norms + i * e.target, e.target, m.eps, x + i * e.target);
            if (e.fc.panels) prepare(e.fc, x, all, r, s.act);
        }
        barrier.wait();
        if (e.fc.panels) {
            multiply(e.fc, rows_for(e.fc, wide.data(), all, s.act), n.rows, fused.data(), H, H);
            barrier.wait();
        }
        const float* made = e.fc.panels ? fused.data() : wide.data();
        for (int r = mine.first; r < mine.last; r++)
            std::memcpy(n.features + n.slots[r] * H, made + r * H, sizeof(float) * H);
        barrier.wait();  // a row's parent may be one of these
        const std::vector<float> nothing(H);
        for (int r = mine.first; r < mine.last; r++) {
            float* x = wide.data() + r * 2 * H;
            read_row(e, layer, n.tokens[r], n.parents[r] < 0 ? nothing.data() : n.features + n.parents[r] * H, x);
            prepare(layer.qkv, x, 2 * H, r, s.act);
        }
        barrier.wait();
        Clock clock{nullptr};
        Blocks blocks(m.heads, 1, 1);
        LayerPass<FloatCache>{m, layer, s, blocks, barrier, clock, (int)(2 * H)}.project();
        release_tiles();
    }
}

}  // namespace mapar
